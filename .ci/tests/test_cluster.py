"""A real Kubernetes with KEDA: what the manifests promise, seen there.

With KUBECONFIG set the tests run on that cluster (kind, k3d, minikube; another one only where
CLUSTER_CONTEXT names its context, since they empty a namespace and drain a node): it has KEDA, its
nodes have both images of the Dockerfile (`kind load docker-image`), and CLUSTER_KAFKA names a
broker that its pods and this machine reach by the same address. Without it .ci/cluster makes one,
which wants root and Debian, takes a quarter of an hour the first time, and ends with the tests; it
goes on where KUBECONFIG says that it is the one: `eval "$(.ci/cluster env)"`.

The namespace of the manifests enforces the Pod Security Standard `restricted` throughout. A worker
that is not the bot takes the bot's place in the manifests by its command and its variables; the
programs of these pods are in pods/, and the recorder counts for them what was cut off: a message
that was begun, and not ended, in a pod that is gone.
"""
import collections
import json
import os
import shutil
import tempfile
import threading
import time
import unittest

from support import HERE, Case, installed, needs, readme_blocks, run, until
from test_idle_first import OnCluster
from test_kafka import KafkaCase, Replies, envelope
from test_manifests import KUSTOMIZE, MANIFESTS, containers, pick

CLUSTER = os.path.join(HERE, ".ci", "cluster")
PODS = os.path.join(HERE, ".ci", "tests", "pods")
BOT = "telegram-serverless"         # the manifests' namespace
RECORDER = "recorder"               # and that of the recorder
LABEL = "app.kubernetes.io/name=bot-echo"
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
OWN_CONFIG = "/tmp/sidecar-cluster/admin.conf"
OWN = os.environ.get("KUBECONFIG", OWN_CONFIG) == OWN_CONFIG        # the cluster is .ci/cluster's
# A drain that is over because the count was zero, and not because its grace period was over.
DRAINED_SECONDS = 30

needs_cluster = needs(
    "a cluster (KUBECONFIG, or root on Debian with Go) or PyYAML",
    installed("yaml") and (not OWN or os.geteuid() == 0 and shutil.which("apt-get")
                           and shutil.which("go")))
needs_broker = needs("a broker for the cluster (CLUSTER_KAFKA) or confluent-kafka",
                     (OWN or "CLUSTER_KAFKA" in os.environ) and installed("confluent_kafka"))


class Cluster:
    """The cluster that all tests share, started by the first of them: `cluster.recorder` is where
    the pods find the recorder."""

    started = False

    def start(self):
        if self.started:
            return
        self.started = True
        if OWN:
            for command in "up", "images", "keda", "kafka":
                run(CLUSTER, command)
        else:
            check_context(self.kubectl("config", "current-context").strip())
        self.kubectl("delete", "namespace", RECORDER, "--ignore-not-found")
        self.apply([namespace(RECORDER), programs(RECORDER), recorder(image_of_the_bot())])
        self.kubectl("wait", "-n", RECORDER, "pod/recorder", "--for=condition=Ready",
                     "--timeout=60s")
        self.recorder = "http://%s:8000" % self.kubectl(
            "get", "-n", RECORDER, "pod/recorder", "-o", "jsonpath={.status.podIP}")

    def stop(self):
        if self.started and "KUBECONFIG" not in os.environ:
            run(CLUSTER, "down")
        elif self.started:
            self.kubectl("delete", "namespace", BOT, RECORDER, "--ignore-not-found")

    def command(self, *arguments):
        """Return the command line of a kubectl."""
        return ([CLUSTER, "kubectl"] if OWN else ["kubectl"]) + list(arguments)

    def kubectl(self, *arguments, objects=None):
        """Run kubectl to its end and return what it printed. objects: what it reads."""
        if objects is None:
            return run(*self.command(*arguments))
        with tempfile.TemporaryFile() as file:
            file.write(json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}).encode())
            file.seek(0)
            return run(*self.command(*arguments), stdin=file)

    def apply(self, objects):
        """Apply objects, the namespace first."""
        spaces = [thing for thing in objects if thing["kind"] == "Namespace"]
        for part in spaces, [thing for thing in objects if thing not in spaces]:
            if part:
                self.kubectl("apply", "-f", "-", objects=part)

    def ask_recorder(self, path):
        """Return what the recorder answers, by way of the API server, which reaches every pod."""
        return json.loads(self.kubectl(
            "get", "--raw", "/api/v1/namespaces/%s/pods/recorder:8000/proxy/%s" % (RECORDER, path)))


