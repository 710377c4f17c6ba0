"""Questions answered in one process, in several, or on a Dask cluster: the same answers in the same order."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from tensorcast.errors import InputError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

Task = TypeVar("Task")
Result = TypeVar("Result")

LOST_WORKERS = 10
"""Workers that may die under one task before it is given up; a task is not lost before that."""


@cache
def keep_freed() -> None:
    """Freed memory is taken again rather than given back. glibc gives back what exceeds twice the largest array that
    was freed so far, of those up to 32 MB, and every page of it that is taken anew costs a fault: a search takes tens
    of MB again and again. The array is never touched, so it takes no memory; other systems do not care."""
    import numpy as np

    np.empty((1 << 25) - (1 << 13), dtype=np.uint8)


@contextmanager
def uncollected() -> Iterator[None]:
    """Without the search for cycles of garbage: pricing makes many small objects and hardly a cycle. What lives on
    afterwards counts as old, so that the collector does not go through it at once; a full collection still does."""
    was = gc.isenabled()
    gc.disable()
    try:
        keep_freed()
        yield
    finally:
        if was:
            if not gc.get_freeze_count():  # what others have frozen stays so
                gc.freeze()
                gc.unfreeze()
            gc.enable()


def spread(
    work: Callable[[Task], Result], tasks: Sequence[Task], jobs: int = 1, executor: str | None = None
) -> list[Result]:
    """``work`` of every task, in order. ``executor``: ``dask:ADDRESS`` of a scheduler; else ``jobs`` processes.

    Raises :class:`InputError` for a bad address or number; an :class:`InputError` of a task is raised here.
    """
    if jobs == 1 and executor is None:
        return [work(task) for task in tasks]
    found = dict(as_done(work, tasks, jobs, executor))
    return [found[i] for i in range(len(tasks))]


def as_done(
    work: Callable[[Task], Result], tasks: Sequence[Task], jobs: int = 1, executor: str | None = None
) -> Iterator[tuple[int, Result]]:
    """As :func:`spread`, each answer with its task's place as soon as it is there."""
    if jobs < 1:
        raise InputError(f"--jobs {jobs}: must be at least 1")
    if executor is not None:
        yield from _on_dask(work, tasks, executor)
    elif jobs == 1 or len(tasks) < 2:
        for i, task in enumerate(tasks):
            yield i, work(task)
    else:
        yield from _in_processes(work, tasks, min(jobs, len(tasks)))


def _in_processes(work: Callable[[Task], Result], tasks: Sequence[Task], jobs: int) -> Iterator[tuple[int, Result]]:
    """Whatever ends this process, or this call, ends its workers."""
    import multiprocessing
    from concurrent.futures import as_completed
    from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor

    # a fresh interpreter imports in a second; a forked one would share the parent's threads
    context = multiprocessing.get_context("spawn")
    lease, held = context.Pipe(duplex=False)
    with lease, held, ProcessPoolExecutor(jobs, context, initializer=_work_until_closed, initargs=(lease,)) as pool:
        try:
            with _interrupts_held_back():
                places = {pool.submit(work, task): i for i, task in enumerate(tasks)}
            for answer in as_completed(places):
                yield places[answer], answer.result()
        except BrokenProcessPool:
            raise InputError(f"--jobs {jobs}: a process was killed, perhaps for want of memory; try fewer") from None
        except BaseException:
            held.close()  # nobody waits for what is still under way
            raise


def _work_until_closed(lease: Connection) -> None:
    """A worker's first act: to see to it that it ends once its parent has closed the other end of ``lease``, by will
    or by dying. Ctrl-C goes to every process of a terminal; the parent answers it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        with suppress(OSError):
            lease.poll(None)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Ctrl-C waits; a process that is started meanwhile gets none, not even while it imports."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    was = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, was)


def note(questions: int, jobs: int = 1, executor: str | None = None, of: str = "devices and sizes") -> str:
    """What to say where there is nothing to spread; empty where there is."""
    if questions > 1 or (jobs == 1 and executor is None):
        return ""
    asked = f"--executor {executor}" if executor is not None else f"--jobs {jobs}"
    return f"{asked} spreads {of}: one of each is one question, answered in one process"


def _on_dask(work: Callable[[Task], Result], tasks: Sequence[Task], executor: str) -> Iterator[tuple[int, Result]]:
    kind, _, address = executor.partition(":")
    if kind != "dask" or not address:
        raise InputError(f"--executor {executor!r}: must be dask:ADDRESS, as in dask:tcp://10.0.0.1:8786")
    try:
        from distributed import Client, as_completed
    except ImportError:
        raise InputError("--executor dask needs Dask: pip install 'tensorcast[dask]'") from None
    try:
        client: Any = Client(address, timeout=10)
    except (OSError, ValueError) as reason:
        line = str(reason).strip().splitlines()[0][:120]
        raise InputError(f"--executor {executor}: no scheduler answers there ({line})") from None
    with client:
        client.run_on_scheduler(_allow_losses)
        answers = client.map(work, tasks, pure=False)
        places = {answer.key: i for i, answer in enumerate(answers)}
        for answer in as_completed(answers):
            yield places[answer.key], answer.result()


def _allow_losses(dask_scheduler: Any = None) -> None:
    """Dask runs a dead worker's tasks elsewhere; after too few deaths it blames the task."""
    dask_scheduler.allowed_failures = max(dask_scheduler.allowed_failures, LOST_WORKERS)
