"""README's recipes, each with the framework's own worker and the real library.

Under load a worker's sidecar hangs for 5 s, and then SIGTERM comes through `run`. Nothing may be
lost, frozen or left counted. The frameworks are in a virtual environment of their own, since their
versions of common packages differ: .ci/cache/frameworks.
"""
import http.client
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest

from support import (CACHE, HERE, PATIENCE, Case, child_of, needs, readme_blocks, text_of, until,
                     version_of)
from test_client import COUNTED, SILENCE, ScriptedServer, answer
from test_clients import patient
from test_kafka import KafkaCase, KafkaNode, needs_kafka
from test_telegram import BotAPI, BotAPIHandler

import sidecar as sidecar_module      # `sidecar` is what the tests call a running one

FRAMEWORKS = os.path.join(CACHE, "frameworks")
PYTHON = os.path.join(FRAMEWORKS, "bin", "python")
WORKERS = os.path.join(HERE, ".ci", "tests", "workers")
RUST_WORKER = os.path.join(CACHE, "rust", "debug", "worker")
HUNG_SECONDS = 5.0
WORK_SECONDS = 0.2      # of a message
# The quiet period is that of the manifests.
SETTINGS = {"GRACE_PERIOD_SECONDS": 60, "QUIET_PERIOD_SECONDS": 0.5}
UNAVAILABLE = answer({"error": "too many connections"}, "503 Service Unavailable")

# What every worker in Python begins with: its work, and what a recipe takes for granted.
PRELUDE = """
import asyncio, os, signal, sys, threading, time
sys.path.insert(0, %r)
from sidecar import Sidecar

Sidecar.CALL_SECONDS = 2.0      # a machine that is busy is no sidecar that hangs

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

SECONDS = float(os.environ.get("WORK_SECONDS", "%s"))

def work(number):
    say("took", number)
    time.sleep(SECONDS)
    say("did", number)

async def work_in_loop(number):
    say("took", number)
    await asyncio.sleep(SECONDS)
    say("did", number)
""" % (HERE, WORK_SECONDS)


def needs_frameworks(thing):
    return needs("the frameworks' environment", os.path.exists(PYTHON))(thing)


def needs_node(thing):
    node = os.path.exists(os.path.join(FRAMEWORKS, "node_modules", "grammy"))
    return needs("grammY, kafkajs", node and version_of(["node", "--version"]) >= (18, 0))(thing)


def module_folder(name):
    """Return where Go keeps a module that was downloaded."""
    try:
        cache = subprocess.run(["go", "env", "GOMODCACHE"], stdout=subprocess.PIPE).stdout
    except OSError:
        return ""
    return os.path.join(cache.decode().strip(), name)


TELEBOT = module_folder("gopkg.in/telebot.v3@v3.3.8")
TELEBOT_WORKER = """package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"os/signal"
	"strconv"
	"sync"
	"syscall"
	"time"

	tele "gopkg.in/telebot.v3"
)

var _, _ = context.Background, signal.Notify // not of every recipe
var _ = syscall.SIGTERM
var _ sync.WaitGroup

func main() {
	seconds, _ := strconv.ParseFloat(os.Getenv("WORK_SECONDS"), 64)
	bot, err := tele.NewBot(tele.Settings{URL: os.Getenv("API"), Token: os.Getenv("TOKEN"),
		Synchronous: %s, Poller: &tele.LongPoller{Timeout: time.Second}})
	if err != nil {
		log.Fatal(err)
	}
%s
	bot.Handle(tele.OnText, func(c tele.Context) error {
		fmt.Println("took", c.Text()[1:])
		time.Sleep(time.Duration(seconds * float64(time.Second)))
		fmt.Println("did", c.Text()[1:])
		return nil
	})
%s}
"""


def needs_redis(thing):
    return needs("redis-server", shutil.which("redis-server"))(needs_frameworks(thing))


def recipe(title):
    """Return the code of README's recipe whose paragraph begins with the title."""
    found = re.search(r"^\*\*%s\*\*.*?^```\w+\n(.*?)^```$" % re.escape(title),
                      text_of("README.md"), re.DOTALL | re.MULTILINE)
    if not found:
        raise AssertionError("README has no recipe %r" % title)
    return found.group(1)


