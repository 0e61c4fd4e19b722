"""View server: serves the page, and streams frames to browsers over websockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from maskcast.pipeline.clients.view.access import Access
from maskcast.pipeline.clients.view.feed import Feed, Mailbox
from maskcast.pipeline.clients.view.listener import Listener
from maskcast.pipeline.clients.view.packet import Packet
from maskcast.pipeline.subscriber.received import PublishedFrame, StreamEvent
from maskcast.pipeline.subscriber.subscribe import subscribe
from maskcast.pipeline.subscriber.subscription import Subscription

MAX_BROWSERS = 32

HELLO_WITHIN_S = 5.0
"""A browser must send its token (which may be empty) within this many seconds."""

WRONG_TOKEN_DELAY_S = 1.0

WRONG_TOKEN, TOO_MANY = 4401, 4429
"""Close codes of the websocket that the page handles."""

PAGE = {
    "/": ("index.html", "text/html"),
    "/view.css": ("view.css", "text/css"),
    "/view.js": ("view.js", "text/javascript"),
    "/tile.js": ("tile.js", "text/javascript"),
    "/draw.js": ("draw.js", "text/javascript"),
    "/masks.js": ("masks.js", "text/javascript"),
    "/packet.js": ("packet.js", "text/javascript"),
}

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def subscribe_for_view(
    endpoint: str, server_key: Path | None = None, client_key: Path | None = None
) -> Subscription[PublishedFrame | StreamEvent]:
    """Return a subscription for ``ViewServer``, not open.

    Raises:
        InputError: the endpoint or a key is invalid.
    """
    return subscribe(
        endpoint,
        policy="latest",
        events=True,
        until_ended=False,
        server_key=server_key,
        client_key=client_key,
    )


class ViewServer:
    """The server of the page.

    Args:
        subscription: the messages to show, from ``subscribe_for_view``.
        listener: the socket to serve on; the server closes it.
    """

    def __init__(
        self, subscription: Subscription[PublishedFrame | StreamEvent], listener: Listener
    ) -> None:
        self._feed = Feed(subscription)
        self._socket = listener.socket
        self._server = uvicorn.Server(
            uvicorn.Config(
                create_app(self._feed, listener.access, self.stop),
                log_level="critical",
                access_log=False,
                server_header=False,
                lifespan="on",
                ws="websockets-sansio",
                ws_max_size=4096,
                ws_per_message_deflate=False,  # JPEG cannot be compressed further
                limit_concurrency=4 * MAX_BROWSERS,
                timeout_graceful_shutdown=1,
            )
        )

    def run(self) -> None:
        """Serve until ``stop``, SIGINT or SIGTERM.

        Raises:
            RuntimeError: the subscription failed.
        """
        with self._socket:
            self._server.run(sockets=[self._socket])
        if self._feed.fault is not None:
            raise RuntimeError("the view's subscription failed") from self._feed.fault

    def stop(self) -> None:
        """End ``run``; may be called from any thread."""
        self._server.should_exit = True


def create_app(feed: Feed, access: Access, stop: Callable[[], None]) -> Guard:
    """Make the ASGI application; it calls ``stop`` when the feed fails."""

    @asynccontextmanager
    async def receiving(_: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(feed.run())
        task.add_done_callback(lambda _: stop())
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    async def stream(websocket: WebSocket) -> None:
        await _stream(websocket, feed, access)

    routes = [Route(path, _file(name, kind)) for path, (name, kind) in PAGE.items()]
    app = Starlette(routes=[*routes, WebSocketRoute("/stream", stream)], lifespan=receiving)
    return Guard(app, access)


class Guard:
    """Refuses requests for other hosts and from other pages; adds the security headers."""

    def __init__(self, app: Starlette, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, as ASGI defines it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        is_websocket = scope["type"] == "websocket"
        admitted = self._access.admits_host(host) and (
            not is_websocket or self._access.admits_origin(headers.get("origin"), host)
        )
        if admitted:
            await self._app(scope, receive, _with_headers(send))
        elif is_websocket:
            await WebSocket(scope, receive, send).close()  # before accept: status 403
        else:
            refusal = PlainTextResponse("this server is not known by that name\n", 421)
            await refusal(scope, receive, _with_headers(send))


def _with_headers(send: Send) -> Send:
    async def send_with_headers(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(HEADERS)
        await send(message)

    return send_with_headers


def _file(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    content = resources.files(__package__).joinpath("page", name).read_bytes()

    async def answer(_: Request) -> Response:
        return Response(content, media_type=kind)

    return answer


async def _stream(websocket: WebSocket, feed: Feed, access: Access) -> None:
    """Stream to one browser until it disconnects."""
    await websocket.accept()
    try:
        async with asyncio.timeout(HELLO_WITHIN_S):
            token = await _receive_text(websocket)
        if not access.admits_token(token):
            await asyncio.sleep(WRONG_TOKEN_DELAY_S)
            await websocket.close(WRONG_TOKEN)
            return
        if len(feed) >= MAX_BROWSERS:
            await websocket.close(TOO_MANY)
            return
        with feed.connect() as mailbox:
            sending = asyncio.create_task(_send(websocket, mailbox))
            try:
                while True:
                    mailbox.acknowledge(await _receive_text(websocket))
            finally:
                sending.cancel()
                with suppress(asyncio.CancelledError, WebSocketDisconnect, RuntimeError):
                    await sending
    except TimeoutError:
        await websocket.close(WRONG_TOKEN)
    except WebSocketDisconnect:
        pass


async def _send(websocket: WebSocket, mailbox: Mailbox) -> None:
    while True:
        item = await mailbox.take()
        if isinstance(item, Packet):
            await websocket.send_bytes(item.encode())
        else:
            await websocket.send_text(item)


async def _receive_text(websocket: WebSocket) -> str:
    """Return the next message if it is text, else "".

    Raises:
        WebSocketDisconnect: the browser has disconnected.
    """
    message = await websocket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1006))
    return str(message.get("text") or "")
