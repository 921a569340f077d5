"""A pod's life, with the manifests as they are, and workers that know nothing of it."""
import collections
import concurrent.futures
import functools
import os
import re
import shutil
import signal
import socket
import socketserver
import sys
import tempfile
import threading
import unittest

from pod import Pod, in_network_of
from support import (CACHE, HERE, NAMESPACES, PATIENCE, Case, in_threads, installed, needs, run,
                     until)
from test_kafka import KafkaCase, KafkaNode, Proxy, Replies, needs_kafka
from test_manifests import MANIFESTS_BUILD, containers, kustomize, pick

WORKERS = os.path.join(HERE, ".ci", "tests", "workers")
AT_ONCE = 6             # pods of tests that are side by side; each mostly waits
# What a slow machine may need where nothing has to be waited for: the bound is the manifest's grace
# period of 30 seconds, since a pod that is not gone before that has waited it out.
GONE_SECONDS = 25


def side_by_side(test):
    """Decorate a test that mostly waits: it runs beside the others of its class, and when its turn
    comes it tells what came of it."""
    @functools.wraps(test)
    def outcome(self):
        self.outcomes[self._testMethodName].result()
    outcome.test = test
    return outcome


def needs_pods(case):
    """Decorate a class that needs what a stand-in for the kubelet needs."""
    case = needs("kubectl, or the Python package PyYAML", MANIFESTS_BUILD)(case)
    return needs("a root who may make namespaces", NAMESPACES)(case)


def pod_spec(objects):
    return pick(objects, "Deployment")["spec"]["template"]["spec"]


def manifest(components=(), grace_seconds=None, shares=None, held_seconds=None, **variables):
    """Return what kustomize builds, with changes.

    components: the overlays. grace_seconds: the sidecar's grace period; the pod's keeps its
    distance to it. shares: whether its containers share the process namespace. held_seconds: the
    sidecar's HELD_SECONDS. variables: more of the sidecar's, or with other values.
    """
    objects = kustomize(components=components)
    sidecar = containers(objects)["sidecar"]
    values = {entry["name"]: entry["value"] for entry in sidecar["env"]}
    if grace_seconds is not None:
        pod_spec(objects)["terminationGracePeriodSeconds"] += \
            grace_seconds - int(values["GRACE_PERIOD_SECONDS"])
        values["GRACE_PERIOD_SECONDS"] = str(grace_seconds)
    if shares is not None:
        pod_spec(objects)["shareProcessNamespace"] = shares
    if held_seconds is not None:
        sidecar["command"] = ["python3", "-c", """if True:
            import sys
            sys.path.insert(0, "/app")
            import sidecar
            sidecar.HELD_SECONDS = %d
            sidecar.main(sys.argv[1:])""" % held_seconds]
    values.update(variables)
    sidecar["env"] = [{"name": name, "value": value} for name, value in values.items()]
    return objects


def python_worker(program, **options):
    """Return the command of a Python worker."""
    return [sys.executable, os.path.join(WORKERS, program)] + [
        "%s=%s" % option for option in options.items()]


def out_of_step(count, seconds=2):
    """Return the work of messages so that `count` at a time do not end together, but evenly spread;
    else all would be held at once, and the count would be zero before a client gives up."""
    return ",".join("%.2f" % (seconds * (number + 1) / count) for number in range(count))


