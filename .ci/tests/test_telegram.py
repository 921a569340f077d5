"""The bot on Telegram: a Bot API server on loopback that keeps Telegram's rules."""
import base64
import collections
import http.client
import http.server
import itertools
import json
import os
import re
import shutil
import signal
import socket
import ssl
import sys
import tempfile
import threading
import time
import unittest
import urllib.parse

from support import HERE, PATIENCE, Case, ScriptedSidecar, needs, run, until


def utf16_units(text):
    """Return the length of a text as Telegram counts it."""
    return len(text.encode("utf-16-le")) // 2


class Refused(Exception):
    """A call that the Bot API refuses: status, description, then the response's `parameters`."""


class BotAPI(http.server.ThreadingHTTPServer):
    """A Bot API server on loopback that keeps Telegram's rules, and lets a test see and hold every
    stage of an update.

    The stages, each with what it is about: "polling" (offset: getUpdates came, nothing is confirmed
    yet), "confirmed" (update_id), "waiting" and "waited" (offset: a poll that found nothing),
    "handing" and "handed" (update_ids: just before and after the answer was sent), "replying"
    (text: the user has the reply, the bot not yet its answer), "replied" (text: it has).
    """
    TOKEN = "123456:AAtest-token_that-no_log-may_show"
    SLOW_DOWN_SECONDS = 0.3     # 3 at Telegram's
    BY_DEFAULT = {"message", "edited_message", "channel_post", "callback_query", "poll",
                  "my_chat_member"}

    def __init__(self):
        super().__init__(("127.0.0.1", 0), BotAPIHandler)
        self.url = "http://127.0.0.1:%d" % self.server_port
        self.changed = threading.Condition()        # guards all that follows; re-entrant
        self.updates = []           # those not confirmed yet, oldest first
        self.last_id = 0            # the newest update's
        self.messages = set()       # (chat id, message id): what can be replied to
        self.allowed = self.BY_DEFAULT
        self.poll = 0               # the number of the newest getUpdates
        self.waiting = 0            # the number of the newest one that waits
        self.last_poll = (None, 0)  # its offset and when it came
        self.webhook = False
        self.stages = []            # (stage, what)
        self.gates = []             # (stage, condition on what, Event that lets it go on)
        self.failures = {}          # method: how its next calls fail, see fail()
        # Of all calls, drop this one's connection, in turn before and after acting on it.
        self.drop_every = 0
        self.logins = set()         # the values of Authorization headers
        self.calls = []             # (method, monotonic time)
        self.replies = []           # (method, params) of each that reached the user
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()
        for _, _, gate in self.gates:
            gate.set()

    def handle_error(self, request, client_address):
        # A bot that was killed is no error of the server.
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    # What a test does and sees.

    def push(self, kind, content):
        """A user does something: queue it as an update unless the bot has asked for other kinds;
        return its id."""
        with self.changed:
            if kind in self.allowed:
                self.last_id += 1
                self.updates.append({"update_id": self.last_id, kind: content})
                if kind == "message" and isinstance(content,
                                                    dict) and isinstance(content.get("chat"), dict):
                    self.messages.add((str(content["chat"].get("id")), content.get("message_id")))
                self.changed.notify_all()
            return self.last_id

    def say(self, text, chat=7):
        """A user sends a text message; return its update's id."""
        return self.push("message",
                         {"message_id": 1000 + self.last_id, "date": 1700000000, "text": text,
                          "chat": {"id": chat, "type": "private"},
                          "from": {"id": chat, "is_bot": False}})

    def fail(self, method, *how):
        """Let the next calls of a method fail, one each: a status, ("retry_after", seconds), "drop
        before", "drop after", ("page", status): a proxy's, ("json", value), ("says", status,
        description and perhaps parameters): Telegram's."""
        self.failures.setdefault(method.lower(), collections.deque()).extend(how)

    def hold(self, stage, condition=lambda what: True):
        """Hold the next such stage (but "waiting" and "waited"); return the Event that lets it go
        on."""
        gate = threading.Event()
        self.gates.append((stage, condition, gate))
        return gate

    def wait_for(self, stage, condition=lambda what: True):
        """Wait until a stage has been reached."""
        with self.changed:
            if not self.changed.wait_for(
                    lambda: any(name == stage and condition(what) for name, what in self.stages),
                    PATIENCE):
                raise AssertionError("no %s; there were %s" % (stage, self.stages))

    def wait_until_confirmed(self):
        with self.changed:
            if not self.changed.wait_for(lambda: not self.updates, PATIENCE):
                raise AssertionError("never confirmed: %s" % self.updates)

    def texts(self):
        """Return the text of each reply that reached a user, in order."""
        return [params.get("text") for _, params in self.replies]

    # Telegram's side.

    def reach(self, stage, what):
        with self.changed:
            self.stages.append((stage, what))
            self.changed.notify_all()
            held = next((gate for gate in self.gates if gate[0] == stage and gate[1](what)), None)
            if held:
                self.gates.remove(held)
        if held:
            held[2].wait(PATIENCE)

    def getupdates(self, params):
        offset = int(params.get("offset", 0))
        limit = min(max(int(params.get("limit", 100)), 1), 100)
        timeout = min(max(int(params.get("timeout", 0)), 0), 50)
        self.reach("polling", offset)
        with self.changed:
            if self.webhook:
                raise Refused(409, "Conflict: can't use getUpdates method while webhook is active; "
                                   "use deleteWebhook to delete the webhook first")
            if params.get("allowed_updates"):
                self.allowed = set(json.loads(params["allowed_updates"])) or self.BY_DEFAULT
            self.poll += 1
            mine, now = self.poll, time.monotonic()
            if self.last_poll[0] == offset and now < self.last_poll[1] + self.SLOW_DOWN_SECONDS:
                timeout = max(timeout, self.SLOW_DOWN_SECONDS)   # the same question again and again
            self.last_poll = offset, now
        self.confirm(offset)
        with self.changed:
            if not self.updates and timeout:
                self.wait_for_updates(mine, offset, timeout)
            handed = self.updates[:limit]
        if handed:
            self.reach("handing", [update["update_id"] for update in handed])
        return handed

    def confirm(self, offset):
        """Forget the updates before an offset."""
        with self.changed:
            if offset < 0:                      # counted from the end
                offset += self.last_id + 1
            confirmed = [update["update_id"] for update in self.updates
                         if update["update_id"] < offset]
            self.updates = self.updates[len(confirmed):]
        for update_id in confirmed:
            self.reach("confirmed", update_id)

    def wait_for_updates(self, mine, offset, timeout):
        """Let the poll of a number wait: the newest may, and ends the one that waits already."""
        self.waiting = max(mine, self.waiting)
        self.reach("waiting", offset)
        self.changed.wait_for(lambda: self.updates or self.waiting != mine or self.webhook, timeout)
        self.reach("waited", offset)
        if self.webhook:
            raise Refused(409, "Conflict: terminated by setWebhook request")
        if self.waiting != mine:
            raise Refused(409, "Conflict: terminated by other getUpdates request; "
                               "make sure that only one bot instance is running")

    def sendmessage(self, params):
        text, chat = params.get("text", ""), params.get("chat_id", "")
        reply = json.loads(params.get("reply_parameters", "{}"))
        if not chat:
            raise Refused(400, "Bad Request: chat_id is empty")
        if not re.match(r"-?\d+$|@\w+$", chat):
            raise Refused(400, "Bad Request: chat not found")
        if not text.strip():
            raise Refused(400, "Bad Request: message text is empty")
        if utf16_units(text) > 4096:
            raise Refused(400, "Bad Request: message is too long")
        unknown = reply and (chat, reply["message_id"]) not in self.messages
        if unknown and not reply.get("allow_sending_without_reply"):
            raise Refused(400, "Bad Request: message to be replied not found")
        return {"message_id": 5000 + len(self.replies), "date": 1700000000, "text": text,
                "chat": {"id": chat}}

    def answercallbackquery(self, params):
        if not params.get("callback_query_id"):
            raise Refused(400,
                          "Bad Request: query is too old and response timeout expired or query ID "
                          "is invalid")
        if utf16_units(params.get("text", "")) > 200:
            raise Refused(400, "Bad Request: MESSAGE_TOO_LONG")
        return True

    def getme(self, params):
        return {"id": 123456, "is_bot": True, "first_name": "Echo", "username": "echo_bot"}


class BotAPIHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    REFUSALS = {403: "Forbidden: bot was blocked by the user", 404: "Not Found"}

    def log_message(self, *args):
        pass

    def do_POST(self):
        if "Authorization" in self.headers:
            self.server.logins.add(self.headers["Authorization"])
        url = urllib.parse.urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        params = dict(urllib.parse.parse_qsl(url.query))
        if "json" in self.headers.get("Content-Type", ""):
            params.update((name, value if isinstance(value, str) else json.dumps(value))
                          for name, value in json.loads(body or "{}").items())
        else:
            params.update(urllib.parse.parse_qsl(body, strict_parsing=bool(body)))
        path = re.match(r"/bot(\d+:[\w-]+)/(\w+)$", urllib.parse.unquote(url.path))
        try:
            if not path:
                raise Refused(404, "Not Found")
            if path.group(1) != self.server.TOKEN:
                raise Refused(401, "Unauthorized")
            self.act(path.group(2).lower(), params)
        except Refused as refusal:
            status, description = refusal.args[:2]
            answer = {"ok": False, "error_code": status, "description": description}
            if refusal.args[2:]:
                answer["parameters"] = refusal.args[2]
            self.answer(status, answer)

    do_GET = do_POST

    def act(self, method, params):
        api = self.server
        with api.changed:
            api.calls.append((method, time.monotonic()))
            number = len(api.calls)
            failures = api.failures.get(method)
            failure = failures.popleft() if failures else None
            if api.drop_every and not failure and number % api.drop_every == 0:
                failure = "drop before" if number // api.drop_every % 2 else "drop after"
        if failure and failure != "drop after":
            return self.act_out(failure)
        if method not in ("getupdates", "sendmessage", "answercallbackquery", "getme"):
            raise Refused(404, "Not Found: method not found")
        result = getattr(api, method)(params)
        replies = method in ("sendmessage", "answercallbackquery")
        if replies:
            api.replies.append((method, params))
            api.reach("replying", params.get("text"))
        if failure:
            return self.drop()
        self.answer(200, {"ok": True, "result": result})
        if replies:
            api.reach("replied", params.get("text"))
        elif result and method == "getupdates":
            api.reach("handed", [update["update_id"] for update in result])

    def act_out(self, failure):
        """Fail in a way that BotAPI.fail() tells, before anything is done."""
        kind, *more = failure if isinstance(failure, tuple) else (failure,)
        if kind == "drop before":
            self.drop()
        elif kind == "says":
            raise Refused(*more)
        elif kind == "json":
            self.answer(200, json.dumps(more[0]))
        elif kind == "page":
            self.answer(more[0], "<html><h1>a proxy's page</h1></html>")
        elif kind == "retry_after":
            raise Refused(429, "Too Many Requests: retry after %d" % more[0],
                          {"retry_after": more[0]})
        elif kind in self.REFUSALS:
            raise Refused(kind, self.REFUSALS[kind])
        else:
            self.answer(kind, "<html><h1>%d Bad Gateway</h1></html>" % kind)

    def drop(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, status, content):
        text = json.dumps(content) if isinstance(content, dict) else content
        self.send_response(status)
        self.send_header("Content-Type",
                         "application/json" if isinstance(content, dict) else "text/html")
        self.send_header("Content-Length", str(len(text)))
        if "parameters" in content and "retry_after" in content["parameters"]:
            self.send_header("Retry-After", str(content["parameters"]["retry_after"]))
        self.end_headers()
        self.wfile.write(text.encode())


