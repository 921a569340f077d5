"""Messages a second of one bot: echo_bot.py, with CONCURRENCY 1 and 8, beside the same bot on
kafka-python, in one run against one real broker.

    .ci/cache/venv/bin/python .ci/peers/bench_kafka.py [MESSAGES]

Both do the same for each update: reply_to, produce with acks=all and idempotence, wait for the
broker, commit the offset and wait for that; kafka-python one after another. They take turns,
three times each. It needs Kafka's
jars, confluent-kafka and kafka-python, as the tests do.
"""
import collections
import json
import os
import statistics
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests"))
import test_kafka     # noqa: E402


def kafka_python_bot(brokers, incoming, outgoing, group):
    """The loop of echo_bot.py on kafka-python."""
    from kafka import KafkaConsumer, KafkaProducer, TopicPartition
    from kafka.structs import OffsetAndMetadata
    import echo_bot
    consumer = KafkaConsumer(incoming, bootstrap_servers=brokers, group_id=group,
                             auto_offset_reset="earliest", enable_auto_commit=False,
                             session_timeout_ms=10000, fetch_max_wait_ms=500)
    producer = KafkaProducer(bootstrap_servers=brokers, acks="all", enable_idempotence=True,
                             linger_ms=0)
    for record in consumer:
        update = json.loads(record.value)["update"]
        method, params = echo_bot.reply_to(update)
        producer.send(outgoing, key=str(params["chat_id"]).encode(), value=json.dumps(
            {"bot_token": "1:x", "method": method, "params": params}).encode()).get(30)
        consumer.commit({TopicPartition(record.topic, record.partition): OffsetAndMetadata(
            record.offset + 1, "", -1)})


class Bench(test_kafka.KafkaCase):
    def runTest(self):
        """Count from the first reply to the last, so that neither start nor join is in it."""

    def messages_a_second(self, count, *argv, concurrency=1):
        self.setUp()
        self.topics(incoming=6, outgoing=6)
        self.write(self.updates(count))
        bot = self.program(sys.executable, *[part.format(self) for part in argv], env=dict(
            KAFKA_BROKERS=self.brokers, KAFKA_INCOMING_TOPIC=self.incoming,
            KAFKA_OUTGOING_TOPIC=self.outgoing,
            KAFKA_CONSUMER_GROUP=self.group, BOT_TOKEN="1:x", SIDECAR_URL=None,
            CONCURRENCY=concurrency))
        replies = test_kafka.Replies(self).read(1)
        first, started = len(replies.texts), time.monotonic()
        replies.read(count)
        seconds = time.monotonic() - started
        bot.kill()
        return (count - first) / seconds


def main():
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    # 5 is Kafka's default: what a commit waits for others to be written along with.
    for linger_ms in (5, 0):
        node = test_kafka.KafkaNode(**{"group.coordinator.append.linger.ms": linger_ms})
        try:
            test_kafka.wait_for_kafka(node)
            bench, speeds = Bench(), collections.defaultdict(list)
            bench.brokers = node.address
            for _ in range(3):
                for concurrency in 1, 8:
                    speeds["echo_bot.py, CONCURRENCY=%d" % concurrency].append(
                        bench.messages_a_second(count, os.path.join(test_kafka.HERE, "echo_bot.py"),
                                                concurrency=concurrency))
                speeds["kafka-python"].append(bench.messages_a_second(
                    count, os.path.abspath(__file__), "--kafka-python", "{0.brokers}",
                    "{0.incoming}", "{0.outgoing}", "{0.group}"))
            bench.doCleanups()
            for name, values in speeds.items():
                print("group.coordinator.append.linger.ms=%d  %-26s  %4.0f messages/s  (%s)" % (
                    linger_ms, name, statistics.median(values),
                    ", ".join("%.0f" % value for value in values)),
                    flush=True)
        finally:
            node.remove()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--kafka-python"]:
        kafka_python_bot(*sys.argv[2:])
    else:
        main()