cluster = Cluster()


def check_context(name):
    """Raise where this may be a cluster that people use."""
    if not name.startswith(("kind-", "k3d-", "minikube")) and name != os.getenv("CLUSTER_CONTEXT"):
        raise SystemExit("%s is no kind, k3d or minikube: these tests empty the namespace %s and "
                         "drain a node; CLUSTER_CONTEXT=%s allows that" % (name, BOT, name))


def tearDownModule():
    cluster.stop()


def namespace(name):
    return {"apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": name, "labels": RESTRICTED}}


def programs(space):
    """Return the ConfigMap with the programs of the tests' pods."""
    data = {}
    for name in sorted(os.listdir(PODS)):
        if name.endswith(".py"):
            with open(os.path.join(PODS, name)) as file:
                data[name] = file.read()
    return {"apiVersion": "v1", "kind": "ConfigMap", "data": data,
            "metadata": {"name": "pods", "namespace": space}}


def recorder(image):
    container = {
        "name": "recorder", "image": image, "command": ["python3", "/pods/recorder.py"],
        "readinessProbe": {"httpGet": {"path": "/health", "port": 8000}, "periodSeconds": 1},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": "pods", "mountPath": "/pods"}]}
    return {
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "recorder", "namespace": RECORDER},
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "securityContext": {"runAsNonRoot": True, "runAsUser": 65532,
                                "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [container],
            "volumes": [{"name": "pods", "configMap": {"name": "pods"}}]}}


def build(components=(), secrets=""):
    """Return what `kubectl apply -k manifests` sends, with a namespace that enforces `restricted`.

    components: the overlays that are switched on, in this order. secrets: more lines for bot.env.
    """
    import yaml
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, "manifests")
        shutil.copytree(MANIFESTS, copy, ignore=shutil.ignore_patterns("bot.env"))
        shutil.copy(os.path.join(copy, "bot.env.example"), os.path.join(copy, "bot.env"))
        with open(os.path.join(copy, "bot.env"), "a") as file:
            file.write(secrets)
        with open(os.path.join(copy, "kustomization.yaml"), "a") as file:
            if components:
                file.write("components:\n")
            file.writelines("- overlays/%s\n" % name for name in components)
        objects = list(yaml.safe_load_all(run(*KUSTOMIZE, copy)))
    pick(objects, "Namespace")["metadata"]["labels"].update(RESTRICTED)
    return objects


def image_of_the_bot():
    return containers(build())["bot"]["image"]


def with_worker(objects, client, threads, seconds, replicas=3):
    """Return the objects with a worker of pods/worker.py in the bot's place, and without KEDA's."""
    bot = containers(objects)["bot"]
    bot["command"] = ["python3", "/pods/worker.py"]
    bot["env"] += [{"name": name, "value": str(value)} for name, value in (
        ("CLIENT", client), ("THREADS", threads), ("SECONDS", seconds),
        ("RECORDER", cluster.recorder), ("PYTHONPATH", "/app"))]
    bot.setdefault("volumeMounts", []).append({"name": "pods", "mountPath": "/pods"})
    deployment = pick(objects, "Deployment")["spec"]
    deployment["replicas"] = replicas
    deployment["template"]["spec"].setdefault("volumes", []).append(
        {"name": "pods", "configMap": {"name": "pods"}})
    return [thing for thing in objects if "keda.sh" not in thing["apiVersion"]] + [programs(BOT)]


# Finds the process by its command line, since a pod may share its process namespace or not.
SIGNAL = """
import os, sys
for entry in os.listdir("/proc"):
    if entry.isdigit() and int(entry) != os.getpid():
        with open("/proc/%s/cmdline" % entry, "rb") as file:
            if file.read().split(bytes(1))[1:] == [sys.argv[1].encode(), b""]:
                os.kill(int(entry), int(sys.argv[2]))
"""


