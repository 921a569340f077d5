"""Every test of the project: `python test_sidecar.py`, or a part: `python test_sidecar.py TestDrain`.

Each test starts the real program as a process and speaks to it over real sockets and real signals; ports are free ones
that the kernel picks. A test that needs a peer (Go, Node, a broker, Prometheus, ...) is skipped where that is missing.
SIDECAR_TEST_PEERS=none skips them all, SIDECAR_TEST_PEERS=all fails instead of skipping.
"""
import base64
import collections
import hashlib
import http.client
import http.server
import importlib.util
import json
import os
import re
import select
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
import urllib.parse

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


needs_proc = unittest.skipUnless(os.path.exists("/proc/self/stat"), "/proc is not mounted")


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
            if stream:
                stream.close()


class SidecarProcess(Program):
    """A running sidecar.py on free ports of loopback. Any other keyword is a variable of its environment.

    `constants` are module constants with other values, so that a test need not wait for as long as a user would.
    """

    def __init__(self, *argv, constants=None, **env):
        settings = dict(SIDECAR_HOST="127.0.0.1", SIDECAR_PORT=0, METRICS_PORT=0, SIDECAR_URL=None)
        settings.update(env)
        command = [os.path.join(HERE, "sidecar.py")]
        if constants:
            command = ["-c", "import sys; sys.path.insert(0, %r); import sidecar; vars(sidecar).update(%r); "
                             "sys.exit(sidecar.main(sys.argv[1:]))" % (HERE, constants)]
        super().__init__(sys.executable, *(command + list(argv)), env=settings)
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

    @needs_proc
    def test_those_who_wait_at_sigterm_get_their_answer_before_the_exit(self):
        sidecar = self.sidecar()
        sidecar.post("/start-request?id=a")
        before = sidecar.sample("process_open_fds")
        callers = [sidecar.raw(b"GET /drain HTTP/1.1\r\n\r\n") for _ in range(4)]
        until(lambda: sidecar.sample("process_open_fds") >= before + 4, "accepted")
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
            for path in ("/start-request", "/end-request", "/drain"):
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
            age = until(lambda: sidecar.get("/requests")[1][0]["age_seconds"])
        self.assertEqual(sidecar.active(), 0)
        self.assertGreaterEqual(sidecar.sample("sidecar_request_duration_seconds_sum"), age - 0.001)
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

    @needs_proc
    def test_a_connection_that_the_sidecar_closed_is_opened_again(self):
        sidecar = self.sidecar(constants={"IDLE_SECONDS": 0.05})
        client, before = self.client(sidecar.url), sidecar.sample("process_open_fds")
        for turn in range(3):
            with client.track():
                self.assertEqual(sidecar.active(), 1)
                until(lambda: sidecar.sample("process_open_fds") <= before)     # its connection is gone
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
            bot = self.bot()
            self.say(bot, "hello")
            bot.wait_for("Echo: hello")
            bot.signal(number)
            self.assertEqual(bot.wait(), 0, bot.log)
            self.assertNotIn("Traceback", bot.log)

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


if __name__ == "__main__":
    unittest.main(verbosity=2)
