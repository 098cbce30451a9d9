"""llmops_ref.retrieval_bench: ranks and figures by hand, baselines that are what they say, files that lose nothing, and refusals."""

from __future__ import annotations

import gc
import itertools
import json
import math
import os
import tempfile
import threading

import numpy as np
import pytest
from hash_embeddings import HashEmbeddings
from hypothesis import given, settings
from hypothesis import strategies as st

import llmops_ref.retrieval_bench as module
from llmops_ref.core import BadInputError
from llmops_ref.documents import Passage
from llmops_ref.retrieval_bench import (
    BenchFileError,
    BenchResults,
    Built,
    DatasetError,
    Found,
    System,
    ablation_systems,
    all_systems,
    bench_retrieval,
    load_dataset,
    places,
    plain_passages,
    plain_systems,
    rank_places,
)

SECTIONS = {
    "fees.md": "# Fees\n\n## Monthly fees\n\nThe Premium account costs £18 a month.\n\n## Cash abroad\n\nA withdrawal abroad costs one pound.\n",
    "cards.md": "# Cards\n\n## Stolen cards\n\nA stolen card is blocked at once when you call us.\n",
}
QUESTIONS = [
    {"id": "one", "user_input": "What does the Premium account cost?", "reference_context_ids": ["fees.md#monthly-fees"], "kind": "lookup", "split": "dev"},
    {"id": "two", "user_input": "Is a stolen card blocked?", "reference_context_ids": ["cards.md#stolen-cards"], "kind": "lookup", "split": "dev"},
    {"id": "three", "user_input": "What does a withdrawal abroad cost?", "reference_context_ids": ["fees.md#cash-abroad", "cards.md#stolen-cards"], "kind": "multi", "split": "test"},
    {"id": "four", "user_input": "Who is the chair?", "reference_context_ids": [], "kind": "unanswerable", "split": "dev", "expected": "decline"},
]


def write(folder, rows=QUESTIONS, documents=SECTIONS):
    "A data set on disk."
    (folder / "documents").mkdir(exist_ok=True, parents=True)
    for name, text in documents.items():
        (folder / "documents" / name).write_text(text, encoding="utf-8")
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture
def dataset(tmp_path):
    return load_dataset(write(tmp_path / "set"))


def passage(place, number=0, source="a.pdf"):
    "A passage of a page (a number) or a section (a string)."
    page, section = (place, None) if isinstance(place, int) else (None, place)
    return Passage(f"text {number}", source, page, section, 0.5, f"c{number}")


def fixed(answers, settings=""):
    "A system that returns what it was told, whatever is asked."
    return System(lambda: Built(lambda question, k: answers[:k], chunks=len(answers), index_bytes=10, ingest_seconds=0.1), settings)


# --- places and ranks ---------------------------------------------------------------------------------------------


def test_a_page_or_the_last_heading_is_the_place():
    assert places(passage(7)) == ("a.pdf#page=7",)
    assert places(passage("Fees > What's new in 2026?")) == ("a.pdf#whats-new-in-2026",)
    assert places(passage(None)) == ("a.pdf#",)
    several = Passage("t", "g.md", None, None, 0.0, "c", metadata={"sections": ["A > One", "A > Two"]})
    assert places(several) == ("g.md#one", "g.md#two")


def test_a_name_in_another_normal_form_is_the_same_document(tmp_path):
    rows = [{**QUESTIONS[0], "id": str(number), "reference_context_ids": ["cafe\u0301.md#monthly-fees"]} for number in range(2)]
    dataset = load_dataset(write(tmp_path, rows, {"caf\u00e9.md": SECTIONS["fees.md"]}))
    assert set(places(Passage("t", "cafe\u0301.md", None, "Fees > Monthly fees", 0.0, "c"))) == set(dataset.questions[0].wanted)


def test_passages_of_one_page_share_a_rank():
    found = [passage(3), passage(3, 1), passage(9, 2), passage(3, 3), passage(4, 4)]
    assert rank_places(found, {"a.pdf#page=4"}) == (3,)
    assert rank_places(found, {"a.pdf#page=3", "a.pdf#page=4"}) == (1, 3)
    assert rank_places(found, {"b.pdf#page=3"}) == ()