class Frameworks:
    """A worker that a test runs under `run`; it prints "took N" and "did N" of each message.

    A method that is named like a framework returns the command of its worker, with a recipe's code.
    """
    CONCURRENCY = 4         # of a worker that lets one choose

    def setUp(self):
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def save(self, name, text):
        path = os.path.join(self.folder, name)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        return path

    def node_worker(self, text):
        """Return the command of a worker beside README's client for Node.js."""
        os.symlink(os.path.join(FRAMEWORKS, "node_modules"),
                   os.path.join(self.folder, "node_modules"))
        self.save("sidecar.mjs", patient(readme_blocks("js")[0]))
        return "node", self.save("worker.mjs", """
const seconds = Number(process.env.WORK_SECONDS ?? %s);

async function work(number) {
  console.log("took", number);
  if (seconds) await new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
  console.log("did", number);
}
""" % WORK_SECONDS + text)

    def go_worker(self):
        """Build the folder's Go files; return the program's path."""
        done = subprocess.run(["go", "build", "-o", "worker", "."], cwd=self.folder,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              env=dict(os.environ, GOFLAGS="-mod=mod", GOTOOLCHAIN="local",
                                       GOWORK="off"))
        self.assertEqual(done.returncode, 0, done.stdout.decode())
        return os.path.join(self.folder, "worker")

    def node_client(self, url, messages, seconds=0, blocked=0):
        """Start a worker with README's client for Node.js that ends after so many messages."""
        command = self.node_worker("""
import { track } from "./sidecar.mjs";

for (let number = 0; number < %d; number++) {
  await track(async () => {
    console.log("took", number);
    await new Promise((resolve) => setTimeout(resolve, %d));
    for (const over = Date.now() + %d; Date.now() < over; ); // blocks the loop
    console.log("did", number);
  });
}
""" % (messages, 1000 * seconds, 1000 * blocked))
        return self.program(*command, env={"SIDECAR_URL": url})

    def go_client(self, url, messages, seconds=0):
        """The same in Go."""
        self.save("go.mod", "module worker\n\ngo 1.19\n")
        self.save("sidecar.go", patient(readme_blocks("go")[0]))
        self.save("main.go", """package main

func main() {
	for number := 0; number < %d; number++ {
		track(func() error {
			fmt.Println("took", number)
			time.Sleep(%d * time.Millisecond)
			fmt.Println("did", number)
			return nil
		})
	}
}
""".replace("main\n", "main\n\nimport (\n\t\"fmt\"\n\t\"time\"\n)\n", 1)
                  % (messages, 1000 * seconds))
        return self.program(self.go_worker(), env={"SIDECAR_URL": url})

    def under_run(self, *command, **env):
        sidecar = self.sidecar("run", "--", "env", "--chdir=" + self.folder, *command,
                               **dict(SETTINGS, **env))
        self.addCleanup(self.end_group, child_of(sidecar.process.pid))
        return sidecar

    @staticmethod
    def end_group(leader):
        """End what a test that failed left of a worker: `run` gives it a group of its own."""
        try:
            os.killpg(leader, signal.SIGKILL)
        except ProcessLookupError:
            pass

    @staticmethod
    def numbers(program, word):
        return [int(number) for number in
                re.findall(r"^%s (\d+)$" % word, "\n".join(list(program.lines)), re.MULTILINE)]

    def did(self, program):
        return set(self.numbers(program, "did"))

    def hang(self, sidecar, at_least):
        """Let the sidecar hang under load: the worker works on, and is counted right after."""
        sidecar.wait_for("^did ")
        goal = len(self.did(sidecar)) + at_least
        sidecar.signal(signal.SIGSTOP)
        over_at = time.monotonic() + HUNG_SECONDS
        until(lambda: time.monotonic() > over_at and len(self.did(sidecar)) >= goal,
              "work beside a sidecar that hangs")
        sidecar.signal(signal.SIGCONT)

        def counted():
            return sidecar.get("/metrics")[1]["total_requests"]
        # The client leaves the sidecar alone for some seconds yet; what it tells late are a few.
        goal = counted() + self.under_way(sidecar) + 5
        until(lambda: counted() >= goal, "a worker that counts again")
        self.wait_until_counted(sidecar)

    def under_way(self, program):
        return len(self.numbers(program, "took")) - len(self.numbers(program, "did"))

    def wait_until_counted(self, sidecar):
        until(lambda: sidecar.active() == self.under_way(sidecar) > 0,
              "a count of what is under way")

    # `run` passes SIGTERM on when the count is zero. A worker that stops by itself ends with 0,
    # unless it is so far by then that it has put its handlers away.
    STOPPED_BY_ITSELF = 0, 128 + signal.SIGTERM

    def drain(self, sidecar, ended_by=None):
        """SIGTERM: what was taken is done, and the worker ends; return what it did.

        ended_by: the signal that ends a worker which does not stop by itself.
        """
        sidecar.signal(signal.SIGTERM)
        if ended_by:
            self.assertEqual(sidecar.wait(), 128 + ended_by, sidecar.log)
            sidecar.wait_for("drain completed active_requests=0")
        else:
            self.assertIn(sidecar.wait(), self.STOPPED_BY_ITSELF, sidecar.log)
            self.assertNotRegex(sidecar.log, "drain timed out|request given up")
        self.assertEqual(sorted(set(self.numbers(sidecar, "took"))), sorted(self.did(sidecar)),
                         sidecar.log)
        self.assertNotIn("Traceback", sidecar.log)
        return self.did(sidecar)


