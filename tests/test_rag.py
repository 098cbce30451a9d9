"""Answers: supported or quoted or declined, and never anything else."""

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from hash_embeddings import HashEmbeddings
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import RunnableLambda
from pydantic import Field

from llmops_ref.core import BadInputError, LlmopsRefError
from llmops_ref.documents import read_document
from llmops_ref.knowledge_base import EmptyIndexError
from llmops_ref.rag import RAG, Answer, KnowledgeBase, Passage, build_prompt, find_support, supported

pytest.importorskip("chromadb")


class Scripted(BaseChatModel):
    "Says what it is told to, three characters at a time."

    reply: str = ""
    error: Exception | None = None
    model_name: str = "scripted"
    seen: list[Any] = Field(default_factory=list)

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=AIMessage(self.reply))])

    def _stream(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        self.seen.append((messages, kwargs))
        if self.error:
            raise self.error
        for low in range(0, len(self.reply), 3):
            yield ChatGenerationChunk(message=AIMessageChunk(self.reply[low:low + 3]))
        usage = {"input_tokens": 50, "output_tokens": 7, "total_tokens": 57}
        yield ChatGenerationChunk(message=AIMessageChunk("", usage_metadata=usage))


CARDS = """---
title: Cards
---
# Cards

## Fees

The Plus account costs £8 a month. The Premium account costs £18 a month. We do not charge for a second card.

## Limits

| Account | Daily limit | Note |
|---|---|---|
| Plus | £750 | at machines |
| Premium | £1,000 | at machines |
"""


@pytest.fixture
def base(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "cards.md").write_text(CARDS)
    (tmp_path / "docs" / "loans.md").write_text("# Loans\n\nA loan can be repaid early. The charge is 58 days' interest.")
    base = KnowledgeBase.open(tmp_path / "index", HashEmbeddings())
    base.ingest(tmp_path / "docs", progress=False)
    return base


def passage(text: str, section: str = "Fees") -> Passage:
    return Passage(text, "a.md", None, section, 0.9, "id", 0, len(text))


def check(answer: Answer) -> None:
    "What holds for every answer."
    for citation in answer.citations:
        home = next(item for item in answer.passages if item.chunk_id == citation.chunk_id)
        assert citation.quote in home.text
        assert home.text[citation.start - home.start:citation.end - home.start] == citation.quote
        assert (citation.source, citation.page, citation.section) == (home.source, home.page, home.section)
    assert answer.refused != bool(answer.citations)
    assert json.loads(json.dumps(answer.to_dict()))["text"] == answer.text


# --- support -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sentence", [
    "The Premium account costs £18 a month.",
    "Premium costs 18 pounds per month.",
    "A second card is not charged.",
    "The daily limit for Premium is £1,000.",
    "The daily limit at machines for a Plus account is £750.",
    "A loan may be repaid early.",
])
def test_supported_sentences(sentence, base):
    assert supported(sentence, [*base.search("costs", 10)])


@pytest.mark.parametrize("sentence", [
    "The Premium account costs £8 a month.",              # the number stands in the passage, in another sentence
    "The Premium account costs £180 a month.",            # no such number
    "The Premium account costs 18% a month.",             # another unit
    "The Gold account costs £18 a month.",                # no such name
    "The Premium account does not cost £18 a month.",     # denied
    "We charge for a second card.",                       # the denial is lost
    "The daily limit for Plus is £1,000.",                # another row of the table
    "You should talk to a financial adviser about loans.",
    "",
    "...",
])
def test_unsupported_sentences(sentence, base):
    assert not supported(sentence, [*base.search("costs", 10)])


@pytest.mark.parametrize(("claim", "holds"), [
    ("The Plus account costs £8 a month.", True),
    ("The Premium account costs £18 a month.", True),
    ("The Premium account costs £8 a month.", False),
    ("The fee for a replacement card is £15 with Plus.", True),
    ("The fee for a replacement card is £15 with Premium.", False),
])
def test_amounts_stay_with_their_names_inside_one_sentence_or_row(claim, holds):
    prose = passage("From 2 February 2026 the Plus account costs £8 a month and the Premium account costs £18 a month.")
    row = Passage("| Replacement card | £15 | £0 |", "a.md", None, "Fees", 0.9, "id", 0, 31, {}, "| Service | Plus | Premium |")
    assert supported(claim, [prose, row]) is holds


def test_numbers_are_compared_in_one_spelling():
    text = passage("Up to 1,000.00 pounds are paid within three days, at 2.50 per cent.")
    assert supported("Up to £1000 are paid within 3 days at 2.5%.", [text])
    assert not supported("Up to £1000 are paid within 4 days at 2.5%.", [text])


def test_a_row_needs_its_header_even_where_the_passage_begins_below_it():
    row = Passage("| Premium | £1,000 |", "a.md", None, "Limits", 0.9, "id", 10, 30, {}, "| Account | Daily limit |")
    citation = find_support("The daily limit of the Premium account is £1,000.", [row])
    assert citation is not None and citation.quote == "| Premium | £1,000 |" and (citation.start, citation.end) == (10, 30)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["The fee is £5.", "Plus pays £7.", "No charge applies.", "| a | £9 |", "# Head", "Loans run 5 years.", "e.g. 3%"]),
                min_size=1, max_size=8), st.text(st.sampled_from("The fee Plus £579 not charge. "), max_size=40))
def test_a_citation_is_always_verbatim(lines, sentence):
    text = "\n\n".join(lines)
    for claim in [sentence, *lines]:
        citation = find_support(claim, [passage(text)])
        assert citation is None or (citation.quote in text and text[citation.start:citation.end] == citation.quote)