def test_a_passage_over_several_sections_brings_them_all_at_one_rank():
    wide = Passage("t", "g.md", None, None, 0.0, "c", metadata={"sections": ["One", "Two"]})
    again = Passage("t", "g.md", None, None, 0.0, "d", metadata={"sections": ["Two"]})
    last = Passage("t", "g.md", None, None, 0.0, "e", metadata={"sections": ["Two", "Three"]})
    assert rank_places([wide, again, last], {"g.md#two", "g.md#three"}) == (1, 2)


@settings(deadline=None)
@given(st.lists(st.integers(1, 8), max_size=25), st.sets(st.integers(1, 8), min_size=1))
def test_ranks_are_those_of_the_pages_in_order(pages, wanted):
    order = list(dict.fromkeys(pages))
    ranks = rank_places([passage(page, number) for number, page in enumerate(pages)], {f"a.pdf#page={page}" for page in wanted})
    assert ranks == tuple(rank for rank, page in enumerate(order, 1) if page in wanted)


def score(metric, ranks, wanted, first=None):
    return Found("q", "", wanted, tuple(ranks), first, 0.1, 0.1).score(metric)


def test_the_figures_by_hand():
    assert [score(f"hit@{n}", [4, 11], 2) for n in (1, 3, 4, 10)] == [0, 0, 1, 1]
    assert score("mrr", [4, 11], 2) == 0.25 and score("mrr", [11], 1) == 0
    assert score("ndcg@10", [1], 1) == 1 and score("ndcg@10", [1, 2], 2) == pytest.approx(1)
    assert score("ndcg@10", [2], 1) == pytest.approx(1 / math.log2(3))
    assert score("ndcg@10", [1, 4], 3) == pytest.approx((1 + 1 / math.log2(5)) / (1 + 1 / math.log2(3) + 0.5))
    assert score("first passages", [1], 1, 3) == 1 and score("first passages", [1], 1) == 0
    with pytest.raises(BadInputError, match="hit@4"):
        score("accuracy", [1], 1)


@settings(deadline=None)
@given(st.sets(st.integers(1, 15), max_size=6), st.integers(6, 9))
def test_ndcg_agrees_with_its_definition(ranks, wanted):
    gains = [1.0 if rank in ranks else 0.0 for rank in range(1, 11)]
    ideal = [1.0] * min(wanted, 10)
    dcg, best = (sum(gain / math.log2(place + 1) for place, gain in enumerate(row, 1)) for row in (gains, ideal))
    assert score("ndcg@10", sorted(ranks), wanted) == pytest.approx(dcg / best)
    assert 0 <= score("ndcg@10", sorted(ranks), wanted) <= 1


# --- data sets ----------------------------------------------------------------------------------------------------


def test_a_data_set_keeps_what_has_evidence(dataset):
    assert [question.id for question in dataset.questions] == ["one", "two", "three"]
    assert dataset.skipped == 1 and dataset.name == "set"
    assert dataset.questions[2].wanted == {"fees.md#cash-abroad", "cards.md#stolen-cards"} and dataset.questions[2].kind == "multi"


def test_pages_become_places(tmp_path):
    rows = [{"user_input": f"Question {n}?", "source": "fees.md", "reference_pages": [n, 7], "question_type": "novel"} for n in (1, 2)]
    dataset = load_dataset(write(tmp_path / "reports", rows))
    assert dataset.questions[0].wanted == {"fees.md#page=1", "fees.md#page=7"}
    assert [(question.id, question.kind) for question in dataset.questions] == [("line-1", "novel"), ("line-2", "novel")]


def test_a_split_is_chosen_and_named(tmp_path):
    chosen = load_dataset(write(tmp_path / "set"), split="dev")
    assert [question.id for question in chosen.questions] == ["one", "two"] and chosen.name == "set-dev"