class Bots(BotAPI):
    """A Bot API whose bots begin with calls that change nothing here, and which want each field."""

    def __init__(self):
        super().__init__()
        self.RequestHandlerClass = BotsHandler
        self.said = 0

    def feed(self, stopped):
        """Say something 5 times a second, three quarters of what a bot here can do."""
        while not stopped.wait(1 / 5):
            self.say_next()

    def say_next(self):
        self.push("message", {
            "message_id": 1000 + self.said, "date": 1700000000, "text": "m%d" % self.said,
            "chat": {"id": 7, "type": "private", "first_name": "A"},
            "from": {"id": 7, "is_bot": False, "first_name": "A"}})
        self.said += 1

    def left(self):
        """Return the numbers of the messages that Telegram would hand out again."""
        with self.changed:
            return {int(update["message"]["text"][1:]) for update in self.updates}


class BotsHandler(BotAPIHandler):
    def do_POST(self):
        connection, length = self.rfile, int(self.headers.get("Content-Length", 0))
        body = connection.read(length)
        self.rfile = io.BytesIO(b"{}  " if body == b"null\n" or body == b"null" else body)
        try:
            super().do_POST()
        finally:
            self.rfile = connection

    do_GET = do_POST

    def act(self, method, params):
        params = {name: value for name, value in params.items() if value != "null"}
        if method in ("deletewebhook", "setmycommands", "logout", "close"):
            return self.answer(200, {"ok": True, "result": True})
        return super().act(method, params)


class TestBots(Frameworks, Case):
    """Long polling: what is confirmed and not done is lost."""

    def check(self, *command, **env):
        api, stopped = Bots(), threading.Event()
        self.addCleanup(api.close)
        feeding = threading.Thread(target=api.feed, args=(stopped,))
        feeding.start()
        self.addCleanup(stopped.set)
        env = dict(dict(WORK_SECONDS=0.6), **env)   # longer than a session's end lasts
        sidecar = self.under_run(*command, API=api.url, TOKEN=api.TOKEN, **env)
        self.hang(sidecar, at_least=5)
        did = self.drain(sidecar)
        stopped.set()
        feeding.join(PATIENCE)
        self.assertEqual(set(range(api.said)) - did - api.left(), set())
        return sidecar

    def aiogram(self, recipe):
        return PYTHON, self.save("bot.py", PRELUDE + """
import weakref
from aiogram import Bot, Dispatcher
from aiogram.client.session.aiohttp import AiohttpSession
from aiogram.client.telegram import TelegramAPIServer

dp = Dispatcher()

@dp.message()
async def handle(message):
    await work_in_loop(message.text[1:])

""" + recipe + """
session = AiohttpSession(api=TelegramAPIServer.from_base(os.environ["API"]))
bot = Bot(os.environ["TOKEN"], session=session)
asyncio.run(dp.start_polling(bot, tasks_concurrency_limit=%d))
""" % self.CONCURRENCY)

    @needs_frameworks
    def test_aiogram(self):
        self.check(*self.aiogram(recipe("aiogram 3")))

    def python_telegram_bot(self, recipe):
        return PYTHON, self.save("bot.py", PRELUDE + """
from telegram.ext import Application, MessageHandler, filters

async def handle(update, context):
    await work_in_loop(update.message.text[1:])

""" + recipe + """
builder = Application.builder().token(os.environ["TOKEN"]).concurrent_updates(%d)
builder = builder.base_url(os.environ["API"] + "/bot")
application = builder.application_class(Counted).build()
application.add_handler(MessageHandler(filters.TEXT, handle))
application.run_polling()
""" % self.CONCURRENCY)

    @needs_frameworks
    def test_python_telegram_bot(self):
        """Its end lasts longer than the drain, as with a persistence that writes everything."""
        sidecar = self.check(*self.python_telegram_bot(recipe("python-telegram-bot") + """
class Counted(Counted):
    async def shutdown(self):
        await asyncio.sleep(3)
        await super().shutdown()
        say("shut down")
"""))
        self.assertIn("shut down", sidecar.log)

    def grammy(self, recipe):
        return self.node_worker("""
import { Bot } from "grammy";
import { draining, track } from "./sidecar.mjs";

const bot = new Bot(process.env.TOKEN, { client: { apiRoot: process.env.API } });
""" + recipe.replace("await bot.start", """
bot.on("message", (ctx) => work(ctx.message.text.slice(1)));
await bot.start"""))

    @needs_node
    def test_grammy(self):
        self.check(*self.grammy(recipe("grammY")), WORK_SECONDS=WORK_SECONDS)  # one at a time

    def telebot(self, recipe):
        self.save("go.mod", "module worker\n\ngo 1.19\n\nrequire gopkg.in/telebot.v3 v3.3.8\n")
        self.save("sidecar.go", patient(readme_blocks("go")[0]))
        use, blank, start = recipe.partition("\n\n")
        self.save("main.go", TELEBOT_WORKER % (
            str(self.CONCURRENCY == 1).lower(), use, start))
        return self.go_worker(),

    @needs("telebot", os.path.isdir(TELEBOT))
    def test_telebot(self):
        self.check(*self.telebot(recipe("telebot")))


