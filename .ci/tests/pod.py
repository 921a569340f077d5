"""A stand-in for the kubelet and its runtime: pods with real processes, in namespaces of their own.

What a pod is and does is read from the built manifest. As in a real one a container's first process
is PID 1 of a PID namespace of its own, where SIGTERM without a handler does nothing; or, with
shareProcessNamespace, an ordinary process of the pod's one, whose PID 1 is `pause`. Signals come
from outside of it. All containers share the loopback, so that the manifest's ports are the real
ones. Needs root, and util-linux.
"""
import ctypes
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

from support import HERE, PATIENCE, in_threads, until
from test_manifests import environment, pick

# The first process of a pod, as the runtime's own: it reaps what is orphaned. Here it also sets up
# the loopback, and ends when the test does, however that ends: with it the kernel kills every
# process of its PID namespace, and of those within.
PAUSE = """
import signal, subprocess, sys
subprocess.check_call(["ip", "link", "set", "lo", "up"])
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
with open("/proc/self/comm", "w") as name:
    name.write("pause")
print("paused", flush=True)
sys.stdin.read()
"""
OWN_PROCESSES = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
LAUNCHERS = ("nsenter", "unshare", "setpriv")
LIBC = ctypes.CDLL(None, use_errno=True)


def command_of(launcher):
    """Return the PID of the command that launchers forked, or None where it is not there yet."""
    pid, name = launcher, None
    try:
        while name is None or name in LAUNCHERS:
            with open("/proc/%d/task/%d/children" % (pid, pid)) as children:
                pid = int(children.read().split()[0])
            with open("/proc/%d/comm" % pid) as comm:
                name = comm.read().strip()
        return pid
    except (OSError, IndexError):
        return None


def in_network_of(pid, function):
    """Return what function() returns in the network namespace of a process. A socket that is made
    there stays there."""
    def enter(_):
        with open("/proc/%d/ns/net" % pid) as namespace:
            if LIBC.setns(namespace.fileno(), 0):
                raise OSError(ctypes.get_errno(), "setns")
        return function()
    return in_threads(1, enter)[0]      # setns(2) is for the one thread, which ends with it


def kill_session(leader):
    """Kill every process of a session."""
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open("/proc/%s/stat" % entry) as stat:
                session = int(stat.read().rpartition(")")[2].split()[3])    # proc(5), field 6
            if session == leader:
                os.kill(int(entry), signal.SIGKILL)
        except OSError:                 # it has just ended
            pass


class Container:
    """A container: its first process, and what that started."""

    def __init__(self, case, launcher, command, env, **options):
        """launcher: puts the command into its namespaces. options: for Popen."""
        self.killed = False
        self.program = case.program(*launcher, *command, env=env, start_new_session=True, **options)
        launcher = self.program.process.pid
        until(lambda: command_of(launcher) or self.program.process.poll() is not None)
        self.pid = command_of(launcher)         # None: it has ended already

    def signal(self, number):
        """Send a signal to the first process, from outside of its PID namespace."""
        if self.pid and self.program.process.poll() is None:
            os.kill(self.pid, number)

    def ends(self, timeout):
        """Wait for the end of the first process; return whether it came. The runtime then kills
        what is left of the container."""
        try:
            self.program.process.wait(max(timeout, 0))
        except subprocess.TimeoutExpired:
            return False
        kill_session(self.program.process.pid)
        self.program.wait()
        return True

    def kill(self):
        if self.program.process.poll() is None:
            self.killed = True
            self.signal(signal.SIGKILL)
        self.ends(PATIENCE)

    @property
    def status(self):
        """The exit status of the first process, or minus the signal that ended it. None: it runs.
        (The launcher's is another one after SIGKILL.)"""
        status = self.program.process.poll()
        return -signal.SIGKILL if self.killed and status is not None else status


