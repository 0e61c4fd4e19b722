import os
import platform
import subprocess
import sys

import pytest

from maskcast.engines.memory import HEAPS, give_back_memory, read_memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")

THREADS_THAT_ALLOCATE = """
import ctypes, threading
from maskcast.engines.memory import limit_heaps
limit_heaps()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
together = threading.Barrier(12)
def allocate():
    together.wait()
    libc.malloc(1000)
    together.wait()
threads = [threading.Thread(target=allocate) for _ in range(12)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
"""


def heaps_of_threads(environment: dict[str, str]) -> int:
    ran = subprocess.run(
        [sys.executable, "-c", THREADS_THAT_ALLOCATE],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return ran.stdout.count("<heap nr=")


def test_many_threads_share_few_heaps(monkeypatch) -> None:
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    assert heaps_of_threads(dict(os.environ)) == HEAPS


def test_malloc_arena_max_takes_precedence(monkeypatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "3")
    assert heaps_of_threads(dict(os.environ)) == 3


def test_free_memory_between_used_blocks_is_returned() -> None:
    pieces = [b"x" * 100_000 for _ in range(600)]  # too small to be mapped one by one
    held = pieces[::50]
    before = read_memory().rss_bytes
    del pieces
    give_back_memory()
    assert before - read_memory().rss_bytes > 40e6
    assert held[-1][-1] == ord("x")
