"""Idle pods go first: POD_DELETION_COST, before a stand-in for the API server and on a cluster.

The stand-in speaks TLS, knows one pod and asks for its account's token. What only a real API server
and its controllers can tell is in OnCluster, which test_cluster.py runs. It runs here too where
KUBECONFIG is set: a Kubernetes 1.30 or newer, whose nodes have the image of the manifests; in a
namespace of its own.
"""
import http.server
import json
import os
import re
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import unittest

from support import (FILL, HERE, NAMESPACES, PATIENCE, Case, SidecarProcess, installed, needs, run,
                     until)

# Made for this file, valid until 2100. The CAs lack key identifiers, as those of some clusters do.
CA = """-----BEGIN CERTIFICATE-----
MIIBLDCB1KADAgECAgEBMAoGCCqGSM49BAMCMBUxEzARBgNVBAMMCmt1YmVybmV0
ZXMwIBcNMjAwMTAxMDAwMDAwWhgPMjEwMDAxMDEwMDAwMDBaMBUxEzARBgNVBAMM
Cmt1YmVybmV0ZXMwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAQFa5luP4r+YsPt
XYeUBAq9AVGSXu0/zJnLJlpF9fHmpeoi7ji71K5q1dRHWOKEWyD0cxP5HrS4XEAD
wQK3+XU+oxMwETAPBgNVHRMBAf8EBTADAQH/MAoGCCqGSM49BAMCA0cAMEQCIHwK
p0X1qP3pNE+LO5jk5tFcVQCyxxvKBCOCeQ7pWyqkAiBfOcxGtzYASmXeGlYPyDhP
E7VPRIDbe16TD4KGok0pJw==
-----END CERTIFICATE-----
"""
OTHER_CA = """-----BEGIN CERTIFICATE-----
MIIBLjCB1KADAgECAgECMAoGCCqGSM49BAMCMBUxEzARBgNVBAMMCmt1YmVybmV0
ZXMwIBcNMjAwMTAxMDAwMDAwWhgPMjEwMDAxMDEwMDAwMDBaMBUxEzARBgNVBAMM
Cmt1YmVybmV0ZXMwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAR8SNRFgs2WwHll
fHk/nmobe00OT0g5beQwbrMi+HwjLlpwoyfNesr/TFa5DsZZnsDycFGdjXbSGxVP
IJGpNbF+oxMwETAPBgNVHRMBAf8EBTADAQH/MAoGCCqGSM49BAMCA0kAMEYCIQD+
DosL/2XR6fFsPH3Xgo0CQT8aKDHAoY5/oq5zhpxFxAIhANa+aHgo2cNkRT5Wdgpk
8dVcrXYp/nvZUQr6p4SXEzz6
-----END CERTIFICATE-----
"""
SERVER = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgwzjvCTcujr9Fj/68
NiNB5L+0R12GUiRk3iFw1dVSao+hRANCAARCGoHL8GIqsOzwlZBrKzVLp1guqazk
cWMDVCHwxtXwDxNgvy7lGJfp60h/iCl600lBuuhrc5yPx1JxJQI42UMY
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBMTCB2KADAgECAgEDMAoGCCqGSM49BAMCMBUxEzARBgNVBAMMCmt1YmVybmV0
ZXMwIBcNMjAwMTAxMDAwMDAwWhgPMjEwMDAxMDEwMDAwMDBaMBkxFzAVBgNVBAMM
Dmt1YmUtYXBpc2VydmVyMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEQhqBy/Bi
KrDs8JWQays1S6dYLqms5HFjA1Qh8MbV8A8TYL8u5RiX6etIf4gpetNJQbroa3Oc
j8dScSUCONlDGKMTMBEwDwYDVR0RBAgwBocEfwAAATAKBggqhkjOPQQDAgNIADBF
AiEAymLQYDisD5KoWHSBOpU/wn97maSJ0TKhEsZJdK/RL/0CIAlOv/1g7Wjur1l8
3RlDtcHVouvp9wQjwQnMMcqf/lmq
-----END CERTIFICATE-----
"""

ANNOTATION = "controller.kubernetes.io/pod-deletion-cost"
NAMESPACE = "bots"
SOON = 0.2                      # seconds; COST_SECONDS of a test that need not wait for 10


class ApiServer(http.server.ThreadingHTTPServer):
    """One pod called `pod`, and the token that it takes.

    The next PATCHes get the `answers`, (status, content type, text, headers), while there are any.
    """

    daemon_threads = True

    def __init__(self, pod="worker-1", token="first-token"):
        super().__init__(("127.0.0.1", 0), Patch)
        self.pod, self.token = pod, token
        self.annotations, self.answers, self.patches = {}, [], []
        self.changed = threading.Condition()
        self.go_on = threading.Event()          # an answer of None waits for it
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:
            file.write(SERVER)
            file.flush()
            self.tls.load_cert_chain(file.name)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def finish_request(self, request, client_address):
        with self.tls.wrap_socket(request, server_side=True) as secured:
            super().finish_request(secured, client_address)

    def handle_error(self, request, client_address):
        pass                                    # a client that refused the certificate, or is gone

    def wait_for(self, count):
        """Wait until so many PATCHes have come; return the costs that they set."""
        with self.changed:
            self.changed.wait_for(lambda: len(self.patches) >= count, PATIENCE)
            costs = [patch["cost"] for patch in self.patches]
        if len(costs) < count:
            raise AssertionError("%d PATCHes, expected %d" % (len(costs), count))
        return costs

    def gaps(self):
        """Return the seconds between one PATCH and the next."""
        times = [patch["time"] for patch in self.patches]
        return [later - earlier for earlier, later in zip(times, times[1:])]


def status(code, reason, message):
    """Return an error as the API server tells it."""
    return code, "application/json", json.dumps(
        {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
         "message": message, "reason": reason, "code": code}), {}


class Patch(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_PATCH(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])).decode())
        patch = {"time": time.monotonic(), "path": self.path, "headers": self.headers, "body": body,
                 "cost": body["metadata"]["annotations"][ANNOTATION]}
        with server.changed:
            answer = server.answers.pop(0) if server.answers else self.answer(patch)
            server.patches.append(patch)
            server.changed.notify_all()
        if answer is None:
            server.go_on.wait()
            answer = self.answer(patch)
        self.reply(*answer)

    def answer(self, patch):
        server = self.server
        if self.headers["Authorization"] != "Bearer " + server.token:
            return status(401, "Unauthorized", "Unauthorized")
        if self.path != "/api/v1/namespaces/%s/pods/%s" % (NAMESPACE, server.pod):
            name = self.path.rpartition("/")[2]
            return status(404, "NotFound", 'pods "%s" not found' % name)
        if self.headers["Content-Type"] != "application/merge-patch+json":
            return status(415, "UnsupportedMediaType", "the body of the request was unknown")
        server.annotations.update(patch["body"]["metadata"]["annotations"])
        pod = {"kind": "Pod", "metadata": {"name": server.pod, "annotations": server.annotations}}
        return 200, "application/json", json.dumps(pod), {}

    def reply(self, code, content_type, text, headers):
        self.send_response(code)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(text)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


class IdleFirstCase(Case):
    """A test with an API server and the folder of the account's token."""

    def setUp(self):
        self.server = ApiServer()
        self.addCleanup(self.server.server_close)
        self.addCleanup(self.server.shutdown)
        self.addCleanup(self.server.go_on.set)
        self.folder = tempfile.mkdtemp() + "/"
        self.addCleanup(shutil.rmtree, self.folder)
        os.chmod(self.folder, 0o755)
        for name, text in (("token", self.server.token), ("namespace", NAMESPACE), ("ca.crt", CA)):
            self.write(name, text)

    def write(self, name, text):
        """Write a file of the account at once, as the kubelet does."""
        with open(self.folder + name + ".new", "w") as file:
            file.write(text)
        os.rename(file.name, self.folder + name)

    def settings(self, constants, **env):
        """Return the keywords of a SidecarProcess in the pod."""
        return dict(dict(
            constants=dict(dict(ACCOUNT_FOLDER=self.folder, COST_SECONDS=SOON,
                                POD_IDLE_SECONDS=SOON / 2), **constants),
            POD_DELETION_COST="true", POD_NAME=self.server.pod, KUBERNETES_SERVICE_HOST="127.0.0.1",
            KUBERNETES_SERVICE_PORT=self.server.server_address[1]), **env)

    def in_pod(self, *argv, constants=(), **env):
        return self.sidecar(*argv, **self.settings(dict(constants), **env))