def test_the_handbook_is_a_data_set():
    dev, test = (load_dataset("handbook", split=split) for split in ("dev", "test"))
    assert dev.name == "handbook-dev" and len(dev.questions) > 60 and dev.skipped > 10
    assert not {question.id for question in dev.questions} & {question.id for question in test.questions}


def test_the_digest_follows_questions_and_documents(tmp_path):
    first = load_dataset(write(tmp_path)).sha256
    assert load_dataset(write(tmp_path)).sha256 == first
    assert load_dataset(write(tmp_path, QUESTIONS[:2])).sha256 != first
    write(tmp_path)
    (tmp_path / "documents" / "fees.md").write_text("# Fees\n\nOther.\n")
    assert load_dataset(tmp_path).sha256 != first


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("not json", "Line 1"),
        ("[1, 2]", "Line 1"),
        ('{"reference_context_ids": ["fees.md#x"]}', "'user_input' is missing"),
        ({"user_input": " ", "reference_context_ids": ["fees.md#x"]}, "user_input is empty"),
        ({"user_input": "q", "source": "fees.md", "reference_pages": [0]}, r"reference_pages is \[0\]"),
        ({"user_input": "q", "source": "fees.md", "reference_pages": "3"}, "reference_pages is '3'"),
        ({"user_input": "q", "reference_pages": [3]}, "no source"),
        ({"user_input": "q", "reference_context_ids": ["fees.md"]}, "FILE#ANCHOR"),
        ({"user_input": "q", "source": "none.pdf", "reference_pages": [3]}, "'none.pdf' is not among"),
        ({"user_input": "q", "reference_context_ids": ["../secret.md#x"]}, "not among"),
    ],
)
def test_a_question_that_cannot_be_scored_is_named(tmp_path, row, says):
    folder = write(tmp_path)
    (folder / "questions.jsonl").write_text(row if isinstance(row, str) else json.dumps(row))
    with pytest.raises(DatasetError, match=says) as caught:
        load_dataset(folder)
    assert "line 1" in str(caught.value).lower() and "user_input" in caught.value.remedy


def test_what_is_no_data_set_is_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"questions\.jsonl cannot be read"):
        load_dataset(tmp_path)
    (tmp_path / "questions.jsonl").write_text("{}")
    with pytest.raises(DatasetError, match="no folder pdfs or documents"):
        load_dataset(tmp_path)
    with pytest.raises(DatasetError, match="1 questions with evidence"):
        load_dataset(write(tmp_path, QUESTIONS[:1]))
    with pytest.raises(DatasetError, match="two with one id"):
        load_dataset(write(tmp_path, [QUESTIONS[0], QUESTIONS[0]]))


# --- systems ------------------------------------------------------------------------------------------------------


def test_plain_chunks_are_langchains_and_know_their_sections(dataset):
    splitters = pytest.importorskip("langchain_text_splitters")
    found = plain_passages(dataset, size=60, overlap=10)
    texts = [text for path in dataset.files for text in splitters.RecursiveCharacterTextSplitter(chunk_size=60, chunk_overlap=10).split_text(path.read_text())]
    assert [one.text for one in found] == texts
    by_text = {one.text: places(one) for one in found}
    assert any("fees.md#monthly-fees" in found for text, found in by_text.items() if "Premium" in text)
    wide = plain_passages(dataset)
    assert set(places(next(one for one in wide if one.source == "fees.md"))) == {"fees.md#monthly-fees", "fees.md#cash-abroad"}


