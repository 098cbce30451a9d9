"""A metric that writes down what it is asked, for processes that are killed while they score."""
from __future__ import annotations

import time
from pathlib import Path

from llmops_ref.evaluation import Evaluation, evaluate
from llmops_ref.evaluation_data import EvaluationDataset, EvaluationRow
from llmops_ref.metrics import Metric


def evaluate_slowly(cache: str | Path | None, log: str | Path, *, hang: bool = False) -> Evaluation:
    "Score forty rows one after the other; where `hang`, stop at the twentieth for good."

    class Words:
        name = "words"

        async def ascore(self, response: str) -> float:
            with open(log, "a") as file:
                file.write(f"{response}\n")
            if hang and response == "word 20":
                time.sleep(600)
            return len(response) / 100

    rows = tuple(EvaluationRow(f"r{number}", "q", f"word {number}") for number in range(40))
    return evaluate(EvaluationDataset(rows), [Metric("words", "1", Words)], cache=cache, workers=1, progress=False)
