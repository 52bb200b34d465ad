"""Ports for servers in processes of their own."""

import random
import socket


def free_port() -> int:
    """Return a port that nobody uses, for a server that is started later.

    It is not one that the system hands out: connections of other tests would take it in the meantime.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 32_768)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
