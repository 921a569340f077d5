"""The class Sidecar of sidecar.py, for workers in Python: threads, forks, event loops, and a
sidecar that hangs, refuses or is gone. Needs nothing but Python.
"""
import asyncio
import json
import logging
import os
import re
import select
import signal
import socket
import sys
import threading
import time
import unittest
from unittest import mock

from support import HERE, PATIENCE, Case, in_threads, until

import sidecar as sidecar_module      # `sidecar` is what the tests call a running one
from sidecar import Sidecar


def answer(content, status="200 OK"):
    """Return the bytes of an answer as the sidecar sends it."""
    body = json.dumps(content) + "\n"
    return ("HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
            "Cache-Control: no-store\r\nConnection: keep-alive\r\n\r\n%s"
            % (status, len(body), body)).encode()


COUNTED = answer({"request_id": "x", "active_requests": 1, "draining": False})
DRAINING = answer({"request_id": "x", "active_requests": 1, "draining": True})
CLOSE = b""         # the connection
SILENCE = None      # for as long as the connection lasts


class ScriptedServer:
    """Stands in for a sidecar that does what a real one cannot be made to do.

    It answers each call with what `script(path)` gives: bytes, CLOSE, SILENCE, or an Event, until
    which the answer is held, as the sidecar holds it. `calls` has (connection's number, path).
    """

    def __init__(self, script=lambda path: COUNTED):
        self.script, self.calls, self.changed = script, [], threading.Condition()
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(200)
        self.url = "http://127.0.0.1:%d" % self.listener.getsockname()[1]
        self.connections = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        try:
            while True:
                connection = self.listener.accept()[0]
                self.connections.append(connection)
                threading.Thread(target=self._serve, args=(connection, len(self.connections)),
                                 daemon=True).start()
        except OSError:
            pass

    def _serve(self, connection, number):
        received = b""
        try:
            while True:
                while b"\r\n\r\n" not in received:
                    piece = connection.recv(65536)
                    if not piece:
                        return
                    received += piece
                head, _, received = received.partition(b"\r\n\r\n")
                path = head.split()[1].decode()
                with self.changed:
                    self.calls.append((number, path))
                    self.changed.notify_all()
                what = self.script(path)
                if what is SILENCE:
                    continue
                if what == CLOSE:
                    connection.shutdown(socket.SHUT_RDWR)
                elif isinstance(what, threading.Event):
                    self._hold(connection, what)
                else:
                    connection.sendall(what)
        except OSError:
            pass

    def _hold(self, connection, event):
        line, _, rest = COUNTED.partition(b"\r\n")
        connection.sendall(line + b"\r\nX-Held: ")
        while not event.wait(0.05):
            connection.sendall(b".")
        connection.sendall(b"\r\n" + rest)

    @property
    def paths(self):
        return [path for _, path in self.calls]

    def heard(self, pattern):
        return [path for path in self.paths if re.match(pattern, path)]

    def wait_for(self, pattern, count=1):
        with self.changed:
            if not self.changed.wait_for(lambda: len(self.heard(pattern)) >= count, PATIENCE):
                raise AssertionError("not %d times %s: %s" % (count, pattern, self.paths))

    def close(self):
        try:
            self.listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.listener.close()
        for connection in self.connections:
            connection.close()


class ClientCase(Case):
    def setUp(self):
        handlers = mock.patch.object(logging, "lastResort", None)   # what is logged is no news
        handlers.start()
        self.addCleanup(handlers.stop)

    def server(self, script=lambda path: COUNTED):
        server = ScriptedServer(script)
        self.addCleanup(server.close)
        return server

    def client(self, url, **options):
        """Return a client. Its class constants come as keywords too, such as REST_SECONDS.

        CALL_SECONDS are many where a test does not say it: a busy machine is no sidecar that hangs.
        """
        constants = {name: options.pop(name) for name in list(options) if name.isupper()}
        client = Sidecar(url, **options)
        vars(client).update(dict(dict(CALL_SECONDS=PATIENCE), **constants))
        self.addCleanup(self.end, client)
        return client

    @staticmethod
    def end(client):
        for memory in client._memories.values():
            memory.unsaid.clear()
            memory.callbacks.clear()
        client.close()

    def run_python(self, script, *arguments, **options):
        """Run a script to its end; return its output. It has to end with status 0."""
        program = self.program(sys.executable, "-W", "error::ResourceWarning", "-c", script,
                               *arguments, cwd=HERE, **options)
        self.assertEqual(program.wait(), 0, program.log)
        return program.log


