#!/usr/bin/env python3
"""What README's recipes cost and what they save, as a table in Markdown: about six minutes.

    python .ci/framework_costs.py               every framework
    python .ci/framework_costs.py aiogram rq    some

It runs the workers of tests/test_frameworks.py, each with its recipe and as it would be without
one, on what .ci/run has installed.

time        of a message without work, one at a time, under `run`: the median over rounds, in which
            the worker without the recipe and the one with it have their turn
cut, lost   when SIGTERM comes through `run` under load, with a second of work for each message:
            begun and not done as the worker ended;
            never done, since it was acknowledged, or sent by a user who got no answer
end         from SIGTERM until the worker has ended
"""
import http.client
import os
import signal
import statistics
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "tests"))

import test_frameworks
from support import PATIENCE, until
from test_frameworks import recipe

ROUNDS = 3
WORK_SECONDS = 1.0              # of a message, where SIGTERM comes
PLAIN_COUNTED = "class Counted(%s):\n    pass\n"
# What stands in a recipe's place where nobody counts.
PLAIN = {
    "aiogram 3": "",
    "python-telegram-bot": "Counted = Application\n",
    "grammY": "await bot.start();\n",
    "telebot": "\n\nbot.Start()\n",
    "Celery": "",
    "RQ": PLAIN_COUNTED % "rq.Worker",
    "Dramatiq": PLAIN_COUNTED % "dramatiq.Middleware",
    "confluent-kafka": """
while True:
    message = consumer.poll(1.0)
    if message is not None and not message.error():
        handle(message)
        consumer.commit(message, asynchronous=False)
""",
    "aiokafka": """
async for message in consumer:
    await handle(message)
    await consumer.commit()
""",
    "kafkajs": "await consumer.run({ eachMessage: async ({ message }) => handle(message) });\n",
    "FastAPI": "",
    "Flask": "",
}


class Measured:
    """How one kind of framework is fed, and what of its messages is lost."""
    WARM_UP, TIMED = 100, 400       # messages

    def begin(self, command, seconds):
        """Return the sidecar of a worker that has enough to do, `seconds` for each message."""
        return self.under_run(*command, WORK_SECONDS=seconds)

    def seconds_per_message(self, command):
        sidecar = self.begin(command, 0)
        until(lambda: len(self.did(sidecar)) >= self.WARM_UP)
        first, began = len(self.did(sidecar)), time.monotonic()
        until(lambda: len(self.did(sidecar)) >= first + self.TIMED)
        return (time.monotonic() - began) / (len(self.did(sidecar)) - first)

    def end(self, command):
        """SIGTERM under load; return how many were cut, how many lost, and the seconds it took."""
        sidecar = self.begin(command, WORK_SECONDS)
        until(lambda: len(self.did(sidecar)) >= 10 and self.under_way(sidecar))
        sidecar.signal(signal.SIGTERM)
        began = time.monotonic()
        self.meanwhile()
        sidecar.wait()
        seconds = time.monotonic() - began
        cut = set(self.numbers(sidecar, "took")) - self.did(sidecar)
        return len(cut), self.lost(sidecar, command), seconds

    def meanwhile(self):
        pass

    def lost(self, sidecar, command):
        """Return how many nobody will do: where nothing can be handed out again, those cut."""
        return len(set(self.numbers(sidecar, "took")) - self.did(sidecar))


class Bots(Measured, test_frameworks.TestBots):
    def begin(self, command, seconds):
        self.api, self.stopped = test_frameworks.Bots(), threading.Event()
        self.addCleanup(self.api.close)
        self.addCleanup(self.stopped.set)
        for _ in range(5 if seconds else self.WARM_UP + 2 * self.TIMED):
            self.api.say_next()
        self.feeding = threading.Thread(target=self.api.feed, args=(self.stopped,), daemon=True)
        self.feeding.start()
        return self.under_run(*command, API=self.api.url, TOKEN=self.api.TOKEN,
                              WORK_SECONDS=seconds)

    def lost(self, sidecar, command):
        self.stopped.set()
        self.feeding.join(PATIENCE)
        return len(set(range(self.api.said)) - self.did(sidecar) - self.api.left())


