"""Data sets that are checked line by line, and runs that a crash cannot break."""
from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_system import Fake, questions
from hypothesis import given, settings
from hypothesis import strategies as st

from llmops_ref import evaluation_data
from llmops_ref.access import ALL_GROUPS
from llmops_ref.core import BadInputError, LlmopsRefError
from llmops_ref.evaluation_data import (
    Claim,
    DatasetFormatError,
    EvaluationDataset,
    EvaluationRow,
    RowError,
    RunFileError,
    RunLockedError,
    load_labelled,
    rag_settings,
    run_rag,
)

ROOT = Path(__file__).parent.parent
HANDBOOK = ROOT / "llmops_ref" / "data" / "questions.jsonl"


def write(folder: Path, *lines: str | bytes, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


# ---- reading

def test_the_handbook_loads_with_its_kinds_groups_and_documents() -> None:
    dataset = EvaluationDataset.from_jsonl(HANDBOOK, needs=("reference",))
    assert len(dataset) == 180 and len(dataset.where(split="test")) == 90
    row = dataset["q001"]
    assert row.metadata["kind"] == "lookup" and row.metadata["groups"] == ["everyone"]
    assert row.document == "current-accounts-guide.md"
    assert dataset["q122"].document == "q122"    # no evidence: it shares its luck with nobody


GOOD = '{"id": "a", "user_input": "What?", "reference": "That."}'
BROKEN = [
    ('{"id": "b"}', "user_input", "missing"),
    ('{"id": "b", "user_input": null}', "user_input", "missing"),
    ('{"id": "b", "user_input": 7}', "user_input", "a number"),
    ('{"id": "b", "user_input": "  "}', "user_input", "empty"),
    ('{"id": "", "user_input": "q"}', "id", "empty"),
    ('{"id": true, "user_input": "q"}', "id", "true or false"),
    ('{"user_input": "q"}', "id", "some rows"),
    ('{"id": "a", "user_input": "q"}', "id", "line 2"),
    ('{"id": "b", "user_input": "q", "response": ["x"]}', "response", "a list"),
    ('{"id": "b", "user_input": "q", "response": NaN}', "response", "NaN"),
    ('{"id": "b", "user_input": "q", "retrieved_contexts": "x"}', "retrieved_contexts", "a text"),
    ('{"id": "b", "user_input": "q", "retrieved_contexts": ["x", 3]}', "retrieved_contexts[1]", "a number"),
    ('{"id": "b", "user_input": "q", "retrieved_context_ids": [1, 2.5]}', "retrieved_context_ids[1]", "a number"),
    ('{"id": "b", "user_input": "q", "reference_contexts": {"a": 1}}', "reference_contexts", "an object"),
    ('{"id": "b", "user_input": "q", "metadata": [1]}', "metadata", "a list"),
    ('{"id": "b", "user_input": "q", "metadata": {"scores": [{"x": Infinity}]}}', "metadata.scores[0].x", "infinite"),
    ('{"id": "b", "user_input": "q", "weight": 1e999}', "metadata.weight", "infinite"),
    ('{"id": "b", "user_input": "q", "groups": "staff"}', "metadata.groups", "a text"),
    ('{"id": "b", "user_input": "q", "groups": ["staff", 1]}', "metadata.groups[1]", "a number"),
    ('{"id": "b", "user_input": "q", "expected": "refuse"}', "metadata.expected", "refuse"),
    ('{"id": "b", "user_input": "q", "metadata": {"refused": "yes"}}', "metadata.refused", "a text"),
    ('{"id": "b", "user_input": "q", "kind": "x", "metadata": {"kind": "y"}}', "kind", "metadata"),
    ('{"id": "b", "user_input": "q", "refrence": "x"}', "refrence", "reference"),
    ('{"id": "b", "question": "q"}', "question", "user_input"),
    ('{"id": "b", "user_input": "q", "ground_truth": "x"}', "ground_truth", "reference"),
    ('{"id": "b", "user_input": "q", "user_input": "r"}', "user_input", "twice"),
    ('{"id": "b", "user_input": "q\\ud800"}', "user_input", "surrogate"),
    ('{"id": "b", "user_input": "q", "error": {"kind": "tired", "message": "x"}}', "error", "kind"),
    ('{"id": "b", "user_input": []}', "user_input", "without messages"),
    ('{"id": "b", "user_input": ["hello"]}', "user_input[0]", "a text"),
    ('{"id": "b", "user_input": [{"type": "robot", "content": "x"}]}', "user_input[0].type", "robot"),
    ('{"id": "b", "user_input": [{"type": "ai", "content": "", "tool_calls": [{"name": "f", "args": 1}]}]}', "user_input[0].tool_calls[0].args", "a number"),
    ('{"id": "b", "user_input": "q", "reference_tool_calls": [{"args": {}}]}', "reference_tool_calls[0].name", "null"),
    ('["id"]', "", "a list"),
    ("7", "", "a number"),
    ('{"id": "b", "user_input": "q"', "", "not JSON"),
    ("[" * 100_000, "", "not usable JSON"),
    ('{"id": "b", "user_input": "q", "deep": ' + "[" * 300 + "]" * 300 + "}", "metadata.deep" + "[0]" * 29, "nested"),
    ('{"id": "b", "user_input": "q", "n": ' + "9" * 5000 + "}", "", "not usable JSON"),
    (b'{"id": "b", "user_input": "caf\xe9"}', "", "not UTF-8"),
]


@pytest.mark.parametrize(("line", "field", "said"), BROKEN, ids=[str(number) for number in range(len(BROKEN))])
def test_a_broken_row_names_file_line_and_field(tmp_path: Path, line: str | bytes, field: str, said: str) -> None:
    path = write(tmp_path, "", GOOD, "   ", line)
    before = path.read_bytes()
    with pytest.raises(DatasetFormatError) as caught:
        EvaluationDataset.from_jsonl(path)
    error = caught.value
    assert (error.file, error.line, error.field) == ("data.jsonl", 4, field)
    assert "data.jsonl, line 4" in str(error) and said in str(error) and error.remedy
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["data.jsonl"]
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.line, again.field) == (str(error), 4, field)


