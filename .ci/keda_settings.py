"""Measures KEDA's settings: `python .ci/keda_settings.py [MINUTES]`, 15 without a number.

Two light streams of updates, one every 5 s and 4 a second, meet the bot of the manifests under each
of SETTINGS, all at the same time, each in a namespace of its own. Printed are cold starts (from no
pod; the first update is one), how long updates waited for their answer, and what it cost in pods.
It wants what .ci/tests/test_cluster.py wants, and a machine that does nothing else.
"""
import collections
import json
import os
import subprocess
import sys
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "tests"))

from support import until           # noqa: E402
from test_cluster import (          # noqa: E402
    LABEL, TestKafka, build, cluster, pick, pick_settings, with_broker)
from test_kafka import envelope     # noqa: E402

# pollingInterval and cooldownPeriod, s; lagThreshold, updates; the HPA's stabilizationWindowSeconds
Setting = collections.namedtuple("Setting", "polling cooldown lag window_up window_down")
SETTINGS = [Setting(10, 120, 5, 0, 120), Setting(10, 600, 16, 30, 120),
            Setting(5, 300, 16, 30, 120), Setting(5, 600, 16, 30, 120),
            Setting(5, 900, 16, 30, 120)]
PERIODS = [5, 0.25]         # s between two updates
APART_SECONDS = 5           # between the starts of two streams: cold starts slow each other


