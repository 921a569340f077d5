"""aiohttp: python aiohttp_web.py PORT METRICS_PORT"""
import sys

from aiohttp import web
from prometheus_client import start_http_server

import count

routes = web.RouteTableDef()


@routes.post("/start-request")
async def start_request(request):
    return web.json_response(count.start())


@routes.post("/end-request")
async def end_request(request):
    status, content = count.end(request.query.get("duration"))
    return web.json_response(content, status=status)


@routes.get("/metrics")
async def metrics(request):
    return web.json_response(count.metrics())


@routes.get("/health")
async def health(request):
    return web.json_response({"status": "ok"})


app = web.Application()
app.add_routes(routes)
start_http_server(int(sys.argv[2]), "127.0.0.1")
web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), access_log=None)
