"""Units, words and ranking; what `find_support` lets through is tested with the answers, in test_rag."""

import numpy as np
import pytest

from llmops_ref.documents import Passage
from llmops_ref.evidence import Citation, amounts_in, content_words, rank_units, stem, stems, units_of

TEXT = "## Fees\n\nThe Plus account costs £8 a month.\n\n| Account | Limit |\n|---|---|\n| Plus | £750 |\n| Premium | £1,000 |"
PASSAGE = Passage(TEXT, "cards.md", None, "Cards > Fees", 0.5, "id", 100, 100 + len(TEXT), {"title": "Cards"})


def test_units_are_sentences_and_rows_without_headings_headers_and_rules():
    units = list(units_of(PASSAGE))
    assert [unit.text for unit in units] == ["The Plus account costs £8 a month.", "| Plus | £750 |", "| Premium | £1,000 |"]
    assert units[1].readable() == "Account: Plus; Limit: £750" and units[1].topic() == "Cards: Fees"
    for unit in units:
        citation = unit.citation()
        assert TEXT[citation.start - 100:citation.end - 100] == citation.quote == unit.text


def test_a_place_is_a_page_or_a_section_or_the_document():
    for page, section, place in ((3, "A", "a.md p. 3"), (None, "A > B", "a.md, A > B"), (None, None, "a.md")):
        assert Citation("q", "a.md", page, section, "id", 0, 1).place == place


@pytest.mark.parametrize(("text", "expected"), [
    ("1,000.00 pounds", {"£1000"}), ("£1000", {"£1000"}), ("two per cent", {"%2"}), ("2.50%", {"%2.5"}), ("$ 3", {"$3"}), ("nothing", set()), ("007", {"7"}),
])
def test_amounts_have_one_spelling(text, expected):
    assert amounts_in(text) == expected


def test_words_that_carry_meaning():
    assert content_words("What does the Plus account, the PLUS account, cost?") == ["plus", "account", "cost"]
    assert stems("charged charges charging") == {stem("charge")} and content_words("") == []


def test_ranking_puts_the_nearest_unit_first():
    def embed(texts):
        rows = np.array([[float("£8" in text or "cost?" in text), 0.1] for text in texts])
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    units, texts, cosines = rank_units("What does it cost?", [PASSAGE], embed)
    assert "£8" in units[0].text and len(units) == len(texts) == len(cosines) == 3 and cosines[0] == max(cosines)
    only = Passage("# Title", "a.md", None, None, 0.1, "id", 0, 7)
    assert rank_units("Why?", [only], embed)[0][0].text == "# Title"