class PodCase(Case):
    """Tests that play pods. Those that are decorated with side_by_side begin with their class: of
    all that were picked, AT_ONCE at a time."""

    picked = collections.defaultdict(list)      # {class: its tests that will run}

    def __init__(self, name):
        super().__init__(name)
        self.picked[type(self)].append(self)

    @classmethod
    def setUpClass(cls):
        cls.pool = concurrent.futures.ThreadPoolExecutor(AT_ONCE)
        methods = {test._testMethodName: getattr(cls, test._testMethodName)
                   for test in cls.picked[cls]}
        cls.outcomes = {test._testMethodName: cls.pool.submit(methods[test._testMethodName].test,
                                                              test)
                        for test in cls.picked[cls]
                        if hasattr(methods[test._testMethodName], "test")}

    @classmethod
    def tearDownClass(cls):
        cls.pool.shutdown()

    def pod(self, worker=None, objects=None, **options):
        return Pod(self, objects or manifest(), worker, **options)

    def busy(self, pod, messages):
        """Wait until the worker has begun so many messages, and return the pod."""
        until(lambda: len(pod.facts()[0]) >= messages, "%d messages were begun" % messages)
        return pod

    def delete(self, pod):
        """Delete a pod; print what came of it; return the exit statuses of its containers."""
        in_hand = len(pod.in_hand())
        statuses = pod.delete()
        print("%s: %d in hand, gone after %.1f s, %d cut off" % (
            self.id().rsplit(".", 1)[1], in_hand, pod.gone_after, len(pod.in_hand())),
            file=sys.stderr)
        return statuses

    def none_cut_off(self, pod, within=GONE_SECONDS, worker_status=-signal.SIGTERM):
        """Delete a pod, which is to be gone within so many seconds with all that was begun done."""
        statuses = self.delete(pod)
        told = "%s\n%s" % (pod.events, pod.log("sidecar"))
        self.assertEqual(pod.in_hand(), [], told)
        self.assertEqual((statuses["sidecar"], statuses["bot"]), (0, worker_status), told)
        self.assertLess(pod.gone_after, within, told)


class Queue(socketserver.ThreadingUnixStreamServer):
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
        self.delivers = threading.Event()       # while it is not set, "take" waits for its message
        self.delivers.set()
        self.folder = tempfile.mkdtemp()
        # A path, and no port, because each pod has a loopback of its own.
        self.path = os.path.join(self.folder, "queue")
        super().__init__(self.path, self.Worker)
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
                    queue.delivers.wait()
                    self.wfile.write(b"none\n" if taken is None else b"%d\n" % taken)
            except OSError:             # killed
                pass
            if taken is not None:
                with queue.changed:
                    queue.again.append(taken)

    def close(self):
        self.shutdown()
        self.server_close()
        shutil.rmtree(self.folder, ignore_errors=True)

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
connection = socket.socket(socket.AF_UNIX)
connection.connect(os.environ["QUEUE"])
queue = connection.makefile("rw")

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