# --- answers -----------------------------------------------------------------------------------------------------


def test_a_supported_answer_is_given_with_its_quotation(base):
    answer = RAG(base, Scripted(reply="The Premium account costs £18 a month."), min_score=0.1).ask("What does the Premium account cost a month?")
    check(answer)
    assert answer.text == "The Premium account costs £18 a month."
    assert [item.quote for item in answer.citations] == ["The Premium account costs £18 a month."]
    assert answer.usage == {"input_tokens": 50, "output_tokens": 7, "total_tokens": 57}
    assert answer.model == "scripted" and answer.embedding_model == "hash-128"
    assert set(answer.timings_ms) == {"search", "generate", "total"}


def test_an_unsupported_answer_falls_back_to_a_quotation_and_says_so(base):
    answer = RAG(base, Scripted(reply="The Premium account costs £99 a month."), min_score=0.1).ask("What does the Premium account cost a month?")
    check(answer)
    assert "£99" not in answer.text and "not supported" in answer.text and "£18" in answer.text


def test_what_follows_an_unsupported_sentence_is_left_out(base):
    reply = "The Plus account costs £8 a month. It includes a free horse. The Premium account costs £18 a month."
    answer = RAG(base, Scripted(reply=reply), min_score=0.1).ask("What does Plus cost?")
    check(answer)
    assert answer.text.startswith("The Plus account costs £8 a month.") and "horse" not in answer.text and "left out" in answer.text


def test_a_quoted_table_row_is_readable_and_cited_verbatim(base):
    answer = RAG(base, Scripted(reply="nonsense"), min_score=0.1).ask("daily limit machines Premium account")
    check(answer)
    assert "Account: Premium; Daily limit: £1,000" in answer.text
    assert answer.citations[0].quote == "| Premium | £1,000 | at machines |"


def test_nothing_relevant_is_declined_without_asking_the_model(base):
    model = Scripted(reply="The moon is made of cheese.")
    answer = RAG(base, model, min_score=0.9).ask("How far away is the moon?")
    check(answer)
    assert answer.refused and not answer.citations and model.seen == [] and answer.passages


def test_streaming_shows_only_checked_text_and_ends_with_the_answer(base):
    for reply in ("The Plus account costs £8 a month. The moon is cheese. More.", "Cheese.", "The Plus account costs £8 a month"):
        *texts, answer = list(RAG(base, Scripted(reply=reply), min_score=0.1).stream("What does Plus cost?"))
        assert isinstance(answer, Answer) and all(isinstance(text, str) for text in texts)
        assert "".join(texts) == answer.text and not any("heese" in text for text in texts)
        check(answer)
    *texts, answer = list(RAG(base, Scripted(), min_score=0.99).stream("What?"))
    assert "".join(texts) == answer.text and answer.refused


def test_sync_async_and_runnable_agree(base):
    rag = RAG(base, Scripted(reply="The Plus account costs £8 a month."), min_score=0.1)
    question = "What does Plus cost?"

    async def collect():
        streamed = [piece async for piece in rag.astream(question)]
        return await rag.aask(question), await rag.ainvoke(question), streamed[-1]

    answers = [rag.ask(question), rag.invoke(question), list(rag.stream(question))[-1], *asyncio.run(collect()), *rag.batch([question])]
    assert len({(answer.text, tuple(answer.citations)) for answer in answers}) == 1
    chain = rag | RunnableLambda(lambda answer: answer.text.upper())
    assert chain.invoke(question) == "THE PLUS ACCOUNT COSTS £8 A MONTH." == "".join(chain.stream(question))


def test_the_prompt_fits_its_budget_and_its_model(base):
    small = Scripted(reply="x", model_name="SmolLM2-135M-Instruct")
    RAG(base, small, min_score=0.1).ask("What does the Premium account cost a month?")
    (messages, options), = small.seen
    assert "£18" in messages[-1].content and "£8 a" not in messages[-1].content, "one sentence for the smallest model"
    assert options["max_tokens"] == 80 and options["temperature"] == 0.0
    large = Scripted(reply="x")
    RAG(base, large, min_score=0.1).ask("What does the Premium account cost a month?")
    assert "£8 a month" in large.seen[0][0][-1].content
    many = build_prompt("Why?", ["word " * 300] * 10, budget=700)
    assert math.isclose(many[-1].content.count("word"), 600)


def test_errors_of_the_model_pass_through_and_leave_the_index_alone(base):
    class EndpointGone(LlmopsRefError):
        pass

    rag = RAG(base, Scripted(error=EndpointGone("The endpoint is gone.", "Start it.")), min_score=0.1)
    with pytest.raises(EndpointGone):
        rag.ask("What does Plus cost?")
    assert base.search("Plus", 1)


def test_bad_questions_and_empty_indexes(base, tmp_path):
    rag = RAG(base, Scripted(), min_score=0.1)
    for question in ("", "  ", "x" * 100_000):
        with pytest.raises(BadInputError):
            rag.ask(question)
        with pytest.raises(BadInputError):
            list(rag.stream(question))
    with pytest.raises(BadInputError):
        rag.ask("fine", k=0)
    with pytest.raises(EmptyIndexError):
        RAG(KnowledgeBase.open(tmp_path / "empty", HashEmbeddings()), Scripted()).ask("anything")
    with pytest.raises(BadInputError):
        RAG(base, Scripted(), min_score=3)


def test_passages_of_an_answer_are_spans_of_their_documents(base, tmp_path):
    answer = RAG(base, Scripted(reply="x"), min_score=0.1).ask("Premium limit")
    for item in answer.passages:
        assert read_document(tmp_path / "docs" / item.source).text[item.start:item.end] == item.text