class TestPatches(IdleFirstCase):
    """What is patched, and when."""

    def test_a_change_each_way(self):
        sidecar = self.in_pod()
        self.assertEqual(self.server.wait_for(1), ["0"])    # it may have been restarted at 1
        sidecar.post("/start-request")
        self.assertEqual(self.server.wait_for(2)[1:], ["1"])
        sidecar.post("/end-request")
        self.assertEqual(self.server.wait_for(3)[2:], ["0"])
        sidecar.post("/start-request")
        self.assertEqual(self.server.wait_for(4)[3:], ["1"])
        self.assertEqual(self.server.annotations, {ANNOTATION: "1"})
        self.assertGreaterEqual(min(self.server.gaps()), SOON)
        self.assertNotIn("not set", sidecar.whole_log())

    def test_what_is_sent(self):
        self.in_pod()
        self.server.wait_for(1)
        patch, = self.server.patches
        self.assertEqual(patch["path"], "/api/v1/namespaces/bots/pods/worker-1")
        self.assertEqual(patch["body"], {"metadata": {"annotations": {ANNOTATION: "0"}}})
        self.assertEqual(patch["headers"]["Authorization"], "Bearer first-token")
        self.assertEqual(patch["headers"]["Content-Type"], "application/merge-patch+json")
        self.assertRegex(patch["headers"]["User-Agent"], r"^sidecar/\d")

    def test_without_POD_NAME_the_host_is_called_as_the_pod(self):
        self.in_pod(POD_NAME=None, HOSTNAME="worker-1")
        self.server.wait_for(1)
        until(lambda: self.server.annotations, "the annotation")

    def test_once_in_ten_seconds(self):
        """With the seconds that a user has. The first request is told before they are over."""
        import sidecar as module
        self.assertGreaterEqual(module.COST_SECONDS, 10)
        sidecar = self.in_pod(constants={"COST_SECONDS": module.COST_SECONDS})
        sidecar.post("/start-request")
        self.assertEqual(self.server.wait_for(1), ["1"])
        sidecar.post("/end-request")
        self.assertEqual(self.server.wait_for(2), ["1", "0"])
        self.assertGreaterEqual(self.server.gaps()[0], 10)

    def test_the_wait_for_a_request(self):
        """It ends as soon as one starts, and where it was over before anybody could look."""
        import sidecar as module
        tracker = module.RequestTracker()
        for is_over in False, True:
            results = []
            waiting = threading.Thread(target=lambda: results.append(tracker.wait_until_busy()))
            waiting.daemon = True
            waiting.start()
            until(lambda: tracker._condition._waiters, "the thread to wait")
            with tracker._condition:            # the waiting thread cannot look in between
                tracker.start("a")
                if is_over:
                    tracker.end("a")
            waiting.join(PATIENCE)
            self.assertEqual(results, [True])
            self.assertIs(tracker.wait_until_busy(0.01), not is_over)
            tracker.end("a")

    def test_a_stream_of_short_requests_is_one_change(self):
        pause = 1.0
        sidecar = self.in_pod(constants={"POD_IDLE_SECONDS": pause})
        self.server.wait_for(1)
        over_at, latest, breaks = time.monotonic() + 5 * pause, None, 0
        while time.monotonic() < over_at:
            sidecar.post("/start-request")
            now = time.monotonic()
            breaks += latest is not None and now - latest > pause       # a machine that stood still
            latest = now
            sidecar.post("/end-request")
            time.sleep(pause / 20)              # idle mostly, but never for long
        changes = self.server.wait_for(2)[1:]
        self.assertEqual(changes[0], "1")
        self.assertLessEqual(len(changes), 1 + 2 * breaks)

    def test_a_new_token_is_read(self):
        sidecar = self.in_pod()
        self.server.wait_for(1)
        self.write("token", "second-token\n")
        self.server.token = "second-token"
        sidecar.post("/start-request")
        self.server.wait_for(2)
        until(lambda: self.server.annotations == {ANNOTATION: "1"}, "the annotation")
        self.assertEqual([patch["headers"]["Authorization"] for patch in self.server.patches],
                         ["Bearer first-token", "Bearer second-token"])

    def test_off_unless_asked_for(self):
        silent = [self.in_pod(POD_DELETION_COST=value) for value in (None, "", "false")]
        for sidecar in silent:
            sidecar.post("/start-request")
        self.in_pod(POD_NAME="worker-2", POD_DELETION_COST="True")
        self.assertEqual(self.server.wait_for(1), ["0"])
        self.assertEqual([patch["path"][-8:] for patch in self.server.patches], ["worker-2"])

    def test_other_values_are_refused(self):
        told = "sidecar: POD_DELETION_COST='yes': expected true or false"
        with self.assertRaisesRegex(AssertionError, told):
            SidecarProcess(POD_DELETION_COST="yes")

    def test_run(self):
        sidecar = self.in_pod("run", "--", sys.executable, "-c",
                              "import time; time.sleep(%d)" % PATIENCE)
        self.assertEqual(self.server.wait_for(1), ["0"])
        sidecar.signal(signal.SIGTERM)
        self.assertEqual(sidecar.wait(), 128 + signal.SIGTERM)


