"""Scores with their failures, values that survive a crash, and rows that say what to fix."""
from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hash_embeddings import HashEmbeddings
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from slow_metric import evaluate_slowly

from llmops_ref.core import BadInputError
from llmops_ref.documents import Passage
from llmops_ref.evaluation import (
    CAUSES,
    Evaluation,
    EvaluationFileError,
    NoTestsetError,
    WorstRow,
    evaluate,
    generate_testset,
)
from llmops_ref.evaluation_data import EvaluationDataset, EvaluationRow, RowError
from llmops_ref.metrics import Metric, as_metric
from llmops_ref.scores import Failure, compare

pytest.importorskip("ragas")
ROOT = Path(__file__).parent.parent
asked: Counter[str] = Counter()


def words_metric(name: str = "words", **settings: Any) -> Metric:
    "Counts words of the response, and how often it was asked; some responses make it fail."
    from ragas.metrics import numeric_metric

    def words(response: str) -> float:
        asked[response] += 1
        if "slow" in response:
            time.sleep(5)
        if "boom" in response:
            raise RuntimeError("no judge")
        return math.nan if "nothing" in response else min(len(response.split()) / 10, 2.0 if "far" in response else 1.0)

    return replace(as_metric(numeric_metric(name=name, allowed_values=(0.0, 1.0))(words)), **settings)


def decision(expected: str = "answer", refused: bool = False, **metadata: Any) -> dict[str, Any]:
    return {"expected": expected, "refused": refused, **metadata}


ROWS = (
    EvaluationRow("a", "A?", "one two", "r", ("p",), ("fees.md#x",), reference_context_ids=("fees.md#x",), metadata=decision(kind="lookup")),
    EvaluationRow("b", "B?", "one two three four", "r", ("p",), ("fees.md#y",), reference_context_ids=("fees.md#x",), metadata=decision(kind="table")),
    EvaluationRow("c", "C?", "I cannot answer", "r", ("p",), ("fees.md#x",), reference_context_ids=("fees.md#x",), metadata=decision(refused=True, kind="lookup")),
    EvaluationRow("d", "D?", "I cannot answer", "r", ("p",), metadata=decision("decline", True, kind="none")),
    EvaluationRow("e", "E?", error=RowError("timeout", "TimeoutError: late"), metadata={"expected": "answer", "kind": "lookup"}),
    EvaluationRow("f", "F?", "an invention", "r", ("p",), metadata=decision("decline", False, kind="none")),
)
DATASET = EvaluationDataset(ROWS, "six")


def test_rows_are_scored_counted_or_left_out_by_what_became_of_them() -> None:
    found = evaluate(DATASET, [words_metric(), "correct_decision", "id_based_context_recall"], progress=False)
    assert found.values("words") == {"a": 0.2, "b": 0.4, "c": Failure("refused", "the system declined: no reason given"), "e": Failure("timeout", "TimeoutError: late")}
    assert found.values("correct_decision") == {"a": 1.0, "b": 1.0, "c": 0.0, "d": 1.0, "e": Failure("timeout", "TimeoutError: late"), "f": 0.0}
    assert found.values("id_based_context_recall") == {"a": 1.0, "b": 0.0, "c": 1.0, "e": Failure("timeout", "TimeoutError: late")}
    words = found.scores["words"]
    assert (words.n, words.failures, dict(words.failure_kinds)) == (2, 2, {"refused": 1, "timeout": 1})
    assert words.estimate == pytest.approx(0.3) and words.as_misses is not None and words.as_misses.estimate == pytest.approx(0.15)
    assert "2 " not in found._repr_markdown_().splitlines()[0] and "1 refused, 1 timeout" in found._repr_markdown_()


def test_the_order_of_values_is_that_of_the_rows() -> None:
    rows = tuple(EvaluationRow(f"r{number}", "q", "word " * (number % 7 + 1)) for number in range(40))
    found = evaluate(EvaluationDataset(rows), [words_metric()], workers=8, progress=False)
    assert list(found.values("words")) == [row.id for row in rows]


def test_failures_are_typed_and_none_is_lost() -> None:
    rows = [EvaluationRow(name, "q", f"{name} one") for name in ("fine", "boom", "nothing", "slow")]
    found = evaluate(EvaluationDataset((*rows, EvaluationRow("silent", "q"))), [words_metric()], timeout=1, progress=False)
    kinds = {id: value.kind if isinstance(value, Failure) else "value" for id, value in found.values("words").items()}
    assert kinds == {"fine": "value", "boom": "upstream", "nothing": "not_a_number", "slow": "timeout", "silent": "missing_field"}


