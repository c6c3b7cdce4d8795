"""One Ray for all tests that need it: starting one takes seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    from orchestrator.sweep import ray_cluster

    with ray_cluster():
        yield
