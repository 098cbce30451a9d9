"The bench: its texts are what they say, its counts are right, and the finder meets its goals on seeds that no chapter prints."

import pytest

from llmops_ref.core import BadInputError
from llmops_ref.privacy import Kind, PersonalData
from llmops_ref.privacy_bench import BANK_DETAILS, by_length, ours, personal_texts, presidio_as_it_comes, score_finder

FINDER = PersonalData()


@pytest.mark.parametrize("generator", ["documents", "habits"])
def test_recall_and_precision_meet_their_goals(generator: str) -> None:
    score = score_finder(ours(FINDER), personal_texts(generator, 250, seed=99))
    assert score.recall()[0] >= 0.97 and score.precision()[0] >= 0.95, score.to_dict()
    assert all(score.recall(kind)[0] >= 0.9 for kind in (*map(str, (Kind.CARD, Kind.IBAN, Kind.EMAIL, Kind.PHONE, Kind.NATIONAL_INSURANCE)), BANK_DETAILS))


@pytest.mark.parametrize("generator", ["documents", "habits"])
def test_texts_are_repeatable_and_their_places_hold_something(generator: str) -> None:
    texts = personal_texts(generator, 50, seed=3)
    assert texts == personal_texts(generator, 50, seed=3) != personal_texts(generator, 50, seed=4)
    assert all(text[start:end].strip() == text[start:end] != "" for text, places in texts for _, start, end in places)
    assert any(places for _, places in texts) and any(not places for _, places in texts)


def test_a_score_counts_what_is_found_missed_and_imagined() -> None:
    texts = [("abcdef", (("CARD", 0, 3), ("IBAN", 3, 6))), ("ghi", ())]
    score = score_finder(lambda text: [("CARD", 0, 3)], texts)
    assert (score.found, score.missed, score.imagined) == ({"CARD": 1}, {"IBAN": 1}, {"CARD": 1})
    assert score.recall()[0] == 0.5 and score.precision()[0] == 0.5 and "CARD" in score._repr_markdown_()
    half = score_finder(lambda text: [("CARD", 0, 2)], texts[:1])
    assert half.missed == {"CARD": 1, "IBAN": 1} and half.imagined == {}


def test_the_others_are_worse() -> None:
    texts = personal_texts("habits", 150, seed=7)
    mine = score_finder(ours(FINDER), texts)
    assert score_finder(presidio_as_it_comes(), texts).recall()[0] < mine.recall()[0]
    assert score_finder(by_length, texts, any_kind=True).precision()[0] < mine.precision()[0]


def test_an_unknown_generator_is_named() -> None:
    with pytest.raises(BadInputError, match="habits"):
        personal_texts("novels", 1)
