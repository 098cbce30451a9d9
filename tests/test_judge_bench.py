"""The bench of judges: fast estimates that agree with the slow ones, scores that have not seen the text, any labelled file."""

import json
import math
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmops_ref import judge_bench
from llmops_ref.core import BadInputError
from llmops_ref.corrected_estimates import ppi_mean
from llmops_ref.evaluation_data import Claim, LabelledClaim
from llmops_ref.groundedness import RULES, SIGNALS, auroc
from llmops_ref.judge_bench import (
    SAMPLE_SIGNALS,
    History,
    HistoryError,
    JudgeBench,
    bench_judge,
    combined_scores,
    draw_labels,
    finite_estimate,
    fitted_scores,
    keep_history,
    sample_signals,
    saving,
)
from llmops_ref.judges import LabelsError
from llmops_ref.scores import Failure


@pytest.fixture(scope="module")
def wikibio() -> tuple[dict[str, np.ndarray], list[str], np.ndarray]:
    "Signals, texts and labels of the shipped history that have samples."
    history = History.load()
    whole = np.isfinite(history.values).all(1)
    return dict(zip(history.names, history.values[whole].T, strict=True)), [text for text, kept in zip(history.texts, whole, strict=True) if kept], history.labels[whole]


@pytest.fixture(scope="module")
def combined(wikibio: tuple[dict[str, np.ndarray], list[str], np.ndarray]) -> np.ndarray:
    return combined_scores(wikibio[0], wikibio[1], History.load(), trees=100)


def population(size: int = 500, rho: float = 0.6) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(3)
    scores = generator.normal(size=size)
    return (scores * rho + generator.normal(size=size) * math.sqrt(1 - rho**2) > 0.3).astype(float), scores


# the estimate


def test_the_fast_estimate_is_the_regression_estimator_and_near_that_of_ppi_mean() -> None:
    labels, scores = population()
    for chosen in draw_labels(500, 80, 15):
        estimates, half = finite_estimate(labels[chosen][None], scores[chosen][None], scores.mean()[None], 500)
        slope, start = np.polyfit(scores[chosen], labels[chosen], 1)
        assert estimates[0] == pytest.approx(start + slope * scores.mean())
        errors = labels[chosen] - slope * scores[chosen] - start
        assert half[0] == pytest.approx(1.9908 * math.sqrt((errors**2).sum() / 78 / 80 * (1 - 80 / 500)), rel=1e-3)
        slow = ppi_mean(labels[chosen], scores[chosen], np.delete(scores, chosen), population="these")
        assert estimates[0] == pytest.approx(slow.estimate, abs=0.02) and 2 * half[0] == pytest.approx(slow.ci_high - slow.ci_low, rel=0.12)


def test_both_intervals_keep_their_promise_and_the_ratio_follows_the_correlation() -> None:
    labels, scores = population(1500)
    found = saving("score", labels, scores, draw_labels(1500, 150, 3000))
    for coverage in (found.coverage, found.coverage_alone):
        assert abs(coverage - 0.95) < 4 * found.coverage_error
    assert found.ratio == pytest.approx(math.sqrt(1 - found.correlation**2), abs=0.015)
    assert found.ratio_low < found.ratio < found.ratio_high < 1


def test_a_useless_or_contrary_score_costs_next_to_nothing() -> None:
    labels, scores = population()
    for useless in (np.zeros(500), np.random.default_rng(0).random(500), -scores):
        found = saving("useless", labels, useless, draw_labels(500, 80, 500))
        assert 0.97 < found.ratio < 1.01 and found.coverage > 0.92


def test_all_but_all_labels_leave_next_to_no_doubt() -> None:
    labels, scores = population(100)
    assert saving("most", labels, scores, draw_labels(100, 98, 50)).width < 0.05


@pytest.mark.parametrize("rows, labels, draws", [(10, 3, 5), (10, 9, 5), (10, 5, 0)])
def test_draws_that_cannot_be_are_refused(rows: int, labels: int, draws: int) -> None:
    with pytest.raises(BadInputError):
        draw_labels(rows, labels, draws)


