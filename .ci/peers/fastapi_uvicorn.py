"""FastAPI and uvicorn, with uvloop and httptools: python fastapi_uvicorn.py PORT METRICS_PORT"""
import sys
from typing import Optional

import uvicorn
from fastapi import FastAPI, Response
from prometheus_client import start_http_server

import count

app = FastAPI()


@app.post("/start-request")
async def start_request():
    return count.start()


@app.post("/end-request")
async def end_request(response: Response, duration: Optional[str] = None):
    response.status_code, content = count.end(duration)
    return content


@app.get("/metrics")
async def metrics():
    return count.metrics()


@app.get("/health")
async def health():
    return {"status": "ok"}


start_http_server(int(sys.argv[2]), "127.0.0.1")
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), loop="uvloop", http="httptools",
            access_log=False)
