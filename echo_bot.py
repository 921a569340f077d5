#!/usr/bin/env python3
"""A Telegram echo bot that loses no message when it is shut down: sidecar.py's reference worker.

    python echo_bot.py      KAFKA_BROKERS set: take updates from Kafka, send replies to Kafka
                            else BOT_TOKEN set: a Telegram bot by long polling
                            else: the console; each line typed is a message, or an update
                            where it is a JSON object

It tells the sidecar of every update, and works the same without one. On SIGTERM or SIGINT, or when
the sidecar drains, it takes no more, and finishes and acknowledges what it has in hand. It needs
Python 3.7 or newer and nothing else.

Variables:

    SIDECAR_URL             where the sidecar is                        http://127.0.0.1:8081
    CONCURRENCY             how many updates are in hand at once,       8 (the console: 1)
                            1 to 100; one chat's are done in order
    BOT_TOKEN               the token that @BotFather gave
    TELEGRAM_API_URL        a Bot API server of your own                https://api.telegram.org
    HTTPS_PROXY, NO_PROXY   the proxy on the way to Telegram            none

and for Kafka 2.2 or newer, where updates come as {"bot_id", "update"} and replies go as
{"bot_token", "method", "params"}:

    KAFKA_BROKERS, KAFKA_INCOMING_TOPIC, KAFKA_OUTGOING_TOPIC, KAFKA_CONSUMER_GROUP
    BOT_ID                  an update for another bot is passed over    every update is answered
    KAFKA_DEAD_LETTER_TOPIC where a record goes that is no such JSON,   it is logged, passed over
                            or whose reply the outgoing topic refuses
    KAFKA_SECURITY_PROTOCOL PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL  PLAINTEXT
    KAFKA_SSL_CAFILE        the CA of the brokers' certificates         the system's CAs
    KAFKA_SSL_CERTFILE, KAFKA_SSL_KEYFILE: the bot's own certificate and its key (PEM, no password)
    KAFKA_SASL_MECHANISM    PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512       PLAIN
    KAFKA_SASL_USERNAME, KAFKA_SASL_PASSWORD
"""
import base64
import collections
import contextlib
import functools
import hashlib
import hmac
import http.client
import importlib
import itertools
import json
import logging
import os
import random
import re
import select
import signal
import socket
import ssl
import struct
import sys
import threading
import time
import types
import urllib.request
import zlib
from concurrent import futures
from urllib.parse import unquote, urlsplit

from sidecar import Sidecar

log = logging.getLogger("echo_bot")


class ConfigError(Exception):
    """A setting is wrong: one line for the bot's user, and exit status 2."""


class Refused(Exception):
    """A server refuses, and trying again is of no use: one line for the user, and exit status 1."""


class Interrupted(Exception):
    """What was under way is given up, since the bot has to stop; an update in hand comes again."""


# ---- The bot ------------------------------------------------------------------------------------

def reply_to(update):
    """Return the Bot API call that answers an update, as (method, parameters), or None for none.

    A text message is echoed, a callback query is confirmed, within the limits that
    https://core.telegram.org/bots/api tells. Any exception: the update is broken.
    """
    if "message" in update:
        message = update["message"]
        if "text" not in message:
            return None
        return "sendMessage", {
            "chat_id": message["chat"]["id"], "text": cut("Echo: " + message["text"], 4096),
            "reply_parameters": {"message_id": message["message_id"],
                                 "allow_sending_without_reply": True}}
    if "callback_query" in update:
        query = update["callback_query"]
        return "answerCallbackQuery", {"callback_query_id": query["id"],
                                       "text": cut("Received: " + query.get("data", ""), 200)}
    return None


def cut(text, limit):
    """Return `text`, cut to `limit` UTF-16 code units, as Telegram counts; no half characters."""
    units = text.encode("utf-16-le", "surrogatepass")[:2 * limit]
    return units.decode("utf-16-le", "ignore")


def chat_of(update):
    """Return the id of an update's chat, or None: it is of an inline message, or broken."""
    try:
        message = update["message"] if "message" in update else update["callback_query"]["message"]
        return str(message["chat"]["id"])
    except (KeyError, TypeError):
        return None


class Stopping:
    """Notes the first signal, or what else ends the bot. Whoever waits looks at `requested` several
    times a second.

    So it does not matter which thread a signal is delivered to, nor which call it interrupts.
    """

    def __init__(self, *signals):
        self.requested_at = None        # in time.monotonic()'s seconds
        self.failure = None             # the first exception that ends the bot
        self._thread = futures.ThreadPoolExecutor(1)        # runs what wait() waits for
        for number in signals:
            signal.signal(number, self.request)

    def request(self, *_):
        if not self.requested:
            self.requested_at = time.monotonic()

    def fail(self, error):
        """Stop because of an exception, which main() tells."""
        self.failure = self.failure or error
        self.request()

    @property
    def requested(self):
        return self.requested_at is not None

    def for_longer_than(self, seconds, since):
        """Return whether both the signal and the time `since` were more than `seconds` ago."""
        return self.requested and time.monotonic() > max(self.requested_at, since) + seconds

    def sleep(self, seconds):
        """Wait, but not on after a signal."""
        end = time.monotonic() + seconds
        while not self.requested and time.monotonic() < end:
            time.sleep(max(0, min(0.1, end - time.monotonic())))

    def wait(self, function):
        """Return function(), or None when a signal came before or comes meanwhile.

        Its thread is left behind in that case.
        """
        future = self._thread.submit(function)
        while not self.requested:
            if futures.wait([future], 0.1).done:
                return future.result()
        return None


@contextlib.contextmanager
def borrowed(pool, make, *args):
    """Lend something from a pool, or make(*args) when all are in use; after an exception it is
    closed and not used again."""
    try:
        thing = pool.pop()
    except IndexError:
        thing = make(*args)
    try:
        yield thing
    except BaseException:
        thing.close()
        raise
    pool.append(thing)


def retry_delay(failures, first_seconds=0.2, longest_seconds=3.0):
    """Return seconds to wait before another try, after so many failures in a row."""
    return min(longest_seconds, first_seconds * 2 ** min(failures - 1, 10)) * random.uniform(0.5, 1)


def log_retry(what, error, failures, delay):
    """Log a failure that is waited out; no warning the first time, since it may soon be over."""
    log.log(logging.WARNING if failures > 1 else logging.INFO, "%s: %s; trying again in %.1f s",
            what, error, delay)


STOP_SECONDS = 5.0              # after a signal, a reply that fails is tried again for so long
IDLE_SECONDS = 20.0             # a connection that lay idle for longer is opened anew


class Console:
    """Updates from standard input, replies to standard output.

    This and the sources below have the same four methods. `take` waits for the next update and
    returns it with a receipt, or None so that the caller can look around; EOFError: there are no
    more. `reply` makes the Bot API call that answers the update of a receipt. `acknowledge` says
    that this update is done: only then it is not handed out again. `close`, when nothing is in
    hand, lets go of everything; `take` may follow. Several threads may call `reply` and
    `acknowledge` at once, one alone calls the others.
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
            update = {"update_id": self.taken, "message": {
                "message_id": self.taken, "chat": {"id": 0}, "text": line.rstrip("\r\n")}}
        return update, self.taken

    def reply(self, receipt, call):
        print(call[1]["text"], flush=True)

    def acknowledge(self, receipt):
        pass

    def close(self):
        pass


def split_url(name, text, schemes):
    """Return the parts of a URL. ConfigError names the variable, and shows no password."""
    shown = re.sub("//.*@", "//...@", text)
    try:
        parts = urlsplit(text)
        valid = (parts.scheme in schemes and parts.hostname and parts.port != 0
                 and re.fullmatch("[!-~]+", text) and not parts.query and not parts.fragment)
    except ValueError:      # a port that is no number, a bracket that is not closed
        valid = False
    if not valid:
        raise ConfigError("%s=%r: expected %s://HOST[:PORT]" % (name, shown, schemes[-1]))
    return parts


def login_header(name, parts):
    """Return {name: value} of the header that carries a URL's user:password; {} if it has none."""
    if parts.username is None:
        return {}
    login = "%s:%s" % (unquote(parts.username), unquote(parts.password or ""))
    return {name: "Basic " + base64.b64encode(login.encode()).decode()}


def is_stale(connected, used_at):
    """Return whether a socket without a request under way is better not used again.

    Its peer has closed it, or a middlebox may have forgotten it silently: one that lay idle for
    IDLE_SECONDS is not trusted, as in franz-go.
    """
    return (time.monotonic() - used_at > IDLE_SECONDS
            or bool(select.select([connected], [], [], 0)[0]))