def track_in_loop(client, work=None):
    """Return a coroutine that does work, an awaitable function, as a request."""
    async def run():
        async with client.track():
            if work:
                await work()
    return run()


class TestCounting(ClientCase):
    def test_in_a_coroutine_too(self):
        sidecar = self.sidecar()
        client = self.client(sidecar.url)

        async def look():
            self.assertEqual(sidecar.active(), 1)

        for _ in range(2):      # in two loops, one after the other
            asyncio.run(track_in_loop(client, look))
        self.assertEqual(sidecar.active(), 0)
        self.assertEqual(sidecar.sample("sidecar_request_duration_seconds_count"), 2)
        self.assertEqual(sidecar.sample("sidecar_unmatched_ends_total"), 0)

    def test_an_exception_goes_on_and_the_end_is_told(self):
        sidecar = self.sidecar()
        client = self.client(sidecar.url)

        async def fail():
            raise KeyError("x")

        for problem in (KeyError("x"), KeyboardInterrupt()):
            with self.assertRaises(type(problem)):
                with client.track():
                    raise problem
        with self.assertRaises(KeyError):
            asyncio.run(track_in_loop(client, fail))
        self.assertEqual(sidecar.active(), 0)
        self.assertEqual(sidecar.sample("sidecar_request_duration_seconds_count"), 3)

    def test_hooks_before_and_after_the_work(self):
        sidecar = self.sidecar()
        client = self.client(sidecar.url)
        client.start("task/1 ä")
        client.start("task-2")
        self.assertEqual([request["request_id"] for request in sidecar.get("/requests")[1]],
                         ["task/1 ä", "task-2"])
        client.end("task/1 ä")
        self.client(sidecar.url).end("task-2")      # as in another process
        client._memory.started.pop("task-2")
        self.assertEqual(sidecar.active(), 0)
        self.assertEqual(sidecar.sample("sidecar_unmatched_ends_total"), 0)
        self.assertFalse(client._memory.started)

    def test_threads_and_loops_share_one_client(self):
        sidecar = self.sidecar()
        client = self.client(sidecar.url)

        def work(number):
            if number % 2:
                for _ in range(100):
                    with client.track():
                        pass
            else:
                async def ten():
                    for _ in range(10):
                        await asyncio.gather(*[track_in_loop(client) for _ in range(10)])
                asyncio.run(ten())

        in_threads(8, work)
        self.assertEqual(sidecar.sample("sidecar_requests_total"), 800)
        self.assertEqual(sidecar.sample("sidecar_request_duration_seconds_count"), 800)
        self.assertEqual(sidecar.active(), 0)
        self.assertLessEqual(len(client._memory.kept), sidecar_module.MAX_KEPT_CONNECTIONS)

    def test_one_connection_serves_a_plain_loop(self):
        server = self.server()
        client = self.client(server.url)
        for _ in range(20):
            with client.track():
                pass
        for _ in range(20):
            asyncio.run(track_in_loop(client))
        self.assertEqual({number for number, _ in server.calls}, {1})
        self.assertEqual(len(server.calls), 80)

    def test_a_call_is_made_again_where_a_kept_connection_was_closed(self):
        sidecar = self.sidecar(constants={"IDLE_SECONDS": 0.05})
        client = self.client(sidecar.url)
        for _ in range(3):
            with client.track():
                self.assertEqual(sidecar.active(), 1)
                kept, = client._memory.kept
                self.assertTrue(select.select([kept], [], [], PATIENCE)[0])     # it was closed
        asyncio.run(track_in_loop(client))
        self.assertEqual(sidecar.sample("sidecar_request_duration_seconds_count"), 4)
        self.assertEqual(sidecar.sample("sidecar_unmatched_ends_total"), 0)


