"""The bot on Kafka: its pieces, without a broker, on librdkafka's mock cluster, on a real Kafka."""
import collections
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import zlib

from support import CACHE, HERE, PATIENCE, Case, Program, installed, needs, until

import echo_bot        # support has put the project's folder on the path.

KAFKA_JARS = os.path.join(CACHE, "kafka")
# What the tests' own environment may not bring in.
KAFKA_NAMES = ("KAFKA_", "BOT_", "TELEGRAM_", "SIDECAR_URL", "CONCURRENCY")


def needs_kafka(thing):
    """Decorate a test of a real Apache Kafka, to which the test speaks with confluent-kafka;
    .ci/run installs both."""
    jars = os.path.isdir(KAFKA_JARS) and any(name.startswith("kafka_2")
                                             for name in os.listdir(KAFKA_JARS))
    return needs("Apache Kafka (jars, a JDK, confluent-kafka)",
                 jars and shutil.which("java") and installed("confluent_kafka"))(thing)


def lasting_ports(count):
    """Return ports for a broker, which must know them before it starts and find them free after a
    restart.

    They are below those that the kernel hands out, to a client's connection say.
    """
    ports = set()
    while len(ports) < count:
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", random.randrange(10000, 32768)))
                ports.add(one.getsockname()[1])
            except OSError:
                pass
    return list(ports)


def kafka_class(name, *argv, java=(), **options):
    """Start a class of Kafka's jars as a process."""
    return Program("java", "-Xmx512m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", *java,
                   "-cp", os.path.join(KAFKA_JARS, "*"), name, *argv, **options)


def update_of(number, chat=1, text=None):
    return {"update_id": number,
            "message": {"message_id": number, "date": 0, "chat": {"id": chat, "type": "private"},
                        "text": text or "m%d" % number}}


def envelope(number, chat=1, bot_id="b1", text=None):
    """Return the record with which the platform hands the bot an update."""
    return json.dumps({"bot_id": bot_id, "update": update_of(number, chat, text)}).encode()


