"""Answers: supported or quoted or declined, and never anything else."""

import asyncio
import json
import logging
import math
import random
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hash_embeddings import HashEmbeddings
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import RunnableLambda
from pydantic import Field

from llmops_ref.access import ALL_GROUPS
from llmops_ref.answerability import best_cosine
from llmops_ref.core import BadInputError, LlmopsRefError
from llmops_ref.documents import read_document
from llmops_ref.knowledge_base import EmptyIndexError
from llmops_ref.rag import (
    RAG,
    Answer,
    KnowledgeBase,
    Passage,
    TokenCounter,
    Turn,
    build_prompt,
    find_support,
    follow_up,
    rewrite_with,
    supported,
)

pytest.importorskip("chromadb")

JUDGE: dict[str, Any] = {"decline": best_cosine, "threshold": 0.1}


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
    answer = RAG(base, Scripted(reply="The Premium account costs £18 a month."), **JUDGE).ask("What does the Premium account cost a month?")
    check(answer)
    assert answer.text == "The Premium account costs £18 a month."
    assert [item.quote for item in answer.citations] == ["The Premium account costs £18 a month."]
    assert answer.usage == {"input_tokens": 50, "output_tokens": 7, "total_tokens": 57}
    assert answer.model == "scripted" and answer.embedding_model == "hash-128"
    assert set(answer.timings_ms) == {"search", "generate", "total"}


def test_an_unsupported_answer_falls_back_to_a_quotation_and_says_so(base):
    answer = RAG(base, Scripted(reply="The Premium account costs £99 a month."), **JUDGE).ask("What does the Premium account cost a month?")
    check(answer)
    assert "£99" not in answer.text and "not supported" in answer.text and "£18" in answer.text


def test_what_follows_an_unsupported_sentence_is_left_out(base):
    reply = "The Plus account costs £8 a month. It includes a free horse. The Premium account costs £18 a month."
    answer = RAG(base, Scripted(reply=reply), **JUDGE).ask("What does Plus cost?")
    check(answer)
    assert answer.text.startswith("The Plus account costs £8 a month.") and "horse" not in answer.text and "left out" in answer.text


def test_a_quoted_table_row_is_readable_and_cited_verbatim(base):
    answer = RAG(base, Scripted(reply="nonsense"), **JUDGE).ask("daily limit machines Premium account")
    check(answer)
    assert "Account: Premium; Daily limit: £1,000" in answer.text
    assert answer.citations[0].quote == "| Premium | £1,000 | at machines |"


def test_nothing_relevant_is_declined_without_asking_the_model(base):
    model = Scripted(reply="The moon is made of cheese.")
    answer = RAG(base, model, decline=best_cosine, threshold=0.9).ask("How far away is the moon?")
    check(answer)
    assert answer.refused and not answer.citations and model.seen == [] and answer.passages


def test_streaming_shows_only_checked_text_and_ends_with_the_answer(base):
    for reply in ("The Plus account costs £8 a month. The moon is cheese. More.", "Cheese.", "The Plus account costs £8 a month"):
        *texts, answer = list(RAG(base, Scripted(reply=reply), **JUDGE).stream("What does Plus cost?"))
        assert isinstance(answer, Answer) and all(isinstance(text, str) for text in texts)
        assert "".join(texts) == answer.text and not any("heese" in text for text in texts)
        check(answer)
    *texts, answer = list(RAG(base, Scripted(), decline=best_cosine, threshold=0.99).stream("What?"))
    assert "".join(texts) == answer.text and answer.refused


def test_sync_async_and_runnable_agree(base):
    rag = RAG(base, Scripted(reply="The Plus account costs £8 a month."), **JUDGE)
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
    RAG(base, small, **JUDGE).ask("What does the Premium account cost a month?")
    (messages, options), = small.seen
    assert "£18" in messages[-1].content and "£8 a" not in messages[-1].content, "one sentence for the smallest model"
    assert options["max_tokens"] == 80 and options["temperature"] == 0.0
    large = Scripted(reply="x")
    RAG(base, large, **JUDGE).ask("What does the Premium account cost a month?")
    assert "£8 a month" in large.seen[0][0][-1].content
    many = build_prompt("Why?", ["word " * 300] * 10, budget=700)
    assert math.isclose(many[-1].content.count("word"), 600)