class Telegram:
    """Updates by long polling, replies as Bot API calls: https://core.telegram.org/bots/api

    The offset of a getUpdates confirms every update before it, so it is the oldest one that is not
    done. Telegram hands out at once what is not confirmed: while something is in hand, it is asked
    only when there is room for more, when one is done or a second later, and what is known already
    is passed over. A bot that is killed gets again what was not confirmed.
    """

    POLL_SECONDS = 50
    ANSWER_SECONDS = 10
    CONNECT_SECONDS = 5             # for each address of the server, and for the TLS handshake
    WINDOW = 100                    # getUpdates returns no more than this
    MAX_DELAY_SECONDS = 30.0
    TRIES = 5                       # of a reply that gets a 5xx; of a poll that another one ends

    def __init__(self, environ, stopping, concurrency):
        self.stopping, self.concurrency = stopping, concurrency
        self._token = environ["BOT_TOKEN"]
        if not re.fullmatch("[0-9]+:[A-Za-z0-9_-]+", self._token):
            raise ConfigError("BOT_TOKEN is malformed: expected what @BotFather gave, such as "
                              "123456:ABC-DEF")
        self._url = split_url("TELEGRAM_API_URL", environ.get("TELEGRAM_API_URL")
                              or "https://api.telegram.org", ("http", "https"))
        self._headers = dict(login_header("Authorization", self._url),
                             **{"Content-Type": "application/json"})
        self._proxy = None
        if self._url.scheme == "https" and not urllib.request.proxy_bypass(self._url.hostname):
            proxy = urllib.request.getproxies().get("https")
            if proxy:
                proxy = proxy if "://" in proxy else "http://" + proxy
                self._proxy = split_url("HTTPS_PROXY", proxy, ("http",))
        self._polling, self._idle = self._new_connection(), collections.deque()
        self._updates = collections.deque()         # received, not handed out
        self._changed = threading.Condition()       # guards the next two
        self._offset = self._confirmed = 0
        self._done = {}                             # update_id: whether it is done; handed out
        log.info("Telegram: polling %s://%s", self._url.scheme, self._url.netloc.rpartition("@")[2])

    def take(self):
        if not self._updates:
            with self._changed:
                known = dict(self._done)
            room = self.concurrency - list(known.values()).count(False)
            limit = min(self.WINDOW, len(known) + room)
            updates = self._get_updates(0 if known else self.POLL_SECONDS, limit) or ()
            self._updates.extend(update for update in updates if update["update_id"] not in known)
            if known and not self._updates:
                with self._changed:
                    self._changed.wait_for(lambda: self._done != known, 1)
                return None
        if not self._updates:
            return None
        update = self._updates.popleft()
        with self._changed:
            self._done[update["update_id"]] = False
        return update, update["update_id"]

    def reply(self, receipt, call):
        with borrowed(self._idle, self._new_connection) as connection:
            self._send(connection, *call)

    def acknowledge(self, receipt):
        with self._changed:
            self._done[receipt] = True
            while self._done and self._done[min(self._done)]:
                self._offset = min(self._done) + 1
                del self._done[min(self._done)]
            self._changed.notify_all()

    def close(self):
        self._updates.clear()
        if self._offset != self._confirmed:
            try:
                self._get_updates(0, 1, closing=True)       # what comes now will come again
            except Interrupted:
                log.warning("Telegram did not hear what is done: update %d and later will come "
                            "again", self._confirmed)
        self._done = {key: done for key, done in self._done.items() if done}
        for connection in [self._polling] + list(self._idle):
            connection.close()

    def _get_updates(self, seconds, limit, closing=False):
        """Return updates, or None when a signal ended the wait. Interrupted: there is no time."""
        offset, since = self._offset, time.monotonic()
        parameters = {"offset": offset, "timeout": seconds, "limit": limit,
                      "allowed_updates": ["message", "callback_query"]}
        for attempt in itertools.count(1):
            ask = functools.partial(self._ask, self._polling, "getUpdates", parameters)
            answer = ask() if closing else self.stopping.wait(ask)
            if answer is None:      # its thread may still use the connection
                self._polling = self._new_connection()
                return None
            if answer["ok"] and isinstance(answer.get("result"), list):
                self._confirmed = offset
                return [update for update in answer["result"] if isinstance(update, dict)
                        and isinstance(update.get("update_id"), int)]
            if answer["error_code"] == 409 and (attempt >= self.TRIES
                                                or "webhook" in answer["description"]):
                raise Refused("another poller or a webhook takes this bot's updates (409 %s)"
                              % answer["description"])
            self._back_off("getUpdates", answer, attempt, since)

    def _send(self, connection, method, parameters):
        """Make a Bot API call, until Telegram has done it or has refused it for good."""
        since = time.monotonic()
        for attempt in itertools.count(1):
            answer = self._ask(connection, method, parameters)
            code, moved_to = answer["error_code"], answer["parameters"].get("migrate_to_chat_id")
            if answer["ok"]:
                return
            if moved_to and attempt == 1:
                log.info("chat %s has become %s", parameters.get("chat_id"), moved_to)
                parameters = dict(parameters, chat_id=moved_to)
            elif (code and (400 <= code < 500 or attempt >= self.TRIES)
                  and code not in (401, 404, 429)):
                log.warning("%s was refused: %d %s", method, code, answer["description"])
                return
            else:
                self._back_off(method, answer, attempt, since)

    def _back_off(self, method, answer, attempt, since):
        """Wait before another try. Refused: none is of use. Interrupted: the bot has to stop."""
        code, description = answer["error_code"], answer["description"]
        if code in (401, 404):
            raise Refused("Telegram refuses BOT_TOKEN (%d %s): expected what @BotFather gave"
                          % (code, description))
        told = answer["parameters"].get("retry_after")
        if self.stopping.requested and (
                told or self.stopping.for_longer_than(STOP_SECONDS, since)):
            raise Interrupted
        delay = retry_delay(attempt, 1.0, self.MAX_DELAY_SECONDS)
        delay = told if isinstance(told, (int, float)) else delay
        log_retry(method, "%d %s" % (code, description) if code else description, attempt, delay)
        if self.stopping.requested:
            time.sleep(min(delay, 0.5))
        self.stopping.sleep(delay)

    def _new_connection(self):
        """Return a connection that is not open yet, by way of the proxy where there is one."""
        if not self._proxy:
            kind = "HTTPSConnection" if self._url.scheme == "https" else "HTTPConnection"
            return getattr(http.client, kind)(self._url.hostname, self._url.port)
        connection = http.client.HTTPSConnection(self._proxy.hostname, self._proxy.port or 80)
        connection.set_tunnel(self._url.hostname, self._url.port or 443,
                              login_header("Proxy-Authorization", self._proxy))
        return connection

    def _ask(self, connection, method, parameters):
        """Return Telegram's answer to a call, with an error_code of None where it gave none.

        Only JSON with an `ok` is Telegram's; all else is an outage, such as a proxy's page.
        """
        body, description = self._post(connection, method, parameters)
        try:
            answer = dict(json.loads(body.decode()))
            answer["ok"] = bool(answer["ok"])
        except (ValueError, TypeError, KeyError, RecursionError):
            answer = {"ok": False}
        code, more = answer.get("error_code"), answer.get("parameters")
        answer["error_code"] = code if isinstance(code, int) else None
        answer["parameters"] = more if isinstance(more, dict) else {}
        description = str(answer.get("description", description))
        answer["description"] = description.replace(self._token, "...")
        return answer

    def _post(self, connection, method, parameters):
        """Return what a server answers to a call, and in words how that went."""
        path = "%s/bot%s/%s" % (self._url.path.rstrip("/"), self._token, method)
        try:
            if connection.sock and is_stale(connection.sock, connection.used_at):
                connection.close()
            if not connection.sock:
                connection.timeout = self.CONNECT_SECONDS
                connection.connect()
            connection.sock.settimeout(self.ANSWER_SECONDS + parameters.get("timeout", 0))
            connection.request("POST", path, json.dumps(parameters), self._headers)
            response = connection.getresponse()
            body, connection.used_at = response.read(), time.monotonic()
            return body, "%d %s" % (response.status, response.reason)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            return b"", "%s: %s" % (type(error).__name__, error)


# ---- Kafka: the protocol as data ----------------------------------------------------------------

# The letters of the struct module; a string or bytes may be null, which is None here.
INT8, INT16, INT32, INT64, BOOLEAN, STRING, BYTES = "b", "h", "i", "q", "?", "string", "bytes"


def by_topic(number=None, **fields):
    """Return a schema that most requests and answers contain: topics, each with its partitions, of
    which there are fields, or nothing but the number."""
    return [dict(name=STRING, partitions=[number or fields])]


def one_topic(name, partitions):
    """Return what a request has by that schema: the bot asks about one topic at a time."""
    return [dict(name=name, partitions=partitions)]


def partitions_of(answer):
    return [partition for topic in answer["topics"] for partition in topic["partitions"]]


MEMBER = dict(group=STRING, generation=INT32, member_id=STRING)     # how the group knows us
STATUS = dict(throttle_ms=INT32, error=INT16)                       # how most answers begin

