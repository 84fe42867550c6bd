"""Nothing here reaches the network; every annotated shape and type is checked as the tests run."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

# Scripts that tests start find what tests share, as the tests themselves do.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).with_name("parts")), *filter(None, [os.environ.get("PYTHONPATH")])]
)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are small, and a core has a worker

import jaxtyping
import pytest

import shape_checks
from alone import pytest_runtest_protocol

__all__ = ["pytest_runtest_protocol"]

shape_checks.install()


def pytest_collection_finish() -> None:
    """What all those imports made stays: looking for garbage in it again and again takes long."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _unchecked(request: pytest.FixtureRequest) -> Iterator[None]:
    """Without the checks, for tests of the errors that users see for a wrong shape or type."""
    unchecked = request.node.get_closest_marker("unchecked") is not None
    jaxtyping.config.update("jaxtyping_disable", unchecked)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