class in_background:
    """Runs function(*arguments) in a thread. A call waits for it, and returns or raises as it."""

    def __init__(self, function, *arguments):
        self.function, self.arguments, self.result, self.error = function, arguments, None, None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self):
        try:
            self.result = self.function(*self.arguments)
        except BaseException as error:
            self.error = error

    def goes_on(self):
        return self.thread.is_alive()

    def __call__(self):
        self.thread.join()
        if self.error:
            raise self.error
        return self.result


def pick_settings(objects):
    """Return the variables of the bot's ConfigMap."""
    found, = [thing["data"] for thing in objects
              if thing["kind"] == "ConfigMap" and "KAFKA_BROKERS" in thing["data"]]
    return found


def with_broker(objects, brokers):
    """Return the objects with another broker: the one thing that differs here."""
    pick_settings(objects)["KAFKA_BROKERS"] = brokers
    return objects


def text_of(reply):
    return json.loads(reply.value())["params"]["text"]


class ClusterCase(Case):
    """A test in the namespace of the manifests, which is empty when it begins."""

    def setUp(self):
        cluster.start()
        self.empty()
        self.addCleanup(self.empty)

    def empty(self):
        """Take everything out of the namespace, the pods at once."""
        cluster.kubectl("delete", "-n", BOT, "scaledobject,deployment", "--all",
                        "--ignore-not-found")
        cluster.kubectl("delete", "-n", BOT, "pods", "--all", "--grace-period=1")

    def kubectl(self, *arguments):
        return cluster.kubectl("-n", BOT, *arguments)

    def apply(self, objects):
        """Apply the objects and wait until their pods are ready."""
        cluster.apply(objects)
        self.kubectl("rollout", "status", "deployment/bot-echo", "--timeout=120s")

    def pods(self):
        """Return the pods that are not on their way out: {name: pod}."""
        listed = json.loads(self.kubectl("get", "pods", "-l", LABEL, "-o", "json"))["items"]
        return {pod["metadata"]["name"]: pod for pod in listed
                if "deletionTimestamp" not in pod["metadata"]}

    def busy(self, threads):
        """Wait until each thread of each pod is at work; return the names of the pods."""
        names = sorted(self.pods())
        self.wait_for_begun(threads, *names)
        return names

    def wait_for_begun(self, count, *names):
        """Wait until each of these pods has begun so many more messages."""
        came = cluster.ask_recorder("wait/%d/%s" % (count, ",".join(names)))
        self.assertTrue(came, "%d more messages in each of %s" % (count, ", ".join(names)))

    def delete(self, names):
        """Delete pods; return after how many seconds the last of them was gone."""
        began = time.monotonic()
        self.kubectl("delete", "pods", *names, "--timeout=120s")
        return time.monotonic() - began

    def cut_off(self, names, ignored=()):
        """Return (how many messages were cut off in pods that are gone, of how many begun).

        ignored: the runs of workers that are not looked at.
        """
        seen = collections.defaultdict(set)
        for _, what, pod, message in cluster.ask_recorder("records"):
            if pod in names and message.partition("-")[0] not in ignored:
                seen[what].add(message)
        return len(seen["begin"] - seen["end"]), len(seen["begin"])

    def delete_all_thrice(self, threads):
        """Delete all pods at work, three times; none may be cut off."""
        gone, cut, pods = [], 0, 0
        for _ in range(3):
            names = self.busy(threads)
            gone.append(self.delete(names))
            cut += self.cut_off(names)[0]
            pods += len(names)
            self.kubectl("rollout", "status", "deployment/bot-echo", "--timeout=120s")
        self.report("%d pods of %d threads deleted: gone after %s s, %d of %d requests cut off" % (
            pods, threads, " ".join("%.1f" % seconds for seconds in gone), cut, pods * threads))
        self.assertEqual(cut, 0)
        self.assertLess(max(gone), DRAINED_SECONDS)

    def report(self, text):
        print("%s: %s" % (self.id().partition(".")[2], text), flush=True)


