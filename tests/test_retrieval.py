"""Retrieval: lexical index, fusion, inferred sources, aims, and the order they give together."""

import dataclasses
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from hash_embeddings import HashEmbeddings
from hypothesis import given, settings
from hypothesis import strategies as st

from llmops_ref.core import BadInputError
from llmops_ref.documents import Passage
from llmops_ref.retrieval import (
    FINANCE,
    Glossary,
    LexicalIndex,
    LexicalIndexError,
    MemoryStore,
    Place,
    Retrieval,
    chat_rewriter,
    find_aims,
    infer_sources,
    lexical_tokens,
    mmr,
    page_of,
    reciprocal_rank_fusion,
    retrieve,
    strip_instructions,
    widen,
)

MODEL = HashEmbeddings(dimensions=256)


def embed(texts):
    return np.asarray(MODEL.embed_documents(list(texts)), np.float32)


# --- words -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("one", "other"), [
    ("SG&A", "sga"), ("PP&E", "PPE"), ("17,606", "17606"), ("companies", "company"), ("leased", "leasing"), ("Adobe\u2019s", "Adobe"), ("notes", "note"),
])
def test_spellings_that_mean_the_same_become_the_same_token(one, other):
    assert lexical_tokens(one) == lexical_tokens(other) != []


def test_scores_are_those_of_bm25s():
    import bm25s

    texts = ["the cost of sales rose", "sales of kettles", "kettles kettles and more kettles", "nothing here"]
    index = LexicalIndex.build(list("abcd"), texts)
    reference = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
    reference.index([lexical_tokens(text) for text in texts], show_progress=False)
    expected = dict(zip("abcd", reference.get_scores(lexical_tokens("kettles sales")), strict=True))
    names, scores = index.search("kettles sales", 10)
    assert names == sorted((name for name in expected if expected[name] > 0), key=lambda name: -expected[name])
    np.testing.assert_allclose(scores, [expected[name] for name in names], rtol=1e-5)


WORDS = st.sampled_from(["net", "sales", "cost", "income", "margin", "kettle", "debt", "2022", "2021", "☃", "東京", "café"])
TEXTS = st.lists(st.lists(WORDS, max_size=12).map(" ".join), min_size=1, max_size=20)


@settings(max_examples=40, deadline=None)
@given(TEXTS, st.lists(WORDS, max_size=6).map(" ".join), st.integers(1, 8), st.randoms())
def test_search_finds_exactly_allowed_texts_that_share_a_word(texts, question, n, random):
    index = LexicalIndex.build([f"t{number}" for number in range(len(texts))], texts)
    allowed = np.array([random.random() < 0.6 for _ in texts])
    names, scores = index.search(question, n, allowed)
    wanted = set(lexical_tokens(question))
    sharing = {f"t{number}" for number, text in enumerate(texts) if allowed[number] and wanted & set(lexical_tokens(text))}
    assert set(names) <= sharing and len(names) == min(n, len(sharing)) == len(set(names))
    assert list(scores) == sorted(scores, reverse=True) and (scores > 0).all()


@pytest.mark.parametrize("texts", [["net sales", "cost of sales"], [], ["", "the of and"]])
def test_a_saved_index_finds_the_same_and_holds_no_pickle(tmp_path, texts):
    index = LexicalIndex.build([f"id \u00e9 {number}" for number in range(len(texts))], texts)
    index.save(tmp_path / "index")
    again = LexicalIndex.load(tmp_path / "index")
    assert len(again) == len(texts)
    for question in ("sales", "net", "missing", ""):
        ours, theirs = index.search(question, 5), again.search(question, 5)
        assert ours[0] == theirs[0] and ours[1].tolist() == theirs[1].tolist()
    assert {path.suffix for path in (tmp_path / "index").iterdir()} == {".npy", ".json"}


