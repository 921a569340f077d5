"""Keeps what the workers of the cluster's tests say of their messages, outside of their pods.

POST /begin/POD/MESSAGE and /end/POD/MESSAGE are recorded with the time that they came, and GET
/records returns all of them as JSON. GET /wait/COUNT/POD,POD,... waits until each of the pods has
begun COUNT more. GET /callers returns the addresses that asked for /health: the node's.
"""
import http.server
import json
import threading
import time

records = []
callers = set()
changed = threading.Condition()


def begun(pod):
    return sum(what == "begin" and its_pod == pod for _, what, its_pod, _ in records)


def wait(count, *pods):
    """Return true when each of the pods has begun `count` more messages, false after 60 s."""
    with changed:
        before = {pod: begun(pod) for pod in pods}
        return changed.wait_for(lambda: all(begun(pod) >= before[pod] + count for pod in pods), 60)


class Recorder(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        what, pod, message = self.path.strip("/").split("/")
        with changed:
            records.append((time.time(), what, pod, message))
            changed.notify_all()
        self.answer("recorded")

    def do_GET(self):
        what, *arguments = self.path.strip("/").split("/")
        if what == "health":
            callers.add(self.client_address[0])
            self.answer("serving")
        elif what == "callers":
            self.answer(sorted(callers))
        elif what == "wait":
            self.answer(wait(int(arguments[0]), *arguments[1].split(",")))
        else:
            self.answer(records)

    def answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 100


Server(("", 8000), Recorder).serve_forever()
