"""llmops_ref.metrics: RAGAS' numbers where RAGAS gives one, a typed failure everywhere else, and judges that may misbehave."""

from __future__ import annotations

import asyncio
import importlib
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hash_embeddings import HashEmbeddings
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from judge_server import JudgeServer
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableLambda
from pydantic import BaseModel

from llmops_ref.core import BadInputError
from llmops_ref.evaluation_data import Claim, EvaluationRow, RowError
from llmops_ref.metrics import (
    METRICS,
    CallCache,
    JudgeCallError,
    LangChainJudge,
    Metric,
    RagasEmbeddings,
    as_judge,
    as_metric,
    chat_identity,
    failure_of,
    judge_trial,
    load_metrics,
    measure,
)
from llmops_ref.models import load_chat_model
from llmops_ref.scores import Failure, Value

WITHOUT = [name for name, spec in METRICS.items() if not spec.judge and spec.source != "llmops-ref"]
WITH_CHAT = [name for name, spec in METRICS.items() if spec.judge == "chat model"]
CALLS = ({"name": "pay", "args": {"amount": 5, "to": {"iban": "GB1"}}}, {"name": "tell", "args": {}})
SAID = [
    {"type": "human", "content": "Pay £5."},
    {"type": "ai", "content": "", "tool_calls": [{"name": "pay", "args": {"amount": 5, "to": {"iban": "GB1"}}}]},
    {"type": "tool", "content": "done"},
    {"type": "ai", "content": "Paid."},
]


def row(id: str, **fields: Any) -> EvaluationRow:
    return EvaluationRow(id, fields.pop("user_input", "What is the late fee?"), **fields)


ROWS = [
    row(
        "plain", response="The late fee is £25. It is charged once.", reference="The late fee is £25.",
        retrieved_contexts=("The late fee is £25 a month.", "Cards are free."), reference_contexts=("The late fee is £25.",),
        retrieved_context_ids=("a#1", "b#1"), reference_context_ids=("a#1", "c#1"),
    ),
    row(
        "unicode", user_input="¿Cuánto? 日本 🙂", response="Gebühr: 5 € – ‘não’ \u202e", reference="Gebühr: 5 € – não", retrieved_contexts=("日本語 🙂", "5 €"),
        reference_contexts=("日本語",), retrieved_context_ids=("é",), reference_context_ids=("é",),
    ),
    row(
        "empty", response="", reference="", retrieved_contexts=(), reference_contexts=(), retrieved_context_ids=(), reference_context_ids=(),
        reference_tool_calls=(),
    ),
    row("nothing found", response="I do not know.", reference="£25.", retrieved_contexts=(), reference_contexts=("x",), retrieved_context_ids=(), reference_context_ids=("a",)),
    row("no reference", response="Yes.", retrieved_contexts=("Yes.",), retrieved_context_ids=("a",)),
    row("bare"),
    row("agent", user_input=SAID, reference_tool_calls=CALLS, response="Paid.", reference="Paid."),
    row("right agent", user_input=SAID, reference_tool_calls=CALLS[:1]),
    row("quoting", response='It says "the late fee is" and "made up by nobody".', reference='"', retrieved_contexts=("The late fee is £25.",)),
]
FULL = [one for one in ROWS if one.id in ("plain", "unicode")] + [
    row(f"r{i}", response=f"Answer {i}. And £{i}.", reference=f"Reference {i}", retrieved_contexts=(f"Text {i}", f"More {i}")) for i in range(4)
]


@pytest.fixture(scope="module")
def server():
    found = JudgeServer()
    yield found
    found.release.set()
    found.shutdown()


@pytest.fixture(autouse=True)
def good(request):
    "Each test starts with a server that behaves."
    if "server" in request.fixturenames:
        found = request.getfixturevalue("server")
        found.way = "good"
        found.requests.clear()


def chat_on(server: JudgeServer, **options: Any) -> Any:
    return load_chat_model("openai:judge", **{"base_url": server.address, "api_key": "top-secret", "max_retries": 0, "temperature": 0.0, **options})


@pytest.fixture(scope="module")
def embeddings():
    return HashEmbeddings()


# ---- RAGAS' numbers are RAGAS' numbers


def ragas_object(name: str, llm: Any = None, vectors: Any = None) -> Any:
    "The metric as a user of RAGAS would make it."
    module, _, class_name = METRICS[name].source.partition(":")
    spec = METRICS[name]
    models = {"llm": llm} if spec.judge else {}
    return getattr(importlib.import_module(module), class_name)(**models, **({"embeddings": vectors} if spec.embeddings else {}))


def ragas_arguments(one: EvaluationRow, needs: tuple[str, ...]) -> dict[str, Any]:
    from ragas import messages

    kinds = {"human": messages.HumanMessage, "ai": messages.AIMessage, "tool": messages.ToolMessage}
    found: dict[str, Any] = {}
    for name in needs:
        value = getattr(one, name)
        if name == "user_input" and not isinstance(value, str):
            value = [kinds[said["type"]](**{key: part for key, part in said.items() if key != "type"}) for said in value]
        elif name == "reference_tool_calls" and value is not None:
            value = [messages.ToolCall(**call) for call in value]
        found[name] = list(value) if isinstance(value, tuple) else value
    return found