@needs_pods
class TestLifecycle(PodCase):
    """What the kubelet does to a pod, played through with the manifest as it is, and with a piece
    taken out. The worker is README's, without its signal handler."""

    def __init__(self, name):
        super().__init__(name)
        self.queue, self.pods = None, []

    def pod(self, objects, last=None, **env):
        """Start a pod with the worker above, on one queue for all of the test's pods."""
        self.queue = self.queue or Queue(last)
        self.addCleanup(self.queue.close)
        pod = Pod(self, objects, [sys.executable, "-c", QUEUE_WORKER],
                  QUEUE=self.queue.path, **env).start()
        self.pods.append(pod)
        return pod

    def answered_twice(self, objects):
        """Scale 0 -> 3 -> 1 -> 0 -> 1 in the middle of the stream; return the messages that were
        answered twice, and what happened."""
        pods = [self.pod(objects) for _ in range(3)]
        for removed in pods[:2], pods[2:]:
            answered = len(self.queue.answers) + 6
            self.queue.wait_for(lambda: len(self.queue.answers) >= answered)
            in_threads(len(removed), lambda number: removed[number].delete())
        self.pod(objects)
        with self.queue.changed:
            self.queue.last = self.queue.sent + 6
        self.queue.wait_for(lambda: len(self.queue.answers) == self.queue.last
                            and not self.queue.left)
        twice = [message for message, count in self.queue.answers.items() if count > 1]
        return twice, "\n".join("%s\n%s" % (pod.events, pod.log("sidecar")) for pod in self.pods
                                if "sidecar" in pod.containers)

    @side_by_side
    def test_no_message_twice_with_the_manifest(self):
        twice, told = self.answered_twice(manifest())
        self.assertEqual(twice, [], told)

    @side_by_side
    def test_no_message_twice_before_1_29(self):
        twice, told = self.answered_twice(manifest(["pre-1.29"]))
        self.assertEqual(twice, [], told)

    @side_by_side
    def test_messages_twice_without_the_preStop_hook(self):
        objects = manifest()
        del pod_spec(objects)["containers"][0]["lifecycle"]
        self.assertTrue(self.answered_twice(objects)[0])

    @side_by_side
    def test_messages_twice_without_the_sidecar(self):
        objects = manifest()
        del pod_spec(objects)["initContainers"]
        self.assertTrue(self.answered_twice(objects)[0])

    def left_by_a_worker_that_takes_as_the_drain_begins(self, **variables):
        """Hand the worker a message when the drain has begun, and its start comes 100 ms later;
        return what is not acknowledged in the end. Starts are not held, as for a worker that looks
        at `draining`."""
        self.queue = Queue(last=1)
        self.queue.delivers.clear()
        pod = self.pod(manifest(HOLD_STARTS="never", **variables), PAUSE=0.1)
        self.queue.wait_for(lambda: self.queue.sent)
        removal = threading.Thread(target=pod.delete)
        removal.start()
        pod.containers["sidecar"].program.wait_for("drain started")
        self.queue.delivers.set()
        removal.join()
        return self.queue.left

    @side_by_side
    def test_quiet_period_covers_a_message_that_was_taken_and_not_reported_yet(self):
        self.assertEqual(self.left_by_a_worker_that_takes_as_the_drain_begins(), set())

    @side_by_side
    def test_without_quiet_period_that_message_is_cut_off(self):
        self.assertEqual(self.left_by_a_worker_that_takes_as_the_drain_begins(
            QUIET_PERIOD_SECONDS="0"), {1})

    @side_by_side
    def test_order(self):
        pod = self.pod(manifest(), last=1)
        self.queue.wait_for(lambda: self.queue.answers)
        statuses = pod.delete()
        self.assertEqual(pod.events, [
            "sidecar started", "bot started", "bot's preStop hook ended", "bot got SIGTERM",
            "bot ended", "sidecar got SIGTERM", "sidecar ended"])
        self.assertEqual(statuses, {"sidecar": 0, "bot": -signal.SIGTERM})
        self.assertFalse(self.queue.left)

    @side_by_side
    def test_probes_while_the_pod_goes(self):
        objects = manifest()
        pod, sidecar = self.pod(objects, last=0), containers(objects)["sidecar"]
        pod.call("POST", "/start-request")
        removal = threading.Thread(target=pod.delete)
        removal.start()
        pod.containers["sidecar"].program.wait_for("drain started")
        self.assertEqual(pod.probe(sidecar["readinessProbe"]), 503)
        self.assertEqual(pod.probe(sidecar["livenessProbe"]), 200)
        self.assertIsNone(pod.containers["bot"].status)
        pod.call("POST", "/end-request")
        removal.join()

    @side_by_side
    def test_request_that_never_ends(self):
        """With every second of the manifest made a tenth: the hook gives up, then the pod's own
        time is over."""
        objects = manifest()
        pod_spec(objects)["terminationGracePeriodSeconds"] /= 10
        for variable in containers(objects)["sidecar"]["env"]:
            variable["value"] = str(float(variable["value"]) / 10)
        worker = (
            "import signal, time; from echo_bot import Sidecar; signal.signal(signal.SIGTERM, "
            "signal.SIG_IGN)\n"
            "with Sidecar().track(): print('stuck', flush=True); time.sleep(%d)" % PATIENCE)
        pod = Pod(self, objects, [sys.executable, "-c", worker]).start()
        pod.containers["bot"].program.wait_for("stuck")
        self.assertEqual(pod.delete(), {"sidecar": 1, "bot": -signal.SIGKILL})
        self.assertLess(pod.events.index("bot's preStop hook ended"),
                        pod.events.index("bot got SIGTERM"))
        pod.containers["sidecar"].program.wait_for("still active")