class TestDrains(IdleFirstCase):
    """Nobody waits for a PATCH, and a pod that is going is not patched."""

    def test_a_server_that_does_not_answer_delays_no_call_and_no_drain(self):
        self.server.answers = [None]
        sidecar = self.in_pod(constants={"COST_SECONDS": 10 * PATIENCE})    # so long a PATCH waits
        sidecar.post("/start-request")
        self.server.wait_for(1)
        for path in "/start-request", "/end-request", "/end-request":
            self.assertEqual(sidecar.post(path)[0], 200)
        sidecar.signal(signal.SIGTERM)
        self.assertEqual(sidecar.wait(), 0, sidecar.log)
        self.assertFalse(self.server.go_on.is_set())

    def test_nothing_is_patched_after_SIGTERM(self):
        sidecar = self.in_pod(QUIET_PERIOD_SECONDS=10 * SOON)   # so long it stays, and is idle
        sidecar.post("/start-request")
        until(lambda: self.server.annotations == {ANNOTATION: "1"}, "the annotation")
        before = len(self.server.patches)
        sidecar.signal(signal.SIGTERM)
        sidecar.wait_for("drain started")
        sidecar.post("/end-request")
        self.assertEqual(sidecar.wait(), 0, sidecar.log)
        self.assertEqual(len(self.server.patches), before)

    def test_a_drain_that_is_undone(self):
        sidecar = self.in_pod()
        sidecar.post("/start-request")
        until(lambda: self.server.annotations == {ANNOTATION: "1"}, "the annotation")
        sidecar.post("/end-request")
        self.assertEqual(sidecar.post("/drain")[0], 200)
        sidecar.post("/reset")
        until(lambda: self.server.annotations == {ANNOTATION: "0"}, "the annotation")

    @needs("root, whose children may become another user", NAMESPACES)
    def test_at_the_process_limit(self):
        """Its thread was started before the first connection was taken."""
        user = 40000 + os.getpid()              # nobody else's

        def become():
            resource.setrlimit(resource.RLIMIT_NPROC, (30, 30))
            os.setgid(user)
            os.setuid(user)
        settings = self.settings({})
        constants = settings.pop("constants")
        settings.update(SIDECAR_HOST="127.0.0.1", SIDECAR_PORT=0, METRICS_PORT=0)
        program = self.program(
            "/usr/bin/python3", "-c", "import sys; sys.path.insert(0, %r); import sidecar; "
            "vars(sidecar).update(%r); sidecar.main([])" % (HERE, constants),
            preexec_fn=become, cwd="/", env=settings)
        where = program.wait_for(r"listening api=http://(\S+):(\d+)")
        with socket.create_connection((where.group(1), int(where.group(2))),
                                      timeout=PATIENCE) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            self.assertIn(b" 200 ", connection.recv(65536))
            filler = self.program("/usr/bin/python3", "-c", FILL, preexec_fn=become, cwd="/",
                                  stdin=subprocess.PIPE)
            filler.wait_for("full")
            connection.sendall(b"POST /start-request HTTP/1.1\r\nHost: x\r\n\r\n")
            until(lambda: self.server.annotations == {ANNOTATION: "1"}, "the annotation")
        filler.process.stdin.close()
        self.assertEqual(filler.wait(), 0)


