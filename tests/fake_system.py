"""A system under evaluation that answers at once, and keeps count; imported by processes that are killed."""
from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

from llmops_ref.documents import Passage
from llmops_ref.evaluation_data import EvaluationDataset, EvaluationRow


class Fake:
    "A system that says what it was asked, and keeps count."

    def __init__(self, seconds: float = 0.0, k: int = 4) -> None:
        self.seconds, self.k, self.asked, self.lock = seconds, k, list[tuple[str, Any]](), threading.Lock()

    def ask(self, question: str, **wishes: Any) -> SimpleNamespace:
        with self.lock:
            self.asked.append((question, wishes.get("groups")))
        time.sleep(self.seconds)
        if "fail" in question:
            raise RuntimeError("the model is down")
        if "hang" in question:
            time.sleep(20)
        passage = Passage("Fees are £8.", "fees.md", None, "Fees > Late payments", 0.9, "c1", header="a | b")
        return SimpleNamespace(text=f"re: {question}", citations=[], passages=[passage], refused="decline" in question, declined_because="", score=None,
                               usage={"total_tokens": 3}, timings_ms={"total": time.time()}, model="fake")


def questions(number: int, text: str = "question", **metadata: Any) -> EvaluationDataset:
    return EvaluationDataset(tuple(EvaluationRow(f"r{place}", f"{text} {place}", metadata=dict(metadata)) for place in range(number)), "small")
