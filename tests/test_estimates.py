"""Intervals that cover, tests that agree with the textbook, and sentences for input that has no answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llmops_ref.estimates as module
from llmops_ref import quantization
from llmops_ref.core import BadInputError
from llmops_ref.estimates import (
    Estimate,
    bootstrap_interval,
    estimate,
    holm,
    mcnemar,
    paired_difference,
    student_quantile,
    student_tail,
)

WORLDS = {
    "normal": (lambda generator, n: generator.normal(2.0, 1.0, n), 2.0, 0.90),
    "skewed": (lambda generator, n: generator.exponential(1.0, n), 1.0, 0.84),    # the small skewed sample is the known weak spot
    "reciprocal ranks": (lambda generator, n: generator.choice([0.0, 0.25, 0.5, 1.0], n, p=[0.4, 0.1, 0.2, 0.3]), 0.425, 0.90),
    "frequent": (lambda generator, n: generator.random(n) < 0.6, 0.6, 0.90),
    "rare": (lambda generator, n: generator.random(n) < 0.05, 0.05, 0.90),
}


# --- intervals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [8, 20, 40])
@pytest.mark.parametrize("world", WORLDS)
def test_the_interval_covers_the_truth_about_as_often_as_it_says(world, n):
    draw, truth, least = WORLDS[world]
    generator = np.random.default_rng(n)
    found = [estimate(draw(generator, n)) for _ in range(250)]
    share = np.mean([one.low <= truth <= one.high for one in found])
    assert share >= least
    assert share <= 0.995 or world == "rare"    # not wider than it has to be, where a sample can tell


def test_the_plain_bootstrap_is_narrower_than_a_small_sample_allows():
    generator, plain, widened = np.random.default_rng(5), 0, 0
    for _ in range(300):
        sample = generator.normal(0.0, 1.0, 8)
        found = bootstrap_interval(lambda times, sample=sample: times @ sample / 8, 8, 1000)
        plain += found.low <= 0 <= found.high
        found = estimate(sample)
        widened += found.low <= 0 <= found.high
    assert widened > plain + 10


@pytest.mark.parametrize(("ones", "n"), [(0, 20), (20, 20), (1, 20), (7, 19), (1, 2)])
def test_a_rate_has_wilsons_interval(ones, n):
    scipy_stats = pytest.importorskip("scipy.stats")
    found = estimate([1] * ones + [0] * (n - ones))
    expected = scipy_stats.binomtest(ones, n).proportion_ci(0.95, method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert found.value == ones / n and found.n == n
    assert 0 <= found.low <= found.value <= found.high <= 1 and found.high - found.low > 0.1


@pytest.mark.parametrize("freedom", [1, 2.5, 4, 7.3, 19, 400, 1e6])
@pytest.mark.parametrize("chance", [0.2, 0.5, 0.6, 0.975, 0.9999])
def test_students_quantile_and_tail(freedom, chance):
    scipy_stats = pytest.importorskip("scipy.stats")
    expected = scipy_stats.t.ppf(chance, freedom)
    assert student_quantile(chance, freedom) == pytest.approx(expected, rel=1e-7, abs=1e-7)
    assert student_tail(expected, freedom) == pytest.approx(1 - chance, rel=1e-6)


@pytest.mark.parametrize(("chance", "freedom"), [(0.0, 5), (1.0, 5), (0.5, 0), (0.5, -1), (0.5, math.inf), (math.nan, 5)])
def test_a_quantile_that_does_not_exist_is_refused(chance, freedom):
    with pytest.raises(BadInputError):
        student_quantile(chance, freedom)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30), st.randoms())
def test_an_interval_holds_its_mean_and_grows_with_its_level(values, random):
    found, wide = estimate(values), estimate(values, level=0.99)
    spread = 1e-9 * (1 + max(map(abs, values)))
    assert found.value == pytest.approx(np.mean(values), abs=1e-9)
    assert wide.low - spread <= found.low <= found.value + spread and found.value - spread <= found.high <= wide.high + spread
    assert (min(values) - spread <= found.low and found.high <= max(values) + spread) or set(values) <= {0.0, 1.0}


def test_draws_in_blocks_are_the_same_draws(monkeypatch):
    sample = np.random.default_rng(0).normal(size=50)
    whole = bootstrap_interval(lambda times: times @ sample / 50, 50)
    monkeypatch.setattr(module, "_BLOCK", 170)    # three draws at a time, and a remainder
    parts = []
    again = bootstrap_interval(lambda times: parts.append(len(times)) or times @ sample / 50, 50)
    assert [again.low, again.high] == pytest.approx([whole.low, whole.high]) and max(parts) == 3


def test_ratios_of_sums_are_drawn_by_unit():
    hits, questions = np.array([9.0, 1.0, 5.0, 5.0]), np.array([10.0, 2.0, 10.0, 50.0])
    found = bootstrap_interval(lambda times: (times @ hits) / (times @ questions), 4)
    assert found.value == pytest.approx(20 / 72) and found.low < 20 / 72 < found.high and found.n == 4


def test_an_estimate_shows_itself():
    assert f"{Estimate(0.5, 0.25, 0.75, 8):.0%}" == "50% (25% to 75%)"
    assert Estimate(0.5, 0.25, 0.75).to_dict() == {"value": 0.5, "low": 0.25, "high": 0.75, "n": None}


# --- differences --------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_exact_binomial_test(first, second):
    scipy_stats = pytest.importorskip("scipy.stats")
    expected = 1.0 if first + second == 0 else scipy_stats.binomtest(first, first + second, 0.5).pvalue
    assert mcnemar(first, second) == pytest.approx(expected)
    assert mcnemar(first, second) == mcnemar(second, first)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60))
def test_sign_flips_of_hits_are_mcnemars_test(pairs):
    first, second = map(list, zip(*pairs, strict=True))
    found = paired_difference(first, second)
    assert found.exact
    assert found.p == pytest.approx(mcnemar(found.wins, found.losses))
    assert found.difference.value == pytest.approx((found.wins - found.losses) / len(pairs))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=9))
def test_sign_flips_are_counted_exactly(differences):
    moved = [round(value, 6) for value in differences]
    tosses = np.array(np.meshgrid(*[[-1, 1]] * len(moved))).reshape(len(moved), -1).T
    scale = max(map(abs, moved)) or 1.0
    expected = np.mean(np.abs(tosses @ moved) / scale >= abs(sum(moved)) / scale - 1e-8)
    assert paired_difference(moved, [0.0] * len(moved)).p == pytest.approx(expected)


def test_a_sampled_p_value_agrees_with_the_exact_one(monkeypatch):
    differences = np.random.default_rng(2).normal(0.35, 1.0, 16)
    exact = paired_difference(differences, np.zeros(16))
    monkeypatch.setattr(module, "_DISTINCT", 10)
    sampled = paired_difference(differences, np.zeros(16))
    assert exact.exact and not sampled.exact
    assert sampled.p == pytest.approx(exact.p, abs=4 * math.sqrt(exact.p / module._TOSSES))
    sure = paired_difference(np.arange(1.0, 41.0), np.zeros(40))
    assert not sure.exact and 0 < sure.p <= 2 / module._TOSSES    # it counts itself: never zero


def test_equal_systems_raise_false_alarms_as_often_as_allowed():
    generator = np.random.default_rng(4)
    alarms = sum(paired_difference(*generator.choice([0.0, 0.25, 0.5, 1.0], (2, 20))).p < 0.05 for _ in range(300))
    assert alarms <= 25    # 15 expected


def test_the_first_system_is_the_one_that_is_ahead():
    found = paired_difference([1, 1, 1, 0.5, 1], [0, 0, 0.5, 1, 0])
    assert found.difference.value == pytest.approx(0.6) and (found.wins, found.losses) == (4, 1)
    assert found.to_dict()["difference"]["n"] == 5


# --- several comparisons ------------------------------------------------------------------------------------------


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == [] and holm([0.2]) == [0.2]


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_keeps_the_order_and_never_helps(values):
    adjusted = holm(values)
    assert all(raw <= new <= min(1.0, raw * len(values) + 1e-12) for raw, new in zip(values, adjusted, strict=True))
    pairs = sorted(zip(values, adjusted, strict=True))
    assert [new for _, new in pairs] == sorted(new for _, new in pairs)


# --- bad input, and the names that were here before ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda: estimate([]), "at least 2"),
        (lambda: estimate([0.5]), "at least 2"),
        (lambda: estimate([[0.5, 1.0], [0.0, 1.0]]), "one for each question"),
        (lambda: estimate([0.5, float("nan")]), "Value 1 is NaN"),
        (lambda: estimate([0.5, float("inf")]), "infinite"),
        (lambda: estimate("hits"), "not numbers|shape"),
        (lambda: estimate([1, 0], level=95), "level is 95"),
        (lambda: paired_difference([1, 0, 1], [1, 0]), "3 and 2 questions"),
        (lambda: bootstrap_interval(lambda times: times.sum(axis=1), 0), "0 units"),
        (lambda: bootstrap_interval(lambda times: times.sum(axis=1), 3, level=1.0), "level 1.0"),
        (lambda: mcnemar(-1, 3), "negative"),
        (lambda: holm([0.2, 1.2]), "outside 0 to 1"),
    ],
)
def test_bad_input_gets_a_sentence(attempt, says):
    with pytest.raises(BadInputError, match=says) as caught:
        attempt()
    assert caught.value.remedy


def test_quantization_still_offers_the_same_names():
    assert quantization.Estimate is Estimate and quantization.mcnemar is mcnemar
    assert {"Estimate", "mcnemar"} <= set(quantization.__all__)