def test_what_cannot_be_evaluated_is_refused() -> None:
    bare = EvaluationDataset((EvaluationRow("a", "q", reference="r"),))
    with pytest.raises(BadInputError, match=r"words needs response, which no row has.*run_rag"):
        evaluate(bare, [words_metric()], progress=False)
    with pytest.raises(BadInputError, match="no metrics"):
        evaluate(DATASET, [], progress=False)
    with pytest.raises(BadInputError, match="two metrics named 'words'"):
        evaluate(DATASET, [words_metric(), words_metric()], progress=False)
    with pytest.raises(BadInputError, match="Measured: words"):
        evaluate(DATASET, [words_metric()], progress=False).values("rouge")


# ---- values on disk

def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    asked.clear()
    first = evaluate(DATASET, [words_metric()], cache=tmp_path / "values", progress=False)
    count = asked.total()
    again = evaluate(DATASET, [words_metric()], cache=tmp_path / "values", progress=False)
    assert again.measured == first.measured and asked.total() == count
    changed = EvaluationDataset((replace(ROWS[0], response="other words here"), *ROWS[1:]))
    assert evaluate(changed, [words_metric()], cache=tmp_path / "values", progress=False).values("words")["a"] == 0.3
    assert asked.total() == count + 1
    slower = EvaluationDataset(tuple(replace(row, metadata=row.metadata | {"timings_ms": {"total": 5}}) for row in ROWS))
    evaluate(slower, [words_metric()], cache=tmp_path / "values", progress=False)
    assert asked.total() == count + 1
    evaluate(DATASET, [words_metric(fingerprint="another judge")], cache=tmp_path / "values", progress=False)
    assert asked.total() > count + 1


def test_only_failures_that_may_pass_are_tried_again(tmp_path: Path) -> None:
    dataset = EvaluationDataset(tuple(EvaluationRow(name, "q", f"{name} one") for name in ("boom", "nothing")))
    for retry, expected in ((False, {"boom one": 1, "nothing one": 1}), (False, {"boom one": 2, "nothing one": 1}), (True, {"boom one": 3, "nothing one": 2})):
        if retry is False and expected["boom one"] == 1:
            asked.clear()
        evaluate(dataset, [words_metric()], cache=tmp_path, retry_failures=retry, progress=False)
        assert asked == expected