def test_errors_of_the_model_pass_through_and_leave_the_index_alone(base):
    class EndpointGone(LlmopsRefError):
        pass

    rag = RAG(base, Scripted(error=EndpointGone("The endpoint is gone.", "Start it.")), **JUDGE)
    with pytest.raises(EndpointGone):
        rag.ask("What does Plus cost?")
    assert base.search("Plus", 1)


def test_bad_questions_and_empty_indexes(base, tmp_path):
    rag = RAG(base, Scripted(), **JUDGE)
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
        RAG(base, Scripted(), decline=lambda question, passages: 1.0)


def test_passages_of_an_answer_are_spans_of_their_documents(base, tmp_path):
    answer = RAG(base, Scripted(reply="x"), **JUDGE).ask("Premium limit")
    for item in answer.passages:
        assert read_document(tmp_path / "docs" / item.source).text[item.start:item.end] == item.text


# --- the prompt and the model's citations ------------------------------------------------------------------------


def test_passages_are_numbered_and_the_budget_is_counted_by_the_model():
    messages = build_prompt("Why?", ["one two three", "four five six", "seven eight nine"], 8, numbered=True, count=lambda text: len(text.split()))
    assert "[1] one two three\n\n[2] four five six\n\nQuestion" in messages[1].content and "seven" not in messages[1].content
    long = build_prompt("Why?", ["The first one. The second one. The third one."], 6, count=lambda text: len(text.split()))
    assert "The second one." in long[1].content and "third" not in long[1].content


def test_tokens_are_counted_by_the_models_tokenizer_or_the_counter_says_that_it_guesses():
    class Tokenizer:
        def encode(self, text):
            return list(text)

    model = Scripted()
    assert not TokenCounter.of(model).exact and TokenCounter.of(model).count("a few words") >= 3
    object.__setattr__(model, "tokenizer", Tokenizer())
    assert TokenCounter.of(model).exact and TokenCounter.of(model).count("abc") == 3


@pytest.mark.parametrize("reply", [
    "The Plus account costs £8 a month [{right}].",
    "The Plus account costs £8 a month. [{right}]",
    "The Plus account costs £8 a month [{right}]. The Premium account costs £18 a month [{right}, 9].",
    "The Plus account costs £8 a month [{wrong}].",
    "The Plus account costs £8 a month [0][77].",
])
def test_citations_of_the_model_are_checked(base, reply):
    question = "What does the Plus account cost a month?"
    passages = base.search(question, 4)
    right = next(number for number, item in enumerate(passages, 1) if "£8" in item.text)
    wrong = next(number for number, item in enumerate(passages, 1) if "£8" not in item.text)
    answer = RAG(base, Scripted(reply=reply.format(right=right, wrong=wrong)), **JUDGE).ask(question)
    check(answer)
    assert answer.text.startswith("The Plus account costs £8 a month.") and "[" not in answer.text
    assert answer.citations[0].quote == "The Plus account costs £8 a month."
    bad = [number for number in re.findall(r"\d+", "".join(re.findall(r"\[.*?\]", reply.format(right=right, wrong=wrong)))) if int(number) != right]
    assert [re.match(r"\[(\d+)\]", text)[1] for text in answer.dropped] == bad


def test_a_model_that_finds_nothing_declines(base):
    answer = RAG(base, Scripted(reply="NOT IN THE DOCUMENTS."), **JUDGE).ask("What does the Gold account cost a month?")
    check(answer)
    assert answer.refused and "model" in answer.declined_because


def test_a_judge_of_ones_own_decides(base):
    for score, refused in ((0.2, True), (0.8, False)):
        answer = RAG(base, Scripted(reply="x"), decline=lambda question, passages, score=score: score, threshold=0.5).ask("What does Plus cost?")
        assert answer.refused is refused and answer.score == score and bool(answer.declined_because) is refused
    assert not RAG(base, Scripted(reply="x"), decline=None).ask("zebra").refused


# --- conversations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "question", "expected"), [
    ("What does the Premium account cost a month?", "and Plus?", "What does the Plus account cost a month?"),
    ("What does the Premium account cost a month?", "And for the Plus account?", "What does the Plus account cost a month?"),
    ("How do I register a power of attorney?", "How long does it take?", "How long does it take (register a power of attorney)?"),
    ("What does the Premium account cost a month?", "and for business accounts?", "for business accounts (Premium account cost a month)?"),
    ("What does the Premium account cost a month?", "When do branches open on Sundays?", "When do branches open on Sundays?"),
])
def test_follow_ups_stand_alone(before, question, expected):
    assert follow_up(question, [Turn(before, before, "")]) == expected
    assert follow_up(question, []) == question