class TestWhere(ClientCase):
    def test_a_slash_at_the_end_a_path_and_white_space(self):
        for tail, base in (("/", ""), ("/a/b/", "/a/b"), (" ", ""), ("/50%25", "/50%25")):
            server = self.server()
            with self.client(server.url + tail).track("i"):
                pass
            self.assertEqual(server.paths[0], base + "/start-request?id=i")

    def test_the_variable_and_a_name_of_the_host(self):
        server = self.server()
        with mock.patch.dict(os.environ, SIDECAR_URL=server.url.replace("127.0.0.1", "localhost")):
            client = self.client(None)
        with client.track():
            pass
        client.close()
        asyncio.run(track_in_loop(client))
        self.assertEqual(len(server.paths), 4)

    def test_ipv6(self):
        try:
            sidecar = self.sidecar(SIDECAR_HOST="::1")
        except AssertionError:
            self.skipTest("no IPv6 here")
        client = self.client(sidecar.url)
        with client.track():
            self.assertEqual(sidecar.active(), 1)
        client.close()
        asyncio.run(track_in_loop(client))
        self.assertEqual(sidecar.sample("sidecar_request_duration_seconds_count"), 2)

    def test_what_is_no_url_and_no_name_is_named(self):
        for url in ("127.0.0.1:8081", "https://x", "http://", "http://x:y", "http://x:99999"):
            with self.assertRaisesRegex(ValueError, "^SIDECAR_URL=%s: " % re.escape(repr(url))):
                Sidecar(url)
        for name in ("", "a\nb", "n" * 65):
            with self.assertRaisesRegex(ValueError, "^name=.*: expected"):
                Sidecar(name=name)

    def test_importing_and_making_one_starts_nothing(self):
        self.assertIn("fine", self.run_python("""
import sys, threading
import sidecar
sidecar.Sidecar()
assert threading.active_count() == 1
assert not {"asyncio", "typing", "http.client"} & (set(sys.modules) - BEFORE), sys.modules
print("fine")
""".replace("BEFORE", "set(%r)" % ["http.client", "typing"])))

    def test_a_worker_in_threads_imports_nothing_later(self):
        server = self.server()
        self.run_python("""
import sys, sidecar
client = sidecar.Sidecar(sys.argv[1])
client.on_drain(print)
with client.track():
    pass
client.close()
assert "asyncio" not in sys.modules
# A child that is forked in the middle of a first import waits for its lock for ever.
assert "encodings.idna" not in sys.modules
""", server.url)
        self.assertEqual(len(server.heard("/(start|end)-request")), 2)

    def test_ids_and_reset_of_one_of_several_processes(self):
        server = self.server()
        client = self.client(server.url, name="slot 3")
        with client.track():
            pass
        client.start("t1")
        client.reset()
        self.client(server.url).reset()
        paths = [path.partition("&")[0] for path in server.paths]
        self.assertRegex(paths[0], r"^/start-request\?id=slot%203%3A[0-9a-f]{32}$")
        self.assertEqual(paths[2:], ["/start-request?id=slot%203%3At1",
                                     "/reset?prefix=slot%203%3A", "/reset"])

    def test_a_recycled_process_gives_up_only_what_is_its_own(self):
        sidecar = self.sidecar()
        clients = [self.client(sidecar.url, name="slot%d" % number) for number in (1, 2)]
        for client in clients:
            client.start("task")
        self.client(sidecar.url, name="slot1").reset()
        self.assertEqual([request["request_id"] for request in sidecar.get("/requests")[1]],
                         ["slot2:task"])
        for client in clients:
            client.end("task")
        self.assertEqual(sidecar.active(), 0)
        self.assertEqual(sidecar.sample("sidecar_unmatched_ends_total"), 0)