def test_plain_pages_come_from_the_pdf(tmp_path):
    canvas = pytest.importorskip("reportlab.pdfgen.canvas")
    (tmp_path / "pdfs").mkdir()
    sheet = canvas.Canvas(str(tmp_path / "pdfs" / "report.pdf"))
    for text in ("Total revenue was 41 million.", "The board met nine times."):
        sheet.drawString(72, 700, text)
        sheet.showPage()
    sheet.save()
    rows = [{"user_input": text, "source": "report.pdf", "reference_pages": [page]} for text, page in (("What was total revenue?", 1), ("How often did the board meet?", 2))]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = load_dataset(tmp_path)
    assert [(one.page, one.text) for one in plain_passages(dataset)] == [(1, "Total revenue was 41 million."), (2, "The board met nine times.")]
    results = bench_retrieval(dataset, all_systems(dataset, HashEmbeddings(), ["plain", "full"]), HashEmbeddings(), progress=False)
    assert results.estimate("plain", "hit@1").value == results.estimate("full", "hit@1").value == 1
    (tmp_path / "pdfs" / "report.pdf").write_bytes(b"%PDF-1.4 cut off")
    with pytest.raises(DatasetError, match=r"report\.pdf cannot be read"):
        plain_passages(dataset)


def test_the_plain_searches_are_cosine_words_and_their_fusion(dataset):
    embeddings = HashEmbeddings()
    built = {name: system.build() for name, system in plain_systems(dataset, embeddings, size=60, overlap=0).items()}
    passages = plain_passages(dataset, size=60, overlap=0)
    question = "Is a stolen card blocked?"
    cosines = np.array(embeddings.embed_documents([one.text for one in passages])) @ np.array(embeddings.embed_query(question))
    assert [one.text for one in built["plain"].search(question, 3)] == [passages[at].text for at in np.argsort(-cosines, kind="stable")[:3]]
    words = built["plain-bm25"].search("withdrawal abroad", 5)
    assert "withdrawal" in words[0].text and all("withdrawal" in one.text.lower() or "abroad" in one.text.lower() for one in words)
    fused = built["plain-fusion"].search(question, 3)
    assert len({one.chunk_id for one in fused}) == 3 and "stolen" in fused[0].text
    assert built["plain-bm25"].search("zebra", 5) == []
    assert all(one.chunks == len(passages) and one.index_bytes > 0 and one.ingest_seconds >= 0 for one in built.values())


def test_the_ablation_adds_one_piece_at_a_time_and_ends_with_the_default():
    steps = module._configurations()
    names = [name for name in steps if name.startswith("+")]
    assert names[:2] == ["+chunks", "+context"] and steps["full"] == (True, module.Retrieval())
    ladder = [steps[name][1] for name in [*names[1:], "full"]]
    for before, after in itertools.pairwise(ladder):
        changed = [one.name for one in module.fields(before) if getattr(before, one.name) != getattr(after, one.name)]
        assert len(changed) == 1
    for name, (context, retrieval) in steps.items():
        if name.startswith("without-"):
            changed = [one.name for one in module.fields(retrieval) if getattr(retrieval, one.name) != getattr(module.Retrieval(), one.name)]
            assert len(changed) + (not context) == 1, name


def test_every_piece_of_the_ablation_searches(dataset):
    embeddings = HashEmbeddings()
    results = bench_retrieval(dataset, ablation_systems(dataset, embeddings), embeddings, progress=False)
    assert all(len(one.found) == 3 and one.chunks == 3 for one in results.systems.values())
    assert len({one.settings for one in results.systems.values()}) == len(results.systems)
    assert "at 0x" not in "".join(one.settings for one in results.systems.values())
    assert results.estimate("full", "hit@4").value == 1


def test_the_index_is_built_once_for_all_that_share_it(dataset):
    embeddings = HashEmbeddings()
    bench_retrieval(dataset, plain_systems(dataset, embeddings), embeddings, progress=False)
    assert embeddings.embedded == len(plain_passages(dataset))


def test_an_unknown_system_is_refused_with_the_known_ones(dataset):
    with pytest.raises(BadInputError, match="magic") as caught:
        all_systems(dataset, HashEmbeddings(), ["plain", "magic"])
    assert "knowledge-base" in caught.value.remedy
    assert list(all_systems(dataset, HashEmbeddings(), ["full", "plain"])) == ["plain", "full"]


