"""The standard library's http.server, as its manual shows it: python http_server.py PORT
METRICS_PORT"""
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from prometheus_client import start_http_server

import count


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        url = urlsplit(self.path)
        if url.path == "/start-request":
            self.answer(200, count.start())
        elif url.path == "/end-request":
            self.answer(*count.end(parse_qs(url.query).get("duration", [None])[0]))
        else:
            self.answer(404, {"error": "not found"})

    def do_GET(self):
        if self.path == "/metrics":
            self.answer(200, count.metrics())
        elif self.path == "/health":
            self.answer(200, {"status": "ok"})
        else:
            self.answer(404, {"error": "not found"})

    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


start_http_server(int(sys.argv[2]), "127.0.0.1")
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
