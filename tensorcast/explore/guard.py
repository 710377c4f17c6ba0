"""Who may ask: this machine's own page. Other sites' pages that run in the same browser are refused."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

Scope = MutableMapping[str, Any]
Messages = Callable[..., Awaitable[Any]]

HEADERS = {
    b"content-security-policy": (
        b"default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    b"x-content-type-options": b"nosniff", b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin", b"cross-origin-opener-policy": b"same-origin",
}
"""Nothing is loaded from elsewhere, nobody frames the page; charts write styles of their own."""

LARGEST_BODY = 1 << 16


class Guard:
    """ASGI middleware. A request must name this machine as its host, or a site's own name could be pointed here; what
    comes from another site's page is refused."""

    def __init__(self, app: Callable[..., Awaitable[None]], host: str) -> None:
        self.app = app
        self.names = {"localhost", host.lower()}
        if not is_loopback(host):
            self.names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Messages, send: Messages) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if problem := self.problem(scope["method"], headers):
            await _refuse(send, problem)
            return

        async def guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS.items()]
            await send(message)

        await self.app(scope, receive, guarded)

    def problem(self, method: str, headers: dict[str, str]) -> str:
        """Why a request is refused; empty if it is not."""
        host = headers.get("host", "")
        if not self._is_ours(host):
            return f"host {host[:80]!r} is not this machine's name"
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "same-origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return f"origin {origin[:80]!r} is another site"
        if site == "cross-site" and (method != "GET" or headers.get("sec-fetch-mode") != "navigate"):
            return "asked for by another site"
        if method == "POST":
            if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
                return "a question is JSON"
            length = headers.get("content-length", "")
            if not length.isdigit() or int(length) > LARGEST_BODY:
                return f"a question has a length, of at most {LARGEST_BODY} bytes"
        return ""

    def _is_ours(self, host: str) -> bool:
        """An address is where the request went; a name may be anyone's."""
        name = urlsplit(f"//{host}").hostname or ""
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self.names
        return True


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


async def _refuse(send: Messages, problem: str) -> None:
    body = f"refused: {problem}\n".encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 403, "headers": [*headers, *HEADERS.items()]})
    await send({"type": "http.response.body", "body": body})
