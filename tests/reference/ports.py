"""Ports for servers that tests start."""

import random
import socket

_random = random.SystemRandom()  # hypothesis seeds the module's generator


def find_free_port() -> int:
    """Return a free TCP port of 127.0.0.1.

    It is below the range from which Linux takes ports for outgoing connections and for servers
    that bind port 0, so that another test, in this process or another, does not take it first.
    """
    while True:
        port = _random.randrange(20_000, 32_768)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
