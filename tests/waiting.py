"""What tests with other processes need: to wait for something, and ports for servers."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any


def wait(condition: Callable[[], Any], seconds: float = 120, what: str = "") -> Any:
    """What `condition` gives as soon as it is true."""
    limit = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < limit, f"waited {seconds} s {what or condition}"
        time.sleep(0.05)
    return found


def free_ports(count: int) -> list[int]:
    """Ports of loopback on which nobody listens now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