class TestHeld(ClientCase):
    """The sidecar drains, and holds a start: its answer comes a byte at a time."""

    def holding(self, **options):
        released = threading.Event()
        server = self.server(lambda path: released if "start" in path else COUNTED)
        client = self.client(server.url, CALL_SECONDS=4.0, **options)
        self.addCleanup(released.set)
        return server, client, released

    def test_a_thread_waits_for_as_long_as_it_is_held(self):
        server, client, released = self.holding()
        began = []

        def work():
            with client.track():
                began.append(time.monotonic())

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        server.wait_for("/start-request")
        time.sleep(4.5)         # more than the longest that a call which is not held may take
        self.assertEqual(began, [])
        released.set()
        thread.join(PATIENCE)
        self.assertEqual(len(began), 1)
        self.assertEqual(len(server.paths), 2)          # and nothing was said twice
        self.assertIsNone(client._memory.trouble)

    def test_what_is_said_after_a_hold_has_its_time(self):
        server, client, released = self.holding(WATCH_SECONDS=3600, REST_SECONDS=0.0)
        server.script = lambda path: released if "start" in path else time.sleep(0.1) or COUNTED
        released.set()
        client.start("before")
        client._memory.rest_until = time.monotonic() + 3600     # so that its end stays unsaid
        client.end("before")
        client._memory.rest_until = 0.0
        released.clear()
        threading.Timer(4.5, released.set).start()
        with self.assertRaisesRegex(AssertionError, "no logs"):
            with self.assertLogs("sidecar", "WARNING"):
                with client.track():
                    pass
        self.assertEqual(client._memory.unsaid, {})             # its end found the time for it

    def test_coroutines_wait_and_the_loop_goes_on_without_a_thread(self):
        server, client, released = self.holding()

        async def run():
            tasks = [asyncio.ensure_future(track_in_loop(client)) for _ in range(60)]
            threads = threading.active_count() - len(server.connections)
            while len(server.paths) < 60:               # more than an executor has threads
                await asyncio.sleep(0.01)
            await asyncio.sleep(4.5)
            self.assertFalse(any(task.done() for task in tasks))
            self.assertLessEqual(threading.active_count() - len(server.connections), threads)
            released.set()
            await asyncio.gather(*tasks)

        asyncio.run(run())
        self.assertEqual(len(server.paths), 120)
        self.assertIsNone(client._memory.trouble)

    def test_one_that_stops_in_the_middle_is_given_up(self):
        def script(path):
            return COUNTED[:40] if "start" in path else COUNTED
        server = self.server(script)
        client = self.client(server.url, SILENCE_SECONDS=0.2, REST_SECONDS=3600)
        with self.assertLogs("sidecar", "WARNING"):
            with client.track():
                pass
            asyncio.run(track_in_loop(client))
        self.assertEqual(len(server.heard("/start-request")), 1)

    def test_who_asks_not_to_be_held_says_so(self):
        server = self.server()
        for hold, said in ((None, ""), (True, "&hold=true"), (False, "&hold=false")):
            with self.client(server.url, hold=hold).track("i"):
                self.assertEqual(server.paths[-1], "/start-request?id=i" + said)
        client = self.client(server.url)
        client.on_drain(print)
        with client.track("i"):
            self.assertEqual(server.heard("/start")[-1], "/start-request?id=i&hold=false")

    def test_a_coroutine_that_is_cancelled_while_it_is_held_leaves_no_count(self):
        server, client, _ = self.holding(WATCH_SECONDS=0.02)

        async def run():
            task = asyncio.ensure_future(track_in_loop(client))
            while not server.paths:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            task.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await task

        asyncio.run(run())
        server.wait_for("/end-request")
        self.assertEqual(server.paths[1], server.paths[0].replace("start", "end"))

    def test_a_thread_that_is_interrupted_while_it_is_held_leaves_no_count(self):
        server, client, _ = self.holding(WATCH_SECONDS=0.02)

        def interrupt(*_):
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, interrupt)
        self.addCleanup(signal.signal, signal.SIGALRM, before)

        def interrupt_it():
            server.wait_for("/start-request")
            signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)

        with self.assertRaises(KeyboardInterrupt):
            threading.Thread(target=interrupt_it).start()
            with client.track():
                self.fail("it was not held")
        server.wait_for("/end-request")
        self.assertEqual(server.paths[1], server.paths[0].replace("start", "end"))


