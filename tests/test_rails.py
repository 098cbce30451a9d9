"Rails under a policy: whatever a rail does, the request gets its answer and the verdict says what happened."

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmops_ref.core import BadInputError
from llmops_ref.rails import (
    MOST_FINDINGS,
    BlockedError,
    Category,
    Finding,
    Outcome,
    Policy,
    PolicyFileError,
    RailFailure,
    RailPolicy,
    RailRunner,
    Subject,
    Verdict,
    decide,
    rail,
    redact,
)

SECRET = "zebra crossing at midnight"
QUICK = Policy.from_dict({"defaults": {"budget_ms": 120}})


def finding(span: tuple[int, int] | None = (0, 1), replacement: str | None = None, **more: Any) -> Finding:
    return Finding(**{"rail": "x", "category": Category.POLICY, "severity": "low", "score": 1.0, "span": span, "explanation": "why", "replacement": replacement, **more})


def broken_iterator(error: BaseException | None) -> Iterator[Finding]:
    yield finding((0, 2), "[found]")
    if error:
        raise error
    time.sleep(5)


async def later(value: Any, seconds: float = 0.0) -> Any:
    await asyncio.sleep(seconds)
    return value


async def blocks() -> list[Finding]:
    time.sleep(5)
    return []


def burn() -> None:
    while True:
        pass


def refuse_to_die() -> None:
    end = time.monotonic() + 5
    while time.monotonic() < end:
        with contextlib.suppress(BaseException):
            time.sleep(0.01)


def fail(error: BaseException) -> None:
    raise error


def leave() -> None:
    sys.exit(f"with {SECRET}")