async def directly(obj: Any, one: EvaluationRow, needs: tuple[str, ...]) -> float | None:
    "What RAGAS says when it is called by itself; None where it raises or says NaN."
    from ragas import SingleTurnSample

    arguments = ragas_arguments(one, needs)
    try:
        if hasattr(obj, "single_turn_ascore"):
            value = await obj.single_turn_ascore(SingleTurnSample(**arguments))
        else:
            value = (await obj.ascore(**arguments)).value
    except Exception:
        return None
    return None if value is None or not math.isfinite(value) else float(value)


async def all_directly(obj: Any, rows: list[EvaluationRow], needs: tuple[str, ...]) -> dict[str, float | None]:
    return {one.id: await directly(obj, one, needs) for one in rows}


def assert_equal(ours: dict[str, Value], theirs: dict[str, float | None]) -> None:
    assert list(ours) == list(theirs)
    for id, value in ours.items():
        assert value == theirs[id] if theirs[id] is not None else isinstance(value, Failure), (id, value, theirs[id])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WITHOUT)
def test_without_a_judge_ours_are_ragas_numbers(name, embeddings):
    [metric] = load_metrics([name], embeddings=embeddings)
    ours = metric.measure(ROWS)
    obj = ragas_object(name, vectors=RagasEmbeddings(embeddings))
    theirs = asyncio.run(all_directly(obj, ROWS, metric.needs))
    present = {one.id for one in ROWS if all(getattr(one, need) is not None for need in metric.needs)}
    theirs = {id: value if id in present else None for id, value in theirs.items()}
    assert_equal(ours, theirs)
    assert any(isinstance(value, float) for value in ours.values()) and any(isinstance(value, Failure) for value in ours.values())
    assert obj.name == metric.name == name


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.text(max_size=30), st.text(max_size=30)), min_size=1, max_size=3))
def test_any_text_gives_ragas_number_or_a_failure(embeddings, texts):
    texts = [tuple(part.encode("utf-8", "ignore").decode() for part in pair) for pair in texts]
    contexts = tuple(pair[0] for pair in texts), tuple(pair[1] for pair in texts)
    one = row(
        "r", response=texts[0][0], reference=texts[0][1], retrieved_contexts=contexts[0], reference_contexts=contexts[1],
        retrieved_context_ids=contexts[0], reference_context_ids=contexts[1],
    )
    names = [name for name in WITHOUT if not name.startswith("tool_")]
    for metric in load_metrics(names, embeddings=embeddings):
        theirs = asyncio.run(all_directly(ragas_object(metric.name, vectors=RagasEmbeddings(embeddings)), [one], metric.needs))
        assert_equal(metric.measure([one]), theirs)


def test_semantic_similarity_is_that_of_the_embedded_model():
    from llmops_ref.models import load_embeddings

    pairs = [("The fee is £25.", "The fee is £250."), ("Dogs bark.", "Interest is paid yearly.")]
    rows = [row(str(i), response=a, reference=b) for i, (a, b) in enumerate(pairs)]
    [metric] = load_metrics(["semantic_similarity"])
    ours = metric.measure(rows)
    vectors = load_embeddings().embed_documents([text for pair in pairs for text in pair])
    for i in range(2):
        assert ours[str(i)] == pytest.approx(sum(a * b for a, b in zip(vectors[2 * i], vectors[2 * i + 1], strict=True)), abs=1e-5)
    assert_equal(ours, asyncio.run(all_directly(ragas_object("semantic_similarity", vectors=RagasEmbeddings()), rows, metric.needs)))


def instructor_llm(server: JudgeServer) -> Any:
    "RAGAS' own language model, as its documentation makes it, with the schema sent along."
    import instructor
    from openai import AsyncOpenAI
    from ragas.llms.base import InstructorLLM

    client = AsyncOpenAI(base_url=server.address, api_key="x", max_retries=0)
    return InstructorLLM(client=instructor.from_openai(client, mode=instructor.Mode.JSON_SCHEMA), model="judge", provider="openai")


@pytest.mark.parametrize("name", WITH_CHAT)
def test_with_a_judge_ours_are_ragas_numbers(name, server, embeddings):
    rows = FULL + [one for one in ROWS if one.id in ("empty", "nothing found", "bare")]
    [metric] = load_metrics([name], judge=chat_on(server), embeddings=embeddings)
    ours = metric.measure(rows)
    theirs = asyncio.run(all_directly(ragas_object(name, instructor_llm(server), RagasEmbeddings(embeddings)), rows, metric.needs))
    assert_equal(ours, theirs)
    assert len({value for value in ours.values() if isinstance(value, float)}) > 1 and isinstance(ours["bare"], Failure)