def test_a_row_of_50_megabytes_is_refused_before_it_is_read_whole(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD, b'{"id": "b", "user_input": "' + b"x" * 50_000_000 + b'"}')
    with pytest.raises(DatasetFormatError, match=r"data\.jsonl, line 2: it is longer than 10,000,000 bytes"):
        EvaluationDataset.from_jsonl(path)


@pytest.mark.parametrize("lines", [[], ["", "  "], [b"\xef\xbb\xbf"]], ids=["empty", "blank", "only a mark"])
def test_a_file_without_rows_is_refused(tmp_path: Path, lines: list[str]) -> None:
    with pytest.raises(DatasetFormatError, match="no rows"):
        EvaluationDataset.from_jsonl(write(tmp_path, *lines))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.jsonl"):
        with pytest.raises(DatasetFormatError, match="cannot be read"):
            EvaluationDataset.from_jsonl(path)


def test_utf_16_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetFormatError, match="UTF-16"):
        EvaluationDataset.from_jsonl(write(tmp_path, GOOD.encode("utf-16")))


def test_windows_files_and_line_separators_inside_texts_are_read(tmp_path: Path) -> None:
    path = write(tmp_path, b"\xef\xbb\xbf" + GOOD.encode() + b"\r", '{"id": "b", "user_input": "one\u2028two\x85three"}')
    dataset = EvaluationDataset.from_jsonl(path)
    assert [row.id for row in dataset] == ["a", "b"] and dataset["b"].user_input == "one\u2028two\x85three"


def test_fields_that_a_metric_needs_are_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD, '{"id": "b", "user_input": "q"}')
    with pytest.raises(DatasetFormatError, match="line 2, field 'reference': it is missing"):
        EvaluationDataset.from_jsonl(path, needs=("reference",))


def test_rows_without_ids_get_ids_that_stay_when_rows_move(tmp_path: Path) -> None:
    lines = [json.dumps({"user_input": text}) for text in ("one", "two", "three")]
    first, second = (EvaluationDataset.from_jsonl(write(tmp_path, *part)) for part in (lines, lines[::-1]))
    assert {row.id: row.user_input for row in first} == {row.id: row.user_input for row in second}
    with pytest.raises(DatasetFormatError, match="line 4, field 'id': line 1 asks the same"):
        EvaluationDataset.from_jsonl(write(tmp_path, *lines, lines[0]))


# ---- rows and data sets

