"""A pod's life with real processes, as the manifests have it."""
import collections
import re
import signal
import socketserver
import subprocess
import sys
import threading
import time
import unittest
import urllib.error
import urllib.request

from support import HERE, PATIENCE, Case, in_threads, needs, until
from test_kafka import KafkaCase, KafkaNode, Replies, needs_kafka
from test_manifests import MANIFESTS_BUILD, environment, kustomize, pick


class Pod:
    """A pod as the kubelet runs it, with real processes; what it does is read from the built
    manifest.

    Two things stand in for the node: python3 and /app are this Python and this folder, and the
    sidecar's ports are free ones of loopback, to which everything that names the manifest's ports
    is pointed.
    """

    def __init__(self, case, objects, worker=None, **env):
        """objects: from kustomize(); worker: a command in place of the bot's; env: more variables
        for the bot."""
        self.case, self.objects, self.worker, self.env = case, objects, worker, env
        self.spec = pick(objects, "Deployment")["spec"]["template"]["spec"]
        self.programs, self.ports, self.events = {}, {}, []

    def start(self):
        """Start the containers in the kubelet's order, and return self when each readiness probe
        has passed."""
        for container in self.spec.get("initContainers", []):
            self.case.assertEqual(container.get("restartPolicy"), "Always",
                                  "nothing else would start before its end")
            self._start(container)
            # Only then the next container starts.
            until(lambda: self.probe(container["startupProbe"]) == 200)
        for container in self.spec["containers"]:
            self._start(container)
        for container in self._containers():
            if "readinessProbe" in container:
                until(lambda: self.probe(container["readinessProbe"]) == 200)
        return self

    def delete(self):
        """Delete the pod as the kubelet does, and return {container: exit status}.

        The preStop hooks of all containers run at once, and each container gets SIGTERM after its
        own; but a native sidecar (an init container) only when the ordinary ones are gone.
        terminationGracePeriodSeconds counts all of it; when it is over, what still runs gets
        SIGTERM and two seconds, and then SIGKILL. (killContainer in the kubelet's
        kuberuntime_container.go)
        """
        self.over_at = time.monotonic() + self.spec["terminationGracePeriodSeconds"]
        ordinary = [threading.Thread(target=self._stop, args=(container, []))
                    for container in self.spec["containers"]]
        native = [threading.Thread(target=self._stop, args=(container, ordinary))
                  for container in self.spec.get("initContainers", [])]
        for thread in ordinary + native:
            thread.start()
        for thread in ordinary + native:
            thread.join()
        return {name: program.process.returncode for name, program in self.programs.items()}

    def url(self, port):
        """Return where a port, by its name or number in the manifest, really is."""
        number, = [entry["containerPort"] for container in self._containers()
                   for entry in container.get("ports", [])
                   if port in (entry["name"], entry["containerPort"])]
        return "http://127.0.0.1:%d" % self.ports[number]

    def probe(self, probe):
        """Return the status of an httpGet probe, as the node asks it."""
        try:
            return urllib.request.urlopen(self.url(probe["httpGet"]["port"])
                                          + probe["httpGet"]["path"]).status
        except urllib.error.HTTPError as error:
            return error.code

    def _containers(self):
        return self.spec.get("initContainers", []) + self.spec["containers"]

    def _environment(self, container):
        env = environment(container, self.objects)
        for name, value in env.items():
            port = re.search("127.0.0.1:([0-9]+)", value)
            if port:                                            # port 1: nobody is there
                env[name] = "http://127.0.0.1:%d" % self.ports.get(int(port.group(1)), 1)
        return env

    def _command(self, command):
        return [sys.executable if part == "python3" else part.replace("/app", HERE)
                for part in command]

    def _start(self, container):
        command, env = self._command(container["command"]), self._environment(container)
        if container["name"] == "sidecar":
            env.update(SIDECAR_HOST="127.0.0.1", SIDECAR_PORT="0", METRICS_PORT="0")
        else:
            command, env = self.worker or command, dict(env, **self.env)
        program = self.programs[container["name"]] = self.case.program(*command, env=env, cwd=HERE)
        self.events.append(container["name"] + " started")
        if container["name"] == "sidecar":
            found = program.wait_for(r"listening.*?http://\S+?:(\d+).*?http://\S+?:(\d+)")
            numbers = [port["containerPort"] for port in container["ports"]]
            self.ports.update(zip(numbers, map(int, found.groups())))

    def _stop(self, container, others):
        name = container["name"]
        hook = container.get("lifecycle", {}).get("preStop")
        if hook:
            hook = self.case.program(*self._command(hook["exec"]["command"]),
                                     env=self._environment(container))
            if not self._ends(hook):
                hook.kill()
            self.events.append("%s's preStop hook ended" % name)
        for other in others:
            other.join(max(self.over_at - time.monotonic(), 0))
        program = self.programs[name]
        self.events.append("%s got SIGTERM" % name)
        program.signal(signal.SIGTERM)
        if not self._ends(program, at_least=2):
            program.kill()
        self.events.append("%s ended" % name)

    def _ends(self, program, at_least=0):
        """Wait for the end of a process, until the pod's grace period is over; return whether it
        came."""
        try:
            program.wait(max(self.over_at - time.monotonic(), at_least))
            return True
        except subprocess.TimeoutExpired:
            return False