class TestTrouble(ClientCase):
    def test_one_that_hangs_costs_one_time_out(self):
        server = self.server(lambda path: SILENCE)
        client, done = self.client(server.url, CALL_SECONDS=0.5, REST_SECONDS=3600), []
        for turn in range(100):
            with client.track():
                done.append(turn)
            asyncio.run(track_in_loop(client))
        self.assertEqual(len(done), 100)
        server.wait_for("/start-request")
        self.assertEqual(len(server.calls), 1)

    def test_one_that_hangs_does_not_freeze_the_loop(self):
        server = self.server(lambda path: SILENCE)
        client = self.client(server.url, CALL_SECONDS=1.0, REST_SECONDS=3600)

        async def run():
            tasks = [asyncio.ensure_future(track_in_loop(client)) for _ in range(20)]
            turns = 0
            while not all(task.done() for task in tasks):
                await asyncio.sleep(0.01)
                turns += 1
            return turns

        self.assertGreater(asyncio.run(run()), 4)       # a loop that waits for it has one or two

    def test_a_message_is_delayed_by_a_second_at_most(self):
        self.assertLessEqual(2 * Sidecar.CALL_SECONDS, 1.0)
        server = self.server(lambda path: SILENCE)
        for io, enter in (
                (sidecar_module.Blocking, lambda request: request.__enter__()),
                (sidecar_module.InLoop, lambda request: asyncio.run(request.__aenter__()))):
            given, connect, receive = [], io.connect, io.receive

            async def slow_connect(address, seconds):
                if threading.current_thread() is not threading.main_thread():
                    raise OSError("not of this test")
                given.append(seconds)
                connection = await connect(address, seconds)
                time.sleep(0.5)             # as with a full backlog, or a server of names
                return connection

            async def timed_receive(connection, seconds):
                if threading.current_thread() is threading.main_thread():
                    given.append(seconds)
                return await receive(connection, seconds)

            client = self.client(server.url, CALL_SECONDS=1.0, REST_SECONDS=3600)
            with mock.patch.object(io, "connect", slow_connect), \
                    mock.patch.object(io, "receive", timed_receive):
                enter(client.track())
            self.assertEqual(len(given), 2)
            self.assertLessEqual(given[0], 1.0)
            self.assertLessEqual(given[1], 0.5)

    def test_a_request_that_began_while_it_hung_is_counted_when_it_is_back(self):
        sidecar = self.sidecar()
        client = self.client(sidecar.url, CALL_SECONDS=0.2, REST_SECONDS=0.1, WATCH_SECONDS=0.1)
        sidecar.signal(signal.SIGSTOP)
        with client.track():
            with client.track():            # this one rests: the sidecar has not heard of it
                client.CALL_SECONDS = PATIENCE
                sidecar.signal(signal.SIGCONT)
                until(lambda: sidecar.active() == 2)
        until(lambda: sidecar.active() == 0)
        self.assertEqual(sidecar.sample("sidecar_requests_total"), 2)
        self.assertEqual(sidecar.sample("sidecar_unmatched_ends_total"), 0)

    def test_what_it_has_not_heard_of_is_not_ended(self):
        hung = threading.Event()
        server = self.server(lambda path: SILENCE if hung.is_set() else COUNTED)
        client = self.client(server.url, CALL_SECONDS=0.1, REST_SECONDS=3600, WATCH_SECONDS=3600)
        hung.set()
        for number in range(3):             # the first may have been heard
            with client.track("r%d" % number):
                pass
        hung.clear()
        client.CALL_SECONDS = PATIENCE
        client.close()
        self.assertEqual([path.partition("&")[0] for path in server.paths],
                         ["/start-request?id=r0", "/end-request?id=r0"])

    def test_a_server_failure_is_no_answer(self):
        failing = [answer({"error": "too many connections"}, "503 Service Unavailable")] * 2
        server = self.server(
            lambda path: failing.pop() if "end" in path and failing else COUNTED)
        client = self.client(server.url, REST_SECONDS=0.05, WATCH_SECONDS=0.05)
        with self.assertLogs("sidecar") as logs:
            with client.track():
                pass
            server.wait_for("/end-request", 3)
        self.assertEqual(len(set(server.heard("/end-request"))), 1)
        self.assertIn("503: too many connections", "".join(logs.output))

    def test_a_refusal_is_told_once_with_its_reason(self):
        for status in ("403 Forbidden", "404 Not Found", "405 Method Not Allowed"):
            server = self.server(lambda path: answer({"error": "the reason"}, status))
            client = self.client(server.url, REST_SECONDS=0.0, WATCH_SECONDS=0.01)
            with self.assertLogs("sidecar") as logs:
                for _ in range(5):
                    with client.track():
                        pass
            self.assertEqual(len(logs.output), 1, logs.output)
            self.assertIn("refuses to count: %s: the reason" % status[:3], logs.output[0])
            self.assertEqual(client._memory.unsaid, {})
            self.assertEqual(server.heard("/end-request"), [])      # nothing was counted

    def test_it_is_told_when_all_is_well_again(self):
        bad = [CLOSE]
        server = self.server(lambda path: bad.pop() if bad else COUNTED)
        client = self.client(server.url, REST_SECONDS=0.0)
        with self.assertLogs("sidecar", "INFO") as logs:
            for _ in range(3):
                with client.track():
                    pass
        self.assertEqual([record.levelname for record in logs.records], ["WARNING", "INFO"])

    def test_a_malformed_id_does_not_stop_the_counting_of_others(self):
        sidecar = self.sidecar()
        client = self.client(sidecar.url, REST_SECONDS=3600)
        with self.assertLogs("sidecar") as logs:
            for _ in range(2):
                with client.track("x" * 200):
                    with client.track():
                        self.assertEqual(sidecar.active(), 1)
        self.assertEqual(len([line for line in logs.output if "expected 1 to 128" in line]), 1)
        self.assertEqual(sidecar.sample("sidecar_unmatched_ends_total"), 0)

    def test_whatever_else_answers_is_an_error(self):
        no_head = b"HTTP/1.1 200 OK\r\n\r\n{}"
        for odd in (b"SSH-2.0-OpenSSH_9.2\r\n", b"\x15\x03\x01\x00\x02\x02\x16", no_head,
                    answer([]), answer("x"), COUNTED + b"more", b"H" * 70000, b"HTTP/1.0 200 OK",
                    COUNTED.replace(b"{", b"<"), COUNTED.replace(b'"x"', b'"\xff"'), CLOSE):
            server = self.server(lambda path: odd)
            client = self.client(server.url, REST_SECONDS=3600)
            with self.assertLogs("sidecar", "WARNING"):
                with client.track():
                    pass
            self.assertEqual(len(server.calls), 1, odd)

    def test_what_waits_is_bounded_and_one_thread_delivers_it(self):
        hung = threading.Event()
        server = self.server(lambda path: SILENCE if hung.is_set() else COUNTED)
        client = self.client(server.url, REST_SECONDS=0.2, WATCH_SECONDS=0.05)
        requests = [client.track() for _ in range(300)]
        for request in requests:
            request.__enter__()
        before = threading.enumerate()
        hung.set()
        client.CALL_SECONDS = 0.2
        with mock.patch.object(sidecar_module, "MAX_UNSAID", 250):
            for request in requests:
                request.__exit__()
        waiting = len(client._memory.unsaid)
        self.assertTrue(245 <= waiting <= 250, waiting)     # one may be said this very moment
        own = [thread for thread in threading.enumerate()
               if thread.name == "sidecar" and thread not in before]
        self.assertEqual(len(own), 1)
        hung.clear()
        until(lambda: len(set(server.heard("/end-request"))) >= 245)
        until(lambda: not own[0].is_alive())

    def test_an_end_that_comes_while_its_start_is_said_late_is_said_too(self):
        gate, reached = threading.Event(), threading.Event()

        def script(path):
            if path == "/start-request?id=slow&hold=false":
                reached.set()
                gate.wait(PATIENCE)
            return COUNTED
        server = self.server(script)
        client = self.client(server.url, REST_SECONDS=3600, WATCH_SECONDS=0.01)
        client._memory.rest_until = time.monotonic() + 3600
        with client.track("slow"):
            client._memory.rest_until = 0.0
            self.assertTrue(reached.wait(PATIENCE))
        gate.set()
        server.wait_for("/end-request", 1)
        until(lambda: not client._memory.unsaid)
        self.assertEqual({path.partition("&")[0] for path in server.paths},
                         {"/start-request?id=slow", "/end-request?id=slow"})
        self.assertIn("/end-request", server.paths[-1])

    def test_an_end_that_comes_just_before_its_start_is_said_late_is_said_after_it(self):
        server = self.server()
        client = self.client(server.url, REST_SECONDS=0.0, WATCH_SECONDS=0.01)
        gate, reached, connect = threading.Event(), threading.Event(), \
            sidecar_module.Blocking.connect

        async def gated_connect(address, seconds):
            if address == client._address:
                reached.set()
                gate.wait(PATIENCE)
            return await connect(address, PATIENCE)

        with mock.patch.object(sidecar_module.Blocking, "connect", gated_connect):
            client._memory.rest_until = time.monotonic() + 3600
            with client.track("slow"):
                client._memory.rest_until = 0.0
                self.assertTrue(reached.wait(PATIENCE))     # nothing of it is heard yet
            gate.set()
            server.wait_for("/end-request")
        self.assertEqual([path.partition("&")[0] for path in server.paths],
                         ["/start-request?id=slow", "/end-request?id=slow"])

    def test_at_the_limit_of_processes_nothing_raises_and_the_next_call_delivers(self):
        server = self.server(lambda path: COUNTED)
        failing = [CLOSE, CLOSE]
        server.script = lambda path: failing.pop() if "end" in path and failing else COUNTED
        self.assertIn("0 unsaid", self.run_python("""
import resource, sys, threading
from sidecar import Sidecar
client = Sidecar(sys.argv[1])
client.REST_SECONDS, client.CALL_SECONDS = 0.0, 60
resource.setrlimit(resource.RLIMIT_AS, (1 << 33, 1 << 33))
threading.stack_size(1 << 34)           # so no thread can be started, whoever runs this
client.on_drain(print)
for _ in range(4):
    with client.track():
        pass
assert threading.active_count() == 1
print(len(client._memory.unsaid), "unsaid")
client._memory.callbacks.clear()
client.close()
""", server.url))
        self.assertEqual(len(set(server.heard("/end-request"))), 4)

    def test_as_the_interpreter_exits_nothing_raises(self):
        server = self.server(lambda path: SILENCE if "end" in path else COUNTED)
        log = self.run_python("""
import asyncio, atexit, sys, threading, time
from sidecar import Sidecar
client = Sidecar(sys.argv[1])
client.CALL_SECONDS = 1.0

def late():
    with client.track():
        threading.main_thread().join()      # it ends when the interpreter is exiting

async def in_loop():
    async with client.track():
        pass

threading.Thread(target=late).start()
atexit.register(client.close)
atexit.register(lambda: asyncio.run(in_loop()))
atexit.register(lambda: client.track().__enter__())
time.sleep(0.2)
""", server.url)
        self.assertNotIn("Traceback", log)
        self.assertTrue(server.heard("/end-request"))


