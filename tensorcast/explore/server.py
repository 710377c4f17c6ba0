"""The web server: a page, its files, and questions answered by two processes.

One process answers in full, the other what cannot wait: a few variants while a slider moves, and one row from close by.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import mimetypes
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tensorcast.errors import InputError
from tensorcast.explore import work
from tensorcast.explore.answer import Found
from tensorcast.explore.exports import EXPORTS
from tensorcast.explore.fields import fields
from tensorcast.explore.guard import Guard
from tensorcast.explore.lanes import Lane, Superseded
from tensorcast.explore.question import field_of, with_defaults
from tensorcast.explore.work import Reply
from tensorcast.report.glossary import glossary
from tensorcast.search.space import Variant
from tensorcast.version import __version__

MOST_KEPT = 32
"""Answers whose rows can be looked at from close by."""

OF_LOAD = (
    "input_len", "output_len", "cached", "users", "request_rate", "ttft_ms", "tpot_ms", "price", "objective",
    "budget", "confidence",
    "world_size", "mtp_acceptance", "mode",
)
"""Fields that leave the variants worth pricing what they were."""


@dataclass
class Kept:
    """What the server remembers of answers: whole ones by question, rows by question, and the variants worth pricing by
    what they hang on."""

    whole: OrderedDict[Hashable, Reply] = field(default_factory=OrderedDict)
    rows: OrderedDict[Hashable, dict[tuple[str, float], Found]] = field(default_factory=OrderedDict)
    known: OrderedDict[Hashable, tuple[Variant, ...]] = field(default_factory=OrderedDict)

    def take(self, state: dict[str, str], reply: Reply) -> None:
        """Remember a reply; those that were worth pricing stay as long as they hold all that are, for their prices are
        kept."""
        _put(self.rows, _key(state), reply.behind)
        key = _structure(state)
        if not set(reply.known) <= set(self.known.get(key, ())):
            _put(self.known, key, reply.known)

    def row(self, state: dict[str, str], chosen: Any) -> Found | None:
        """The row of ``state``'s answer that is ``chosen``: of that key, at the batch nearest to the one asked for."""
        rows = self.rows.get(_key(state), {})
        batch = float(chosen.get("batch") or 0)
        same = [found for (key, _), found in rows.items() if key == chosen.get("key")]
        return min(same, key=lambda found: abs(float(found.row["batch"]) - batch), default=None)


def _put(kept: OrderedDict[Hashable, Any], key: Hashable, value: Any) -> None:
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > MOST_KEPT:
        kept.popitem(last=False)


def _key(state: dict[str, str]) -> Hashable:
    return tuple(sorted(state.items()))


def _structure(state: dict[str, str]) -> Hashable:
    return _key({key: value for key, value in state.items() if key not in OF_LOAD})