def test_a_large_saved_index_is_memory_mapped(tmp_path):
    LexicalIndex.build([str(number) for number in range(3000)], (f"{number} shared" for number in range(3000))).save(tmp_path)
    again = LexicalIndex.load(tmp_path)
    assert isinstance(again._scores, np.memmap) and isinstance(again.ids, np.memmap)
    assert again.search("17", 5)[0] == ["17"]


def test_a_damaged_index_is_refused_not_searched(tmp_path):
    index = LexicalIndex.build(list("ab"), ["net sales", "cost of sales"])

    def damage(name, action):
        folder = tmp_path / name
        index.save(folder)
        action(folder)
        with pytest.raises(LexicalIndexError, match="Build it again"):
            LexicalIndex.load(folder)

    for file in ("ids.npy", "scores.npy", "rows.npy", "starts.npy", "vocabulary.json"):
        damage(f"missing-{file}", lambda folder, file=file: (folder / file).unlink())
        damage(f"empty-{file}", lambda folder, file=file: (folder / file).write_bytes(b""))
    damage("pickle", lambda folder: np.save(folder / "ids.npy", np.array([{"a": 1}, None], dtype=object)))
    damage("other", lambda folder: np.save(folder / "rows.npy", np.zeros(1, np.int32)))
    damage("json", lambda folder: (folder / "vocabulary.json").write_text("[]"))
    with pytest.raises(LexicalIndexError):
        LexicalIndex.load(tmp_path / "nowhere")


def test_ids_must_name_the_texts_one_by_one():
    for ids, texts in ((["a"], ["x", "y"]), (["a", "a"], ["x", "y"])):
        with pytest.raises(BadInputError, match="one id"):
            LexicalIndex.build(ids, texts)


# --- fusion and diversity ----------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.sampled_from("abcdef"), unique=True, max_size=6), max_size=4))
def test_fusion_keeps_everything_and_never_prefers_what_is_behind_everywhere(rankings):
    fused = reciprocal_rank_fusion(rankings)
    assert set(fused) == {name for ranking in rankings for name in ranking}
    for first in fused:
        for second in fused:
            if first != second and all(first in r and (second not in r or r.index(first) < r.index(second)) for r in rankings):
                assert fused[first] > fused[second]


def test_fusion_with_weight_zero_leaves_a_ranking_out_and_bad_weights_are_refused():
    fused = reciprocal_rank_fusion([["a", "b"], ["b", "a"]], [1, 0])
    assert fused["a"] > fused["b"]
    for weights in ([1], [1, -1], [1, float("nan")]):
        with pytest.raises(BadInputError):
            reciprocal_rank_fusion([["a"], ["b"]], weights)


def test_mmr_prefers_what_differs_and_needs_matching_shapes():
    vectors = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    assert mmr(vectors, [0.9, 0.8, 0.1], 3, 0.0) == [0, 1, 2]
    assert mmr(vectors, [0.9, 0.8, 0.1], 2, 0.6) == [0, 2]
    assert mmr(vectors[:0], [], 3) == []
    for relevance, diversity in (([1.0], 0.3), ([1.0, 1.0, 1.0], 1.5)):
        with pytest.raises(BadInputError):
            mmr(vectors, relevance, 2, diversity)


# --- which documents ---------------------------------------------------------------------------------------------

