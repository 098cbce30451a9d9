"""Answers by meaning: what is served, to whom, for how long, and what happens when everything goes wrong."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from hash_embeddings import HashEmbeddings
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain_core.embeddings import Embeddings

from llmops_ref.cache_files import CacheDegradedWarning
from llmops_ref.core import BadInputError
from llmops_ref.embeddings import EmptyTextError
from llmops_ref.exact_cache import Response, Scope
from llmops_ref.hit_calibration import CalibrationReport, calibrate
from llmops_ref.hit_verification import VERSION
from llmops_ref.semantic_cache import (
    Decision,
    History,
    SemanticCache,
    ShadowModeWarning,
    _Vectors,
    correctness_bound,
    same_answer,
)


class Planar(Embeddings):
    "Vectors chosen by the test; a text that is not known lies by itself."

    model = "planar"

    def __init__(self, known: dict[str, list[float]] | None = None, dimensions: int = 8) -> None:
        self.known, self.dimensions, self.calls = known or {}, dimensions, 0

    def embed_query(self, text: str) -> list[float]:
        self.calls += 1
        if text in self.known:
            return self.known[text]
        vector = np.random.default_rng(abs(hash(text)) % 2**32).normal(size=self.dimensions)
        return [float(value) for value in vector]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]


def pairs(count: int = 550) -> list[tuple[str, str, bool]]:
    "Labelled pairs that words alone can tell apart."
    return [
        pair
        for i in range(count)
        for pair in (
            (f"What is the fee for service item{i} today?", f"What is the fee for the service item{i} today?", True),
            (f"What is the fee for service item{i} today?", f"Who wrote the winter novel about book{i}?", False),
        )
    ]


@pytest.fixture(scope="module")
def report() -> CalibrationReport:
    "A calibration of the hashing model on pairs that are easy to tell apart."
    found = calibrate(pairs(), HashEmbeddings(), model="hash-128", verifier=None)
    assert found.serves
    return replace(found, verifier=VERSION)    # its pairs are so easy that the verifier would leave none that differ


@pytest.fixture
def cache(tmp_path: Path, report: CalibrationReport) -> Iterator[SemanticCache]:
    "A cache that serves."
    with SemanticCache(HashEmbeddings(), tmp_path / "cache.sqlite") as made:
        made.use(report)
        assert made.mode == "serving"
        yield made


STORED, ASKED = "What is the fee for service item7 today?", "What is the fee for the service item7 today?"


# ------------------------------------------------------------------ serving and shadow mode


def test_an_answer_is_served_to_another_wording(cache: SemanticCache) -> None:
    entry = cache.update(STORED, Response("Eight pounds.", documents=("fees.md",)), scope="acme")
    hit = cache.lookup(ASKED, scope="acme")
    assert hit is not None and hit.response.text == "Eight pounds." and hit.response.documents == ("fees.md",)
    assert (hit.kind, hit.id, hit.prompt) == ("semantic", entry, STORED)
    assert 0.9 < hit.similarity < 1 and 0.9 < hit.confidence < 1 and hit.age < 60
    assert cache.lookup("Who wrote the winter novel?", scope="acme") is None


def test_what_differs_only_in_white_space_and_unicode_form_is_the_same_text(cache: SemanticCache) -> None:
    first = cache.update(STORED, "Eight pounds.", scope="acme")
    hit = cache.lookup(f"  {STORED.replace(' ', '  ')} ", scope="acme")
    assert hit is not None and hit.confidence == 1
    second = cache.update(f" {STORED}", "Nine pounds.", scope="acme")
    assert second != first and cache.stats().entries == 1
    hit = cache.lookup(STORED, scope="acme")
    assert hit is not None and hit.response.text == "Nine pounds."


def test_without_a_calibration_nothing_is_served_and_it_says_so_once(tmp_path: Path) -> None:
    cache = SemanticCache(HashEmbeddings(), tmp_path / "cache.sqlite", domain="handbook")
    cache.update(STORED, "Eight pounds.", scope="acme")
    with pytest.warns(ShadowModeWarning, match="no calibration.*hash-128.*handbook"):
        assert cache.lookup(STORED, scope="acme") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decision = cache.decide(STORED, scope="acme")
    assert decision.outcome == "shadow" and decision.hit is None
    assert decision.shadow is not None and decision.shadow.response.text == "Eight pounds."
    assert cache.mode == "shadow" and "no calibration" in cache.why and "mode='shadow'" in repr(cache)
    stats = cache.stats()
    assert (stats.shadow, stats.hits, stats.misses, stats.mode) == (2, 0, 2, "shadow")
    assert "shadow" in cache._repr_markdown_() and "no calibration" in stats._repr_markdown_()


@pytest.mark.filterwarnings("ignore::llmops_ref.semantic_cache.ShadowModeWarning")
def test_whatever_the_calibration_was_not_made_for_puts_the_cache_into_shadow_mode(tmp_path: Path, report: CalibrationReport) -> None:
    path = tmp_path / "cache.sqlite"

    def why(embeddings: Embeddings | None = None, **options: object) -> str:
        with SemanticCache(embeddings or HashEmbeddings(), path, **options) as cache:  # type: ignore[arg-type]
            cache.update(STORED, "Eight pounds.", scope="acme")
            assert (cache.lookup(STORED, scope="acme") is None) == (cache.mode == "shadow")
            return cache.why if cache.mode == "shadow" else ""

    assert "no calibration" in why()
    with SemanticCache(HashEmbeddings(), path) as cache:
        cache.use(report)
    assert why() == "" and why(max_wrong_hit_rate=0.05) == ""
    assert "allows 0.50%" in why(max_wrong_hit_rate=0.005)
    assert "'hash-64' in the domain 'default'" in why(HashEmbeddings(64))
    assert "'hash-128' in the domain 'default'" in why(domain="other")
    assert "other checks" in why(checks=["numbers"])
    renamed = HashEmbeddings(128, salt="x")
    renamed.model = "hash-128"    # the same name, other numbers
    assert "no calibration" in why(renamed)
    with SemanticCache(HashEmbeddings(), path) as cache:
        cache.use(replace(report, verifier="of another time"))
    assert "verifier" in why()
    with SemanticCache(HashEmbeddings(), path) as cache:
        cache.use(replace(report, threshold=None))
    assert "No threshold" in why()


def test_two_models_in_one_file_do_not_see_each_others_entries(tmp_path: Path, report: CalibrationReport) -> None:
    first, second = HashEmbeddings(128), HashEmbeddings(64)
    with SemanticCache(first, tmp_path / "c") as one, SemanticCache(second, tmp_path / "c") as other:
        one.use(report)
        other.use(replace(report, embeddings="hash-64"))
        one.update(STORED, "from the first", scope="acme")
        assert other.decide(STORED, scope="acme").why == "Nothing is stored in this scope."
        other.update(STORED, "from the second", scope="acme")
        assert one.decide(STORED, scope="acme").candidate.response.text == "from the first"  # type: ignore[union-attr]
        assert other.decide(STORED, scope="acme").candidate.response.text == "from the second"  # type: ignore[union-attr]
    with SemanticCache(None, tmp_path / "c") as unloaded:
        assert unloaded.stats().entries == 2 and not unloaded._model.loaded


def test_the_verifier_has_the_last_word(cache: SemanticCache) -> None:
    cache.update("What is the fee for 100 items today?", "Eight pounds.", scope="acme")
    cache.use(replace(cache.calibration, threshold=0.0, floor=0.0))  # type: ignore[type-var]
    decision = cache.decide("What is the fee for 200 items today?", scope="acme")
    assert decision.hit is None and decision.mismatches and "numbers" in decision.why
    assert cache.stats().objections["numbers"] == 1
    assert "numbers" in decision._repr_markdown_()


def test_long_prompts_are_served_to_the_same_text_only(cache: SemanticCache) -> None:
    cache.use(replace(cache.calibration, threshold=0.0, floor=0.0))  # type: ignore[type-var]
    long = "please " * 160 + "summarise"
    cache.update(long, "A summary.", scope="acme")
    assert cache.lookup(long, scope="acme") is not None
    decision = cache.decide("please " * 161 + "summarise", scope="acme")
    assert decision.hit is None and ("150 words" in decision.why or decision.mismatches)


def test_calibrate_serves_what_it_measured_and_stays_in_the_file(tmp_path: Path) -> None:
    with SemanticCache(HashEmbeddings(), tmp_path / "c", checks=[]) as cache:
        report = cache.calibrate(pairs())
        assert report.serves and cache.mode == "serving" and cache.calibration == report
        assert report.bound <= 0.01 and f"{report.pairs} pairs" in cache.why
        elsewhere = cache.calibrate(pairs(560), domain="elsewhere")
        assert elsewhere.domain == "elsewhere" and cache.calibration == report
    with SemanticCache(HashEmbeddings(), tmp_path / "c", checks=[]) as again:
        again.update(STORED, "Eight pounds.", scope="acme")
        assert again.lookup(ASKED, scope="acme") is not None
    with SemanticCache(HashEmbeddings(), tmp_path / "c", domain="elsewhere", checks=[]) as other:
        assert other.mode == "serving" and other.calibration == elsewhere


def test_the_embedding_is_computed_once_for_a_lookup_and_its_update(tmp_path: Path) -> None:
    model = Planar()
    with SemanticCache(model, tmp_path / "c") as cache, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache.lookup("first", scope="acme")
        before = model.calls
        cache.lookup(STORED, scope="acme")
        cache.update(STORED, "Eight pounds.", scope="acme")
        cache.lookup(STORED, scope="acme")
        assert model.calls == before + 1


def test_async_calls_do_the_same(cache: SemanticCache) -> None:
    async def run() -> tuple[str, str | None]:
        await cache.aupdate(STORED, "Eight pounds.", scope="acme", tags=["fees"])
        hit = await cache.alookup(ASKED, scope="acme")
        return ("", None) if hit is None else (hit.response.text, hit.prompt)

    assert asyncio.run(run()) == ("Eight pounds.", STORED)
    assert cache.invalidate(tag="fees") == 1


# ------------------------------------------------------------------ hard partitions


def test_another_scope_is_never_searched(cache: SemanticCache) -> None:
    cache.update(STORED, "Eight pounds.", scope=Scope("acme", model="m", groups=["staff"]))
    others = [Scope("other", model="m", groups=["staff"]), Scope("acme", model="n", groups=["staff"]), Scope("acme", model="m"), Scope("acme")]
    for scope in others:
        assert cache.decide(STORED, scope=scope).why == "Nothing is stored in this scope."
    assert cache.lookup(STORED, scope=Scope("acme", model="m", groups=["staff"])) is not None


def test_a_row_moved_to_another_scope_is_not_served(cache: SemanticCache) -> None:
    cache.update(STORED, "A secret of acme.", scope="acme")
    cache.update("Something else entirely?", "x", scope="other")
    with cache._answers._file.writing() as connection:
        connection.execute("UPDATE prompts SET partition = (SELECT max(id) FROM partitions)")
    for tenant in ("acme", "other"):
        hit = cache.lookup(STORED, scope=tenant)
        assert hit is None or tenant == "acme"


def test_a_hundred_thousand_random_operations_cross_no_scope(tmp_path: Path, report: CalibrationReport) -> None:
    "Every answer names its scope and prompt; whatever is served must name the asker's, and must not have been invalidated."
    draw = random.Random(7)
    prompts = [f"What is the fee for service item{i}{' today' * (i % 3)}?" for i in range(25)]
    scopes = [Scope(f"tenant{i // 2}", model=f"m{i % 2}") for i in range(60)]
    cache = SemanticCache(HashEmbeddings(16), tmp_path / "c", max_entries=150)
    cache.use(replace(report, embeddings="hash-16", threshold=0.0, floor=0.99))    # what is near is judged, the rest costs time
    alive: dict[tuple[str, str], int] = {}
    served = 0
    for number in range(100_000):
        scope, prompt, dice = draw.choice(scopes), draw.choice(prompts), draw.random()
        if dice < 0.02:
            cache.update(prompt, f"{scope.digest}|{number}", scope=scope)
            alive[scope.digest, str(number)] = number
        elif dice < 0.021:
            cache.invalidate(tenant=scope.tenant, model=scope.model)
            alive = {key: value for key, value in alive.items() if key[0] != scope.digest}
        else:
            hit = cache.lookup(prompt, scope=scope)
            if hit is not None:
                served += 1
                owner, stamp = hit.response.text.split("|")
                assert owner == scope.digest and (owner, stamp) in alive
    assert served > 5_000 and cache.stats().entries <= 150
    cache.close()


# ------------------------------------------------------------------ feedback


def test_one_wrong_report_leaves_an_entry_its_own_text_and_a_second_nothing(cache: SemanticCache) -> None:
    cache.update(STORED, "Eight pounds.", scope="acme")
    hit = cache.lookup(ASKED, scope="acme")
    assert hit is not None and cache.feedback(hit, False)
    decision = cache.decide(ASKED, scope="acme")
    assert decision.hit is None and "reported wrong" in decision.why
    same = cache.lookup(STORED, scope="acme")
    assert same is not None and cache.feedback(same, False)
    assert cache.lookup(STORED, scope="acme") is None
    assert cache.stats().wrong == 2
    assert cache.mode == "serving"    # two reports suspend nothing
    cache.update(STORED, "Nine pounds.", scope="acme")
    hit = cache.lookup(ASKED, scope="acme")
    assert hit is not None and hit.response.text == "Nine pounds."


def test_feedback_is_kept_in_the_file_and_seen_by_other_processes(cache: SemanticCache, report: CalibrationReport) -> None:
    cache.update(STORED, "Eight pounds.", scope="acme")
    with SemanticCache(HashEmbeddings(), cache.path) as other:
        hit = other.lookup(ASKED, scope="acme")
        assert hit is not None
        other.feedback(hit, False)
    assert cache.lookup(ASKED, scope="acme") is None
    cache.use(replace(report, data_hash="other pairs"))
    assert cache.lookup(ASKED, scope="acme") is None    # a new calibration does not make the answer right


def test_concurrent_feedback_is_not_lost(cache: SemanticCache) -> None:
    cache.update(STORED, "Eight pounds.", scope="acme")
    hit = cache.lookup(ASKED, scope="acme")
    assert hit is not None
    others = [SemanticCache(HashEmbeddings(), cache.path) for _ in range(3)]

    def report_some(one: SemanticCache, start: int) -> None:
        for step in range(20):
            one.feedback(replace(hit, confidence=0.5 + (start * 20 + step) / 1000), True)

    threads = [threading.Thread(target=report_some, args=(one, place)) for place, one in enumerate(others)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with cache._answers._file.reading() as connection:
        entry, history = connection.execute("SELECT entry, history FROM prompts").fetchone()
    assert len(json.loads(cache._answers.unseal(b"history", history, entry) or b"")["observations"]) == 60


def test_repeated_feedback_on_one_hit_counts_once() -> None:
    history = History()
    for _ in range(50):
        history = history.with_one(0.9, True, budget=0.01, calibration="c")
    assert len(history.observations) == 1
    assert not dict(history.with_one(0.9, False, budget=0.01, calibration="c").with_one(0.9, True, budget=0.01, calibration="c").observations)[0.9]


@given(st.lists(st.tuples(st.floats(0, 0.999), st.booleans()), max_size=12), st.floats(0.3, 0.99))
@settings(max_examples=20, deadline=None)
def test_a_history_never_serves_below_what_it_has_proven(observations: list[tuple[float, bool]], threshold: float) -> None:
    history = History()
    for confidence, right in observations:
        history = history.with_one(confidence, right, budget=0.05, calibration="c")
    needed = history.needed(threshold, "c")
    if not observations:
        assert needed == threshold
    elif all(right or round(confidence, 6) < threshold for confidence, right in observations):
        assert needed <= threshold
        assert needed == threshold or correctness_bound(history.observations)[round(needed * 100)] >= 0.95
    else:
        assert needed == 1.0 or correctness_bound(history.observations)[round(needed * 100)] >= 0.95
    assert history.needed(threshold, "another") >= min(needed, threshold)


def test_the_bound_rises_with_evidence_and_confidence() -> None:
    few, many = correctness_bound([(0.8, True)] * 5), correctness_bound([(0.8, True)] * 100)
    assert (np.diff(few) >= -1e-12).all() and (many >= few - 1e-12)[60:].all()
    assert correctness_bound([(0.8, True)] * 100 + [(0.79, False)] * 100)[80] < 0.7
    assert (correctness_bound([(0.9, False)]) < 0.95).all()


def test_many_wrong_reports_put_the_cache_into_shadow_mode(cache: SemanticCache, report: CalibrationReport) -> None:
    with pytest.warns(ShadowModeWarning, match="called wrong"):
        for number in range(6):
            prompt = f"What is the fee for service item{number} today?"
            cache.update(prompt, "Eight pounds.", scope="acme")
            hit = cache.lookup(prompt, scope="acme")
            assert (hit is None) == (number >= 3)
            if hit is not None:
                cache.feedback(hit, False)
    assert cache.mode == "shadow" and "called wrong" in cache.why
    cache.use(report)
    assert cache.mode == "serving"


def test_explored_hits_are_compared_with_the_fresh_answer(tmp_path: Path, report: CalibrationReport) -> None:
    cache = SemanticCache(HashEmbeddings(), tmp_path / "c", explore=0.999999)
    cache.use(report)
    cache.update(STORED, "It costs 8 pounds.", scope="acme")
    for fresh, counts in (("it costs  8 pounds", (1, 0)), ("It costs 9 pounds.", (1, 1))):
        decision = cache.decide(ASKED, scope="acme")
        assert decision.outcome == "explored" and decision.hit is None and decision.shadow is not None
        cache.update(ASKED, fresh, scope="acme")
        cache.invalidate(id=cache.update(ASKED, fresh, scope="acme"))
        stats = cache.stats()
        assert (stats.agreed, stats.disagreed) == counts
    assert "reported wrong" in cache.decide(ASKED, scope="acme").why
    cache.close()


def test_same_answer_knows_what_it_does_not_know() -> None:
    assert same_answer("It costs £8.", "it costs £8") is True
    assert same_answer("It costs £8.", "It costs £9.") is False
    assert same_answer("Bring your passport.", "A passport is needed.") is None


def test_what_cannot_be_reported_on_is_refused(cache: SemanticCache) -> None:
    for wrong in (None, Decision("miss", "nothing"), replace(_hit(cache), kind="exact"), replace(_hit(cache), id="x")):
        with pytest.raises(BadInputError):
            cache.feedback(wrong, True)  # type: ignore[arg-type]
    hit = _hit(cache)
    cache.clear()
    assert cache.feedback(hit, True) is False


def _hit(cache: SemanticCache):  # type: ignore[no-untyped-def]
    cache.update(STORED, "Eight pounds.", scope="acme")
    return cache.lookup(STORED, scope="acme")


# ------------------------------------------------------------------ invalidation, expiry, eviction


@given(st.lists(st.tuples(st.sampled_from("ulit"), st.integers(0, 3), st.integers(0, 2)), max_size=30))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_was_invalidated_is_never_served_again(tmp_path_factory: pytest.TempPathFactory, report: CalibrationReport, steps: list[tuple[str, int, int]]) -> None:
    "Against a model that knows when each answer's call began; two objects on one file take turns."
    path = tmp_path_factory.mktemp("c") / "c"
    both = [SemanticCache(HashEmbeddings(), path) for _ in range(2)]
    both[0].use(report)
    begun: dict[int, str] = {}
    dead: set[str] = set()
    live: set[str] = set()
    for number, (step, item, document) in enumerate(steps):
        cache, prompt = both[number % 2], f"What is the fee for service item{item} today?"
        if step == "t":
            begun[item] = cache.begin()
            live -= {text for text in live if text.endswith(f"/{item}")}
        elif step == "u":
            ticket = begun.pop(item, None) or cache.begin()
            text = f"{number}/{document}/{item}"
            if cache.update(prompt, Response(text, documents=(f"d{document}",)), scope="acme", ticket=ticket):
                assert not any(one[2] > _generation(ticket) and one[1] == document for one in _log)
        elif step == "i":
            cache.invalidate(document=f"d{document}")
            _log.append(("i", document, _generation(cache.begin())))
            dead |= {f"{n}/{document}/{i}" for n in range(len(steps)) for i in range(4) if n < number}
        else:
            for one in both:
                hit = one.lookup(prompt, scope="acme")
                assert hit is None or hit.response.text not in dead
    _log.clear()
    for cache in both:
        cache.close()


_log: list[tuple[str, int, int]] = []


def _generation(ticket: str) -> int:
    return int(ticket.rpartition(":")[2])


def test_an_answer_whose_call_began_before_the_invalidation_is_not_stored(cache: SemanticCache) -> None:
    assert cache.lookup(STORED, scope="acme") is None    # upstream is asked now
    with SemanticCache(HashEmbeddings(), cache.path) as other:
        other.invalidate(document="fees.md")
    assert cache.update(STORED, Response("Eight pounds.", documents=("fees.md",)), scope="acme") == ""
    assert cache.stats().refused == 1 and cache.lookup(STORED, scope="acme") is None
    assert cache.update(STORED, Response("Nine pounds.", documents=("fees.md",)), scope="acme") != ""
    ticket = cache.begin()
    cache.invalidate(tenant="acme")
    assert cache.update(STORED, "Eight pounds.", scope="acme", ticket=ticket) == ""


def test_every_selector_removes_what_it_names_and_nothing_else(cache: SemanticCache) -> None:
    scope = Scope("acme", model="m", prompt_version="v3", knowledge_base="7")
    for selector in ({"tenant": "acme"}, {"model": "m"}, {"prompt": "v3"}, {"document": "fees.md"}, {"tag": "spring"}, {"before": time.time() + 9}):
        entry = cache.update(STORED, Response("Eight pounds.", documents=("fees.md",)), scope=scope, tags=["spring"])
        assert cache.invalidate(**{name: f"{value}x" if isinstance(value, str) else 0.0 for name, value in selector.items()}) == 0
        assert cache.lookup(ASKED, scope=scope) is not None
        assert cache.invalidate(**selector) == 1
        assert cache.lookup(ASKED, scope=scope) is None
    entry = cache.update(STORED, "Eight pounds.", scope=scope)
    assert cache.invalidate(id=entry) == 1 and cache.lookup(STORED, scope=scope) is None
    with pytest.raises(BadInputError):
        cache.invalidate()
    with pytest.raises(BadInputError):
        cache.invalidate(id=entry, tenant="acme")


class Clock:
    "A clock to be set."

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def test_entries_expire_and_a_clock_that_goes_back_revives_none(tmp_path: Path, report: CalibrationReport) -> None:
    clock = Clock()
    cache = SemanticCache(HashEmbeddings(), tmp_path / "c", ttl=60, clock=clock)
    cache.use(report)
    cache.update(STORED, "Eight pounds.", scope="acme")
    clock.now += 59
    hit = cache.lookup(ASKED, scope="acme")
    assert hit is not None and hit.age == 59
    clock.now += 2
    assert cache.lookup(ASKED, scope="acme") is None
    cache.update(STORED, "Eight pounds.", scope="acme", ttl=1000)
    clock.now -= 3600
    with pytest.warns(CacheDegradedWarning, match="clock"):
        assert cache.lookup(ASKED, scope="acme") is None
    cache.close()


def test_the_longest_unused_make_room(tmp_path: Path, report: CalibrationReport) -> None:
    cache = SemanticCache(HashEmbeddings(), tmp_path / "c", max_entries=10)
    cache.use(report)
    prompts = [f"What is the fee for service item{i} today?" for i in range(15)]
    for prompt in prompts[:10]:
        cache.update(prompt, "x", scope="acme")
    assert cache.lookup(prompts[0], scope="acme") is not None
    for prompt in prompts[10:]:
        cache.update(prompt, "x", scope="acme")
    assert cache.stats().entries == 10 and cache.stats().evicted == 5
    assert cache.lookup(prompts[0], scope="acme") is not None and cache.lookup(prompts[1], scope="acme") is None
    cache.close()


# ------------------------------------------------------------------ many entries


@pytest.fixture
def small_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    "Graphs from 50 entries on."
    monkeypatch.setattr("llmops_ref.semantic_cache._EXACT", 50)


def test_a_graph_finds_what_the_matrix_finds_and_is_saved_with_the_file(tmp_path: Path, report: CalibrationReport, small_matrix: None) -> None:
    draw, prompts = np.random.default_rng(0), [f"question {i}" for i in range(400)]
    vectors = draw.normal(size=(400, 32))
    asked = vectors + 0.3 * draw.normal(size=(400, 32))
    known = dict(zip(prompts, vectors.tolist(), strict=True)) | {f"asked {i}": vector.tolist() for i, vector in enumerate(asked)}
    model = Planar({**known, "A new question": [1.0] * 32}, dimensions=32)
    with SemanticCache(model, tmp_path / "c", checks=[]) as cache:
        cache.use(replace(report, embeddings="planar", threshold=0.0, floor=0.5))
        assert cache.warm([(prompt, str(number)) for number, prompt in enumerate(prompts)], scope="acme") == 400
        assert cache._index.open[1].graph is not None
        found = [cache.lookup(f"asked {number}", scope="acme") for number in range(400)]
    assert sum(hit is not None and hit.prompt == prompt for hit, prompt in zip(found, prompts, strict=True)) >= 390
    with SemanticCache(model, tmp_path / "c", checks=[]) as again:
        hit = again.lookup(prompts[333], scope="acme")
        assert hit is not None and hit.response.text == "333"
        assert again._index.open[1].changed == 0 and len(again._index.open[1]) == 400    # loaded, not built
        again.update("A new question", "new", scope="acme")
        hit = again.lookup("A new question", scope="acme")
        assert hit is not None and hit.response.text == "new"
        assert again.invalidate(tenant="acme") == 401
        assert again.lookup(prompts[333], scope="acme") is None
        with again._answers._file.reading() as connection:
            assert connection.execute("SELECT count(*) FROM graphs").fetchone() == (0,)


def test_a_damaged_graph_is_built_again(tmp_path: Path, report: CalibrationReport, small_matrix: None) -> None:
    with SemanticCache(HashEmbeddings(), tmp_path / "c") as cache:
        cache.use(report)
        cache.warm([(f"What is the fee for service item{i} today?", str(i)) for i in range(100)], scope="acme")
        with cache._answers._file.writing() as connection:
            (data,) = connection.execute("SELECT data FROM graphs WHERE name = 'graph'").fetchone()
            connection.execute("UPDATE graphs SET data = ? WHERE name = 'graph'", (data[:5000] + b"x" * 100 + data[5100:],))
    with SemanticCache(HashEmbeddings(), tmp_path / "c") as cache:
        hit = cache.lookup("What is the fee for service item7 today?", scope="acme")
        assert hit is not None and hit.response.text == "7"


@given(st.lists(st.integers(0, 60), min_size=1, max_size=80))
@settings(max_examples=25, deadline=None)
def test_vectors_stay_in_step_with_a_plain_list(steps: list[int]) -> None:
    "Numbers below 40 add the next vector; the others remove one of those there."
    draw, vectors, kept, newest = np.random.default_rng(0), _Vectors(4), {}, 0
    for step in steps:
        if step < 40:
            newest += 1
            vector = draw.normal(size=4).astype(np.float32)
            kept[newest] = vector / np.linalg.norm(vector)
            vectors.add([newest], kept[newest][None])
        elif kept:
            gone = sorted(kept)[step % len(kept)]
            del kept[gone]
            vectors.remove([gone])
    assert len(vectors) == len(kept) and vectors.newest == newest
    asked = np.array([1, 0, 0, 0], np.float32)
    nearest, cosines = vectors.nearest(asked, 3)
    best = sorted(kept, key=lambda number: -float(kept[number] @ asked))[:3]
    assert set(nearest) == set(best) and cosines is not None


def test_what_was_removed_does_not_hide_what_is_left(tmp_path: Path, report: CalibrationReport, small_matrix: None) -> None:
    near = {f"near {i}": [1.0, i / 1000, 0, 0, 0, 0, 0, 0] for i in range(120)}
    model = Planar({**near, "asked": [1.0, 0, 0, 0, 0, 0, 0, 0]})
    with SemanticCache(model, tmp_path / "c", checks=[]) as cache, SemanticCache(model, tmp_path / "c", checks=[]) as other:
        cache.use(replace(report, embeddings="planar", threshold=0.0, floor=0.0))
        for number, prompt in enumerate(near):
            cache.update(prompt, "x", scope="acme", tags=["first"] if number < 100 else [])
        assert cache.lookup("asked", scope="acme") is not None and other.lookup("asked", scope="acme") is not None
        assert other.invalidate(tag="first") == 100
        for one in (cache, other):
            hit = one.lookup("asked", scope="acme")
            assert hit is not None and hit.prompt is not None and int(hit.prompt.split()[1]) >= 100


# ------------------------------------------------------------------ two processes, crashes, bad disks


PROCESSES = multiprocessing.get_context("fork")


def _answers(path: Path, pipe: Connection) -> None:
    "In another process: look up whenever told to."
    with SemanticCache(HashEmbeddings(), path) as cache:
        while pipe.recv():
            hit = cache.lookup(ASKED, scope="acme")
            pipe.send(None if hit is None else hit.response.text)


def test_two_processes_see_each_others_entries_and_invalidations_at_once(cache: SemanticCache) -> None:
    here, there = PROCESSES.Pipe()
    other = PROCESSES.Process(target=_answers, args=(cache.path, there))
    other.start()

    def ask() -> object:
        here.send(True)
        return here.recv()

    assert ask() is None
    for number in range(5):
        cache.update(STORED, f"answer {number}", scope="acme")
        assert ask() == f"answer {number}"
        cache.invalidate(tenant="acme")
        assert ask() is None
    here.send(False)
    other.join()
    assert other.exitcode == 0


def _writes(path: Path, ready: Connection) -> None:
    "In another process: write until killed."
    cache = SemanticCache(HashEmbeddings(), path)
    for number in itertools.count():
        cache.update(f"What is the fee for service item{number % 50} today?", f"item{number % 50}", scope="acme")
        if number == 3:
            ready.send(True)


def test_a_killed_writer_leaves_whole_entries_only(cache: SemanticCache) -> None:
    for _ in range(4):
        here, there = PROCESSES.Pipe()
        writer = PROCESSES.Process(target=_writes, args=(cache.path, there))
        writer.start()
        here.recv()
        time.sleep(random.uniform(0, 0.1))
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        for number in range(50):
            hit = cache.lookup(f"What is the fee for service item{number} today?", scope="acme")
            assert hit is None or hit.response.text == f"item{number}"
    assert cache.stats().entries > 0 and not cache.stats().degraded
    cache.update(STORED, "Eight pounds.", scope="acme")
    assert cache.lookup(ASKED, scope="acme") is not None


def test_flipped_bytes_give_no_wrong_answer(tmp_path: Path, report: CalibrationReport) -> None:
    draw = random.Random(3)
    for trial in range(12):
        path = tmp_path / f"c{trial}"
        with SemanticCache(HashEmbeddings(), path) as cache:
            cache.use(report)
            cache.warm([(f"What is the fee for service item{i} today?", f"item{i}") for i in range(40)], scope="acme")
        data = bytearray(path.read_bytes())
        for _ in range(200):
            data[draw.randrange(4096 if trial % 3 else 100, len(data))] = draw.randrange(256)
        path.write_bytes(data)
        with warnings.catch_warnings(), SemanticCache(HashEmbeddings(), path) as cache:
            warnings.simplefilter("ignore")
            for number in range(40):
                hit = cache.lookup(f"What is the fee for service item{number} today?", scope="acme")
                assert hit is None or hit.response.text == f"item{number}"
            assert cache.lookup("What is the fee for service item1 today?", scope="other") is None
            cache.update(STORED, "Eight pounds.", scope="acme")


def test_a_file_that_is_no_cache_is_a_warning_and_no_cache(tmp_path: Path) -> None:
    path = tmp_path / "c"
    path.write_bytes(b"not a database" * 1000)
    with pytest.warns(CacheDegradedWarning), SemanticCache(HashEmbeddings(), path) as cache:
        assert cache.lookup(STORED, scope="acme") is None
        cache.update(STORED, "Eight pounds.", scope="acme")
        assert cache.stats().degraded


def test_a_disk_that_is_full_or_read_only_degrades_to_no_cache(tmp_path: Path, report: CalibrationReport, monkeypatch: pytest.MonkeyPatch) -> None:
    with SemanticCache(HashEmbeddings(), tmp_path / "c") as cache:
        cache.use(report)
        cache.update(STORED, "Eight pounds.", scope="acme")
        with cache._answers._file.writing() as connection:
            connection.execute(f"PRAGMA max_page_count={connection.execute('PRAGMA page_count').fetchone()[0]}")
        with pytest.warns(CacheDegradedWarning, match="full"):
            stored = [cache.update(f"question {i} " * 50, "x" * 5000, scope="acme") for i in range(20)]
        assert "" in stored
        assert cache.lookup("nothing like it", scope="acme") is None
    blocked = tmp_path / "file"
    blocked.write_text("a file where the folder should be")
    with pytest.warns(CacheDegradedWarning) as caught:
        cache = SemanticCache(HashEmbeddings(), blocked / "c")
        for _ in range(3):
            assert cache.lookup(STORED, scope="acme") is None and cache.update(STORED, "x", scope="acme") == ""
    assert len([one for one in caught if issubclass(one.category, CacheDegradedWarning)]) == 1
    assert "degraded" in cache._repr_markdown_() and repr(cache)


def test_a_cache_opened_with_another_key_or_none_reads_nothing(tmp_path: Path, report: CalibrationReport) -> None:
    key = bytes(range(32))
    with SemanticCache(HashEmbeddings(), tmp_path / "c", encryption_key=key) as cache:
        cache.use(report)
        cache.update(STORED, "Eight pounds of secrets.", scope="acme")
        assert cache.lookup(ASKED, scope="acme") is not None
    data = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    for secret in (b"secrets", b"service item7", b"acme"):
        assert secret not in data
    for other in (None, bytes(32)):
        with pytest.warns(CacheDegradedWarning), SemanticCache(HashEmbeddings(), tmp_path / "c", encryption_key=other) as cache:
            assert cache.lookup(STORED, scope="acme") is None
    with SemanticCache(HashEmbeddings(), tmp_path / "c", encryption_key=key) as cache:
        assert cache.lookup(ASKED, scope="acme") is not None


# ------------------------------------------------------------------ bad input, display, export


def test_bad_arguments_get_typed_errors(tmp_path: Path) -> None:
    cache = SemanticCache(HashEmbeddings(), tmp_path / "c")
    for prompt in ("", "  \n"):
        with pytest.raises(EmptyTextError):
            cache.lookup(prompt, scope="acme")
        with pytest.raises(EmptyTextError):
            cache.update(prompt, "x", scope="acme")
    for arguments in (
        {"max_wrong_hit_rate": 0}, {"max_wrong_hit_rate": 1.0}, {"max_wrong_hit_rate": math.nan}, {"max_wrong_hit_rate": "0.01"}, {"domain": ""},
        {"max_entries": 0}, {"max_entries": True}, {"checks": ["spelling"]}, {"checks": "numbers"}, {"explore": 1.0}, {"explore": -0.1},
        {"ttl": 0}, {"ttl": "1"}, {"encryption_key": b"short"},
    ):
        with pytest.raises(BadInputError):
            SemanticCache(HashEmbeddings(), tmp_path / "d", **arguments)  # type: ignore[arg-type]
    for call in (
        lambda: cache.lookup(7, scope="acme"), lambda: cache.lookup("x", scope=""), lambda: cache.lookup("x", scope=None),
        lambda: cache.update("x", 7, scope="acme"), lambda: cache.update("x", "y", scope="acme", tags="one"), lambda: cache.update("x", "y", scope="acme", ticket="no"),
        lambda: cache.update("x", Response("y", data={1}), scope="acme"),
    ):
        with pytest.raises(BadInputError):
            call()  # type: ignore[no-untyped-call]


@pytest.mark.filterwarnings("ignore::llmops_ref.semantic_cache.ShadowModeWarning")
def test_a_broken_embedding_model_is_an_error_and_a_broken_vector_a_miss(tmp_path: Path) -> None:
    for broken in ([math.nan] * 8, [0.0] * 8, [], [math.inf] + [0.0] * 7, ["x"]):
        class Broken(Planar):
            def embed_query(self, text: str, vector: object = broken) -> list[float]:
                return vector  # type: ignore[return-value]

        with pytest.raises(BadInputError, match="finite"):
            SemanticCache(Broken(), tmp_path / "a").lookup("x", scope="acme")
        cache = SemanticCache(Planar({"bad": broken}), tmp_path / "b")  # type: ignore[dict-item]
        assert cache.lookup("good", scope="acme") is None
        with pytest.warns(CacheDegradedWarning, match="vector"):
            assert cache.lookup("bad", scope="acme") is None
        assert cache.update("bad", "x", scope="acme") == ""
        assert cache.warm([("bad", "x"), ("good", "y")], scope="acme") == 1


def test_an_endpoint_that_fails_is_a_miss_and_one_warning(tmp_path: Path) -> None:
    class Down(Embeddings):
        def embed_query(self, text: str) -> list[float]:
            raise ConnectionError(f"a message with the prompt {text} in it")

        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            raise ConnectionError

    cache = SemanticCache(Down(), tmp_path / "c")
    with pytest.warns(CacheDegradedWarning) as caught:
        for _ in range(3):
            assert cache.lookup("secret words", scope="acme") is None and cache.update("secret words", "x", scope="acme") == ""
    assert len(caught) == 1 and "ConnectionError" in str(caught[0].message) and "secret" not in str(caught[0].message)
    assert "cannot be used" in cache.why


def test_export_writes_prompts_and_answers(cache: SemanticCache, tmp_path: Path) -> None:
    cache.warm([(f"question number {i}", f"answer {i}") for i in range(3)], scope="acme")
    assert cache.export(tmp_path / "out.jsonl") == 3
    _, *lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted((line["prompt"], line["response"]["text"]) for line in lines) == [(f"question number {i}", f"answer {i}") for i in range(3)]


def test_displays_cannot_be_broken_by_a_prompt(cache: SemanticCache) -> None:
    cache.update("What | is\nthe fee?", "a | b", scope="acme")
    text = cache.decide("What | is\nthe fee?", scope="acme")._repr_markdown_()
    assert all(line.count("|") - line.count("\\|") == 3 for line in text.splitlines())
    assert "serving" in cache._repr_markdown_() and cache.stats().to_dict()["mode"] == "serving"


def test_threads_share_a_cache(cache: SemanticCache) -> None:
    failures: list[BaseException] = []

    def work(tenant: str) -> None:
        try:
            for number in range(30):
                prompt = f"What is the fee for service item{number % 7} today?"
                cache.update(prompt, tenant, scope=tenant)
                hit = cache.lookup(prompt, scope=tenant)
                assert hit is not None and hit.response.text == tenant
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(f"tenant{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and cache.stats().entries == 28


def test_closed_caches_miss(cache: SemanticCache) -> None:
    cache.update(STORED, "Eight pounds.", scope="acme")
    cache.close()
    assert cache.lookup(STORED, scope="acme") is None and cache.update(STORED, "x", scope="acme") == ""