TEXT = st.text(st.characters(codec="utf-8"), max_size=30)
JSON = st.recursive(st.none() | st.booleans() | st.integers(-10**9, 10**9) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8)
ROWS = st.builds(
    EvaluationRow, id=TEXT.filter(lambda text: bool(text.strip())), user_input=TEXT.filter(lambda text: bool(text.strip())),
    response=st.none() | TEXT, reference=st.none() | TEXT,
    retrieved_contexts=st.none() | st.lists(TEXT, max_size=3), retrieved_context_ids=st.none() | st.lists(TEXT | st.integers(), max_size=3),
    error=st.none() | st.builds(RowError, kind=st.sampled_from(["timeout", "upstream"]), message=TEXT),
    metadata=st.dictionaries(TEXT.filter(lambda name: name not in ("kind", "split", "document", "groups", "expected", "refused", "declined_because")), JSON, max_size=3),
)


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(ROWS, min_size=1, max_size=4, unique_by=lambda row: row.id))
def test_what_is_written_is_read_back(rows: list[EvaluationRow], tmp_path_factory: pytest.TempPathFactory) -> None:
    dataset = EvaluationDataset(tuple(rows))
    path = tmp_path_factory.mktemp("roundtrip") / "rows.jsonl"
    dataset.to_jsonl(path)
    read = EvaluationDataset.from_jsonl(path)
    assert read.rows == dataset.rows and read.data_hash == dataset.data_hash


def test_nothing_is_written_over_unless_asked(tmp_path: Path) -> None:
    dataset, path = EvaluationDataset((EvaluationRow("a", "q"),)), write(tmp_path, "precious")
    with pytest.raises(BadInputError, match="already"):
        dataset.to_jsonl(path)
    assert path.read_text() == "precious"
    dataset.to_jsonl(path, overwrite=True)
    assert EvaluationDataset.from_jsonl(path).rows == dataset.rows


def test_hashes_see_what_they_should() -> None:
    row = EvaluationRow("a", "q", reference="r", metadata={"kind": "lookup"})
    base = EvaluationDataset((row,))
    answered = EvaluationDataset((replace(row, response="x", retrieved_contexts=("p",), metadata={"kind": "lookup", "refused": False, "timings_ms": {"total": 3}}),))
    slower = EvaluationDataset((replace(answered.rows[0], metadata={"kind": "lookup", "refused": False, "timings_ms": {"total": 9}}),))
    assert base.questions_hash == answered.questions_hash and base.data_hash != answered.data_hash == slower.data_hash
    assert EvaluationDataset((replace(row, reference="s"),)).questions_hash != base.questions_hash


def test_a_data_set_refuses_no_rows_two_of_one_id_and_unknown_ids() -> None:
    with pytest.raises(DatasetFormatError, match="no rows"):
        EvaluationDataset(())
    with pytest.raises(DatasetFormatError, match="twice"):
        EvaluationDataset((EvaluationRow("a", "q"), EvaluationRow("a", "r")))
    with pytest.raises(DatasetFormatError):
        EvaluationDataset((EvaluationRow("a", "q"),)).where(split="test")
    with pytest.raises(BadInputError, match="no row 'b'"):
        EvaluationDataset((EvaluationRow("a", "q"),))["b"]


def test_pandas_and_datasets_give_the_same_rows(tmp_path: Path) -> None:
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    dataset = EvaluationDataset.from_jsonl(HANDBOOK).where(split="dev")
    assert EvaluationDataset.from_pandas(dataset.to_pandas()).rows == dataset.rows
    plain = [{"user_input": row.user_input, "id": row.id, "reference_contexts": list(row.reference_contexts or ())} for row in dataset]
    loaded = EvaluationDataset.from_datasets(datasets.Dataset.from_list(plain))
    assert [row.reference_contexts for row in loaded] == [row.reference_contexts for row in dataset]
    with pytest.raises(DatasetFormatError, match=r"dataset\['train'\]"):
        EvaluationDataset.from_datasets(datasets.DatasetDict(train=datasets.Dataset.from_list(plain)))
    frame = pandas.DataFrame({"id": [1, 2], "user_input": ["q", None], "response": [float("nan"), "x"]})
    with pytest.raises(DatasetFormatError, match="answers, line 2, field 'user_input'"):
        EvaluationDataset.from_pandas(frame, name="answers")
    assert EvaluationDataset.from_pandas(frame[:1]).rows == (EvaluationRow("1", "q"),)