def test_a_fitted_score_sees_its_own_labels_only() -> None:
    generator = np.random.default_rng(0)
    labels, noise = generator.random(300) < 0.5, generator.normal(size=(300, 60))    # as many signals as labels: a fit that peeks is perfect
    chosen = draw_labels(300, 60, 50)
    found = fitted_scores(noise, labels.astype(float), chosen, penalty=1.0)
    peeked = np.mean([np.corrcoef(found[turn, rows], labels[rows])[0, 1] for turn, rows in enumerate(chosen)])
    assert abs(peeked) < 0.2
    changed = labels.astype(float)
    changed[np.setdiff1d(np.arange(300), chosen[0])] = 0.0
    assert np.allclose(fitted_scores(noise, changed, chosen[:1], penalty=1.0), found[:1])


# signals and the combined score


def claim(text: str, *samples: str) -> LabelledClaim:
    return LabelledClaim(text, Claim(text, ("a passage",)), True, "c", "", samples)


def test_what_the_samples_repeat_scores_higher_than_what_they_do_not() -> None:
    found = sample_signals([claim("The painter lived in York.", "A painter who lived in York.", "York was where the painter lived."), claim("The dancer died in 1912.", "A painter of York.", "Born in 1850.")])
    assert set(found) == set(SAMPLE_SIGNALS) and all(values[0] >= values[1] for values in found.values())
    assert found["words in samples"].tolist() == [1.0, 0.0] and found["numbers in samples"].tolist() == [0.0, -1.0]
    assert all(np.isfinite(values).all() for values in sample_signals([claim("?!", "x"), claim("of the", "y")]).values())
    with pytest.raises(BadInputError):
        sample_signals([claim("No samples.")])


