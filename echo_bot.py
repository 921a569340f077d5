#!/usr/bin/env python3
"""A Telegram echo bot that loses no message when it is shut down: the reference worker of sidecar.py.

    python echo_bot.py      KAFKA_BROKERS set: take updates from Kafka, send replies to Kafka
                            else BOT_TOKEN set: a Telegram bot by long polling
                            else: the console; each line typed is a message, or an update where it is a JSON object

It tells the sidecar of every update, works the same without one, and on SIGTERM or SIGINT, or when the sidecar drains,
takes no more, finishes the update in hand and acknowledges it. It needs Python 3.7 or newer and nothing else.

Variables:

    SIDECAR_URL             where the sidecar is                        http://127.0.0.1:8081
    BOT_TOKEN               the token that @BotFather gave
    TELEGRAM_API_URL        a Bot API server of your own                https://api.telegram.org

and for Kafka, where updates come as {"bot_id", "update"} and replies go as {"bot_token", "method", "params"}:

    KAFKA_BROKERS, KAFKA_INCOMING_TOPIC, KAFKA_OUTGOING_TOPIC, KAFKA_CONSUMER_GROUP
    BOT_ID                  an update for another bot is passed over    every update is answered
    KAFKA_DEAD_LETTER_TOPIC where a record goes that is no such JSON    it is logged, and passed over
    KAFKA_SECURITY_PROTOCOL PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL  PLAINTEXT
    KAFKA_SSL_CAFILE        the CA of the brokers' certificates         the system's CAs
    KAFKA_SASL_MECHANISM    PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512       PLAIN
    KAFKA_SASL_USERNAME, KAFKA_SASL_PASSWORD
"""
import base64
import collections
import hashlib
import hmac
import http.client
import importlib
import json
import logging
import os
import random
import re
import signal
import socket
import ssl
import struct
import sys
import threading
import time
import types
import zlib
from contextlib import contextmanager
from urllib.parse import urlsplit

log = logging.getLogger("echo_bot")


class ConfigError(Exception):
    """What ends the bot: one line for its user, and the exit status: 2 for a setting, 1 for what a server refused."""

    def __init__(self, text, status=2):
        super().__init__(text)
        self.status = status


# ---- The sidecar's client: copy this class into your own worker -----------------------------------------------------

class Sidecar:
    """Tells the sidecar of each request: `with sidecar.track(): work()`. Needs the imports above, may be used by threads.

    It never raises, and never delays the work by more than TIMEOUT_SECONDS. After a failure it leaves the sidecar alone
    for REST_SECONDS. `draining` is true from the moment on when an answer said so: take no more work, ask `ready`.
    """

    TIMEOUT_SECONDS = 1.0
    REST_SECONDS = 3.0

    def __init__(self, url=None):
        """url: where the sidecar is; default: SIDECAR_URL, or http://127.0.0.1:8081. ValueError: it is no such URL."""
        self.url = url or os.environ.get("SIDECAR_URL") or "http://127.0.0.1:8081"
        parts = urlsplit(self.url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError("SIDECAR_URL=%r: expected http://HOST:PORT" % self.url)
        self.draining = False
        self._host, self._port = parts.hostname, parts.port or 80
        self._threads_own = threading.local()       # a connection for each thread, kept alive
        self._rest_until = 0.0
        self._trouble = "unknown"                   # of the last call; None: it was answered
        self._undelivered = set()                   # the paths of ends that wait for their next try

    @contextmanager
    def track(self):
        """Report the start of a request, and its end with its duration, however the block is left."""
        request_id = os.urandom(16).hex()           # an id of our own makes it safe to say anything twice
        heard = self._tell("POST", "/start-request?id=" + request_id)
        started = time.monotonic()
        try:
            yield
        finally:
            if heard is not False:
                self._end("/end-request?id=%s&duration=%.6fs" % (request_id, time.monotonic() - started))

    def ready(self):
        """Ask whether work may be taken again. A sidecar that is gone has not said so: its pod is on its way out."""
        self._rest_until = 0.0
        self._tell("GET", "/ready")
        return not self.draining

    def reset(self):
        """Say that this worker has just started: requests that one before it left behind are over."""
        self._tell("POST", "/reset")

    def close(self):
        """Say, as the worker exits, what could not be said yet; a sidecar that still hangs costs one time-out."""
        self._rest_until = 0.0
        for path in list(self._undelivered):
            self._tell("POST", path)

    def _end(self, path):
        """Deliver an end, now or later: a sidecar that hung for a moment must not be left with a count."""
        self._undelivered.discard(path)
        if not self._tell("POST", path) and not isinstance(self._trouble, ConnectionRefusedError):      # its count is gone
            self._undelivered.add(path)
            retry = threading.Timer(self.REST_SECONDS, self._end, [path])
            retry.daemon = True
            retry.start()

    def _tell(self, method, path):
        """Return True when the sidecar answered, False when it surely did not hear it, None when it may have."""
        if time.monotonic() < self._rest_until:
            return False
        heard = False
        for _ in range(2):
            connection = getattr(self._threads_own, "connection", None)
            is_new = connection is None
            try:
                if is_new:
                    connection = http.client.HTTPConnection(self._host, self._port, timeout=self.TIMEOUT_SECONDS)
                    connection.connect()
                    self._threads_own.connection = connection
                heard = None
                connection.request(method, path)
                answer = connection.getresponse()
                content = json.loads(answer.read().decode())
                if path == "/ready":
                    self.draining = answer.status != 200
                elif "draining" in content:
                    self.draining = content["draining"]
                self._note(None)
                return True
            except Exception as error:              # whatever it is, the work goes on
                trouble = error
                self._threads_own.connection = None
                connection.close()
                if is_new or isinstance(error, socket.timeout):
                    break                           # else the sidecar had only closed an idle connection
        self._rest_until = time.monotonic() + self.REST_SECONDS
        self._note(trouble)
        return heard

    def _note(self, trouble):
        if (trouble is None) != (self._trouble is None) or self._trouble == "unknown":
            if trouble is None:
                log.info("reporting to the sidecar at %s", self.url)
            else:
                log.warning("working without a sidecar, %s does not answer: %s", self.url, trouble)
        self._trouble = trouble


# ---- The bot --------------------------------------------------------------------------------------------------------

def reply_to(update):
    """Return the Bot API call that answers an update, as (method, parameters), or None for one that needs no answer.

    A text message is echoed, a callback query is confirmed; https://core.telegram.org/bots/api tells the limits, which
    are kept. Any exception: the update is broken.
    """
    if "message" in update:
        message = update["message"]
        if "text" not in message:
            return None
        return "sendMessage", {
            "chat_id": message["chat"]["id"],
            "text": cut("Echo: " + message["text"], 4096),
            "reply_parameters": {"message_id": message["message_id"], "allow_sending_without_reply": True}}
    if "callback_query" in update:
        query = update["callback_query"]
        return "answerCallbackQuery", {"callback_query_id": query["id"],
                                       "text": cut("Received: " + query.get("data", ""), 200)}
    return None


def cut(text, limit):
    """Return `text`, cut to `limit` UTF-16 code units, which is how Telegram counts; no character is cut in half."""
    return text.encode("utf-16-le", "surrogatepass")[:2 * limit].decode("utf-16-le", "ignore")


class Interrupted(Exception):
    """A signal came while the bot had nothing in hand, or nothing that it could finish."""


class Stopping:
    """Handles SIGTERM and SIGINT from now on. Work is finished, so only a wait is broken into."""

    def __init__(self):
        self.requested = self._waiting = False
        woken, wakes = os.pipe()
        os.set_blocking(wakes, False)
        signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
        threading.Thread(target=self._insist, args=(woken,), daemon=True).start()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self)

    def __call__(self, number, frame):
        first, self.requested = not self.requested, True
        if first and self._waiting:
            raise Interrupted

    def _insist(self, woken):
        """Send the signal that came again until it is handled: Python puts it off, and where that is just before a
        system call, the call waits on as if nothing had come."""
        number = os.read(woken, 1)[0]
        while not self.requested:
            signal.pthread_kill(threading.main_thread().ident, number)
            time.sleep(0.1)

    def wait(self, function, *args):
        """Return function(*args), or None when a signal came before or comes meanwhile."""
        try:
            self._waiting = True
            return None if self.requested else function(*args)
        except Interrupted:
            return None
        finally:
            self._waiting = False

    def sleep(self, seconds):
        self.wait(time.sleep, seconds)


