"""The gate: limits against intervals, a file that is read strictly, and no way past an unchecked judge."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from datetime import date, timedelta
from typing import Any

import pytest
from evaluated import FAILED, Facts, FakeEvaluation, evaluated, rows
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from langchain_core.language_models import FakeListChatModel

from llmops_ref.evaluation_data import Claim, LabelledClaim
from llmops_ref.judges import ChatJudge, JudgeCard, calibrate, identity
from llmops_ref.release_gate import EXIT_CODES, Check, Gate, GateFileError, GateResult, JudgeRule
from llmops_ref.reports import write_report
from llmops_ref.scores import Failure, Score, Value, score

TODAY = date(2026, 11, 22)
GOOD, BAD, MIXED = [1.0] * 95 + [0.0] * 5, [1.0] * 30 + [0.0] * 70, [1.0] * 80 + [0.0] * 20


def checks(result: GateResult) -> dict[str, str]:
    return {check.name: check.verdict for check in result.checks}


def one(result: GateResult, name: str) -> Check:
    [found] = [check for check in result.checks if check.name == name]
    return found


# ---- the file


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "checks nothing"),
        ("min_n = 5", "checks nothing"),
        ("[floors]\n[margins]", "checks nothing"),
        ("[floor]\nx = 0.5", "'floor'.*floors"),
        ("[floors]\nx = '0.5'", "floors.x is '0.5', which is not a number but text in quotes. Write a number"),
        ("[floors]\nx = true", "floors.x is True, which is not a number"),
        ("[floors]\nx = nan", "floors.x is nan, which cannot be"),
        ("[floors]\nx = inf", "floors.x is inf, which cannot be"),
        ("[floors]\na.b = 0.5", r"floors.a is \{'b': 0.5\}.*has a dot stands in quotes"),
        ("floors = 0.5", r"floors is not a table. Write \[floors\]"),
        ("[margins]\nx = -0.1", "margins.x is -0.1, which cannot be. Write the loss"),
        ("max_failure_rate = 0", "max_failure_rate is 0, which cannot be"),
        ("max_failure_rate = 1.5", "max_failure_rate is 1.5"),
        ("max_failure_rate = '5%'", "max_failure_rate is '5%'"),
        ("max_failures = 0.1", "max_failures.*max_failure_rate"),
        ("max_failure_rate = 0.1\nmin_n = 0", "min_n is 0"),
        ("max_failure_rate = 0.1\nmin_n = 2.5", "min_n is 2.5, which cannot be. Write a whole number"),
        ("max_failure_rate = 0.1\nlevel = 95", "level is 95"),
        ("max_failure_rate = 0.1\njudge = 0.6", r"judge is not a table. Write \[judge\]"),
        ("max_failure_rate = 0.1\n[judge]\nkappa = 0", "judge.kappa is 0.*yes to everything has kappa 0"),
        ("max_failure_rate = 0.1\n[judge]\nkappa = -1.0", "judge.kappa is -1.0"),
        ("max_failure_rate = 0.1\n[judge]\nkapa = 0.5", r"\[judge\] has the key 'kapa'.*kappa"),
        ("max_failure_rate = 0.1\n[judge]\nmax_age_days = 0", "judge.max_age_days is 0"),
        ("max_failure_rate = 0.1\n[judge]\nmax_failure_rate = 1", "judge.max_failure_rate is 1"),
        ("max_failure_rate = 0.1\n[judge]\ndata_hash = ''", "judge.data_hash is ''"),
        ("max_failure_rate = 0.1\n[judge]\nallow_constant = 1", "judge.allow_constant is 1"),
        ("max_failure_rate = 0.1\n[baseline]\nmin_shared = 0", "baseline.min_shared is 0"),
        ("[floors]\nx = 0.5\n[ceilings]\nx = 0.9", "'x' has a floor and a ceiling"),
        ("[floors]\nx = 0.5\nx = 0.6", "is not TOML: Cannot overwrite a value"),
        ("[floors\nx = 0.5", "is not TOML.*line 1"),
        ("x = " + "[" * 5000, "is not TOML"),
        ("min_n = " + "9" * 5000, "is not TOML"),
        ("[floors]\nx = " + "9" * 400, "which cannot be"),
    ],
)
def test_a_gate_file_that_cannot_be_meant_names_file_key_and_remedy(tmp_path, text, says):
    (tmp_path / "gate.toml").write_text(text)
    with pytest.raises(GateFileError, match=rf"(?s)gate\.toml.*{says}|{says}.*gate\.toml") as caught:
        Gate.from_file(tmp_path / "gate.toml")
    assert caught.value.remedy and ("is not TOML" in str(caught.value)) is says.startswith("is not TOML")


def test_a_gate_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "latin.toml").write_bytes(b"name = '\xe9'")
    for path, says in ((tmp_path / "absent.toml", "cannot be read"), (tmp_path, "cannot be read"), (tmp_path / "latin.toml", "not UTF-8: byte 8")):
        with pytest.raises(GateFileError, match=says):
            Gate.from_file(path)


def test_a_whole_gate_file_is_read(tmp_path):
    (tmp_path / "gate.toml").write_text(
        "\ufeffmax_failure_rate = 0.05\nmin_n = 50\nlevel = 0.9\n[floors]\nrecall = 0.8\n'a.b' = 1\n[ceilings]\nseconds = 3\n[margins]\nrecall = 0.02\n"
        "[judge]\nkappa = 0.5\nmax_age_days = 30\nmax_failure_rate = 0.02\ndata_hash = 'abc'\nallow_constant = true\n[baseline]\nmin_shared = 0.9\n"
    )
    rule = JudgeRule(0.5, 30, 0.02, "abc", True)
    assert Gate.from_file(tmp_path / "gate.toml") == Gate({"recall": 0.8, "a.b": 1}, {"seconds": 3}, {"recall": 0.02}, 0.05, 50, rule, 0.9, 0.9, "gate.toml")
    assert Gate.from_file(tmp_path / "gate.toml").named == ["recall", "a.b", "seconds"]


anything = st.none() | st.booleans() | st.floats() | st.integers() | st.sampled_from(["", "0.5", [], [0.5], {"a": 1}])
KEYS = st.sampled_from(["floors", "ceilings", "margins", "max_failure_rate", "min_n", "level", "judge", "baseline", "x", ""])


INNER = st.dictionaries(st.sampled_from(["kappa", "max_age_days", "max_failure_rate", "data_hash", "allow_constant", "min_shared", "m", "n"]), anything, max_size=2)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(KEYS, anything | INNER, max_size=5))
def test_whatever_the_file_holds_it_is_a_gate_or_a_gate_file_error(plain):
    try:
        gate = Gate.from_dict(plain, "any.toml")
    except GateFileError as error:
        assert "any.toml" in str(error) and error.remedy
    else:
        assert gate.named or gate.max_failure_rate is not None
        assert 0 < gate.judge.kappa <= 1 and gate.min_n >= 2 and 0.5 < gate.level < 1


# ---- floors, ceilings, failures, rows


@pytest.mark.parametrize(("values", "verdict"), [(GOOD, "pass"), (BAD, "fail"), (MIXED, "inconclusive")])
def test_a_floor_is_held_against_the_interval(values, verdict):
    result = Gate(floors={"recall": 0.75}).check(evaluated({"recall": values}))
    found = one(result, "floor: recall")
    assert (found.verdict, result.verdict, result.exit_code) == (verdict, verdict, EXIT_CODES[verdict])
    bounds = score(values)
    assert (found.measured.ci_low, found.measured.ci_high) == (bounds.ci_low, bounds.ci_high)
    assert "0.75" in found.reason and ("rows would settle it" in found.reason) is (verdict == "inconclusive")


def test_an_estimate_above_the_floor_is_not_enough():
    "The mean of nine rows in ten is above 0.85, and says little with twenty rows."
    assert Gate(floors={"recall": 0.85}).check(evaluated({"recall": [1.0] * 18 + [0.0] * 2})).verdict == "inconclusive"


def test_failures_count_as_misses():
    values = [1.0] * 80 + [FAILED] * 20
    result = Gate(floors={"recall": 0.9}).check(evaluated({"recall": values}))
    assert result.verdict == "fail" and "20 without a value (20 parse) counted as misses, 1.000 without them" in one(result, "floor: recall").reason
    for nothing in (math.nan, math.inf, None):
        assert Gate(floors={"recall": 0.9}).check(evaluated({"recall": [1.0] * 80 + [nothing] * 20})).verdict == "fail"


def test_a_miss_is_worth_the_lowest_value_of_its_metric():
    values = [0.5] * 60 + [0.4] * 38 + [FAILED] * 2
    assert Gate(floors={"m": 0.42}).check(evaluated({"m": values}, {"m": Facts(lowest=0.0)})).verdict == "pass"
    assert Gate(floors={"m": 0.42}).check(evaluated({"m": values}, {"m": Facts(lowest=-9.0)})).verdict != "pass"


@pytest.mark.parametrize(("limit", "verdict"), [(1.2, "pass"), (0.8, "fail"), (1.0, "inconclusive")])
def test_a_ceiling_is_a_floor_from_above(limit, verdict):
    seconds = [0.9, 1.1] * 50
    assert Gate(ceilings={"seconds": limit}).check(evaluated({"seconds": seconds}, {"seconds": Facts(higher_is_better=False)})).verdict == verdict


def test_a_row_without_a_value_could_be_above_any_ceiling():
    values = [1.0, 1.2] * 50 + [FAILED]
    result = Gate(ceilings={"seconds": 2.0}).check(evaluated({"seconds": values}, {"seconds": Facts(higher_is_better=False)}))
    assert result.verdict == "inconclusive" and "could be anything" in one(result, "ceiling: seconds").reason


@pytest.mark.parametrize(("failed", "verdict"), [(0, "pass"), (5, "inconclusive"), (40, "fail")])
def test_the_failure_rate_is_held_against_its_interval(failed, verdict):
    values = [1.0] * (100 - failed) + [Failure("timeout")] * failed
    result = Gate(max_failure_rate=0.05).check(evaluated({"recall": values}))
    assert one(result, "failures: recall").verdict == verdict
    assert ("timeout" in one(result, "failures: recall").reason) is bool(failed)


def test_too_few_values_are_inconclusive():
    evaluation = evaluated({"recall": [1.0] * 40})
    assert Gate(floors={"recall": 0.5}, min_n=40).check(evaluation).verdict == "pass"
    result = Gate(floors={"recall": 0.5}, min_n=41).check(evaluation)
    assert checks(result) == {"floor: recall": "pass", "rows: recall": "inconclusive"} and result.verdict == "inconclusive"


def test_rows_that_share_a_document_count_for_less():
    "Ten documents of ten rows that all agree are ten observations."
    values = [float(number // 10 not in (3, 7)) for number in range(100)]
    dataset = rows(100)
    together = dataclasses.replace(dataset, rows=tuple(dataclasses.replace(row, metadata={"document": str(number // 10)}) for number, row in enumerate(dataset)))
    apart = dataclasses.replace(dataset, rows=tuple(dataclasses.replace(row, reference_context_ids=None) for row in dataset))
    width = {}
    for name, chosen in (("together", together), ("apart", apart)):
        measured = one(Gate(floors={"m": 0.5}).check(evaluated({"m": values}, dataset=chosen)), "floor: m").measured
        width[name] = measured.ci_high - measured.ci_low
    assert width["together"] > 1.5 * width["apart"]


@pytest.mark.parametrize(
    ("gate", "says"),
    [
        (Gate(floors={"recal": 0.5}), "names the metric 'recal', which is not measured.*Write 'recall'"),
        (Gate(margins={"kindness": 0.5}), "'kindness'.*--metrics"),
        (Gate(floors={"seconds": 0.5}), "floors.seconds does not fit: lower is better"),
        (Gate(ceilings={"recall": 0.5}), "ceilings.recall does not fit: higher is better"),
        (Gate(floors={"recall": 0.0}), "floors.recall is 0.0, which nothing can be below"),
    ],
)
def test_a_gate_that_does_not_fit_the_evaluation_is_an_error(gate, says):
    evaluation = evaluated({"recall": GOOD, "seconds": GOOD}, {"seconds": Facts(higher_is_better=False)})
    with pytest.raises(GateFileError, match=says):
        gate.check(evaluation)


def test_a_result_without_checks_is_no_pass():
    assert GateResult((), Gate(floors={"x": 0.5})).verdict == "inconclusive"


# ---- the baseline


def pair(ours: list[Any], theirs: list[Any], **changes: Any) -> tuple[FakeEvaluation, FakeEvaluation]:
    return evaluated({"recall": ours}), evaluated({"recall": theirs}, **changes)


def test_the_same_answers_of_the_same_system_are_no_worse():
    "With forty rows an interval could not tell; where settings and answers are the same there is nothing to tell."
    dataset = dataclasses.replace(rows(40), settings={"model_name": "a"})
    other = dataclasses.replace(dataset, settings={"model_name": "b"})
    answers = dataclasses.replace(dataset, rows=tuple(dataclasses.replace(row, response="x") for row in dataset))
    values = [1.0] * 30 + [0.0] * 10
    gate, ours = Gate(margins={"recall": 0.01}), evaluated({"recall": values}, dataset=dataset)
    assert gate.check(ours, evaluated({"recall": values}, dataset=dataset)).verdict == "pass"
    for theirs in (evaluated({"recall": values}, dataset=other), evaluated({"recall": values}, dataset=answers), evaluated({"recall": values[::-1]}, dataset=dataset)):
        assert gate.check(ours, theirs).verdict == "inconclusive"
    unknown = evaluated({"recall": values}, dataset=rows(40))
    assert gate.check(unknown, unknown).verdict == "inconclusive"    # nothing is recorded of the system


@pytest.mark.parametrize(("lost", "verdict"), [(1, "pass"), (6, "inconclusive"), (60, "fail")])
def test_a_margin_is_held_against_the_interval_of_the_difference(lost, verdict):
    ours = [0.0] * lost + [1.0] * (200 - lost)
    result = Gate(margins={"recall": 0.05}).check(*pair(ours, [1.0] * 200))
    assert one(result, "margin: recall").verdict == verdict, one(result, "margin: recall").reason


def test_where_lower_is_better_more_is_worse():
    facts = {"seconds": Facts(higher_is_better=False)}
    fast, slow = (evaluated({"seconds": [base + number % size / 10 for number in range(120)]}, facts) for base, size in ((1.0, 5), (2.0, 7)))
    gate = Gate(margins={"seconds": 0.1})
    assert (gate.check(fast, slow).verdict, gate.check(slow, fast).verdict) == ("pass", "fail")


def test_holms_correction_keeps_many_metrics_from_failing_by_luck():
    "A loss that a gate of one margin calls is not called among thirty."
    ours, theirs = [0.0] * 7 + [1.0] * 93, [1.0] * 100
    names = [f"m{number}" for number in range(30)]
    alone = Gate(margins={"m0": 0.0}).check(evaluated({"m0": ours}), evaluated({"m0": theirs}))
    values = {name: ours if name == "m0" else theirs for name in names}
    among = Gate(margins=dict.fromkeys(names, 0.0)).check(evaluated(values), evaluated(dict.fromkeys(names, theirs)))
    assert one(alone, "margin: m0").verdict == "fail" and one(among, "margin: m0").verdict == "inconclusive"
    assert "correction for several metrics" in one(among, "margin: m0").reason


@pytest.mark.parametrize(
    ("change", "verdict", "says"),
    [
        (lambda row: dataclasses.replace(row, id="other-" + row.id), "fail", "no row is in both"),
        (lambda row: dataclasses.replace(row, user_input=row.user_input + "!"), "fail", "another data set: 100 of 100 shared rows"),
        (lambda row: dataclasses.replace(row, reference="x"), "fail", "another data set"),
        (lambda row: dataclasses.replace(row, metadata={"expected": "decline"}), "fail", "another data set"),
        (lambda row: dataclasses.replace(row, id="other-q001") if row.id == "q001" else row, "inconclusive", "only 99 rows are in both"),
        (lambda row: dataclasses.replace(row, response="x", retrieved_contexts=("y",)), "pass", "no worse"),
    ],
)
def test_a_baseline_of_other_rows_never_passes(change, verdict, says):
    dataset = rows(100)
    other = dataclasses.replace(dataset, rows=tuple(map(change, dataset)))
    ours, theirs = pair([1.0] * 100, [1.0] * 100, dataset=other)
    found = one(Gate(margins={"recall": 0.05}).check(ours, theirs), "margin: recall")
    assert found.verdict == verdict and says in found.reason


def test_rows_may_differ_as_far_as_the_gate_says():
    dataset = rows(100)
    fewer = evaluated({"recall": [1.0] * 95}, dataset=dataclasses.replace(dataset, rows=dataset.rows[:95]))
    full = evaluated({"recall": [1.0] * 100}, dataset=dataset)
    for shared, verdict in ((0.96, "inconclusive"), (0.95, "pass")):
        assert Gate(margins={"recall": 0.05}, min_shared=shared).check(full, fewer).verdict == verdict


@pytest.mark.parametrize(
    ("facts", "verdict", "says"),
    [
        ({"other": Facts()}, "inconclusive", "not measured by this metric"),
        ({"recall": Facts(fingerprint="2")}, "fail", "another version"),
        ({"recall": Facts(judge="somebody")}, "fail", "another judge"),
    ],
)
def test_a_baseline_measured_otherwise_never_passes(facts, verdict, says):
    theirs = evaluated({next(iter(facts)): [1.0] * 100}, facts)
    found = one(Gate(margins={"recall": 0.05}).check(evaluated({"recall": [1.0] * 100}), theirs), "margin: recall")
    assert found.verdict == verdict and says in found.reason


def test_margins_without_a_baseline_are_inconclusive():
    result = Gate(margins={"recall": 0.05}).check(evaluated({"recall": GOOD}))
    assert result.verdict == "inconclusive" and "--baseline" in one(result, "margin: recall").reason


def test_a_row_that_the_system_declined_is_a_miss_and_no_failure_to_measure():
    dataset = rows(50)
    declined = dataclasses.replace(dataset, rows=tuple(dataclasses.replace(row, metadata={"refused": int(row.id[1:]) < 25}) for row in dataset))
    values = [Failure("refused", "the system declined")] * 25 + [1.0] * 25
    result = Gate(floors={"recall": 0.7}, max_failure_rate=0.2).check(evaluated({"recall": values}, dataset=declined))
    assert checks(result) == {"floor: recall": "fail", "failures: recall": "pass", "rows: recall": "pass"}
    asked = Gate(max_failure_rate=0.2).check(evaluated({"recall": values}))    # here it was not the system: a judge refused
    assert asked.verdict == "fail"


# ---- judges


CLAIMS = [
    LabelledClaim(f"c{number}", Claim(f"Fee {number} is {number + (number % 2)} pounds.", (f"Fee {number} is {number} pounds.",)), number % 2 == 0, f"text {number}")
    for number in range(120)
]


class Judge:
    "A judge by a rule; `wrong` of every hundred verdicts are turned round."

    name, model, prompt, threshold = "reader", "rules 1", "compare the numbers", 0.5

    def __init__(self, rule: Callable[[Claim], Value] | None = None, wrong: int = 0) -> None:
        self.rule, self.wrong = rule, wrong

    def judge(self, claims: Sequence[Claim]) -> list[Value]:
        if self.rule:
            return [self.rule(claim) for claim in claims]
        right = [float(claim.text in claim.passages) for claim in claims]
        return [1 - value if number % 100 < self.wrong else value for number, value in enumerate(right)]


def judged(judge: Any, card: JudgeCard | None, *, n: int = 120) -> FakeEvaluation:
    "Answers scored by a judge: nine of ten are supported, so that a judge that works says so."
    values = judge.judge([Claim(f"Fee {number} is {number + (number % 10 == 0)} pounds.", (f"Fee {number} is {number} pounds.",)) for number in range(n)])
    who = identity(judge)
    return evaluated({"faithfulness": values}, {"faithfulness": Facts(judge=who.name)}, rows(n), judges={who.name: who}, cards={who.name: card} if card else {})


FLOOR = Gate(floors={"faithfulness": 0.6})


@pytest.fixture(scope="module")
def card() -> JudgeCard:
    return calibrate(Judge(), CLAIMS, today=TODAY)


def test_a_judge_that_agrees_with_people_can_pass(card):
    result = FLOOR.check(judged(Judge(), card), today=TODAY)
    assert result.verdict == "pass" and one(result, "judge: reader").verdict == "pass"


def scripted(answer: str, **settings: Any) -> ChatJudge:
    return ChatJudge(FakeListChatModel(responses=[answer], **settings), name="chat", timeout=0.02 if settings else 60, patience=2)


BAD_JUDGES = {
    "garbage": (lambda: scripted("Bananas are berries."), "no verdict.*parse"),
    "half JSON": (lambda: scripted('{"verdict": "ye'), "no verdict.*parse"),
    "an empty answer": (lambda: scripted(""), "no verdict.*parse"),
    "refusals": (lambda: scripted("I'm sorry, but I cannot help with that."), "no verdict.*refused"),
    "timeouts": (lambda: scripted('{"verdict": "yes"}', sleep=0.5), "no verdict.*timeout"),
    "yes to everything": (lambda: scripted('{"verdict": "yes"}'), "told from chance"),
    "no to everything": (lambda: scripted('{"verdict": "no"}'), "told from chance"),
    "NaN": (lambda: Judge(lambda claim: math.nan), "no verdict"),
    "a coin": (lambda: Judge(lambda claim: float(hash(len(claim.text) * 7919) % 3 > 0)), "told from chance|is wanted"),
    "yes, and half the time nothing": (lambda: Judge(lambda claim: 1.0 if int(claim.text.split()[1]) % 3 else Failure("timeout")), "told from chance"),
}


@pytest.mark.parametrize("bad", BAD_JUDGES)
def test_a_bad_judge_never_passes_and_the_reason_is_given(bad, tmp_path):
    make, says = BAD_JUDGES[bad]
    judge = make()
    evaluation = judged(judge, calibrate(judge, CLAIMS, today=TODAY))
    for gate in (FLOOR, Gate(floors={"faithfulness": 0.01}, judge=JudgeRule(kappa=0.01, max_failure_rate=0.5, allow_constant=True))):
        result = gate.check(evaluation, today=TODAY)
        assert result.verdict != "pass" and result.exit_code != 0
        assert one(result, f"judge: {judge.name}").verdict != "pass"
    reasons = " ".join(check.reason for check in FLOOR.check(evaluation, today=TODAY).checks)
    assert re.search(says, reasons), reasons
    paths = write_report(evaluation, tmp_path, FLOOR.check(evaluation, today=TODAY))
    assert json.loads(paths.json.read_text())["gate"]["verdict"] == "fail"
    assert 'failures="0"' not in paths.junit.read_text() and "✅ pass" not in paths.markdown.read_text()
    assert re.search(says, paths.markdown.read_text().replace("\\", ""))


def test_a_good_card_does_not_help_a_judge_that_fails_here(card):
    "Calibrated when the endpoint was well; now it times out."
    evaluation = judged(Judge(lambda claim: Failure("timeout", "30 s")), card)
    result = FLOOR.check(evaluation, today=TODAY)
    assert one(result, "judge: reader").verdict == "pass" and result.verdict == "fail"
    assert "timeout" in one(result, "floor: faithfulness").reason and one(result, "failures: faithfulness").verdict == "fail"


def test_a_good_card_does_not_help_a_judge_that_says_yes_to_everything_here(card):
    evaluation = judged(Judge(lambda claim: 1.0), card)
    result = FLOOR.check(evaluation, today=TODAY)
    assert result.verdict == "inconclusive" and "gave every row 1" in one(result, "floor: faithfulness").reason
    allowed = dataclasses.replace(FLOOR, judge=JudgeRule(allow_constant=True))
    assert allowed.check(evaluation, today=TODAY).verdict == "pass"


SPOILT: dict[str, tuple[Callable[[JudgeCard], JudgeCard | None], str]] = {
    "missing": (lambda card: None, "no card"),
    "of another judge": (lambda card: dataclasses.replace(card, judge="other"), "'other'"),
    "of another model": (lambda card: dataclasses.replace(card, model="rules 2"), "rules 2"),
    "of another prompt": (lambda card: dataclasses.replace(card, prompt_hash="0" * 64), "prompt has changed"),
    "of another threshold": (lambda card: dataclasses.replace(card, threshold=0.9), "threshold"),
    "too old": (lambda card: dataclasses.replace(card, date=(TODAY - timedelta(days=91)).isoformat()), "91 days old"),
    "of tomorrow": (lambda card: dataclasses.replace(card, date=(TODAY + timedelta(days=1)).isoformat()), "after today"),
    "on other labels": (lambda card: dataclasses.replace(card, data_hash="1" * 64), "other labels"),
    "weak": (lambda card: dataclasses.replace(card, kappa=Score(0.4, 0.3, 0.5, 120, 120, 0, "x")), "0.6 is wanted"),
    "no better than chance": (lambda card: dataclasses.replace(card, kappa=Score(0.7, -0.1, 1.0, 3, 3, 0, "x")), "told from chance"),
    "without a kappa": (lambda card: dataclasses.replace(card, kappa=Score(math.nan, -math.inf, math.inf, 0, 0, 120, "x")), "no verdict on any"),
    "full of failures": (lambda card: dataclasses.replace(card, failures=Score(0.5, 0.4, 0.6, 120, 120, 0, "x")), "no verdict"),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_card_that_says_nothing_of_this_judge_passes_nothing(card, spoilt):
    change, says = SPOILT[spoilt]
    gate = dataclasses.replace(FLOOR, judge=JudgeRule(data_hash=card.data_hash))
    assert gate.check(judged(Judge(), card), today=TODAY).verdict == "pass"
    result = gate.check(judged(Judge(), change(card)), today=TODAY)
    assert result.verdict == "fail" and says in one(result, "judge: reader").reason
    assert all(check.verdict == "fail" for check in result.checks)


def test_too_few_labels_are_inconclusive(card):
    few = dataclasses.replace(card, kappa=Score(0.75, 0.5, 1.0, 20, 20, 0, "x"))
    result = FLOOR.check(judged(Judge(), few), today=TODAY)
    assert (one(result, "judge: reader").verdict, result.verdict) == ("inconclusive", "inconclusive") and "labels would settle it" in one(result, "judge: reader").reason


def test_an_evaluation_that_does_not_say_who_judged_passes_nothing(card):
    evaluation = judged(Judge(), card)
    evaluation.judges = {}
    assert FLOOR.check(evaluation, today=TODAY).verdict == "fail"


def test_a_metric_that_the_gate_does_not_name_needs_no_card():
    both = evaluated({"recall": GOOD, "faithfulness": GOOD}, {"faithfulness": Facts(judge="reader")})
    assert Gate(floors={"recall": 0.8}).check(both).verdict == "pass"
    assert Gate(max_failure_rate=0.1).check(both).verdict == "fail"    # names none, so all are checked


def test_a_baseline_by_another_judge_is_not_compared(card):
    ours = judged(Judge(), card)
    theirs = judged(Judge(), card)
    theirs.judges = {"reader": dataclasses.replace(theirs.judges["reader"], prompt_hash="2" * 64)}
    found = one(Gate(margins={"faithfulness": 0.2}).check(ours, theirs, today=TODAY), "margin: faithfulness")
    assert found.verdict == "fail" and "another judge, model or prompt" in found.reason


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    spoilt=st.sampled_from(sorted(SPOILT)),
    gate=st.builds(
        Gate,
        floors=st.fixed_dictionaries({}, optional={"faithfulness": st.floats(0.001, 1), "recall": st.floats(0.001, 1)}),
        margins=st.fixed_dictionaries({}, optional={"faithfulness": st.floats(0.001, 1), "recall": st.floats(0.001, 1)}),
        max_failure_rate=st.floats(0.01, 0.9),
        min_n=st.integers(2, 120),
        level=st.floats(0.51, 0.99),
        min_shared=st.floats(0.01, 1),
        judge=st.builds(JudgeRule, kappa=st.floats(0.6, 1), max_age_days=st.integers(1, 90), max_failure_rate=st.floats(0.01, 0.3), allow_constant=st.booleans(), data_hash=st.just("LABELS")),
    ),
    values=st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=120, max_size=120),
)
def test_no_gate_passes_anything_that_a_bad_card_vouches_for(card, spoilt, gate, values):
    assume("faithfulness" in gate.named or not gate.named)
    gate = dataclasses.replace(gate, judge=dataclasses.replace(gate.judge, data_hash=card.data_hash))
    both = judged(Judge(), SPOILT[spoilt][0](card))
    both.found = {**both.found, "recall": dict(zip((row.id for row in both.dataset), values, strict=True))}
    both.metrics = {**both.metrics, "recall": Facts()}
    assert gate.check(both, both, today=TODAY).verdict == "fail"


@pytest.mark.parametrize(("right", "n", "floor"), [(20, 20, 0.9), (18, 20, 0.8), (80, 100, 0.75), (70, 100, 0.75)])
def test_the_rows_that_would_settle_it_do(right, n, floor):
    "With that many rows and the same share of right ones the verdict is clear; with a third of them it is not."
    gate = Gate(floors={"recall": floor}, min_n=2)
    reason = one(gate.check(evaluated({"recall": [1.0] * right + [0.0] * (n - right)})), "floor: recall").reason
    wanted = int(re.search(r"about ([\d,]+) rows", reason).group(1).replace(",", ""))
    for rows_then, clear in ((int(1.15 * wanted), True), (wanted // 3, False)):
        good = round(rows_then * right / n)
        assert (gate.check(evaluated({"recall": [1.0] * good + [0.0] * (rows_then - good)})).verdict != "inconclusive") is clear
