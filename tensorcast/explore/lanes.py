"""Jobs of many browsers for one process: one at a time, each browser's newest only, in the order of their asking."""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from typing import Any, TypeVar

from tensorcast.explore.work import Reply, begin, warm
from tensorcast.report.plain import to_json

LOST = Reply(to_json({"error": "the process that searches was killed, perhaps for want of memory; ask again",
                      "field": ""}), wrong=True)

Found = TypeVar("Found")

HOW = "forkserver" if sys.platform == "linux" else "spawn"
"""How processes start: not forked from the server, whose threads they would share. Those of a fork server, which has
none, share one import of all that they need."""


class Superseded(Exception):
    """The same browser asked for something newer before this was begun."""


class Lane:
    """A process of its own, with what it keeps from question to question.

    A job that waits is dropped, with :class:`Superseded`, where its browser asks anew; one that runs is finished.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, tuple[asyncio.Future[Reply], Callable[..., Reply], tuple[Any, ...]]] = {}
        self._busy = False
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context(HOW)
        if HOW == "forkserver":
            context.set_forkserver_preload([begin.__module__])
        self._lease, self._held = context.Pipe(duplex=False)
        self._pool = ProcessPoolExecutor(1, context, initializer=begin, initargs=(self._lease,))

    async def ready(self) -> int:
        """Wait until the process stands; its id."""
        return await self._done(warm)

    async def _done(self, work: Callable[..., Found], *args: Any) -> Found:
        """``work`` in the process. Handed over by a thread: the first time that waits until the process stands."""
        return await asyncio.wrap_future(await asyncio.to_thread(self._pool.submit, work, *args))

    async def ask(self, browser: str, work: Callable[..., Reply], *args: Any) -> Reply:
        """``work`` of ``args`` in the process, once it is ``browser``'s turn."""
        older = self._waiting.pop(browser, None)
        if older is not None and not older[0].done():
            older[0].set_exception(Superseded())
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[browser] = answer, work, args
        if not self._busy:
            self._busy = True
            self._task = asyncio.create_task(self._drain())
        return await answer

    async def _drain(self) -> None:
        """Do what waits until nothing does."""
        try:
            while self._waiting:
                answer, work, args = self._waiting.pop(next(iter(self._waiting)))
                if answer.cancelled():
                    continue
                try:
                    found = await self._done(work, *args)
                except BrokenProcessPool:
                    self.close()
                    self._start()
                    found = LOST
                except Exception as error:  # a bug there is no reason to keep the page waiting
                    if not answer.done():
                        answer.set_exception(error)
                    continue
                if not answer.done():
                    answer.set_result(found)
        finally:
            self._busy = False

    def close(self) -> None:
        """End the process, whatever it is at."""
        self._held.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