def test_the_knowledge_base_is_measured_and_leaves_nothing_behind(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    embeddings = HashEmbeddings()
    results = bench_retrieval(dataset, all_systems(dataset, embeddings, ["knowledge-base"]), embeddings, progress=False)
    one = results.systems["knowledge-base"]
    assert one.chunks == 3 and one.index_bytes > 1000 and results.estimate("knowledge-base", "hit@4").value == 1
    gc.collect()
    assert os.listdir(tmp_path / "temporary") == []


# --- the bench and its file ---------------------------------------------------------------------------------------


RIGHT = [Passage("t", "fees.md", None, "Fees > Monthly fees", 0.9, "a"), Passage("t", "cards.md", None, "Cards > Stolen cards", 0.8, "b")]
WRONG = [Passage("t", "fees.md", None, "Fees", 0.9, "z")]


def test_results_say_who_found_what(dataset):
    results = bench_retrieval(dataset, {"right": fixed(RIGHT), "wrong": fixed(WRONG)}, HashEmbeddings(), progress=False)
    assert [one.ranks for one in results.systems["right"].found] == [(1,), (2,), (2,)]
    assert [one.first_passage for one in results.systems["right"].found] == [1, 2, 2]
    assert results.missed("wrong") == {"lookup": ["one", "two"], "multi": ["three"]} and results.missed("right") == {"lookup": [], "multi": []}
    difference, adjusted = results.compare("hit@4", reference="wrong")["right"]
    assert (difference.wins, difference.losses, difference.p) == (3, 0, 0.25) and adjusted == 0.25
    table = results.table(reference="wrong")
    assert "| right | 0.33 (" in table and "+1.00 (3 better, 0 worse)" in table and results._repr_markdown_().count("| wrong |") == 1
    assert results.estimate("right", "mrr").value == pytest.approx(2 / 3)
    with pytest.raises(BadInputError, match="no result of 'other'"):
        results.estimate("other", "mrr")


def test_p_values_are_corrected_for_all_systems(dataset):
    systems = {"base": fixed(WRONG), **{f"s{number}": fixed(RIGHT) for number in range(5)}}
    results = bench_retrieval(dataset, systems, HashEmbeddings(), progress=False)
    assert all(adjusted == 1.0 and difference.p == 0.25 for difference, adjusted in results.compare(reference="base").values())


def test_latency_is_over_the_embedding_measured_beside_it(dataset, monkeypatch):
    clock = iter(float(second) for second in range(10_000))
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    results = bench_retrieval(dataset, {"one": fixed(RIGHT)}, HashEmbeddings(), progress=False)
    assert results.systems["one"].slowness() == (1.0, 1.0)


def test_a_stored_system_is_not_built_again(dataset, tmp_path):
    out, counted = tmp_path / "deep" / "results.json", []

    def counting(name, settings=""):
        return System(lambda: counted.append(name) or Built(lambda question, k: RIGHT[:k]), settings)

    first = bench_retrieval(dataset, {"one": counting("one")}, HashEmbeddings(), out=out, progress=False, note="source, terms")
    more = bench_retrieval(dataset, {"two": counting("two"), "one": counting("one")}, HashEmbeddings(), out=out, progress=False)
    assert counted == ["one", "two"] and list(more.systems) == ["two", "one"] and more.systems["one"] == first.systems["one"]
    assert more.note == "source, terms" and BenchResults.load(out) == more
    bench_retrieval(dataset, {"one": counting("one", "k1=2")}, HashEmbeddings(), out=out, progress=False)
    assert counted == ["one", "two", "one"]    # other settings are another system
    bench_retrieval(dataset, {"one": counting("one", "k1=2")}, HashEmbeddings(), out=out, force=True, progress=False)
    assert counted[-1] == "one" and len(counted) == 4 and list(BenchResults.load(out).systems) == ["one"]


def test_an_interrupted_bench_keeps_what_was_finished(dataset, tmp_path):
    def broken():
        raise KeyboardInterrupt

    out = tmp_path / "results.json"
    with pytest.raises(KeyboardInterrupt):
        bench_retrieval(dataset, {"one": fixed(RIGHT), "two": System(broken)}, HashEmbeddings(), out=out, progress=False)
    assert list(BenchResults.load(out).systems) == ["one"] and not list(tmp_path.glob(".*"))


def test_the_file_holds_figures_and_no_text(dataset, tmp_path):
    out = tmp_path / "results.json"
    bench_retrieval(dataset, all_systems(dataset, HashEmbeddings(), ["plain", "full"]), HashEmbeddings(), out=out, progress=False)
    text = out.read_text(encoding="utf-8").lower()
    assert "premium" not in text and "stolen" not in text and str(tmp_path).lower() not in text and '"one"' in text


@pytest.mark.parametrize("change", ["questions", "k", "versions", "cpu"])
def test_results_of_another_bench_are_not_mixed(tmp_path, change, monkeypatch):
    dataset, out = load_dataset(write(tmp_path / "set")), tmp_path / "results.json"
    bench_retrieval(dataset, {"one": fixed(RIGHT)}, HashEmbeddings(), out=out, progress=False)
    before, options = out.read_bytes(), {}
    if change == "questions":
        dataset = load_dataset(write(tmp_path / "set", QUESTIONS[:2]))
    elif change == "k":
        options["k"] = 20
    elif change == "versions":
        monkeypatch.setattr(module, "_versions", lambda: {"python": "2.7"})
    else:
        monkeypatch.setattr(module, "_cpu", lambda: "abacus")
    with pytest.raises(BenchFileError, match="holds results of another bench"):
        bench_retrieval(dataset, {"one": fixed(RIGHT)}, HashEmbeddings(), out=out, progress=False, **options)
    assert out.read_bytes() == before


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"schema": 2}', '{"schema": 1, "systems": {"a": {"found": [{}]}}}', "\x00"])
def test_a_file_that_is_no_result_is_left_alone(dataset, tmp_path, content):
    out = tmp_path / "results.json"
    out.write_text(content)
    with pytest.raises(BenchFileError):
        BenchResults.load(out)
    with pytest.raises(BenchFileError):
        bench_retrieval(dataset, {"one": fixed(RIGHT)}, HashEmbeddings(), out=out, progress=False)
    assert out.read_text() == content


