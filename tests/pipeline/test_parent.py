import subprocess
import sys

CHILD = """
import threading
from maskcast.pipeline.parent import on_parent_exit

ended = threading.Event()
on_parent_exit(ended.set)
{rest}
"""


def start(rest: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", CHILD.format(rest=rest)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)


def test_the_action_is_called_once_standard_input_is_closed() -> None:
    with start("ended.wait(60)\nassert ended.is_set()") as child:
        assert child.stdin is not None
        child.stdin.write(b"ignored\n" * 1000)
        child.stdin.flush()
        child.stdin.close()
        assert child.wait(60) == 0


def test_a_process_that_ends_before_its_parent_ends_well() -> None:
    with start("ended.wait(0.2)") as child:
        assert child.wait(60) == 0
        assert child.stderr is not None
        assert child.stderr.read() == b""
