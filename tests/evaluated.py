"""A small evaluation to hold against a gate, with answers that try to break a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from llmops_ref.evaluation_data import EvaluationDataset, EvaluationRow
from llmops_ref.scores import Failure, Value, score


@dataclass(frozen=True)
class Facts:
    "What an evaluation says of a metric."

    judge: str | None = None
    higher_is_better: bool = True
    lowest: float = 0.0
    fingerprint: str = "1"


@dataclass(frozen=True)
class Slice:
    name: str
    score: Any


@dataclass
class FakeEvaluation:
    "Values as given, by metric and row."

    found: dict[str, dict[str, Value]]
    metrics: Mapping[str, Facts]
    dataset: EvaluationDataset
    judges: Mapping[str, Any] = field(default_factory=dict)
    cards: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=lambda: {"device": "cpu", "date": "2026-11-22"})

    def values(self, metric: str) -> dict[str, Value]:
        return self.found[metric]

    def clusters(self) -> dict[str, str]:
        return self.dataset.clusters()

    def slices(self, by: str, metric: str) -> list[Slice]:
        groups: dict[str, list[Value]] = {}
        for row, value in self.found[metric].items():
            groups.setdefault(str(self.dataset[row].metadata.get(by, "all")), []).append(value)
        return [Slice(name, score(values)) for name, values in groups.items()]

    def attribution(self) -> Any:
        return SimpleNamespace(counts={"right": 3, "wrong, evidence missed": 2})


def rows(n: int, **changes: Any) -> EvaluationDataset:
    "Questions with answers, each of a document of its own."
    return EvaluationDataset(
        tuple(
            EvaluationRow(
                f"q{number:03d}", f"What is fee {number}?", response=f"Fee {number} is £{number}.", reference=f"£{number}",
                retrieved_contexts=(f"Fee {number} is £{number} a month.", "Nothing else."), reference_context_ids=(f"fees-{number}.md#fees",),
                metadata={"kind": "lookup" if number % 3 else "table"}, **changes,
            )
            for number in range(n)
        ),
        "fees",
    )  # fmt: skip


def evaluated(values: Mapping[str, list[Value]], facts: Mapping[str, Facts] | None = None, dataset: EvaluationDataset | None = None, **more: Any) -> FakeEvaluation:
    "An evaluation of as many rows as there are values."
    dataset = dataset or rows(max(map(len, values.values())))
    found = {metric: {row.id: value for row, value in zip(dataset, given, strict=False)} for metric, given in values.items()}
    return FakeEvaluation(found, {metric: (facts or {}).get(metric, Facts()) for metric in values}, dataset, **more)


FAILED = Failure("parse", "half of a JSON object: {\"verdict\": ")