class TestFailures(IdleFirstCase):
    """It tries again, less and less often, and the log says once what is wrong."""

    BUSY = (429, "text/plain; charset=utf-8", "Too many requests, please try again later.\n",
            {"Retry-After": "1"})
    FORBIDDEN = status(
        403, "Forbidden", 'pods "worker-1" is forbidden: User "system:serviceaccount:bots:default" '
        'cannot patch resource "pods" in API group "" in the namespace "bots"')

    @staticmethod
    def warnings(log):
        return re.findall("pod deletion cost not set error=(.*)", log)

    def test_the_pauses_grow(self):
        self.server.answers = [
            status(500, "InternalError", "etcdserver: leader changed"),
            (503, "text/plain", "apiserver is shutting down", {}),
            status(409, "Conflict", "try again")]
        sidecar = self.in_pod()
        self.assertEqual(self.server.wait_for(4), ["0"] * 4)
        until(lambda: self.server.annotations == {ANNOTATION: "0"}, "the annotation")
        for gap, factor in zip(self.server.gaps(), (2, 4, 8)):
            self.assertGreaterEqual(gap, factor * SOON)
        sidecar.post("/start-request")
        self.server.wait_for(5)
        self.assertGreaterEqual(self.server.gaps()[-1], SOON)
        self.assertEqual(self.warnings(sidecar.whole_log()), [
            '"500 etcdserver: leader changed"', '"503 apiserver is shutting down"',
            '"409 try again"'])

    def test_they_grow_to_a_limit(self):
        self.server.answers = [self.BUSY[:3] + ({},)] * 12      # 800 s, if each pause was doubled
        sidecar = self.in_pod(constants={"COST_RETRY_SECONDS": SOON})
        self.server.wait_for(13)
        until(lambda: self.server.annotations, "the annotation")
        self.assertEqual(self.warnings(sidecar.whole_log()),
                         ['"429 Too many requests, please try again later."'])

    def test_the_pause_that_the_server_asks_for(self):
        self.server.answers = [self.BUSY]
        self.in_pod(constants={"COST_SECONDS": 0.4})        # the time-out of a call as well
        self.server.wait_for(2)
        self.assertGreaterEqual(self.server.gaps()[0], 1)

    def test_what_is_true_by_then_is_told(self):
        sidecar = self.in_pod()
        self.server.wait_for(1)
        self.server.answers = [self.BUSY]
        sidecar.post("/start-request")
        self.assertEqual(self.server.wait_for(2), ["0", "1"])
        sidecar.post("/end-request")
        self.assertEqual(self.server.wait_for(3), ["0", "1", "0"])

    def test_no_right(self):
        self.server.answers = [self.FORBIDDEN] * 4
        sidecar = self.in_pod(constants={"COST_RETRY_SECONDS": SOON})
        self.server.wait_for(5)
        until(lambda: self.server.annotations, "the annotation")
        message = json.loads(self.FORBIDDEN[2])["message"]
        self.assertEqual([json.loads(text) for text in self.warnings(sidecar.whole_log())],
                         ["403 " + message])

    def test_it_is_told_again_when_it_was_well_meanwhile(self):
        sidecar = self.in_pod()
        for count in 1, 2:
            self.server.answers = [self.FORBIDDEN]
            sidecar.post("/start-request")
            until(lambda: len(self.warnings(sidecar.log)) == count, "the warning")
            until(lambda: self.server.annotations == {ANNOTATION: "1"}, "the annotation")
            sidecar.post("/end-request")
            until(lambda: self.server.annotations == {ANNOTATION: "0"}, "the annotation")

    def test_another_pods_name(self):
        sidecar = self.in_pod(POD_NAME="worker-9")
        sidecar.wait_for(r'not set error="404 pods \\"worker-9\\" not found"')

    def test_no_token(self):
        os.unlink(self.folder + "token")
        sidecar = self.in_pod(constants={"COST_RETRY_SECONDS": SOON})
        sidecar.wait_for("not set error=.*%stoken is missing" % self.folder)
        self.assertEqual(sidecar.post("/start-request")[0], 200)
        self.write("token", self.server.token)
        until(lambda: self.server.annotations == {ANNOTATION: "1"}, "the annotation")
        self.assertEqual(len(self.warnings(sidecar.whole_log())), 1)

    def test_no_pod(self):
        sidecar = self.in_pod(KUBERNETES_SERVICE_HOST=None)
        sidecar.wait_for("not set error=.*KUBERNETES_SERVICE_HOST")
        self.assertEqual(sidecar.post("/start-request")[0], 200)

    def test_no_server(self):
        with socket.socket() as closed:         # bound, so nobody else's, and not listening
            closed.bind(("127.0.0.1", 0))
            sidecar = self.in_pod(KUBERNETES_SERVICE_PORT=closed.getsockname()[1])
            sidecar.wait_for("not set error=.*ConnectionRefusedError")
            self.assertEqual(sidecar.post("/start-request")[0], 200)

    def test_a_server_that_the_CA_did_not_sign_gets_no_token(self):
        self.write("ca.crt", OTHER_CA)
        sidecar = self.in_pod()
        sidecar.wait_for("not set error=.*CERTIFICATE_VERIFY_FAILED")
        self.assertEqual(self.server.patches, [])

    def test_a_server_of_another_name_gets_no_token(self):
        sidecar = self.in_pod(KUBERNETES_SERVICE_HOST="localhost")
        sidecar.wait_for("not set error=.*[Cc]ertificate.*localhost")
        self.assertEqual(self.server.patches, [])


