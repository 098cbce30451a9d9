"""Chapters are tests only if nbval fails where it should: on another output, a new one, a missing one, an error."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent


def code(source: str, printed: str = "") -> nbformat.NotebookNode:
    "A cleaned code cell: no execution count, and perhaps a stored output."
    outputs = [nbformat.v4.new_output("stream", name="stdout", text=printed)] if printed else []
    return nbformat.v4.new_code_cell(source, outputs=outputs)


CASES = {
    "same output": (code("print('as stored')", "as stored\n"), 0),
    "changed output": (code("print('as stored')", "edited by hand\n"), 1),
    "new output": (code("print('nothing is stored')"), 1),
    "missing output": (code("x = 1", "printed once\n"), 1),
    "error": (code("1 / 0"), 1),
    "leaves the machine": (code("import contextlib, socket\nwith contextlib.suppress(OSError):\n    socket.gethostbyname('example.org')"), 1),
    "measured": (code("# NBVAL_IGNORE_OUTPUT\nprint('3.2 s')", "2.9 s\n"), 0),
    "not evaluated": (code("#| eval: false\n1 / 0"), 0),
    "address": (code("print('<object at 0x7f00aa>')", "<object>\n"), 0),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    "Run all cases in one pytest run, a notebook each, and tell which ones failed."
    folder = tmp_path_factory.mktemp("repository")
    (folder / "nbs").mkdir()
    shutil.copytree(ROOT / "tests" / "network_guard", folder / "tests" / "network_guard")
    shutil.copy(ROOT / "tests" / "guard.py", folder / "tests")
    shutil.copy(ROOT / "nbs" / "conftest.py", folder / "nbs")
    shutil.copy(ROOT / ".ci" / "nbval_sanitize.cfg", folder)
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    for name, (cell, _) in CASES.items():
        nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), folder / "nbs" / f"{name.replace(' ', '_')}.ipynb")
    options = ["-q", "-rA", "-p", "no:cacheprovider", "--nbval", "--nbval-current-env", "--nbval-sanitize-with", "nbval_sanitize.cfg", "nbs"]
    done = subprocess.run([sys.executable, "-m", "pytest", *options], cwd=folder, capture_output=True, text=True)
    failed = {line.split("nbs/")[1].split(".ipynb")[0] for line in done.stdout.splitlines() if line.startswith("FAILED")}
    assert "passed" in done.stdout.splitlines()[-1], done.stdout + done.stderr
    return {name: int(name.replace(" ", "_") in failed) for name in CASES}


@pytest.mark.parametrize("case", CASES)
def test_nbval_fails_where_it_should(results: dict[str, int], case: str) -> None:
    assert results[case] == CASES[case][1]