def test_a_judge_of_ragas_itself_is_taken_as_it_is(server):
    rows = FULL[:2]
    [metric] = load_metrics(["faithfulness"], judge=instructor_llm(server))
    assert metric.measure(rows) == load_metrics(["faithfulness"], judge=chat_on(server))[0].measure(rows)
    server.way = "garbage"
    assert [value.kind for value in metric.measure(rows).values()] == ["parse", "parse"]
    server.way = "500"
    assert [value.kind for value in metric.measure(rows).values()] == ["upstream", "upstream"]


def test_ragas_takes_our_adapters_in_any_of_its_metrics(server, embeddings):
    from ragas.metrics import DiscreteMetric
    from ragas.metrics.collections import AnswerAccuracy, ContextRelevance, Faithfulness

    judge = LangChainJudge(chat_on(server))
    assert asyncio.run(Faithfulness(llm=judge).ascore(**ragas_arguments(FULL[0], METRICS["faithfulness"].needs))).value is not None
    assert AnswerAccuracy(llm=judge) and ContextRelevance(llm=judge)
    verdict = DiscreteMetric(name="tone", prompt="Judge {response}", allowed_values=["pass", "fail"]).score(llm=judge, response="Hello.")
    assert verdict.value == "pass" and judge.asked == 3


# ---- a judge that misbehaves


WAYS = {
    "garbage": "parse", "half": "parse", "cut": "parse", "empty": "parse", "wrong form": "parse", "not a number": "parse",
    "sorry": "refused", "refusal": "refused", "filter": "refused", "500": "upstream", "no json": "upstream",
}


@pytest.mark.parametrize(("way", "kind"), WAYS.items())
def test_what_a_judge_does_wrong_is_a_failure_of_that_kind(server, embeddings, way, kind):
    server.way = way
    rows = FULL[:2]
    found = measure(load_metrics(WITH_CHAT, judge=chat_on(server), embeddings=embeddings), rows)
    for values in found.values():
        assert [value.kind for value in values.values()] == [kind, kind]
        assert all(value.detail for value in values.values())


def test_a_judge_that_hangs_times_out_and_the_rest_goes_on(server):
    server.way = "hang"
    metrics = load_metrics(["faithfulness"], judge=chat_on(server), timeout=0.2)
    found = measure([*metrics, "exact_match"], FULL, workers=3)
    assert {value.kind for value in found["faithfulness"].values()} == {"timeout"} and "0.2 s" in found["faithfulness"]["plain"].detail
    assert all(isinstance(value, float) for value in found["exact_match"].values())
    patient = load_metrics(["faithfulness"], judge=chat_on(server), timeout=None)
    assert measure(patient, FULL[:1], timeout=0.2)["faithfulness"]["plain"].kind == "timeout"
    impatient = load_metrics(["faithfulness"], judge=chat_on(server, timeout=0.2))
    assert impatient[0].measure(FULL[:1])["plain"].kind == "timeout"


def test_a_blocking_model_that_hangs_does_not_hold_up_the_end_of_the_program():
    code = """
from langchain_core.language_models import SimpleChatModel
from llmops_ref.evaluation_data import EvaluationRow
from llmops_ref.metrics import load_metrics
import time
class Stuck(SimpleChatModel):
    _llm_type = "stuck"
    def _call(self, *arguments, **options):
        time.sleep(600)
rows = [EvaluationRow(str(i), "?", response="a", retrieved_contexts=["b"]) for i in range(9)]
[metric] = load_metrics(["faithfulness"], judge=Stuck(), timeout=0.1)
print({value.kind for value in metric.measure(rows).values()})
"""
    root = str(Path(__file__).resolve().parent.parent)
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "{'timeout'}", done.stderr


def test_nobody_at_the_endpoint_is_upstream():
    chat = load_chat_model("openai:judge", base_url="http://127.0.0.1:9/v1", max_retries=0)
    [value] = load_metrics(["context_recall"], judge=chat)[0].measure(FULL[:1]).values()
    assert value.kind == "upstream" and "127.0.0.1:9" in value.detail


def test_verdicts_out_of_range_are_failures_where_they_make_the_value_one(server):
    server.way = "too high"
    found = measure(load_metrics(["context_precision", "context_recall"], judge=chat_on(server)), FULL)
    assert {value.kind for values in found.values() for value in values.values() if isinstance(value, Failure)} == {"out_of_range"}
    assert all(isinstance(value, Failure) or 0 <= value <= 1 for values in found.values() for value in values.values())


def test_json_in_a_code_block_is_read(server):
    good = load_metrics(["faithfulness"], judge=chat_on(server))[0].measure(FULL)
    server.way = "fenced"
    assert load_metrics(["faithfulness"], judge=chat_on(server))[0].measure(FULL) == good


