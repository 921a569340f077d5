"""A worker that always has more to do: in each of THREADS threads one message of SECONDS after the
other. The recorder is told when the work on each begins, and when it has ended.

CLIENT says how it calls the sidecar:
- readme: README's loop for Python, without a handler for SIGTERM.
- finishing: the same with README's handler, which lets the work in hand come to its end.
- python: two calls without an id, each on a new connection, a time-out of 1 s for the connection
  and for each read, as `requests.post(url, timeout=1)` has it. It never looks at `draining`, and
  without an answer it goes on.
- patient: the same without a time-out, as the usual clients of Go and Node.js have it.

SIGUSR1 lets it grow until it is killed for its memory; after SIGUSR2 its GET /health is a 500.
"""
import contextlib
import http.client
import http.server
import itertools
import os
import signal
import threading
import time
import urllib.parse
import urllib.request

CLIENT = os.environ["CLIENT"]
THREADS = int(os.environ["THREADS"])
SECONDS = float(os.environ["SECONDS"])
RECORDER = os.environ["RECORDER"]
POD = os.environ["HOSTNAME"]
RUN = os.urandom(3).hex()       # another one after the container was restarted
SIDECAR = urllib.parse.urlsplit(os.environ["SIDECAR_URL"])
hangs = threading.Event()
stopping = threading.Event()


def record(what, message):
    urllib.request.urlopen("%s/%s/%s/%s" % (RECORDER, what, POD, message), b"", timeout=20).close()


def work(message):
    record("begin", message)
    time.sleep(SECONDS)
    record("end", message)


def post(path, timeout):
    connection = http.client.HTTPConnection(SIDECAR.hostname, SIDECAR.port, timeout=timeout)
    try:
        connection.request("POST", path)
        connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        pass
    finally:
        connection.close()


@contextlib.contextmanager
def two_calls(timeout):
    post("/start-request", timeout)
    began = time.monotonic()
    try:
        yield
    finally:
        post("/end-request?duration=%.3fs" % (time.monotonic() - began), timeout)


def plain_loop(messages, timeout):
    for message in messages:
        with two_calls(timeout):
            work(message)


def readme_loop(messages, sidecar):
    for message in messages:
        while sidecar.draining and not sidecar.ready():
            if stopping.wait(1):
                return
        if stopping.is_set():
            return
        with sidecar.track():
            work(message)


def loop(name, sidecar):
    messages = ("%s-%d-%d" % (RUN, name, number) for number in itertools.count())
    if sidecar:
        readme_loop(messages, sidecar)
    else:
        plain_loop(messages, 1 if CLIENT == "python" else None)


class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(500 if hangs.is_set() else 200)
        self.end_headers()

    def log_message(self, *args):
        pass


def grow(*_):
    memory = []
    while True:
        memory.append(bytearray(b"x" * 1000000))


def main():
    sidecar = None
    if CLIENT in ("readme", "finishing"):
        from echo_bot import Sidecar
        sidecar = Sidecar()
        sidecar.CALL_SECONDS = 30.0     # a machine that is busy is no sidecar that hangs
        sidecar.reset()
    if CLIENT == "finishing":
        signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    signal.signal(signal.SIGUSR1, grow)
    signal.signal(signal.SIGUSR2, lambda *_: hangs.set())
    health = http.server.ThreadingHTTPServer(("", 8000), Health)
    threading.Thread(target=health.serve_forever, daemon=True).start()
    threads = [threading.Thread(target=loop, args=(name, sidecar)) for name in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():        # a signal's handler runs between two looks
            thread.join(0.2)
    health.shutdown()


main()