def test_a_conversation_remembers_rewrites_and_forgets(base):
    rag = RAG(base, Scripted(reply="The Plus account costs £8 a month."), **JUDGE)
    talk = rag.conversation(budget=60)
    assert talk.ask("What does the Premium account cost?").question == "What does the Premium account cost?"
    assert talk.ask("and Plus?").question == "What does the Plus account cost?"
    assert talk.turns[-1].question == "and Plus?" and len(talk.turns) == 2
    for _ in range(10):
        talk.ask("What does the Plus account cost?")
    assert sum(rag.counter.count(f"{turn.question}\n{turn.answer}") for turn in talk.turns) <= 60
    before = talk.turns
    with pytest.raises(BadInputError):
        talk.ask(" ")
    assert talk.turns == before
    assert rag.conversation().turns == ()


def test_a_capable_model_rewrites_and_the_rules_take_over_where_it_fails():
    turns = [Turn("What does Premium cost?", "What does Premium cost?", "£18")]
    assert rewrite_with(Scripted(reply="What does Plus cost?"))("and Plus?", turns) == "What does Plus cost?"
    for useless in ("", "one\ntwo", "x" * 500):
        assert rewrite_with(Scripted(reply=useless))("and Plus?", turns) == follow_up("and Plus?", turns)
    assert rewrite_with(Scripted(error=RuntimeError()))("first", []) == "first"


# --- readers' rights ---------------------------------------------------------------------------------------------

MARKERS = {"fraud": "zqfraudmark", "risk": "zqriskmark", "hr": "zqhrmark"}
SECRETS = {group: f"The release limit of the {group} desk is £{number},417 on form {mark}." for number, (group, mark) in enumerate(MARKERS.items(), 3)}


@pytest.fixture
def divided(tmp_path):
    "A public document, and one for each of three groups."
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "cards.md").write_text(CARDS)
    for group, text in SECRETS.items():
        (tmp_path / "docs" / f"{MARKERS[group]}-desk.md").write_text(f"---\ntitle: {MARKERS[group]} desk\nallowed_groups: [{group}]\n---\n# {MARKERS[group]} desk\n\n{text}")
    base = KnowledgeBase.open(tmp_path / "index", HashEmbeddings())
    base.ingest(tmp_path / "docs", progress=False)
    return base


def test_groups_reach_the_search_whichever_way_they_are_given(divided):
    rag = RAG(divided, Scripted(reply="x"), decline=None)
    question, config = "What is the release limit of the fraud desk?", {"configurable": {"groups": ["fraud"]}}

    async def both():
        return await rag.aask(question, groups=["fraud"]), await rag.ainvoke(question, config)

    answers = [rag.ask(question, groups=["fraud"]), rag.invoke(question, config), rag.invoke(question, groups=["fraud"]),
               list(rag.stream(question, config))[-1], *asyncio.run(both()), rag.conversation(groups=["fraud"]).ask(question), rag.ask(question, groups=ALL_GROUPS)]
    assert all(MARKERS["fraud"] in answer.text for answer in answers)
    for answer in (rag.ask(question), rag.invoke(question), rag.ask(question, groups=[]), rag.ask(question, groups=["Fraud"]), rag.conversation().ask(question)):
        assert MARKERS["fraud"] not in json.dumps(answer.to_dict())
    for groups in ("fraud", 7, [3]):
        with pytest.raises(BadInputError):
            rag.ask(question, groups=groups)


def test_a_caller_who_may_read_nothing_is_declined(tmp_path):
    (tmp_path / "a.md").write_text(f"---\nallowed_groups: [fraud]\n---\n{SECRETS['fraud']}")
    base = KnowledgeBase.open(tmp_path / "index", HashEmbeddings())
    base.ingest(tmp_path / "a.md", progress=False)
    answer = RAG(base, Scripted(reply="x"), **JUDGE).ask(SECRETS["fraud"])
    assert answer.refused and not answer.passages and answer.score is None and answer.declined_because


