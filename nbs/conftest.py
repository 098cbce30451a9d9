"""What nbval needs to know about nbdev's notebooks, and the network guard for the chapters' kernels.

nbval does not read nbdev's directives, and calls the outputs of a cleaned notebook, which stores no execution
counts, "unrun". So cells that are never evaluated are skipped, and every other cell counts as run: a cell that
prints what it did not print before fails, as does one that prints nothing where something is stored.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from guard import install

REPEATABLE = {    # the same answers and outputs on every machine
    "LLMOPS_REF_CHAT_WEIGHTS": "Q4_1",
    "LLMOPS_REF_THREADS": "1",
    "OMP_NUM_THREADS": "1",    # of PyTorch and numpy: two workers with two threads each wait for each other
    "PYTHONWARNINGS": "ignore:IProgress not found",    # tqdm, where ipywidgets is not installed
}
FEWER = {"QUESTIONS": "2", "ROUNDS": "2", "TOPICS": "2", "TOKENS": "4"}    # of cells that measure: their outputs are not compared, so fewer prove as much
NOT_EVALUATED = re.compile(r"^#\|\s*eval:\s*false\s*$", re.MULTILINE | re.IGNORECASE)


def pytest_configure(config: pytest.Config) -> None:
    "Install the network guard and pin what the engine would choose by trial: kernels inherit both."
    install(config)
    os.environ.update(REPEATABLE)
    for name, value in FEWER.items():
        os.environ.setdefault(name, value)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    "Prepare the cells that nbval collected."
    for item in items:
        cell = getattr(item, "cell", None)
        if cell is None:
            continue
        if NOT_EVALUATED.search(cell.source):
            item.options["skip"] = True
        elif cell.execution_count is None:
            cell.execution_count = 1