class TestPlainLoop(Frameworks, Case):
    """README's first loop, without a handler for SIGTERM: its starts are held in a drain."""

    def check(self, threads):
        setup, for_, loop = readme_blocks("py")[0].partition("for message")
        sidecar = self.under_run(sys.executable, self.save("worker.py", PRELUDE + """
import itertools

class Consumer:
    numbers = itertools.count()

    def __iter__(self):
        return self.numbers

    def commit(self):
        pass

consumer, handle = Consumer(), work
""" + setup + """
loop = compile(%r, "README.md", "exec")
for _ in range(%d):
    threading.Thread(target=exec, args=(loop, globals(), {}), daemon=True).start()
threading.Event().wait()
""" % (for_ + loop, threads)))
        self.hang(sidecar, at_least=5)
        self.drain(sidecar, ended_by=signal.SIGTERM)

    def test_one_thread(self):
        self.check(1)

    def test_four_threads(self):
        self.check(4)


# The clients that users of the platform have today.
REQUESTS_WORKER = """
import itertools
import requests

SIDECAR_URL = os.environ["SIDECAR_URL"]
numbers = itertools.count()

def process():
    try:
        requests.post(f"{SIDECAR_URL}/start-request", timeout=1)
    except requests.RequestException:
        pass
    start = time.time()
    try:
        work(next(numbers))
    finally:
        try:
            requests.post(f"{SIDECAR_URL}/end-request?duration={time.time() - start}s", timeout=1)
        except requests.RequestException:
            pass

def loop():
    while True:
        process()

for _ in range(3):
    threading.Thread(target=loop, daemon=True).start()
loop()
"""
AXIOS_WORKER = """
import axios from "axios";

const sidecar = process.env.SIDECAR_URL;
let number = 0;

async function processMessage() {
  const start = Date.now();
  await axios.post(`${sidecar}/start-request`).catch(() => {});
  try {
    await work(number++);
  } finally {
    const duration = (Date.now() - start) / 1000;
    await axios.post(`${sidecar}/end-request?duration=${duration}s`).catch(() => {});
  }
}

async function loop() {
  for (;;) await processMessage();
}

await Promise.all([loop(), loop(), loop(), loop()]);
"""
HTTP_POST_WORKER = """package main

import (
	"fmt"
	"net/http"
	"os"
	"sync/atomic"
	"time"
)

var sidecar = os.Getenv("SIDECAR_URL")

func reportEnd(duration time.Duration) {
	http.Post(sidecar+"/end-request?duration="+duration.String(), "application/json", nil)
}

var number atomic.Int64

func process() {
	http.Post(sidecar+"/start-request", "application/json", nil)
	start := time.Now()
	defer func() { reportEnd(time.Since(start)) }()
	message := number.Add(1)
	fmt.Println("took", message)
	time.Sleep(%d * time.Millisecond)
	fmt.Println("did", message)
}

func loop() {
	for {
		process()
	}
}

func main() {
	for i := 0; i < 3; i++ {
		go loop()
	}
	loop()
}
"""


