"""More connections than there are places, from clients as they are: nothing is lost, and who
matters finds a place. Real Go and Node.js where they are installed.
"""
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
import unittest

from support import (NAMESPACES, PATIENCE, SCALE, Case, SidecarProcess, figures, needs,
                     readme_blocks, run, until, version_of)

PLACES = 512                        # Of each of the two budgets of a port.
START = b"POST /start-request?id=%d HTTP/1.1\r\nHost: a\r\n\r\n"


def read_to_end(connection):
    return b"".join(iter(lambda: connection.recv(65536), b""))


class Limits(Case):
    """What every test here asks of a sidecar in the end."""

    def folder(self):
        path = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, path)
        return path

    def connect(self, sidecar, count, data=b"", source=None):
        """Return connections that each sent `data`, or what it is for its number."""
        connections = []
        for number in range(count):
            connection = socket.create_connection((sidecar.host, sidecar.port), PATIENCE, source)
            self.addCleanup(connection.close)
            connection.sendall(data % number if b"%d" in data else data)
            connections.append(connection)
        return connections

    def serves(self, sidecar):
        """Check that who looks, who counts and who drains is answered."""
        self.assertEqual(sidecar.get("/health")[0], 200)
        self.assertEqual(sidecar.post("/start-request?id=serves")[0], 200)
        self.assertEqual(sidecar.post("/end-request?id=serves")[0], 200)

    def refused(self, sidecar):
        return sidecar.get("/metrics")[1]["refused_connections"]


