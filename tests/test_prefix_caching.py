"Prompts that begin alike: ordering, measuring, pricing, isolation, without an engine."

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmops_ref.core import BadInputError
from llmops_ref.prefix_caching import (
    CHANGES,
    Part,
    SaltError,
    approximate_tokens,
    bench_prefix_caching,
    expected_saving,
    find_breaks,
    order_for_reuse,
    prefix_table,
    read_prompt,
    reusable_fraction,
    reuse_offers,
    tenant_salt,
)

RULES = "The branch manager signs the list every evening. " * 12

parts_strategy = st.lists(
    st.builds(Part, text=st.text("ab 7.", max_size=12), changes_per=st.sampled_from(CHANGES), system=st.booleans(), fixed=st.booleans()), max_size=8
)


class FakeEngine:
    "An engine with one shared cache: it reuses the longest beginning of any earlier prompt, and keeps what it reads."

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def tokenize(self, text: str) -> list[Any]:
        return approximate_tokens(text)

    def complete(self, prompt: str, tokens: int, **options: Any) -> dict[str, Any]:
        now = approximate_tokens(prompt)
        shared = max((sum(1 for _ in iter_equal(now, old)) for old in self.seen), default=0) if options["cache_prompt"] else 0
        shared = min(shared, len(now) - 1)
        self.seen.append(now)
        return {"timings": {"cache_n": shared, "prompt_n": len(now) - shared, "prompt_ms": 1.0 + len(now) - shared}}


def iter_equal(first: list[str], second: list[str]) -> Any:
    for one, other in zip(first, second, strict=False):
        if one != other:
            return
        yield one


@settings(max_examples=200)
@given(parts_strategy)
def test_ordering_keeps_every_part_and_every_rule(parts: list[Part]) -> None:
    plan = order_for_reuse(parts)
    key = repr
    assert sorted(map(key, plan.parts)) == sorted(key(part) for part in parts if part.text)
    assert [part.system for part in plan.parts] == sorted((part.system for part in plan.parts), reverse=True)
    for system in (True, False):
        assert [part for part in plan.parts if part.fixed and part.system is system] == [part for part in parts if part.text and part.fixed and part.system is system]
    assert 0 <= plan.reusable_fraction <= 1
    shares = [boundary.tokens for boundary in plan.boundaries]
    assert shares == sorted(shares) and all(0 <= boundary.usable <= boundary.tokens <= plan.tokens for boundary in plan.boundaries)


@settings(max_examples=200)
@given(parts_strategy, st.randoms(use_true_random=False))
def test_no_allowed_order_shares_more_than_the_plan(parts: list[Part], random_order: random.Random) -> None:
    "Letters as tokens: any order that keeps the rules shares at most as much, at every level."
    free = [replace(part, fixed=False, system=False) for part in parts]
    shuffled = random_order.sample(free, len(free))
    best, other = order_for_reuse(free, tokenize=list), order_for_reuse(shuffled, tokenize=list, as_given=True)
    assert all(mine.tokens >= theirs.tokens for mine, theirs in zip(best.boundaries, other.boundaries, strict=True))
    fixed = order_for_reuse(parts, tokenize=list)
    if not any(part.system for part in parts):
        written = order_for_reuse(parts, tokenize=list, as_given=True)
        assert all(mine.tokens >= theirs.tokens for mine, theirs in zip(fixed.boundaries, written.boundaries, strict=True))