SPACE = "idle-first"            # the namespace of the tests, in place of the manifests' own
SCALED_DOWN = 3                 # times

# The sidecar's calls, from the bot's container.
CALL = """
import sys, urllib.request
for path in sys.argv[1:]:
    urllib.request.urlopen("http://127.0.0.1:8081" + path, b"").read()
"""
# Requests of 10 ms, 50 a second, for a minute.
LOAD = """
import http.client, time
connection = http.client.HTTPConnection("127.0.0.1", 8081)
def call(path):
    connection.request("POST", path)
    connection.getresponse().read()
began = time.monotonic()
for number in range(3000):
    time.sleep(max(0, began + number / 50 - time.monotonic()))
    call("/start-request")
    time.sleep(0.01)
    call("/end-request")
print(time.monotonic() - began)
"""
# PATCHes with the account's token; prints the status of each, and what the API server says.
ATTEMPTS = """
import http.client, json, os, ssl, sys
folder = "/var/run/secrets/kubernetes.io/serviceaccount/"
context = ssl.create_default_context(cafile=folder + "ca.crt")
for method, path, content_type, body in json.loads(sys.argv[1]):
    connection = http.client.HTTPSConnection(os.environ["KUBERNETES_SERVICE_HOST"],
                                             os.environ["KUBERNETES_SERVICE_PORT"], context=context)
    connection.request(method, path, json.dumps(body), {
        "Authorization": "Bearer " + open(folder + "token").read(),
        "Content-Type": "application/" + content_type})
    answer = connection.getresponse()
    told = json.loads(answer.read())
    print(answer.status, told.get("message", ""))
"""


