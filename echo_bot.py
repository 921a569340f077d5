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
"""
import collections
import http.client
import json
import logging
import os
import random
import re
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager
from urllib.parse import urlsplit

log = logging.getLogger("echo_bot")


class BotError(Exception):
    """What ends the bot: one line for its user, and the exit status: 2 for a setting, 1 for what a server refused."""

    def __init__(self, text, status=2):
        super().__init__(text)
        self.status = status


# ---- The sidecar's client: copy this class into your own worker -------------------------------------------------------

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

    def _end(self, path):
        """Deliver an end, now or later: a sidecar that hung for a moment must not be left with a count."""
        if not self._tell("POST", path) and not isinstance(self._trouble, ConnectionRefusedError):      # its count is gone
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


# ---- The bot ----------------------------------------------------------------------------------------------------------

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
    """The handler of SIGTERM and SIGINT. Work is finished, so only a wait is broken into."""

    def __init__(self):
        self.requested = False
        self._waiting = False

    def __call__(self, number, frame):
        self.requested = True
        if self._waiting:
            self._waiting = False
            raise Interrupted

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
    BATCH = 10
    MAX_DELAY_SECONDS = 30.0

    def __init__(self, environ, stopping):
        self.stopping = stopping
        self._token = environ["BOT_TOKEN"]
        if not re.fullmatch("[0-9]+:[A-Za-z0-9_-]+", self._token):
            raise BotError("BOT_TOKEN is malformed: expected what @BotFather gave, such as 123456:ABC-DEF")
        url = environ.get("TELEGRAM_API_URL") or "https://api.telegram.org"
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BotError("TELEGRAM_API_URL=%r: expected https://HOST[:PORT]" % url)
        connection = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = connection(parts.hostname, parts.port, timeout=self.POLL_SECONDS + 10)
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
                return answer["result"]
            code, problem = answer.get("error_code", 500), str(answer.get("description")).replace(self._token, "...")
            if code in (401, 404):
                raise BotError("Telegram refuses BOT_TOKEN (%s %s): expected what @BotFather gave" % (code, problem), 1)
            if code == 409:
                raise BotError("another poller or a webhook takes this bot's updates (409 %s)" % problem, 1)
            if 400 <= code < 500 and code != 429:
                log.warning("%s was refused: %s %s", method, code, problem)
                return None
            if self.stopping.requested:
                raise Interrupted
            attempt += 1
            delay = min(self.MAX_DELAY_SECONDS, 2.0 ** attempt) * random.uniform(0.25, 0.5)
            delay = (answer.get("parameters") or {}).get("retry_after", delay)
            log.warning("%s failed, next try in %.1f s: %s %s", method, delay, code, problem)
            self.stopping.sleep(delay)

    def _post(self, method, parameters):
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
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stopping)
    try:
        sidecar = Sidecar()
        source = Telegram(environ, stopping) if environ.get("BOT_TOKEN") else Console(stopping)
        run(source, sidecar, stopping)
    except (BotError, ValueError) as error:
        log.error("%s", error)
        return getattr(error, "status", 2)
    except BrokenPipeError:             # nobody reads the console's replies any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(os.environ))
