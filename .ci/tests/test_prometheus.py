"""A real Prometheus, promtool and the reference parsers read what the sidecar exposes."""
import http.server
import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
import threading
import unittest
import urllib.parse

from support import OPENMETRICS, PATIENCE, Case, needs, samples, until

PROMETHEUS = shutil.which("prometheus") and shutil.which("promtool")
PROMETHEUS_CLIENT = importlib.util.find_spec("prometheus_client")


@needs("prometheus_client", PROMETHEUS_CLIENT)
class TestPrometheusClient(Case):
    """The reference parsers read what is exposed, and read the same."""

    def check(self, parse, accept):
        sidecar = self.sidecar()
        durations = (0.001, 0.005, 0.2, 3, 1000)
        for seconds in durations:
            sidecar.post("/start-request")
            sidecar.post("/end-request?duration=%s" % seconds)
        sidecar.post("/start-request")
        sidecar.post("/end-request?id=none")
        text = sidecar.prometheus(accept)
        families = {family.name: family for family in parse(text)}
        read = {}
        for family in families.values():
            self.assertTrue(family.documentation, family.name)
            self.assertNotEqual(family.type, "unknown", family.name)
            for sample in family.samples:
                labels = ",".join('%s="%s"' % pair for pair in sample.labels.items())
                read[sample.name + ("{%s}" % labels if labels else "")] = sample.value
                self.assertEqual((sample.timestamp, sample.exemplar), (None, None))
        self.assertEqual(read, samples(text))
        self.assertEqual(len(read), sum(not line.startswith("#") for line in text.splitlines()))
        self.assertEqual(families["sidecar_requests"].type, "counter")
        self.assertEqual([read["sidecar_" + name] for name in (
            "requests_total", "active_requests", "unmatched_ends_total",
            "request_duration_seconds_count",
            'request_duration_seconds_bucket{le="0.25"}')], [6, 1, 1, 5, 3])
        self.assertAlmostEqual(read["sidecar_request_duration_seconds_sum"], sum(durations))
        return families

    def test_text(self):
        from prometheus_client.parser import text_string_to_metric_families as parse
        families = self.check(parse, "text/plain")
        self.assertEqual(families["sidecar_info"].type, "gauge")

    def test_openmetrics(self):
        from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse
        families = self.check(parse, OPENMETRICS)
        self.assertEqual(families["sidecar"].type, "info")


@needs("Prometheus", PROMETHEUS)
class TestPrometheusServer(Case):
    """A real Prometheus scrapes a real sidecar.

    It does so as OpenMetrics, and as text by way of a relay that asks for that.
    """

    def setUp(self):
        self.watched = self.sidecar()
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder, ignore_errors=True)
        config = os.path.join(folder, "prometheus.yml")
        jobs = [{"job_name": name, "static_configs": [{"targets": ["127.0.0.1:%d" % port]}]}
                for name, port in (("openmetrics", self.watched.metrics_port),
                                   ("text", self.relay()))]
        with open(config, "w") as file:
            json.dump({"global": {"scrape_interval": "500ms", "scrape_timeout": "500ms"},
                       "scrape_configs": jobs}, file)
        self.prometheus = self.program("prometheus", "--config.file=" + config,
                                       "--storage.tsdb.path=" + folder,
                                       "--web.listen-address=127.0.0.1:0")
        listening = self.prometheus.wait_for(r'msg="Listening on" address=127.0.0.1:(\d+)')
        self.port = int(listening.group(1))
        self.prometheus.wait_for("Server is ready")

    def relay(self):
        """Return the port of a relay, which asks the watched sidecar for text."""
        case = self

        class Relay(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                text = case.watched.prometheus("text/plain").encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def handle(self):
                try:
                    super().handle()
                except OSError:                 # Nobody to relay from: the scrape has failed.
                    pass

            def log_message(self, *args):
                pass

        relay = http.server.HTTPServer(("127.0.0.1", 0), Relay)
        self.addCleanup(relay.server_close)
        self.addCleanup(relay.shutdown)
        threading.Thread(target=relay.serve_forever, args=(0.01,), daemon=True).start()
        return relay.server_port

    def ask(self, path, **query):
        """Return the data of Prometheus's answer.

        https://prometheus.io/docs/prometheus/latest/querying/api/
        """
        path = "/api/v1/%s?%s" % (path, urllib.parse.urlencode(query))
        status, answer = self.watched.call("GET", path, port=self.port)
        self.assertEqual((status, answer["status"]), (200, "success"), answer)
        return answer["data"]

    def wait_for(self, query, value):
        """Wait until both jobs have `value`."""
        def found():
            return {each["metric"]["job"]: float(each["value"][1])
                    for each in self.ask("query", query=query)["result"]}
        until(lambda: found() == {"openmetrics": value, "text": value}, "%s == %s" % (query, value))

    def test_it_scrapes_both_formats_and_sees_a_restart(self):
        self.wait_for("up", 1)
        for job, counter in (("openmetrics", "sidecar_requests"),
                             ("text", "sidecar_requests_total")):
            metadata = self.ask("targets/metadata", match_target='{job="%s"}' % job)
            known = {each["metric"]: each["type"] for each in metadata}
            self.assertEqual(known[counter], "counter")
            self.assertEqual(known["sidecar_request_duration_seconds"], "histogram")
        # Evenly spread, as histogram_quantile has it inside a bucket.
        for hundredths in range(1, 101):
            self.watched.post("/start-request")
            self.watched.post("/end-request?duration=%dms" % (10 * hundredths))
        self.wait_for("sidecar_request_duration_seconds_count", 100)
        for quantile in (0.1, 0.5, 0.75, 0.9, 1.0):
            estimate = "histogram_quantile(%s, sidecar_request_duration_seconds_bucket)" % quantile
            self.wait_for("round(%s, 0.000001)" % estimate, quantile)
        self.wait_for("sidecar_request_duration_seconds_sum", 50.5)
        self.wait_for("sidecar_active_requests", 0)
        self.watched.kill()
        self.wait_for("up", 0)
        self.watched = self.sidecar(METRICS_PORT=self.watched.metrics_port)
        self.watched.post("/start-request")
        self.wait_for("sidecar_active_requests", 1)
        self.wait_for("resets(sidecar_requests_total[1h])", 1)
        self.wait_for("resets(sidecar_request_duration_seconds_count[1h])", 1)

    def test_promtool_has_nothing_to_say(self):
        for path in (None, "/start-request", "/end-request?duration=1s", "/end-request",
                     "/start-request", "/reset"):
            if path:
                self.watched.post(path)
            checked = subprocess.run(["promtool", "check", "metrics"],
                                     input=self.watched.prometheus().encode(),
                                     stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                     timeout=PATIENCE)
            self.assertEqual((checked.returncode, checked.stdout), (0, b""))


if __name__ == "__main__":
    unittest.main(verbosity=2)