BROKEN: dict[str, tuple[Callable[[], Any], str]] = {
    "raises": (lambda: fail(ValueError(SECRET)), "error"),
    "exits": (leave, "error"),
    "interrupts": (lambda: fail(KeyboardInterrupt()), "error"),
    "generator_raises": (lambda: broken_iterator(RuntimeError(SECRET)), "error"),
    "coroutine_raises": (lambda: later(None).__await__().throw(OSError(SECRET)), "error"),
    "stops": (lambda: fail(StopIteration()), "error"),
    "deep": (lambda: json.loads("[" * 100_000), "error"),
    "hangs": (lambda: time.sleep(5), "timeout"),
    "burns": (burn, "timeout"),
    "survives": (refuse_to_die, "timeout"),
    "generator_hangs": (lambda: broken_iterator(None), "timeout"),
    "waits": (lambda: later([], 30), "timeout"),
    "blocks": (blocks, "timeout"),
    "endless": (lambda: iter(lambda: time.sleep(0.001) or finding((0, 1), "[x]"), None), "timeout"),
    "nothing": (lambda: None, "nonsense"),
    "text": (lambda: SECRET, "nonsense"),
    "number": (lambda: 3, "nonsense"),
    "true": (lambda: True, "nonsense"),
    "table": (lambda: {"score": 1}, "nonsense"),
    "one_finding": (finding, "nonsense"),
    "texts": (lambda: [SECRET], "nonsense"),
    "later_nothing": (lambda: later(None), "nonsense"),
    "nan": (lambda: [finding(score=math.nan)], "nonsense"),
    "infinite": (lambda: [finding(score=math.inf)], "nonsense"),
    "above": (lambda: [finding(score=1.5)], "nonsense"),
    "score_text": (lambda: [finding(score="1")], "nonsense"),
    "score_bool": (lambda: [finding(score=True)], "nonsense"),
    "beyond": (lambda: [finding((0, 10_000))], "nonsense"),
    "negative": (lambda: [finding((-1, 2))], "nonsense"),
    "backwards": (lambda: [finding((3, 2))], "nonsense"),
    "empty_span": (lambda: [finding((2, 2))], "nonsense"),
    "span_floats": (lambda: [finding((0.0, 1.0))], "nonsense"),
    "span_three": (lambda: [finding((0, 1, 2))], "nonsense"),
    "category": (lambda: [finding(category="LLM01")], "nonsense"),
    "severity": (lambda: [finding(severity="huge")], "nonsense"),
    "explanation": (lambda: [finding(explanation=None)], "nonsense"),
    "replacement": (lambda: [finding(replacement=3)], "nonsense"),
    "too_many": (lambda: (finding((0, 1), "[x]") for _ in range(10 * MOST_FINDINGS)), "nonsense"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rail_is_a_failure_that_the_policy_judges(name: str) -> None:
    made, kind = BROKEN[name]
    bad = rail(name, "input")(lambda subject: made())
    good = rail("good", "input")(lambda subject: [finding((0, 5), "[x]")])
    policy = QUICK if kind == "timeout" else Policy()
    subjects = [Subject(SECRET)]
    started = time.monotonic()
    outcome = RailRunner([bad, good], policy).run(subjects)
    assert time.monotonic() - started < 4
    closed = decide(policy, subjects, outcome)
    assert [(failure.rail, failure.kind, failure.closed) for failure in closed.failures] == [(name, kind, True)]
    assert closed.action == "block" and closed.text == policy.messages["input"]
    assert "zebra" not in repr(closed) + json.dumps(closed.to_dict()) + closed._repr_markdown_()
    opened = decide(replace(policy, defaults=replace(policy.defaults, on_error="open")), subjects, outcome)
    assert opened.allowed and not opened.failures[0].closed and opened.failures[0].kind == kind
    assert "good" in {one.rail for one in opened.findings}
    shadow = decide(policy.with_mode("shadow", name), subjects, outcome)
    assert shadow.allowed and shadow.would == "block"


def test_what_was_found_before_a_rail_broke_still_counts() -> None:
    policy = Policy.from_dict({"defaults": {"on_error": "open"}})
    half = rail("half", "input")(lambda subject: itertools.chain([finding(None)], broken_iterator(RuntimeError())))
    verdict = decide(policy, [Subject("hello")], RailRunner([half], policy).run([Subject("hello")]))
    assert verdict.action == "block" and verdict.findings[0].enforced and verdict.failures


def test_a_rail_that_hangs_eats_neither_time_nor_threads() -> None:
    hangs = rail("hangs", "input")(lambda subject: time.sleep(3))
    runner = RailRunner([hangs], Policy.from_dict({"defaults": {"budget_ms": 30}}))
    runner.run([Subject("x")])
    before = threading.active_count()
    started = time.monotonic()
    kinds = [runner.run([Subject("x")]).failures[0].kind for _ in range(200)]
    assert set(kinds) == {"timeout"} and time.monotonic() - started < 3 and threading.active_count() <= before + 4


def test_a_rail_that_was_slow_is_asked_again() -> None:
    slow = [0.3]

    def sometimes(subject: Subject) -> list[Finding]:
        time.sleep(slow[0])
        return []

    runner = RailRunner([rail("sometimes", "input")(sometimes)], Policy.from_dict({"defaults": {"budget_ms": 100}}), rest_seconds=0.2)
    for _ in range(3):
        assert runner.run([Subject("x")]).failures
    slow[0] = 0.0
    deadline = time.monotonic() + 10
    while runner.run([Subject("x")]).failures and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runner.run([Subject("x")]).failures


def test_many_requests_at_once_get_their_own_verdicts() -> None:
    @rail("echo", "input")
    def echo(subject: Subject) -> list[Finding]:
        time.sleep(0.002)
        return [finding((0, len(subject.text)), subject.text[::-1])]

    policy = Policy.from_dict({"defaults": {"budget_ms": 20_000}})
    runner, wrong = RailRunner([echo], policy), []

    def ask(number: int) -> None:
        for count in range(10):
            text = f"text {number} {count}"
            if decide(policy, [Subject(text)], runner.run([Subject(text)])).text != text[::-1]:
                wrong.append(text)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_event_loop_goes_on_while_rails_hang() -> None:
    hangs = rail("hangs", "input")(lambda subject: time.sleep(2))
    runner = RailRunner([hangs], Policy.from_dict({"defaults": {"budget_ms": 400}}))

    async def both() -> tuple[Outcome, int]:
        asked = asyncio.create_task(runner.arun([Subject("x")]))
        ticks = 0
        while not asked.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return await asked, ticks

    outcome, ticks = asyncio.run(both())
    assert outcome.failures[0].kind == "timeout" and ticks > 5


def test_asynchronous_rails_share_one_loop() -> None:
    loops = []

    @rail("service", "input")
    async def service(subject: Subject) -> list[Finding]:
        loops.append(asyncio.get_running_loop())
        return [finding((0, 1))]

    runner = RailRunner([service], Policy())
    assert runner.run([Subject("x")]).findings and asyncio.run(runner.arun([Subject("x")])).findings
    assert loops[0] is loops[1]


def test_an_interpreter_with_hung_rails_exits() -> None:
    code = (
        "import time, asyncio\nfrom llmops_ref.rails import *\n"
        "p = Policy.from_dict({'defaults': {'budget_ms': 50}})\n"
        "async def forever(subject): time.sleep(600)\n"
        "def burn(subject):\n    while True: pass\n"
        "rails = [rail('a', 'input')(lambda s: time.sleep(600)), rail('b', 'input')(forever), rail('c', 'input')(burn)]\n"
        "print(len(RailRunner(rails, p).run([Subject('x')]).failures))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.returncode) == ("3", 0), done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_checks_too() -> None:
    runner = RailRunner([rail("fine", "input")(lambda subject: later([finding((0, 1))]))], Policy())
    assert runner.run([Subject("x")]).findings

    def child(found: Any) -> None:
        found.value = len(runner.run([Subject("x")]).findings)

    context = multiprocessing.get_context("fork")
    found = context.Value("i", 0)
    process = context.Process(target=child, args=(found,))
    process.start()
    process.join(30)
    assert (process.exitcode, found.value) == (0, 1)


def test_what_comes_first_and_blocks_is_not_shown_to_the_others() -> None:
    seen = []

    class Size:
        name, stages, first = "size", frozenset({"input", "context"}), True

        def __call__(self, subject: Subject) -> list[Finding]:
            return [finding(None)] if len(subject.text) > 5 else []

    @rail("reader", ["input", "context"])
    def reader(subject: Subject) -> list[Finding]:
        seen.append(subject.text)
        return []

    runner = RailRunner([reader, Size()], Policy())
    subjects = [Subject("a long text", "context", part=0), Subject("short", "context", part=1)]
    assert decide(Policy(), subjects, runner.run(subjects)).parts == ("", "short") and seen == ["short"]


def test_rails_get_what_they_stand_for() -> None:
    seen = []

    def note(name: str) -> Callable[[Subject], list[Finding]]:
        return lambda subject: seen.append((name, subject.stage)) or []    # type: ignore[func-returns-value]

    rails = [rail("text", ["input", "output"])(note("text")), rail("picture", "input", reads="image")(note("picture")), rail("never", "input")(note("never"))]
    runner = RailRunner(rails, Policy.from_dict({"rails": {"never": {"mode": "off"}}}))
    outcome = runner.run([Subject("a"), Subject("b", "context"), Subject("", metadata={"image": b"x"}), Subject("c", "output")])
    assert seen == [("text", "input"), ("text", "output"), ("picture", "input")] and set(outcome.timings_ms) == {"text", "picture"}


# ------------------------------------------------------------------ policies and verdicts


@settings(max_examples=60)
@given(text=st.text(max_size=60), spans=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=8))
def test_redaction_leaves_nothing_of_what_was_found_and_all_of_the_rest(text: str, spans: list[tuple[int, int]]) -> None:
    found = [finding((start, min(start + length, len(text))), "\uffff") for start, length in spans if start < len(text)]
    hidden = {place for one in found if one.span for place in range(*one.span)}
    kept = "".join(character for place, character in enumerate(text) if place not in hidden)
    result = redact(text, found)
    assert result.replace("\uffff", "") == kept.replace("\uffff", "")
    assert bool(found) == ("\uffff" in result) or "\uffff" in text


def test_the_widest_of_overlapping_findings_gives_the_replacement() -> None:
    found = [finding((0, 4), "[a]"), finding((2, 12), "[b]"), finding((11, 13), "[c]"), finding((13, 14), "[d]")]
    assert redact("0123456789abcdef", found) == "[b][d]ef"


@pytest.mark.parametrize(("threshold", "own", "score", "action"), [
    (None, None, 0.49, "allow"), (None, None, 0.5, "block"), (None, 0.99, 0.98, "allow"), (None, 0.99, 0.99, "block"), (0.3, 0.99, 0.31, "block"), (1.0, None, 0.99, "allow"),
])
def test_thresholds(threshold: float | None, own: float | None, score: float, action: str) -> None:
    class Scored:
        name, stages = "scored", frozenset({"input"})

        def __call__(self, subject: Subject) -> list[Finding]:
            return [finding(None, score=score)]

    if own is not None:
        Scored.threshold = own    # type: ignore[attr-defined]
    policy = Policy.from_dict({"rails": {"scored": {} if threshold is None else {"threshold": threshold}}})
    verdict = decide(policy, [Subject("x")], RailRunner([Scored()], policy).run([Subject("x")]))
    assert verdict.action == action and verdict.score == score and verdict.findings[0].enforced == (action == "block")


def test_messages_come_from_the_rail_that_weighs_most() -> None:
    policy = Policy.from_dict({"rails": {"mild": {"message": "mild"}, "grave": {"message": "grave"}}, "messages": {"output": "nothing"}})
    findings = (finding(None, rail="mild"), finding(None, rail="grave", severity="critical"))
    assert decide(policy, [Subject("x")], Outcome(findings)).text == "grave"
    assert decide(policy, [Subject("x", "output")], Outcome((finding(None, rail="other"),))).text == "nothing"


def test_a_failure_closes_only_what_was_not_checked() -> None:
    subjects = [Subject("one", "context", part=0), Subject("two", "context", part=1)]

    def second_fails(subject: Subject) -> list[Finding]:
        return [] if subject.part == 0 else fail(ValueError())    # type: ignore[return-value]

    verdict = decide(Policy(), subjects, RailRunner([rail("r", "context")(second_fails)], Policy()).run(subjects))
    assert verdict.parts == ("one", "") and verdict.action == "redact" and verdict.failures[0].parts == (1,)


BAD_FILES = {
    "[rails.card]\nmdoe = 'off'": "mdoe", "[rails.card]\nmode = 'on'": "mode", "[rails.card]\nthreshold = 2": "threshold", "[rails.card]\nthreshold = true": "threshold",
    "[rails.card]\nthreshold = nan": "threshold", "[rails.card]\nbudget_ms = 0": "budget_ms", "[rails.card]\nbudget_ms = inf": "budget_ms", "[rails.card]\non_error = 'maybe'": "on_error",
    "[rails.card]\naction = 'allow'": "action", "[rails.card]\nmessage = 3": "message", "[rails.card]\noptions = 3": "options", "[rails]\ncard = 1": "rails.card", "rails = 1": "rails",
    "[message]\ninput = 'x'": "message", "[messages]\ninputs = 'x'": "inputs", "[messages]\ninput = ''": "messages.input", "version = []": "version", "[rails.card": "TOML", "defaults = 1": "defaults",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_mistakes_in_a_policy_file_are_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "house.toml").write_text(text)
    with pytest.raises(PolicyFileError) as caught:
        Policy.from_file(tmp_path / "house.toml")
    assert "house.toml" in str(caught.value) and BAD_FILES[text] in str(caught.value) and caught.value.remedy
    assert str(tmp_path) not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b"version = '\xe9'")
    for path in (tmp_path / "absent.toml", tmp_path, tmp_path / "latin.toml"):
        with pytest.raises(PolicyFileError):
            Policy.from_file(path)


def test_the_version_follows_the_content() -> None:
    data = {"version": "7", "rails": {"a": {"threshold": 0.4}, "b": {"options": {"names": ["x"]}}}}
    policy = Policy.from_dict(data)
    assert policy.version.startswith("7+") and policy.version == Policy.from_dict(dict(reversed(data.items()))).version
    changed = [{**data, "version": "8"}, {**data, "rails": {}}, {**data, "defaults": {"on_error": "open"}}, {**data, "messages": {"input": "no"}}]
    assert len({policy.version, *(Policy.from_dict(one).version for one in changed)}) == 5
    assert policy.with_mode("shadow").of("a").mode == policy.with_mode("shadow").of("unnamed").mode == "shadow"
    assert policy.with_mode("off", "c").of("c").mode == "off" and policy.with_mode("off", "c").of("a").mode == "enforce"


def test_the_shipped_policy_reads() -> None:
    policy = Policy.default()
    assert policy.of("size").mode == "enforce" and policy.of("injection").on_error == "closed"


@pytest.mark.parametrize("make", [
    lambda: rail("", "input"), lambda: rail("a b", "input"), lambda: rail("a", "inputs"), lambda: rail("a", []), lambda: rail("a", "input", lookback=0),
    lambda: rail("a", "input", lookback=True), lambda: RailRunner([print], Policy()), lambda: RailRunner([None], Policy()),
    lambda: Policy().with_mode("on"),
])
def test_bad_input_is_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(BadInputError) as caught:
        make()
    assert caught.value.remedy


def test_errors_and_verdicts_travel_between_processes() -> None:
    verdict = Verdict("block", "no", (finding(),), {"x": 1.0}, "1", (RailFailure("x", "error", "E"),), ("",))
    again = pickle.loads(pickle.dumps(BlockedError(verdict)))
    assert again.verdict == verdict and str(again) == "no"
    assert json.loads(json.dumps(verdict.to_dict(text=True)))["text"] == "no"
    assert "| x |" in verdict._repr_markdown_()
    assert RailPolicy() == RailPolicy() and Policy().version == Policy().version


def test_one_caller_with_long_texts_does_not_stop_a_rail_for_all() -> None:
    slow = rail("slow", "input")(lambda subject: time.sleep(0.2 if len(subject.text) > 5_000 else 0) or [])    # type: ignore[func-returns-value]
    runner = RailRunner([slow], Policy.from_dict({"defaults": {"budget_ms": 60}}), most_stuck=50)
    assert all(runner.run([Subject("x" * 6_000)]).failures for _ in range(5))
    assert any(not runner.run([Subject("short")]).failures for _ in range(3))
