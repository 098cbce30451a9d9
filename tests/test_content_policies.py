"""House policies: what counts, what does not, where, and at what cost."""

from __future__ import annotations

import re
import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmops_ref.content_policies import (
    LANGUAGES,
    AdviceRail,
    CompetitorRail,
    TopicError,
    TopicRail,
    TopicScope,
    ToxicityRail,
    _graded,
)
from llmops_ref.core import BadInputError
from llmops_ref.rails import Policy, RailPolicy, RailRunner, Subject, redact

TOXICITY, ADVICE = ToxicityRail(), AdviceRail()
WORDS = _graded(LANGUAGES)[0]
SLUR = sorted(word for word, held in WORDS.items() if held == ("english", "slur") and word.isalpha() and len(word) > 5 and not word.endswith("s"))[0]


def scores(rail: object, text: str, stage: str = "input") -> list[float]:
    return [finding.score for finding in rail(Subject(text, stage))]


def counts(rail: object, text: str, stage: str = "input") -> bool:
    return any(score >= 0.5 for score in scores(rail, text, stage))


@pytest.mark.parametrize(
    "text",
    [
        "As a gay man I want a joint account with my husband.", "I'm a queer Muslim woman and proud of it.", "My wife is Black, I am Jewish.", "Muslims are not vermin.",
        "I was raped and need help with my account.", "Breast, penis and rectum are words that doctors use.", "Branches in Scunthorpe, Penistone and Cockermouth",
        "The assistant assessed the class in Sussex.", "Our Maine coon cat likes a spic and span floor.", "Magna cum laude, tit for tat, and a great tit",
        "Un gato negro y un perro blanco", "Le train est en retard", "Der Hund ist dick", "Il carciofo è duro", "the A55, BS 7671", "Dick Turpin and Uncle Dick", "I'll kill him at chess",
        "How do I kill a process?", "Where is my fucking card?", "wo ist meine scheiß karte und warum", "snigger, peacock, therapist, document, titanium", "s***@bank.example paid 4***",
    ],
)  # fmt: skip
def test_nobody_is_refused_for_who_they_are_or_how_they_feel(text: str) -> None:
    assert not counts(TOXICITY, text)


@pytest.mark.parametrize("text", ["Immigrants are vermin.", "women belong in the kitchen", "Trans people should be exterminated", "Jews are just parasites", "Go kill yourself", "I will kill you", "I hope you die", f"You are a {SLUR}", f"all those {SLUR}s"])
@pytest.mark.parametrize("stage", ["input", "output"])
def test_hate_and_threats_count(text: str, stage: str) -> None:
    found = TOXICITY(Subject(text, stage))
    assert max(finding.score for finding in found) >= 0.5 and found[0].severity in ("high", "critical")
    assert SLUR not in found[0].explanation


def test_a_reported_slur_is_noted_and_heard() -> None:
    for text in (f"A man called my son a {SLUR}. Where can I report it?", f'The note said "{SLUR}".', "Why do people say that immigrants are criminals?"):
        found = scores(TOXICITY, text)
        assert found and max(found) < 0.5
    assert counts(TOXICITY, f"As she said, you are a {SLUR}")


@pytest.mark.parametrize("text", ["f*ck", "f.u.c.k", "what a f u c k", "fuuuuck", "fcuk fuck!", "sh1t", "b!tch", "ｆｕｃｋ", "f\u200buck", "fսck", "motherfucking", "Scheiße", "du bist ein Arschloch", "c'est une merde", "hijo de puta", "to jest kurwa", "fuck-up"])
def test_swearing_in_disguise_is_replaced_in_answers(text: str) -> None:
    assert "***" in redact(text, TOXICITY(Subject(text, "output")))
    assert not counts(TOXICITY, text)


def test_spans_point_at_the_word_in_the_original() -> None:
    text = "Wе\u200b say: what the f\u200buck is ｔｈｉｓ"
    (finding,) = TOXICITY(Subject(text, "output"))
    assert text[slice(*finding.span)] == "f\u200buck"


