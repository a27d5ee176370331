"""Answers on their way: whole ones and streams of server-sent events, ended at once where the client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, MutableMapping
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response

from lora_tune.errors import LoraTuneError
from lora_tune.serving.refusals import Refusal, refusal_of, too_slow

_Result = TypeVar("_Result")
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Chunks = AsyncGenerator[dict[str, Any], None]


class ClientLeft(Exception):
    """The client closed the connection before its answer was whole."""


async def unless_client_leaves(receive: Receive, work: Coroutine[Any, Any, _Result], *, until: float) -> _Result:
    """The result of the work, which is cancelled where the client leaves or the loop's clock passes `until`.

    Raises: ClientLeft, TimeoutError, and what the work raises.
    """
    task, leaving = asyncio.create_task(work), asyncio.create_task(_left(receive))
    try:
        async with asyncio.timeout_at(until):
            await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientLeft
    finally:
        for one in (task, leaving):
            one.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Chunks as server-sent events, `data: {…}` each, and `data: [DONE]` behind the last one.

    An error in the midst becomes an event with OpenAI's error body, and no `[DONE]`: half an answer is never taken for
    a whole one. Whatever happens, the chunks' generator is closed before this ends, which cancels their requests.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: Chunks, *, until: float, seconds: float) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._chunks, self._until, self._seconds = chunks, until, seconds

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Send everything, or stop where the client leaves."""
        async with aclosing(self._chunks):
            try:
                await unless_client_leaves(receive, self._send_all(send), until=self._until)
                last = b"data: [DONE]\n\n"
            except ClientLeft:
                return
            except (LoraTuneError, Refusal) as error:
                last = _event((error if isinstance(error, Refusal) else refusal_of(error)).as_json())
            except TimeoutError:
                last = _event(too_slow(self._seconds).as_json())
            await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for chunk in self._chunks:
            await send({"type": "http.response.body", "body": _event(chunk), "more_body": True})


async def begun(chunks: Chunks) -> Chunks:
    """The same chunks, the first of them awaited: what is refused is refused before anything is sent."""
    try:
        first = await anext(chunks)
    except BaseException:
        await chunks.aclose()
        raise

    async def all_of_them() -> Chunks:
        async with aclosing(chunks):
            yield first
            async for chunk in chunks:
                yield chunk

    return all_of_them()


def _event(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return b"data: " + text.encode("utf-8", "replace") + b"\n\n"
