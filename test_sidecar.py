"""Every test of the project: `python test_sidecar.py`, or a part: `python test_sidecar.py TestDrain`.

Each test starts the real program as a process and speaks to it over real sockets and real signals; ports are free ones
that the kernel picks. A test that needs a peer (Go, Node, a broker, Prometheus, ...) is skipped where that is missing.
SIDECAR_TEST_PEERS=none skips them all, SIDECAR_TEST_PEERS=all fails instead of skipping.
"""
import base64
import collections
import fcntl
import hashlib
import http.client
import http.server
import importlib.util
import io
import itertools
import json
import logging
import os
import pty
import random
import re
import select
import shutil
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import unittest
import urllib.error
import urllib.parse
import urllib.request
import zlib

import sidecar as sidecar_module      # `sidecar` is what the tests call a running one

HERE = os.path.dirname(os.path.abspath(__file__))
CACHE = os.path.join(HERE, ".ci", "cache")     # what .ci/run installs for the tests; git ignores it
PEERS = os.environ.get("SIDECAR_TEST_PEERS", "")
PATIENCE = 60       # seconds after which a wait for an event has failed, whatever the machine; nothing waits it out


def needs(peer, found):
    """Decorate a test or class that needs a peer: skip it where `found` is false, fail where all are demanded."""
    if PEERS == "all" and not found:
        def missing(*args):
            raise AssertionError("%s is not installed, and SIDECAR_TEST_PEERS=all" % peer)
        return lambda thing: type(thing.__name__, (unittest.TestCase,), {"test_peer": missing}) \
            if isinstance(thing, type) else missing
    return unittest.skipUnless(found and PEERS != "none", "%s is not installed" % peer)


class Program:
    """A process under test: its standard error (and output, where not asked for apart) line by line, its end."""

    def __init__(self, *argv, **options):
        """argv: the command; env: variables to add (None takes one away); the rest goes to Popen."""
        env = dict(os.environ, PYTHONUNBUFFERED="1")
        for name, value in options.pop("env", {}).items():
            if value is None:
                env.pop(name, None)
            else:
                env[name] = str(value)
        options = dict(dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT), **options)
        self.process = subprocess.Popen([str(arg) for arg in argv], env=env, **options)
        self.lines, self.changed, self.closed = [], threading.Condition(), False
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        stream = self.process.stdout or self.process.stderr
        for line in stream or ():
            with self.changed:
                self.lines.append(line.decode("utf-8", "replace").rstrip("\r\n"))
                self.changed.notify_all()
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    @property
    def log(self):
        return "\n".join(self.lines)

    def wait_for(self, pattern, after=0, timeout=PATIENCE):
        """Return the match of `pattern` in the first line from number `after` on that has one, as soon as it is there."""
        def found():
            return next((match for match in (re.search(pattern, line) for line in self.lines[after:]) if match), None)
        with self.changed:
            self.changed.wait_for(lambda: found() or self.closed, timeout)
            match = found()
        if not match:
            raise AssertionError("no line matches %r in:\n%s" % (pattern, self.log))
        return match

    def signal(self, number):
        self.process.send_signal(number)

    def wait(self, timeout=PATIENCE):
        """Return the exit status, after every line of the log has been read."""
        status = self.process.wait(timeout)
        self.reader.join(timeout)
        return status

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.reader.join(PATIENCE)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream and not self.reader.is_alive():       # a grandchild may hold the other end of the pipe
                stream.close()


class SidecarProcess(Program):
    """A running sidecar.py on free ports of loopback. Any other keyword is a variable of its environment.

    `constants` are module constants with other values, so that a test need not wait for as long as a user would.
    `launcher` is what stands in front of the command, such as unshare and its options.
    """

    def __init__(self, *argv, constants=None, launcher=(), **env):
        settings = dict(SIDECAR_HOST="127.0.0.1", SIDECAR_PORT=0, METRICS_PORT=0, SIDECAR_URL=None)
        settings.update(env)
        command = [os.path.join(HERE, "sidecar.py")]
        if constants:
            command = ["-c", "import sys; sys.path.insert(0, %r); import sidecar; vars(sidecar).update(%r); "
                             "sys.exit(sidecar.main(sys.argv[1:]))" % (HERE, constants)]
        super().__init__(*launcher, sys.executable, *(command + list(argv)), env=settings)
        try:
            match = self.wait_for(r"listening.*?http://(\S+):(\d+).*?http://\S+:(\d+)")
        except AssertionError:
            self.kill()
            raise
        self.host, self.port, self.metrics_port = match.group(1), int(match.group(2)), int(match.group(3))
        self.url = "http://%s:%d" % (self.host, self.port)

    def call(self, method, path, body=None, headers=None, port=None):
        """Ask over a connection of its own; return (status, JSON or text)."""
        connection = http.client.HTTPConnection(self.host.strip("[]"), port or self.port, timeout=PATIENCE)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            text = answer.read().decode()
            return answer.status, json.loads(text) if text and "json" in answer.getheader("Content-Type", "") else text
        finally:
            connection.close()

    def raw(self, data, port=None):
        """Send bytes over a connection of its own; return the socket."""
        connection = socket.create_connection((self.host.strip("[]"), port or self.port), timeout=PATIENCE)
        connection.sendall(data)
        return connection

    def answers(self, data):
        """Send bytes, read to the end of the connection; return [(status, headers, body), ...] of the answers."""
        with self.raw(data) as connection:
            received = b"".join(iter(lambda: connection.recv(65536), b""))
        found = []
        while received:
            head, _, rest = received.partition(b"\r\n\r\n")
            lines = head.decode().split("\r\n")
            headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines[1:])}
            length = int(headers.get("content-length", 0))
            found.append((int(lines[0].split()[1]), headers, rest[:length].decode()))
            received = rest[length:]
        return found

    def active(self):
        return self.get("/metrics")[1]["active_requests"]

    def sample(self, name):
        """Return the value of one sample of the Prometheus port; `name` with its labels as they stand there."""
        return float(re.search("^%s (.*)$" % re.escape(name), self.prometheus(), re.MULTILINE).group(1))

    def get(self, path):
        return self.call("GET", path)

    def post(self, path):
        return self.call("POST", path)

    def prometheus(self, accept=""):
        """Return the text of the Prometheus port."""
        return self.call("GET", "/metrics", headers={"Accept": accept}, port=self.metrics_port)[1]


class Case(unittest.TestCase):
    """A test case whose processes end with the test."""

    def program(self, *argv, **options):
        return self._ends_with_test(Program(*argv, **options))

    def sidecar(self, *argv, **env):
        return self._ends_with_test(SidecarProcess(*argv, **env))

    def _ends_with_test(self, program):
        self.addCleanup(program.kill)
        return program



def in_threads(count, function):
    """Run function(0), function(1), ... at once; return what they return, in order. An exception is raised here."""
    results = [None] * count

    def run(number):
        try:
            results[number] = function(number)
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def until(condition, what="the condition"):
    """Return the first true value of condition(), asked again and again for PATIENCE seconds."""
    over_at = time.monotonic() + PATIENCE
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > over_at:
            raise AssertionError("%s never came true" % what)
        time.sleep(0.01)