def test_the_schema_is_sent_and_left_out_where_a_server_refuses_it(server):
    judge = LangChainJudge(chat_on(server))
    [metric] = load_metrics(["faithfulness"], judge=judge)
    good = metric.measure(FULL[:2])
    sent = [request["response_format"] for request in server.requests]
    assert all(one["type"] == "json_schema" and one["json_schema"]["strict"] for one in sent)
    assert all(one["json_schema"]["schema"]["additionalProperties"] is False for one in sent)
    server.way = "no schema"
    server.requests.clear()
    assert metric.measure(FULL[:2], workers=1) == good and not judge.sends_schema
    assert sum("response_format" in request for request in server.requests) == 1
    server.requests.clear()
    assert load_metrics(["faithfulness"], judge=LangChainJudge(chat_on(server), schema=False))[0].measure(FULL[:2]) == good
    assert not any("response_format" in request for request in server.requests)


@given(st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_no_reply_breaks_the_judge(text):
    class Verdict(BaseModel):
        verdict: int

    judge = LangChainJudge(FakeListChatModel(responses=[text]), timeout=None)
    try:
        assert isinstance(judge.generate("?", Verdict), Verdict)
    except JudgeCallError as error:
        assert error.failure.kind in ("parse", "refused")


class StructuredChat(FakeListChatModel):
    "A model whose interface takes a form, as those of other vendors do."

    def bind_tools(self, tools: Any, **options: Any) -> Any:
        raise NotImplementedError

    def with_structured_output(self, schema: Any, *, include_raw: bool = False, **options: Any) -> Any:
        raw = AIMessage(self.responses[0])
        parsed = schema(verdict=1) if "verdict" in self.responses[0] else None
        return RunnableLambda(lambda messages: {"raw": raw, "parsed": parsed, "parsing_error": None})


def test_models_of_other_vendors_are_asked_in_their_own_way():
    class Verdict(BaseModel):
        verdict: int

    assert LangChainJudge(StructuredChat(responses=["verdict: yes"])).generate("?", Verdict).verdict == 1
    with pytest.raises(JudgeCallError, match="parse"):
        LangChainJudge(StructuredChat(responses=["hm"])).generate("?", Verdict)
    for text in ('Sure! {"verdict": 0} Done.', '<think>{"verdict": 1} or not?</think> {"verdict": 0}'):
        assert LangChainJudge(FakeListChatModel(responses=[text])).generate("?", Verdict).verdict == 0


# ---- the cache of judge calls


def faithful(server: JudgeServer, cache: Path, **options: Any) -> tuple[dict[str, Value], int]:
    "Values, and how many calls reached the server."
    server.requests.clear()
    judge = LangChainJudge(chat_on(server, **options.pop("chat", {})), cache=cache, **options)
    values = load_metrics(["faithfulness", "answer_relevancy"], judge=judge, embeddings=HashEmbeddings())
    found = measure(values, FULL[:2])
    return {f"{name} {id}": value for name, by_id in found.items() for id, value in by_id.items()}, len(server.requests)


def test_a_second_run_asks_nothing_and_gives_the_same(server, tmp_path):
    first, asked = faithful(server, tmp_path)
    assert asked == 2 * (2 + 3)    # two steps of faithfulness, three questions of relevancy, each asked although alike
    assert faithful(server, tmp_path) == (first, 0)
    assert len(CallCache(tmp_path)) == asked


@pytest.mark.parametrize("change", [{"chat": {"temperature": 0.5}}, {"chat": {"max_tokens": 99}}, {"chat": {"seed": 3}}, {"schema": False}])
def test_another_configuration_asks_anew(server, tmp_path, change):
    first, asked = faithful(server, tmp_path)
    assert faithful(server, tmp_path, **change) == (first, asked)


def test_another_model_or_endpoint_is_another_call(server):
    other = JudgeServer()
    identities = [
        chat_identity(load_chat_model(f"openai:{model}", base_url=address, api_key="k"))
        for model, address in [("judge", server.address), ("judge-2", server.address), ("judge", other.address)]
    ]
    other.shutdown()
    assert len({CallCache.key(**one) for one in identities}) == 3


def test_failures_are_asked_again_unless_told_otherwise(server, tmp_path):
    server.way = "garbage"
    failed, asked = faithful(server, tmp_path)
    assert all(isinstance(value, Failure) for value in failed.values()) and asked == 4 and len(CallCache(tmp_path)) == 0
    assert faithful(server, tmp_path, cache_failures=True) == (failed, asked)
    assert faithful(server, tmp_path, cache_failures=True) == (failed, 0)
    server.way = "good"
    healed, asked = faithful(server, tmp_path)
    assert asked == 10 and all(isinstance(value, float) for value in healed.values())
    assert faithful(server, tmp_path, cache_failures=True) == (healed, 0)


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b"\xff\xfe", b'{"text": 3}', b'{"text": "no form"}', b'{"failure": 1}'])
def test_a_damaged_entry_is_asked_again_and_healed(server, tmp_path, damage):
    first, asked = faithful(server, tmp_path)
    for path in tmp_path.glob("??/*.json"):
        path.write_bytes(damage)
    assert faithful(server, tmp_path) == (first, asked)
    assert faithful(server, tmp_path) == (first, 0)