@needs("requests and aiohttp", installed("requests") and installed("aiohttp"))
@needs_pods
class TestWorkers(PodCase):
    """Workers that make the two calls, and know nothing else: their pod is deleted while they are
    busy. Each test prints a line of the table."""

    @side_by_side
    def test_readmes_loop_without_a_signal_handler(self):
        pod = self.pod(python_worker("readme.py")).start()
        self.none_cut_off(self.busy(pod, 2))

    @side_by_side
    def test_1_thread_of_300_ms(self):
        pod = self.pod(python_worker("threads.py", seconds=0.3)).start()
        self.none_cut_off(self.busy(pod, 5))

    @side_by_side
    def test_4_threads_of_2_s(self):
        pod = self.pod(python_worker("threads.py", threads=4, seconds=out_of_step(4))).start()
        self.none_cut_off(self.busy(pod, 8))

    @side_by_side
    def test_16_threads_of_2_s(self):
        pod = self.pod(python_worker("threads.py", threads=16,
                                     seconds=out_of_step(16))).start()
        self.none_cut_off(self.busy(pod, 32))

    @side_by_side
    def test_3_threads_of_2_s_and_a_message_of_25_s(self):
        pod = self.pod(python_worker("threads.py", threads=4, seconds="25,2"),
                       manifest(grace_seconds=40)).start()
        self.none_cut_off(self.busy(pod, 10), within=35)

    @side_by_side
    def test_batches_of_10_all_started_first(self):
        pod = self.pod(python_worker("batches.py", seconds=0.1)).start()
        self.none_cut_off(self.busy(pod, 25))

    @side_by_side
    def test_batch_that_is_half_started(self):
        pod = self.pod(python_worker("batches.py", seconds=0.1, between=0.5, backlog=20)).start()
        self.none_cut_off(self.busy(pod, 17), within=30)
        self.assertEqual(len(pod.facts()[1]), 20)

    @side_by_side
    def test_request_within_a_request(self):
        pod = self.pod(python_worker("nested.py")).start()
        self.none_cut_off(self.busy(pod, 1), within=20)

    @side_by_side
    def test_aiohttp_with_a_time_out_for_the_whole_call_and_two_retries(self):
        """Each try counts once more, and what no end comes for lapses. (With two seconds, since a
        try that is not held may take one on a busy machine, and that one does not lapse.)"""
        pod = self.pod(python_worker("event_loop.py", handlers=6, tries=3, timeout=2, backlog=24,
                                     seconds=out_of_step(6, 4))).start()
        self.none_cut_off(self.busy(pod, 12), within=30)
        self.assertEqual(len(pod.facts()[1]), 24)

    @side_by_side
    def test_start_that_gave_up_is_counted(self):
        """Message 3 is begun because its start gave up, and it is the last to end."""
        pod = self.pod(python_worker("event_loop.py", handlers=2, seconds="6,2,8",
                                     backlog=3)).start()
        self.none_cut_off(self.busy(pod, 2))
        self.assertEqual(len(pod.facts()[1]), 3)

    @side_by_side
    def test_aiohttp_with_a_time_out_for_the_whole_call_is_as_before(self):
        """README: protected in part. It finds nothing hung, and ends when its time is over."""
        pod = self.pod(python_worker("event_loop.py", seconds=out_of_step(4)),
                       manifest(grace_seconds=10)).start()
        self.in_time(self.busy(pod, 8))

    @side_by_side
    def test_blocking_client_in_an_event_loop_is_as_before(self):
        """README: protected in part, likewise."""
        pod = self.pod(python_worker("event_loop.py", handlers=10, client="requests",
                                     seconds=out_of_step(10)), manifest(grace_seconds=10)).start()
        self.in_time(self.busy(pod, 20))

    @side_by_side
    def test_blocking_client_in_an_event_loop_with_a_message_each_400_ms(self):
        pod = self.pod(python_worker("event_loop.py", handlers=10, client="requests", seconds=0.3,
                                     every=0.4)).start()
        self.none_cut_off(self.busy(pod, 5))

    @side_by_side
    def test_handler_that_lets_its_threads_finish(self):
        pod = self.pod(python_worker("threads.py", threads=4, seconds=out_of_step(4),
                                     handler=1)).start()
        self.none_cut_off(self.busy(pod, 8), worker_status=0)

    @side_by_side
    def test_pool_of_one_connection(self):
        """A held start has the connection that the ends need. It depends on who gets it next how
        many starts have to be tried before all are answered."""
        pod = self.pod(python_worker("threads.py", threads=4, seconds=out_of_step(4, 1),
                                     client="pool", backlog=14), manifest(grace_seconds=60)).start()
        self.none_cut_off(self.busy(pod, 8), within=55)
        self.assertEqual(len(pod.facts()[1]), 14)

    @side_by_side
    def test_urllib(self):
        pod = self.pod(python_worker("threads.py", threads=4, seconds=out_of_step(4),
                                     client="urllib")).start()
        self.none_cut_off(self.busy(pod, 8))

    def in_time(self, pod):
        statuses = self.delete(pod)
        told = "%s\n%s" % (pod.events, pod.log("sidecar"))
        self.assertIn(statuses["sidecar"], (0, 1), told)
        self.assertEqual(statuses["bot"], -signal.SIGTERM, told)


