"""What needs namespaces of the test's own, and so root on Linux: being PID 1, and a caller from
elsewhere."""
import os
import shutil
import signal
import sys
import unittest

from support import (ENDPOINTS, HERE, NAMESPACES, SCALE, WORKER, Case, SidecarProcess, child_of,
                     needs)


class TestPid1(Case):
    """As PID 1 of a namespace: by itself, and with a worker as its child."""

    @needs("a right to make namespaces (root, unshare, ip)", NAMESPACES)
    def test_it_works_as_pid_1(self):
        sidecar = self.program("unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c",
                               "import os, sys; sys.path.insert(0, %r); import sidecar; "
                               "print('pid', os.getpid(), flush=True); "
                               "sidecar.main([])" % HERE,
                               env={"SIDECAR_PORT": 0, "METRICS_PORT": 0})
        self.assertEqual(sidecar.wait_for(r"pid (\d+)").group(1), "1")
        sidecar.wait_for("listening")
        children = "/proc/%d/task/%d/children" % (sidecar.process.pid, sidecar.process.pid)
        with open(children) as file:
            os.kill(int(file.read().split()[0]), signal.SIGTERM)
        self.assertEqual(sidecar.wait(), 0)
        sidecar.wait_for("drain completed")

    def under(self, init, *command):
        """Return a process that runs `command` under `init`, which is PID 1 of a namespace."""
        return self.program("unshare", "--pid", "--fork", "--kill-child", "--mount-proc",
                            *(tuple(init) + command),
                            env={"SIDECAR_HOST": "127.0.0.1", "SIDECAR_PORT": 0, "METRICS_PORT": 0})

    INITS = {"sidecar": (sys.executable, os.path.join(HERE, "sidecar.py"), "run", "--"),
             "tini": ("tini", "--"), "dumb-init": ("dumb-init", "--")}
    LEAVE_ORPHANS = r"""
import os, sys, time
for _ in range(int(sys.argv[1])):
    if os.fork() == 0:
        if os.fork():
            os._exit(0)             # The grandchild is an orphan now, of PID 1.
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
        scripts = ("exit 0", "exit 1", "exit 7", "exit 255", "kill -9 $$", "kill -15 $$",
                   "kill -1 $$", "kill -11 $$", "sleep 9 & exit 5")
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
        self.assertEqual(self.statuses(self.INITS["sidecar"]),
                         [0, 1, 7, 255, 137, 143, 129, 139, 5])
        got, status = self.signals(self.INITS["sidecar"])
        self.assertEqual((len(got), status), (8, 3))

    @needs("a right to make namespaces (root, unshare, ip)", NAMESPACES)
    def test_a_fork_bombs_leftovers(self):
        self.reaps(self.INITS["sidecar"], orphans=max(int(5000 * SCALE), 100))

    @needs("tini and dumb-init in namespaces",
           NAMESPACES and shutil.which("tini") and shutil.which("dumb-init"))
    def test_beside_tini_and_dumb_init(self):
        ours = self.INITS["sidecar"]
        for name in ("tini", "dumb-init"):
            theirs = self.INITS[name]
            self.reaps(theirs)
            self.assertEqual(self.statuses(theirs), self.statuses(ours), name)
            self.assertEqual(self.signals(theirs), self.signals(ours), name)
        for command in ("no-such-command", "/", os.path.join(HERE, "test_sidecar.py")):
            self.assertEqual(self.under(self.INITS["tini"], command).wait(),
                             self.under(ours, command).wait(), command)


class TestOtherHost(Case):
    """A caller that is not on loopback."""

    @needs("a right to make namespaces (root, unshare, ip)", NAMESPACES)
    def test_others_may_look_but_not_change_anything(self):
        inside = self.program("unshare", "--net", "sh", "-c",
                              "ip link set lo up && ip address add 192.0.2.10 dev lo && "
                              "ip address add 192.0.2.11 dev lo && "
                              "exec \"$@\"", "sh", sys.executable, "-c",
                              "import test_namespaces; test_namespaces.call_as_another()",
                              cwd=os.path.dirname(os.path.abspath(__file__)))
        self.assertEqual(inside.wait(), 0, inside.log)
        self.assertEqual(inside.log, "as expected")


def call_as_another():
    """In a network namespace where this host has two addresses, call a sidecar at the first one.

    Who calls from that same address is on the same machine.
    """
    for caller, clients, trusted in (
            ("192.0.2.11", "", False), ("192.0.2.11", "192.0.2.11/32", True),
            ("192.0.2.11", "198.51.100.0/24, 192.0.2.11", True),
            ("192.0.2.11", "198.51.100.1", False), ("192.0.2.10", "", True)):
        sidecar = SidecarProcess(SIDECAR_HOST=None, TRUSTED_CLIENTS=clients)
        sidecar.host, sidecar.source = "192.0.2.10", (caller, 0)
        try:
            for path, (_, star) in ENDPOINTS.items():
                status, answer = sidecar.call("POST" if star else "GET", path)
                refused = star and not trusted
                assert (status == 403) == refused, (caller, clients, path, status, answer)
                assert not refused or "TRUSTED_CLIENTS" in answer["error"], answer
            assert "sidecar_info" in sidecar.prometheus()
            log = sidecar.whole_log()
            assert log.count("call refused") == (not trusted), log
        finally:
            sidecar.kill()
    print("as expected")


if __name__ == "__main__":
    unittest.main(verbosity=2)
