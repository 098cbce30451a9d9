"Labelled pairs, the score and its threshold: what is promised must hold, and bad input must say where it is bad."
from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmops_ref.core import BadInputError, LlmopsRefError
from llmops_ref.hit_calibration import (
    LIKENESS,
    CalibrationReport,
    HitCalibrationError,
    HitRates,
    HitScore,
    Pair,
    PairError,
    _Measured,
    calibrate,
    calibrate_threshold,
    fit_score,
    hit_rates,
    hits_needed,
    likeness,
    load_pairs,
    upper_bound,
)

WORDS = [f"{start}{end}" for start in "bdfgklmnprst" for end in ("avor", "elim", "inod", "orut", "ulap", "ymes")]


class Bag:
    "Embeddings that count words: near for texts that share most of them."

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [[float(text.lower().split().count(word)) + 1e-3 for word in WORDS] for text in texts]


def made_up(number: int, seed: int = 0) -> list[Pair]:
    "Paraphrases swap neighbours, near misses add words; a few labels are wrong."
    generator, pairs = np.random.default_rng(seed), []
    for _ in range(number):
        words = list(generator.choice(WORDS, 9, replace=False))
        same = bool(generator.uniform() < 0.6)
        other = words[3:6] + words[:3] + words[6:] if same else words[:7] + list(generator.choice(WORDS, generator.integers(1, 5)))
        pairs.append(Pair(" ".join(words), " ".join(other), same if generator.uniform() > 0.002 else not same, "made up"))
    return pairs


# Reading pairs ------------------------------------------------------------------------------------------------------

def test_shipped_pairs_are_many_divided_by_topic_and_both_kinds() -> None:
    pairs = load_pairs()
    same = sum(pair.same for pair in pairs)
    assert len(pairs) >= 400 and min(same, len(pairs) - same) >= 200
    texts = {split: {text for pair in pairs if pair.split == split for text in (pair.a, pair.b)} for split in ("calibration", "test")}
    topics = {split: {pair.topic for pair in pairs if pair.split == split} for split in texts}
    assert {pair.split for pair in pairs} == set(texts)
    assert not texts["calibration"] & texts["test"] and not topics["calibration"] & topics["test"]
    assert len({pair.kind for pair in pairs if not pair.same}) >= 14
    assert load_pairs(split="test") == [pair for pair in pairs if pair.split == "test"]