def test_ragas_gets_every_field() -> None:
    pytest.importorskip("ragas")
    row = EvaluationRow("a", "q", response="x", reference="r", retrieved_contexts=("p",), retrieved_context_ids=("1",), metadata={"kind": "k", "rubrics": {"score1": "bad"}})
    sample = EvaluationDataset((row,)).to_ragas()[0]
    assert sample.rubrics == {"score1": "bad"}
    assert (sample.user_input, sample.response, sample.retrieved_contexts, sample.retrieved_context_ids) == ("q", "x", ["p"], ["1"])
    talk = [{"type": "human", "content": "2+2?"}, {"type": "ai", "content": "", "tool_calls": [{"name": "add", "args": {"a": 2}}]}]
    agent = EvaluationRow("b", talk, reference_tool_calls=({"name": "add", "args": {"a": 2}},))
    sample = EvaluationDataset((agent,)).to_ragas()[0]
    assert sample.user_input[1].tool_calls[0].name == "add" == sample.reference_tool_calls[0].name
    with pytest.raises(BadInputError, match="one kind"):
        EvaluationDataset((row, agent)).to_ragas()


def test_runs_of_langchain_become_rows() -> None:
    from langchain_core.documents import Document
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
    from langchain_core.retrievers import BaseRetriever
    from langchain_core.runnables import RunnableLambda
    from langchain_core.tracers.context import collect_runs

    class Fixed(BaseRetriever):
        def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
            return [Document(page_content="Fees are £8.", metadata={"source": "fees.md"})]

    def answer(question: str) -> AIMessage:
        if "boom" in question:
            raise RuntimeError("no model")
        return AIMessage(f"{Fixed().invoke(question)[0].page_content} Yes.")

    def agent(state: dict[str, Any]) -> dict[str, Any]:
        call = {"name": "add", "args": {"a": 2}, "id": "1"}
        return {"messages": [SystemMessage("Add."), *state["messages"], AIMessage("", tool_calls=[call]), ToolMessage("4", tool_call_id="1"), AIMessage("4")]}

    with collect_runs() as collected:
        RunnableLambda(answer).invoke("What are the fees?", config={"metadata": {"kind": "lookup"}})
        with pytest.raises(RuntimeError):
            RunnableLambda(answer).invoke("boom?")
        RunnableLambda(agent).invoke({"messages": [HumanMessage("2+2?")]})
    first, failed, talk = EvaluationDataset.from_langchain(collected.traced_runs, references={"What are the fees?": "£8"})
    assert (first.user_input, first.response, first.reference) == ("What are the fees?", "Fees are £8. Yes.", "£8")
    assert (first.retrieved_contexts, first.retrieved_context_ids, first.metadata) == (("Fees are £8.",), ("fees.md",), {"kind": "lookup"})
    assert failed.error is not None and "no model" in failed.error.message and failed.response is None
    assert [message["type"] for message in talk.user_input] == ["human", "ai", "tool", "ai"] and talk.response == "4"
    with pytest.raises(DatasetFormatError, match="line 1, field 'inputs'"):
        EvaluationDataset.from_langchain([{"id": "x", "inputs": {"a": 1, "b": 2}, "outputs": {"output": "y"}}])


# ---- labels

def test_both_schemas_of_labels_are_read(tmp_path: Path) -> None:
    path = write(tmp_path, '{"id": 5, "reference": "R", "sentences": ["a", "b", "c"], "labels": ["accurate", "minor_inaccurate", 1], "samples": ["x"]}',
                 '{"id": "w", "text": "t", "passages": ["p", "q"], "question": "?", "label": false, "cluster": "doc", "annotator": "kim"}')
    found = load_labelled(path)
    assert [(item.id, item.label, item.cluster) for item in found] == [("5#0", True, "5"), ("5#1", False, "5"), ("5#2", True, "5"), ("w", False, "doc")]
    assert found[0].claim == Claim("a", ("R",)) and found[3].claim == Claim("t", ("p", "q"), "?") and found[3].annotator == "kim"
    assert found[0].samples == ("x",) and found[3].samples == ()


