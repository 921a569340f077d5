"""The tests that need nothing but Python.

    python test_sidecar.py              all of them, several classes side by side
    python test_sidecar.py TestDrain    a part

Each test starts the real program as a process and speaks to it over real sockets and real signals;
ports are free ones that the kernel picks. What needs more, or minutes, is in .ci/tests, and .ci/run
runs it all.
"""
import base64
import collections
import concurrent.futures
import contextlib
import fcntl
import hashlib
import http.client
import http.server
import json
import logging
import os
import platform
import pty
import random
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
import types
import unittest

import sidecar as sidecar_module      # `sidecar` is what the tests call a running one.

HERE = os.path.dirname(os.path.abspath(__file__))
# Seconds after which a wait for an event has failed, whatever the machine; nothing waits it out.
PATIENCE = 60


class Program:
    """A process under test: its output line by line, and its end.

    The lines are those of standard error, and of standard output where that is not asked for apart.
    """

    def __init__(self, *argv, **options):
        """argv: the command; env: variables to add, or to take away with None.

        The other options are Popen's.
        """
        env = dict(os.environ, PYTHONUNBUFFERED="1")
        for name, value in options.pop("env", {}).items():
            if value is None:
                env.pop(name, None)
            else:
                env[name] = str(value)
        options = dict(dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT), **options)
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
        """Return the match of `pattern` in the first line that has one, as soon as it is there.

        The lines are those from number `after` on.
        """
        def found():
            return next((match for match in (re.search(pattern, line)
                                             for line in self.lines[after:]) if match), None)
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

    def whole_log(self):
        """End it, and return all that it logged.

        While it runs, `log` lags behind its answers: a thread writes there, and one reads here.
        """
        self.signal(signal.SIGTERM)
        self.signal(signal.SIGINT)                  # waits for no request
        self.wait()
        return self.log

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.reader.join(PATIENCE)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            # A grandchild may hold the other end of the pipe.
            if stream and not self.reader.is_alive():
                stream.close()


class SidecarProcess(Program):
    """A running sidecar.py on free ports of loopback.

    Any other keyword is a variable of its environment.

    `constants` are module constants with other values, so that a test need not wait for as long as
    a user would. `launcher` is what stands in front of the command, such as unshare and its
    options.
    """

    source = None           # the (address, port) that `call` calls from

    def __init__(self, *argv, constants=None, launcher=(), **env):
        settings = dict(SIDECAR_HOST="127.0.0.1", SIDECAR_PORT=0, METRICS_PORT=0, SIDECAR_URL=None)
        settings.update(env)
        command = [os.path.join(HERE, "sidecar.py")]
        if constants:
            command = ["-c", "import sys; sys.path.insert(0, %r); import sidecar; "
                             "vars(sidecar).update(%r); "
                             "sys.exit(sidecar.main(sys.argv[1:]))" % (HERE, constants)]
        super().__init__(*launcher, sys.executable, *(command + list(argv)), env=settings)
        try:
            match = self.wait_for(r"listening.*?http://(\S+):(\d+).*?http://\S+:(\d+)")
        except AssertionError:
            self.kill()
            raise
        self.host = match.group(1)
        self.port, self.metrics_port = int(match.group(2)), int(match.group(3))
        self.url = "http://%s:%d" % (self.host, self.port)

    @classmethod
    def of(cls, program, port, metrics_port=None, host="127.0.0.1"):
        """Return the sidecar that a Program runs, once it answers: its log cannot be read."""
        sidecar = cls.__new__(cls)
        vars(sidecar).update(vars(program), host=host, port=port, metrics_port=metrics_port)

        def answers():
            try:
                return sidecar.get("/health")[0] == 200
            except OSError:
                return False
        until(answers, "an answer")
        return sidecar

    def call(self, method, path, body=None, headers=None, port=None):
        """Ask over a connection of its own; return (status, JSON or text)."""
        connection = http.client.HTTPConnection(self.host.strip("[]"), port or self.port,
                                                timeout=PATIENCE, source_address=self.source)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            text = answer.read().decode()
            is_json = text and "json" in answer.getheader("Content-Type", "")
            return answer.status, json.loads(text) if is_json else text
        finally:
            connection.close()

    def raw(self, data, port=None):
        """Send bytes over a connection of its own; return the socket."""
        connection = socket.create_connection((self.host.strip("[]"), port or self.port),
                                              timeout=PATIENCE)
        connection.sendall(data)
        return connection

    def answers(self, data, port=None):
        """Send bytes, and read to the end; return the answers: [(status, headers, body), ...]."""
        with self.raw(data, port) as connection:
            received = b"".join(iter(lambda: connection.recv(65536), b""))
        found = []
        while received:
            head, _, rest = received.partition(b"\r\n\r\n")
            lines = head.decode().split("\r\n")
            headers = {name.lower(): value
                       for name, value in (line.split(": ", 1) for line in lines[1:])}
            length = int(headers.get("content-length", 0))
            found.append((int(lines[0].split()[1]), headers, rest[:length].decode()))
            received = rest[length:]
        return found

    def active(self):
        return self.get("/metrics")[1]["active_requests"]

    def sample(self, name):
        """Return the value of a sample of the Prometheus port; `name` is with its labels."""
        pattern = "^%s (.*)$" % re.escape(name)
        return float(re.search(pattern, self.prometheus(), re.MULTILINE).group(1))

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
    """Run function(0), function(1), ... at once; return what they return, in order.

    An exception of one is raised here.
    """
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


def host_of_its_own():
    """Return an address of loopback for a test that leaves a port and takes it again: on it nobody
    else takes one. Only Linux has more than one.
    """
    if sys.platform != "linux":
        return "127.0.0.1"
    return "127.%d.%d.%d" % tuple(random.randrange(1, 255) for _ in range(3))


def free_ports(host, count):
    """Return ports for a program that must know them before it starts, or cannot tell them."""
    with contextlib.ExitStack() as stack:
        takers = [stack.enter_context(socket.socket()) for _ in range(count)]
        for taker in takers:
            taker.bind((host, 0))
        return [taker.getsockname()[1] for taker in takers]


class FakeTime:
    """What sidecar.py uses of `time`, with a clock that only the test moves."""

    def __init__(self):
        self.now = 1000.0
        self.gmtime, self.strftime = time.gmtime, time.strftime

    def monotonic(self):
        return self.now

    def time(self):
        return self.now + 1.6e9


class Clockwork(unittest.TestCase):
    """A tracker with a clock that the test moves, and processes that it sets."""

    GRACE, QUIET = 30.0, 0.5

    def setUp(self):
        self.clock = FakeTime()
        self.addCleanup(setattr, sidecar_module, "time", sidecar_module.time)
        sidecar_module.time = self.clock
        log = sidecar_module.log
        silent = logging.NullHandler()
        log.addHandler(silent)
        self.addCleanup(log.removeHandler, silent)
        self.restart()

    def restart(self, **options):
        """Begin anew, with a tracker that has counted nothing."""
        self.oldest_process = None
        self.looks = 0
        self.processes = types.SimpleNamespace(oldest_began=self.look, unseen=False)
        self.tracker = sidecar_module.RequestTracker(
            self.GRACE, self.QUIET, options.get("timeout", 0.0), self.processes)

    def look(self, now):
        self.looks += 1
        return self.oldest_process

    def pass_time(self, seconds):
        self.clock.now += seconds

    def start(self, request_id=None, hold=False, **options):
        return self.tracker.start(request_id, hold, **options)

    def hold(self, request_id=None):
        """Return a start that is held."""
        held = self.start(request_id, hold=True)
        self.assertIsNone(held.answer)
        return held

    def answer(self, held):
        return self.tracker.answer_of_held(held)

    @property
    def active(self):
        return [request_id for request_id, _ in self.tracker.active_requests()]

    def figure(self, name):
        return self.tracker.snapshot()[name]


class TestTransitions(Clockwork):
    """The life of a drain: each row a phase, each column what happens, and the phase after it."""

    # in this phase         /drain      SIGTERM     the last    the grace   /reset      /reset
    #                                               end, quiet  period over             ?prefix=
    TABLE = """
    serving                 draining    draining    serving     serving     serving     serving
    draining                draining    draining    completed   timed_out   serving     draining
    completed               completed   completed   completed   completed   serving     completed
    completed,active        draining    draining    completed   completed   serving     completed
    timed_out               draining    timed_out   timed_out   timed_out   serving     timed_out
    draining,SIGTERM        draining    draining    completed   timed_out   draining    draining
    completed,SIGTERM       completed   completed   completed   completed   completed   completed
    timed_out,SIGTERM       draining    timed_out   timed_out   timed_out   timed_out   timed_out
    """
    # in this phase         a start     that is     of a        15 s after  still held  5 s
    #                                   held        restarted   the grace   at once     after
    #                                               worker      period                  the drain
    STARTS = """
    serving                 serving     serving     serving     serving     serving     serving
    draining                draining    draining    draining    serving     draining    draining
    completed               completed   completed   serving     serving     completed   serving
    completed,active        completed   completed   serving     serving     completed   serving
    timed_out               timed_out   timed_out   serving     serving     timed_out   serving
    draining,SIGTERM        draining    draining    draining    timed_out   draining    draining
    completed,SIGTERM       completed   completed   completed   completed   completed   completed
    timed_out,SIGTERM       timed_out   timed_out   timed_out   timed_out   timed_out   timed_out
    """

    def bring_to(self, state):
        """Bring a new tracker into a phase; in each but `completed` the request "a" is active."""
        self.restart()
        phase, _, more = state.partition(",")
        self.start("a")
        if phase != "serving":
            self.tracker.begin_drain(terminating=more == "SIGTERM")
        if phase == "completed":
            self.end_all()
        if phase == "timed_out":
            self.pass_time(self.GRACE)
        if more == "active":
            self.assertEqual(self.phase(), "completed")
            self.start("a")
        self.assertEqual(self.phase(), phase)

    def end_all(self):
        for request_id in self.active:
            self.tracker.end(request_id)
        self.pass_time(self.QUIET)

    def phase(self):
        """Return the phase; for one that is drained, how it came to that."""
        phase = self.tracker.phase()
        return self.tracker._drain.outcome if phase == "drained" else phase

    def start_of_a_restarted_worker(self):
        self.pass_time(1)
        self.oldest_process = self.clock.now
        self.pass_time(1)
        self.start("b", hold=True)

    def held_start_is_looked_at(self, seconds):
        held = self.start("b", hold=True)
        self.pass_time(seconds)
        self.answer(held)

    def check(self, table, events):
        for row in table.strip().splitlines():
            state, *expected = row.split()
            self.assertEqual(len(expected), len(events))
            for event, phase in zip(events, expected):
                self.bring_to(state)
                event()
                self.assertEqual(self.phase(), phase, (state, events.index(event)))

    def test_table(self):
        self.check(self.TABLE, [
            self.tracker_call("begin_drain"), self.tracker_call("begin_drain", terminating=True),
            self.end_all, lambda: self.pass_time(self.GRACE), self.tracker_call("reset"),
            self.tracker_call("reset", "other:")])

    def tracker_call(self, name, *args, **options):
        return lambda: getattr(self.tracker, name)(*args, **options)

    def test_starts(self):
        self.check(self.STARTS, [
            lambda: self.start("b"), lambda: self.start("b", hold=True),
            self.start_of_a_restarted_worker,
            lambda: (self.pass_time(self.GRACE + 15), self.start("b")),
            lambda: self.held_start_is_looked_at(0),
            lambda: self.held_start_is_looked_at(5)])

    def test_who_drains_joins_the_drain_that_is_under_way(self):
        self.start("a")
        first = self.tracker.begin_drain()
        self.pass_time(self.GRACE - 1)
        self.assertIs(self.tracker.begin_drain(terminating=True), first)
        self.pass_time(1)
        self.assertEqual(self.tracker.wait(first), "timed_out")

    def test_a_new_drain_has_a_clock_of_its_own(self):
        self.bring_to("completed,active")
        drain = self.tracker.begin_drain(terminating=True)
        self.assertIsNone(self.tracker.wait(drain, 0))
        self.pass_time(self.GRACE - 0.1)
        self.assertIsNone(self.tracker.wait(drain, 0))
        self.pass_time(0.1)
        self.assertEqual(self.tracker.wait(drain, 0), "timed_out")

    def test_sigterm_after_a_drain_that_timed_out_does_not_wait_again(self):
        self.bring_to("timed_out")
        drain = self.tracker.begin_drain(terminating=True)
        self.assertEqual(self.tracker.wait(drain, 0), "timed_out")

    def test_the_quiet_period(self):
        """It begins with the drain at the earliest, and anew with each request."""
        self.pass_time(9)
        drain = self.tracker.begin_drain()
        self.pass_time(self.QUIET - 0.1)
        self.start("a")
        self.pass_time(9)
        self.tracker.end("a")
        self.pass_time(self.QUIET - 0.1)
        self.assertIsNone(self.tracker.wait(drain, 0))
        self.pass_time(0.1)
        self.assertEqual(self.tracker.wait(drain, 0), "completed")

    def test_who_waited_for_a_drain_that_is_undone_is_told_so(self):
        self.start("a")
        drain = self.tracker.begin_drain()
        self.tracker.reset()
        self.assertEqual(self.tracker.wait(drain), "undone")
        self.assertEqual(self.figure("drains"), {"completed": 0, "timed_out": 0, "undone": 1})