def test_quoting_restricted_text_gives_what_one_gets_without_the_document(divided, tmp_path):
    (tmp_path / "public").mkdir()
    (tmp_path / "public" / "cards.md").write_text(CARDS)
    without = KnowledgeBase.open(tmp_path / "other", HashEmbeddings())
    without.ingest(tmp_path / "public", progress=False)

    def told(base, question):
        answer = RAG(base, Scripted(reply="The Plus account costs £8 a month."), **JUDGE).ask(question)
        return answer.text, [item.quote for item in answer.citations], [(item.text, item.score) for item in answer.passages], answer.score, answer.declined_because

    for question in (*SECRETS.values(), SECRETS["fraud"].upper(), f"Repeat: {SECRETS['risk']} And what does Plus cost?"):
        assert told(divided, question) == told(without, question)


def test_ten_thousand_questions_leak_nothing(divided, caplog):
    caplog.set_level(logging.DEBUG)
    draw = random.Random(5)
    words = re.findall(r"\w+", f"{CARDS} {' '.join(SECRETS.values())} desk secret why who")
    words = [word for word in words if word not in MARKERS.values()]
    views: dict[Any, Any] = {}
    leaks = asked = 0
    search = divided.search

    def remembered(question, k=4, *, groups=None, retrieval=None):
        "The real search; a pair that comes again is answered as before, because the pairs are many and the machine is small."
        key = question, frozenset(groups or ())
        if key not in views:
            views[key] = search(question, k, groups=groups, retrieval=retrieval)
        return views[key]

    divided.search = remembered
    pool = [" ".join(draw.choices(words, k=draw.randint(1, 9))) for _ in range(120)] + [text.replace(MARKERS[group], "") for group, text in SECRETS.items()] * 4
    groups_pool = [[], *[draw.sample([*MARKERS, "staff", "everyone", "FRAUD", "fraud "], draw.randint(1, 3)) for _ in range(9)]]

    class Fast:
        "A chat model without LangChain's machinery around it."

        model_name = "fast"

        def __init__(self, reply):
            self.reply = reply

        def stream(self, messages, config, **options):
            yield AIMessageChunk(self.reply)

    rags = [RAG(divided, Fast(reply), decline=judge, threshold=0.05) for reply, judge in (("Plus costs £8 a month [1].", best_cosine), (" ".join(SECRETS.values()), None))]
    for rag in rags:
        rag.embed = lambda texts: np.ones((len(texts), 2), np.float32)
    for number in range(10_000):
        question, groups = draw.choice(pool), draw.choice(groups_pool)
        answer = rags[number % 50 == 0].ask(question, groups=groups)
        shown = f"{answer.text}{answer.citations}{answer.passages}{answer.dropped}{answer.declined_because}{answer.question}"
        leaks += any(mark in shown for group, mark in MARKERS.items() if group not in groups)
        asked += 1
    assert asked == 10_000 and leaks == 0
    assert not any(mark in record.getMessage() for record in caplog.records for mark in MARKERS.values())
    assert any(MARKERS["fraud"] in str(found) for (_, groups), found in views.items() if "fraud" in groups), "the test can see a leak"


def test_errors_and_callbacks_show_nothing_restricted(divided):
    from langchain_core.callbacks import BaseCallbackHandler

    heard: list[str] = []

    class Listener(BaseCallbackHandler):
        def on_chat_model_start(self, serialized, messages, **kwargs):
            heard.append(str(messages))

    model = Scripted(reply="x", error=None)
    RAG(divided, model, decline=None).invoke("What is the release limit of the fraud desk?", {"callbacks": [Listener()]})
    broken = RAG(divided, Scripted(error=RuntimeError("the model broke")), decline=None)
    with pytest.raises(RuntimeError) as raised:
        broken.ask("What is the release limit of the risk desk?")
    with pytest.raises(BadInputError) as refused:
        broken.ask("release limit", groups="fraud")
    assert heard and not any(mark in text for mark in MARKERS.values() for text in (*heard, str(model.seen), str(raised.value), str(refused.value)))


# --- concurrency -------------------------------------------------------------------------------------------------