@pytest.mark.parametrize(("line", "field"), [
    ('{"id": "a", "reference": "R", "sentences": ["a"], "labels": ["maybe"]}', "labels[0]"),
    ('{"id": "a", "reference": "R", "sentences": ["a", "b"], "labels": ["accurate"]}', "labels"),
    ('{"id": "a", "reference": "R", "labels": ["accurate"]}', "sentences"),
    ('{"id": "a", "reference": 3, "sentences": ["a"], "labels": [1]}', "reference"),
    ('{"id": "a", "text": "t", "passages": "p", "label": 1}', "passages"),
    ('{"id": "a", "text": "t", "passages": ["p"], "label": 0.5}', "label"),
    ('{"id": "good", "text": "t", "passages": ["p"], "label": 1}', "id"),
    ("[]", ""),
])
def test_a_bad_label_names_line_and_field(tmp_path: Path, line: str, field: str) -> None:
    with pytest.raises(DatasetFormatError) as caught:
        load_labelled(write(tmp_path, '{"id": "good", "text": "t", "passages": ["p"], "label": 1}', line))
    assert (caught.value.line, caught.value.field) == (2, field)
    with pytest.raises(DatasetFormatError, match="no claims"):
        load_labelled(write(tmp_path, ""))


# ---- runs

def test_a_run_keeps_order_passages_and_errors() -> None:
    dataset = EvaluationDataset((*questions(3).rows, EvaluationRow("bad", "fail please"), EvaluationRow("no", "decline me", metadata={"expected": "decline"})))
    found = run_rag(Fake(), dataset, workers=4, progress=False)
    assert [row.id for row in found] == [row.id for row in dataset]
    assert found["r1"].response == "re: question 1" and found["r1"].retrieved_context_ids == ("fees.md#late-payments",)
    assert found["r1"].retrieved_contexts == ("a | b\nFees are £8.",)
    assert found["bad"].error == RowError("upstream", "RuntimeError: the model is down") and found["bad"].response is None
    assert found["no"].metadata["refused"] is True and found["no"].metadata["expected"] == "decline"
    assert found.settings["system"] == "Fake" and found.settings["k"] == 4 and found.questions_hash == dataset.questions_hash


def test_groups_of_a_row_go_before_those_of_the_run() -> None:
    rag = Fake()
    rows = (EvaluationRow("a", "one", metadata={"groups": ["staff"]}), EvaluationRow("b", "two"), EvaluationRow("c", "three", metadata={"groups": []}))
    run_rag(rag, EvaluationDataset(rows), groups=["risk"], progress=False)
    assert dict(rag.asked) == {"one": ["staff"], "two": ["everyone", "risk"], "three": []}
    rag.asked.clear()
    run_rag(rag, EvaluationDataset(rows[1:2]), progress=False)
    run_rag(rag, EvaluationDataset(rows[1:2]), groups=ALL_GROUPS, progress=False)
    assert [given for _, given in rag.asked] == [None, ALL_GROUPS]


def test_a_row_that_hangs_is_an_error_and_holds_up_nobody() -> None:
    dataset = EvaluationDataset((EvaluationRow("h", "hang"), *questions(6).rows))
    began = time.monotonic()
    found = run_rag(Fake(), dataset, workers=1, timeout=0.3, progress=False)
    assert time.monotonic() - began < 15
    assert found["h"].error == RowError("timeout", "TimeoutError: no answer within 0.3 s")
    assert all(row.error is None for row in found.rows[1:])


def test_rows_run_at_the_same_time() -> None:
    together = threading.Barrier(3, timeout=20)

    class Meeting(Fake):
        def ask(self, question: str, **wishes: Any) -> SimpleNamespace:
            together.wait()
            return super().ask(question, **wishes)

    assert all(row.error is None for row in run_rag(Meeting(), questions(6), workers=3, progress=False))


def test_a_finished_run_asks_nothing_and_is_read_as_a_data_set(tmp_path: Path) -> None:
    out, dataset = tmp_path / "new" / "run.jsonl", questions(5)
    first = run_rag(Fake(), dataset, out=out, workers=3, progress=False)
    again = Fake()
    second = run_rag(again, dataset, out=out, progress=False)
    assert not again.asked and second.rows == first.rows
    read = EvaluationDataset.from_jsonl(out)
    assert read.rows == first.rows and read.settings == first.settings and read.name == "small"