class TestHeldStarts(Clockwork):
    """What becomes of a start that comes while draining, with a clock that the test moves."""

    def drain(self, *active):
        for request_id in active:
            self.start(request_id)
        return self.tracker.begin_drain()

    def test_it_is_neither_counted_nor_answered(self):
        drain = self.drain("a")
        held = self.hold("b")
        self.assertEqual((self.active, self.figure("total_requests")), (["a"], 1))
        self.pass_time(3)
        self.assertEqual((self.figure("held_starts"), self.figure("oldest_held_start_age_seconds")),
                         (1, 3.0))
        self.tracker.end("a")
        self.pass_time(self.QUIET)
        self.assertEqual(self.tracker.wait(drain), "completed")
        self.assertIsNone(self.answer(held))

    def test_one_that_need_not_wait_or_is_active_or_over_is_answered_at_once(self):
        self.drain("a")
        self.assertEqual(self.start("b").answer, ("b", 2, True))
        self.assertEqual(self.start("a", hold=True).answer, ("a", 2, True))
        self.tracker.end("early")
        self.assertEqual(self.start("early", hold=True).answer, ("early", 2, True))

    def test_an_end_that_overtook_its_start(self):
        """It is remembered for 10 s, once; the start is over when it comes."""
        self.assertEqual(self.tracker.end("a", 0.2), (False, 0, False))
        self.assertEqual(self.start("a").answer, ("a", 0, False))
        counts, total = self.figure("durations")
        self.assertEqual((sum(counts), total, self.figure("total_requests")), (1, 0.2, 1))
        self.assertEqual(self.tracker.end("a"), (True, 0, False))       # again: no error
        self.assertEqual(self.start("a").answer, ("a", 1, False))       # a later request
        self.tracker.end("b")
        self.pass_time(10)
        self.assertEqual(self.start("b").answer, ("b", 2, False))
        self.tracker.end()
        self.assertEqual(self.start().answer[1], 3)                     # none without an id

    def test_five_seconds_after_the_drain_all_are_counted_and_it_is_undone(self):
        self.drain()
        held = [self.hold("a"), self.hold("b")]
        self.pass_time(self.QUIET)
        self.assertEqual(self.tracker.phase(), "drained")
        self.pass_time(4.9)
        self.assertEqual([self.answer(one) for one in held], [None, None])
        self.pass_time(0.1)
        self.assertEqual([self.answer(one) for one in held], [("a", 1, False), ("b", 2, False)])

    def test_after_sigterm_none_is_let_go_before_run_has_passed_the_signal_on(self):
        held = []
        self.drain()
        held.append(self.hold("a"))
        self.tracker.begin_drain(terminating=True)
        self.pass_time(3600)
        self.assertIsNone(self.answer(held[0]))
        self.tracker.passed_on()
        self.pass_time(0.9)
        self.assertIsNone(self.answer(held[0]))
        self.pass_time(0.1)
        self.assertEqual(self.answer(held[0]), ("a", 1, True))

    def test_what_may_block_the_worker_is_answered_one_by_one(self):
        self.drain("a")
        first, second = self.hold(), self.hold()
        self.pass_time(4.9)
        self.assertIsNone(self.answer(first))
        self.pass_time(0.1)
        self.assertIsNone(self.answer(second))              # the oldest goes first
        self.assertEqual(self.answer(first)[1:], (2, True))
        self.pass_time(4.9)
        self.assertIsNone(self.answer(second))
        self.pass_time(0.1)
        self.assertEqual(self.answer(second)[1:], (3, True))

    def test_an_end_puts_that_off(self):
        self.drain("a", "b")
        held = self.hold()
        self.pass_time(4.9)
        self.tracker.end("a")
        self.pass_time(4.9)
        self.assertIsNone(self.answer(held))
        self.pass_time(0.1)
        self.assertIsNotNone(self.answer(held))

    def test_where_the_count_falls_within_a_second_it_was_the_hold_that_blocked(self):
        for seconds, ends, freed in ((1.0, 2, True), (1.1, 2, False), (0.5, 1, False)):
            self.restart()
            self.drain("a", "b", "c")
            first, second = self.hold(), self.hold()
            self.pass_time(5)
            self.assertEqual(self.answer(first)[1], 4)
            self.pass_time(seconds)
            for request_id in "ab"[:ends]:
                self.tracker.end(request_id)
            self.assertEqual(self.answer(second) is not None, freed, (seconds, ends))
            self.assertEqual(self.start("late", hold=True).answer is not None, freed)

    def test_none_is_held_for_over_15_seconds_while_draining(self):
        self.drain("a")
        held = self.hold()
        for number in range(3):                             # while others end, so it is not blocked
            self.start(str(number))
            self.pass_time(4.9)
            self.tracker.end(str(number))
        self.assertIsNone(self.answer(held))
        self.pass_time(0.4)
        self.assertIsNotNone(self.answer(held))

    def test_a_client_that_gave_up_is_counted_and_no_more_are_held(self):
        self.drain("a")
        one, other = self.hold(), self.hold()
        self.tracker.client_gone(one)
        self.assertEqual(len(self.active), 3)
        self.assertEqual(self.answer(other)[1:], (3, True))
        self.assertIsNotNone(self.start(hold=True).answer)

    def test_a_request_whose_client_heard_no_answer_ends_last_and_lapses(self):
        self.drain()
        held = self.hold()
        self.tracker.client_gone(held)
        unheard, = self.active
        heard = self.start().answer[0]
        self.tracker.end()
        self.assertEqual(self.active, [unheard])
        self.pass_time(9.9)
        self.assertEqual(self.active, [unheard])
        self.pass_time(0.1)
        self.assertEqual((self.active, self.figure("expired_requests")), ([], 1))
        self.assertEqual(self.tracker.end(), (True, 0, True))       # its end is still known
        self.assertNotEqual(heard, unheard)

    def test_it_lapses_after_the_longest_of_the_last_requests(self):
        self.start("long")
        self.pass_time(25)
        self.tracker.end("long", 0.1)                       # by the clock here, not by what it says
        self.drain("a")
        self.tracker.client_gone(self.hold("b"))
        self.pass_time(24.9)
        self.assertEqual(self.active, ["a", "b"])
        self.pass_time(0.1)
        self.assertEqual(self.active, ["a"])

    def test_after_a_drain_sigterm_does_not_wait_for_those_whose_clients_hung_up(self):
        """They were held when SIGTERM ended their worker."""
        drain = self.drain()
        held = self.hold()
        self.pass_time(self.QUIET)
        self.assertEqual(self.tracker.wait(drain), "completed")
        self.tracker.client_gone(held)
        self.assertEqual(len(self.active), 1)
        self.assertIs(self.tracker.begin_drain(terminating=True), drain)

    def test_one_that_is_started_again_with_its_id_is_heard(self):
        self.drain("a")
        self.tracker.client_gone(self.hold("b"))
        self.assertEqual(self.start("b").answer, ("b", 2, True))
        self.pass_time(25)
        self.assertEqual(self.active, ["a", "b"])

    def test_a_client_that_hung_up_says_nothing_of_a_later_request_of_its_id(self):
        self.drain("a")
        held = self.hold("b")
        self.pass_time(5)
        self.answer(held)
        self.tracker.end("b")
        self.start("b")
        self.tracker.client_gone(held)
        self.pass_time(25)
        self.assertIn("b", self.active)

    def test_two_held_with_one_id_are_one_request(self):
        self.drain("a")
        first, again = self.hold("b"), self.hold("b")
        self.tracker.client_gone(first)
        self.assertEqual(self.answer(again), ("b", 2, True))
        self.assertEqual(self.figure("total_requests"), 2)

    def test_the_time_out_of_requests_stands_still_while_one_is_held(self):
        self.restart(timeout=4.0)
        self.drain("a")
        self.pass_time(1)
        held = self.hold("b")
        self.pass_time(4.9)
        self.assertEqual(self.active, ["a"])
        self.tracker.client_gone(held)
        self.pass_time(2.9)
        self.assertEqual(self.active, ["a", "b"])
        self.pass_time(0.1)
        self.assertEqual(self.active, ["b"])

    def test_what_a_process_that_is_gone_left_behind(self):
        """Only what came by loopback, and only where another process or none is there now."""
        self.oldest_process = self.clock.now - 1
        self.start("a")
        self.start("from afar", local=False)
        self.pass_time(1)
        self.assertEqual(self.active, ["a", "from afar"])
        self.oldest_process = None                          # nobody can tell
        self.assertEqual(self.active, ["a", "from afar"])
        self.pass_time(1)
        self.oldest_process = self.clock.now
        self.start("b")
        self.assertEqual(self.active, ["from afar", "b"])
        self.assertEqual((self.figure("expired_requests"), self.figure("left_behind_requests")),
                         (1, 1))
        drain = self.tracker.begin_drain()
        self.pass_time(1)
        self.oldest_process = self.clock.now                # while it waits, too
        self.assertIsNone(self.tracker.wait(drain, 0))
        self.assertEqual(self.active, ["from afar"])

    def test_starts_look_until_a_process_was_seen(self):
        """So that a worker is known that is gone before anybody drains or asks for figures."""
        self.processes.unseen = True
        self.start("a")
        self.assertEqual(self.looks, 1)
        self.processes.unseen = False
        self.start("b")
        self.assertEqual(self.looks, 1)

    def test_an_end_without_an_id_ends_no_request_that_was_left_behind(self):
        self.start()
        self.pass_time(1)
        self.oldest_process = self.clock.now
        self.start()
        self.tracker.end()
        self.assertEqual((self.active, self.figure("left_behind_requests")), ([], 1))

    def test_the_held_start_of_a_process_that_is_gone_is_not_counted(self):
        self.drain("a")
        held = self.hold()
        self.pass_time(1)
        self.oldest_process = self.clock.now
        self.tracker.client_gone(held)
        self.assertEqual((self.active, self.figure("held_starts")), ([], 0))

    def test_reset_lets_all_go_and_keeps_them(self):
        self.drain("a")
        held = self.hold("b")
        self.assertEqual(self.tracker.reset(), 1)
        self.assertIs(self.answer(held)[2], False)
        self.assertEqual(self.active, ["b"])

    def test_reset_with_a_prefix_gives_up_only_that_processs(self):
        for request_id in ("slot1:a", "slot11:a", "slot2:a"):
            self.start(request_id)
        self.start()
        self.assertEqual(self.tracker.reset("slot1:"), 1)
        self.assertEqual(len(self.active), 3)
        self.assertNotIn("slot1:a", self.active)


def documented_endpoints():
    """Return {path: (methods, is it only for those who may change what is counted?)}.

    That is what the docstring of sidecar.py says; TestTables holds the program against it.
    """
    text = sidecar_module.__doc__.partition("\nEndpoints")[2].partition("\nOn METRICS_PORT")[0]
    found = {}
    for entry in re.split(r"^(?=    [* ] [A-Z]+ +/)", text, flags=re.MULTILINE)[1:]:
        star, method, path = re.match(r"    ([* ]) ([A-Z]+) +(\S+)", entry).groups()
        found[path] = {method, *re.findall("([A-Z]+) does the same", entry)}, star == "*"
    return found


ENDPOINTS = documented_endpoints()


class TestManyRequests(unittest.TestCase):
    """What the tracker does with very many of them."""

    def test_a_start_need_not_wait_for_the_end_of_a_reset(self):
        silent = logging.NullHandler()
        sidecar_module.log.addHandler(silent)
        self.addCleanup(sidecar_module.log.removeHandler, silent)
        tracker = sidecar_module.RequestTracker()
        count = 50000
        for _ in range(count):
            tracker.start()
        given_up = []
        resetting = threading.Thread(target=lambda: given_up.append(tracker.reset()))
        resetting.start()
        until(lambda: tracker.snapshot()["expired_requests"])
        tracker.start("meanwhile")
        self.assertLess(tracker.snapshot()["expired_requests"], count)      # it still goes on
        resetting.join(PATIENCE)
        self.assertEqual(given_up, [count])
        self.assertEqual([name for name, _ in tracker.active_requests()], ["meanwhile"])

    def test_the_log_names_some_of_them(self):
        lines = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append((record.msg, record.args))
        sidecar_module.log.addHandler(handler)
        self.addCleanup(sidecar_module.log.removeHandler, handler)
        tracker = sidecar_module.RequestTracker(grace_period_seconds=0.0)
        for _ in range(sidecar_module.MAX_NAMED + 7):
            tracker.start()
        tracker.begin_drain()
        tracker.reset()
        events = collections.Counter(event for event, _ in lines)
        self.assertEqual(events["request given up"], sidecar_module.MAX_NAMED)
        self.assertEqual(events["still active"], sidecar_module.MAX_NAMED)
        self.assertIn(("more requests given up", {"requests": 7}), lines)


class TestDurationHint(Case):
    """A worker whose durations cannot be true is told so once."""

    def ends(self, sidecar, *durations):
        """Each of a request that took 0.1 s and more, as the sidecar saw it."""
        for number, _ in enumerate(durations):
            sidecar.post("/start-request?id=%d" % number)
        until(lambda: sidecar.get("/requests")[1][-1]["age_seconds"] > 0.1)
        for number, duration in enumerate(durations):
            sidecar.post("/end-request?id=%d%s" % (number, duration and "&duration=" + duration))

    def test_gos_defer_that_takes_the_time_before_the_work(self):
        sidecar = self.sidecar()
        self.ends(sidecar, *["87ns"] * 9, "60ms", *["87ns"] * 9, "")        # no ten in a row
        self.ends(sidecar, *["0.2s"] * 10)
        for _ in range(12):                                     # and what was short was soon over
            sidecar.post("/start-request?id=a")
            sidecar.post("/end-request?id=a&duration=87ns")
        self.ends(sidecar, "100ms")
        self.assertNotIn("durations are too short", sidecar.log)
        self.ends(sidecar, *["87ns"] * 10)
        sidecar.wait_for("WARNING durations are too short duration_seconds=.* hint=.*defer")
        self.ends(sidecar, *["87ns"] * 30)
        self.assertEqual(sidecar.whole_log().count("durations are too short"), 1)


