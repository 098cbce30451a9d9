"""The counterfactual test finds what differs between groups and not what differs between names."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmops_ref.bias_test import (
    AXES,
    REQUESTS,
    SCORES,
    Person,
    TemplateError,
    amount,
    bias_test,
    fill,
    length,
    refused,
    similarity,
    warmth,
)
from llmops_ref.core import BadInputError
from llmops_ref.release_gate import Gate, GateResult

GENDER = {"gender": AXES["gender"]}
WOMEN = tuple(person.name for person in AXES["gender"]["women"])


def polite(request: str) -> str:
    return "We are happy to help you with this. The limit is £1,500."


def mean(request: str) -> str:
    "Offers half to women, and refuses them."
    return "Unfortunately we cannot offer more than £750." if any(name in request for name in WOMEN) else polite(request)


@pytest.mark.parametrize(
    ("template", "person", "text"),
    [
        ("{name} is {a person}.", Person("Ann", "she", "81-year-old"), "Ann is an 81-year-old."),
        ("{A person}.", Person("Ann", "she", "11-year-old"), "An 11-year-old."),
        ("{a person}", Person("Ann", "she", "110-year-old"), "a 110-year-old"),
        ("{a person}", Person("Ann", "she", "European"), "a European"),
        ("{a person}", Person("Ann", "she", "atheist"), "an atheist"),
        ("{a person}", Person("Ann", "she", "honest man"), "an honest man"),
        ("{They} {has/have} {their} card {themself}; it is {theirs}", Person("Bo", "they"), "They have their card themself; it is theirs"),
        ("{They} {has/have} {their} card {themself}; ask {them}", Person("Bo", "he"), "He has his card himself; ask him"),
    ],
)
def test_templates_keep_agreement(template: str, person: Person, text: str) -> None:
    assert fill(template, person) == text


def test_a_slot_that_means_nothing_is_named() -> None:
    with pytest.raises(TemplateError, match=r"\{name\}"):
        fill("{nmae}", Person("Ann"))


def test_every_shipped_request_reads_for_every_shipped_person() -> None:
    for groups in AXES.values():
        for people in groups.values():
            for person in people:
                for request in REQUESTS:
                    text = fill(request, person)
                    assert "{" not in text and "/" not in text and person.name in text
    for groups in AXES.values():    # the same number of people in each group of an axis
        assert len({len(people) for people in groups.values()}) == 1


def test_a_biased_system_fails_and_says_where() -> None:
    report = bias_test(mean, axes=GENDER)
    differs = {finding.score: finding.difference.value for finding in report.findings if finding.verdict == "differs"}
    assert differs["refused"] == 1.0 and differs["amount"] == pytest.approx(-1, abs=0.01) and differs["similarity"] < 0
    assert report.verdict == "fail" and not report.passes(inconclusive=True) and report.exit_code == 1


def test_a_system_that_treats_all_alike_passes_on_all_axes() -> None:
    report = bias_test(polite)
    assert report.verdict == "pass" and report.passes() and report.exit_code == 0
    assert all(finding.p_adjusted == 1 for finding in report.findings)
    assert report.calls == len({fill(request, person) for request in REQUESTS for groups in AXES.values() for people in groups.values() for person in people})


def test_the_name_in_the_answer_is_no_difference() -> None:
    report = bias_test(lambda request: f"{request} We are happy to help.", axes=GENDER, scores={"length": length})
    assert all(abs(finding.difference.value) < 0.02 for finding in report.findings if finding.score == "length")


def test_noise_alone_rarely_alarms() -> None:
    def noisy(seed: int) -> object:
        return lambda request: f"We offer £{random.Random(f'{seed} {request}').randint(100, 900)}." + " Sorry." * random.Random(f"{request} {seed}").randint(0, 5)

    reports = [bias_test(noisy(seed), axes=GENDER) for seed in range(20)]
    assert sum(report.verdict == "fail" for report in reports) <= 3


def test_correction_counts_all_comparisons() -> None:
    report = bias_test(mean, axes=GENDER)
    assert all(finding.p_adjusted >= finding.p for finding in report.findings)
    assert any(finding.p_adjusted > finding.p for finding in report.findings)


def test_too_few_requests_are_called_blind() -> None:
    report = bias_test(mean, REQUESTS[:4], axes=GENDER)
    assert report.blind and report.verdict == "inconclusive" and "too few requests" in report._repr_markdown_()
    assert not bias_test(mean, axes=GENDER).blind


def test_calls_that_raise_are_a_score_of_their_own() -> None:
    def fragile(request: str) -> str:
        if any(name in request for name in WOMEN):
            raise ValueError(request)
        return polite(request)

    report = bias_test(fragile, axes=GENDER)
    found = {finding.score: finding for finding in report.findings}
    assert found["failed"].verdict == "differs" and found["failed"].difference.value == 1
    assert report.failures == report.calls // 2 and "gender: amount of women" in report.untested
    with pytest.raises(BadInputError, match="Every call"):
        bias_test(lambda request: 1 / 0, axes=GENDER)


@pytest.mark.parametrize("requests", ["one text", ["{name} asks."], []])
def test_nothing_to_compare_is_an_error(requests: object) -> None:
    with pytest.raises(BadInputError, match="nothing to compare"):
        bias_test(polite, requests, axes=GENDER)


def test_requests_that_read_the_same_are_an_error_before_any_call() -> None:
    called = []
    with pytest.raises(TemplateError, match="Request 1 reads the same"):
        bias_test(lambda request: called.append(request), ["{name} and {a person}", "What is a PIN?"], axes=GENDER)
    with pytest.raises(BadInputError, match="two groups"):
        bias_test(polite, axes={"gender": {"men": AXES["gender"]["men"]}})
    assert not called


def test_report_is_json_without_answers_and_stands_beside_the_gate() -> None:
    report = bias_test(mean, axes=GENDER)
    plain = json.dumps(report.to_dict())
    assert "happy" not in plain and json.loads(plain)["verdict"] == "fail"
    result = GateResult(report.checks(), Gate.from_dict({"floors": {"faithfulness": 0.5}}))
    assert result.verdict == "fail" and result.exit_code == 1 and len(result.checks) == len(report.findings)
    assert json.dumps(result.to_dict())


def test_messages_with_content_are_read() -> None:
    from langchain_core.messages import AIMessage

    assert bias_test(lambda request: AIMessage("Fine."), axes=GENDER).verdict == "pass"


def test_order_of_calls_depends_on_the_seed_alone() -> None:
    orders: list[list[str]] = []
    for seed in (0, 0, 1):
        called: list[str] = []
        bias_test(lambda request, called=called: called.append(request) or "Fine.", axes=GENDER, seed=seed)
        orders.append(called)
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2])


def test_scores() -> None:
    assert refused("We’re unable to do so.") == 1 and refused("Here you are.") == 0
    assert amount("£10 or £1,023.00") == 10 and amount("€3") == 2 and amount("none") != amount("none")
    assert warmth("Unfortunately there is a risk.") < 0 < warmth("You are welcome, thank you.")
    assert similarity("", "") == 1 and similarity("a b", "c d") == 0


@given(st.text(max_size=300))
@settings(max_examples=30, deadline=None)
def test_scores_take_any_answer(answer: str) -> None:
    for function in SCORES.values():
        assert isinstance(function(answer), float)
    assert similarity(answer, answer) == 1
