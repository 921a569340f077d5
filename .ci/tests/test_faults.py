"""What goes wrong around the sidecar: descriptors, the disk, the clock, a stopped process."""
import fcntl
import http.client
import os
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.parse

from support import (FILL, HERE, NAMESPACES, PATIENCE, WORKER, Case, SidecarProcess, figures,
                     free_ports, host_of_its_own, needs, until)


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

    def silent(self, redirection="", options=(), **env):
        """Return a sidecar whose log cannot be read."""
        host = host_of_its_own()
        ports = free_ports(host, 2)
        settings = dict(env, SIDECAR_HOST=host, SIDECAR_PORT=ports[0], METRICS_PORT=ports[1])
        program = self.program("sh", "-c", 'exec "$@" ' + redirection, "sh", sys.executable,
                               os.path.join(HERE, "sidecar.py"), env=settings, **dict(options))
        return SidecarProcess.of(program, *ports, host=host)

    PYTHON = "/usr/bin/python3"         # one that every user may run
    def limited(self, *argv, most):
        """Return a program of a user that nobody else is, who may have so many threads in all."""
        user = 40000 + os.getpid()

        def become():
            resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
            os.setgid(user)
            os.setuid(user)
        return self.program(
            self.PYTHON, *argv, preexec_fn=become, cwd="/", stdin=subprocess.PIPE,
            env={"SIDECAR_HOST": "127.0.0.1", "SIDECAR_PORT": 0, "METRICS_PORT": 0})

    @needs("root, whose children may become another user", NAMESPACES)
    def test_a_signal_at_the_process_limit(self):
        """No thread can be started any more; a drain needs none."""
        for argv, status in (((), 0), (("run", "--", self.PYTHON, "-c", WORKER), 3)):
            program = self.limited(os.path.join(HERE, "sidecar.py"), *argv, most=30)
            where = program.wait_for(r"listening api=http://(\S+):(\d+)")
            with socket.create_connection((where.group(1), int(where.group(2))),
                                          timeout=PATIENCE) as connection:
                connection.sendall(b"POST /start-request HTTP/1.1\r\nHost: x\r\n\r\n")
                self.assertIn(b" 200 ", connection.recv(65536))
                filler = self.limited("-c", FILL, most=30)
                filler.wait_for("full")
                program.signal(signal.SIGTERM)
                program.wait_for("drain started active_requests=1")
                connection.sendall(b"POST /end-request HTTP/1.1\r\nHost: x\r\n\r\n")
                program.wait_for("drain completed")
            self.assertEqual(program.wait(), status, program.log)
            self.assertNotIn("Traceback", program.log)
            filler.process.stdin.close()
            self.assertEqual(filler.wait(), 0)

    @needs("root, whose children may become another user", NAMESPACES)
    def test_run_starts_no_worker_that_it_could_not_accompany(self):
        program = self.limited(os.path.join(HERE, "sidecar.py"), "run", "--", self.PYTHON, "-c",
                               WORKER, most=1)
        self.assertEqual(program.wait(), 1)
        self.assertRegex(program.log, r"\Asidecar: no thread can be started: [^\n]*\Z")

    def test_no_descriptors_left(self):
        sidecar = self.sidecar(launcher=("sh", "-c", 'ulimit -n 64; exec "$@"', "sh"))
        with sidecar.raw(b"POST /start-request?id=a HTTP/1.1\r\nHost: a\r\n\r\n") as worker:
            self.assertTrue(worker.recv(65536).startswith(b"HTTP/1.1 200 "))
            held = [sidecar.raw(b"") for _ in range(100)]
            sidecar.wait_for("ERROR no connection accepted")
            # Who is connected is served.
            worker.sendall(b"POST /end-request?id=a HTTP/1.1\r\nHost: a\r\n\r\n")
            self.assertTrue(worker.recv(65536).startswith(b"HTTP/1.1 200 "))
            for connection in held:
                connection.close()
            self.serves(sidecar)                        # And so are all, once there are some again.
            self.drains(sidecar)
            self.assertEqual(sidecar.log.count("no connection accepted"), 1)

    def test_a_connection_that_is_reset_before_it_is_accepted(self):
        sidecar = self.sidecar()
        held = [sidecar.raw(b"") for _ in range(512)]
        self.addCleanup(lambda: [connection.close() for connection in held])
        until(lambda: figures(sidecar.process.pid)[1] >= 512)
        sidecar.signal(signal.SIGSTOP)
        reset = sidecar.raw(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        reset.close()
        # Accepted in their order: so the other one has been looked at.
        with sidecar.raw(b"") as behind:
            sidecar.signal(signal.SIGCONT)
            behind.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            self.assertTrue(behind.recv(65536).startswith(b"HTTP/1.1 200 "))
        while held:
            held.pop().close()
        until(lambda: figures(sidecar.process.pid)[1] < 512)
        self.serves(sidecar)
        self.assertNotIn("failed", sidecar.whole_log())

    def test_a_body_that_never_comes(self):
        sidecar = self.sidecar(constants={"REQUEST_SECONDS": 0.3})       # And IDLE_SECONDS stay 60.
        for fields in (b"Content-Length: 5\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n",
                       b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n"):
            self.assertEqual([status for status, _, _ in sidecar.answers(
                b"POST /start-request HTTP/1.1\r\nHost: a\r\n" + fields)], [408])
        self.assertEqual(sidecar.active(), 0)

    def test_stderr_is_closed(self):
        for redirection in ("2>&-", "<&- 2>&-", "<&- >&- 2>&-"):
            sidecar = self.silent(redirection, LOG_LEVEL="DEBUG")
            answers = sidecar.answers(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n" * 3
                                      + b"GET /health HTTP/1.0\r\n\r\n")
            self.assertEqual([(status, body) for status, _, body in answers],
                             [(200, '{"status": "ok"}\n')] * 4)
            self.serves(sidecar)
            self.drains(sidecar)
        bad = subprocess.run(
            ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, os.path.join(HERE, "sidecar.py")],
            env=dict(os.environ, SIDECAR_PORT="x"), timeout=PATIENCE)
        self.assertEqual(bad.returncode, 2)

    def test_the_disk_is_full(self):
        sidecar = self.silent("2>/dev/full", LOG_LEVEL="DEBUG")
        self.serves(sidecar)
        self.drains(sidecar)

    def full_pipe(self):
        """Return (reader, writer) of a pipe that is full."""
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)
        fcntl.fcntl(writer, 1031, 4096)                     # F_SETPIPE_SZ
        os.set_blocking(writer, False)
        try:
            while True:
                os.write(writer, b"x")
        except BlockingIOError:
            os.set_blocking(writer, True)
        return reader, writer

    def test_nobody_reads_the_log(self):
        """A pipe that is full: nothing that the sidecar does may wait for it."""
        reader, writer = self.full_pipe()
        sidecar = self.silent(options={"stdout": subprocess.DEVNULL, "stderr": writer},
                              LOG_LEVEL="DEBUG")
        os.close(writer)
        for number in range(300):
            sidecar.post("/start-request?id=%d" % number)
            if number % 50 == 0:
                os.read(reader, 4096)       # So that some lines go out, and the pipe is full again.
        self.assertEqual(sidecar.active(), 300)
        self.assertEqual(sidecar.post("/reset"), (200, {"given_up": 300}))
        sidecar.signal(signal.SIGTERM)
        self.assertEqual(sidecar.process.wait(PATIENCE), 0)

    def test_a_wait_whose_time_out_never_comes(self):
        """So it is where Condition.wait follows the wall clock, and that is set back by a day."""
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        with open(os.path.join(folder, "sitecustomize.py"), "w") as file:
            file.write("import threading; real = threading.Condition.wait; "
                       "threading.Condition.wait = lambda self, timeout=None: real(self)")
        for caller in ("SIGTERM", "GET /drain"):
            sidecar = self.sidecar(PYTHONPATH=folder, GRACE_PERIOD_SECONDS=0.5)
            sidecar.post("/start-request?id=a")
            if caller == "SIGTERM":
                sidecar.signal(signal.SIGTERM)
                self.assertEqual(sidecar.wait(), 1)
            else:
                self.assertEqual(sidecar.get("/drain")[0], 503)
            sidecar.wait_for("drain timed out")

    def test_the_wall_clock_jumps_back_by_a_day(self):
        """Of each time that is waited for or told as an age, none is of the wall clock."""
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        flag = os.path.join(folder, "jumped")
        with open(os.path.join(folder, "sitecustomize.py"), "w") as file:
            file.write("import os, time; real = time.time; "
                       "time.time = lambda: real() - 86400 * os.path.exists(%r)" % flag)
        sidecar = self.sidecar(PYTHONPATH=folder, GRACE_PERIOD_SECONDS=0.5)
        sidecar.post("/start-request?id=a")
        sidecar.post("/start-request?id=b")
        newest = sidecar.get("/metrics")[1]["last_request_time"]
        open(flag, "w").close()
        sidecar.post("/start-request?id=c")
        self.assertLess(sidecar.get("/metrics")[1]["last_request_time"], newest)    # It has jumped.
        sidecar.post("/end-request?id=a")
        self.assertLess(0, sidecar.sample("sidecar_request_duration_seconds_sum"))
        self.assertLess(sidecar.sample("sidecar_request_duration_seconds_sum"), 2 * PATIENCE)
        for entry in sidecar.get("/requests")[1]:
            self.assertGreaterEqual(entry["age_seconds"], 0)
        began = time.monotonic()
        sidecar.signal(signal.SIGTERM)
        self.assertEqual(sidecar.wait(), 1)                 # The grace period was over.
        self.assertGreaterEqual(time.monotonic() - began, 0.5)
        sidecar.wait_for(r"drain timed out active_requests=2 .*elapsed_seconds=[0-9]+\.[0-9]")

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
                late = sidecar.raw(b"POST /start-request?id=b&hold=false HTTP/1.0\r\n\r\n")
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
        time.sleep(0.6)                                 # It is the time that passes that is tested.
        sidecar.signal(signal.SIGCONT)
        self.assertEqual(sidecar.wait(), 1)
        sidecar.wait_for("still active request_id=a")

    @needs("a right to make namespaces (root, unshare, ip)", NAMESPACES)
    def test_without_proc(self):
        sidecar = self.sidecar(launcher=("unshare", "--mount", "sh", "-c",
                                         'mount -t tmpfs none /proc && exec "$@"', "sh"))
        self.serves(sidecar)
        self.assertNotIn("process_", sidecar.prometheus())
        self.drains(sidecar)

    @needs("a right to make namespaces (root, unshare, ip)", NAMESPACES)
    def test_a_read_only_file_system_no_home_and_an_unknown_user(self):
        launcher = ("unshare", "--mount", "sh", "-c",
                    'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && '
                    'exec unshare --user --map-user=12345 "$@"', HERE)
        sidecar = self.sidecar("run", "--", "sh", "-c",
                               'id -u; touch "$0" || echo read-only; exec sleep 600',
                               HERE + "/touched", HOME=None, USER=None, launcher=launcher)
        sidecar.wait_for("^12345$")
        sidecar.wait_for("^read-only$")
        self.serves(sidecar)
        sidecar.signal(signal.SIGTERM)
        sidecar.process.wait(PATIENCE)
        self.assertEqual(sidecar.process.returncode, 128 + signal.SIGTERM)

    @needs("a right to make namespaces (root, unshare, ip)", NAMESPACES)
    def test_hosts_with_ipv6_only_and_with_ipv4_only(self):
        for setup, url in (("ip link set lo up && ip -4 address flush dev lo", "http://[::1]:%d"),
                           ("echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6 && ip link set lo up",
                            "http://127.0.0.1:%d")):
            sidecar = self.sidecar(SIDECAR_HOST=None, launcher=("unshare", "--net", "sh", "-c",
                                                                setup + ' && exec "$@"', "sh"))
            enter = ("nsenter", "--net", "--target", str(sidecar.process.pid))
            ask = self.program(*enter, sys.executable, "-c",
                               "import sys, test_faults; test_faults.call_there(sys.argv[1])",
                               url % sidecar.port, cwd=os.path.dirname(os.path.abspath(__file__)))
            self.assertEqual(ask.wait(), 0, ask.log)
            health = self.program(*enter, sys.executable, os.path.join(HERE, "sidecar.py"),
                                  "health", env={"SIDECAR_URL": url % sidecar.port})
            self.assertEqual(health.wait(), 0, health.log)
            self.drains(sidecar)


def call_there(url):
    """In another network namespace: call the sidecar there."""
    target = urllib.parse.urlsplit(url)
    for path, expected in (("/start-request?id=a", 200), ("/end-request?id=a", 200),
                           ("/reset", 200), ("/drain", 200)):
        connection = http.client.HTTPConnection(target.hostname, target.port, timeout=PATIENCE)
        connection.request("POST", path)
        assert connection.getresponse().status == expected, path
        connection.close()


if __name__ == "__main__":
    unittest.main(verbosity=2)