class TestCounting(Case):
    """POST /start-request, POST /end-request, GET /metrics and GET /requests."""

    def test_a_request_is_counted_from_its_start_to_its_end(self):
        sidecar = self.sidecar()
        self.assertEqual(sidecar.active(), 0)
        status, started = sidecar.post("/start-request")
        self.assertEqual((status, started["active_requests"], started["draining"]), (200, 1, False))
        self.assertTrue(started["request_id"])
        self.assertEqual(sidecar.active(), 1)
        self.assertEqual(sidecar.post("/end-request?duration=1.2s"),
                         (200, {"active_requests": 0, "draining": False}))
        self.assertEqual(sidecar.active(), 0)

    def test_metrics_have_the_promised_names_and_types(self):
        sidecar = self.sidecar()
        moment = r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$"
        before = sidecar.get("/metrics")[1]
        self.assertEqual(list(before)[:6],
                         ["active_requests", "total_requests", "last_request_time", "start_time",
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
        self.assertEqual((after["active_requests"], after["total_requests"],
                          after["is_processing"]), (0, 1, False))
        self.assertEqual(after["start_time"], before["start_time"])

    def test_a_retried_start_or_end_with_an_id_does_no_harm(self):
        sidecar = self.sidecar()
        for _ in range(3):
            status, answer = sidecar.post("/start-request?id=update-7")
            self.assertEqual((status, answer["request_id"], answer["active_requests"]),
                             (200, "update-7", 1))
        sidecar.post("/start-request?id=update-8")
        for _ in range(3):
            self.assertEqual(sidecar.post("/end-request?id=update-7"),
                             (200, {"active_requests": 1, "draining": False}))
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
        own = [sidecar.post("/start-request" + query)[1]["request_id"]
               for query in ("?id=mine", "", "", "")]
        self.assertEqual(sidecar.post("/end-request")[0], 200)
        self.assertEqual([entry["request_id"] for entry in sidecar.get("/requests")[1]],
                         [own[0], own[2], own[3]])
        self.assertEqual(sidecar.post("/end-request?id=" + own[2])[0], 200)
        self.assertEqual(sidecar.post("/end-request")[0], 200)
        self.assertEqual([entry["request_id"] for entry in sidecar.get("/requests")[1]], ["mine"])
        self.assertEqual(sidecar.post("/end-request")[0], 409)
        self.assertEqual(sidecar.active(), 1)

    def test_ids_that_the_sidecar_hands_out_differ(self):
        sidecars = [self.sidecar(), self.sidecar()]
        handed_out = [sidecar.post("/start-request")[1]["request_id"] for sidecar in sidecars
                      for _ in range(50)]
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
        listed = until(lambda: [entry for entry in sidecar.get("/requests")[1]
                                if entry["age_seconds"] > 0][2:] and
                       sidecar.get("/requests")[1])
        self.assertEqual([entry["request_id"] for entry in listed], ["c", "a", "b"])
        ages = [entry["age_seconds"] for entry in listed]
        self.assertEqual(ages, sorted(ages, reverse=True))

    def test_ids_that_are_no_ids_are_refused(self):
        sidecar = self.sidecar()
        sidecar.post("/start-request?id=%20%7E" + "x" * 126)
        self.assertEqual(sidecar.active(), 1)
        for bad in ("id=", "id=" + "x" * 129, "id=a%0Ab", "id=%00", "id=%1B[2J", "id=a&id=b",
                    "id=a&id=a"):
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

    GOOD = [("1.2s", 1.2), ("1s", 1), ("0s", 0), ("350ms", 0.35), ("150%C2%B5s", 150e-6),
            ("150%CE%BCs", 150e-6), ("150us", 150e-6), ("12ns", 12e-9), ("1m2.5s", 62.5),
            ("1h2m3s", 3723), ("1.5h", 5400), ("0.003s", 0.003), ("5.1e-05s", 5.1e-05),
            ("1e-7s", 1e-07), ("3", 3), ("3.25", 3.25), (".5s", 0.5), ("1.s", 1),
            ("8760h", 31536000)]
    BAD = ["", "abc", "-1s", "nan", "infs", "inf", "1e999s", "1%20s", "+1s", "s", "1m-2s", "1d",
           "8760h1s", "1s1", "1..2s", "%D9%A1s", "0x1s", "1_0s", "1s&duration=1s", "9" * 200]

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
        request = "POST /end-request?duration=150µs HTTP/1.0\r\n\r\n"
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
        # It is rounded.
        self.assertGreaterEqual(sidecar.sample("sidecar_request_duration_seconds_sum"), age - 0.001)


class TestDrain(Case):
    """SIGTERM, SIGINT and /drain."""

    def test_sigterm_waits_for_the_last_request(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            # Only an end wakes it.
            sidecar = self.sidecar(GRACE_PERIOD_SECONDS="1h",
                                   constants={"REPORT_SECONDS": 3600, "LOOK_SECONDS": 3600})
            sidecar.post("/start-request?id=a")
            sidecar.post("/start-request?id=b")
            sidecar.signal(number)
            sidecar.wait_for("drain started")
            self.assertEqual(sidecar.get("/ready"), (503, {"error": "draining"}))
            self.assertEqual(sidecar.get("/health")[0], 200)
            self.assertEqual(sidecar.get("/metrics")[1]["phase"], "draining")
            self.assertEqual(sidecar.sample("sidecar_draining"), 1)
            self.assertEqual(sidecar.post("/start-request?id=c")[1],
                             {"request_id": "c", "active_requests": 3, "draining": True})
            for left, name in ((2, "a"), (1, "b"), (0, "c")):
                self.assertIsNone(sidecar.process.poll())
                self.assertEqual(sidecar.post("/end-request?id=" + name)[1],
                                 {"active_requests": left, "draining": True})
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
            age = sidecar.wait_for("still active request_id=%s age_seconds=(.*)" % name).group(1)
            self.assertGreaterEqual(float(age), 0.3)

    def test_the_log_tells_what_it_waits_for(self):
        sidecar = self.sidecar(constants={"REPORT_SECONDS": 0.05})
        sidecar.post("/start-request?id=stuck")
        sidecar.signal(signal.SIGTERM)
        for _ in range(2):
            sidecar.wait_for(
                "INFO draining active_requests=1 .*oldest_request_id=stuck oldest_age_seconds=",
                len(sidecar.lines))
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

    def test_a_signal_after_the_drain_changes_nothing(self):
        sidecar = self.sidecar()
        page = b"GET / HTTP/1.1\r\nHost: a\r\nAccept: text/html\r\n\r\n"
        with sidecar.raw(page * 2000):              # Nobody reads the answers: its end waits.
            sidecar.signal(signal.SIGTERM)
            sidecar.wait_for("drain completed")
            while sidecar.process.poll() is None:
                sidecar.signal(signal.SIGINT)
        self.assertEqual(sidecar.wait(), 0)
        self.assertEqual(sidecar.log.count("exit status"), 1)

    def test_the_quiet_period_begins_anew_with_each_request(self):
        sidecar = self.sidecar(QUIET_PERIOD_SECONDS=1)
        began = time.monotonic()
        sidecar.signal(signal.SIGTERM)
        sidecar.wait_for("drain started")
        # Taken just before, reported just after.
        self.assertEqual(sidecar.post("/start-request?id=late")[0], 200)
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
        sidecar = self.sidecar(GRACE_PERIOD_SECONDS="1h",
                               constants={"REPORT_SECONDS": 3600, "LOOK_SECONDS": 3600})
        sidecar.post("/start-request?id=a")
        with_answers = []

        def drain(number):
            return sidecar.call("POST" if number % 2 else "GET", "/drain")

        callers = threading.Thread(target=lambda: with_answers.extend(in_threads(8, drain)),
                                   daemon=True)
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
        callers = [sidecar.raw(b"GET /drain HTTP/1.1\r\nHost: a\r\n\r\n") for _ in range(4)]
        sidecar.get("/health")          # Was accepted after them.
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
            idle = [sidecar.raw(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n") for _ in range(20)]
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
        sidecar.signal(signal.SIGTERM)                  # Its grace period is over: no second one.
        self.assertEqual(sidecar.wait(), 1)
        sidecar.wait_for("still active request_id=a")

    def test_reset_undoes_a_drain_that_no_sigterm_followed(self):
        sidecar = self.sidecar(GRACE_PERIOD_SECONDS="1h")
        self.assertEqual(sidecar.get("/drain")[0], 200)
        self.assertEqual(sidecar.get("/ready")[0], 503)
        # Where no start is held, one does not undo it: the pod may still be on its way out.
        self.assertEqual(sidecar.post("/start-request?id=a")[1]["draining"], True)
        self.assertEqual(sidecar.get("/metrics")[1]["phase"], "drained")
        self.assertEqual(sidecar.post("/reset"), (200, {"given_up": 1}))
        sidecar.wait_for("serving again")
        self.assertEqual(sidecar.get("/ready")[0], 200)
        self.assertEqual(sidecar.post("/start-request?id=b")[1]["draining"], False)
        sidecar.signal(signal.SIGTERM)                  # And the next drain waits again.
        sidecar.wait_for("drain started active_requests=1")
        sidecar.post("/end-request?id=b")
        self.assertEqual(sidecar.wait(), 0)

    def test_callers_of_a_drain_that_is_undone_are_told(self):
        sidecar = self.sidecar(GRACE_PERIOD_SECONDS="1h")
        sidecar.post("/start-request")
        with sidecar.raw(b"GET /drain HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n") as caller:
            sidecar.wait_for("drain started")
            sidecar.post("/reset")
            answer = b"".join(iter(lambda: caller.recv(65536), b"")).decode()
        self.assertIn("HTTP/1.1 503 ", answer)
        self.assertIn('{"error": "undone", "active_requests": 0}', answer)
        self.assertEqual(sidecar.sample('sidecar_drains_total{outcome="undone"}'), 1)

    def test_a_start_undoes_it_once_a_pod_that_goes_would_be_gone(self):
        sidecar = self.sidecar(GRACE_PERIOD_SECONDS=0, constants={"GONE_SECONDS": 0.0})
        self.assertEqual(sidecar.get("/drain")[0], 200)
        self.assertEqual(sidecar.post("/start-request")[1]["draining"], False)
        sidecar.wait_for("serving again")

    def test_a_sigterm_that_is_delivered_twice_is_one(self):
        sidecar = self.sidecar(GRACE_PERIOD_SECONDS="1h", constants={"REPEATED_SECONDS": 3600})
        sidecar.post("/start-request")
        sidecar.signal(signal.SIGTERM)
        sidecar.wait_for("drain started")
        sidecar.signal(signal.SIGTERM)
        self.assertEqual(sidecar.get("/ready")[0], 503)     # It is still there.
        sidecar.post("/end-request")
        self.assertEqual(sidecar.wait(), 0)
        self.assertNotIn("second signal", sidecar.log)

    def test_a_later_sigterm_ends_the_wait_and_a_second_ctrl_c_always_does(self):
        for number, constants in ((signal.SIGTERM, {"REPEATED_SECONDS": 0}), (signal.SIGINT, {})):
            sidecar = self.sidecar(GRACE_PERIOD_SECONDS="1h", constants=constants)
            sidecar.post("/start-request")
            sidecar.signal(number)
            sidecar.wait_for("drain started")
            sidecar.signal(number)
            self.assertEqual(sidecar.wait(), 1)


class TestHolding(Case):
    """A start that comes while draining, as its client sees it."""

    START = b"POST /start-request HTTP/1.1\r\nHost: x\r\n\r\n"

    def draining(self, *argv, **options):
        """Return a sidecar that holds starts, and drains because the request "a" is active."""
        sidecar = self.sidecar(*argv, **dict(dict(HOLD_STARTS="always", GRACE_PERIOD_SECONDS="1h"),
                                             **options))
        sidecar.post("/start-request?id=a")
        caller = sidecar.raw(b"GET /drain HTTP/1.1\r\nHost: x\r\n\r\n")
        self.addCleanup(caller.close)
        sidecar.wait_for("drain started")
        return sidecar

    def hold(self, sidecar, count=1):
        """Return a connection whose start is held, after the first bytes of its answer."""
        connection = sidecar.raw(self.START)
        self.addCleanup(connection.close)
        until(lambda: sidecar.sample("sidecar_held_starts") == count)
        return connection

    @staticmethod
    def read_until(connection, pattern):
        """Read until what has come matches; return it."""
        received = b""
        while not re.search(pattern, received, re.DOTALL):
            piece = connection.recv(65536)
            if not piece:
                raise AssertionError("closed after %r" % received)
            received += piece
        return received

    def test_its_answer_trickles_until_it_is_whole(self):
        """So a time-out for each read never fires, and the connection can be used again."""
        sidecar = self.draining()
        connection = self.hold(sidecar)
        begin = self.read_until(connection, rb"Held: \.\.\.")
        self.assertRegex(begin, rb"\AHTTP/1.1 200 OK\r\nHeld: \.+\Z")
        sidecar.post("/reset")
        rest = self.read_until(connection, rb"}\n")
        head, _, body = rest.partition(b"\r\n\r\n")
        self.assertEqual(json.loads(body.decode()), {
            "request_id": json.loads(body.decode())["request_id"], "active_requests": 2,
            "draining": False})
        self.assertIn(b"\r\nContent-Length: %d\r\n" % len(body), head)
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        self.assertTrue(self.read_until(connection, rb"}\n").startswith(b"HTTP/1.1 200 OK\r\n"))

    def test_every_client_library_reads_it(self):
        """Here the one of the standard library, with a time-out for each read."""
        sidecar = self.draining(constants={"TRICKLE_SECONDS": 0.05})
        connection = http.client.HTTPConnection(sidecar.host, sidecar.port, timeout=1)
        self.addCleanup(connection.close)
        answers = []

        def ask():
            connection.request("POST", "/start-request?id=b")
            answers.append(json.loads(connection.getresponse().read().decode()))
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        sidecar.wait_for("holding starts")
        sidecar.post("/reset")
        asking.join(PATIENCE)
        self.assertEqual([answer["request_id"] for answer in answers], ["b"])
        self.assertEqual(sidecar.active(), 1)

    def test_a_client_that_hangs_up_is_counted(self):
        sidecar = self.draining()
        self.hold(sidecar).close()
        sidecar.wait_for('starts are not held any longer reason="a client gave up"')
        self.assertEqual(sidecar.active(), 2)
        self.assertEqual(sidecar.sample("sidecar_held_starts"), 0)

    def test_a_half_closed_connection_is_no_client_that_hung_up(self):
        sidecar = self.draining()
        connection = self.hold(sidecar)
        connection.shutdown(socket.SHUT_WR)
        self.read_until(connection, rb"Held: \.\.\.\.")
        self.assertEqual(sidecar.active(), 1)
        sidecar.post("/reset")
        self.read_until(connection, rb'"draining": false}\n')

    def test_the_sidecar_exits_and_answers_nobody(self):
        sidecar = self.draining()
        connection = self.hold(sidecar)
        sidecar.signal(signal.SIGTERM)
        sidecar.wait_for("INFO signal")
        sidecar.post("/end-request?id=a")
        self.assertEqual(sidecar.wait(), 0)
        with self.assertRaisesRegex(AssertionError, r"closed after b'HTTP/1.1 200 OK"):
            self.read_until(connection, rb"}\n")

    def test_the_query_decides_for_one_call(self):
        sidecar = self.draining(HOLD_STARTS="never")
        self.assertEqual(sidecar.post("/start-request?id=b")[1]["draining"], True)
        self.assertEqual(sidecar.post("/start-request?hold=maybe"),
                         (400, {"error": "hold 'maybe': expected true or false"}))
        self.START = self.START.replace(b"request ", b"request?hold=true ")
        self.hold(sidecar)
        sidecar = self.draining()
        self.assertEqual(sidecar.post("/start-request?hold=false")[1]["draining"], True)
        self.assertNotIn("holding starts", sidecar.whole_log())

    def test_auto_holds_only_where_sigterm_surely_ends_the_worker(self):
        sidecar = self.draining(HOLD_STARTS="auto", KUBERNETES_SERVICE_HOST="10.0.0.1")
        self.assertEqual(sidecar.post("/start-request")[1]["draining"], True)
        missing = "WARNING starts are not held while draining missing=\"shareProcessNamespace: true"
        self.assertEqual(sidecar.whole_log().count(missing), 1)
        for options in ({"HOLD_STARTS": "never", "KUBERNETES_SERVICE_HOST": "10.0.0.1"},
                        {"HOLD_STARTS": "auto", "KUBERNETES_SERVICE_HOST": None}):
            self.assertNotIn("starts are not held", self.draining(**options).whole_log())

    def test_the_log_tells_it_once_a_drain(self):
        sidecar = self.draining()
        self.hold(sidecar)
        self.hold(sidecar, 2)
        sidecar.post("/reset")
        self.assertEqual(sidecar.whole_log().count("holding starts"), 1)

    def test_run_ends_a_worker_whose_next_start_is_held(self):
        """One without a signal handler, which does not look at `draining`."""
        loop = ("import json, os, urllib.request as u\n"
                "while True:\n"
                "    for path in ('/start-request', '/end-request'):\n"
                "        u.urlopen(u.Request(os.environ['SIDECAR_URL'] + path, method='POST'))\n")
        sidecar = self.sidecar("run", "--", sys.executable, "-c", loop, GRACE_PERIOD_SECONDS="1h")
        until(lambda: sidecar.get("/metrics")[1]["total_requests"] > 20)
        sidecar.signal(signal.SIGTERM)
        self.assertEqual(sidecar.wait(), 128 + signal.SIGTERM)
        sidecar.wait_for("drain completed active_requests=0 held_starts=[01] ")
        self.assertNotIn("WARNING request given up", sidecar.log)    # of one that was answered

    def test_run_lets_a_worker_go_on_that_ends_in_its_own_way(self):
        """It has a handler for SIGTERM, and first does what it has taken."""
        loop = ("import os, signal, sys, urllib.request as u\n"
                "stopping = []\n"
                "signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))\n"
                "done = 0\n"
                "while not stopping:\n"
                "    for path in ('/start-request', '/end-request'):\n"
                "        u.urlopen(u.Request(os.environ['SIDECAR_URL'] + path, method='POST'))\n"
                "    done += 1\n"
                "sys.exit(7 if done else 8)\n")
        sidecar = self.sidecar("run", "--", sys.executable, "-c", loop, GRACE_PERIOD_SECONDS="1h")
        until(lambda: sidecar.get("/metrics")[1]["total_requests"] > 20)
        sidecar.signal(signal.SIGTERM)
        self.assertEqual(sidecar.wait(), 7)
        self.assertNotIn("request given up", sidecar.log)


class TestEndpoints(Case):
    """What is common to every endpoint."""

    def test_head_works_wherever_get_does(self):
        sidecar = self.sidecar()
        for path in [path for path, (methods, star) in ENDPOINTS.items() if not star]:
            with_body, without = sidecar.answers(
                ("GET %s HTTP/1.1\r\nHost: a\r\n\r\nHEAD %s HTTP/1.0\r\n\r\n"
                 % (path, path)).encode())[:2]
            self.assertEqual((with_body[0], without[0]), (200, 200), path)
            self.assertTrue(with_body[2])
            self.assertEqual(without[2], "")
        with sidecar.raw(b"HEAD /metrics HTTP/1.0\r\n\r\n", sidecar.metrics_port) as connection:
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        self.assertTrue(answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"\r\n\r\n"),
                        answer)

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
        for path, (methods, _) in ENDPOINTS.items():
            allow = ", ".join(sorted(methods) + ["HEAD"] * ("GET" in methods))
            for method in {"GET", "POST", "PUT", "DELETE", "OPTIONS", "BREW"} - methods:
                answer = sidecar.answers(("%s %s HTTP/1.0\r\n\r\n" % (method, path)).encode())[0]
                self.assertEqual((answer[0], answer[1]["allow"]), (405, allow), (method, path))
                self.assertIn("error", json.loads(answer[2]))
        self.assertEqual(sidecar.get("/metrics")[1]["total_requests"], 0)
        self.assertEqual(sidecar.call("POST", "/metrics", port=sidecar.metrics_port)[0], 405)

    def test_a_browser_on_another_site_may_not_change_anything(self):
        sidecar = self.sidecar()
        for origin, expected in (("https://example.com", 403), ("null", 403),
                                 ("http://127.0.0.1.example.com:8081", 403),
                                 ("http://localhost:8081", 200), ("http://[::1]:8081", 200),
                                 ("http://127.0.0.1", 200)):
            self.assertEqual(sidecar.call("POST", "/start-request", headers={"Origin": origin})[0],
                             expected, origin)
        self.assertEqual(sidecar.active(), 3)
        self.assertEqual(sidecar.call("GET", "/drain", headers={"Sec-Fetch-Site": "cross-site"})[0],
                         403)

    def test_it_listens_on_ipv4_and_ipv6(self):
        sidecar = self.sidecar(SIDECAR_HOST=None)
        for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            try:
                socket.socket(family).close()
            except OSError:
                continue
            sidecar.host = host
            # IPv4-mapped loopback is loopback too.
            self.assertEqual(sidecar.post("/start-request")[0], 200)
        for host in ("127.0.0.1", "localhost"):
            self.assertEqual(self.sidecar(SIDECAR_HOST=host).get("/health")[0], 200)


class TestHostileClients(Case):
    """Bad input never leaves a traceback, a lost count or a stuck server."""

    def setUp(self):
        self.target = self.sidecar()

    def tearDown(self):
        self.assertEqual(self.target.get("/health")[0], 200)
        self.assertNotRegex(self.target.whole_log(), "Traceback|failed")

    def statuses(self, data):
        answers = self.target.answers(data)
        for status, _, body in answers:
            if status >= 400:
                self.assertEqual(list(json.loads(body))[:1], ["error"])
        return [status for status, _, _ in answers]

    def test_malformed_requests_are_400(self):
        for head in (b"GET", b"GET /health", b"GET /health HTTP/2.0", b"GET /health HTTP/1.1 x",
                     b"GET  /health HTTP/1.1", b"GET health HTTP/1.1", b"G@T /health HTTP/1.1",
                     b"\x16\x03\x01\x02\x00\x01\x00", b"GET /\x00 HTTP/1.1",
                     b"GET /health HTTP/1.1\r\nHost: a\r\nno colon",
                     b"GET /health HTTP/1.1\r\nHost: a\r\n: empty",
                     b"GET /health HTTP/1.1\r\nHost: a\r\nspace : x",
                     b"GET /health HTTP/1.1\r\nHost: a\r\nA: x\r\n folded",
                     b"GET /health HTTP/1.1\r\nHost: a\r\nA: \x00",
                     b"GET /health HTTP/1.1\r\nHost: a\r\nA: a\rb"):
            self.assertEqual(self.statuses(head + b"\r\n\r\n"), [400], head)

    def test_over_long_heads_are_414_and_431(self):
        self.assertEqual(self.statuses(b"GET /" + b"x" * 9000 + b" HTTP/1.0\r\n\r\n"), [414])
        self.assertEqual(self.statuses(b"GET /" + b"x" * 100000), [414])
        self.assertEqual(self.statuses(b"GET / HTTP/1.0\r\nA: " + b"x" * 20000 + b"\r\n\r\n"),
                         [431])
        self.assertEqual(self.statuses(b"GET / HTTP/1.0\r\n" + b"A: x\r\n" * 20000 + b"\r\n"),
                         [431])
        self.assertEqual(self.statuses(b"GET /health HTTP/1.0\r\nA: " + b"x" * 8000 + b"\r\n\r\n"),
                         [200])

    def test_a_body_is_read_and_dropped(self):
        last = b"GET /health HTTP/1.0\r\n\r\n"
        for body in (b"Content-Length: 5\r\n\r\nhello", b"Content-Length: 0\r\n\r\n",
                     b"Content-Length: 65536\r\n\r\n" + b"x" * 65536,
                     b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
                     b"Transfer-Encoding: Chunked\r\n\r\n"
                     b"00A;x=y\r\n0123456789\r\n1\r\nx\r\n0\r\nTrailer: x\r\n\r\n"):
            for method, path in ((b"POST", b"/start-request"), (b"GET", b"/health"),
                                 (b"GET", b"/nowhere")):
                statuses = self.statuses(method + b" " + path + b" HTTP/1.1\r\nHost: a\r\n" + body
                                         + last)
                self.assertEqual(statuses, [404 if path == b"/nowhere" else 200, 200], body[:60])

    def test_a_body_that_is_too_long_or_malformed_closes_the_connection(self):
        after = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
        for fields, expected in ((b"Content-Length: 65537\r\n\r\n" + b"x" * 65537, 413),
                                 (b"Content-Length: 9999999999999999999999\r\n\r\n", 413),
                                 (b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", 413),
                                 (b"Content-Length: -1\r\n\r\n", 400),
                                 (b"Content-Length: 1_0\r\n\r\n", 400),
                                 (b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello", 400), (
                                     b"Content-Length: 5\r\nTransfer-Encoding: "
                                     b"chunked\r\n\r\n0\r\n\r\n", 400),
                                 (b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
                                 (b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n", 400),
                                 (b"Transfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n",
                                  400),
                                 (b"Transfer-Encoding: chunked\r\n\r\n3\r\nhello\r\n0\r\n\r\n",
                                  400), (b"Transfer-Encoding: chunked\r\n\r\n" + b"1" * 9000, 400),
                                 (b"Transfer-Encoding: chunked\r\n\r\n10001\r\n" + b"x" * 65537,
                                  413), (b"Transfer-Encoding: chunked\r\n\r\n"
                                         + (b"8000\r\n" + b"x" * 32768 + b"\r\n") * 3, 413)):
            start = b"POST /start-request HTTP/1.1\r\nHost: a\r\n"
            self.assertEqual(self.statuses(start + fields + after),
                             [expected], fields[:60])
        self.assertEqual(self.target.active(), 0)
        # Sent whole, then read.
        self.assertEqual(self.target.call("POST", "/start-request", b"x" * (8 << 20))[0], 413)

    def test_expect_100_continue(self):
        head = (b"POST /start-request HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n"
                b"Content-Length: %d\r\n\r\n")
        with self.target.raw(head % 5) as connection:
            self.assertEqual(connection.recv(65536), b"HTTP/1.1 100 Continue\r\n\r\n")
            connection.sendall(b"hello")
            self.assertTrue(connection.recv(65536).startswith(b"HTTP/1.1 200 OK\r\n"))
        self.assertEqual(self.statuses(head % 70000), [413])
        old = head.replace(b"1.1", b"1.0") % 5
        self.assertEqual(self.target.answers(old + b"hello")[0][0], 200)
        with self.target.raw(old) as connection:    # an HTTP/1.0 client does not know what a 100 is
            connection.shutdown(socket.SHUT_WR)
            self.assertEqual(connection.recv(65536), b"")

    def test_pipelined_requests_are_answered_in_order(self):
        requests = (b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n\r\n"
                    b"GET /nowhere HTTP/1.1\nHost: a\n\n"
                    b"POST /start-request HTTP/1.1\r\nHost: a\r\n\r\n"
                    b"POST /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
                    b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        self.assertEqual(self.statuses(requests), [200, 404, 200, 405])

    def test_http_1_0_and_connection_close(self):
        for head, keeps in ((b"HTTP/1.0", False), (b"HTTP/1.0\r\nConnection: Keep-Alive", True),
                            (b"HTTP/1.1\r\nHost: a", True),
                            (b"HTTP/1.1\r\nHost: a\r\nConnection: Close", False)):
            data = b"GET /health " + head + b"\r\n\r\n"
            self.assertEqual(self.statuses(data * 2 + b"GET /ready HTTP/1.0\r\n\r\n"),
                             [200] * (3 if keeps else 1), head)

    def test_absolute_targets(self):
        self.assertEqual(self.statuses(
            b"GET http://sidecar:8081/health HTTP/1.0\r\nHost: sidecar\r\n\r\n"), [200])
        self.assertEqual(self.statuses(b"GET HTTP://sidecar:8081/health HTTP/1.0\r\n\r\n"), [200])
        self.assertEqual(self.statuses(b"GET http://sidecar?x HTTP/1.0\r\n\r\n"), [200])
        self.assertEqual(self.statuses(b"GET http:///health HTTP/1.0\r\n\r\n"), [400])

    def test_options_of_the_server_as_a_whole(self):
        (status, headers, _), = self.target.answers(b"OPTIONS * HTTP/1.0\r\n\r\n")
        self.assertEqual((status, headers["allow"]), (200, "GET, POST, HEAD"))
        self.assertEqual(self.statuses(b"GET * HTTP/1.0\r\n\r\n"), [400])

    def test_requests_in_single_bytes(self):
        with self.target.raw(b"") as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in b"POST /start-request?id=a HTTP/1.0\r\nContent-Length: 2\r\n\r\nhi":
                connection.sendall(bytes([byte]))
            self.assertTrue(connection.recv(65536).startswith(b"HTTP/1.1 200 OK\r\n"))
        self.assertEqual(self.target.active(), 1)

    def test_a_client_that_stops_in_the_middle_is_let_go(self):
        self.target = self.sidecar(constants={"REQUEST_SECONDS": 0.2})
        start = b"POST /start-request HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n"
        for data in b"GET /hea", start + b"he", start:
            self.assertEqual(self.statuses(data), [408])
        self.assertEqual(self.target.active(), 0)
        with self.target.raw(start + b"he"):
            pass                                                    # one that is gone in the middle
        self.assertEqual(self.target.active(), 0)

    def test_an_idle_connection_is_closed(self):
        self.target = self.sidecar(constants={"IDLE_SECONDS": 0.2})
        self.assertEqual(self.statuses(b""), [])
        self.assertEqual(self.statuses(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"), [200])
        two = (b"GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx"
               b"GET /ready HTTP/1.1\r\nHost: a\r\n\r\n")
        self.assertEqual(self.statuses(two), [200] * 2)

    def test_a_client_that_does_not_read_its_answer(self):
        for _ in range(50):
            self.target.raw(b"POST /start-request HTTP/1.1\r\nHost: a\r\n\r\n").close()
        until(lambda: self.target.active() == 50)

    def test_more_than_512_connections(self):
        held = []
        self.addCleanup(lambda: [connection.close() for connection in held])
        for _ in range(512):
            held.append(self.target.raw(b""))
        self.assertEqual(self.target.post("/start-request?id=a")[0], 200)    # the first one goes
        self.assertEqual(held[0].recv(65536), b"")
        for _ in range(10):                        # and some that are gone before they are accepted
            gone = self.target.raw(b"")
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            gone.close()
        held[-1].sendall(b"POST /end-request?id=a HTTP/1.1\r\nHost: a\r\n\r\n")
        self.assertTrue(held[-1].recv(65536).startswith(b"HTTP/1.1 200 "))
        metrics = self.target.get("/metrics")[1]
        self.assertGreaterEqual(metrics["evicted_connections"], 1)
        self.assertEqual((metrics["refused_connections"], metrics["active_requests"]), (0, 0))
        self.target.wait_for("WARNING many connections: each is closed after its answer client=")
        self.target.wait_for("WARNING too many connections: the longest idle is closed")
        self.assertEqual(self.target.log.count("WARNING"), 2)

    def test_a_burst_of_300_connects(self):
        burst = [socket.socket() for _ in range(300)]
        self.addCleanup(lambda: [connection.close() for connection in burst])
        # So that nothing is accepted: it is the backlog that is tested.
        self.target.signal(signal.SIGSTOP)
        for connection in burst:
            connection.settimeout(PATIENCE)
            connection.connect(("127.0.0.1", self.target.port))
        self.target.signal(signal.SIGCONT)
        for connection in burst:
            connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        for connection in burst:
            self.assertEqual(connection.recv(12), b"HTTP/1.1 200")


def read_families(text):
    """Return {family: [type, help, {sample with its labels: value}]} of an exposition.

    AssertionError: a line of it is none, or stands where it may not.
    """
    families, current = {}, None
    for line in text.splitlines():
        comment = re.fullmatch(r"# (HELP|TYPE) ([a-z_]+) (.+)", line)
        sample = re.fullmatch(
            r'([a-z_]+)(\{[a-z_]+="[^"]*"(?:,[a-z_]+="[^"]*")*\})? ([-+0-9.e]+)', line)
        if comment and comment.group(1) == "HELP":
            current = comment.group(2)
            assert current not in families, line
            families[current] = [None, comment.group(3), {}]
        elif comment:
            assert comment.group(2) == current, line
            families[current][0] = comment.group(3)
        else:
            assert sample and sample.group(1).startswith(current), line
            name = sample.group(1) + (sample.group(2) or "")
            families[current][2][name] = float(sample.group(3))
    return families


class TestNeverFooled(Case):
    """Input that other servers, and this one before, were fooled by."""

    CHANGING = (("POST", "/start-request"), ("POST", "/end-request"), ("POST", "/reset"),
                ("GET", "/drain"), ("POST", "/drain"))

    def status(self, sidecar, head):
        return sidecar.answers(head + b"\r\n\r\n")[0][0]

    def test_a_request_has_one_host(self):
        sidecar = self.sidecar()
        start = b"GET /health HTTP/1.%s"
        for version, fields, expected in (
                (b"1", b"", 400), (b"1", b"\r\nHost: a\r\nHost: a", 400), (b"0", b"", 200),
                (b"0", b"\r\nHost: a\r\nhost: b", 400), (b"1", b"\r\nHost: a b", 400),
                (b"1", b"\r\nHost: a/b", 400), (b"1", b"\r\nHost: [::1", 400),
                (b"1", b"\r\nHost: a:b", 400), (b"1", b"\r\nHost: my_sidecar:8081", 200),
                (b"1", b"\r\nHost: [fe80::1%eth0]:8081", 200), (b"1", b"\r\nHost:", 200)):
            head = start % version + fields + b"\r\nConnection: close"
            self.assertEqual(self.status(sidecar, head), expected, head)

    def test_a_name_that_dns_could_point_here_changes_nothing(self):
        sidecar = self.sidecar()
        for host in ("rebound.example", "rebound.example:8081", "REBOUND.example.",
                     "127.0.0.1.nip.io"):
            for method, path in self.CHANGING:
                status, answer = sidecar.call(method, path, headers={"Host": host})
                self.assertEqual(status, 403, (host, path))
                self.assertIn("expected a Host that is an address", answer["error"])
            self.assertEqual(sidecar.call("GET", "/health", headers={"Host": host})[0], 200)
        for host in ("sidecar", "sidecar:8081", "localhost", "LOCALHOST:1", "127.0.0.1", "10.1.2.3",
                     "[::1]:8081", "[2001:db8::1]", ""):
            status, _ = sidecar.call("POST", "/start-request", headers={"Host": host})
            self.assertEqual(status, 200, host)
        self.assertEqual(sidecar.active(), 9)
        self.assertEqual(sidecar.get("/ready")[0], 200)
        self.assertEqual(sidecar.sample("sidecar_calls_refused_total"), 4 * len(self.CHANGING))
        sidecar.wait_for("call refused client=127.0.0.1 path=/start-request reason=.* rebound")
        # Once each: the second host has the name of the first one.
        self.assertEqual(sidecar.whole_log().count("WARNING call refused client=127.0.0.1"), 2)

    def test_the_name_that_it_listens_on_is_no_others(self):
        caller = sidecar_module.Caller("127.0.0.1", trusted=True, local=True)
        api = sidecar_module.Api(sidecar_module.RequestTracker(), [], own_name="worker.example")
        with sidecar_module.Server("127.0.0.1", 0, api, api.routes) as server:
            for name, expected in (("worker.example", 200), ("other.example", 403)):
                head = b"POST /reset HTTP/1.1\nHost: %s\n\n" % name.encode()
                answer = server.answer(*server.parse(head, caller))
                self.assertEqual(answer.status, expected, name)

    def test_ids_that_are_no_utf_8_are_refused(self):
        sidecar = self.sidecar()
        for name in (b"%FF", b"%FE", b"\xff", b"a\xc3", b"%C3%28", b"%ED%B3%BF", b"\xc2%B5"):
            for path in (b"/start-request?id=", b"/end-request?duration=1s&id="):
                head = b"POST " + path + name + b" HTTP/1.0"
                self.assertEqual(self.status(sidecar, head), 400, head)
        self.assertEqual(sidecar.get("/metrics")[1]["total_requests"], 0)
        start = "POST /start-request?id=%C3%B6ö HTTP/1.0".encode()
        self.assertEqual(self.status(sidecar, start), 200)
        self.assertEqual(sidecar.get("/requests")[1][0]["request_id"], "öö")
        # A duration that is no UTF-8 is a bad one: told, and the request has ended all the same.
        self.assertEqual(
            self.status(sidecar, b"POST /end-request?id=%C3%B6%C3%B6&duration=1%B5s HTTP/1.0"), 400)
        self.assertEqual(sidecar.active(), 0)

    def test_what_is_no_http_is_told_at_once(self):
        sidecar = self.sidecar(constants={"REQUEST_SECONDS": 2 * PATIENCE})
        hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200))
        for data in (hello, b"\x80.\x01", b"\0\0\0\x08\x04\xd2\x16\x2f", b"SSH-2.0-OpenSSH_9.2\r\n",
                     b"\r\n\r\n\0\r\nQUIT\n", b"*1\r\n", b"PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\n"):
            status, headers, body = sidecar.answers(data)[0]
            self.assertEqual((status, headers["connection"]), (400, "close"), data)
            self.assertIn("TLS", json.loads(body)["error"])

    def test_accept_is_read_as_rfc_9110_has_it(self):
        sidecar = self.sidecar()
        openmetrics = "application/openmetrics-text"
        for accept, expected in (
                (openmetrics, True), ("Application/OpenMetrics-Text; Version=1.0.0", True),
                (openmetrics + ";q=0", False), (openmetrics + "; q=0.000, text/plain", False),
                (openmetrics + ";q=0.4,text/plain;q=0.5", False),
                ("*/*," + openmetrics + ";q=0.1", False),
                (openmetrics + ";Q=0.5,text/plain;q=0.4", True),
                ("text/*;q=0.3," + openmetrics, True),
                (openmetrics + ";q=high", False), (openmetrics + ";q=2", False), ("*/*", False),
                ("application/*", False), ("", False), (",;,", False),
                (openmetrics + ";version=1.0.0;q=0.5," + openmetrics + ";version=0.0.1;q=0.4,"
                 "text/plain;version=0.0.4;q=0.3,*/*;q=0.2", True)):
            self.assertEqual(sidecar.prometheus(accept).endswith("# EOF\n"), expected, accept)
        for accept, expected in (
                ("text/html,application/xhtml+xml,*/*;q=0.8", True), ("TEXT/HTML", True),
                ("*/*", False),
                ("text/html;q=0", False), ("text/html;q=0.1,text/plain", False)):
            page = sidecar.call("GET", "/", headers={"Accept": accept})[1].startswith("<!doctype")
            self.assertEqual(page, expected, accept)

    def test_signs_that_deceive_do_not_reach_the_log(self):
        for log_format in ("text", "json"):
            sidecar = self.sidecar(LOG_LEVEL="DEBUG", LOG_FORMAT=log_format)
            for sign in ("\u202e", "\x85", "\x9b2J", "\u2028", "\u200b", "\ufeff", "\U000e0001"):
                sidecar.answers(("GET /a%sb?%s HTTP/1.0\r\n\r\n" % (sign, sign)).encode())
            sidecar.answers(b"GET /a\xffb HTTP/1.0\r\n\r\n")
            until(lambda lines=sidecar.lines: len(lines) == 9)
            for line in sidecar.lines:
                self.assertTrue(line.isprintable(), ascii(line))
            self.assertIn("/a\\u202eb", sidecar.log)

    def test_a_head_seen_before_is_the_same_request_and_no_other(self):
        """What is looked up whole is told apart by every byte, wherever it is cut."""
        sidecar = self.sidecar()
        first = b"POST /start-request?id=a HTTP/1.1\r\nHost: x\r\n\r\n"
        second = first.replace(b"id=a", b"id=b")
        last = b"GET /requests HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        with sidecar.raw(b"") as connection:
            for head, name in ((first, b"a"), (first, b"a"), (second, b"b"), (first, b"a")):
                connection.sendall(head)
                self.assertIn(b'"request_id": "%s"' % name, connection.recv(65536))
        for data in (first, first * 2 + second, b"\r\n" + second,
                     first + b"\r\n" + second + last[:9]):
            with sidecar.raw(b"") as connection:
                connection.sendall(data)
                rest = last[9:] if data.endswith(last[:9]) else last
                connection.sendall(rest)
                answer = b"".join(iter(lambda: connection.recv(65536), b""))
            self.assertEqual(answer.count(b"HTTP/1.1 200 OK"), data.count(b"POST") + 1)
        self.assertEqual([found["request_id"] for found in sidecar.get("/requests")[1]], ["a", "b"])

    def test_what_is_remembered_of_heads_is_bounded(self):
        """Read heads of which no two are equal, and then the first of them again."""
        few, many = 5, 3 * sidecar_module.MAX_SEEN
        sizes = [(few, b"x" * sidecar_module.MAX_SEEN_BYTES, 0), (few, b"", few),
                 (many, b"", sidecar_module.MAX_SEEN)]
        caller = sidecar_module.Caller("127.0.0.1", trusted=True, local=True)
        api = sidecar_module.Api(sidecar_module.RequestTracker(), [])
        for count, more, remembered in sizes:
            with sidecar_module.Server("127.0.0.1", 0, api, api.routes) as server:
                for number in [*range(count), 0]:
                    head = b"GET /?%d HTTP/1.1\nHost: a\nA: %d%s\n\n" % (number, number, more)
                    request, query = server.parse(head, caller)
                    self.assertEqual(query, str(number))
                    self.assertEqual(request.head.fields["a"], "%d%s" % (number, more.decode()))
                self.assertEqual(server.parse_once.cache_info().currsize, remembered)

    def test_heads_that_differ_in_their_queries_are_parsed_once(self):
        caller = sidecar_module.Caller("127.0.0.1", trusted=True, local=True)
        api = sidecar_module.Api(sidecar_module.RequestTracker(), [])
        with sidecar_module.Server("127.0.0.1", 0, api, api.routes) as server:
            seen = [server.parse(b"GET /%s HTTP/1.0\r\nA: ?b c\r\n\r\n" % query, caller)
                    for query in (b"", b"?", b"?a=b", b"?a=?&%20=" + "é".encode())]
        self.assertEqual([query for _, query in seen], ["", "", "a=b", "a=?&%20=é"])
        self.assertEqual(len({id(request) for request, _ in seen[1:]}), 1)

    def test_the_time_of_a_request_is_not_that_of_its_answer(self):
        """A request that took its time to arrive, and a client that is slow to read."""
        sidecar = self.sidecar(constants={"REQUEST_SECONDS": 2})
        count = 20000                       # of them, so that no buffer holds the answer
        sidecar.answers(b"".join(
            b"POST /start-request?id=%d%s HTTP/1.1\r\nHost: a\r\n\r\n" % (number, b"x" * 100)
            for number in range(count)) + b"GET / HTTP/1.0\r\n\r\n")
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(PATIENCE)
            connection.connect((sidecar.host, sidecar.port))
            pieces = (b"GET /requests", 1.4), (b" HTTP/1.0\r\n", 0.1), (b"\r\n", 1.5)
            for piece, seconds in pieces:
                connection.sendall(piece)
                time.sleep(seconds)         # it is the time that passes that is tested
            answer = b"".join(iter(lambda: connection.recv(1 << 20), b""))
        self.assertEqual(len(json.loads(answer.partition(b"\r\n\r\n")[2].decode())), count)


class TestVariables(Case):
    """The variables, as the server and the commands read them."""

    def command(self, *argv, **env):
        """Return (status, output, errors) of a command; the variables are the ones given alone."""
        clean = {name: value for name, value in os.environ.items()
                 if not name.startswith(("SIDECAR_", "METRICS_"))}
        done = subprocess.Popen([sys.executable, os.path.join(HERE, "sidecar.py"), *argv],
                                env=dict(clean, **{name: str(env[name]) for name in env}),
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE)
        output, errors = done.communicate(timeout=PATIENCE)
        return done.returncode, output.decode(), errors.decode()

    def test_a_port_is_ascii_digits(self):
        for number, text in enumerate(("8_081", "+80", "-1", "٨٠٨١", "80 81", "8081.0", "0x50",
                                       "65536", "１", "8081x")):
            name = ("SIDECAR_PORT", "METRICS_PORT")[number % 2]
            status, _, errors = self.command(**{name: text})
            self.assertEqual((status, errors.count("\n")), (2, 1), text)
            self.assertIn("%s=%r: expected a port from 0 to 65535" % (name, text), errors)
            with self.assertRaises(ValueError):
                sidecar_module.parse_port(text)
        status, _, errors = self.command("health", SIDECAR_PORT="8_081")
        self.assertEqual((status, errors.count("\n")), (2, 1))
        self.assertIn("SIDECAR_PORT='8_081'", errors)

    def test_white_space_around_a_value_does_not_count(self):
        sidecar = self.sidecar(SIDECAR_HOST=" 127.0.0.1\n", SIDECAR_PORT=" 0 ", METRICS_PORT="\t0",
                               GRACE_PERIOD_SECONDS=" 7s ", QUIET_PERIOD_SECONDS=" ",
                               TRUSTED_CLIENTS=" 10.0.0.0/8 ,\n192.0.2.1 ",
                               LOG_LEVEL=" debug\n", LOG_FORMAT=" Text ", HOLD_STARTS=" Never ")
        self.assertEqual(sidecar.get("/metrics")[1]["grace_period_seconds"], 7)
        self.assertEqual(self.command("health", SIDECAR_HOST=" 127.0.0.1 ",
                                      SIDECAR_PORT=" %d\n" % sidecar.port)[0], 0)
        self.assertEqual(self.command("health", SIDECAR_URL=" %s/ \n" % sidecar.url)[0], 0)

    def test_the_commands_find_the_server_by_its_own_variables(self):
        hosts = ["127.0.0.1", "localhost", "0.0.0.0", ""]
        if sys.platform == "linux":
            hosts.append("127.0.0.2")       # elsewhere only 127.0.0.1 is an address of this machine
        if self.sidecar(SIDECAR_HOST="").host == "[::]":
            hosts += ["::1", "::"]
        for host in hosts:
            sidecar = self.sidecar(SIDECAR_HOST=host)
            found = {"SIDECAR_HOST": host, "SIDECAR_PORT": sidecar.port}
            self.assertEqual(self.command("health", **found)[0], 0, host)
            status, output, errors = self.command("drain", **found)
            self.assertEqual((status, errors), (0, ""), host)
            self.assertEqual(json.loads(output), {"status": "drained", "active_requests": 0})

    def test_a_command_needs_a_port_to_ask(self):
        status, _, errors = self.command("health", SIDECAR_PORT=0)
        self.assertEqual((status, errors.count("\n")), (2, 1))
        self.assertIn("SIDECAR_PORT='0': expected the port of a sidecar", errors)
        for url in ("http://127.0.0.1:0", "http://127.0.0.1:8_081", "http://127.0.0.1:+80",
                    "http://:80", "http://[::1", "http://a b:80", "https://127.0.0.1:80",
                    "127.0.0.1:80", "http://x?y"):
            status, _, errors = self.command("health", SIDECAR_URL=url)
            self.assertEqual((status, errors), (
                2, "sidecar: SIDECAR_URL=%r: expected http://HOST:PORT\n" % url))

    def test_drain_ends_by_itself_when_the_sidecar_hangs(self):
        """One hangs at once, one when it has told its grace period: 5 s later it is over."""
        hanging = HangingServer()
        self.addCleanup(hanging.close)
        at_once = self.program(sys.executable, os.path.join(HERE, "sidecar.py"), "drain",
                               env={"SIDECAR_URL": hanging.url})
        sidecar = self.sidecar(GRACE_PERIOD_SECONDS=1)
        sidecar.post("/start-request")
        drain = self.program(sys.executable, os.path.join(HERE, "sidecar.py"), "drain",
                             env={"SIDECAR_URL": sidecar.url})
        sidecar.wait_for("drain started")
        sidecar.signal(signal.SIGSTOP)
        for command, url in ((at_once, hanging.url), (drain, sidecar.url)):
            self.assertEqual(command.wait(), 1)
            self.assertRegex(command.log, "^sidecar: no answer from %s: [^\n]+$" % url)

    def test_an_answer_that_cannot_be_printed_is_no_traceback(self):
        if not os.path.exists("/dev/full"):
            self.skipTest("this system has no /dev/full")
        with open("/dev/full", "wb") as full:
            done = subprocess.run([sys.executable, os.path.join(HERE, "sidecar.py"), "health"],
                                  env=dict(os.environ, SIDECAR_URL=self.sidecar().url),
                                  stdout=full, stderr=subprocess.PIPE, timeout=PATIENCE)
        self.assertEqual((done.returncode, done.stderr), (1, b""))

    def test_without_docstrings(self):
        help_text = self.program(sys.executable, "-OO", os.path.join(HERE, "sidecar.py"), "--help")
        self.assertEqual(help_text.wait(), 0)
        for text in (help_text.log, self.sidecar(PYTHONOPTIMIZE=2).get("/")[1]):
            self.assertIn("/start-request", text)
            self.assertIn("GRACE_PERIOD_SECONDS", text)


class TestLogPipe(Case):
    """The log, where its pipe is not as one would wish."""

    def logging_to(self, writer, **env):
        """Return a sidecar whose stderr is the given end of a pipe."""
        host = host_of_its_own()
        port, = free_ports(host, 1)
        settings = dict({"SIDECAR_HOST": host, "SIDECAR_PORT": port, "METRICS_PORT": 0,
                         "LOG_LEVEL": "DEBUG"}, **env)
        program = self._ends_with_test(Program(
            sys.executable, os.path.join(HERE, "sidecar.py"), env=settings,
            stdout=subprocess.DEVNULL, stderr=writer))
        return SidecarProcess.of(program, port, host=host)

    def test_one_that_a_worker_made_non_blocking_loses_no_line(self):
        reader, writer = os.pipe()
        os.set_blocking(writer, False)      # as Node.js does with the pipe that it shares with us
        sidecar = self.logging_to(writer)
        os.close(writer)
        count = 60                          # 8 kB each: several times what the pipe holds
        for number in range(count):
            sidecar.get("/%s-%d-" % ("x" * 8000, number))
        sidecar.signal(signal.SIGTERM)
        with open(reader, "rb") as log:
            lines = log.read().decode().splitlines()
        self.assertEqual(sidecar.process.wait(PATIENCE), 0)
        found = [int(re.search(r"x-(\d+)-", line).group(1)) for line in lines if "path=/x" in line]
        self.assertEqual(sorted(found), list(range(count)))
        self.assertIn("INFO exit status=0", lines[-1])
        for line in lines:
            self.assertRegex(line, "^[-0-9]{10}T[:0-9]{8}Z (INFO|DEBUG) ")

    def test_what_waits_for_one_that_nobody_reads_is_bounded_in_bytes(self):
        reader, writer = os.pipe()
        sidecar = self.logging_to(writer)
        os.close(writer)
        count = 1000
        sidecar.answers(b"".join(b"GET /%s-%d- HTTP/1.1\r\nHost: a\r\n\r\n" % (b"x" * 8000, number)
                                 for number in range(count)) + b"GET /health HTTP/1.0\r\n\r\n")
        lines = []                          # nobody has read any by now

        def read():
            with open(reader) as log:
                for line in log:
                    lines.append(line)
        reading = threading.Thread(target=read, daemon=True)
        reading.start()
        until(lambda: sidecar.get("/ready") and any("lines dropped" in line for line in lines))
        kept = sum("path=/x" in line for line in lines)
        dropped = re.search(r"log lines dropped lines=(\d+)", "".join(lines)).group(1)
        self.assertLess(kept * 8000, sidecar_module.MAX_QUEUED_BYTES + (1 << 18))
        self.assertGreaterEqual(kept + int(dropped), count)
        sidecar.signal(signal.SIGTERM)
        self.assertEqual(sidecar.process.wait(PATIENCE), 0)
        reading.join(PATIENCE)



class TestPrometheus(Case):
    """Port 9091, as text 0.0.4 and as OpenMetrics."""

    def test_every_metric_has_its_help_type_and_value(self):
        sidecar = self.sidecar()
        for path in ("/start-request?id=a", "/start-request?id=b",
                     "/end-request?id=a&duration=40ms", "/end-request"):
            sidecar.post(path)
        families = read_families(sidecar.prometheus())
        for name, (kind, description, values) in families.items():
            self.assertIn(kind, ("counter", "gauge", "histogram"), name)
            self.assertTrue(description and values, name)
        value = {name: samples for _, _, family in families.values()
                 for name, samples in family.items()}
        self.assertEqual([value["sidecar_active_requests"], value["sidecar_requests_total"],
                          value["sidecar_unmatched_ends_total"], value["sidecar_draining"]],
                         [1, 2, 1, 0])
        self.assertGreater(value["sidecar_oldest_request_age_seconds"], 0)
        for name in ("sidecar_last_request_timestamp_seconds", "sidecar_start_time_seconds"):
            self.assertLess(abs(value[name] - time.time()), 2 * PATIENCE)
        self.assertEqual(
            [value[name] for name in value if name.startswith("sidecar_info{version=")], [1])
        if os.path.exists("/proc/self/stat"):
            with open("/proc/%d/statm" % sidecar.process.pid) as file:
                pages = int(file.read().split()[1])
            self.assertLess(abs(value["process_resident_memory_bytes"] - pages * 4096), 8 << 20)
            self.assertLess(abs(value["process_start_time_seconds"] - time.time()), 2 * PATIENCE)
            for name in ("process_cpu_seconds_total", "process_open_fds", "process_max_fds",
                         "process_virtual_memory_bytes"):
                self.assertGreaterEqual(value[name], 0)

    def test_the_histogram_is_cumulative(self):
        sidecar = self.sidecar()
        durations = (0.001, 0.005, 0.0051, 0.3, 60, 61)
        for seconds in durations:
            sidecar.post("/start-request")
            sidecar.post("/end-request?duration=%s" % seconds)
        _, _, samples = read_families(sidecar.prometheus())["sidecar_request_duration_seconds"]
        buckets = [(re.search('le="(.*)"', name).group(1), count) for name, count in samples.items()
                   if "_bucket" in name]
        self.assertEqual([bound for bound, _ in buckets],
                         ["0.005", "0.01", "0.025", "0.05", "0.1", "0.25", "0.5", "1.0", "2.5",
                          "5.0", "10.0", "30.0", "60.0", "+Inf"])
        for bound, count in buckets:
            self.assertEqual(count, sum(seconds <= float(bound) for seconds in durations), bound)
        self.assertEqual(samples["sidecar_request_duration_seconds_count"], 6)
        self.assertAlmostEqual(samples["sidecar_request_duration_seconds_sum"], sum(durations))

    def test_content_types_follow_accept(self):
        sidecar = self.sidecar()
        text_format = "text/plain; version=0.0.4; charset=utf-8"
        for accept, expected in (
                (None, text_format), ("text/plain", text_format),
                ("application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.2",
                 "application/openmetrics-text; version=1.0.0; charset=utf-8")):
            with sidecar.raw(("GET /metrics HTTP/1.0\r\n%s\r\n"
                              % ("Accept: %s\r\n" % accept if accept else "")).encode(),
                             sidecar.metrics_port) as connection:
                text = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
            self.assertIn("Content-Type: %s\r\n" % expected, text)
            self.assertEqual(text.endswith("# EOF\n"), "openmetrics" in expected)
            self.assertEqual("# TYPE sidecar_requests counter" in text, "openmetrics" in expected)
            self.assertIn("\nsidecar_requests_total 0\n", text)


def readme_table(heading):
    """Return the rows of the first table below a heading of README, each a list of its cells."""
    below = text_of("README.md").partition("\n%s\n" % heading)[2]
    table = re.search(r"^(?:\|.*\n)+", below, re.MULTILINE).group()
    rows = table.splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


class TestTables(Case):
    """What the program has stands in its docstring and in README, and nothing else stands there."""

    DOCSTRING = sidecar_module.__doc__
    VARIABLES = DOCSTRING.partition("\nVariables")[2].partition("\nSIGTERM")[0]

    def routes(self, sidecar, port):
        """Return {path: [methods]}, as a running sidecar tells who asks for what is not there."""
        told = sidecar.call("GET", "/nowhere", port=port)[1]["error"]
        found = {}
        for path in told.partition("expected one of ")[2].split(", "):
            answer = sidecar.answers(("BREW %s HTTP/1.0\r\n\r\n" % path).encode(), port)[0]
            self.assertEqual(answer[0], 405, path)
            found[path] = set(answer[1]["allow"].split(", ")) - {"HEAD"}
        return found

    def test_endpoints(self):
        sidecar = self.sidecar()
        routes = self.routes(sidecar, sidecar.port)
        self.assertEqual(routes, {path: methods for path, (methods, _) in ENDPOINTS.items()})
        in_readme = {}
        for call, _ in readme_table("## Endpoints, on port 8081"):
            path = re.search(r"/[-a-z]*", call).group()
            in_readme.setdefault(path, set()).update(re.findall("GET|POST", call))
        self.assertEqual(routes, in_readme)
        self.assertEqual(self.routes(sidecar, sidecar.metrics_port), {"/metrics": {"GET"}})
        self.assertIn("On METRICS_PORT: GET /metrics,", self.DOCSTRING)

    def test_those_with_a_star_answer_no_page_of_another_site(self):
        sidecar = self.sidecar()
        for path, (methods, star) in ENDPOINTS.items():
            for method in methods:
                status = sidecar.call(method, path, headers={"Sec-Fetch-Site": "cross-site"})[0]
                self.assertEqual(status == 403, star, (method, path))

    def test_variables(self):
        asked_for = []

        class Environment(dict):
            def get(self, name, default=None):
                asked_for.append(name)
                return default

        sidecar_module.Settings(Environment())
        in_docstring = re.findall("^    ([A-Z_]{2,}) ", self.VARIABLES, re.MULTILINE)
        in_readme = {name: default for name, default, _ in
                     readme_table("## Variables, all of them optional")}
        self.assertEqual(sorted(in_docstring), sorted(set(asked_for)))
        self.assertEqual(sorted(in_readme), sorted(set(asked_for)))

    def test_their_defaults(self):
        unset = vars(sidecar_module.Settings({}))
        for name, default, _ in readme_table("## Variables, all of them optional"):
            entry = re.search("^    %s .*" % name, self.VARIABLES, re.MULTILINE).group()
            if default:
                self.assertRegex(entry, " {2,}%s(:|$)" % re.escape(default))
            if name != "SIDECAR_HOST":          # Its default is words, not a value.
                self.assertEqual(vars(sidecar_module.Settings({name: default})), unset, name)

    def test_commands(self):
        asked = subprocess.run([sys.executable, os.path.join(HERE, "sidecar.py"), "brew"],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE)
        commands = asked.stdout.decode().partition("or one of ")[2].strip().split(", ")
        first, others = re.search(r"python sidecar.py (\w+) +ask a running sidecar.*?also:(.*?)\.",
                                  self.DOCSTRING, re.DOTALL).groups()
        self.assertEqual([first] + others.replace(",", " ").split(), commands)
        told = re.search(r"`python sidecar.py (\w+)` \(or (.*?)\)", text_of("README.md"),
                         re.DOTALL)
        self.assertEqual([told.group(1)] + re.findall(r"`(\w+)`", told.group(2)), commands)

    def test_figures(self):
        sidecar = self.sidecar()
        kinds = {name: kind for name, (kind, _, _) in read_families(sidecar.prometheus()).items()}
        ours = {name: kind for name, kind in kinds.items() if not name.startswith("process_")}
        in_readme = readme_table("### Metrics")
        self.assertEqual({name.strip("`"): kind for _, name, kind, _ in in_readme if name}, ours)
        self.assertEqual([field.strip("`") for field, _, _, _ in in_readme if field],
                         list(sidecar.get("/metrics")[1]))

    def test_figures_in_the_help(self):
        sidecar = self.sidecar()
        told = subprocess.run([sys.executable, os.path.join(HERE, "sidecar.py"), "--help"],
                              stdout=subprocess.PIPE, timeout=PATIENCE).stdout.decode()
        figures = told.partition("\nFigures")[2]
        fields = re.findall("^    ([a-z_]+) ", figures, re.MULTILINE)
        self.assertEqual(fields, list(sidecar.get("/metrics")[1]))
        families = read_families(sidecar.prometheus())
        self.assertEqual(re.findall(r"^ +(sidecar_\w+), an? \w+$", figures, re.MULTILINE),
                         [name for name in families if not name.startswith("process_")])


class TestCommands(Case):
    """python sidecar.py COMMAND, and the settings."""

    def run_sidecar(self, *argv, **env):
        """Return (status, output, errors) of a command."""
        env = dict(os.environ, **{name: str(value) for name, value in env.items()})
        done = subprocess.run([sys.executable, os.path.join(HERE, "sidecar.py")] + list(argv),
                              env=env, timeout=PATIENCE, stdin=subprocess.DEVNULL,
                              capture_output=True)
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    def test_they_print_the_answer_and_exit_0_or_1(self):
        sidecar = self.sidecar()
        sidecar.post("/start-request?id=a")
        for command in ("health", "ready", "metrics", "requests"):
            status, output, errors = self.run_sidecar(command, SIDECAR_URL=sidecar.url + "/")
            self.assertEqual((status, errors), (0, ""), command)
            self.assertTrue(json.loads(output))
        self.assertIn('"request_id": "a"', output)
        self.assertEqual(self.run_sidecar("health", SIDECAR_URL="", SIDECAR_PORT=sidecar.port)[0],
                         0)
        sidecar.signal(signal.SIGTERM)
        sidecar.wait_for("drain started")
        self.assertEqual(self.run_sidecar("ready", SIDECAR_URL=sidecar.url),
                         (1, '{"error": "draining"}\n', ""))
        self.assertEqual(self.run_sidecar("health", SIDECAR_URL=sidecar.url)[0], 0)

    def test_drain_waits_as_long_as_the_sidecar_does(self):
        sidecar = self.sidecar()
        sidecar.post("/start-request?id=a")
        drain = self.program(sys.executable, os.path.join(HERE, "sidecar.py"), "drain",
                             env={"SIDECAR_URL": sidecar.url})
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
            taken.bind(("127.0.0.1", 0))            # And nobody listens.
            status, output, errors = self.run_sidecar("health", SIDECAR_URL="http://127.0.0.1:%d"
                                                      % taken.getsockname()[1])
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
            port = str(taken.getsockname()[1])
            for name, value in (("SIDECAR_PORT", "http"), ("SIDECAR_PORT", "65536"),
                                ("METRICS_PORT", "-1"), ("SIDECAR_PORT", port),
                                ("METRICS_PORT", port),
                                ("GRACE_PERIOD_SECONDS", "soon"), ("GRACE_PERIOD_SECONDS", "-1"),
                                ("GRACE_PERIOD_SECONDS", "nan"), ("QUIET_PERIOD_SECONDS", "1d"),
                                ("TRUSTED_CLIENTS", "10.0.0.0/33"), ("TRUSTED_CLIENTS", "pod"),
                                ("LOG_LEVEL", "LOUD"), ("LOG_FORMAT", "xml"),
                                ("SIDECAR_HOST", "no.such.host.invalid"), ("SIDECAR_HOST", "a..b"),
                                ("SIDECAR_HOST", "ü.invalid"), ("SIDECAR_URL", "ftp://x"),
                                ("SIDECAR_URL", "http://x:y")):
                env = dict({"SIDECAR_HOST": "127.0.0.1", "SIDECAR_PORT": 0, "METRICS_PORT": 0},
                           **{name: value})
                argv = ["health"] if name == "SIDECAR_URL" else []
                status, output, errors = self.run_sidecar(*argv, **env)
                self.assertEqual((status, output, errors.count("\n")), (2, "", 1), errors)
                self.assertIn(name, errors)
                self.assertIn(value, errors)


class TestLogs(Case):
    """One line an event, on stderr."""

    def test_text(self):
        sidecar = self.sidecar()
        self.assertRegex(sidecar.lines[0], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ INFO listening "
                         r"api=http://127.0.0.1:\d+ metrics=http://127.0.0.1:\d+ version=")
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
        self.assertEqual([event["event"] for event in events],
                         ["listening", "signal", "drain started", "drain timed out", "still active",
                          "exit"])
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
        for method, path in (("GET", "/" + "a" * 8000), ("GET", "/health?" + "a" * 8000),
                             ("A" * 8000, "/health"),
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
        loud.wait_for("DEBUG request client=127.0.0.1 method=POST path=/start-request "
                      'query="id=a" status=200')


class TestGivenUp(Case):
    """Requests whose worker died: REQUEST_TIMEOUT_SECONDS and POST /reset."""

    def test_a_request_that_takes_too_long_is_given_up(self):
        sidecar = self.sidecar(REQUEST_TIMEOUT_SECONDS=0.3)
        sidecar.post("/start-request?id=hung")
        sidecar.post("/start-request")
        until(lambda: sidecar.active() == 0)
        sidecar.wait_for("request given up request_id=hung age_seconds=")
        self.assertEqual(sidecar.sample("sidecar_requests_expired_total"), 2)
        for query in ("?id=hung&duration=7s", "?duration=8s"):          # Late, and no error.
            self.assertEqual(sidecar.post("/end-request" + query),
                             (200, {"active_requests": 0, "draining": False}))
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
        self.assertEqual(sidecar.post("/end-request"),
                         (200, {"active_requests": 0, "draining": False}))
        self.assertEqual(sidecar.post("/end-request"),
                         (200, {"active_requests": 0, "draining": False}))
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
        self.socket = socket.create_server(("127.0.0.1", 0)) if hasattr(
            socket, "create_server") else socket.socket()
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
    """The class Sidecar, in this process. More of it is in .ci/tests/test_client.py."""

    def client(self, url, **constants):
        client = sidecar_module.Sidecar(url)
        vars(client).update(dict({"CALL_SECONDS": PATIENCE}, **constants))
        self.addCleanup(client.close)
        return client

    def test_it_reports_the_start_and_the_end_with_the_duration(self):
        sidecar = self.sidecar()
        client = self.client(sidecar.url)
        with client.track():
            began = time.monotonic()
            until(lambda: sidecar.get("/requests")[1][0]["age_seconds"])
            seconds = time.monotonic() - began
        self.assertEqual(sidecar.active(), 0)
        self.assertGreaterEqual(sidecar.sample("sidecar_request_duration_seconds_sum"),
                                seconds - 1e-6)
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
        sidecar = self.sidecar(GRACE_PERIOD_SECONDS="1h")
        client = self.client(sidecar.url)
        sidecar.post("/start-request?id=other")
        drain = threading.Thread(target=sidecar.get, args=("/drain",), daemon=True)
        self.assertFalse(client.draining)
        self.assertTrue(client.ready())
        drain.start()
        sidecar.wait_for("drain started")
        with client.track():
            self.assertTrue(client.draining)
        self.assertFalse(client.ready())
        sidecar.post("/reset")              # no SIGTERM came
        drain.join(PATIENCE)
        self.assertTrue(client.ready())
        self.assertFalse(client.draining)

    def test_a_connection_that_the_sidecar_closed_is_opened_again(self):
        sidecar = self.sidecar(constants={"IDLE_SECONDS": 0.05})
        client = self.client(sidecar.url)
        for _ in range(3):
            with client.track():
                self.assertEqual(sidecar.active(), 1)
                kept, = client._memory.kept
                # Readable: its end has come.
                self.assertTrue(select.select([kept], [], [], PATIENCE)[0])
        self.assertEqual(sidecar.sample("sidecar_request_duration_seconds_count"), 3)

    def test_without_a_sidecar_the_work_is_done_and_the_log_says_so_once(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            client, done = self.client("http://127.0.0.1:%d" % taken.getsockname()[1]), []
            with self.assertLogs("sidecar") as logs:
                for turn in range(100):
                    with client.track():
                        done.append(turn)
            self.assertEqual(client._memory.unsaid, {})
        self.assertEqual(len(done), 100)
        self.assertEqual(len(logs.output), 1)
        self.assertIn("working without the sidecar", logs.output[0])

    def test_what_began_before_the_sidecar_is_told_with_the_next_call(self):
        gone = self.sidecar(SIDECAR_HOST=host_of_its_own())
        gone.kill()
        client = self.client(gone.url, REST_SECONDS=3600, WATCH_SECONDS=3600)
        with client.track():
            sidecar = self.sidecar(SIDECAR_HOST=gone.host, SIDECAR_PORT=gone.port)
            with client.track():
                self.assertEqual(sidecar.active(), 2)

    def test_one_that_hangs_costs_its_time_out_once(self):
        hanging = HangingServer()
        self.addCleanup(hanging.close)
        client, done = self.client(hanging.url, CALL_SECONDS=0.1, REST_SECONDS=3600), []
        for turn in range(100):
            with client.track():
                done.append(turn)
        self.assertEqual(len(done), 100)
        self.assertEqual(len(hanging.connections), 1)

    def test_an_end_that_could_not_be_delivered_is_delivered_later(self):
        sidecar = self.sidecar()
        client = self.client(sidecar.url, REST_SECONDS=0.1, WATCH_SECONDS=0.1)
        with client.track():
            self.assertEqual(sidecar.active(), 1)
            sidecar.signal(signal.SIGSTOP)
            client.CALL_SECONDS = 0.2
        client.CALL_SECONDS = PATIENCE
        sidecar.signal(signal.SIGCONT)
        until(lambda: sidecar.active() == 0)
        with client.track():                # and it is talked to again
            until(client.ready)
        self.assertEqual(sidecar.active(), 0)
        self.assertEqual(sidecar.sample("sidecar_unmatched_ends_total"), 0)


class TestConsole(Case):
    """python echo_bot.py with nothing set, and reply_to."""

    def bot(self, **env):
        env = dict({"SIDECAR_URL": None, "BOT_TOKEN": None, "KAFKA_BROKERS": None}, **env)
        return self.program(sys.executable, os.path.join(HERE, "echo_bot.py"), env=env,
                            stdin=subprocess.PIPE)

    def patient_bot(self, sidecar):
        """Return one that takes a sidecar on a busy machine for no sidecar that hangs."""
        code = "import os, sys; sys.path.insert(0, %r); import sidecar, echo_bot; " \
            "sidecar.Sidecar.CALL_SECONDS = %d; os._exit(echo_bot.main(os.environ))"
        return self.program(sys.executable, "-c", code % (HERE, PATIENCE), stdin=subprocess.PIPE,
                            env=dict(SIDECAR_URL=sidecar.url, BOT_TOKEN=None, KAFKA_BROKERS=None))

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
        self.say(bot, "hello", "", "päivää 👋",
                 '{"update_id": 1, "callback_query": {"id": "7", "data": "yes"}}',
                 '{"update_id": 2, "edited_message": {}}', '{"message": 7}', "[1]", "[" * 100000)
        bot.process.stdin.close()
        self.assertEqual(bot.wait(), 0)
        echoed = [line for line in bot.lines if line.startswith(("Echo", "Received"))]
        self.assertEqual(echoed[:4], ["Echo: hello", "Echo: ", "Echo: päivää 👋", "Received: yes"])
        self.assertEqual(echoed[4], "Echo: [1]")
        self.assertEqual(len(echoed), 6)
        self.assertEqual(bot.log.count("broken update"), 1)
        self.assertEqual(bot.log.count("working without the sidecar"), 1)
        self.assertNotIn("Traceback", bot.log)

    def test_each_line_is_tracked(self):
        sidecar = self.sidecar()
        bot = self.patient_bot(sidecar)
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
        other = next(int(thread) for thread in os.listdir("/proc/%d/task" % pid)
                     if int(thread) != pid)
        self.assertEqual(tgkill(pid, other, signal.SIGTERM), 0)       # the main thread is not woken
        self.assertEqual(bot.wait(), 0, bot.log)

    def test_the_log_tells_when_the_sidecar_goes_and_comes_back(self):
        sidecar = self.sidecar(SIDECAR_HOST=host_of_its_own())
        bot = self.patient_bot(sidecar)
        self.say(bot, "one")
        bot.wait_for("reporting to the sidecar at")
        sidecar.kill()
        self.say(bot, "two")
        bot.wait_for("Echo: two")
        bot.wait_for("working without the sidecar")
        again = self.sidecar(SIDECAR_HOST=sidecar.host, SIDECAR_PORT=sidecar.port)
        before = len(bot.lines)

        def tracked():
            self.say(bot, "again")
            return again.get("/metrics")[1]["total_requests"]
        until(tracked)
        bot.wait_for("reporting to the sidecar", before)
        self.assertEqual([bot.log.count("reporting to the sidecar"),
                          bot.log.count("working without the sidecar")], [2, 1])

    def test_a_crashed_workers_requests_are_given_up_when_it_starts_again(self):
        sidecar = self.sidecar()
        sidecar.post("/start-request?id=lost")
        self.patient_bot(sidecar)
        until(lambda: sidecar.active() == 0)
        self.assertEqual(sidecar.sample("sidecar_requests_expired_total"), 1)

    def test_while_the_sidecar_drains_nothing_is_taken(self):
        sidecar = self.sidecar(GRACE_PERIOD_SECONDS="1h")
        bot = self.patient_bot(sidecar)
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
        sidecar.post("/reset")                          # no SIGTERM came
        bot.wait_for("Echo: afterwards")
        drain.join(PATIENCE)

    def test_replies_keep_telegrams_limits(self):
        from echo_bot import reply_to
        chat = {"update_id": 1, "message": {"message_id": 5, "chat": {"id": -7}}}

        def echo(text):
            chat["message"]["text"] = text
            method, params = reply_to(chat)
            self.assertEqual((method, params["chat_id"], params["reply_parameters"]["message_id"]),
                             ("sendMessage", -7, 5))
            return params["text"]

        self.assertEqual(echo("hi"), "Echo: hi")
        self.assertEqual(echo("x" * 4090), "Echo: " + "x" * 4090)
        self.assertEqual(echo("x" * 4091), "Echo: " + "x" * 4090)
        self.assertEqual(echo("👋" * 4096), "Echo: " + "👋" * 2045)
        self.assertEqual(echo("x" + "👋" * 4096), "Echo: x" + "👋" * 2044)
        method, params = reply_to({"callback_query": {"id": "9", "data": "é" * 300}})
        self.assertEqual((method, params), ("answerCallbackQuery", {"callback_query_id": "9",
                                                                    "text": "Received: "
                                                                    + "é" * 190}))
        for update in ({"edited_message": {"text": "x"}},
                       {"message": {"message_id": 1, "chat": {"id": 1}, "sticker": {}}},
                       {"update_id": 7}, {"a_kind_of_the_future": {"text": "x"}}):
            self.assertIsNone(reply_to(update))


def text_of(*path):
    """Return the text of a file of the project."""
    with open(os.path.join(HERE, *path), encoding="utf-8") as file:
        return file.read()


def readme_blocks(language):
    """Return the README's code blocks of a language, in their order."""
    return re.findall(r"^```%s\n(.*?)^```$" % language, text_of("README.md"),
                      re.DOTALL | re.MULTILINE)


class ScriptedSidecar(http.server.ThreadingHTTPServer):
    """Stands in for a sidecar that does what a real one cannot be made to do.

    It tells every POST that it is `draining` or not, and closes the connection of every GET instead
    of answering; of every POST too while it is `away`.
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
    """What each client in the README must do.

    A language adds how its blocks become a program, and its own handler.

    Every program reads its messages from standard input, a line each, and ends with status 0 at the
    end of it. "work" takes 60 ms; "hold" lasts until the next line; "throw" throws an error. It
    prints "took ..." and "did ...".
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
        log = sidecar.whole_log()
        self.assertEqual(len(re.findall("path=/end-request .*duration=.*status=200", log)), 3, log)

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
        with socket.socket() as taken:     # bound, so that nobody else gets the port; not listening
            taken.bind(("127.0.0.1", 0))
            self.check_all_work_is_done("http://127.0.0.1:%d" % taken.getsockname()[1])

    def test_a_worker_that_was_up_first_is_counted_once_its_sidecar_is(self):
        gone = self.sidecar(SIDECAR_HOST=host_of_its_own())
        gone.kill()
        worker = self.worker(gone.url)
        self.tell(worker, "work a")
        worker.wait_for("did work a")
        sidecar = self.sidecar(SIDECAR_HOST=gone.host, SIDECAR_PORT=gone.port)
        self.tell(worker, "hold b")
        worker.wait_for("took hold b")
        self.assertEqual(sidecar.active(), 1)
        self.assertEqual(self.finish(worker), 0, worker.log)
        self.assertEqual(sidecar.get("/metrics")[1]["unmatched_ends"], 0)

    def test_a_sidecar_that_hangs_does_not_stop_the_work(self):
        with socket.socket() as deaf:      # the kernel accepts the connections, nobody ever answers
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
        # The worker asks whether it may go on, again and again, and takes nothing.
        for _ in range(2):
            sidecar.wait_for("path=/ready", after=before)
            before = len(sidecar.lines)
        self.assertNotIn("took work b", worker.log)
        sidecar.post("/reset")                  # brings the sidecar back to serving
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
        # More often than a client repeats a call that failed.
        sidecar.wait_until(lambda: sidecar.gets >= 3)
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


OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def samples(text):
    """Return {sample with its labels: value} of an exposition."""
    return {name: float(value)
            for name, value in re.findall(r"^([a-z_]+(?:\{.*\})?) (\S+)$", text, re.MULTILINE)}


class TestPage(Case):
    """GET / on SIDECAR_PORT, as it is sent."""

    def front(self, accept):
        """Return (headers, body) of the answer to GET /."""
        answers = self.sidecar().answers(
            b"GET / HTTP/1.1\r\nHost: a\r\nAccept: %s\r\nConnection: close\r\n\r\n" % accept)
        status, headers, body = answers[0]
        self.assertEqual((status, len(answers)), (200, 1))
        return headers, body

    def test_a_browser_gets_a_page_below_5_kb(self):
        headers, body = self.front(b"text/html,application/xhtml+xml,*/*;q=0.8")
        self.assertEqual(headers["content-type"], "text/html; charset=utf-8")
        head = sum(len("%s: %s\r\n" % header) for header in headers.items())
        self.assertLess(head + len(body.encode()), 5 * 1024)
        self.assertNotRegex(
            body, r"(?i)https?:|\bsrc=|\bhref=|@import|url\(|innerHTML|\son[a-z]+=|\sstyle=")

    def test_its_policy_allows_its_own_script_and_style_and_nothing_else(self):
        headers, body = self.front(b"text/html")
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        for tag in ("script", "style"):
            (text,) = re.findall("<%s>(.*?)</%s>" % (tag, tag), body, re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            self.assertEqual(policy.pop(tag + "-src"), "'sha256-%s'" % digest)
        self.assertEqual(policy.pop("connect-src"), "'self'")
        self.assertEqual(policy, dict.fromkeys(
            ("default-src", "base-uri", "form-action", "frame-ancestors"), "'none'"))

    def test_curl_gets_the_text_of_help(self):
        headers, body = self.front(b"*/*")
        self.assertEqual(headers["content-type"], "text/plain; charset=utf-8")
        for path in ENDPOINTS:
            self.assertIn(" %s " % path, body)
        self.assertEqual(body, sidecar_module.__doc__)


class TestScrapes(Case):
    """Each scrape is of one moment."""

    def test_scrapes_add_up_while_requests_come_and_go(self):
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        # Its threads take turns all the time.
        with open(os.path.join(folder, "sitecustomize.py"), "w") as file:
            file.write("import sys; sys.setswitchinterval(1e-6)")
        sidecar = self.sidecar(PYTHONPATH=folder)
        over = threading.Event()

        def play(number):
            try:
                return self.work(sidecar, number, over) if number else self.scrape(sidecar)
            finally:
                over.set()

        seen = in_threads(4, play)[0]
        self.assertGreater(len({active for active, _ in seen}), 2)   # Or nothing went on meanwhile.
        self.assertGreater(len(seen), 30)

    def work(self, sidecar, number, over):
        """Start and end requests, many in one piece.

        Each says that it took a quarter of a second, so that sums are exact.
        """
        paths = ("/start-request", "/start-request?id=%d" % number,
                 "/end-request?duration=250ms", "/end-request?duration=250ms&id=%d" % number)
        batch = "".join("POST %s HTTP/1.1\r\nHost: a\r\n\r\n" % path
                        for path in paths).encode() * 25
        with sidecar.raw(b"") as connection, connection.makefile("rb") as answers:
            while not over.is_set():
                connection.sendall(batch)
                for _ in range(100):
                    next(line for line in answers if line.startswith(b"HTTP/1.1 200"))

    def scrape(self, sidecar):
        """Scrape again and again; return all pairs of (active requests, ended ones) that it saw."""
        connection = http.client.HTTPConnection(sidecar.host, sidecar.metrics_port,
                                                timeout=PATIENCE)
        self.addCleanup(connection.close)
        before, seen = {}, set()
        for turn in range(1500):
            connection.request("GET", "/metrics",
                               headers={"Accept": OPENMETRICS if turn % 2 else ""})
            values = samples(connection.getresponse().read().decode())
            self.check(values, before)
            before = values
            seen.add((values["sidecar_active_requests"],
                      values["sidecar_request_duration_seconds_count"]))
        return seen

    def check(self, values, before):
        """Check that the values of a scrape are of one moment, which came after another one."""
        ended = values["sidecar_request_duration_seconds_count"]
        self.assertEqual(values["sidecar_requests_total"],
                         values["sidecar_active_requests"] + ended)
        self.assertEqual(values["sidecar_request_duration_seconds_sum"], ended / 4)
        for name, value in values.items():
            if name.startswith("sidecar_request_duration_seconds_bucket"):
                bound = float(re.search('le="(.*)"', name).group(1))
                self.assertEqual(value, ended if bound >= 0.25 else 0, name)
            if re.search("_(total|count|sum|bucket)", name):
                self.assertGreaterEqual(value, before.get(name, 0), name)

    def test_what_was_given_up_adds_up_too(self):
        sidecar = self.sidecar()
        for path in ("/start-request?id=a", "/start-request", "/end-request?id=a", "/reset",
                     "/start-request"):
            sidecar.post(path)
        values = samples(sidecar.prometheus())
        self.assertEqual([values["sidecar_" + name] for name in (
            "requests_total", "active_requests", "request_duration_seconds_count",
            "requests_expired_total")],
            [3, 1, 1, 1])


WORKER = r"""
import os, signal, sys
def say(text):
    os.write(1, text.encode() + b"\n")      # In one piece: the sidecar's log goes to this pipe too.
def tell(number, frame):
    say("got " + signal.Signals(number).name)
    if number == signal.SIGTERM and "stubborn" not in sys.argv:
        sys.exit(3)
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}:
    signal.signal(number, tell)
woken, wakes = os.pipe()                    # A signal just before signal.pause would not end it.
os.set_blocking(wakes, False)
signal.set_wakeup_fd(wakes)
say("worker is up %s" % os.environ.get("SIDECAR_URL"))
while True:
    os.read(woken, 1)
"""

KEEPS_SYNTAX_TREE = (
    sys.implementation.name == "cpython" and platform.libc_ver()[0] == "glibc"
    and sys.version_info >= (3, 9) and sidecar_module.SCRIPT_MAY_END)


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
        options = dict(dict(env=env, timeout=PATIENCE, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE), **options)
        run = subprocess.run([sys.executable, os.path.join(HERE, "sidecar.py"), "run", "--"]
                             + list(command), **options)
        return run.returncode, (run.stdout or b"").decode(), (run.stderr or b"").decode()

    def test_the_worker_hears_of_sigterm_when_the_drain_is_over(self):
        sidecar = self.worker()
        self.assertEqual(sidecar.wait_for("worker is up (.*)").group(1), sidecar.url)
        sidecar.post("/start-request?id=a")
        sidecar.signal(signal.SIGTERM)
        sidecar.wait_for("drain started")
        self.assertEqual(sidecar.post("/start-request?id=b&hold=false")[1]["draining"], True)
        for name in "ab":
            self.assertNotIn("got ", sidecar.log)
            self.assertEqual(sidecar.post("/end-request?id=" + name)[0], 200)
        self.assertEqual(sidecar.wait(), 3)
        sidecar.wait_for("drain completed")
        self.assertEqual(sidecar.log.count("got "), 1)

    @unittest.skipUnless(hasattr(os, "sched_getaffinity"), "no CPU affinities here")
    def test_the_sidecar_keeps_to_one_cpu_and_leaves_the_worker_all_of_them(self):
        sidecar = self.worker()
        sidecar.get("/health")                          # There is a thread of a connection as well.
        pid = sidecar.process.pid
        cpus = {cpu for thread in os.listdir("/proc/%d/task" % pid)
                for cpu in os.sched_getaffinity(int(thread))}
        self.assertEqual(len(cpus), 1)
        self.assertEqual(os.sched_getaffinity(child_of(pid)), os.sched_getaffinity(0))
        if len(os.sched_getaffinity(0)) > 1:
            code = "import sys; sys._is_gil_enabled = lambda: %r; import os, sidecar; " \
                "sidecar.stay_on_one_cpu(); sys.exit(len(os.sched_getaffinity(0)))"
            for has_lock, count in (True, 1), (False, len(os.sched_getaffinity(0))):
                ended = subprocess.run([sys.executable, "-c", code % has_lock], cwd=HERE)
                self.assertEqual(ended.returncode, count)

    def test_sigint_does_the_same_and_is_passed_on_as_such(self):
        sidecar = self.worker()
        sidecar.signal(signal.SIGINT)
        sidecar.wait_for("got SIGINT")
        sidecar.wait_for("drain completed")
        self.assertIsNone(sidecar.process.poll())
        sidecar.signal(signal.SIGTERM)                      # A second one.
        self.assertEqual(sidecar.wait(), 3)

    def test_a_second_signal_is_passed_on_at_once(self):
        sidecar = self.worker(GRACE_PERIOD_SECONDS="1h", constants={"REPEATED_SECONDS": 0})
        sidecar.post("/start-request?id=a")
        sidecar.signal(signal.SIGTERM)
        sidecar.wait_for("drain started")
        sidecar.signal(signal.SIGTERM)
        self.assertEqual(sidecar.wait(), 3)
        sidecar.wait_for("request given up request_id=a age_seconds=")

    def test_a_sigterm_that_is_delivered_twice_is_one(self):
        sidecar = self.worker(GRACE_PERIOD_SECONDS="1h", constants={"REPEATED_SECONDS": 3600})
        sidecar.post("/start-request")
        sidecar.signal(signal.SIGTERM)
        sidecar.wait_for("drain started")
        sidecar.signal(signal.SIGTERM)
        self.assertEqual(sidecar.get("/ready")[0], 503)
        sidecar.signal(signal.SIGUSR1)                  # What comes after it is passed on.
        sidecar.wait_for("got SIGUSR1")
        self.assertNotIn("got SIGTERM", sidecar.log)
        sidecar.post("/end-request")
        self.assertEqual(sidecar.wait(), 3)

    def test_it_never_kills_a_worker_that_stays(self):
        """The platform does that, when its own time is over."""
        sidecar = self.worker("stubborn", GRACE_PERIOD_SECONDS=0.1)
        sidecar.signal(signal.SIGTERM)
        sidecar.wait_for("got SIGTERM")
        sidecar.signal(signal.SIGUSR1)
        sidecar.wait_for("got SIGUSR1")
        self.assertNotIn("SIGKILL", sidecar.log)
        os.kill(child_of(sidecar.process.pid), signal.SIGKILL)
        self.assertEqual(sidecar.wait(), 128 + signal.SIGKILL)
        self.assertEqual(sidecar.log.count("worker ended"), 1)

    def test_the_worker_hears_of_sigterm_when_the_drain_ran_out(self):
        sidecar = self.worker(GRACE_PERIOD_SECONDS=0.1)
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
        self.assertEqual(len(waiting), 1)                # Whoever waited for a drain got an answer.

    def test_other_signals_are_passed_on_at_once(self):
        sidecar = self.worker()
        sidecar.post("/start-request")
        for name in ("HUP", "QUIT", "USR1", "USR2", "WINCH", "CONT", "ALRM", "URG", "IO", "PWR",
                     "RTMIN", "RTMAX"):
            sidecar.signal(getattr(signal, "SIG" + name))
            sidecar.wait_for("got SIG(%s|%s)$" % (name, "POLL" if name == "IO" else name))
        self.assertEqual(sidecar.active(), 1)
        self.assertEqual(sidecar.get("/ready")[0], 200)

    def test_exit_statuses(self):
        for script, expected in (("exit 0", 0), ("exit 7", 7), ("exit 255", 255),
                                 ("kill -9 $$", 137), ("kill -15 $$", 143)):
            self.assertEqual(self.done("sh", "-c", script)[0], expected, script)

    def test_a_command_that_cannot_be_run_is_one_line(self):
        with tempfile.TemporaryDirectory() as folder:
            script = os.path.join(folder, "script")
            with open(script, "w") as file:
                file.write("no program\n")
            for mode, command, expected in ((0o644, script, 126), (0o755, script, 126),
                                            (0o755, folder, 126), (0o755, "no-such-command", 127),
                                            (0o755, script + "/x", 127),
                                            (0o755, folder + "/no-such-command", 127)):
                os.chmod(script, mode)
                status, output, errors = self.done(command)
                self.assertEqual((status, output, errors.count("\n")), (expected, "", 1), errors)
                self.assertIn(command, errors)

    def test_without_a_command_it_is_one_line_and_2(self):
        for argv in (["run"], ["run", "--"], ["run", "true"]):
            run = subprocess.run([sys.executable, os.path.join(HERE, "sidecar.py")] + argv,
                                 stderr=subprocess.PIPE, timeout=PATIENCE)
            self.assertEqual((run.returncode, run.stderr.count(b"\n")), (2, 1), argv)

    def test_what_the_worker_inherits(self):
        """Standard input, output and errors, other descriptors, signal mask and dispositions."""
        script = ("read line; echo out $line; echo err >&2; (cd /proc/$$/fd; echo *); "
                  "while read name mask; do case $name in SigBlk:|SigIgn:|SigCgt:) "
                  "echo $name $mask;; esac; done </proc/$$/status")

        def told(output):       # Without signals 32 and 33, which libc sets for its threads.
            masks = re.findall("^(Sig...): (.*)$", output, re.MULTILINE)
            return output.partition("Sig")[0], [
                (name, int(mask, 16) & ~(3 << 31)) for name, mask in masks]

        with tempfile.TemporaryFile() as file:
            os.set_inheritable(file.fileno(), True)
            options = dict(input=b"in\n", close_fds=False)
            plain = subprocess.run([shutil.which("sh"), "-c", script], capture_output=True,
                                   timeout=PATIENCE, **options)
            status, output, errors = self.done("sh", "-c", script, **options)
            self.assertIn(str(file.fileno()), output.splitlines()[1].split())
        self.assertEqual((status, told(output)), (0, told(plain.stdout.decode())))
        self.assertEqual([name for name, _ in told(output)[1]], ["SigBlk", "SigIgn", "SigCgt"])
        self.assertIn("err\n", errors)
        descriptors = self.done(sys.executable, "-c",
                                "import os; print(len(os.listdir('/proc/self/fd')))")[1]
        # Three, and the one of listdir: no socket of the sidecar's.
        self.assertEqual(descriptors, "4\n")

    @unittest.skipIf(sys.implementation.name == "pypy", "PyPy does not say what it inherited")
    def test_a_parent_that_ignored_sigchld(self):
        """Such a disposition is inherited, also by the worker; the kernel then tells nobody how a
        child ended."""
        ignoring = ("import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); "
                    "os.execv(sys.argv[1], sys.argv[1:])")
        run = subprocess.run([sys.executable, "-c", ignoring, sys.executable,
                              os.path.join(HERE, "sidecar.py"), "run", "--", sys.executable, "-c",
                              "import signal, sys; sys.exit(7 + (signal.getsignal(signal.SIGCHLD) "
                              "== signal.SIG_IGN))"],
                             env=dict(os.environ, SIDECAR_PORT="0", METRICS_PORT="0"),
                             stderr=subprocess.DEVNULL, timeout=PATIENCE)
        self.assertEqual(run.returncode, 8)

    @unittest.skipUnless(hasattr(signal, "sigwaitinfo"), "nobody says who sent a signal")
    def test_at_a_terminal_the_worker_gets_each_key_once(self):
        """Ctrl-C, and what else a terminal sends to all of its foreground processes."""
        shown, status = self.at_a_terminal(
            (lambda terminal: None, b"listening"), (lambda terminal: None, b"worker is up"),
            (lambda terminal: os.write(terminal, b"\x03"), b"got SIGINT"),         # Ctrl-C
            (lambda terminal: os.write(terminal, b"\x1c"), b"got SIGQUIT"),        # Ctrl-\\
            (lambda terminal: fcntl.ioctl(terminal, 0x5414,                        # TIOCSWINSZ
                                          struct.pack("HHHH", 7, 7, 7, 7)), b"got SIGWINCH"))
        self.assertEqual(status, 3, shown)
        self.assertEqual([shown.count(b"got " + name)
                          for name in (b"SIGINT", b"SIGQUIT", b"SIGWINCH", b"SIGTERM")], [1] * 4)
        self.assertEqual([shown.count(b"signal passed on"), shown.count(b"drain completed")],
                         [1, 1], shown)

    def at_a_terminal(self, *steps):
        """Run WORKER at a terminal of its own; return what that shows, and the exit status.

        Each step is what to do with the terminal, and what it shows then. SIGTERM comes after them.
        """
        pid, terminal = pty.fork()
        if pid == 0:
            os.environ.update(SIDECAR_PORT="0", METRICS_PORT="0", GRACE_PERIOD_SECONDS="1h")
            os.execv(sys.executable, [sys.executable, os.path.join(HERE, "sidecar.py"), "run", "--",
                                      sys.executable, "-c", WORKER])
        shown = b""
        try:
            for press, expected in steps:
                press(terminal)
                while expected not in shown:
                    self.assertTrue(select.select([terminal], [], [], PATIENCE)[0], shown)
                    shown += os.read(terminal, 4096)
            # It may read from the terminal, so it is in the foreground with us.
            self.assertEqual(os.getpgid(child_of(pid)), pid)
            os.kill(pid, signal.SIGTERM)             # No terminal's, so it drains and passes it on.
            while select.select([terminal], [], [], PATIENCE)[0]:
                shown += os.read(terminal, 4096)
        except OSError:                         # The terminal's way to say that all have closed it.
            pass
        finally:
            os.close(terminal)
            os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
        return shown, os.WEXITSTATUS(status)

    def test_a_worker_that_dies_in_a_drain_is_told_once_and_gets_no_signal(self):
        sidecar = self.worker(GRACE_PERIOD_SECONDS="1h")
        sidecar.post("/start-request?id=a")
        sidecar.signal(signal.SIGTERM)
        sidecar.wait_for("drain started")
        os.kill(child_of(sidecar.process.pid), signal.SIGKILL)
        self.assertEqual(sidecar.wait(), 128 + signal.SIGKILL)
        self.assertEqual(sidecar.log.count("worker ended status=137"), 1)
        self.assertEqual(sidecar.log.count("request given up request_id=a"), 1)
        self.assertNotIn("passed on", sidecar.log)

    def test_its_process_group(self):
        """One of its own, so that what is sent to ours does not reach it before the drain."""
        sidecar = self.worker()
        worker = child_of(sidecar.process.pid)
        self.assertEqual(os.getpgid(worker), worker)
        self.assertNotEqual(os.getpgid(sidecar.process.pid), worker)

    def test_where_nobody_says_who_sent_a_signal(self):
        """As on macOS and PyPy, which have no sigwaitinfo."""
        sidecar = self.program(
            sys.executable, "-c", "import signal, sys; vars(signal).pop('sigwaitinfo', 0); "
            "sys.path.insert(0, %r); import sidecar; sidecar.main(sys.argv[1:])" % HERE,
            "run", "--", sys.executable, "-c", WORKER,
            env={"SIDECAR_HOST": "127.0.0.1", "SIDECAR_PORT": 0, "METRICS_PORT": 0})
        sidecar.wait_for("worker is up")
        sidecar.signal(signal.SIGUSR1)
        sidecar.wait_for("got SIGUSR1")
        sidecar.signal(signal.SIGTERM)
        sidecar.wait_for("drain completed")
        sidecar.wait_for("got SIGTERM")
        self.assertEqual(sidecar.wait(), 3)

    def test_nothing_wakes_up_while_idle(self):
        for sidecar in (self.sidecar(), self.worker()):
            sidecar.post("/start-request")
            folder = "/proc/%d/task" % sidecar.process.pid

            def switches():
                told = {}
                for task in os.listdir(folder):
                    try:
                        with open("%s/%s/status" % (folder, task)) as file:
                            last = file.read().rpartition("\nvoluntary_ctxt_switches:")[2]
                            told[task] = int(last.split()[0])
                    except OSError:                         # The thread of the call above ends.
                        told[task] = None
                return told

            def unchanged():
                before = switches()
                time.sleep(1.5)             # Nothing to wait for: it is nothing that should happen.
                return before == switches()
            until(unchanged, "an idle while")

    @unittest.skipUnless(KEEPS_SYNTAX_TREE, "this Python keeps nothing, or has to")
    def test_memory_that_only_the_start_needed_is_given_back(self):
        """Python keeps the syntax tree of a script until that ends: MiBs for one of this size."""
        for sidecar in (self.sidecar(), self.worker()):
            def kib(field):
                with open("/proc/%d/status" % sidecar.process.pid) as file:
                    return int(re.search(field + r":\s+([0-9]+) kB", file.read()).group(1))
            until(lambda: kib("VmRSS") < kib("VmHWM") - 2048, "less memory than at the start")

    def test_to_listen_on_an_address_loads_no_tables_of_names(self):
        asked = self.program(sys.executable, "-c", "import sys, sidecar\n"
                             "sidecar.Server('127.0.0.1', 0, None, {}).server_close()\n"
                             "print('loaded', 'encodings.idna' in sys.modules)", cwd=HERE)
        asked.wait_for("loaded False")


class TestCallers(Case):
    """Who may call what."""

    def test_a_page_of_another_site(self):
        sidecar = self.sidecar()
        changing = [(method, path) for path, (methods, star) in ENDPOINTS.items() if star
                    for method in (methods | {"HEAD"} if "GET" in methods else methods)]
        for method, path in changing:
            for headers in ({"Origin": "https://example.com"}, {"Origin": "null"}, {"Origin": ""},
                            {"Origin": "http://127.0.0.1.example.com"},
                            {"Origin": "http://localhost.example.com"},
                            {"Origin": "http://10.0.0.1:8081"},
                            {"Origin": "http://127.0.0.1@example.com"},
                            {"Sec-Fetch-Site": "cross-site"}):
                self.assertEqual(sidecar.call(method, path, headers=headers)[0], 403,
                                 (path, headers))
        self.assertEqual(sidecar.get("/metrics")[1]["total_requests"], 0)
        self.assertEqual(sidecar.get("/ready")[0], 200)
        for path, (_, star) in ENDPOINTS.items():
            headers = {"Origin": "https://example.com"}
            if not star:
                self.assertEqual(sidecar.call("GET", path, headers=headers)[0], 200, path)

    def test_ipv4_mapped_ipv6_loopback_counts_as_loopback(self):
        trusts = sidecar_module.Api(
            None, sidecar_module.parse_networks("10.0.0.0/8, 2001:db8::/32")).trusts
        for host, expected in (("127.0.0.1", True), ("127.9.9.9", True), ("::1", True),
                               ("::ffff:127.0.0.1", True), ("::ffff:10.1.2.3", True),
                               ("10.255.255.255", True), ("2001:db8::7", True),
                               ("::ffff:192.0.2.1", False), ("192.0.2.1", False),
                               ("11.0.0.1", False), ("fe80::1%eth0", False), ("::", False),
                               ("0.0.0.0", False), ("", False), ("localhost.example.com", False)):
            self.assertIs(trusts(host), expected, host)
        sidecar = self.sidecar(SIDECAR_HOST=None)
        if ":" in sidecar.host:  # it listens on one IPv6 socket, where IPv4 clients are mapped ones
            sidecar.host = "127.0.0.1"
            self.assertEqual(sidecar.post("/reset")[0], 200)


# ---- The run -------------------------------------------------------------------------------------

SIDE_BY_SIDE = 4    # Classes, each in a process of its own: most of a test is waiting.


def run_class(name):
    """Run the tests of one class; return (its name, what unittest printed)."""
    done = subprocess.run([sys.executable, os.path.abspath(__file__), name],
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    return name, done.stdout.decode("utf-8", "replace")


def read_result(name, text):
    """Return what unittest printed: a line for each test, the problems in detail, the counts.

    The counts are a dict such as {"tests": 7, "failures": 1}.
    """
    told, _, verdict = text.rpartition("\n" + "-" * 70 + "\n")
    summary = re.match(r"Ran (\d+) tests? in .*\n\n(?:OK|FAILED|NO TESTS RAN)(?: \((.*)\))?\n",
                       verdict)
    if not summary:                         # It was killed, or broke before its first test.
        return "", "\n%s ended without a summary:\n%s\n" % (name, text), {"tests": 0, "errors": 1}
    counts = {what: int(count)
              for what, count in re.findall(r"([a-z ]+)=(\d+)", summary.group(2) or "")}
    lines, rule, problems = told.partition("\n" + "=" * 70 + "\n")
    return lines.rstrip("\n"), rule + problems, dict(counts, tests=int(summary.group(1)))


def run_all():
    """Run every class, print what unittest prints of one run, and return the exit status."""
    began, problems, counts = time.monotonic(), "", collections.Counter()
    classes = [name for name, thing in globals().items() if isinstance(thing, type)
               and name.startswith("Test")]
    classes.sort(
        key=lambda name: -len(unittest.defaultTestLoader.getTestCaseNames(globals()[name])))
    with concurrent.futures.ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        for running in concurrent.futures.as_completed(
                [pool.submit(run_class, name) for name in classes]):
            lines, problem, count = read_result(*running.result())
            print(lines, flush=True)
            problems += problem
            counts.update(count)
    print("%s\n%s\nRan %d tests in %.1fs\n"
          % (problems, "-" * 70, counts.pop("tests"), time.monotonic() - began))
    failed = set(counts) - {"skipped", "expected failures"}
    told = ", ".join("%s=%d" % pair for pair in sorted(counts.items()))
    print(("FAILED" if failed else "OK") + (" (%s)" % told if told else ""))
    print("Tests with Kafka, Kubernetes and a browser are in .ci/tests; .ci/run runs them all.")
    return 1 if failed else 0


if __name__ == "__main__":
    if sys.argv[1:]:
        unittest.main(verbosity=2)
    sys.exit(run_all())
