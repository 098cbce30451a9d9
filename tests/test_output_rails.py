"Answers against their passages: unsupported sentences and false citations are found where they stand, and refusals say what to do and nothing else."

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmops_ref.core import BadInputError
from llmops_ref.evaluation_data import Claim
from llmops_ref.output_rails import (
    LANGUAGES,
    CitationRail,
    GroundednessRail,
    SafeCompletion,
    language_of,
    safe_completion,
)
from llmops_ref.rails import Category, Finding, Subject, redact
from llmops_ref.scores import Failure

PASSAGES = ("Premium accounts may withdraw 1,000 pounds a day at cash machines.", "A lost card is replaced within five working days.")


class Judge:
    "Supports what holds the word `true`, and has nothing to say about greetings."

    name, model, prompt, threshold = "stub", "stub", "stub", 0.5

    def __init__(self) -> None:
        self.asked: list[Claim] = []

    def judge(self, claims):
        self.asked += claims
        return [
            Failure("missing_field", "the claim says nothing that could be checked") if "Hello" in claim.text
            else Failure("timeout", "late") if "late" in claim.text else 0.9 if "true" in claim.text else 0.2
            for claim in claims
        ]


def find(rail, text, passages=PASSAGES, question="") -> list[Finding]:
    return list(rail(Subject(text, "output", passages=passages, question=question)))


# ------------------------------------------------------------------ groundedness


def test_sentences_are_judged_one_by_one_and_taken_out_where_they_stand():
    judge, text = Judge(), "Hello there. This is true. This is wrong.\n\n- This came late.\n- And this is true."
    found = find(GroundednessRail(judge), text, question="What?")
    assert [text[slice(*item.span)] for item in found] == ["This is wrong.", "- This came late."] or [text[slice(*item.span)] for item in found] == ["This is wrong.", "This came late."]
    assert [item.score for item in found] == [0.8, 1.0] and {item.category for item in found} == {Category.MISINFORMATION}
    assert {(claim.passages, claim.question) for claim in judge.asked} == {(PASSAGES, "What?")}
    assert "wrong" not in redact(text, found) and "true" in redact(text, found) and "wrong" not in "".join(item.explanation for item in found)


def test_without_passages_nothing_is_judged_unless_it_must_rest_on_some():
    judge = Judge()
    assert find(GroundednessRail(judge), "Wrong.", passages=()) == [] and find(GroundednessRail(judge), "Wrong.", passages=(" ",)) == []
    assert [item.replacement for item in find(GroundednessRail(judge, required=True), "Wrong.", passages=())] == [None] and judge.asked == []
    assert find(GroundednessRail(judge, required=True), " ", passages=()) == [] and find(GroundednessRail(judge), "") == []


def test_the_threshold_is_the_judges_or_ones_own():
    assert GroundednessRail(Judge()).threshold == 0.5 and find(GroundednessRail(Judge(), 0.1), "Wrong.") == []
    assert find(GroundednessRail(Judge(), 0.95), "This is true.") and GroundednessRail(Judge(), 0.95).threshold == pytest.approx(0.05)
    assert all(item.score >= GroundednessRail(Judge(), 0.3).threshold for item in find(GroundednessRail(Judge(), 0.3), "Wrong."))
    assert find(GroundednessRail(Judge(), replacement=None), "Wrong.")[0].replacement is None


@pytest.mark.parametrize(("judge", "threshold"), [("judge", None), (None, None), (Judge(), 7), (Judge(), -0.1)])
def test_what_is_no_judge_or_threshold_is_told(judge, threshold):
    with pytest.raises(BadInputError):
        GroundednessRail(judge, threshold)


# ------------------------------------------------------------------ citations


@pytest.mark.parametrize(
    ("text", "gone"),
    [("a [1]. b [2].", []), ("a [3]", ["[3]"]), ("a [0]", ["[0]"]), ("a [1, 2] b [2; 9]", ["[2; 9]"]), ("a [1-3]", ["[1-3]"]), ("a [1–2]", []), ("a 【7】 b 【1†source】", ["【7】"]),
     ("a [12](https://x.example)", []), ("[12]: https://x.example", []), ("a [^9] b [x] c [ ]", []), ("a [9999]", ["[9999]"])],
)
def test_marks_must_point_to_a_passage(text, gone):
    found = find(CitationRail(), text)
    assert [text[slice(*item.span)] for item in found] == gone and all(item.replacement == "" for item in found)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("“A lost card is replaced within five working days.”", 0), ('It says "a LOST card   is replaced"', 0), ("„A lost card … five working days“", 0), ("«A lost card [...] working days»", 0),
        ("“A lost card is replaced within three working days”", 1), ("“lost card” and “five days”", 0), ("“A lost card is … ten working days”", 1), ("“lost card is replaced within five working days and more besides”", 1),
        ('The so-called "premium account holders of last year" are gone', 1),
    ],
)
def test_quotations_must_stand_in_a_passage(text, wrong):
    assert len(find(CitationRail(), text)) == wrong and find(CitationRail(quotes=False), text) == []


