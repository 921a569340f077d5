"""Every test of the project: `python test_sidecar.py`, or a part: `python test_sidecar.py TestDrain`.

Each test starts the real program as a process and speaks to it over real sockets and real signals; ports are free ones
that the kernel picks. A test that needs a peer (Go, Node, a broker, Prometheus, ...) is skipped where that is missing.
SIDECAR_TEST_PEERS=none skips them all, SIDECAR_TEST_PEERS=all fails instead of skipping.
"""
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest

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
            if stream:
                stream.close()


class SidecarProcess(Program):
    """A running sidecar.py on free ports of loopback. Any other keyword is a variable of its environment."""

    def __init__(self, *argv, **env):
        settings = dict(SIDECAR_HOST="127.0.0.1", SIDECAR_PORT=0, METRICS_PORT=0, SIDECAR_URL=None)
        settings.update(env)
        super().__init__(sys.executable, os.path.join(HERE, "sidecar.py"), *argv, env=settings)
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
            return answer.status, json.loads(text) if "json" in answer.getheader("Content-Type", "") else text
        finally:
            connection.close()

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


if __name__ == "__main__":
    unittest.main(verbosity=2)