def test_shipped_pairs_name_questions_that_exist() -> None:
    data = Path(__file__).parents[1] / "llmops_ref" / "data"
    questions = {json.loads(line)["id"] for line in (data / "questions.jsonl").read_text(encoding="utf-8").splitlines()}
    rows = [json.loads(line) for line in (data / "paraphrases.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["question"] for row in rows if "question" in row} <= questions


def test_a_file_is_the_source_unless_a_line_names_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"a": "x", "b": "y", "same": true}\n\n{"a": "x", "b": "z", "same": false, "set": "other", "kind": "name"}\n', encoding="utf-8")
    assert load_pairs(path) == [Pair("x", "y", True, "mine"), Pair("x", "z", False, "other", "name")]
    assert load_pairs([("x", "y", True), Pair("x", "z", False)]) == [Pair("x", "y", True), Pair("x", "z", False)]


@pytest.mark.parametrize(("line", "says"), [
    ('{"a": "x", "same": true}', "'b'"), ('{"a": 3, "b": "y", "same": true}', "'a'"), ('{"a": "x", "b": " ", "same": true}', "'b'"),
    ('{"a": "x", "b": "y", "same": "yes"}', "'same'"), ('{"a": "x", "b": "y", "same": 1}', "'same'"), ("{broken", "JSON"), ("[1, 2]", "pair"),
    ('{"a": "x", "b": "y", "same": true, "kind": ["a"]}', "'kind'"), ('{"a": "q", "b": "p", "same": false}', "same two texts"),
])
def test_a_bad_line_is_named_with_file_line_and_field(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"a": "p", "b": "q", "same": true}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(PairError, match=r"pairs\.jsonl, line 2") as error:
        load_pairs(path)
    assert says in str(error.value)


def test_no_pairs_no_file_no_text(tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty.jsonl", tmp_path / "binary.jsonl"
    empty.write_text("\n", encoding="utf-8")
    binary.write_bytes(b"\xff\xfe\x00")
    for source in ([], empty, binary, tmp_path / "absent.jsonl"):
        with pytest.raises(PairError):
            load_pairs(source)


# Likeness and score -------------------------------------------------------------------------------------------------

TEXTS = st.text(alphabet=st.sampled_from(list("abc AB 012,.'’?-éß漢\n")), max_size=60) | st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)


@settings(max_examples=80, deadline=None)
@given(TEXTS, TEXTS, st.floats(-1, 1.001))
def test_likeness_is_finite_symmetric_and_complete(one: str, other: str, cosine: float) -> None:
    found = likeness(one, other, cosine)
    assert tuple(found) == LIKENESS and all(math.isfinite(value) for value in found.values())
    assert found == pytest.approx(likeness(other, one, cosine))


def test_likeness_of_a_text_with_itself_is_the_best_there_is() -> None:
    found = likeness("What does Plus cost in 2026?", "What does Plus cost in 2026?", 1.0)
    assert found["share"] == found["order"] == found["triples"] == 1 and found["fewer"] == found["more"] == found["numbers"] == found["moved"] == 0


def test_likeness_sees_order_spelling_and_what_stands_alone() -> None:
    assert likeness("money from Rome to Paris", "money from Paris to Rome", 0.99)["moved"] > 0
    assert likeness("the organisation", "the organization", 0.9)["more"] == 0
    found = likeness("the limit is 300 pounds", "the limit is 500 pounds for Premium cards", 0.9)
    assert found["numbers_both"] == 1 and found["more"] > found["fewer"] > 0 and found["names"] > 0


def test_score_of_one_is_the_score_of_many_and_survives_a_file(tmp_path: Path) -> None:
    score = HitScore.shipped()
    rows = np.array([list(likeness("a b c", "a c", 0.8).values()), list(likeness("x 1", "x 2", 0.9).values())])
    assert score.many(rows) == pytest.approx([score("a b c", "a c", 0.8), score("x 1", "x 2", 0.9)])
    score.save(tmp_path / "score.json")
    assert HitScore.of(json.loads((tmp_path / "score.json").read_text(encoding="utf-8"))) == score
    assert 0 <= score("", "", -5.0) <= 1 and 0 <= score("a " * 3000, "b", 50.0) <= 1


@pytest.mark.parametrize("change", [{"means": [0.0, 1.0]}, {"names": ["unheard of"]}, {"intercept": math.nan}, {"scales": [0.0]}, {"surplus": 1}, {"weights": "text"}])
def test_a_damaged_score_is_refused(change: dict[str, object]) -> None:
    good = {"names": ["cosine"], "means": [0.0], "scales": [1.0], "weights": [1.0], "intercept": 0.0, "fitted_on": {}, "versions": {}}
    HitScore.of(good)
    with pytest.raises(HitCalibrationError):
        HitScore.of(good | change)


# Bound and threshold ------------------------------------------------------------------------------------------------

def test_bounds_are_those_of_clopper_and_pearson() -> None:
    assert upper_bound(0, 299) == pytest.approx(1 - 0.05 ** (1 / 299)) and upper_bound(0, 0) == upper_bound(3, 3) == 1
    assert upper_bound(3, 800) == pytest.approx(0.0096633, abs=1e-6)
    assert [hits_needed(0.01, wrong) for wrong in range(3)] == [299, 473, 628]
    assert upper_bound(2, 628) <= 0.01 < upper_bound(2, 627)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 20), st.integers(0, 500), st.sampled_from([0.9, 0.95, 0.99]))
def test_the_bound_lies_above_the_rate_and_falls_with_clean_hits(wrong: int, clean: int, level: float) -> None:
    hits = wrong + clean
    if hits:
        assert wrong / hits <= upper_bound(wrong, hits, level) <= 1
        assert upper_bound(wrong, hits + 1, level) <= upper_bound(wrong, hits, level) + 1e-12


def test_over_500_calibrations_the_true_rate_exceeds_the_budget_in_about_one_of_twenty_at_most() -> None:
    generator, exceeded, served = np.random.default_rng(7), 0, 0
    for _ in range(500):
        scores = generator.uniform(size=1500)
        chance = 0.4 * (1 - scores) ** generator.uniform(0.3, 1.5)
        found = calibrate_threshold(scores, generator.uniform(size=1500) < chance, budget=0.05)
        if found.value is not None:
            served += 1
            exceeded += chance[scores >= found.value].mean() > 0.05
    assert served > 150
    assert exceeded <= 500 * 0.05 + 3 * math.sqrt(500 * 0.05 * 0.95)


def test_a_score_that_knows_nothing_is_never_served_above_its_rate() -> None:
    generator = np.random.default_rng(3)
    proven = [calibrate_threshold(generator.uniform(size=2000), generator.uniform(size=2000) < 0.06, budget=0.05).value for _ in range(300)]
    assert sum(value is not None for value in proven) <= 300 * 0.05 + 3 * math.sqrt(300 * 0.05 * 0.95)