class TestClientsOfToday(Frameworks, Case):
    """Workers with a client of their own that know nothing else: no id, no look at `draining`, no
    handler for SIGTERM."""

    def check(self, *command, **env):
        sidecar = self.under_run(*command, **env)
        until(lambda: len(self.did(sidecar)) >= 20, "the first work")
        self.wait_until_counted(sidecar)
        sidecar.signal(signal.SIGTERM)
        sidecar.wait()
        sidecar.wait_for("drain completed active_requests=0")
        took, did = self.numbers(sidecar, "took"), self.numbers(sidecar, "did")
        self.assertEqual(sorted(took), sorted(did), sidecar.log)

    def requests(self):
        return PYTHON, self.save("worker.py", PRELUDE + REQUESTS_WORKER)

    @needs_frameworks
    def test_python_with_requests(self):
        self.check(*self.requests())

    def axios(self):
        return self.node_worker(AXIOS_WORKER)

    @needs_node
    def test_node_with_axios(self):
        self.check(*self.axios())

    def http_post(self):
        self.save("go.mod", "module worker\n\ngo 1.19\n")
        self.save("main.go", HTTP_POST_WORKER % (1000 * WORK_SECONDS))
        return self.go_worker(),

    @needs("Go 1.19", version_of(["go", "version"]) >= (1, 19))
    def test_go_with_http_post(self):
        self.check(*self.http_post())


class ReadmeClients:
    """README's clients beyond what test_clients.py has of them: where the sidecar is in trouble."""

    def test_a_slash_at_the_end_of_its_url(self):
        sidecar = self.sidecar()
        worker = self.worker(sidecar.url + "/", messages=2)
        self.assertEqual(worker.wait(), 0, worker.log)
        self.assertEqual(sidecar.sample("sidecar_requests_total"), 2)

    def test_one_that_hangs_is_left_alone(self):
        server = ScriptedServer(lambda path: SILENCE)
        self.addCleanup(server.close)
        worker = self.worker(server.url, messages=20)
        self.assertEqual(worker.wait(), 0, worker.log)
        self.assertEqual(len(self.did(worker)), 20)
        self.assertLess(len(server.heard("/start-request")), 10)

    def test_what_it_did_not_hear_it_is_told_later(self):
        sidecar = self.sidecar()
        worker = self.worker(sidecar.url, messages=1000000, seconds=0.1)
        worker.wait_for("^did 2$")
        sidecar.signal(signal.SIGSTOP)
        stopped_at = len(self.did(worker))
        until(lambda: len(self.did(worker)) > stopped_at + 10, "work without a sidecar")
        sidecar.signal(signal.SIGCONT)
        until(lambda: [request["age_seconds"] < 5 for request in sidecar.get("/requests")[1]] ==
              [True], "no count but that of the work in hand")
        worker.kill()

    def test_a_failure_of_the_server_is_no_answer(self):
        failures = [UNAVAILABLE]
        server = ScriptedServer(
            lambda path: failures.pop() if "end" in path and failures else COUNTED)
        self.addCleanup(server.close)
        worker = self.worker(server.url, messages=100, seconds=0.1)
        server.wait_for("/end-request", 2)
        first = server.heard("/end-request")[0]
        until(lambda: server.paths.count(first) == 2, "the end once more")
        worker.kill()


@needs_node
class TestNodeClient(ReadmeClients, Frameworks, Case):
    worker = Frameworks.node_client

    def test_a_connection_that_was_closed_while_the_loop_was_blocked(self):
        sidecar = self.sidecar(constants={"IDLE_SECONDS": 1.5})
        worker = self.worker(sidecar.url, messages=2, seconds=0.1, blocked=2.5)
        self.assertEqual(worker.wait(), 0, worker.log)
        self.assertEqual(sidecar.sample("sidecar_request_duration_seconds_count"), 2)
        self.assertEqual(sidecar.active(), 0)


@needs("Go 1.19", version_of(["go", "version"]) >= (1, 19))
class TestGoClient(ReadmeClients, Frameworks, Case):
    worker = Frameworks.go_client

    def test_a_connection_that_was_closed_while_it_was_idle(self):
        sidecar = self.sidecar(constants={"IDLE_SECONDS": 0.3})
        worker = self.worker(sidecar.url, messages=3, seconds=0.9)
        self.assertEqual(worker.wait(), 0, worker.log)
        self.assertEqual(sidecar.sample("sidecar_request_duration_seconds_count"), 3)
        self.assertEqual(sidecar.active(), 0)