# Forks while threads are in the middle of calls. The children use the client in a loop too.
FORK_SCRIPT = """
import asyncio, os, sys, threading
from sidecar import Sidecar
client = Sidecar(sys.argv[1])
client.CALL_SECONDS = 60     # a machine that is busy is no sidecar that hangs
stopped = threading.Event()
made = []

def work():
    while not stopped.is_set():
        with client.track():
            made.append(1)

async def work_in_loop():
    for _ in range(20):
        async with client.track():
            pass

threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
for _ in range(10):
    child = os.fork()
    if not child:
        client.start("child-%d" % os.getpid())
        client.end("child-%d" % os.getpid())
        asyncio.run(work_in_loop())
        os._exit(0)
    assert not os.waitpid(child, 0)[1]
stopped.set()
for thread in threads:
    thread.join()
with open(sys.argv[2], "w") as file:
    file.write(str(len(made)))
"""


@unittest.skipUnless(hasattr(os, "fork"), "no fork here")
class TestFork(ClientCase):
    def counts(self, sidecar, total):
        self.assertEqual(sidecar.sample("sidecar_requests_total"), total)
        self.assertEqual(sidecar.sample("sidecar_request_duration_seconds_count"), total)
        self.assertEqual(sidecar.active(), 0)
        self.assertEqual(sidecar.sample("sidecar_unmatched_ends_total"), 0)

    def test_a_child_has_connections_of_its_own(self):
        sidecar = self.sidecar()
        self.run_python("""
import os, sys
from sidecar import Sidecar
client = Sidecar(sys.argv[1])
client.CALL_SECONDS = 60     # a machine that is busy is no sidecar that hangs

def work(count):
    for _ in range(count):
        with client.track():
            pass

work(1)
children = []
for _ in range(4):
    child = os.fork()
    if not child:
        work(100)
        os._exit(0)
    children.append(child)
work(99)
assert not any(os.waitpid(child, 0)[1] for child in children)
client.close()
""", sidecar.url)
        self.counts(sidecar, 500)

    def test_a_fork_while_threads_and_a_loop_are_in_the_middle_of_calls(self):
        sidecar = self.sidecar()
        self.run_python(FORK_SCRIPT, sidecar.url, self.path("made"))
        with open(self.path("made")) as file:
            self.counts(sidecar, 10 * 21 + int(file.read()))

    def path(self, name):
        if not hasattr(self, "folder"):
            import tempfile
            folder = tempfile.TemporaryDirectory()
            self.addCleanup(folder.cleanup)
            self.folder = folder.name
        return os.path.join(self.folder, name)

    def test_multiprocessing(self):
        sidecar = self.sidecar()
        self.run_python("""
import multiprocessing, sys
from sidecar import Sidecar
client = Sidecar(sys.argv[1])
client.CALL_SECONDS = 60     # a machine that is busy is no sidecar that hangs

def work(number):
    with client.track():
        return number

if __name__ == "__main__":
    work(0)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert sum(pool.map(work, range(200), chunksize=5)) == 19900
""", sidecar.url)
        self.counts(sidecar, 201)

    def test_what_the_parent_could_not_say_the_child_does_not_say(self):
        server = self.server()
        server.script = lambda path: SILENCE if "end" in path else COUNTED
        self.run_python("""
import os, sys
from sidecar import Sidecar
client = Sidecar(sys.argv[1])
client.CALL_SECONDS = 60     # a machine that is busy is no sidecar that hangs
client.on_drain(lambda: print("called in", os.getpid()))
with client.track():
    client.CALL_SECONDS = 0.1
child = os.fork()
if not child:
    client.close()
    os._exit(0)
os.waitpid(child, 0)
""", server.url)
        self.assertEqual(len(server.heard("/end-request")), 1)


