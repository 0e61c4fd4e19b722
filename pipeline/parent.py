"""Parent: the process that started this one, and holds the other end of its standard input."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable


def on_parent_exit(action: Callable[[], None]) -> None:
    """Call ``action`` on a thread of its own once the parent has ended or closed standard input.

    What the parent sends until then is discarded.
    """

    def wait() -> None:
        while os.read(0, 1024):  # not sys.stdin: its lock, held at exit, is a fatal error
            pass
        action()

    threading.Thread(target=wait, name="parent", daemon=True).start()
