"""The subscriber of a profile: receives what is published.

It runs in a process of its own, so that its processor time is not counted as the pipeline's and it
does not hold the pipeline's interpreter lock. It ends when its standard input is closed, so that it
does not outlive a profile that is killed.
"""

from __future__ import annotations

import os
import sys
from collections import deque

from maskcast.pipeline.parent import on_parent_exit
from maskcast.pipeline.subscriber.subscribe import subscribe

_TIMEOUT_S = 3600.0


def main(endpoint: str) -> None:
    """Receive and decode all frames of a publisher until its sources have ended."""
    with subscribe(endpoint, policy="all", timeout_s=_TIMEOUT_S) as subscription:
        deque(subscription, maxlen=0)


if __name__ == "__main__":
    on_parent_exit(lambda: os._exit(0))
    main(sys.argv[1])
