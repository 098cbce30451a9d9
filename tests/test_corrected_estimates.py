"""Corrections that find the truth behind a biased judge, agree with the authors' package, and say when they cannot."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llmops_ref.corrected_estimates as module
from llmops_ref.core import BadInputError
from llmops_ref.corrected_estimates import (
    ChanceJudgeError,
    CoverageBench,
    bench_coverage,
    label_curve,
    labels_needed,
    ppi_mean,
    rogan_gladen,
    sensitivity_and_specificity,
)
from llmops_ref.scores import Failure, Score, score


def judged(seed: int, rows: int, rate: float = 0.7, right: float = 0.85, clear: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    "Labels and a judge's verdicts."
    generator = np.random.default_rng(seed)
    labels = generator.random(rows) < rate
    return labels * 1.0, np.where(labels, generator.random(rows) < right, generator.random(rows) > clear) * 1.0


# --- Rogan-Gladen -----------------------------------------------------------------------------------------------------


def test_sensitivity_and_specificity_are_rates_with_their_rows():
    labels, verdicts = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0, 1, None]
    right, clear = sensitivity_and_specificity(verdicts, labels)
    assert (right.estimate, right.n, right.failures) == (0.75, 4, 0)
    assert (clear.estimate, clear.n, clear.failures) == (0.8, 5, 1)
    grouped = sensitivity_and_specificity(verdicts, labels, clusters=list("aabbaabbcc"))
    assert grouped[0].clusters == 2 and grouped[1].clusters == 3


def test_the_correction_is_rogan_and_gladens():
    labels, verdicts = judged(0, 100)
    pair = sensitivity_and_specificity(verdicts, labels)
    many = judged(1, 500)[1]
    found = rogan_gladen(many, *pair)
    positive, right, clear = many.mean(), pair[0].estimate, pair[1].estimate
    assert found.estimate == pytest.approx((positive + clear - 1) / (right + clear - 1))
    share, better = found.estimate, right + clear - 1
    variance = positive * (1 - positive) / 500 + share**2 * right * (1 - right) / pair[0].n + (1 - share) ** 2 * clear * (1 - clear) / pair[1].n
    assert found.standard_error == pytest.approx(math.sqrt(variance) / better)
    assert found.ci_low < found.estimate < found.ci_high
    assert found.uncorrected is not None and found.uncorrected.estimate == positive and found.labels == 100


def test_lang_and_reiczigels_own_formula():
    rates, rows, z = (0.3, 0.9, 0.8), (500.0, 60.0, 40.0), 1.96
    positive = (500 * 0.3 + z**2 / 2) / (500 + z**2)
    right, clear = (60 * 0.9 + 1) / 62, (40 * 0.8 + 1) / 42
    better = right + clear - 1
    share = (positive + clear - 1) / better
    moved = 2 * z**2 * (share * right * (1 - right) / 62 - (1 - share) * clear * (1 - clear) / 42)
    half = z * math.sqrt(positive * (1 - positive) / (500 + z**2) + right * (1 - right) * share**2 / 62 + clear * (1 - clear) * (1 - share) ** 2 / 42) / better
    assert module._lang_reiczigel(rates, rows, z) == pytest.approx((max(share + moved - half, 0), share + moved + half))


def test_the_score_interval_solves_its_inequality():
    rates, rows, z = (0.45, 0.9, 0.8), (300.0, 50.0, 50.0), 1.96
    low, high = module._score_interval(rates, rows, z)
    right, clear = 46 / 52, 41 / 52
    for share in (low, high):
        positive = 1 - clear + share * (right + clear - 1)
        variance = positive * (1 - positive) / 300 + share**2 * right * (1 - right) / 50 + (1 - share) ** 2 * clear * (1 - clear) / 50
        assert abs(0.45 - share * 0.9 - (1 - share) * 0.2) == pytest.approx(z * math.sqrt(variance), rel=1e-6)


def test_a_judge_that_cannot_tell_corrects_nothing():
    coin = Score(0.5, 0.4, 0.6, 50, None, 0, "Wilson", effective_n=50)
    with pytest.raises(ChanceJudgeError, match=r"add up to 1\.00"):
        rogan_gladen([1, 0, 1], coin, coin)
    nearly = Score(0.55, 0.4, 0.7, 50, None, 0, "Wilson", effective_n=50)
    found = rogan_gladen([1, 0, 1] * 30, nearly, nearly)
    assert (found.ci_low, found.ci_high) == (0.0, 1.0)


def test_a_perfect_judge_on_many_labels_needs_no_correction():
    perfect = Score(1.0, 0.999, 1.0, 10**6, None, 0, "Wilson", effective_n=1e6)
    verdicts = [1] * 30 + [0] * 70
    found = rogan_gladen(verdicts, perfect, perfect)
    plain = score(verdicts)
    assert found.estimate == pytest.approx(0.3)
    assert (found.ci_low, found.ci_high) == pytest.approx((plain.ci_low, plain.ci_high), abs=0.005)


def test_failed_verdicts_are_counted_and_shown_as_misses():
    pair = sensitivity_and_specificity(*judged(2, 200)[::-1])
    found = rogan_gladen([1, 0, 1, 1, Failure("timeout"), None] * 20, *pair)
    assert found.failures == 40 and found.failure_kinds == {"timeout": 20, "not_a_number": 20} and found.n == 80
    assert found.as_misses is not None and found.as_misses.n == 120 and found.as_misses.estimate < found.estimate
    nothing = rogan_gladen([None], *pair)
    assert math.isnan(nothing.estimate) and nothing.method.startswith("no interval")
    json.dumps(nothing.to_dict(), allow_nan=False)


def test_clustered_verdicts_widen_the_correction():
    pair = sensitivity_and_specificity(*judged(3, 200)[::-1])
    generator = np.random.default_rng(3)
    owners = np.repeat(np.arange(12), 20)
    verdicts = (generator.random(240) < np.repeat(generator.beta(1, 1, 12), 20)) * 1.0
    alone, grouped = rogan_gladen(verdicts, *pair), rogan_gladen(verdicts, *pair, clusters=owners)
    assert grouped.ci_high - grouped.ci_low > 1.3 * (alone.ci_high - alone.ci_low) and grouped.clusters == 12


# --- PPI++ ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["verdicts", "scores", "grades", "useless", "perfect"])
@pytest.mark.parametrize(("few", "many"), [(30, 100), (100, 2000)])
def test_it_agrees_with_the_authors_package(kind, few, many):
    ppi_py = pytest.importorskip("ppi_py")
    generator = np.random.default_rng(few)
    labels, verdicts = judged(few, few + many)
    scores = {
        "verdicts": verdicts,
        "scores": verdicts * 0.5 + generator.random(few + many) / 2,
        "grades": labels * 3 + generator.normal(0, 1, few + many),
        "useless": generator.random(few + many),
        "perfect": labels,
    }[kind]
    known = labels[:few] if kind != "grades" else labels[:few] * 4 + generator.normal(0, 1, few)
    given = known, scores[:few], scores[few:]
    for weight in (None, 0.0, 0.4, 1.0):
        found = ppi_mean(*given, weight=weight, interval="normal", level=0.9)
        assert found.estimate == pytest.approx(ppi_py.ppi_mean_pointestimate(*given, lam=weight).item(), abs=1e-12)
        ends = [end.item() for end in ppi_py.ppi_mean_ci(*given, alpha=0.1, lam=weight)]
        assert (found.ci_low, found.ci_high) == pytest.approx(ends, abs=1e-9)


def test_the_robust_interval_is_close_to_the_papers_on_large_samples():
    labels, verdicts = judged(5, 12_000, 0.5)
    given = labels[:2000], verdicts[:2000], verdicts[2000:]
    robust, normal = ppi_mean(*given), ppi_mean(*given, interval="normal")
    assert (robust.ci_low, robust.ci_high) == pytest.approx((normal.ci_low, normal.ci_high), abs=5e-4)
    assert robust.estimate == normal.estimate


def test_a_useful_judge_narrows_the_interval_and_a_coin_does_not_widen_it_much():
    labels, verdicts = judged(6, 3100, 0.6, 0.95, 0.95)
    found = ppi_mean(labels[:100], verdicts[:100], verdicts[100:])
    alone = found.labels_alone
    assert alone is not None and alone.n == 100 and alone.estimate == labels[:100].mean()
    assert found.ci_high - found.ci_low < 0.65 * (alone.ci_high - alone.ci_low)
    assert found.effective_n is not None and found.effective_n > 250 and found.weight > 0.7
    coin = (np.random.default_rng(60).random(3100) < 0.5) * 1.0
    useless = ppi_mean(labels[:100], coin[:100], coin[100:])
    assert useless.weight < 0.25 and useless.ci_high - useless.ci_low < 1.05 * (alone.ci_high - alone.ci_low)


def test_without_weight_it_is_the_labels_alone():
    labels, verdicts = judged(7, 300)
    found = ppi_mean(labels[:100], verdicts[:100], verdicts[100:], weight=0.0)
    assert found.labels_alone is not None and found.estimate == found.labels_alone.estimate == pytest.approx(labels[:100].mean())
    assert (found.ci_low, found.ci_high) == (found.labels_alone.ci_low, found.labels_alone.ci_high)
    plain = score(labels[:100])
    assert (found.ci_low, found.ci_high) == pytest.approx((plain.ci_low, plain.ci_high), abs=0.004)


def test_the_judges_failures_bias_nothing_and_are_counted():
    labels, verdicts = judged(8, 4000, 0.5)
    broken: list = [Failure("parse") if verdict and row % 2 else float(verdict) for row, verdict in enumerate(verdicts)]
    found = ppi_mean(labels[:400], broken[:400], broken[400:])
    assert found.ci_low < 0.5 < found.ci_high
    assert found.failure_kinds == {"parse": sum(isinstance(one, Failure) for one in broken)}
    nothing = ppi_mean(labels[:400], [None] * 400, [None] * 600)
    assert nothing.weight == 0 and nothing.estimate == labels[:400].mean() and nothing.failures == 1000


def test_equal_labels_still_leave_room():
    found = ppi_mean([1] * 50, [0.9] * 25 + [0.8] * 25, np.linspace(0, 1, 500))
    assert found.estimate == 1.0 and 0.9 < found.ci_low < 0.95 and found.ci_high == 1.0
    grades = ppi_mean([3.5] * 50, [0.9] * 50, [0.8] * 500)
    assert grades.ci_low == -math.inf and "equal" in grades.method
    one_cluster = ppi_mean([1, 0, 1], [1, 0, 1], [1, 0, 1], clusters=["a"] * 3, unlabelled_clusters=["b"] * 3)
    assert one_cluster.ci_low == -math.inf and "one cluster" in one_cluster.method


def test_documents_shared_by_labelled_and_other_rows_count_once():
    generator = np.random.default_rng(9)
    owners = np.repeat(np.arange(20), 30)
    labels = (generator.random(600) < np.repeat(generator.beta(1, 1, 20), 30)) * 1.0
    scores = labels * 0.6 + generator.random(600) * 0.4
    few = generator.permutation(600) < 150
    alone = ppi_mean(labels[few], scores[few], scores[~few])
    grouped = ppi_mean(labels[few], scores[few], scores[~few], clusters=owners[few], unlabelled_clusters=owners[~few])
    assert grouped.estimate == alone.estimate and grouped.clusters == 20
    assert grouped.ci_high - grouped.ci_low > 1.5 * (alone.ci_high - alone.ci_low)


def test_a_finite_set_has_the_same_estimate_and_a_narrower_interval():
    labels, verdicts = judged(10, 200)
    given = labels[:100], verdicts[:100], verdicts[100:]
    source, these = ppi_mean(*given), ppi_mean(*given, population="these")
    assert these.estimate == source.estimate
    assert these.ci_high - these.ci_low < 0.8 * (source.ci_high - source.ci_low)
    assert these.labels_alone.ci_high - these.labels_alone.ci_low < 0.8 * (source.labels_alone.ci_high - source.labels_alone.ci_low)


def test_the_intervals_for_a_finite_set_cover_its_mean():
    labels, verdicts = judged(11, 400, 0.7, 0.9, 0.8)
    (point,) = label_curve(labels, verdicts, sizes=(120,), draws=400)
    assert 0.92 <= point.coverage_alone.value <= 0.985 and 0.92 <= point.coverage_corrected.value <= 0.985
    assert point.ratio < 0.9 and point.draws == 400 and point.weight > 0.2
    json.dumps(point.to_dict())


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from([0.0, 1.0, 0.5, 3.0]), st.one_of(st.none(), st.floats(0, 1), st.just(Failure("parse")))), min_size=2, max_size=30),
    st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=2, max_size=40),
)
def test_any_labels_and_scores_give_ends_around_the_estimate(pairs, rest):
    found = ppi_mean([label for label, _ in pairs], [one for _, one in pairs], rest)
    assert not math.isnan(found.ci_low) and not math.isnan(found.ci_high)
    assert found.ci_low - 1e-9 <= found.estimate <= found.ci_high + 1e-9
    json.dumps(found.to_dict(), allow_nan=False)


# --- how many labels ----------------------------------------------------------------------------------------------------


def test_more_labels_narrow_both_intervals():
    labels, verdicts = judged(12, 600)
    points = label_curve(labels, verdicts, sizes=(30, 100, 300), draws=30)
    assert [one.labels for one in points] == [30, 100, 300]
    assert points[0].width_alone > points[1].width_alone > points[2].width_alone
    assert points[0].width_corrected > points[1].width_corrected > points[2].width_corrected
    assert points == label_curve(labels, verdicts, sizes=(30, 100, 300), draws=30)


def test_the_plan_gives_the_width_that_was_asked_for():
    labels, verdicts = judged(13, 20_000, 0.6, 0.9, 0.9)
    with_judge, without = labels_needed(labels[:500], verdicts[:500], 0.05, unlabelled=19_000)
    assert with_judge < 0.6 * without
    found = ppi_mean(labels[:with_judge], verdicts[:with_judge], verdicts[1000:])
    assert (found.ci_high - found.ci_low) / 2 == pytest.approx(0.05, rel=0.12)
    alone = score(labels[:without])
    assert (alone.ci_high - alone.ci_low) / 2 == pytest.approx(0.05, rel=0.12)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "attempt",
    [
        lambda: ppi_mean([1, 0], [0.5], [0.2, 0.3]),
        lambda: ppi_mean([1], [0.5], [0.2, 0.3]),
        lambda: ppi_mean([1, 0], [0.5, 0.1], [0.2]),
        lambda: ppi_mean([1, None], [0.5, 0.1], [0.2, 0.3]),
        lambda: ppi_mean([1, "0"], [0.5, 0.1], [0.2, 0.3]),
        lambda: ppi_mean([1, 0], [0.5, 0.1], [0.2, 0.3], clusters=["a", "b"]),
        lambda: ppi_mean([1, 0], [0.5, 0.1], [0.2, 0.3], clusters=["a"], unlabelled_clusters=["a", "b"]),
        lambda: ppi_mean([1, 0], [0.5, 0.1], [0.2, 0.3], weight=2.0),
        lambda: ppi_mean([1, 0], [0.5, 0.1], [0.2, 0.3], interval="exact"),
        lambda: ppi_mean([1, 0], [0.5, 0.1], [0.2, 0.3], population="everyone"),
        lambda: ppi_mean([1, 0], [0.5, 0.1], [0.2, 0.3], level=1.0),
        lambda: sensitivity_and_specificity([1, 0], [1, 1]),
        lambda: sensitivity_and_specificity([1, 0, 1], [1, 0]),
        lambda: sensitivity_and_specificity([1, 0], [1, None]),
        lambda: sensitivity_and_specificity([0.5, 0], [1, 0]),
        lambda: sensitivity_and_specificity([1, 0], [1, 0], clusters=["a"]),
        lambda: rogan_gladen([0.3], Score(0.9, 0.8, 1, 9, None, 0, "", effective_n=9), Score(0.9, 0.8, 1, 9, None, 0, "", effective_n=9)),
        lambda: label_curve([1, 0, 1], [1, 0, 1], sizes=(2,)),
        lambda: label_curve([1, 0] * 20, [1, 0] * 10, sizes=(5,)),
        lambda: label_curve([1, 0] * 20, [1, 0] * 20, sizes=()),
        lambda: labels_needed([1, 0], [1, 0], 0.1, unlabelled=100),
        lambda: labels_needed([1, 0] * 10, [1, 0] * 10, 0.0, unlabelled=100),
        lambda: bench_coverage(1),
        lambda: bench_coverage(10, intervals=["median"]),
    ],
)
def test_bad_input_gets_a_sentence_that_says_what_to_do(attempt):
    with pytest.raises(BadInputError) as caught:
        attempt()
    assert caught.value.problem and caught.value.remedy.endswith(".")


# --- coverage ---------------------------------------------------------------------------------------------------------


def test_a_bench_is_written_whole_and_read_back(tmp_path, capsys):
    path = tmp_path / "coverage.json"
    bench = bench_coverage(10, out=path, intervals=["proportion"], every=5, progress=True)
    assert CoverageBench.load(path) == bench and len(bench.rows) >= 4
    assert capsys.readouterr().out.count("\n") == len(bench.rows)
    assert str(bench).count("\n") == 2 and "| proportion |" in bench._repr_markdown_()
    assert bench.rows == bench_coverage(10, intervals=["proportion"], every=5).rows
    path.write_text("{}")
    for wrong in (path, tmp_path / "missing.json"):
        with pytest.raises(BadInputError, match="bench coverage"):
            CoverageBench.load(wrong)


@pytest.mark.parametrize("interval", ["Rogan-Gladen", "PPI++", "PPI++, clustered", "clustered proportion", "paired difference"])
def test_intervals_cover_on_average(interval):
    bench = bench_coverage(60, intervals=[interval], every=1 if interval == "PPI++, clustered" else 3)
    covered = np.mean([row["covered"] for row in bench.rows])
    error = math.sqrt(0.95 * 0.05 / (60 * len(bench.rows)))
    assert 0.945 - 4 * error <= covered <= 0.968 + 4 * error, covered


def test_the_stored_results_are_of_the_designs_that_are_there():
    from pathlib import Path

    bench = CoverageBench.load(Path(__file__).parent.parent / "nbs" / "results" / "coverage.json")
    trials = [*module._mean_trials(), *module._clustered_trials(), *module._paired_trials(), *module._corrected_trials(), *module._identical_trials()]
    assert [(row["interval"], row["design"], row["n"]) for row in bench.rows] == [(one.interval, one.design, one.n) for one in trials]
    assert bench.sets >= 1000
    by_kind = {kind: [row["covered"] for row in bench.rows if row["interval"] == kind] for kind in {row["interval"] for row in bench.rows}}
    assert all(0.94 <= np.mean(shares) <= 0.975 for kind, shares in by_kind.items() if kind != "A/A")
    assert min(by_kind["A/A"]) >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / bench.sets)


def test_a_corrected_record_survives_json():
    labels, verdicts = judged(14, 300)
    pair = sensitivity_and_specificity(verdicts[:100], labels[:100])
    for found in (rogan_gladen([*verdicts[100:], None], *pair), ppi_mean(labels[:100], verdicts[:100], verdicts[100:]), rogan_gladen([None], *pair)):
        back = module.CorrectedScore.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False)))
        assert back.to_dict() == found.to_dict() and isinstance(back.uncorrected, Score)