@needs("Go", shutil.which("go"))
@needs_pods
class TestGoWorker(PodCase):

    def test_4_goroutines_of_2_s(self):
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        worker = os.path.join(folder, "worker")
        run("go", "build", "-o", worker, os.path.join(WORKERS, "worker.go"))
        pod = self.pod([worker]).start()
        self.none_cut_off(self.busy(pod, 8))


@needs("Node.js, or its package axios",
       shutil.which("node") and os.path.exists(os.path.join(CACHE, "node_modules", "axios")))
@needs_pods
class TestNodeWorker(PodCase):

    def play(self, client):
        pod = self.pod(["node", os.path.join(WORKERS, "worker.js"), client],
                       NODE_PATH=os.path.join(CACHE, "node_modules")).start()
        self.none_cut_off(self.busy(pod, 8))

    @side_by_side
    def test_axios(self):
        self.play("axios")

    @side_by_side
    def test_fetch(self):
        self.play("fetch")

    @side_by_side
    def test_http(self):
        self.play("http")


@needs("requests", installed("requests"))
@needs_pods
class TestPodProcesses(PodCase):
    """What the sidecar makes of the processes of its pod."""

    WORKER = python_worker("threads.py", threads=4, seconds=out_of_step(4))
    # It is listed first, so it is told last.
    OTHER = {"name": "mesh", "command": ["sleep", "600"], "restartPolicy": "Always"}

    def with_another_sidecar(self, **options):
        objects = manifest(**options)
        pod_spec(objects)["initContainers"].insert(0, self.OTHER)
        return objects

    def crash_twice(self, pod):
        """Delete a pod whose worker was killed twice in mid-work."""
        for _ in range(2):
            self.busy(pod, 6).crash("bot")
        self.none_cut_off(self.busy(pod, 6))
        left = re.search(r"drain started active_requests=(\d+)", pod.log("sidecar")).group(1)
        self.assertLessEqual(int(left), 4, pod.log("sidecar"))

    @side_by_side
    def test_crashes_leave_nothing_behind(self):
        self.crash_twice(self.pod(self.WORKER).start())

    @side_by_side
    def test_crashes_as_two_users(self):
        worker = ["/usr/bin/python3"] + self.WORKER[1:] + ["client=urllib"]
        self.crash_twice(self.pod(worker, users={"sidecar": 65532, "bot": 1001}).start())

    @side_by_side
    def test_restart_of_the_container_serves_again_at_once(self):
        """At once: not after HELD_SECONDS, which are more than the test waits."""
        pod = self.pod(self.WORKER, manifest(held_seconds=10 * PATIENCE)).start()
        self.busy(pod, 8).restart("bot")
        self.none_cut_off(self.busy(pod, 8))

    @side_by_side
    def test_another_sidecar_hides_a_crash(self):
        pod = self.busy(self.pod(self.WORKER, self.with_another_sidecar()).start(), 4)
        pod.crash("bot")
        until(lambda: pod.call("GET", "/metrics")[1]["active_requests"] == 8, "4 are left behind")
        self.assertEqual(pod.call("POST", "/reset")[1], {"given_up": 8})

    @side_by_side
    def test_another_sidecar_hides_a_restart_for_a_while(self):
        pod = self.busy(self.pod(self.WORKER, self.with_another_sidecar()).start(), 8)
        pod.restart("bot")
        self.none_cut_off(self.busy(pod, 8))
        drained, serving = [
            int(hours) * 3600 + int(minutes) * 60 + int(seconds)
            for hours, minutes, seconds in re.findall(
                r"T(..):(..):(..)Z INFO (?:drain completed|serving again)", pod.log("sidecar"))[:2]]
        self.assertGreaterEqual((serving - drained) % 86400, 4, pod.log("sidecar"))

    @side_by_side
    def test_another_sidecar_is_waited_for_in_full(self):
        pod = self.busy(self.pod(self.WORKER, self.with_another_sidecar()).start(), 8)
        self.none_cut_off(pod)
        self.assertLess(pod.events.index("sidecar ended"), pod.events.index("mesh got SIGTERM"))
        self.assertGreater(pod.times["sidecar ended"] - pod.times["bot ended"], 4)

    @side_by_side
    def test_before_1_29_the_sidecar_is_the_last_to_go(self):
        pod = self.pod(self.WORKER, manifest(components=["pre-1.29"])).start()
        self.none_cut_off(self.busy(pod, 8))
        self.assertLess(pod.events.index("sidecar got SIGTERM"),
                        pod.events.index("bot got SIGTERM"))
        self.assertLess(pod.events.index("bot ended"), pod.events.index("sidecar ended"))

    @side_by_side
    def test_before_1_29_the_worker_is_started_when_its_sidecar_listens(self):
        objects = manifest(["pre-1.29"])
        sidecar = containers(objects)["sidecar"]
        sidecar["command"] = ["sh", "-c", "sleep 2; exec python3 /app/sidecar.py"]
        pod = self.pod(self.WORKER, objects).start(ready=False)
        self.assertEqual(pod.probe(sidecar["startupProbe"]), 200)

    def in_its_first_second(self, worker, objects):
        """Delete a pod when its containers have just been started."""
        pod = self.pod(worker, objects).start(ready=False)
        statuses = self.delete(pod)
        self.assertLess(pod.gone_after, GONE_SECONDS, pod.log("sidecar"))
        self.assertNotIn(-signal.SIGKILL, statuses.values(), pod.log("sidecar"))
        self.assertEqual(pod.in_hand(), [], pod.log("sidecar"))

    @side_by_side
    def test_deleted_in_its_first_second(self):
        self.in_its_first_second(self.WORKER, manifest())

    @side_by_side
    def test_deleted_in_its_first_second_before_1_29(self):
        """The sidecar, which is told at once, waits for the worker as long as that takes: on a busy
        machine its preStop hook alone may take longer than HELD_SECONDS."""
        self.in_its_first_second(self.WORKER, manifest(["pre-1.29"], held_seconds=PATIENCE))

    @side_by_side
    def test_bot_deleted_in_its_first_second(self):
        self.in_its_first_second(None, manifest())