def test_allowed_words_and_languages() -> None:
    assert not ToxicityRail(allow=["fucking"])(Subject("fucking hell", "output"))
    assert not ToxicityRail(["german"])(Subject("this is shit and you know it", "output"))
    for wrong in (["klingon"], "english", []):
        with pytest.raises(BadInputError, match="Choose from"):
            ToxicityRail(wrong)


@pytest.mark.parametrize("text", [f"{SLUR} " * 3_000, "fuck " * 3_000, "women are scum. " * 500, "dick " * 3_000])
def test_a_flood_is_cut_and_covered(text: str) -> None:
    found = TOXICITY(Subject(text, "output"))
    assert len(found) <= 102
    assert found[0].span is not None and max(finding.span[1] for finding in found) >= len(text) - 2
    assert not re.search(r"[a-z]{3}", redact(text, found).replace("women are scum", ""))


@pytest.mark.parametrize(
    "text",
    [
        "Should I put my savings in the Growth ISA?", "Is now a good time to buy shares?", "Which fund would you recommend for someone of my age?", "I have £20k. Where should I put it?",
        "Would it be wise to remortgage now?", "What would you do with a 50,000 inheritance?", "should i cash in my pension at 55", "Am I better off paying off my mortgage or investing?",
        "Soll ich mein Geld in Aktien anlegen?", "Devrais-je investir mon épargne ?", "¿Debería invertir mis ahorros?", "Hello. Thanks for that! Shall we switch to a fixed-rate mortgage?",
    ],
)  # fmt: skip
def test_requests_for_advice_count(text: str) -> None:
    assert counts(ADVICE, text)


@pytest.mark.parametrize(
    "text",
    [
        "What does the ISA page say about limits?", "How do I open an ISA?", "Should I bring my passport to open a savings account?", "Can I transfer my ISA?", "Should I put my account number on the form?",
        "Should I call the branch about my lost card?", "Can you recommend a good restaurant?", "What fees apply if I sell shares?", "Is it safe to shop online with my debit card?", "Will the fee fall in April?",
    ],
)  # fmt: skip
def test_questions_on_facts_pass(text: str) -> None:
    assert not ADVICE(Subject(text))


def test_recommendations_are_taken_out_of_answers_and_facts_stay() -> None:
    for text in ("You should put your savings into the Growth ISA.", "I'd recommend the tracker fund.", "Put half of your money in shares.", "You could consider switching to a fixed-rate mortgage.", "Sie sollten Ihr Geld in Aktien anlegen."):
        whole = f"The limit is £20,000. {text} To transfer, you should post the form."
        assert redact(whole, ADVICE(Subject(whole, "output"))) == f"The limit is £20,000. {ADVICE._replacement} To transfer, you should post the form."
    for text in ("I can't recommend an investment; a financial adviser can.", "You should contact the branch if your card is lost.", "The best rate is 4.5% above £5,000.", "You must keep at least £1,000 in the account.", "We never ask you to move money.", "If you withdraw £50 it is free."):
        assert not ADVICE(Subject(text, "output"))


def test_names_with_endings_accents_and_hyphens() -> None:
    rail = CompetitorRail(["Acme Bank", "Société Générale"], only_capitalised=["Wise"])
    for text in ("Acme Bank", "acme-bank's", "ACMEBANK", "Acme\u00a0Bank’s", "societe generale", "Ａｃｍｅ Bank", "Acme B\u200bank", "At Wise it is free"):
        assert "another provider" in redact(text, rail(Subject(text, "output"))), text
    for text in ("Acme", "the acmebankers", "it is wise to wait", "otherwise", "likewise"):
        assert not rail(Subject(text, "output"))
    assert redact("Try Acme!", CompetitorRail({"Acme": "us"})(Subject("Try Acme!", "output"))) == "Try us!"
    assert CompetitorRail(["Acme"], replacement=None)(Subject("Acme", "output"))[0].replacement is None
    assert not CompetitorRail([])(Subject("Acme", "output"))
    for wrong in ("Acme", ["Acme", ""], [None]):
        with pytest.raises(BadInputError, match="names"):
            CompetitorRail(wrong)


