"""A guard of words, for tests of what is built around a guard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Found:
    rail: str
    enforced: bool = True
    explanation: str = "a word"
    category: str = "LLM01"
    severity: str = "high"
    score: float = 1.0
    span: tuple[int, int] | None = None


@dataclass
class Said:
    action: str
    text: str
    findings: tuple[Found, ...] = ()
    score: float = 0.0
    parts: tuple[str, ...] = ()
    failures: tuple[Any, ...] = ()
    policy_version: str = "1"

    def to_dict(self, *, text: bool = False) -> dict[str, Any]:
        return {"action": self.action, "text": self.text}


class Words:
    "A rail that minds some words."

    def __init__(self, name: str, stages: tuple[str, ...], *words: str) -> None:
        self.name, self.stages, self.words = name, frozenset(stages), words


@dataclass
class Version:
    version: str = "1"


class WordGuard:
    "A guard of such rails; passages are dropped, the rest is blocked."

    def __init__(self, rails: Any, policy: Any = None) -> None:
        self.rails, self.policy, self.asked = list(rails), policy or Version(), 0

    def _check(self, stage: str, text: str) -> Said:
        self.asked += 1
        found = tuple(Found(rail.name) for rail in self.rails if stage in rail.stages and any(word in text.lower() for word in rail.words))
        return Said("block" if found else "allow", "No." if found else text, found, float(bool(found)), ("" if found else text,))

    def check_input(self, text: str) -> Said:
        return self._check("input", text)

    def check_context(self, passages: Any, question: str = "") -> Said:
        each = [self._check("context", text) for text in passages]
        findings = tuple(one for said in each for one in said.findings)
        return Said("redact" if findings else "allow", "", findings, max(said.score for said in each), tuple(said.parts[0] for said in each))

    def check_output(self, answer: str, passages: Any = (), question: str = "") -> Said:
        return self._check("output", answer)
