"""Processes that train together wait for each other as long as a storage may take."""

import multiprocessing
import os
import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from trainers.ranks import joined

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch.distributed"])


def _patience(where: dict[str, str]) -> timedelta:
    """After which this process would give up waiting for the other."""
    os.environ |= where
    with joined(torch.device("cpu")):
        return dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout


@pytest.mark.slow
def test_who_waits_while_the_first_one_stores_something_gives_up_after_days() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    with FORKS.Pool(2) as pool:
        waits = pool.map_async(_patience, [shared | {"RANK": f"{rank}"} for rank in range(2)], 1)
        assert min(waits.get(60)) > timedelta(days=7)