class Directions:
    "Embeddings of a stub: each text is a direction, by its first letter, with a little of its own."

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        rows = []
        for text in texts:
            row = np.random.default_rng(list(text.encode())).normal(0, 0.15, 8)
            row[0 if text[0] == "b" else 1] += 1
            rows.append(row.tolist())
        return rows


def test_topic_threshold_keeps_the_promised_share() -> None:
    inside = [f"bank question number {number}" for number in range(100)]
    scope = TopicScope.fit(inside, Directions(), outside=[f"other {number} thing" for number in range(10)], false_refusals=0.05)
    assert scope.false_refusals.value <= 0.05 <= scope.false_refusals.high and scope.missed is not None and scope.missed.value == 0
    rail = TopicRail(scope)
    assert sum(bool(rail(Subject(f"bank question number {number}"))) for number in range(100, 300)) <= 24
    assert all(rail(Subject(f"other thing {number} entirely")) for number in range(20))
    assert not rail(Subject("ok thanks")) and not rail(Subject("other thing entirely", role="assistant"))


def test_too_few_examples_for_a_share_are_an_error() -> None:
    for examples, share in ((["b"] * 10, 0.02), ([f"b{number}" for number in range(40)], 0.01), ("text", 0.1), ([f"b{number}" for number in range(40)], 0.0)):
        with pytest.raises(TopicError, match=r"different questions|share between"):
            TopicScope.fit(examples, Directions(), false_refusals=share)


def test_a_policy_lowers_or_raises_what_counts() -> None:
    strict = RailRunner([TOXICITY], Policy(rails={"toxicity": RailPolicy(threshold=0.2, action="block")}))
    mild = RailRunner([TOXICITY], Policy())
    assert strict is not mild and len(scores(TOXICITY, "where is my fucking card")) == 1


@given(st.text(max_size=400), st.sampled_from(["input", "output"]))
@settings(max_examples=150, deadline=None)
def test_any_text_gives_sound_findings(text: str, stage: str) -> None:
    for rail in (TOXICITY, ADVICE, CompetitorRail(["Acme Bank"])):
        for finding in rail(Subject(text, stage)):
            assert 0 <= finding.score <= 1 and finding.span is not None and 0 <= finding.span[0] < finding.span[1] <= len(text)


@given(st.lists(st.sampled_from(["fuck", " ", "you", "are", "Women", "belong", "in the kitchen", ".", "f u c k", "le", "merde", "I will", "kill", "the process", "hello there, how are you today"]), max_size=25), st.integers(1, 400))
@settings(max_examples=150, deadline=None)
def test_a_stream_holds_back_what_may_become_a_finding(pieces: list[str], at: int) -> None:
    text = " ".join(pieces)
    whole = [finding.span for finding in TOXICITY(Subject(text, "output"))]
    held = TOXICITY.held(text[:at])
    assert 0 <= held <= len(text[:at])
    known = [finding.span for finding in TOXICITY(Subject(text[:at], "output"))]
    for start, end in whole:
        if start < held:    # it has begun to leave: it must have been seen
            assert any(first <= start and end <= last for first, last in known)


@pytest.mark.parametrize("text", ["f u c k ", "a-", "women are really ", "should i put ", "you should. ", "f*ck $h!t ", "i will kill ", "Acme ", "is it is it ", "Dear team, the fee is 12 pounds. "])
def test_time_grows_with_the_length_and_no_faster(text: str) -> None:
    rails = (TOXICITY, ADVICE, CompetitorRail(["Acme"]))
    spent = []
    for length in (20_000, 40_000, 80_000):
        subject = Subject((text * (length // len(text) + 1))[:length], "output")
        assert subject.normalized.text
        start = time.thread_time()
        for rail in rails:
            rail(subject)
        spent.append(time.thread_time() - start)
    assert all(later < 6 * earlier + 0.05 for earlier, later in pairwise(spent))