@needs("requests, or tini", installed("requests") and shutil.which("tini"))
@needs_pods
class TestHolding(PodCase):
    """Where starts are held, and where they are not. With an init the worker is not PID 1, so that
    SIGTERM ends it in a PID namespace of its own too."""

    INIT = ["tini", "--"]
    WORKER = python_worker("threads.py", threads=4, seconds=out_of_step(4))

    def goes_on(self, pod):
        """Delete a pod whose worker is to begin messages all through the drain."""
        begun = len(self.busy(pod, 3).facts()[0])
        statuses = self.delete(pod)
        self.assertGreater(len(pod.facts()[0]), begun + 2, pod.log("sidecar"))
        return statuses

    @side_by_side
    def test_auto_does_not_hold_where_the_namespace_is_not_shared(self):
        pod = self.pod(python_worker("threads.py", seconds=0.3),
                       manifest(grace_seconds=4, shares=False)).start()
        statuses = self.goes_on(pod)
        self.assertEqual(statuses["bot"], -signal.SIGKILL, "SIGTERM without a handler, as PID 1")
        self.assertEqual(pod.log("sidecar").count("shareProcessNamespace"), 1, pod.log("sidecar"))

    @side_by_side
    def test_always(self):
        pod = self.pod(self.INIT + self.WORKER,
                       manifest(shares=False, HOLD_STARTS="always")).start()
        self.none_cut_off(self.busy(pod, 8), worker_status=128 + signal.SIGTERM)

    @side_by_side
    def test_never(self):
        pod = self.pod(python_worker("threads.py", seconds=0.3),
                       manifest(grace_seconds=4, HOLD_STARTS="never")).start()
        self.assertEqual(self.goes_on(pod)["bot"], -signal.SIGTERM)

    @side_by_side
    def test_hold_true_in_the_query(self):
        pod = self.pod(self.INIT + self.WORKER + ["hold=true"], manifest(shares=False)).start()
        self.none_cut_off(self.busy(pod, 8), worker_status=128 + signal.SIGTERM)

    @side_by_side
    def test_hold_false_in_the_query(self):
        """As for one that finishes what it has when SIGTERM comes."""
        pod = self.pod(python_worker("threads.py", seconds=0.3, hold="false", handler=1),
                       manifest(grace_seconds=4)).start()
        self.assertEqual(self.goes_on(pod)["bot"], 0)
        self.assertEqual(pod.in_hand(), [])