def test_the_lowest_threshold_of_a_perfect_score_serves_all_that_is_right() -> None:
    scores = np.linspace(1, 0, 4000)
    found = calibrate_threshold(scores, scores < 0.5, budget=0.01)
    assert found.value is not None and found.value >= 0.49 and found.hits > 1900 and found.bound <= 0.01


def test_too_few_hits_prove_nothing_and_ties_are_served_together() -> None:
    assert calibrate_threshold(np.ones(298), np.zeros(298, bool)).value is None
    assert calibrate_threshold(np.ones(299), np.zeros(299, bool)).hits == 299
    tied = calibrate_threshold(np.r_[np.ones(400), np.zeros(400)], np.r_[np.zeros(399, bool), True, np.ones(400, bool)], budget=0.02)
    assert tied.value == 1.0 and (tied.hits, tied.wrong) == (400, 1)
    assert calibrate_threshold([], []).value is None


@pytest.mark.parametrize("arguments", [
    {"scores": [math.nan], "wrong": [False]}, {"scores": [0.1, 0.2], "wrong": [True]}, {"scores": [[0.1]], "wrong": [[True]]},
    {"scores": [0.1], "wrong": [True], "budget": 0.0}, {"scores": [0.1], "wrong": [True], "budget": 1.0}, {"scores": [0.1], "wrong": [True], "level": 1.5},
])
def test_bad_numbers_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(BadInputError):
        calibrate_threshold(**arguments)    # type: ignore[arg-type]


# Calibration --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def report() -> CalibrationReport:
    return calibrate(made_up(1600), Bag(), model="bag", domain="made up", max_wrong_hit_rate=0.02, verifier=None)    # type: ignore[arg-type]


def test_what_was_calibrated_holds_on_unseen_pairs(report: CalibrationReport) -> None:
    assert report.serves and report.bound <= 0.02 and report.hits > 300
    unseen = _Measured(made_up(1200, seed=1), Bag(), None)    # type: ignore[arg-type]
    served = [report.allows(pair.b, pair.a, cosine) for pair, cosine in zip(unseen.pairs, unseen.cosines, strict=True)]
    assert sum(served) > 300 and np.mean(~unseen.same[served]) <= 0.02


def test_a_report_survives_a_file_and_shows_itself(report: CalibrationReport, tmp_path: Path) -> None:
    report.save(tmp_path / "report.json")
    again = CalibrationReport.load(tmp_path / "report.json")
    assert again == report and again.allows("bavor", "bavor", 1.0) == report.allows("bavor", "bavor", 1.0)
    assert "bag" in report._repr_markdown_() and "made up" in report._repr_markdown_()
    assert sum(row["hits"] for row in report.by_source.values()) == report.hits == sum(row["hits"] for row in report.by_kind.values())


