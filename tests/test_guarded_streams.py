"A guarded stream lets nothing out that a check of the whole answer would have stopped, however it is cut."

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import AsyncIterator, Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmops_ref.guarded_streams import StreamGate, aguard_stream, guard_stream, settled
from llmops_ref.rails import BlockedError, Category, Finding, Policy, RailRunner, Subject, decide, rail


def found(span: tuple[int, int] | None, replacement: str | None = None) -> Finding:
    return Finding("", Category.POLICY, "high", 1.0, span, "found", replacement)


@rail("code", "output", lookback=8)
def code(subject: Subject) -> list[Finding]:
    return [found(match.span(), "[code]") for match in re.finditer(r"\bK\d{1,6}\b", subject.text)]


@rail("name", "output", lookback=12)
def name(subject: Subject) -> list[Finding]:
    return [found(match.span(), "[name]") for match in re.finditer(r"Ann K\d{0,3}|👩‍👧", subject.text)]


@rail("banned", "output", lookback=6)
def banned(subject: Subject) -> list[Finding]:
    return [found(match.span()) for match in re.finditer("secret", subject.text)]


@rail("long", "output")
def long_answer(subject: Subject) -> list[Finding]:
    return [found(None)] if subject.text.count("é") > 3 else []


def cut(text: str, places: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[start:end] for start, end in itertools.pairwise(edges)] or [""]


PIECES = st.lists(st.sampled_from(["K12", "K", "123", "Ann ", "Ann K1", "sec", "ret", "secret", " ", ". ", "a", "é", "👩", "\u200d", "👧", "👩‍👧", "word " * 5, "x" * 40]), max_size=30).map("".join)


@pytest.mark.parametrize("whole", [False, True])
@given(text=PIECES, places=st.lists(st.integers(0, 10_000), max_size=60), every=st.booleans())
@example(text="K12 Ann K1 secret", places=[], every=True)
def test_no_chunking_lets_anything_out(whole: bool, text: str, places: list[int], every: bool) -> None:
    runner = RailRunner([code, name, banned, *([long_answer] if whole else [])], Policy())
    subject = [Subject(text, "output", "assistant")]
    full = decide(runner.policy, subject, runner.run(subject))
    gate = StreamGate(runner, least=1)
    shown: list[str] = []
    try:
        for piece in guard_stream(list(text) if every else cut(text, places), gate):
            shown.append(piece)
    except BlockedError as error:
        assert not full.allowed and error.verdict.action == "block"
        first = min((finding.span[0] for finding in full.findings if finding.span and finding.replacement is None), default=0)
        before = [Subject(text[:first], "output")]
        assert decide(runner.policy, before, runner.run(before)).text.startswith("".join(shown))
        assert not (whole and shown)
    else:
        assert full.allowed and "".join(shown) == full.text
    assert gate.verdict is not None and gate.verdict.action == full.action
    assert "".join(shown) == gate.text


def test_text_leaves_before_the_answer_ends() -> None:
    gate = StreamGate(RailRunner([code, banned], Policy()))
    shown = [gate.feed("word ") for _ in range(100)]
    assert len("".join(shown)) > 300
    assert "".join([*shown, gate.close()]) == "word " * 100


def test_a_rail_that_decides_by_sentences_never_sees_half_a_sentence() -> None:
    seen = []

    @rail("whole_sentences", "output", lookback="sentence")
    def whole_sentences(subject: Subject) -> list[Finding]:
        seen.append(subject.text)
        return [found((match.start(), match.end()), "") for match in re.finditer(r"[^.]*never[^.]*\.", subject.text)]

    text = "The fee is 8 pounds. It never changes at all. You pay it by card. It is due in May. We write to you before. You may ask us."
    gate = StreamGate(RailRunner([whole_sentences], Policy()), least=1)
    assert "".join(guard_stream(list(text), gate)) == text.replace(" It never changes at all.", "")
    assert all(part.rstrip().endswith(".") for part in seen if part)


def test_the_model_is_stopped_as_soon_as_the_answer_is_lost() -> None:
    asked, closed = [], []

    def model() -> Iterator[str]:
        try:
            for number in range(10_000):
                asked.append(number)
                yield "a secret " if number == 3 else "a word "
        finally:
            closed.append(True)

    gate = StreamGate(RailRunner([banned], Policy()))
    pieces = list(guard_stream(model(), gate, on_block="message"))
    assert len(asked) < 50 and closed == [True]
    assert pieces[-1].strip() == Policy().messages["output"] and "secret" not in "".join(pieces)


def test_a_rail_with_a_lookback_that_is_too_short_ends_the_answer() -> None:
    @rail("liar", "output", lookback=1)
    def liar(subject: Subject) -> list[Finding]:
        return [found((0, 5), "[late]")] if subject.text.endswith("!") else []

    gate = StreamGate(RailRunner([liar], Policy()), least=1)
    with pytest.raises(BlockedError) as caught:
        list(guard_stream(["some ", "words ", "and ", "more", "!"], gate))
    assert caught.value.verdict.failures[0].kind == "nonsense" and "[late]" not in gate.text


def test_a_rail_that_breaks_closes_the_stream_or_not_as_the_policy_says() -> None:
    @rail("broken", "output", lookback=4)
    def broken(subject: Subject) -> list[Finding]:
        raise ValueError

    text = "word " * 60
    with pytest.raises(BlockedError):
        list(guard_stream(text.split(" "), StreamGate(RailRunner([broken], Policy()))))
    for settings in ({"on_error": "open"}, {"mode": "shadow"}):
        policy = Policy.from_dict({"rails": {"broken": settings}})
        gate = StreamGate(RailRunner([broken], policy))
        assert "".join(guard_stream([text], gate)) == text
        assert gate.verdict is not None and gate.verdict.failures[0].kind == "error"


def test_asynchronous_streams_are_held_alike() -> None:
    async def model() -> AsyncIterator[str]:
        for piece in ["My code ", "is K1", "2, ", "ok?", " " * 80]:
            yield piece

    async def read() -> str:
        return "".join([piece async for piece in aguard_stream(model(), StreamGate(RailRunner([code], Policy())))])

    assert asyncio.run(read()).strip() == "My code is [code], ok?"


def test_the_work_of_all_checks_stays_linear() -> None:
    read = []

    @rail("counts", "output", lookback=4)
    def reader(subject: Subject) -> list[Finding]:
        read.append(len(subject.text))
        return []

    for length in (2_000, 200_000):
        read.clear()
        list(guard_stream(["x"] * length, StreamGate(RailRunner([reader], Policy()))))
        assert sum(read) < 12 * length


def test_what_is_settled() -> None:
    assert settled("0123456789", 3) == 7 and settled("short", 100) == 0 and settled("One. Two. Three.", None) == 0
    assert settled("One is. Two are. Three were.", "sentence") == len("One is. ")
