from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="ray is not installed")

# Other work on the machine must not make Ray end trials.
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """One Ray of two CPUs for all tests, for starting it takes seconds."""
    from lightning_dpo.tuning.cluster.connect import connected

    with connected(None):
        yield


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sweep_project import make_project

    return make_project(tmp_path_factory.mktemp("project"))
