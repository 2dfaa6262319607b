"""Ports for the servers that tests start."""

from __future__ import annotations

import random
import socket

# Below what Linux gives to whoever asks for any port or calls out (from 32768 on), and what Ray gives to its workers
# (10002 to 19999): nobody who does not look here takes such a port between its choice and its use.
RANGE = range(20000, 32768)


def free_ports(count: int) -> list[int]:
    """Distinct ports on which nothing listens, at any address of this machine."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.SystemRandom().choice(RANGE)
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("", port))
            except OSError:
                continue
        if port not in ports:
            ports.append(port)
    return ports


def free_port() -> int:
    return free_ports(1)[0]