@settings(max_examples=150)
@given(st.lists(st.text("ab ", max_size=10), min_size=1, max_size=8), st.integers(1, 4), st.integers(0, 6), st.sampled_from([None, 0, 1, 3]))
def test_measured_reuse_is_the_longest_earlier_beginning(prompts: list[str], block: int, minimum: int, remember: int | None) -> None:
    report = reusable_fraction(prompts, tokenize=list, block=block, minimum=minimum, remember=remember)
    for turn, prompt in enumerate(prompts):
        earlier = prompts[max(0, turn - remember) : turn] if remember is not None else prompts[:turn]
        shared = max((len(list(iter_equal(list(prompt), list(old)))) for old in earlier), default=0)
        shared = min(shared // block * block, max(len(prompt) - 1, 0)) // block * block
        assert report.reused[turn] == (shared if shared >= minimum else 0)
        assert report.reused[turn] + report.stored[turn] <= report.tokens[turn] == len(prompt)
    assert 0 <= report.fraction <= 1


@settings(max_examples=100)
@given(st.lists(st.tuples(st.text("ab", max_size=6), st.integers(0, 2)), min_size=1, max_size=10))
def test_scopes_share_nothing(rows: list[tuple[str, int]]) -> None:
    prompts, scopes = [text for text, _ in rows], [scope for _, scope in rows]
    together = reusable_fraction(prompts, tokenize=list, scopes=scopes)
    for scope in set(scopes):
        alone = reusable_fraction([text for text, owner in rows if owner == scope], tokenize=list)
        assert [count for count, owner in zip(together.reused, scopes, strict=True) if owner == scope] == list(alone.reused)


def test_a_tokenizer_that_joins_letters_across_the_seam_is_believed() -> None:
    "Pairs of letters as tokens: an odd number of letters shifts every pair behind it, and the count must notice."
    def pairs(text: str) -> list[str]:
        return [text[start : start + 2] for start in range(0, len(text), 2)]

    plan = order_for_reuse([Part("abc"), Part("xyz", "request")], tokenize=pairs, separator="")
    assert plan.boundaries[0].tokens == 1    # "ab"; "cx" is another token than "c"


def test_messages_and_display() -> None:
    plan = order_for_reuse([Part("Hello", "request"), Part("Be brief.", system=True), Part("Rules|here", name="a|b")])
    assert plan.messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Rules|here\n\nHello"}]
    assert "a b" in plan._repr_markdown_() and plan.to_dict()["reusable_fraction"] == plan.reusable_fraction
    assert order_for_reuse([]).reusable_fraction == 0 and order_for_reuse([]).text == ""
    assert order_for_reuse([Part(RULES), Part("x", "request")], minimum=10_000).reusable_fraction == 0


@pytest.mark.parametrize(
    ("part", "word"),
    [
        (Part("Started at 09:30:12."), "time of day"),
        (Part("Session 123e4567-e89b-12d3-a456-426614174000"), "identifier"),
        (Part("You talk to Dana.", "user", system=True), "more stable"),
    ],
)
def test_a_plan_warns_of_what_is_not_stable(part: Part, word: str) -> None:
    assert any(word in warning for warning in order_for_reuse([part, Part(RULES), Part("Why?", "request")]).warnings)


def test_a_clean_plan_does_not_warn() -> None:
    assert not order_for_reuse([Part("Why at 10:15?", "request"), Part(RULES), Part("Be brief.", system=True)]).warnings


TOOLS = [{"name": "balance", "args": {"a": 1, "b": 2}}, {"name": "block", "args": {}}]


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        ("time stamp", "Now: 2026-11-22T10:15:01\n" + RULES, "Now: 2026-11-22T10:16:40\n" + RULES),
        ("identifier", "Request 91af23bc77.\n" + RULES, "Request 03bd88aa12.\n" + RULES),
        ("json order", json.dumps(TOOLS) + "\n" + RULES, json.dumps(TOOLS[::-1]) + "\n" + RULES),
        ("json order", json.dumps(TOOLS, indent=1) + "\n" + RULES, json.dumps(TOOLS[::-1], indent=1) + "\n" + RULES),
        ("name", "You answer Dana Brook.\n" + RULES, "You answer Alex Reed.\n" + RULES),
        ("text", "the weather is fine today\n" + RULES, "nothing of that sort\n" + RULES),
    ],
)
def test_breaks_are_found_and_named(kind: str, first: str, second: str) -> None:
    found = find_breaks([first, second, first])
    assert [item.kind for item in found] == [kind]
    assert found[0].pairs == 2 and found[0].lost >= 2 * len(approximate_tokens(RULES.strip())) - 40 and found[0].remedy


def test_what_differs_at_the_end_is_no_break() -> None:
    assert find_breaks([RULES + "\nWhat is due at 10:15?", RULES + "\nWho signs?", RULES]) == ()
    assert find_breaks([RULES, RULES]) == () and find_breaks([RULES]) == () and find_breaks([]) == ()
    find_breaks(["{" * 30 + RULES, "[" * 30 + RULES])    # unbalanced brackets must not raise