class PodBroker(Proxy):
    """A broker of this machine, on the same port of a pod's own loopback."""

    def __init__(self, pod, port):
        def listening():
            server = socket.socket()
            server.bind(("127.0.0.1", port))
            server.listen()
            return server
        self.target, self.spoil, self.port = port, None, port
        self.server = in_network_of(pod.pause.pid, listening)
        threading.Thread(target=self._accept, daemon=True).start()


@needs_pods
@needs_kafka
class TestLifecycleOnKafka(KafkaCase):
    """The bot of the manifest, its sidecar and a real Kafka."""

    @classmethod
    def setUpClass(cls):
        cls.use(KafkaNode())

    def pod(self, objects):
        pod = Pod(self, objects)
        broker = PodBroker(pod, int(self.brokers.rpartition(":")[2]))
        self.addCleanup(broker.close)
        return pod.start()

    def stream(self):
        """Write updates, 100 a second at most; return the list of them, and what ends it."""
        sent, over = [], threading.Event()

        def write():
            producer = self.producer()
            while not over.wait(0.01):
                record, = self.updates(1, first=len(sent))
                producer.produce(self.incoming, **record)
                sent.append(record)
            producer.flush(PATIENCE)

        def end():
            over.set()
            writing.join()

        writing = threading.Thread(target=write, daemon=True)
        writing.start()
        self.addCleanup(over.set)
        return sent, end

    def test_scaled_0_3_1_0_1_in_the_stream_each_update_is_answered_once(self):
        self.topics(incoming=6, outgoing=3)
        objects = kustomize()
        settings = pick(objects, "ConfigMap")["data"]
        settings.update(BOT_ID="b1", KAFKA_BROKERS=self.brokers, KAFKA_INCOMING_TOPIC=self.incoming,
                        KAFKA_OUTGOING_TOPIC=self.outgoing, KAFKA_CONSUMER_GROUP=self.group)
        sent, end_stream = self.stream()
        replies = Replies(self)
        pods = in_threads(3, lambda number: self.pod(objects))
        for removed in pods[:2], pods[2:]:
            replies.read(len(replies.texts) + 200)
            for statuses in in_threads(len(removed), lambda number: removed[number].delete()):
                self.assertEqual(statuses, {"sidecar": 0, "bot": 0})
        self.pod(objects)
        end_stream()
        replies.read(len(sent)).rest()
        self.assertEqual(replies.texts,
                         collections.Counter("Echo: m%d" % number for number in range(len(sent))))
        until(lambda: self.lag(6) == 0, "every offset is committed")


if __name__ == "__main__":
    unittest.main(verbosity=2)
