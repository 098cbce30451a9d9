"""The main job with the network gone: demo, ingest and ask, under the guard and in a network namespace."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HANDBOOK = ROOT / "llmops_ref" / "data" / "handbook"
RUN = "import sys; from llmops_ref.cli import main; sys.exit(main())"
LOOPBACK_ONLY = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("llmops_ref.cli") is None, reason="the command line is not there yet")


def llmops_ref(
    *arguments: str | Path,            # what follows `llmops-ref`
    prefix: tuple[str, ...] = (),      # a command to run it under
) -> subprocess.CompletedProcess[str]:
    "Run the command line in a process of its own, which inherits the network guard."
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], str(ROOT)])}
    return subprocess.run([*prefix, sys.executable, "-c", RUN, *map(str, arguments)], env=environment, capture_output=True, text=True)


def namespace_works() -> bool:
    "Tell whether this system lets us make a network namespace that has only loopback."
    if sys.platform != "linux" or not shutil.which("unshare") or not shutil.which("ip"):
        return False
    return subprocess.run([*LOOPBACK_ONLY, "true"], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "An index of the sample handbook, ingested under the guard."
    folder = tmp_path_factory.mktemp("offline") / "index"
    done = llmops_ref("ingest", HANDBOOK, "--index", folder, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["added"] and not report["failed"] and report["chunks"] > report["added"]
    return folder


def test_ingest_again_offline_changes_nothing(index: Path) -> None:
    done = llmops_ref("ingest", HANDBOOK, "--index", index, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["added"], report["updated"], report["deleted"]) == (0, 0, 0)


def test_ask_offline_answers_with_citations(index: Path) -> None:
    done = llmops_ref("ask", "How much can I withdraw at the post office in a day?", "--index", index, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["text"] and answer["citations"] and not answer["refused"]


@pytest.mark.slow
def test_demo_offline() -> None:
    done = llmops_ref("demo")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("?") >= 3


@pytest.mark.slow
@pytest.mark.skipif(not namespace_works(), reason="no network namespaces here")
def test_ask_where_only_loopback_exists(index: Path) -> None:
    "Compiled code too: in this namespace no socket of any kind reaches another machine."
    done = llmops_ref("ask", "How much can I withdraw at the post office in a day?", "--index", index, "--json", prefix=tuple(LOOPBACK_ONLY))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["citations"]


@pytest.mark.skipif(not namespace_works(), reason="no network namespaces here")
def test_the_namespace_has_no_way_out() -> None:
    "Proof that the test above means something: the same prefix cannot reach an address beyond loopback."
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=5)"
    done = subprocess.run([*LOOPBACK_ONLY, sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "unreachable" in done.stderr