def test_errors_are_asked_again_only_where_wanted(tmp_path: Path) -> None:
    out, dataset = tmp_path / "run.jsonl", questions(2, "fail")
    assert all(row.error for row in run_rag(Fake(), dataset, out=out, progress=False))
    rag = Fake()
    run_rag(rag, dataset, out=out, progress=False)
    assert not rag.asked

    class Healed(Fake):
        def ask(self, question: str, **wishes: Any) -> SimpleNamespace:
            return super().ask(question.replace("fail", "work"), **wishes)

    Healed.__name__ = Healed.__qualname__ = "Fake"
    assert not any(row.error for row in run_rag(Healed(), dataset, out=out, retry_errors=True, progress=False))
    assert len(out.read_text().splitlines()) == 3 and not any(row.error for row in EvaluationDataset.from_jsonl(out))


CHILD = """
import os, sys, time
sys.path.insert(0, sys.argv[3])
from fake_system import Fake, questions
from llmops_ref.evaluation_data import run_rag

class Logged(Fake):
    def ask(self, question, **wishes):
        answer = super().ask(question, **wishes)
        with open(sys.argv[2], "a") as log:
            log.write(question + "\\n")
        if os.path.getsize(sys.argv[2]) > 200 and sys.argv[4] == "kill":
            time.sleep(30)
        return answer
Logged.__qualname__ = Logged.__name__ = "Fake"
run_rag(Logged(0.01), questions(40), out=sys.argv[1], workers=2, progress=False)
"""


def child(out: Path, log: Path, mode: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", CHILD, str(out), str(log), str(ROOT / "tests"), mode], env=environment)


def test_killed_half_way_and_resumed_is_the_same_run(tmp_path: Path) -> None:
    out, log = tmp_path / "run.jsonl", tmp_path / "asked.txt"
    process = child(out, log, "kill")
    deadline = time.monotonic() + 60
    while not (log.exists() and log.stat().st_size > 200) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    recorded = [json.loads(line)["user_input"] for line in out.read_text().splitlines()[1:]]
    assert 0 < len(recorded) < 40
    with pytest.raises(DatasetFormatError, match=f"stopped after {len(recorded)} of 40 rows"):
        EvaluationDataset.from_jsonl(out)
    rag = Fake()
    resumed = run_rag(rag, questions(40), out=out, progress=False)
    assert sorted([*recorded, *(question for question, _ in rag.asked)]) == sorted(row.question for row in questions(40))
    assert resumed.data_hash == run_rag(Fake(), questions(40), progress=False).data_hash
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()[1:]] == [row.id for row in questions(40)]


@pytest.mark.parametrize("cut", [1, 2, 40, 150])
def test_a_torn_last_line_is_repaired(tmp_path: Path, cut: int) -> None:
    out, dataset = tmp_path / "run.jsonl", questions(4)
    whole = run_rag(Fake(), dataset, out=out, workers=1, progress=False)
    out.write_bytes(out.read_bytes()[:-cut])
    rag = Fake()
    assert run_rag(rag, dataset, out=out, progress=False).data_hash == whole.data_hash
    assert len(rag.asked) == (0 if cut == 1 else 1)    # only the line feed was missing: the row is there
    assert len(out.read_bytes().splitlines()) == 5


def test_damage_in_the_middle_is_named_and_left(tmp_path: Path) -> None:
    out, dataset = tmp_path / "run.jsonl", questions(4)
    run_rag(Fake(), dataset, out=out, progress=False)
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join([*lines[:2], b'{"id": "r1"\n', *lines[3:]]))
    before = out.read_bytes()
    with pytest.raises(RunFileError, match=r"run\.jsonl, line 3"):
        run_rag(Fake(), dataset, out=out, progress=False)
    assert out.read_bytes() == before


def test_another_run_is_refused_and_left(tmp_path: Path) -> None:
    out = tmp_path / "run.jsonl"
    run_rag(Fake(), questions(2), out=out, progress=False)
    before = out.read_bytes()
    for rag, dataset, wishes, said in [
        (Fake(), questions(3), {}, "questions was"), (Fake(k=8), questions(2), {}, "k was 4, now 8"),
        (Fake(), questions(2), {"groups": ["staff"]}, "groups was None, now"),
    ]:
        with pytest.raises(RunFileError, match=said):
            run_rag(rag, dataset, out=out, progress=False, **wishes)
    assert out.read_bytes() == before
    with pytest.raises(RunFileError, match="is a folder"):
        run_rag(Fake(), questions(2), out=tmp_path, progress=False)
    for content in ("", "notes of mine\n", GOOD + "\n", "[1]\n"):
        (tmp_path / "mine.txt").write_text(content)
        with pytest.raises(RunFileError):
            run_rag(Fake(), questions(2), out=tmp_path / "mine.txt", progress=False)
        assert (tmp_path / "mine.txt").read_text() == content


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    out, log = tmp_path / "run.jsonl", tmp_path / "asked.txt"
    process = child(out, log, "kill")
    try:
        deadline = time.monotonic() + 60
        while not (log.exists() and log.stat().st_size > 200) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)
        before = out.read_bytes()
        with pytest.raises(RunLockedError, match=r"run\.jsonl"):
            run_rag(Fake(), questions(40), out=out, progress=False)
        assert out.read_bytes() == before
    finally:
        process.kill()
        process.wait()
    assert len(run_rag(Fake(), questions(40), out=out, progress=False)) == 40