# A thread and an event loop share a client.
PYTHON_CLIENTS = """
sidecar = Sidecar()

async def main():
    async with sidecar.track():
        await work_in_loop(0)

thread = threading.Thread(target=asyncio.run, args=(main(),))
thread.start()
with sidecar.track():
    work(1)
thread.join()
"""


class TestOtherLanguages(Frameworks, Case):
    """HTTP clients as they come: an upgrade to HTTP/2, Expect, and connections that were closed
    while they were idle."""
    IDLE_SECONDS = 0.5      # 60 where nobody waits for it

    def counts(self, *command):
        sidecar = self.sidecar(constants={"IDLE_SECONDS": self.IDLE_SECONDS})
        worker = self.program(*command, env={"SIDECAR_URL": sidecar.url,
                                             "PAUSE_SECONDS": 3 * self.IDLE_SECONDS})
        self.assertEqual(worker.wait(), 0, worker.log)
        self.assertEqual(self.numbers(worker, "did"), [0, 1, 2])
        self.assertEqual(sidecar.sample("sidecar_requests_total"), 3)
        self.assertEqual(sidecar.sample("sidecar_request_duration_seconds_count"), 3)
        self.assertGreaterEqual(sidecar.sample("sidecar_request_duration_seconds_sum"),
                                9 * self.IDLE_SECONDS)
        self.assertEqual(sidecar.active(), 0)
        self.assertEqual(sidecar.sample("sidecar_unmatched_ends_total"), 0)

    @needs("a JDK", shutil.which("javac"))
    def test_java(self):
        self.counts("java", os.path.join(WORKERS, "Worker.java"))

    @needs("ureq", os.path.exists(RUST_WORKER))
    def test_rust(self):
        self.counts(RUST_WORKER)

    @needs("a JDK, ureq, Node.js, Go, curl",
           shutil.which("javac") and os.path.exists(RUST_WORKER) and shutil.which("node") and
           shutil.which("go") and version_of(["curl", "--version"]) >= (7, 84))
    def test_a_message_of_over_a_minute(self):
        """The sidecar has closed each kept connection when the end is told. All clients at once."""
        sidecar, seconds = self.sidecar(), sidecar_module.IDLE_SECONDS + 1.5
        env = {"SIDECAR_URL": sidecar.url, "PAUSE_SECONDS": seconds, "MESSAGES": 1}
        started, ended = (sidecar.url + path for path in ("/start-request", "/end-request"))
        workers = [
            self.program("java", os.path.join(WORKERS, "Worker.java"), env=env),
            self.program(RUST_WORKER, env=env),
            self.node_client(sidecar.url, messages=1, seconds=seconds),
            self.go_client(sidecar.url, messages=1, seconds=seconds),
            self.program(sys.executable, "-c", PRELUDE + PYTHON_CLIENTS,
                         env=dict(env, WORK_SECONDS=seconds)),
            self.program("curl", "--fail", "--no-progress-meter", "--rate",
                         "%d/h" % (3600 / seconds), "-X", "POST", started, ended)]
        for worker in workers:
            self.assertEqual(worker.wait(seconds + PATIENCE), 0, worker.log)
        for name in ("requests_total", "request_duration_seconds_count"):
            self.assertEqual(sidecar.sample("sidecar_" + name), len(workers) + 1)   # two in Python
        self.assertEqual(sidecar.active(), 0)
        self.assertEqual(sidecar.sample("sidecar_unmatched_ends_total"), 0)

    @needs("curl", shutil.which("curl"))
    def test_curl_as_readme_has_it(self):
        sidecar = self.sidecar()
        code, = [block for block in readme_blocks("sh") if "--max-time" in block]
        self.assertEqual(code.count("-X POST"), 2)
        start, end = code.replace("http://127.0.0.1:8081", sidecar.url).splitlines()
        for command, active in ((start, 1), (end, 0)):
            for odd in ("", " --data-raw '' --header 'Expect: 100-continue'", " --http2"):
                done = subprocess.run(["sh", "-ec", command + " --fail --no-progress-meter" + odd],
                                      env=dict(os.environ, ID="7"), stdout=subprocess.PIPE)
                self.assertEqual(done.returncode, 0)
                self.assertIn('"active_requests": %d' % active, done.stdout.decode())
        self.assertEqual(sidecar.sample("sidecar_requests_total"), 1)
        self.assertEqual(sidecar.sample("sidecar_request_duration_seconds_sum"), 1.2)