@pytest.mark.parametrize("change", [
    {"threshold": math.nan}, {"threshold": "0.5"}, {"hits": 10**9}, {"wrong": -1}, {"bound": 0.5}, {"budget": None}, {"score": {}}, {"curve": 3}, {"surplus": 1}, {"hit_rate": {}},
])
def test_a_damaged_report_is_refused(report: CalibrationReport, change: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(HitCalibrationError):
        CalibrationReport.from_dict(report.to_dict() | change)
    (tmp_path / "cut.json").write_text(json.dumps(report.to_dict())[:-20], encoding="utf-8")
    for text in ("[]", "3", "null"):
        (tmp_path / "odd.json").write_text(text, encoding="utf-8")
        with pytest.raises(HitCalibrationError):
            CalibrationReport.load(tmp_path / "odd.json")
    with pytest.raises(HitCalibrationError):
        CalibrationReport.load(tmp_path / "cut.json")


def test_few_pairs_serve_nothing_and_say_how_many_more(tmp_path: Path) -> None:
    found = calibrate(made_up(120), Bag(), model="bag", verifier=None)    # type: ignore[arg-type]
    assert not found.serves and not found.allows("bavor", "bavor", 1.0) and found.needed == 299 and found.more_pairs >= 250
    assert "serves nothing" in found._repr_markdown_() and str(found.more_pairs) in found._repr_markdown_()
    found.save(tmp_path / "none.json")
    again = CalibrationReport.load(tmp_path / "none.json")
    assert not again.serves and math.isnan(again.wrong_hit_rate.value)


def test_one_label_broken_vectors_and_too_few_of_a_label_are_errors() -> None:
    class Broken(Bag):
        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return [[math.nan] for _ in texts]

    for pairs, embeddings in (([pair for pair in made_up(50) if pair.same], Bag()), (made_up(50), Broken()), ([], Bag())):
        with pytest.raises(LlmopsRefError):
            calibrate(pairs, embeddings, model="m", verifier=None)    # type: ignore[arg-type]
    with pytest.raises(HitCalibrationError, match="too few"):
        fit_score(made_up(20), Bag(), verifier=None)    # type: ignore[arg-type]


def test_what_a_check_objects_to_is_never_served() -> None:
    pairs = made_up(1600)
    refused = {pair.b for pair in pairs[::2]}
    found = calibrate(pairs, Bag(), model="bag", max_wrong_hit_rate=0.05, verifier=lambda asked, stored: ["no"] if asked in refused else [])    # type: ignore[arg-type]
    assert found.serves and found.hits <= sum(pair.b not in refused for pair in pairs) and found.by_source["made up"]["usable"] < found.same


def test_pairs_given_twice_or_turned_round_count_once() -> None:
    pairs = made_up(300)
    twice = [*pairs, *pairs, *(Pair(pair.b, pair.a, pair.same, pair.source) for pair in pairs)]
    one, other = (calibrate(given, Bag(), model="bag", verifier=None) for given in (pairs, twice))    # type: ignore[arg-type]
    assert one.pairs == other.pairs == 300 and one.hits == other.hits


def test_scores_come_from_weights_that_have_not_seen_relatives() -> None:
    texts = made_up(400)
    relatives = _Measured([Pair(pair.a, pair.b, pair.same, topic=str(number % 7)) for number, pair in enumerate(texts)], Bag(), None)    # type: ignore[arg-type]
    assert relatives.clusters.max() == 6
    chained = _Measured([Pair("bavor x", "belim y", True), Pair("belim y", "binod z", False), Pair("dorut u", "dulap v", True)], Bag(), None)    # type: ignore[arg-type]
    assert chained.clusters[0] == chained.clusters[1] != chained.clusters[2]


def test_comparison_keeps_pairs_apart_and_survives_a_file() -> None:
    found = hit_rates(made_up(1500), Bag(), model="bag", max_wrong_hit_rate=(0.02, 0.05), folds=3, verifier=None)    # type: ignore[arg-type]
    rows = {(row.policy, row.budget): row for row in found.rates}
    assert {row.pairs for row in found.rates} == {1500} and rows["score and checks", 0.05].hits >= rows["score and checks", 0.02].hits > 0
    assert all(row.hits == sum(counts["hits"] for counts in row.by_source.values()) for row in found.rates)
    assert rows["score and checks", 0.05].wrong_hit_rate.value <= 0.05 < rows["cosine 0.80", None].wrong_hit_rate.value
    again = HitRates.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False)))
    assert again.to_dict() == found.to_dict() and "score and checks" in found._repr_markdown_()
    with pytest.raises(HitCalibrationError):
        HitRates.from_dict({"rates": []})


STATEMENT = "The branch in Harrowby told Mr Miller that 12 of its 30 clerks will be trained by Northmere on Friday."


@pytest.mark.parametrize("change", [
    ("12", "14"), ("Harrowby", "Dunmere"), ("Friday", "Monday"), ("trained", "replaced"), ("will be", "will not be"), ("by Northmere on", "without Northmere after"),
    ("12 of its 30", "30 of its 12"), ("Harrowby told Mr Miller", "Miller told Mr Harrowby"), ("will", "will never"),
])
def test_a_statement_that_was_only_edited_has_no_score(change: tuple[str, str]) -> None:
    edited = STATEMENT.replace(*change)
    assert edited != STATEMENT and HitScore.shipped()(edited, STATEMENT, 0.99) == HitScore.shipped()(STATEMENT, edited, 0.99) == 0.0


@pytest.mark.parametrize("asked", [
    STATEMENT, STATEMENT.lower(), "Mr Miller was told by the branch in Harrowby that Northmere will train 12 of its 30 clerks on Friday.",
    "According to the branch in Harrowby, 12 of its 30 clerks will be trained by Northmere on Friday, Mr Miller was told.",
])
def test_what_is_the_same_or_worded_anew_is_not_an_edit(asked: str) -> None:
    assert likeness(asked, STATEMENT, 0.97)["edited"] == 0.0
    assert likeness("What does the card cost a year?", "What does the card cost a month?", 0.97)["edited"] == 0.0, "questions are left to the checks"