# name: (key, version, request, answer). A dict is a structure, a list an array of what is in it.
# Kafka 2.2 knows these versions, and Kafka 4 still does (KIP-896). JoinGroup 4 is the one that
# needs 2.2: before it (KIP-394) a member whose first call was broken off haunted its group. Every
# error code of an answer is called `error`. https://kafka.apache.org/protocol
APIS = {
    "Produce": (0, 7, dict(transactional_id=STRING, acks=INT16, timeout_ms=INT32,
                           topics=by_topic(index=INT32, records=BYTES)),
                dict(topics=by_topic(index=INT32, error=INT16, offset=INT64, time_ms=INT64,
                                     log_start_offset=INT64), throttle_ms=INT32)),
    "Fetch": (1, 10, dict(
        replica_id=INT32, max_wait_ms=INT32, min_bytes=INT32, max_bytes=INT32,
        isolation_level=INT8, session_id=INT32, session_epoch=INT32, topics=by_topic(
            index=INT32, leader_epoch=INT32, offset=INT64, log_start_offset=INT64,
            max_bytes=INT32),
        forgotten=by_topic(INT32)),
        dict(STATUS, session_id=INT32, topics=by_topic(
            index=INT32, error=INT16, high_watermark=INT64, last_stable_offset=INT64,
            log_start_offset=INT64, aborted=[dict(producer_id=INT64, first_offset=INT64)],
            records=BYTES))),
    "ListOffsets": (2, 2, dict(replica_id=INT32, isolation_level=INT8,
                               topics=by_topic(index=INT32, time_ms=INT64)),
                    dict(throttle_ms=INT32, topics=by_topic(
                        index=INT32, error=INT16, time_ms=INT64, offset=INT64))),
    "Metadata": (3, 4, dict(topics=[STRING], create=BOOLEAN),
                 dict(throttle_ms=INT32,
                      brokers=[dict(node=INT32, host=STRING, port=INT32, rack=STRING)],
                      cluster_id=STRING, controller=INT32, topics=[dict(
                          error=INT16, name=STRING, internal=BOOLEAN, partitions=[dict(
                              error=INT16, index=INT32, leader=INT32, replicas=[INT32],
                              in_sync=[INT32])])])),
    "OffsetCommit": (8, 3, dict(MEMBER, retention_ms=INT64, topics=by_topic(
                         index=INT32, offset=INT64, metadata=STRING)),
                     dict(throttle_ms=INT32, topics=by_topic(index=INT32, error=INT16))),
    "OffsetFetch": (9, 3, dict(group=STRING, topics=by_topic(INT32)),
                    dict(throttle_ms=INT32, topics=by_topic(
                        index=INT32, offset=INT64, metadata=STRING, error=INT16), error=INT16)),
    "FindCoordinator": (10, 1, dict(key=STRING, key_type=INT8),
                        dict(STATUS, message=STRING, node=INT32, host=STRING, port=INT32)),
    "JoinGroup": (11, 4, dict(group=STRING, session_timeout_ms=INT32, rebalance_timeout_ms=INT32,
                              member_id=STRING, protocol_type=STRING,
                              protocols=[dict(name=STRING, metadata=BYTES)]),
                  dict(STATUS, generation=INT32, protocol=STRING, leader=STRING, member_id=STRING,
                       members=[dict(member_id=STRING, metadata=BYTES)])),
    "Heartbeat": (12, 1, MEMBER, STATUS),
    "LeaveGroup": (13, 1, dict(group=STRING, member_id=STRING), STATUS),
    "SyncGroup": (14, 1, dict(MEMBER, assignments=[dict(member_id=STRING, assignment=BYTES)]),
                  dict(STATUS, assignment=BYTES)),
    "SaslHandshake": (17, 1, dict(mechanism=STRING), dict(error=INT16, mechanisms=[STRING])),
    "ApiVersions": (18, 0, {}, dict(error=INT16,
                                    apis=[dict(key=INT16, lowest=INT16, highest=INT16)])),
    "InitProducerId": (22, 0, dict(transactional_id=STRING, timeout_ms=INT32),
                       dict(STATUS, producer_id=INT64, epoch=INT16)),
    "SaslAuthenticate": (36, 0, dict(data=BYTES), dict(error=INT16, message=STRING, data=BYTES)),
}
HEADER = dict(key=INT16, version=INT16, correlation_id=INT32, client_id=STRING)
SUBSCRIPTION = dict(version=INT16, topics=[STRING], user_data=BYTES)    # what JoinGroup carries
ASSIGNMENT = dict(version=INT16, topics=by_topic(INT32), user_data=BYTES)

# What each error code asks for.
TRY, LOOK, REJOIN, EXPELLED, SKIP = "try", "look", "rejoin", "expelled", "skip"
RENEW, UNSURE, START, DONE, STOP = "renew", "unsure", "start", "done", "stop"
ERRORS = {code: (name, action) for action, names in (
    (TRY, {     # again, later; so do codes that are not listed
        -1: "UNKNOWN_SERVER_ERROR", 2: "CORRUPT_MESSAGE", 19: "NOT_ENOUGH_REPLICAS",
        32: "INVALID_TIMESTAMP (is this machine's clock right?)", 78: "OFFSET_NOT_AVAILABLE",
        81: "GROUP_MAX_SIZE_REACHED", 88: "UNSTABLE_OFFSET_COMMIT",
        89: "THROTTLING_QUOTA_EXCEEDED"}),
    (LOOK, {    # who leads the partition or coordinates the group, and try again
        3: "UNKNOWN_TOPIC_OR_PARTITION", 5: "LEADER_NOT_AVAILABLE", 6: "NOT_LEADER_OR_FOLLOWER",
        8: "BROKER_NOT_AVAILABLE", 9: "REPLICA_NOT_AVAILABLE", 14: "COORDINATOR_LOAD_IN_PROGRESS",
        15: "COORDINATOR_NOT_AVAILABLE", 16: "NOT_COORDINATOR", 56: "KAFKA_STORAGE_ERROR",
        72: "LISTENER_NOT_FOUND", 74: "FENCED_LEADER_EPOCH", 75: "UNKNOWN_LEADER_EPOCH"}),
    (UNSURE, {  # the record may have been written
        7: "REQUEST_TIMED_OUT", 13: "NETWORK_EXCEPTION", 20: "NOT_ENOUGH_REPLICAS_AFTER_APPEND"}),
    (DONE, {46: "DUPLICATE_SEQUENCE_NUMBER"}),              # it was written before
    (RENEW, {   # ask for a new producer id
        45: "OUT_OF_ORDER_SEQUENCE_NUMBER", 47: "INVALID_PRODUCER_EPOCH",
        59: "UNKNOWN_PRODUCER_ID", 90: "PRODUCER_FENCED"}),
    (SKIP, {    # the record: it will never be taken
        10: "MESSAGE_TOO_LARGE", 18: "RECORD_LIST_TOO_LARGE",
        87: "INVALID_RECORD (does the topic want keys?)"}),
    (START, {1: "OFFSET_OUT_OF_RANGE"}),                    # at the earliest offset
    (REJOIN, {27: "REBALANCE_IN_PROGRESS"}),                # the group
    (EXPELLED, {22: "ILLEGAL_GENERATION", 25: "UNKNOWN_MEMBER_ID"}),
    (STOP, {    # trying again is of no use
        17: "INVALID_TOPIC_EXCEPTION",
        23: "INCONSISTENT_GROUP_PROTOCOL (the others do without the range assignor)",
        24: "INVALID_GROUP_ID", 26: "INVALID_SESSION_TIMEOUT", 29: "TOPIC_AUTHORIZATION_FAILED",
        30: "GROUP_AUTHORIZATION_FAILED",
        31: "CLUSTER_AUTHORIZATION_FAILED (IdempotentWrite, before Kafka 2.8?)",
        33: "UNSUPPORTED_SASL_MECHANISM",
        34: "ILLEGAL_SASL_STATE (is KAFKA_SECURITY_PROTOCOL right?)",
        35: "UNSUPPORTED_VERSION", 42: "INVALID_REQUEST", 43: "UNSUPPORTED_FOR_MESSAGE_FORMAT",
        44: "POLICY_VIOLATION",
        58: "SASL_AUTHENTICATION_FAILED (KAFKA_SASL_USERNAME, KAFKA_SASL_PASSWORD)",
        76: "UNSUPPORTED_COMPRESSION_TYPE (set the topic's compression.type to lz4)"}),
    ) for code, name in names.items()}

SESSION_MS = 10000              # a killed bot's partitions move after this; brokers allow 6 s on
REBALANCE_MS = 60000            # the group waits so long for a bot that is busy with updates
LET_GO_SECONDS = 40             # a reply that cannot be written by then is left to who comes next
HEARTBEAT_SECONDS = 1.0         # also how soon the others stand back for a new bot
FETCH_MS = 500                  # so long a broker waits for records
BUSY_FETCH_MS = 20              # or so long, while others of its partitions will soon need more
PARTITION_BYTES = 1 << 16       # a fetch's share for one partition: small, so that none waits long
LARGEST_BYTES = 1 << 27         # an answer or an unpacked batch over this is malformed
WINDOW = 500                    # offsets that may be done beyond one that is not
ANSWER_SECONDS = 15             # a broker's time to answer; it gives its replicas 10 s of that
CONNECT_SECONDS = 1.5
METADATA_SECONDS = 30           # how soon new partitions are found
UNSURE_SECONDS = 20.0           # after a signal, a write whose outcome is unknown is tried so long
FIRST_TRIES = 6                 # what fails as often before any broker has answered is a setting


class KafkaError(Exception):
    """An error code of a broker that it may be worth trying again after."""

    def __init__(self, code, about):
        name, self.action = ERRORS.get(code, ("Kafka's error %d" % code, TRY))
        super().__init__("%s: %s" % (about, name))
        self.code = code


class Malformed(Exception):
    """Bytes that are not what the protocol says."""


TROUBLE = (OSError, KafkaError, Malformed)      # what is waited out


def check(code, about):
    """Raise for an error code: Refused where trying again is of no use, else KafkaError."""
    if code:
        error = KafkaError(code, about)
        raise Refused("Kafka refuses %s" % error) if error.action == STOP else error


def first_error(answer):
    """Return the first error code of an answer that is not 0, wherever it is in it; else 0."""
    if isinstance(answer, dict):
        return answer.get("error") or first_error(list(answer.values()))
    if isinstance(answer, list):
        return next((code for code in map(first_error, answer) if code), 0)
    return 0


def encode(schema, value):
    """Return a value as bytes, by a schema such as those in APIS."""
    if isinstance(schema, dict):
        return b"".join([encode(kind, value[name]) for name, kind in schema.items()])
    if isinstance(schema, list):
        items = [encode(schema[0], item) for item in value]
        return struct.pack(">i", len(value)) + b"".join(items)
    if schema in (STRING, BYTES):
        data = value.encode() if isinstance(value, str) else value
        size = struct.pack(">h" if schema == STRING else ">i", -1 if data is None else len(data))
        return size + (data or b"")
    return struct.pack(">" + schema, value)


class Decoder:
    """Reads values out of bytes, one after another. Whatever they are, it raises but Malformed."""

    def __init__(self, data):
        self.data, self.position = data, 0

    def take(self, size):
        """Return the next `size` bytes, or None for a size of -1, which is Kafka's null."""
        if not -1 <= size <= len(self.data) - self.position:
            raise Malformed("%d bytes where %d are left" % (size, len(self.data) - self.position))
        start, self.position = self.position, self.position + max(size, 0)
        return None if size == -1 else self.data[start:self.position]

    def value(self, schema):
        """Return the value that a schema describes."""
        if isinstance(schema, dict):
            return {name: self.value(kind) for name, kind in schema.items()}
        if isinstance(schema, list):
            count, left = self.value(INT32), len(self.data) - self.position
            if not -1 <= count <= left:         # no element is smaller than a byte
                raise Malformed("%d elements in %d bytes" % (count, left))
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
        raise Malformed("a number of more than ten bytes")