@pytest.mark.parametrize("answer", [[*RIGHT, *RIGHT, *RIGHT], ["a string"], [None]])
def test_a_system_that_returns_no_passages_is_named(dataset, answer):
    broken = System(lambda: Built(lambda question, k: answer))
    with pytest.raises(BadInputError, match="'odd' returned no list"):
        bench_retrieval(dataset, {"odd": broken}, HashEmbeddings(), progress=False)


def test_a_bench_of_nothing_is_refused(dataset, tmp_path):
    for systems, options in (({}, {}), ({"one": fixed(RIGHT)}, {"k": 2}), ({"one": fixed(RIGHT)}, {"few": 0})):
        with pytest.raises(BadInputError, match="at least one system"):
            bench_retrieval(dataset, systems, HashEmbeddings(), progress=False, **options)
    with pytest.raises(BenchFileError, match="cannot be written"):
        bench_retrieval(dataset, {"one": fixed(RIGHT)}, HashEmbeddings(), out=tmp_path, progress=False)


def test_readers_of_a_file_never_see_half_of_it(dataset, tmp_path):
    out, seen, done = tmp_path / "results.json", [], threading.Event()
    results = bench_retrieval(dataset, {"one": fixed(RIGHT)}, HashEmbeddings(), out=out, progress=False)

    def read():
        while not done.is_set():
            seen.append(BenchResults.load(out) == results)

    thread = threading.Thread(target=read)
    thread.start()
    for _ in range(50):
        results.save(out)
    done.set()
    thread.join()
    assert seen and all(seen) and os.listdir(tmp_path / "set") and not list(tmp_path.glob(".*"))


def test_a_plot_has_a_place_for_every_system(dataset):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    results = bench_retrieval(dataset, {"right": fixed(RIGHT), "wrong": fixed(WRONG)}, HashEmbeddings(), progress=False)
    figure, axes = pyplot.subplots()
    results.plot(axes)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["right", "wrong"] and len(axes.get_legend().get_texts()) == 3
    pyplot.close(figure)