class Queue(socketserver.ThreadingTCPServer):
    """A stream of numbers with at-least-once delivery: what a worker took and did not acknowledge
    is delivered again.

    A worker sends a line and gets a line: "take" gets a message, or "none"; "answer" is what the
    message's sender sees; "ack" ends the message. A connection that closes gives its message back.
    `last`: the number that ends the stream.
    """
    daemon_threads = True

    def __init__(self, last=None):
        self.last, self.sent, self.again = last, 0, []
        self.left, self.answers, self.changed = set(), collections.Counter(), threading.Condition()
        super().__init__(("127.0.0.1", 0), self.Worker)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def take(self):
        if self.again:
            return self.again.pop()
        if self.sent == self.last:
            return None
        self.sent += 1
        self.left.add(self.sent)
        return self.sent

    class Worker(socketserver.StreamRequestHandler):
        def handle(self):
            queue, taken = self.server, None
            try:
                for line in self.rfile:
                    with queue.changed:
                        if line == b"take\n":
                            taken = queue.take()
                        elif line == b"answer\n":
                            queue.answers[taken] += 1
                        elif line == b"ack\n":
                            queue.left.discard(taken)
                            taken = None
                        queue.changed.notify_all()
                    self.wfile.write(b"none\n" if taken is None else b"%d\n" % taken)
            except OSError:             # killed
                pass
            if taken is not None:
                with queue.changed:
                    queue.again.append(taken)

    def wait_for(self, condition):
        with self.changed:
            if not self.changed.wait_for(condition, PATIENCE):
                raise AssertionError("%d answered, %d left" % (len(self.answers), len(self.left)))


# A worker with no signal handler, and only the README's Python client. The sender sees the answer
# when the work begins; so a worker that is killed during the 300 ms after it has done work that
# will be done again.
QUEUE_WORKER = """
import os, socket, sys, time
from echo_bot import Sidecar

sidecar = Sidecar()
queue = socket.create_connection(("127.0.0.1", int(os.environ["QUEUE_PORT"]))).makefile("rw")

def ask(line):
    queue.write(line + "\\n")
    queue.flush()
    return queue.readline().strip()

while True:
    if sidecar.draining and not sidecar.ready():
        time.sleep(0.05)
    elif ask("take") == "none":
        time.sleep(0.05)
    else:
        time.sleep(float(os.environ.get("PAUSE", 0)))
        with sidecar.track():
            ask("answer")
            time.sleep(0.3)
            ask("ack")
"""