# ---- Kafka: record batches ----------------------------------------------------------------------

# The head of a record batch v2 (KIP-98); its checksum covers byte 21 and on.
BATCH = struct.Struct(">qiibIhiqqqhii")
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
    """Return a batch of one record.

    key, value: bytes or None; the rest is what makes a repeat count once (KIP-98).
    """
    parts = [varint(-1) if part is None else varint(len(part)) + part for part in (key, value)]
    record = b"\0\0\0" + b"".join(parts) + b"\0"    # no attributes, the batch's time, no headers
    record, now_ms = varint(len(record)) + record, int(time.time() * 1000)
    batch = bytearray(BATCH.pack(0, BATCH.size - 12 + len(record), -1, 2, 0, 0, 0, now_ms, now_ms,
                                 producer_id, epoch, sequence, 1) + record)
    struct.pack_into(">I", batch, 17, crc32c(batch[21:]))
    return bytes(batch)


def decode_batches(data, aborted, topic):
    """Read what Fetch brought of one partition, as read_committed has it.

    data: batches, the last of them perhaps cut short; aborted: the aborted transactions, as the
    answer lists them. Yields for each batch (the offset after it, [(offset, key, value), ...]),
    with no records for a control batch or an aborted one. Malformed: a batch is corrupt. Refused:
    it is in a form that is not read here.
    """
    aborted = sorted(aborted, key=lambda transaction: transaction["first_offset"])
    aborting, start = set(), 0      # the producers in whose aborted transactions we are
    while len(data) - start >= BATCH.size:
        (base, size, _, magic, crc, attributes, last, _, _, producer, _, _,
         count) = BATCH.unpack_from(data, start)
        end = start + 12 + size
        check_head(magic, size, last, "topic %s, the batch at offset %d" % (topic, base))
        if end > len(data):
            break
        if crc32c(data[start + 21:end]) != crc:
            raise Malformed("topic %s: the checksum of the batch at offset %d" % (topic, base))
        while aborted and aborted[0]["first_offset"] <= base + last:
            aborting.add(aborted.pop(0)["producer_id"])
        body = decompress(data[start + BATCH.size:end], attributes & 7, topic)
        records = decode_records(body, count, base)
        if attributes & 32 and any(key and key[2:4] == b"\0\0" for _, key, _ in records):
            aborting.discard(producer)      # the key of a control batch: its transaction is aborted
        skipped = attributes & 32 or attributes & 16 and producer in aborting
        yield base + last + 1, [] if skipped else records
        start = end
    if data and not start:          # brokers send one batch whole, however large
        raise Malformed("topic %s: a batch that is cut short" % topic)


def check_head(magic, size, last, place):
    if magic in (0, 1):
        raise Refused(place + " is in the format before Kafka 0.11, which is not read: write it "
                      "again with a newer client, and move the group past it with "
                      "kafka-consumer-groups --reset-offsets")
    if magic != 2 or size < BATCH.size - 12 or last < 0:
        raise Malformed(place + ": its head")


def decode_records(data, count, base):
    """Return [(offset, key, value), ...] for the `count` records of a batch from `base` on."""
    decoder, records = Decoder(data), []
    for _ in range(count):
        end = decoder.varint() + decoder.position
        decoder.take(1)         # attributes: none are defined
        decoder.varint()        # time
        offset = base + decoder.varint()
        records.append((offset, decoder.take(decoder.varint()), decoder.take(decoder.varint())))
        if not decoder.position <= end <= len(data):
            raise Malformed("the length of the record at offset %d" % offset)
        decoder.position = end  # over the headers
    return records


def decompress(data, codec, topic):
    """Return the records of a batch, unpacked. Refused: this Python cannot read the codec."""
    name, unpack = {1: ("gzip", gunzip), 2: ("snappy", unsnappy), 3: ("lz4", unlz4),
                    4: ("zstd", unzstd)}.get(codec, ("codec %d" % codec, None))
    try:
        if not codec:
            return data
        if not unpack:
            raise ImportError
        return unpack(data)
    except ImportError:
        raise Refused("topic %s has messages compressed with %s, which this Python cannot read: "
                      "use Python 3.14 or newer; or set the topic's compression.type to lz4, and "
                      "move the group past them with kafka-consumer-groups --reset-offsets"
                      % (topic, name))
    except Exception as error:      # zlib.error, ZstdError, IndexError: each has its own
        raise Malformed("topic %s: a batch compressed with %s (%r)" % (topic, name, error))


def gunzip(data):
    return unpacked(zlib.decompressobj(31), data)


def unzstd(data):
    return unpacked(importlib.import_module("compression.zstd").ZstdDecompressor(), data)


def unpacked(unpacker, data):
    data = unpacker.decompress(data, LARGEST_BYTES)
    if not unpacker.eof:
        raise ValueError("it is cut short or huge")
    return data


def unsnappy(data):
    """Unpack snappy: one block, or blocks in the framing that snappy-java writes.

    https://github.com/google/snappy/blob/main/format_description.txt; snappy-java's head is a name
    of 8 bytes and two versions, and each block has its size before it.
    """
    out = bytearray()
    if not data.startswith(b"\x82SNAPPY\0"):
        unsnappy_block(data, out)
    else:
        decoder = Decoder(data)
        decoder.take(16)
        while decoder.position < len(data):
            unsnappy_block(decoder.value(BYTES), out)
    return bytes(out)


def unsnappy_block(data, out):
    expected = at = shift = 0
    while not at or data[at - 1] > 127:
        expected |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
    expected += len(out)
    while at < len(data):
        kind, number = data[at] & 3, data[at] >> 2
        at += 1
        if kind:                # a copy; its distance is in the next 1, 2 or 4 bytes
            width = (0, 1, 2, 4)[kind]
            distance = int.from_bytes(data[at:at + width], "little")
            size = number + 1
            if kind == 1:       # 3 bits of this byte are the distance's upper ones
                distance, size = distance | number >> 3 << 8, (number & 7) + 4
            at += width
            copy_back(out, distance, size)
        else:                   # a literal; a size over 60 is in the next 1 to 4 bytes
            width = max(0, number - 59)
            size = (int.from_bytes(data[at:at + width], "little") if width else number) + 1
            at += width + size
            out += data[at - size:at]
    if at != len(data) or len(out) != expected:
        raise ValueError("%d bytes where %d were announced" % (len(out), expected))


def unlz4(data):
    """Unpack LZ4 frames: https://github.com/lz4/lz4/blob/dev/doc/lz4_Frame_format.md

    Its checksums are not looked at: the batch has one, and older clients wrote wrong ones.
    """
    out, at = bytearray(), 0
    while at < len(data):
        if data[at:at + 4] != b"\x04\x22\x4d\x18":
            raise ValueError("the head of the frame")
        flags = data[at + 4]
        at += 7 + (8 if flags & 8 else 0) + (4 if flags & 1 else 0)
        while True:
            size = struct.unpack_from("<I", data, at)[0]
            at += 4
            if not size:
                break
            block = data[at:at + (size & 0x7FFFFFFF)]
            at += len(block) + (4 if flags & 16 else 0)
            if len(block) != size & 0x7FFFFFFF:
                raise ValueError("it is cut short")
            if size >> 31:      # the block is stored as it is
                out += block
            else:
                unlz4_block(block, out)
        at += 4 if flags & 4 else 0
    return bytes(out)


def unlz4_block(data, out):
    at = 0
    while True:
        token = data[at]
        size, at = lz4_size(token >> 4, data, at + 1)
        if at + size > len(data):
            raise ValueError("a literal that is cut short")
        out += data[at:at + size]
        at += size
        if at == len(data):     # the last sequence has no copy
            return
        distance = data[at] | data[at + 1] << 8
        size, at = lz4_size(token & 15, data, at + 2)
        copy_back(out, distance, size + 4)


def lz4_size(size, data, at):
    """Return a size and the place after it; 15 goes on in the next bytes, up to one below 255."""
    more = 255 if size == 15 else 0
    while more == 255:
        more = data[at]
        size, at = size + more, at + 1
    return size, at


def copy_back(out, distance, size):
    """Append `size` bytes from `distance` bytes before the end of `out` on; they may overlap it."""
    start = len(out) - distance
    if start < 0 or not distance or len(out) + size > LARGEST_BYTES:
        raise ValueError("a copy of %d bytes from %d before" % (size, distance))
    while size > 0:
        piece = out[start:start + size]
        out += piece
        size -= len(piece)


def murmur2(key):
    """Return the hash by which Java's client spreads keys over partitions, modulo their number."""
    mask, mix, whole = 0xFFFFFFFF, 0x5BD1E995, len(key) & ~3
    number = 0x9747B28C ^ len(key)
    for start in range(0, whole, 4):
        word = int.from_bytes(key[start:start + 4], "little") * mix & mask
        number = number * mix & mask ^ (word ^ word >> 24) * mix & mask
    if key[whole:]:
        number = (number ^ int.from_bytes(key[whole:], "little")) * mix & mask
    number = (number ^ number >> 13) * mix & mask
    return (number ^ number >> 15) & 0x7FFFFFFF


# ---- Kafka: connections -------------------------------------------------------------------------