def test_a_damaged_cache_costs_only_what_is_damaged(tmp_path: Path) -> None:
    first = evaluate(DATASET, [words_metric()], cache=tmp_path, progress=False)
    file = next(tmp_path.glob("*.jsonl"))
    lines = file.read_text().strip().splitlines()
    file.write_text("\n".join([lines[0], '["x", "y"]', "[1]", '["z", NaN]', lines[1][: len(lines[1]) // 2]]))
    asked.clear()
    assert evaluate(DATASET, [words_metric()], cache=tmp_path, progress=False).measured == first.measured
    assert asked.total() == 1
    asked.clear()
    assert evaluate(DATASET, [words_metric()], cache=tmp_path, progress=False).measured == first.measured and not asked


CHILD = """
import sys
sys.path.insert(0, sys.argv[3])
from slow_metric import evaluate_slowly
evaluate_slowly(sys.argv[1], sys.argv[2], hang=True)
"""


def test_killed_while_scoring_and_resumed_is_the_same_evaluation(tmp_path: Path) -> None:
    log = tmp_path / "log"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path / "values"), str(log), str(ROOT / "tests")], env=environment)
    deadline = time.monotonic() + 90
    while not (log.exists() and "word 20\n" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = evaluate_slowly(tmp_path / "values", log)
    counts = Counter(log.read_text().splitlines())
    assert len(counts) == 40 and {name for name, count in counts.items() if count > 1} <= {"word 20"}    # the one in progress
    assert resumed.measured == evaluate_slowly(None, tmp_path / "other log").measured


# ---- saved

def test_a_saved_evaluation_is_read_back_whole(tmp_path: Path) -> None:
    found = evaluate(DATASET, [words_metric(range=(-math.inf, math.inf)), "correct_decision"], progress=False)
    found.save(tmp_path / "one.json")
    read = Evaluation.load(tmp_path / "one.json")
    assert (read.measured, read.metrics, read.dataset, read.scores) == (found.measured, found.metrics, found.dataset, found.scores)
    assert json.loads((tmp_path / "one.json").read_text())["environment"]["versions"]["ragas"]
    assert compare(read, found, "words").difference == 0
    with pytest.raises(BadInputError, match="is a folder"):
        found.save(tmp_path)


def test_a_file_that_is_no_evaluation_is_refused(tmp_path: Path) -> None:
    evaluate(DATASET, [words_metric()], progress=False).save(tmp_path / "one.json")
    plain = json.loads((tmp_path / "one.json").read_text())
    for change in ({"llmops_ref_evaluation": 2}, {"metrics": []}, {"rows": []}, {"values": {}}, {"values": {"words": {"a": "x"}}}, {"judges": {"x": {"y": 1}}}, {"questions_hash": ""}):
        (tmp_path / "two.json").write_text(json.dumps(plain | change))
        with pytest.raises(EvaluationFileError, match=r"two\.json"):
            Evaluation.load(tmp_path / "two.json")
    for content in (b"", b"\xff\xfe", b"[]", (tmp_path / "one.json").read_bytes()[:-40]):
        (tmp_path / "two.json").write_bytes(content)
        with pytest.raises(EvaluationFileError):
            Evaluation.load(tmp_path / "two.json")
    with pytest.raises(EvaluationFileError):
        Evaluation.load(tmp_path / "missing.json")


# ---- what to fix

def many(per_kind: dict[str, float]) -> Evaluation:
    rows = tuple(EvaluationRow(f"{kind}{number}", "word " * (number + 1), f"{int(10 * value)} " + "w " * (int(10 * value) - 1), metadata={"kind": kind, "document": f"{kind}{number % 3}.md"})
                 for kind, value in per_kind.items() for number in range(12))
    return evaluate(EvaluationDataset(rows), [words_metric()], progress=False)


def test_slices_are_corrected_for_their_number_and_the_worst_comes_first() -> None:
    found = many({"table": 0.2, "lookup": 0.9, "other": 0.6})
    kinds = found.slices("kind", "words")
    assert [part.name for part in kinds] == ["table", "other", "lookup"] and all(part.score.level == pytest.approx(1 - 0.05 / 3) for part in kinds)
    assert sum(len(part.rows) for part in kinds) == 36 and "98.3% interval" in kinds._repr_markdown_()
    assert len(found.slices("document", "words")) == 9
    assert {part.name for part in found.slices(lambda row: row.id[0], "words")} == {"t", "l", "o"}
    assert len(found.slices("length", "words")) == 3 and len(found.slices("question length", "words")) == 3
    with pytest.raises(BadInputError, match="No row has 'split'"):
        found.slices("split", "words")


def test_slices_of_one_length_or_of_no_response_do_not_break() -> None:
    found = evaluate(DATASET, [words_metric()], progress=False)
    assert {part.name for part in found.slices("length", "words")} >= {"none"}
    same = EvaluationDataset(tuple(EvaluationRow(str(number), "q", "one word") for number in range(4)))
    assert sum(part.score.n for part in evaluate(same, [words_metric()], progress=False).slices("length", "words")) == 4


def test_the_worst_rows_show_their_passages_and_cannot_change_the_page() -> None:
    found = evaluate(DATASET, [words_metric()], progress=False)
    assert [worst.row.id for worst in found.worst("words", 3)] == ["c", "e", "a"]
    assert [worst.row.id for worst in evaluate(DATASET, [words_metric(higher_is_better=False)], progress=False).worst("words", 4)][2:] == ["b", "a"]
    row = EvaluationRow("x", "<script>alert(1)</script>", "a | b **c**", "r", ("<b>p</b>",), ("fees.md#x",), reference_context_ids=("fees.md#x",))
    shown = WorstRow(row, "words", 0.1)._repr_markdown_()
    assert "<script>" not in shown and "<b>" not in shown and "holds the evidence" in shown and "**c**" not in shown


def test_every_row_has_one_cause() -> None:
    def row(id: str, found: bool, refused: bool = False, expected: str = "answer", response: str = "right " * 9) -> EvaluationRow:
        return EvaluationRow(id, "q", response, "r", ("p",), ("d#x" if found else "d#y",), reference_context_ids=("d#x",), metadata=decision(expected, refused))

    rows = (
        row("right", True), row("right by luck", False), row("wrong, found", True, response="no"), row("wrong, missed", False, response="no"),
        row("declined, found", True, True), row("declined, missed", False, True), row("declined rightly", True, True, "decline"),
        row("invented", True, False, "decline"), row("no value", True, response="nothing"), EvaluationRow("failed", "q", error=RowError("upstream", "x")),
    )
    found = evaluate(EvaluationDataset(rows), [words_metric(), "id_based_context_recall"], progress=False).attribution(right={"words": 0.5})
    assert list(found.causes.values()) == [
        "right", "right", "wrong, evidence found", "wrong, evidence missed", "declined, evidence found", "declined, evidence missed", "rightly declined",
        "answered, should decline", "not known", "failed",
    ]
    assert set(found.causes.values()) == set(CAUSES) and sum(found.counts.values()) == 10 and found.rows("failed") == ["failed"]
    assert {stage: one.estimate for stage, one in found.stages.items()} == {"retrieval": 0.2, "generation": 0.1, "decision": 0.2, "system": 0.1}
    assert json.loads(json.dumps(found.to_dict()))["counts"]["right"] == 2 and "the stage to fix" in found._repr_markdown_()
    with pytest.raises(BadInputError, match="evidence was found"):
        evaluate(EvaluationDataset(rows), [words_metric()], progress=False).attribution()


# ---- test sets

class Filler(BaseChatModel):
    "Fills in any form that RAGAS sends."

    model_name: str = "filler"
    said: str = "fee"
    count: int = 0

    @property
    def _llm_type(self) -> str:
        return "filler"

    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **wishes: Any) -> ChatResult:
        text = str(messages[-1].content)
        schema, _ = json.JSONDecoder().raw_decode(text[text.index("{", text.index("schema")):])
        self.count += 1

        def fill(part: dict[str, Any], name: str = "") -> Any:
            if "$ref" in part:
                return fill(schema["$defs"][part["$ref"].rpartition("/")[2]], name)
            if part.get("type") == "object":
                return {key: fill(value, key) for key, value in part["properties"].items()} if part.get("properties") else {"Customer": ["fee"], "New employee": ["fee"]}
            if part.get("type") == "array":
                return [fill(part["items"], name)]
            return 5 if part.get("type") == "integer" else f"{name} {self.count}" if name in ("query", "answer") else self.said

        return ChatResult(generations=[ChatGeneration(message=AIMessage(json.dumps(fill(schema))))])


PASSAGES = [Passage(f"The fee of account {number} is {number} pounds a month, taken on the first working day. " * 6, "fees.md", None, f"Fees > Account {number}", 0.9, f"c{number}") for number in range(4)]


@pytest.mark.filterwarnings("ignore")
def test_ragas_writes_a_test_set_with_the_ids_of_its_passages(tmp_path: Path) -> None:
    found = generate_testset(PASSAGES, Filler(), 4, embeddings=HashEmbeddings())
    assert len(found) >= 2 and {row.metadata["written_by"] for row in found} == {"filler"}
    for row in found:
        assert row.reference and row.reference_context_ids and all(re.fullmatch(r"fees\.md#account-[0-3]", id) for id in row.reference_context_ids)
        assert set(row.reference_contexts or ()) <= {item.text for item in PASSAGES}
    found.to_jsonl(tmp_path / "set.jsonl")
    assert EvaluationDataset.from_jsonl(tmp_path / "set.jsonl").rows == found.rows


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_cannot_write_a_test_set_is_named() -> None:
    class Babbler(Filler):
        model_name: str = "babbler"

        def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **wishes: Any) -> ChatResult:
            return ChatResult(generations=[ChatGeneration(message=AIMessage("Sure! Here is"))])

    with pytest.raises(NoTestsetError, match="babbler gave no test set"):
        generate_testset(PASSAGES, Babbler(), 4, embeddings=HashEmbeddings())
    with pytest.raises(NoTestsetError, match="too small"):
        generate_testset(PASSAGES, Filler(model_name="SmolLM2-135M-Instruct"), 4, embeddings=HashEmbeddings())
    with pytest.raises(BadInputError, match="0 passages"):
        generate_testset([], Filler(), 4)


# ---- one place for all names

def test_the_names_of_the_parts_are_the_same_objects_here() -> None:
    import llmops_ref.evaluation as here
    from llmops_ref import (
        corrected_estimates,
        evaluation_data,
        groundedness,
        judge_bench,
        judges,
        metrics,
        release_gate,
        reports,
        scores,
    )

    names = {
        evaluation_data: "EvaluationDataset EvaluationRow RowError DatasetFormatError Claim LabelledClaim Judge load_labelled run_rag RunFileError RunLockedError",
        scores: "Score Failure score Comparison compare compare_all", corrected_estimates: "rogan_gladen ppi_mean label_curve", groundedness: "Groundedness",
        judges: "calibrate JudgeCard JudgeCardError JudgeIdentity identity ChatJudge LabellingWidget", judge_bench: "bench_judge",
        metrics: "METRICS Metric load_metrics as_metric as_judge LangChainJudge measure", release_gate: "Gate GateResult Check JudgeRule GateFileError", reports: "write_report",
    }
    for module, listed in names.items():
        for name in listed.split():
            assert getattr(here, name) is getattr(module, name) and name in here.__all__, name