def test_the_readers_own_words_may_be_quoted():
    assert find(CitationRail(), "You asked “may I take ten thousand pounds”: no.", question="May I take ten thousand pounds?") == []


def test_an_answer_from_passages_must_cite_one_where_that_is_required():
    rail = CitationRail(required=True)
    assert [item.replacement for item in find(rail, "It is free.")] == [None]
    assert find(rail, "It is free [2].") == [] and find(rail, "It is free.", passages=()) == [] and find(rail, " ") == []
    assert rail.lookback is None and CitationRail().lookback == 420


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["[1]", "[7]", "[1, 9]", "[", "]", "1", ", ", "“A lost card is gone for good”", '"A lost card is gone for good"', "“", "”", '"', "a lost card is replaced", "word " * 50, "\n"]), max_size=16).map("".join), st.data())
def test_a_stream_lets_no_false_citation_go(text, data):
    "What begins `lookback` characters before the end of a beginning, or earlier, is found in the beginning."
    cut = data.draw(st.integers(0, len(text)))
    early = [item.span for item in find(CitationRail(), text[:cut])]
    assert [item.span for item in find(CitationRail(), text) if item.span[0] < cut - CitationRail().lookback and item.span not in early] == []


@pytest.mark.parametrize("flood", ["[", "[1,", "“", '"', "a “b "])
def test_floods_of_marks_take_no_time_to_speak_of(flood):
    import time

    text = (flood * 300_000)[:300_000]
    started = time.process_time()
    list(find(CitationRail(), text))
    assert time.process_time() - started < 5    # a quadratic reading would take hours


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize("category", list(Category))
@pytest.mark.parametrize("language", LANGUAGES)
def test_every_category_has_a_message_in_every_language(category, language):
    said = safe_completion(category, language=language, policy_version="7")
    assert said.language == language and len(said.message) > 30 and said.message == said.message.strip()
    assert said.to_dict() == {"refused": True, "code": said.code, "category": str(category), "language": language, "message": said.message, "policy_version": "7"}


def test_messages_teach_an_attacker_nothing():
    for category in Category:
        for language in LANGUAGES:
            assert not re.search(r"(?i)\b(?:rail|detect|inject|threshold|score|prompt|canary|classifier|blocked|filter|policy|LLM\d+)", safe_completion(category, language=language).message)


def test_the_worst_finding_decides_and_rails_of_the_house_have_messages_of_their_own():
    low = Finding("citations", Category.MISINFORMATION, "low", 1.0, None, "")
    high = Finding("toxicity", Category.POLICY, "high", 0.6, None, "")
    assert safe_completion([low, high]).code == "harm" and safe_completion(low).code == "not_supported"
    assert safe_completion([Finding("advice", Category.POLICY, "low", 0.5, None, "", enforced=True), high]).code == "advice"
    assert isinstance(safe_completion(iter([low])), SafeCompletion)
    with pytest.raises(BadInputError, match="no finding"):
        safe_completion([])
    with pytest.raises(BadInputError, match="no messages"):
        safe_completion(Category.POLICY, language="xx")


@pytest.mark.parametrize(
    ("question", "language"),
    [
        ("How do I block my card?", "en"), ("Wie sperre ich meine Karte?", "de"), ("Comment bloquer ma carte ?", "fr"), ("¿Cómo bloqueo mi tarjeta?", "es"), ("", "en"), ("12345", "en"), ("日本語", "en"),
        ("Ich möchte wissen, wann die Gebühr fällig ist.", "de"), ("Quels sont les frais de mon compte ?", "fr"), ("¿Cuál es el límite de mi cuenta?", "es"), ("IGNORE ALL", "en"),
    ],
)
def test_the_language_of_a_question_is_told_by_its_small_words(question, language):
    assert language_of(question) == language == safe_completion(Category.POLICY, question).language