def test_no_key_reaches_the_disk_or_a_name(server, tmp_path):
    faithful(server, tmp_path)
    assert not any(b"top-secret" in path.read_bytes() for path in tmp_path.rglob("*.json"))
    assert "top-secret" not in json.dumps(chat_identity(chat_on(server)))


def _write_for_ever(folder: str) -> None:
    cache, text = CallCache(folder), "x" * 100_000
    while True:
        for number in range(5):
            cache.put(CallCache.key(number=number), {"text": text})


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_processes_that_share_a_cache_and_die_leave_whole_entries(tmp_path):
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=_write_for_ever, args=(str(tmp_path),)) for _ in range(2)]
    for writer in writers:
        writer.start()
    while len(CallCache(tmp_path)) < 5:
        time.sleep(0.01)
    for _ in range(50):
        for number in range(5):
            entry = CallCache(tmp_path).get(CallCache.key(number=number))
            assert entry is not None and len(entry["text"]) == 100_000
    for writer in writers:
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
    assert all(json.loads(path.read_text())["text"] for path in tmp_path.glob("??/*.json"))


# ---- metrics of anybody


def decorated(function: Any, **settings: Any) -> Any:
    from ragas.metrics import numeric_metric

    return numeric_metric(name=function.__name__, **settings)(function)


def one_value(obj: Any, one: EvaluationRow = FULL[0], **settings: Any) -> Value:
    [value] = as_metric(obj, **settings).measure([one], timeout=5).values()
    return value


def test_a_decorated_function_is_a_metric_of_its_parameters():
    def words(response: str, kind: str, most: int = 10) -> float:
        return min(1.0, len(response.split()) / most) if kind == "x" else 0.0

    async def later(response: str) -> float:
        await asyncio.sleep(0)
        return 0.5

    metric = as_metric(decorated(words))
    assert metric.needs == ("response", "kind") and metric.range == (0, 1) and metric.lowest == 0 and metric.judge is None
    assert one_value(metric, row("a", response="one two", metadata={"kind": "x"})) == 0.2
    assert one_value(metric, row("a", response="one two")) == Failure("missing_field", "kind")
    assert one_value(decorated(later)) == 0.5
    wide = as_metric(decorated(words, allowed_values=(1.0, 5.0)), higher_is_better=False)
    assert wide.range == (1, 5) and wide.lowest == 5


@pytest.mark.parametrize(
    ("result", "kind"),
    [
        (math.nan, "not_a_number"), (math.inf, "not_a_number"), (-math.inf, "not_a_number"), (None, "not_a_number"), ("high", "not_a_number"),
        ([1], "not_a_number"), (2.0, "out_of_range"), (-0.1, "out_of_range"), (ZeroDivisionError("oops"), "upstream"),
        (TimeoutError("slow"), "upstream"), (StopIteration(1), "upstream"), (SystemExit(2), "upstream"), (KeyboardInterrupt(), "upstream"),
    ],
)
@pytest.mark.parametrize("is_async", [False, True])
def test_what_ragas_turns_into_none_is_typed(result, kind, is_async):
    def give() -> Any:
        if isinstance(result, BaseException):
            raise result
        return result

    def plain(response: str) -> float:
        return give()

    async def waiting(response: str) -> float:
        return give()

    value = one_value(decorated(waiting if is_async else plain))
    assert isinstance(value, Failure) and value.kind == kind, value


def test_labels_of_a_discrete_metric_are_worth_what_is_said():
    from ragas.metrics import discrete_metric, ranking_metric

    @discrete_metric(name="tone", allowed_values=["pass", "fail"])
    def tone(response: str) -> str:
        return {"Hello.": "pass", "Bah.": "fail"}.get(response, "maybe")

    assert [one_value(tone, row("a", response=text)) for text in ("Hello.", "Bah.")] == [1.0, 0.0]
    assert one_value(tone, row("a", response="Hm.")).kind == "out_of_range"

    @discrete_metric(name="size", allowed_values=["small", "large"])
    def size(response: str) -> str:
        return "large"

    with pytest.raises(BadInputError, match=r"'small' of size worth.*labels="):
        as_metric(size)
    graded = as_metric(size, labels={"small": 1, "large": 4})
    assert graded.range == (1, 4) and one_value(graded) == 4.0

    @ranking_metric(name="order", allowed_values=2)
    def order(response: str) -> list[str]:
        return ["a", "b"]

    with pytest.raises(BadInputError, match="ranks"):
        as_metric(order)


@pytest.mark.parametrize("obj", [3, None, len, object(), "exact_mach", {"name": "x"}])
def test_what_is_no_metric_is_refused(obj):
    with pytest.raises(BadInputError, match="no metric"):
        as_metric(obj)