RECORDS = (
    {"source": "AMERICANEXPRESS_2022_10K.pdf", "company": "American Express Company", "ticker": "AXP", "document_type": "10-K", "fiscal_year": 2022},
    {"source": "a/AMERICANEXPRESS_2021_10K.pdf", "company": "American Express Company", "ticker": "AXP", "document_type": "10-K", "fiscal_year": 2021},
    {"source": "AMERICANWATERWORKS_2022_10K.pdf", "company": "American Water Works Company, Inc."},
    {"source": "BESTBUY_2023_10K.pdf", "company": "Best Buy Co., Inc.", "fiscal_year": 2023, "period_end": "2023-01-28"},
    {"source": "ULTABEAUTY_2023Q4_EARNINGS.pdf", "company": "Ulta Beauty, Inc.", "fiscal_year": 2022, "period_end": "2023-01-28", "document_type": "earnings release"},
    {"source": "3M_2023Q2_10Q.pdf", "company": "3M Company", "document_type": "10-Q", "fiscal_year": 2023},
    {"source": "3M_2023_10K.pdf", "company": "3M Company", "document_type": "10-K", "fiscal_year": 2023},
    {"source": "JOHNSON_JOHNSON_2022_10K.pdf", "company": "Johnson & Johnson", "fiscal_year": 2022},
    {"source": "PEPSICO_2022_10K.pdf"},
    {"source": "MCDONALDS_2022_10K.pdf", "company": "McDonald\u2019s Corporation"},
    {"source": "MGMRESORTS_2022_10K.pdf", "company": "MGM Resorts International"},
    {"source": "overdraft-rates-2025.md", "title": "Overdraft rates 2025"},
)


@pytest.mark.parametrize(("question", "expected"), [
    ("Does AMEX have an improving margin as of 2022?", ["AMERICANEXPRESS_2022_10K.pdf"]),
    ("What was AXP\u2019s tax rate in FY21?", ["a/AMERICANEXPRESS_2021_10K.pdf"]),
    ("American Express' dividends?", ["AMERICANEXPRESS_2022_10K.pdf", "a/AMERICANEXPRESS_2021_10K.pdf"]),
    ("How did American Express change from FY2021 to FY2022?", ["AMERICANEXPRESS_2022_10K.pdf"]),
    ("American Express in 2009?", ["AMERICANEXPRESS_2022_10K.pdf", "a/AMERICANEXPRESS_2021_10K.pdf"]),
    ("American Water Works' capex", ["AMERICANWATERWORKS_2022_10K.pdf"]),
    ("Are Best Buy's gross margins consistent?", ["BESTBUY_2023_10K.pdf"]),
    ("Ulta Beauty's inventories at the end of FY2023?", ["ULTABEAUTY_2023Q4_EARNINGS.pdf"]),
    ("Ulta's sales in fiscal 2022", ["ULTABEAUTY_2023Q4_EARNINGS.pdf"]),
    ("What did 3M sell in Q2 of 2023?", ["3M_2023Q2_10Q.pdf"]),
    ("What does 3M's 2023 annual report say?", ["3M_2023_10K.pdf"]),
    ("J&J's sales in 2022", ["JOHNSON_JOHNSON_2022_10K.pdf"]),
    ("JnJ sales in 2022", ["JOHNSON_JOHNSON_2022_10K.pdf"]),
    ("How many restaurants does McDonald's run?", ["MCDONALDS_2022_10K.pdf"]),
    ("MGM's EBITDAR", ["MGMRESORTS_2022_10K.pdf"]),
    ("Pepsico's cash?", ["PEPSICO_2022_10K.pdf"]),
    ("What is the best overdraft rate for American customers in 2025?", None),
    ("What were the overdraft rates?", None),
    ("", None),
])
def test_documents_are_inferred_from_company_year_and_kind(question, expected):
    assert infer_sources(question, RECORDS) == expected


@given(st.text(max_size=80))
def test_inferred_documents_exist(question):
    sources = infer_sources(question, RECORDS)
    assert sources is None or (sources and set(sources) <= {str(record["source"]) for record in RECORDS})


# --- what is asked -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("question", "left"), [
    ("Is the margin improving? If margin is not a useful metric for a company like this, then state that and explain why.", "Is the margin improving?"),
    ("What is the FY2018 capex? Answer in USD millions. Give a response by relying on the cash flow statement.", "What is the FY2018 capex?"),
    ("What is DPO? DPO is defined as: 365 * payables / COGS. Round your answer to two decimals.", "What is DPO?"),
    ("Show me the fees.", "Show me the fees."),
    ("Assume you are an analyst. Answer from the balance sheet: what is the net PP&E? Answer in USD.", "what is the net PP&E?"),
    ("Using the P&L, what is the margin? Round to two decimals.", "Using the P&L, what is the margin?"),
    ("Which card is free? Do I pay abroad?", "Which card is free? Do I pay abroad?"),
])
def test_instructions_are_stripped_and_a_question_is_never_emptied(question, left):
    assert strip_instructions(question) == left