class KafkaNode:
    """A real Kafka, broker and controller in one. `voters` of several nodes: {number: port of its
    controller}."""

    def __init__(self, number=1, voters=None, certificate=None, **settings):
        self.folder, self.number, self.program = tempfile.mkdtemp(), number, None
        names = ["PLAINTEXT", "PROXIED"]
        names += ["SSL", "SASL_PLAINTEXT", "SASL_SSL"] if certificate else []
        ports = lasting_ports(len(names) + 1)
        self.voters = voters or {number: ports.pop()}
        self.ports = dict(zip(names, ports))
        self.proxy = Proxy(self.ports["PROXIED"])
        config = dict(self._listeners(), **{
            "log.dirs": os.path.join(self.folder, "data"),
            "offsets.topic.num.partitions": 3, "offsets.topic.replication.factor": len(self.voters),
            "transaction.state.log.num.partitions": 1, "transaction.state.log.min.isr": 1,
            "transaction.state.log.replication.factor": len(self.voters),
            "group.initial.rebalance.delay.ms": 300,
            # Its 5 ms a commit are the most of a run's time.
            "group.coordinator.append.linger.ms": 0})
        config.update(self._security(certificate) if certificate else {}, **settings)
        self.config = os.path.join(self.folder, "server.properties")
        with open(self.config, "w") as file:
            file.write("".join("%s=%s\n" % item for item in config.items()))
        self.run("kafka.tools.StorageTool", "format", "--cluster-id", "c2lkZWNhcnRlc3RrYWZrYQ",
                 "--config", self.config, "--add-scram",
                 "SCRAM-SHA-256=[name=bot,password=PASSWORD-1]", "--add-scram",
                 "SCRAM-SHA-512=[name=bot,password=PASSWORD-1]")
        self.start()

    def _listeners(self):
        """Return the settings about the node's ports and the cluster that it is in."""
        listeners = ["%s://127.0.0.1:%d" % item for item in self.ports.items()]
        listeners.append("CONTROLLER://127.0.0.1:%d" % self.voters[self.number])
        advertised = ["%s://localhost:%d" % (name, self.proxy.port if name == "PROXIED" else port)
                      for name, port in self.ports.items()]
        protocols = ["%s:%s" % (name, "PLAINTEXT" if name == "PROXIED" else name)
                     for name in self.ports]
        return {"process.roles": "broker,controller", "node.id": self.number,
                "listeners": ",".join(listeners), "advertised.listeners": ",".join(advertised),
                "controller.listener.names": "CONTROLLER",
                "listener.security.protocol.map": ",".join(protocols + ["CONTROLLER:PLAINTEXT"]),
                "inter.broker.listener.name": "PLAINTEXT",
                "controller.quorum.voters": ",".join("%d@127.0.0.1:%d" % voter
                                                     for voter in self.voters.items())}

    def _security(self, certificate):
        """Return the settings about TLS, logins and rights."""
        config = {
            "ssl.keystore.type": "PEM", "ssl.keystore.location": certificate,
            "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512",
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:ANONYMOUS", "allow.everyone.if.no.acl.found": "true"}
        for name in ("sasl_plaintext", "sasl_ssl"):
            for mechanism, module in (
                    ("plain", 'plain.PlainLoginModule required user_bot="PASSWORD-1"'),
                    ("scram-sha-256", "scram.ScramLoginModule required"),
                    ("scram-sha-512", "scram.ScramLoginModule required")):
                config["listener.name.%s.%s.sasl.jaas.config" % (name, mechanism)] = \
                    "org.apache.kafka.common.security.%s;" % module
        return config

    @property
    def address(self):
        return "localhost:%d" % self.ports["PLAINTEXT"]

    def run(self, name, *argv, **options):
        """Run one of Kafka's tools to its end; return what it printed."""
        tool = kafka_class(name, *argv, **options)
        try:
            if tool.wait():
                raise AssertionError("%s:\n%s" % (name, tool.log))
            return tool.log
        finally:
            tool.kill()

    def start(self):
        self.program = kafka_class("kafka.Kafka", self.config)

    def stop(self, number=signal.SIGTERM):
        self.program.signal(number)
        self.program.wait()
        self.program.kill()

    def remove(self):
        self.proxy.close()
        self.program.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


def wait_for_kafka(*nodes):
    """Wait until all nodes of a cluster are up, and every group has a coordinator that serves."""
    from confluent_kafka import Consumer, KafkaException, TopicPartition
    from confluent_kafka.admin import AdminClient
    admin = AdminClient(
        {"bootstrap.servers": ",".join(node.address for node in nodes), "log_level": 0})

    def up():
        for node in nodes:
            if node.program.process.poll() is not None:
                raise AssertionError("Kafka has ended:\n" + node.program.log)
        try:
            return len(admin.list_topics(timeout=2).brokers) == len(nodes)
        except KafkaException:
            return False
    until(up, "Kafka is up")

    def coordinated(consumer):
        try:
            return consumer.committed([TopicPartition("none", 0)], timeout=2)
        except KafkaException:
            return False
    for group in "abc":         # one for each partition of the topic that holds the offsets
        consumer = Consumer({"bootstrap.servers": nodes[0].address, "group.id": group,
                             "log_level": 0})
        until(lambda: coordinated(consumer), "a coordinator")       # noqa: B023
        consumer.close()


def report(case, sent, replies, seconds, concurrency=8):
    """Print a line of the table of runs, which is what people want to know of a bot that is said to
    lose nothing."""
    answered = len(replies.texts)
    print("\n%s, CONCURRENCY=%d: sent %d, answered %d, twice %d, lost %d, %.1f s" % (
        case.id().rsplit(".", 1)[1], concurrency, sent, answered,
        sum(replies.texts.values()) - answered, sent - answered, seconds), file=sys.stderr)


class Proxy:
    """A TCP proxy before a broker. `spoil`, where set, gets each piece of an answer and returns
    what to pass on; where that is shorter, the connection is cut after it. A connection that lay
    idle for `forgets_after` seconds, where set, passes nothing any more and stays open."""

    forgets_after = None

    def __init__(self, target):
        self.target, self.spoil, self.server = target, None, socket.socket()
        self.server.bind(("127.0.0.1", 0))
        self.server.listen(50)
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                client = self.server.accept()[0]
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        with client, socket.socket() as broker:
            try:
                broker.connect(("127.0.0.1", self.target))
            except OSError:
                return
            requests = threading.Thread(target=self._pass, args=(client, broker, False),
                                        daemon=True)
            requests.start()
            self._pass(broker, client, True)
            requests.join()

    def _pass(self, source, sink, answers):
        used_at, forgotten = time.monotonic(), False
        try:
            while True:
                data = source.recv(1 << 16)
                idle, used_at = time.monotonic() - used_at, time.monotonic()
                forgotten = forgotten or self.forgets_after and idle > self.forgets_after
                if forgotten and data:
                    continue
                passed = self.spoil(data) if answers and data and self.spoil else data
                sink.sendall(passed)
                if not data or len(passed) < len(data):
                    break
        except OSError:
            pass
        for end in (source, sink):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def close(self):
        self.server.close()


class KafkaCase(Case):
    """A test with brokers: `self.brokers` is their address list. Topics and groups are new in each
    test."""

    brokers, nodes = None, ()
    # What the bot runs before, for a broker that may take as long as it likes to answer.
    PATIENT = "import echo_bot; echo_bot.Connection.call.__defaults__ = (1000, True); "

    @classmethod
    def use(cls, *nodes):
        """Keep these brokers for the tests of the class, from when they serve until its last test
        is over."""
        cls.nodes, cls.brokers = nodes, ",".join(node.address for node in nodes)
        try:
            wait_for_kafka(*nodes)
        except BaseException:
            cls.tearDownClass()
            raise

    @classmethod
    def tearDownClass(cls):
        for node in cls.nodes:
            node.remove()

    def setUp(self):
        self.name = self.id().rsplit(".", 1)[1] + "-%08x" % random.getrandbits(32)
        self.incoming, self.outgoing, self.group = self.name + "-in", self.name + "-out", self.name

    def producer(self, **settings):
        from confluent_kafka import Producer
        return Producer(
            dict({"bootstrap.servers": self.brokers, "enable.idempotence": True, "log_level": 0},
                 **settings))

    def admin(self):
        from confluent_kafka.admin import AdminClient
        return AdminClient({"bootstrap.servers": self.brokers, "log_level": 0})

    def consumer(self, group=None, **settings):
        from confluent_kafka import Consumer
        consumer = Consumer(dict({
            "bootstrap.servers": self.brokers, "group.id": group or "reader-" + self.name,
            "log_level": 0,
            "auto.offset.reset": "earliest", "enable.auto.commit": False}, **settings))
        self.addCleanup(consumer.close)
        return consumer

    def topics(self, replicas=1, **partitions):
        """Create topics: in=6 creates self.incoming with 6 partitions."""
        from confluent_kafka.admin import NewTopic
        names = {"incoming": self.incoming, "outgoing": self.outgoing}
        admin = self.admin()        # its end would be the end of what it does
        topics = [NewTopic(names.get(name, name), count, replicas)
                  for name, count in partitions.items()]
        for future in admin.create_topics(topics).values():
            future.result()

    def write(self, records, topic=None, **settings):
        """Write records with librdkafka: dicts for Producer.produce."""
        producer = self.producer(**settings)
        for record in records:
            while True:
                try:
                    producer.produce(topic or self.incoming, **record)
                    break
                except BufferError:
                    producer.poll(0.1)
            producer.poll(0)
        self.assertEqual(producer.flush(PATIENCE), 0)

    def updates(self, count, chats=50, first=0):
        return [dict(key=str(number % chats), value=envelope(number, number % chats))
                for number in range(first, first + count)]

    def bot(self, code="", **env):
        """Start the bot. `code` runs before, with echo_bot.py's folder on the path."""
        clean = {name: None for name in os.environ if name.startswith(KAFKA_NAMES)}
        settings = dict(clean, KAFKA_BROKERS=self.brokers, KAFKA_INCOMING_TOPIC=self.incoming,
                        BOT_ID="b1", KAFKA_OUTGOING_TOPIC=self.outgoing,
                        KAFKA_CONSUMER_GROUP=self.group, BOT_TOKEN="123:TEST-TOKEN")
        settings.update(env)
        command = [os.path.join(HERE, "echo_bot.py")]
        if code:
            command = ["-c", "import os, sys; sys.path.insert(0, %r); %s"
                             "os._exit(echo_bot.main(os.environ))" % (HERE, code)]
        return self.program(sys.executable, *command, env=settings)

    def source(self, **env):
        """Return a Kafka source of echo_bot.py inside the test, and the object that stops it."""
        settings = dict(KAFKA_BROKERS=self.brokers, KAFKA_INCOMING_TOPIC=self.incoming,
                        BOT_TOKEN="123:TEST-TOKEN", KAFKA_OUTGOING_TOPIC=self.outgoing,
                        KAFKA_CONSUMER_GROUP=self.group)
        settings.update(env)
        stopping = echo_bot.Stopping()
        source = echo_bot.Kafka(settings, stopping)
        self.addCleanup(source.close)
        return source, stopping

    def end(self, *bots):
        """SIGTERM bots, which have to end with status 0 and to have kept the token to
        themselves."""
        for bot in bots:
            bot.signal(signal.SIGTERM)
        for bot in bots:
            self.assertEqual(bot.wait(), 0, bot.log)
            self.assertNotIn("TEST-TOKEN", bot.log)
            self.assertNotIn("Traceback", bot.log)

    def lag(self, partitions, group=None):
        """Return how far a group's committed offsets are behind the ends of the incoming topic, as
        KEDA sees it."""
        from confluent_kafka import TopicPartition
        consumer = self.consumer(group or self.group)
        parts = [TopicPartition(self.incoming, index) for index in range(partitions)]
        return sum(consumer.get_watermark_offsets(part, timeout=PATIENCE)[1] - max(part.offset, 0)
                   for part in consumer.committed(parts, timeout=PATIENCE))


class Replies:
    """What is in a topic, read from its start by librdkafka as it comes: each record, and how often
    each text came."""

    def __init__(self, case, topic=None):
        from confluent_kafka import OFFSET_BEGINNING, TopicPartition
        self.consumer, self.records, self.texts = case.consumer(), [], collections.Counter()
        topic = topic or case.outgoing

        def partitions():
            return self.consumer.list_topics(topic, timeout=PATIENCE).topics[topic].partitions
        indexes = until(partitions, topic)
        self.consumer.assign([TopicPartition(topic, index, OFFSET_BEGINNING) for index in indexes])
        self.next_offsets = dict.fromkeys(indexes, 0)

    def read(self, count, tick=lambda: None):
        """Read until there are `count` different texts, with tick() now and then; PATIENCE is for
        each to come."""
        last = time.monotonic()
        while len(self.texts) < count:
            if self.read_some():
                last = time.monotonic()
            tick()
            if time.monotonic() - last > PATIENCE:
                raise AssertionError("%d of %d replies" % (len(self.texts), count))
        return self

    def rest(self):
        """Read what there is beyond, up to the ends of the partitions."""
        ends = {part.partition: self.consumer.get_watermark_offsets(part, timeout=PATIENCE)[1]
                for part in self.consumer.assignment()}
        until(lambda: not self.read_some()
              and all(self.next_offsets[index] >= end for index, end in ends.items()),
              "the end of the replies")
        return self

    def read_some(self):
        """Read what has come; return how many records."""
        records = [record for record in self.consumer.consume(500, timeout=0.2)
                   if not record.error()]
        for record in records:
            self._take(record)
        return len(records)

    def _take(self, record):
        self.records.append(record)
        self.next_offsets[record.partition()] = record.offset() + 1
        try:
            self.texts[json.loads(record.value())["params"]["text"]] += 1
        except (ValueError, TypeError, KeyError, RecursionError):
            self.texts[record.value()] += 1


class TestKafkaPieces(unittest.TestCase):
    """What needs no broker: the codec, the batches, the partitioner, the assignor, the settings."""

    @classmethod
    def setUpClass(cls):
        cls.bot = echo_bot

    def test_checksum(self):
        for data, crc in ((b"", 0), (b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA),
                          (b"\xff" * 32, 0x62A8AB43)):
            self.assertEqual(self.bot.crc32c(data), crc)        # RFC 3720, B.4

    def test_partitioner(self):
        for key, number in ((b"21", -973932308), (b"foobar", -790332482),
                            (b"a-little-bit-long-string", -985981536),
                            (b"a-little-bit-longer-string", -1486304829), (b"abc", 479470107),
                            (b"", 275646681),
                            (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971)):
            self.assertEqual(self.bot.murmur2(key), number & 0x7FFFFFFF)

    def test_assignor(self):
        shares = self.bot.assign_ranges({"b": ["t"], "a": ["t"], "c": ["t", "u"], "d": ["v"]},
                                        {"t": 7, "u": 2, "v": 0})
        self.assertEqual(
            shares, {"a": {"t": [0, 1, 2]}, "b": {"t": [3, 4]}, "c": {"t": [5, 6], "u": [0, 1]},
                     "d": {"v": []}})
        shares = self.bot.assign_ranges({"a": ["t"], "b": ["t"], "c": ["t"]}, {"t": 2})
        self.assertEqual(shares, {"a": {"t": [0]}, "b": {"t": [1]}, "c": {"t": []}})

    def value_of(self, schema, chance):
        """Return a random value that a schema describes."""
        if isinstance(schema, dict):
            return {name: self.value_of(kind, chance) for name, kind in schema.items()}
        if isinstance(schema, list):
            return [self.value_of(schema[0], chance) for _ in range(chance.randrange(4))]
        if schema in (self.bot.STRING, self.bot.BYTES):
            text = "".join(chance.choice("ab\u00e9\U0001f600") for _ in range(chance.randrange(9)))
            return chance.choice((None, text if schema == self.bot.STRING else text.encode()))
        bits = 8 * struct.calcsize(">" + schema)
        if schema == self.bot.BOOLEAN:
            return bool(chance.getrandbits(1))
        return chance.getrandbits(bits) - (1 << bits - 1)

    def test_what_is_encoded_is_decoded(self):
        chance = random.Random(1)
        for name, (_, _, request, answer) in self.bot.APIS.items():
            for schema in (request, answer):
                for _ in range(20):
                    value = self.value_of(schema, chance)
                    decoder = self.bot.Decoder(self.bot.encode(schema, value))
                    self.assertEqual(decoder.value(schema), value, name)
                    self.assertEqual(decoder.position, len(decoder.data))
        for number in (0, 1, -1, 63, 64, -64, -65, 1 << 31, (1 << 63) - 1, -(1 << 63)):
            self.assertEqual(self.bot.Decoder(self.bot.varint(number)).varint(), number)

    def test_random_bytes_are_an_error_each_time(self):
        chance, outcomes = random.Random(2), collections.Counter()
        for _, _, _, answer in self.bot.APIS.values():
            for round_number in range(300):
                data = bytearray(self.bot.encode(answer, self.value_of(answer, chance)))
                if round_number % 2:
                    data = bytearray(chance.getrandbits(8) for _ in range(chance.randrange(200)))
                for _ in range(chance.randrange(1, 4)):
                    if data:
                        data[chance.randrange(len(data))] = chance.choice((0, 127, 128, 255))
                try:
                    self.bot.Decoder(bytes(data[:chance.randrange(len(data) + 1)])).value(answer)
                    outcomes["value"] += 1
                except self.bot.Malformed:
                    outcomes["error"] += 1
        self.assertGreater(outcomes["error"], 1000)

    def batch(self, records, base=0, attributes=0, producer=-1, data=None, count=None):
        """Return a record batch of (key, value) records, each with a header; `data` takes their
        place."""
        body = b"".join(self.bot.varint(len(record)) + record for record in (
            b"\0\0" + self.bot.varint(delta)
            + b"".join(b"\x01" if part is None else self.bot.varint(len(part)) + part
                       for part in record) + b"\x02\x02h\x01"
            for delta, record in enumerate(records)))
        body = body if data is None else data
        checked = struct.pack(">hiqqqhii", attributes, len(records) - 1, 0, 0, producer, 0, 0,
                              len(records) if count is None else count) + body
        return struct.pack(">qiibI", base, len(checked) + 9, 0, 2,
                           self.bot.crc32c(checked)) + checked

    def read(self, data, aborted=()):
        aborted = [dict(producer_id=producer, first_offset=offset) for producer, offset in aborted]
        return list(self.bot.decode_batches(data, aborted, "t"))

    def test_batches(self):
        mine = self.bot.encode_batch(b"k", b"v", 7, 0, 1)
        self.assertEqual(self.read(mine), [(1, [(0, b"k", b"v")])])
        self.assertEqual(self.read(self.bot.encode_batch(None, None, -1, -1, -1)),
                         [(1, [(0, None, None)])])
        two = self.batch([(b"a", b"1"), (None, b""), (b"", None)], base=5)
        records = [(5, b"a", b"1"), (6, None, b""), (7, b"", None)]
        self.assertEqual(self.read(two), [(8, records)])
        self.assertEqual(self.read(two + mine[:30]), [(8, records)], "the last may be cut short")
        self.assertEqual(self.read(two + mine[:-1]), [(8, records)])

    def test_transactions_in_batches(self):
        abort, commit = (b"\0\0\0\0", b"\0\0"), (b"\0\0\0\1", b"\0\0")
        log = b"".join((
            self.batch([(None, b"a0")], 0, 16, producer=1),
            self.batch([(None, b"b0")], 1, 16, producer=2),
            self.batch([(None, b"plain")], 2), self.batch([abort], 3, 48, producer=1),
            self.batch([(None, b"a1")], 4, 16, producer=1), self.batch([commit], 5, 48, producer=2),
            self.batch([commit], 6, 48, producer=1)))
        found = [record[2] for _, records in self.read(log, [(1, 0)]) for record in records]
        self.assertEqual(found, [b"b0", b"plain", b"a1"])
        self.assertEqual(self.read(log, [(1, 0)])[-1], (7, []))

    def test_corrupt_batches_are_errors(self):
        good = self.batch([(b"key", b"value")] * 3)
        for place in range(12, len(good)):
            for bit in range(8):
                data = bytearray(good)
                data[place] ^= 1 << bit
                # Before the checksum lie the leader's epoch, which nobody reads, and the format.
                if place >= 17:
                    self.assertRaises(self.bot.Malformed, self.read, bytes(data))
        gzip = zlib.compressobj(9, zlib.DEFLATED, 31)
        packed = gzip.compress(b"\0" * 100) + gzip.flush()
        for data in (packed[:-3], b"no gzip", b"", packed):
            self.assertRaises(self.bot.Malformed, self.read,
                              self.batch([(None, b"")], attributes=1, data=data))

    def test_rubbish_is_an_error_or_no_records(self):
        good, chance = self.batch([(b"key", b"value")] * 3), random.Random(3)
        for _ in range(3000):           # rubbish that is said to be compressed
            data = bytearray(chance.getrandbits(8) for _ in range(chance.randrange(60)))
            head = chance.choice((b"", b"\x82SNAPPY\0", b"\x04\x22\x4d\x18\x40\x40?"))
            for codec in 1, 2, 3:
                try:
                    self.read(self.batch([(None, b"")], attributes=codec, data=head + bytes(data)))
                except self.bot.Malformed:
                    pass
        for _ in range(2000):           # a right checksum over rubbish
            data = bytearray(good[61:])
            data[chance.randrange(len(data))] = chance.getrandbits(8)
            try:
                self.read(self.batch([(None, b"")] * 3, data=bytes(data),
                                     count=chance.choice((3, 4, 1 << 30))))
            except self.bot.Malformed:
                pass
            try:
                self.read(bytes(chance.getrandbits(8) for _ in range(chance.randrange(300))))
            except (self.bot.Malformed, self.bot.Refused):
                pass

    def test_what_is_done_is_committed_in_order_and_told_beyond(self):
        partition = self.bot.Partition(0, 5, "done:1")
        self.assertEqual(partition.progress(), (5, {6}))
        partition.fill(6, [(5, None, b"")])
        partition.records.clear()
        partition.in_hand.add(5)
        self.assertEqual(partition.progress(), (5, {6}))
        partition.in_hand.clear()
        partition.done.add(5)
        self.assertEqual(partition.progress(), (6, {6}), "6 is not fetched, but known to be done")
        partition.fill(8, [(6, None, b""), (7, None, b"")])
        self.assertEqual([record[0] for record in partition.records], [7])
        self.assertEqual(partition.progress(), (7, set()))
        for metadata in (None, "", "done:", "done:,", "done:x", "of another client"):
            self.assertEqual(self.bot.Partition(0, 5, metadata).progress(), (5, set()))
        self.assertIsNone(self.bot.Partition(0, -1, None).progress())

    def test_snappy_and_lz4(self):
        # By hand, after the formats' descriptions: literals, copies of each kind, overlaps.
        block = bytes([20, 3 << 2]) + b"abcd" + bytes([1 | 1 << 2, 4, 2 | 10 << 2, 1, 0])
        self.assertEqual(self.bot.unsnappy(block), b"abcdabcda" + b"a" * 11)
        self.assertEqual(self.bot.unsnappy(b"\x82SNAPPY\0" + bytes(8) + 2 * (
            struct.pack(">i", len(block)) + block)), 2 * (b"abcdabcda" + b"a" * 11))
        long = bytes(range(256)) * 2
        self.assertEqual(self.bot.unsnappy(b"\x84\x04" + bytes([61 << 2]) + struct.pack(
            "<H", 511) + long + bytes([3 | 3 << 2]) + struct.pack("<I", 512)), long + long[:4])
        block = bytes([4 << 4 | 15]) + b"abcd" + bytes([4, 0, 255, 6, 1 << 4]) + b"z"
        for flags in 0x40, 0x60, 0x78, 0x54, 0x49:
            frame = (b"\x04\x22\x4d\x18" + bytes([flags, 0x40]) + bytes(8 * (flags >> 3 & 1))
                     + bytes(4 * (flags & 1)) + b"?")
            for word, data in (len(block), block), (1 << 31 | 3, b"end"):
                frame += struct.pack("<I", word) + data + bytes(4 * (flags >> 4 & 1))
            frame += bytes(4 + 4 * (flags >> 2 & 1))
            self.assertEqual(self.bot.unlz4(2 * frame), 2 * (b"abcd" * 71 + b"z" + b"end"))

    @needs("kafka-python", installed("kafka"))
    def test_error_codes_have_the_names_that_others_give_them(self):
        from kafka.errors import kafka_errors
        for code, (name, _) in self.bot.ERRORS.items():
            if code not in (-1, 6, 10, 17):         # it has older names for these
                self.assertEqual(name.split(" ")[0], kafka_errors[code].message)
        error = self.bot.KafkaError(12345, "a call")
        self.assertEqual((str(error), error.action), ("a call: Kafka's error 12345", self.bot.TRY))

    def test_bots_that_are_killed_at_random_repeat_only_what_was_in_hand(self):
        chance = random.Random(6)
        for _ in range(100):
            times, committed, repeats, end = collections.Counter(), (-1, None), 0, 60
            while committed != (end, None):
                partition = self.bot.Partition(0, *committed)
                partition.position = partition.position or 0
                for _ in range(chance.choice((5, 50, 500))):
                    if chance.random() < 0.3 and partition.position < end:
                        after = min(end, partition.position + chance.randrange(1, 9))
                        partition.fill(after, [(offset, None, b"")
                                               for offset in range(partition.position, after)])
                    if partition.records and len(partition.in_hand) < 8:
                        partition.in_hand.add(partition.records.popleft()[0])
                    if partition.in_hand and chance.random() < 0.8:
                        offset = chance.choice(sorted(partition.in_hand))
                        partition.in_hand.discard(offset)
                        partition.done.add(offset)
                        times[offset] += 1
                    if chance.random() < 0.7:
                        mark, done = partition.progress()
                        committed = mark, "done:" + ",".join(
                            str(offset - mark) for offset in done) if done else None
                    told = self.bot.Partition(0, *committed)
                repeats += sum(1 for offset in times if not (
                    told.progress() and (offset < told.progress()[0] or offset in told.done)))
            self.assertEqual(sorted(times), list(range(end)), "nothing is lost")
            self.assertLessEqual(sum(times.values()) - end, repeats)

    def test_a_broker_must_know_the_password_too(self):
        connection = self.bot.Connection.__new__(self.bot.Connection)
        connection.name, answers = "broker:9092", []

        def call(api, request):
            nonce = request["data"].rpartition(b"r=")[2] if not answers else b""
            answers.append(challenge % nonce if not answers else b"v=bm8=")
            return {"data": answers[-1]}
        connection.call = call
        for challenge, error in (       # noqa: B007, since call() uses the challenge.
                (b"r=%s-more,s=c2FsdA==,i=4096", self.bot.Refused),
                (b"%s", self.bot.Malformed),
                (b"r=x%s,s=c2FsdA==,i=4096", self.bot.Malformed),
                (b"r=%s-more,s=c2FsdA==,i=99999999", self.bot.Malformed),
                (b"r=%s-more,s=c2FsdA==,i=1", self.bot.Malformed)):
            self.assertRaises(error, connection._scram, "sha256", "user", "password")
            answers.clear()

    def test_settings(self):
        good = dict(KAFKA_BROKERS="a:1, [::1]:2", KAFKA_INCOMING_TOPIC="i",
                    KAFKA_OUTGOING_TOPIC="o", KAFKA_CONSUMER_GROUP="g", BOT_TOKEN="123:TEST-TOKEN")
        self.assertEqual(self.bot.kafka_settings(good).brokers, [("a", 1), ("::1", 2)])
        sasl = dict(KAFKA_SECURITY_PROTOCOL="SASL_SSL", KAFKA_SASL_USERNAME="u",
                    KAFKA_SASL_PASSWORD="TEST-TOKEN")
        self.bot.kafka_settings(dict(good, **sasl))
        for name, env in [(name, {name: ""}) for name in good] + [
                ("KAFKA_BROKERS", {"KAFKA_BROKERS": "a"}),
                ("KAFKA_BROKERS", {"KAFKA_BROKERS": "a:0"}),
                ("KAFKA_BROKERS", {"KAFKA_BROKERS": "a:1,"}),
                ("KAFKA_BROKERS", {"KAFKA_BROKERS": "a:70000"}),
                ("KAFKA_SECURITY_PROTOCOL", {"KAFKA_SECURITY_PROTOCOL": "TLS"}),
                ("KAFKA_SASL_MECHANISM", dict(sasl, KAFKA_SASL_MECHANISM="GSSAPI")),
                ("KAFKA_SASL_PASSWORD", dict(sasl, KAFKA_SASL_PASSWORD="")),
                ("KAFKA_SASL_MECHANISM", dict(sasl, KAFKA_SASL_MECHANISM="OAUTHBEARER")),
                ("KAFKA_SASL_MECHANISM", dict(sasl, KAFKA_SASL_MECHANISM="AWS_MSK_IAM")),
                ("KAFKA_BROKERS", {"KAFKA_BROKERS": "user:TEST-TOKEN@a:1"}),
                ("KAFKA_BROKERS", {"KAFKA_BROKERS": "kafka://a:1"}),
                ("KAFKA_SSL_CAFILE",
                 {"KAFKA_SECURITY_PROTOCOL": "SSL", "KAFKA_SSL_CAFILE": "/nowhere"}),
                ("KAFKA_SSL_CERTFILE",
                 {"KAFKA_SECURITY_PROTOCOL": "SSL", "KAFKA_SSL_CERTFILE": __file__}),
                ("KAFKA_SSL_CERTFILE",
                 {"KAFKA_SECURITY_PROTOCOL": "SSL", "KAFKA_SSL_KEYFILE": "/nowhere"})]:
            with self.assertRaises(self.bot.ConfigError, msg=name) as caught:
                self.bot.kafka_settings(dict(good, **env))
            self.assertIn(name, str(caught.exception))
            self.assertNotIn("TEST-TOKEN", str(caught.exception))


class TestKafkaBot(Case):
    """The bot as a process, where there is no broker, or what is there is none."""

    def bot(self, port, **env):
        clean = {name: None for name in os.environ if name.startswith(KAFKA_NAMES)}
        settings = dict(clean, KAFKA_BROKERS="127.0.0.1:%d" % port, KAFKA_INCOMING_TOPIC="i",
                        KAFKA_OUTGOING_TOPIC="o", KAFKA_CONSUMER_GROUP="g",
                        BOT_TOKEN="123:TEST-TOKEN")
        settings.update(env)
        return self.program(sys.executable, os.path.join(HERE, "echo_bot.py"), env=settings)

    def serve(self, answer):
        """Answer each connection's first request with bytes, or let it wait when there are none;
        return the port."""
        server = socket.socket()
        server.bind(("127.0.0.1", 0))
        server.listen(5)
        self.addCleanup(server.close)
        connections = []

        def run():
            while True:
                try:
                    connection = server.accept()[0]
                except OSError:
                    return
                connections.append(connection)
                connection.recv(1000)
                connection.sendall(answer)
        threading.Thread(target=run, daemon=True).start()
        self.addCleanup(lambda: [connection.close() for connection in connections])
        return server.getsockname()[1], connections

    def test_a_wrong_variable_is_one_line_and_status_2(self):
        bot = self.bot(1, KAFKA_CONSUMER_GROUP=None)
        self.assertEqual(bot.wait(), 2)
        self.assertIn("KAFKA_CONSUMER_GROUP is not set", bot.lines[-1])

    def test_it_waits_for_brokers_that_are_away_and_heeds_sigterm(self):
        bot = self.bot(lasting_ports(1)[0])
        bot.wait_for("INFO .*refused.*trying again")        # it may be over in a moment
        bot.wait_for("WARNING .*refused.*trying again")
        bot.signal(signal.SIGTERM)
        self.assertEqual(bot.wait(), 0)

    def test_it_heeds_sigterm_while_a_broker_is_silent(self):
        port, connections = self.serve(b"")
        bot = self.bot(port)
        until(lambda: connections, "it connects")
        bot.signal(signal.SIGTERM)
        self.assertEqual(bot.wait(), 0)
        self.assertNotIn("has not answered", bot.log)   # not the 15 s that a broker has to answer

    def test_a_broker_too_old_is_named(self):
        bot = self.bot(self.serve(struct.pack(">iihihhhhhh", 22, 1, 0, 2, 0, 0, 2, 1, 0, 3))[0])
        self.assertEqual(bot.wait(), 1)
        self.assertRegex(bot.lines[-1],
                         r"127.0.0.1:\d+ is not a Kafka from 2.2 on.*Produce version 7")

    def test_rubbish_for_an_answer_is_an_error(self):
        for answer in (b"HTTP/1.1 400 Bad Request\r\n\r\n", struct.pack(">ii", 0x7FFFFFFF, 1),
                       struct.pack(">iihi", 10, 1, 0, -9),
                       struct.pack(">iihi", 10, 1, 0, 0x7FFFFFFF), struct.pack(">iih", 6, 1, 0)):
            bot = self.bot(self.serve(answer)[0])
            bot.wait_for("trying again")
            bot.signal(signal.SIGTERM)
            self.assertEqual(bot.wait(), 0, bot.log)
            self.assertNotIn("Traceback", bot.log)


@needs("confluent-kafka", installed("confluent_kafka"))
class TestKafkaMock(KafkaCase):
    """Against librdkafka's mock cluster: three brokers, so that leaders and the coordinator are on
    different ones."""

    @classmethod
    def setUpClass(cls):
        from confluent_kafka import Producer
        cls.cluster = Producer(
            {"bootstrap.servers": "mock", "test.mock.num.brokers": 3, "log_level": 0})
        brokers = until(lambda: len(cls.cluster.list_topics(timeout=PATIENCE).brokers) == 3
                        and cls.cluster.list_topics(timeout=PATIENCE).brokers,
                        "the mock cluster")
        cls.brokers = ",".join("%s:%d" % (broker.host, broker.port) for broker in brokers.values())

    @classmethod
    def tearDownClass(cls):
        cls.cluster = None

    def test_each_update_is_answered_once_over_several_brokers(self):
        self.write(self.updates(200))
        bot = self.bot()
        replies = Replies(self).read(200)
        self.end(bot)
        replies.rest()
        self.assertEqual(replies.texts,
                         collections.Counter({"Echo: m%d" % number: 1 for number in range(200)}))
        reply = json.loads(replies.records[0].value())
        self.assertEqual((reply["bot_token"], reply["method"]), ("123:TEST-TOKEN", "sendMessage"))
        for record in replies.records:
            self.assertEqual(record.key().decode(),
                             str(json.loads(record.value())["params"]["chat_id"]))


def make_certificates(folder):
    """Make a CA, and a certificate of it for `localhost` alone; return its file, with the key
    in it."""
    def openssl(*argv):
        subprocess.run(["openssl"] + list(argv), cwd=folder, check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for name in ("ca", "other"):
        openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
                "/CN=Test " + name, "-keyout", name + ".key", "-out", name + ".pem")
    with open(os.path.join(folder, "names"), "w") as file:
        file.write("subjectAltName=DNS:localhost\n")
    openssl("req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-keyout",
            "broker.key", "-out", "broker.csr")
    openssl("x509", "-req", "-in", "broker.csr", "-CA", "ca.pem", "-CAkey", "ca.key",
            "-CAcreateserial", "-days", "2", "-extfile", "names", "-out", "broker.crt")
    openssl("pkcs8", "-topk8", "-nocrypt", "-in", "broker.key", "-out", "broker.p8")
    path = os.path.join(folder, "broker.pem")
    with open(path, "w") as file:
        for name in ("broker.p8", "broker.crt"):
            with open(os.path.join(folder, name)) as part:
                file.write(part.read())
    return path


@needs_kafka
class TestKafka(KafkaCase):
    """Against a real Apache Kafka, one node in KRaft mode."""

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp()
        cls.authority = os.path.join(cls.folder, "ca.pem")
        certificate = make_certificates(cls.folder) if shutil.which("openssl") else None
        cls.node = KafkaNode(certificate=certificate)
        cls.use(cls.node)

    @classmethod
    def tearDownClass(cls):
        super().tearDownClass()
        shutil.rmtree(cls.folder, ignore_errors=True)

    # -- what is read, and what is written --

    def test_messages_of_librdkafka_and_of_the_java_client_are_read(self):
        self.topics(incoming=3, outgoing=3)
        self.write([dict(key=None, value=envelope(0)),
                    dict(key="k", value=envelope(1), headers={"a": b"1", "b": None}),
                    dict(key=b"", value=envelope(2)), dict(key="null", value=None)])
        self.write(self.updates(500, first=3), **{"compression.type": "gzip", "linger.ms": 50})
        padded = json.loads(envelope(503).decode())
        # Far more than the share of a partition in a fetch.
        padded["update"]["padding"] = "x" * 300000
        self.write([dict(value=json.dumps(padded))])
        lines = ["source:java\tk%d\t%s" % (number, envelope(number).decode())
                 for number in range(504, 524)]
        lines.append("h:\tNULL\t" + envelope(524).decode())
        options = ["--bootstrap-server", self.brokers, "--topic", self.incoming,
                   "--compression-codec", "gzip"]
        for option in ("parse.key=true", "parse.headers=true", "null.marker=NULL"):
            options += ["--property", option]
        with tempfile.TemporaryFile() as file:
            file.write("\n".join(lines).encode())
            file.seek(0)
            self.node.run("org.apache.kafka.tools.ConsoleProducer", *options, stdin=file)
        bot = self.bot()
        replies = Replies(self).read(525)
        until(lambda: self.lag(3) == 0, "all is committed")
        self.end(bot)
        self.assertEqual(replies.rest().texts,
                         collections.Counter("Echo: m%d" % number for number in range(525)))
        self.assertEqual(bot.log.count("passed over"), 1, bot.log)      # the one without a value

    def test_replies_are_read_by_java_and_lie_where_its_partitioner_puts_them(self):
        self.topics(incoming=1, outgoing=7, **{self.name + "-java": 7})
        chats = [random.randrange(-10 ** random.randint(1, 14), 10 ** random.randint(1, 14))
                 for _ in range(100)]
        self.write([dict(value=envelope(number, chat)) for number, chat in enumerate(chats)])
        bot = self.bot()
        replies = Replies(self).read(100)
        self.end(bot)
        with tempfile.TemporaryFile() as file:
            file.write("".join("%d\tx\n" % chat for chat in chats).encode())
            file.seek(0)
            self.node.run("org.apache.kafka.tools.ConsoleProducer", "--bootstrap-server",
                          self.brokers, "--topic", self.name + "-java", "--property",
                          "parse.key=true", stdin=file)
        def java_reads(topic):
            log = self.node.run("org.apache.kafka.tools.consumer.ConsoleConsumer",
                                "--bootstrap-server", self.brokers, "--topic", topic,
                                "--from-beginning", "--max-messages", "100", "--property",
                                "print.key=true", "--property", "print.partition=true")
            return sorted(match.groups()
                          for match in re.finditer(r"^Partition:(\d+)\t(-?\d+)\t", log, re.M))
        placed = java_reads(self.name + "-java")
        self.assertEqual(len(placed), 100)
        self.assertEqual(java_reads(self.outgoing), placed)
        self.assertEqual(sorted((str(record.partition()), record.key().decode())
                                for record in replies.records), placed)

    def test_aborted_transactions_are_passed_over_and_leave_no_lag(self):
        self.topics(incoming=1, outgoing=1)
        producer = self.producer(**{"transactional.id": self.name})
        producer.init_transactions()
        for first, commit in ((0, False), (10, True), (20, False), (30, True), (40, False)):
            producer.begin_transaction()
            for record in self.updates(10, first=first):
                producer.produce(self.incoming, **record)
            producer.flush(PATIENCE)
            producer.commit_transaction() if commit else producer.abort_transaction()
        bot = self.bot()
        replies = Replies(self).read(20)
        until(lambda: self.lag(1) == 0, "no lag is left for KEDA to see")
        self.end(bot)
        self.assertEqual(sorted(replies.rest().texts),
                         sorted("Echo: m%d" % n for n in range(40) if n // 10 in (1, 3)))

    def test_a_bad_record_blocks_nothing(self):
        self.topics(incoming=1, outgoing=1, **{self.name + "-dead": 1})
        bad = [b"no json", b"\xff\xfe", b"[]", b"{}", b'{"bot_id": "b1", "update": "text"}',
               b"[" * 100000, b"null", None]
        self.write([dict(key="k%d" % number, value=value) for number, value in enumerate(bad)] +
                   [dict(value=envelope(1, bot_id="b2")), dict(value=envelope(2))])
        bot = self.bot(KAFKA_DEAD_LETTER_TOPIC=self.name + "-dead")
        self.assertEqual(Replies(self).read(1).texts, collections.Counter(["Echo: m2"]))
        until(lambda: self.lag(1) == 0, "all is committed")
        self.end(bot)
        for offset in range(len(bad)):
            self.assertRegex(bot.log, r"-in, partition 0, offset %d is no JSON" % offset)
        self.assertIn("-in, partition 0, offset 8 is for another bot", bot.log)
        dead = Replies(self, self.name + "-dead").rest().records
        self.assertEqual({record.key().decode(): record.value() for record in dead},
                         {"k%d" % number: value for number, value in enumerate(bad)})
        self.assertEqual(len(dead), len(bad))

    def test_snappy_lz4_and_gzip_of_librdkafka_and_of_the_java_client_are_read(self):
        self.topics(incoming=1, outgoing=1)
        chance, count = random.Random(5), 0
        for codec in "gzip", "snappy", "lz4":
            # Long ones, so that batches have several blocks, with much and with little to copy.
            texts = ["%s-%d " % (codec, number) + "".join(
                chance.choice("ab" if number % 2 else "abcdefghijklmnopqrstuvwxyz0123456789")
                for _ in range(chance.randrange(3000))) for number in range(200)]
            records = [envelope(number, text=text) for number, text in enumerate(texts)]
            self.write([dict(value=record) for record in records[:100]],
                       **{"compression.type": codec, "linger.ms": 100})
            with tempfile.TemporaryFile() as file:
                file.write(b"\n".join(records[100:]))
                file.seek(0)
                self.node.run("org.apache.kafka.tools.ConsoleProducer", "--bootstrap-server",
                              self.brokers, "--topic", self.incoming, "--compression-codec", codec,
                              "--batch-size", "200000", "--timeout", "500", stdin=file)
            count += len(texts)
            bot = self.bot()
            replies = Replies(self).read(count)
            self.end(bot)
            for text in texts:
                self.assertEqual(replies.texts["Echo: " + text], 1)

    def test_zstd_is_read_where_python_can_and_else_it_says_what_helps(self):
        self.topics(incoming=1, outgoing=1)
        self.write(self.updates(50), **{"compression.type": "zstd", "linger.ms": 50})
        bot = self.bot()
        if installed("compression.zstd") if sys.version_info >= (3, 14) else False:
            Replies(self).read(50)
            return self.end(bot)
        self.assertEqual(bot.wait(), 1)
        self.assertRegex(bot.lines[-1], "%s has messages compressed with zstd.*Python 3.14.*"
                                        "compression.type.*reset-offsets" % self.incoming)

    def test_what_has_expired_is_no_lag(self):
        from confluent_kafka import TopicPartition
        self.topics(incoming=2, outgoing=1)
        self.write([dict(value=envelope(number), partition=number % 2) for number in range(20)])
        consumer = self.consumer(self.group)
        consumer.commit(offsets=[TopicPartition(self.incoming, 1, 4)], asynchronous=False)
        admin = self.admin()
        for future in admin.delete_records([TopicPartition(self.incoming, index, 10)
                                            for index in range(2)]).values():
            future.result()
        bot = self.bot()
        parts = [TopicPartition(self.incoming, index) for index in range(2)]
        until(lambda: [part.offset for part in consumer.committed(parts, timeout=PATIENCE)]
              == [10, 10], "both offsets are committed, where one was and where none was")
        self.end(bot)

    def test_a_poison_record_is_buried_and_blocks_nothing(self):
        from confluent_kafka.admin import NewTopic
        self.topics(incoming=1, **{self.name + "-dead": 1})
        admin = self.admin()
        for future in admin.create_topics([NewTopic(self.outgoing, 1, 1, config={
                "max.message.bytes": "2000", "cleanup.policy": "compact"})]).values():
            future.result()
        keyless = {"update_id": 1, "callback_query": {"id": "1", "data": "of an inline message"}}
        poison = [envelope(0, text="x" * 3000),
                  json.dumps({"bot_id": "b1", "update": keyless}).encode()]
        self.write([dict(key="k", value=value) for value in poison] + [dict(value=envelope(2))])
        bot = self.bot(KAFKA_DEAD_LETTER_TOPIC=self.name + "-dead")
        self.assertEqual(Replies(self).read(1).texts, collections.Counter(["Echo: m2"]))
        until(lambda: self.lag(1) == 0, "all is committed")
        self.end(bot)
        bot.wait_for(r"-in, partition 0, offset 0: its reply is refused.*MESSAGE_TOO_LARGE")
        bot.wait_for(r"-in, partition 0, offset 1: its reply is refused.*INVALID_RECORD")
        dead = Replies(self, self.name + "-dead").rest().records
        self.assertEqual(sorted(record.value() for record in dead), sorted(poison))

    def test_a_partition_with_much_to_do_does_not_wait_for_an_idle_one(self):
        self.topics(incoming=2, outgoing=1)
        large = "x" * 20000         # three of them are a partition's share of a fetch
        for number in range(60):
            self.write([dict(value=envelope(number, text="%d %s" % (number, large)), partition=0)])
        self.bot(code=self.PATIENT + "echo_bot.FETCH_MS = 10 ** 6; ")
        Replies(self).read(60)          # so it was not waited for

    # -- the group --

    def consume_with_librdkafka(self, shares, seen, stop):
        """Be a member of the group until `stop` is set; note our share, and what we see."""
        consumer = self.consumer(self.group, **{
            "session.timeout.ms": 10000, "enable.auto.commit": True,
            "partition.assignment.strategy": "range"})
        consumer.subscribe([self.incoming])
        while not stop.is_set():
            record = consumer.poll(0.1)
            shares["librdkafka"] = sorted(part.partition for part in consumer.assignment())
            if record and not record.error():
                seen["librdkafka", record.value()] += 1

    def consume_with_kafka_python(self, shares, seen, stop):
        from kafka import KafkaConsumer
        consumer = KafkaConsumer(self.incoming, bootstrap_servers=self.brokers, group_id=self.group,
                                 auto_offset_reset="earliest", session_timeout_ms=10000)
        while not stop.is_set():
            for records in consumer.poll(100).values():
                seen.update(("kafka-python", record.value) for record in records)
            shares["kafka-python"] = sorted(part.partition for part in consumer.assignment())
        consumer.close()

    def wait_until_shared_out(self, shares, count, bot):
        """Wait until six partitions are shared out evenly among so many members and a bot."""
        def shared_out():
            match = re.findall(r"partitions ([\d, ]+) of", bot.log)
            shares["bot"] = [int(index) for index in match[-1].split(", ")] if match else []
            return (len(shares) == count + 1
                    and {len(share) for share in shares.values()} == {6 // len(shares)}
                    and sorted(sum(shares.values(), [])) == list(range(6)))
        until(shared_out, "each has its share: %r" % shares)

    def test_a_group_with_librdkafka_and_kafka_python(self):
        self.topics(incoming=6, outgoing=6)
        shares, seen, stop = {}, collections.Counter(), threading.Event()
        others = [self.consume_with_librdkafka]
        others += [self.consume_with_kafka_python] if installed("kafka") else []
        threads = [threading.Thread(target=run, args=(shares, seen, stop)) for run in others]
        bot = self.bot()
        bot.wait_for("generation")
        try:
            for thread in threads:
                thread.start()
            self.wait_until_shared_out(shares, len(threads), bot)
            generations = bot.log.count("generation")
            replies = Replies(self)
            for first in range(0, 600, 100):
                self.write([dict(record, partition=number % 6)
                            for number, record in enumerate(self.updates(100, first=first))])
                until(lambda: replies.read_some() * 0 + len(seen) + len(replies.texts) >= first
                      + 100, "each message reaches one of them")
            self.assertEqual(bot.log.count("generation"), generations, "each keeps what it has")
            self.assertEqual(set(seen.values()) | set(replies.texts.values()), {1})
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        self.end(bot)

    def test_a_bot_leaves_its_group_at_once(self):
        self.topics(incoming=2, outgoing=1)
        bots = [self.bot(), self.bot()]
        for bot in bots:
            bot.wait_for(r"partitions \d of")
        self.end(bots.pop(0))
        admin = self.admin()
        members = admin.describe_consumer_groups([self.group])[self.group].result().members
        self.assertEqual(len(members), 1, "the group does not wait for the session to time out")
        bots[0].wait_for("partitions 0, 1 of")
        self.end(*bots)

    def expel(self, source):
        """Let the group believe that a source has left it."""
        cluster = echo_bot.Cluster(source.settings, lambda: False)
        self.addCleanup(cluster.close)
        cluster.call(cluster.coordinator(), "LeaveGroup",
                     dict(group=self.group, member_id=source.member.id))

    def test_who_was_expelled_neither_writes_nor_commits(self):
        self.topics(incoming=1, outgoing=1)
        self.write(self.updates(2))
        first, second = self.source()[0], self.source()[0]
        (update, receipt), (_, done) = until(first.take, "one"), until(first.take, "the other")
        self.expel(first)
        again, other = until(second.take, "the update, with the other bot")
        self.assertEqual(again, update)
        with self.assertLogs("echo_bot", "WARNING") as logs:
            first.acknowledge(done)
        self.assertIn("went to another bot", str(logs.output))
        self.assertEqual(self.lag(1), 2)
        with self.assertRaises(echo_bot.Interrupted), self.assertLogs("echo_bot") as logs:
            first.reply(receipt, ("sendMessage", {"chat_id": 1, "text": "late"}))
        self.assertIn("is left to who comes next", str(logs.output))
        second.reply(other, ("sendMessage", {"chat_id": 1, "text": "in time"}))
        second.acknowledge(other)
        self.assertEqual(self.lag(1), 1)
        self.assertEqual(Replies(self).rest().texts, collections.Counter(["in time"]))
        until(lambda: first.take() or first.member.state == "rebalancing" or
              first.member.generation > 2, "it joins again")

    def test_an_update_in_hand_when_others_come_and_go_is_committed(self):
        self.topics(incoming=2, outgoing=1)
        self.write([dict(value=envelope(0), partition=0)])
        first = self.source()[0]
        _, receipt = until(first.take, "the update")
        bot = self.bot()                                # it must wait for us
        until(lambda: first.member.state == "rebalancing", "the heartbeat tells of the rebalance")
        self.assertNotIn("generation", bot.log)
        first.acknowledge(receipt)
        self.assertEqual(self.lag(2), 0)
        bot.wait_for(r"partitions \d of")
        self.end(bot)
        until(lambda: first.take() or len(first.member.partitions) == 2, "the partitions are back")

    def test_after_close_it_joins_again_and_what_was_not_acknowledged_comes_again(self):
        self.topics(incoming=1, outgoing=1)
        self.write(self.updates(2))
        source, stopping = self.source()
        update, _ = until(source.take, "an update")
        source.close()
        self.assertEqual(until(source.take, "the same update")[0], update)
        stopping.requested_at = time.monotonic()
        source.close()
        self.assertIsNone(source.take(), "a signal has come")

    def test_a_bot_is_stopped_while_it_waits_for_the_group(self):
        self.topics(incoming=2, outgoing=1)
        self.write(self.updates(1))
        first = self.source()[0]
        _, receipt = until(first.take, "an update")
        bot = self.bot()
        until(lambda: first.member.state == "rebalancing", "the update in hand holds it up")
        bot.signal(signal.SIGTERM)
        self.assertEqual(bot.wait(), 0)
        self.assertNotIn("generation", bot.log)
        admin = self.admin()
        members = admin.describe_consumer_groups([self.group])[self.group].result().members
        self.assertEqual(len(members), 1, "the one that was joining has left")
        first.acknowledge(receipt)
        self.assertEqual(self.lag(2), 0)

    def test_a_drain_hands_over_to_another_bot_and_is_undone(self):
        self.topics(incoming=4, outgoing=4)
        # Or the drain may be over between two updates.
        sidecar = self.sidecar(QUIET_PERIOD_SECONDS=1)
        self.write(self.updates(3000))
        # So slow that the drain comes long before the end.
        first = self.bot(code=self.SLOW.format(seconds=0.5), SIDECAR_URL=sidecar.url)
        replies = Replies(self).read(10)
        self.assertEqual(sidecar.call("POST", "/drain")[0], 200)
        first.wait_for("left group")
        self.assertEqual(sidecar.get("/metrics")[1]["active_requests"], 0)
        done = self.lag(4)
        second = self.bot()
        replies.read(3000)
        self.assertEqual(replies.rest().texts,
                         collections.Counter("Echo: m%d" % number for number in range(3000)))
        self.assertGreater(done, 0, "the drain came before the end")
        until(lambda: self.lag(4) == 0, "all is committed")
        self.end(first, second)

    def test_a_topic_that_comes_later_and_grows(self):
        from confluent_kafka.admin import NewPartitions
        from unittest import mock
        source = self.source()[0]
        with mock.patch.object(echo_bot, "METADATA_SECONDS",
                               0.5), self.assertLogs("echo_bot") as logs:
            until(lambda: source.take() or "UNKNOWN_TOPIC_OR_PARTITION" in str(logs.output),
                  "it says what is missing")
            self.topics(incoming=1, outgoing=1)
            self.write(self.updates(1))
            source.acknowledge(until(source.take, "an update of the new topic")[1])
            admin = self.admin()
            admin.create_partitions([NewPartitions(self.incoming, 3)])[self.incoming].result()
            until(lambda: len(admin.list_topics(timeout=PATIENCE).topics[self.incoming].partitions)
                  == 3, "it grows")
            self.write([dict(value=envelope(1), partition=2)])
            self.assertEqual(
                until(source.take, "an update of the new partition")[0]["update_id"], 1)

    def test_offsets_that_are_gone_start_anew_at_the_earliest(self):
        from confluent_kafka import TopicPartition
        self.topics(incoming=1, outgoing=1)
        self.write(self.updates(10))
        bot = self.bot()
        replies = Replies(self).read(10)
        until(lambda: self.lag(1) == 0, "all is committed")
        self.end(bot)
        self.write(self.updates(10, first=10))
        admin = self.admin()
        for future in admin.delete_records([TopicPartition(self.incoming, 0, 15)]).values():
            future.result()
        bot = self.bot()
        self.assertEqual(len(replies.read(15).rest().texts), 15)
        self.end(bot)
        self.assertIn("offset 10 is not there any more", bot.log)

    # -- more than one at a time --

    # A slow handler, and a sidecar that may take as long as it likes to answer.
    SLOW = ("import echo_bot, time; echo_bot.Sidecar.CALL_SECONDS = 30; answer = echo_bot.reply_to;"
            "echo_bot.reply_to = lambda update: (time.sleep({seconds}), answer(update))[1]; ")

    def test_a_slow_handler_is_run_for_as_many_as_concurrency_says(self):
        self.topics(incoming=3, outgoing=3)
        sidecar, rates = self.sidecar(), {}
        replies, sent = Replies(self), 0
        for concurrency, count in (1, 6), (8, 48):
            self.write(self.updates(count, chats=count, first=sent))
            bot = self.bot(code=self.SLOW.format(seconds=1), CONCURRENCY=concurrency,
                           SIDECAR_URL=sidecar.url)
            replies.read(sent + 1)
            first, started = len(replies.texts), time.monotonic()
            until(lambda: sidecar.active() == concurrency)
            replies.read(sent + count)
            rates[concurrency] = (count + sent - first) / (time.monotonic() - started)
            sent += count
            self.end(bot)
        print("\nhandler of 1 s: %.2f updates/s with CONCURRENCY=1, %.2f with 8"
              % (rates[1], rates[8]), file=sys.stderr)
        self.assertGreater(rates[8], 2 * rates[1])      # 8 times, where nothing else is going on
        self.assertEqual(set(replies.rest().texts.values()), {1})

    def test_what_is_done_out_of_order_is_not_done_again(self):
        self.topics(incoming=1, outgoing=1)
        self.write([dict(value=envelope(0, chat=-1, text="slow"))] + self.updates(100, first=1))
        code = ("import echo_bot, threading; answer = echo_bot.reply_to; echo_bot.reply_to = "
                "lambda update: threading.Event().wait() if 'slow' in str(update) else "
                "answer(update); ")
        bot = self.bot(code=code)
        replies = Replies(self).read(100)
        cluster = echo_bot.Cluster(self.source()[0].settings, lambda: False)
        self.addCleanup(cluster.close)

        def committed():
            answer = cluster.call(cluster.coordinator(), "OffsetFetch", dict(
                group=self.group, topics=[dict(name=self.incoming, partitions=[0])]))
            return answer["topics"][0]["partitions"][0]
        until(lambda: (committed()["metadata"] or "").endswith(",100"), "the group is told")
        self.assertEqual(committed()["offset"], 0, "nothing is committed beyond what is not done")
        bot.kill()
        bot = self.bot()
        replies.read(101)
        until(lambda: self.lag(1) == 0, "all is committed")
        self.end(bot)
        self.assertEqual(set(replies.rest().texts.values()), {1})
        self.assertEqual(replies.texts["Echo: slow"], 1)

    def test_sigterm_finishes_all_that_is_in_hand_and_takes_no_more(self):
        self.topics(incoming=2, outgoing=2)
        self.write(self.updates(30))
        sidecar = self.sidecar()
        slow = echo_bot.STOP_SECONDS + 1        # what failed then would not be tried again
        bot = self.bot(code=self.SLOW.format(seconds=slow), SIDECAR_URL=sidecar.url)
        until(lambda: sidecar.active() == 8)
        self.end(bot)
        self.assertEqual(sidecar.active(), 0)
        answered = sum(Replies(self).rest().texts.values())
        self.assertEqual(sidecar.sample("sidecar_requests_total"), answered)
        self.assertLess(answered, 30)
        bot = self.bot()
        replies = Replies(self).read(30)
        self.end(bot)
        self.assertEqual(set(replies.rest().texts.values()), {1})

    # -- topics that change --

    def delete(self, topic):
        admin = self.admin()
        admin.delete_topics([topic])[topic].result()
        until(lambda: topic not in admin.list_topics(timeout=PATIENCE).topics, "it is gone")

    def test_an_outgoing_topic_with_fewer_partitions_than_before(self):
        self.topics(incoming=1, outgoing=12)
        self.write(self.updates(50))
        bot = self.bot()
        Replies(self).read(50)
        self.delete(self.outgoing)
        self.topics(outgoing=1)
        self.write(self.updates(50, first=50))
        replies = Replies(self).read(50)
        self.end(bot)
        self.assertEqual(set(replies.rest().texts.values()), {1})

    def test_an_outgoing_topic_that_grows(self):
        from confluent_kafka.admin import NewPartitions
        self.topics(incoming=1, outgoing=1)
        self.write(self.updates(10))
        bot = self.bot(code="import echo_bot; echo_bot.METADATA_SECONDS = 0.5; ")
        Replies(self).read(10)
        admin = self.admin()
        admin.create_partitions([NewPartitions(self.outgoing, 6)])[self.outgoing].result()
        sent = [10]

        def on_a_new_partition():
            self.write(self.updates(10, first=sent[0]))
            sent[0] += 10
            return len({record.partition() for record in
                        Replies(self).read(sent[0]).records}) > 1
        until(on_a_new_partition, "a reply on a new partition")
        self.end(bot)

    def test_sigterm_ends_it_within_seconds_without_the_incoming_topic(self):
        self.topics(incoming=1, outgoing=1)
        self.write(self.updates(8))
        sidecar = self.sidecar()
        bot = self.bot(code=self.SLOW.format(seconds=3), SIDECAR_URL=sidecar.url)
        until(lambda: sidecar.active() == 8)
        self.delete(self.incoming)
        self.end(bot)
        self.assertEqual(len(Replies(self).rest().texts), 8)

    # -- the network --

    def proxied(self):
        self.addCleanup(setattr, self.node.proxy, "spoil", None)
        return "localhost:%d" % self.node.proxy.port

    def test_connections_that_die_in_the_middle_of_an_answer(self):
        self.topics(incoming=3, outgoing=3)
        self.write(self.updates(500))
        chance = random.Random(4)
        cuts = []

        def cut(data):
            if chance.random() < 0.02:
                cuts.append(1)
                return data[:len(data) // 2]
            return data
        brokers = self.proxied()
        self.node.proxy.spoil = cut
        bot = self.bot(KAFKA_BROKERS=brokers)
        replies = Replies(self).read(500)
        until(lambda: self.lag(3) == 0, "all is committed")
        self.node.proxy.spoil = None
        self.end(bot)
        self.assertGreater(len(cuts), 5)
        self.assertEqual(set(replies.rest().texts.values()), {1},
                         "what was tried again counts once")

    def test_a_connection_that_lay_idle_is_not_trusted(self):
        self.topics(incoming=1, outgoing=1)
        brokers = self.proxied()
        self.addCleanup(setattr, self.node.proxy, "forgets_after", None)
        self.node.proxy.forgets_after = 5       # as a firewall does, without a word
        bot = self.bot(KAFKA_BROKERS=brokers, code="import echo_bot; echo_bot.IDLE_SECONDS = 1; ")
        replies = Replies(self)
        self.write(self.updates(1))
        replies.read(1)
        time.sleep(6)
        self.write(self.updates(1, first=1))
        replies.read(2)
        self.end(bot)
        self.assertNotIn("has not answered", bot.log)
        self.assertEqual(set(replies.rest().texts.values()), {1})

    def test_a_corrupt_batch_is_an_error_and_no_message(self):
        self.topics(incoming=1, outgoing=1)
        self.write([dict(value=envelope(1, text="intact"))])
        self.write([dict(value=envelope(2, text="corrupt-me"))])
        left = [2]

        def corrupt(data):
            if b"corrupt-me" in data and left[0]:
                left[0] -= 1
                return data.replace(b"corrupt-me", b"corrupt-Me")
            return data
        brokers = self.proxied()
        self.node.proxy.spoil = corrupt
        bot = self.bot(KAFKA_BROKERS=brokers)
        replies = Replies(self).read(2).rest()
        self.end(bot)
        self.assertEqual(sorted(replies.texts), ["Echo: corrupt-me", "Echo: intact"])
        self.assertEqual(bot.log.count("the checksum of the batch at offset 1"), 2)

    def test_the_update_in_hand_is_finished_after_the_signal_though_the_broker_hangs(self):
        self.topics(incoming=1, outgoing=1)
        self.write(self.updates(2))
        source, stopping = self.source()
        _, receipt = until(source.take, "an update")
        self.node.program.signal(signal.SIGSTOP)
        os.waitpid(self.node.program.process.pid, os.WUNTRACED)     # every thread of it has stopped
        try:
            def finish():
                source.reply(receipt, ("sendMessage", {"chat_id": 1, "text": "done"}))
                source.acknowledge(receipt)
            work = threading.Thread(target=finish)
            work.start()
            stopping.requested_at = time.monotonic()
            work.join(1)
            self.assertTrue(work.is_alive())
        finally:
            self.node.program.signal(signal.SIGCONT)
        work.join(PATIENCE)
        self.assertIsNone(source.take(), "nothing is started any more")
        self.assertEqual(self.lag(1), 1)
        self.assertEqual(Replies(self).rest().texts, collections.Counter(["done"]))

    # -- security --

    def secure(self, protocol, mechanism=None, password="PASSWORD-1", **env):
        if mechanism:
            env.update(KAFKA_SASL_MECHANISM=mechanism, KAFKA_SASL_USERNAME="bot",
                       KAFKA_SASL_PASSWORD=password)
        settings = dict(KAFKA_BROKERS="localhost:%d" % self.node.ports[protocol],
                        KAFKA_SECURITY_PROTOCOL=protocol, KAFKA_SSL_CAFILE=self.authority)
        settings.update(env)
        return self.bot(**settings)

    @needs("openssl", shutil.which("openssl"))
    def test_tls_and_logins(self):
        self.topics(incoming=1, outgoing=1)
        count = 0
        for protocol, mechanism in (("SSL", None), ("SASL_PLAINTEXT", "PLAIN"),
                                    ("SASL_SSL", "SCRAM-SHA-256"),
                                    ("SASL_PLAINTEXT", "SCRAM-SHA-512")):
            count += 1
            self.write(self.updates(1, first=count))
            bot = self.secure(protocol, mechanism)
            replies = Replies(self).read(count)
            until(lambda: self.lag(1) == 0, "it is committed")
            self.end(bot)
        self.assertEqual(set(replies.rest().texts.values()), {1})

    def deny_reading(self, topic):
        from confluent_kafka.admin import (AclBinding, AclOperation, AclPermissionType,
                                           ResourcePatternType, ResourceType)
        denied = AclBinding(ResourceType.TOPIC, topic, ResourcePatternType.LITERAL, "User:bot", "*",
                            AclOperation.READ, AclPermissionType.DENY)
        admin = self.admin()
        for future in admin.create_acls([denied]).values():
            future.result()

    @needs("openssl", shutil.which("openssl"))
    def test_what_cannot_mend_itself_ends_with_one_line(self):
        self.topics(incoming=1, outgoing=1, **{self.name + "-secret": 1})
        self.deny_reading(self.name + "-secret")
        numeric = "127.0.0.1:%d" % self.node.ports["SSL"]
        bots = {
            "SASL_AUTHENTICATION_FAILED": [self.secure("SASL_SSL", mechanism, "PASSWORD-2")
                                           for mechanism in ("PLAIN", "SCRAM-SHA-256",
                                                             "SCRAM-SHA-512")],
            "CERTIFICATE_VERIFY_FAILED": [
                self.secure("SSL", KAFKA_SSL_CAFILE=os.path.join(self.folder, "other.pem")),
                self.secure("SSL", KAFKA_BROKERS=numeric)],
            "TOPIC_AUTHORIZATION_FAILED": [
                self.secure("SASL_SSL", "PLAIN", KAFKA_INCOMING_TOPIC=self.name + "-secret")],
            "KAFKA_SECURITY_PROTOCOL": [self.secure("SSL", KAFKA_SECURITY_PROTOCOL="PLAINTEXT"),
                                        self.secure("SASL_PLAINTEXT",
                                                    KAFKA_SECURITY_PROTOCOL="PLAINTEXT"),
                                        self.secure("SASL_SSL", "PLAIN",
                                                    KAFKA_BROKERS=self.brokers)],
            "no-such-host": [self.bot(KAFKA_BROKERS="no-such-host.invalid:9092")]}
        for words, ended in bots.items():
            for bot in ended:
                self.assertEqual(bot.wait(), 1, bot.log)
                self.assertIn(words, bot.lines[-1])
                for secret in ("TEST-TOKEN", "PASSWORD-1", "PASSWORD-2", "Traceback"):
                    self.assertNotIn(secret, bot.log)

    # -- the runs of 10,000 --

    def run_updates(self, events, count=10000, kills=0):
        """Send updates over 6 partitions to three bots, with CONCURRENCY 1 and 8. events: {number
        of replies: function(list of running bots)}.

        Prints a line of the table for each; in the end every offset is committed, and each chat's
        replies are in order.
        """
        for concurrency in 1, 8:
            with self.subTest(concurrency=concurrency):
                self.setUp()
                self.concurrency = concurrency
                self.run_once(events, count, kills * concurrency)

    def run_once(self, events, count, twice):
        self.topics(incoming=6, outgoing=6)
        self.write(self.updates(count, chats=500))
        running, pending = [], sorted(events.items())
        for _ in range(3):
            self.start(running)
        started, replies = time.monotonic(), Replies(self)

        def tick():
            while pending and len(replies.texts) >= pending[0][0]:
                pending.pop(0)[1](running)
        replies.read(count, tick)
        seconds = time.monotonic() - started
        until(lambda: self.lag(6) == 0, "every offset is committed")
        self.end(*running)
        replies.rest()
        report(self, count, replies, seconds, self.concurrency)
        self.assertLessEqual(sum(replies.texts.values()) - count, twice)
        chats = collections.defaultdict(list)
        for record in replies.records:
            chats[record.key()].append(
                int(json.loads(record.value())["params"]["text"].split("m")[1]))
        for numbers in chats.values():
            self.assertEqual(numbers, sorted(numbers), "a chat's replies are in order")

    def sigterm(self, running):
        self.end(running.pop(0))

    def sigkill(self, running):
        running.pop(0).kill()

    def start(self, running):
        running.append(self.bot(CONCURRENCY=self.concurrency))

    def restart_broker(self, running):
        self.node.stop()
        self.node.start()

    def test_run_with_a_bot_killed_one_stopped_and_one_started(self):
        self.run_updates({2000: self.sigkill, 4000: self.sigterm, 5000: self.start}, kills=1)

    def test_run_with_bots_stopped_and_started(self):
        self.run_updates(
            {1500: self.sigterm, 3000: self.start, 4500: self.start, 6000: self.sigterm,
             7500: self.sigterm})

    def test_run_with_the_broker_restarted(self):
        self.run_updates(
            {1500: self.sigterm, 3000: self.restart_broker, 3001: self.start, 6000: self.sigterm})


@needs_kafka
class TestKafkaCluster(KafkaCase):
    """Against three nodes of Apache Kafka, one of which dies: leaders and the coordinator move."""

    @classmethod
    def setUpClass(cls):
        voters = dict(zip((1, 2, 3), lasting_ports(3)))
        settings = {"broker.session.timeout.ms": 3000, "broker.heartbeat.interval.ms": 500}
        cls.use(*[KafkaNode(number, voters, **settings) for number in voters])

    def setUp(self):
        super().setUp()
        wait_for_kafka(*self.nodes)         # one was away in the test before, perhaps

    def test_nothing_is_committed_before_every_replica_has_the_reply(self):
        from confluent_kafka.admin import NewTopic
        self.topics(replicas=3, incoming=1)
        admin = self.admin()
        topic = NewTopic(self.outgoing, 1, 3, config={"min.insync.replicas": "3"})
        admin.create_topics([topic])[self.outgoing].result()
        self.nodes[2].stop()
        self.write(self.updates(1))
        bot = self.bot()
        bot.wait_for("NOT_ENOUGH_REPLICAS; trying again")
        self.assertEqual(self.lag(1), 1)
        self.nodes[2].start()
        replies = Replies(self).read(1)
        until(lambda: self.lag(1) == 0, "it is committed")
        self.end(bot)
        self.assertEqual(replies.rest().texts, collections.Counter(["Echo: m0"]))

    def assigned(self, topic, *nodes, **config):
        """Create a topic with a partition for each node, which is its only replica."""
        from confluent_kafka.admin import NewTopic
        admin = self.admin()
        admin.create_topics([NewTopic(topic, len(nodes), config=config, replica_assignment=[
            [node] for node in nodes])])[topic].result()

    def test_no_partition_waits_for_another_to_be_empty(self):
        # 0, 1 and 2 are led by three nodes, 3 to 5 by the first of them; in 3 and 4 no batch fits
        # into a partition's share of a fetch.
        self.assigned(self.incoming, 1, 2, 3, 1, 1, 1)
        self.assigned(self.outgoing, 1)
        self.write([dict(record, partition=0) for record in self.updates(3000)])
        large = "x" * 3000
        for partition in 3, 4:
            self.write([dict(value=envelope(number, text="%d-%d %s" % (partition, number, large)),
                             partition=partition) for number in range(100)],
                       **{"linger.ms": 500, "batch.size": 900000})
        for partition in 1, 2, 5:
            self.write([dict(value=envelope(number, text="%d-%d " % (partition, number)),
                             partition=partition) for number in range(10)])
        bot = self.bot()
        replies = Replies(self).read(3230)
        self.end(bot)
        order = [json.loads(record.value())["params"]["text"] for record in replies.records]
        for partition in 1, 2, 3, 4, 5:
            last = max(order.index(text) for text in order if
                       re.match("Echo: %d-[0-9] " % partition, text))
            self.assertLess(last, 1000, "the tenth of partition %d" % partition)

    def coordinator(self):
        """Return the number of the node that is our group's coordinator."""
        settings = self.source()[0].settings
        cluster = echo_bot.Cluster(settings, lambda: False)
        self.addCleanup(cluster.close)
        return until(lambda: self.answer(cluster))["node"]

    def answer(self, cluster):
        try:
            return cluster.call_any("FindCoordinator", dict(key=self.group, key_type=0))
        except echo_bot.KafkaError:         # the topic of the offsets is being made
            return None

    def test_a_broker_that_cannot_be_reached_stops_no_partition_of_the_others(self):
        over = threading.Event()
        self.addCleanup(over.set)
        # One hangs up at once, one never answers and is waited for without end.
        for spoil, code in ((lambda data: b"", ""),
                            (lambda data: (over.wait(4 * PATIENCE), b"")[1], self.PATIENT)):
            self.setUp()
            over.clear()
            self.answer_beside_a_broker_that_is_away(spoil, code, over)

    def answer_beside_a_broker_that_is_away(self, spoil, code, over):
        first, second, away = sorted((1, 2, 3), key=lambda node: (
            node != self.coordinator(), node))
        self.assigned(self.incoming, first, second, away)
        self.assigned(self.outgoing, first, second)
        proxy = self.nodes[away - 1].proxy
        self.addCleanup(setattr, proxy, "spoil", None)
        proxy.spoil = spoil
        bot = self.bot(code=code, KAFKA_BROKERS=",".join(
            "localhost:%d" % self.nodes[node - 1].proxy.port for node in (first, second)))
        self.write([dict(value=envelope(number, text="first-%d" % number), partition=number % 3)
                    for number in range(3)])
        replies = Replies(self).read(2)
        started, producer = time.monotonic(), self.producer()
        for number in range(3, 63):         # one at a time
            producer.produce(self.incoming, envelope(number), partition=number % 2)
            producer.flush(PATIENCE)
            replies.read(number)
        print("\n60 updates beside a broker that cannot be reached: %.1f s"
              % (time.monotonic() - started), file=sys.stderr)
        self.assertNotIn("first-2", str(replies.texts))
        over.set()
        proxy.spoil = None
        replies.read(63)
        self.end(bot)
        self.assertEqual(set(replies.rest().texts.values()), {1})

    def wants_every_replica(self):
        """Create the outgoing topic so that all three nodes must be there for each reply."""
        from confluent_kafka.admin import NewTopic
        admin = self.admin()
        admin.create_topics([NewTopic(self.outgoing, 1, 3, config={
            "min.insync.replicas": "3"})])[self.outgoing].result()

    def test_a_reply_that_cannot_be_written_is_left_to_the_next_bot_and_answered_once(self):
        self.assigned(self.incoming, 1)
        self.wants_every_replica()
        self.write(self.updates(20))
        self.nodes[2].stop()
        code = "import echo_bot; echo_bot.LET_GO_SECONDS = 4; "        # not 40 of the group's 60
        first = self.bot(code=code)
        first.wait_for("NOT_ENOUGH_REPLICAS; trying again")
        second = self.bot(code=code)
        first.wait_for("is left to who comes next")
        second.wait_for("generation")
        self.nodes[2].start()
        replies = Replies(self).read(20)
        until(lambda: self.lag(1) == 0, "all is committed")
        self.end(first, second)
        self.assertNotIn("xpelled", first.log + second.log)
        self.assertEqual(set(replies.rest().texts.values()), {1})

    def test_who_is_expelled_while_a_reply_cannot_be_written_does_not_write_it_afterwards(self):
        self.assigned(self.incoming, 1)
        self.wants_every_replica()
        self.write(self.updates(20))
        self.nodes[2].stop()
        first = self.bot()
        first.wait_for("NOT_ENOUGH_REPLICAS; trying again")
        admin = self.admin()
        member, = admin.describe_consumer_groups([self.group])[self.group].result().members
        cluster = echo_bot.Cluster(self.source()[0].settings, lambda: False)
        self.addCleanup(cluster.close)
        cluster.call(cluster.coordinator(), "LeaveGroup",
                     dict(group=self.group, member_id=member.member_id))
        second = self.bot()
        first.wait_for("xpelled from the group")
        first.wait_for("is left to who comes next")
        second.wait_for(r"generation \d+: partitions 0|generation \d+: partitions none")
        self.nodes[2].start()
        replies = Replies(self).read(20)
        until(lambda: self.lag(1) == 0, "all is committed")
        self.end(first, second)
        self.assertEqual(set(replies.rest().texts.values()), {1})

    def test_a_node_dies_and_comes_back(self):
        self.topics(replicas=3, incoming=6, outgoing=6)
        self.write(self.updates(4000))
        admin = self.admin()
        started, bots = time.monotonic(), [self.bot(), self.bot()]
        replies = Replies(self).read(500)
        group = admin.describe_consumer_groups([self.group])[self.group].result()
        # The coordinator, and a third of the leaders with it.
        victim = self.nodes[group.coordinator.id - 1]
        victim.program.kill()
        replies.read(2000)
        victim.start()
        replies.read(2500)
        self.end(bots.pop(0))
        replies.read(4000)
        until(lambda: self.lag(6) == 0, "all is committed")
        self.end(*bots)
        report(self, 4000, replies.rest(), time.monotonic() - started)


@needs_kafka
@needs("openssl", shutil.which("openssl"))
class TestKafkaStrict(KafkaCase):
    """Against a Kafka that creates no topics by itself, closes what lies idle for 3 s, and wants a
    certificate of clients that speak TLS."""

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp()
        cls.authority = os.path.join(cls.folder, "ca.pem")
        cls.certificate = make_certificates(cls.folder)
        cls.use(KafkaNode(certificate=cls.certificate, **{
            "auto.create.topics.enable": "false", "connections.max.idle.ms": 3000,
            "ssl.client.auth": "required", "ssl.truststore.type": "PEM",
            "ssl.truststore.location": cls.authority}))

    @classmethod
    def tearDownClass(cls):
        super().tearDownClass()
        shutil.rmtree(cls.folder, ignore_errors=True)

    def test_sigterm_ends_it_within_seconds_without_the_outgoing_topic(self):
        self.topics(incoming=1)
        self.write(self.updates(3))
        bot = self.bot()
        bot.wait_for("UNKNOWN_TOPIC_OR_PARTITION; trying again")
        self.end(bot)
        self.topics(outgoing=1)
        bot = self.bot()
        replies = Replies(self).read(3)
        self.end(bot)
        self.assertEqual(set(replies.rest().texts.values()), {1})

    def test_a_broker_that_closes_an_idle_connection_is_no_warning(self):
        self.topics(incoming=1, outgoing=1)
        bot, replies = self.bot(), Replies(self)
        self.write(self.updates(1))
        replies.read(1)
        # The broker deals connections out to three threads, and each closes the longest idle first.
        # So when it has closed these, which each of them has some of, it has closed the bot's.
        for idle in [socket.create_connection(("127.0.0.1", self.nodes[0].ports["PLAINTEXT"]))
                     for _ in range(9)]:
            with idle:
                idle.settimeout(PATIENCE)
                self.assertEqual(idle.recv(1), b"")
        line = len(bot.lines)
        self.write(self.updates(1, first=1))
        replies.read(2)
        self.end(bot)
        for word in "hung up", "reset", "Broken pipe":
            self.assertNotIn(word, "\n".join(bot.lines[line:]))

    def test_a_client_certificate(self):
        self.topics(incoming=1, outgoing=1)
        self.write(self.updates(1))
        key = os.path.join(self.folder, "broker.p8")
        certificate = os.path.join(self.folder, "broker.crt")
        env = dict(KAFKA_BROKERS="localhost:%d" % self.nodes[0].ports["SSL"],
                   KAFKA_SECURITY_PROTOCOL="SSL", KAFKA_SSL_CAFILE=self.authority)
        bot = self.bot(KAFKA_SSL_CERTFILE=certificate, KAFKA_SSL_KEYFILE=key, **env)
        replies = Replies(self).read(1)
        self.end(bot)
        self.write(self.updates(1, first=1))
        bot = self.bot(KAFKA_SSL_CERTFILE=self.certificate, **env)      # with the key in it
        replies.read(2)
        self.end(bot)
        bot = self.bot(**env)
        self.assertEqual(bot.wait(), 1, bot.log)
        self.assertIn("KAFKA_SSL_CERTFILE", bot.lines[-1])


if __name__ == "__main__":
    unittest.main(verbosity=2)