Taken = collections.namedtuple("Taken", "update")


class Console:
    """Updates from standard input, replies to standard output.

    This and the sources below have the same four methods. `take` waits for the next update and returns it, or None so
    that the loop can look around; EOFError: there are no more. `reply` makes the Bot API call. `acknowledge` says that
    the update is done: only then it is not handed out again. `close` lets go of everything; `take` may follow.
    """

    def __init__(self, stopping):
        self.stopping, self.taken = stopping, 0
        for stream in (sys.stdin, sys.stdout):
            stream.reconfigure(errors="replace")
        log.info("console: each line is a message, end of input ends it")

    def take(self):
        line = self.stopping.wait(sys.stdin.readline)
        if line is None:
            return None
        if not line:
            raise EOFError
        self.taken += 1
        try:
            update = json.loads(line)
        except (ValueError, RecursionError):
            update = None
        if not isinstance(update, dict):
            update = {"update_id": self.taken, "message": {"message_id": self.taken, "chat": {"id": 0},
                                                           "text": line.rstrip("\r\n")}}
        return Taken(update)

    def reply(self, taken, call):
        print(call[1]["text"], flush=True)

    def acknowledge(self, taken):
        pass

    def close(self):
        pass


class Telegram:
    """Updates by long polling, replies as Bot API calls: https://core.telegram.org/bots/api#getupdates

    An update that was acknowledged is confirmed by the offset of the next getUpdates, so a bot that is killed gets the
    ones after it again: of a batch, all that it had answered since.
    """

    POLL_SECONDS = 50
    ANSWER_SECONDS = 10
    BATCH = 10
    MAX_DELAY_SECONDS = 30.0

    def __init__(self, environ, stopping):
        self.stopping = stopping
        self._token = environ["BOT_TOKEN"]
        if not re.fullmatch("[0-9]+:[A-Za-z0-9_-]+", self._token):
            raise ConfigError("BOT_TOKEN is malformed: expected what @BotFather gave, such as 123456:ABC-DEF")
        url = environ.get("TELEGRAM_API_URL") or "https://api.telegram.org"
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError("TELEGRAM_API_URL=%r: expected https://HOST[:PORT]" % url)
        connection = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = connection(parts.hostname, parts.port)
        self._path = parts.path.rstrip("/")
        self._updates = collections.deque()
        self._offset = self._confirmed = 0
        log.info("Telegram: polling %s", url)

    def take(self):
        if not self._updates:
            self._updates.extend(self._get_updates(self.POLL_SECONDS, self.BATCH) or ())
        return Taken(self._updates.popleft()) if self._updates else None

    def reply(self, taken, call):
        self._call(*call)

    def acknowledge(self, taken):
        update_id = taken.update.get("update_id") if isinstance(taken.update, dict) else None
        if isinstance(update_id, int):
            self._offset = update_id + 1

    def close(self):
        self._updates.clear()
        if self._offset != self._confirmed:
            try:
                self._get_updates(0, 1)     # confirms, and does not take: what it returns will come again
            except Interrupted:
                log.warning("Telegram did not hear what is done: update %d and later will come again", self._confirmed)
        self._connection.close()

    def _get_updates(self, seconds, limit):
        offset = self._offset
        updates = self._call("getUpdates", {"offset": offset, "timeout": seconds, "limit": limit,
                                            "allowed_updates": ["message", "callback_query"]}, wait=seconds > 0)
        if updates is not None:
            self._confirmed = offset
        return updates

    def _call(self, method, parameters, wait=False):
        """Return the result of a Bot API call, or None where a signal broke into it (with `wait`), or it was refused.

        What may mend itself is tried again. Interrupted: it was not possible before the bot had to stop.
        """
        attempt = 0
        while True:
            try:
                answer = self.stopping.wait(self._post, method, parameters) if wait else self._post(method, parameters)
            except (OSError, http.client.HTTPException, ValueError) as error:
                self._connection.close()
                answer = {"ok": False, "error_code": 500, "description": "%s: %s" % (type(error).__name__, error)}
            if answer is None:
                self._connection.close()        # a poll that was broken off: its answer may still come
                return None
            if answer.get("ok"):
                return answer.get("result")
            code, problem = answer.get("error_code", 500), str(answer.get("description")).replace(self._token, "...")
            if code in (401, 404):
                raise ConfigError("Telegram refuses BOT_TOKEN (%s %s): expected what @BotFather gave" % (code, problem), 1)
            if code == 409:
                raise ConfigError("another poller or a webhook takes this bot's updates (409 %s)" % problem, 1)
            if 400 <= code < 500 and code != 429:
                log.warning("%s was refused: %s %s", method, code, problem)
                return None
            if self.stopping.requested:
                raise Interrupted
            attempt += 1
            delay = min(self.MAX_DELAY_SECONDS, 2.0 ** attempt) * random.uniform(0.25, 0.5)
            told = (answer.get("parameters") or {}).get("retry_after")
            delay = told if isinstance(told, (int, float)) else delay
            log.warning("%s failed, next try in %.1f s: %s %s", method, delay, code, problem)
            self.stopping.sleep(delay)

    def _post(self, method, parameters):
        seconds = self.ANSWER_SECONDS + parameters.get("timeout", 0)
        self._connection.timeout = seconds
        if self._connection.sock:
            self._connection.sock.settimeout(seconds)
        self._connection.request("POST", "%s/bot%s/%s" % (self._path, self._token, method), json.dumps(parameters),
                                 {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        body = answer.read()
        try:
            content = json.loads(body.decode())
            content["ok"]
            return content
        except (ValueError, TypeError, KeyError):       # a proxy's page, say
            return {"ok": False, "error_code": answer.status if answer.status >= 400 else 500,
                    "description": answer.reason}


# ---- Kafka: the protocol as data ------------------------------------------------------------------------------------

INT8, INT16, INT32, INT64, BOOLEAN = "b", "h", "i", "q", "?"    # the letters of the struct module
STRING, BYTES = "string", "bytes"                               # either may be null, here None


def by_topic(**partition):
    """Return the schema that most requests and answers have in common: topics, in each its partitions."""
    return [dict(name=STRING, partitions=[partition])]


# name: (key, version, request, answer). A dict is a structure, a list an array of what is in it. Each version is the
# newest of Kafka 0.11 (for SASL: of 1.0), and Kafka 4 still takes it (KIP-896). An `error` in an answer is raised; a
# `code` is an error that the caller looks at. https://kafka.apache.org/protocol
APIS = {
    "Produce": (0, 3, dict(transactional_id=STRING, acks=INT16, timeout_ms=INT32,
                           topics=by_topic(index=INT32, records=BYTES)),
                dict(topics=by_topic(index=INT32, code=INT16, offset=INT64, time_ms=INT64), throttle_ms=INT32)),
    "Fetch": (1, 5, dict(replica_id=INT32, max_wait_ms=INT32, min_bytes=INT32, max_bytes=INT32, isolation_level=INT8,
                         topics=by_topic(index=INT32, offset=INT64, log_start_offset=INT64, max_bytes=INT32)),
              dict(throttle_ms=INT32, topics=by_topic(
                  index=INT32, code=INT16, high_watermark=INT64, last_stable_offset=INT64, log_start_offset=INT64,
                  aborted=[dict(producer_id=INT64, first_offset=INT64)], records=BYTES))),
    "ListOffsets": (2, 2, dict(replica_id=INT32, isolation_level=INT8, topics=by_topic(index=INT32, time_ms=INT64)),
                    dict(throttle_ms=INT32, topics=by_topic(index=INT32, error=INT16, time_ms=INT64, offset=INT64))),
    "Metadata": (3, 4, dict(topics=[STRING], create=BOOLEAN),
                 dict(throttle_ms=INT32, brokers=[dict(node=INT32, host=STRING, port=INT32, rack=STRING)],
                      cluster_id=STRING, controller=INT32, topics=[dict(
                          code=INT16, name=STRING, internal=BOOLEAN, partitions=[dict(
                              code=INT16, index=INT32, leader=INT32, replicas=[INT32], in_sync=[INT32])])])),
    "OffsetCommit": (8, 3, dict(group=STRING, generation=INT32, member_id=STRING, retention_ms=INT64,
                                topics=by_topic(index=INT32, offset=INT64, metadata=STRING)),
                     dict(throttle_ms=INT32, topics=by_topic(index=INT32, error=INT16))),
    "OffsetFetch": (9, 3, dict(group=STRING, topics=[dict(name=STRING, partitions=[INT32])]),
                    dict(throttle_ms=INT32, topics=by_topic(index=INT32, offset=INT64, metadata=STRING, error=INT16),
                         error=INT16)),
    "FindCoordinator": (10, 1, dict(key=STRING, key_type=INT8),
                        dict(throttle_ms=INT32, error=INT16, message=STRING, node=INT32, host=STRING, port=INT32)),
    "JoinGroup": (11, 2, dict(group=STRING, session_timeout_ms=INT32, rebalance_timeout_ms=INT32, member_id=STRING,
                              protocol_type=STRING, protocols=[dict(name=STRING, metadata=BYTES)]),
                  dict(throttle_ms=INT32, error=INT16, generation=INT32, protocol=STRING, leader=STRING,
                       member_id=STRING, members=[dict(member_id=STRING, metadata=BYTES)])),
    "Heartbeat": (12, 1, dict(group=STRING, generation=INT32, member_id=STRING), dict(throttle_ms=INT32, error=INT16)),
    "LeaveGroup": (13, 1, dict(group=STRING, member_id=STRING), dict(throttle_ms=INT32, error=INT16)),
    "SyncGroup": (14, 1, dict(group=STRING, generation=INT32, member_id=STRING,
                              assignments=[dict(member_id=STRING, assignment=BYTES)]),
                  dict(throttle_ms=INT32, error=INT16, assignment=BYTES)),
    "SaslHandshake": (17, 1, dict(mechanism=STRING), dict(error=INT16, mechanisms=[STRING])),
    "ApiVersions": (18, 0, {}, dict(error=INT16, apis=[dict(key=INT16, lowest=INT16, highest=INT16)])),
    "InitProducerId": (22, 0, dict(transactional_id=STRING, timeout_ms=INT32),
                       dict(throttle_ms=INT32, code=INT16, producer_id=INT64, epoch=INT16)),
    "SaslAuthenticate": (36, 0, dict(data=BYTES), dict(error=INT16, message=STRING, data=BYTES)),
}
HEADER = dict(key=INT16, version=INT16, correlation_id=INT32, client_id=STRING)
SUBSCRIPTION = dict(version=INT16, topics=[STRING], user_data=BYTES)           # what JoinGroup carries
ASSIGNMENT = dict(version=INT16, topics=[dict(name=STRING, partitions=[INT32])], user_data=BYTES)   # and SyncGroup

ERRORS = {
    2: "CORRUPT_MESSAGE", 3: "UNKNOWN_TOPIC_OR_PARTITION", 5: "LEADER_NOT_AVAILABLE", 6: "NOT_LEADER_OR_FOLLOWER",
    7: "REQUEST_TIMED_OUT", 10: "MESSAGE_TOO_LARGE", 14: "COORDINATOR_LOAD_IN_PROGRESS", 16: "NOT_COORDINATOR",
    15: "COORDINATOR_NOT_AVAILABLE", 17: "INVALID_TOPIC_EXCEPTION", 19: "NOT_ENOUGH_REPLICAS", 22: "ILLEGAL_GENERATION",
    23: "INCONSISTENT_GROUP_PROTOCOL (the others do without the range assignor)", 24: "INVALID_GROUP_ID",
    25: "UNKNOWN_MEMBER_ID", 26: "INVALID_SESSION_TIMEOUT", 27: "REBALANCE_IN_PROGRESS", 35: "UNSUPPORTED_VERSION",
    29: "TOPIC_AUTHORIZATION_FAILED", 30: "GROUP_AUTHORIZATION_FAILED", 31: "CLUSTER_AUTHORIZATION_FAILED",
    33: "UNSUPPORTED_SASL_MECHANISM", 34: "ILLEGAL_SASL_STATE (is KAFKA_SECURITY_PROTOCOL right?)",
    58: "SASL_AUTHENTICATION_FAILED (KAFKA_SASL_USERNAME, KAFKA_SASL_PASSWORD)"}
REFUSALS = (17, 23, 24, 26, 29, 30, 31, 33, 34, 35, 58)     # trying again mends none of these
BAD_RECORD = (10, 18, 87)                                   # nor these, which are about one record
NOT_A_MEMBER = (22, 25, 27)                                 # this generation of the group is over
NOT_THE_PRODUCER = (45, 47, 59)                             # the broker has forgotten our producer id

SESSION_MS = 10000              # a killed bot's partitions move after this time; brokers allow 6 s and more
REBALANCE_MS = 60000            # how long the group waits for a bot that is busy with an update
HEARTBEAT_SECONDS = 1.0         # also how soon the others hear of a new bot and stand back for it
FETCH_MS = 500                  # a fetch waits this long, so that SIGTERM and a drain are seen in time
PARTITION_BYTES = 1 << 16       # a fetch's share for one partition: small, so that none waits long for its turn
LARGEST_BYTES = 1 << 27         # an answer or an unpacked batch over this is taken for rubbish
ANSWER_SECONDS = 15             # a broker's time to answer; it gives its replicas 10 s of that
CONNECT_SECONDS = 1.5           # SIGTERM cannot break this off, so it is short; it is tried again
METADATA_SECONDS = 30           # how soon new partitions are found
FIRST_TRIES = 6                 # some 5 s: what fails as often before any broker has answered is a wrong setting


class KafkaError(Exception):
    """An error code of a broker, or bytes that cannot be read (then `code` is 2)."""

    def __init__(self, code, about):
        super().__init__("%s: %s" % (about, ERRORS.get(code, "Kafka's error %d" % code)))
        self.code = code


def check(code, about):
    """Raise for an error code: ConfigError where trying again is of no use, else KafkaError. 0 is none."""
    if code in REFUSALS:
        raise ConfigError("Kafka refuses %s: %s" % (about, ERRORS[code]), 1)
    if code:
        raise KafkaError(code, about)


def encode(schema, value):
    """Return a value as bytes, by a schema such as those in APIS."""
    if isinstance(schema, dict):
        return b"".join([encode(kind, value[name]) for name, kind in schema.items()])
    if isinstance(schema, list):
        return struct.pack(">i", len(value)) + b"".join([encode(schema[0], item) for item in value])
    if schema in (STRING, BYTES):
        data = value.encode() if isinstance(value, str) else value
        return struct.pack(">h" if schema == STRING else ">i", -1 if data is None else len(data)) + (data or b"")
    return struct.pack(">" + schema, value)


class Decoder:
    """Reads values out of bytes, one after another. Whatever the bytes are, it raises KafkaError and nothing else."""

    def __init__(self, data):
        self.data, self.position, self.error = data, 0, 0

    def take(self, size):
        """Return the next `size` bytes, or None for a size of -1, which is Kafka's null."""
        if not -1 <= size <= len(self.data) - self.position:
            raise KafkaError(2, "%d bytes where %d are left" % (size, len(self.data) - self.position))
        start, self.position = self.position, self.position + max(size, 0)
        return None if size == -1 else self.data[start:self.position]

    def value(self, schema):
        """Return the value that a schema describes. `self.error` keeps the first error code on the way."""
        if isinstance(schema, dict):
            value = {name: self.value(kind) for name, kind in schema.items()}
            self.error = self.error or value.get("error", 0)
            return value
        if isinstance(schema, list):
            count = self.value(INT32)
            if not -1 <= count <= len(self.data) - self.position:       # no element is smaller than a byte
                raise KafkaError(2, "%d elements in %d bytes" % (count, len(self.data) - self.position))
            return [self.value(schema[0]) for _ in range(count)]
        if schema == BYTES:
            return self.take(self.value(INT32))
        if schema == STRING:
            data = self.take(self.value(INT16))
            return None if data is None else data.decode("utf-8", "replace")
        return struct.unpack(">" + schema, self.take(struct.calcsize(">" + schema)))[0]

    def varint(self):
        """Return a signed number in the zigzag form of Protocol Buffers, which records use."""
        number = 0
        for shift in range(0, 70, 7):
            byte = self.take(1)[0]
            number |= (byte & 127) << shift
            if byte < 128:
                return number >> 1 ^ -(number & 1)
        raise KafkaError(2, "a number of more than ten bytes")


# ---- Kafka: record batches ------------------------------------------------------------------------------------------

BATCH = struct.Struct(">qiibIhiqqqhii")     # the head of a record batch v2 (KIP-98); its checksum covers byte 21 and on
CODECS = {1: "gzip", 2: "snappy", 3: "lz4", 4: "zstd"}
CRC_TABLE = list(range(256))
for _ in range(8):
    CRC_TABLE = [number >> 1 ^ (0x82F63B78 if number & 1 else 0) for number in CRC_TABLE]


def crc32c(data):
    """Return the CRC-32C of bytes (RFC 3720, Castagnoli); zlib has only the other polynomial."""
    crc, table = 0xFFFFFFFF, CRC_TABLE
    for byte in data:
        crc = table[(crc ^ byte) & 255] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def varint(number):
    """Return bytes that Decoder.varint reads."""
    number, data = number << 1 ^ number >> 63, bytearray()
    while number > 127:
        data.append(number & 127 | 128)
        number >>= 7
    return bytes(data) + bytes([number])


def encode_batch(key, value, producer_id, epoch, sequence):
    """Return a batch of one record. key, value: bytes or None; the rest is what makes a repeat count once (KIP-98)."""
    parts = [varint(-1) if part is None else varint(len(part)) + part for part in (key, value)]
    record = b"\0\0\0" + b"".join(parts) + b"\0"        # no attributes, the batch's time and offset; no headers
    record, now_ms = varint(len(record)) + record, int(time.time() * 1000)
    batch = bytearray(BATCH.pack(0, BATCH.size - 12 + len(record), -1, 2, 0, 0, 0, now_ms, now_ms,
                                 producer_id, epoch, sequence, 1) + record)
    struct.pack_into(">I", batch, 17, crc32c(batch[21:]))
    return bytes(batch)


def decode_batches(data, aborted, topic):
    """Read what Fetch brought of one partition, as read_committed has it.

    data: batches, the last of them perhaps cut short; aborted: the aborted transactions, as the answer lists them.
    Yields for each batch (the offset after it, [(offset, key, value), ...]), with no records for a control batch or an
    aborted one. Raises KafkaError where a batch is corrupt, ConfigError where it is in a form that is not read here.
    """
    aborted = sorted(aborted, key=lambda transaction: transaction["first_offset"])
    aborting, start = set(), 0      # the producers in whose aborted transactions we are
    while len(data) - start >= BATCH.size:
        base, size, _, magic, crc, attributes, last, _, _, producer, _, _, count = BATCH.unpack_from(data, start)
        end = start + 12 + size
        if magic in (0, 1):
            raise ConfigError("topic %s has messages in the format before Kafka 0.11: set message.format.version to "
                              "2.0, and write them again" % topic, 1)
        if magic != 2 or size < BATCH.size - 12 or last < 0:
            raise KafkaError(2, "topic %s: the head of the batch at offset %d" % (topic, base))
        if end > len(data):
            break
        if crc32c(data[start + 21:end]) != crc:
            raise KafkaError(2, "topic %s: the checksum of the batch at offset %d" % (topic, base))
        while aborted and aborted[0]["first_offset"] <= base + last:
            aborting.add(aborted.pop(0)["producer_id"])
        records = decode_records(decompress(data[start + BATCH.size:end], attributes & 7, topic), count, base)
        if attributes & 32:         # a control batch: the key of its record says how the transaction has ended
            if any(key and key[2:4] == b"\0\0" for _, key, _ in records):
                aborting.discard(producer)
            records = []
        yield base + last + 1, [] if attributes & 16 and producer in aborting else records
        start = end
    if data and not start:          # brokers send one batch whole, however large
        raise KafkaError(2, "topic %s: a batch that is cut short" % topic)


def decode_records(data, count, base):
    """Return [(offset, key, value), ...] for the `count` records of a batch that begins at offset `base`."""
    decoder, records = Decoder(data), []
    for _ in range(count):
        end = decoder.varint() + decoder.position
        decoder.take(1)         # attributes: none are defined
        decoder.varint()        # time
        offset = base + decoder.varint()
        records.append((offset, decoder.take(decoder.varint()), decoder.take(decoder.varint())))
        if not decoder.position <= end <= len(data):
            raise KafkaError(2, "the length of the record at offset %d" % offset)
        decoder.position = end  # over the headers
    return records


def decompress(data, codec, topic):
    """Return the records of a batch, unpacked. ConfigError for a codec that this Python does not have."""
    try:
        if not codec:
            return data
        if codec not in (1, 4):
            raise ImportError
        zstd = importlib.import_module("compression.zstd") if codec == 4 else None      # from Python 3.14 on
        unpacker = zstd.ZstdDecompressor() if zstd else zlib.decompressobj(31)
        data = unpacker.decompress(data, LARGEST_BYTES)
    except ImportError:
        raise ConfigError("topic %s has messages compressed with %s, which this Python cannot read: set the topic's "
                          "compression.type to gzip" % (topic, CODECS.get(codec, "codec %d" % codec)), 1)
    except Exception as error:      # zlib.error, ZstdError: each library has its own
        raise KafkaError(2, "topic %s: a compressed batch (%s)" % (topic, error))
    if not unpacker.eof:
        raise KafkaError(2, "topic %s: a compressed batch that is cut short or huge" % topic)
    return data


def murmur2(key):
    """Return the hash by which the Java client spreads keys over partitions (modulo their number)."""
    mask, mix, whole = 0xFFFFFFFF, 0x5BD1E995, len(key) & ~3
    number = 0x9747B28C ^ len(key)
    for start in range(0, whole, 4):
        word = int.from_bytes(key[start:start + 4], "little") * mix & mask
        number = number * mix & mask ^ (word ^ word >> 24) * mix & mask
    if key[whole:]:
        number = (number ^ int.from_bytes(key[whole:], "little")) * mix & mask
    number = (number ^ number >> 13) * mix & mask
    return (number ^ number >> 15) & 0x7FFFFFFF


# ---- Kafka: connections ---------------------------------------------------------------------------------------------

def kafka_settings(environ):
    """Return the variables about Kafka, checked, as attributes. ConfigError names the one that is wrong."""
    for name in ("KAFKA_BROKERS", "KAFKA_INCOMING_TOPIC", "KAFKA_OUTGOING_TOPIC", "KAFKA_CONSUMER_GROUP", "BOT_TOKEN"):
        if not environ.get(name):
            raise ConfigError("%s is not set" % name)
    brokers = [re.match(r"\s*\[?([^\s\[\]]+?)\]?:(\d{1,5})\s*$", part) for part in environ["KAFKA_BROKERS"].split(",")]
    if not all(match and 0 < int(match.group(2)) < 65536 for match in brokers):
        raise ConfigError("KAFKA_BROKERS=%r: expected HOST:PORT, or several with commas" % environ["KAFKA_BROKERS"])
    for name, choices in (("KAFKA_SECURITY_PROTOCOL", ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")),
                          ("KAFKA_SASL_MECHANISM", ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"))):
        if (environ.get(name) or choices[0]) not in choices:
            raise ConfigError("%s=%r: expected one of %s" % (name, environ[name], ", ".join(choices)))
    protocol = environ.get("KAFKA_SECURITY_PROTOCOL") or "PLAINTEXT"
    mechanism = (environ.get("KAFKA_SASL_MECHANISM") or "PLAIN") if protocol.startswith("SASL") else None
    if mechanism and not (environ.get("KAFKA_SASL_USERNAME") and environ.get("KAFKA_SASL_PASSWORD")):
        raise ConfigError("%s needs KAFKA_SASL_USERNAME and KAFKA_SASL_PASSWORD" % protocol)
    try:
        tls = protocol.endswith("SSL") and ssl.create_default_context(cafile=environ.get("KAFKA_SSL_CAFILE") or None)
    except OSError as error:
        raise ConfigError("KAFKA_SSL_CAFILE=%r: %s" % (environ.get("KAFKA_SSL_CAFILE"), error))
    return types.SimpleNamespace(
        brokers=[(match.group(1), int(match.group(2))) for match in brokers], tls=tls, mechanism=mechanism,
        username=environ.get("KAFKA_SASL_USERNAME"), password=environ.get("KAFKA_SASL_PASSWORD"),
        incoming=environ["KAFKA_INCOMING_TOPIC"], outgoing=environ["KAFKA_OUTGOING_TOPIC"],
        dead_letters=environ.get("KAFKA_DEAD_LETTER_TOPIC"), group=environ["KAFKA_CONSUMER_GROUP"],
        bot_id=environ.get("BOT_ID"), token=environ["BOT_TOKEN"])


class Connection:
    """A connection to one broker, logged in; one request at a time. To be closed after whatever it raises.

    It raises OSError (the network), KafkaError (the answer), ConfigError (a refusal, a certificate, a broker too old),
    and Interrupted when give_up() is true, which it asks several times a second.
    """

    def __init__(self, address, settings, give_up):
        self.name, self.settings, self.give_up = "%s:%d" % address, settings, give_up
        self.asking, self.count = ("TLS", {}), 0
        try:
            self.socket = socket.create_connection(address, CONNECT_SECONDS)
        except OSError as error:
            raise type(error)("%s: %s" % (self.name, error.strerror or error))
        try:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if settings.tls:
                self.socket = settings.tls.wrap_socket(self.socket, server_hostname=address[0],
                                                       do_handshake_on_connect=False)
                self._wait(self.socket.do_handshake, ANSWER_SECONDS)
            self._log_in()
        except BaseException as error:
            self.socket.close()
            if isinstance(error, ssl.SSLCertVerificationError):
                raise ConfigError("%s: %s" % (self.name, error), 1)
            raise

    def _wait(self, operation, seconds):
        """Return operation(), which is tried again each time the socket's time-out ends it."""
        deadline = time.monotonic() + seconds
        self.socket.settimeout(0.2)
        while not self.give_up():
            try:
                return operation()
            except socket.timeout:
                if time.monotonic() > deadline:
                    raise socket.timeout("%s has not answered %s for %d s" % (self.name, self.asking[0], seconds))
        raise Interrupted

    def _log_in(self):
        apis = {api["key"]: range(api["lowest"], api["highest"] + 1) for api in self.call("ApiVersions", {})["apis"]}
        mechanism, username, password = self.settings.mechanism, self.settings.username, self.settings.password
        for name, (key, version, _, _) in APIS.items():
            if version not in apis.get(key, ()) and (mechanism or not name.startswith("Sasl")):
                raise ConfigError("%s is not a Kafka from 0.11 on (with SASL: 1.0): it does not take %s version %d"
                                  % (self.name, name, version), 1)
        if mechanism:
            self.call("SaslHandshake", dict(mechanism=mechanism))
        if mechanism == "PLAIN":            # RFC 4616
            self.call("SaslAuthenticate", dict(data=("\0%s\0%s" % (username, password)).encode()))
        elif mechanism:
            self._scram({"SCRAM-SHA-256": "sha256", "SCRAM-SHA-512": "sha512"}[mechanism], username, password)

    def _scram(self, algorithm, username, password):
        """RFC 5802 without channel binding: each side proves that it knows the password, and tells it to nobody."""
        def mac(key, data):
            return hmac.new(key, data, algorithm).digest()

        nonce = base64.b64encode(os.urandom(24)).decode()
        opening = "n=%s,r=%s" % (username.replace("=", "=3D").replace(",", "=2C"), nonce)
        challenge = self.call("SaslAuthenticate", dict(data=("n,," + opening).encode()))["data"] or b""
        fields = re.match(rb"r=([^,]+),s=([^,]+),i=(\d{4,6})$", challenge)
        if not fields or not fields.group(1).startswith(nonce.encode()) or int(fields.group(3)) < 4096:
            raise KafkaError(2, "the SCRAM challenge of " + self.name)
        salt, rounds = base64.b64decode(fields.group(2) + b"==="), int(fields.group(3))
        salted = hashlib.pbkdf2_hmac(algorithm, password.encode(), salt, rounds)
        closing, client_key = b"c=biws,r=" + fields.group(1), mac(salted, b"Client Key")
        signed = b",".join((opening.encode(), challenge, closing))
        signature = mac(hashlib.new(algorithm, client_key).digest(), signed)
        proof = base64.b64encode(bytes(a ^ b for a, b in zip(client_key, signature)))
        answer = self.call("SaslAuthenticate", dict(data=closing + b",p=" + proof))
        if answer["data"] != b"v=" + base64.b64encode(mac(mac(salted, b"Server Key"), signed)):
            raise ConfigError("%s does not know the password of %s itself" % (self.name, username), 1)

    def call(self, api, request, seconds=ANSWER_SECONDS):
        """Send a request and return its answer. Raises the first `error` that is in it."""
        key, version, schema, _ = APIS[api]
        self.asking, self.count = (api, request), self.count + 1
        frame = encode(HEADER, dict(key=key, version=version, correlation_id=self.count, client_id="echo-bot"))
        frame += encode(schema, request)
        self.socket.settimeout(ANSWER_SECONDS)
        self.socket.sendall(struct.pack(">i", len(frame)) + frame)
        return self.receive(seconds)

    def receive(self, seconds):
        """Return the answer to the request that was sent last; `call` does so, unless it was Interrupted."""
        api, request = self.asking
        size, correlation_id = struct.unpack(">ii", self._read(8, seconds))
        if correlation_id != self.count or not 4 <= size <= LARGEST_BYTES:
            raise KafkaError(2, "the head of an answer of " + self.name)
        decoder = Decoder(self._read(size - 4, seconds))
        answer = decoder.value(APIS[api][3])
        if decoder.error:
            names = [topic if isinstance(topic, str) else topic["name"] for topic in request.get("topics", ())]
            check(decoder.error, "%s (%s)" % (api, ", ".join(names) or request.get("group") or self.name))
        if decoder.position != len(decoder.data):
            raise KafkaError(2, "the length of an answer of " + self.name)
        return answer

    def _read(self, size, seconds):
        data = bytearray()
        while len(data) < size:
            part = self._wait(lambda: self.socket.recv(min(size - len(data), 1 << 20)), seconds)
            if not part:
                raise ConnectionResetError("%s hung up without answering %s" % (self.name, self.asking[0]))
            data += part
        return bytes(data)


class Cluster:
    """The connections of one thread, and what it has been told about the brokers. Raises what Connection does."""

    def __init__(self, settings, give_up):
        self.settings, self.give_up, self.known, self.reached = settings, give_up, set(settings.brokers), False
        self.connections, self.leaders, self.coordinator_at = {}, {}, None

    def connection(self, address):
        """Return the connection to a broker, a new one where there is none."""
        if address not in self.connections:
            self.connections[address] = Connection(address, self.settings, self.give_up)
        return self.connections[address]

    def any(self):
        """Return a connection to one of the brokers, whichever takes it, an open one first."""
        failure = None
        for address in sorted(self.known, key=lambda address: (address not in self.connections, random.random())):
            try:
                return self.connection(address)
            except OSError as error:
                failure = error
        raise failure

    def find(self, topic, create=False):
        """Return {partition: (host, port) of its leader, or None}, asked for anew; {} where there is no such topic."""
        answer = self.any().call("Metadata", dict(topics=[topic], create=create))
        brokers = {broker["node"]: (broker["host"], broker["port"]) for broker in answer["brokers"]}
        self.known = set(brokers.values()) | set(self.settings.brokers)
        for found in answer["topics"]:
            check(found["code"] if found["code"] != 3 else 0, "topic " + topic)
            self.leaders[topic] = {part["index"]: brokers.get(part["leader"]) for part in found["partitions"]}
        return self.leaders[topic]

    def coordinator(self):
        """Return the connection to the broker that keeps the group."""
        if not self.coordinator_at:
            answer = self.any().call("FindCoordinator", dict(key=self.settings.group, key_type=0))
            self.coordinator_at, self.reached = (answer["host"], answer["port"]), True
        return self.connection(self.coordinator_at)

    def forget(self):
        """Close every connection, and take nothing for granted that was true before."""
        for connection in self.connections.values():
            connection.socket.close()
        self.connections, self.leaders, self.coordinator_at = {}, {}, None


# ---- Kafka: the consumer group --------------------------------------------------------------------------------------

def assign_ranges(members, counts):
    """Share partitions out as the Java client's range assignor does: {member: {topic: [partition, ...]}}.

    members: {member: its topics}; counts: {topic: the number of its partitions}.
    """
    shares = {member: {} for member in members}
    for topic, count in counts.items():
        readers = sorted(member for member in members if topic in members[member])
        for place, member in enumerate(readers):
            share, extra = divmod(count, len(readers))
            first = place * share + min(place, extra)
            shares[member][topic] = list(range(first, first + share + (place < extra)))
    return shares


class Partition:
    """A partition that we read: `position` is the next offset to fetch, `committed` the group's; None: the earliest."""

    def __init__(self, index, committed):
        self.index, self.position, self.committed = index, committed, committed
        self.batches, self.records = iter(()), []

    def next_record(self):
        """Return (offset, key, value), or None where nothing fetched is left. Raises what decode_batches does."""
        while not self.records:
            after, records = next(self.batches, (None, None))
            if after is None:
                return None
            self.records = [record for record in records if record[0] >= self.position][::-1]
            self.position = after
        return self.records.pop()


class Member:
    """Our part in one generation of the consumer group: from JoinGroup until `over`, of which a heartbeat learns."""

    def __init__(self, settings, cluster, last):
        """last: what we were in the generation before, or None."""
        self.settings, self.cluster, self.id, self.generation = settings, cluster, last.id if last else "", -1
        self.partitions, self.count = [], None      # count: of the topic's partitions; only the group's leader knows
        self.joining, self.over, self.ended = None, True, threading.Event()
        if last:
            last.ended.set()

    def fields(self, **more):
        """Return `more` and the fields by which the group knows us."""
        return dict(more, group=self.settings.group, generation=self.generation, member_id=self.id)

    def join(self):
        """Take part in the group's next generation; that waits until each other member is done with its update."""
        topic, seconds = self.settings.incoming, REBALANCE_MS / 1000 + 5
        subscription = encode(SUBSCRIPTION, dict(version=0, topics=[topic], user_data=b""))
        self.joining = connection = self.cluster.coordinator()
        answer = connection.call("JoinGroup", self.fields(
            session_timeout_ms=SESSION_MS, rebalance_timeout_ms=REBALANCE_MS, protocol_type="consumer",
            protocols=[dict(name="range", metadata=subscription)]), seconds)
        self.joining, self.id, self.generation = None, answer["member_id"], answer["generation"]
        shares = self._assign(answer["members"]) if answer["leader"] == self.id else []
        share = connection.call("SyncGroup", self.fields(assignments=shares), seconds)["assignment"]
        topics = Decoder(share).value(ASSIGNMENT)["topics"] if share else []
        indexes = [index for entry in topics if entry["name"] == topic for index in entry["partitions"]]
        answer = connection.call("OffsetFetch", self.fields(topics=[dict(name=topic, partitions=indexes)]))
        self.partitions = [Partition(part["index"], part["offset"] if part["offset"] >= 0 else None)
                           for entry in answer["topics"] for part in entry["partitions"]]
        self.over = False
        threading.Thread(target=self._beat, daemon=True).start()
        log.info("group %s, generation %d: partitions %s of %s", self.settings.group, self.generation,
                 ", ".join(map(str, indexes)) or "none", topic)

    def _assign(self, members):
        """Return each member's share: what its leader tells the group in SyncGroup."""
        topics = {member["member_id"]: Decoder(member["metadata"] or b"").value(SUBSCRIPTION)["topics"]
                  for member in members}
        counts = {topic: len(self.cluster.find(topic)) for topic in sorted(set(sum(topics.values(), [])))}
        self.count = counts[self.settings.incoming]
        return [dict(member_id=member, assignment=encode(ASSIGNMENT, dict(version=0, user_data=b"", topics=[
            dict(name=topic, partitions=share) for topic, share in shares.items()])))
            for member, shares in assign_ranges(topics, counts).items()]

    def _beat(self):
        """Send heartbeats, on a thread and connections of its own, until the generation has `ended` for us."""
        cluster, trouble = Cluster(self.settings, self.ended.is_set), False
        while not self.ended.wait(HEARTBEAT_SECONDS):
            try:
                cluster.coordinator().call("Heartbeat", self.fields(), SESSION_MS / 3000)
                trouble = False
            except Interrupted:
                break
            except (OSError, KafkaError, ConfigError) as error:
                if getattr(error, "code", 0) in NOT_A_MEMBER:
                    self.over = True    # and go on: the group waits for a member only while its heart beats
                    continue
                if not trouble:
                    log.warning("no heartbeat: %s", error)
                trouble = True
                cluster.forget()
        cluster.forget()

    def commit(self, partition, offset):
        """Commit an offset; return False where the group may have given the partition to another by now."""
        try:
            self.cluster.coordinator().call("OffsetCommit", self.fields(retention_ms=-1, topics=[dict(
                name=self.settings.incoming, partitions=[dict(index=partition.index, offset=offset, metadata=None)])]))
        except KafkaError as error:
            if error.code not in NOT_A_MEMBER:
                raise
            self.over = True
            return False
        partition.committed = offset
        return True

    def leave(self):
        """Tell the group that we go, so that our partitions move now and not after SESSION_MS. Raises nothing."""
        self.ended.set()
        self.over, deadline = True, time.monotonic() + 5
        cluster = Cluster(self.settings, lambda: time.monotonic() > deadline)
        try:
            if self.joining and not self.id:    # the group has a place for us already: hear under which name
                self.joining.give_up = cluster.give_up
                self.id = self.joining.receive(ANSWER_SECONDS)["member_id"]
            if self.id:
                cluster.coordinator().call("LeaveGroup", self.fields())
                log.info("left group %s", self.settings.group)
        except (OSError, KafkaError, ConfigError, Interrupted) as error:
            log.warning("group %s was not left: %s", self.settings.group, error)
        cluster.forget()


# ---- Kafka: the source ----------------------------------------------------------------------------------------------

class Kafka:
    """Updates from one topic, replies to another: at least once, and exactly once while bots end by SIGTERM only.

    An update that was taken but not acknowledged comes again after close(). An envelope whose bot_id is not BOT_ID is
    passed over. Any method may raise ConfigError, where trying again is of no use; every other failure is waited out.
    Interrupted: a signal came, and nothing was in hand.
    """

    def __init__(self, environ, stopping):
        self.settings, self.in_hand = kafka_settings(environ), False    # while an update is in hand, a signal waits
        self.cluster = Cluster(self.settings, lambda: stopping.requested and not self.in_hand)
        self.member, self.producer, self.sequences, self.failures, self.looked_at = None, None, {}, 0, 0.0

    def take(self):
        """Return an object whose `update` is the next update, or None when none came within half a second."""
        if self.cluster.give_up():
            return None
        try:
            if not self.member or self.member.over:
                self.member = Member(self.settings, self.cluster, self.member)
                self.member.join()
                return None     # that may have taken a while: the caller looks first whether it still wants an update
            taken = self._next()
            self.failures = 0
        except (OSError, KafkaError) as error:
            if getattr(error, "code", 0) == 25:     # UNKNOWN_MEMBER_ID: join as a new one
                self.member = None
            self._back_off("reading " + self.settings.incoming, error)
            return None
        if taken:
            self.in_hand = True
            if self._open(taken):
                return taken
            self.acknowledge(taken)
        return None

    def reply(self, taken, call):
        """Produce the answer to a taken update. call: (method, parameters), as reply_to returns it."""
        method, params = call
        try:
            key = str(params["chat_id"] if "chat_id" in params else
                      taken.update["callback_query"]["message"]["chat"]["id"]).encode("utf-8", "replace")
        except (KeyError, TypeError):       # a callback query of an inline message is from no chat
            key = None
        value = json.dumps({"bot_token": self.settings.token, "method": method, "params": params}).encode()
        code = self._produce(self.settings.outgoing, key, value)
        if code:
            raise ConfigError("topic %s does not take a reply (error %d): is its max.message.bytes too small?"
                              % (self.settings.outgoing, code), 1)

    def acknowledge(self, taken):
        """Commit the offset after a taken update, unless the group has taken its partition away."""
        if not self._until_done("commit", lambda: taken.member.commit(taken.partition, taken.offset + 1)):
            log.warning("%s went to another bot meanwhile, which may do it again", taken.place)
        self.in_hand = False

    def close(self):
        """Leave the group and close every connection; take() joins again."""
        self.in_hand = False
        if self.member:
            self.member.leave()
        self.member = None
        self.cluster.forget()

    def _back_off(self, about, error):
        """Log an error, let go of all that may have caused it, and wait before the next try."""
        self.failures += 1
        if not self.cluster.reached and self.failures >= FIRST_TRIES and isinstance(
                error, (socket.gaierror, ssl.SSLError, ConnectionResetError, BrokenPipeError)):
            raise ConfigError("KAFKA_BROKERS or KAFKA_SECURITY_PROTOCOL is wrong: %s" % error, 1)
        delay = min(3, 0.1 * 2 ** min(self.failures, 10)) * random.uniform(0.5, 1)
        log.warning("%s: %s; trying again in %.1f s", about, error, delay)
        self.cluster.forget()
        self._pause(delay)

    def _pause(self, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.cluster.give_up():
                raise Interrupted
            time.sleep(0.05)

    def _until_done(self, about, step):
        """Return step(), which is tried until it comes through."""
        while True:
            try:
                result = step()
                self.failures = 0
                return result
            except (OSError, KafkaError) as error:
                self._back_off(about, error)

    def _next(self):
        """Return the next record of a partition that has one, each partition in turn; fetch when none has."""
        topic, partitions = self.settings.incoming, self.member.partitions
        for fetch in (True, False):
            for _ in partitions:
                partition = partitions.pop(0)
                partitions.append(partition)
                record = partition.next_record()
                if record:
                    return types.SimpleNamespace(
                        member=self.member, partition=partition, offset=record[0], key=record[1], value=record[2],
                        place="%s, partition %d, offset %d" % (topic, partition.index, record[0]))
                if partition.committed is not None and partition.committed < partition.position:
                    self.member.commit(partition, partition.position)   # past what is no update: KEDA counts it as lag
            if fetch:
                self._fetch()
        return None

    def _fetch(self):
        """Fetch from each leader in turn: first what is there already, and when that is nothing, what comes."""
        topic, now, shares = self.settings.incoming, time.monotonic(), {}
        leaders = self.cluster.leaders.get(topic)
        if leaders is None or now - self.looked_at > (METADATA_SECONDS if leaders and all(leaders.values()) else 2):
            self.looked_at, leaders = now, self.cluster.find(topic)
            if not leaders:
                log.warning("topic %s does not exist yet", topic)
            if self.member.count not in (None, len(leaders)):       # the group's leader shares out what is new
                self.member.over = True
        for partition in self.member.partitions:
            if leaders.get(partition.index):
                shares.setdefault(leaders[partition.index], []).append(partition)
        if not shares:
            self._pause(FETCH_MS / 1000)
        for wait_ms in (0, FETCH_MS // max(1, len(shares))):
            for address, partitions in shares.items():
                if self._fetch_from(self.cluster.connection(address), partitions, wait_ms):
                    return

    def _fetch_from(self, connection, partitions, wait_ms):
        """Fetch partitions from their leader; return whether anything came."""
        topic, code, by_index = self.settings.incoming, 0, {partition.index: partition for partition in partitions}
        for partition in partitions:
            if partition.position is None:
                answer = connection.call("ListOffsets", dict(replica_id=-1, isolation_level=1, topics=[dict(
                    name=topic, partitions=[dict(index=partition.index, time_ms=-2)])]))        # -2: the earliest
                partition.position = answer["topics"][0]["partitions"][0]["offset"]
        answer = connection.call("Fetch", dict(
            replica_id=-1, max_wait_ms=wait_ms, min_bytes=1, max_bytes=PARTITION_BYTES * 16, isolation_level=1,
            topics=[dict(name=topic, partitions=[
                dict(index=partition.index, offset=partition.position, log_start_offset=-1, max_bytes=PARTITION_BYTES)
                for partition in partitions])]))
        fetched = [part for entry in answer["topics"] for part in entry["partitions"]]
        for part in fetched:
            partition = by_index[part["index"]]
            if part["code"] == 1:       # OFFSET_OUT_OF_RANGE
                log.warning("%s, partition %d: offset %d is not there any more: from the earliest on",
                            topic, partition.index, partition.position)
                partition.position = partition.committed = None
            elif part["code"]:
                code = part["code"]
            else:
                partition.batches = decode_batches(part["records"] or b"", part["aborted"], topic)
        check(code, "Fetch (%s)" % topic)
        return any(part["records"] for part in fetched)

    def _open(self, taken):
        """Put the record's update into `taken`, and return whether there is one for us; log it where there is none."""
        try:
            envelope = json.loads(taken.value)
            taken.update, bot_id = envelope["update"], envelope["bot_id"]
            if not isinstance(taken.update, dict):
                raise TypeError
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            log.error("%s is no JSON of {bot_id, update} (%s): passed over", taken.place, type(error).__name__)
            code = self.settings.dead_letters and self._produce(self.settings.dead_letters, taken.key, taken.value)
            if code:
                log.error("%s: topic %s does not take it (error %d)", taken.place, self.settings.dead_letters, code)
            return False
        if self.settings.bot_id and str(bot_id) != self.settings.bot_id:
            log.info("%s is for another bot: passed over", taken.place)
            return False
        return True

    def _produce(self, topic, key, value):
        """Append a record and wait for its replicas. Return 0, or a code of BAD_RECORD: the topic does not take it."""
        chosen = []         # the partition stays the same when it is tried again: so the broker knows a repeat

        def append():
            leaders = self.cluster.leaders.get(topic) or self.cluster.find(topic, create=True)
            if leaders and not chosen:
                chosen.append((random.getrandbits(31) if key is None else murmur2(key)) % len(leaders))
            address = leaders and leaders.get(chosen[0])
            check(0 if address else 5, "topic " + topic)
            connection = self.cluster.connection(address)
            if not self.producer:
                answer = connection.call("InitProducerId", dict(transactional_id=None, timeout_ms=60000))
                if answer["code"] != 31:    # before Kafka 2.8 this took a right of its own: without it, do without
                    check(answer["code"], "a producer id")
                self.producer, self.sequences = (answer["producer_id"], answer["epoch"]), {}
            sequence = self.sequences.get((topic, chosen[0]), 0) if self.producer[0] >= 0 else -1
            records = encode_batch(key, value, self.producer[0], self.producer[1], sequence)
            answer = connection.call("Produce", dict(transactional_id=None, acks=-1, timeout_ms=10000, topics=[dict(
                name=topic, partitions=[dict(index=chosen[0], records=records)])]))
            code = answer["topics"][0]["partitions"][0]["code"]
            if code in NOT_THE_PRODUCER:
                self.producer = None
            if code in BAD_RECORD:
                return code
            check(0 if code == 46 else code, "topic " + topic)      # 46: the broker has it already
            self.sequences[topic, chosen[0]] = (sequence + 1) & 0x7FFFFFFF
            return 0
        return self._until_done("writing to " + topic, append)


# ---- The loop -------------------------------------------------------------------------------------------------------

def run(source, sidecar, stopping):
    """Take, track, reply, and only then acknowledge; until a signal comes or the source has no more."""
    sidecar.reset()
    try:
        while not stopping.requested:
            if sidecar.draining:
                log.info("the sidecar is draining: no more updates are taken")
                source.close()
                while not stopping.requested and not sidecar.ready():
                    stopping.sleep(1)
                continue
            taken = source.take()
            if taken is not None:
                with sidecar.track():
                    handle(source, taken)
    except (EOFError, Interrupted):
        pass
    finally:
        source.close()
        sidecar.close()
        log.info("stopped")


def handle(source, taken):
    try:
        call = reply_to(taken.update)
    except Exception as error:      # it would be as broken the next time
        log.warning("a broken update is passed over: %s: %s: %.200r", type(error).__name__, error, taken.update)
        call = None
    if call:
        source.reply(taken, call)
    source.acknowledge(taken)


def main(environ):
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    stopping = Stopping()
    try:
        sidecar = Sidecar()
        if environ.get("KAFKA_BROKERS"):
            source = Kafka(environ, stopping)
        elif environ.get("BOT_TOKEN"):
            source = Telegram(environ, stopping)
        else:
            source = Console(stopping)
        run(source, sidecar, stopping)
    except (ConfigError, ValueError) as error:
        log.error("%s", error)
        return getattr(error, "status", 2)
    except BrokenPipeError:             # nobody reads the console's replies any more
        return 1
    return 0


if __name__ == "__main__":
    os._exit(main(os.environ))          # sys.exit would take the handlers away first, and one more signal would kill it