@given(st.text(min_size=1, max_size=200).filter(str.strip))
def test_stripping_leaves_words_of_the_question_only(question):
    left = strip_instructions(question)
    assert left.strip() and set(left.split()) <= set(question.split())


def places(question):
    names = {place: name for name, place in FINANCE.places.items()}
    return [names[aim.place] for aim in find_aims(question, FINANCE)]


@pytest.mark.parametrize(("question", "expected"), [
    ("What is the days payable outstanding?", ["balance sheet", "income statement"]),
    ("Is it capital intensive?", ["balance sheet", "cash flow statement", "income statement"]),
    ("What is the operating margin? Use the P&L.", ["income statement"]),
    ("Capex, by the statement of cash flows and the statement of income", ["income statement", "cash flow statement"]),
    ("What was the adjusted EBITDA?", ["reconciliation"]),
    ("What was the EBITDA?", ["income statement", "cash flow statement"]),
    ("Which debt securities are registered to trade on an exchange?", ["cover"]),
    ("Any lawsuits?", ["legal"]),
    ("How do I freeze my card?", []),
])
def test_metrics_lead_to_the_statements_they_stand_in(question, expected):
    assert sorted(places(question)) == sorted(expected)


# --- all together ------------------------------------------------------------------------------------------------

PAGES = {
    1: ("Cover page", "Securities registered pursuant to Section 12(b) of the Act."),
    2: ("Table of contents", "Operating margin 3. Consolidated statements of income operations earnings 5. Balance sheets 6."),
    3: ("Item 7. Management's Discussion", "Our operating margin is one of the measures of operating success. Operating margin matters."),
    4: ("Item 7. Management's Discussion", "Operating margin improved, driven by lower freight."),
    5: ("Consolidated statements of income", "Net sales 1,204 1,150 Cost of sales 722 701 Operating income 181 154"),
    6: ("Consolidated balance sheets", "Inventories 155 162 Accounts payable 121 118 Total assets 900 880"),
    7: ("Consolidated statements of cash flows", "Purchases of property (64) (58) Dividends (44) (40)"),
    8: ("Note 7. Legal proceedings", "A supplier has sued us. Operating margin is unaffected."),
}


def passages(company="Harlow Kettles Company", source="HARLOW_2025_10K.pdf", pages=PAGES, copies=2):
    facts = {"company": company, "document_type": "10-K", "fiscal_year": 2025}
    return [
        Passage(f"{text} part {copy}", source, page, None, 0.0, f"{source}:{page}:{copy}", 1000 * page + 100 * copy, 1000 * page + 100 * copy + 50, facts,
                context=f"{company} | 10-K | fiscal 2025 | {heading}")
        for page, (heading, text) in pages.items() for copy in range(copies)
    ]


@pytest.fixture(scope="module")
def store():
    return MemoryStore([*passages(), *passages("Bexley Stoves, Inc.", "BEXLEY_2025_10K.pdf")], embed)


def found(store, question, k=4, **changes):
    return [(item.source[:6], item.page) for item in retrieve(store, question, k, Retrieval(**changes))]


def test_a_metric_finds_the_statement_that_does_not_name_it(store):
    question = "Does Harlow have an improving operating margin profile? If it is not a useful metric, state that."
    assert ("HARLOW", 5) in found(store, question)[:2]
    assert ("HARLOW", 5) not in found(store, question, glossary=None)


def test_each_statement_that_a_ratio_needs_is_among_the_first_four(store):
    pages = found(store, "What is Harlow's days payable outstanding? Use the balance sheet and the P&L.")
    assert {("HARLOW", 5), ("HARLOW", 6)} <= set(pages[:2])