CHOICES = {"KAFKA_SECURITY_PROTOCOL": ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"),
           "KAFKA_SASL_MECHANISM": ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")}


def kafka_settings(environ):
    """Return the variables about Kafka as attributes. ConfigError names the one that is wrong."""
    for name in ("KAFKA_BROKERS", "KAFKA_INCOMING_TOPIC", "KAFKA_OUTGOING_TOPIC",
                 "KAFKA_CONSUMER_GROUP", "BOT_TOKEN"):
        if not environ.get(name):
            raise ConfigError("%s is not set" % name)
    for name, choices in CHOICES.items():
        if (environ.get(name) or choices[0]) not in choices:
            raise ConfigError("%s=%r: expected one of %s"
                              % (name, environ[name], ", ".join(choices)))
    protocol = environ.get("KAFKA_SECURITY_PROTOCOL") or "PLAINTEXT"
    mechanism = environ.get("KAFKA_SASL_MECHANISM") or "PLAIN"
    if protocol.startswith("SASL") and not (environ.get("KAFKA_SASL_USERNAME")
                                            and environ.get("KAFKA_SASL_PASSWORD")):
        raise ConfigError("%s needs KAFKA_SASL_USERNAME and KAFKA_SASL_PASSWORD" % protocol)
    return types.SimpleNamespace(
        brokers=broker_list(environ["KAFKA_BROKERS"]),
        tls=tls_context(environ) if protocol.endswith("SSL") else None,
        mechanism=mechanism if protocol.startswith("SASL") else None,
        username=environ.get("KAFKA_SASL_USERNAME"), password=environ.get("KAFKA_SASL_PASSWORD"),
        incoming=environ["KAFKA_INCOMING_TOPIC"], outgoing=environ["KAFKA_OUTGOING_TOPIC"],
        dead_letters=environ.get("KAFKA_DEAD_LETTER_TOPIC"), group=environ["KAFKA_CONSUMER_GROUP"],
        bot_id=environ.get("BOT_ID"), token=environ["BOT_TOKEN"])


def broker_list(text):
    """Return [(host, port), ...] of KAFKA_BROKERS."""
    brokers = [re.match(r"\s*\[?([^\s\[\]@/]+?)\]?:([0-9]{1,5})\s*$", part)
               for part in text.split(",")]
    if not all(match and 0 < int(match.group(2)) < 65536 for match in brokers):
        raise ConfigError("KAFKA_BROKERS=%r: expected HOST:PORT, or several with commas"
                          % re.sub("[^,]*@", "...@", text))
    return [(match.group(1), int(match.group(2))) for match in brokers]


def tls_context(environ):
    """Return the TLS context for KAFKA_SSL_CAFILE, KAFKA_SSL_CERTFILE and KAFKA_SSL_KEYFILE."""
    names = ["KAFKA_SSL_CAFILE", "KAFKA_SSL_CERTFILE", "KAFKA_SSL_KEYFILE"]
    authority, certificate, key = (environ.get(name) or None for name in names)
    if key and not certificate:
        raise ConfigError("KAFKA_SSL_KEYFILE needs KAFKA_SSL_CERTFILE")
    wrong = "KAFKA_SSL_CAFILE=%r" % authority
    try:
        context = ssl.create_default_context(cafile=authority)
        if certificate:
            wrong = "KAFKA_SSL_CERTFILE=%r, KAFKA_SSL_KEYFILE=%r" % (certificate, key)
            context.load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as error:
        raise ConfigError("%s: expected PEM files without a password (%s)" % (wrong, error))
    return context


class Connection:
    """A connection to one broker, logged in; one request at a time.

    It raises OSError (the network), Malformed or KafkaError (the answer), Refused (a login, a
    certificate, a broker too old), and Interrupted when ended() is true, which it asks several
    times a second. After a KafkaError it may be used again, after any other it is to be closed.
    """

    def __init__(self, address, settings, ended):
        self.name, self.settings, self.ended = "%s:%d" % address, settings, ended
        self.correlation_id, self.used_at = 0, time.monotonic()
        try:
            self.socket = socket.create_connection(address, CONNECT_SECONDS)
        except OSError as error:
            raise type(error)("%s: %s" % (self.name, error.strerror or error))
        try:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if settings.tls:
                self.socket = settings.tls.wrap_socket(self.socket, server_hostname=address[0],
                                                       do_handshake_on_connect=False)
                self._wait(self.socket.do_handshake, ANSWER_SECONDS, "TLS")
            self._log_in()
        except ssl.SSLCertVerificationError as error:
            self.socket.close()
            raise Refused("%s: %s" % (self.name, error))
        except BaseException:
            self.socket.close()
            raise

    def _wait(self, operation, seconds, about):
        """Return operation(), which is tried again each time the socket's time-out ends it."""
        deadline = time.monotonic() + seconds
        self.socket.settimeout(0.2)
        while not self.ended():
            try:
                return operation()
            except socket.timeout:
                if time.monotonic() > deadline:
                    raise socket.timeout("%s has not answered %s for %d s"
                                         % (self.name, about, seconds))
        raise Interrupted

    def _log_in(self):
        apis = {api["key"]: range(api["lowest"], api["highest"] + 1)
                for api in self.call("ApiVersions", {})["apis"]}
        mechanism, username = self.settings.mechanism, self.settings.username
        for name, (key, version, _, _) in APIS.items():
            if version not in apis.get(key, ()) and (mechanism or not name.startswith("Sasl")):
                raise Refused("%s is not a Kafka from 2.2 on: it does not take %s version %d"
                              % (self.name, name, version))
        if mechanism:
            self.call("SaslHandshake", dict(mechanism=mechanism))
        if mechanism == "PLAIN":            # RFC 4616
            login = "\0%s\0%s" % (username, self.settings.password)
            self.call("SaslAuthenticate", dict(data=login.encode()))
        elif mechanism:
            algorithm = {"SCRAM-SHA-256": "sha256", "SCRAM-SHA-512": "sha512"}[mechanism]
            self._scram(algorithm, username, self.settings.password)

    def _scram(self, algorithm, username, password):
        """RFC 5802 without channel binding: each side proves that it knows the password."""
        def mac(key, data):
            return hmac.new(key, data, algorithm).digest()

        nonce = base64.b64encode(os.urandom(24)).decode()
        opening = "n=%s,r=%s" % (username.replace("=", "=3D").replace(",", "=2C"), nonce)
        answer = self.call("SaslAuthenticate", dict(data=("n,," + opening).encode()))
        challenge = answer["data"] or b""
        fields = re.match(rb"r=([^,]+),s=([^,]+),i=(\d{4,6})$", challenge)
        if not (fields and fields.group(1).startswith(nonce.encode())
                and int(fields.group(3)) >= 4096):
            raise Malformed("the SCRAM challenge of " + self.name)
        salt, rounds = base64.b64decode(fields.group(2) + b"==="), int(fields.group(3))
        salted = hashlib.pbkdf2_hmac(algorithm, password.encode(), salt, rounds)
        closing, client_key = b"c=biws,r=" + fields.group(1), mac(salted, b"Client Key")
        signed = b",".join((opening.encode(), challenge, closing))
        signature = mac(hashlib.new(algorithm, client_key).digest(), signed)
        proof = base64.b64encode(bytes(a ^ b for a, b in zip(client_key, signature)))
        answer = self.call("SaslAuthenticate", dict(data=closing + b",p=" + proof))
        if answer["data"] != b"v=" + base64.b64encode(mac(mac(salted, b"Server Key"), signed)):
            raise Refused("%s does not know the password of %s itself" % (self.name, username))

    def call(self, api, request, seconds=ANSWER_SECONDS, errors=True):
        """Send a request and return its answer; with `errors`, raise the first error code in it."""
        key, version, schema, expected = APIS[api]
        self.correlation_id += 1
        head = dict(key=key, version=version, correlation_id=self.correlation_id,
                    client_id="echo-bot")
        frame = encode(HEADER, head) + encode(schema, request)
        self.socket.settimeout(ANSWER_SECONDS)
        self.socket.sendall(struct.pack(">i", len(frame)) + frame)
        size, correlation_id = struct.unpack(">ii", self._read(8, seconds, api))
        if correlation_id != self.correlation_id or not 4 <= size <= LARGEST_BYTES:
            raise Malformed("the head of an answer of " + self.name)
        decoder = Decoder(self._read(size - 4, seconds, api))
        self.used_at = time.monotonic()
        answer = decoder.value(expected)
        code = first_error(answer) if errors else 0
        if code:
            names = [topic["name"] for topic in request.get("topics", ())]
            about = ", ".join(names) or request.get("group") or self.name
            check(code, "%s (%s)" % (api, about))
        if decoder.position != len(decoder.data):
            raise Malformed("the length of an answer of " + self.name)
        return answer

    def _read(self, size, seconds, api):
        data = bytearray()
        while len(data) < size:
            left = min(size - len(data), 1 << 20)
            part = self._wait(lambda: self.socket.recv(left), seconds, api)     # noqa: B023
            if not part:
                raise ConnectionResetError("%s hung up without answering %s" % (self.name, api))
            data += part
        return bytes(data)


class Cluster:
    """The connections of one thread, and what it was told about the brokers, by address.

    An address is (host, port). It raises what Connection does.
    """

    def __init__(self, settings, ended):
        self.settings, self.ended = settings, ended
        self.brokers = set(settings.brokers)      # their addresses
        self.connections = {}
        self.looked = {}            # topic: (when, {partition: its leader's address, or None})
        self.coordinator_at = None

    def call(self, address, api, request, **options):
        """Call a broker. What broke its connection closes it; the next call opens a new one."""
        connection = self.connections.get(address)
        if connection and is_stale(connection.socket, connection.used_at):
            self._close(address)
        try:
            if address not in self.connections:
                self.connections[address] = Connection(address, self.settings, self.ended)
            return self.connections[address].call(api, request, **options)
        except KafkaError:
            raise
        except BaseException:
            self._close(address)
            raise

    def call_any(self, api, request, **options):
        """Call one of the brokers, whichever takes it, one with an open connection first."""
        def rank(address):
            return address not in self.connections, random.random()

        failure = None
        for address in sorted(self.brokers, key=rank):
            try:
                return self.call(address, api, request, **options)
            except OSError as error:
                failure = error
        raise failure

    def leaders(self, topic, create=False):
        """Return {partition: its leader's address, or None}; {} where there is no such topic."""
        looked_at, leaders = self.looked.get(topic, (0, None))
        keep = METADATA_SECONDS if leaders and all(leaders.values()) else 0.5
        if leaders is not None and time.monotonic() < looked_at + keep:
            return leaders
        answer = self.call_any("Metadata", dict(topics=[topic], create=create), errors=False)
        brokers = {broker["node"]: (broker["host"], broker["port"])
                   for broker in answer["brokers"]}
        self.brokers = set(brokers.values()) | set(self.settings.brokers)
        leaders = {}
        for found in answer["topics"]:
            if found["error"] != 3:         # UNKNOWN_TOPIC_OR_PARTITION
                check(found["error"], "topic " + topic)
            leaders = {part["index"]: brokers.get(part["leader"]) for part in found["partitions"]}
        self.looked[topic] = time.monotonic(), leaders
        return leaders

    def coordinator(self):
        if not self.coordinator_at:
            answer = self.call_any("FindCoordinator", dict(key=self.settings.group, key_type=0))
            self.coordinator_at = answer["host"], answer["port"]
        return self.coordinator_at

    def note_failure(self, what, error, failures):
        """Log a failure, and take nothing for granted any more that brokers have told of leaders
        and the coordinator. Return seconds to wait."""
        delay = retry_delay(failures)
        log_retry(what, error, failures, delay)
        self.looked.clear()
        self.coordinator_at = None
        return delay

    def close(self):
        for address in list(self.connections):
            self._close(address)

    def _close(self, address):
        if address in self.connections:
            self.connections.pop(address).socket.close()


# ---- Kafka: partitions, and who reads them ------------------------------------------------------

class Partition:
    """A partition that we read in one generation of the group. Member.changed guards it.

    What is done although something before it is not stands in the metadata of the commit, as
    "done:2,5" (counted from the committed offset), so that whoever comes next does not do it again.
    """

    def __init__(self, index, offset, metadata):
        """offset, metadata: what the group has committed; an offset of -1 is none."""
        listed = re.match(r"done:([0-9,]+)$", metadata or "")
        beyond = [int(part) for part in listed.group(1).split(",") if part] if listed else []
        self.index = index
        self.position = offset if offset >= 0 else None     # the next to fetch; None: the earliest
        self.records = collections.deque()      # fetched: (offset, key, value)
        self.in_hand = set()                    # offsets that are not done
        self.done = {offset + number for number in beyond}
        self.committed = (offset, frozenset(self.done)) if offset >= 0 else None
        self.rests_until = 0.0                  # when to fetch it again, after a batch was corrupt

    def progress(self):
        """Return (the offset before which all is done, what is done beyond), or None: unknown."""
        following = self.records[0][0] if self.records else self.position
        if following is None:
            return None
        mark = min(self.in_hand | {following})
        return mark, frozenset(offset for offset in self.done if offset >= mark)

    def fill(self, after, records):
        """Keep fetched records; the next fetch begins at offset `after`."""
        self.records.extend(record for record in records
                            if record[0] >= self.position and record[0] not in self.done)
        self.position = after

    def may_be_handed_out(self):
        return bool(self.records) and len(self.done) < WINDOW

    def is_told(self, offset):
        """Return whether the group knows that an offset is done."""
        return bool(self.committed) and (self.committed[0] > offset or offset in self.committed[1])


class Reader(threading.Thread):
    """Fetches from one leader, as long as it leads anything for us: so none waits for another."""

    def __init__(self, settings, stopping, member, leader):
        super().__init__(daemon=True)
        self.topic, self.stopping, self.member, self.leader = (
            settings.incoming, stopping, member, leader)
        self.cluster = Cluster(settings, self._is_over)
        self.start()

    def _is_over(self):
        return (self.stopping.requested or self.member.state == LEFT
                or self.leader not in self.member.leaders.values())

    def run(self):
        failures = 0
        while not self._is_over():
            try:
                self._read()
                failures = 0
            except TROUBLE as error:
                failures += 1
                self.member.cluster.looked.clear()
                self.stopping.sleep(self.cluster.note_failure(
                    "reading %s from %s:%d" % ((self.topic,) + self.leader), error, failures))
            except Interrupted:
                break
            except Exception as error:
                self.stopping.fail(error)
        self.cluster.close()

    def _read(self):
        """Fetch those of the leader's partitions that have no records left, when there are some."""
        def led():
            return [partition for partition in self.member.partitions
                    if self.member.leaders.get(partition.index) == self.leader]

        def hungry():
            return [partition for partition in led() if not partition.records
                    and time.monotonic() > partition.rests_until]

        with self.member.changed:
            partitions = self.member.changed.wait_for(hungry, FETCH_MS / 1000)
            wait_ms = FETCH_MS if len(partitions) == len(led()) else BUSY_FETCH_MS
        if partitions:
            self._fetch(partitions, wait_ms)

    def _fetch(self, partitions, wait_ms):
        """Fetch partitions from their leader, which waits for wait_ms where it has nothing."""
        for partition in partitions:
            if partition.position is None:
                earliest = self._find_earliest(partition)
                with self.member.changed:
                    partition.position = earliest
        asked = {partition.index: partition.position for partition in partitions}
        answer = self.cluster.call(self.leader, "Fetch", dict(
            replica_id=-1, max_wait_ms=wait_ms, min_bytes=1, max_bytes=PARTITION_BYTES * 16,
            isolation_level=1, session_id=0, session_epoch=-1, forgotten=[],
            topics=one_topic(self.topic, [dict(
                index=index, leader_epoch=-1, offset=offset, log_start_offset=-1,
                max_bytes=PARTITION_BYTES) for index, offset in asked.items()])), errors=False)
        check(answer["error"], "Fetch")
        fetched = {part["index"]: part for part in partitions_of(answer)}
        for partition in partitions:
            if partition.index in fetched:
                self._keep(partition, asked[partition.index], fetched[partition.index])

    def _find_earliest(self, partition):
        answer = self.cluster.call(self.leader, "ListOffsets", dict(
            replica_id=-1, isolation_level=1, topics=one_topic(self.topic, [dict(
                index=partition.index, time_ms=-2)])))      # -2: the earliest
        for part in partitions_of(answer):
            return part["offset"]
        raise Malformed("an answer without the earliest offset")

    def _keep(self, partition, offset, part):
        """Keep what a Fetch from an offset on brought, or note why it brought nothing."""
        place, code, batches = "%s, partition %d" % (self.topic, partition.index), part["error"], []
        if ERRORS.get(code, ("", TRY))[1] == START:
            log.warning("%s: offset %d is not there any more: from the earliest on", place, offset)
        else:
            check(code, "Fetch (%s)" % place)
            try:
                batches.extend(decode_batches(part["records"] or b"", part["aborted"], self.topic))
            except Malformed as error:
                partition.rests_until = time.monotonic() + 1
                log.warning("partition %d: %s; trying again in 1 s", partition.index, error)
        with self.member.changed:
            if partition.position != offset:        # a new leader was faster than this one
                return
            if code:        # the next offset is gone
                partition.position, partition.done = None, set()
            for after, records in batches:
                partition.fill(after, records)
            self.member.changed.notify_all()


# ---- Kafka: the consumer group ------------------------------------------------------------------

def assign_ranges(members, counts):
    """Share partitions out as Java's range assignor does: {member: {topic: [partition, ...]}}.

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


MEMBER_ID_REQUIRED = 79
JOINING, STABLE, REBALANCING = "joining", "stable", "rebalancing"
FENCED, LEFT = "fenced", "left"


class Member:
    """Our part in the consumer group, on a thread that alone talks to the group's coordinator.

    It joins, sends heartbeats, commits what is done, and leaves. It sees to it that something reads
    from each leader. Its states:

        JOINING      until the group has shared out the partitions: STABLE. Nothing is in hand.
        STABLE       updates are taken
        REBALANCING  others come or go, or the topic has grown: nothing more is taken. When nothing
                     is in hand and all is committed, or after LET_GO_SECONDS: JOINING
        FENCED       from any of the above, when the group has expelled us: no partition is ours any
                     more, nor what is in hand. When nothing is in hand: JOINING
        LEFT         by leave(), when nothing is in hand; for good
    """

    def __init__(self, settings, stopping):
        self.settings, self.stopping, self.id, self.generation = settings, stopping, "", -1
        self.partition_count = None     # of the topic; only the group's leader knows it
        self.failures = 0           # in a row
        self.reached = False        # whether a coordinator has ever answered
        self.beat_at = 0.0          # when the next heartbeat is due
        self.leave_by = 0.0         # set by leave(): when to stop trying
        self.leaving = False        # whether the thread knows of it
        self.leaders = {}           # partition: the address of its leader, or None
        self.readers = {}           # address: the one that fetches from it
        self.changed = threading.Condition()        # guards what follows, and the partitions
        self.state, self.partitions = JOINING, []
        self.hands = 0              # receipts whose updates are neither done nor given up
        self.heard_at = 0.0         # when the group last knew us
        self.rebalance_at = 0.0     # when the state became REBALANCING
        self.cluster = Cluster(settings, self._is_over)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    # What other threads call.

    def owns(self, partition):
        """Return whether we may write replies to its updates; None: not known at the moment."""
        with self.changed:
            now, expired = time.monotonic(), self.heard_at + SESSION_MS / 1000
            if partition not in self.partitions:
                return False
            if self.state == REBALANCING and now > self.rebalance_at + LET_GO_SECONDS:
                return False
            return True if now < expired else None

    def release(self):
        """Say that an update was given up: it will come again, to us or to another."""
        with self.changed:
            self.hands -= 1
            self.changed.notify_all()

    def finish(self, partition, offset):
        """Say that an update is done, and wait until the group knows. Return whether it does."""
        with self.changed:
            partition.in_hand.discard(offset)
            partition.done.add(offset)
            self.hands -= 1
            self.changed.notify_all()
            self.changed.wait_for(lambda: partition.is_told(offset)
                                  or partition not in self.partitions, ANSWER_SECONDS)
            return partition.is_told(offset)

    def leave(self):
        """Tell the group that we go, so that our partitions move now and not after SESSION_MS."""
        with self.changed:
            self.leave_by = time.monotonic() + STOP_SECONDS
            self._to(LEFT)
        self.thread.join(STOP_SECONDS + CONNECT_SECONDS)

    # The thread.

    def _run(self):
        try:
            while self.state != LEFT:
                try:
                    if self.state == JOINING:
                        self._join()
                    else:
                        self._keep()
                    self.failures = 0
                except TROUBLE as error:
                    self._mend(error)
                except Interrupted:
                    break
            self._leave()
        except Exception as error:
            self.stopping.fail(error)
            with self.changed:
                self._to(FENCED)
        self.cluster.close()

    def _is_over(self):
        """Once we leave, no answer is waited for, but the one that tells our name in the group."""
        return self.state == LEFT and (time.monotonic() > self.leave_by
                                       or bool(self.id) and not self.leaving)

    def _to(self, state):
        """Change the state, unless we have left; `changed` is held."""
        if self.state == LEFT or state == REBALANCING and self.state != STABLE:
            return
        if state == REBALANCING:
            self.rebalance_at = time.monotonic()
        if state in (JOINING, FENCED):
            self.partitions = []
        self.state = state
        self.changed.notify_all()

    def _call(self, api, seconds=ANSWER_SECONDS, errors=True, **fields):
        """Call the coordinator, with the fields by which the group knows us."""
        fields.update(group=self.settings.group, generation=self.generation, member_id=self.id)
        address = self.cluster.coordinator()
        self.reached = True
        answer = self.cluster.call(address, api, fields, seconds=seconds, errors=errors)
        self.heard_at = time.monotonic()
        return answer

    def _join(self):
        """Take part in the next generation; that waits until each member has done its updates."""
        topic, seconds = self.settings.incoming, REBALANCE_MS / 1000 + 5
        subscription = encode(SUBSCRIPTION, dict(version=0, topics=[topic], user_data=b""))
        answer = self._call("JoinGroup", seconds, errors=False, session_timeout_ms=SESSION_MS,
                            rebalance_timeout_ms=REBALANCE_MS, protocol_type="consumer",
                            protocols=[dict(name="range", metadata=subscription)])
        if answer["error"] == MEMBER_ID_REQUIRED:
            self.id = answer["member_id"]
            return
        check(answer["error"], "JoinGroup (%s)" % self.settings.group)
        self.id, self.generation = answer["member_id"], answer["generation"]
        self.partition_count = None
        shares = self._share_out(answer["members"]) if answer["leader"] == self.id else []
        share = self._call("SyncGroup", seconds, assignments=shares)["assignment"]
        topics = Decoder(share).value(ASSIGNMENT)["topics"] if share else []
        indexes = [index for entry in topics if entry["name"] == topic
                   for index in entry["partitions"]]
        answer = self._call("OffsetFetch", topics=one_topic(topic, indexes))
        with self.changed:
            self.partitions = [Partition(part["index"], part["offset"], part["metadata"])
                               for part in partitions_of(answer)]
            self._to(STABLE)
        log.info("group %s, generation %d: partitions %s of %s", self.settings.group,
                 self.generation, ", ".join(map(str, indexes)) or "none", topic)

    def _share_out(self, members):
        """Return each member's share: what the group's leader tells it in SyncGroup."""
        topics = {member["member_id"]: Decoder(member["metadata"] or b"").value(
            SUBSCRIPTION)["topics"] for member in members}
        self.cluster.looked.clear()
        counts = {topic: len(self.cluster.leaders(topic))
                  for topic in sorted(set(sum(topics.values(), [])))}
        self.partition_count = counts[self.settings.incoming]
        return [dict(member_id=member, assignment=encode(ASSIGNMENT, dict(
            version=0, user_data=b"", topics=[dict(name=topic, partitions=share)
                                              for topic, share in shares.items()])))
                for member, shares in assign_ranges(topics, counts).items()]

    def _keep(self):
        """Wait for something to do, do it, and join again when nothing is in the way of that."""
        with self.changed:
            self.changed.wait_for(lambda: self.state == LEFT or self._may_join() or self._news(),
                                  self.beat_at - time.monotonic())
            if self._may_join():
                self._to(JOINING)
            if self.state in (JOINING, LEFT):
                return
        due = time.monotonic() >= self.beat_at
        if due:
            self.beat_at = time.monotonic() + HEARTBEAT_SECONDS
            if self.state != FENCED:
                self._call("Heartbeat", SESSION_MS / 3000)
        self._commit()
        if due:
            self._look_at_topic()

    def _look_at_topic(self):
        """Find out who leads the partitions, and whether there are more than we have shared out."""
        self.leaders = self.cluster.leaders(self.settings.incoming)
        if self.partition_count not in (None, len(self.leaders)):
            with self.changed:
                self._to(REBALANCING)
        for leader in set(self.leaders.values()) - {None}:
            if leader not in self.readers or not self.readers[leader].is_alive():
                self.readers[leader] = Reader(self.settings, self.stopping, self, leader)
        if not self.leaders:
            raise KafkaError(3, "topic " + self.settings.incoming)

    def _may_join(self):
        late = time.monotonic() > self.rebalance_at + LET_GO_SECONDS
        return (not self.hands and self.state in (FENCED, REBALANCING)
                and (late or not self._news()))

    def _news(self):
        """Return {partition: its progress} of those about which the group does not know it yet."""
        progress = {partition: partition.progress() for partition in self.partitions}
        return {partition: made for partition, made in progress.items()
                if made and made != partition.committed}

    def _commit(self):
        """Tell the group what is done: the only place that does."""
        with self.changed:
            news = self._news()
        if not news:
            return
        self._call("OffsetCommit", retention_ms=-1, topics=one_topic(self.settings.incoming, [
            dict(index=partition.index, offset=mark, metadata="done:" + ",".join(
                str(offset - mark) for offset in sorted(done)) if done else None)
            for partition, (mark, done) in news.items()]))
        with self.changed:
            for partition, (mark, done) in news.items():
                partition.committed = mark, done
                partition.done = {offset for offset in partition.done if offset >= mark}
            self.changed.notify_all()

    def _mend(self, error):
        """Do what an error asks for; what has no other remedy is waited out."""
        action = getattr(error, "action", None)
        if action == REJOIN:
            self.heard_at = time.monotonic()
            with self.changed:
                self._to(REBALANCING)
                self.changed.wait_for(lambda: self.state == LEFT, 0.1)
            return
        self.failures += 1
        if action == EXPELLED:
            log.warning("expelled from the group: %s", error)
            if error.code == 25:        # UNKNOWN_MEMBER_ID
                self.id = ""
            with self.changed:
                return self._to(FENCED)
        wrong = (socket.gaierror, ssl.SSLError, ConnectionResetError, BrokenPipeError)
        if not self.reached and self.failures >= FIRST_TRIES and isinstance(error, wrong):
            raise Refused("KAFKA_BROKERS, KAFKA_SECURITY_PROTOCOL or KAFKA_SSL_CERTFILE is "
                          "wrong: %s" % error)
        delay = self.cluster.note_failure("group " + self.settings.group, error, self.failures)
        with self.changed:
            self.changed.wait_for(lambda: self.state == LEFT, delay)

    def _leave(self):
        self.leaving = True
        try:
            self._commit()
        except (Refused, Interrupted) + TROUBLE as error:
            log.warning("the last updates were not committed, and may be done again: %s",
                        error or "no answer")
        try:
            if self.id:
                self._call("LeaveGroup")
                log.info("left group %s", self.settings.group)
        except (Refused, Interrupted) + TROUBLE as error:
            log.warning("group %s was not left: %s", self.settings.group, error or "no answer")


# ---- Kafka: the producer ------------------------------------------------------------------------

class Producer:
    """Appends records to topics. A broker knows a repeat by our id and the sequence (KIP-98).

    One thread at a time uses it.
    """

    def __init__(self, settings, stopping):
        self.cluster = Cluster(settings, lambda: stopping.for_longer_than(
            UNSURE_SECONDS, self.since))
        self.since = 0.0            # when the record was first tried
        self.id = None              # (producer id, epoch) that a broker has given us
        self.sequences = {}         # (topic, partition): the next

    def append(self, topic, key, value, may_write):
        """Append a record, and return when each replica has it.

        may_write(since, unsure) is asked until it is true before each try, and raises where the
        record is to be given up; `since`: when it was first tried; `unsure`: an earlier try may
        have written it. KafkaError: the topic refuses the record.
        """
        partition, unsure, retry_at, self.since = None, False, 0.0, time.monotonic()
        for failures in itertools.count(1):
            while not may_write(self.since, unsure) or time.monotonic() < retry_at:
                time.sleep(0.05)
            sending = False
            try:
                partition, leader = self._place(topic, key, partition)
                self._get_id(leader)
                sending = True
                return self._produce(topic, partition, leader, key, value)
            except TROUBLE as error:
                action = getattr(error, "action", UNSURE)
                if action == SKIP or sending and failures > 3 and getattr(error, "code", 0) == 2:
                    raise       # before Kafka 2.4 code 2 was also what INVALID_RECORD is now
                unsure = unsure or sending and action == UNSURE
                retry_at = time.monotonic() + self.cluster.note_failure(
                    "writing to " + topic, error, failures)

    def close(self):
        self.cluster.close()

    def _place(self, topic, key, partition):
        """Return the partition for a record and its leader. It is the one that was tried before, as
        long as there is such a one, so that a repeat is known."""
        leaders = self.cluster.leaders(topic, create=True)
        if not leaders:
            raise KafkaError(3, "topic " + topic)
        if partition not in leaders:
            number = random.getrandbits(31) if key is None else murmur2(key)
            partition = number % len(leaders)
        if not leaders[partition]:
            raise KafkaError(5, "topic %s, partition %d" % (topic, partition))
        return partition, leaders[partition]

    def _get_id(self, address):
        if not self.id:
            answer = self.cluster.call(address, "InitProducerId",
                                       dict(transactional_id=None, timeout_ms=60000))
            self.id, self.sequences = (answer["producer_id"], answer["epoch"]), {}

    def _produce(self, topic, partition, address, key, value):
        sequence = self.sequences.get((topic, partition), 0)
        records = encode_batch(key, value, self.id[0], self.id[1], sequence)
        try:
            self.cluster.call(address, "Produce", dict(
                transactional_id=None, acks=-1, timeout_ms=10000,
                topics=one_topic(topic, [dict(index=partition, records=records)])))
        except KafkaError as error:
            if error.action == RENEW:
                self.id = None
            if error.action != DONE:
                raise
        self.sequences[topic, partition] = (sequence + 1) & 0x7FFFFFFF


# ---- Kafka: the source --------------------------------------------------------------------------

class Receipt:
    """What an update came as: a record of a partition, which a member of the group was given."""

    def __init__(self, member, partition, record, topic):
        self.member, self.partition, (self.offset, self.key, self.value) = member, partition, record
        self.place = "%s, partition %d, offset %d" % (topic, partition.index, self.offset)
        self.update, self.bot_id, self.broken = {}, None, None      # broken: why there is no update
        try:
            envelope = json.loads(self.value)
            update, self.bot_id = envelope["update"], str(envelope["bot_id"])
            if not isinstance(update, dict):
                raise TypeError
            self.update = update
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            self.broken = type(error).__name__


class Kafka:
    """Updates from one topic, replies to another: at least once, and exactly once while bots end
    by SIGTERM only.

    An update that was given up comes again. An envelope whose bot_id is not BOT_ID is passed over.
    Every failure but Refused is waited out. Interrupted: the bot has to stop, or the update belongs
    to another bot now.
    """

    def __init__(self, environ, stopping):
        self.settings, self.stopping, self.member = kafka_settings(environ), stopping, None
        self.producers = collections.deque()        # those that no thread uses at the moment

    def take(self):
        if self.stopping.requested:
            return None
        self.member = self.member or Member(self.settings, self.stopping)
        with self.member.changed:
            partition = self.member.changed.wait_for(self._turn, FETCH_MS / 1000)
            receipt = partition and self._next(partition)
        return receipt and (receipt.update, receipt)

    def reply(self, receipt, call):
        method, params = call
        chat = params.get("chat_id", chat_of(receipt.update))
        key = None if chat is None else str(chat).encode("utf-8", "replace")
        value = json.dumps({"bot_token": self.settings.token, "method": method, "params": params})
        try:
            self._append(receipt, self.settings.outgoing, key, value.encode())
        except KafkaError as error:
            log.error("%s: its reply is refused (%s): passed over", receipt.place, error)
            self._bury(receipt)

    def acknowledge(self, receipt):
        """Say that an update is done; return when the group knows, or has given it to another."""
        if receipt.broken:
            log.error("%s is no JSON of {bot_id, update} (%s): passed over", receipt.place,
                      receipt.broken)
            self._bury(receipt)
        if not receipt.member.finish(receipt.partition, receipt.offset):
            log.warning("%s went to another bot meanwhile, which may do it again", receipt.place)

    def close(self):
        """Leave the group and close every connection; take() joins again."""
        if self.member:
            self.member.leave()
        self.member = None
        while self.producers:
            self.producers.pop().close()

    def _turn(self):
        """Return the partition from which an update may be taken now, or None."""
        partitions = self.member.partitions if self.member.state == STABLE else []
        return next(filter(Partition.may_be_handed_out, partitions), None)

    def _next(self, partition):
        """Return the receipt of a partition's next update, or None when it is for another bot."""
        self.member.partitions.remove(partition)        # to the end of the turn
        self.member.partitions.append(partition)
        record = partition.records.popleft()
        self.member.changed.notify_all()    # its reader may fetch more
        receipt = Receipt(self.member, partition, record, self.settings.incoming)
        if not receipt.broken and self.settings.bot_id not in (None, "", receipt.bot_id):
            log.info("%s is for another bot: passed over", receipt.place)
            return None
        partition.in_hand.add(receipt.offset)
        self.member.hands += 1
        return receipt

    def _bury(self, receipt):
        """Write a record that is passed over to KAFKA_DEAD_LETTER_TOPIC, where there is one."""
        topic = self.settings.dead_letters
        try:
            if topic:
                self._append(receipt, topic, receipt.key, receipt.value)
        except KafkaError as error:
            log.error("%s: the dead letter is refused too (%s)", receipt.place, error)

    def _append(self, receipt, topic, key, value):
        """Append a record. KafkaError: the topic refuses it."""
        try:
            with borrowed(self.producers, Producer, self.settings, self.stopping) as producer:
                producer.append(topic, key, value, functools.partial(self._may_write, receipt))
        except Interrupted:
            receipt.member.release()
            raise

    def _may_write(self, receipt, since, unsure):
        """Return whether the record of a receipt is ours to answer; if it is not known at the
        moment, None. Interrupted: it is given up."""
        owned = receipt.member.owns(receipt.partition)
        if owned is False or self.stopping.for_longer_than(
                UNSURE_SECONDS if unsure else STOP_SECONDS, since):
            log.warning("%s is left to who comes next%s", receipt.place, ", and may be done "
                        "twice: whether it was written is not known" if unsure else "")
            raise Interrupted
        return owned


# ---- The loop -----------------------------------------------------------------------------------

class Crew:
    """Handles up to `size` updates at once, each on a thread, those of one chat one after another.

    A thread waits until the update before it of the same chat is done; that one was handed out
    earlier, so it has a thread too.
    """

    def __init__(self, source, sidecar, stopping, size):
        self.source, self.sidecar, self.stopping, self.size = source, sidecar, stopping, size
        self.threads = futures.ThreadPoolExecutor(size)
        self.in_hand = []               # (chat, what becomes of the update), the oldest first

    def has_room(self, seconds):
        """Return whether one more update may be taken, within `seconds`."""
        if len(self.in_hand) == self.size:
            futures.wait([future for _, future in self.in_hand], seconds, futures.FIRST_COMPLETED)
        self.in_hand = [(chat, future) for chat, future in self.in_hand if not future.done()]
        return len(self.in_hand) < self.size

    def finish(self):
        """Return when nothing is in hand any more."""
        futures.wait([future for _, future in self.in_hand])

    def begin(self, update, receipt):
        """Let a thread handle an update; there is room."""
        chat = chat_of(update)
        before = next((future for other, future in reversed(self.in_hand)
                       if chat is not None and other == chat), None)
        self.in_hand.append((chat, self.threads.submit(self._work, update, receipt, before)))

    def _work(self, update, receipt, before):
        """Return whether an update is done; else it was given up, or has ended the bot."""
        try:
            with self.sidecar.track():
                if before and not before.result() and self.stopping.requested:
                    raise Interrupted       # so that it does not come before that one
                handle(self.source, update, receipt)
            return True
        except Interrupted:
            return False
        except Exception as error:
            self.stopping.fail(error)
            return False


def handle(source, update, receipt):
    try:
        call = reply_to(update)
    except Exception as error:      # it would be as broken the next time
        log.warning("a broken update is passed over: %s: %s: %.200r", type(error).__name__, error,
                    update)
        call = None
    if call:
        source.reply(receipt, call)
    source.acknowledge(receipt)


def run(source, sidecar, stopping, concurrency):
    """Take, track, reply, and only then acknowledge; until a signal comes or there are no more."""
    crew = Crew(source, sidecar, stopping, concurrency)
    sidecar.reset()
    try:
        while not stopping.requested:
            if sidecar.draining:
                log.info("the sidecar is draining: no more updates are taken")
                crew.finish()
                source.close()
                while not stopping.requested and not sidecar.ready():
                    stopping.sleep(1)
            elif crew.has_room(0.1) and not sidecar.draining:
                taken = source.take()
                if taken and not sidecar.draining and not stopping.requested:
                    crew.begin(*taken)          # else it comes again: nobody acknowledges it
    except EOFError:
        pass
    except Exception as error:
        stopping.fail(error)
    crew.finish()
    try:
        source.close()
    except Exception as error:
        stopping.fail(error)
    sidecar.close()
    log.info("stopped")
    if stopping.failure:
        raise stopping.failure


def read_concurrency(environ):
    text = environ.get("CONCURRENCY") or "8"
    if not re.fullmatch("[1-9][0-9]?|100", text):
        raise ConfigError("CONCURRENCY=%r: expected a whole number from 1 to 100" % text)
    return int(text)


def new_sidecar(environ):
    split_url("SIDECAR_URL", environ.get("SIDECAR_URL") or "http://127.0.0.1:8081", ("http",))
    return Sidecar(hold=False)          # on SIGTERM it finishes by itself what it has in hand


def main(environ):
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    stopping = Stopping(signal.SIGTERM, signal.SIGINT)
    try:
        sidecar, concurrency = new_sidecar(environ), read_concurrency(environ)
        if environ.get("KAFKA_BROKERS"):
            source = Kafka(environ, stopping)
        elif environ.get("BOT_TOKEN"):
            source = Telegram(environ, stopping, concurrency)
        else:
            source, concurrency = Console(stopping), 1
        run(source, sidecar, stopping, concurrency)
    except (ConfigError, Refused) as error:
        log.error("%s", error)
        return 2 if isinstance(error, ConfigError) else 1
    except BrokenPipeError:             # nobody reads the console's replies any more
        return 1
    return 0


if __name__ == "__main__":
    # sys.exit would take the handlers away first, and one more signal would kill it.
    os._exit(main(os.environ))