class TestTelegram(Case):
    # What the bot runs before, where each of its calls has to reach the sidecar, however slow.
    PATIENT = "echo_bot.Sidecar.CALL_SECONDS = 30; "

    def setUp(self):
        self.api = self.bot_api()
        taken = socket.socket()            # bound, so that nobody else gets the port; not listening
        self.addCleanup(taken.close)
        taken.bind(("127.0.0.1", 0))
        self.nowhere = "http://127.0.0.1:%d" % taken.getsockname()[1]

    def bot_api(self):
        api = BotAPI()
        self.addCleanup(api.close)
        return api

    def bot(self, constants=None, code="", **env):
        """Start the bot; without a sidecar, unless SIDECAR_URL says where one is.

        `constants` of Telegram have other values, so that a test need not wait for as long as a
        user would; `code` runs before.
        """
        settings = dict(BOT_TOKEN=self.api.TOKEN, TELEGRAM_API_URL=self.api.url,
                        SIDECAR_URL=self.nowhere, KAFKA_BROKERS=None, CONCURRENCY=None,
                        HTTPS_PROXY=None, https_proxy=None)
        settings.update(env)
        command = [os.path.join(HERE, "echo_bot.py")]
        if constants or code:
            command = ["-c", "import os, sys; sys.path.insert(0, %r); import echo_bot; [setattr("
                             "echo_bot.Telegram, *item) for item in %r.items()]; %s"
                             "os._exit(echo_bot.main(os.environ))" % (HERE, constants or {}, code)]
        return self.program(sys.executable, *command, env=settings)

    def end(self, bot):
        bot.signal(signal.SIGTERM)
        self.assertEqual(bot.wait(), 0, bot.log)
        self.check_log(bot)

    def check_log(self, bot):
        self.assertNotIn("Traceback", bot.log)
        self.assertNotIn(self.api.TOKEN.partition(":")[2], bot.log)

    # What the bot answers.

    def test_messages_and_button_presses_are_answered(self):
        bot = self.bot()
        self.api.say("hello")
        self.api.push("callback_query", {"id": "q1", "data": "yes", "from": {"id": 7}})
        self.api.wait_until_confirmed()
        (other_method, press), (method, message) = sorted(self.api.replies, key=lambda one: one[0])
        self.assertEqual((method, message["chat_id"], message["text"]),
                         ("sendmessage", "7", "Echo: hello"))
        self.assertEqual(json.loads(message["reply_parameters"])["message_id"], 1000)
        self.assertEqual((other_method, press), (
            "answercallbackquery", {"callback_query_id": "q1", "text": "Received: yes"}))
        self.end(bot)

    def test_replies_keep_to_telegrams_limits(self):
        for text in ("x" * 4096, "\N{GRINNING FACE}" * 2048, "x" + "\N{GRINNING FACE}" * 2047):
            self.api.say(text)
        self.api.push("callback_query",
                      {"id": "q1", "data": "\N{GRINNING FACE}" * 200, "from": {"id": 7}})
        bot = self.bot(CONCURRENCY=1)
        self.api.wait_until_confirmed()
        self.assertEqual(len(self.api.replies), 4, bot.log)
        for (_, params), longest in zip(self.api.replies, (4096, 4096, 4096, 200)):
            # Never half of a surrogate pair.
            self.assertLessEqual(longest - 1, utf16_units(params["text"]))
            self.assertLessEqual(utf16_units(params["text"]), longest)
        self.end(bot)

    def test_other_updates_are_acknowledged_and_broken_ones_logged(self):
        chat = {"id": 7, "type": "private"}
        self.api.allowed = {"message", "edited_message", "callback_query", "poll", "of_the_future"}
        self.api.push("edited_message", {"message_id": 1, "chat": chat, "text": "edited"})
        self.api.push("message",
                      {"message_id": 2, "chat": chat, "sticker": {"emoji": "\N{GRINNING FACE}"}})
        self.api.push("message", {"message_id": 3, "chat": chat, "new_chat_members": [{"id": 8}]})
        self.api.push("of_the_future", {"id": 1})
        broken = [self.api.push("message", content) for content in (
            "text", [1], {"message_id": 4, "text": "no chat"},
            {"message_id": 5, "chat": chat, "text": 5},
            {"message_id": 6, "chat": 7, "text": "hi"},
            {"message_id": 7, "chat": {"type": "private"}, "text": "no id"})]
        broken += [self.api.push("callback_query", content) for content in (7, {"data": "no id"})]
        self.api.say("after them")
        bot = self.bot()
        self.api.wait_until_confirmed()
        self.assertEqual(self.api.texts(), ["Echo: after them"])
        self.end(bot)
        for update_id in broken:
            self.assertRegex(bot.log, r"\b%d\b" % update_id)

    def test_a_reply_that_telegram_refuses_is_logged_and_acknowledged(self):
        self.api.say("from one who has blocked the bot")
        self.api.fail("sendMessage", 403)
        self.api.say("hello")
        bot = self.bot()
        self.api.wait_until_confirmed()
        self.assertEqual(self.api.texts(), ["Echo: hello"])
        bot.wait_for("blocked")
        self.end(bot)

    def test_a_message_that_was_deleted_meanwhile_is_answered(self):
        self.api.say("hello")
        self.api.messages.clear()
        bot = self.bot()
        self.api.wait_until_confirmed()
        self.assertEqual(self.api.texts(), ["Echo: hello"])
        self.end(bot)

    def test_it_asks_for_the_kinds_that_it_answers_and_no_others(self):
        bot = self.bot()
        self.api.wait_for("polling")
        self.api.say("hello")
        self.api.wait_until_confirmed()
        self.assertEqual(self.api.allowed, {"message", "callback_query"})
        self.end(bot)

    # Nothing is lost.

    STAGES = {      # for updates 1, 2 and 3: when to stop
        "while the update is on its way to it": ("handing", lambda ids: 2 in ids),
        "when it has the update": ("handed", lambda ids: 2 in ids),
        "while the reply is under way": ("replying", lambda text: text == "Echo: 2"),
        "when the reply is sent": ("replied", lambda text: text == "Echo: 2"),
        "while it confirms the update": ("polling", lambda offset: offset > 2),
        "when the update is confirmed": ("confirmed", lambda update_id: update_id == 2),
        "when all is done": ("confirmed", lambda update_id: update_id == 3),
    }

    def stop_at_every_stage(self, number, check):
        """Stop the bot with a signal at every stage and start it again; check({text: how often
        users got it})."""
        for (name, (stage, condition)), concurrency in itertools.product(self.STAGES.items(),
                                                                         (1, 8)):
            with self.subTest(name, concurrency=concurrency):
                self.api = self.bot_api()
                for text in "123":
                    self.api.say(text)
                gate = self.api.hold(stage, condition)
                bot = self.bot(CONCURRENCY=concurrency)
                self.api.wait_for(stage, condition)
                bot.signal(number)
                if number == signal.SIGKILL:
                    bot.wait()
                gate.set()
                self.assertEqual(bot.wait(), 0 if number == signal.SIGTERM else -number, bot.log)
                self.check_log(bot)
                self.api.say("4")
                again = self.bot()
                self.api.wait_until_confirmed()
                self.end(again)
                check(collections.Counter(text[-1] for text in self.api.texts()))

    def test_sigkill_loses_nothing_at_any_stage(self):
        self.stop_at_every_stage(signal.SIGKILL,
                                 lambda answered: self.assertEqual(set(answered), set("1234")))

    def test_sigterm_answers_each_exactly_once_at_any_stage(self):
        self.stop_at_every_stage(
            signal.SIGTERM, lambda answered: self.assertEqual(answered, dict.fromkeys("1234", 1)))

    def test_sigterm_lets_the_update_in_hand_be_answered_and_no_other(self):
        self.api.say("1")
        self.api.say("2")
        gate = self.api.hold("replying")
        bot = self.bot(CONCURRENCY=1)
        self.api.wait_for("replying")
        bot.signal(signal.SIGTERM)
        gate.set()
        self.assertEqual(bot.wait(), 0, bot.log)
        self.assertEqual(self.api.texts(), ["Echo: 1"])
        self.assertEqual([update["update_id"] for update in self.api.updates], [2])

    def test_sigterm_does_not_wait_for_the_poll_to_end(self):
        bot = self.bot()
        self.api.wait_for("waiting")
        self.end(bot)
        self.assertNotIn("waited", [stage for stage, _ in self.api.stages])

    def test_a_connection_that_drops_now_and_then_loses_nothing(self):
        self.api.drop_every = 5
        texts = ["%d" % number for number in range(20)]
        for text in texts[:10]:
            self.api.say(text)
        bot = self.bot()
        for text in texts[10:]:
            self.api.say(text)
        self.api.wait_until_confirmed()
        self.assertEqual({"Echo: " + text for text in texts}, set(self.api.texts()))
        self.end(bot)

    # Telegram's errors.

    def test_too_many_requests_waits_as_long_as_it_is_told(self):
        for method in ("getUpdates", "sendMessage"):
            with self.subTest(method):
                self.api = self.bot_api()
                self.api.fail(method, ("retry_after", 2))
                self.api.say("hello")
                bot = self.bot()
                self.api.wait_until_confirmed()
                self.assertEqual(self.api.texts(), ["Echo: hello"])
                refused, again = [at for called, at in self.api.calls
                                  if called == method.lower()][:2]
                self.assertGreaterEqual(again - refused, 2)
                self.end(bot)

    def test_a_server_error_is_waited_out(self):
        self.api.fail("getUpdates", 502, 200)       # 200: somebody else's page
        self.api.fail("sendMessage", 503, "drop before")
        self.api.say("hello")
        bot = self.bot()
        self.api.wait_until_confirmed()
        self.assertEqual(self.api.texts(), ["Echo: hello"])
        self.end(bot)

    def test_sigterm_breaks_into_a_wait_to_try_again(self):
        # A reply is tried once more.
        for method, failures in (("getUpdates", 1), ("sendMessage", 2)):
            with self.subTest(method):
                self.api = self.bot_api()
                self.api.fail(method, *[("retry_after", 1000 * PATIENCE)] * failures)
                self.api.say("hello")
                bot = self.bot()
                bot.wait_for(method + ": .*trying again")
                self.end(bot)
                self.assertEqual(self.api.texts(), [])
                again = self.bot()
                self.api.wait_until_confirmed()
                self.assertEqual(self.api.texts(), ["Echo: hello"])
                self.end(again)

    def test_no_server_at_all_is_waited_out_and_the_token_not_told(self):
        bot = self.bot(TELEGRAM_API_URL=self.nowhere)
        bot.wait_for("(?i)getUpdates.*refused")
        with open("/proc/%d/cmdline" % bot.process.pid) as file:
            self.assertNotIn("AAtest", file.read())
        self.end(bot)

    def check_it_gives_up(self, bot, *words):
        self.assertEqual(bot.wait(), 1, bot.log)
        self.check_log(bot)
        for word in words:
            self.assertIn(word, bot.lines[-1].lower())

    def test_a_bad_token_ends_it(self):
        self.check_it_gives_up(self.bot(BOT_TOKEN="123456:another"), "token")               # 401
        self.api.fail("getUpdates", 404)
        self.check_it_gives_up(self.bot(), "token")

    def test_a_malformed_token_ends_it_and_is_not_told(self):
        for token in ("SECRET", "123456:SECRET with\na line's end", "123456:SECRET/..",
                      "123456:SECRETé"):
            bot = self.bot(BOT_TOKEN=token)
            self.assertEqual(bot.wait(), 2, bot.log)
            self.assertIn("BOT_TOKEN", bot.log)
            self.assertNotIn("SECRET", bot.log)
            self.check_log(bot)

    def poll_as_another(self, count):
        """Poll as another bot does, so many times, until somebody else's poll ends each."""
        connection = http.client.HTTPConnection("127.0.0.1", self.api.server_port,
                                                timeout=PATIENCE)
        try:
            for _ in range(count):
                connection.request("GET", "/bot%s/getUpdates?timeout=50" % self.api.TOKEN)
                connection.getresponse().read()
        except OSError:
            pass
        finally:
            connection.close()

    def test_a_second_poller_ends_it(self):
        bot = self.bot(constants={"MAX_DELAY_SECONDS": 0.1})
        self.api.wait_for("waiting")
        other = threading.Thread(target=self.poll_as_another, args=(1000,), daemon=True)
        other.start()
        self.check_it_gives_up(bot, "poll", "webhook")
        self.api.say("for the other one")
        self.api.webhook = True         # and this ends the other one's last poll

    def test_a_poller_that_goes_away_does_not_end_it(self):
        bot = self.bot(constants={"MAX_DELAY_SECONDS": 0.1})
        self.api.wait_for("waiting")
        self.poll_as_another(1)
        bot.wait_for("getUpdates: 409 .*trying again")
        self.api.say("hello")
        self.api.wait_until_confirmed()
        self.assertEqual(self.api.texts(), ["Echo: hello"])
        self.end(bot)

    def test_a_webhook_ends_it(self):
        self.api.webhook = True
        self.check_it_gives_up(self.bot(), "webhook")

    # Several at once.

    def test_as_many_as_concurrency_says_are_in_hand_and_counted(self):
        sidecar = self.sidecar()
        gates = [self.api.hold("replying") for _ in range(4)]
        for number in range(5):
            self.api.say("%d" % number, chat=number + 1)
        bot = self.bot(code=self.PATIENT, SIDECAR_URL=sidecar.url, CONCURRENCY=3)
        until(lambda: sidecar.active() == 3)
        until(lambda: len(self.api.texts()) == 3)
        gates[1].set()
        until(lambda: len(self.api.texts()) == 4)       # as soon as one is done, and not before
        self.assertEqual(sidecar.active(), 3)
        for gate in gates:
            gate.set()
        self.api.wait_until_confirmed()
        self.assertEqual(sorted(self.api.texts()), ["Echo: %d" % number for number in range(5)])
        self.end(bot)
        self.assertEqual(sidecar.sample("sidecar_requests_total"), 5)

    def test_one_chats_updates_stay_in_order(self):
        gate = self.api.hold("replying", lambda text: text == "Echo: a0")
        for number in range(4):
            self.api.say("a%d" % number, chat=1)
        self.api.say("b0", chat=2)
        bot = self.bot()
        until(lambda: len(self.api.texts()) == 2)       # the one of the other chat, and no third
        self.api.wait_for("replied", lambda text: text == "Echo: b0")
        self.assertEqual(sorted(self.api.texts()), ["Echo: a0", "Echo: b0"])
        gate.set()
        self.api.wait_until_confirmed()
        self.assertEqual([text for text in self.api.texts() if "a" in text],
                         ["Echo: a%d" % number for number in range(4)])
        self.end(bot)

    def test_nothing_is_confirmed_before_everything_before_it_is_done(self):
        gate = self.api.hold("replying", lambda text: text == "Echo: slow")
        self.api.say("slow", chat=1)
        for number in range(20):
            self.api.say("%d" % number, chat=number + 2)
        bot = self.bot(CONCURRENCY=2)
        until(lambda: len(self.api.texts()) == 21)
        polls = [at for called, at in self.api.calls if called == "getupdates"]
        self.assertEqual(len(self.api.updates), 21)
        until(lambda: len([at for called, at in self.api.calls if called == "getupdates"])
              > len(polls) + 1)         # it goes on asking, and does nothing twice
        bot.signal(signal.SIGTERM)
        gate.set()
        self.assertEqual(bot.wait(), 0, bot.log)
        self.assertEqual(len(self.api.texts()), 21)
        self.assertEqual(self.api.updates, [])

    def test_while_one_is_in_hand_it_asks_about_once_a_second(self):
        gate = self.api.hold("replying")
        self.api.say("slow")
        bot = self.bot()
        self.api.wait_for("replying")
        until(lambda: [called for called, _ in self.api.calls].count("getupdates") >= 4)
        polls = [at for called, at in self.api.calls if called == "getupdates"][1:]
        for before, after in zip(polls, polls[1:]):
            self.assertGreater(after - before, 0.9)
        gate.set()
        self.api.wait_until_confirmed()
        self.end(bot)

    def test_a_chat_that_has_to_slow_down_does_not_stop_the_others(self):
        self.api.fail("sendMessage", ("retry_after", 10 * PATIENCE))
        self.api.say("too fast", chat=1)
        bot = self.bot()
        bot.wait_for("sendMessage: .*trying again")
        for number in range(30):
            self.api.say("%d" % number, chat=number + 2)
        until(lambda: len(self.api.texts()) == 30)
        self.api.fail("sendMessage", ("retry_after", 10 * PATIENCE))    # for the try on SIGTERM
        self.end(bot)
        self.assertEqual(len(set(self.api.texts())), 30)

    def test_sigterm_finishes_all_that_is_in_hand(self):
        gates = [self.api.hold("replying") for _ in range(8)]
        for number in range(12):
            self.api.say("%d" % number, chat=number + 1)
        bot = self.bot()
        until(lambda: len(self.api.texts()) == 8)
        bot.signal(signal.SIGTERM)
        for gate in gates:
            gate.set()
        self.assertEqual(bot.wait(), 0, bot.log)
        self.assertEqual(len(self.api.texts()), 8)
        self.assertEqual(len(self.api.updates), 4)

    def test_sigkill_repeats_at_most_what_was_in_hand(self):
        for number in range(40):
            self.api.say("%d" % number, chat=number + 1)
        gates = [self.api.hold("replying", lambda text: int(text[6:]) >= 20) for _ in range(8)]
        bot = self.bot()
        until(lambda: len(self.api.texts()) == 28)      # 20 are done, and 8 in hand
        until(lambda: len(self.api.updates) == 20)
        bot.kill()
        for gate in gates:
            gate.set()
        again = self.bot()
        self.api.wait_until_confirmed()
        self.end(again)
        answered = collections.Counter(self.api.texts())
        self.assertEqual(len(answered), 40)
        self.assertLessEqual(sum(answered.values()), 48)

    # What is not Telegram's word.

    def test_every_refusal_of_a_poll_backs_off(self):
        for refusal in (400, "Logged out"), (403, "Forbidden"), (418, "I'm a teapot"):
            with self.subTest(refusal):
                self.api = self.bot_api()
                self.api.fail("getUpdates", *[("says",) + refusal] * 3)
                self.api.say("hello")
                bot = self.bot()
                self.api.wait_until_confirmed()
                self.assertEqual(self.api.texts(), ["Echo: hello"])
                times = [at for called, at in self.api.calls if called == "getupdates"]
                self.assertGreater(times[3] - times[0], 0.5 + 1 + 2)
                self.end(bot)
                self.assertIn(refusal[1], bot.log)

    def test_what_is_not_telegrams_is_an_outage(self):
        for method in "getUpdates", "sendMessage":
            with self.subTest(method):
                self.api = self.bot_api()
                pages = [("page", status) for status in (401, 403, 404, 408, 409, 413)]
                pages += [("json", value) for value in ([], 5, {}, {"result": []}, [["ok", 0]])]
                if method == "getUpdates":
                    pages += [("json", {"ok": True}), ("json", {"ok": True, "result": {}})]
                self.api.fail(method, *pages)
                self.api.say("hello")
                bot = self.bot(constants={"MAX_DELAY_SECONDS": 0.1})
                self.api.wait_until_confirmed()
                self.assertEqual(self.api.texts(), ["Echo: hello"])
                self.end(bot)
                self.assertEqual(bot.log.count("trying again"), len(pages))

    def test_a_lasting_error_for_one_message_blocks_nobody_for_ever(self):
        gone = ("says", 500, "Internal Server Error: sent message was immediately deleted")
        self.api.fail("sendMessage", *[gone] * 5)
        self.api.say("deleted", chat=1)
        self.api.say("another", chat=1)
        self.api.say("hello", chat=2)
        bot = self.bot(CONCURRENCY=1, constants={"MAX_DELAY_SECONDS": 0.1})
        self.api.wait_until_confirmed()
        self.assertEqual(self.api.texts(), ["Echo: another", "Echo: hello"])
        bot.wait_for("sendMessage was refused: 500.*immediately deleted")
        self.end(bot)

    def test_a_group_that_became_a_supergroup_gets_its_reply_there(self):
        self.api.fail("sendMessage", (
            "says", 400, "Bad Request: group chat was upgraded to a supergroup chat",
            {"migrate_to_chat_id": -1001234567890}))
        self.api.say("hello", chat=-7)
        bot = self.bot()
        self.api.wait_until_confirmed()
        (_, params), = self.api.replies
        self.assertEqual((params["chat_id"], params["text"]), ("-1001234567890", "Echo: hello"))
        self.end(bot)

    def test_an_address_that_answers_nothing_costs_a_few_seconds(self):
        with socket.socket(socket.AF_INET6) as hole:        # its queue is full: it drops every SYN
            hole.bind(("::1", self.api.server_port))
            hole.listen(0)
            fill = [socket.socket(socket.AF_INET6) for _ in range(4)]
            for one in fill:
                self.addCleanup(one.close)
                one.setblocking(False)
                one.connect_ex(("::1", self.api.server_port))
            self.api.say("hello")
            code = ("import socket; both = [(family, socket.SOCK_STREAM, 6, '', (host, %d)) for "
                    "family, host in ((socket.AF_INET6, '::1'), (socket.AF_INET, '127.0.0.1'))]; "
                    "socket.getaddrinfo = lambda *args, **options: both; "
                    % self.api.server_port)
            started = time.monotonic()
            bot = self.bot(code=code, TELEGRAM_API_URL="http://both.invalid",
                           constants={"CONNECT_SECONDS": 2})
            self.api.wait_until_confirmed()
            # One time-out for the poll's connection and one for the reply's.
            self.assertGreater(time.monotonic() - started, 2)
            self.end(bot)
            self.assertNotIn("trying again", bot.log)

    @needs("openssl", shutil.which("openssl"))
    def test_by_way_of_a_proxy(self):
        with tempfile.TemporaryDirectory() as folder:
            certificate, key = os.path.join(folder, "cert.pem"), os.path.join(folder, "key.pem")
            run("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
                "/CN=bot.test", "-addext", "subjectAltName=DNS:bot.test", "-keyout", key, "-out",
                certificate)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, key)
            self.api.socket = context.wrap_socket(self.api.socket, server_side=True)
            heads, proxy = [], socket.socket()
            proxy.bind(("127.0.0.1", 0))
            proxy.listen(5)
            self.addCleanup(proxy.close)
            threading.Thread(target=self.tunnel, args=(proxy, heads), daemon=True).start()
            self.api.say("hello")
            bot = self.bot(
                TELEGRAM_API_URL="https://bot.test", SSL_CERT_FILE=certificate, NO_PROXY=None,
                HTTPS_PROXY="http://user:pass%%20word@127.0.0.1:%d" % proxy.getsockname()[1])
            self.api.wait_until_confirmed()
            self.end(bot)
        self.assertEqual(self.api.texts(), ["Echo: hello"])
        self.assertRegex(heads[0], "^CONNECT bot.test:443 ")
        self.assertIn("Basic " + base64.b64encode(b"user:pass word").decode(), heads[0])
        self.assertNotIn("word@", bot.log)

    def tunnel(self, proxy, heads):
        """Serve CONNECT, whatever its target: to the Bot API."""
        def pump(source, sink):
            try:
                for data in iter(lambda: source.recv(65536), b""):
                    sink.sendall(data)
                sink.shutdown(socket.SHUT_WR)
            except OSError:
                pass

        while True:
            try:
                client = proxy.accept()[0]
            except OSError:
                return
            head = b""
            while b"\r\n\r\n" not in head:
                head += client.recv(65536)
            heads.append(head.decode())
            server = socket.create_connection(("127.0.0.1", self.api.server_port))
            for one in client, server:
                self.addCleanup(one.close)
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            for pair in (client, server), (server, client):
                threading.Thread(target=pump, args=pair, daemon=True).start()

    def test_a_login_in_a_url_is_used_and_not_told(self):
        self.api.say("hello")
        bot = self.bot(TELEGRAM_API_URL=self.api.url.replace("//", "//me:SECRET@"))
        self.api.wait_until_confirmed()
        self.assertEqual(self.api.logins, {"Basic " + base64.b64encode(b"me:SECRET").decode()})
        self.end(bot)
        self.assertNotIn("SECRET", bot.log)

    def test_a_malformed_variable_names_itself_in_one_line(self):
        for name, value in (
                ("TELEGRAM_API_URL", "ftp://me:SECRET@host"), ("TELEGRAM_API_URL", "http://"),
                ("TELEGRAM_API_URL", "http://[::1"), ("TELEGRAM_API_URL", "https://host:port"),
                ("TELEGRAM_API_URL", "https://me:SECRET@host:70000"),
                ("TELEGRAM_API_URL", "http://a host"), ("TELEGRAM_API_URL", "http://host?a=b"),
                ("SIDECAR_URL", "http://me:SECRET@[::1"), ("SIDECAR_URL", "http://host:port"),
                ("SIDECAR_URL", "https://host"), ("CONCURRENCY", "0"), ("CONCURRENCY", "101"),
                ("CONCURRENCY", "eight"), ("CONCURRENCY", "-1"), ("CONCURRENCY", "1e1"),
                ("HTTPS_PROXY", "socks5://me:SECRET@host")):
            with self.subTest(name, value=value):
                bot = self.bot(**dict(dict(TELEGRAM_API_URL="https://bot.test", NO_PROXY=None),
                                      **{name: value}))
                self.assertEqual(bot.wait(), 2, bot.log)
                self.assertEqual(len(bot.lines), 1)
                self.assertIn(name + "=", bot.log)
                self.assertIn("expected", bot.log)
                self.assertNotIn("SECRET", bot.log)
                self.check_log(bot)

    # With a sidecar.

    def test_an_update_is_counted_while_it_is_answered(self):
        sidecar = self.sidecar()
        gate = self.api.hold("replying")
        confirm = self.api.hold("polling", lambda offset: offset > 1)
        bot = self.bot(code=self.PATIENT, SIDECAR_URL=sidecar.url)
        self.api.say("hello")
        self.api.wait_for("replying")
        self.assertEqual(sidecar.get("/metrics")[1]["active_requests"], 1)
        gate.set()
        # It is over while the next poll, which confirms it, is still under way.
        self.api.wait_for("polling", lambda offset: offset > 1)
        until(lambda: sidecar.active() == 0)
        confirm.set()
        self.end(bot)
        self.assertRegex(sidecar.prometheus(), r"(?m)^sidecar_requests_total 1$")
        self.assertRegex(sidecar.prometheus(), r"(?m)^sidecar_unmatched_ends_total 0$")

    def test_a_bot_that_was_killed_leaves_no_count_once_it_is_back(self):
        sidecar = self.sidecar()
        gate = self.api.hold("replying")
        bot = self.bot(code=self.PATIENT, SIDECAR_URL=sidecar.url)
        self.api.say("hello")
        self.api.wait_for("replying")
        bot.kill()
        gate.set()
        self.assertEqual(sidecar.active(), 1)
        again = self.bot(code=self.PATIENT, SIDECAR_URL=sidecar.url)
        self.api.wait_until_confirmed()
        until(lambda: sidecar.active() == 0)
        self.end(again)

    def drained(self):
        """Return a sidecar that is drained, and a bot that knows it and has an update waiting."""
        sidecar = self.sidecar(LOG_LEVEL="DEBUG", GRACE_PERIOD_SECONDS=10 * PATIENCE)
        gate = self.api.hold("replying")
        self.api.say("before")
        self.api.say("after")
        bot = self.bot(code=self.PATIENT, SIDECAR_URL=sidecar.url, CONCURRENCY=1)
        self.api.wait_for("replying")
        drain = threading.Thread(target=sidecar.get, args=("/drain",))
        drain.start()
        sidecar.wait_for("drain started")
        gate.set()
        drain.join(PATIENCE)
        line = len(sidecar.lines)
        for _ in range(2):      # it asks whether it may go on, again and again, and takes nothing
            sidecar.wait_for("path=/ready", after=line)
            line = len(sidecar.lines)
        self.assertEqual(self.api.texts(), ["Echo: before"])
        return sidecar, bot

    def test_it_takes_nothing_while_the_sidecar_drains_and_goes_on_when_it_serves(self):
        sidecar, bot = self.drained()
        sidecar.post("/reset")              # brings the sidecar back to serving
        self.api.wait_until_confirmed()
        self.assertEqual(self.api.texts(), ["Echo: before", "Echo: after"])
        self.end(bot)

    def test_sigterm_ends_the_wait_for_a_drained_sidecar(self):
        _, bot = self.drained()
        self.end(bot)
        self.assertEqual(self.api.texts(), ["Echo: before"])
        again = self.bot()
        self.api.wait_until_confirmed()
        self.assertEqual(self.api.texts(), ["Echo: before", "Echo: after"])
        self.end(again)

    def test_an_end_that_was_not_delivered_is_delivered_later(self):
        sidecar = ScriptedSidecar()
        self.addCleanup(sidecar.close)
        gate = self.api.hold("replying")
        bot = self.bot(code=self.PATIENT, SIDECAR_URL=sidecar.url)
        self.api.say("hello")
        self.api.wait_for("replying")
        sidecar.away = True
        gate.set()
        self.api.wait_until_confirmed()
        self.assertEqual([path for path in sidecar.posts if "/end-request" in path], [])
        sidecar.away = False
        started, = re.findall("/start-request.*id=([^&,']+)", str(sidecar.posts))
        sidecar.wait_until(
            lambda: any(re.search("/end-request.*id=" + started, path) for path in sidecar.posts))
        self.end(bot)

    def test_a_sidecar_that_hangs_is_left_alone_for_a_while(self):
        with socket.socket() as deaf:       # the kernel accepts connections, nobody ever answers
            deaf.bind(("127.0.0.1", 0))
            deaf.listen(100)
            for number in range(20):
                self.api.say("%d" % number)
            bot = self.bot(SIDECAR_URL="http://127.0.0.1:%d" % deaf.getsockname()[1])
            self.api.wait_until_confirmed()
            self.assertEqual(self.api.texts(), ["Echo: %d" % number for number in range(20)])
            self.end(bot)
            deaf.setblocking(False)
            tried = 0
            while True:
                try:
                    deaf.accept()[0].close()
                except BlockingIOError:
                    break
                tried += 1
            self.assertLess(tried, 20)

    def test_it_says_whether_a_sidecar_is_there_and_only_when_that_changes(self):
        sidecar = ScriptedSidecar()
        self.addCleanup(sidecar.close)
        sidecar.away = True
        # One call after another, and no time-outs.
        bot = self.bot(code=self.PATIENT, SIDECAR_URL=sidecar.url, CONCURRENCY=1)

        def said():         # after one more update
            self.api.say("hello")
            self.api.wait_until_confirmed()
            return re.findall("working without the sidecar|reporting to the sidecar", bot.log)

        for number, away in enumerate((True, False, True), 1):
            sidecar.away = away
            until(lambda: len(said()) >= number)   # it leaves one that was absent alone for a while
            for _ in range(5):
                said()
        lines = said()
        gone, there = "working without the sidecar", "reporting to the sidecar"
        # A call of another thread that was answered just before may tell of it just after.
        self.assertIn(lines, ([gone, there, gone], [gone, there, gone, there, gone]))
        self.end(bot)


if __name__ == "__main__":
    unittest.main(verbosity=2)
