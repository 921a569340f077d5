"""Many clients at once, and mutated requests."""
import http.client
import io
import itertools
import json
import random
import socket
import sys
import types
import unittest

from support import SCALE, Case, figures, in_threads, until

import sidecar as sidecar_module      # `sidecar` is what the tests call a running one.


def read_answers(connection):
    """Return [(status, body), ...] as http.client reads them, up to the connection's end."""
    pieces, answers = [b""], []
    try:
        pieces.extend(iter(lambda: connection.recv(1 << 18), b""))
    except ConnectionError:                 # Closed with bytes of ours unread.
        pass
    received = b"".join(pieces)
    if received.endswith(b"HTTP/1.1 100 Continue\r\n\r\n"):        # And then the body did not come.
        received = received[:-25]
    stream = io.BytesIO(received)
    stream.close = lambda: None             # http.client would close it with the first answer.
    while stream.tell() < len(received):
        answer = http.client.HTTPResponse(types.SimpleNamespace(makefile=lambda mode: stream))
        answer.begin()                      # It passes over a 100.
        answers.append((answer.status, answer.read()))
    return answers


class TestLoad(Case):
    """Many clients, and hostile ones, at once."""

    PAIRS, CLIENTS = 200000, 64

    def test_many_clients_with_retries(self):
        """Pairs of start and end from 64 keep-alive connections, pipelined.

        Any of them may come twice, as after a time-out.
        """
        # All ends: a retry may be late here.
        sidecar = self.sidecar(constants={"REMEMBERED": self.PAIRS})
        pairs = int(self.PAIRS * SCALE) // self.CLIENTS

        def client(number):
            choice = random.Random(number)
            with sidecar.raw(b"") as connection:
                for first in range(0, pairs, 50):
                    requests = []
                    for turn in range(first, min(first + 50, pairs)):
                        for call in (b"start", b"end"):
                            request = b"POST /%s-request?id=%d-%d HTTP/1.1\r\nHost: a\r\n\r\n"
                            requests += [request % (call, number, turn)] * choice.choice(
                                (1, 1, 1, 2, 3))
                    self.all_is_well(connection, requests)

        in_threads(self.CLIENTS, client)
        self.assertEqual(sidecar.active(), 0)
        self.assertEqual(sidecar.get("/metrics")[1]["total_requests"], pairs * self.CLIENTS)
        self.assertEqual(sidecar.sample("sidecar_request_duration_seconds_count"),
                         pairs * self.CLIENTS)
        self.assertEqual(sidecar.sample("sidecar_unmatched_ends_total"), 0)

    def all_is_well(self, connection, requests):
        """Send all of the requests at once; check that the answer to each is 200."""
        connection.sendall(b"".join(requests))
        received = b""
        while received.count(b"HTTP/1.1 ") < len(requests):
            piece = connection.recv(1 << 18)
            self.assertTrue(piece, received[-300:])
            received += piece
        self.assertEqual(received.count(b"HTTP/1.1 200 OK\r\n"), len(requests))

    def test_threads_on_the_tracker(self):
        """The same without HTTP, so that the threads meet in the tracker far more often.

        A third of the requests has no id.
        """
        self.addCleanup(setattr, sidecar_module, "REMEMBERED", sidecar_module.REMEMBERED)
        sidecar_module.REMEMBERED = self.PAIRS
        self.addCleanup(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(1e-5)
        tracker = sidecar_module.RequestTracker()
        pairs = int(self.PAIRS * SCALE) // self.CLIENTS

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
        self.assertEqual((snapshot["active_requests"], snapshot["total_requests"],
                          sum(snapshot["durations"][0]), snapshot["unmatched_ends"]),
                         (0, pairs * self.CLIENTS, pairs * self.CLIENTS, 0))


class TestFuzz(Case):
    """Mutated requests: no traceback, no hang, no lost count, no growth.

    Every answer is one that http.client reads.
    """

    REQUESTS = 100000
    SEEDS = [
        b"POST /start-request?id=%(id)s HTTP/1.1\r\nHost: localhost:8081\r\nUser-Agent: "
        b"fuzz\r\n\r\n",
        b"POST /start-request HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
        b"POST /start-request?id=%(id)s&x=1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: "
        b"chunked\r\n\r\n5;a=b\r\nhello\r\n1\r\n!\r\n0\r\nT: x\r\n\r\n",
        b"POST /end-request?duration=1m2.5s HTTP/1.1\r\nHost: a\r\nAccept: */*\r\nConnection: "
        b"keep-alive\r\n\r\n",
        b"POST /end-request?id=%(id)s&duration=150%%C2%%B5s HTTP/1.0\r\nContent-Type: "
        b"application/json\r\nContent-Length: 2\r\n\r\n{}",
        b"POST /end-request?id=%(id)s&duration=5.1e-05s HTTP/1.1\r\nHost: a\r\nExpect: "
        b"100-continue\r\nContent-Length: 2\r\n\r\n{}",
        b"GET /metrics HTTP/1.1\r\nHost: a\r\nAccept: "
        b"application/openmetrics-text;version=1.0.0\r\nAccept-Encoding: gzip\r\n\r\n",
        b"GET /requests HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET http://localhost:8081/ready?x=%%00 HTTP/1.1\r\nHost: a\r\nOrigin: http://[::1]:8081\r\n\r\n",
        b"POST /reset HTTP/1.1\r\nHost: a\r\n\r\n",
    ]
    TOKENS = [b"\r\n", b"\n", b"\r", b"\x00", b" ", b":", b"%", b"%ff", b"?", b"&", b"=", b";",
              b"#", b"\xff\xfe", b"\xc2\xb5", b"-1", b"0", b"99999999999999999999", b"0x10",
              b"GET ", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/9.9", b"Content-Length: 3\r\n",
              b"Content-Length: 70000\r\n", b"Transfer-Encoding: chunked\r\n",
              b"Transfer-Encoding: identity\r\n", b"Expect: 100-continue\r\n",
              b"Connection: close\r\n", b" folded\r\n", b"x" * 9000, b"A: b\r\n" * 3000, b"\t",
              b"[", b"duration=", b"nan", b"\x1b[2J", b"\x85"]

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
                data[at:at + choice.choice((0, 0, 1, 5))] = choice.choice(
                    self.TOKENS[:-1] if kind == 5 else self.TOKENS[:20])
        return bytes(data)

    def check(self, answers):
        """Take note of the answers of one connection: all well-formed, each error in JSON."""
        for status, body in answers:
            self.statuses[status] = self.statuses.get(status, 0) + 1
            if status == 200 and b'"request_id": "' in body and body[:1] == b"{":
                self.started.append(json.loads(body.decode())["request_id"])
            self.assertNotEqual(status, 500, body)
            if status >= 400 and body:
                self.assertIn("error", json.loads(body.decode()))

    def exchange(self, sidecar, pieces_of):
        """Send each list of pieces over a connection of its own; check the answers.

        The connections take turns, piece by piece.
        """
        connections = [sidecar.raw(b"") for _ in pieces_of]
        for connection in connections:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for pieces in itertools.zip_longest(*pieces_of):
            for connection, piece in zip(connections, pieces):
                if piece:
                    try:
                        connection.sendall(piece)
                    except OSError:  # Answered and closed already: an error was in the first piece.
                        pass
        answers = []
        for connection in connections:
            try:
                connection.shutdown(socket.SHUT_WR)
            except OSError:                                 # Closed already.
                pass
            answers.append(read_answers(connection))
            self.check(answers[-1])
            connection.close()
        return answers

    def setUp(self):
        self.statuses, self.started = {}, []

    def settled(self, sidecar):
        """Return its memory, once nothing of a connection is left.

        That is no socket, and no thread but the spare ones.
        """
        def alone():
            memory, threads, sockets = figures(sidecar.process.pid)
            spare = threads <= 4 + 2 * sidecar_module.SPARE_THREADS
            return memory if spare and sockets == 2 else None
        return until(alone, "an end of all connections")

    def test_mutated_requests(self):
        sidecar = self.sidecar()
        total, number, before = int(self.REQUESTS * SCALE), 0, None
        choice = random.Random(8)
        while number < total:
            batch = []
            for _ in range(32):             # Each connection: three requests, in up to four pieces.
                data = b"".join(self.mutated(choice, number + turn) for turn in range(3))
                number += 3
                cuts = sorted(choice.randrange(len(data) + 1) for _ in range(choice.randrange(4)))
                batch.append(
                    [data[start:end] for start, end in zip([0] + cuts, cuts + [len(data)])])
            self.exchange(sidecar, batch)
            if before is None and number > total // 4:
                sidecar.post("/reset")
                before = self.settled(sidecar)
        sidecar.post("/reset")
        if sys.implementation.name == "cpython":    # others collect when they like
            self.assertLess(self.settled(sidecar) - before, 8 << 20)
        self.counts_agree(sidecar)
        self.assertGreater(self.statuses.get(200, 0), total // 10, self.statuses)
        self.assertGreater(self.statuses.get(400, 0), total // 20, self.statuses)

    def counts_agree(self, sidecar):
        self.assertEqual(sidecar.active(), 0)
        self.assertEqual(sidecar.get("/health")[0], 200)
        metrics = sidecar.get("/metrics")[1]
        # An id may have come twice.
        self.assertLessEqual(len(set(self.started)), metrics["total_requests"])
        self.assertLessEqual(metrics["total_requests"], len(self.started))
        ended = sidecar.sample("sidecar_request_duration_seconds_count")
        # Late ends are in both.
        self.assertLessEqual(metrics["total_requests"] - metrics["expired_requests"], ended)
        sidecar.post("/start-request")
        self.assertEqual(sidecar.post("/end-request")[1]["active_requests"], 0)
        for line in sidecar.lines:
            self.assertRegex(line, "^[-0-9]{10}T[:0-9]{8}Z (INFO (listening|signal)|"
                                   "WARNING (request given up|call refused)) ")

    def test_pieces_cut_at_every_byte(self):
        sidecar = self.sidecar()
        for number, seed in enumerate(self.SEEDS):
            data = seed % {b"id": b"cut-%d" % number}
            cuts = range(1, len(data), 1 if SCALE >= 1 else 3)
            for answers in self.exchange(sidecar, [[data[:cut], data[cut:]] for cut in cuts]):
                self.assertEqual(len(answers), 1, seed)
                self.assertIn(answers[0][0], (200, 409), seed)
        self.assertEqual([list(sidecar.post("/reset")[1]), sidecar.active()], [["given_up"], 0])


if __name__ == "__main__":
    unittest.main(verbosity=2)
