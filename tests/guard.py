"""The network guard as a pytest plugin: installed in this process, inherited by its children, checked after each test."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent / "network_guard"
PLUGIN = "llmops-ref-network-guard"


class NetworkGuard:
    "Fails every test, chapter cells included, during which anything tried to leave this machine."

    def __init__(self) -> None:
        handle, name = tempfile.mkstemp(prefix="llmops-ref-network-")
        os.close(handle)
        self.log = Path(name)
        os.environ["LLMOPS_REF_NETWORK_LOG"] = name
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(FOLDER), os.environ.get("PYTHONPATH")]))
        sys.path.insert(0, str(FOLDER))
        sys.modules.pop("sitecustomize", None)
        __import__("sitecustomize")

    def attempts(self) -> list[str]:
        "What was tried so far, in this process and the ones it started."
        return self.log.read_text(encoding="utf-8").splitlines()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        "Run the test; fail it where an attempt was made that its own code swallowed."
        before = len(self.attempts())
        result = yield
        new = self.attempts()[before:]
        if new and item.get_closest_marker("tries_network") is None:
            pytest.fail(f"This test tried to leave the machine: {', '.join(new)}", pytrace=False)
        return result

    def pytest_unconfigure(self) -> None:
        "Remove the log."
        self.log.unlink(missing_ok=True)


def install(config: pytest.Config) -> None:
    "Register the guard once, whichever conftest comes first."
    if not config.pluginmanager.hasplugin(PLUGIN):
        config.addinivalue_line("markers", "tries_network: tries to leave the machine on purpose, to test the guard")
        config.pluginmanager.register(NetworkGuard(), PLUGIN)