def account_calls(own, other):
    """Return the calls that the policy allows to the account of the pod `own`, and some of those
    that it refuses: [(method, path, kind of body, body), ...].
    """
    path = "/api/v1/namespaces/%s/pods/" % SPACE

    def patch(metadata, pod=own, spec=None, kind="merge-patch+json", sub=""):
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata}
        return "PATCH", path + pod + sub, kind, dict(body, spec=spec) if spec else body

    def cost(value):
        return {"annotations": {ANNOTATION: value}}
    image = {"containers": [{"name": "bot", "image": "other"}]}
    strategic = "strategic-merge-patch+json"
    allowed = [patch(cost("1")), patch(cost("0"), kind=strategic)]
    return allowed, [
        patch(cost("1"), pod=other), patch(cost("2")), patch(cost("-1")), patch(cost(None)),
        patch({"annotations": {ANNOTATION: "1", "other": "1"}}),
        patch({"annotations": {"kubectl.kubernetes.io/default-container": "sidecar"}}),
        patch({"annotations": {"kubectl.kubernetes.io/default-container": None}}),
        patch({"annotations": None}), patch({"labels": {"other": "1"}}),
        patch({"labels": {"app.kubernetes.io/name": None}}),
        patch({"finalizers": ["example.com/stay"]}), patch({"ownerReferences": None}),
        patch({}, spec={"activeDeadlineSeconds": 1}), patch({}, spec=image, kind=strategic),
        patch(cost("1"), sub="/status"), patch(cost("1"), sub="/ephemeralcontainers"),
        patch({"name": "new"}, pod="new", kind="apply-patch+yaml", sub="?fieldManager=other",
              spec=image),
        ("GET", path + own, "json", None), ("DELETE", path + own, "json", None)]


