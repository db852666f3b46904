"""What every request must pass and every answer carries: the right host, no other site's page, a bounded body.

A page of another site can make a browser send requests to this machine. It cannot choose their `Host` (by which a name
that was rebound to 127.0.0.1 gives itself away), nor hide its `Origin`, nor send JSON without asking first.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Collection
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from mmcontrast.eval.serve.schema import MAX_FILE_BYTES

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 2 * MAX_FILE_BYTES
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",
        "media-src 'self' blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(self)",
}


class Guard:
    """ASGI middleware that lets a request through or answers it with one sentence."""

    def __init__(self, app: ASGIApp, *, host: str, names: Collection[str]) -> None:
        """Guard an app.

        Args:
            app: what is guarded.
            host: the address that is listened at.
            names: further names by which the server may be reached.
        """
        self.app = app
        self.names = {"localhost", host.lower(), *(name.lower() for name in names)}
        self.loopback = is_loopback(host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name for name, _ in message["headers"]}
                ours = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *(h for h in ours if h[0] not in given)]
            await send(message)

        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        problem = self._problem(scope["method"], headers)
        body = b""
        if problem is None and scope["method"] not in ("GET", "HEAD"):
            body, problem = await _body(receive, headers)
        if problem is not None:
            await _refuse(told, *problem)
            return
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def given() -> Message:
            return waiting.pop() if waiting else await receive()

        await self.app(scope, given, told)

    def _problem(self, method: str, headers: dict[str, str]) -> tuple[int, str] | None:
        asked = headers.get("host", "")
        if not self._ours(asked):
            return 421, f"this server does not answer for the host {asked[:100]!r}; allow it with --allow-host"
        origin = headers.get("origin")
        if origin is not None and _netloc(origin) != asked.lower():
            return 403, f"requests of the page {origin[:100]!r} are not answered"
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and (
            headers.get("sec-fetch-mode") != "navigate" or method != "GET"
        ):
            return 403, "requests of other sites' pages are not answered"
        if method == "POST" and headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return 415, "a request must be JSON, with content-type application/json"
        return None

    def _ours(self, asked: str) -> bool:
        """A name that was given, or an address: those cannot be rebound."""
        try:
            name = urlsplit(f"//{asked}").hostname or ""
        except ValueError:
            return False
        if name in self.names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self.loopback


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _netloc(origin: str) -> str | None:
    """Host and port of an origin; None for what is no origin, such as "null"."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None


async def _body(receive: Receive, headers: dict[str, str]) -> tuple[bytes, tuple[int, str] | None]:
    too_large = (413, f"the request is above {MAX_BODY_BYTES >> 20} MiB; send a smaller file")
    said = headers.get("content-length", "0")
    if not said.isdecimal() or len(said) > 15 or int(said) > MAX_BODY_BYTES:
        return b"", too_large
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return b"", (400, "the request is cut off")
        parts.append(message.get("body", b""))
        size, more = size + len(parts[-1]), message.get("more_body", False)
        if size > MAX_BODY_BYTES:
            return b"", too_large
    return b"".join(parts), None


async def _refuse(send: Send, status: int, error: str) -> None:
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": body})