def test_reasons_stay_ahead_of_statements(store):
    assert found(store, "What drove Harlow's operating margin?")[0] in (("HARLOW", 3), ("HARLOW", 4))


def test_one_passage_a_page_unless_switched_off(store):
    pages = found(store, "Harlow operating margin", 8)
    assert len(pages) == len(set(pages)) == 8
    pages = found(store, "Harlow operating margin", 8, one_per_page=False)
    assert len(set(pages)) < len(pages)


def test_another_company_comes_only_after_the_named_one_is_used_up(store):
    pages = found(store, "Harlow operating margin", 12)
    assert [source for source, _ in pages] == ["HARLOW"] * 8 + ["BEXLEY"] * 4
    assert {source for source, _ in found(store, "Harlow operating margin", 12, sources=None)[:8]} == {"HARLOW", "BEXLEY"}


def test_a_contents_page_is_put_behind(store):
    assert ("HARLOW", 2) not in found(store, "Harlow consolidated statements of income operations earnings")


def test_without_headings_pages_of_numbers_stand_in():
    bare = MemoryStore([dataclasses.replace(item, context="") for item in passages(copies=1)], embed)
    assert ("HARLOW", 5) in found(bare, "What is the cost of sales in Harlow's income statement?")


def test_scores_tell_what_each_stage_gave(store):
    question = "What is Harlow's operating margin?"
    vector = store.embed([strip_instructions(question)])[0]
    for item in retrieve(store, question, 6):
        assert item.score == item.scores["dense"] == pytest.approx(float(store.similarity(vector, [item])[0]), abs=1e-5)
        assert item.scores.keys() & {"fused", "aim"}


def test_weights_leave_a_ranking_out(store):
    plain = {"glossary": None, "sources": None, "prepare": None, "one_per_page": False, "candidates": 32}
    question = "operating margin driven by freight"
    dense = [item.chunk_id for item in store.dense(store.embed([question])[0], 32) if item.page != 2][:3]    # contents pages go behind
    lexical = [item.chunk_id for item in store.lexical(question, 32) if item.page != 2][:3]
    assert [item.chunk_id for item in retrieve(store, question, 3, Retrieval(dense_weight=1, **plain))] == dense
    assert [item.chunk_id for item in retrieve(store, question, 3, Retrieval(dense_weight=0, **plain))] == lexical


def test_a_reranker_has_the_last_word_and_must_score_every_passage(store):
    last = Retrieval(rerank=lambda question, items: [item.page or 0 for item in items])
    pages = [item.page for item in retrieve(store, "Harlow operating margin", 4, last)]
    assert pages == sorted(pages, reverse=True)
    with pytest.raises(BadInputError, match="one a passage"):
        retrieve(store, "margin", 4, Retrieval(rerank=lambda question, items: [1.0] * (len(items) + 1)))


def test_a_rewriter_adds_searches(store):
    pages = found(store, "Tell me about Harlow", 2, rewrite=lambda question: ["a supplier has sued us", "a supplier has sued us"], glossary=None)
    assert ("HARLOW", 8) in pages


def test_chat_rewriter_reads_lines_and_bounds_them():
    class Chat:
        def invoke(self, prompt):
            assert "What is DPO?" in prompt
            return type("Message", (), {"content": '1. accounts payable\n\n- "cost of sales"\n* more\n'})()

    assert chat_rewriter(Chat(), 2)("What is DPO?") == ["accounts payable", "cost of sales"]


def test_diversity_changes_the_order_only(store):
    assert set(found(store, "Harlow operating margin", 8)) == set(found(store, "Harlow operating margin", 8, diversity=0.9))


def test_an_empty_store_and_a_foreign_question_give_what_there_is():
    assert retrieve(MemoryStore([], lambda texts: np.zeros((len(texts), 1), np.float32)), "anything") == []
    few = MemoryStore(passages(copies=1)[:2], embed)
    assert len(retrieve(few, "\u6771\u4eac \u0645\u0631\u062d\u0628\u0627 \U0001f600", 4)) == 2


