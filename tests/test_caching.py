"""The composed cache: nobody gets another's answer, nothing stale, refused or cut off is served, and no failure of it reaches a caller."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain_core.language_models import FakeListChatModel, GenericFakeChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda

from llmops_ref import caching
from llmops_ref.cache_ledger import Ledger, PriceFileError, PriceList
from llmops_ref.caching import AnswerCache, CachedAnswer, as_response, joined, pieces_of, restored, scope_of
from llmops_ref.core import BadInputError
from llmops_ref.exact_cache import CacheDegradedWarning, CacheHit, CacheStats, ExactCache, Response, Scope


class Upstream:
    "Counts its calls; the answer names the question and the call."

    def __init__(self, answer=None, wait=0.0, error=None):
        self.calls, self.answer, self.wait, self.error = 0, answer, wait, error
        self.lock = threading.Lock()

    def __call__(self, prompt, **kwargs):
        with self.lock:
            self.calls += 1
            number = self.calls
        time.sleep(self.wait)
        if self.error:
            raise self.error
        return self.answer if self.answer is not None else f"answer {number} to {prompt}"


@dataclass
class Decision:
    hit: CacheHit | None
    shadow: CacheHit | None
    ticket: str


class FakeSemantic:
    "Takes questions for equal that have the same words; an `ExactCache` behind."

    model, why = "all-MiniLM-L6-v2", "a fake"

    def __init__(self, path, mode="serving"):
        self.store, self.mode, self.said = ExactCache(path), mode, []

    def _key(self, text, scope):
        return scope.key(" ".join(sorted(text.lower().strip("?").split())))

    def decide(self, text, *, scope):
        hit = self.store.get(self._key(text, scope))
        found = replace(hit, kind="semantic", similarity=0.9, prompt="stored") if hit else None
        return Decision(found if self.mode == "serving" else None, found if self.mode == "shadow" else None, self.store.begin())

    def update(self, text, response, *, scope, tags=(), ttl=None, ticket=None):
        return "id" if self.store.put(self._key(text, scope), response, tags=tags, ttl=ttl, ticket=ticket) else ""

    def feedback(self, hit, correct):
        self.said.append(correct)

    def __getattr__(self, name):
        return getattr(self.store, name)


@pytest.fixture
def cache(tmp_path):
    with AnswerCache(ExactCache(tmp_path / "exact.sqlite3"), gate=None, ledger=Ledger(tmp_path / "ledger.sqlite3", interval=60)) as made:
        yield made


@pytest.fixture
def both(tmp_path):
    with AnswerCache(ExactCache(tmp_path / "exact.sqlite3"), FakeSemantic(tmp_path / "semantic.sqlite3"), gate=None, ledger=Ledger(tmp_path / "ledger.sqlite3", interval=60)) as made:
        yield made


def counted(cache):
    total = cache.ledger.summary().total
    return {name: getattr(total, name) for name in ("hits", "misses", "shared", "errors", "shadow", "refused", "wrong", "right") if getattr(total, name)}


# Order and what comes back


def test_first_the_model_then_the_cache(cache):
    upstream = Upstream()
    first, second = (cache.answer("Q?", upstream, scope="acme") for _ in range(2))
    assert (first.source, first.stored, first.hit) == ("upstream", True, None) and first.value == first.text == "answer 1 to Q?"
    assert (second.source, second.stored, second.hit.kind) == ("exact", False, "exact") and second.value == first.value
    assert upstream.calls == 1 and counted(cache) == {"hits": 1, "misses": 1}
    assert "from: exact" in second._repr_markdown_()


def test_exact_before_semantic_before_upstream(both):
    upstream = Upstream()
    sources = [both.answer(text, upstream, scope="acme").source for text in ("is it open?", "is it open?", "open is it?", "closed is it?")]
    assert sources == ["upstream", "exact", "semantic", "upstream"] and upstream.calls == 2
    assert {row.name: row.hits for row in both.ledger.summary("kind").rows} == {"exact": 1, "semantic": 1}
    assert both.ledger.summary().total.overhead_seconds > 0


def test_a_shadow_hit_is_counted_and_not_served(tmp_path):
    cache = AnswerCache(None, FakeSemantic(tmp_path / "s", "shadow"), gate=None, ledger=Ledger(tmp_path / "l", interval=60))
    upstream = Upstream()
    assert [cache.answer(text, upstream, scope="acme").source for text in ("a b", "b a")] == ["upstream", "upstream"]
    assert counted(cache) == {"misses": 2, "shadow": 1}


def message(**changes):
    usage = {"input_tokens": 900, "output_tokens": 80, "total_tokens": 980, "input_token_details": {"cache_read": 500}}
    return AIMessage("It costs £8.", usage_metadata=usage, response_metadata={"model_name": "large", "finish_reason": "stop"}, id="run-1", **changes)


@pytest.mark.parametrize("value", ["text", "", {"a": [1, None, "x"]}, ["a"], 3, message(), message(tool_calls=[{"name": "f", "args": {"x": 1}, "id": "c1", "type": "tool_call"}]), Response("r", data={"mine": 1}, metadata={"k": "v"})])
def test_a_value_comes_back_as_it_was(value):
    back = restored(Response.from_dict(json.loads(json.dumps(as_response(value).to_dict()))))
    assert type(back) is type(value)
    assert back == (value.model_copy(update={"usage_metadata": None}) if isinstance(value, AIMessage) else value)


def test_a_message_brings_its_tokens_and_a_hit_reports_none(cache):
    first, second = (cache.answer([HumanMessage("Q?")], lambda _: message(), scope=Scope("acme", model="asked")) for _ in range(2))
    assert (first.response.model, first.response.input_tokens, first.response.output_tokens) == ("large", 900, 80)
    assert first.value.usage_metadata and second.value.usage_metadata is None and second.source == "exact"
    priced = Ledger(cache.ledger.path, PriceList.from_dict({"models": {"large": {"input": 2.0, "cached_input": 0.2, "output": 8.0}}}))
    cache.ledger.flush()
    assert priced.summary().total.money == {"USD": pytest.approx((400 * 2 + 500 * 0.2 + 80 * 8) / 1e6)}


@pytest.mark.parametrize(("value", "why"), [
    ("  ", "empty"), (message().model_copy(update={"response_metadata": {"finish_reason": "length"}}), "cut off"),
    (message().model_copy(update={"response_metadata": {"stop_reason": "max_tokens"}}), "cut off"),
    (message().model_copy(update={"response_metadata": {"finish_reason": "content_filter"}}), "cut off"),
    (AIMessage("x", invalid_tool_calls=[{"name": "f", "args": "{", "id": "1", "error": "e", "type": "invalid_tool_call"}]), "tool call"),
    (object(), "JSON"), ({"a": float("nan")}, "JSON"), ({1: 2}, "JSON"), ((1, 2), "JSON"), (AIMessage("x", additional_kwargs={"o": object()}), "JSON"),
])
def test_what_is_not_whole_or_not_data_is_returned_and_not_stored(cache, value, why):
    first, second = (cache.answer("Q?", lambda _: value, scope="acme") for _ in range(2))
    assert first.value is value and second.value is value and second.source == "upstream"
    assert not second.stored and why in second.why_not_stored and counted(cache) == {"misses": 2, "refused": 2}


class Gate:
    def __init__(self, refuse="", error=None):
        self.refuse, self.error, self.asked = refuse, error, []

    def allows(self, prompt, response):
        self.asked.append((prompt, response.text))
        if self.error:
            raise self.error
        return self.refuse or None


def test_the_gate_decides_what_is_stored(cache):
    cache.gate = Gate("personal data")
    first = cache.answer([SystemMessage("be brief"), HumanMessage("Q?")], Upstream("A"), scope="acme")
    assert not first.stored and first.why_not_stored == "personal data" and cache.gate.asked == [("be brief\nQ?", "A")]
    assert cache.answer([SystemMessage("be brief"), HumanMessage("Q?")], Upstream("A"), scope="acme").source == "upstream"


def test_a_gate_that_fails_lets_nothing_in_and_everything_out(cache):
    cache.gate = Gate(error=RuntimeError("judge is down"))
    with pytest.warns(CacheDegradedWarning, match="write gate failed"):
        answer = cache.answer("Q?", Upstream("A"), scope="acme")
    assert answer.text == "A" and not answer.stored


# Who shares with whom


def test_no_two_scopes_share(both):
    scopes = [Scope("a"), Scope("b"), Scope("a", groups=["staff"]), Scope("a", knowledge_base="2"), Scope("a", policy="2"), Scope("a", prompt_version="2"), Scope("a", extra={"x": 1})]
    upstream = Upstream()
    assert len({both.answer("is it open?", upstream, scope=scope).text for scope in scopes}) == len(scopes)
    assert [both.answer("open is it?", upstream, scope=scope).text for scope in scopes] == [f"answer {number} to is it open?" for number in range(1, len(scopes) + 1)]


def test_a_scope_must_be_one(cache):
    for scope in ("", None, 3):
        with pytest.raises(BadInputError):
            cache.answer("Q?", Upstream(), scope=scope)


def test_arguments_of_the_upstream_are_part_of_the_key(cache):
    upstream = Upstream()
    texts = [cache.answer("Q?", upstream, scope="a", **given).text for given in ({}, {"k": 1}, {"k": 2}, {"k": 1})]
    assert texts[1] == texts[3] and len(set(texts)) == 3
    with pytest.warns(CacheDegradedWarning, match="key"):
        answer = cache.answer("Q?", upstream, scope="a", k=object())
    assert answer.source == "upstream" and answer.key is None and not answer.stored


def test_by_meaning_only_where_a_question_stands_alone(both):
    upstream = Upstream()
    system, other = SystemMessage("be brief"), SystemMessage("be long")

    def source(*messages):
        return both.answer(list(messages), upstream, scope="a").source

    assert source(system, HumanMessage("a b")) == "upstream" and source(system, HumanMessage("b a")) == "semantic"
    assert source(other, HumanMessage("b a")) == "upstream" and source(HumanMessage("a b")) == "upstream"
    talk = [HumanMessage("hello"), AIMessage("hi")]
    assert source(*talk, HumanMessage("a b")) == "upstream" and source(*talk, HumanMessage("b a")) == "upstream" and source(*talk, HumanMessage("b a")) == "exact"
    assert source(HumanMessage([{"type": "image_url", "image_url": {"url": "data:x"}}])) == "upstream"


def test_normalisation_is_an_option(tmp_path):
    upstream = Upstream()
    for name, normalize, calls in (("n", True, 1), ("v", False, 2)):
        upstream.calls = 0
        with AnswerCache(ExactCache(tmp_path / name), gate=None, normalize=normalize) as cache:
            for text in ("fee  of ﬁve", "fee of five"):
                cache.answer(text, upstream, scope="a")
        assert upstream.calls == calls


# Invalidation and feedback


@pytest.mark.parametrize("by", [{"tenant": "a"}, {"document": "fees.md"}, {"tag": "mine"}, {"model": "m"}, {"prompt": "v1"}, {"before": time.time() + 1e6}])
def test_what_was_invalidated_is_never_served_again(both, by):
    upstream = Upstream(Response("A", documents=("fees.md",)))
    scope = Scope("a", model="m", prompt_version="v1")
    both.answer("x y", upstream, scope=scope, tags=["mine"])
    assert both.answer("y x", upstream, scope=scope).source == "semantic"
    assert both.invalidate(**by) == 2
    assert [both.answer(text, upstream, scope=scope).source for text in ("y x", "x y")] == ["upstream", "semantic"]


def test_invalidating_nothing_in_particular_is_an_error(both):
    with pytest.raises(BadInputError, match="clear"):
        both.invalidate()
    both.answer("x", Upstream(), scope="a")
    both.clear()
    assert both.answer("x", Upstream(), scope="a").source == "upstream"


def test_an_answer_begun_before_an_invalidation_is_not_stored(both):
    def upstream(prompt):
        both.invalidate(tenant="a")
        return "stale"

    answer = both.answer("x y", upstream, scope="a")
    assert answer.text == "stale" and not answer.stored and "not take" in answer.why_not_stored
    assert both.answer("y x", Upstream(), scope="a").source == "upstream"


def test_who_asks_after_an_invalidation_does_not_share_a_call_begun_before(cache):
    began, go = threading.Event(), threading.Event()

    def slow(prompt):
        began.set()
        go.wait(10)
        return "stale"

    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(cache.answer, "Q?", slow, scope="a")
        began.wait(10)
        cache.invalidate(tenant="a")
        assert cache.answer("Q?", lambda _: "fresh", scope="a").text == "fresh"
        go.set()
        assert early.result().text == "stale" and not early.result().stored
    assert cache.answer("Q?", Upstream(), scope="a").text == "fresh"


def test_feedback(both):
    upstream = Upstream()
    both.answer("x y", upstream, scope="a")
    semantic, exact = both.answer("y x", upstream, scope="a"), both.answer("x y", upstream, scope="a")
    both.feedback(semantic, True)
    both.feedback(semantic, False)
    assert both.semantic.said == [True, False] and both.answer("x y", upstream, scope="a").source == "exact"    # right for its own question
    both.feedback(exact, False)
    assert both.answer("x y", upstream, scope="a").source == "upstream" and counted(both)["wrong"] == 2 and counted(both)["right"] == 1
    fresh = both.answer("new", upstream, scope="a")
    both.feedback(fresh, False)    # the model itself was wrong: no hit, and not served again
    assert both.answer("new", upstream, scope="a").source == "upstream" and counted(both)["wrong"] == 2


# Sharing a call


def test_identical_misses_make_one_call(cache):
    upstream = Upstream(wait=0.1)
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda _: cache.answer("Q?", upstream, scope="a"), range(64)))
    assert upstream.calls == 1 and {answer.text for answer in answers} == {"answer 1 to Q?"}
    count = counted(cache)
    assert count["misses"] == 1 and sum(count.values()) == 64
    assert sum(answer.source == "upstream" for answer in answers) == 1


def test_identical_misses_make_one_call_in_asyncio(cache):
    calls = []

    async def upstream(prompt):
        calls.append(prompt)
        await asyncio.sleep(0.05)
        return message()

    async def main():
        return await asyncio.gather(*(cache.aanswer("Q?", upstream, scope="a") for _ in range(64)))

    answers = asyncio.run(main())
    assert len(calls) == 1 and len({id(answer.value) for answer in answers if answer.source == "shared"}) > 1    # copies: nobody can change another's
    assert asyncio.run(cache.aanswer("Q?", Upstream(), scope="a")).source == "exact"


def test_errors_of_the_upstream_are_the_callers_and_poison_nothing(cache):
    error = RuntimeError("upstream is down")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="upstream is down"):
            cache.answer("Q?", Upstream(error=error), scope="a")
        with pytest.raises(RuntimeError, match="upstream is down"):
            asyncio.run(cache.aanswer("Q?", Upstream(error=error), scope="a"))
        with pytest.raises(RuntimeError, match="upstream is down"):
            list(cache.stream("Q?", Upstream(error=error), scope="a"))
    assert counted(cache) == {"errors": 6} and cache.answer("Q?", Upstream("fine"), scope="a").text == "fine"


def test_an_upstream_that_asks_the_cache_itself(cache):
    def chain(prompt):
        return cache.answer("inner", Upstream("inner"), scope="a").text + cache.answer(prompt, Upstream(" same"), scope="a").text

    assert cache.answer("Q?", chain, scope="a").text == "inner same"


# Streams


def words(*pieces, then=None):
    def upstream(prompt):
        yield from pieces
        if then:
            raise then
    return upstream


def test_a_stream_is_live_and_then_replayed(cache):
    pieces, got = ["It ", "costs ", "£8."], []

    def upstream(prompt):
        for piece in pieces:
            got.append(piece)
            yield piece

    stream = cache.stream("Q?", upstream, scope="a")
    assert next(stream) == "It " and got == ["It "]    # not collected first
    assert [*stream] == pieces[1:]
    assert "".join(cache.stream("Q?", words("never"), scope="a")) == "It costs £8."
    assert cache.answer("Q?", Upstream(), scope="a").text == "It costs £8." and counted(cache) == {"hits": 2, "misses": 1}


def test_a_stream_that_did_not_end_by_itself_is_not_stored(cache):
    stream = cache.stream("left?", words("a", "b"), scope="a")
    next(stream)
    stream.close()
    with pytest.raises(ConnectionError):
        list(cache.stream("broken?", words("a", then=ConnectionError()), scope="a"))
    list(cache.stream("cut?", words(AIMessageChunk("a"), AIMessageChunk("b", response_metadata={"finish_reason": "length"})), scope="a"))
    list(cache.stream("strange?", words(object(), object()), scope="a"))
    for question in ("left?", "broken?", "cut?", "strange?"):
        assert cache.answer(question, Upstream("new"), scope="a").text == "new"


def test_an_asynchronous_stream_that_is_left_is_not_stored_and_closed(cache):
    closed = []

    async def upstream(prompt):
        try:
            for piece in ("a", "b", "c"):
                yield piece
        finally:
            closed.append(True)

    async def main():
        stream = cache.astream("left?", upstream, scope="a")
        assert await anext(stream) == "a"
        await stream.aclose()
        assert closed == [True]
        whole = [piece async for piece in cache.astream("Q?", upstream, scope="a")]
        again = [piece async for piece in cache.astream("Q?", upstream, scope="a")]
        return whole, again

    whole, again = asyncio.run(main())
    assert whole == ["a", "b", "c"] and "".join(again) == "abc" and len(closed) == 2
    assert cache.answer("left?", Upstream("new"), scope="a").text == "new"


def test_streams_share_a_call(cache):
    calls = []

    def upstream(prompt):
        calls.append(1)
        for piece in ("a", "b"):
            time.sleep(0.05)
            yield piece

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda _: "".join(cache.stream("Q?", upstream, scope="a")), range(8)))
    assert texts == ["ab"] * 8 and len(calls) == 1


@pytest.mark.parametrize("value", ["It costs £8.\n\n  Twice.", message(), message(tool_calls=[{"name": "f", "args": {"x": 1}, "id": "c1", "type": "tool_call"}])])
def test_pieces_join_to_what_they_were_cut_from(value):
    whole = joined(pieces_of(value))
    assert (whole.text, whole.tool_calls, whole.usage_metadata) == (value.text, value.tool_calls, value.usage_metadata) if isinstance(value, AIMessage) else whole == value


@given(st.text())
def test_any_text_survives_as_a_stream(text):
    assert "".join(pieces_of(text)) == text


# Around LangChain


def test_wrapped_model_all_ways(cache):
    model = GenericFakeChatModel(messages=iter([AIMessage(f"answer {number}") for number in range(99)]))
    wrapped = cache.wrap(model, scope="acme")
    first = wrapped.invoke("Q?")
    assert isinstance(first, AIMessage) and first.content == "answer 0"
    assert wrapped.invoke([HumanMessage("Q?")]).content == "answer 0"
    assert [one.content for one in wrapped.batch(["Q?", "Q?", "R?"])] == ["answer 0", "answer 0", "answer 1"]
    assert "".join(piece.content for piece in wrapped.stream("R?")) == "answer 1"
    assert asyncio.run(wrapped.ainvoke("R?")).content == "answer 1"

    async def streamed(text):
        return "".join([piece.content async for piece in wrapped.astream(text)])

    assert asyncio.run(streamed("R?")) == "answer 1" and asyncio.run(streamed("S?")) == "answer 2" and wrapped.invoke("S?").content == "answer 2"


def test_wrapped_in_a_chain_the_config_passes_through(cache):
    seen = []
    step = RunnableLambda(lambda value, config: seen.append((config["tags"], config["configurable"])) or f"<{value.to_string()}>")
    chain = ChatPromptTemplate.from_template("Say {word}") | cache.wrap(step, scope="acme") | StrOutputParser()
    config = {"tags": ["mine"], "configurable": {"user": "u"}}
    assert chain.invoke({"word": "hi"}, config) == chain.invoke({"word": "hi"}, config) == "<Human: Say hi>"
    assert len(seen) == 1 and "mine" in seen[0][0] and seen[0][1]["user"] == "u"


def test_configurable_values_are_part_of_the_key(cache):
    wrapped = cache.wrap(RunnableLambda(lambda value, config: f"for {config['configurable'].get('groups')}"), scope="acme")
    assert wrapped.invoke("Q?", {"configurable": {"groups": ["staff"]}}) == "for ['staff']"
    assert wrapped.invoke("Q?", {"configurable": {"groups": []}}) == "for []"
    with pytest.warns(CacheDegradedWarning):
        assert wrapped.invoke("Q?", {"configurable": {"groups": object}}) == f"for {object}"


def test_a_scope_from_the_config(cache):
    upstream = Upstream()
    wrapped = cache.wrap(RunnableLambda(upstream), scope=lambda config: config["metadata"]["tenant"])
    texts = [wrapped.invoke("Q?", {"metadata": {"tenant": tenant}}) for tenant in ("a", "b", "a")]
    assert texts[0] == texts[2] != texts[1]
    with pytest.raises(BadInputError, match="Runnable"):
        cache.wrap(print, scope="a")


def test_chains_of_other_parts_do_not_share_in_one_scope(cache):
    def made(number):
        return RunnableLambda(lambda value: f"{number}: {value}")

    def chains():
        model = FakeListChatModel(responses=["x", "y"])
        return [
            ChatPromptTemplate.from_template("one {q}") | model, ChatPromptTemplate.from_template("two {q}") | model,
            RunnableLambda(lambda value: "one"), RunnableLambda(lambda value: "two"), made(1), made(2), made(1) | made(2), {"a": made(1)} | made(2), {"a": made(2)} | made(2),
        ]

    for _ in range(2):    # the same chains, built again, do share
        for chain in chains():
            cache.wrap(chain, scope="a").invoke({"q": "Q?"})
    assert counted(cache) == {"misses": 9, "hits": 9}


def test_models_with_other_settings_do_not_share(cache):
    texts = {cache.wrap(FakeListChatModel(responses=[answer], sleep=sleep), scope="a").invoke("Q?").content for answer, sleep in (("x", None), ("y", 0.001))}
    bound = [cache.wrap(FakeListChatModel(responses=["x"]).bind(stop=[stop]), scope="a").invoke("Q?") for stop in ("1", "2")]
    assert texts == {"x", "y"} and len(bound) == 2 and counted(cache)["misses"] == 4


# Nothing of the cache takes the service down


class Broken:
    "A store of which everything fails."

    def __getattr__(self, name):
        def fail(*_, **__):
            raise OSError(5, "Input/output error")
        return fail


@pytest.mark.parametrize("parts", [("exact",), ("semantic",), ("ledger",), ("gate",), ("exact", "semantic", "ledger", "gate")])
def test_whatever_fails_the_upstream_is_asked_and_each_cause_warned_of_once(tmp_path, parts):
    made = {"exact": ExactCache(tmp_path / "e"), "semantic": FakeSemantic(tmp_path / "s"), "ledger": Ledger(tmp_path / "l", interval=60), "gate": None}
    cache = AnswerCache(**{**made, **{name: Broken() for name in parts}})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert cache.answer("Q?", Upstream("A"), scope="a").text == "A"
            assert asyncio.run(cache.aanswer("Q?", Upstream("A"), scope="a")).text == "A"
            assert "".join(cache.stream("R?", words("A"), scope="a")) == "A"
    texts = [str(item.message) for item in caught if item.category is CacheDegradedWarning]
    assert texts and len(texts) == len(set(texts)) and not any("Q?" in text for text in texts)


def test_an_entry_that_cannot_be_read_back_is_a_miss(cache):
    key = Scope("a").key("Q?")
    for data in (None, {"type": "ai"}, {"type": "system", "data": {}}):
        cache.exact.put(key, Response("old", data=data, metadata={"llmops_ref.returned": "message"}))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CacheDegradedWarning)
            assert cache.answer("Q?", Upstream("new"), scope="a").text == "new"
        cache.clear()


def test_where_warnings_are_errors_the_answer_still_comes(tmp_path):
    cache = AnswerCache(Broken(), gate=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheDegradedWarning)
        assert cache.answer("Q?", Upstream("A"), scope="a").text == "A"


def test_a_cache_needs_a_store():
    with pytest.raises(BadInputError, match="store"):
        AnswerCache(None, gate=None)


# Any order of things


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(
    st.tuples(st.just("ask"), st.sampled_from("ab"), st.sampled_from(["x y", "y x", "x z"])),
    st.tuples(st.just("drop"), st.sampled_from("ab"), st.sampled_from(["tenant", "document"])),
    st.tuples(st.just("feedback"), st.booleans(), st.none()),
), max_size=25))
def test_never_another_tenants_answer_and_never_one_that_was_taken_back(both, steps):
    "Every answer says for whom, to which words and after how many invalidations it was made."
    both.clear()
    drops, last = {"a": 0, "b": 0}, None
    for step, who, what in steps:
        if step == "ask":
            words_asked, drop = " ".join(sorted(what.split())), drops[who]
            last = both.answer(what, lambda _, who=who, drop=drop, asked=words_asked: Response(f"{who} {asked} {drop}", documents=(f"doc-{who}",)), scope=who)
            assert last.text == f"{who} {words_asked} {drop}"
        elif step == "drop":
            drops[who] += 1
            both.invalidate(**({"tenant": who} if what == "tenant" else {"document": f"doc-{who}"}))
        elif last is not None:
            both.feedback(last, who)


# Around a RAG


@pytest.fixture
def rag(tmp_path):
    from hash_embeddings import HashEmbeddings

    from llmops_ref.knowledge_base import KnowledgeBase
    from llmops_ref.rag import RAG

    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "fees.md").write_text("# Fees\n\nThe Plus account costs £8 a month.\n")
    (docs / "staff.md").write_text("---\nallowed_groups: [staff]\n---\n# Staff fees\n\nThe Plus account costs staff £2 a month.\n")
    knowledge_base = KnowledgeBase.open(tmp_path / "index", HashEmbeddings())
    knowledge_base.ingest([docs], progress=False)
    model = Counting(responses=["The Plus account costs £8 a month.", "The Plus account costs staff £2 a month."])
    return RAG(knowledge_base, model, decline=None)


class Counting(FakeListChatModel):
    def _call(self, messages, *args, **kwargs):
        return next((answer for answer in self.responses if answer in str(messages)), self.responses[0])

    def _stream(self, messages, *args, **kwargs):
        from langchain_core.outputs import ChatGenerationChunk

        for word in pieces_of(self._call(messages)):
            yield ChatGenerationChunk(message=AIMessageChunk(content=word))


QUESTION = "What does the Plus account cost a month?"


def test_a_rag_answer_comes_back_with_its_citations_and_is_invalidated_by_its_documents(cache, rag):
    first, second = (cache.answer(QUESTION, rag, scope="acme") for _ in range(2))
    assert (first.source, second.source) == ("upstream", "exact") and second.value.citations == first.value.citations
    assert type(second.value) is type(first.value) and second.value.passages == first.value.passages and second.value.usage == {}
    assert second.response.documents and cache.invalidate(document="nowhere.md") == 0
    assert cache.invalidate(document=first.value.citations[0].source) == 1
    assert cache.answer(QUESTION, rag, scope="acme").source == "upstream"


def test_a_changed_document_makes_the_answer_stale_at_once_and_only_for_who_may_read_it(cache, rag, tmp_path):
    staff = Scope("acme", groups=["staff"])
    assert cache.answer(QUESTION, rag, scope="acme").source == cache.answer(QUESTION, rag, scope=staff).source == "upstream"
    (tmp_path / "docs" / "staff.md").write_text("---\nallowed_groups: [staff]\n---\n# Staff fees\n\nStaff pay nothing for it.\n")
    rag.knowledge_base.ingest([tmp_path / "docs"], progress=False)
    assert cache.answer(QUESTION, rag, scope="acme").source == "exact" and cache.answer(QUESTION, rag, scope=staff).source == "upstream"
    (tmp_path / "docs" / "fees.md").write_text("# Fees\n\nThe Plus account costs £9 a month.\n")
    rag.knowledge_base.ingest([tmp_path / "docs"], progress=False)
    assert cache.answer(QUESTION, rag, scope="acme").source == "upstream"


def test_a_rag_is_asked_with_the_groups_of_the_key_whoever_names_them(cache, rag):
    from llmops_ref.access import ALL_GROUPS

    wrapped, secret = cache.wrap(rag, scope="acme"), "staff"
    for ask in (
        lambda: cache.answer(QUESTION, rag, scope=Scope("acme", groups=["staff"])).value,
        lambda: cache.answer(QUESTION, rag, scope=scope_of(rag, "acme", ["staff"])).value,
        lambda: cache.answer(QUESTION, rag, scope=scope_of(rag, "acme", ALL_GROUPS)).value,
        lambda: wrapped.invoke(QUESTION, {"configurable": {"groups": ["staff"]}}),
        lambda: wrapped.invoke(QUESTION, groups=["staff"]),
    ):
        assert any(secret in passage.text for passage in ask().passages)
        for public in (cache.answer(QUESTION, rag, scope="acme").value, wrapped.invoke(QUESTION), cache.answer(QUESTION, rag, scope=scope_of(rag, "acme")).value):
            assert not any(secret in passage.text for passage in public.passages)


def test_declined_answers_are_not_stored(cache, rag):
    rag.decline, rag.threshold = (lambda question, passages: 0.0), 0.5
    answer = cache.answer(QUESTION, rag, scope="acme")
    assert answer.value.refused and not answer.stored and "declined" in answer.why_not_stored


def test_a_rag_streams_and_replays_text_and_answer(cache, rag):
    live, again = (list(cache.stream(QUESTION, rag, scope="acme")) for _ in range(2))
    assert live[-1].text == "".join(live[:-1]) == "".join(again[:-1]) == again[-1].text and again[-1].citations == live[-1].citations


def test_the_version_of_a_knowledge_base(rag, tmp_path):
    from hash_embeddings import HashEmbeddings

    from llmops_ref.caching import knowledge_base_version
    from llmops_ref.knowledge_base import KnowledgeBase

    base = rag.knowledge_base
    mine, staff = knowledge_base_version(base), knowledge_base_version(base, ["staff"])
    assert mine != staff and len(mine) == 16
    base.ingest([tmp_path / "docs"], progress=False)    # nothing changed
    assert knowledge_base_version(base) == mine
    other = KnowledgeBase.open(tmp_path / "other", HashEmbeddings())
    other.ingest([tmp_path / "docs"], progress=False)
    assert knowledge_base_version(other) == mine    # another machine with the same documents
    (tmp_path / "docs" / "fees.md").unlink()
    base.ingest([tmp_path / "docs"], progress=False)
    assert knowledge_base_version(base) != mine


def test_a_version_that_comes_into_force_makes_the_old_answer_stale(cache, rag, tmp_path):
    import datetime

    base = rag.knowledge_base
    (tmp_path / "docs" / "fees-2030.md").write_text("---\neffective_date: 2030-01-01\nsupersedes: fees.md\n---\n# Fees\n\nThe Plus account costs £9 a month.\n")
    base.ingest([tmp_path / "docs"], progress=False)
    base.today = lambda: datetime.date(2029, 12, 31)
    assert [cache.answer(QUESTION, rag, scope="acme").source for _ in range(2)] == ["upstream", "exact"]
    base.today = lambda: datetime.date(2030, 1, 1)
    assert cache.answer(QUESTION, rag, scope="acme").source == "upstream"


def test_every_setting_of_a_rag_is_in_its_scope(rag):
    from llmops_ref.retrieval import Retrieval

    digests = {scope_of(rag, "acme").digest}
    for name, value in {"k": 9, "budget": 7, "sentences": 3, "threshold": 0.9, "options": {"temperature": 1.0}, "model_name": "other", "decline": len, "retrieval": Retrieval()}.items():
        before = getattr(rag, name)
        setattr(rag, name, value)
        digests.add(scope_of(rag, "acme").digest)
        setattr(rag, name, before)
    assert len(digests) == 9 and scope_of(rag, "acme").digest in digests
    assert scope_of(rag, "acme", knowledge_base="handbook").knowledge_base == "handbook"


# One folder


def test_open_lays_out_a_folder_that_the_next_process_reads(tmp_path):
    with AnswerCache.open(tmp_path / "cache", gate=None) as cache:
        cache.answer("Q?", Upstream(), scope="acme")
    with AnswerCache.open(tmp_path / "cache", gate=None) as cache:
        assert cache.answer("Q?", Upstream(), scope="acme").source == "exact"
        overview = cache.stats()
    assert {"exact.sqlite3", "ledger.sqlite3", "prices.toml"} <= {path.name for path in (tmp_path / "cache").iterdir()}
    assert overview.exact.entries == 1 and overview.ledger.total.requests == 2 and overview.semantic is None
    json.dumps(overview.to_dict(), allow_nan=False)
    assert "1 entries" in str(overview) and "| exact | 1 |" in overview._repr_markdown_()


def test_a_price_file_with_an_error_is_told_when_the_cache_is_opened(tmp_path):
    (tmp_path / "prices.toml").write_text("[models.a]\ninput = 'x'\n")
    with pytest.raises(PriceFileError, match=r"prices\.toml"):
        AnswerCache.open(tmp_path, gate=None)


def test_names_of_the_issue_import_from_here():
    for name in caching.__all__:
        assert getattr(caching, name) is not None
    assert CachedAnswer(Response("x"), "upstream").text == "x" and CacheStats() is not None
    gc.collect()


def _ask_in_child(folder, log, start):
    start.wait()

    def upstream(prompt):
        with open(log, "a") as file:
            file.write("call\n")
        time.sleep(0.3)
        return "answer"

    with AnswerCache.open(folder, gate=None) as cache, ThreadPoolExecutor(8) as pool:
        assert {answer.text for answer in pool.map(lambda _: cache.answer("Q?", upstream, scope="acme"), range(8))} == {"answer"}


def test_processes_share_one_call_one_folder_and_one_ledger(tmp_path):
    import multiprocessing

    context = multiprocessing.get_context("fork")
    start = context.Event()
    children = [context.Process(target=_ask_in_child, args=(tmp_path / "cache", tmp_path / "log", start)) for _ in range(4)]
    for child in children:
        child.start()
    start.set()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 4 and (tmp_path / "log").read_text() == "call\n"
    with AnswerCache.open(tmp_path / "cache", gate=None) as cache:
        total = cache.stats().ledger.total
    assert (total.requests, total.misses, total.hits + total.shared) == (32, 1, 31)


# With the real semantic cache


def test_shadow_then_calibrated_then_taken_back_with_the_real_semantic_cache(tmp_path):
    from hash_embeddings import HashEmbeddings

    from llmops_ref.caching import Pair

    names = [f"{first}{second}" for first in ("Ab", "Ce", "Do", "Fi", "Gu") for second in ("lor", "mir", "nos", "pan", "rel", "sut", "tav", "vix")]
    pairs = [Pair(f"What does the {name} account cost a month?", f"what does the {name} account cost a month", True, "made", "case") for name in names]
    pairs += [Pair(f"What does the {name} account cost a month?", f"What does the {other} account cost a month?", False, "made", "name") for name, other in itertools.pairwise(names)]
    upstream = Upstream()
    asked, reworded, near = "What does the Plus account cost a month?", "what does the Plus account cost a month", "What does the Prime account cost a month?"
    with AnswerCache.open(tmp_path, HashEmbeddings(512), gate=None, max_wrong_hit_rate=0.2) as cache:
        with pytest.warns(UserWarning, match="shadow"):
            assert cache.answer(asked, upstream, scope="a").source == "upstream"
        assert cache.answer(reworded, upstream, scope="a").source == "upstream" and cache.stats().mode == "shadow"
        cache.invalidate(tenant="a")
        report = cache.semantic.calibrate(pairs)
        assert report.serves and cache.stats().mode == "serving", cache.stats().why
        assert cache.answer(asked, upstream, scope="a").source == "upstream"
        hit = cache.answer(reworded, upstream, scope="a")
        assert hit.source == "semantic" and hit.text.endswith(asked) and hit.hit.prompt == asked and asked in hit._repr_markdown_()
        assert cache.answer(near, upstream, scope="a").source == "upstream" and cache.answer(reworded, upstream, scope="b").source == "upstream"
        cache.feedback(hit, False)
        assert cache.answer(reworded, upstream, scope="a").source == "upstream"    # the pair of them is not served again
        assert cache.stats().ledger.total.wrong == 1 and cache.stats().semantic.entries == 4
    with AnswerCache.open(tmp_path, gate=None) as plain:    # without a model the file is kept in step all the same, and read as it was opened
        assert plain.stats().mode == "serving" and not plain._resting._model.loaded
        assert plain.semantic is None and plain.stats().semantic.entries == 4
        assert plain.invalidate(tenant="a") == 6 and plain.stats().semantic.entries == 1
        assert plain.export(tmp_path / "all.jsonl") == {"all.jsonl": 1, "all.semantic.jsonl": 1}
    with AnswerCache.open(tmp_path, HashEmbeddings(512), gate=None) as cache:
        assert cache.answer(reworded, upstream, scope="a").source == "upstream" and cache.stats().mode == "serving"
    for text in ("", "{}", "[]", '{"max_wrong_hit_rate": 2.0, "domain": "x"}', '{"max_wrong_hit_rate": 0.1, "domain": 3}'):
        (tmp_path / "settings.json").write_text(text)
        with AnswerCache.open(tmp_path, gate=None) as cache:
            assert cache._resting.max_wrong_hit_rate == 0.01