def test_the_shipped_history_is_of_the_rules_in_use_and_holds_no_text() -> None:
    history = History.load()
    assert history.rules == RULES and set(SIGNALS) | set(SAMPLE_SIGNALS) == set(history.names) and len(history.labels) > 700
    lines = resources.files("llmops_ref").joinpath("data/judge_history.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(len(json.loads(line)[0]) == 16 and all(value is None or isinstance(value, int | float) for value in json.loads(line)[1:]) for line in lines[1:])


def test_the_combined_score_narrows_the_interval_by_fifteen_percent_on_texts_it_has_not_seen(wikibio: Any, combined: np.ndarray) -> None:
    labels = wikibio[2].astype(float)
    found = saving("combined", labels, combined, draw_labels(len(labels), 100, 2000), checks=40)
    assert found.ratio <= 0.85 and found.ratio_by_ppi <= 0.86 and abs(found.coverage - 0.95) < 0.02 and abs(found.coverage_alone - 0.95) < 0.02
    assert auroc(wikibio[2], combined, wikibio[1]).ci_low > 0.75


def test_no_text_is_scored_by_trees_that_have_seen_it(wikibio: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found, texts, labels = wikibio
    random_labels = np.random.default_rng(0).permutation(labels)    # nothing to learn: a score that peeks would still look good
    history = replace(History.load(), labels=np.concatenate([random_labels, History.load().labels[len(labels):]]))
    peeking = combined_scores(found, [f"other {text}" for text in texts], history, trees=30)    # the texts are not recognised: the trees see all
    honest = combined_scores(found, texts, history, trees=30)
    assert auroc(random_labels, peeking, draws=50).estimate > 0.9 and auroc(random_labels, honest, draws=50).estimate < 0.6


def test_a_file_without_samples_is_scored_by_what_it_has(wikibio: Any) -> None:
    found, texts, labels = wikibio
    scores = combined_scores({name: found[name] for name in SIGNALS}, texts, History.load(), trees=50)
    assert auroc(labels, scores, texts, draws=50).estimate > 0.72


def test_histories_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    good = History.load()
    replace(good, rules="old").save(tmp_path / "old.jsonl")
    (tmp_path / "torn.jsonl").write_text('{"names": ["a"]')
    (tmp_path / "ragged.jsonl").write_text(json.dumps({"names": ["a", "b"], "rules": RULES, "source": {}}) + '\n["t", 1, 0.5]\n')
    (tmp_path / "empty.jsonl").write_text("")
    for name in ("old", "torn", "ragged", "empty", "absent"):
        with pytest.raises(HistoryError):
            History.load(tmp_path / f"{name}.jsonl")


# any labelled file


class Signals:
    "Stands for the embedded judge: no model is loaded."

    name, model, prompt, threshold = "stub", "none", "p", 0.5
    weights = type("Weights", (), {"fitted_on": {}})()

    def signals(self, claims: list[Claim]) -> dict[str, np.ndarray]:
        generator = np.random.default_rng(len(claims))
        return {name: np.array([float("right" in claim.text) + generator.normal() for claim in claims]) for name in SIGNALS}

    def judge(self, claims: list[Claim]) -> list[Any]:
        return [Failure("timeout") if "broken" in claim.text else 0.7 if "right" in claim.text else 0.2 for claim in claims]


@pytest.fixture()
def labelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(judge_bench.Groundedness, "load", classmethod(lambda cls, path=None: Signals()))
    lines = [{"id": number, "reference": f"text {number}", "sentences": ["right words here", "wrong"] * 3, "labels": ["accurate", "major_inaccurate"] * 3,
              **({"samples": ["right words", "other"]} if number % 2 < 2 else {})} for number in range(20)]
    path = tmp_path / "file.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_one_call_measures_any_file_and_its_result_survives_the_disk(labelled: Path, tmp_path: Path) -> None:
    made = bench_judge(labelled, labels=60, draws=100, out=tmp_path / "out.json")
    assert made.data["claims"] == 120 and made.data["texts"] == 20 and made.data["supported"] == 60
    assert set(made.aurocs) >= {"length alone (longer)", "stub", "combined", *SIGNALS, *SAMPLE_SIGNALS} and made.aurocs["stub"].estimate == 1.0
    assert [one.score for one in made.savings] == ["stub", "combined", "fitted on the labels alone"] and made.savings[0].ratio < 0.05
    assert made.how["combined"] == "trees that have seen none of these texts"
    stored = JudgeBench.from_dict(json.loads((tmp_path / "out.json").read_text()))
    assert str(stored) == str(made) and "narrower than labels alone" in str(made) and "| stub |" in made._repr_markdown_()


def test_the_widgets_schema_works_and_failures_are_counted(labelled: Path, tmp_path: Path) -> None:
    path = tmp_path / "widget.jsonl"
    rows = [{"id": f"{number}", "text": "broken" if number == 5 else "right" if number % 2 else "wrong", "passages": ["p", f"q {number // 4}"], "question": "", "label": bool(number % 2),
             "cluster": f"c{number // 4}", "annotator": "a"} for number in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = bench_judge(path, labels=100, draws=50)
    assert made.failures == {"timeout": 1} and made.savings[0].labels == 20 and len(made.savings) == 2 and "Without a score: 1 claims" in str(made)


def test_files_that_cannot_be_measured_are_refused(labelled: Path, tmp_path: Path) -> None:
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps({"id": 1, "reference": "r", "sentences": ["a", "b"], "labels": [1, 1]}) + "\n")
    with pytest.raises(LabelsError, match="both kinds"):
        bench_judge(one)
    one.write_text(json.dumps({"id": 1, "reference": "r", "sentences": ["a", "b"], "labels": [1, 0]}) + "\n")
    with pytest.raises(LabelsError, match="too few"):
        bench_judge(one)


def test_a_history_keeps_numbers_and_hashes_only(labelled: Path, tmp_path: Path) -> None:
    one = [LabelledClaim("1", Claim("secret right words", ("a secret passage",)), True, "c", "", ("right words",))]
    two = [LabelledClaim("2", Claim("wrong", ("b",)), False, "d")]
    made = keep_history([one, two], tmp_path / "history.jsonl", {"from": "a test"})
    assert "secret" not in (tmp_path / "history.jsonl").read_text()
    assert made.labels.tolist() == [True, False] and np.isnan(made.values[1]).sum() == len(SAMPLE_SIGNALS) and np.isfinite(made.values[0]).all()