@settings(max_examples=30, deadline=None)
@given(question=st.text(min_size=1, max_size=60).filter(str.strip), k=st.integers(1, 20))
def test_any_question_gets_at_most_k_different_pages_from_the_store(store, question, k):
    items = retrieve(store, question, k)
    assert len(items) == len({page_of(item) for item in items}) == min(k, 16)
    known = {item.chunk_id: item.text for item in store.passages}
    assert all(known[item.chunk_id] == item.text for item in items)


def test_a_store_is_never_asked_outside_its_filter(store):
    asked = []

    class Watched:
        def __getattr__(self, name):
            return getattr(store, name)

        def dense(self, vector, n, where=None):
            asked.append(where)
            return store.dense(vector, n, where)

        def lexical(self, question, n, where=None):
            asked.append(where)
            return store.lexical(question, n, where)

    retrieve(Watched(), "Harlow's operating margin and capex in FY2025, please?")
    assert len(asked) >= 3 and all(where == {"source": {"$in": ["HARLOW_2025_10K.pdf"]}} for where in asked)


def test_threads_share_a_store_and_agree(store):
    questions = [f"Harlow operating margin {number}" for number in range(8)]
    expected = [found(store, question) for question in questions]
    results: dict[int, object] = {}
    threads = [threading.Thread(target=lambda n=n: results.__setitem__(n, found(store, questions[n % 8]))) for n in range(16)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(results[n] == expected[n % 8] for n in range(16))


@pytest.mark.parametrize("change", [
    {"dense_weight": 1.5}, {"dense_weight": "0.5"}, {"dense_weight": float("nan")}, {"candidates": 0}, {"candidates": 2.5}, {"candidates": True},
    {"fuse": None}, {"prepare": "strip"}, {"sources": 1}, {"rerank": "model"}, {"rerank_depth": 0}, {"diversity": -0.1}, {"glossary": {}},
])
def test_a_bad_configuration_is_refused_when_it_is_made(change):
    with pytest.raises(BadInputError, match=next(iter(change))):
        Retrieval(**change)


@pytest.mark.parametrize(("question", "k"), [("", 4), (" \n", 4), (None, 4), ("margin", 0), ("margin", True), ("margin", 1.5)])
def test_a_bad_question_is_refused(store, question, k):
    with pytest.raises(BadInputError):
        retrieve(store, question, k)


def test_a_glossary_can_be_replaced():
    legal = Glossary({"notes": Place(r"legal", "legal proceedings")}, {}, {r"sued|trial": {"notes": "supplier"}})
    assert [aim.words for aim in find_aims("Is there a trial?", legal)] == ["supplier"]
    assert find_aims("What is the operating margin?", legal) == []


# --- small to large ----------------------------------------------------------------------------------------------


def test_widen_grows_to_neighbours_within_the_budget(store):
    small = next(item for item in store.passages if item.chunk_id == "HARLOW_2025_10K.pdf:5:1")
    wide = widen(store, small)
    assert wide.text.split() == " ".join(item.text for item in store.siblings(small)).split() and small.text in wide.text
    assert (wide.start, wide.end) == (5000, 5150) and page_of(wide) == page_of(small)
    assert widen(store, small, 1).text == small.text
    stranger = dataclasses.replace(small, chunk_id="unknown")
    assert widen(store, stranger) == stranger
    with pytest.raises(BadInputError):
        widen(store, small, 0)


def test_the_chapter_and_the_glossary_name_no_company_of_the_evaluation():
    patterns = json.dumps([dict(FINANCE.named), {name: dict(value) for name, value in FINANCE.terms.items()}]).lower()
    for name in ("adobe", "amazon", "amcor", "american express", "best buy", "ulta"):
        assert name not in patterns
    assert (Path(__file__).parents[1] / "nbs" / "retrieval.ipynb").exists()