def namespaces():
    """Return true where a test may make namespaces of its own: root on Linux, but not in every container."""
    try:
        return subprocess.call(["unshare", "--net", "--pid", "--fork", "ip", "link", "set", "lo", "up"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0
    except OSError:
        return False


NAMESPACES = namespaces()


class TestCounting(Case):
    """POST /start-request, POST /end-request, GET /metrics and GET /requests."""

    def test_a_request_is_counted_from_its_start_to_its_end(self):
        sidecar = self.sidecar()
        self.assertEqual(sidecar.active(), 0)
        status, started = sidecar.post("/start-request")
        self.assertEqual((status, started["active_requests"], started["draining"]), (200, 1, False))
        self.assertTrue(started["request_id"])
        self.assertEqual(sidecar.active(), 1)
        self.assertEqual(sidecar.post("/end-request?duration=1.2s"), (200, {"active_requests": 0, "draining": False}))
        self.assertEqual(sidecar.active(), 0)

    def test_metrics_have_the_promised_names_and_types(self):
        sidecar = self.sidecar()
        moment = r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$"
        before = sidecar.get("/metrics")[1]
        self.assertEqual(list(before)[:6], ["active_requests", "total_requests", "last_request_time", "start_time",
                                            "is_processing", "idle_duration_seconds"])
        self.assertIs(type(before["active_requests"]), int)
        self.assertIs(type(before["total_requests"]), int)
        self.assertIsNone(before["last_request_time"])
        self.assertRegex(before["start_time"], moment)
        self.assertIs(before["is_processing"], False)
        self.assertGreater(until(lambda: sidecar.get("/metrics")[1]["idle_duration_seconds"]), 0)
        sidecar.post("/start-request")
        during = sidecar.get("/metrics")[1]
        self.assertEqual((during["active_requests"], during["total_requests"]), (1, 1))
        self.assertRegex(during["last_request_time"], moment)
        self.assertIs(during["is_processing"], True)
        self.assertEqual(during["idle_duration_seconds"], 0)
        sidecar.post("/end-request")
        after = sidecar.get("/metrics")[1]
        self.assertEqual((after["active_requests"], after["total_requests"], after["is_processing"]), (0, 1, False))
        self.assertEqual(after["start_time"], before["start_time"])

    def test_a_retried_start_or_end_with_an_id_does_no_harm(self):
        sidecar = self.sidecar()
        for _ in range(3):
            status, answer = sidecar.post("/start-request?id=update-7")
            self.assertEqual((status, answer["request_id"], answer["active_requests"]), (200, "update-7", 1))
        sidecar.post("/start-request?id=update-8")
        for _ in range(3):
            self.assertEqual(sidecar.post("/end-request?id=update-7"), (200, {"active_requests": 1, "draining": False}))
        self.assertEqual(sidecar.get("/metrics")[1]["total_requests"], 2)
        self.assertEqual(sidecar.sample("sidecar_unmatched_ends_total"), 0)
        self.assertEqual(sidecar.sample("sidecar_request_duration_seconds_count"), 1)

    def test_an_id_may_be_used_again_for_a_later_request(self):
        sidecar = self.sidecar()
        for _ in range(2):
            self.assertEqual(sidecar.post("/start-request?id=a")[1]["active_requests"], 1)
            self.assertEqual(sidecar.post("/end-request?id=a")[1]["active_requests"], 0)
        self.assertEqual(sidecar.sample("sidecar_requests_total"), 2)
        self.assertEqual(sidecar.sample("sidecar_request_duration_seconds_count"), 2)

    def test_an_end_without_an_id_ends_the_oldest_that_was_started_without_one(self):
        sidecar = self.sidecar()
        own = [sidecar.post("/start-request" + query)[1]["request_id"] for query in ("?id=mine", "", "", "")]
        self.assertEqual(sidecar.post("/end-request")[0], 200)
        self.assertEqual([entry["request_id"] for entry in sidecar.get("/requests")[1]], [own[0], own[2], own[3]])
        self.assertEqual(sidecar.post("/end-request?id=" + own[2])[0], 200)
        self.assertEqual(sidecar.post("/end-request")[0], 200)
        self.assertEqual([entry["request_id"] for entry in sidecar.get("/requests")[1]], ["mine"])
        self.assertEqual(sidecar.post("/end-request")[0], 409)
        self.assertEqual(sidecar.active(), 1)

    def test_ids_that_the_sidecar_hands_out_differ(self):
        sidecars = [self.sidecar(), self.sidecar()]
        handed_out = [sidecar.post("/start-request")[1]["request_id"] for sidecar in sidecars for _ in range(50)]
        self.assertEqual(len(set(handed_out)), 100)

    def test_an_end_with_nothing_to_end_is_told_and_counted(self):
        sidecar = self.sidecar()
        for path in ("/end-request", "/end-request?id=nobody", "/end-request?duration=1s"):
            status, answer = sidecar.post(path)
            self.assertEqual((status, answer["active_requests"]), (409, 0))
            self.assertIn("error", answer)
        self.assertEqual(sidecar.sample("sidecar_unmatched_ends_total"), 3)
        self.assertEqual(sidecar.sample("sidecar_active_requests"), 0)
        self.assertEqual(sidecar.sample("sidecar_request_duration_seconds_count"), 0)

    def test_requests_are_listed_oldest_first_with_their_ages(self):
        sidecar = self.sidecar()
        for name in "cab":
            sidecar.post("/start-request?id=" + name)
        listed = until(lambda: [entry for entry in sidecar.get("/requests")[1] if entry["age_seconds"] > 0][2:] and
                       sidecar.get("/requests")[1])
        self.assertEqual([entry["request_id"] for entry in listed], ["c", "a", "b"])
        ages = [entry["age_seconds"] for entry in listed]
        self.assertEqual(ages, sorted(ages, reverse=True))

    def test_ids_that_are_no_ids_are_refused(self):
        sidecar = self.sidecar()
        sidecar.post("/start-request?id=%20%7E" + "x" * 126)
        self.assertEqual(sidecar.active(), 1)
        for bad in ("id=", "id=" + "x" * 129, "id=a%0Ab", "id=%00", "id=%1B[2J", "id=a&id=b", "id=a&id=a"):
            for path in ("/start-request", "/end-request"):
                status, answer = sidecar.post(path + "?" + bad)
                self.assertEqual((status, list(answer)), (400, ["error"]), bad)
                self.assertNotIn("\n", answer["error"])
        self.assertEqual(sidecar.active(), 1)
        self.assertEqual(sidecar.sample("sidecar_unmatched_ends_total"), 0)

    def test_unknown_parameters_are_ignored(self):
        sidecar = self.sidecar()
        self.assertEqual(sidecar.post("/start-request?user=7&&=&x")[0], 200)
        self.assertEqual(sidecar.post("/end-request?user=7&duration=1s")[0], 200)
        self.assertEqual(sidecar.active(), 0)

    def test_many_threads_lose_no_count(self):
        sidecar = self.sidecar()

        def work(number):
            connection = http.client.HTTPConnection(sidecar.host, sidecar.port, timeout=PATIENCE)
            for turn in range(50):
                query = "?id=%d-%d" % (number, turn) if number % 2 else ""
                for path in ("/start-request", "/end-request"):
                    connection.request("POST", path + query)
                    answer = connection.getresponse()
                    answer.read()
                    self.assertEqual(answer.status, 200)
            connection.close()

        in_threads(16, work)
        self.assertEqual(sidecar.active(), 0)
        self.assertEqual(sidecar.sample("sidecar_requests_total"), 800)
        self.assertEqual(sidecar.sample("sidecar_request_duration_seconds_count"), 800)


class TestDurations(Case):
    """What `duration` may be."""

    GOOD = [("1.2s", 1.2), ("1s", 1), ("0s", 0), ("350ms", 0.35), ("150%C2%B5s", 150e-6), ("150%CE%BCs", 150e-6),
            ("150us", 150e-6), ("12ns", 12e-9), ("1m2.5s", 62.5), ("1h2m3s", 3723), ("1.5h", 5400), ("0.003s", 0.003),
            ("5.1e-05s", 5.1e-05), ("1e-7s", 1e-07), ("3", 3), ("3.25", 3.25), (".5s", 0.5), ("1.s", 1), ("8760h", 31536000)]
    BAD = ["", "abc", "-1s", "nan", "infs", "inf", "1e999s", "1%20s", "+1s", "s", "1m-2s", "1d", "8760h1s", "1s1", "1..2s",
           "%D9%A1s", "0x1s", "1_0s", "1s&duration=1s", "9" * 200]

    def test_good_ones_are_recorded(self):
        sidecar, total = self.sidecar(), 0.0
        for text, seconds in self.GOOD:
            sidecar.post("/start-request")
            self.assertEqual(sidecar.post("/end-request?duration=" + text)[0], 200, text)
            before, total = total, sidecar.sample("sidecar_request_duration_seconds_sum")
            self.assertAlmostEqual(total - before, seconds, delta=1e-9 * max(total, 1), msg=text)

    def test_a_raw_micro_sign_is_understood(self):
        sidecar = self.sidecar()
        sidecar.post("/start-request")
        request = "POST /end-request?duration=150µs HTTP/1.1\r\nConnection: close\r\n\r\n"
        self.assertEqual(sidecar.answers(request.encode())[0][0], 200)
        self.assertAlmostEqual(sidecar.sample("sidecar_request_duration_seconds_sum"), 150e-6)

    def test_bad_ones_are_told_and_the_request_has_ended_all_the_same(self):
        sidecar = self.sidecar()
        for number, text in enumerate(self.BAD):
            sidecar.post("/start-request?id=%d" % number)
            status, answer = sidecar.post("/end-request?id=%d&duration=%s" % (number, text))
            self.assertEqual((status, answer["active_requests"]), (400, 0), text)
            self.assertIn("expected a duration", answer["error"])
        self.assertEqual(sidecar.sample("sidecar_request_duration_seconds_count"), len(self.BAD))
        self.assertLess(sidecar.sample("sidecar_request_duration_seconds_sum"), PATIENCE)

    def test_without_one_the_sidecars_own_clock_counts(self):
        sidecar = self.sidecar()
        sidecar.post("/start-request")
        age = until(lambda: sidecar.get("/requests")[1][0]["age_seconds"])
        sidecar.post("/end-request")
        self.assertGreaterEqual(sidecar.sample("sidecar_request_duration_seconds_sum"), age - 0.001)    # it is rounded


class TestDrain(Case):
    """SIGTERM, SIGINT and /drain."""

    def test_sigterm_waits_for_the_last_request(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            sidecar = self.sidecar(GRACE_PERIOD_SECONDS="1h", constants={"REPORT_SECONDS": 3600})     # only an end wakes it
            sidecar.post("/start-request?id=a")
            sidecar.post("/start-request?id=b")
            sidecar.signal(number)
            sidecar.wait_for("drain started")
            self.assertEqual(sidecar.get("/ready"), (503, {"error": "draining"}))
            self.assertEqual(sidecar.get("/health")[0], 200)
            self.assertEqual(sidecar.get("/metrics")[1]["phase"], "draining")
            self.assertEqual(sidecar.sample("sidecar_draining"), 1)
            self.assertEqual(sidecar.post("/start-request?id=c")[1], {"request_id": "c", "active_requests": 3,
                                                                      "draining": True})
            for left, name in ((2, "a"), (1, "b"), (0, "c")):
                self.assertIsNone(sidecar.process.poll())
                self.assertEqual(sidecar.post("/end-request?id=" + name)[1], {"active_requests": left, "draining": True})
            self.assertEqual(sidecar.wait(), 0)

    def test_with_nothing_active_it_exits_at_once(self):
        sidecar = self.sidecar(GRACE_PERIOD_SECONDS="1h")
        sidecar.signal(signal.SIGTERM)
        self.assertEqual(sidecar.wait(), 0)

    def test_when_the_grace_period_is_over_it_names_what_is_left(self):
        sidecar = self.sidecar(GRACE_PERIOD_SECONDS=0.3)
        for name in ("slow", "stuck"):
            sidecar.post("/start-request?id=" + name)
        sidecar.signal(signal.SIGTERM)
        self.assertEqual(sidecar.wait(), 1)
        for name in ("slow", "stuck"):
            self.assertGreaterEqual(float(sidecar.wait_for("still active request_id=%s age_seconds=(.*)" % name).group(1)),
                                    0.3)

    def test_the_log_tells_what_it_waits_for(self):
        sidecar = self.sidecar(constants={"REPORT_SECONDS": 0.05})
        sidecar.post("/start-request?id=stuck")
        sidecar.signal(signal.SIGTERM)
        for _ in range(2):
            sidecar.wait_for("INFO draining active_requests=1 .*oldest_request_id=stuck oldest_age_seconds=", len(sidecar.lines))
        sidecar.post("/end-request?id=stuck")
        self.assertEqual(sidecar.wait(), 0)

    def test_a_second_signal_ends_it_at_once(self):
        sidecar = self.sidecar(GRACE_PERIOD_SECONDS="1h", constants={"REPORT_SECONDS": 3600})
        sidecar.post("/start-request")
        sidecar.signal(signal.SIGTERM)
        sidecar.wait_for("drain started")
        sidecar.signal(signal.SIGINT)
        self.assertEqual(sidecar.wait(), 1)
        sidecar.wait_for("second signal signal=SIGINT")

    def test_the_quiet_period_begins_anew_with_each_request(self):
        sidecar = self.sidecar(QUIET_PERIOD_SECONDS=1)
        began = time.monotonic()
        sidecar.signal(signal.SIGTERM)
        sidecar.wait_for("drain started")
        self.assertEqual(sidecar.post("/start-request?id=late")[0], 200)    # taken just before, reported just after
        self.assertGreaterEqual(sidecar.get("/metrics")[1]["active_requests"], 1)
        ended = time.monotonic()
        sidecar.post("/end-request?id=late")
        self.assertEqual(sidecar.wait(), 0)
        self.assertGreaterEqual(time.monotonic() - max(ended, began), 1)

    def test_quiet_since_before_the_drain_does_not_count(self):
        sidecar = self.sidecar(QUIET_PERIOD_SECONDS=0.3)
        until(lambda: sidecar.get("/metrics")[1]["idle_duration_seconds"] > 0.3)
        began = time.monotonic()
        self.assertEqual(sidecar.get("/drain")[0], 200)
        self.assertGreaterEqual(time.monotonic() - began, 0.3)

    def test_every_caller_of_drain_gets_the_answer(self):
        sidecar = self.sidecar(GRACE_PERIOD_SECONDS="1h", constants={"REPORT_SECONDS": 3600})
        sidecar.post("/start-request?id=a")
        with_answers = []
        callers = threading.Thread(target=lambda: with_answers.extend(
            in_threads(8, lambda number: sidecar.call("POST" if number % 2 else "GET", "/drain"))), daemon=True)
        callers.start()
        sidecar.wait_for("drain started")
        self.assertEqual(sidecar.get("/ready")[0], 503)
        sidecar.post("/end-request?id=a")
        callers.join(PATIENCE)
        self.assertEqual(with_answers, [(200, {"status": "drained", "active_requests": 0})] * 8)
        self.assertEqual(sidecar.get("/ready")[0], 503)
        self.assertEqual(sidecar.get("/metrics")[1]["phase"], "drained")

    def test_drain_says_when_the_grace_period_is_over(self):
        sidecar = self.sidecar(GRACE_PERIOD_SECONDS=0.2)
        sidecar.post("/start-request")
        status, answer = sidecar.get("/drain")
        self.assertEqual((status, answer["active_requests"]), (503, 1))
        self.assertIn("grace period", answer["error"])
        self.assertEqual(sidecar.sample('sidecar_drains_total{outcome="timed_out"}'), 1)

    def test_those_who_wait_at_sigterm_get_their_answer_before_the_exit(self):
        sidecar = self.sidecar(GRACE_PERIOD_SECONDS="1h")
        sidecar.post("/start-request?id=a")
        callers = [sidecar.raw(b"GET /drain HTTP/1.1\r\n\r\n") for _ in range(4)]
        sidecar.get("/health")          # was accepted after them
        sidecar.signal(signal.SIGTERM)
        sidecar.wait_for("INFO signal")
        sidecar.post("/end-request?id=a")
        self.assertEqual(sidecar.wait(), 0)
        for caller in callers:
            with caller:
                self.assertTrue(caller.recv(65536).startswith(b"HTTP/1.1 200 OK\r\n"))

    def test_idle_connections_do_not_delay_the_exit_nor_lose_the_last_answer(self):
        for _ in range(5):
            sidecar = self.sidecar()
            idle = [sidecar.raw(b"GET /health HTTP/1.1\r\n\r\n") for _ in range(20)]
            sidecar.post("/start-request")
            sidecar.signal(signal.SIGTERM)
            sidecar.wait_for("drain started")
            self.assertEqual(sidecar.post("/end-request")[0], 200)
            self.assertEqual(sidecar.wait(), 0)
            for connection in idle:
                connection.close()

    def test_a_sigterm_after_a_drain_goes_on_with_it(self):
        sidecar = self.sidecar(GRACE_PERIOD_SECONDS=0.5)
        sidecar.post("/start-request?id=a")
        self.assertEqual(sidecar.get("/drain")[0], 503)
        sidecar.signal(signal.SIGTERM)                  # its grace period is over: no second one
        self.assertEqual(sidecar.wait(), 1)
        sidecar.wait_for("still active request_id=a")

    def test_a_new_request_undoes_a_drain_that_no_sigterm_followed(self):
        sidecar = self.sidecar(GRACE_PERIOD_SECONDS="1h")
        self.assertEqual(sidecar.get("/drain")[0], 200)
        self.assertEqual(sidecar.get("/ready")[0], 503)
        self.assertEqual(sidecar.post("/start-request?id=a")[1]["draining"], False)
        self.assertEqual(sidecar.get("/ready")[0], 200)
        self.assertEqual(sidecar.get("/metrics")[1]["phase"], "serving")
        sidecar.wait_for("serving again")
        sidecar.signal(signal.SIGTERM)                  # and the next drain waits again
        sidecar.wait_for("drain started active_requests=1")
        sidecar.post("/end-request?id=a")
        self.assertEqual(sidecar.wait(), 0)

    def test_time_undoes_a_drain_that_no_sigterm_followed(self):
        sidecar = self.sidecar(GRACE_PERIOD_SECONDS=0.2)
        self.assertEqual(sidecar.get("/drain")[0], 200)
        until(lambda: sidecar.get("/ready")[0] == 200, "ready again")
        sidecar.wait_for("serving again")

    @needs("a right to make namespaces (root, unshare, ip)", NAMESPACES)
    def test_it_works_as_pid_1(self):
        sidecar = self.program("unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c",
                               "import os, sys; sys.path.insert(0, %r); import sidecar; print('pid', os.getpid(), flush=True); "
                               "sidecar.main([])" % HERE, env={"SIDECAR_PORT": 0, "METRICS_PORT": 0})
        self.assertEqual(sidecar.wait_for(r"pid (\d+)").group(1), "1")
        sidecar.wait_for("listening")
        children = "/proc/%d/task/%d/children" % (sidecar.process.pid, sidecar.process.pid)
        with open(children) as file:
            os.kill(int(file.read().split()[0]), signal.SIGTERM)
        self.assertEqual(sidecar.wait(), 0)
        sidecar.wait_for("drain completed")


class TestEndpoints(Case):
    """What is common to every endpoint."""

    def test_head_works_wherever_get_does(self):
        sidecar = self.sidecar()
        for path in ("/metrics", "/requests", "/health", "/ready"):
            with_body, without = sidecar.answers(("GET %s HTTP/1.1\r\n\r\nHEAD %s HTTP/1.0\r\n\r\n" % (path, path)).encode())[:2]
            self.assertEqual((with_body[0], without[0]), (200, 200), path)
            self.assertTrue(with_body[2])
            self.assertEqual(without[2], "")
        with sidecar.raw(b"HEAD /metrics HTTP/1.0\r\n\r\n", sidecar.metrics_port) as connection:
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        self.assertTrue(answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"\r\n\r\n"), answer)

    def test_unknown_paths_are_404_in_json(self):
        sidecar = self.sidecar()
        for port in (sidecar.port, sidecar.metrics_port):
            for method in ("GET", "POST", "HEAD", "BREW"):
                status, answer = sidecar.call(method, "/coffee?id=1", port=port)
                self.assertEqual(status, 404)
                if method != "HEAD":
                    self.assertIn("/coffee", answer["error"])

    def test_wrong_methods_are_405_with_allow(self):
        sidecar = self.sidecar()
        for method, path, allow in (("GET", "/start-request", "POST"), ("PUT", "/end-request", "POST"),
                                    ("POST", "/metrics", "GET, HEAD"), ("DELETE", "/drain", "GET, POST, HEAD"),
                                    ("OPTIONS", "/health", "GET, HEAD"), ("POST", "/ready", "GET, HEAD")):
            answer = sidecar.answers(("%s %s HTTP/1.0\r\n\r\n" % (method, path)).encode())[0]
            self.assertEqual((answer[0], answer[1]["allow"]), (405, allow))
            self.assertIn("error", json.loads(answer[2]))
        self.assertEqual(sidecar.get("/metrics")[1]["total_requests"], 0)
        self.assertEqual(sidecar.call("POST", "/metrics", port=sidecar.metrics_port)[0], 405)

    @needs("a right to make namespaces (root, unshare, ip)", NAMESPACES)
    def test_others_may_look_but_not_change_anything(self):
        inside = self.program("unshare", "--net", "sh", "-c", "ip link set lo up && ip address add 192.0.2.10 dev lo && "
                              "exec \"$@\"", "sh", sys.executable, "-c", "import test_sidecar; test_sidecar.call_as_another()",
                              cwd=HERE)
        self.assertEqual(inside.wait(), 0, inside.log)
        self.assertEqual(inside.log, "as expected")

    def test_a_browser_on_another_site_may_not_change_anything(self):
        sidecar = self.sidecar()
        for origin, expected in (("https://example.com", 403), ("null", 403), ("http://127.0.0.1.example.com:8081", 403),
                                 ("http://localhost:8081", 200), ("http://[::1]:8081", 200), ("http://127.0.0.1", 200)):
            self.assertEqual(sidecar.call("POST", "/start-request", headers={"Origin": origin})[0], expected, origin)
        self.assertEqual(sidecar.active(), 3)
        self.assertEqual(sidecar.call("GET", "/drain", headers={"Sec-Fetch-Site": "cross-site"})[0], 403)

    def test_it_listens_on_ipv4_and_ipv6(self):
        sidecar = self.sidecar(SIDECAR_HOST=None)
        for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            try:
                socket.socket(family).close()
            except OSError:
                continue
            sidecar.host = host
            self.assertEqual(sidecar.post("/start-request")[0], 200)    # IPv4-mapped loopback is loopback too
        for host in ("127.0.0.1", "localhost"):
            self.assertEqual(self.sidecar(SIDECAR_HOST=host).get("/health")[0], 200)


def call_as_another():
    """In a network namespace where 192.0.2.10 is an address of this host: call a sidecar from there."""
    for trusted, expected in (("", 403), ("192.0.2.10/32", 200), ("198.51.100.0/24, 192.0.2.10", 200), ("198.51.100.1", 403)):
        sidecar = SidecarProcess(SIDECAR_HOST=None, TRUSTED_CLIENTS=trusted)
        sidecar.host = "192.0.2.10"
        try:
            for path in ("/start-request", "/end-request", "/reset", "/drain"):
                status, answer = sidecar.post(path)
                assert status == expected, (trusted, path, status, answer)
                assert status == 200 or "TRUSTED_CLIENTS" in answer["error"], answer
            for path in ("/metrics", "/requests", "/health"):
                assert sidecar.get(path)[0] == 200, path
            assert "sidecar_info" in sidecar.prometheus()
        finally:
            sidecar.kill()
    print("as expected")


class TestHostileClients(Case):
    """Bad input never leaves a traceback, a lost count or a stuck server."""

    def setUp(self):
        self.target = self.sidecar()

    def tearDown(self):
        self.assertEqual(self.target.get("/health")[0], 200)
        self.assertNotIn("Traceback", self.target.log)
        self.assertNotIn("failed", self.target.log)

    def statuses(self, data):
        answers = self.target.answers(data)
        for status, headers, body in answers:
            if status >= 400:
                self.assertEqual(list(json.loads(body))[:1], ["error"])
        return [status for status, _, _ in answers]

    def test_malformed_requests_are_400(self):
        for head in (b"GET", b"GET /health", b"GET /health HTTP/2.0", b"GET /health HTTP/1.1 x", b"GET  /health HTTP/1.1",
                     b"GET health HTTP/1.1", b"G@T /health HTTP/1.1", b"\x16\x03\x01\x02\x00\x01\x00", b"GET /\x00 HTTP/1.1",
                     b"GET /health HTTP/1.1\r\nno colon", b"GET /health HTTP/1.1\r\n: empty",
                     b"GET /health HTTP/1.1\r\nspace : x", b"GET /health HTTP/1.1\r\nA: x\r\n folded",
                     b"GET /health HTTP/1.1\r\nA: \x00", b"GET /health HTTP/1.1\r\nA: a\rb"):
            self.assertEqual(self.statuses(head + b"\r\n\r\n"), [400], head)

    def test_over_long_heads_are_414_and_431(self):
        self.assertEqual(self.statuses(b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\n\r\n"), [414])
        self.assertEqual(self.statuses(b"GET /" + b"x" * 100000), [414])
        self.assertEqual(self.statuses(b"GET / HTTP/1.1\r\nA: " + b"x" * 20000 + b"\r\n\r\n"), [431])
        self.assertEqual(self.statuses(b"GET / HTTP/1.1\r\n" + b"A: x\r\n" * 20000 + b"\r\n"), [431])
        self.assertEqual(self.statuses(b"GET /health HTTP/1.0\r\nA: " + b"x" * 8000 + b"\r\n\r\n"), [200])

    def test_a_body_is_read_and_dropped(self):
        last = b"GET /health HTTP/1.0\r\n\r\n"
        for body in (b"Content-Length: 5\r\n\r\nhello", b"Content-Length: 0\r\n\r\n",
                     b"Content-Length: 65536\r\n\r\n" + b"x" * 65536,
                     b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
                     b"Transfer-Encoding: Chunked\r\n\r\n00A;x=y\r\n0123456789\r\n1\r\nx\r\n0\r\nTrailer: x\r\n\r\n"):
            for method, path in ((b"POST", b"/start-request"), (b"GET", b"/health"), (b"GET", b"/nowhere")):
                statuses = self.statuses(method + b" " + path + b" HTTP/1.1\r\n" + body + last)
                self.assertEqual(statuses, [404 if path == b"/nowhere" else 200, 200], body[:60])

    def test_a_body_that_is_too_long_or_malformed_closes_the_connection(self):
        after = b"GET /health HTTP/1.1\r\n\r\n"
        for fields, expected in ((b"Content-Length: 65537\r\n\r\n" + b"x" * 65537, 413),
                                 (b"Content-Length: 9999999999999999999999\r\n\r\n", 413),
                                 (b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", 413),
                                 (b"Content-Length: -1\r\n\r\n", 400), (b"Content-Length: 1_0\r\n\r\n", 400),
                                 (b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello", 400),
                                 (b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
                                 (b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
                                 (b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n", 400),
                                 (b"Transfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n", 400),
                                 (b"Transfer-Encoding: chunked\r\n\r\n3\r\nhello\r\n0\r\n\r\n", 400),
                                 (b"Transfer-Encoding: chunked\r\n\r\n" + b"1" * 9000, 400),
                                 (b"Transfer-Encoding: chunked\r\n\r\n10001\r\n" + b"x" * 65537, 413),
                                 (b"Transfer-Encoding: chunked\r\n\r\n" + (b"8000\r\n" + b"x" * 32768 + b"\r\n") * 3, 413)):
            self.assertEqual(self.statuses(b"POST /start-request HTTP/1.1\r\n" + fields + after), [expected], fields[:60])
        self.assertEqual(self.target.active(), 0)
        self.assertEqual(self.target.call("POST", "/start-request", b"x" * (8 << 20))[0], 413)     # sent whole, then read

    def test_expect_100_continue(self):
        head = b"POST /start-request HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
        with self.target.raw(head % 5) as connection:
            self.assertEqual(connection.recv(65536), b"HTTP/1.1 100 Continue\r\n\r\n")
            connection.sendall(b"hello")
            self.assertTrue(connection.recv(65536).startswith(b"HTTP/1.1 200 OK\r\n"))
        self.assertEqual(self.statuses(head % 70000), [413])
        old = head.replace(b"1.1", b"1.0") % 5
        self.assertTrue(self.target.answers(old + b"hello")[0][0], 200)
        with self.target.raw(old) as connection:        # an HTTP/1.0 client does not know what a 100 is
            connection.shutdown(socket.SHUT_WR)
            self.assertEqual(connection.recv(65536), b"")

    def test_pipelined_requests_are_answered_in_order(self):
        self.assertEqual(self.statuses(b"GET /health HTTP/1.1\r\n\r\n\r\nGET /nowhere HTTP/1.1\n\nPOST /start-request HTTP/1.1\r\n"
                                       b"\r\nPOST /health HTTP/1.1\r\nConnection: close\r\n\r\nGET /health HTTP/1.1\r\n\r\n"),
                         [200, 404, 200, 405])

    def test_http_1_0_and_connection_close(self):
        for head, keeps in ((b"HTTP/1.0", False), (b"HTTP/1.0\r\nConnection: Keep-Alive", True), (b"HTTP/1.1", True),
                            (b"HTTP/1.1\r\nConnection: Close", False)):
            data = b"GET /health " + head + b"\r\n\r\n"
            self.assertEqual(self.statuses(data * 2 + b"GET /ready HTTP/1.0\r\n\r\n"), [200] * (3 if keeps else 1), head)

    def test_absolute_targets(self):
        self.assertEqual(self.statuses(b"GET http://sidecar:8081/health HTTP/1.0\r\nHost: sidecar\r\n\r\n"), [200])
        self.assertEqual(self.statuses(b"OPTIONS * HTTP/1.0\r\n\r\n"), [404])

    def test_requests_in_single_bytes(self):
        with self.target.raw(b"") as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in b"POST /start-request?id=a HTTP/1.0\r\nContent-Length: 2\r\n\r\nhi":
                connection.sendall(bytes([byte]))
            self.assertTrue(connection.recv(65536).startswith(b"HTTP/1.1 200 OK\r\n"))
        self.assertEqual(self.target.active(), 1)

    def test_a_client_that_stops_in_the_middle_is_let_go(self):
        self.target = self.sidecar(constants={"REQUEST_SECONDS": 0.2})
        for data in (b"GET /hea", b"POST /start-request HTTP/1.1\r\nContent-Length: 5\r\n\r\nhe",
                     b"POST /start-request HTTP/1.1\r\nContent-Length: 5\r\n\r\n"):
            self.assertEqual(self.statuses(data), [408])
        self.assertEqual(self.target.active(), 0)
        with self.target.raw(b"POST /start-request HTTP/1.1\r\nContent-Length: 5\r\n\r\nhe"):
            pass                                                    # one that is gone in the middle
        self.assertEqual(self.target.active(), 0)

    def test_an_idle_connection_is_closed(self):
        self.target = self.sidecar(constants={"IDLE_SECONDS": 0.2})
        self.assertEqual(self.statuses(b""), [])
        self.assertEqual(self.statuses(b"GET /health HTTP/1.1\r\n\r\n"), [200])
        self.assertEqual(self.statuses(b"GET /health HTTP/1.1\r\nContent-Length: 1\r\n\r\nxGET /ready HTTP/1.1\r\n\r\n"), [200] * 2)

    def test_a_client_that_does_not_read_its_answer(self):
        for _ in range(50):
            self.target.raw(b"POST /start-request HTTP/1.1\r\n\r\n").close()
        until(lambda: self.target.active() == 50)

    def test_more_than_512_connections(self):
        held = []
        self.addCleanup(lambda: [connection.close() for connection in held])
        for _ in range(512):
            held.append(self.target.raw(b""))
        # accepted in their order: the next one is the first too many
        with self.target.raw(b"") as refused:
            answer = b"".join(iter(lambda: refused.recv(65536), b""))
        self.assertTrue(answer.startswith(b"HTTP/1.1 503 "), answer)
        self.assertEqual(json.loads(answer.partition(b"\r\n\r\n")[2].decode()), {"error": "too many connections"})
        for _ in range(10):                             # and some that are gone before they are accepted
            gone = self.target.raw(b"")
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            gone.close()
        held[0].sendall(b"POST /start-request HTTP/1.1\r\n\r\n")
        self.assertTrue(held[0].recv(65536).startswith(b"HTTP/1.1 200 "))
        while held:
            held.pop().close()

        def recovered():
            with self.target.raw(b"GET /metrics HTTP/1.0\r\n\r\n") as connection:
                return connection.recv(12) == b"HTTP/1.1 200"
        until(recovered)
        self.assertEqual(self.target.active(), 1)

    def test_a_burst_of_300_connects(self):
        burst = [socket.socket() for _ in range(300)]
        self.addCleanup(lambda: [connection.close() for connection in burst])
        self.target.signal(signal.SIGSTOP)              # so that nothing is accepted: it is the backlog that is tested
        for connection in burst:
            connection.settimeout(PATIENCE)
            connection.connect(("127.0.0.1", self.target.port))
        self.target.signal(signal.SIGCONT)
        for connection in burst:
            connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        for connection in burst:
            self.assertEqual(connection.recv(12), b"HTTP/1.1 200")


class TestPrometheus(Case):
    """Port 9091, as text 0.0.4 and as OpenMetrics."""

    KINDS = {"sidecar_active_requests": "gauge", "sidecar_requests_total": "counter",
             "sidecar_request_duration_seconds": "histogram", "sidecar_unmatched_ends_total": "counter",
             "sidecar_oldest_request_age_seconds": "gauge", "sidecar_draining": "gauge",
             "sidecar_last_request_timestamp_seconds": "gauge", "sidecar_start_time_seconds": "gauge", "sidecar_info": "gauge"}

    def families(self, text):
        """Return {family: (type, help, {sample with labels: value})} of an exposition; each line is checked."""
        families, current = {}, None
        for line in text.splitlines():
            comment = re.fullmatch(r"# (HELP|TYPE) ([a-z_]+) (.+)", line)
            sample = re.fullmatch(r'([a-z_]+)(\{[a-z_]+="[^"]*"(?:,[a-z_]+="[^"]*")*\})? ([-+0-9.e]+)', line)
            if comment and comment.group(1) == "HELP":
                current = comment.group(2)
                self.assertNotIn(current, families)
                families[current] = [None, comment.group(3), {}]
            elif comment:
                self.assertEqual(comment.group(2), current)
                families[current][0] = comment.group(3)
            else:
                self.assertTrue(sample, line)
                self.assertTrue(sample.group(1).startswith(current), line)
                families[current][2][sample.group(1) + (sample.group(2) or "")] = float(sample.group(3))
        return families

    def test_every_metric_has_its_help_type_and_value(self):
        sidecar = self.sidecar()
        for path in ("/start-request?id=a", "/start-request?id=b", "/end-request?id=a&duration=40ms", "/end-request"):
            sidecar.post(path)
        families = self.families(sidecar.prometheus())
        self.assertEqual({name: families[name][0] for name in self.KINDS}, self.KINDS)
        value = {name: samples for _, _, family in families.values() for name, samples in family.items()}
        self.assertEqual([value["sidecar_active_requests"], value["sidecar_requests_total"],
                          value["sidecar_unmatched_ends_total"], value["sidecar_draining"]], [1, 2, 1, 0])
        self.assertGreater(value["sidecar_oldest_request_age_seconds"], 0)
        for name in ("sidecar_last_request_timestamp_seconds", "sidecar_start_time_seconds"):
            self.assertLess(abs(value[name] - time.time()), 2 * PATIENCE)
        self.assertEqual([value[name] for name in value if name.startswith("sidecar_info{version=")], [1])
        if os.path.exists("/proc/self/stat"):
            with open("/proc/%d/statm" % sidecar.process.pid) as file:
                pages = int(file.read().split()[1])
            self.assertLess(abs(value["process_resident_memory_bytes"] - pages * 4096), 8 << 20)
            self.assertLess(abs(value["process_start_time_seconds"] - time.time()), 2 * PATIENCE)
            for name in ("process_cpu_seconds_total", "process_open_fds", "process_max_fds", "process_virtual_memory_bytes"):
                self.assertGreaterEqual(value[name], 0)

    def test_the_histogram_is_cumulative(self):
        sidecar = self.sidecar()
        durations = (0.001, 0.005, 0.0051, 0.3, 60, 61)
        for seconds in durations:
            sidecar.post("/start-request")
            sidecar.post("/end-request?duration=%s" % seconds)
        _, _, samples = self.families(sidecar.prometheus())["sidecar_request_duration_seconds"]
        buckets = [(re.search('le="(.*)"', name).group(1), count) for name, count in samples.items() if "_bucket" in name]
        self.assertEqual([bound for bound, _ in buckets], ["0.005", "0.01", "0.025", "0.05", "0.1", "0.25", "0.5", "1.0",
                                                           "2.5", "5.0", "10.0", "30.0", "60.0", "+Inf"])
        for bound, count in buckets:
            self.assertEqual(count, sum(seconds <= float(bound) for seconds in durations), bound)
        self.assertEqual(samples["sidecar_request_duration_seconds_count"], 6)
        self.assertAlmostEqual(samples["sidecar_request_duration_seconds_sum"], sum(durations))

    def test_content_types_follow_accept(self):
        sidecar = self.sidecar()
        for accept, expected in ((None, "text/plain; version=0.0.4; charset=utf-8"), ("text/plain", "text/plain; version=0.0.4; "
                                 "charset=utf-8"), ("application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.2",
                                 "application/openmetrics-text; version=1.0.0; charset=utf-8")):
            with sidecar.raw(("GET /metrics HTTP/1.0\r\n%s\r\n" % ("Accept: %s\r\n" % accept if accept else "")).encode(),
                             sidecar.metrics_port) as connection:
                text = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
            self.assertIn("Content-Type: %s\r\n" % expected, text)
            self.assertEqual(text.endswith("# EOF\n"), "openmetrics" in expected)
            self.assertEqual("# TYPE sidecar_requests counter" in text, "openmetrics" in expected)
            self.assertIn("\nsidecar_requests_total 0\n", text)


class TestCommands(Case):
    """python sidecar.py COMMAND, and the settings."""

    def run_sidecar(self, *argv, **env):
        """Return (status, output, errors) of a command."""
        env = dict(os.environ, **{name: str(value) for name, value in env.items()})
        done = subprocess.run([sys.executable, os.path.join(HERE, "sidecar.py")] + list(argv), env=env, timeout=PATIENCE,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    def test_they_print_the_answer_and_exit_0_or_1(self):
        sidecar = self.sidecar()
        sidecar.post("/start-request?id=a")
        for command in ("health", "ready", "metrics", "requests"):
            status, output, errors = self.run_sidecar(command, SIDECAR_URL=sidecar.url + "/")
            self.assertEqual((status, errors), (0, ""), command)
            self.assertTrue(json.loads(output))
        self.assertIn('"request_id": "a"', output)
        self.assertEqual(self.run_sidecar("health", SIDECAR_URL="", SIDECAR_PORT=sidecar.port)[0], 0)
        sidecar.signal(signal.SIGTERM)
        sidecar.wait_for("drain started")
        self.assertEqual(self.run_sidecar("ready", SIDECAR_URL=sidecar.url), (1, '{"error": "draining"}\n', ""))
        self.assertEqual(self.run_sidecar("health", SIDECAR_URL=sidecar.url)[0], 0)

    def test_drain_waits_as_long_as_the_sidecar_does(self):
        sidecar = self.sidecar()
        sidecar.post("/start-request?id=a")
        drain = self.program(sys.executable, os.path.join(HERE, "sidecar.py"), "drain", env={"SIDECAR_URL": sidecar.url})
        sidecar.wait_for("drain started")
        self.assertIsNone(drain.process.poll())
        sidecar.post("/end-request?id=a")
        self.assertEqual(drain.wait(), 0)
        self.assertIn("drained", drain.log)

    def test_drain_fails_when_the_grace_period_is_over(self):
        sidecar = self.sidecar(GRACE_PERIOD_SECONDS=0.1)
        sidecar.post("/start-request?id=a")
        self.assertEqual(self.run_sidecar("drain", SIDECAR_URL=sidecar.url)[0], 1)

    def test_without_a_sidecar_there_it_is_one_line_and_1(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))            # and nobody listens
            status, output, errors = self.run_sidecar("health", SIDECAR_URL="http://127.0.0.1:%d" % taken.getsockname()[1])
        self.assertEqual((status, output, errors.count("\n")), (1, "", 1))

    def test_help_and_version(self):
        status, output, errors = self.run_sidecar("--help")
        self.assertEqual((status, errors), (0, ""))
        for name in ("/start-request", "GRACE_PERIOD_SECONDS", "METRICS_PORT", "drain"):
            self.assertIn(name, output)
        self.assertRegex(self.run_sidecar("--version")[1], r"^sidecar \d+\.\d+\.\d+\n$")

    def test_anything_else_is_one_line_and_2(self):
        for argv in (["--port"], ["serve"], ["health", "now"], [""]):
            status, output, errors = self.run_sidecar(*argv)
            self.assertEqual((status, output, errors.count("\n")), (2, "", 1), argv)

    def test_bad_settings_are_one_line_and_2(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen(1)
            for name, value in (("SIDECAR_PORT", "http"), ("SIDECAR_PORT", "65536"), ("METRICS_PORT", "-1"),
                                ("SIDECAR_PORT", str(taken.getsockname()[1])), ("METRICS_PORT", str(taken.getsockname()[1])),
                                ("GRACE_PERIOD_SECONDS", "soon"), ("GRACE_PERIOD_SECONDS", "-1"), ("GRACE_PERIOD_SECONDS", "nan"),
                                ("QUIET_PERIOD_SECONDS", "1d"), ("TRUSTED_CLIENTS", "10.0.0.0/33"), ("TRUSTED_CLIENTS", "pod"),
                                ("LOG_LEVEL", "LOUD"), ("LOG_FORMAT", "xml"), ("SIDECAR_HOST", "no.such.host.invalid"), ("SIDECAR_HOST", "a..b"),
                                ("SIDECAR_URL", "ftp://x"), ("SIDECAR_URL", "http://x:y")):
                env = dict({"SIDECAR_HOST": "127.0.0.1", "SIDECAR_PORT": 0, "METRICS_PORT": 0}, **{name: value})
                status, output, errors = self.run_sidecar(*["health"] if name == "SIDECAR_URL" else [], **env)
                self.assertEqual((status, output, errors.count("\n")), (2, "", 1), errors)
                self.assertIn(name, errors)
                self.assertIn(value, errors)


class TestLogs(Case):
    """One line an event, on stderr."""

    def test_text(self):
        sidecar = self.sidecar()
        self.assertRegex(sidecar.lines[0], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ INFO listening api=http://127.0.0.1:\d+ "
                                           r"metrics=http://127.0.0.1:\d+ version=")
        sidecar.post("/start-request?id=a%20b")
        sidecar.signal(signal.SIGTERM)
        sidecar.wait_for('drain started .* oldest_request_id="a b"')

    def test_json_tells_a_whole_drain(self):
        sidecar = self.sidecar(LOG_FORMAT="json", GRACE_PERIOD_SECONDS=0.1)
        sidecar.post("/start-request?id=a%22b")
        sidecar.signal(signal.SIGTERM)
        self.assertEqual(sidecar.wait(), 1)
        events = [json.loads(line) for line in sidecar.lines]
        for event in events:
            self.assertEqual(list(event)[:3], ["time", "level", "event"])
        self.assertEqual([event["event"] for event in events], ["listening", "signal", "drain started", "drain timed out",
                                                                "still active", "exit"])
        self.assertEqual(events[1]["signal"], "SIGTERM")
        self.assertEqual((events[2]["active_requests"], events[2]["oldest_request_id"]), (1, 'a"b'))
        self.assertEqual((events[4]["level"], events[4]["request_id"]), ("WARNING", 'a"b'))
        self.assertEqual(events[5]["status"], 1)

    def test_json_tells_a_drain_from_its_start_to_its_end(self):
        sidecar = self.sidecar(LOG_FORMAT="json", constants={"REPORT_SECONDS": 0.01})
        for name in "abc":
            sidecar.post("/start-request?id=" + name)
        sidecar.signal(signal.SIGTERM)
        sidecar.wait_for("drain started")
        for name, left in (("a", 2), ("b", 1)):
            sidecar.post("/end-request?id=" + name)
            sidecar.wait_for('"draining".*"active_requests": %d' % left)
        sidecar.post("/end-request?id=c")
        self.assertEqual(sidecar.wait(), 0)
        events = [json.loads(line) for line in sidecar.lines]
        for event in events:
            self.assertRegex(event["time"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")
            self.assertEqual(event["level"], "INFO")
        names = [event["event"] for event in events]
        self.assertEqual(names[:3], ["listening", "signal", "drain started"])
        self.assertEqual(set(names[3:-2]), {"draining"})
        self.assertEqual(names[-2:], ["drain completed", "exit"])
        drain = events[2:-1]
        counts = [event["active_requests"] for event in drain]
        self.assertEqual((counts, set(counts)), (sorted(counts, reverse=True), {0, 1, 2, 3}))
        elapsed = [event["elapsed_seconds"] for event in drain]
        self.assertEqual(elapsed, sorted(elapsed))
        self.assertEqual([event.get("oldest_request_id") for event in drain],
                         [(None, "c", "b", "a")[count] for count in counts])

    def test_json_is_whole_however_long_a_client_makes_it(self):
        sidecar = self.sidecar(LOG_FORMAT="json", LOG_LEVEL="DEBUG")
        for method, path in (("GET", "/" + "a" * 8000), ("GET", "/health?" + "a" * 8000), ("A" * 8000, "/health"),
                             ("POST", "/start-request?id=" + "%F0%9F%99%82" * 128)):
            sidecar.call(method, path)
        until(lambda: len(sidecar.lines) == 5, "a line for each request")
        sidecar.signal(signal.SIGTERM)
        sidecar.wait_for("drain started")
        events = [json.loads(line)["event"] for line in sidecar.lines]
        self.assertEqual(events[:7], ["listening"] + ["request"] * 4 + ["signal", "drain started"])

    def test_requests_are_logged_at_debug_only(self):
        quiet, loud = self.sidecar(), self.sidecar(LOG_LEVEL="debug")
        for sidecar in (quiet, loud):
            sidecar.post("/start-request?id=a")
            sidecar.signal(signal.SIGTERM)
            sidecar.wait_for("drain started")
            sidecar.post("/end-request?id=a")
            sidecar.wait()
        self.assertNotIn("/start-request", quiet.log)
        loud.wait_for("DEBUG request client=127.0.0.1 method=POST path=/start-request query=\"id=a\" status=200")


class TestGivenUp(Case):
    """Requests whose worker died: REQUEST_TIMEOUT_SECONDS and POST /reset."""

    def test_a_request_that_takes_too_long_is_given_up(self):
        sidecar = self.sidecar(REQUEST_TIMEOUT_SECONDS=0.3)
        sidecar.post("/start-request?id=hung")
        sidecar.post("/start-request")
        until(lambda: sidecar.active() == 0)
        sidecar.wait_for("request given up request_id=hung age_seconds=")
        self.assertEqual(sidecar.sample("sidecar_requests_expired_total"), 2)
        for query in ("?id=hung&duration=7s", "?duration=8s"):          # late, and no error
            self.assertEqual(sidecar.post("/end-request" + query), (200, {"active_requests": 0, "draining": False}))
        self.assertEqual(sidecar.sample("sidecar_request_duration_seconds_sum"), 15)
        self.assertEqual(sidecar.sample("sidecar_unmatched_ends_total"), 0)
        self.assertEqual(sidecar.post("/end-request")[0], 409)

    def test_a_drain_does_not_wait_for_it_any_longer(self):
        sidecar = self.sidecar(REQUEST_TIMEOUT_SECONDS=0.3, GRACE_PERIOD_SECONDS="1h")
        sidecar.post("/start-request?id=hung")
        sidecar.signal(signal.SIGTERM)
        self.assertEqual(sidecar.wait(), 0)
        sidecar.wait_for("request given up request_id=hung")

    def test_a_late_end_without_an_id_ends_an_active_request_first(self):
        sidecar = self.sidecar()
        sidecar.post("/start-request")
        sidecar.post("/reset")
        sidecar.post("/start-request")
        self.assertEqual(sidecar.post("/end-request"), (200, {"active_requests": 0, "draining": False}))
        self.assertEqual(sidecar.post("/end-request"), (200, {"active_requests": 0, "draining": False}))
        self.assertEqual(sidecar.post("/end-request")[0], 409)

    def test_reset_gives_up_everything(self):
        sidecar = self.sidecar()
        for query in ("?id=a", "?id=b", ""):
            sidecar.post("/start-request" + query)
        self.assertEqual(sidecar.post("/reset"), (200, {"given_up": 3}))
        self.assertEqual(sidecar.post("/reset"), (200, {"given_up": 0}))
        self.assertEqual(sidecar.active(), 0)
        sidecar.wait_for("request given up request_id=b")
        self.assertEqual(sidecar.sample("sidecar_requests_expired_total"), 3)
        self.assertEqual(sidecar.get("/reset")[0], 405)

    def test_a_reset_ends_a_drain_that_waited(self):
        sidecar = self.sidecar(GRACE_PERIOD_SECONDS="1h")
        sidecar.post("/start-request")
        sidecar.signal(signal.SIGTERM)
        sidecar.wait_for("drain started")
        sidecar.post("/reset")
        self.assertEqual(sidecar.wait(), 0)


class HangingServer:
    """A port that takes connections and never answers; `heard` is an event."""

    def __init__(self):
        self.socket = socket.create_server(("127.0.0.1", 0)) if hasattr(socket, "create_server") else socket.socket()
        if not hasattr(socket, "create_server"):
            self.socket.bind(("127.0.0.1", 0))
            self.socket.listen(5)
        self.url = "http://127.0.0.1:%d" % self.socket.getsockname()[1]
        self.connections, self.heard = [], threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        try:
            while True:
                self.connections.append(self.socket.accept()[0])
                self.heard.set()
        except OSError:
            pass

    def close(self):
        self.socket.close()
        for connection in self.connections:
            connection.close()


class TestSidecarClient(Case):
    """The class Sidecar of echo_bot.py, in this process."""

    def client(self, url, **constants):
        import echo_bot
        client = echo_bot.Sidecar(url)
        vars(client).update(constants)
        self.addCleanup(lambda: client._threads_own.connection and client._threads_own.connection.close())
        return client

    def test_it_reports_the_start_and_the_end_with_the_duration(self):
        sidecar = self.sidecar()
        client = self.client(sidecar.url)
        with client.track():
            began = time.monotonic()
            until(lambda: sidecar.get("/requests")[1][0]["age_seconds"])
            seconds = time.monotonic() - began
        self.assertEqual(sidecar.active(), 0)
        self.assertGreaterEqual(sidecar.sample("sidecar_request_duration_seconds_sum"), seconds - 1e-6)
        for _ in range(10):
            with client.track():
                self.assertEqual(sidecar.active(), 1)
        self.assertEqual(sidecar.sample("sidecar_requests_total"), 11)
        self.assertEqual(sidecar.sample("sidecar_unmatched_ends_total"), 0)

    def test_an_exception_passes_and_the_end_is_reported(self):
        sidecar = self.sidecar()
        client = self.client(sidecar.url)
        for problem in (KeyError("x"), KeyboardInterrupt()):
            with self.assertRaises(type(problem)):
                with client.track():
                    raise problem
        self.assertEqual(sidecar.active(), 0)
        self.assertEqual(sidecar.sample("sidecar_request_duration_seconds_count"), 2)

    def test_draining_is_told(self):
        sidecar = self.sidecar(GRACE_PERIOD_SECONDS=0.2)
        client = self.client(sidecar.url)
        sidecar.post("/start-request?id=other")
        drain = threading.Thread(target=sidecar.get, args=("/drain",), daemon=True)
        self.assertFalse(client.draining)
        self.assertTrue(client.ready())
        drain.start()
        sidecar.wait_for("drain started")
        with client.track():
            self.assertTrue(client.draining)
        drain.join(PATIENCE)
        until(client.ready)                 # no SIGTERM came
        self.assertFalse(client.draining)

    def test_a_connection_that_the_sidecar_closed_is_opened_again(self):
        sidecar = self.sidecar(constants={"IDLE_SECONDS": 0.05})
        client = self.client(sidecar.url)
        for turn in range(3):
            with client.track():
                self.assertEqual(sidecar.active(), 1)
                kept = client._threads_own.connection.sock
                self.assertTrue(select.select([kept], [], [], PATIENCE)[0])     # readable: its end has come
        self.assertEqual(sidecar.sample("sidecar_request_duration_seconds_count"), 3)

    def test_without_a_sidecar_the_work_is_done_and_it_is_left_alone(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            client, done = self.client("http://127.0.0.1:%d" % taken.getsockname()[1], REST_SECONDS=3600), []
            with self.assertLogs("echo_bot") as logs:
                for turn in range(100):
                    with client.track():
                        done.append(turn)
        self.assertEqual(len(done), 100)
        self.assertEqual(len(logs.output), 1)
        self.assertIn("working without a sidecar", logs.output[0])

    def test_one_that_hangs_costs_its_time_out_once(self):
        hanging = HangingServer()
        self.addCleanup(hanging.close)
        client, done = self.client(hanging.url, TIMEOUT_SECONDS=0.1, REST_SECONDS=3600), []
        for turn in range(100):
            with client.track():
                done.append(turn)
        self.assertEqual(len(done), 100)
        self.assertEqual(len(hanging.connections), 1)

    def test_an_end_that_could_not_be_delivered_is_delivered_later(self):
        sidecar = self.sidecar()
        client = self.client(sidecar.url, TIMEOUT_SECONDS=0.2, REST_SECONDS=0.1)
        with client.track():
            self.assertEqual(sidecar.active(), 1)
            sidecar.signal(signal.SIGSTOP)
        sidecar.signal(signal.SIGCONT)
        until(lambda: sidecar.active() == 0)
        with client.track():                # and it is talked to again
            until(lambda: client.ready())
        self.assertEqual(sidecar.active(), 0)
        self.assertEqual(sidecar.sample("sidecar_unmatched_ends_total"), 0)


class TestConsole(Case):
    """python echo_bot.py with nothing set, and reply_to."""

    def bot(self, **env):
        env = dict({"SIDECAR_URL": None, "BOT_TOKEN": None, "KAFKA_BROKERS": None}, **env)
        return self.program(sys.executable, os.path.join(HERE, "echo_bot.py"), env=env, stdin=subprocess.PIPE)

    def say(self, bot, *lines):
        for line in lines:
            bot.process.stdin.write(line.encode() + b"\n")
        bot.process.stdin.flush()

    def echoing_bot(self):
        """Return a bot that has answered a first line."""
        bot = self.bot()
        self.say(bot, "hello")
        bot.wait_for("Echo: hello")
        return bot

    def test_each_line_is_echoed_and_end_of_input_ends_it(self):
        bot = self.bot(SIDECAR_URL="http://127.0.0.1:9")
        self.say(bot, "hello", "", "päivää 👋", '{"update_id": 1, "callback_query": {"id": "7", "data": "yes"}}',
                 '{"update_id": 2, "edited_message": {}}', '{"message": 7}', "[1]", "[" * 100000)
        bot.process.stdin.close()
        self.assertEqual(bot.wait(), 0)
        echoed = [line for line in bot.lines if line.startswith(("Echo", "Received"))]
        self.assertEqual(echoed[:4], ["Echo: hello", "Echo: ", "Echo: päivää 👋", "Received: yes"])
        self.assertEqual(echoed[4], "Echo: [1]")
        self.assertEqual(len(echoed), 6)
        self.assertEqual(bot.log.count("broken update"), 1)
        self.assertEqual(bot.log.count("working without a sidecar"), 1)
        self.assertNotIn("Traceback", bot.log)

    def test_each_line_is_tracked(self):
        sidecar = self.sidecar()
        bot = self.bot(SIDECAR_URL=sidecar.url)
        self.say(bot, *"abc")
        bot.wait_for("Echo: c")
        until(lambda: sidecar.sample("sidecar_request_duration_seconds_count") == 3)
        self.assertEqual(sidecar.active(), 0)
        bot.wait_for("reporting to the sidecar")

    def test_sigterm_and_sigint_end_it(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            bot = self.echoing_bot()
            bot.signal(number)
            self.assertEqual(bot.wait(), 0, bot.log)
            self.assertNotIn("Traceback", bot.log)

    def test_more_signals_change_nothing_about_its_end(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            bot = self.echoing_bot()
            while bot.process.poll() is None:           # at every moment up to its end
                bot.signal(number)
            self.assertEqual(bot.wait(), 0, bot.log)
            self.assertNotIn("Traceback", bot.log)

    def test_a_signal_that_breaks_into_no_system_call_ends_it(self):
        try:
            from ctypes import CDLL
            tgkill = CDLL(None).tgkill
        except (ImportError, OSError, AttributeError) as error:
            self.skipTest("a C library with tgkill: %s" % error)
        bot = self.echoing_bot()
        pid = bot.process.pid       # and the main thread's number

        def waits():
            with open("/proc/%d/stat" % pid) as file:
                return file.read().rpartition(")")[2].split()[0] == "S"
        until(waits, "it waits for a line")
        other = next(int(thread) for thread in os.listdir("/proc/%d/task" % pid) if int(thread) != pid)
        self.assertEqual(tgkill(pid, other, signal.SIGTERM), 0)       # the main thread is not woken
        self.assertEqual(bot.wait(), 0, bot.log)

    def test_the_log_tells_when_the_sidecar_goes_and_comes_back(self):
        sidecar = self.sidecar()
        bot = self.bot(SIDECAR_URL=sidecar.url)
        self.say(bot, "one")
        bot.wait_for("reporting to the sidecar at")
        sidecar.kill()
        self.say(bot, "two")
        bot.wait_for("Echo: two")
        bot.wait_for("working without a sidecar")
        again, before = self.sidecar(SIDECAR_PORT=sidecar.port), len(bot.lines)

        def tracked():
            self.say(bot, "again")
            return again.get("/metrics")[1]["total_requests"]
        until(tracked)
        bot.wait_for("reporting to the sidecar", before)
        self.assertEqual([bot.log.count("reporting to the sidecar"), bot.log.count("working without a sidecar")], [2, 1])

    def test_a_crashed_workers_requests_are_given_up_when_it_starts_again(self):
        sidecar = self.sidecar()
        sidecar.post("/start-request?id=lost")
        self.bot(SIDECAR_URL=sidecar.url)
        until(lambda: sidecar.active() == 0)
        self.assertEqual(sidecar.sample("sidecar_requests_expired_total"), 1)

    def test_while_the_sidecar_drains_nothing_is_taken(self):
        sidecar = self.sidecar(GRACE_PERIOD_SECONDS=1)
        bot = self.bot(SIDECAR_URL=sidecar.url)
        self.say(bot, "before")
        bot.wait_for("Echo: before")
        until(lambda: sidecar.sample("sidecar_request_duration_seconds_count") == 1)
        sidecar.post("/start-request?id=other")
        drain = threading.Thread(target=sidecar.get, args=("/drain",), daemon=True)
        drain.start()
        sidecar.wait_for("drain started")
        self.say(bot, "in hand", "afterwards")
        bot.wait_for("Echo: in hand")
        bot.wait_for("the sidecar is draining")
        self.assertNotIn("Echo: afterwards", bot.log)
        bot.wait_for("Echo: afterwards")                # the drain was undone: no SIGTERM came
        sidecar.wait_for("serving again")
        drain.join(PATIENCE)

    def test_replies_keep_telegrams_limits(self):
        from echo_bot import reply_to
        chat = {"update_id": 1, "message": {"message_id": 5, "chat": {"id": -7}}}

        def echo(text):
            chat["message"]["text"] = text
            method, params = reply_to(chat)
            self.assertEqual((method, params["chat_id"], params["reply_parameters"]["message_id"]), ("sendMessage", -7, 5))
            return params["text"]

        self.assertEqual(echo("hi"), "Echo: hi")
        self.assertEqual(echo("x" * 4090), "Echo: " + "x" * 4090)
        self.assertEqual(echo("x" * 4091), "Echo: " + "x" * 4090)
        self.assertEqual(echo("👋" * 4096), "Echo: " + "👋" * 2045)
        self.assertEqual(echo("x" + "👋" * 4096), "Echo: x" + "👋" * 2044)
        method, params = reply_to({"callback_query": {"id": "9", "data": "é" * 300}})
        self.assertEqual((method, params), ("answerCallbackQuery", {"callback_query_id": "9",
                                                                    "text": "Received: " + "é" * 190}))
        for update in ({"edited_message": {"text": "x"}}, {"message": {"message_id": 1, "chat": {"id": 1}, "sticker": {}}},
                       {"update_id": 7}, {"a_kind_of_the_future": {"text": "x"}}):
            self.assertIsNone(reply_to(update))


def readme_blocks(language):
    """Return the README's code blocks of a language, in their order."""
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        return re.findall(r"^```%s\n(.*?)^```$" % language, file.read(), re.DOTALL | re.MULTILINE)


def version_of(command):
    """Return the first two numbers that `command` prints of its version; (0, 0) where it is missing."""
    try:
        text = subprocess.run(command, stdout=subprocess.PIPE).stdout.decode()
    except OSError:
        return 0, 0
    return tuple(int(number) for number in re.search(r"(\d+)\.(\d+)", text).groups())


class ScriptedSidecar(http.server.ThreadingHTTPServer):
    """Stands in for a sidecar that does what a real one cannot be made to do.

    It tells every POST that it is `draining` or not, and closes the connection of every GET instead of answering; of
    every POST too while it is `away`.
    """

    class RequestHandlerClass(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self):
            super().setup()
            self.server.connections += 1

        def log_message(self, *args):
            pass

        def do_POST(self):
            if self.server.away:
                self.close_connection = True
                return
            with self.server.changed:
                self.server.posts.append(self.path)
                self.server.changed.notify_all()
            body = json.dumps({"active_requests": 1, "draining": self.server.draining}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.close_connection = True
            with self.server.changed:
                self.server.gets += 1
                self.server.changed.notify_all()

    def __init__(self):
        super().__init__(("127.0.0.1", 0), self.RequestHandlerClass)
        self.draining = self.away = False
        self.changed, self.posts, self.gets, self.connections = threading.Condition(), [], 0, 0
        self.url = "http://127.0.0.1:%d" % self.server_port
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def wait_until(self, condition):
        with self.changed:
            if not self.changed.wait_for(condition, PATIENCE):
                raise AssertionError("posts: %s, gets: %d" % (self.posts, self.gets))

    def close(self):
        self.shutdown()
        self.server_close()


class Clients:
    """What each client in the README must do. A language adds how its blocks become a program, and its own handler.

    Every program reads its messages from standard input, a line each, and ends with status 0 at the end of it. "work"
    takes 60 ms; "hold" lasts until the next line; "throw" throws an error. It prints "took ..." and "did ...".
    """
    DONE = ["took work b", "did work b", "took work c", "did work c"]

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp()
        try:
            cls.argv = cls.build()
        except BaseException:
            shutil.rmtree(cls.folder)
            raise

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.folder)

    @classmethod
    def write(cls, name, text):
        path = os.path.join(cls.folder, name)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        return path

    def worker(self, url):
        return self.program(*self.argv, stdin=subprocess.PIPE, cwd=self.folder,
                            env={"SIDECAR_URL": url, "PYTHONPATH": HERE})

    def tell(self, worker, *lines):
        """Hand the worker messages."""
        worker.process.stdin.write("".join(line + "\n" for line in lines).encode())
        worker.process.stdin.flush()

    def finish(self, worker):
        """End the worker's input; return its exit status."""
        worker.process.stdin.close()
        return worker.wait()

    def test_messages_are_counted_with_the_duration_of_their_work(self):
        sidecar = self.sidecar(LOG_LEVEL="DEBUG")
        worker = self.worker(sidecar.url)
        self.tell(worker, "hold a")
        worker.wait_for("took hold a")
        self.assertEqual(sidecar.get("/metrics")[1]["active_requests"], 1)
        self.tell(worker, "release", "work b", "work c")
        self.assertEqual(self.finish(worker), 0, worker.log)
        self.assertEqual(self.work(worker), ["took hold a", "did hold a"] + self.DONE)
        self.assertEqual(sidecar.sample("sidecar_active_requests"), 0)
        self.assertEqual(sidecar.sample("sidecar_requests_total"), 3)
        self.assertEqual(sidecar.sample("sidecar_unmatched_ends_total"), 0)
        self.assertEqual(sidecar.sample("sidecar_request_duration_seconds_count"), 3)
        self.assertGreaterEqual(sidecar.sample("sidecar_request_duration_seconds_sum"), 2 * 0.06)
        self.assertLess(sidecar.sample("sidecar_request_duration_seconds_sum"), 4 * PATIENCE)
        self.assertEqual(len(re.findall("path=/end-request .*duration=.*status=200", sidecar.log)), 3, sidecar.log)

    def test_two_workers_never_share_an_id(self):
        sidecar = self.sidecar()
        workers = [self.worker(sidecar.url) for _ in range(2)]
        for worker in workers:
            self.tell(worker, "work")
            worker.wait_for("did work")         # both have done their reset
        for worker in workers:
            self.tell(worker, "hold")
            worker.wait_for("took hold")
        self.assertEqual(len({request["request_id"] for request in sidecar.get("/requests")[1]}), 2)
        for worker in workers:
            self.tell(worker, "release")
            self.assertEqual(self.finish(worker), 0, worker.log)
        self.assertEqual(sidecar.get("/metrics")[1]["active_requests"], 0)

    def test_a_handler_that_throws_is_ended_and_its_error_goes_on(self):
        sidecar = self.sidecar()
        worker = self.worker(sidecar.url)
        self.tell(worker, "throw the towel")
        self.assertNotEqual(self.finish(worker), 0)
        self.assertIn("cannot throw the towel", worker.log)
        self.assertEqual(sidecar.sample("sidecar_requests_total"), 1)
        self.assertEqual(sidecar.sample("sidecar_active_requests"), 0)
        self.assertEqual(sidecar.sample("sidecar_request_duration_seconds_count"), 1)
        self.assertGreaterEqual(sidecar.sample("sidecar_request_duration_seconds_sum"), 0.06)

    def work(self, worker):
        """Return what the worker printed of its messages, without what a client logs."""
        return [line for line in worker.lines if line.startswith(("took ", "did "))]

    def test_a_worker_that_was_killed_leaves_no_count_once_it_is_back(self):
        sidecar = self.sidecar()
        worker = self.worker(sidecar.url)
        self.tell(worker, "hold a")
        worker.wait_for("took hold a")
        worker.kill()
        self.assertEqual(sidecar.active(), 1)
        worker = self.worker(sidecar.url)
        self.assertEqual(self.finish(worker), 0, worker.log)
        self.assertEqual(sidecar.active(), 0)

    def check_all_work_is_done(self, url):
        worker = self.worker(url)
        self.tell(worker, "work b", "work c")
        self.assertEqual(self.finish(worker), 0, worker.log)
        self.assertEqual(self.work(worker), self.DONE)

    def test_an_absent_sidecar_does_not_stop_the_work(self):
        with socket.socket() as taken:          # bound, so that nobody else gets the port; not listening
            taken.bind(("127.0.0.1", 0))
            self.check_all_work_is_done("http://127.0.0.1:%d" % taken.getsockname()[1])

    def test_a_sidecar_that_hangs_does_not_stop_the_work(self):
        with socket.socket() as deaf:           # the kernel accepts the connections, nobody ever answers
            deaf.bind(("127.0.0.1", 0))
            deaf.listen(50)
            self.check_all_work_is_done("http://127.0.0.1:%d" % deaf.getsockname()[1])

    def test_a_sidecar_that_went_away_does_not_stop_the_work(self):
        sidecar = self.sidecar()
        worker = self.worker(sidecar.url)
        self.tell(worker, "work a")
        worker.wait_for("did work a")
        sidecar.kill()
        self.tell(worker, "work b", "work c")
        self.assertEqual(self.finish(worker), 0, worker.log)
        self.assertEqual(self.work(worker)[2:], self.DONE)

    def test_the_loop_takes_nothing_while_the_sidecar_drains(self):
        sidecar = self.sidecar(LOG_LEVEL="DEBUG", GRACE_PERIOD_SECONDS=10 * PATIENCE)
        worker = self.worker(sidecar.url)
        self.tell(worker, "hold a")
        worker.wait_for("took hold a")
        drain = threading.Thread(target=sidecar.get, args=("/drain",))
        drain.start()
        sidecar.wait_for("drain started")
        self.tell(worker, "release", "work b")
        worker.wait_for("did hold a")
        drain.join(PATIENCE)
        before = len(sidecar.lines)
        for _ in range(2):      # the worker asks whether it may go on, again and again, and takes nothing
            sidecar.wait_for("path=/ready", after=before)
            before = len(sidecar.lines)
        self.assertNotIn("took work b", worker.log)
        sidecar.post("/start-request")          # brings the sidecar back to serving
        worker.wait_for("did work b")
        self.assertEqual(self.finish(worker), 0, worker.log)

    def test_a_connection_is_used_again(self):
        sidecar = ScriptedSidecar()
        self.addCleanup(sidecar.close)
        worker = self.worker(sidecar.url)
        self.tell(worker, *["work"] * 5)
        self.assertEqual(self.finish(worker), 0, worker.log)
        self.assertEqual(len([path for path in sidecar.posts if "-request" in path]), 10)
        self.assertLess(sidecar.connections, 5)

    def test_the_loop_takes_nothing_when_a_draining_sidecar_has_gone(self):
        sidecar = ScriptedSidecar()
        self.addCleanup(sidecar.close)
        worker = self.worker(sidecar.url)
        self.tell(worker, "hold a")
        worker.wait_for("took hold a")
        sidecar.draining = True
        self.tell(worker, "release", "work b")
        sidecar.wait_until(lambda: sidecar.gets >= 3)       # more often than a client repeats a call that failed
        worker.signal(signal.SIGTERM)
        self.assertEqual(worker.wait(), 0, worker.log)
        self.assertEqual(self.work(worker), ["took hold a", "did hold a"])

    def test_sigterm_lets_the_work_in_hand_end(self):
        sidecar = self.sidecar()
        worker = self.worker(sidecar.url)
        self.tell(worker, "hold a")
        worker.wait_for("took hold a")
        worker.signal(signal.SIGTERM)
        self.tell(worker, "release")
        self.assertEqual(worker.wait(), 0, worker.log)
        self.assertEqual(self.work(worker), ["took hold a", "did hold a"])
        self.assertEqual(sidecar.get("/metrics")[1]["active_requests"], 0)


class TestPythonClient(Clients, Case):
    @classmethod
    def build(cls):
        loop, = readme_blocks("python")
        return sys.executable, cls.write("worker.py", """
import sys
import time

def next_message():
    return sys.stdin.readline().strip() or sys.exit(0)

def handle(message):
    print("took", message)
    if message.startswith("hold"):
        sys.stdin.readline()
    else:
        time.sleep(0.06)
    if message.startswith("throw"):
        raise ValueError("cannot " + message)
    print("did", message)

""" + loop)


@needs("Go 1.19", version_of(["go", "version"]) >= (1, 19))
class TestGoClient(Clients, Case):
    @classmethod
    def build(cls):
        client, loop = readme_blocks("go")
        cls.write("go.mod", "module worker\n\ngo 1.19\n")
        cls.write("sidecar.go", client)
        cls.write("main.go", """package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

var lines = make(chan string)

func read() {
	for input := bufio.NewScanner(os.Stdin); input.Scan(); {
		lines <- input.Text()
	}
	close(lines)
}

func nextMessage(term context.Context) (string, bool) {
	select {
	case line, open := <-lines:
		if !open {
			os.Exit(0)
		}
		return line, true
	case <-term.Done():
		return "", false
	}
}

func handle(message string) error {
	fmt.Println("took", message)
	if strings.HasPrefix(message, "hold") {
		<-lines
	} else {
		time.Sleep(60 * time.Millisecond)
	}
	switch {
	case strings.HasPrefix(message, "throw"):
		panic("cannot " + message)
	case strings.HasPrefix(message, "fail"):
		return errors.New("cannot " + message)
	}
	fmt.Println("did", message)
	return nil
}

func main() {
	go read()
""" + loop + "}\n")
        for command in (["go", "vet", "."], ["go", "build", "-o", "worker", "."]):
            done = subprocess.run(command, cwd=cls.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                  env=dict(os.environ, GOFLAGS="-mod=mod", GOTOOLCHAIN="local", GOWORK="off"))
            if done.returncode:
                raise AssertionError("%s: %s" % (command, done.stdout.decode()))
        return os.path.join(cls.folder, "worker"),

    def test_a_returned_error_is_handed_on_and_the_loop_goes_on(self):
        sidecar = self.sidecar()
        worker = self.worker(sidecar.url)
        self.tell(worker, "fail early", "work b")
        self.assertEqual(self.finish(worker), 0, worker.log)
        self.assertIn("cannot fail early", worker.log)
        self.assertIn("did work b", worker.log)
        self.assertEqual(sidecar.sample("sidecar_request_duration_seconds_count"), 2)


@needs("Node.js 18", version_of(["node", "--version"]) >= (18, 0))
class TestNodeClient(Clients, Case):
    @classmethod
    def build(cls):
        client, loop = readme_blocks("js")
        cls.write("sidecar.mjs", client)
        return "node", cls.write("worker.mjs", """
import { createInterface } from "node:readline";

const input = createInterface({ input: process.stdin });
const lines = input[Symbol.asyncIterator]();
const terminated = new Promise((resolve) => process.once("SIGTERM", () => resolve({})));

async function nextMessage() {
  const { value, done } = await Promise.race([lines.next(), terminated]);
  if (done) process.exit(0);
  return value;
}

async function handle(message) {
  console.log("took", message);
  if (message.startsWith("hold")) await lines.next();
  else await new Promise((resolve) => setTimeout(resolve, 60));
  if (message.startsWith("throw")) throw new Error("cannot " + message);
  console.log("did", message);
}

""" + loop + "input.close();\n")


def utf16_units(text):
    """Return the length of a text as Telegram counts it."""
    return len(text.encode("utf-16-le")) // 2


class Refused(Exception):
    """A call that the Bot API refuses: status, description, then the response's `parameters`."""


class BotAPI(http.server.ThreadingHTTPServer):
    """A Bot API server on loopback that keeps Telegram's rules, and lets a test see and hold every stage of an update.

    The stages, each with what it is about: "polling" (offset: getUpdates came, nothing is confirmed yet), "confirmed"
    (update_id), "waiting" and "waited" (offset: a poll that found nothing), "handing" and "handed" (update_ids: just
    before and after the answer was sent), "replying" (text: the user has the reply, the bot not yet its answer),
    "replied" (text: it has).
    """
    TOKEN = "123456:AAtest-token_that-no_log-may_show"
    SLOW_DOWN_SECONDS = 0.3     # 3 at Telegram's
    BY_DEFAULT = {"message", "edited_message", "channel_post", "callback_query", "poll", "my_chat_member"}

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
        self.drop_every = 0         # of all calls, drop this one's connection, in turn before and after acting on it
        self.calls = []             # (method, monotonic time)
        self.replies = []           # (method, params) of each that reached the user
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()
        for _, _, gate in self.gates:
            gate.set()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):      # a bot that was killed is no error of the server
            super().handle_error(request, client_address)

    # What a test does and sees.

    def push(self, kind, content):
        """A user does something: queue it as an update unless the bot has asked for other kinds; return its id."""
        with self.changed:
            if kind in self.allowed:
                self.last_id += 1
                self.updates.append({"update_id": self.last_id, kind: content})
                if kind == "message" and isinstance(content, dict) and isinstance(content.get("chat"), dict):
                    self.messages.add((str(content["chat"].get("id")), content.get("message_id")))
                self.changed.notify_all()
            return self.last_id

    def say(self, text, chat=7):
        """A user sends a text message; return its update's id."""
        return self.push("message", {"message_id": 1000 + self.last_id, "date": 1700000000, "text": text,
                                     "chat": {"id": chat, "type": "private"}, "from": {"id": chat, "is_bot": False}})

    def fail(self, method, *how):
        """Let the next calls of a method fail, one each: a status, ("retry_after", seconds), "drop before", "drop after"."""
        self.failures.setdefault(method.lower(), collections.deque()).extend(how)

    def hold(self, stage, condition=lambda what: True):
        """Hold the next such stage (but "waiting" and "waited"); return the Event that lets it go on."""
        gate = threading.Event()
        self.gates.append((stage, condition, gate))
        return gate

    def wait_for(self, stage, condition=lambda what: True):
        """Wait until a stage has been reached."""
        with self.changed:
            if not self.changed.wait_for(lambda: any(name == stage and condition(what) for name, what in self.stages),
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
                timeout = max(timeout, self.SLOW_DOWN_SECONDS)      # the same question again and again
            self.last_poll = offset, now
            if offset < 0:                      # counted from the end
                offset += self.last_id + 1
            confirmed = [update["update_id"] for update in self.updates if update["update_id"] < offset]
            self.updates = self.updates[len(confirmed):]
        for update_id in confirmed:
            self.reach("confirmed", update_id)
        with self.changed:
            if not self.updates and timeout:
                self.waiting = max(mine, self.waiting)      # the newest may wait, and ends the one that waits already
                self.reach("waiting", offset)
                self.changed.wait_for(lambda: self.updates or self.waiting != mine or self.webhook, timeout)
                self.reach("waited", offset)
                if self.webhook:
                    raise Refused(409, "Conflict: terminated by setWebhook request")
                if self.waiting != mine:
                    raise Refused(409, "Conflict: terminated by other getUpdates request; "
                                       "make sure that only one bot instance is running")
            handed = self.updates[:limit]
        if handed:
            self.reach("handing", [update["update_id"] for update in handed])
        return handed

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
        if reply and (chat, reply["message_id"]) not in self.messages and not reply.get("allow_sending_without_reply"):
            raise Refused(400, "Bad Request: message to be replied not found")
        return {"message_id": 5000 + len(self.replies), "date": 1700000000, "text": text, "chat": {"id": chat}}

    def answercallbackquery(self, params):
        if not params.get("callback_query_id"):
            raise Refused(400, "Bad Request: query is too old and response timeout expired or query ID is invalid")
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
        if failure == "drop before":
            return self.drop()
        if isinstance(failure, tuple):
            raise Refused(429, "Too Many Requests: retry after %d" % failure[1], {"retry_after": failure[1]})
        if failure in self.REFUSALS:
            raise Refused(failure, self.REFUSALS[failure])
        if isinstance(failure, int):
            return self.answer(failure, "<html><h1>%d Bad Gateway</h1></html>" % failure)
        if method not in ("getupdates", "sendmessage", "answercallbackquery", "getme"):
            raise Refused(404, "Not Found: method not found")
        result = getattr(api, method)(params)
        replies = method in ("sendmessage", "answercallbackquery")
        if replies:
            api.replies.append((method, params))
            api.reach("replying", params.get("text"))
        if failure == "drop after":
            return self.drop()
        self.answer(200, {"ok": True, "result": result})
        if replies:
            api.reach("replied", params.get("text"))
        elif result and method == "getupdates":
            api.reach("handed", [update["update_id"] for update in result])

    def drop(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, status, content):
        text = json.dumps(content) if isinstance(content, dict) else content
        self.send_response(status)
        self.send_header("Content-Type", "application/json" if isinstance(content, dict) else "text/html")
        self.send_header("Content-Length", str(len(text)))
        if status == 429:
            self.send_header("Retry-After", str(content["parameters"]["retry_after"]))
        self.end_headers()
        self.wfile.write(text.encode())


class TestTelegram(Case):
    def setUp(self):
        self.api = self.bot_api()
        taken = socket.socket()             # bound, so that nobody else gets the port; not listening
        self.addCleanup(taken.close)
        taken.bind(("127.0.0.1", 0))
        self.nowhere = "http://127.0.0.1:%d" % taken.getsockname()[1]

    def bot_api(self):
        api = BotAPI()
        self.addCleanup(api.close)
        return api

    def bot(self, **env):
        """Start the bot; without a sidecar, unless SIDECAR_URL says where one is."""
        settings = dict(BOT_TOKEN=self.api.TOKEN, TELEGRAM_API_URL=self.api.url, SIDECAR_URL=self.nowhere,
                        KAFKA_BROKERS=None)
        settings.update(env)
        return self.program(sys.executable, os.path.join(HERE, "echo_bot.py"), env=settings)

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
        (method, message), (other_method, press) = self.api.replies
        self.assertEqual((method, message["chat_id"], message["text"]), ("sendmessage", "7", "Echo: hello"))
        self.assertEqual(json.loads(message["reply_parameters"])["message_id"], 1000)
        self.assertEqual((other_method, press), ("answercallbackquery", {"callback_query_id": "q1", "text": "Received: yes"}))
        self.end(bot)

    def test_replies_keep_to_telegrams_limits(self):
        for text in ("x" * 4096, "\N{GRINNING FACE}" * 2048, "x" + "\N{GRINNING FACE}" * 2047):
            self.api.say(text)
        self.api.push("callback_query", {"id": "q1", "data": "\N{GRINNING FACE}" * 200, "from": {"id": 7}})
        bot = self.bot()
        self.api.wait_until_confirmed()
        self.assertEqual(len(self.api.replies), 4, bot.log)
        for (_, params), longest in zip(self.api.replies, (4096, 4096, 4096, 200)):
            self.assertLessEqual(longest - 1, utf16_units(params["text"]))      # never half of a surrogate pair
            self.assertLessEqual(utf16_units(params["text"]), longest)
        self.end(bot)

    def test_other_updates_are_acknowledged_and_broken_ones_logged(self):
        chat = {"id": 7, "type": "private"}
        self.api.allowed = {"message", "edited_message", "callback_query", "poll", "of_the_future"}
        self.api.push("edited_message", {"message_id": 1, "chat": chat, "text": "edited"})
        self.api.push("message", {"message_id": 2, "chat": chat, "sticker": {"emoji": "\N{GRINNING FACE}"}})
        self.api.push("message", {"message_id": 3, "chat": chat, "new_chat_members": [{"id": 8}]})
        self.api.push("of_the_future", {"id": 1})
        broken = [self.api.push("message", content) for content in (
            "text", [1], {"message_id": 4, "text": "no chat"}, {"message_id": 5, "chat": chat, "text": 5},
            {"message_id": 6, "chat": 7, "text": "hi"}, {"message_id": 7, "chat": {"type": "private"}, "text": "no id"})]
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
        """Stop the bot with a signal at every stage and start it again; check({text: how often users got it})."""
        for name, (stage, condition) in self.STAGES.items():
            with self.subTest(name):
                self.api = self.bot_api()
                for text in "123":
                    self.api.say(text)
                gate = self.api.hold(stage, condition)
                bot = self.bot()
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
        self.stop_at_every_stage(signal.SIGKILL, lambda answered: self.assertEqual(set(answered), set("1234")))

    def test_sigterm_answers_each_exactly_once_at_any_stage(self):
        self.stop_at_every_stage(signal.SIGTERM, lambda answered: self.assertEqual(answered, dict.fromkeys("1234", 1)))

    def test_sigterm_lets_the_update_in_hand_be_answered_and_no_other(self):
        self.api.say("1")
        self.api.say("2")
        gate = self.api.hold("replying")
        bot = self.bot()
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
                refused, again = [at for called, at in self.api.calls if called == method.lower()][:2]
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
        for method, failures in (("getUpdates", 1), ("sendMessage", 2)):    # a reply is tried once more
            with self.subTest(method):
                self.api = self.bot_api()
                self.api.fail(method, *[("retry_after", 1000 * PATIENCE)] * failures)
                self.api.say("hello")
                bot = self.bot()
                bot.wait_for(method + " failed")
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
        for token in ("SECRET", "123456:SECRET with\na line's end", "123456:SECRET/..", "123456:SECRETé"):
            bot = self.bot(BOT_TOKEN=token)
            self.assertEqual(bot.wait(), 2, bot.log)
            self.assertIn("BOT_TOKEN", bot.log)
            self.assertNotIn("SECRET", bot.log)
            self.check_log(bot)

    def test_a_second_poller_ends_it(self):
        bot = self.bot()
        self.api.wait_for("waiting")
        other = http.client.HTTPConnection("127.0.0.1", self.api.server_port, timeout=PATIENCE)
        self.addCleanup(other.close)
        other.request("GET", "/bot%s/getUpdates?timeout=50" % self.api.TOKEN)
        self.check_it_gives_up(bot, "poll", "webhook")

    def test_a_webhook_ends_it(self):
        self.api.webhook = True
        self.check_it_gives_up(self.bot(), "webhook")

    # With a sidecar.

    def test_an_update_is_counted_while_it_is_answered(self):
        sidecar = self.sidecar()
        gate = self.api.hold("replying")
        confirm = self.api.hold("polling", lambda offset: offset > 1)
        bot = self.bot(SIDECAR_URL=sidecar.url)
        self.api.say("hello")
        self.api.wait_for("replying")
        self.assertEqual(sidecar.get("/metrics")[1]["active_requests"], 1)
        gate.set()
        self.api.wait_for("polling", lambda offset: offset > 1)     # it acknowledges only what it has told the sidecar
        self.assertEqual(sidecar.get("/metrics")[1]["active_requests"], 0)
        confirm.set()
        self.end(bot)
        self.assertRegex(sidecar.prometheus(), r"(?m)^sidecar_requests_total 1$")
        self.assertRegex(sidecar.prometheus(), r"(?m)^sidecar_unmatched_ends_total 0$")

    def test_a_bot_that_was_killed_leaves_no_count_once_it_is_back(self):
        sidecar = self.sidecar()
        gate = self.api.hold("replying")
        bot = self.bot(SIDECAR_URL=sidecar.url)
        self.api.say("hello")
        self.api.wait_for("replying")
        bot.kill()
        gate.set()
        self.assertEqual(sidecar.active(), 1)
        again = self.bot(SIDECAR_URL=sidecar.url)
        self.api.wait_until_confirmed()
        self.assertEqual(sidecar.active(), 0)
        self.end(again)

    def drained(self):
        """Return a sidecar that is drained, and a bot that knows it and has an update waiting."""
        sidecar = self.sidecar(LOG_LEVEL="DEBUG", GRACE_PERIOD_SECONDS=10 * PATIENCE)
        gate = self.api.hold("replying")
        self.api.say("before")
        self.api.say("after")
        bot = self.bot(SIDECAR_URL=sidecar.url)
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
        sidecar.post("/start-request")      # brings the sidecar back to serving
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
        bot = self.bot(SIDECAR_URL=sidecar.url)
        self.api.say("hello")
        self.api.wait_for("replying")
        sidecar.away = True
        gate.set()
        self.api.wait_until_confirmed()
        self.assertEqual([path for path in sidecar.posts if "/end-request" in path], [])
        sidecar.away = False
        started, = re.findall("/start-request.*id=([^&,']+)", str(sidecar.posts))
        sidecar.wait_until(lambda: any(re.search("/end-request.*id=" + started, path) for path in sidecar.posts))
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
        bot = self.bot(SIDECAR_URL=sidecar.url)

        def said():         # after one more update
            self.api.say("hello")
            self.api.wait_until_confirmed()
            return re.findall("working without a sidecar|reporting to the sidecar", bot.log)

        for number, away in enumerate((True, False, True), 1):
            sidecar.away = away
            until(lambda: len(said()) >= number)    # it leaves one that was absent alone for a while
            for _ in range(5):
                said()
        self.assertEqual(said(), ["working without a sidecar", "reporting to the sidecar", "working without a sidecar"])
        self.end(bot)


CHROMIUM = shutil.which("chromium")
PROMETHEUS = shutil.which("prometheus") and shutil.which("promtool")
PROMETHEUS_CLIENT = importlib.util.find_spec("prometheus_client")
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def samples(text):
    """Return {sample with its labels: value} of an exposition."""
    return {name: float(value) for name, value in re.findall(r"^([a-z_]+(?:\{.*\})?) (\S+)$", text, re.MULTILINE)}


class TestPage(Case):
    """GET / on SIDECAR_PORT, as it is sent."""

    def front(self, accept):
        """Return (headers, body) of the answer to GET /."""
        answers = self.sidecar().answers(b"GET / HTTP/1.1\r\nAccept: %s\r\nConnection: close\r\n\r\n" % accept)
        status, headers, body = answers[0]
        self.assertEqual((status, len(answers)), (200, 1))
        return headers, body

    def test_a_browser_gets_a_page_below_5_kb(self):
        headers, body = self.front(b"text/html,application/xhtml+xml,*/*;q=0.8")
        self.assertEqual(headers["content-type"], "text/html; charset=utf-8")
        head = sum(len("%s: %s\r\n" % header) for header in headers.items())
        self.assertLess(head + len(body.encode()), 5 * 1024)
        self.assertNotRegex(body, r"(?i)https?:|\bsrc=|\bhref=|@import|url\(|innerHTML|\son[a-z]+=|\sstyle=")

    def test_its_policy_allows_its_own_script_and_style_and_nothing_else(self):
        headers, body = self.front(b"text/html")
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        for tag in ("script", "style"):
            (text,) = re.findall("<%s>(.*?)</%s>" % (tag, tag), body, re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            self.assertEqual(policy.pop(tag + "-src"), "'sha256-%s'" % digest)
        self.assertEqual(policy.pop("connect-src"), "'self'")
        self.assertEqual(policy, dict.fromkeys(("default-src", "base-uri", "form-action", "frame-ancestors"), "'none'"))

    def test_curl_gets_the_list_of_endpoints(self):
        headers, body = self.front(b"*/*")
        self.assertEqual(headers["content-type"], "text/plain; charset=utf-8")
        for path in "/start-request /end-request /reset /metrics /requests /health /ready /drain".split():
            self.assertIn(" %s " % path, body)
        self.assertNotIn("Variables", body)


class Browser:
    """A headless Chromium, asked over its DevTools pipe: JSON texts, each ended by a NUL byte.

    https://chromedevtools.github.io/devtools-protocol/
    """

    FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --disable-dev-shm-usage --no-first-run "
             "--disable-sync --disable-background-networking --disable-component-update --remote-debugging-pipe")

    def __init__(self):
        self.folder = tempfile.mkdtemp()
        # Chromium reads from descriptor 3 and writes to 4; the shell makes them of its own input and output.
        self.process = subprocess.Popen(
            ["sh", "-c", 'exec "$0" "$@" 3<&0 4>&1 </dev/null >/dev/null', CHROMIUM, "--user-data-dir=" + self.folder]
            + self.FLAGS.split(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True)
        self.unread, self.sent, self.events = b"", 0, []
        self.tab = self.session = None

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def ask(self, method, **params):
        """Return the result of a DevTools command. The events that come before it are added to `events`."""
        self.sent += 1
        message = dict({"id": self.sent, "method": method, "params": params},
                       **{"sessionId": self.session} if self.session else {})
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        self.process.stdin.flush()
        while True:
            message = self.receive()
            if message.get("id") == self.sent:
                if "error" in message:
                    raise AssertionError("%s: %s" % (method, message["error"]))
                return message["result"]
            self.events.append(message)

    def receive(self):
        while b"\0" not in self.unread:
            if not select.select([self.process.stdout], [], [], PATIENCE)[0]:
                raise AssertionError("the browser does not answer")
            piece = os.read(self.process.stdout.fileno(), 65536)
            if not piece:
                raise AssertionError("the browser has crashed")
            self.unread += piece
        text, _, self.unread = self.unread.partition(b"\0")
        return json.loads(text.decode())

    def open(self, url):
        """Load a page in a new tab, which takes the place of the one before."""
        before, self.session = self.tab, None
        self.tab = self.ask("Target.createTarget", url="about:blank")["targetId"]
        if before:
            self.ask("Target.closeTarget", targetId=before)
        self.session = self.ask("Target.attachToTarget", targetId=self.tab, flatten=True)["sessionId"]
        self.events = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(domain + ".enable")
        self.ask("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())

    def run(self, script):
        """Return the value of JavaScript in the page; a promise is waited for."""
        answer = self.ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise AssertionError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def text(self, selector):
        return self.run("document.querySelector(%s).innerText" % json.dumps(selector))

    def style(self, selector, name):
        return self.run("getComputedStyle(document.querySelector(%s))[%s]" % (json.dumps(selector), json.dumps(name)))


@needs("Chromium", CHROMIUM)
class TestBrowser(Case):
    """The page in a real browser."""

    @classmethod
    def setUpClass(cls):
        cls.browser = Browser()

    @classmethod
    def tearDownClass(cls):
        cls.browser.kill()

    def open(self, **env):
        """Return a new sidecar, whose page the browser shows."""
        sidecar = self.sidecar(**env)
        self.browser.open(sidecar.url + "/")
        self.wait_for("#phase", "serving")
        return sidecar

    def wait_for(self, selector, pattern):
        """Return the match of `pattern` in the text of an element, as soon as it is there."""
        return until(lambda: re.search(pattern, self.browser.text(selector)), "%s ~ %r" % (selector, pattern))

    def assert_quiet(self, sidecar):
        """Check that the console is empty, and that nothing was asked of anyone but the sidecar."""
        self.browser.run("0")               # the events until now are received
        said = [event["params"] for event in self.browser.events
                if event["method"] in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")]
        self.assertEqual(said, [])
        asked = {event["params"]["request"]["url"] for event in self.browser.events
                 if event["method"] == "Network.requestWillBeSent"}
        self.assertEqual(asked, {sidecar.url + path for path in ("/", "/metrics", "/requests")})

    def test_a_started_request_is_seen_within_two_seconds(self):
        sidecar = self.open()
        for count in range(1, 6):           # a machine may be slow for a moment, but not each time
            sidecar.post("/start-request?id=job-%d" % count)
            started = time.monotonic()
            self.wait_for("#active", "^%d$" % count)
            if time.monotonic() - started < 2:
                break
        else:
            self.fail("a started request was never seen within two seconds")
        self.assertRegex(self.browser.text("#longest tr"), r"^job-1\s+\d+\.\d s$")
        self.assertRegex(self.browser.text("#figures"), r"started\s+%d\b" % count)
        self.assert_quiet(sidecar)

    def test_the_chart_moves(self):
        sidecar = self.open()

        def path(pattern):
            script = "document.querySelector('path').getAttribute('d')"
            return until(lambda: re.match(pattern, self.browser.run(script)), "a chart ~ %r" % pattern)

        first = float(path(r"M([\d.]+) 100V100").group(1))
        sidecar.post("/start-request?id=a")
        sidecar.post("/start-request?id=b")
        path(r".*V0H")                      # up to the top
        self.wait_for("#peak", "^peak 2$")
        sidecar.post("/end-request?id=a")
        path(r".*V0H.*V50H")                # and half-way down again
        sidecar.post("/end-request?id=b")
        last = float(path(r"M([\d.]+) .*V50H.*V100").group(1))
        self.assertLess(last, first - 2)    # and to the left meanwhile
        self.assert_quiet(sidecar)

    def test_a_drain_is_seen_with_its_countdown(self):
        sidecar = self.open(GRACE_PERIOD_SECONDS=4 * PATIENCE)
        for name in "ab":
            sidecar.post("/start-request?id=" + name)
        self.wait_for("#active", "^2$")
        hue = self.browser.style("#active", "color")
        sidecar.signal(signal.SIGTERM)
        self.wait_for("#phase", r"^draining: 2 of 2 to go, \d+ s left$")
        self.assertNotEqual(self.browser.style("#active", "color"), hue)
        sidecar.post("/end-request?id=a")
        left = int(self.wait_for("#phase", r"^draining: 1 of 2 to go, (\d+) s left$").group(1))
        fewer = tuple(" %d s left" % seconds for seconds in range(left))
        until(lambda: self.browser.text("#phase").endswith(fewer), "less than %d s left" % left)
        share = float(re.match(r"([\d.]+)% 2px$", self.browser.style("header", "backgroundSize")).group(1))
        self.assertTrue(0 < share < 100, share)
        self.assert_quiet(sidecar)
        sidecar.post("/end-request?id=b")
        self.assertEqual(sidecar.wait(), 0)
        self.wait_for("#phase", r"^gone: no answer since \d")

    def test_it_says_when_the_sidecar_is_gone_and_comes_back_with_it(self):
        sidecar = self.open()
        sidecar.post("/start-request?id=a")
        self.wait_for("#active", "^1$")
        sidecar.signal(signal.SIGSTOP)                      # it accepts, and never answers
        self.wait_for("#phase", "^gone: no answer since ")
        sidecar.signal(signal.SIGCONT)
        self.wait_for("#phase", "^serving$")
        self.assertEqual(self.browser.text("#active"), "1")
        sidecar.kill()
        self.wait_for("#phase", "^gone: no answer since ")
        self.assertEqual(self.browser.text("#active"), "1")     # the last that was known
        self.sidecar(SIDECAR_PORT=sidecar.port)
        self.wait_for("#phase", "^serving$")
        self.assertEqual(self.browser.text("#active"), "0")
        self.assertEqual(self.browser.run("document.querySelector('#longest').rows.length"), 0)

    def test_an_id_is_shown_as_text(self):
        sidecar = self.open()
        name = "<b>bold</b><img src=x onerror=alert(1)>"
        sidecar.post("/start-request?id=" + urllib.parse.quote(name))
        until(lambda: self.browser.run("document.querySelectorAll('#longest td').length") == 2)
        self.assertEqual(self.browser.text("#longest td"), name)
        self.assertEqual(self.browser.run("document.querySelectorAll('b, img').length"), 0)
        self.assert_quiet(sidecar)

    def test_the_ten_oldest_of_many(self):
        sidecar = self.open()
        sidecar.answers(b"POST /start-request HTTP/1.1\r\n\r\n" * 1233 + b"POST /start-request HTTP/1.0\r\n\r\n")
        self.wait_for("#active", r"^1.?234$")
        oldest = [request["request_id"] for request in sidecar.get("/requests")[1][:10]]
        shown = "Array.from(document.querySelector('#longest').rows, row => row.cells[0].textContent)"
        self.assertEqual(self.browser.run(shown), oldest)
        sidecar.post("/reset")
        self.wait_for("#active", "^0$")
        self.assertEqual(self.browser.run(shown), [])
        self.assertRegex(self.browser.text("#figures"), r"given up\s+1.?234\b")
        self.assert_quiet(sidecar)

    def test_what_has_not_changed_is_not_touched(self):
        sidecar = self.open()
        sidecar.post("/start-request?id=a")
        self.wait_for("#longest", "a")
        self.browser.run("""window.changes = []; window.ticks = 0;
            new MutationObserver(found => {
                for (const change of found) if (change.type === "childList") changes.push(change.target.outerHTML);
                if (found.some(change => change.target.matches("path"))) ticks++;
            }).observe(document.body, { subtree: true, childList: true, attributes: true });""")
        until(lambda: self.browser.run("ticks") >= 2)
        changed = [html for html in self.browser.run("changes") if not re.match(r"<td>[\d.]+ s</td>$", html)]
        self.assertEqual(changed, [])       # but for the age, that is

    def test_its_policy_is_in_force(self):
        sidecar = self.open()
        self.assert_quiet(sidecar)
        violation = """new Promise(done => {
            const tell = event => done(event.effectiveDirective);
            document.addEventListener("securitypolicyviolation", tell, { once: true });
            %s })"""
        for directive, script in (
                ("img-src", "document.body.append(Object.assign(new Image(), { src: '/health' }))"),
                ("script-src-elem", "const script = document.createElement('script'); "
                                    "script.textContent = 'window.hit = 1'; document.body.append(script)"),
                ("style-src-attr", "document.body.setAttribute('style', 'color: red')"),
                ("connect-src", "fetch('http://127.0.0.1:%d/metrics').catch(() => 0)" % sidecar.metrics_port)):
            self.assertEqual(self.browser.run(violation % script), directive)
        self.assertIsNone(self.browser.run("window.hit"))

    def test_it_follows_the_colour_scheme_and_fits_a_phone(self):
        sidecar = self.open()
        sidecar.post("/start-request?id=" + "W" * 128)
        self.wait_for("#longest", "W" * 128)
        self.browser.ask("Emulation.setDeviceMetricsOverride", width=320, height=640, deviceScaleFactor=2,
                         mobile=True)
        self.assertLessEqual(self.browser.run("document.documentElement.scrollWidth"), 320)
        paper = {}
        for scheme in ("light", "dark"):
            self.browser.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            paper[scheme] = luminance(self.browser.style("body", "backgroundColor"))
            for selector in ("body", "#phase", "#active", "td + td"):
                darker, lighter = sorted((luminance(self.browser.style(selector, "color")), paper[scheme]))
                self.assertGreaterEqual((lighter + 0.05) / (darker + 0.05), 4.5, (scheme, selector))
        self.assertLess(paper["dark"], 0.1)
        self.assertGreater(paper["light"], 0.9)
        self.assert_quiet(sidecar)


def luminance(color):
    """Return the luminance of "rgb(R, G, B)", from 0 to 1 (https://www.w3.org/TR/WCAG21/#dfn-relative-luminance)."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


class TestScrapes(Case):
    """Each scrape is of one moment."""

    def test_scrapes_add_up_while_requests_come_and_go(self):
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        with open(os.path.join(folder, "sitecustomize.py"), "w") as file:       # its threads take turns all the time
            file.write("import sys; sys.setswitchinterval(1e-6)")
        sidecar = self.sidecar(PYTHONPATH=folder)
        over = threading.Event()

        def work(number):
            """Start and end requests, many in one piece. Each takes a quarter of a second, it says: sums are exact."""
            paths = ("/start-request", "/start-request?id=%d" % number,
                     "/end-request?duration=250ms", "/end-request?duration=250ms&id=%d" % number)
            batch = "".join("POST %s HTTP/1.1\r\n\r\n" % path for path in paths).encode() * 25
            with sidecar.raw(b"") as connection, connection.makefile("rb") as answers:
                while not over.is_set():
                    connection.sendall(batch)
                    for _ in range(100):
                        next(line for line in answers if line.startswith(b"HTTP/1.1 200"))

        def scrape():
            connection = http.client.HTTPConnection(sidecar.host, sidecar.metrics_port, timeout=PATIENCE)
            self.addCleanup(connection.close)
            before, seen = {}, set()
            for turn in range(1500):
                connection.request("GET", "/metrics", headers={"Accept": OPENMETRICS if turn % 2 else ""})
                values = samples(connection.getresponse().read().decode())
                ended = values["sidecar_request_duration_seconds_count"]
                self.assertEqual(values["sidecar_requests_total"], values["sidecar_active_requests"] + ended)
                self.assertEqual(values["sidecar_request_duration_seconds_sum"], ended / 4)
                for name, value in values.items():
                    if name.startswith("sidecar_request_duration_seconds_bucket"):
                        bound = float(re.search('le="(.*)"', name).group(1))
                        self.assertEqual(value, ended if bound >= 0.25 else 0, name)
                    if re.search("_(total|count|sum|bucket)", name):
                        self.assertGreaterEqual(value, before.get(name, 0), name)
                before = values
                seen.add((values["sidecar_active_requests"], ended))
            return seen

        def play(number):
            try:
                return work(number) if number else scrape()
            finally:
                over.set()

        seen = in_threads(4, play)[0]
        self.assertGreater(len({active for active, _ in seen}), 2)      # or nothing went on meanwhile
        self.assertGreater(len(seen), 30)

    def test_what_was_given_up_adds_up_too(self):
        sidecar = self.sidecar()
        for path in ("/start-request?id=a", "/start-request", "/end-request?id=a", "/reset", "/start-request"):
            sidecar.post(path)
        values = samples(sidecar.prometheus())
        self.assertEqual([values["sidecar_" + name] for name in (
            "requests_total", "active_requests", "request_duration_seconds_count", "requests_expired_total")],
            [3, 1, 1, 1])


@needs("prometheus_client", PROMETHEUS_CLIENT)
class TestPrometheusClient(Case):
    """The reference parsers read what is exposed, and read the same."""

    def check(self, parse, accept):
        sidecar = self.sidecar()
        durations = (0.001, 0.005, 0.2, 3, 1000)
        for seconds in durations:
            sidecar.post("/start-request")
            sidecar.post("/end-request?duration=%s" % seconds)
        sidecar.post("/start-request")
        sidecar.post("/end-request?id=none")
        text = sidecar.prometheus(accept)
        families = {family.name: family for family in parse(text)}
        read = {}
        for family in families.values():
            self.assertTrue(family.documentation, family.name)
            self.assertNotEqual(family.type, "unknown", family.name)
            for sample in family.samples:
                labels = ",".join('%s="%s"' % pair for pair in sample.labels.items())
                read[sample.name + ("{%s}" % labels if labels else "")] = sample.value
                self.assertEqual((sample.timestamp, sample.exemplar), (None, None))
        self.assertEqual(read, samples(text))
        self.assertEqual(len(read), sum(not line.startswith("#") for line in text.splitlines()))
        self.assertEqual(families["sidecar_requests"].type, "counter")
        self.assertEqual([read["sidecar_" + name] for name in (
            "requests_total", "active_requests", "unmatched_ends_total", "request_duration_seconds_count",
            'request_duration_seconds_bucket{le="0.25"}')], [6, 1, 1, 5, 3])
        self.assertAlmostEqual(read["sidecar_request_duration_seconds_sum"], sum(durations))
        return families

    def test_text(self):
        from prometheus_client.parser import text_string_to_metric_families as parse
        families = self.check(parse, "text/plain")
        self.assertEqual(families["sidecar_info"].type, "gauge")

    def test_openmetrics(self):
        from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse
        families = self.check(parse, OPENMETRICS)
        self.assertEqual(families["sidecar"].type, "info")


@needs("Prometheus", PROMETHEUS)
class TestPrometheusServer(Case):
    """A real Prometheus scrapes a real sidecar: as OpenMetrics, and as text by way of a relay that asks for that."""

    def setUp(self):
        self.watched = self.sidecar()
        case = self

        class Relay(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                text = case.watched.prometheus("text/plain").encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def handle(self):
                try:
                    super().handle()
                except OSError:                 # nobody to relay from: the scrape has failed
                    pass

            def log_message(self, *args):
                pass

        relay = http.server.HTTPServer(("127.0.0.1", 0), Relay)
        self.addCleanup(relay.server_close)
        self.addCleanup(relay.shutdown)
        threading.Thread(target=relay.serve_forever, args=(0.01,), daemon=True).start()
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder, ignore_errors=True)
        config = os.path.join(folder, "prometheus.yml")
        with open(config, "w") as file:
            json.dump({"global": {"scrape_interval": "500ms", "scrape_timeout": "500ms"}, "scrape_configs": [
                {"job_name": job, "static_configs": [{"targets": ["127.0.0.1:%d" % port]}]}
                for job, port in (("openmetrics", self.watched.metrics_port), ("text", relay.server_port))]}, file)
        self.prometheus = self.program("prometheus", "--config.file=" + config, "--storage.tsdb.path=" + folder,
                                       "--web.listen-address=127.0.0.1:0")
        self.port = int(self.prometheus.wait_for(r'msg="Listening on" address=127.0.0.1:(\d+)').group(1))
        self.prometheus.wait_for("Server is ready")

    def ask(self, path, **query):
        """Return the data of Prometheus's answer: https://prometheus.io/docs/prometheus/latest/querying/api/"""
        path = "/api/v1/%s?%s" % (path, urllib.parse.urlencode(query))
        status, answer = self.watched.call("GET", path, port=self.port)
        self.assertEqual((status, answer["status"]), (200, "success"), answer)
        return answer["data"]

    def wait_for(self, query, value):
        """Wait until both jobs have `value`."""
        def found():
            return {each["metric"]["job"]: float(each["value"][1]) for each in self.ask("query", query=query)["result"]}
        until(lambda: found() == {"openmetrics": value, "text": value}, "%s == %s" % (query, value))

    def test_it_scrapes_both_formats_and_sees_a_restart(self):
        self.wait_for("up", 1)
        for job, counter in (("openmetrics", "sidecar_requests"), ("text", "sidecar_requests_total")):
            metadata = self.ask("targets/metadata", match_target='{job="%s"}' % job)
            known = {each["metric"]: each["type"] for each in metadata}
            self.assertEqual(known[counter], "counter")
            self.assertEqual(known["sidecar_request_duration_seconds"], "histogram")
        for hundredths in range(1, 101):        # evenly spread, as histogram_quantile has it inside a bucket
            self.watched.post("/start-request")
            self.watched.post("/end-request?duration=%dms" % (10 * hundredths))
        self.wait_for("sidecar_request_duration_seconds_count", 100)
        for quantile in (0.1, 0.5, 0.75, 0.9, 1.0):
            estimate = "histogram_quantile(%s, sidecar_request_duration_seconds_bucket)" % quantile
            self.wait_for("round(%s, 0.000001)" % estimate, quantile)
        self.wait_for("sidecar_request_duration_seconds_sum", 50.5)
        self.wait_for("sidecar_active_requests", 0)
        self.watched.kill()
        self.wait_for("up", 0)
        self.watched = self.sidecar(METRICS_PORT=self.watched.metrics_port)
        self.watched.post("/start-request")
        self.wait_for("sidecar_active_requests", 1)
        self.wait_for("resets(sidecar_requests_total[1h])", 1)
        self.wait_for("resets(sidecar_request_duration_seconds_count[1h])", 1)

    def test_promtool_has_nothing_to_say(self):
        for path in (None, "/start-request", "/end-request?duration=1s", "/end-request", "/start-request", "/reset"):
            if path:
                self.watched.post(path)
            checked = subprocess.run(["promtool", "check", "metrics"], input=self.watched.prometheus().encode(),
                                     stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE)
            self.assertEqual((checked.returncode, checked.stdout), (0, b""))


# ---- from here on ----

KAFKA_JARS = os.path.join(CACHE, "kafka")
KAFKA_NAMES = ("KAFKA_", "BOT_", "TELEGRAM_", "SIDECAR_URL")        # what the tests' own environment may not bring in


def installed(name):
    return importlib.util.find_spec(name) is not None


def needs_kafka(thing):
    """Decorate a test of a real Apache Kafka, to which the test speaks with confluent-kafka; .ci/run installs both."""
    jars = os.path.isdir(KAFKA_JARS) and any(name.startswith("kafka_2") for name in os.listdir(KAFKA_JARS))
    return needs("Apache Kafka (jars, a JDK, confluent-kafka)",
                 jars and shutil.which("java") and installed("confluent_kafka"))(thing)


def free_ports(count):
    """Return ports for a broker, which must know them before it starts and find them free after a restart.

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
    return {"update_id": number, "message": {"message_id": number, "date": 0, "chat": {"id": chat, "type": "private"},
                                             "text": text or "m%d" % number}}


def envelope(number, chat=1, bot_id="b1", text=None):
    """Return the record with which the platform hands the bot an update."""
    return json.dumps({"bot_id": bot_id, "update": update_of(number, chat, text)}).encode()


class KafkaNode:
    """A real Kafka, broker and controller in one. `voters` of several nodes: {number: port of its controller}."""

    def __init__(self, number=1, voters=None, certificate=None, **settings):
        self.folder, self.number, self.program = tempfile.mkdtemp(), number, None
        names = ["PLAINTEXT", "PROXIED"] + (["SSL", "SASL_PLAINTEXT", "SASL_SSL"] if certificate else [])
        ports = free_ports(len(names) + 1)
        self.voters = voters or {number: ports.pop()}
        self.ports = dict(zip(names, ports))
        self.proxy = Proxy(self.ports["PROXIED"])
        listeners = ["%s://127.0.0.1:%d" % item for item in self.ports.items()]
        advertised = ["%s://localhost:%d" % (name, self.proxy.port if name == "PROXIED" else port)
                      for name, port in self.ports.items()]
        protocols = ["%s:%s" % (name, "PLAINTEXT" if name == "PROXIED" else name) for name in names]
        config = {
            "process.roles": "broker,controller", "node.id": number, "log.dirs": os.path.join(self.folder, "data"),
            "listeners": ",".join(listeners + ["CONTROLLER://127.0.0.1:%d" % self.voters[number]]),
            "advertised.listeners": ",".join(advertised), "controller.listener.names": "CONTROLLER",
            "listener.security.protocol.map": ",".join(protocols + ["CONTROLLER:PLAINTEXT"]),
            "inter.broker.listener.name": "PLAINTEXT",
            "controller.quorum.voters": ",".join("%d@127.0.0.1:%d" % voter for voter in self.voters.items()),
            "offsets.topic.num.partitions": 3, "offsets.topic.replication.factor": len(self.voters),
            "transaction.state.log.num.partitions": 1, "transaction.state.log.min.isr": 1,
            "transaction.state.log.replication.factor": len(self.voters), "group.initial.rebalance.delay.ms": 300,
            "group.coordinator.append.linger.ms": 0}     # its 5 ms a commit are the most of a run's time
        if certificate:
            config.update({
                "ssl.keystore.type": "PEM", "ssl.keystore.location": certificate,
                "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512",
                "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
                "super.users": "User:ANONYMOUS", "allow.everyone.if.no.acl.found": "true"})
            for name in ("sasl_plaintext", "sasl_ssl"):
                for mechanism, module in (("plain", 'plain.PlainLoginModule required user_bot="PASSWORD-1"'),
                                          ("scram-sha-256", "scram.ScramLoginModule required"),
                                          ("scram-sha-512", "scram.ScramLoginModule required")):
                    config["listener.name.%s.%s.sasl.jaas.config" % (name, mechanism)] = \
                        "org.apache.kafka.common.security.%s;" % module
        config.update(settings)
        self.config = os.path.join(self.folder, "server.properties")
        with open(self.config, "w") as file:
            file.write("".join("%s=%s\n" % item for item in config.items()))
        self.run("kafka.tools.StorageTool", "format", "--cluster-id", "c2lkZWNhcnRlc3RrYWZrYQ", "--config", self.config,
                 "--add-scram", "SCRAM-SHA-256=[name=bot,password=PASSWORD-1]",
                 "--add-scram", "SCRAM-SHA-512=[name=bot,password=PASSWORD-1]")
        self.start()

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
    """Wait until all nodes of a cluster are up."""
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient
    admin = AdminClient({"bootstrap.servers": ",".join(node.address for node in nodes), "log_level": 0})

    def up():
        for node in nodes:
            if node.program.process.poll() is not None:
                raise AssertionError("Kafka has ended:\n" + node.program.log)
        try:
            return len(admin.list_topics(timeout=2).brokers) == len(nodes)
        except KafkaException:
            return False
    until(up, "Kafka is up")


def report(case, sent, replies, seconds):
    """Print a line of the table of runs, which is what people want to know of a bot that is said to lose nothing."""
    answered = len(replies.texts)
    print("\n%s: sent %d, answered %d, twice %d, lost %d, %.1f s" % (
        case.id().rsplit(".", 1)[1], sent, answered, sum(replies.texts.values()) - answered, sent - answered, seconds),
        file=sys.stderr)


class Proxy:
    """A TCP proxy before a broker. `spoil`, where set, gets each piece of an answer and returns what to pass on; where
    that is shorter, the connection is cut after it."""

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
            requests = threading.Thread(target=self._pass, args=(client, broker, False), daemon=True)
            requests.start()
            self._pass(broker, client, True)
            requests.join()

    def _pass(self, source, sink, answers):
        try:
            while True:
                data = source.recv(1 << 16)
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
    """A test with brokers: `self.brokers` is their address list. Topics and groups are new in each test."""

    brokers, nodes = None, ()

    @classmethod
    def use(cls, *nodes):
        """Keep these brokers for the tests of the class, from when they serve until its last test is over."""
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
        return Producer(dict({"bootstrap.servers": self.brokers, "enable.idempotence": True, "log_level": 0},
                             **settings))

    def admin(self):
        from confluent_kafka.admin import AdminClient
        return AdminClient({"bootstrap.servers": self.brokers, "log_level": 0})

    def consumer(self, group=None, **settings):
        from confluent_kafka import Consumer
        consumer = Consumer(dict({
            "bootstrap.servers": self.brokers, "group.id": group or "reader-" + self.name, "log_level": 0,
            "auto.offset.reset": "earliest", "enable.auto.commit": False}, **settings))
        self.addCleanup(consumer.close)
        return consumer

    def topics(self, replicas=1, **partitions):
        """Create topics: in=6 creates self.incoming with 6 partitions."""
        from confluent_kafka.admin import NewTopic
        names = {"incoming": self.incoming, "outgoing": self.outgoing}
        admin = self.admin()        # its end would be the end of what it does
        for future in admin.create_topics([
                NewTopic(names.get(name, name), count, replicas) for name, count in partitions.items()]).values():
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

    def bot(self, **env):
        clean = {name: None for name in os.environ if name.startswith(KAFKA_NAMES)}
        settings = dict(clean, KAFKA_BROKERS=self.brokers, KAFKA_INCOMING_TOPIC=self.incoming, BOT_ID="b1",
                        KAFKA_OUTGOING_TOPIC=self.outgoing, KAFKA_CONSUMER_GROUP=self.group, BOT_TOKEN="123:TEST-TOKEN")
        settings.update(env)
        return self.program(sys.executable, os.path.join(HERE, "echo_bot.py"), env=settings)

    def source(self, **env):
        """Return a Kafka source of echo_bot.py inside the test, and the object that stops it."""
        import echo_bot

        class Stopping:
            requested = False

            def sleep(self, seconds):
                time.sleep(seconds)
        settings = dict(KAFKA_BROKERS=self.brokers, KAFKA_INCOMING_TOPIC=self.incoming, BOT_TOKEN="123:TEST-TOKEN",
                        KAFKA_OUTGOING_TOPIC=self.outgoing, KAFKA_CONSUMER_GROUP=self.group)
        settings.update(env)
        stopping = Stopping()
        source = echo_bot.Kafka(settings, stopping)
        self.addCleanup(source.close)
        return source, stopping

    def end(self, *bots):
        """SIGTERM bots, which have to end with status 0 and to have kept the token to themselves."""
        for bot in bots:
            bot.signal(signal.SIGTERM)
        for bot in bots:
            self.assertEqual(bot.wait(), 0, bot.log)
            self.assertNotIn("TEST-TOKEN", bot.log)
            self.assertNotIn("Traceback", bot.log)

    def lag(self, partitions, group=None):
        """Return how far a group's committed offsets are behind the ends of the incoming topic, as KEDA sees it."""
        from confluent_kafka import TopicPartition
        consumer = self.consumer(group or self.group)
        parts = [TopicPartition(self.incoming, index) for index in range(partitions)]
        return sum(consumer.get_watermark_offsets(part, timeout=PATIENCE)[1] - max(part.offset, 0)
                   for part in consumer.committed(parts, timeout=PATIENCE))


class Replies:
    """What is in a topic, read from its start by librdkafka as it comes: each record, and how often each text came."""

    def __init__(self, case, topic=None):
        from confluent_kafka import OFFSET_BEGINNING, TopicPartition
        self.consumer, self.records, self.texts = case.consumer(), [], collections.Counter()
        topic = topic or case.outgoing
        indexes = until(lambda: self.consumer.list_topics(topic, timeout=PATIENCE).topics[topic].partitions, topic)
        self.consumer.assign([TopicPartition(topic, index, OFFSET_BEGINNING) for index in indexes])
        self.next_offsets = dict.fromkeys(indexes, 0)

    def read(self, count, tick=lambda: None):
        """Read until there are `count` different texts, with tick() now and then; PATIENCE is for each to come."""
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
        until(lambda: not self.read_some() and all(self.next_offsets[index] >= end for index, end in ends.items()),
              "the end of the replies")
        return self

    def read_some(self):
        """Read what has come; return how many records."""
        records = [record for record in self.consumer.consume(500, timeout=0.2) if not record.error()]
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
        import echo_bot
        cls.bot = echo_bot

    def test_checksum(self):
        for data, crc in ((b"", 0), (b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43)):
            self.assertEqual(self.bot.crc32c(data), crc)        # RFC 3720, B.4

    def test_partitioner(self):
        for key, number in ((b"21", -973932308), (b"foobar", -790332482), (b"a-little-bit-long-string", -985981536),
                            (b"a-little-bit-longer-string", -1486304829), (b"abc", 479470107), (b"", 275646681),
                            (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971)):
            self.assertEqual(self.bot.murmur2(key), number & 0x7FFFFFFF)

    def test_assignor(self):
        shares = self.bot.assign_ranges({"b": ["t"], "a": ["t"], "c": ["t", "u"], "d": ["v"]}, {"t": 7, "u": 2, "v": 0})
        self.assertEqual(shares, {"a": {"t": [0, 1, 2]}, "b": {"t": [3, 4]}, "c": {"t": [5, 6], "u": [0, 1]},
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
        return bool(chance.getrandbits(1)) if schema == self.bot.BOOLEAN else chance.getrandbits(bits) - (1 << bits - 1)

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
        for name, (_, _, _, answer) in self.bot.APIS.items():
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
                except self.bot.KafkaError:
                    outcomes["error"] += 1
        self.assertGreater(outcomes["error"], 1000)

    def batch(self, records, base=0, attributes=0, producer=-1, data=None, count=None):
        """Return a record batch of (key, value) records, each with a header; `data` takes their place."""
        body = b"".join(self.bot.varint(len(record)) + record for record in (
            b"\0\0" + self.bot.varint(delta) + b"".join(b"\x01" if part is None else self.bot.varint(len(part)) + part
                                                     for part in record) + b"\x02\x02h\x01"
            for delta, record in enumerate(records)))
        body = body if data is None else data
        checked = struct.pack(">hiqqqhii", attributes, len(records) - 1, 0, 0, producer, 0, 0,
                              len(records) if count is None else count) + body
        return struct.pack(">qiibI", base, len(checked) + 9, 0, 2, self.bot.crc32c(checked)) + checked

    def read(self, data, aborted=()):
        aborted = [dict(producer_id=producer, first_offset=offset) for producer, offset in aborted]
        return list(self.bot.decode_batches(data, aborted, "t"))

    def test_batches(self):
        mine = self.bot.encode_batch(b"k", b"v", 7, 0, 1)
        self.assertEqual(self.read(mine), [(1, [(0, b"k", b"v")])])
        self.assertEqual(self.read(self.bot.encode_batch(None, None, -1, -1, -1)), [(1, [(0, None, None)])])
        two = self.batch([(b"a", b"1"), (None, b""), (b"", None)], base=5)
        records = [(5, b"a", b"1"), (6, None, b""), (7, b"", None)]
        self.assertEqual(self.read(two), [(8, records)])
        self.assertEqual(self.read(two + mine[:30]), [(8, records)], "the last may be cut short")
        self.assertEqual(self.read(two + mine[:-1]), [(8, records)])

    def test_transactions_in_batches(self):
        abort, commit = (b"\0\0\0\0", b"\0\0"), (b"\0\0\0\1", b"\0\0")
        log = b"".join((
            self.batch([(None, b"a0")], 0, 16, producer=1), self.batch([(None, b"b0")], 1, 16, producer=2),
            self.batch([(None, b"plain")], 2), self.batch([abort], 3, 48, producer=1),
            self.batch([(None, b"a1")], 4, 16, producer=1), self.batch([commit], 5, 48, producer=2),
            self.batch([commit], 6, 48, producer=1)))
        found = [record[2] for _, records in self.read(log, [(1, 0)]) for record in records]
        self.assertEqual(found, [b"b0", b"plain", b"a1"])
        self.assertEqual(self.read(log, [(1, 0)])[-1], (7, []))

    def test_corrupt_batches_are_errors(self):
        good, chance = self.batch([(b"key", b"value")] * 3), random.Random(3)
        for place in range(12, len(good)):
            for bit in range(8):
                data = bytearray(good)
                data[place] ^= 1 << bit
                if place >= 17:         # before the checksum lie the leader's epoch, which nobody reads, and the format
                    self.assertRaises(self.bot.KafkaError, self.read, bytes(data))
        gzip = zlib.compressobj(9, zlib.DEFLATED, 31)
        packed = gzip.compress(b"\0" * 100) + gzip.flush()
        for data in (packed[:-3], b"no gzip", b"", packed):
            self.assertRaises(self.bot.KafkaError, self.read, self.batch([(None, b"")], attributes=1, data=data))
        for _ in range(2000):           # a right checksum over rubbish
            data = bytearray(good[61:])
            data[chance.randrange(len(data))] = chance.getrandbits(8)
            try:
                self.read(self.batch([(None, b"")] * 3, data=bytes(data), count=chance.choice((3, 4, 1 << 30))))
            except self.bot.KafkaError:
                pass
            try:
                self.read(bytes(chance.getrandbits(8) for _ in range(chance.randrange(300))))
            except (self.bot.KafkaError, self.bot.ConfigError):
                pass

    def test_a_broker_must_know_the_password_too(self):
        connection = self.bot.Connection.__new__(self.bot.Connection)
        connection.name, answers = "broker:9092", []

        def call(api, request):
            nonce = request["data"].rpartition(b"r=")[2] if not answers else b""
            answers.append(challenge % nonce if not answers else b"v=bm8=")
            return {"data": answers[-1]}
        connection.call = call
        for challenge, error in ((b"r=%s-more,s=c2FsdA==,i=4096", self.bot.ConfigError), (b"%s", self.bot.KafkaError),
                                 (b"r=x%s,s=c2FsdA==,i=4096", self.bot.KafkaError),
                                 (b"r=%s-more,s=c2FsdA==,i=99999999", self.bot.KafkaError),
                                 (b"r=%s-more,s=c2FsdA==,i=1", self.bot.KafkaError)):
            self.assertRaises(error, connection._scram, "sha256", "user", "password")
            answers.clear()

    def test_settings(self):
        good = dict(KAFKA_BROKERS="a:1, [::1]:2", KAFKA_INCOMING_TOPIC="i", KAFKA_OUTGOING_TOPIC="o",
                    KAFKA_CONSUMER_GROUP="g", BOT_TOKEN="123:TEST-TOKEN")
        self.assertEqual(self.bot.kafka_settings(good).brokers, [("a", 1), ("::1", 2)])
        sasl = dict(KAFKA_SECURITY_PROTOCOL="SASL_SSL", KAFKA_SASL_USERNAME="u", KAFKA_SASL_PASSWORD="TEST-TOKEN")
        self.bot.kafka_settings(dict(good, **sasl))
        for name, env in [(name, {name: ""}) for name in good] + [
                ("KAFKA_BROKERS", {"KAFKA_BROKERS": "a"}), ("KAFKA_BROKERS", {"KAFKA_BROKERS": "a:0"}),
                ("KAFKA_BROKERS", {"KAFKA_BROKERS": "a:1,"}), ("KAFKA_BROKERS", {"KAFKA_BROKERS": "a:70000"}),
                ("KAFKA_SECURITY_PROTOCOL", {"KAFKA_SECURITY_PROTOCOL": "TLS"}),
                ("KAFKA_SASL_MECHANISM", dict(sasl, KAFKA_SASL_MECHANISM="GSSAPI")),
                ("KAFKA_SASL_PASSWORD", dict(sasl, KAFKA_SASL_PASSWORD="")),
                ("KAFKA_SSL_CAFILE", {"KAFKA_SECURITY_PROTOCOL": "SSL", "KAFKA_SSL_CAFILE": "/nowhere"})]:
            with self.assertRaises(self.bot.ConfigError, msg=name) as caught:
                self.bot.kafka_settings(dict(good, **env))
            self.assertIn(name, str(caught.exception))
            self.assertEqual(caught.exception.status, 2)
            self.assertNotIn("TEST-TOKEN", str(caught.exception))


class TestKafkaBot(Case):
    """The bot as a process, where there is no broker, or what is there is none."""

    def bot(self, port, **env):
        clean = {name: None for name in os.environ if name.startswith(KAFKA_NAMES)}
        settings = dict(clean, KAFKA_BROKERS="127.0.0.1:%d" % port, KAFKA_INCOMING_TOPIC="i", KAFKA_OUTGOING_TOPIC="o",
                        KAFKA_CONSUMER_GROUP="g", BOT_TOKEN="123:TEST-TOKEN")
        settings.update(env)
        return self.program(sys.executable, os.path.join(HERE, "echo_bot.py"), env=settings)

    def serve(self, answer):
        """Answer each connection's first request with bytes, or let it wait when there are none; return the port."""
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
        bot = self.bot(free_ports(1)[0])
        bot.wait_for("refused.*trying again")
        bot.wait_for("refused.*trying again", after=len(bot.lines))
        bot.signal(signal.SIGTERM)
        self.assertEqual(bot.wait(), 0)

    def test_it_heeds_sigterm_while_a_broker_is_silent(self):
        port, connections = self.serve(b"")
        bot = self.bot(port)
        until(lambda: connections, "it connects")
        bot.signal(signal.SIGTERM)
        self.assertEqual(bot.wait(timeout=10), 0)       # not the 15 s that a broker has to answer

    def test_a_broker_too_old_is_named(self):
        bot = self.bot(self.serve(struct.pack(">iihihhhhhh", 22, 1, 0, 2, 0, 0, 2, 1, 0, 3))[0])
        self.assertEqual(bot.wait(), 1)
        self.assertRegex(bot.lines[-1], r"127.0.0.1:\d+ is not a Kafka from 0.11 on.*Produce version 3")

    def test_rubbish_for_an_answer_is_an_error(self):
        for answer in (b"HTTP/1.1 400 Bad Request\r\n\r\n", struct.pack(">ii", 0x7FFFFFFF, 1),
                       struct.pack(">iihi", 10, 1, 0, -9), struct.pack(">iihi", 10, 1, 0, 0x7FFFFFFF),
                       struct.pack(">iih", 6, 1, 0)):
            bot = self.bot(self.serve(answer)[0])
            bot.wait_for("trying again")
            bot.signal(signal.SIGTERM)
            self.assertEqual(bot.wait(), 0, bot.log)
            self.assertNotIn("Traceback", bot.log)


@needs("confluent-kafka", installed("confluent_kafka"))
class TestKafkaMock(KafkaCase):
    """Against librdkafka's mock cluster: three brokers, so that leaders and the coordinator are on different ones."""

    @classmethod
    def setUpClass(cls):
        from confluent_kafka import Producer
        cls.cluster = Producer({"bootstrap.servers": "mock", "test.mock.num.brokers": 3, "log_level": 0})
        brokers = until(lambda: len(cls.cluster.list_topics(timeout=PATIENCE).brokers) == 3
                             and cls.cluster.list_topics(timeout=PATIENCE).brokers, "the mock cluster")
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
        self.assertEqual(replies.texts, collections.Counter({"Echo: m%d" % number: 1 for number in range(200)}))
        reply = json.loads(replies.records[0].value())
        self.assertEqual((reply["bot_token"], reply["method"]), ("123:TEST-TOKEN", "sendMessage"))
        for record in replies.records:
            self.assertEqual(record.key().decode(), str(json.loads(record.value())["params"]["chat_id"]))


@needs_kafka
class TestKafka(KafkaCase):
    """Against a real Apache Kafka, one node in KRaft mode."""

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp()
        cls.authority = os.path.join(cls.folder, "ca.pem")
        certificate = cls.make_certificates() if shutil.which("openssl") else None
        cls.node = KafkaNode(certificate=certificate)
        cls.use(cls.node)

    @classmethod
    def tearDownClass(cls):
        super().tearDownClass()
        shutil.rmtree(cls.folder, ignore_errors=True)

    @classmethod
    def make_certificates(cls):
        """Make a CA, and a certificate of it for `localhost` alone; return its file, with the key in it."""
        def openssl(*argv):
            subprocess.run(["openssl"] + list(argv), cwd=cls.folder, check=True, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL)
        for name in ("ca", "other"):
            openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=Test " + name,
                    "-keyout", name + ".key", "-out", name + ".pem")
        with open(os.path.join(cls.folder, "names"), "w") as file:
            file.write("subjectAltName=DNS:localhost\n")
        openssl("req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-keyout", "broker.key",
                "-out", "broker.csr")
        openssl("x509", "-req", "-in", "broker.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
                "-days", "2", "-extfile", "names", "-out", "broker.crt")
        openssl("pkcs8", "-topk8", "-nocrypt", "-in", "broker.key", "-out", "broker.p8")
        path = os.path.join(cls.folder, "broker.pem")
        with open(path, "w") as file:
            for name in ("broker.p8", "broker.crt"):
                with open(os.path.join(cls.folder, name)) as part:
                    file.write(part.read())
        return path

    # -- what is read, and what is written --

    def test_messages_of_librdkafka_and_of_the_java_client_are_read(self):
        self.topics(incoming=3, outgoing=3)
        self.write([dict(key=None, value=envelope(0)), dict(key="k", value=envelope(1), headers={"a": b"1", "b": None}),
                    dict(key=b"", value=envelope(2)), dict(key="null", value=None)])
        self.write(self.updates(500, first=3), **{"compression.type": "gzip", "linger.ms": 50})
        padded = json.loads(envelope(503).decode())
        padded["update"]["padding"] = "x" * 300000      # far more than the share of a partition in a fetch
        self.write([dict(value=json.dumps(padded))])
        lines = ["source:java\tk%d\t%s" % (number, envelope(number).decode()) for number in range(504, 524)]
        lines.append("h:\tNULL\t" + envelope(524).decode())
        options = ["--bootstrap-server", self.brokers, "--topic", self.incoming, "--compression-codec", "gzip"]
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
        self.assertEqual(replies.rest().texts, collections.Counter("Echo: m%d" % number for number in range(525)))
        self.assertEqual(bot.log.count("passed over"), 1, bot.log)      # the one without a value

    def test_replies_are_read_by_java_and_lie_where_its_partitioner_puts_them(self):
        self.topics(incoming=1, outgoing=7, **{self.name + "-java": 7})
        chats = [random.randrange(-10 ** random.randint(1, 14), 10 ** random.randint(1, 14)) for _ in range(100)]
        self.write([dict(value=envelope(number, chat)) for number, chat in enumerate(chats)])
        bot = self.bot()
        replies = Replies(self).read(100)
        self.end(bot)
        with tempfile.TemporaryFile() as file:
            file.write("".join("%d\tx\n" % chat for chat in chats).encode())
            file.seek(0)
            self.node.run("org.apache.kafka.tools.ConsoleProducer", "--bootstrap-server", self.brokers, "--topic",
                          self.name + "-java", "--property", "parse.key=true", stdin=file)
        def java_reads(topic):
            log = self.node.run("org.apache.kafka.tools.consumer.ConsoleConsumer", "--bootstrap-server", self.brokers,
                                "--topic", topic, "--from-beginning", "--max-messages", "100", "--property",
                                "print.key=true", "--property", "print.partition=true")
            return sorted(match.groups() for match in re.finditer(r"^Partition:(\d+)\t(-?\d+)\t", log, re.M))
        placed = java_reads(self.name + "-java")
        self.assertEqual(len(placed), 100)
        self.assertEqual(java_reads(self.outgoing), placed)
        self.assertEqual(sorted((str(record.partition()), record.key().decode()) for record in replies.records), placed)

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
        self.assertEqual(sorted(replies.rest().texts), sorted("Echo: m%d" % n for n in range(40) if n // 10 in (1, 3)))

    def test_a_bad_record_blocks_nothing(self):
        self.topics(incoming=1, outgoing=1, **{self.name + "-dead": 1})
        bad = [b"no json", b"\xff\xfe", b"[]", b"{}", b'{"bot_id": "b1", "update": "text"}', b"[" * 100000, b"null",
               None]
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
        self.assertEqual([(record.key().decode(), record.value()) for record in dead],
                         [("k%d" % number, value) for number, value in enumerate(bad)])

    def test_an_unreadable_codec_is_named(self):
        for codec in ("snappy", "lz4"):
            self.setUp()
            self.topics(incoming=1, outgoing=1)
            self.write(self.updates(50), **{"compression.type": codec, "linger.ms": 50})
            bot = self.bot()
            self.assertEqual(bot.wait(), 1)
            self.assertRegex(bot.log, "%s has messages compressed with %s.*compression.type" % (self.incoming, codec))

    # -- the group --

    def test_a_group_with_librdkafka_and_kafka_python(self):
        self.topics(incoming=6, outgoing=6)
        shares, seen, stop, threads = {}, collections.Counter(), threading.Event(), []

        def librdkafka():
            consumer = self.consumer(self.group, **{"session.timeout.ms": 10000, "enable.auto.commit": True,
                                                    "partition.assignment.strategy": "range"})
            consumer.subscribe([self.incoming])
            while not stop.is_set():
                record = consumer.poll(0.1)
                shares["librdkafka"] = sorted(part.partition for part in consumer.assignment())
                if record and not record.error():
                    seen["librdkafka", record.value()] += 1

        def kafka_python():
            from kafka import KafkaConsumer
            consumer = KafkaConsumer(self.incoming, bootstrap_servers=self.brokers, group_id=self.group,
                                     auto_offset_reset="earliest", session_timeout_ms=10000)
            while not stop.is_set():
                for records in consumer.poll(100).values():
                    seen.update(("kafka-python", record.value) for record in records)
                shares["kafka-python"] = sorted(part.partition for part in consumer.assignment())
            consumer.close()
        bot = self.bot()
        bot.wait_for("generation")
        try:
            for run in [librdkafka] + ([kafka_python] if installed("kafka") else []):
                threads.append(threading.Thread(target=run))
                threads[-1].start()

            def shared_out():
                match = re.findall(r"partitions ([\d, ]+) of", bot.log)
                shares["bot"] = [int(index) for index in match[-1].split(", ")] if match else []
                return (len(shares) == len(threads) + 1 and all(shares.values())
                        and sorted(sum(shares.values(), [])) == list(range(6)))
            until(shared_out, "each of the three has partitions: %r" % shares)
            self.assertEqual({len(share) for share in shares.values()}, {6 // len(shares)})
            generations = bot.log.count("generation")
            replies = Replies(self)
            for first in range(0, 600, 100):
                self.write([dict(record, partition=number % 6)
                            for number, record in enumerate(self.updates(100, first=first))])
                until(lambda: replies.read_some() * 0 + len(seen) + len(replies.texts) >= first + 100,
                      "each message reaches one of them")
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

    def test_a_message_is_not_committed_when_its_partition_was_taken_away(self):
        self.topics(incoming=1, outgoing=1)
        self.write(self.updates(1))
        first, second = self.source()[0], self.source()[0]
        taken = until(first.take, "the update")
        first.member.leave()                            # as if the group had given up on the bot
        again = until(second.take, "the update, with the other")
        self.assertEqual(again.update, taken.update)
        first.reply(taken, ("sendMessage", {"chat_id": 1, "text": "late"}))
        with self.assertLogs("echo_bot", "WARNING") as logs:
            first.acknowledge(taken)
        self.assertIn("went to another bot", logs.output[0])
        self.assertEqual(self.lag(1), 1)
        second.acknowledge(again)
        self.assertEqual(self.lag(1), 0)
        with self.assertLogs("echo_bot", "WARNING") as logs:
            first.close()
        self.assertIn("was not left", logs.output[0])

    def test_an_update_in_hand_when_others_come_and_go_is_committed(self):
        self.topics(incoming=2, outgoing=1)
        self.write([dict(value=envelope(0), partition=0)])
        first = self.source()[0]
        taken = until(first.take, "the update")
        bot = self.bot()                                # it must wait for us
        until(lambda: first.member.over, "the heartbeat tells of the rebalance")
        first.acknowledge(taken)
        self.assertEqual(self.lag(2), 0)
        self.assertNotIn("generation", bot.log)
        first.take()
        bot.wait_for(r"partitions \d of")
        self.end(bot)
        until(lambda: first.take() or len(first.member.partitions) == 2, "the partitions are back")

    def test_after_close_it_joins_again_and_what_was_not_acknowledged_comes_again(self):
        self.topics(incoming=1, outgoing=1)
        self.write(self.updates(2))
        source, stopping = self.source()
        taken = until(source.take, "an update")
        source.close()
        self.assertEqual(until(source.take, "the same update").update, taken.update)
        stopping.requested = True
        source.close()
        self.assertIsNone(source.take(), "a signal has come")

    def test_a_bot_is_stopped_while_it_waits_for_the_group(self):
        self.topics(incoming=2, outgoing=1)
        self.write(self.updates(1))
        first = self.source()[0]
        taken = until(first.take, "an update")
        bot = self.bot()
        until(lambda: first.member.over, "the rebalance, which the update in hand holds up")
        bot.signal(signal.SIGTERM)
        self.assertEqual(bot.wait(), 0)
        self.assertNotIn("generation", bot.log)
        first.acknowledge(taken)
        self.assertEqual(self.lag(2), 0)

    def test_a_drain_hands_over_to_another_bot_and_is_undone(self):
        self.topics(incoming=4, outgoing=4)
        sidecar = self.sidecar(QUIET_PERIOD_SECONDS=1)      # or the drain may be over between two updates
        self.write(self.updates(3000))
        first = self.bot(SIDECAR_URL=sidecar.url)
        replies = Replies(self).read(100)
        self.assertEqual(sidecar.call("POST", "/drain")[0], 200)
        first.wait_for("left group")
        self.assertEqual(sidecar.get("/metrics")[1]["active_requests"], 0)
        done = self.lag(4)
        second = self.bot()
        replies.read(3000)
        self.assertEqual(replies.rest().texts, collections.Counter("Echo: m%d" % number for number in range(3000)))
        self.assertGreater(done, 0, "the drain came before the end")
        until(lambda: self.lag(4) == 0, "all is committed")
        self.end(first, second)

    def test_a_topic_that_comes_later_and_grows(self):
        from confluent_kafka.admin import NewPartitions
        from unittest import mock
        import echo_bot
        source = self.source()[0]
        with mock.patch.object(echo_bot, "METADATA_SECONDS", 0.5), self.assertLogs("echo_bot") as logs:
            until(lambda: source.take() or "does not exist yet" in str(logs.output), "it says what is missing")
            self.topics(incoming=1, outgoing=1)
            self.write(self.updates(1))
            source.acknowledge(until(source.take, "an update of the new topic"))
            admin = self.admin()
            admin.create_partitions([NewPartitions(self.incoming, 3)])[self.incoming].result()
            until(lambda: len(admin.list_topics(timeout=PATIENCE).topics[self.incoming].partitions) == 3, "it grows")
            self.write([dict(value=envelope(1), partition=2)])
            self.assertEqual(until(source.take, "an update of the new partition").update["update_id"], 1)

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
        self.assertEqual(set(replies.rest().texts.values()), {1}, "what was tried again counts once")

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
        taken = until(source.take, "an update")
        self.node.program.signal(signal.SIGSTOP)
        os.waitpid(self.node.program.process.pid, os.WUNTRACED)     # every thread of it has stopped
        try:
            def finish():
                source.reply(taken, ("sendMessage", {"chat_id": 1, "text": "done"}))
                source.acknowledge(taken)
            work = threading.Thread(target=finish)
            work.start()
            stopping.requested = True
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
            env.update(KAFKA_SASL_MECHANISM=mechanism, KAFKA_SASL_USERNAME="bot", KAFKA_SASL_PASSWORD=password)
        settings = dict(KAFKA_BROKERS="localhost:%d" % self.node.ports[protocol], KAFKA_SECURITY_PROTOCOL=protocol,
                        KAFKA_SSL_CAFILE=self.authority)
        settings.update(env)
        return self.bot(**settings)

    @needs("openssl", shutil.which("openssl"))
    def test_tls_and_logins(self):
        self.topics(incoming=1, outgoing=1)
        count = 0
        for protocol, mechanism in (("SSL", None), ("SASL_PLAINTEXT", "PLAIN"), ("SASL_SSL", "SCRAM-SHA-256"),
                                    ("SASL_PLAINTEXT", "SCRAM-SHA-512")):
            count += 1
            self.write(self.updates(1, first=count))
            bot = self.secure(protocol, mechanism)
            replies = Replies(self).read(count)
            until(lambda: self.lag(1) == 0, "it is committed")
            self.end(bot)
        self.assertEqual(set(replies.rest().texts.values()), {1})

    @needs("openssl", shutil.which("openssl"))
    def test_what_cannot_mend_itself_ends_with_one_line(self):
        from confluent_kafka.admin import AclBinding, AclOperation, AclPermissionType, ResourcePatternType, ResourceType
        self.topics(incoming=1, outgoing=1, **{self.name + "-secret": 1})
        admin = self.admin()
        for future in admin.create_acls([AclBinding(
                ResourceType.TOPIC, self.name + "-secret", ResourcePatternType.LITERAL, "User:bot", "*",
                AclOperation.READ, AclPermissionType.DENY)]).values():
            future.result()
        numeric = "127.0.0.1:%d" % self.node.ports["SSL"]
        bots = {
            "SASL_AUTHENTICATION_FAILED": [self.secure("SASL_SSL", mechanism, "PASSWORD-2")
                                           for mechanism in ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")],
            "CERTIFICATE_VERIFY_FAILED": [self.secure("SSL", KAFKA_SSL_CAFILE=os.path.join(self.folder, "other.pem")),
                                          self.secure("SSL", KAFKA_BROKERS=numeric)],
            "TOPIC_AUTHORIZATION_FAILED": [
                self.secure("SASL_SSL", "PLAIN", KAFKA_INCOMING_TOPIC=self.name + "-secret")],
            "KAFKA_SECURITY_PROTOCOL": [self.secure("SSL", KAFKA_SECURITY_PROTOCOL="PLAINTEXT"),
                                        self.secure("SASL_PLAINTEXT", KAFKA_SECURITY_PROTOCOL="PLAINTEXT"),
                                        self.secure("SASL_SSL", "PLAIN", KAFKA_BROKERS=self.brokers)],
            "no-such-host": [self.bot(KAFKA_BROKERS="no-such-host.invalid:9092")]}
        for words, ended in bots.items():
            for bot in ended:
                self.assertEqual(bot.wait(), 1, bot.log)
                self.assertIn(words, bot.lines[-1])
                for secret in ("TEST-TOKEN", "PASSWORD-1", "PASSWORD-2", "Traceback"):
                    self.assertNotIn(secret, bot.log)

    # -- the runs of 10,000 --

    def run_updates(self, events, count=10000, exactly_once=True):
        """Send updates over 6 partitions to three bots; events: {number of replies: function(list of running bots)}.

        Prints a line of the table; in the end every offset is committed, and each chat's replies are in order.
        """
        self.topics(incoming=6, outgoing=6)
        self.write(self.updates(count, chats=500))
        running, pending = [self.bot() for _ in range(3)], sorted(events.items())
        started, replies = time.monotonic(), Replies(self)

        def tick():
            while pending and len(replies.texts) >= pending[0][0]:
                pending.pop(0)[1](running)
        replies.read(count, tick)
        seconds = time.monotonic() - started
        until(lambda: self.lag(6) == 0, "every offset is committed")
        self.end(*running)
        replies.rest()
        report(self, count, replies, seconds)
        if exactly_once:
            self.assertEqual(set(replies.texts.values()), {1})
            chats = collections.defaultdict(list)
            for record in replies.records:
                chats[record.key()].append(int(json.loads(record.value())["params"]["text"].split("m")[1]))
            for numbers in chats.values():
                self.assertEqual(numbers, sorted(numbers), "a chat's replies are in order")

    def sigterm(self, running):
        self.end(running.pop(0))

    def sigkill(self, running):
        running.pop(0).kill()

    def start(self, running):
        running.append(self.bot())

    def restart_broker(self, running):
        self.node.stop()
        self.node.start()

    def test_run_with_a_bot_killed_one_stopped_and_one_started(self):
        self.run_updates({2000: self.sigkill, 4000: self.sigterm, 5000: self.start}, exactly_once=False)

    def test_run_with_bots_stopped_and_started(self):
        self.run_updates({1500: self.sigterm, 3000: self.start, 4500: self.start, 6000: self.sigterm,
                          7500: self.sigterm})

    def test_run_with_the_broker_restarted(self):
        self.run_updates({1500: self.sigterm, 3000: self.restart_broker, 3001: self.start, 6000: self.sigterm})


@needs_kafka
class TestKafkaCluster(KafkaCase):
    """Against three nodes of Apache Kafka, one of which dies: leaders and the coordinator move."""

    @classmethod
    def setUpClass(cls):
        voters = dict(zip((1, 2, 3), free_ports(3)))
        settings = {"broker.session.timeout.ms": 3000, "broker.heartbeat.interval.ms": 500}
        cls.use(*[KafkaNode(number, voters, **settings) for number in voters])

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

    def test_a_node_dies_and_comes_back(self):
        self.topics(replicas=3, incoming=6, outgoing=6)
        self.write(self.updates(4000))
        admin = self.admin()
        started, bots = time.monotonic(), [self.bot(), self.bot()]
        replies = Replies(self).read(500)
        group = admin.describe_consumer_groups([self.group])[self.group].result()
        victim = self.nodes[group.coordinator.id - 1]   # the coordinator, and a third of the leaders with it
        victim.program.kill()
        replies.read(2000)
        victim.start()
        replies.read(2500)
        self.end(bots.pop(0))
        replies.read(4000)
        until(lambda: self.lag(6) == 0, "all is committed")
        self.end(*bots)
        report(self, 4000, replies.rest(), time.monotonic() - started)


# ---- Manifests ------------------------------------------------------------------------------------------------------

MANIFESTS = os.path.join(HERE, "manifests")
KUSTOMIZE = ["kubectl", "kustomize"] if shutil.which("kubectl") else [os.path.join(CACHE, "bin", "kustomize"), "build"]
MANIFESTS_BUILD = shutil.which(KUSTOMIZE[0]) and importlib.util.find_spec("yaml")
VALIDATE = MANIFESTS_BUILD and importlib.util.find_spec("kubernetes_validate")
TYPES = MANIFESTS_BUILD and os.path.exists(os.path.join(CACHE, "node_modules", "@kubernetes-models", "keda"))
OPERATORS = {"keda.sh": "keda", "monitoring.coreos.com": "prometheus-operator"}     # API groups and their npm packages


def run(*argv, **options):
    """Run a command to its end and return what it printed. AssertionError with both outputs where it failed."""
    options = dict(dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE), **options)
    done = subprocess.run([str(arg) for arg in argv], **options)
    if done.returncode:
        raise AssertionError("%s: exit status %d\n%s%s" % (" ".join(map(str, argv)), done.returncode,
                                                           done.stdout.decode(), done.stderr.decode()))
    return done.stdout.decode()


def kustomize(folder="", components=()):
    """Return the objects that `kubectl apply -k manifests/folder` would send, right after the README's `cp`.

    components: the overlays to switch on first, by uncommenting their lines.
    """
    import yaml
    with tempfile.TemporaryDirectory() as copy:
        copy = os.path.join(copy, "manifests")
        shutil.copytree(MANIFESTS, copy, ignore=shutil.ignore_patterns("bot.env"))
        shutil.copy(os.path.join(copy, "bot.env.example"), os.path.join(copy, "bot.env"))
        if components:
            path = os.path.join(copy, "kustomization.yaml")
            with open(path) as file:
                text = file.read()
            for line in ("components:",) + tuple("  - overlays/" + component for component in components):
                text = re.sub("^#(?=%s)" % line, "", text, flags=re.MULTILINE)
            with open(path, "w") as file:
                file.write(text)
        return list(yaml.safe_load_all(run(*KUSTOMIZE, os.path.join(copy, folder))))


def pick(objects, kind):
    """Return the one object of a kind."""
    found, = [thing for thing in objects if thing["kind"] == kind]
    return found


def containers(objects):
    """Return {name: container} of the Deployment, init containers and ordinary ones alike."""
    spec = pick(objects, "Deployment")["spec"]["template"]["spec"]
    return {container["name"]: container for container in spec.get("initContainers", []) + spec["containers"]}


def environment(container, objects):
    """Return the variables that a container gets, those of its ConfigMaps and Secrets too."""
    sources = {(thing["kind"], thing["metadata"]["name"]): thing for thing in objects}
    values = {}
    for source in container.get("envFrom", []):
        if "configMapRef" in source:
            values.update(sources["ConfigMap", source["configMapRef"]["name"]]["data"])
        else:
            values.update((name, base64.b64decode(value).decode()) for name, value in
                          sources["Secret", source["secretRef"]["name"]]["data"].items())
    values.update((entry["name"], entry["value"]) for entry in container.get("env", []))
    return values


@needs("kubectl, or the Python package PyYAML", MANIFESTS_BUILD)
class TestManifests(Case):
    """What the manifests say, read from what kubectl builds of them."""

    OVERLAYS = ("pre-1.29", "kafka-sasl")

    def setUp(self):
        self.objects = kustomize()
        self.spec = pick(self.objects, "Deployment")["spec"]["template"]["spec"]
        self.sidecar, = self.spec["initContainers"]
        self.bot, = self.spec["containers"]

    def test_sidecar_is_native_and_starts_first(self):
        self.assertEqual(self.sidecar["restartPolicy"], "Always")
        self.assertEqual(self.sidecar["startupProbe"]["httpGet"]["path"], "/health")
        self.assertNotIn("replicas", pick(self.objects, "Deployment")["spec"], "KEDA's, and would be reset by an apply")

    def test_preStop_hook_drains(self):
        self.assertEqual(self.bot["lifecycle"]["preStop"]["exec"]["command"], ["python3", "/app/sidecar.py", "drain"])
        self.assertNotIn("lifecycle", self.sidecar)

    def test_grace_period_is_the_sum_in_the_comment(self):
        seconds = self.spec["terminationGracePeriodSeconds"]
        with open(os.path.join(MANIFESTS, "deployment.yaml")) as file:
            comment = re.search(r"# (\d+) s = (\d+) GRACE_PERIOD_SECONDS.*\n((?: +# +\+.*\n)+)", file.read())
        parts = [int(comment.group(2))] + [int(part) for part in re.findall(r"\+ +(\d+)", comment.group(3))]
        self.assertEqual(seconds, int(comment.group(1)))
        self.assertEqual(seconds, sum(parts))
        self.assertEqual(str(parts[0]), environment(self.sidecar, self.objects)["GRACE_PERIOD_SECONDS"])
        self.assertGreater(float(environment(self.sidecar, self.objects)["QUIET_PERIOD_SECONDS"]), 0)

    def test_ports_and_probes_are_the_sidecars(self):
        import sidecar
        ports = {port["name"]: port["containerPort"] for port in self.sidecar["ports"]}
        defaults = sidecar.Settings({})
        self.assertEqual(ports, {"http": defaults.port, "metrics": defaults.metrics_port})
        paths = {}
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            self.assertEqual(self.sidecar[name]["httpGet"]["port"], "http")
            paths[name] = self.sidecar[name]["httpGet"]["path"]
        self.assertEqual(paths, {"startupProbe": "/health", "readinessProbe": "/ready", "livenessProbe": "/health"})
        self.assertEqual(environment(self.bot, self.objects)["SIDECAR_URL"], "http://127.0.0.1:%d" % defaults.port)

    def test_variables_are_known_to_the_programs(self):
        for objects in self.objects, kustomize(components=self.OVERLAYS):
            for name, program in ("sidecar", "sidecar.py"), ("bot", "echo_bot.py"):
                with open(os.path.join(HERE, program), encoding="utf-8") as file:
                    text = file.read()
                for variable in environment(containers(objects)[name], objects):
                    self.assertTrue(re.search(r"\b%s\b" % variable, text), "%s: unknown to %s" % (variable, program))

    def test_token_is_in_the_secret_only(self):
        secret = pick(self.objects, "Secret")
        self.assertEqual(list(secret["data"]), ["BOT_TOKEN"])
        self.assertNotIn("envFrom", self.sidecar)
        with open(os.path.join(HERE, ".gitignore")) as file:
            self.assertIn("manifests/bot.env", file.read().splitlines())

    def test_pod_security_standard_restricted(self):
        """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted"""
        for components in (), self.OVERLAYS:
            objects = kustomize(components=components)
            spec = pick(objects, "Deployment")["spec"]["template"]["spec"]
            self.assertTrue(spec["securityContext"]["runAsNonRoot"])
            self.assertGreater(spec["securityContext"]["runAsUser"], 0)
            self.assertEqual(spec["securityContext"]["seccompProfile"], {"type": "RuntimeDefault"})
            self.assertFalse({"hostNetwork", "hostPID", "hostIPC"} & set(spec))
            for volume in spec.get("volumes", []):
                self.assertLessEqual(set(volume), {"name", "configMap", "secret", "emptyDir", "projected"})
            for container in containers(objects).values():
                self.assertEqual(container["securityContext"],
                                 {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
                                  "capabilities": {"drop": ["ALL"]}})
                self.assertFalse([port for port in container.get("ports", []) if "hostPort" in port])
                self.assertEqual(set(container["resources"]), {"requests", "limits"})
            self.assertIs(spec["automountServiceAccountToken"], False)
            self.assertIs(spec["enableServiceLinks"], False)

    def test_only_prometheus_comes_in(self):
        policy = pick(self.objects, "NetworkPolicy")["spec"]
        self.assertEqual(policy["policyTypes"], ["Ingress"])
        rule, = policy["ingress"]
        metrics, = [port["containerPort"] for port in self.sidecar["ports"] if port["name"] == "metrics"]
        self.assertEqual(rule["ports"], [{"port": metrics, "protocol": "TCP"}])
        self.assertEqual(rule["from"], [{"namespaceSelector": {"matchLabels":
                                                               {"kubernetes.io/metadata.name": "monitoring"}}}])

    def test_disruption_budget_never_blocks_a_drain(self):
        budget = pick(self.objects, "PodDisruptionBudget")["spec"]
        self.assertNotIn("minAvailable", budget)
        self.assertEqual(budget["maxUnavailable"], 1)
        self.assertEqual(budget["unhealthyPodEvictionPolicy"], "AlwaysAllow")

    def test_every_selector_finds_the_pods(self):
        template = pick(self.objects, "Deployment")["spec"]["template"]
        for selector in [pick(self.objects, kind)["spec"][name] for kind, name in (
                ("Deployment", "selector"), ("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector"))] + [
                pick(kustomize("monitoring"), "PodMonitor")["spec"]["selector"]]:
            self.assertLessEqual(set(selector["matchLabels"].items()), set(template["metadata"]["labels"].items()))

    def test_lag_alone_scales(self):
        scaled = pick(self.objects, "ScaledObject")["spec"]
        self.assertEqual(scaled["scaleTargetRef"]["name"], pick(self.objects, "Deployment")["metadata"]["name"])
        self.assertEqual((scaled["minReplicaCount"], scaled["maxReplicaCount"]), (0, 5))
        trigger, = scaled["triggers"]
        settings = trigger["metadata"]
        self.assertEqual((trigger["type"], settings["lagThreshold"], settings["offsetResetPolicy"]),
                         ("kafka", "5", "earliest"))
        source = containers(self.objects)[scaled["scaleTargetRef"]["envSourceContainerName"]]
        variables = environment(source, self.objects)
        for name, variable in settings.items():
            if name.endswith("FromEnv"):
                self.assertIn(variable, variables)

    def test_before_1_29_the_sidecar_is_an_ordinary_container_that_outwaits_the_hook(self):
        objects = kustomize(components=["pre-1.29"])
        spec = pick(objects, "Deployment")["spec"]["template"]["spec"]
        self.assertNotIn("initContainers", spec)
        sidecar, bot = spec["containers"]
        self.assertEqual(bot, dict(self.bot, envFrom=bot["envFrom"]))
        expected = dict(self.sidecar, env=sidecar["env"])
        del expected["restartPolicy"]
        self.assertEqual(sidecar, expected)
        variables = environment(sidecar, objects)
        self.assertEqual(variables["QUIET_PERIOD_SECONDS"], "5")
        self.assertEqual(dict(variables, QUIET_PERIOD_SECONDS="1"), environment(self.sidecar, self.objects))

    def test_with_sasl_KEDA_logs_in_as_the_bot_does(self):
        objects = kustomize(components=["kafka-sasl"])
        login = pick(objects, "TriggerAuthentication")
        trigger, = pick(objects, "ScaledObject")["spec"]["triggers"]
        variables = environment(containers(objects)["bot"], objects)
        self.assertEqual(trigger["authenticationRef"]["name"], login["metadata"]["name"])
        self.assertEqual(trigger["metadata"]["tls"], "enable")
        self.assertEqual(trigger["metadata"]["sasl"].replace("_", "").upper(),
                         variables["KAFKA_SASL_MECHANISM"].replace("-", ""))
        volume, = pick(objects, "Deployment")["spec"]["template"]["spec"]["volumes"]
        mount, = containers(objects)["bot"]["volumeMounts"]
        ca, = login["spec"]["secretTargetRef"]
        self.assertEqual((volume["secret"]["secretName"], os.path.join(mount["mountPath"], ca["key"])),
                         (ca["name"], variables["KAFKA_SSL_CAFILE"]))


@needs("kubectl, or the Python package kubernetes-validate", VALIDATE)
class TestKubernetesSchemas(Case):
    """The API server's published schemas, with unknown fields refused."""

    VERSIONS = {(): ("1.29", "newest"), ("kafka-sasl",): ("1.29", "newest"),
                ("pre-1.29",): ("1.26", "1.27", "1.28", "1.29", "newest")}

    def test_every_object(self):
        for components, versions in self.VERSIONS.items():
            for thing in kustomize(components=components) + kustomize("monitoring"):
                for version in versions:
                    self.validate(thing, version)

    def test_wrong_objects_are_refused(self):
        import kubernetes_validate
        for path, value in ((("spec", "template", "spec", "terminationGracePeriodSeconds"), "45s"),
                            (("spec", "template", "spec", "terminationGracePeriod"), 45),
                            (("spec", "replcas"), 1)):
            deployment = pick(kustomize(), "Deployment")
            parent = deployment
            for name in path[:-1]:
                parent = parent[name]
            parent[path[-1]] = value
            for version in "1.29", "newest":
                with self.assertRaises(kubernetes_validate.ValidationError, msg=path):
                    self.validate(deployment, version)

    def validate(self, thing, version):
        import kubernetes_validate
        if thing["apiVersion"].partition("/")[0] in OPERATORS:
            return
        version = kubernetes_validate.latest_version() if version == "newest" else version
        kubernetes_validate.validate(thing, version, strict=True)


@needs("kubectl, Node.js, or the npm packages @kubernetes-models and typescript", TYPES)
class TestOperatorTypes(Case):
    """KEDA's and the Prometheus operator's published types: TypeScript refuses unknown fields, validate() the rest."""

    def test_every_object(self):
        objects = kustomize(components=["kafka-sasl"]) + kustomize("monitoring")
        kinds = [thing["kind"] for thing in objects if self.check(thing)]
        self.assertEqual(sorted(kinds), ["PodMonitor", "PrometheusRule", "ScaledObject", "TriggerAuthentication"])

    def test_wrong_objects_are_refused(self):
        def scaled_object(change):
            thing = pick(kustomize(), "ScaledObject")
            change(thing["spec"])
            return thing

        for thing in (scaled_object(lambda spec: spec.update(minReplicas=0)),
                      scaled_object(lambda spec: spec.update(minReplicaCount="0")),
                      scaled_object(lambda spec: spec["triggers"][0]["metadata"].update(lagThreshold=5)),
                      scaled_object(lambda spec: spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
                                    ["scaleDown"].update(stabilisationWindowSeconds=1))):
            with self.assertRaises(AssertionError):
                self.check(thing)
        rule = pick(kustomize("monitoring"), "PrometheusRule")
        rule["spec"]["groups"][0]["interval"] = "5 s"
        with self.assertRaises(AssertionError):
            self.check(rule)

    def check(self, thing):
        """Return whether the object is of an operator's kind. AssertionError where the operator would refuse it."""
        group, _, version = thing["apiVersion"].partition("/")
        if group not in OPERATORS:
            return False
        kind = thing["kind"]
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:         # where node_modules is found
            path = os.path.join(folder, "thing.mts")
            with open(path, "w") as file:
                file.write("import { %s, I%s } from '@kubernetes-models/%s/%s/%s/%s';\n"
                           % (kind, kind, OPERATORS[group], group, version, kind)
                           + "const thing: I%s = %s;\nnew %s(thing).validate();\n" % (kind, json.dumps(thing), kind))
            run("node", os.path.join(CACHE, "node_modules", "typescript", "bin", "tsc"), "--strict", "--skipLibCheck",
                "--noEmitOnError", "--target", "es2022", "--module", "nodenext", path)
            run("node", os.path.join(folder, "thing.mjs"))
        return True


PROMTOOL = MANIFESTS_BUILD and shutil.which("promtool")


@needs("promtool", PROMTOOL)
class TestAlerts(Case):
    """Each alert, evaluated by promtool over a made-up past of one pod: when it is quiet, and when it fires."""

    LABELS = 'namespace="telegram-serverless", pod="bot-echo-1"'
    SCRAPE = 5          # seconds between two samples, as the PodMonitor says

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.rules = pick(kustomize("monitoring"), "PrometheusRule")["spec"]
        self.write("rules.json", {"groups": self.rules["groups"]})

    def write(self, name, thing):
        with open(os.path.join(self.folder, name), "w") as file:        # JSON is YAML
            json.dump(thing, file)
        return file.name

    def check(self, alert, series, quiet=(), firing=()):
        """series: {metric: promtool's notation of its samples}; quiet, firing: seconds at which to look."""
        def samples(at):
            return {"expr": 'count(ALERTS{alertname="%s", alertstate="firing"}) or vector(0)' % alert,
                    "eval_time": "%ds" % at, "exp_samples": [{"labels": "{}", "value": int(at in firing)}]}
        self.assertIn(alert, [rule["alert"] for group in self.rules["groups"] for rule in group["rules"]])
        run("promtool", "test", "rules", self.write("test.json", {
            "rule_files": ["rules.json"], "evaluation_interval": "%ds" % self.SCRAPE, "tests": [{
                "interval": "%ds" % self.SCRAPE,
                "input_series": [{"series": name[:-1] + ", " * (name[-2] != "{") + self.LABELS + "}", "values": values}
                                 for name, values in series.items()],
                "promql_expr_test": [samples(at) for at in sorted(set(quiet) | set(firing))]}]}))

    def test_stuck_request(self):
        grace = {"sidecar_grace_period_seconds{}": "30x60"}
        self.check("SidecarRequestStuck", dict(grace, **{"sidecar_oldest_request_age_seconds{}": "0+5x60"}),
                   quiet=[30, 80], firing=[120, 300])
        self.check("SidecarRequestStuck", dict(grace, **{"sidecar_oldest_request_age_seconds{}": "0+5x5 0+5x5 0x48"}),
                   quiet=[60, 120, 300])

    def test_drain_alert_fires_before_the_grace_period_is_over(self):
        rule, = [rule for group in self.rules["groups"] for rule in group["rules"]
                 if rule["alert"] == "SidecarDrainTimedOut"]
        grace = float(environment(containers(kustomize())["sidecar"], kustomize())["GRACE_PERIOD_SECONDS"])
        self.assertLessEqual(float(rule["for"].rstrip("s")) + self.SCRAPE, grace)

    def test_drain_that_ran_out_before_the_pod_was_gone(self):
        self.check("SidecarDrainTimedOut", {"sidecar_draining{}": "0x11 1x5 stale",
                                            "sidecar_active_requests{}": "1x17 stale",
                                            'sidecar_drains_total{outcome="timed_out"}': "0x17 stale"},
                   quiet=[60, 80, 1200], firing=[85, 300, 900])

    def test_drain_that_ran_out_and_was_counted(self):
        self.check("SidecarDrainTimedOut", {'sidecar_drains_total{outcome="timed_out"}': "0x11 1x100",
                                            'sidecar_drains_total{outcome="completed"}': "0x111"},
                   quiet=[55, 80, 1200], firing=[85, 300])

    def test_drains_that_completed(self):
        self.check("SidecarDrainTimedOut", {"sidecar_draining{}": "0x11 1x3 stale",
                                            "sidecar_active_requests{}": "1x15 stale"},
                   quiet=[60, 75, 300])
        self.check("SidecarDrainTimedOut", {"sidecar_draining{}": "0x11 1x60", "sidecar_active_requests{}": "2x13 0x58",
                                            'sidecar_drains_total{outcome="completed"}': "0x13 1x58"},
                   quiet=[60, 90, 300])

    def test_unmatched_ends(self):
        self.check("SidecarUnmatchedEnds", {"sidecar_unmatched_ends_total{}": "0x10 1x110"}, quiet=[100, 300])
        self.check("SidecarUnmatchedEnds", {"sidecar_unmatched_ends_total{}": "0x10 0+1x10 10x250"},
                   quiet=[50, 1300], firing=[100, 300])

    def test_absent_sidecar(self):
        running, up = 'kube_pod_status_phase{phase="Running", instance="10.0.0.1:8080"}', 'up{instance="10.0.0.2:9091"}'
        self.check("SidecarAbsent", {running: "1x60", up: "1x60"}, quiet=[60, 300])
        self.check("SidecarAbsent", {running: "1x60", up: "1x12 0x48"}, quiet=[60, 175], firing=[195, 300])
        self.check("SidecarAbsent", {running: "1x60"}, quiet=[60], firing=[125, 300])
        self.check("SidecarAbsent", {running: "0x60"}, quiet=[300])
        self.check("SidecarAbsent", {up: "0x60"}, quiet=[300])

    def test_every_alert_has_a_case_here(self):
        with open(os.path.abspath(__file__), encoding="utf-8") as file:
            tested = set(re.findall(r'self\.check\("(\w+)"', file.read()))
        self.assertLessEqual({rule["alert"] for group in self.rules["groups"] for rule in group["rules"]}, tested)

    def test_every_query_is_valid_and_asks_for_metrics_that_the_sidecar_has(self):
        dashboard = json.loads(pick(kustomize("monitoring"), "ConfigMap")["data"]["dashboard.json"])
        queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
        self.write("queries.json", {"groups": [{"name": "dashboard", "rules": [
            {"record": "query:%d" % number, "expr": query} for number, query in enumerate(queries)]}]})
        for name in "queries.json", "rules.json":
            run("promtool", "check", "rules", os.path.join(self.folder, name))
        exposed = set(re.findall(r"^(\w+)", self.sidecar().prometheus(), re.MULTILINE))
        alerts = [rule["expr"] for group in self.rules["groups"] for rule in group["rules"]]
        self.assertLessEqual(set(re.findall(r"\bsidecar_\w+", " ".join(queries + alerts))), exposed)
        self.assertEqual(len({panel["id"] for panel in dashboard["panels"]}), len(dashboard["panels"]))


# ---- The pod's lifecycle --------------------------------------------------------------------------------------------

class Pod:
    """A pod as the kubelet runs it, with real processes; what it does is read from the built manifest.

    Two things stand in for the node: python3 and /app are this Python and this folder, and the sidecar's ports are free
    ones of loopback, to which everything that names the manifest's ports is pointed.
    """

    def __init__(self, case, objects, worker=None, **env):
        """objects: from kustomize(); worker: a command in place of the bot's; env: more variables for the bot."""
        self.case, self.objects, self.worker, self.env = case, objects, worker, env
        self.spec = pick(objects, "Deployment")["spec"]["template"]["spec"]
        self.programs, self.ports, self.events = {}, {}, []

    def start(self):
        """Start the containers in the kubelet's order, and return self when each readiness probe has passed."""
        for container in self.spec.get("initContainers", []):
            self.case.assertEqual(container.get("restartPolicy"), "Always", "nothing else would start before its end")
            self._start(container)
            until(lambda: self.probe(container["startupProbe"]) == 200)     # only then the next container starts
        for container in self.spec["containers"]:
            self._start(container)
        for container in self._containers():
            if "readinessProbe" in container:
                until(lambda: self.probe(container["readinessProbe"]) == 200)
        return self

    def delete(self):
        """Delete the pod as the kubelet does, and return {container: exit status}.

        The preStop hooks of all containers run at once, and each container gets SIGTERM after its own; but a native
        sidecar (an init container) only when the ordinary ones are gone. terminationGracePeriodSeconds counts all of
        it; when it is over, what still runs gets SIGTERM and two seconds, and then SIGKILL. (killContainer in the
        kubelet's kuberuntime_container.go)
        """
        self.over_at = time.monotonic() + self.spec["terminationGracePeriodSeconds"]
        ordinary = [threading.Thread(target=self._stop, args=(container, [])) for container in self.spec["containers"]]
        native = [threading.Thread(target=self._stop, args=(container, ordinary))
                  for container in self.spec.get("initContainers", [])]
        for thread in ordinary + native:
            thread.start()
        for thread in ordinary + native:
            thread.join()
        return {name: program.process.returncode for name, program in self.programs.items()}

    def url(self, port):
        """Return where a port, by its name or number in the manifest, really is."""
        number, = [entry["containerPort"] for container in self._containers() for entry in container.get("ports", [])
                   if port in (entry["name"], entry["containerPort"])]
        return "http://127.0.0.1:%d" % self.ports[number]

    def probe(self, probe):
        """Return the status of an httpGet probe, as the node asks it."""
        try:
            return urllib.request.urlopen(self.url(probe["httpGet"]["port"]) + probe["httpGet"]["path"]).status
        except urllib.error.HTTPError as error:
            return error.code

    def _containers(self):
        return self.spec.get("initContainers", []) + self.spec["containers"]

    def _environment(self, container):
        env = environment(container, self.objects)
        for name, value in env.items():
            port = re.search("127.0.0.1:([0-9]+)", value)
            if port:                                            # port 1: nobody is there
                env[name] = "http://127.0.0.1:%d" % self.ports.get(int(port.group(1)), 1)
        return env

    def _command(self, command):
        return [sys.executable if part == "python3" else part.replace("/app", HERE) for part in command]

    def _start(self, container):
        command, env = self._command(container["command"]), self._environment(container)
        if container["name"] == "sidecar":
            env.update(SIDECAR_HOST="127.0.0.1", SIDECAR_PORT="0", METRICS_PORT="0")
        else:
            command, env = self.worker or command, dict(env, **self.env)
        program = self.programs[container["name"]] = self.case.program(*command, env=env, cwd=HERE)
        self.events.append(container["name"] + " started")
        if container["name"] == "sidecar":
            found = program.wait_for(r"listening.*?http://\S+?:(\d+).*?http://\S+?:(\d+)")
            numbers = [port["containerPort"] for port in container["ports"]]
            self.ports.update(zip(numbers, map(int, found.groups())))

    def _stop(self, container, others):
        name = container["name"]
        hook = container.get("lifecycle", {}).get("preStop")
        if hook:
            hook = self.case.program(*self._command(hook["exec"]["command"]), env=self._environment(container))
            if not self._ends(hook):
                hook.kill()
            self.events.append("%s's preStop hook ended" % name)
        for other in others:
            other.join(max(self.over_at - time.monotonic(), 0))
        program = self.programs[name]
        self.events.append("%s got SIGTERM" % name)
        program.signal(signal.SIGTERM)
        if not self._ends(program, at_least=2):
            program.kill()
        self.events.append("%s ended" % name)

    def _ends(self, program, at_least=0):
        """Wait for the end of a process, until the pod's grace period is over; return whether it came."""
        try:
            program.wait(max(self.over_at - time.monotonic(), at_least))
            return True
        except subprocess.TimeoutExpired:
            return False


class Queue(socketserver.ThreadingTCPServer):
    """A stream of numbers with at-least-once delivery: what a worker took and did not acknowledge is delivered again.

    A worker sends a line and gets a line: "take" gets a message, or "none"; "answer" is what the message's sender sees;
    "ack" ends the message. A connection that closes gives its message back. `last`: the number that ends the stream.
    """
    daemon_threads = True

    def __init__(self, last=None):
        self.last, self.sent, self.again = last, 0, []
        self.left, self.answers, self.changed = set(), collections.Counter(), threading.Condition()
        super().__init__(("127.0.0.1", 0), self.Worker)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def take(self):
        if self.again:
            return self.again.pop()
        if self.sent == self.last:
            return None
        self.sent += 1
        self.left.add(self.sent)
        return self.sent

    class Worker(socketserver.StreamRequestHandler):
        def handle(self):
            queue, taken = self.server, None
            try:
                for line in self.rfile:
                    with queue.changed:
                        if line == b"take\n":
                            taken = queue.take()
                        elif line == b"answer\n":
                            queue.answers[taken] += 1
                        elif line == b"ack\n":
                            queue.left.discard(taken)
                            taken = None
                        queue.changed.notify_all()
                    self.wfile.write(b"none\n" if taken is None else b"%d\n" % taken)
            except OSError:             # killed
                pass
            if taken is not None:
                with queue.changed:
                    queue.again.append(taken)

    def wait_for(self, condition):
        with self.changed:
            if not self.changed.wait_for(condition, PATIENCE):
                raise AssertionError("%d answered, %d left" % (len(self.answers), len(self.left)))


# A worker with no signal handler, and only the README's Python client. The sender sees the answer when the work begins;
# so a worker that is killed during the 300 ms after it has done work that will be done again.
QUEUE_WORKER = """
import os, socket, sys, time
from echo_bot import Sidecar

sidecar = Sidecar()
queue = socket.create_connection(("127.0.0.1", int(os.environ["QUEUE_PORT"]))).makefile("rw")

def ask(line):
    queue.write(line + "\\n")
    queue.flush()
    return queue.readline().strip()

while True:
    if sidecar.draining and not sidecar.ready():
        time.sleep(0.05)
    elif ask("take") == "none":
        time.sleep(0.05)
    else:
        time.sleep(float(os.environ.get("PAUSE", 0)))
        with sidecar.track():
            ask("answer")
            time.sleep(0.3)
            ask("ack")
"""


@needs("kubectl, or the Python package PyYAML", MANIFESTS_BUILD)
class TestLifecycle(Case):
    """What the kubelet does to a pod, played through with the manifest as it is, and with a piece taken out."""

    def setUp(self):
        self.objects = kustomize()
        self.spec = pick(self.objects, "Deployment")["spec"]["template"]["spec"]
        self.queue = None

    def pod(self, objects, last=None, **env):
        """Start a pod with the worker above, on one queue for all of the test's pods."""
        if self.queue is None:
            self.queue = Queue(last)
            self.addCleanup(self.queue.server_close)
            self.addCleanup(self.queue.shutdown)
        return Pod(self, objects, [sys.executable, "-c", QUEUE_WORKER],
                   QUEUE_PORT=self.queue.server_address[1], **env).start()

    def answered_twice(self, objects):
        """Scale 0 -> 3 -> 1 -> 0 -> 1 in the middle of the stream; return how many messages were answered twice."""
        pods = [self.pod(objects) for _ in range(3)]
        for removed in pods[:2], pods[2:]:
            answered = len(self.queue.answers) + 6
            self.queue.wait_for(lambda: len(self.queue.answers) >= answered)
            for pod in removed:
                threading.Thread(target=pod.delete, daemon=True).start()
            for pod in removed:
                pod.programs["bot"].wait()
        self.pod(objects)
        with self.queue.changed:
            self.queue.last = self.queue.sent + 6
        self.queue.wait_for(lambda: len(self.queue.answers) == self.queue.last and not self.queue.left)
        return sum(1 for count in self.queue.answers.values() if count > 1)

    def test_no_message_twice_with_the_manifest(self):
        self.assertEqual(self.answered_twice(self.objects), 0)

    def test_no_message_twice_before_1_29(self):
        self.assertEqual(self.answered_twice(kustomize(components=["pre-1.29"])), 0)

    def test_messages_twice_without_the_preStop_hook(self):
        del self.spec["containers"][0]["lifecycle"]
        self.assertGreater(self.answered_twice(self.objects), 0)

    def test_messages_twice_without_the_sidecar(self):
        del self.spec["initContainers"]
        self.assertGreater(self.answered_twice(self.objects), 0)

    def test_quiet_period_covers_a_message_that_was_taken_and_not_reported_yet(self):
        pod = self.pod(self.objects, last=1, PAUSE=0.3)
        self.queue.wait_for(lambda: self.queue.sent)
        pod.delete()
        self.assertFalse(self.queue.left)

    def test_without_quiet_period_that_message_is_cut_off(self):
        quiet_period, = [entry for entry in self.spec["initContainers"][0]["env"]
                         if entry["name"] == "QUIET_PERIOD_SECONDS"]
        quiet_period["value"] = "0"
        pod = self.pod(self.objects, last=1, PAUSE=PATIENCE)
        self.queue.wait_for(lambda: self.queue.sent)
        pod.delete()
        self.assertEqual(self.queue.left, {1})

    def test_order(self):
        pod = self.pod(self.objects, last=1)
        self.queue.wait_for(lambda: self.queue.answers)
        statuses = pod.delete()
        self.assertEqual(pod.events, [
            "sidecar started", "bot started", "bot's preStop hook ended", "bot got SIGTERM", "bot ended",
            "sidecar got SIGTERM", "sidecar ended"])
        self.assertEqual(statuses, {"sidecar": 0, "bot": -signal.SIGTERM})
        self.assertFalse(self.queue.left)

    def test_probes_while_the_pod_goes(self):
        pod = self.pod(self.objects, last=0)
        sidecar, = self.spec["initContainers"]
        urllib.request.urlopen(pod.url("http") + "/start-request", data=b"")
        removal = threading.Thread(target=pod.delete)
        removal.start()
        pod.programs["sidecar"].wait_for("drain started")
        self.assertEqual(pod.probe(sidecar["readinessProbe"]), 503)
        self.assertEqual(pod.probe(sidecar["livenessProbe"]), 200)
        self.assertIsNone(pod.programs["bot"].process.poll())
        urllib.request.urlopen(pod.url("http") + "/end-request", data=b"")
        removal.join()

    def test_request_that_never_ends(self):
        """With every second of the manifest made a tenth: the hook gives up, then the pod's own time is over."""
        self.spec["terminationGracePeriodSeconds"] /= 10
        for variable in self.spec["initContainers"][0]["env"]:
            variable["value"] = str(float(variable["value"]) / 10)
        worker = ("import signal, time; from echo_bot import Sidecar; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
                  "with Sidecar().track(): print('stuck', flush=True); time.sleep(%d)" % PATIENCE)
        pod = Pod(self, self.objects, [sys.executable, "-c", worker]).start()
        pod.programs["bot"].wait_for("stuck")
        self.assertEqual(pod.delete(), {"sidecar": 1, "bot": -signal.SIGKILL})
        self.assertLess(pod.events.index("bot's preStop hook ended"), pod.events.index("bot got SIGTERM"))
        pod.programs["sidecar"].wait_for("still active")


# ---- The image ------------------------------------------------------------------------------------------------------

BASE = "gcr.io/distroless/python3-debian12:nonroot"
PODMAN = shutil.which("podman") and not subprocess.call(["podman", "image", "exists", BASE])


@needs("podman, or the image %s," % BASE, PODMAN)
class TestImage(Case):
    """Both images, built by podman on the base, or what .ci/run puts in its place, and run locked down."""

    LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024")           # podman's own may be forbidden
    LOCKED_DOWN = ("--read-only", "--cap-drop", "ALL") + LIMITS

    @classmethod
    def setUpClass(cls):
        cls.images = {}
        for target in "sidecar", "echo-bot":
            cls.images[target] = "localhost/%s:test-%d" % (target, os.getpid())
            # Docker's format, because OCI's has no HEALTHCHECK.
            run("podman", "build", "--pull=never", "--format", "docker", "--target", target,
                "--tag", cls.images[target], HERE)
        cls.names = 0

    @classmethod
    def tearDownClass(cls):
        run("podman", "rmi", "--force", *cls.images.values())

    def container(self, *arguments, image="sidecar", network="none", **env):
        """Start a container, locked down, and return its name. network: whose it shares, as in a pod."""
        TestImage.names += 1
        name = "test-%d-%d" % (os.getpid(), self.names)
        self.addCleanup(run, "podman", "rm", "--force", "--ignore", "--time", 0, name)
        run("podman", "run", "--detach", "--name", name, "--network", network, *self.LOCKED_DOWN,
            *["--env=%s=%s" % pair for pair in env.items()], self.images[image], *arguments)
        return name

    def sidecar_container(self, *arguments, **env):
        name = self.container(*arguments, **env)
        until(lambda: "listening" in self.logs(name))
        return name

    def worker_of(self, name):
        """Start a container that shares the network of another, and return its name: the worker in the same pod."""
        return self.container("-c", "import time; time.sleep(%d)" % PATIENCE, image="echo-bot",
                              network="container:" + name)

    def ask(self, name, command):
        """Run `sidecar.py command` in a container, as an exec hook does, and return what it printed."""
        return run("podman", "exec", name, "python3", "/app/sidecar.py", command)

    def post(self, name, path):
        """Call the API from within a container."""
        run("podman", "exec", name, "python3", "-c", "import urllib.request as u; "
            "u.urlopen(u.Request('http://127.0.0.1:8081%s', method='POST'))" % path)

    def logs(self, name):
        return run("podman", "logs", name, stderr=subprocess.STDOUT)

    def inspect(self, thing, what):
        return json.loads(run("podman", "inspect", "--format", "{{json %s}}" % what, thing))

    def test_layers_are_the_copied_files(self):
        base = self.inspect(BASE, ".RootFS.Layers")
        for target, files in ("sidecar", ["sidecar.py"]), ("echo-bot", ["echo_bot.py", "sidecar.py"]):
            layers = self.inspect(self.images[target], ".RootFS.Layers")
            self.assertEqual(layers[:len(base)], base)
            self.assertEqual(len(layers) - len(base), len(files))
            listed = run("podman", "run", "--rm", "--network", "none", *self.LOCKED_DOWN, "--entrypoint", "python3",
                         self.images[target], "-c", "import os; os.chdir('/app')\n"
                         "for name in sorted(os.listdir()): print(name, oct(os.stat(name).st_mode))")
            self.assertEqual(listed.splitlines(), [name + " 0o100444" for name in files])

    def test_labels(self):
        version = run(sys.executable, os.path.join(HERE, "sidecar.py"), "--version").split()[1]
        for target, image in self.images.items():
            labels = self.inspect(image, ".Config.Labels")
            prefix = "org.opencontainers.image."
            self.assertEqual(labels[prefix + "title"], target)
            self.assertEqual(labels[prefix + "version"], version)
            self.assertEqual(labels[prefix + "base.name"], BASE)
            self.assertTrue(labels[prefix + "description"])

    def test_runs_as_nobody_with_nothing_allowed(self):
        status = run("podman", "exec", self.sidecar_container(), "python3", "-c",
                     "print(open('/proc/1/cmdline').read().replace('\\0', ' '))\n"
                     "print(*(line for line in open('/proc/1/status') if line[:3] in ('Uid', 'Gid', 'Cap')))\n"
                     "for path in '/app/x', '/home/nonroot/x', '/etc/x':\n"
                     "    try: open(path, 'w')\n"
                     "    except OSError as error: print(error.strerror)")
        self.assertEqual(status.splitlines()[0].strip(), "python3 /app/sidecar.py")
        self.assertEqual([line.split()[1] for line in status.splitlines() if ":\t" in line],
                         ["65532"] * 2 + ["0" * 16] * 5)
        self.assertEqual(status.count("Read-only file system"), 3)

    def test_health_status(self):
        name = self.sidecar_container()
        self.assertEqual(self.inspect(self.images["sidecar"], ".HealthCheck")["Test"],
                         ["CMD", "python3", "/app/sidecar.py", "health"])
        run("podman", "healthcheck", "run", name)
        self.assertEqual(self.inspect(name, ".State.Health.Status"), "healthy")
        broken = self.sidecar_container(SIDECAR_URL="http://127.0.0.1:1")
        with self.assertRaises(AssertionError):
            run("podman", "healthcheck", "run", broken)

    def test_stop_waits_for_the_open_request(self):
        name = self.sidecar_container()
        worker = self.worker_of(name)
        self.post(worker, "/start-request")
        stop = self.program("podman", "stop", "--time", PATIENCE, name)
        until(lambda: "drain started" in self.logs(name))
        with self.assertRaises(AssertionError):
            self.ask(worker, "ready")
        self.assertIn('"active_requests": 1', self.ask(worker, "metrics"))
        self.assertIsNone(stop.process.poll())
        self.post(worker, "/end-request")
        self.assertEqual(stop.wait(), 0)
        self.assertEqual(self.inspect(name, ".State.ExitCode"), 0)

    def test_stop_past_the_grace_period(self):
        name = self.sidecar_container(GRACE_PERIOD_SECONDS=1)
        self.post(name, "/start-request")
        run("podman", "stop", "--time", PATIENCE, name)
        self.assertEqual(self.inspect(name, ".State.ExitCode"), 1)
        self.assertIn("still active", self.logs(name))

    def test_echo_bot_image_runs_both(self):
        echo = run("podman", "run", "--rm", "--interactive", "--network", "none", *self.LOCKED_DOWN,
                   self.images["echo-bot"], stdin=None, input=b"hello\n")
        self.assertIn("Echo: hello", echo)
        name = self.sidecar_container("/app/sidecar.py", image="echo-bot")
        run("podman", "stop", "--time", PATIENCE, name)
        self.assertEqual(self.inspect(name, ".State.ExitCode"), 0)

    def test_readmes_docker_lines(self):
        """Each of them, in their order, with podman for docker and names of the test's own."""
        with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
            lines = re.findall(r"^docker ((?:run|exec|stop) .*)$", file.read(), re.MULTILINE)
        self.assertEqual([line.split()[0] for line in lines], ["run", "run", "exec", "stop", "run"])
        name = "test-%d-readme" % os.getpid()
        self.addCleanup(run, "podman", "rm", "--force", "--ignore", "--time", 0, name)
        for line in lines:
            line = re.sub(r"(?<=[ :])sidecar(?= |$)", name, line).replace("-it", "--interactive")
            line = re.sub(r"\b(sidecar|echo-bot):[0-9.]+", lambda match: self.images[match.group(1)], line)
            if line.startswith("run"):
                network = () if "--network" in line else ("--network", "none")
                line = " ".join(("run",) + network + self.LIMITS) + line[len("run"):]
            output = run("podman", *line.split(), stdin=None, input=b"hello\n")
            if " -d " in line:
                until(lambda: "listening" in self.logs(name))
            if "/echo-bot:" in line:
                self.assertIn("Echo: hello", output)
            elif line.endswith("metrics"):
                self.assertIn('"total_requests": 1,', output)


@needs("kubectl, or the Python package PyYAML", MANIFESTS_BUILD)
@needs_kafka
class TestLifecycleOnKafka(KafkaCase):
    """The bot of the manifest, its sidecar and a real Kafka."""

    @classmethod
    def setUpClass(cls):
        cls.use(KafkaNode())

    def test_scaled_0_3_1_0_1_in_the_stream_each_update_is_answered_once(self):
        self.topics(incoming=6, outgoing=3)
        objects = kustomize()
        settings = pick(objects, "ConfigMap")["data"]
        settings.update(BOT_ID="b1", KAFKA_BROKERS=self.brokers, KAFKA_INCOMING_TOPIC=self.incoming,
                        KAFKA_OUTGOING_TOPIC=self.outgoing, KAFKA_CONSUMER_GROUP=self.group)
        sent, over = [], threading.Event()

        def stream():
            producer = self.producer()
            while not over.wait(0.01):
                record, = self.updates(1, first=len(sent))
                producer.produce(self.incoming, **record)
                sent.append(record)
            producer.flush(PATIENCE)

        streaming = threading.Thread(target=stream, daemon=True)
        streaming.start()
        self.addCleanup(over.set)
        replies = Replies(self)
        pods = in_threads(3, lambda number: Pod(self, objects).start())
        for removed in pods[:2], pods[2:]:
            replies.read(len(replies.texts) + 200)
            for statuses in in_threads(len(removed), lambda number: removed[number].delete()):
                self.assertEqual(statuses, {"sidecar": 0, "bot": 0})
        Pod(self, objects).start()
        over.set()
        streaming.join()
        replies.read(len(sent)).rest()
        self.assertEqual(replies.texts, collections.Counter("Echo: m%d" % number for number in range(len(sent))))
        until(lambda: self.lag(6) == 0, "every offset is committed")


# How much of the long tests is run: 1 is the number that stands in them. .ci/run sets it for its last run.
SCALE = float(os.environ.get("SIDECAR_TEST_SCALE", "0.1"))

WORKER = r"""
import os, signal, sys
def say(text):
    os.write(1, text.encode() + b"\n")      # in one piece, for the sidecar's log goes to the same pipe
def tell(number, frame):
    say("got " + signal.Signals(number).name)
    if number == signal.SIGTERM and "stubborn" not in sys.argv:
        sys.exit(3)
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}:
    signal.signal(number, tell)
say("worker is up %s" % os.environ.get("SIDECAR_URL"))
while True:
    signal.pause()
"""


def child_of(pid):
    """Return the first child of a process, as soon as there is one."""
    def first():
        with open("/proc/%d/task/%d/children" % (pid, pid)) as file:
            return int((file.read().split() or [0])[0])
    return until(first, "a child of %d" % pid)


class TestRun(Case):
    """python sidecar.py run -- COMMAND"""

    def worker(self, *argv, **env):
        """Return a sidecar that runs WORKER, which is up."""
        sidecar = self.sidecar("run", "--", sys.executable, "-c", WORKER, *argv, **env)
        sidecar.wait_for("worker is up")
        self.addCleanup(self.end_worker, sidecar)
        return sidecar

    @staticmethod
    def end_worker(sidecar):
        if sidecar.process.poll() is None:
            os.kill(child_of(sidecar.process.pid), signal.SIGKILL)
            sidecar.wait()

    def done(self, *command, **options):
        """Run a command under the sidecar to its end; return (status, output, errors)."""
        env = dict(os.environ, SIDECAR_HOST="127.0.0.1", SIDECAR_PORT="0", METRICS_PORT="0")
        options = dict(dict(env=env, timeout=PATIENCE, stdout=subprocess.PIPE, stderr=subprocess.PIPE), **options)
        run = subprocess.run([sys.executable, os.path.join(HERE, "sidecar.py"), "run", "--"] + list(command), **options)
        return run.returncode, (run.stdout or b"").decode(), (run.stderr or b"").decode()

    def test_the_worker_hears_of_sigterm_when_the_drain_is_over(self):
        sidecar = self.worker()
        self.assertEqual(sidecar.wait_for("worker is up (.*)").group(1), sidecar.url)
        sidecar.post("/start-request?id=a")
        sidecar.signal(signal.SIGTERM)
        sidecar.wait_for("drain started")
        self.assertEqual(sidecar.post("/start-request?id=b")[1]["draining"], True)
        for name in "ab":
            self.assertNotIn("got ", sidecar.log)
            self.assertEqual(sidecar.post("/end-request?id=" + name)[0], 200)
        self.assertEqual(sidecar.wait(), 3)
        sidecar.wait_for("drain completed")
        self.assertEqual(sidecar.log.count("got "), 1)

    @unittest.skipUnless(hasattr(os, "sched_getaffinity"), "only Linux has CPU affinities")
    def test_the_sidecar_keeps_to_one_cpu_and_leaves_the_worker_all_of_them(self):
        sidecar = self.worker()
        sidecar.get("/health")                              # there is a thread of a connection as well
        pid = sidecar.process.pid
        cpus = {cpu for thread in os.listdir("/proc/%d/task" % pid) for cpu in os.sched_getaffinity(int(thread))}
        self.assertEqual(len(cpus), 1)
        self.assertEqual(os.sched_getaffinity(child_of(pid)), os.sched_getaffinity(0))

    def test_sigint_does_the_same_and_is_passed_on_as_such(self):
        sidecar = self.worker()
        sidecar.signal(signal.SIGINT)
        sidecar.wait_for("got SIGINT")
        sidecar.wait_for("drain completed")
        self.assertIsNone(sidecar.process.poll())
        sidecar.signal(signal.SIGTERM)                      # a second one
        self.assertEqual(sidecar.wait(), 3)

    def test_a_second_signal_is_passed_on_at_once(self):
        sidecar = self.worker(GRACE_PERIOD_SECONDS="1h")
        sidecar.post("/start-request?id=a")
        sidecar.signal(signal.SIGTERM)
        sidecar.wait_for("drain started")
        sidecar.signal(signal.SIGTERM)
        self.assertEqual(sidecar.wait(), 3)
        sidecar.wait_for("request given up request_id=a age_seconds=")

    def test_it_is_killed_when_the_grace_period_is_over(self):
        sidecar = self.worker("stubborn", GRACE_PERIOD_SECONDS=0.3, constants={"LINGER_SECONDS": 0.1})
        sidecar.signal(signal.SIGTERM)
        self.assertEqual(sidecar.wait(), 128 + signal.SIGKILL)
        sidecar.wait_for("got SIGTERM")

    def test_after_a_drain_that_ran_out_the_worker_has_a_moment(self):
        sidecar = self.worker(GRACE_PERIOD_SECONDS=0.1, constants={"LINGER_SECONDS": PATIENCE})
        sidecar.post("/start-request?id=a")
        sidecar.signal(signal.SIGTERM)
        self.assertEqual(sidecar.wait(), 3)
        sidecar.wait_for("still active request_id=a")
        sidecar.wait_for("request given up request_id=a")

    def test_when_the_worker_ends_so_does_the_sidecar_and_tells_what_was_in_flight(self):
        sidecar = self.worker(GRACE_PERIOD_SECONDS="1h")
        for name in "ab":
            sidecar.post("/start-request?id=" + name)
        waiting = []
        caller = threading.Thread(target=lambda: waiting.append(sidecar.get("/drain")), daemon=True)
        caller.start()
        sidecar.wait_for("drain started")
        os.kill(child_of(sidecar.process.pid), signal.SIGKILL)
        self.assertEqual(sidecar.wait(), 128 + signal.SIGKILL)
        for name in "ab":
            sidecar.wait_for("request given up request_id=%s age_seconds=" % name)
        sidecar.wait_for("worker ended status=137")
        caller.join(PATIENCE)
        self.assertEqual(len(waiting), 1)                   # whoever waited for a drain got an answer

    def test_other_signals_are_passed_on_at_once(self):
        sidecar = self.worker()
        sidecar.post("/start-request")
        for name in ("HUP", "QUIT", "USR1", "USR2", "WINCH", "CONT", "ALRM", "URG", "IO", "PWR", "RTMIN", "RTMAX"):
            sidecar.signal(getattr(signal, "SIG" + name))
            sidecar.wait_for("got SIG(%s|%s)$" % (name, "POLL" if name == "IO" else name))
        self.assertEqual(sidecar.active(), 1)
        self.assertEqual(sidecar.get("/ready")[0], 200)

    def test_exit_statuses(self):
        for script, expected in (("exit 0", 0), ("exit 7", 7), ("exit 255", 255), ("kill -9 $$", 137), ("kill -15 $$", 143)):
            self.assertEqual(self.done("sh", "-c", script)[0], expected, script)

    def test_a_command_that_cannot_be_run_is_one_line(self):
        with tempfile.TemporaryDirectory() as folder:
            script = os.path.join(folder, "script")
            with open(script, "w") as file:
                file.write("no program\n")
            for mode, command, expected in ((0o644, script, 126), (0o755, script, 126), (0o755, folder, 126),
                                            (0o755, "no-such-command", 127), (0o755, script + "/x", 127),
                                            (0o755, folder + "/no-such-command", 127)):
                os.chmod(script, mode)
                status, output, errors = self.done(command)
                self.assertEqual((status, output, errors.count("\n")), (expected, "", 1), errors)
                self.assertIn(command, errors)

    def test_without_a_command_it_is_one_line_and_2(self):
        for argv in (["run"], ["run", "--"], ["run", "true"]):
            run = subprocess.run([sys.executable, os.path.join(HERE, "sidecar.py")] + argv, stderr=subprocess.PIPE, timeout=PATIENCE)
            self.assertEqual((run.returncode, run.stderr.count(b"\n")), (2, 1), argv)

    def test_what_the_worker_inherits(self):
        """Standard input, output and errors, other descriptors, signal mask and dispositions: as without the sidecar."""
        with tempfile.TemporaryFile() as file:
            os.set_inheritable(file.fileno(), True)
            script = ("read line; echo out $line; echo err >&2; ls -l /proc/self/fd | sed 's/.*[0-9][0-9]:[0-9][0-9] //' | "
                      "grep -c tmp; exec grep -E '^Sig(Blk|Ign|Cgt)' /proc/self/status")
            options = dict(input=b"in\n", close_fds=False)
            plain = subprocess.run([shutil.which("sh"), "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=PATIENCE, **options)
            status, output, errors = self.done("sh", "-c", script, **options)
        self.assertEqual((status, output), (0, plain.stdout.decode()))
        self.assertIn("err\n", errors)
        descriptors = self.done(sys.executable, "-c", "import os; print(len(os.listdir('/proc/self/fd')))")[1]
        self.assertEqual(descriptors, "4\n")                # three, and the one of listdir: no socket of the sidecar's

    def test_a_parent_that_ignored_sigchld(self):
        """Such a disposition is inherited, and the kernel then tells nobody how a child ended."""
        ignoring = "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
        run = subprocess.run([sys.executable, "-c", ignoring, sys.executable, os.path.join(HERE, "sidecar.py"), "run", "--",
                              "sh", "-c", "exit 7"], env=dict(os.environ, SIDECAR_PORT="0", METRICS_PORT="0"),
                             stderr=subprocess.DEVNULL, timeout=PATIENCE)
        self.assertEqual(run.returncode, 7)

    def test_at_a_terminal_the_worker_gets_each_key_once(self):
        """Ctrl-C, and what else a terminal sends to all of its foreground processes."""
        pid, terminal = pty.fork()
        if pid == 0:
            os.environ.update(SIDECAR_PORT="0", METRICS_PORT="0", GRACE_PERIOD_SECONDS="1h")
            os.execv(sys.executable, [sys.executable, os.path.join(HERE, "sidecar.py"), "run", "--", sys.executable, "-c", WORKER])
        shown = b""

        def read():
            self.assertTrue(select.select([terminal], [], [], PATIENCE)[0], shown)
            return os.read(terminal, 4096)

        try:
            for press, expected in ((lambda: None, b"listening"), (lambda: None, b"worker is up"),
                                    (lambda: os.write(terminal, b"\x03"), b"got SIGINT"),
                                    (lambda: os.write(terminal, b"\x1c"), b"got SIGQUIT"),
                                    (lambda: fcntl.ioctl(terminal, 0x5414, struct.pack("HHHH", 7, 7, 7, 7)), b"got SIGWINCH")):
                press()                                     # Ctrl-C, Ctrl-\\, another size of the window (TIOCSWINSZ)
                while expected not in shown:
                    shown += read()
            os.kill(pid, signal.SIGTERM)                    # no terminal's, so it drains and passes it on
            while True:
                try:
                    shown += read()
                except OSError:                             # the terminal's way to say that all have closed it
                    break
        finally:
            os.close(terminal)
            os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
        self.assertEqual(os.WEXITSTATUS(status), 3, shown)
        self.assertEqual([shown.count(b"got " + name) for name in (b"SIGINT", b"SIGQUIT", b"SIGWINCH", b"SIGTERM")], [1] * 4)
        self.assertEqual([shown.count(b"signal passed on"), shown.count(b"drain completed")], [1, 1], shown)

    def test_nothing_wakes_up_while_idle(self):
        for sidecar in (self.sidecar(), self.worker()):
            sidecar.post("/start-request")
            folder = "/proc/%d/task" % sidecar.process.pid

            def switches():
                told = {}
                for task in os.listdir(folder):
                    try:
                        with open("%s/%s/status" % (folder, task)) as file:
                            told[task] = int(file.read().rpartition("\nvoluntary_ctxt_switches:")[2].split()[0])
                    except OSError:                         # the thread of the call above ends
                        told[task] = None
                return told

            def unchanged():
                before = switches()
                time.sleep(1.5)                             # nothing to wait for: it is nothing that should happen
                return before == switches()
            until(unchanged, "an idle while")

    def under(self, init, *command):
        """Return a process that runs `command` under `init`, which is PID 1 of a namespace."""
        return self.program("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *(tuple(init) + command),
                            env={"SIDECAR_HOST": "127.0.0.1", "SIDECAR_PORT": 0, "METRICS_PORT": 0})

    INITS = {"sidecar": (sys.executable, os.path.join(HERE, "sidecar.py"), "run", "--"), "tini": ("tini", "--"),
             "dumb-init": ("dumb-init", "--")}
    LEAVE_ORPHANS = r"""
import os, sys, time
for _ in range(int(sys.argv[1])):
    if os.fork() == 0:
        if os.fork():
            os._exit(0)                                     # the grandchild is an orphan now, of PID 1
        os._exit(0)
    os.wait()
def left():
    return len(set(filter(str.isdigit, os.listdir("/proc"))) - {"1", str(os.getpid())})
over_at = time.monotonic() + 30
while left() and time.monotonic() < over_at:
    time.sleep(0.02)
print("left:", left(), flush=True)
"""

    def reaps(self, init, orphans=20):
        program = self.under(init, sys.executable, "-c", self.LEAVE_ORPHANS, str(orphans))
        self.assertEqual(program.wait(), 0)
        program.wait_for("left: 0$")

    def statuses(self, init):
        scripts = ("exit 0", "exit 1", "exit 7", "exit 255", "kill -9 $$", "kill -15 $$", "kill -1 $$", "kill -11 $$",
                   "sleep 9 & exit 5")
        return [self.under(init, "sh", "-c", script).wait() for script in scripts]

    def signals(self, init):
        """Return what a worker gets of the signals that PID 1 gets, and how both end."""
        program = self.under(init, sys.executable, "-c", WORKER)
        program.wait_for("worker is up")
        pid_1 = child_of(program.process.pid)
        for name in ("HUP", "QUIT", "USR1", "USR2", "WINCH", "CONT", "ALRM", "TERM"):
            os.kill(pid_1, getattr(signal, "SIG" + name))
            program.wait_for("got SIG" + name)
        return [line for line in program.lines if line.startswith("got")], program.wait()

    @needs("a right to make namespaces (root, unshare, ip)", NAMESPACES)
    def test_as_pid_1(self):
        self.reaps(self.INITS["sidecar"])
        self.assertEqual(self.statuses(self.INITS["sidecar"]), [0, 1, 7, 255, 137, 143, 129, 139, 5])
        got, status = self.signals(self.INITS["sidecar"])
        self.assertEqual((len(got), status), (8, 3))

    @needs("a right to make namespaces (root, unshare, ip)", NAMESPACES)
    def test_a_fork_bombs_leftovers(self):
        self.reaps(self.INITS["sidecar"], orphans=max(int(5000 * SCALE), 100))

    @needs("tini and dumb-init in namespaces", NAMESPACES and shutil.which("tini") and shutil.which("dumb-init"))
    def test_beside_tini_and_dumb_init(self):
        ours = self.INITS["sidecar"]
        for name in ("tini", "dumb-init"):
            theirs = self.INITS[name]
            self.reaps(theirs)
            self.assertEqual(self.statuses(theirs), self.statuses(ours), name)
            self.assertEqual(self.signals(theirs), self.signals(ours), name)
        for command in ("no-such-command", "/", os.path.join(HERE, "test_sidecar.py")):
            self.assertEqual(self.under(self.INITS["tini"], command).wait(), self.under(ours, command).wait(), command)


class FakeTime:
    """What sidecar.py uses of `time`, with a clock that only the test moves."""

    def __init__(self):
        self.now = 1000.0
        self.gmtime, self.strftime = time.gmtime, time.strftime

    def monotonic(self):
        return self.now

    def time(self):
        return self.now + 1.6e9


class ScriptedCondition(threading.Condition().__class__):
    """A Condition whose wait() lets the test do what other threads would do, until it is notified or its time is over."""

    def __init__(self, meanwhile):
        super().__init__()
        self.meanwhile, self.waiting = meanwhile, []

    def wait(self, timeout=None):
        waiter = types.SimpleNamespace(notified=False)
        self.waiting.append(waiter)
        self.meanwhile(waiter, timeout)
        self.waiting.pop()                                  # calls within calls: the last in is the first out

    def notify_all(self):
        for waiter in self.waiting:
            waiter.notified = True


class Model:
    """The design of the tracker, as plainly as possible: a list of requests, and what was recorded."""

    def __init__(self, now, grace, quiet, timeout):
        self.grace, self.quiet, self.timeout = grace, quiet, timeout or float("inf")
        self.active, self.given_up, self.ended = [], [], set()      # requests: [id, start, has the worker brought the id?]
        self.total = self.unmatched = self.expired = 0
        self.durations = []
        self.idle_since = now
        self.drain = None                                           # [start, end, completed, final]

    def give_up(self, request, now):
        self.active.remove(request)
        self.given_up.append(request)
        self.expired += 1
        self.idle_since = now

    def pass_time(self, now):
        for request in [request for request in self.active if now >= request[1] + self.timeout]:
            self.give_up(request, now)
        if self.drain and self.drain[1] is not None and not self.drain[3] and now >= self.drain[1] + self.grace:
            self.drain = None

    def start(self, now, name):
        self.pass_time(now)
        if self.drain and self.drain[1] is not None and not self.drain[3]:
            self.drain = None
        if name is None or all(request[0] != name for request in self.active):
            self.total += 1
            self.given_up = [request for request in self.given_up if name is None or request[0] != name]
            self.active.append([name, now, name is not None])

    def end(self, now, name, seconds):
        """Return whether there was one to end."""
        self.pass_time(now)

        def matches(request):
            return request[0] == name if name is not None else not request[2]
        ending = next(filter(matches, self.active), None)
        if ending:
            self.active.remove(ending)
            self.idle_since = now
        else:
            ending = next(filter(matches, self.given_up), None)
            if ending:
                self.given_up.remove(ending)
        if ending:
            self.durations.append(now - ending[1] if seconds is None else seconds)
            self.ended.add(name)
        elif name is None or name not in self.ended:
            self.unmatched += 1
            return False
        return True

    def reset(self, now):
        self.pass_time(now)
        for request in list(self.active):
            self.give_up(request, now)

    def begin_drain(self, now, final):
        self.pass_time(now)
        if not self.drain:
            self.drain = [now, None, None, final]
        self.drain[3] = self.drain[3] or final
        if final and not self.drain[2]:
            self.drain[1] = self.drain[2] = None

    def drain_is_over(self, now):
        return now >= self.drain[0] + self.grace or \
            not self.active and now >= max(self.drain[0], self.idle_since) + self.quiet

    def drain_over_at(self):
        """Return when the drain is over if nobody calls any more."""
        idle_since = max([self.idle_since] + [request[1] + self.timeout for request in self.active])
        return min(self.drain[0] + self.grace, max(self.drain[0], idle_since) + self.quiet)

    def phase(self):
        return "serving" if not self.drain else "draining" if self.drain[1] is None else "drained"


class TestModel(unittest.TestCase):
    """Random sequences of calls, against Model. The tracker is called through the endpoints, with a clock of the test's own."""

    SEQUENCES, STEPS = 4000, 40
    DURATIONS = (("1.2s", 1.2), ("350ms", 0.35), ("0s", 0.0), ("150%C2%B5s", 150e-6), ("1m2.5s", 62.5), ("61", 61.0), ("5ms", 0.005))
    BAD_DURATIONS = ("", "abc", "-1s", "nan", "1e999s", "1%20s")
    BAD_IDS = ("id=", "id=a&id=b", "id=%00", "id=" + "x" * 129)

    def setUp(self):
        silent = logging.NullHandler()
        sidecar_module.log.addHandler(silent)
        self.addCleanup(sidecar_module.log.removeHandler, silent)
        real = sidecar_module.time
        self.addCleanup(setattr, sidecar_module, "time", real)

    def test_random_sequences(self):
        steps = 0
        for seed in range(max(int(self.SEQUENCES * SCALE), 100)):
            self.random = random.Random(seed)
            try:
                steps += self.sequence()
            except AssertionError as error:
                raise AssertionError("seed %d: %s" % (seed, error)) from error
        self.assertGreater(steps, 0)

    def sequence(self):
        pick = self.random.choice
        self.clock = sidecar_module.time = FakeTime()
        grace, quiet, timeout = pick((0.0, 5.0, 30.0)), pick((0.0, 0.0, 2.0)), pick((0.0, 0.0, 4.0, 40.0))
        self.tracker = sidecar_module.RequestTracker(grace, quiet, timeout)
        self.tracker._condition = ScriptedCondition(self.meanwhile)
        self.routes = sidecar_module.Api(self.tracker, sidecar_module.parse_networks("")).routes
        self.model = Model(self.clock.now, grace, quiet, timeout)
        self.names, self.handed_out = ["a", "b", "c"], []
        self.left = self.STEPS
        while self.left > 0:
            self.step()
        return self.STEPS

    def call(self, path, query=""):
        """Return (status, JSON) of a POST."""
        request = sidecar_module.Request("POST", path, query, {}, True, "127.0.0.1")
        try:
            answer = self.routes["POST", path](request)
        except sidecar_module.HTTPError as error:
            answer = error.answer
        return answer.status, json.loads(answer.body)

    def step(self, most=60.0):
        """Do something at random, or let up to `most` seconds pass; then compare all figures."""
        self.left -= 1
        kind = self.random.choice(("start", "start", "start", "end", "end", "end", "bad", "time", "time", "reset", "drain"))
        if kind == "time":
            self.clock.now = min(self.clock.now + self.random.choice((0.001, 1.0, 3.0, 20.0)), self.clock.now + most)
        elif kind == "drain":
            self.drain(final=self.random.random() < 0.2)
        elif kind == "reset" and self.random.random() < 0.5:
            count = len(self.model.active)
            self.model.pass_time(self.clock.now)
            self.assertEqual(self.call("/reset"), (200, {"given_up": len(self.model.active)}), count)
            self.model.reset(self.clock.now)
        elif kind == "start":
            self.start(self.random.choice([None, None] + self.names))
        elif kind == "end":
            self.end(self.random.choice([None, None] + self.names + self.handed_out[-2:]))
        elif kind == "bad":
            for path in ("/start-request", "/end-request"):
                self.assertEqual(self.call(path, self.random.choice(self.BAD_IDS))[0], 400)
        self.compare()

    def start(self, name):
        status, answer = self.call("/start-request", "" if name is None else "id=" + name)
        self.model.start(self.clock.now, name)
        self.assertEqual(status, 200)
        if name is None:
            self.assertNotIn(answer["request_id"], self.handed_out)
            self.handed_out.append(answer["request_id"])
            self.model.active[-1][0] = answer["request_id"]
        else:
            self.assertEqual(answer["request_id"], name)
        self.check_advice(answer)

    def end(self, name):
        text, seconds = self.random.choice(((None, None),) + self.DURATIONS + tuple((bad, None) for bad in self.BAD_DURATIONS))
        query = [] if name is None else ["id=" + name]
        query += [] if text is None else ["duration=" + text]
        self.random.shuffle(query)
        status, answer = self.call("/end-request", "&".join(query))
        known = self.model.end(self.clock.now, name, seconds)
        self.assertEqual(status, 409 if not known else 400 if text is not None and seconds is None else 200)
        self.check_advice(answer)

    def check_advice(self, answer):
        self.assertEqual((answer["active_requests"], answer["draining"]), (len(self.model.active), self.model.drain is not None))

    def drain(self, final):
        self.model.begin_drain(self.clock.now, final)
        if self.model.drain[1] is None and self.model.drain_is_over(self.clock.now):
            self.end_drain()
        if final:
            completed = self.tracker.drain(final=True)
        else:
            completed = self.call("/drain")[0] == 200
        self.assertIsNotNone(self.drained)
        self.assertEqual(completed, self.drained)

    def end_drain(self):
        self.model.drain[1], self.model.drain[2] = self.clock.now, not self.model.active

    @property
    def drained(self):
        return self.model.drain and self.model.drain[2]

    def meanwhile(self, waiter, timeout):
        """While a drain waits: others call, time passes. As soon as it is over, the drain must have been woken."""
        sleeps_until = self.clock.now + timeout
        self.assertLessEqual(sleeps_until, self.model.drain_over_at())
        while not waiter.notified and self.clock.now < sleeps_until:
            if self.left > 0 and len(self.tracker._condition.waiting) < 3:
                self.step(most=sleeps_until - self.clock.now)
            else:
                self.clock.now = sleeps_until
            self.model.pass_time(self.clock.now)
            if self.model.drain[1] is None and self.model.drain_is_over(self.clock.now):
                self.assertTrue(waiter.notified or self.clock.now >= sleeps_until, "a drain that is over was not woken")
                self.end_drain()

    def compare(self):
        model, snapshot = self.model, self.tracker.snapshot()
        model.pass_time(self.clock.now)
        if model.drain and model.drain[1] is None and model.drain_is_over(self.clock.now):
            return                                          # who waits for it is about to wake up: compared after that
        counts = [0] * (len(sidecar_module.BUCKETS) + 1)
        for seconds in model.durations:
            counts[sum(seconds > bound for bound in sidecar_module.BUCKETS)] += 1
        self.assertEqual(
            (snapshot["active_requests"], snapshot["total_requests"], snapshot["unmatched_ends"], snapshot["expired_requests"],
             snapshot["duration_counts"], snapshot["phase"]),
            (len(model.active), model.total, model.unmatched, model.expired, counts, model.phase()))
        self.assertAlmostEqual(snapshot["duration_sum"], sum(model.durations))
        self.assertAlmostEqual(snapshot["idle_duration_seconds"], 0 if model.active else self.clock.now - model.idle_since)
        self.assertEqual([age for _, age in self.tracker.active_requests()],
                         [self.clock.now - request[1] for request in model.active])


def figures(pid):
    """Return (resident bytes, threads, sockets) of a process."""
    with open("/proc/%d/status" % pid) as file:
        status = file.read()
    sockets = 0
    for number in os.listdir("/proc/%d/fd" % pid):
        try:
            sockets += os.readlink("/proc/%d/fd/%s" % (pid, number)).startswith("socket:")
        except OSError:                     # closed meanwhile
            pass

    def field(name):
        return int(status.partition("\n%s:" % name)[2].split()[0])
    return field("VmRSS") * 1024, field("Threads"), sockets


def read_answers(connection):
    """Return [(status, body), ...] as http.client reads them, all up to the end of the connection."""
    pieces, answers = [b""], []
    try:
        pieces.extend(iter(lambda: connection.recv(1 << 18), b""))
    except ConnectionError:                 # closed with bytes of ours unread
        pass
    received = b"".join(pieces)
    if received.endswith(b"HTTP/1.1 100 Continue\r\n\r\n"):        # and then the body did not come
        received = received[:-25]
    stream = io.BytesIO(received)
    stream.close = lambda: None             # http.client would close it with the first answer
    while stream.tell() < len(received):
        answer = http.client.HTTPResponse(types.SimpleNamespace(makefile=lambda mode: stream))
        answer.begin()                      # it passes over a 100
        answers.append((answer.status, answer.read()))
    return answers


class TestLoad(Case):
    """Many clients, and hostile ones, at once."""

    PAIRS, CLIENTS = 200000, 64

    def test_many_clients_with_retries(self):
        """Pairs of start and end from 64 keep-alive connections, pipelined; any of them may come twice, as after a time-out."""
        sidecar = self.sidecar(constants={"REMEMBERED": self.PAIRS})       # all ends: a retry may be late here
        pairs = int(self.PAIRS * SCALE) // self.CLIENTS

        def client(number):
            choice = random.Random(number)
            with sidecar.raw(b"") as connection:
                for first in range(0, pairs, 50):
                    requests = []
                    for turn in range(first, min(first + 50, pairs)):
                        for path in ("start", "end"):
                            request = b"POST /%s-request?id=%d-%d HTTP/1.1\r\n\r\n" % (path.encode(), number, turn)
                            requests += [request] * choice.choice((1, 1, 1, 2, 3))
                    connection.sendall(b"".join(requests))
                    received = b""
                    while received.count(b"HTTP/1.1 ") < len(requests):
                        piece = connection.recv(1 << 18)
                        self.assertTrue(piece, received[-300:])
                        received += piece
                    self.assertEqual(received.count(b"HTTP/1.1 200 OK\r\n"), len(requests))

        in_threads(self.CLIENTS, client)
        self.assertEqual(sidecar.active(), 0)
        self.assertEqual(sidecar.get("/metrics")[1]["total_requests"], pairs * self.CLIENTS)
        self.assertEqual(sidecar.sample("sidecar_request_duration_seconds_count"), pairs * self.CLIENTS)
        self.assertEqual(sidecar.sample("sidecar_unmatched_ends_total"), 0)

    def test_threads_on_the_tracker(self):
        """The same without HTTP, so that the threads meet in the tracker far more often; a third has no id."""
        silent = logging.NullHandler()
        sidecar_module.log.addHandler(silent)
        self.addCleanup(sidecar_module.log.removeHandler, silent)
        remembered = sidecar_module.REMEMBERED
        self.addCleanup(setattr, sidecar_module, "REMEMBERED", remembered)
        sidecar_module.REMEMBERED = self.PAIRS
        tracker = sidecar_module.RequestTracker()
        pairs = int(self.PAIRS * SCALE) // self.CLIENTS
        interval = sys.getswitchinterval()
        self.addCleanup(sys.setswitchinterval, interval)
        sys.setswitchinterval(1e-5)

        def client(number):
            choice = random.Random(number)
            for turn in range(pairs):
                name = "%d-%d" % (number, turn) if turn % 3 else None
                for _ in range(choice.choice((1, 2)) if name else 1):
                    tracker.start(name)
                for _ in range(choice.choice((1, 2)) if name else 1):
                    known, active, _ = tracker.end(name, 0.001)
                    self.assertTrue(known)
                    self.assertGreaterEqual(active, 0)

        in_threads(self.CLIENTS, client)
        snapshot = tracker.snapshot()
        self.assertEqual((snapshot["active_requests"], snapshot["total_requests"], sum(snapshot["duration_counts"]),
                          snapshot["unmatched_ends"]), (0, pairs * self.CLIENTS, pairs * self.CLIENTS, 0))


class TestFuzz(Case):
    """Mutated requests: no traceback, no hang, no lost count, no growth; and every answer is one that http.client reads."""

    REQUESTS = 100000
    SEEDS = [
        b"POST /start-request?id=%(id)s HTTP/1.1\r\nHost: localhost:8081\r\nUser-Agent: fuzz\r\n\r\n",
        b"POST /start-request HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
        b"POST /start-request?id=%(id)s&x=1 HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n1\r\n!\r\n0\r\nT: x\r\n\r\n",
        b"POST /end-request?duration=1m2.5s HTTP/1.1\r\nAccept: */*\r\nConnection: keep-alive\r\n\r\n",
        b"POST /end-request?id=%(id)s&duration=150%%C2%%B5s HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}",
        b"POST /end-request?id=%(id)s&duration=5.1e-05s HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n{}",
        b"GET /metrics HTTP/1.1\r\nAccept: application/openmetrics-text;version=1.0.0\r\nAccept-Encoding: gzip\r\n\r\n",
        b"GET /requests HTTP/1.1\r\n\r\n",
        b"GET http://localhost:8081/ready?x=%%00 HTTP/1.1\r\nOrigin: http://[::1]:8081\r\n\r\n",
        b"POST /reset HTTP/1.1\r\n\r\n",
    ]
    TOKENS = [b"\r\n", b"\n", b"\r", b"\x00", b" ", b":", b"%", b"%ff", b"?", b"&", b"=", b";", b"#", b"\xff\xfe", b"\xc2\xb5", b"-1",
              b"0", b"99999999999999999999", b"0x10", b"GET ", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/9.9", b"Content-Length: 3\r\n",
              b"Content-Length: 70000\r\n", b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: identity\r\n", b"Expect: 100-continue\r\n",
              b"Connection: close\r\n", b" folded\r\n", b"x" * 9000, b"A: b\r\n" * 3000, b"\t", b"[", b"duration=", b"nan", b"\x1b[2J", b"\x85"]

    def mutated(self, choice, number):
        data = bytearray(choice.choice(self.SEEDS) % {b"id": b"fuzz-%d-%d" % (number, number)})
        for _ in range(choice.choice((0, 1, 1, 1, 2, 3, 8))):
            kind, at = choice.randrange(6), choice.randrange(len(data) + 1)
            if kind == 0:
                data[at:at + 1] = bytes([choice.randrange(256)])
            elif kind == 1:
                del data[at:at + choice.choice((1, 1, 2, 20))]
            elif kind == 2:
                data[at:at] = data[at:at + 20]
            else:
                data[at:at + choice.choice((0, 0, 1, 5))] = choice.choice(self.TOKENS[:-1] if kind == 5 else self.TOKENS[:20])
        return bytes(data)

    def check(self, answers):
        """Take note of the answers of one connection; each is well-formed, and an error is told in JSON."""
        for status, body in answers:
            self.statuses[status] = self.statuses.get(status, 0) + 1
            if status == 200 and b'"request_id": "' in body and body[:1] == b"{":
                self.started.append(json.loads(body.decode())["request_id"])
            self.assertNotEqual(status, 500, body)
            if status >= 400 and body:
                self.assertIn("error", json.loads(body.decode()))

    def exchange(self, sidecar, pieces_of):
        """Send each list of pieces over a connection of its own, all of them piece by piece at once; check the answers."""
        connections = [sidecar.raw(b"") for _ in pieces_of]
        for connection in connections:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for pieces in itertools.zip_longest(*pieces_of):
            for connection, piece in zip(connections, pieces):
                if piece:
                    try:
                        connection.sendall(piece)
                    except OSError:                         # answered and closed already: an error was in the first piece
                        pass
        answers = []
        for connection in connections:
            try:
                connection.shutdown(socket.SHUT_WR)
            except OSError:                                 # closed already
                pass
            answers.append(read_answers(connection))
            self.check(answers[-1])
            connection.close()
        return answers

    def setUp(self):
        self.statuses, self.started = {}, []

    def settled(self, sidecar):
        """Return its memory, once nothing of a connection is left: no socket, and no thread but the spare ones."""
        def alone():
            memory, threads, sockets = figures(sidecar.process.pid)
            return memory if threads <= 4 + 2 * sidecar_module.SPARE_THREADS and sockets == 2 else None
        return until(alone, "an end of all connections")

    def test_mutated_requests(self):
        sidecar = self.sidecar()
        total, number, before = int(self.REQUESTS * SCALE), 0, None
        choice = random.Random(8)
        while number < total:
            batch = []
            for _ in range(32):                             # each connection: three requests, in up to four pieces
                data = b"".join(self.mutated(choice, number + turn) for turn in range(3))
                number += 3
                cuts = sorted(choice.randrange(len(data) + 1) for _ in range(choice.randrange(4)))
                batch.append([data[start:end] for start, end in zip([0] + cuts, cuts + [len(data)])])
            self.exchange(sidecar, batch)
            if before is None and number > total // 4:
                sidecar.post("/reset")
                before = self.settled(sidecar)
        sidecar.post("/reset")
        self.assertLess(self.settled(sidecar) - before, 8 << 20)
        self.counts_agree(sidecar)
        self.assertGreater(self.statuses.get(200, 0), total // 10, self.statuses)
        self.assertGreater(self.statuses.get(400, 0), total // 20, self.statuses)

    def counts_agree(self, sidecar):
        self.assertEqual(sidecar.active(), 0)
        self.assertEqual(sidecar.get("/health")[0], 200)
        metrics = sidecar.get("/metrics")[1]
        self.assertLessEqual(len(set(self.started)), metrics["total_requests"])     # an id may have come twice
        self.assertLessEqual(metrics["total_requests"], len(self.started))
        ended = sidecar.sample("sidecar_request_duration_seconds_count")
        self.assertLessEqual(metrics["total_requests"] - metrics["expired_requests"], ended)    # late ends are in both
        sidecar.post("/start-request")
        self.assertEqual(sidecar.post("/end-request")[1]["active_requests"], 0)
        for line in sidecar.lines:
            self.assertRegex(line, "^[-0-9]{10}T[:0-9]{8}Z (INFO (listening|signal)|WARNING request given up) ")

    def test_pieces_cut_at_every_byte(self):
        sidecar = self.sidecar()
        for number, seed in enumerate(self.SEEDS):
            data = seed % {b"id": b"cut-%d" % number}
            cuts = range(1, len(data), 1 if SCALE >= 1 else 3)
            for answers in self.exchange(sidecar, [[data[:cut], data[cut:]] for cut in cuts]):
                self.assertEqual(len(answers), 1, seed)
                self.assertIn(answers[0][0], (200, 409), seed)
        self.assertEqual([list(sidecar.post("/reset")[1]), sidecar.active()], [["given_up"], 0])


class TestFaults(Case):
    """What goes wrong around the sidecar: it counts on, drains, and says so where it can."""

    def serves(self, sidecar):
        """Check that it counts and shows; leave nothing active."""
        self.assertEqual(sidecar.post("/start-request?id=a")[0], 200)
        self.assertEqual(sidecar.active(), 1)
        self.assertIn("sidecar_active_requests 1\n", sidecar.prometheus())
        self.assertEqual(sidecar.post("/end-request?id=a")[0], 200)
        self.assertEqual(sidecar.active(), 0)

    def drains(self, sidecar):
        sidecar.signal(signal.SIGTERM)
        self.assertEqual(sidecar.wait(), 0)

    def silent(self, redirection, **env):
        """Return a sidecar whose log cannot be read, so its ports are picked before."""
        with socket.socket() as api, socket.socket() as metrics:
            for free in (api, metrics):
                free.bind(("127.0.0.1", 0))
            ports = [free.getsockname()[1] for free in (api, metrics)]
        settings = dict(env, SIDECAR_HOST="127.0.0.1", SIDECAR_PORT=ports[0], METRICS_PORT=ports[1])
        program = self.program("sh", "-c", 'exec "$@" ' + redirection, "sh", sys.executable, os.path.join(HERE, "sidecar.py"),
                               env=settings)
        sidecar = SidecarProcess.__new__(SidecarProcess)
        vars(sidecar).update(vars(program), host="127.0.0.1", port=ports[0], metrics_port=ports[1])

        def answers():
            try:
                return sidecar.get("/health")[0] == 200
            except OSError:
                return False
        until(answers, "an answer")
        return sidecar

    def test_no_descriptors_left(self):
        sidecar = self.sidecar(launcher=("sh", "-c", 'ulimit -n 64; exec "$@"', "sh"))
        with sidecar.raw(b"POST /start-request?id=a HTTP/1.1\r\n\r\n") as worker:
            self.assertTrue(worker.recv(65536).startswith(b"HTTP/1.1 200 "))
            held = [sidecar.raw(b"") for _ in range(100)]
            sidecar.wait_for("ERROR no connection accepted")
            worker.sendall(b"POST /end-request?id=a HTTP/1.1\r\n\r\n")          # who is connected is served
            self.assertTrue(worker.recv(65536).startswith(b"HTTP/1.1 200 "))
            for connection in held:
                connection.close()
            self.serves(sidecar)                                                # and so are all, once there are some again
            self.assertEqual(sidecar.log.count("no connection accepted"), 1)
            self.drains(sidecar)

    def test_a_connection_that_is_reset_before_it_is_refused(self):
        sidecar = self.sidecar()
        held = [sidecar.raw(b"") for _ in range(512)]
        self.addCleanup(lambda: [connection.close() for connection in held])
        until(lambda: figures(sidecar.process.pid)[1] >= 512)
        sidecar.signal(signal.SIGSTOP)
        reset = sidecar.raw(b"GET /health HTTP/1.1\r\n\r\n")
        reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        reset.close()
        with sidecar.raw(b"") as behind:                    # accepted in their order: so the other one has been refused
            sidecar.signal(signal.SIGCONT)
            self.assertTrue(behind.recv(65536).startswith(b"HTTP/1.1 503 "))
        while held:
            held.pop().close()
        until(lambda: figures(sidecar.process.pid)[1] < 512)
        self.serves(sidecar)
        self.assertEqual(len(sidecar.lines), 1, sidecar.log)

    def test_a_body_that_never_comes(self):
        sidecar = self.sidecar(constants={"REQUEST_SECONDS": 0.3})              # and IDLE_SECONDS stay 60
        for fields in (b"Content-Length: 5\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n"):
            self.assertEqual([status for status, _, _ in sidecar.answers(b"POST /start-request HTTP/1.1\r\n" + fields)], [408])
        self.assertEqual(sidecar.active(), 0)

    def test_stderr_is_closed(self):
        for redirection in ("2>&-", "<&- 2>&-", "<&- >&- 2>&-"):
            sidecar = self.silent(redirection, LOG_LEVEL="DEBUG")
            answers = sidecar.answers(b"GET /health HTTP/1.1\r\n\r\n" * 3 + b"GET /health HTTP/1.0\r\n\r\n")
            self.assertEqual([(status, body) for status, _, body in answers], [(200, '{"status": "ok"}\n')] * 4)
            self.serves(sidecar)
            self.drains(sidecar)
        bad = subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, os.path.join(HERE, "sidecar.py")],
                             env=dict(os.environ, SIDECAR_PORT="x"), timeout=PATIENCE)
        self.assertEqual(bad.returncode, 2)

    def test_the_disk_is_full(self):
        sidecar = self.silent("2>/dev/full", LOG_LEVEL="DEBUG")
        self.serves(sidecar)
        self.drains(sidecar)

    def test_nobody_reads_the_log(self):
        """A pipe that is full: nothing that the sidecar does may wait for it."""
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)
        fcntl.fcntl(writer, 1031, 4096)                     # F_SETPIPE_SZ
        os.set_blocking(writer, False)
        try:
            while True:
                os.write(writer, b"x")
        except BlockingIOError:
            os.set_blocking(writer, True)
        os.set_inheritable(writer, True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        program = self._ends_with_test(Program(sys.executable, os.path.join(HERE, "sidecar.py"), stdout=subprocess.DEVNULL,
                                               stderr=writer, env={"SIDECAR_HOST": "127.0.0.1", "SIDECAR_PORT": port,
                                                                   "METRICS_PORT": 0, "LOG_LEVEL": "DEBUG"}))
        os.close(writer)
        sidecar = SidecarProcess.__new__(SidecarProcess)
        vars(sidecar).update(vars(program), host="127.0.0.1", port=port)

        def answers():
            try:
                return sidecar.get("/health")[0] == 200
            except OSError:
                return False
        until(answers, "an answer")
        for number in range(300):
            sidecar.post("/start-request?id=%d" % number)
            if number % 50 == 0:
                os.read(reader, 4096)                       # so that some lines go out, and the pipe is full again
        self.assertEqual(sidecar.active(), 300)
        self.assertEqual(sidecar.post("/reset"), (200, {"given_up": 300}))
        sidecar.signal(signal.SIGTERM)
        self.assertEqual(sidecar.process.wait(PATIENCE), 0)

    def test_the_wall_clock_jumps_back_by_a_day(self):
        """Of each time that is waited for or told as an age, none is of the wall clock."""
        with tempfile.TemporaryDirectory() as folder:
            flag = os.path.join(folder, "jumped")
            jumping = ("import os, sys, time; real = time.time; time.time = lambda: real() - 86400 * os.path.exists(%r); "
                       "sys.path.insert(0, %r); import sidecar; sys.exit(sidecar.main([]))" % (flag, HERE))
            sidecar = SidecarProcess.__new__(SidecarProcess)
            Program.__init__(sidecar, sys.executable, "-c", jumping, env={
                "SIDECAR_HOST": "127.0.0.1", "SIDECAR_PORT": 0, "METRICS_PORT": 0, "GRACE_PERIOD_SECONDS": 0.5})
            self._ends_with_test(sidecar)
            match = sidecar.wait_for(r"listening api=http://(\S+):(\d+) metrics=http://\S+:(\d+)")
            sidecar.host, sidecar.port, sidecar.metrics_port = match.group(1), int(match.group(2)), int(match.group(3))
            sidecar.post("/start-request?id=a")
            sidecar.post("/start-request?id=b")
            newest = sidecar.get("/metrics")[1]["last_request_time"]
            open(flag, "w").close()
            sidecar.post("/start-request?id=c")
            self.assertLess(sidecar.get("/metrics")[1]["last_request_time"], newest)        # it has jumped
            sidecar.post("/end-request?id=a")
            self.assertLess(0, sidecar.sample("sidecar_request_duration_seconds_sum"))
            self.assertLess(sidecar.sample("sidecar_request_duration_seconds_sum"), 2 * PATIENCE)
            for entry in sidecar.get("/requests")[1]:
                self.assertGreaterEqual(entry["age_seconds"], 0)
            began = time.monotonic()
            sidecar.signal(signal.SIGTERM)
            self.assertEqual(sidecar.wait(), 1)             # the grace period was over
            self.assertGreaterEqual(time.monotonic() - began, 0.5)
            sidecar.wait_for("drain timed out active_requests=2 elapsed_seconds=0.[5-9]")

    def test_stopped_and_continued_in_the_middle_of_a_drain(self):
        for run in ((), ("run", "--", sys.executable, "-c", WORKER)):
            sidecar = self.sidecar(*run, GRACE_PERIOD_SECONDS="1h")
            if run:
                sidecar.wait_for("worker is up")
            sidecar.post("/start-request?id=a")
            sidecar.signal(signal.SIGTERM)
            sidecar.wait_for("drain started")
            for _ in range(3):
                sidecar.signal(signal.SIGSTOP)
                late = sidecar.raw(b"POST /start-request?id=b HTTP/1.0\r\n\r\n")
                sidecar.signal(signal.SIGCONT)
                with late:
                    self.assertIn(b'"active_requests": 2, "draining": true', late.recv(65536))
            sidecar.post("/end-request?id=a")
            sidecar.post("/end-request?id=b")
            self.assertEqual(sidecar.wait(), 3 if run else 0)

    def test_stopped_for_longer_than_the_grace_period(self):
        sidecar = self.sidecar(GRACE_PERIOD_SECONDS=0.5)
        sidecar.post("/start-request?id=a")
        sidecar.signal(signal.SIGTERM)
        sidecar.wait_for("drain started")
        sidecar.signal(signal.SIGSTOP)
        time.sleep(0.6)                                     # it is the time that passes that is tested
        sidecar.signal(signal.SIGCONT)
        self.assertEqual(sidecar.wait(), 1)
        sidecar.wait_for("still active request_id=a")

    @needs("a right to make namespaces (root, unshare, ip)", NAMESPACES)
    def test_without_proc(self):
        sidecar = self.sidecar(launcher=("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"))
        self.serves(sidecar)
        self.assertNotIn("process_", sidecar.prometheus())
        self.drains(sidecar)

    @needs("a right to make namespaces (root, unshare, ip)", NAMESPACES)
    def test_a_read_only_file_system_no_home_and_an_unknown_user(self):
        sidecar = self.sidecar("run", "--", "sh", "-c", 'id -u; touch "$0" || echo read-only; exec sleep 600', HERE + "/touched",
                               HOME=None, USER=None, launcher=(
            "unshare", "--mount", "sh", "-c",
            'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec unshare --user --map-user=12345 "$@"', HERE))
        sidecar.wait_for("^12345$")
        sidecar.wait_for("^read-only$")
        self.serves(sidecar)
        sidecar.signal(signal.SIGTERM)
        sidecar.process.wait(PATIENCE)
        self.assertEqual(sidecar.process.returncode, 128 + signal.SIGTERM)

    @needs("a right to make namespaces (root, unshare, ip)", NAMESPACES)
    def test_hosts_with_ipv6_only_and_with_ipv4_only(self):
        for setup, url in (("ip link set lo up && ip -4 address flush dev lo", "http://[::1]:%d"),
                           ("sysctl -qw net.ipv6.conf.all.disable_ipv6=1 && ip link set lo up", "http://127.0.0.1:%d")):
            sidecar = self.sidecar(SIDECAR_HOST=None, launcher=("unshare", "--net", "sh", "-c", setup + ' && exec "$@"', "sh"))
            enter = ("nsenter", "--net", "--target", str(sidecar.process.pid))
            ask = self.program(*enter, sys.executable, "-c", "import sys, test_sidecar; test_sidecar.call_there(sys.argv[1])",
                               url % sidecar.port, cwd=HERE)
            self.assertEqual(ask.wait(), 0, ask.log)
            health = self.program(*enter, sys.executable, os.path.join(HERE, "sidecar.py"), "health",
                                  env={"SIDECAR_URL": url % sidecar.port})
            self.assertEqual(health.wait(), 0, health.log)
            self.drains(sidecar)


def call_there(url):
    """In another network namespace: call the sidecar there."""
    target = urllib.parse.urlsplit(url)
    for path, expected in (("/start-request?id=a", 200), ("/end-request?id=a", 200), ("/reset", 200), ("/drain", 200)):
        connection = http.client.HTTPConnection(target.hostname, target.port, timeout=PATIENCE)
        connection.request("POST", path)
        assert connection.getresponse().status == expected, path
        connection.close()


class TestCallers(Case):
    """Who may call what."""

    CHANGING = (("POST", "/start-request"), ("POST", "/end-request?duration=1s"), ("POST", "/reset"), ("POST", "/drain"),
                ("GET", "/drain"), ("HEAD", "/drain"))

    def test_a_page_of_another_site(self):
        sidecar = self.sidecar()
        for method, path in self.CHANGING:
            for headers in ({"Origin": "https://example.com"}, {"Origin": "null"}, {"Origin": ""}, {"Origin": "http://127.0.0.1.example.com"},
                            {"Origin": "http://localhost.example.com"}, {"Origin": "http://10.0.0.1:8081"},
                            {"Origin": "http://127.0.0.1@example.com"}, {"Sec-Fetch-Site": "cross-site"}):
                self.assertEqual(sidecar.call(method, path, headers=headers)[0], 403, (path, headers))
        self.assertEqual(sidecar.get("/metrics")[1]["total_requests"], 0)
        self.assertEqual(sidecar.get("/ready")[0], 200)
        for path in ("/metrics", "/requests", "/health", "/ready"):
            self.assertEqual(sidecar.call("GET", path, headers={"Origin": "https://example.com"})[0], 200, path)

    def test_ipv4_mapped_ipv6_loopback_counts_as_loopback(self):
        trusts = sidecar_module.Api(None, sidecar_module.parse_networks("10.0.0.0/8, 2001:db8::/32")).trusts
        for host, expected in (("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("::ffff:127.0.0.1", True),
                               ("::ffff:10.1.2.3", True), ("10.255.255.255", True), ("2001:db8::7", True), ("::ffff:192.0.2.1", False),
                               ("192.0.2.1", False), ("11.0.0.1", False), ("fe80::1%eth0", False), ("::", False), ("0.0.0.0", False),
                               ("", False), ("localhost.example.com", False)):
            self.assertIs(trusts(host), expected, host)
        sidecar = self.sidecar(SIDECAR_HOST=None)
        if ":" in sidecar.host:                             # it listens on one IPv6 socket, where IPv4 clients are mapped ones
            sidecar.host = "127.0.0.1"
            self.assertEqual(sidecar.post("/reset")[0], 200)


BENCH_PEERS = [os.path.join(CACHE, "go-peer"), os.path.join(CACHE, "venv", "bin", "waitress-serve"),
               os.path.join(CACHE, "venv", "bin", "uvicorn")]


class TestBench(Case):
    """.ci/bench.py, in its shortest form: that it measures, not what it measures."""

    def bench(self, *arguments):
        """Run it; return its table as {figure: [cells]}, and all that it printed."""
        bench = self.program(sys.executable, os.path.join(HERE, ".ci", "bench.py"), *arguments)
        self.assertEqual(bench.wait(), 0, bench.log)
        rows = [line.strip("| ").split(" | ") for line in bench.lines if line.startswith("| ")]
        return {row[0]: row[1:] for row in rows}, bench.log

    @needs("wrk", shutil.which("wrk"))
    def test_load_is_counted_and_timed(self):
        table, log = self.bench("--quick", "--only", "sidecar", "pairs", "last-end")
        rates = [cells[0] for figure, cells in table.items() if figure.startswith("Pairs a second: ")]
        self.assertEqual(len(rates), 5, log)
        for rate in rates:
            self.assertGreater(int(rate.replace(",", "")), 0, log)
        self.assertNotIn("failed", log)
        self.assertTrue(any(re.search("to exit", figure) for figure in table), log)

    @needs("wrk and the peers of the benchmark", shutil.which("wrk") and all(map(os.path.exists, BENCH_PEERS)))
    def test_every_peer_serves(self):
        table, log = self.bench("--quick", "idle")
        self.assertNotIn("Left out", log)
        self.assertEqual(len(table["figure"]), 6, log)
        self.assertEqual(table["Wake-ups in 2 s without a request"][0], "0", log)

    @needs("wrk", shutil.which("wrk"))
    def test_soak(self):
        soak = self.program(sys.executable, os.path.join(HERE, ".ci", "bench.py"), "soak", "--seconds", "2")
        self.assertIn(soak.wait(), (0, 1), soak.log)            # so short a one may find that memory is still being taken
        self.assertRegex(soak.lines[-1], "at most [0-9.]+ MiB, [0-9]+ threads, [0-9]+ descriptors")


if __name__ == "__main__":
    unittest.main(verbosity=2)