class TestManyConnections(Limits):
    """Clients that do nothing wrong, and some that do."""

    def test_idle_connections_make_room(self):
        sidecar = self.sidecar()
        idle = self.connect(sidecar, 2 * PLACES, b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        self.serves(sidecar)
        for connection in idle:                # Each has been answered, the last ones closed after.
            self.assertTrue(connection.recv(65536).startswith(b"HTTP/1.1 200 "))
        self.assertEqual(self.refused(sidecar), 0)
        sidecar.wait_for("WARNING many connections: each is closed after its answer")
        self.assertEqual(sidecar.whole_log().count("WARNING"), 1)

    def test_a_request_that_is_on_its_way_is_answered_before_its_connection_goes(self):
        """Ten times, since it is a race."""
        for _ in range(10):
            sidecar = self.sidecar(constants={"CROWDED": 2 * PLACES})
            idle = self.connect(sidecar, PLACES, b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            for connection in idle:
                self.assertTrue(connection.recv(65536).startswith(b"HTTP/1.1 200 "))
            sidecar.signal(signal.SIGSTOP)      # what follows is there when it looks again
            os.waitpid(sidecar.process.pid, os.WUNTRACED)
            late = self.connect(sidecar, 100, b"GET /health HTTP/1.0\r\n\r\n")
            for number in range(100):
                idle[number].sendall(START % number)
            sidecar.signal(signal.SIGCONT)
            for connection in late:
                self.assertTrue(read_to_end(connection).startswith(b"HTTP/1.1 200 "))
            for number in range(100):
                self.assertIn(b'"request_id": "%d"' % number, idle[number].recv(65536))
            self.assertEqual(sidecar.active(), 100)
            sidecar.kill()
            for connection in idle + late:
                connection.close()

    def test_slow_clients_make_room(self):
        """Half a request each, and never the rest."""
        sidecar = self.sidecar(constants={"REQUEST_SECONDS": 2 * PATIENCE})
        self.connect(sidecar, PLACES, b"POST /start-request HTTP/1.1\r\nHos")
        self.serves(sidecar)
        self.assertEqual(self.refused(sidecar), 0)

    def test_callers_of_drain_that_hang_up(self):
        """A caller that waits on is not taken for one of them, though it was there first."""
        sidecar = self.sidecar(GRACE_PERIOD_SECONDS="1h", HOLD_STARTS="never")
        sidecar.post("/start-request?id=a")
        first, = self.connect(sidecar, 1, b"GET /drain HTTP/1.0\r\n\r\n")
        sidecar.wait_for("drain started")
        for _ in range(PLACES + 8):
            self.connect(sidecar, 1, b"GET /drain HTTP/1.0\r\n\r\n")[0].close()
        self.serves(sidecar)
        self.assertGreaterEqual(sidecar.get("/metrics")[1]["evicted_connections"], 8)
        # The others have heard by now that they gave way; this one waits on.
        self.assertEqual(select.select([first], [], [], 2.0)[0], [])
        self.assertLess(figures(sidecar.process.pid)[1], PLACES + 64)
        sidecar.post("/end-request?id=a")
        self.assertTrue(read_to_end(first).startswith(b"HTTP/1.1 200 "))
        self.assertEqual(self.refused(sidecar), 0)

    def test_callers_of_drain_that_wait(self):
        sidecar = self.sidecar(GRACE_PERIOD_SECONDS="1h", HOLD_STARTS="never")
        sidecar.post("/start-request?id=a")
        waiting = self.connect(sidecar, PLACES, b"GET /drain HTTP/1.0\r\n\r\n")
        sidecar.wait_for("drain started")
        self.assertEqual(sidecar.get("/health")[0], 200)                # in the place of one
        evicted = select.select(waiting, [], [], PATIENCE)[0][0]        # the oldest, or nearly so
        waiting.remove(evicted)
        self.assertIn(b'{"error": "too many connections", "active_requests": 1}',
                      read_to_end(evicted))
        self.assertEqual(sidecar.post("/end-request?id=a")[0], 200)     # which is free now
        answered = sum(read_to_end(connection).startswith(b"HTTP/1.1 200 ")
                       for connection in waiting)
        self.assertGreaterEqual(answered, PLACES - 1)
        self.assertEqual(sidecar.get("/metrics")[1]["evicted_connections"], 1)

    def test_600_held_starts_and_the_ends_that_come_meanwhile(self):
        """Nothing ends for longer than a hold may block, so what is answered gave way."""
        sidecar = self.sidecar(GRACE_PERIOD_SECONDS="1h", HOLD_STARTS="always",
                               constants={"BLOCKED_SECONDS": 600.0, "HELD_LONGEST_SECONDS": 600.0})
        for number in range(3):
            sidecar.post("/start-request?id=before-%d" % number)
        sidecar.post("/start-request?id=stays")                 # so that the drain is not over
        sidecar.signal(signal.SIGTERM)
        sidecar.wait_for("drain started")
        count = 600
        held = self.connect(sidecar, count, START)
        for number in range(3):
            self.assertEqual(sidecar.post("/end-request?id=before-%d" % number)[0], 200)
        # The oldest ones gave way, and are counted: those whose starts were read first.
        until(lambda: len(sidecar.get("/requests")[1]) > 88)
        counted = {request["request_id"] for request in sidecar.get("/requests")[1]} - {"stays"}
        for number in map(int, counted):
            self.assertIn(b'"request_id": "%d"' % number, read_to_end(held[number]))
            self.assertEqual(sidecar.post("/end-request?id=%d" % number)[0], 200)
        metrics = sidecar.get("/metrics")[1]
        self.assertEqual((metrics["unmatched_ends"], metrics["refused_connections"]), (0, 0))
        self.assertGreaterEqual(metrics["held_starts"], count - 88 - 16)


class TestLookers(Case):
    """Who may only look takes no place from who counts."""

    @needs("a right to make namespaces (root, unshare, ip)", NAMESPACES)
    def test_512_idle_connections_from_another_address(self):
        inside = self.program(
            "unshare", "--net", "sh", "-c",
            "ip link set lo up && ip address add 192.0.2.10 dev lo && "
            'ip address add 192.0.2.11 dev lo && exec "$@"', "sh", sys.executable, "-c",
            "import test_limits; test_limits.look()",
            cwd=os.path.dirname(os.path.abspath(__file__)))
        self.assertEqual(inside.wait(), 0, inside.log)
        self.assertEqual(inside.log, "as expected")


def look():
    """In a network namespace: fill the places of those who may only look, and see who is served."""
    sidecar = SidecarProcess(SIDECAR_HOST=None)
    sidecar.host = "192.0.2.10"
    try:
        idle = [socket.create_connection((sidecar.host, sidecar.port), PATIENCE, ("192.0.2.11", 0))
                for _ in range(PLACES)]
        until(lambda: figures(sidecar.process.pid)[1] > PLACES)
        sidecar.host = "127.0.0.1"
        assert sidecar.post("/start-request?id=a")[0] == 200
        assert sidecar.get("/metrics")[1]["evicted_connections"] == 0      # Another budget.
        sidecar.host, sidecar.source = "192.0.2.10", ("192.0.2.11", 0)
        until(lambda: sidecar.get("/health")[0] == 200)     # a second later the first one may go
        assert sidecar.get("/metrics")[1]["evicted_connections"] >= 1
        assert sidecar.post("/reset")[0] == 403
        sidecar.host, sidecar.source = "127.0.0.1", None
        assert sidecar.post("/end-request?id=a")[0] == 200
        assert sidecar.post("/drain")[0] == 200
        sidecar.wait_for(r"too many connections: .* client=\S*192\.0\.2\.11")
        assert idle
    finally:
        sidecar.kill()
    print("as expected")


@needs("Node.js 18", version_of(["node", "--version"]) >= (18, 0))
class TestNode(Limits):
    def test_1000_messages_in_work_at_once(self):
        folder = self.folder()
        client = readme_blocks("js")[0]
        with open(os.path.join(folder, "sidecar.mjs"), "w") as file:
            file.write(client.replace("500", "60000"))      # a busy machine is not what is tested
        with open(os.path.join(folder, "worker.mjs"), "w") as file:
            file.write("""
import { track } from "./sidecar.mjs";
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
await Promise.all(Array.from({ length: 1000 }, () => track(() => sleep(2000))));
""")
        sidecar = self.sidecar()
        run("node", os.path.join(folder, "worker.mjs"),
            env=dict(os.environ, SIDECAR_URL=sidecar.url))
        metrics = sidecar.get("/metrics")[1]
        self.assertEqual([metrics[name] for name in (
            "total_requests", "active_requests", "unmatched_ends", "refused_connections")],
            [1000, 0, 0, 0])
        self.assertEqual(sidecar.sample("sidecar_request_duration_seconds_count"), 1000)
        sidecar.wait_for("WARNING many connections")


# A worker in Go: so many messages, with a pause after each.
UNREAD = """package main

import (
	"fmt"
	"net/http"
	"os"
	"strconv"
	"time"
)

func main() {
	messages, _ := strconv.Atoi(os.Args[1])
	pause, _ := time.ParseDuration(os.Args[2])
	failed := 0
	for i := 0; i < messages; i++ {
		for _, path := range []string{"/start-request", "/end-request?duration=1.2s"} {
			answer, err := http.Post(os.Getenv("SIDECAR_URL")+path, "application/json", nil)
			if err != nil || answer.StatusCode != 200 { // and the body is neither read nor closed
				failed++
			}
		}
		time.Sleep(pause)
	}
	fmt.Println("failed", failed)
}
"""


@needs("Go 1.19", version_of(["go", "version"]) >= (1, 19))
class TestGo(Limits):
    SECONDS = 120

    def test_a_client_that_never_closes_an_answers_body(self):
        """15 messages a second; where less than all is run, so many more of them a second."""
        folder = self.folder()
        with open(os.path.join(folder, "main.go"), "w") as file:
            file.write(UNREAD)
        sidecar = self.sidecar()
        seconds, messages = max(self.SECONDS * SCALE, 12), 15 * self.SECONDS
        printed = run("go", "run", os.path.join(folder, "main.go"), messages,
                      "%dus" % (seconds / messages * 1e6),
                      env=dict(os.environ, SIDECAR_URL=sidecar.url, GO111MODULE="off"))
        self.assertEqual(printed, "failed 0\n")
        metrics = sidecar.get("/metrics")[1]
        self.assertEqual([metrics[name] for name in (
            "total_requests", "active_requests", "unmatched_ends", "refused_connections")],
            [messages, 0, 0, 0])
        sidecar.wait_for("WARNING many connections")
        self.serves(sidecar)


class TestCost(Limits):
    """What many connections cost. The numbers are printed; what is asserted leaves room."""

    @unittest.skipIf(sys.implementation.name == "pypy", "its threads and its heap take more")
    def test_memory_and_threads_of_1000_connections(self):
        sidecar = self.sidecar(constants={"MAX_CONNECTIONS": 1000, "CROWDED": 1000})
        rest = figures(sidecar.process.pid)
        connections = self.connect(sidecar, 999, START)
        for connection in connections:
            self.assertTrue(connection.recv(65536).startswith(b"HTTP/1.1 200 "))
        memory, threads, _ = figures(sidecar.process.pid)
        print("at rest %.1f MiB, %d threads; with 1,000 connections %.1f MiB, %d threads"
              % (rest[0] / 2 ** 20, rest[1], memory / 2 ** 20, threads))
        self.assertLess(memory - rest[0], 64 << 20)
        self.assertLess(threads, 1000 + 40)

    def test_the_cpu_time_of_1000_held_starts(self):
        long = {"BLOCKED_SECONDS": 600.0, "HELD_LONGEST_SECONDS": 600.0, "MAX_CONNECTIONS": 1100,
                "CROWDED": 1100}
        sidecar = self.sidecar(GRACE_PERIOD_SECONDS="1h", HOLD_STARTS="always", constants=long)
        sidecar.post("/start-request?id=a")
        sidecar.signal(signal.SIGTERM)
        sidecar.wait_for("drain started")
        self.connect(sidecar, 1000, START)
        until(lambda: sidecar.get("/metrics")[1]["held_starts"] == 1000)

        def cpu_seconds():
            return sidecar.sample("process_cpu_seconds_total")
        before, began = cpu_seconds(), time.monotonic()
        time.sleep(10)                          # It is the time that passes that is measured.
        share = (cpu_seconds() - before) / (time.monotonic() - began)
        print("1,000 held starts: %.1f %% of a CPU" % (100 * share))
        self.assertLess(share, 0.5)


if __name__ == "__main__":
    unittest.main(verbosity=2)