class Pod:
    """A pod. python3 and /app, of which the manifest speaks, are this Python and this folder."""

    def __init__(self, case, objects, worker=None, users=None, **env):
        """objects: from kustomize(). worker: a command in place of the bot's. users: {container:
        user id}; then python3 is Debian's, since the tests' own may be root's alone. env: more
        variables for the worker."""
        self.case, self.objects, self.worker, self.env = case, objects, worker, env
        self.users = users or {}
        self.spec = pick(objects, "Deployment")["spec"]["template"]["spec"]
        self.containers, self.gone_after = {}, None
        self.events, self.times = [], {}        # what happened; when that was, for the last time
        self.folder = tempfile.mkdtemp()
        os.chmod(self.folder, 0o777)
        case.addCleanup(shutil.rmtree, self.folder)
        self.python, self.app = sys.executable, HERE
        if users:
            self.python, self.app = "/usr/bin/python3", os.path.join(self.folder, "app")
            os.mkdir(self.app)
            shutil.copy(os.path.join(HERE, "sidecar.py"), self.app)
        self.pause = Container(case, OWN_PROCESSES + ("--net",), [sys.executable, "-c", PAUSE], {},
                               stdin=subprocess.PIPE)
        case.addCleanup(self.pause.kill)
        self.pause.program.wait_for("paused")

    def start(self, ready=True):
        """Start the containers in the kubelet's order; return self, with `ready` when each
        readiness probe has passed."""
        for container in self.spec.get("initContainers", []):
            self.case.assertEqual(container.get("restartPolicy"), "Always",
                                  "nothing else would start before its end")
            self._start(container)
            if "startupProbe" in container:     # only when it has passed the next one starts
                until(lambda: self.probe(container["startupProbe"]) == 200)
        for container in self.spec["containers"]:
            self._start(container)
        for container in self._all():
            if ready and "readinessProbe" in container:
                until(lambda: self.probe(container["readinessProbe"]) == 200)
        return self

    def delete(self):
        """Delete the pod as the kubelet does, and return {container: exit status}.

        The preStop hooks of all containers run at once, and each container gets SIGTERM after its
        own; but a native sidecar (an init container) only when the ordinary ones are gone, and the
        sidecars that are listed after it. terminationGracePeriodSeconds counts all of it; when it
        is over, what still runs gets SIGTERM and two seconds, and then SIGKILL. (killContainer in
        the kubelet's kuberuntime_container.go)
        """
        began = time.monotonic()
        over_at = began + self.spec["terminationGracePeriodSeconds"]
        stopping = [threading.Thread(target=self._stop, args=(container, over_at))
                    for container in self.spec["containers"]]
        for container in reversed(self.spec.get("initContainers", [])):
            stopping.append(threading.Thread(target=self._stop,
                                             args=(container, over_at, list(stopping))))
        for thread in stopping:
            thread.start()
        for thread in stopping:
            thread.join()
        self.gone_after = time.monotonic() - began
        self.pause.kill()
        return {name: container.status for name, container in self.containers.items()}

    def restart(self, name):
        """Do what a failed liveness probe does: stop one container as `delete` does, and start it
        anew."""
        container, = [container for container in self._all() if container["name"] == name]
        self._stop(container, time.monotonic() + self.spec["terminationGracePeriodSeconds"])
        self._start(container)

    def crash(self, name):
        """Kill a container, and start it anew."""
        container, = [container for container in self._all() if container["name"] == name]
        self.containers[name].kill()
        self._note("%s crashed" % name)
        self._start(container)

    def connect(self, port):
        """Return a connection to a port of the pod's loopback."""
        return in_network_of(self.pause.pid,
                             lambda: socket.create_connection(("127.0.0.1", port), PATIENCE))

    def call(self, method, path, port=8081):
        """Call a port of the pod; return (status, JSON or text)."""
        connection = http.client.HTTPConnection("localhost", port)
        connection.sock = self.connect(port)
        try:
            connection.request(method, path)
            answer = connection.getresponse()
            text = answer.read().decode()
            is_json = "json" in answer.getheader("Content-Type", "")
            return answer.status, json.loads(text) if is_json else text
        finally:
            connection.close()

    def probe(self, probe):
        """Return the status of an httpGet probe; None where nothing listens yet."""
        wanted = probe["httpGet"]["port"]
        port, = [entry["containerPort"] for container in self._all()
                 for entry in container.get("ports", [])
                 if wanted in (entry["name"], entry["containerPort"])]
        try:
            return self.call("GET", probe["httpGet"]["path"], port)[0]
        except ConnectionRefusedError:
            return None

    def log(self, name):
        return self.containers[name].program.log

    def facts(self):
        """Return what the worker's latest container wrote down: the messages it began, and those it
        ended."""
        try:
            with open(self.facts_path) as facts:
                lines = [line.split() for line in facts]
        except FileNotFoundError:
            lines = []
        return [[int(message) for what, message in lines if what == wanted]
                for wanted in ("begin", "end")]

    def in_hand(self):
        """Return the messages that were begun and are not done. In the end: those cut off."""
        begun, ended = self.facts()
        return sorted(set(begun) - set(ended))

    def _note(self, event):
        self.events.append(event)
        self.times[event] = time.monotonic()

    def _all(self):
        return self.spec.get("initContainers", []) + self.spec["containers"]

    def _command(self, command):
        return [self.python if part == "python3" else part.replace("/app", self.app)
                for part in command]

    def _launcher(self, name):
        """Return the command that puts a container's into its namespaces, and gives it its user."""
        launcher = ["nsenter", "--target", self.pause.pid, "--net", "--pid", "--mount"]
        if not self.spec.get("shareProcessNamespace"):
            launcher += OWN_PROCESSES
        if name in self.users:
            user = str(self.users[name])
            launcher += ["setpriv", "--reuid", user, "--regid", user, "--clear-groups",
                         "--inh-caps=-all", "--no-new-privs"]
        return launcher

    def _start(self, container):
        name, command = container["name"], self._command(container["command"])
        # The kubelet adds this one to every container.
        env = dict(environment(container, self.objects), KUBERNETES_SERVICE_HOST="10.96.0.1")
        if name == "bot":
            run = self.events.count("bot started")
            self.facts_path = os.path.join(self.folder, "facts-%d" % run)
            command = self.worker or command
            env = dict(env, PYTHONPATH=HERE, FACTS=self.facts_path, **self.env)
        self.containers[name] = Container(self.case, self._launcher(name), command, env)
        self.case.addCleanup(self.containers[name].kill)
        self._note("%s started" % name)
        hook = self._hook(container, "postStart")       # only after it, the next container starts
        if hook:
            self.case.assertTrue(hook.ends(PATIENCE), "the kubelet would wait for ever")
            self.case.assertEqual(hook.status, 0, hook.program.log)     # or it would start anew

    def _hook(self, container, which):
        """Start a hook inside of its container; return it as a Container, or None."""
        if which not in container.get("lifecycle", {}):
            return None
        launcher = ["nsenter", "--target", self.containers[container["name"]].pid,
                    "--net", "--pid", "--mount"]
        command = self._command(container["lifecycle"][which]["exec"]["command"])
        return Container(self.case, launcher, command, environment(container, self.objects))

    def _stop(self, container, over_at, others=()):
        """Stop a container after others, which threads stop; its time is over at `over_at`."""
        name, hook = container["name"], self._hook(container, "preStop")
        if hook:
            if not hook.ends(over_at - time.monotonic()):
                hook.kill()
            self._note("%s's preStop hook ended" % name)
        for thread in others:
            thread.join(max(over_at - time.monotonic(), 0))
        self._note("%s got SIGTERM" % name)
        self.containers[name].signal(signal.SIGTERM)
        if not self.containers[name].ends(max(over_at - time.monotonic(), 2)):
            self.containers[name].kill()
        self._note("%s ended" % name)