@needs_cluster
class TestDrain(ClusterCase):
    """Three pods under full load, all deleted, three times: by each kind of worker."""

    def deleted(self, client, threads, seconds):
        self.apply(with_worker(build(), client, threads, seconds))
        self.delete_all_thrice(threads)

    def test_readme(self):
        self.deleted("readme", 1, 0.3)

    def test_readme_of_four_threads(self):
        self.deleted("readme", 4, 2)

    def test_readme_with_its_handler(self):
        self.deleted("finishing", 4, 2)

    def test_python(self):
        self.deleted("python", 1, 0.3)

    def test_python_of_four_threads(self):
        self.deleted("python", 4, 2)

    def test_patient(self):
        self.deleted("patient", 1, 0.3)

    def test_patient_of_four_threads(self):
        self.deleted("patient", 4, 2)



@needs_cluster
class TestInterruptions(ClusterCase):
    """What else ends a pod, or a container of it: three pods of four threads, 2 s a message."""

    THREADS = 4

    def start(self, client="python", change=lambda bot: None, replicas=3):
        objects = with_worker(build(), client, self.THREADS, 2, replicas)
        change(containers(objects)["bot"])
        self.apply(objects)
        return self.busy(self.THREADS)

    def in_pod(self, pod, script, *arguments, container="bot"):
        """Run a Python script in a container of a pod."""
        self.kubectl("exec", pod, "-c", container, "--", "python3", "-c", script, *arguments)

    def signal(self, pod, program, number, container="bot"):
        """Send a signal to the process of a pod that runs a program, from within a container."""
        self.in_pod(pod, SIGNAL, program, str(number), container=container)

    def restarted(self, pod, kind="containerStatuses"):
        """Wait until a container was restarted once."""
        self.kubectl("wait", "pod/" + pod, "--timeout=120s",
                     "--for=jsonpath={.status.%s[0].restartCount}=1" % kind)

    def works_again(self, pod, before):
        """Wait until a worker with another run than `before` works; return its run."""
        def run():
            self.wait_for_begun(self.THREADS, pod)
            return self.runs(pod) - before
        return until(run, "the restarted worker's first message")

    def runs(self, pod):
        """Return the runs of a worker in a pod: each of its processes is one."""
        return {message.partition("-")[0] for _, _, name, message in cluster.ask_recorder("records")
                if name == pod}

    def deleted(self, names, ignored=()):
        """Delete pods; no message is cut off, but for those of the runs that are to be ignored."""
        gone = self.delete(names)
        cut, begun = self.cut_off(names, ignored)
        self.report("gone after %.1f s, %d of %d messages cut off" % (gone, cut, begun))
        self.assertEqual(cut, 0)
        self.assertLess(gone, DRAINED_SECONDS)

    def test_rolling_update(self):
        names = self.start()
        began = time.monotonic()
        self.kubectl("rollout", "restart", "deployment/bot-echo")
        self.kubectl("rollout", "status", "deployment/bot-echo", "--timeout=300s")
        self.kubectl("wait", "--for=delete", "--timeout=120s", *["pod/" + name for name in names])
        cut, begun = self.cut_off(names)
        self.report("%d pods replaced in %.1f s, %d of %d messages cut off" % (
            len(names), time.monotonic() - began, cut, begun))
        self.assertEqual(cut, 0)

    def test_drain_of_the_node(self):
        """By evictions, one at a time, as the PodDisruptionBudget asks for."""
        names = self.start()
        node = self.pods()[names[0]]["spec"]["nodeName"]
        names = [name for name, pod in self.pods().items() if pod["spec"]["nodeName"] == node]
        self.addCleanup(cluster.kubectl, "uncordon", node)
        began = time.monotonic()
        drain = in_background(cluster.kubectl, "drain", node, "--pod-selector=" + LABEL,
                              "--timeout=200s")
        # The node is the only one here, so what is evicted is let in again, as another one would.
        cluster.kubectl("wait", "node/" + node, "--timeout=60s",
                        "--for=jsonpath={.spec.unschedulable}=true")
        cluster.kubectl("uncordon", node)
        drain()
        cut, begun = self.cut_off(names)
        self.report("%d pods evicted in %.1f s, %d of %d messages cut off" % (
            len(names), time.monotonic() - began, cut, begun))
        self.assertEqual(cut, 0)

    def test_deleted_in_its_first_second(self):
        """When it was just made, when its sidecar has started, and when its worker has."""
        states = ("jsonpath={.spec.nodeName}", "condition=Initialized",
                  "jsonpath={.status.phase}=Running")
        cluster.apply(with_worker(build(), "python", self.THREADS, 2, replicas=0))
        for state in states:
            self.kubectl("scale", "deployment/bot-echo", "--replicas=1")
            name, = until(self.pods, "a pod")
            self.kubectl("wait", "pod/" + name, "--for=" + state, "--timeout=60s")
            self.kubectl("scale", "deployment/bot-echo", "--replicas=0")
            began = time.monotonic()
            self.kubectl("wait", "--for=delete", "pod/" + name, "--timeout=120s")
            gone = time.monotonic() - began
            cut, begun = self.cut_off([name])
            self.report("at %s: gone after %.1f s, %d of %d messages cut off" % (
                state, gone, cut, begun))
            self.assertEqual(cut, 0)
            self.assertLess(gone, DRAINED_SECONDS)

    def test_liveness_failure(self):
        """It restarts the worker's container alone: the sidecar drains, and serves again."""
        def probe(bot):
            bot["livenessProbe"] = {"httpGet": {"path": "/health", "port": 8000},
                                    "periodSeconds": 1, "failureThreshold": 2}
        name, = self.start(change=probe, replicas=1)
        before = self.runs(name)
        began = time.monotonic()
        self.signal(name, "/pods/worker.py", 12)
        self.restarted(name)
        self.works_again(name, before)
        self.report("worked again after %.1f s" % (time.monotonic() - began))
        self.assertEqual(self.cut_off([name], self.runs(name) - before)[0], 0)
        self.kubectl("wait", "pod/" + name, "--for=condition=Ready", "--timeout=60s")
        self.busy(self.THREADS)
        self.deleted([name])

    def test_worker_killed_for_its_memory(self):
        """What it had in hand is lost; that does not hold up the pod's end, nor is more lost."""
        name, = self.start(replicas=1)
        before = self.runs(name)
        self.signal(name, "/pods/worker.py", 10)
        self.restarted(name)
        self.kubectl("wait", "pod/" + name, "--timeout=10s", "--for=jsonpath={.status."
                     "containerStatuses[0].lastState.terminated.reason}=OOMKilled")
        self.works_again(name, before)
        self.busy(self.THREADS)
        self.deleted([name], ignored=before)

    def test_sidecar_killed(self):
        """It comes again with a count of zero, and counts what is begun from then on."""
        name, = self.start(replicas=1)
        self.signal(name, "/app/sidecar.py", 9, container="sidecar")
        self.restarted(name, "initContainerStatuses")
        self.kubectl("wait", "pod/" + name, "--for=condition=Ready", "--timeout=60s")
        self.busy(2 * self.THREADS)
        self.deleted([name])