class Trial:
    """One setting under one stream."""

    def __init__(self, number, setting, period):
        self.setting, self.period = setting, period
        self.space = "keda-%d-%d" % (os.getpid(), number)
        self.began = time.monotonic()                       # when its stream did
        self.incoming, self.outgoing = self.space + "-in", self.space + "-out"
        self.written, self.answered = {}, {}                # by text: ms since the epoch
        self.seen = [(time.monotonic(), 0)]                 # how many pods there were, from when on

    def objects(self):
        """Return the manifests with this setting, in a namespace of its own."""
        objects = with_broker(build(), TestKafka.brokers)
        for thing in objects:
            name = thing["metadata"]
            name["name" if thing["kind"] == "Namespace" else "namespace"] = self.space
        pick_settings(objects).update(
            KAFKA_INCOMING_TOPIC=self.incoming, KAFKA_OUTGOING_TOPIC=self.outgoing,
            KAFKA_CONSUMER_GROUP=self.space)
        scaled = pick(objects, "ScaledObject")["spec"]
        scaled.update(pollingInterval=self.setting.polling, cooldownPeriod=self.setting.cooldown)
        scaled["triggers"][0]["metadata"]["lagThreshold"] = str(self.setting.lag)
        behavior = scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        behavior["scaleDown"]["stabilizationWindowSeconds"] = self.setting.window_down
        behavior["scaleUp"] = {"stabilizationWindowSeconds": self.setting.window_up}
        return objects

    def stream(self, producer, seconds):
        """Write an update each period for so long."""
        number, due = 0, self.began
        while due < self.began + seconds:
            time.sleep(max(due - time.monotonic(), 0))
            producer.produce(self.incoming, envelope(number, number % 50, "echo"),
                             key=str(number % 50), on_delivery=self.delivered)
            producer.poll(0)
            number, due = number + 1, due + self.period

    def delivered(self, error, record):
        if error:
            raise SystemExit("%s: %s" % (self.incoming, error))
        text = json.loads(record.value())["update"]["message"]["text"]
        self.written["Echo: " + text] = record.timestamp()[1]

    def row(self, seconds):
        """Return the table's row of what happened in the `seconds` of the stream."""
        over_at = self.began + seconds
        counts = [(max(at, self.began), count) for at, count in self.seen if at < over_at]
        ends = [at for at, _ in counts[1:]] + [over_at]
        pod_seconds = sum(count * (end - at) for (at, count), end in zip(counts, ends))
        cold = sum(count > 0 == before for (_, before), (_, count) in zip(counts, counts[1:]))
        waits = sorted((self.answered[text] - at) / 1000 for text, at in self.written.items())
        return "| %d | %d | %d | %d | %d | %g | %d | %.1f | %.1f | %d | %.1f |" % (
            self.setting + (self.period, cold, waits[len(waits) * 99 // 100], waits[-1],
                            max(count for _, count in counts), pod_seconds / 60))


def watch(trials):
    """Note from now on how many pods each Deployment has; return the process that tells."""
    kubectl = subprocess.Popen(
        cluster.command("get", "deployments", "-A", "-l", LABEL, "--watch", "-o", "jsonpath="
                        '{.metadata.namespace} {.status.replicas}{"\\n"}'),
        stdout=subprocess.PIPE, universal_newlines=True)
    by_space = {trial.space: trial for trial in trials}

    def read():
        for line in kubectl.stdout:
            space, _, count = line.strip().partition(" ")
            if space in by_space:
                by_space[space].seen.append((time.monotonic(), int(count or 0)))
    threading.Thread(target=read, daemon=True).start()
    return kubectl


def make_topics(trials):
    from confluent_kafka.admin import AdminClient, NewTopic
    admin = AdminClient({"bootstrap.servers": TestKafka.brokers})
    for future in admin.create_topics(
            [NewTopic(trial.incoming, 10, 1) for trial in trials]
            + [NewTopic(trial.outgoing, 1, 1) for trial in trials]).values():
        future.result()


def read_answers(trials):
    """Return a consumer of all answers, and a function that notes what has come."""
    from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition
    consumer = Consumer({"bootstrap.servers": TestKafka.brokers, "group.id": "answers"})
    consumer.assign([TopicPartition(trial.outgoing, 0, OFFSET_BEGINNING) for trial in trials])
    by_topic = {trial.outgoing: trial for trial in trials}

    def read():
        for record in consumer.consume(500, timeout=0.5):
            if not record.error():
                text = json.loads(record.value())["params"]["text"]
                by_topic[record.topic()].answered[text] = record.timestamp()[1]
        return all(trial.written.keys() <= trial.answered.keys() for trial in trials)
    return consumer, read


def measure(trials, seconds):
    """Run the streams, and print the table."""
    from confluent_kafka import Producer
    producer = Producer({"bootstrap.servers": TestKafka.brokers})
    consumer, read = read_answers(trials)
    streams = []
    for trial in trials:
        trial.began = time.monotonic()
        streams.append(threading.Thread(target=trial.stream, args=(producer, seconds)))
        streams[-1].start()
        while time.monotonic() < trial.began + APART_SECONDS:
            read()
    while any(stream.is_alive() for stream in streams):
        read()
    producer.flush()
    until(read, "the last answers")
    consumer.close()
    print("| pollingInterval | cooldownPeriod | lagThreshold | window up, s | window down, s | an "
          "update each, s | cold starts | wait p99, s | longest wait, s | most pods | pod-minutes |"
          "\n" + "|---:" * 11 + "|")
    for trial in trials:
        print(trial.row(seconds), flush=True)


def main():
    minutes = float(sys.argv[1]) if sys.argv[1:] else 15
    trials = [Trial(number, *what) for number, what in enumerate(
        (setting, period) for setting in SETTINGS for period in PERIODS)]
    spaces = [trial.space for trial in trials]
    cluster.start()
    try:
        make_topics(trials)
        for trial in trials:
            cluster.apply(trial.objects())
        kubectl = watch(trials)
        until(lambda: all(len(trial.seen) > 1 and trial.seen[-1][1] == 0 for trial in trials),
              "a start without pods")
        measure(trials, minutes * 60)
        kubectl.terminate()
        kubectl.wait()
    finally:
        cluster.kubectl("delete", "namespace", "--ignore-not-found", *spaces)
        cluster.stop()


main()