@pytest.mark.filterwarnings("ignore")
def test_older_metrics_and_metrics_with_a_prompt_take_our_judge(server):
    from ragas.metrics import NumericMetric
    from ragas.metrics._aspect_critic import AspectCritic
    from ragas.metrics._string import ExactMatch

    assert one_value(ExactMatch(), row("a", response="x", reference="x")) == 1.0
    with pytest.raises(BadInputError, match="judge="):
        as_metric(AspectCritic(name="harm", definition="Is it harmful?"))
    critic = as_metric(AspectCritic(name="harm", definition="Is it harmful?"), judge=chat_on(server))
    assert critic.judge == "harm:judge" and critic.range == (0, 1)
    assert isinstance(one_value(critic), Failure) and len(server.requests) >= 1    # the server does not know this form
    from ragas.metrics._tool_call_f1 import ToolCallF1

    assert one_value(ToolCallF1(), ROWS[6]) == load_metrics(["tool_call_f1"])[0].measure(ROWS[6:7])["agent"]
    assert one_value(ToolCallF1(), row("a", reference_tool_calls=CALLS)).kind == "missing_field"
    rated = as_metric(NumericMetric(name="rate", prompt="Rate {response} against {topic}"), judge=chat_on(server))
    assert rated.needs == ("response", "topic")
    assert one_value(rated, row("a", response="x", metadata={"topic": "fees"})) == 0.25
    assert one_value(rated).kind == "missing_field"


def test_a_function_that_hangs_does_not_hold_up_the_others():
    release = threading.Event()

    def stuck(response: str) -> float:
        if response.startswith("Answer 1"):
            release.wait(20)
        return 1.0

    found = measure([decorated(stuck), "exact_match"], FULL, workers=2, timeout=2)
    release.set()
    assert found["stuck"].pop("r1").kind == "timeout" and set(found["stuck"].values()) == {1.0}
    assert all(isinstance(value, float) for value in found["exact_match"].values())


# ---- our own


class SomeJudge:
    "A judge of claims by rule, which can be told to misbehave."

    name, model, prompt, threshold = "some", "rules", "v1", 0.5

    def __init__(self, *results: Any) -> None:
        self.results = results

    def judge(self, claims: Any) -> list[Any]:
        if self.results and isinstance(self.results[0], BaseException):
            raise self.results[0]
        return list(self.results) or [0.9 if any(claim.text in text for text in claim.passages) else 0.2 for claim in claims]


def grounded(judge: SomeJudge, one: EvaluationRow) -> list[Value]:
    return [values[one.id] for values in measure(load_metrics(["groundedness", "grounded"], judge=judge), [one]).values()]


def test_groundedness_is_that_of_the_weakest_sentence():
    passages = ("The fee is £25. Cards are free.",)
    assert grounded(SomeJudge(), row("a", response="Cards are free. The fee is £25.", retrieved_contexts=passages)) == [0.9, 1.0]
    assert grounded(SomeJudge(), row("a", response="Cards are free. The fee is £9.", retrieved_contexts=passages)) == [0.2, 0.0]


def test_the_frame_of_a_fallback_answer_is_not_judged():
    from llmops_ref import metrics, rag

    assert (rag._UNSUPPORTED, rag._CUT.strip()) == (metrics._LEAD_IN, metrics._LEFT_OUT)
    passages = ("The fee is £25. Cards are free (for now).",)
    for said in ("Cards are free (for now).", "The fee is £25. Cards are free (for now)."):
        framed = row("a", response=f"{rag._UNSUPPORTED}“{said}” (fees-2026.md, Fees (personal) > Late)", retrieved_contexts=passages)
        assert grounded(SomeJudge(), framed) == [0.9, 1.0]
        assert load_metrics(["number_agreement"])[0].measure([framed]) == {"a": 1.0}
    cut = row("a", response=f"The fee is £25.{rag._CUT}", retrieved_contexts=passages)
    assert grounded(SomeJudge(), cut) == [0.9, 1.0]
    assert grounded(SomeJudge(), row("a", response=f"{rag._UNSUPPORTED}The fee is £9.", retrieved_contexts=passages)) == [0.2, 0.0]


def test_a_sentence_with_nothing_to_check_does_not_count_beside_others():
    nothing = Failure("missing_field", "nothing to check")
    two = row("a", response="One. I hope this helps.", retrieved_contexts=("One.",))
    assert grounded(SomeJudge(0.9, nothing), two) == [0.9, 1.0]
    assert grounded(SomeJudge(nothing, nothing), two) == [nothing, nothing]
    assert grounded(SomeJudge(0.9, Failure("timeout", "late")), two)[0].kind == "timeout"


@pytest.mark.parametrize(
    ("results", "kind"),
    [
        ((Failure("parse", "hm"),), "parse"), ((0.9, 0.9), "upstream"), ((math.nan,), "not_a_number"), ((1.5,), "out_of_range"),
        ((ConnectionError("gone"),), "upstream"), ((StopIteration(),), "upstream"), ((SystemExit(1),), "upstream"), (("yes",), "upstream"),
    ],
)
def test_a_judge_of_claims_that_misbehaves_is_typed(results, kind):
    [value, _] = grounded(SomeJudge(*results), row("a", response="One.", retrieved_contexts=("One.",)))
    assert isinstance(value, Failure) and value.kind == kind, value
    assert grounded(SomeJudge(), row("a", response="  ", retrieved_contexts=("One.",)))[0].kind == "missing_field"


