"""Work in several processes: the same answers in order, and no process that outlives its parent."""

from __future__ import annotations

import gc
import os
import platform
import signal
import subprocess
import sys
import weakref

import pytest

from tensorcast.errors import InputError
from tensorcast.parallel import spread, uncollected

AT_WORK = """
import signal, sys, tensorcast.api
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
from tensorcast.cli import main
from tensorcast.parallel import spread
task = "__import__('os').write(1, b'at work\\\\n')\\nfor _ in range(600): __import__('time').sleep(0.1)"
tensorcast.api.compare = lambda *args, **options: spread(exec, [task] * 5, 2)
sys.argv = ["tensorcast", "compare", "qwen3-30b-a3b", "-d", "h100", "-n", "4"]
main()
"""
"""A command whose two workers say so when they have begun, and take a minute."""


def test_answers_come_in_order() -> None:
    assert spread(abs, [-3, 1, -2, 0], 3) == spread(abs, [-3, 1, -2, 0]) == [3, 1, 2, 0]


def test_an_error_of_a_task_is_raised_and_the_others_are_not_waited_for() -> None:
    with pytest.raises(ValueError, match="no"):
        spread(exec, ["raise ValueError('no')", "while True: __import__('time').sleep(0.1)"], 2)


def test_a_killed_worker_is_one_line() -> None:
    with pytest.raises(InputError, match=r"--jobs 2: a process was killed"):
        spread(os._exit, [9, 9], 2)


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGKILL", -9)])
def test_no_worker_outlives_its_parent(name: str, status: int) -> None:
    """Workers hold the same output: it ends when the last of them has."""
    started = subprocess.Popen(
        [sys.executable, "-c", AT_WORK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert started.stdout is not None
    assert [started.stdout.readline(), started.stdout.readline()] == ["at work\n"] * 2
    if name == "SIGINT":  # a terminal sends it to all
        os.killpg(started.pid, signal.SIGINT)
    else:
        started.send_signal(getattr(signal, name))
    _, said = started.communicate(timeout=50)
    assert started.returncode == status
    if name != "SIGKILL":
        assert said == ("interrupted\n" if name == "SIGINT" else "")


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_an_interrupt_while_workers_start_is_one_line() -> None:
    code = AT_WORK.replace("spread(exec", "__import__('_thread').start_new_thread(soon, ()) and spread(exec")
    code = "import os, signal, time\ndef soon(): time.sleep(0.4); os.killpg(0, signal.SIGINT)\n" + code
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=100, start_new_session=True
    )
    assert done.returncode == 130 and done.stderr == "interrupted\n"


def test_what_was_made_without_the_collector_is_old_to_it_and_still_collected() -> None:
    class Knot:
        """Holds itself."""

        def __init__(self) -> None:
            self.own = self

    gc.enable()
    with uncollected():
        assert not gc.isenabled()
        knot = weakref.ref(Knot())
        kept = [[i] for i in range(100_000)]
    assert gc.isenabled() and len(gc.get_objects(generation=0)) < len(kept) / 10 and not gc.get_freeze_count()
    assert knot() is not None
    gc.collect()
    assert knot() is None


FAULTS = """
import resource
import numpy as np
from tensorcast.parallel import uncollected

def faults() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        [np.ones(375_000) for _ in range(10)]  # 3 MB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with uncollected():
    faults()
    print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="how the C library keeps memory")
def test_memory_that_pricing_frees_is_taken_again() -> None:
    """Eight times 30 MB are 59,000 pages, most of which would be faults where they are given back."""
    # Dask leaves its workers' MALLOC_TRIM_THRESHOLD_ in the environment (distributed, nanny.pre-spawn-environ)
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    told = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, env=plain).stdout
    assert int(told) < 4_000