INTERRUPTED = """
import signal, sys, threading, time
sys.path.insert(0, sys.argv[2])
from fake_system import Fake, questions
from llmops_ref.evaluation_data import run_rag
rag = Fake(0.2)
signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background job inherits that it is ignored
threading.Timer(0.5, lambda: signal.raise_signal(signal.SIGINT)).start()
try:
    run_rag(rag, questions(400), out=sys.argv[1], workers=2, progress=False)
except KeyboardInterrupt:
    print(len(rag.asked), len(open(sys.argv[1]).readlines()) - 1)
"""


def test_an_interrupt_loses_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, str(tmp_path / "run.jsonl"), str(ROOT / "tests")], env=environment, capture_output=True, text=True)
    asked, recorded = map(int, done.stdout.split())
    assert 0 < asked == recorded < 400


def test_a_full_disk_is_raised_and_the_run_goes_on_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, real, calls = tmp_path / "run.jsonl", os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) > 4:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(evaluation_data.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        run_rag(Fake(), questions(6), out=out, workers=1, progress=False)
    monkeypatch.undo()
    rag = Fake()
    assert len(run_rag(rag, questions(6), out=out, progress=False)) == 6 and len(rag.asked) < 6


@pytest.mark.parametrize("wishes", [{"workers": 0}, {"workers": True}, {"timeout": 0}, {"timeout": float("nan")}, {"timeout": "1"}, {"groups": "staff"}])
def test_wrong_wishes_are_refused(wishes: dict[str, Any]) -> None:
    with pytest.raises(LlmopsRefError):
        run_rag(Fake(), questions(1), progress=False, **wishes)


def test_an_answer_that_is_none_is_the_rows_error() -> None:
    rag = SimpleNamespace(ask=lambda question, **wishes: "just a text")
    found = run_rag(rag, questions(2), progress=False)
    assert all(row.error is not None and "AttributeError" in row.error.message for row in found)


def test_settings_of_a_rag_tell_models_parameters_and_documents_apart(tmp_path: Path) -> None:
    from hash_embeddings import HashEmbeddings
    from langchain_core.language_models import FakeListChatModel

    from llmops_ref.knowledge_base import KnowledgeBase
    from llmops_ref.rag import RAG
    from llmops_ref.retrieval import Retrieval

    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "fees.md").write_text("# Fees\n\nThe fee is £8.")
    found = []
    for name in ("one", "two"):
        base = KnowledgeBase.open(tmp_path / name, HashEmbeddings())
        base.ingest([documents], progress=False)
        found.append(rag_settings(RAG(base, FakeListChatModel(responses=["It is £8."]))))
    assert found[0] == found[1] and json.loads(json.dumps(found[0])) == found[0]
    rag = RAG(base, FakeListChatModel(responses=["x"]), retrieval=Retrieval(dense_weight=1.0))
    assert rag_settings(rag)["retrieval"] != rag_settings(RAG(base, FakeListChatModel(responses=["x"]), retrieval=Retrieval()))["retrieval"]
    (documents / "fees.md").write_text("# Fees\n\nThe fee is £9.")
    base.ingest([documents], progress=False)
    assert rag_settings(RAG(base, FakeListChatModel(responses=["x"])))["index"] != found[0]["index"]
    answered = run_rag(RAG(base, FakeListChatModel(responses=["The fee is £9."]), decline=None), EvaluationDataset((EvaluationRow("a", "What is the fee?"),)), progress=False)
    assert answered["a"].error is None and answered["a"].retrieved_context_ids == ("fees.md#fees",)