@needs("kubectl, or the Python package PyYAML", MANIFESTS_BUILD)
class TestLifecycle(Case):
    """What the kubelet does to a pod, played through with the manifest as it is, and with a piece
    taken out."""

    def setUp(self):
        self.objects = kustomize()
        self.spec = pick(self.objects, "Deployment")["spec"]["template"]["spec"]
        self.queue = None

    def pod(self, objects, last=None, **env):
        """Start a pod with the worker above, on one queue for all of the test's pods."""
        if self.queue is None:
            self.queue = Queue(last)
            self.addCleanup(self.queue.server_close)
            self.addCleanup(self.queue.shutdown)
        return Pod(self, objects, [sys.executable, "-c", QUEUE_WORKER],
                   QUEUE_PORT=self.queue.server_address[1], **env).start()

    def answered_twice(self, objects):
        """Scale 0 -> 3 -> 1 -> 0 -> 1 in the middle of the stream; return how many messages were
        answered twice."""
        pods = [self.pod(objects) for _ in range(3)]
        for removed in pods[:2], pods[2:]:
            answered = len(self.queue.answers) + 6
            self.queue.wait_for(lambda: len(self.queue.answers) >= answered)
            for pod in removed:
                threading.Thread(target=pod.delete, daemon=True).start()
            for pod in removed:
                pod.programs["bot"].wait()
        self.pod(objects)
        with self.queue.changed:
            self.queue.last = self.queue.sent + 6
        self.queue.wait_for(lambda: len(self.queue.answers) == self.queue.last
                            and not self.queue.left)
        return sum(1 for count in self.queue.answers.values() if count > 1)

    def test_no_message_twice_with_the_manifest(self):
        self.assertEqual(self.answered_twice(self.objects), 0)

    def test_no_message_twice_before_1_29(self):
        self.assertEqual(self.answered_twice(kustomize(components=["pre-1.29"])), 0)

    def test_messages_twice_without_the_preStop_hook(self):
        del self.spec["containers"][0]["lifecycle"]
        self.assertGreater(self.answered_twice(self.objects), 0)

    def test_messages_twice_without_the_sidecar(self):
        del self.spec["initContainers"]
        self.assertGreater(self.answered_twice(self.objects), 0)

    def test_quiet_period_covers_a_message_that_was_taken_and_not_reported_yet(self):
        pod = self.pod(self.objects, last=1, PAUSE=0.3)
        self.queue.wait_for(lambda: self.queue.sent)
        pod.delete()
        self.assertFalse(self.queue.left)

    def test_without_quiet_period_that_message_is_cut_off(self):
        quiet_period, = [entry for entry in self.spec["initContainers"][0]["env"]
                         if entry["name"] == "QUIET_PERIOD_SECONDS"]
        quiet_period["value"] = "0"
        pod = self.pod(self.objects, last=1, PAUSE=PATIENCE)
        self.queue.wait_for(lambda: self.queue.sent)
        pod.delete()
        self.assertEqual(self.queue.left, {1})

    def test_order(self):
        pod = self.pod(self.objects, last=1)
        self.queue.wait_for(lambda: self.queue.answers)
        statuses = pod.delete()
        self.assertEqual(pod.events, [
            "sidecar started", "bot started", "bot's preStop hook ended", "bot got SIGTERM",
            "bot ended",
            "sidecar got SIGTERM", "sidecar ended"])
        self.assertEqual(statuses, {"sidecar": 0, "bot": -signal.SIGTERM})
        self.assertFalse(self.queue.left)

    def test_probes_while_the_pod_goes(self):
        pod = self.pod(self.objects, last=0)
        sidecar, = self.spec["initContainers"]
        urllib.request.urlopen(pod.url("http") + "/start-request", data=b"")
        removal = threading.Thread(target=pod.delete)
        removal.start()
        pod.programs["sidecar"].wait_for("drain started")
        self.assertEqual(pod.probe(sidecar["readinessProbe"]), 503)
        self.assertEqual(pod.probe(sidecar["livenessProbe"]), 200)
        self.assertIsNone(pod.programs["bot"].process.poll())
        urllib.request.urlopen(pod.url("http") + "/end-request", data=b"")
        removal.join()

    def test_request_that_never_ends(self):
        """With every second of the manifest made a tenth: the hook gives up, then the pod's own
        time is over."""
        self.spec["terminationGracePeriodSeconds"] /= 10
        for variable in self.spec["initContainers"][0]["env"]:
            variable["value"] = str(float(variable["value"]) / 10)
        worker = (
            "import signal, time; from echo_bot import Sidecar; signal.signal(signal.SIGTERM, "
            "signal.SIG_IGN)\n"
            "with Sidecar().track(): print('stuck', flush=True); time.sleep(%d)" % PATIENCE)
        pod = Pod(self, self.objects, [sys.executable, "-c", worker]).start()
        pod.programs["bot"].wait_for("stuck")
        self.assertEqual(pod.delete(), {"sidecar": 1, "bot": -signal.SIGKILL})
        self.assertLess(pod.events.index("bot's preStop hook ended"),
                        pod.events.index("bot got SIGTERM"))
        pod.programs["sidecar"].wait_for("still active")


@needs("kubectl, or the Python package PyYAML", MANIFESTS_BUILD)
@needs_kafka
class TestLifecycleOnKafka(KafkaCase):
    """The bot of the manifest, its sidecar and a real Kafka."""

    @classmethod
    def setUpClass(cls):
        cls.use(KafkaNode())

    def test_scaled_0_3_1_0_1_in_the_stream_each_update_is_answered_once(self):
        self.topics(incoming=6, outgoing=3)
        objects = kustomize()
        settings = pick(objects, "ConfigMap")["data"]
        settings.update(BOT_ID="b1", KAFKA_BROKERS=self.brokers, KAFKA_INCOMING_TOPIC=self.incoming,
                        KAFKA_OUTGOING_TOPIC=self.outgoing, KAFKA_CONSUMER_GROUP=self.group)
        sent, over = [], threading.Event()

        def stream():
            producer = self.producer()
            while not over.wait(0.01):
                record, = self.updates(1, first=len(sent))
                producer.produce(self.incoming, **record)
                sent.append(record)
            producer.flush(PATIENCE)

        streaming = threading.Thread(target=stream, daemon=True)
        streaming.start()
        self.addCleanup(over.set)
        replies = Replies(self)
        pods = in_threads(3, lambda number: Pod(self, objects).start())
        for removed in pods[:2], pods[2:]:
            replies.read(len(replies.texts) + 200)
            for statuses in in_threads(len(removed), lambda number: removed[number].delete()):
                self.assertEqual(statuses, {"sidecar": 0, "bot": 0})
        Pod(self, objects).start()
        over.set()
        streaming.join()
        replies.read(len(sent)).rest()
        self.assertEqual(replies.texts,
                         collections.Counter("Echo: m%d" % number for number in range(len(sent))))
        until(lambda: self.lag(6) == 0, "every offset is committed")


if __name__ == "__main__":
    unittest.main(verbosity=2)
