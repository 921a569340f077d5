"""What the test files in this folder share.

A new file is `.ci/tests/test_NAME.py`, for one peer or subject. It begins with `from support import
...`, ends with `unittest.main(verbosity=2)` under `if __name__ == "__main__":`, and runs by itself:
`python .ci/tests/test_NAME.py [TestClass[.test_method]]`. .ci/run finds it by its name. It runs it
on every Python with SIDECAR_TEST_PEERS=none, where what `needs` a peer is skipped, and once with
every peer, where a test that is skipped has failed.

From test_sidecar.py, which must also run alone:
    HERE               the project's folder
    PATIENCE           how long a wait for an event may take, in seconds
    Case               a TestCase; self.sidecar() and self.program() start what ends with the test
    SidecarProcess     a running sidecar: get, post, call, raw, answers, sample, wait_for, signal
    Program            any other process: its lines, wait_for, signal, wait
    ENDPOINTS          those that the docstring of sidecar.py has
    until, in_threads  wait for a condition; run a function in threads
    FakeTime           a clock that the test moves
    ScriptedSidecar, Clients, WORKER       a stand-in, what each README client must do, a worker
    child_of, samples  a child's pid, a scrape as a dict
    host_of_its_own    an address of loopback for a test that takes a port again; free_ports
    text_of, readme_blocks     the text of a file of the project, README's code
Here:
    needs              decorates a test or class that needs a peer
    NAMESPACES         whether a test may make namespaces
    installed, version_of, run             a package, a command's version, a command's output
    CACHE, SCALE       where .ci/run installs peers; how much of a long test to run, up to 1
    FILL               a program that takes what processes a user has left
    figures            memory, threads and sockets of a process
Kafka's brokers are in test_kafka.py: KafkaCase, KafkaNode, Replies. What kustomize builds of the
manifests is in test_manifests.py: kustomize, pick, containers, environment.
"""
import importlib.util
import os
import re
import subprocess
import sys
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from test_sidecar import (ENDPOINTS, HERE, OPENMETRICS, PATIENCE, WORKER, Case, Clients, FakeTime,
                          Program, ScriptedSidecar, SidecarProcess, child_of, free_ports,
                          host_of_its_own, in_threads, readme_blocks, samples, text_of, until)

CACHE = os.path.join(HERE, ".ci", "cache")      # Git ignores it.
# With "none" what needs a peer is skipped; with "all" it fails instead of being skipped.
PEERS = os.environ.get("SIDECAR_TEST_PEERS", "")
# How much of the long tests is run: 1 is the number that stands in them, as in .ci/run's last run.
SCALE = float(os.environ.get("SIDECAR_TEST_SCALE", "0.1"))


# A program that takes what processes a user has left, until its standard input is closed.
FILL = """
import os, signal, sys
children = []
try:
    while True:
        children.append(os.fork())
        if children[-1] == 0:
            signal.pause()
except BlockingIOError:
    print("full", flush=True)
sys.stdin.read()
for child in children:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def needs(peer, found):
    """Decorate a test or class that needs a peer: skip it where `found` is false.

    With SIDECAR_TEST_PEERS=all it fails there.
    """
    if PEERS == "all" and not found:
        def missing(*args):
            raise AssertionError("%s is not installed, and SIDECAR_TEST_PEERS=all" % peer)
        return lambda thing: type(thing.__name__, (unittest.TestCase,), {"test_peer": missing}) \
            if isinstance(thing, type) else missing
    return unittest.skipUnless(found and PEERS != "none", "%s is not installed" % peer)


def namespaces():
    """Return true where a test may make namespaces: root on Linux, but not in every container."""
    try:
        return subprocess.call(
            ["unshare", "--net", "--pid", "--fork", "ip", "link", "set", "lo", "up"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0
    except OSError:
        return False


NAMESPACES = namespaces()


def version_of(command):
    """Return the first two numbers of the version that `command` prints, or (0, 0)."""
    try:
        text = subprocess.run(command, stdout=subprocess.PIPE).stdout.decode()
    except OSError:
        return 0, 0
    return tuple(int(number) for number in re.search(r"(\d+)\.(\d+)", text).groups())


def installed(name):
    return importlib.util.find_spec(name) is not None


def run(*argv, **options):
    """Run a command to its end and return what it printed.

    AssertionError: it failed; both of its outputs are told.
    """
    options = dict(dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE),
                   **options)
    done = subprocess.run([str(arg) for arg in argv], **options)
    if done.returncode:
        raise AssertionError("%s: exit status %d\n%s%s"
                             % (" ".join(map(str, argv)), done.returncode, done.stdout.decode(),
                                done.stderr.decode()))
    return done.stdout.decode()


def figures(pid):
    """Return (resident bytes, threads, sockets) of a process."""
    with open("/proc/%d/status" % pid) as file:
        status = file.read()
    sockets = 0
    for number in os.listdir("/proc/%d/fd" % pid):
        try:
            sockets += os.readlink("/proc/%d/fd/%s" % (pid, number)).startswith("socket:")
        except OSError:                     # Closed meanwhile.
            pass

    def field(name):
        return int(status.partition("\n%s:" % name)[2].split()[0])
    return field("VmRSS") * 1024, field("Threads"), sockets