class TestOnDrain(ClientCase):
    def draining(self):
        """Return a server that drains when the returned event is set."""
        drains = threading.Event()

        def script(path):
            if not drains.is_set():
                return answer({"status": "ready"}) if path == "/ready" else COUNTED
            return answer({"error": "draining"}, "503 Service Unavailable") \
                if path == "/ready" else DRAINING
        return self.server(script), drains

    def test_it_is_called_once_on_a_thread(self):
        server, drains = self.draining()
        client, called, told = self.client(server.url), [], threading.Event()
        client.on_drain(lambda: (called.append(threading.current_thread()), told.set()))
        with client.track():
            self.assertFalse(client.draining)
            drains.set()
        self.assertTrue(told.wait(PATIENCE))
        for _ in range(5):
            with client.track():
                self.assertTrue(client.draining)
        self.assertEqual(len(called), 1)
        self.assertIsNot(called[0], threading.current_thread())

    def test_an_idle_worker_hears_of_it_and_nobody_asks_after_that(self):
        server, drains = self.draining()
        client, told = self.client(server.url, WATCH_SECONDS=0.02), threading.Event()
        client.on_drain(told.set)
        server.wait_for("/ready", 2)
        self.assertFalse(told.is_set())
        drains.set()
        self.assertTrue(told.wait(PATIENCE))
        until(lambda: client._memory.attended.acquire(False))
        asked = len(server.paths)
        time.sleep(0.2)
        self.assertEqual(len(server.paths), asked)

    def test_without_a_callback_nobody_asks(self):
        server, _ = self.draining()
        client = self.client(server.url, WATCH_SECONDS=0.01)
        with client.track():
            pass
        time.sleep(0.2)
        self.assertEqual(server.heard("/ready"), [])
        self.assertFalse(client._memory.attended.locked())

    def test_in_the_loop_where_it_was_set(self):
        server, drains = self.draining()
        for idle in (False, True):
            drains.clear()
            client = self.client(server.url, WATCH_SECONDS=0.02 if idle else 3600)

            async def run():
                called, told = [], asyncio.Event()

                def callback():
                    called.append(asyncio.get_running_loop())
                    told.set()

                client.on_drain(callback)
                drains.set()
                if not idle:
                    async with client.track():
                        pass
                await asyncio.wait_for(told.wait(), PATIENCE)
                self.assertEqual(called, [asyncio.get_running_loop()])

            asyncio.run(run())

    def test_a_coroutine_function_becomes_a_task(self):
        server, drains = self.draining()
        client = self.client(server.url)

        async def run():
            told = asyncio.Event()

            async def callback():
                await asyncio.sleep(0)
                told.set()

            client.on_drain(callback)
            drains.set()
            async with client.track():
                await asyncio.wait_for(told.wait(), PATIENCE)

        asyncio.run(run())

    def test_one_that_is_set_while_it_drains_is_called_too(self):
        server, drains = self.draining()
        drains.set()
        client, told = self.client(server.url), threading.Event()
        self.assertFalse(client.ready())
        client.on_drain(told.set)
        self.assertTrue(told.wait(PATIENCE))

    def test_a_loop_that_is_gone_does_no_harm(self):
        server, drains = self.draining()
        client = self.client(server.url)

        async def run():
            client.on_drain(self.fail)

        asyncio.run(run())
        drains.set()
        with client.track():
            pass
        self.assertEqual(client._memory.callbacks, [])

    def test_draining_is_told_by_the_real_one_and_ready_ends_it(self):
        sidecar = self.sidecar(GRACE_PERIOD_SECONDS=0.2)
        client, told = self.client(sidecar.url), threading.Event()
        client.on_drain(told.set)
        self.assertTrue(client.ready())
        sidecar.post("/start-request?id=other")
        drain = threading.Thread(target=sidecar.get, args=("/drain",), daemon=True)
        drain.start()
        sidecar.wait_for("drain started")
        with client.track():
            self.assertTrue(client.draining)
        self.assertTrue(told.wait(PATIENCE))
        drain.join(PATIENCE)
        sidecar.post("/reset")
        until(client.ready)
        self.assertFalse(client.draining)

    def test_one_that_is_gone_does_not_undo_what_it_said(self):
        server, drains = self.draining()
        drains.set()
        client = self.client(server.url)
        self.assertFalse(client.ready())
        server.close()
        self.assertFalse(client.ready())


if __name__ == "__main__":
    unittest.main(verbosity=2)
