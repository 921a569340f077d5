"""Handlers in an event loop.

handlers    how many (4)
client      aiohttp, with a time-out for the whole call; or requests, which blocks the loop
timeout     of a call, in seconds (1)
tries       of a call, without an id (1)
"""
import asyncio

import aiohttp
import requests

from messages import OPTIONS, SIDECAR, Messages, begin, end, option, work_seconds

messages = Messages()


async def aiohttp_post(session, path):
    timeout = aiohttp.ClientTimeout(total=option("timeout", 1.0))
    async with session.post(SIDECAR + path, timeout=timeout) as answer:
        await answer.read()


async def blocking_post(session, path):
    requests.post(SIDECAR + path, timeout=option("timeout", 1.0))


post = blocking_post if OPTIONS.get("client") == "requests" else aiohttp_post


async def tell(session, path):
    for _ in range(option("tries", 1)):
        try:
            return await post(session, path)
        except (asyncio.TimeoutError, aiohttp.ClientError, requests.RequestException):
            pass


async def handle_messages(session):
    while True:
        message = messages.poll()
        if message is None:
            await asyncio.sleep(0.02)
            continue
        await tell(session, "/start-request")
        begin(message)
        await asyncio.sleep(work_seconds(message))
        end(message)
        await tell(session, "/end-request")


async def main():
    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*[handle_messages(session)
                               for _ in range(option("handlers", 4))])


asyncio.run(main())