def test_saving_is_the_price_list_applied_to_the_counts() -> None:
    report = reusable_fraction(["abcd", "abcd", "abce"], tokenize=list)
    assert report.reused == (0, 3, 3) and report.stored == (4, 1, 1)
    saving = expected_saving(report, {"input": 2.0, "cached_input": 0.5, "cache_write": 3.0})
    assert saving.without == pytest.approx(12 * 2e-6) and saving.with_reuse == pytest.approx((6 * 0.5 + 6 * 3.0) * 1e-6)
    assert saving.share.value == pytest.approx(1 - saving.with_reuse / saving.without) and saving.share.low <= saving.share.value <= saving.share.high
    below = reusable_fraction(["abcd", "efgh"], tokenize=list, minimum=5)
    assert expected_saving(below, {"input": 2.0, "cached_input": 0.5, "cache_write": 3.0}).share.value == 0    # nothing stored, nothing charged
    never = reusable_fraction(["abcd", "efgh"], tokenize=list)
    assert expected_saving(never, {"input": 2.0, "cached_input": 0.5, "cache_write": 3.0}).share.value == pytest.approx(-0.5)


def test_the_engine_and_the_count_agree_and_the_salt_isolates() -> None:
    engine, prompts = FakeEngine(), [RULES + "Who?", RULES + "When?", "Else. " + RULES]
    reads = [read_prompt(engine, prompt) for prompt in prompts]
    assert [read.reused for read in reads] == list(reusable_fraction(prompts).reused)
    secret = b"sixteen bytes at least"
    one, two = tenant_salt("acme", secret), tenant_salt("bora", secret)
    assert one != two and one == tenant_salt("acme", secret) != tenant_salt("acme", secret + b"!") and "acme" not in one
    read_prompt(engine, one + RULES)
    assert read_prompt(engine, one + RULES).reused > 20 > read_prompt(engine, two + RULES).reused
    read_prompt(engine, "Letter to Kim. " + RULES, reuse=False)    # opting out protects nobody
    assert read_prompt(engine, "Letter to Kim. " + RULES).reused > 20


def test_the_bench_writes_a_whole_file_and_its_table(tmp_path: Any) -> None:
    out = tmp_path / "deep" / "prefix.json"
    result = bench_prefix_caching(out, engine=FakeEngine(), lengths=(40, 80), repeats=2, guesses=2, progress=False)
    assert json.loads(out.read_text(encoding="utf-8")) == result and result["versions"]["python"] and result["date"]
    table = prefix_table(result)
    assert [row["shared length"] for row in table] == ["40", "80"]
    assert all(int(row["stable first: tokens computed"]) < int(row["stable last: tokens computed"]) for row in table)
    by = {(row["isolation"], row["by_count"]) for row in result["attacks"]}
    assert ("none", True) in by and ("salt", True) not in by


def test_bad_input_says_what_to_do() -> None:
    good = reusable_fraction(["a b", "a b"])
    for attempt in (
        lambda: Part("x", "hourly"),  # type: ignore[arg-type]
        lambda: order_for_reuse(["text"]),  # type: ignore[list-item]
        lambda: order_for_reuse([Part("x")], block=0),
        lambda: reusable_fraction([]),
        lambda: reusable_fraction(["a"], scopes=["x", "y"]),
        lambda: reusable_fraction(["a"], remember=-1),
        lambda: expected_saving(good, {"input": 1.0}),
        lambda: expected_saving(good, {"input": float("nan"), "cached_input": 1}),
    ):
        with pytest.raises(BadInputError):
            attempt()
    for tenant, secret in (("", b"x" * 32), ("acme", b"short")):
        with pytest.raises(SaltError):
            tenant_salt(tenant, secret)


def test_the_shipped_table_names_its_sources() -> None:
    offers = reuse_offers()
    assert {"vLLM", "OpenAI", "DeepSeek"} <= {offer.name for offer in offers} and len({offer.name for offer in offers}) == len(offers)
    for offer in offers:
        assert offer.source.startswith("https://") and offer.checked in ("official page", "copy", "third party")
        assert offer.minimum >= 0 and offer.block >= 1 and 0 <= offer.read <= 1 <= offer.write and offer.to_dict()["read_on"] == offer.read_on.isoformat()
