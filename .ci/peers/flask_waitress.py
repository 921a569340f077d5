"""Flask and waitress: python flask_waitress.py PORT METRICS_PORT"""
import sys

from flask import Flask, request
from prometheus_client import start_http_server
from waitress import serve

import count

app = Flask(__name__)


@app.post("/start-request")
def start_request():
    return count.start()


@app.post("/end-request")
def end_request():
    status, content = count.end(request.args.get("duration"))
    return content, status


@app.get("/metrics")
def metrics():
    return count.metrics()


@app.get("/health")
def health():
    return {"status": "ok"}


start_http_server(int(sys.argv[2]), "127.0.0.1")
serve(app, host="127.0.0.1", port=int(sys.argv[1]))