OWN = [
    ("number_agreement", {"response": "It is £25, or 3 percent.", "retrieved_contexts": ("£25.00",)}, {}, 0.5),
    ("number_agreement", {"response": "It is £25 [1], [2, 3].", "retrieved_contexts": ("£25.00",)}, {}, 1.0),
    ("number_agreement", {"response": "It is free.", "retrieved_contexts": ()}, {}, 1.0),
    ("figure_recall", {"response": "£15 or 1,000.00 pounds", "reference": "£1000, £20"}, {}, 0.5),
    ("figure_recall", {"response": "", "reference": "Free."}, {}, 1.0),
    ("citation_validity", {"retrieved_contexts": ("The  fee\nis £25.",)}, {"citations": [{"quote": "fee is £25."}, {"quote": "£26"}]}, 0.5),
    ("citation_validity", {"retrieved_contexts": ("x",)}, {"citations": []}, 0.0),
    ("citation_validity", {"retrieved_contexts": ("x",)}, {"citations": [{"quote": " "}]}, 0.0),
    ("correct_decision", {}, {"expected": "decline", "refused": True}, 1.0),
    ("correct_decision", {}, {"expected": "decline", "refused": False}, 0.0),
    ("correct_decision", {}, {"expected": "answer", "refused": False}, 1.0),
]


@pytest.mark.parametrize(("name", "fields", "notes", "expected"), OWN)
def test_our_metrics_work_here_and_inside_ragas(name, fields, notes, expected):
    from ragas.metrics.base import SimpleBaseMetric

    [metric] = load_metrics([name])
    assert metric.measure([row("a", **fields, metadata=notes)]) == {"a": expected}
    assert isinstance(metric.ragas, SimpleBaseMetric)
    arguments = {key: list(value) if isinstance(value, tuple) else value for key, value in {**fields, **notes}.items()}
    assert asyncio.run(metric.ragas.ascore(**arguments)).value == expected


def test_a_metric_can_be_judged_as_a_judge(server):
    [metric] = load_metrics(["faithfulness"], judge=chat_on(server))
    judge = as_judge(metric, 0.7)
    assert (judge.name, judge.model, judge.threshold) == ("faithfulness:judge", "judge", 0.7) and judge.prompt == metric.fingerprint
    claims = [Claim("The fee is £25.", ("It is £25.",), "What is it?"), Claim("No.", ("Yes.",))]
    values = judge.judge(claims)
    assert len(values) == 2 and all(0 <= value <= 1 for value in values)
    server.way = "garbage"
    assert [value.kind for value in judge.judge(claims)] == ["parse", "parse"] and judge.judge([]) == []
    with pytest.raises(BadInputError, match="citations"):
        as_judge("citation_validity")
    assert as_judge("exact_match").judge([Claim("Yes.", ("Yes.",)), Claim("Yes.", ("No.",))]) == [1.0, 0.0]
    ours = load_metrics(["groundedness"], judge=SomeJudge())[0]
    assert as_judge(ours).name == "some" == ours.judge_identity.name and ours.judge_identity.threshold == 0.5
    assert metric.judge_identity.name == metric.judge == "faithfulness:judge" and as_metric("exact_match").judge_identity is None


# ---- names, order, loops


def test_every_metric_is_described():
    for name, spec in METRICS.items():
        assert spec.name == name and spec.needs and spec.question.endswith("?") and spec.blind_to and spec.range[0] < spec.range[1]


def test_unknown_names_and_missing_judges_say_what_to_do():
    with pytest.raises(BadInputError, match="Did you mean 'exact_match'"):
        load_metrics(["exact_mach"])
    with pytest.raises(BadInputError, match=r"faithfulness needs a judge.*judge="):
        load_metrics(["faithfulness", "exact_match"])
    with pytest.raises(BadInputError, match="two metrics named 'exact_match'"):
        measure(["exact_match", "exact_match"], FULL)


def test_values_keep_the_order_of_rows_and_are_told_as_they_come():
    told: list[tuple[str, str, Value]] = []
    found = measure(["exact_match", "string_present"], ROWS, workers=3, on_value=lambda *one: told.append(one))
    assert [list(values) for values in found.values()] == [[one.id for one in ROWS]] * 2 and list(found) == ["exact_match", "string_present"]
    assert sorted(told, key=str) == sorted([(name, id, value) for name, values in found.items() for id, value in values.items()], key=str)
    assert measure(["exact_match"], []) == {"exact_match": {}} and measure([], ROWS) == {}

    def stop(*one: Any) -> None:
        raise KeyError("disk full")

    with pytest.raises(KeyError, match="disk full"):
        measure(["exact_match"], ROWS, on_value=stop)