@needs_cluster
class TestOverlays(ClusterCase):
    def test_pre_1_29(self):
        """The sidecar is an ordinary container, and told to go at the same time as the worker."""
        for client, threads, seconds in ("python", 4, 2), ("readme", 1, 0.3):
            with self.subTest(client=client):
                self.apply(with_worker(build(["pre-1.29"]), client, threads, seconds))
                self.delete_all_thrice(threads)
                self.empty()

    def test_both_in_either_order(self):
        """They build the same Deployment: the sidecar first, then the worker."""
        orders = ["pre-1.29", "kafka-sasl"], ["kafka-sasl", "pre-1.29"]
        one, other = (pick(build(order), "Deployment") for order in orders)
        self.assertEqual([part["name"] for part in one["spec"]["template"]["spec"]["containers"]],
                         ["sidecar", "bot"])
        self.assertEqual(one, other)


@needs_cluster
@needs_broker
class TestKafka(ClusterCase, KafkaCase):
    """The bot as the manifests have it, with KEDA and a broker."""

    brokers = os.environ.get("CLUSTER_KAFKA", "10.200.0.1:9092")
    # Updates that are written and not answered: several times what is answered between two looks,
    # or the lag is next to nothing now and then, and pods come only after it has lasted.
    IN_HAND = 2000

    def setUp(self):
        super().setUp()
        KafkaCase.setUp(self)

    def use_topics_of(self, objects):
        """Make the topics of the manifests new, and the group with them."""
        names = pick_settings(objects)
        self.incoming, self.outgoing = names["KAFKA_INCOMING_TOPIC"], names["KAFKA_OUTGOING_TOPIC"]
        admin, own = self.admin(), {self.incoming, self.outgoing}
        old = sorted(own & set(admin.list_topics().topics))
        for future in admin.delete_topics(old).values() if old else ():
            future.result()
        until(lambda: not own & set(admin.list_topics().topics), "the old topics' end")
        self.topics(incoming=10, outgoing=3)
        self.written, self.replies = {}, Replies(self)

    def wait_for_no_pods(self, seconds):
        self.kubectl("wait", "--for=delete", "pods", "-l", LABEL, "--timeout=%ds" % seconds)

    def start(self, objects):
        """Apply the manifests; return when KEDA has taken the Deployment to zero."""
        self.use_topics_of(objects)
        cluster.apply(objects)
        self.kubectl("wait", "scaledobject/bot-echo", "--for=condition=Ready", "--timeout=120s")
        self.wait_for_no_pods(240)

    def write_updates(self, count):
        """Write updates, and keep the time at which each came to the broker, ms."""
        def delivered(error, record):
            self.assertIsNone(error)
            text = json.loads(record.value())["update"]["message"]["text"]
            self.written["Echo: " + text] = record.timestamp()[1]
        first = len(self.written)
        self.write([dict(key=str(number % 50), value=envelope(number, number % 50, "echo"),
                         on_delivery=delivered) for number in range(first, first + count)])

    def write_while(self, goes_on, at_least):
        """Keep IN_HAND updates unanswered, as long as goes_on() and until at_least were written."""
        while goes_on() or len(self.written) < at_least:
            self.replies.read_some()
            self.write_updates(self.IN_HAND - (len(self.written) - len(self.replies.texts)))

    def all_answered_once(self):
        """Every update was answered exactly once; report how long that took."""
        self.replies.read(len(self.written)).rest()
        texts = set(self.written) | set(self.replies.texts)
        wrong = {text: self.replies.texts[text] for text in texts
                 if self.replies.texts[text] != 1 or text not in self.written}
        self.assertEqual(wrong, {}, "how often what was not answered exactly once was answered")
        waits = sorted((record.timestamp()[1] - self.written[text_of(record)]) / 1000
                       for record in self.replies.records)
        self.report("%d updates, each answered once: p50 %.2f s, p99 %.2f s, the longest %.2f s" % (
            len(waits), waits[len(waits) // 2], waits[len(waits) * 99 // 100], waits[-1]))

    def test_whole_story(self):
        """From no pod to five and back, with 3,000 updates at least."""
        self.start(with_broker(build(), self.brokers))
        began = time.monotonic()
        five = in_background(self.kubectl, "wait", "deployment/bot-echo", "--timeout=300s",
                             "--for=jsonpath={.status.readyReplicas}=5")
        self.write_while(five.goes_on, 3000)
        five()
        self.report("five pods after %.1f s" % (time.monotonic() - began))
        self.all_answered_once()
        began = time.monotonic()
        self.wait_for_no_pods(1200)
        self.report("no pod after %.1f s" % (time.monotonic() - began))
        self.all_answered_once()

    @needs("the broker of .ci/cluster, which has a listener with SASL and TLS", OWN)
    def test_sasl(self):
        """KEDA and the bot log in as the overlay says; with pre-1.29 as well, and pods deleted."""
        with open(cluster.kubectl("config", "view", "-o", "jsonpath={.clusters[0].cluster."
                                  "certificate-authority}")) as file:
            ca = {"apiVersion": "v1", "kind": "Secret", "stringData": {"ca.crt": file.read()},
                  "metadata": {"name": "kafka-ca", "namespace": BOT}}
        for components in ["kafka-sasl"], ["pre-1.29", "kafka-sasl"]:
            with self.subTest(components=components):
                objects = build(components,
                                "KAFKA_SASL_USERNAME=bot\nKAFKA_SASL_PASSWORD=secret\n")
                self.start(with_broker(objects + [ca], "10.200.0.1:9094"))
                ready = in_background(self.kubectl, "wait", "deployment/bot-echo", "--timeout=300s",
                                      "--for=jsonpath={.status.readyReplicas}=1")
                self.write_while(ready.goes_on, 3000)
                ready()
                deleted = in_background(self.delete, self.pods())
                self.write_while(deleted.goes_on, 5000)
                self.report("gone after %.1f s" % deleted())
                self.all_answered_once()
                self.empty()


@needs_cluster
class TestHook(ClusterCase):
    def test_http_get(self):
        """A preStop hook for a worker's image without Python: the node calls the sidecar."""
        objects = with_worker(build(), "python", 4, 2)
        callers = cluster.ask_recorder("callers")
        self.assertEqual(len(callers), 1, "the node's address")
        bot, sidecar = (containers(objects)[name] for name in ("bot", "sidecar"))
        bot["lifecycle"] = {"preStop": {"httpGet": {"path": "/drain", "port": 8081}}}
        sidecar["env"].append({"name": "TRUSTED_CLIENTS", "value": callers[0]})
        self.apply(objects)
        self.delete_all_thrice(4)


@needs_cluster
class TestPodSecurity(ClusterCase):
    def test_restricted(self):
        """The namespace refuses what does not keep to the standard, and lets the pods in."""
        objects = build()
        cluster.apply([pick(objects, "Namespace")])
        with self.assertRaisesRegex(AssertionError, "violates PodSecurity \"restricted"):
            self.kubectl("run", "violator", "--image=" + image_of_the_bot(), "--restart=Never")
        for components in [], ["pre-1.29"]:
            with self.subTest(components=components):
                self.apply(with_worker(build(components), "python", 1, 0.3))
                self.assertEqual(len(self.busy(1)), 3)


@needs_cluster
class TestPatch(ClusterCase):
    """README's patches, for a Deployment that knew nothing of the sidecar."""

    def test_two_containers(self):
        text, = [block for block in readme_blocks("yaml")
                 if "preStop" in block and "initContainers" in block]
        self.assertLessEqual(len(text.splitlines()), 18)
        self.patched(text)

    def test_one_container(self):
        text, = [block for block in readme_blocks("yaml") if "run, --" in block]
        self.patched(text.replace("/app/worker.py", "/pods/worker.py"))

    def patched(self, text):
        """Patch such a Deployment, and delete its pods at work."""
        import yaml
        patch = yaml.safe_load(text)["spec"]["template"]["spec"]
        objects = with_worker(build(), "python", 4, 2)
        # The patch says nothing of privileges, as the Deployment that it is for may not either.
        pick(objects, "Namespace")["metadata"]["labels"].update(
            {"pod-security.kubernetes.io/enforce": "privileged"})
        spec = pick(objects, "Deployment")["spec"]["template"]["spec"]
        del spec["initContainers"], spec["terminationGracePeriodSeconds"]
        del spec["shareProcessNamespace"], spec["containers"][0]["lifecycle"]
        spec["containers"][0]["name"] = patch["containers"][0]["name"]
        self.apply(objects)
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            file.write(text)
            file.flush()
            self.kubectl("patch", "deployment", "bot-echo", "--patch-file", file.name)
        self.kubectl("rollout", "status", "deployment/bot-echo", "--timeout=300s")
        self.delete_all_thrice(4)


@needs_cluster
class TestIdleFirst(OnCluster, Case):
    KUBECTL = cluster.command()

    def setUp(self):
        cluster.start()
        super().setUp()


if __name__ == "__main__":
    unittest.main(verbosity=2)