class OnCluster:
    """Tests of three pods of the manifests whose worker does what the test says."""

    KUBECTL = ["kubectl"]

    def setUp(self):
        self.kubectl("delete", "namespace", SPACE, "--ignore-not-found")
        self.addCleanup(self.kubectl, "delete", "--ignore-not-found",
                        "validatingadmissionpolicybinding,validatingadmissionpolicy",
                        "bot-echo-idle-first")
        self.addCleanup(self.kubectl, "delete", "namespace", SPACE, "--wait=false")

    def kubectl(self, *arguments, objects=None):
        """Run kubectl in the tests' namespace to its end and return what it printed."""
        command = self.KUBECTL + ["--namespace", SPACE]
        if objects is None:
            return run(*command, *arguments)
        with tempfile.TemporaryFile() as file:
            for thing in objects:
                file.write(json.dumps(thing).encode() + b"\n---\n")
            file.seek(0)
            return run(*command, *arguments, "-f", "-", stdin=file)

    def apply(self, components):
        """Apply the manifests with these overlays, restricted, without KEDA and with no pod."""
        from test_manifests import containers, kustomize, pick
        objects = json.loads(json.dumps(kustomize(components=components)).replace(
            "telegram-serverless", SPACE))
        objects = [thing for thing in objects if "keda.sh" not in thing["apiVersion"]]
        pick(objects, "Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] = \
            "restricted"
        containers(objects)["bot"]["command"] = ["python3", "-c", "import time; time.sleep(1e6)"]
        pick(objects, "Deployment")["spec"]["replicas"] = 0
        self.kubectl("apply", objects=objects)
        return objects

    def scale(self, replicas):
        """Scale, and wait until all pods are there; return their names."""
        self.kubectl("scale", "deployment/bot-echo", "--replicas=%d" % replicas)
        self.kubectl("rollout", "status", "deployment/bot-echo", "--timeout=180s")
        return self.pods()

    def pods(self):
        """Return the names of the pods that are not on their way out."""
        listed = json.loads(self.kubectl("get", "pods", "-o", "json"))["items"]
        return {pod["metadata"]["name"] for pod in listed
                if "deletionTimestamp" not in pod["metadata"]}

    def with_youngest(self):
        """Scale to two pods and then to three; return all and the third."""
        older = self.scale(2)
        pods = self.scale(3)
        youngest, = pods - older
        return pods, youngest

    def call(self, pod, *paths):
        self.kubectl("exec", pod, "-c", "bot", "--", "python3", "-c", CALL, *paths)

    def wait_for_cost(self, pod, cost):
        escaped = ANNOTATION.replace(".", "\\.")
        self.kubectl("wait", "pod/" + pod, "--timeout=120s",
                     "--for=jsonpath={.metadata.annotations.%s}=%s" % (escaped, cost))

    def report(self, text):
        print("%s: %s" % (self.id().partition(".")[2], text), flush=True)

    def test_the_busy_one_stays(self):
        """Of three, the youngest, which is the first to go where the sidecar tells nothing."""
        for components, stays in ([], False), (["idle-first"], True), \
                (["pre-1.29", "idle-first"], True):
            with self.subTest(components=components):
                self.apply(components)
                times = SCALED_DOWN if components == ["idle-first"] else 1
                stayed = [self.scaled_down(bool(components)) for _ in range(times)]
                self.report("%s: the busy one stayed %d times of %d" % (
                    " ".join(components) or "no overlay", sum(stayed), times))
                self.assertEqual(stayed, [stays] * times)
                self.kubectl("delete", "deployment", "bot-echo")

    def scaled_down(self, told):
        """Scale three pods down to one; return whether it is the youngest, which is busy."""
        pods, youngest = self.with_youngest()
        self.call(youngest, "/start-request")
        if told:
            for pod in pods:
                self.wait_for_cost(pod, int(pod == youngest))
        self.scale(1)
        left, = until(lambda: len(self.pods()) == 1 and self.pods(), "two pods to go")
        self.call(youngest, "/end-request")     # wherever it is, it is still at work
        self.kubectl("wait", "--for=delete", "--timeout=120s",
                     *["pod/" + name for name in pods - {left}])
        return left == youngest

    def test_the_account_can_do_nothing_else(self):
        self.apply(["idle-first"])
        pods, own = self.with_youngest()
        self.wait_for_cost(own, 0)
        allowed, refused = account_calls(own, other=min(pods - {own}))
        told = self.kubectl("exec", own, "-c", "sidecar", "--", "python3", "-c", ATTEMPTS,
                            json.dumps(allowed + refused)).splitlines()
        for (method, path, _, body), line in zip(allowed + refused, told):
            self.report("%s %s %s: %s" % (method, path.partition(SPACE)[2], json.dumps(body), line))
        self.assertEqual([line.split()[0] for line in told],
                         ["200"] * len(allowed) + ["403"] * len(refused))
        bot = self.kubectl("exec", own, "-c", "bot", "--", "python3", "-c",
                           "import os; print(os.path.exists('/var/run/secrets'))")
        self.assertEqual(bot, "False\n")

    def test_no_right_is_told_once(self):
        self.apply(["idle-first"])
        self.kubectl("delete", "rolebinding", "bot-echo")
        pod, = self.scale(1)
        log = until(lambda: re.findall(".* not set .*", self.kubectl("logs", pod, "-c", "sidecar")),
                    "the line in the log")
        self.report(log[0])
        self.assertEqual(len(log), 1)
        self.assertRegex(log[0], "403 pods .* is forbidden: .*bot-echo.* cannot patch resource")

    def patches(self):
        """Return how many PATCHes of pods the API server has had, but for those of a status."""
        pattern = (r'apiserver_request_total\{(?=[^}]*resource="pods")(?=[^}]*subresource="")'
                   r'(?=[^}]*verb="PATCH")[^}]*\} ([0-9.e+]+)')
        return sum(map(float, re.findall(pattern, self.kubectl("get", "--raw", "/metrics"))))

    def test_a_minute_of_load(self):
        self.apply(["idle-first"])
        pod, = self.scale(1)
        self.wait_for_cost(pod, 0)
        before = self.patches()
        seconds = self.kubectl("exec", pod, "-c", "bot", "--", "python3", "-c", LOAD)
        during = self.patches() - before
        self.wait_for_cost(pod, 0)
        self.report("%d PATCHes while 3,000 requests came in %.1f s, and %d after them" % (
            during, float(seconds), self.patches() - before - during))
        self.assertIn("deletion-cost: \"0\"", self.kubectl("get", "pod", pod, "-o", "yaml"))
        self.assertLessEqual(during, 7)


if "KUBECONFIG" in os.environ:      # .ci/run has them in test_cluster.py, on the cluster there
    @needs("PyYAML", installed("yaml"))
    class TestOnCluster(OnCluster, Case):
        pass


if __name__ == "__main__":
    unittest.main(verbosity=2)