def test_rows_on_which_the_system_failed_are_failures_of_that_kind():
    broken = [row("a", error=RowError("timeout", "TimeoutError: 30 s")), row("b", error=RowError("upstream", "ValueError: no"))]
    assert [value.kind for value in measure(["correct_decision"], broken)["correct_decision"].values()] == ["timeout", "upstream"]


def test_it_works_where_a_loop_is_running_already():
    async def notebook() -> None:
        [metric] = load_metrics(["exact_match"])
        assert metric.measure(FULL) == await metric.values(FULL)

    asyncio.run(notebook())
    asyncio.run(notebook())    # a second loop


def test_a_metric_that_waits_for_a_metric_is_told_how_not_to():
    async def nested(response: str) -> float:
        return measure(["exact_match"], FULL)["exact_match"]["plain"]

    value = one_value(decorated(nested))
    assert value.kind == "upstream" and "await metric.values" in value.detail

    async def awaiting(response: str) -> float:
        return (await load_metrics(["exact_match"])[0].values(FULL))["plain"]

    assert one_value(decorated(awaiting)) == 0.0


def test_many_threads_measure_at_once():
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(measure(["rouge_score"], FULL))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and all(one == found[0] for one in found)


def test_fingerprints_change_with_what_decides_the_values(server, embeddings):
    def prints(**parts: Any) -> tuple[str, ...]:
        return tuple(metric.fingerprint for metric in load_metrics(["answer_relevancy", "exact_match"], **{"embeddings": embeddings, **parts}))

    first = prints(judge=chat_on(server))
    assert prints(judge=chat_on(server)) == first == prints(judge=LangChainJudge(chat_on(server)))
    changed = [prints(judge=chat_on(server, temperature=0.3)), prints(judge=chat_on(server, model_kwargs={"x": 1})), prints(judge=instructor_llm(server))]
    changed += [prints(judge=chat_on(server), embeddings=HashEmbeddings(64))]
    assert len({first[0], *(one[0] for one in changed)}) == 5 and {one[1] for one in changed} == {first[1]}
    ours = {load_metrics(["groundedness"], judge=judge)[0].fingerprint for judge in (SomeJudge(), SomeJudge())}
    other = SomeJudge()
    other.prompt = "v2"
    assert len(ours) == 1 and load_metrics(["groundedness"], judge=other)[0].fingerprint not in ours

    def measured(response: str) -> float:
        return 0.5

    one = as_metric(decorated(measured)).fingerprint

    def measured(response: str) -> float:
        return 0.6

    assert as_metric(decorated(measured)).fingerprint != one
    assert as_metric(decorated(measured), version="2").fingerprint != as_metric(decorated(measured)).fingerprint


def test_ragas_is_imported_only_to_measure_and_sends_nothing():
    code = """
import os, sys
from llmops_ref.metrics import METRICS, as_metric, load_metrics
names = [name for name, spec in METRICS.items() if not spec.judge]
metrics = load_metrics(names, embeddings="embedded")
assert all(metric.fingerprint for metric in metrics) and "ragas" not in sys.modules, "imported too early"
metrics[0].ragas
from ragas._analytics import do_not_track
assert do_not_track() and os.environ["RAGAS_DO_NOT_TRACK"] == "true"
"""
    environment = {name: value for name, value in os.environ.items() if name != "RAGAS_DO_NOT_TRACK"}
    root = str(Path(__file__).resolve().parent.parent)
    done = subprocess.run([sys.executable, "-c", code], env={**environment, "PYTHONPATH": root}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_trial_says_whether_a_judge_is_fit(server, tmp_path):
    found = judge_trial(chat_on(server), names=["faithfulness"], questions=2, out=tmp_path / "trial.json")
    assert json.loads((tmp_path / "trial.json").read_text()) == found
    [entry] = found["metrics"]
    assert entry["values"] == 4 and entry["pairs"] == 2 == entry["pairs_with_values"] and found["calls"] == 8 and not entry["failures"]
    server.way = "garbage"
    [entry] = judge_trial(chat_on(server), names=["faithfulness"], questions=2)["metrics"]
    assert entry["failures"] == {"parse": 4} and entry["pairs_with_values"] == entry["right_above_wrong"] == 0


def test_errors_of_many_libraries_have_a_kind():
    class APITimeoutError(Exception):
        pass

    wrapped = ValueError("outer")
    wrapped.__cause__ = APITimeoutError("30 s")
    assert failure_of(wrapped).kind == "timeout" and failure_of(TimeoutError()).kind == "timeout"
    assert failure_of(json.JSONDecodeError("x", "y", 0)).kind == "parse" and failure_of(RuntimeError("x")).kind == "upstream"
    assert failure_of(JudgeCallError(Failure("refused", "no"))) == Failure("refused", "no")
    assert "0x" not in failure_of(RuntimeError(f"{object()} failed")).detail and isinstance(Metric, type)
