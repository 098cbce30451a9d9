"""Every test runs offline: see guard.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from guard import install


def pytest_configure(config: pytest.Config) -> None:
    "Install the network guard before anything is imported by a test."
    install(config)