class Explorer:
    """The application and its two processes. ``start``: the state that the page opens with; ``host``: where it is
    bound to."""

    def __init__(self, start: dict[str, str], host: str = "127.0.0.1", named: tuple[str, ...] = ()) -> None:
        self.start, self.named, self.kept = start, named, Kept()
        self.full, self.swift = Lane(), Lane()
        self.under_way: dict[Hashable, asyncio.Task[Reply]] = {}
        self.ahead: asyncio.Task[None] | None = None
        routes = [
            Route("/", partial(self.file, name="index.html")), Route("/static/{name:path}", self.file),
            Route("/api/catalog", self.catalog), Route("/api/export/{kind}", self.export),
            *(Route(f"/api/{name}", partial(self.posted, call), methods=["POST"]) for name, call in (
                ("answer", self.answer), ("quick", self.quick), ("details", self.details), ("versus", self.versus),
            )),
        ]  # fmt: skip
        self.files = dict(_files())
        self.app = Starlette(routes=routes, middleware=[Middleware(Guard, host=host)], lifespan=self._lifespan)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """The processes begin to import, and to answer the first question, before the first browser asks."""
        first = with_defaults(self.start)
        early = [asyncio.create_task(self._first(ask, first)) for ask in (self.quick, self.answer)]
        yield
        for task in early:
            task.cancel()
        self.close()

    async def _first(self, ask: Callable[..., Any], state: dict[str, str]) -> None:
        with contextlib.suppress(InputError, Superseded):
            await ask("the server", state, {})

    def close(self) -> None:
        """End both processes."""
        self.full.close()
        self.swift.close()

    async def file(self, request: Request, name: str = "") -> Response:
        """A file of the page's own, known by name; no other file can be asked for."""
        found = self.files.get(name or request.path_params["name"])
        if found is None:
            return Response("not found\n", 404, media_type="text/plain")
        content, kind = found
        return Response(content, media_type=kind, headers={"cache-control": "no-cache"})

    async def catalog(self, request: Request) -> Response:
        """What the page's controls and tooltips say."""
        return JSONResponse({
            "fields": [one.described() for one in fields()], "glossary": glossary(), "start": with_defaults(self.start),
            "version": __version__, "exports": {kind: name for kind, (_, name, _) in EXPORTS.items()},
        })  # fmt: skip

    async def posted(self, call: Callable[..., Any], request: Request) -> Response:
        """A question: its state, who asks, and what it is about."""
        try:
            body = json.loads(await request.body())
            browser, state, about = str(body["browser"])[:64], body["state"], body.get("about") or {}
            if not (isinstance(state, dict) and isinstance(about, dict)):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            return JSONResponse({"error": "a question is {browser, state, about}", "field": ""}, 400)
        try:
            reply = await call(browser, with_defaults(state), about)
        except InputError as error:
            return JSONResponse({"error": str(error), "field": field_of(str(error))}, 422)
        except Superseded:
            return JSONResponse({"superseded": True}, 409)
        return Response(reply.text, 422 if reply.wrong else 200, media_type="application/json")

    async def answer(self, browser: str, state: dict[str, str], about: dict[str, Any]) -> Reply:
        """Every layout. A question that somebody asked before, or is asking, is not asked again."""
        key = _key(state)
        while (reply := self.kept.whole.get(key)) is None:
            mine = key not in self.under_way
            if mine:
                self.under_way[key] = asyncio.create_task(self._search(browser, state))
            try:
                return await asyncio.shield(self.under_way[key])
            except Superseded:
                if mine:
                    raise
        return reply

    async def _search(self, browser: str, state: dict[str, str]) -> Reply:
        try:
            reply = await self.full.ask(browser, work.answer_all, state, self.named)
        finally:
            self.under_way.pop(_key(state), None)
        before = self.kept.known.get(_structure(state))
        self.kept.take(state, reply)
        if self.kept.known.get(_structure(state)) is not before:  # priced while nobody waits, for the next move
            self.ahead = asyncio.create_task(self._first(self.quick, state))
        if not self.named and not reply.wrong:  # files may say something else by now
            _put(self.kept.whole, _key(state), reply)
        return reply

    async def quick(self, browser: str, state: dict[str, str], about: dict[str, Any]) -> Reply:
        """The variants that mattered before."""
        known = self.kept.known.get(_structure(state), ())
        reply = await self.swift.ask(browser, work.answer_known, state, self.named, known)
        if _key(state) not in self.kept.rows:
            self.kept.take(state, reply)
        return reply

    async def details(self, browser: str, state: dict[str, str], about: dict[str, Any]) -> Reply:
        """One row from close by."""
        found = await self._row(browser, state, about)
        return await self.swift.ask(f"{browser} details", work.tell_details, state, self.named, found)

    async def versus(self, browser: str, state: dict[str, str], about: dict[str, Any]) -> Reply:
        """Two rows side by side."""
        a, b = [await self._row(browser, state, about.get(side) or {}) for side in "ab"]
        return await self.swift.ask(f"{browser} versus", work.tell_versus, state, self.named, a, b)

    async def _row(self, browser: str, state: dict[str, str], chosen: dict[str, Any]) -> Found:
        """A row of the answer to ``state``, which is given first where it is not remembered."""
        found = self.kept.row(state, chosen)
        if found is None:
            await self.answer(f"{browser} row", state, {})
            found = self.kept.row(state, chosen)
        if found is None:
            raise InputError(f"layout {str(chosen.get('key'))[:120]!r}: is none of this answer's")
        return found

    async def export(self, request: Request) -> Response:
        """A file to keep."""
        kind = request.path_params["kind"]
        try:
            if kind not in EXPORTS:
                raise InputError(f"export {kind[:40]!r}: must be one of {', '.join(EXPORTS)}")
            state = with_defaults(dict(request.query_params))
        except InputError as error:
            return JSONResponse({"error": str(error), "field": field_of(str(error))}, 422)
        _, name, media = EXPORTS[kind]
        reply = await self.full.ask(f"export {kind} {id(request)}", work.export, state, self.named, kind)
        if reply.wrong:
            return Response(reply.text, 422, media_type="application/json")
        return Response(reply.text, media_type=media, headers={
            "content-disposition": f'attachment; filename="{name}"'
        })  # fmt: skip


def _files() -> list[tuple[str, tuple[bytes, str]]]:
    """The page's files and their types, read once."""
    found = []
    folder = resources.files("tensorcast.explore") / "static"
    for place, prefix in ((folder, ""), (folder / "vendor", "vendor/")):
        for one in place.iterdir():
            if one.is_file():
                kind = mimetypes.guess_type(one.name)[0] or "text/plain"
                kind = {".js": "text/javascript", ".css": "text/css"}.get(one.name[one.name.rfind(".") :], kind)
                found.append((prefix + one.name, (one.read_bytes(), kind)))
    return found


def serve(start: dict[str, str], host: str, port: int, named: tuple[str, ...], say: Callable[[str], None]) -> None:
    """Serve until Ctrl-C; ``say`` gets the address once the port is ours. Raises :class:`InputError` where it is not.
    """
    import socket

    import uvicorn

    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen()  # whoever is told the address may ask at once
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--host {host} --port {port}: cannot be listened on: {reason}") from None
    explorer = Explorer(start, host, named)
    shown = f"[{host}]" if ":" in host else host
    say(f"http://{shown}:{listening.getsockname()[1]}/")
    config = uvicorn.Config(explorer.app, log_level="warning", access_log=False, lifespan="on")
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        explorer.close()
