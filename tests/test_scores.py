"""Intervals that cover, failures that are counted, verdicts that the rows carry, and sentences for input without an answer."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llmops_ref.scores as module
from llmops_ref.core import BadInputError
from llmops_ref.scores import (
    Comparison,
    Failure,
    Score,
    compare,
    compare_all,
    comparison_table,
    power_of,
    rows_needed,
    score,
)

# --- the record -----------------------------------------------------------------------------------------------------


def test_failures_are_counted_by_kind_and_shown_as_misses():
    found = score([1, 0.5, None, math.nan, math.inf, Failure("timeout"), Failure("parse", "x"), 1e300])
    assert found.n == 2 and found.failures == 6 and found.estimate == 0.75
    assert found.failure_kinds == {"not_a_number": 3, "timeout": 1, "parse": 1, "out_of_range": 1}
    assert found.as_misses is not None
    assert found.as_misses.n == 8 and found.as_misses.estimate == pytest.approx(1.5 / 8) and found.as_misses.failures == 0
    assert score([1, 0.5]).as_misses is None


def test_a_miss_is_worth_what_the_caller_says():
    assert score([2, 4, None], lowest=-3).as_misses.estimate == 1.0


def test_a_record_survives_json():
    for found in (score([1, 0, 1, None], clusters=list("aabb")), score([]), score([0.3]), score([0.1, 0.2, 0.9])):
        plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
        back = Score.from_dict(plain)
        assert back.to_dict() == found.to_dict()
        assert (back.ci_low, back.ci_high) == (found.ci_low, found.ci_high)
    with pytest.raises(BadInputError, match="not a score"):
        Score.from_dict({"estimate": 1.0})


def test_the_text_of_a_record():
    assert f"{score([1, 0] * 10):.2f}" == "0.50 (0.30 to 0.70)"
    assert f"{score([0.4]):.1f}" == "0.4 (no interval)"
    table = score([1, 0, Failure("timeout")], clusters=list("abb"))._repr_markdown_()
    assert "failures as misses" in table and "timeout 1" in table


@pytest.mark.parametrize(
    ("values", "reason"),
    [([], "no values"), ([None, Failure("parse")], "no values"), ([0.4], "one value"), ([5.0] * 30, "equal"), ([7.0], "one value")],
)
def test_a_sample_with_nothing_to_say_has_no_interval_and_says_why(values, reason):
    found = score(values)
    assert (found.ci_low, found.ci_high) == (-math.inf, math.inf)
    assert found.method.startswith("no interval") and reason in found.method
    assert math.isnan(found.estimate) == (found.n == 0)


def test_one_cluster_has_no_interval_whatever_its_rows():
    for values in ([0.2, 0.4, 0.6], [1, 0, 1]):
        found = score(values, clusters=["a"] * 3)
        assert found.clusters == 1 and not math.isfinite(found.ci_low) and "one cluster" in found.method


def test_equal_values_between_bounds_leave_room_for_those_not_seen():
    small, large = score([0.5] * 10), score([0.5] * 100)
    assert small.ci_low < 0.4 < 0.6 < small.ci_high
    assert 0.4 < large.ci_low < 0.5 < large.ci_high
    assert score([1.0] * 20).ci_low == pytest.approx(score([1] * 20).ci_low)
    nearly = score([1.0] * 19 + [0.99])    # no jump when one value is nearly a hit
    assert abs(nearly.ci_low - score([1.0] * 20).ci_low) < 0.05


@pytest.mark.parametrize("ones", [0, 1, 7, 20])
def test_a_rate_has_wilsons_interval(ones):
    scipy_stats = pytest.importorskip("scipy.stats")
    expected = scipy_stats.binomtest(ones, 20).proportion_ci(0.95, method="wilson")
    found = score([True] * ones + [False] * (20 - ones))
    assert (found.ci_low, found.ci_high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert found.method == "Wilson" and found.effective_n == 20


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.one_of(st.none(), st.floats(), st.integers(-5, 5), st.booleans(), st.just(Failure("parse"))), max_size=40),
    st.integers(1, 9),
)
def test_no_input_gives_nan_ends_or_an_interval_off_its_estimate(values, clusters):
    found = score(values, clusters=[index % clusters for index in range(len(values))])
    for one in (found, found.as_misses) if found.as_misses else (found,):
        assert not math.isnan(one.ci_low) and not math.isnan(one.ci_high)
        assert one.n == 0 or (one.ci_low <= one.estimate + 1e-9 * abs(one.estimate) and one.estimate <= one.ci_high + 1e-9 * abs(one.ci_high))
        json.dumps(one.to_dict(), allow_nan=False)
    assert found.n + found.failures == len(values) == sum(found.failure_kinds.values()) + found.n


def test_the_order_of_rows_does_not_matter_and_draws_repeat():
    values = np.random.default_rng(0).random(40)
    first, again = score(values), score(values)
    assert first == again
    turned = score(values[::-1])
    assert (turned.ci_low, turned.ci_high) == pytest.approx((first.ci_low, first.ci_high), abs=0.01)


def test_clusters_without_repeats_change_nothing():
    values = list(np.random.default_rng(1).random(30))
    alone, named = score(values), score(values, clusters=[str(index) for index in range(30)])
    missing = score(values, clusters=[None] * 15 + [math.nan] * 15)
    assert (alone.ci_low, alone.ci_high) == (named.ci_low, named.ci_high) == (missing.ci_low, missing.ci_high)
    assert named.clusters == missing.clusters == 30 and alone.clusters is None


def test_repeating_every_row_does_not_narrow_a_clustered_interval():
    values = list((np.random.default_rng(2).random(40) < 0.7) * 1.0)
    once = score(values)
    naive, aware = score(values * 5), score(values * 5, clusters=list(range(40)) * 5)
    assert naive.ci_high - naive.ci_low < 0.6 * (once.ci_high - once.ci_low)
    assert aware.ci_high - aware.ci_low == pytest.approx(once.ci_high - once.ci_low, rel=0.08)
    assert aware.clusters == 40 and aware.effective_n == pytest.approx(40, rel=0.1)


# --- what it is built from --------------------------------------------------------------------------------------------


def test_satterthwaites_degrees_of_freedom_are_those_of_the_matrix_form():
    generator = np.random.default_rng(4)
    sizes = generator.integers(1, 20, 9).astype(float)
    shares, variances = sizes / sizes.sum(), generator.random(9) * sizes**2
    weights = 1 / (1 - shares)
    residual = np.eye(9) - np.outer(shares, np.ones(9))
    form = (residual.T * weights) @ residual * variances
    assert module._freedom(shares, weights, variances) == pytest.approx(np.trace(form) ** 2 / np.sum(form * form.T))


def test_groups_of_one_row_are_the_textbook():
    values = np.random.default_rng(5).normal(size=25)
    groups = module._groups(values, np.arange(25))
    assert groups.variance == pytest.approx(values.var(ddof=1) / 25) and groups.freedom == pytest.approx(24)


@pytest.mark.parametrize(("wins", "losses", "rows"), [(9, 4, 50), (0, 0, 30), (5, 0, 20), (1, 1, 40), (20, 0, 20)])
def test_tangos_interval_solves_its_equation(wins, losses, rows):
    optimize = pytest.importorskip("scipy.optimize")

    def statistic(delta):
        def loglikelihood(lost):
            cells = ((wins, lost + delta), (losses, lost), (rows - wins - losses, 1 - 2 * lost - delta))
            return sum(count * math.log(max(share, 1e-300)) for count, share in cells if count)

        bottom, top = max(0.0, -delta), (1 - delta) / 2
        lost = optimize.minimize_scalar(lambda x: -loglikelihood(x), bounds=(bottom, top), method="bounded", options={"xatol": 1e-12}).x
        return (wins - losses - rows * delta) / math.sqrt(rows * (2 * lost + delta - delta**2))

    low, high = module._tango(wins, losses, rows, 1.96)
    assert -1 <= low <= (wins - losses) / rows <= high <= 1
    assert statistic(low) == pytest.approx(1.96, abs=0.01)
    if high < 1 - 1e-9:
        assert statistic(high) == pytest.approx(-1.96, abs=0.01)


# --- comparing --------------------------------------------------------------------------------------------------------


def test_rows_are_paired_by_id_and_the_rest_is_counted():
    new = {"a": 1.0, "b": 1.0, "c": 0.0, "only new": 1.0}
    old = {"c": 0.0, "a": 0.0, "b": 1.0, "only old": 0.0, "too": 1.0}
    found = compare(new, old, "m")
    assert (found.n, found.only_in_one, found.wins, found.losses) == (3, 3, 1, 0)
    assert found.difference == pytest.approx(1 / 3) and found.metric == "m"


def test_failures_are_misses_or_left_out():
    new: list = [1.0, Failure("parse"), 1.0, 1.0]
    old = [0.0, 1.0, None, 1.0]
    misses, excluded = compare(new, old), compare(new, old, failures="excluded")
    assert (misses.n, misses.failures_a, misses.failures_b, misses.difference) == (4, 1, 1, 0.25)
    assert (excluded.n, excluded.failures_a, excluded.failures_b, excluded.difference) == (2, 1, 1, 0.5)
    nothing = compare([Failure("parse")], [1.0], failures="excluded")
    assert nothing.verdict == "inconclusive" and nothing.n == 0 and math.isnan(nothing.difference)
    json.dumps(nothing.to_dict(), allow_nan=False)


def test_a_miss_is_the_worst_value_also_where_lower_is_better():
    seconds = compare([1.0, Failure("timeout")], [1.0, 3.0], higher_is_better=False)
    assert seconds.difference == 0.0    # the worst that was seen, three seconds
    assert compare([1.0, Failure("timeout")], [1.0, 3.0], higher_is_better=False, lowest=13.0).difference == 5.0


def test_lower_can_be_better():
    slow, fast = [float(index % 7 + 3) for index in range(60)], [float(index % 7 + 1) for index in range(60)]
    assert compare(slow, fast).verdict == "better"
    found = compare(slow, fast, higher_is_better=False)
    assert found.verdict == "worse" and (found.wins, found.losses) == (0, 60)


@pytest.mark.parametrize(
    ("new", "old", "margin", "verdict"),
    [
        ([1.0] * 20, [0.0] * 20, 0.0, "better"),
        ([0.0] * 20, [1.0] * 20, 0.1, "worse"),
        ([1.0, 0.0] * 100, [1.0, 0.0] * 100, 0.05, "equivalent"),
        ([1.0, 0.0] * 100, [1.0, 0.0] * 100, 0.0, "inconclusive"),
        ([1.0, 0.0] * 5, [1.0, 0.0] * 5, 0.05, "inconclusive"),
        ([1.0, 0.0, 1.0], [0.0, 1.0, 1.0], 0.0, "inconclusive"),
        ([0.5 + index / 1000 for index in range(100)], [0.5 + index / 1000 - 0.01 for index in range(100)], 0.15, "equivalent"),
    ],
)
def test_the_four_verdicts(new, old, margin, verdict):
    assert compare(new, old, margin=margin).verdict == verdict


def test_rates_are_tested_as_mcnemar_did():
    new, old = [1.0] * 9 + [0.0] * 2 + [1.0] * 20, [0.0] * 9 + [1.0] * 2 + [1.0] * 20
    found = compare(new, old)
    assert found.p == pytest.approx(2 * sum(math.comb(11, count) for count in range(3)) / 2**11)
    assert found.test == "exact McNemar"


def test_whole_clusters_flip():
    documents = [index // 20 for index in range(100)]
    found = compare([1.0] * 100, [0.0] * 100, clusters=documents)
    assert found.p == 2 / 2**5 and found.verdict == "inconclusive" and found.clusters == 5
    assert compare([1.0] * 100, [0.0] * 100).verdict == "better"
    assert compare([1.0, 0.0], [0.0, 0.0], clusters=["a", "a"]).ci_low == -math.inf


@dataclass
class Run:
    scores: dict
    documents: dict

    def values(self, metric):
        return self.scores[metric]

    def clusters(self):
        return self.documents


def test_a_run_brings_its_clusters_and_a_mapping_overrides_them():
    generator = np.random.default_rng(6)
    ids = [f"q{index}" for index in range(60)]
    new, old = ({"m": dict(zip(ids, generator.random(60), strict=True))} for _ in range(2))
    by_ten = {name: int(name[1:]) // 6 for name in ids}
    assert compare(Run(new, by_ten), Run(old, by_ten), "m").clusters == 10
    assert compare(Run(new, by_ten), old["m"], "m", clusters={name: name for name in ids}).clusters == 60
    assert compare(new["m"], old["m"], clusters=by_ten).clusters == 10
    with pytest.raises(BadInputError, match="has no cluster"):
        compare(new["m"], old["m"], clusters={"q0": 1})


def test_several_metrics_are_judged_by_the_adjusted_p():
    ids = [f"q{index}" for index in range(30)]
    old = dict.fromkeys(ids, 0.0)
    barely = old | dict.fromkeys(ids[:6], 1.0)    # six wins, no loss: p = 0.031 alone
    assert compare(barely, old).verdict == "better"
    runs = Run({"x": barely, "y": old, "z": old}, {}), Run({"x": old, "y": old, "z": old}, {})
    found = compare_all(*runs, ["x", "y", "z"], margin={"y": 0.2})
    assert [one.verdict for one in found] == ["inconclusive", "equivalent", "inconclusive"]
    assert found[0].p_adjusted == pytest.approx(3 * found[0].p)
    table = comparison_table(found)
    assert table.count("\n") == 4 and "equivalent" in table
    for wrong in ([], ["x", "x"], "x"):
        with pytest.raises(BadInputError):
            compare_all(*runs, wrong)


def test_identical_systems_are_rarely_told_apart():
    generator, called = np.random.default_rng(7), {"rates": 0, "grades": 0, "clusters": 0}
    documents = list(np.repeat(np.arange(12), 5))
    for _ in range(200):
        base = generator.random(60)[:, None]
        rates, grades = (generator.random((60, 2)) < base) * 1.0, np.clip(base + generator.normal(0, 0.2, (60, 2)), 0, 1).round(1)
        shared = np.clip(np.repeat(generator.normal(0.5, 0.2, (12, 2)), 5, axis=0), 0, 1).round(1)
        called["rates"] += compare(*rates.T).verdict != "inconclusive"
        called["grades"] += compare(*grades.T).verdict != "inconclusive"
        called["clusters"] += compare(*shared.T, clusters=documents).verdict != "inconclusive"
    assert max(called.values()) <= 19, called    # 10 are expected at most; 19 or more with a chance of 1 in 200


@pytest.mark.parametrize("binary", [True, False])
def test_power_is_how_often_a_difference_is_found(binary):
    generator, found, told = np.random.default_rng(8), 0, []
    for _ in range(150):
        if binary:
            moved = generator.choice([1.0, 0.0, -1.0], 120, p=[0.22, 0.68, 0.10])
            new, old = np.maximum(moved, 0), np.maximum(-moved, 0)
        else:
            old = generator.integers(0, 11, 40) / 10
            new = old + generator.choice([-0.2, 0.0, 0.1, 0.3], 40, p=[0.2, 0.2, 0.4, 0.2])
        one = compare(new, old, effect=0.12 if binary else 0.06)
        found += one.verdict == "better"
        told.append(one.power)
    assert found / 150 == pytest.approx(np.mean(told), abs=0.13)


def test_the_rows_needed_have_the_power_asked_for():
    for effect, spread in ((0.05, 0.4), (0.5, 0.4), (2.0, 0.1), (0.01, 0.3)):
        rows = rows_needed(effect, spread)
        assert power_of(effect, spread, rows) >= 0.8
        assert rows == 2 or power_of(effect, spread, rows - 1) < 0.8
    found = compare([1.0, 0.0] * 40, [0.0, 0.0, 1.0, 0.0] * 20)
    assert power_of(found.detectable, math.sqrt(max(found.n, 1) and np.var([1, 0, 0, 0] * 20, ddof=1)), 80) > 0.5
    assert found.n_needed and found.n_needed > 80 and 0 < found.power < 1


@pytest.mark.parametrize(
    "attempt",
    [
        lambda: score(["0.5"]),
        lambda: score([object()]),
        lambda: score([1, 0], clusters=["a"]),
        lambda: score([1, 0], clusters=[["a"], ["b"]]),
        lambda: score([1, 0], level=95),
        lambda: compare([1, 0, 1], [1, 0]),
        lambda: compare({"a": 1.0}, [1.0]),
        lambda: compare({"a": 1.0}, {"b": 1.0}),
        lambda: compare({}, {}),
        lambda: compare([], []),
        lambda: compare(1.0, 2.0),
        lambda: compare("10", "01"),
        lambda: compare([1, 0], [0, 1], margin=-0.1),
        lambda: compare([1, 0], [0, 1], margin=math.nan),
        lambda: compare([1, 0], [0, 1], effect=0.0),
        lambda: compare([1, 0], [0, 1], failures="dropped"),
        lambda: compare([1, 0], [0, 1], clusters=["a"]),
        lambda: compare({"a": 1.0}, {"a": 0.0}, clusters=["a"]),
        lambda: rows_needed(0.0, 0.5),
        lambda: rows_needed(0.1, 0.5, power=1.0),
        lambda: power_of(0.1, -1.0, 10),
        lambda: power_of(0.1, 1.0, 1),
    ],
)
def test_bad_input_gets_a_sentence_that_says_what_to_do(attempt):
    with pytest.raises(BadInputError) as caught:
        attempt()
    assert caught.value.problem.endswith(".") and caught.value.remedy.endswith(".")


# --- coverage: cheap versions of what `simulate_coverage` stores --------------------------------------------------------


@pytest.mark.parametrize("n", [20, 60])
@pytest.mark.parametrize("world", ["normal", "exponential", "beta", "mostly one"])
def test_the_interval_of_a_mean_covers_it(world, n):
    draw, truth = {
        "normal": (lambda generator: generator.normal(0, 1, n), 0.0),
        "exponential": (lambda generator: generator.exponential(1, n), 1.0),
        "beta": (lambda generator: generator.beta(5, 1, n), 5 / 6),
        "mostly one": (lambda generator: np.where(generator.random(n) < 0.8, 1.0, generator.random(n)), 0.9),
    }[world]
    generator = np.random.default_rng(n)
    found = [score(draw(generator)) for _ in range(300)]
    assert 0.915 <= np.mean([one.ci_low <= truth <= one.ci_high for one in found]) <= 0.99


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("clusters", [8, 30])
def test_the_interval_of_clustered_rows_covers_the_mean(clusters, binary):
    generator, hits = np.random.default_rng(clusters), 0
    for _ in range(300):
        owners = np.repeat(np.arange(clusters), generator.integers(1, 12, clusters))
        if binary:
            values, truth = (generator.random(len(owners)) < generator.beta(2.1, 0.9, clusters)[owners]) * 1.0, 0.7
        else:
            values, truth = generator.normal(0, 1, clusters)[owners] + generator.normal(0, 1, len(owners)), 0.0
        found = score(values, clusters=owners)
        hits += found.ci_low <= truth <= found.ci_high
    assert 0.915 <= hits / 300 <= 0.99


def test_wilsons_coverage_is_what_the_binomial_says():
    scipy_stats = pytest.importorskip("scipy.stats")
    shares = []
    for n in (20, 50, 100, 200):
        ends = [score([1] * ones + [0] * (n - ones)) for ones in range(n + 1)]
        for rate in (0.02, 0.1, 0.3, 0.5, 0.8, 0.98):
            chances = scipy_stats.binom.pmf(range(n + 1), n, rate)
            shares.append(sum(chance for chance, one in zip(chances, ends, strict=True) if one.ci_low <= rate <= one.ci_high))
    assert min(shares) > 0.92 and np.mean(shares) == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize(("better", "worse"), [(0.15, 0.05), (0.04, 0.02), (0.3, 0.3)])
def test_the_interval_of_a_paired_difference_of_rates_covers_it(better, worse):
    generator, hits = np.random.default_rng(9), 0
    for _ in range(400):
        moved = generator.choice([1.0, 0.0, -1.0], 60, p=[better, 1 - better - worse, worse])
        found = compare(np.maximum(moved, 0), np.maximum(-moved, 0))
        hits += found.ci_low <= better - worse <= found.ci_high
    assert 0.92 <= hits / 400 <= 0.985


def test_the_interval_of_a_paired_difference_of_grades_covers_it():
    generator, hits = np.random.default_rng(10), 0
    for _ in range(150):
        old = generator.integers(0, 5, 40) / 4
        new = np.clip(old + generator.choice([-0.25, 0, 0.25, 0.5], 40, p=[0.1, 0.5, 0.3, 0.1]), -1, 2)
        found = compare(new, old)
        hits += found.ci_low <= 0.1 <= found.ci_high
    assert 0.9 <= hits / 150 <= 0.99


def test_a_comparison_reads_as_a_sentence():
    found = compare([1.0] * 20, [0.0] * 20, "faithfulness")
    assert isinstance(found, Comparison)
    assert f"{found:.2f}".startswith("better: +1.00 (") and "n = 20" in f"{found:.2f}"
    assert "no interval" in f"{compare([1.0], [0.0]):.2f}"
    assert "faithfulness" in found._repr_markdown_() and "| better |" in found._repr_markdown_()


@pytest.mark.parametrize("tiny", [5e-324, 1e-300, 1e-12])
def test_a_margin_next_to_nothing_needs_more_rows_than_there_are(tiny):
    for found in (compare([1.0, 0.0] * 20, [0.0, 0.0, 1.0, 1.0] * 10, margin=tiny), compare([0.1, 0.5, 0.9] * 9, [0.2, 0.4, 0.9] * 9, effect=tiny)):
        assert found.n_needed is None and found.verdict == "inconclusive"
    with pytest.raises(BadInputError, match="large enough"):
        rows_needed(tiny, 10.0)


@pytest.mark.parametrize("scale", [1e-300, 1e-126, 1e-9, 1e45, 1e60])
@pytest.mark.parametrize("clustered", [False, True])
def test_the_interval_moves_with_the_unit_however_small_or_large(scale: float, clustered: bool) -> None:
    values = [-3.0, -1.0, 0.5, 2.0, 2.5, 4.0, 7.0, 9.0, -2.0, 1.0, 12.0, 3.5]
    groups = [row // 2 for row in range(len(values))] if clustered else None
    plain, scaled = score(values, clusters=groups), score([value * scale for value in values], clusters=groups)
    assert scaled.method == plain.method
    assert [end / scale for end in (scaled.ci_low, scaled.ci_high)] == pytest.approx([plain.ci_low, plain.ci_high], rel=1e-6)


@given(st.lists(st.one_of(st.just(0.0), st.floats(0, 1e-100)), min_size=2, max_size=30))
def test_shares_that_differ_by_less_than_a_number_can_show_count_as_equal(values: list[float]) -> None:
    found = score(values)
    assert 0.0 <= found.ci_low <= found.estimate <= found.ci_high <= 1.0
    assert found.ci_high > 0.01, "equal values say little of the values not seen"
