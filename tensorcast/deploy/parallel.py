"""Questions answered in one process, in several, or on a Dask cluster: the same answers in the same order."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from tensorcast.errors import InputError

Task = TypeVar("Task")
Result = TypeVar("Result")

LOST_WORKERS = 10
"""Workers that may die under one task before it is given up; a task is not lost before that."""


@contextmanager
def uncollected() -> Iterator[None]:
    """Without the search for cycles of garbage: pricing makes many small objects and hardly a cycle."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def spread(
    work: Callable[[Task], Result], tasks: Sequence[Task], jobs: int = 1, executor: str | None = None
) -> list[Result]:
    """``work`` of every task, in order. ``executor``: ``dask:ADDRESS`` of a scheduler; else ``jobs`` processes.

    Raises :class:`InputError` for a bad address or number; an :class:`InputError` of a task is raised here.
    """
    if jobs < 1:
        raise InputError(f"--jobs {jobs}: must be at least 1")
    if executor is not None:
        return _on_dask(work, tasks, executor)
    if jobs == 1 or len(tasks) < 2:
        return [work(task) for task in tasks]
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    # a fresh interpreter imports in a second; a forked one would share the parent's threads
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=context) as pool:
        return list(pool.map(work, tasks))


def note(questions: int, jobs: int = 1, executor: str | None = None) -> str:
    """What to say where there is nothing to spread; empty where there is."""
    if questions > 1 or (jobs == 1 and executor is None):
        return ""
    asked = f"--executor {executor}" if executor is not None else f"--jobs {jobs}"
    return f"{asked} spreads devices and sizes: one of each is one question, answered in one process"


def _on_dask(work: Callable[[Task], Result], tasks: Sequence[Task], executor: str) -> list[Result]:
    kind, _, address = executor.partition(":")
    if kind != "dask" or not address:
        raise InputError(f"--executor {executor!r}: must be dask:ADDRESS, as in dask:tcp://10.0.0.1:8786")
    try:
        from distributed import Client
    except ImportError:
        raise InputError("--executor dask needs Dask: pip install 'tensorcast[dask]'") from None
    try:
        client: Any = Client(address, timeout=10)
    except (OSError, ValueError) as reason:
        line = str(reason).strip().splitlines()[0][:120]
        raise InputError(f"--executor {executor}: no scheduler answers there ({line})") from None
    with client:
        client.run_on_scheduler(_allow_losses)
        return list(client.gather(client.map(work, tasks, pure=False)))


def _allow_losses(dask_scheduler: Any = None) -> None:
    """Dask runs a dead worker's tasks elsewhere; after too few deaths it blames the task."""
    dask_scheduler.allowed_failures = max(dask_scheduler.allowed_failures, LOST_WORKERS)