class Queues(Measured, test_frameworks.TestQueues):
    COUNT = 600

    def begin(self, command, seconds):
        return self.under_run(*command, WORK_SECONDS=seconds, PYTHONPATH=self.folder)

    def lost(self, sidecar, command):
        done = self.did(sidecar)
        following = self.program(*command, cwd=self.folder,
                                 env={"PYTHONPATH": self.folder, "WORK_SECONDS": 0})
        before = -1                     # until it does no more
        while len(self.did(following)) > before and len(done | self.did(following)) < self.COUNT:
            before = len(self.did(following))
            time.sleep(3)
        following.signal(signal.SIGTERM)
        following.wait()
        return self.COUNT - len(done | self.did(following))


class ForkingQueues(Queues):
    COUNT, WARM_UP, TIMED = 80, 10, 30      # a process for each


class Consumers(Measured, test_frameworks.TestConsumers):
    def begin(self, command, seconds):
        return self.under_run(*command, WORK_SECONDS=seconds, **self.fill())

    def lost(self, sidecar, command):
        return len(set(range(self.COUNT - self.lag(1))) - self.did(sidecar))


class Servers(Measured, test_frameworks.TestServers):
    def seconds_per_message(self, command):
        port = self.serve(*command, WORK_SECONDS=0)[1]
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        self.addCleanup(connection.close)
        for number in range(self.WARM_UP + self.TIMED):
            if number == self.WARM_UP:
                began = time.monotonic()
            connection.request("GET", "/%d" % number)
            connection.getresponse().read()
        return (time.monotonic() - began) / self.TIMED

    def begin(self, command, seconds):
        sidecar, port = self.serve(*command, WORK_SECONDS=seconds)
        self.users = test_frameworks.Users(port)
        self.addCleanup(self.users.stop)
        return sidecar

    def meanwhile(self):
        time.sleep(1)                   # until the pod is out of its service's endpoints
        self.users.stop()

    def lost(self, sidecar, command):
        return len(self.users.lost)


class ClientsOfToday(Measured, test_frameworks.TestClientsOfToday):
    pass


FRAMEWORKS = [                  # (its title in README, whose, the method that makes its worker)
    ("aiogram 3", Bots, "aiogram"),
    ("python-telegram-bot", Bots, "python_telegram_bot"),
    ("grammY", Bots, "grammy"),
    ("telebot", Bots, "telebot"),
    ("Celery", Queues, "celery"),
    ("RQ", ForkingQueues, "rq"),
    ("Dramatiq", Queues, "dramatiq"),
    ("confluent-kafka", Consumers, "confluent_kafka"),
    ("aiokafka", Consumers, "aiokafka"),
    ("kafkajs", Consumers, "kafkajs"),
    ("FastAPI", Servers, "fastapi"),
    ("Flask", Servers, "flask"),
]
CLIENTS_OF_TODAY = [("requests", "requests"), ("axios", "axios"), ("http.Post", "http_post")]


def measure(kind, method, what, concurrency, *code):
    """Return what one run of a worker gives: seconds_per_message or end."""
    case = kind(next(name for name in dir(kind) if name.startswith("test_")))
    case.CONCURRENCY = concurrency
    try:
        case.setUp()
        return getattr(case, what)(getattr(case, method)(*code))
    finally:
        case.doCleanups()


def row(title, kind, method):
    codes = PLAIN[title], recipe(title)
    seconds = [[measure(kind, method, "seconds_per_message", 1, code) for code in codes]
               for _ in range(ROUNDS)]
    plain, counted = map(statistics.median, zip(*seconds))
    ends = [measure(kind, method, "end", 4, code) for code in codes]
    lines = len([line for line in codes[1].splitlines() if line.strip()])
    return (title, lines, "%.2f ms" % (1000 * plain), "%.2f ms" % (1000 * counted),
            "%+.2f ms" % (1000 * (counted - plain)), *["%d, %d" % end[:2] for end in ends],
            "%.1f s, %.1f s" % (ends[0][2], ends[1][2]))


def main(names):
    print("| | lines | a message without | with | added | cut, lost without | with | end |")
    print("|---|---|---|---|---|---|---|---|")
    try:
        for title, kind, method in FRAMEWORKS:
            if not names or method in names:
                if kind is Consumers and not kind.nodes:
                    kind.setUpClass()
                print("| %s |" % " | ".join(map(str, row(title, kind, method))), flush=True)
        for title, method in CLIENTS_OF_TODAY:
            if not names or method in names:
                cut, lost, seconds = measure(ClientsOfToday, method, "end", 4)
                print("| %s | | | | | | %d, %d | %.1f s |" % (title, cut, lost, seconds),
                      flush=True)
    finally:
        Consumers.tearDownClass()


if __name__ == "__main__":
    main(sys.argv[1:])
