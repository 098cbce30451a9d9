"""Every test runs offline: see guard.py."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import setuptools  # noqa: F401 - before a test compiles: the compiler imports it late, and in one whole run its own distutils was not found then
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).resolve().parent))

from guard import install

settings.register_profile("same", derandomize=True, deadline=None, database=None)    # a green run does not hang on luck
settings.register_profile("search", deadline=None, max_examples=1000)                # HYPOTHESIS_PROFILE=search looks for new cases
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


def pytest_configure(config: pytest.Config) -> None:
    "Install the network guard, and one thread for PyTorch and numpy, before anything is imported by a test: workers with more wait for each other."
    install(config)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    "PyTorch on one thread for a whole module: its sums are then the same everywhere, and busy cores do not stall each other."
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
