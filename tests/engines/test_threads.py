import subprocess
import sys
import threading

from maskcast.engines.threads import is_any_running, mark_abandonable

PROGRAM = """
import threading, time
import maskcast
from maskcast.engines.threads import mark_abandonable

class Noisy:
    def __del__(self):
        print("shut down")

noisy = Noisy()
thread = threading.Thread(target=time.sleep, args=(60,), daemon=True, name="any name")
if {marked}:
    mark_abandonable(thread)
thread.start()
maskcast._leave(7)
"""


def test_only_marked_threads_that_are_running_count() -> None:
    release = threading.Event()
    other, marked = (threading.Thread(target=release.wait, daemon=True) for _ in range(2))
    mark_abandonable(marked)
    other.start()
    assert not marked.is_alive()
    before = is_any_running()
    marked.start()
    assert is_any_running()
    release.set()
    marked.join()
    other.join()
    assert is_any_running() == before


def test_the_interpreter_does_not_shut_down_under_a_marked_thread() -> None:
    for marked, output in ((True, ""), (False, "shut down\n")):
        program = PROGRAM.format(marked=marked)
        result = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
        )
        assert (result.returncode, result.stdout) == (7, output), result.stderr