@needs_redis
class TestQueues(Frameworks, Case):
    """Task queues on Redis: what is neither done nor done by the next worker is lost."""
    COUNT = 1000            # more than is done before the worker ends

    def setUp(self):
        super().setUp()
        socket = os.path.join(self.folder, "redis.sock")
        redis = self.program("redis-server", "--port", "0", "--unixsocket", socket, "--save", "",
                             "--dir", self.folder)
        redis.wait_for("[Rr]eady to accept connections")
        self.redis = socket

    def fill(self, script):
        """Put what is to be done into the queue: `count` tasks."""
        done = subprocess.run([PYTHON, "-c", "count = %d\n%s" % (self.COUNT, script)],
                              cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.assertEqual(done.returncode, 0, done.stdout.decode())

    def check(self, *command):
        env = {"PYTHONPATH": self.folder}
        sidecar = self.under_run(*command, **env)
        self.hang(sidecar, at_least=5)
        did = self.drain(sidecar)
        self.assertLess(len(did), self.COUNT)
        following = self.program(*command, cwd=self.folder, env=dict(env, WORK_SECONDS=0))
        until(lambda: did | self.did(following) == set(range(self.COUNT)), "the work that is left")
        following.signal(signal.SIGTERM)
        following.wait()

    def app(self, name, text):
        self.save(name + ".py", PRELUDE + text)

    def celery(self, recipe):
        self.app("tasks", """
from celery import Celery, signals

app = Celery("tasks", broker="redis+socket://%s")
app.conf.worker_hijack_root_logger = False

@app.task
def handle(number):
    work(number)

""" % self.redis + recipe)
        self.fill("import tasks\nfor n in range(count): tasks.handle.delay(n)")
        return (PYTHON, "-m", "celery", "-A", "tasks", "worker", "--concurrency",
                str(self.CONCURRENCY))

    def test_celery(self):
        self.check(*self.celery(recipe("Celery")))

    def rq(self, recipe):
        self.app("work_of_jobs", "")
        self.app("workers", "import rq\n" + recipe)
        self.fill("""
import redis, rq, work_of_jobs
queue = rq.Queue(connection=redis.Redis(unix_socket_path=%r))
for n in range(count): queue.enqueue(work_of_jobs.work, n)
""" % self.redis)
        return (os.path.join(FRAMEWORKS, "bin", "rq"), "worker", "--url", "unix://" + self.redis,
                "--worker-class", "workers.Counted")

    def test_rq(self):
        self.COUNT = 100        # it works on one at a time, and forks for each
        self.check(*self.rq(recipe("RQ")))

    def dramatiq(self, recipe):
        self.app("actors", """
import dramatiq
from dramatiq.brokers.redis import RedisBroker

broker = RedisBroker(url="unix://%s")

""" % self.redis + recipe + """
broker.add_middleware(Counted())
dramatiq.set_broker(broker)

@dramatiq.actor
def handle(number):
    work(number)
""")
        self.fill("import actors\nfor n in range(count): actors.handle.send(n)")
        processes = 2 if self.CONCURRENCY > 1 else 1
        return (PYTHON, "-m", "dramatiq", "actors", "--processes", str(processes),
                "--threads", str(self.CONCURRENCY // processes))

    def test_dramatiq(self):
        self.check(*self.dramatiq(recipe("Dramatiq")))


class Users:
    """Four users of a web server, each of whom asks again and again, until `stop`."""

    def __init__(self, port):
        self.port, self.answered, self.lost = port, [], []
        self.stopped = threading.Event()
        self.threads = [threading.Thread(target=self.ask) for _ in range(4)]
        for thread in self.threads:
            thread.start()

    def ask(self):
        while not self.stopped.is_set():
            name = str(random.randrange(10 ** 9))
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
            try:
                connection.request("GET", "/" + name)
                answer = connection.getresponse().read().decode()
                (self.answered if answer == name else self.lost).append(answer)
            except (OSError, http.client.HTTPException) as error:
                self.lost.append(repr(error))
                return                  # and asks no more
            finally:
                connection.close()

    def stop(self):
        self.stopped.set()
        for thread in self.threads:
            thread.join(PATIENCE)


@needs_frameworks
class TestServers(Frameworks, Case):
    """HTTP servers that are pushed to: a request that was sent and not answered is lost."""

    def serve(self, *command, **env):
        """Return the sidecar of a server that listens, and the server's port."""
        sidecar = self.under_run(*command, **env)
        listening = sidecar.wait_for(r"(?:running on|Listening at:) http://127\.0\.0\.1:(\d+)")
        return sidecar, int(listening.group(1))

    def check(self, *command, statuses):
        sidecar, port = self.serve(*command, QUIET_PERIOD_SECONDS=3)
        users = Users(port)
        self.addCleanup(users.stop)
        until(lambda: users.answered, "the first answer")
        self.hang(sidecar, at_least=5)
        sidecar.signal(signal.SIGTERM)
        sidecar.wait_for("drain started")
        before = len(users.answered)
        until(lambda: len(users.answered) >= before + 8, "answers in a drain")
        self.assertNotIn("drain completed", sidecar.log)
        users.stop()                                # the pod is out of its service's endpoints
        self.assertEqual(users.lost, [])
        self.assertIn(sidecar.wait(), statuses, sidecar.log)
        sidecar.wait_for("drain completed active_requests=0")

    def fastapi(self, recipe):
        self.save("web.py", PRELUDE + """
from fastapi import FastAPI, Response

app = FastAPI()

@app.get("/{number}")
async def handle(number: int):
    await work_in_loop(number)
    return Response(str(number))

""" + recipe)
        return PYTHON, "-m", "uvicorn", "web:app", "--port", "0", "--no-access-log"

    def test_fastapi(self):
        self.check(*self.fastapi(recipe("FastAPI")), statuses=(128 + signal.SIGTERM,))

    def flask(self, recipe):
        self.save("web.py", PRELUDE + """
from flask import Flask

app = Flask("web")

@app.get("/<int:number>")
def handle(number):
    work(number)
    return str(number)

""" + recipe)
        return (PYTHON, "-m", "gunicorn", "--bind", "127.0.0.1:0", "--workers", "2",
                "--threads", "2", "--preload", "web:app")

    def test_flask_under_gunicorn(self):
        self.check(*self.flask(recipe("Flask")), statuses=self.STOPPED_BY_ITSELF)


@needs_kafka
class TestConsumers(Frameworks, KafkaCase):
    """Kafka: what is committed and not done is lost."""
    COUNT = 1000            # more than is done before the worker ends

    @classmethod
    def setUpClass(cls):
        cls.use(KafkaNode())

    def fill(self):
        self.topics(incoming=1)
        self.write([dict(value=str(number)) for number in range(self.COUNT)])
        return dict(BROKERS=self.brokers, TOPIC=self.incoming, GROUP=self.group)

    def check(self, *command):
        sidecar = self.under_run(*command, **self.fill())
        self.hang(sidecar, at_least=5)
        did = self.drain(sidecar)
        committed = self.COUNT - self.lag(1)
        self.assertEqual(did, set(range(committed)))
        self.assertLess(committed, self.COUNT)

    def confluent_kafka(self, recipe):
        return PYTHON, self.save("consumer.py", PRELUDE + """
from confluent_kafka import Consumer

def handle(message):
    work(int(message.value()))

consumer = Consumer({"bootstrap.servers": os.environ["BROKERS"], "group.id": os.environ["GROUP"],
                     "enable.auto.commit": False, "auto.offset.reset": "earliest"})
consumer.subscribe([os.environ["TOPIC"]])

""" + recipe)

    @needs_frameworks
    def test_confluent_kafka(self):
        self.check(*self.confluent_kafka(recipe("confluent-kafka")))

    def kafkajs(self, recipe):
        return self.node_worker("""
import { Kafka, logLevel } from "kafkajs";
import { draining, track } from "./sidecar.mjs";

const handle = (message) => work(message.value.toString());
const kafka = new Kafka({ brokers: [process.env.BROKERS], logLevel: logLevel.ERROR });
const consumer = kafka.consumer({ groupId: process.env.GROUP });
await consumer.connect();
await consumer.subscribe({ topic: process.env.TOPIC, fromBeginning: true });
""" + recipe)

    @needs_node
    def test_kafkajs(self):
        self.check(*self.kafkajs(recipe("kafkajs")))

    def aiokafka(self, recipe):
        return PYTHON, self.save("consumer.py", PRELUDE + """
from aiokafka import AIOKafkaConsumer

async def handle(message):
    await work_in_loop(int(message.value))

async def main():
    consumer = AIOKafkaConsumer(
        os.environ["TOPIC"], bootstrap_servers=os.environ["BROKERS"],
        group_id=os.environ["GROUP"], enable_auto_commit=False, auto_offset_reset="earliest")
    await consumer.start()
""" + "".join("    " + line for line in recipe.splitlines(True)) + """
asyncio.run(main())
""")

    @needs_frameworks
    def test_aiokafka(self):
        self.check(*self.aiokafka(recipe("aiokafka")))


if __name__ == "__main__":
    unittest.main(verbosity=2)