def test_ten_threads_ask_while_one_ingests(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()

    def write(version: int) -> None:
        for name in ("a", "b", "c"):
            (folder / f"{name}.md").write_text(f"# Fees {name}\n\nThe {name} account costs £{version} a month. Version {version} of {name} ends here.")

    write(1)
    base = KnowledgeBase.open(tmp_path / "index", HashEmbeddings())
    base.ingest(folder, progress=False)
    rag, errors, torn, done, asked = RAG(base, Scripted(reply="x"), decline=None), [], [], threading.Event(), []

    def ask(number: int) -> None:
        name = "abc"[number % 3]
        while not done.is_set():
            try:
                answer = rag.ask(f"What does the {name} account cost a month?")
                asked.append(1)
                for item in answer.passages:
                    if len(set(re.findall(r"(?:£|Version )(\d+)", item.text))) > 1:
                        torn.append(item.text)
                if len({item.source for item in answer.passages}) != len(answer.passages):
                    torn.append("two versions of one document")
            except Exception as error:
                errors.append(error)
                return

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for version in range(2, 7):
        write(version)
        base.ingest(folder, progress=False)
        time.sleep(0.05)
    done.set()
    for thread in threads:
        thread.join()
    assert not errors and not torn and len(asked) >= 10
    assert {re.search(r"£(\d+)", item.text)[1] for item in base.search("account cost", 3)} == {"6"}


# --- found small, read large ---------------------------------------------------------------------------------------


def test_a_model_that_reads_passages_gets_the_neighbours_too_and_citations_keep_their_places(tmp_path):
    fillers = "\n\n".join(f"Paragraph {number} talks at length about branches, queues, counters and the weather in town." for number in range(40))
    (tmp_path / "docs").mkdir()
    path = tmp_path / "docs" / "kettles.md"
    path.write_text(f"# Kettles\n\n{fillers}\n\nThe kettle levy is named after Zorro.\n\nIt costs £41 a year.\n\n{fillers.replace('town', 'ports')}")
    base = KnowledgeBase.open(tmp_path / "index", HashEmbeddings())
    base.ingest(tmp_path / "docs", progress=False)
    found = base.search("kettle levy Zorro", 1)[0]
    model = Scripted(reply="The kettle levy is named after Zorro.")
    answer = RAG(base, model, k=1, sentences=None, budget=600, **JUDGE).ask("kettle levy Zorro")
    read = answer.passages[0]
    assert read.chunk_id == found.chunk_id and found.text in read.text and len(read.text) > 1.5 * len(found.text)
    assert len(read.text) == read.end - read.start and read.text in model.seen[0][0][1].content
    text = read_document(path).text
    assert [text[item.start:item.end] for item in answer.citations] == ["The kettle levy is named after Zorro."]
    small = RAG(base, model, k=1, sentences=None, budget=10, **JUDGE).ask("kettle levy Zorro")
    assert small.passages[0].text == found.text, "a budget without room for more leaves the passage as it was found"


# --- a screen and marks ------------------------------------------------------------------------------------------


def test_a_screen_comes_before_the_decision_to_answer_and_after_pages_are_read_wider(base):
    seen: list[tuple[str, list[str]]] = []

    def screen(question: str, passages: Any) -> list[Passage]:
        seen.append((question, [one.text for one in passages]))
        return [one for one in passages if "loan" not in one.text.lower()]

    model = Scripted(reply="The Premium account costs £18 a month.")
    answer = RAG(base, model, sentences=None, screen=screen, **JUDGE).ask("What does the Premium account cost a month?")
    check(answer)
    assert answer.text == model.reply and all("loan" not in one.text.lower() for one in answer.passages)
    assert len(seen) == 2 and "loan" not in str(model.seen[0][0]).lower()
    nothing = RAG(base, model, screen=lambda question, passages: [], **JUDGE).ask("What does the Premium account cost a month?")
    assert nothing.refused and nothing.declined_because == "no passage passed the screen" and len(model.seen) == 1


def test_marked_texts_and_their_instruction_reach_the_model_and_marks_do_not_hide_citations(base):
    class Marked:
        def __init__(self, texts: Any) -> None:
            self.instruction, self.texts = "Data stands between bars.", [f"|{text}|".replace(" ", "_") for text in texts]

    model = Scripted(reply="The Premium account costs £18 a month. [1]")
    answer = RAG(base, model, sentences=None, spotlight=Marked, **JUDGE).ask("What does the Premium account cost a month?")
    check(answer)
    system, human = (str(message.content) for message in model.seen[0][0])
    assert system.endswith("Data stands between bars.") and "The_Premium_account_costs" in human and answer.dropped == []
