"""Caches behind LangChain, embeddings and Redis: what is stored is data, what is served is right, what is down costs hits only."""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.callbacks import UsageMetadataCallbackHandler
from langchain_core.embeddings import Embeddings
from langchain_core.globals import get_llm_cache, set_llm_cache
from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.fake import FakeListLLM
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, ChatResult, Generation
from pydantic import Field

from llmops_ref.cache_adapters import (
    CachedEmbeddings,
    CacheUnavailableError,
    LangChainCache,
    RedisCache,
    RedisLocks,
    RedisSemanticBackend,
    VectorSearchMissingError,
    VectorShapeError,
)
from llmops_ref.cache_files import CacheDegradedWarning
from llmops_ref.core import BadInputError
from llmops_ref.exact_cache import CacheHit, ExactCache, Response, ResponseCache, Scope
from llmops_ref.single_flight import SingleFlight

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 20.0


def until(condition: Callable[[], bool]) -> None:
    "Wait for a condition, and fail where it does not come."
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, "the condition did not come about"
        time.sleep(0.005)


# ------------------------------------------------------------------ LangChain


class Model(BaseChatModel):
    "A chat model that counts its calls and answers with usage and a tool call."

    temperature: float = 0.0
    finish: str = "stop"
    calls: list[int] = Field(default_factory=list)
    extra: dict[str, Any] = Field(default_factory=dict)

    @property
    def _llm_type(self) -> str:
        return "counting"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"temperature": self.temperature}

    def _generate(self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any) -> ChatResult:
        self.calls.append(1)
        message = AIMessage(
            f"answer {len(self.calls)}", id="run-of-the-first-call",
            tool_calls=[{"name": "lookup", "args": {"fee": 5}, "id": "call-1"}],
            usage_metadata={"input_tokens": 7, "output_tokens": 3, "total_tokens": 10},
            response_metadata={"model_name": "counting-1", "finish_reason": self.finish, "token_usage": {"total_tokens": 10}},
            additional_kwargs=self.extra,
        )
        return ChatResult(generations=[ChatGeneration(message=message)])


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ExactCache]:
    with_cache = ExactCache(tmp_path / "exact.sqlite")
    yield with_cache
    with_cache.close()


@pytest.fixture
def installed(store: ExactCache) -> Iterator[LangChainCache]:
    "The cache of one tenant as LangChain's cache for all models."
    before, cache = get_llm_cache(), LangChainCache(store, "acme")
    set_llm_cache(cache)
    yield cache
    set_llm_cache(before)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_hit_is_the_answer_without_the_bill(installed: LangChainCache, asynchronous: bool) -> None:
    model, usage = Model(), UsageMetadataCallbackHandler()

    def ask() -> Any:
        call = model.ainvoke if asynchronous else model.invoke
        answer = call("What is the fee?", config={"callbacks": [usage]})
        return asyncio.run(answer) if asynchronous else answer

    first, second = ask(), ask()
    assert len(model.calls) == 1
    assert (second.content, second.tool_calls) == (first.content, first.tool_calls)
    assert usage.usage_metadata["counting-1"]["total_tokens"] == 10, "a hit was paid for twice"
    assert second.usage_metadata["input_tokens"] == second.usage_metadata["output_tokens"] == 0
    assert second.response_metadata["cache_hit"]["usage_metadata"]["total_tokens"] == 10
    assert second.response_metadata["finish_reason"] == "stop" and "token_usage" not in second.response_metadata
    assert second.id != first.id, "two messages of one id replace each other in LangGraph's state"


def test_a_hit_can_be_answered_to_and_cached_again(installed: LangChainCache) -> None:
    model = Model()
    for _ in range(4):
        first = model.invoke("What is the fee?")
        model.invoke([HumanMessage("What is the fee?"), first, HumanMessage("Why?")])
    assert len(model.calls) <= 3    # the second turn is stored once behind a fresh answer and once behind a hit


def test_whatever_changes_the_call_changes_the_key(installed: LangChainCache, store: ExactCache) -> None:
    model = Model()
    model.invoke("a")
    assert len({model.invoke("a").content, model.invoke("b").content, model.invoke("a", stop=["x"]).content}) == 3
    warmer = Model(temperature=1.0)
    warmer.invoke("a")
    assert len(warmer.calls) == 1
    for cache in (LangChainCache(store, "other tenant"), LangChainCache(store, Scope("acme", prompt_version="2"))):
        set_llm_cache(cache)
        assert model.invoke("a").content != "answer 1"
    set_llm_cache(installed)
    assert model.invoke("a").content == "answer 1"


def test_language_models_for_text_are_cached_prompt_by_prompt(installed: LangChainCache) -> None:
    model = FakeListLLM(responses=["one", "two", "three"])
    assert model.batch(["a", "b"]) == ["one", "two"]
    assert [generation[0].text for generation in model.generate(["b", "c", "a"]).generations] == ["two", "three", "one"]
    assert asyncio.run(model.ainvoke("c")) == "three"


@pytest.mark.parametrize("finish", ["length", "content_filter", "MAX_TOKENS"])
def test_an_answer_that_was_cut_off_is_not_stored(store: ExactCache, finish: str) -> None:
    model = Model(finish=finish, cache=LangChainCache(store, "acme"))
    assert model.invoke("a").content != model.invoke("a").content
    kept = Model(finish=finish, cache=LangChainCache(store, "acme", keep_cut_off=True))
    assert kept.invoke("a").content == kept.invoke("a").content


@pytest.mark.parametrize("extra", [{"parsed": object()}, {"score": math.inf}, {"pair": (1, 2)}, {"by": {1: 2}}])
def test_what_is_not_data_is_not_stored(store: ExactCache, extra: dict[str, Any]) -> None:
    model = Model(extra=extra, cache=LangChainCache(store, "acme"))
    assert [model.invoke("a").content, model.invoke("a").content] == ["answer 1", "answer 2"]
    assert store.stats().entries == 0


def test_nothing_but_text_and_messages_is_ever_made_from_what_is_stored(store: ExactCache) -> None:
    "A stored record that names a class, as LangChain's own format does, stays a record."
    cache = LangChainCache(store, "acme")
    key = cache._scoped("model").key("prompt")
    constructor = {"lc": 1, "type": "constructor", "id": ["langchain_core", "prompts", "PromptTemplate"], "kwargs": {"template": "x"}}
    assert cache.lookup("prompt", "model") is None
    for data in (None, {}, "no JSON", "[]", *map(json.dumps, (
        {}, {"generations": 7}, {"generations": [constructor]}, {"generations": [{"message": {"content": 7}}]}, {"generations": [7]}
    ))):
        store.put(key, Response("x", data=data))
        assert cache.lookup("prompt", "model") is None
    store.put(key, Response("x", data=json.dumps({"generations": [{"message": {"content": [constructor], "type": "human"}}]})))
    [generation] = cache.lookup("prompt", "model") or []
    assert type(generation) is ChatGeneration and type(generation.message) is AIMessage
    assert generation.message.content == [constructor]


def test_the_gate_decides(store: ExactCache) -> None:
    class Gate:
        def allows(self, prompt: str, response: Response) -> str | None:
            return "no" if "secret" in prompt else None

    seen: list[str] = []

    class Reader:
        def allows(self, prompt: str, response: Response) -> None:
            seen.append(prompt)

    Model(cache=LangChainCache(store, "reader", gate=Reader())).invoke([("system", "Be brief."), ("user", "Wie hoch ist die Gebühr?")])
    assert seen == ["Be brief.\nWie hoch ist die Gebühr?"]
    cache = LangChainCache(store, "acme", gate=Gate())
    for prompt, found in (("a secret", False), ("a fee", True)):
        cache.update(prompt, "model", [Generation(text="answer")])
        assert (cache.lookup(prompt, "model") is not None) == found


def test_an_answer_that_was_invalidated_while_it_was_made_is_not_stored(store: ExactCache) -> None:
    cache = LangChainCache(store, "acme")
    for prompt, call in (("p", lambda: store.invalidate(tenant="acme")), ("q", lambda: cache.clear())):
        assert cache.lookup(prompt, "m") is None
        call()
        cache.update(prompt, "m", [Generation(text="of before")])
        assert cache.lookup(prompt, "m") is None
        cache.update(prompt, "m", [Generation(text="of after")])
        assert cache.lookup(prompt, "m") == [Generation(text="of after")]


def test_clear_leaves_other_tenants_alone(store: ExactCache) -> None:
    one, two = LangChainCache(store, "one"), LangChainCache(store, "two")
    for cache in (one, two):
        cache.update("p", "m", [Generation(text="kept")])
    asyncio.run(one.aclear())
    assert one.lookup("p", "m") is None and two.lookup("p", "m") == [Generation(text="kept")]


# ------------------------------------------------------------------ embeddings


class Vectors(Embeddings):
    "Embeddings that count what they are asked for."

    model_id = "counting/2"

    def __init__(self, dimensions: int = 3) -> None:
        self.dimensions = dimensions
        self.batches: list[list[str]] = []
        self.go = threading.Event()
        self.go.set()

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        assert self.go.wait(LIMIT)
        self.batches.append(list(texts))
        return [[1 / 3 + len(text)] * self.dimensions for text in texts]

    def embed_query(self, text: str) -> list[float]:
        return [-value for value in self.embed_documents([text])[0]]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_each_text_goes_upstream_once(tmp_path: Path, asynchronous: bool) -> None:
    upstream = Vectors()
    cached = CachedEmbeddings(upstream, tmp_path / "vectors.sqlite")

    def documents(texts: list[str]) -> list[list[float]]:
        return asyncio.run(cached.aembed_documents(texts)) if asynchronous else cached.embed_documents(texts)

    first = documents(["a", "bb", "a", "ccc"])
    second = documents(["ccc", "dddd", "bb", "dddd"])
    assert upstream.batches == [["a", "bb", "ccc"], ["dddd"]]
    assert first[0] == first[2] and second[0] == first[3] and second[2] == first[1]
    assert len(cached) == 4
    query = asyncio.run(cached.aembed_query("a")) if asynchronous else cached.embed_query("a")
    assert query == [-value for value in first[0]], "a query was taken for a document"
    assert cached.embed_query("a") == query and len(upstream.batches) == 3
    again = CachedEmbeddings(upstream, tmp_path / "vectors.sqlite")
    assert again.embed_documents(["a", "bb"]) == first[:2] and len(upstream.batches) == 3


class Spelled(Vectors):
    "Gives the numbers that a text spells."

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [json.loads(text) for text in texts]


@pytest.fixture(scope="module")
def spelled(tmp_path_factory: pytest.TempPathFactory) -> CachedEmbeddings:
    return CachedEmbeddings(Spelled(), tmp_path_factory.mktemp("spelled") / "v.sqlite")


@settings(max_examples=25)
@given(rows=st.lists(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=4, max_size=4), min_size=1, max_size=5))
def test_vectors_come_back_bit_by_bit(rows: list[list[float]], spelled: CachedEmbeddings) -> None:
    for _ in range(2):
        got = np.array(spelled.embed_documents([json.dumps(row) for row in rows]), np.float32)
        assert got.tobytes() == np.array(rows, np.float32).tobytes()


def test_what_is_fresh_and_what_is_stored_are_the_same_numbers(tmp_path: Path) -> None:
    "A third has no exact float32: without rounding at once, the first answer would differ from all later ones."
    cached = CachedEmbeddings(Vectors(), tmp_path / "v.sqlite")
    assert cached.embed_documents(["a"]) == cached.embed_documents(["a"])


def test_models_and_namespaces_do_not_mix(tmp_path: Path) -> None:
    upstream = Vectors()
    variants: list[dict[str, str]] = [{}, {"model": "other"}, {"namespace": "acme"}, {"model": "counting/2a"}, {"model": "counting/", "namespace": "2"}]
    for arguments in variants:
        CachedEmbeddings(upstream, tmp_path / "v.sqlite", **arguments).embed_documents(["a"])
    assert len(upstream.batches) == len(variants)


def test_concurrent_queries_share_one_call(tmp_path: Path) -> None:
    upstream = Vectors()
    cached = CachedEmbeddings(upstream, tmp_path / "v.sqlite")
    upstream.go.clear()
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(cached.embed_query, "a") for _ in range(8)]
        until(lambda: sum(cached._flight.waiting(key) for key in list(cached._flight._flights.table)) == 7)
        upstream.go.set()
        assert len({tuple(future.result(LIMIT)) for future in futures}) == 1
    assert len(upstream.batches) == 1


def test_forgotten_texts_are_gone(tmp_path: Path) -> None:
    upstream = Vectors()
    cached = CachedEmbeddings(upstream, tmp_path / "v.sqlite")
    cached.embed_documents(["a", "b"])
    cached.embed_query("a")
    assert cached.forget(["a"]) == 2
    assert len(cached) == 1
    cached.embed_documents(["a", "b"])
    assert upstream.batches[-1] == ["a"]


def test_a_damaged_row_is_computed_again(tmp_path: Path) -> None:
    import sqlite3

    upstream = Vectors()
    cached = CachedEmbeddings(upstream, tmp_path / "v.sqlite")
    right = cached.embed_documents(["a", "b"])
    with sqlite3.connect(tmp_path / "v.sqlite") as link:
        link.execute("UPDATE vectors SET value = (SELECT value FROM vectors v WHERE v.entry != vectors.entry)")
    link.close()
    assert cached.embed_documents(["a", "b"]) == right
    assert len(upstream.batches) == 2, "the vector of another text was served"


def test_a_file_that_is_none_is_set_aside(tmp_path: Path) -> None:
    path, upstream = tmp_path / "v.sqlite", Vectors()
    path.write_bytes(b"this is not a database at all" * 50)
    with pytest.warns(CacheDegradedWarning) as caught:
        cached = CachedEmbeddings(upstream, path)
        assert cached.embed_documents(["a"]) == cached.embed_documents(["a"])
    assert len(caught) == 1 and len(upstream.batches) == 1


def test_a_disk_that_cannot_be_used_is_said_once_and_costs_only_speed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    upstream = Vectors()
    with pytest.warns(CacheDegradedWarning) as caught:
        cached = CachedEmbeddings(upstream, tmp_path / "file" / "v.sqlite")
        assert cached.embed_documents(["a"]) == cached.embed_documents(["a"])
        cached.embed_query("a")
    assert len(caught) == 1
    assert len(upstream.batches) == 3 and len(cached) == 0
    with pytest.raises(CacheUnavailableError, match="nothing was removed"):
        cached.forget(["a"])


def test_a_full_file_makes_room(tmp_path: Path) -> None:
    cached = CachedEmbeddings(Vectors(384), tmp_path / "v.sqlite", max_bytes=1 << 18)
    for start in range(0, 600, 60):
        texts = [f"{number:04}" for number in range(start, start + 60)]
        cached.embed_documents(texts)
        assert cached._store.read(cached._keys("document", texts[-10:])), "what came last is not even tried to be kept"
    assert 20 < len(cached) < 200
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1 << 18


def test_with_a_key_the_file_tells_nothing(tmp_path: Path) -> None:
    upstream = Vectors()
    vector = np.array(CachedEmbeddings(upstream, tmp_path / "v.sqlite", encryption_key=SECRET).embed_documents(["a"]), "<f4").tobytes()
    assert vector not in b"".join(path.read_bytes() for path in tmp_path.iterdir())
    again = CachedEmbeddings(upstream, tmp_path / "v.sqlite", encryption_key=SECRET)
    assert np.array(again.embed_documents(["a"]), "<f4").tobytes() == vector and len(upstream.batches) == 1


def test_a_model_that_gives_too_little_or_another_length_is_an_error(tmp_path: Path) -> None:
    class Short(Vectors):
        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return super().embed_documents(texts)[:-1]

    class Ragged(Vectors):
        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return [[1.0] * (number + 1) for number in range(len(texts))]

    for model in (Short(), Ragged()):
        with pytest.raises(VectorShapeError, match="one vector of one length"):
            CachedEmbeddings(model, tmp_path / "v.sqlite").embed_documents(["a", "b"])
    CachedEmbeddings(Vectors(3), tmp_path / "v.sqlite").embed_documents(["a"])
    with pytest.raises(VectorShapeError, match="4 dimensions, the file holds 3"):
        CachedEmbeddings(Vectors(4), tmp_path / "v.sqlite").embed_documents(["a", "b"])
    with pytest.raises(BadInputError, match="which model"):
        CachedEmbeddings(Nameless(), tmp_path / "v.sqlite")
    with pytest.raises(BadInputError, match="list of strings"):
        CachedEmbeddings(Vectors(), tmp_path / "v.sqlite").embed_documents("abc")    # type: ignore[arg-type]


class Nameless(Embeddings):
    "Embeddings that do not say which model they are."

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return []

    def embed_query(self, text: str) -> list[float]:
        return []


def test_vectors_that_are_not_finite_are_not_kept(tmp_path: Path) -> None:
    class Broken(Vectors):
        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return [[math.nan, 1.0] for _ in texts]

    cached = CachedEmbeddings(Broken(), tmp_path / "v.sqlite")
    assert math.isnan(cached.embed_documents(["a"])[0][0]) and len(cached) == 0


# ------------------------------------------------------------------ Redis

SERVER = shutil.which("redis-server")
needs_redis = pytest.mark.skipif(SERVER is None, reason="needs the program redis-server (Debian: apt-get install redis-server)")


class Server:
    "A Redis on a free port of this machine, keeping nothing."

    def __init__(self, *settings: str) -> None:
        self.settings = settings
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.start()

    def start(self) -> None:
        arguments = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", *self.settings]
        self.process = subprocess.Popen([SERVER or "", *arguments], stdout=subprocess.DEVNULL)
        until(self.up)

    def up(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as link:
                link.sendall(b"PING\r\n")
                return link.recv(7) == b"+PONG\r\n"
        except OSError:
            return False

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.stop()


@pytest.fixture
def redis(server: Server, request: pytest.FixtureRequest) -> Iterator[RedisCache]:
    cache = RedisCache(server.url, prefix=f"test-{abs(hash(request.node.name))}")
    yield cache
    cache.clear()
    cache.close()


KEY = Scope("acme", model="m", prompt_version="3").key("What is the fee?")
SECRET = bytes(range(32))


@needs_redis
def test_what_is_stored_in_redis_comes_back(redis: RedisCache) -> None:
    assert isinstance(redis, ResponseCache)
    assert redis.get(KEY) is None
    response = Response("Five.", 7, 3, 1.5, "m", ("fees",), {"chunks": ["Five."]}, {"a": "\ud800é"})
    assert redis.put(KEY, response, ticket=redis.begin())
    hit = redis.get(KEY)
    assert isinstance(hit, CacheHit) and hit.response == response and hit.kind == "exact" and 0 <= hit.age < LIMIT
    assert redis.get(Scope("other", model="m", prompt_version="3").key("What is the fee?")) is None
    stats = redis.stats()
    assert (stats.entries, stats.hits, stats.misses, stats.stored, stats.degraded) == (1, 1, 2, 1, ())


@needs_redis
def test_entries_end_with_their_time_and_their_tags_with_them(redis: RedisCache) -> None:
    assert redis.put(KEY, Response("a"), ttl=0.05)
    assert redis.put(Scope("acme").key("b"), Response("b"), ttl=math.inf)
    time.sleep(0.1)
    assert redis.get(KEY) is None
    assert redis.stats().entries == 1
    assert redis.put(Scope("acme").key("c"), Response("c"), ttl=0.05)
    tenant = f"{redis.prefix}:tag:{redis._tag('tenant:acme')}"
    assert redis.client.zcard(tenant) == 2 and redis.client.ttl(tenant) == -1    # an entry without end keeps its tag for ever
    only = f"{redis.prefix}:tag:{redis._tag('prompt:3')}"
    until(lambda: not redis.client.exists(only))    # a tag of expired entries goes by itself


@needs_redis
@pytest.mark.parametrize("chosen", [
    {"tenant": "acme"}, {"model": "m"}, {"model": "answered"}, {"prompt": "3"}, {"document": "fees"}, {"tag": "campaign"},
    {"tenant": "acme", "document": "fees"}, {"before": 4e9},
])
def test_invalidated_entries_are_gone_and_others_stay(redis: RedisCache, chosen: dict[str, Any]) -> None:
    other = Scope("other", model="n", prompt_version="4").key("What is the fee?")
    redis.put(KEY, Response("a", model="answered", documents=("fees",)), tags=["campaign"])
    redis.put(other, Response("b"))
    everything = "before" in chosen
    assert redis.invalidate(**chosen) == (2 if everything else 1)
    assert redis.get(KEY) is None
    assert (redis.get(other) is None) == everything
    assert redis.invalidate(**chosen) == 0
    assert redis.stats().invalidated == (2 if everything else 1)


@needs_redis
def test_all_conditions_must_hold(redis: RedisCache) -> None:
    redis.put(KEY, Response("a", documents=("fees",)))
    assert redis.invalidate(tenant="acme", document="other") == redis.invalidate(tenant="acme", before=1.0) == 0
    assert redis.get(KEY) is not None


@needs_redis
def test_an_answer_begun_before_an_invalidation_is_refused(redis: RedisCache) -> None:
    ticket = redis.begin()
    redis.invalidate(document="fees")
    assert not redis.put(KEY, Response("old", documents=("fees",)), ticket=ticket)
    assert redis.put(KEY, Response("on other documents", documents=("limits",)), ticket=ticket)
    assert redis.put(KEY, Response("new", documents=("fees",)), ticket=redis.begin())
    assert redis.begin() == redis.begin(), "what shares a flight may go by the ticket"
    ticket = redis.begin()
    redis.invalidate(before=1.0)
    assert redis.begin() != ticket
    ticket = redis.begin()
    redis.clear()
    assert not redis.put(KEY, Response("old"), ticket=ticket)
    ticket = redis.begin()
    redis.client.flushdb()    # what was invalidated is forgotten with everything else
    assert not redis.put(KEY, Response("old"), ticket=ticket)
    for nonsense in ("none", "a.b", "00.-1", "ff.1.2"):
        assert not redis.put(KEY, Response("old"), ticket=nonsense)
    assert redis.get(KEY) is None


@needs_redis
def test_a_ticket_older_than_the_memory_of_invalidations_is_refused(server: Server) -> None:
    short = RedisCache(server.url, prefix="short", retention=0.05)
    ticket = short.begin()
    short.invalidate(document="fees")
    time.sleep(0.1)
    short.invalidate(tenant="nobody")    # forgets the first
    assert not short.put(KEY, Response("old", documents=("fees",)), ticket=ticket)
    assert short.put(KEY, Response("new", documents=("fees",)), ticket=short.begin())
    short.clear()


@needs_redis
def test_a_tag_set_that_redis_evicted_takes_its_entries_along(redis: RedisCache) -> None:
    "Otherwise an entry without its tag would survive an invalidation by that tag."
    redis.put(KEY, Response("a", documents=("fees",)))
    redis.client.delete(f"{redis.prefix}:tag:{redis._tag('document:fees')}")
    assert redis.get(KEY) is None
    assert redis.stats().entries == 0


@needs_redis
@settings(max_examples=15)
@given(steps=st.lists(st.tuples(st.sampled_from(["put", "late", "get", "invalidate"]), st.integers(0, 2), st.integers(0, 2)), max_size=25))
def test_no_entry_is_served_after_its_invalidation(server: Server, steps: list[tuple[str, int, int]]) -> None:
    "Against a model in plain Python: what is found is the newest answer of this very tenant, begun after the last invalidation."
    redis, known, late, number = RedisCache(server.url, prefix="model"), {}, {}, 0
    redis.clear()
    for step, tenant, question in steps:
        key, number = Scope(f"t{tenant}").key(f"q{question}"), number + 1
        document = f"d{question}"
        if step == "put":
            assert redis.put(key, Response(str(number), documents=(document,)), ticket=redis.begin())
            known[tenant, question] = str(number)
        elif step == "late":
            if (tenant, question) in late:
                ticket, alive = late.pop((tenant, question))
                assert redis.put(key, Response(str(number), documents=(document,)), ticket=ticket) == alive
                if alive:
                    known[tenant, question] = str(number)
            else:
                late[tenant, question] = (redis.begin(), True)
        elif step == "get":
            hit = redis.get(key)
            assert (hit.response.text if hit else None) == known.get((tenant, question))
        else:
            redis.invalidate(tenant=f"t{tenant}", document=document)
            known.pop((tenant, question), None)
            if (tenant, question) in late:
                late[tenant, question] = (late[tenant, question][0], False)
    redis.close()


@needs_redis
def test_with_a_key_redis_sees_neither_answers_nor_names(server: Server) -> None:
    cache = RedisCache(server.url, prefix="sealed", encryption_key=SECRET)
    cache.put(KEY, Response("SECRET ANSWER", documents=("SECRET-DOCUMENT",)), tags=["SECRET-TAG"])
    client = cache.client
    dump = b" ".join(name + client.dump(name) for name in client.keys("{sealed}*"))
    for word in (b"SECRET", b"acme", KEY.digest.encode(), KEY.digest[:16].encode()):
        assert word not in dump
    hit = cache.get(KEY)
    assert hit is not None and hit.response.text == "SECRET ANSWER"
    for key in (None, bytes(32)):
        assert RedisCache(server.url, prefix="sealed", encryption_key=key).get(KEY) is None
    assert cache.invalidate(tag="SECRET-TAG") == 1


@needs_redis
@pytest.mark.parametrize("encryption_key", [None, SECRET])
def test_an_entry_that_was_changed_or_moved_is_a_miss(server: Server, encryption_key: bytes | None) -> None:
    cache = RedisCache(server.url, prefix="changed", encryption_key=encryption_key)
    other = Scope("other").key("What is the fee?")
    for key, text in ((KEY, "mine"), (other, "theirs")):
        cache.put(key, Response(text))
    mine, theirs = (f"{{changed}}:entry:{cache._vault.number(key.digest):016x}" for key in (KEY, other))
    value = bytes(cache.client.hget(theirs, "value"))
    cache.client.hset(mine, "value", value)
    assert cache.get(KEY) is None
    for changed in (b"", b"\x80\x04.", b"{}", value[:-1], value[:-1] + bytes([value[-1] ^ 1])):
        cache.client.hset(theirs, "value", changed)
        assert cache.get(other) is None
    cache.clear()


@needs_redis
def test_a_redis_that_goes_away_costs_hits_and_not_requests() -> None:
    own = Server()
    cache = RedisCache(own.url, prefix="app")
    assert cache.put(KEY, Response("a"))
    own.stop()
    with pytest.warns(CacheDegradedWarning, match="Redis cannot be used") as caught:
        began = time.monotonic()
        for _ in range(200):
            assert cache.get(KEY) is None
            assert not cache.put(KEY, Response("b"), ticket=cache.begin())
        spent = time.monotonic() - began
    assert len(caught) == 1 and "127.0.0.1" not in str(caught[0].message)
    assert spent < 200 * 0.25 / 4, "every call paid for the dead server"
    assert cache.stats().degraded
    with pytest.raises(CacheUnavailableError, match="may still be served"):
        cache.invalidate(tenant="acme")
    own.start()
    until(lambda: cache.put(KEY, Response("c")))
    assert cache.stats().degraded == ()
    own.stop()


@needs_redis
def test_a_redis_that_hangs_is_left_alone_after_its_time_limit() -> None:
    own = Server()
    cache = RedisCache(own.url, prefix="app", timeout=0.1)
    cache.put(KEY, Response("a"))
    own.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.warns(CacheDegradedWarning, match="TimeoutError"):
            assert cache.get(KEY) is None
            began = time.perf_counter()
            for _ in range(50):
                assert cache.get(KEY) is None
            assert time.perf_counter() - began < 50 * 0.1 / 4
    finally:
        own.process.send_signal(signal.SIGCONT)
    until(lambda: cache.get(KEY) is not None)
    own.stop()


@needs_redis
def test_a_redis_that_is_full_refuses_answers_and_not_invalidations(redis: RedisCache) -> None:
    assert redis.put(KEY, Response("a"))
    redis.client.config_set("maxmemory", 1)
    try:
        with pytest.warns(CacheDegradedWarning):
            assert not redis.put(Scope("acme").key("b"), Response("b"))
        assert redis.invalidate(prompt="3") == 1, "a full Redis must still forget"
    finally:
        redis.client.config_set("maxmemory", 0)
    until(lambda: redis.put(KEY, Response("c")))


@needs_redis
def test_langchain_over_redis_does_not_block_the_loop(redis: RedisCache) -> None:
    async def main() -> None:
        model = Model(cache=LangChainCache(redis, "acme"))
        threads = set()
        get = redis.get
        redis.get = lambda key: (threads.add(threading.get_ident()), get(key))[1]    # type: ignore[method-assign]
        first, second = await model.ainvoke("a"), await model.ainvoke("a")
        assert first.content == second.content and len(model.calls) == 1
        assert threading.get_ident() not in threads
        assert (await model.ainvoke("b")).content == "answer 2"
        cache = LangChainCache(redis, "acme")
        assert await cache.alookup("p", "m") is None
        redis.invalidate(tenant="acme")
        await cache.aupdate("p", "m", [Generation(text="of before")])
        assert await cache.alookup("p", "m") is None

    asyncio.run(main())


@needs_redis
def test_one_flight_for_many_machines(server: Server) -> None:
    caches = [RedisCache(server.url, prefix="machines") for _ in range(4)]
    calls: list[int] = []

    def machine(cache: RedisCache) -> set[str]:
        flight = SingleFlight(locks=RedisLocks(cache, lease=1.0))

        def compute() -> str:
            calls.append(1)
            time.sleep(0.3)
            cache.put(KEY, Response("answer"))
            return "answer"

        def recall() -> str | None:
            hit = cache.get(KEY)
            return hit.response.text if hit else None

        with ThreadPoolExecutor(8) as pool:
            return {future.result(LIMIT) for future in [pool.submit(flight.run, KEY.digest, recall, compute) for _ in range(8)]}

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(machine, caches)) == [{"answer"}] * 4
    assert len(calls) == 1
    assert not caches[0].client.keys("{machines}:flight:*")
    caches[0].clear()


@needs_redis
def test_a_lock_is_renewed_while_it_is_held_and_free_after_a_kill(server: Server, redis: RedisCache) -> None:
    locks = RedisLocks(redis, lease=0.3)
    release = locks.take("k")
    assert release is not None
    time.sleep(0.8)
    assert RedisLocks(redis).take("k") is None, "the lock was not renewed"
    release()
    release()
    until(lambda: locks._renewer is None)
    code = f"""
import os
from llmops_ref.cache_adapters import RedisCache, RedisLocks
assert RedisLocks(RedisCache({server.url!r}, prefix={redis.prefix.strip("{}")!r}), lease=0.5).take("k")
os.kill(os.getpid(), 9)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == -9
    assert locks.take("k") is None
    taken: list[Any] = []
    until(lambda: taken.append(locks.take("k")) or taken[-1] is not None)
    taken[-1]()


@needs_redis
def test_without_redis_every_machine_makes_its_own_call() -> None:
    own = Server()
    flight = SingleFlight(locks=RedisLocks(RedisCache(own.url, prefix="app")), timeout=LIMIT)
    own.stop()
    with pytest.warns(CacheDegradedWarning):
        assert flight.run("k", lambda: None, lambda: "answer") == "answer"


@needs_redis
def test_a_release_does_not_free_the_lock_of_the_next(redis: RedisCache) -> None:
    locks = RedisLocks(redis, lease=10)
    release = locks.take("k")
    assert release is not None
    redis.client.delete(*redis.client.keys(f"{redis.prefix}:flight:*"))    # the lease ran out
    next_one = RedisLocks(redis).take("k")
    assert next_one is not None
    release()
    assert RedisLocks(redis).take("k") is None
    next_one()


@needs_redis
def test_a_cluster_keeps_an_application_on_one_node(tmp_path: Path) -> None:
    library = pytest.importorskip("redis")
    own = Server("--cluster-enabled", "yes", "--cluster-port", str(port_above()), "--dir", str(tmp_path))
    try:
        with library.Redis(port=own.port) as node:
            node.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            until(lambda: b"cluster_state:ok" in node.execute_command("CLUSTER", "INFO"))
        cache = RedisCache(library.RedisCluster(host="127.0.0.1", port=own.port), prefix="app")
        ticket = cache.begin()
        assert cache.put(KEY, Response("a", documents=("fees",)), ticket=ticket)
        hit = cache.get(KEY)
        assert hit is not None and cache.stats().entries == 1
        release = RedisLocks(cache).take("k")
        assert release is not None and RedisLocks(cache).take("k") is None
        release()
        assert cache.invalidate(document="fees") == 1 and cache.get(KEY) is None
        assert not cache.put(KEY, Response("a", documents=("fees",)), ticket=ticket)
        assert cache.stats().degraded == ()
        cache.close()
    finally:
        own.stop()


def port_above() -> int:
    "A free port that a cluster's own port can have."
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@needs_redis
def test_a_redis_without_vector_search_says_what_to_install(redis: RedisCache) -> None:
    with pytest.raises(VectorSearchMissingError, match="Redis 8"):
        RedisSemanticBackend(redis, model="m", dimensions=3)


def test_bad_arguments_of_redis_are_refused() -> None:
    pytest.importorskip("redis")
    for arguments in ({"redis": "http://x", "prefix": "a"}, {"redis": 7, "prefix": "a"}, {"redis": "redis://localhost", "prefix": ""},
                      {"redis": "redis://localhost", "prefix": "a}b"}, {"redis": "redis://localhost?decode_responses=True", "prefix": "a"},
                      {"redis": "redis://localhost", "prefix": "a", "ttl": -1}, {"redis": "redis://localhost", "prefix": "a", "encryption_key": b"short"}):
        with pytest.raises(BadInputError):
            RedisCache(**arguments)    # type: ignore[arg-type]
    cache = RedisCache("redis://localhost", prefix="a")
    for call in (lambda: cache.get("text"), lambda: cache.put(KEY, "text"), lambda: cache.put(KEY, Response("a", data=object())),    # type: ignore[arg-type]
                 lambda: cache.put(KEY, Response("a", data=math.nan)), lambda: cache.invalidate(), lambda: cache.invalidate(before=math.nan), lambda: cache.put(KEY, Response("a"), tags="abc"),
                 lambda: cache.put(KEY, Response("a"), ttl=0), lambda: RedisLocks(cache, lease=0)):
        with pytest.raises(BadInputError):
            call()


# ------------------------------------------------------------------ RedisVL


def searching(port: int) -> Any:
    "A client of a real Redis that answers RedisVL's search commands itself, by looking at every key: what Debian's Redis lacks."
    library = pytest.importorskip("redis")
    pytest.importorskip("redisvl")

    class Searching(library.Redis):    # type: ignore[misc, name-defined]
        indexes: ClassVar[dict[str, tuple[Any, ...]]] = {}    # of this client: the class is made anew for each

        def execute_command(self, *arguments: Any, **options: Any) -> Any:
            command, ask = arguments[0], super().execute_command
            if command == "FT._LIST":
                return [name.encode() for name in self.indexes]
            if command == "FT.INFO" and arguments[1] not in self.indexes:
                raise library.ResponseError("Unknown index name")
            if command == "FT.INFO":
                return []
            if command == "FT.CREATE":
                assert arguments[arguments.index("PREFIX") + 1] in (1, "1")
                self.indexes[arguments[1]] = arguments
                return b"OK"
            if command != "FT.SEARCH":
                return ask(*arguments, **options)
            if arguments[1] not in self.indexes:
                raise library.ResponseError("no such index")
            created = self.indexes[arguments[1]]
            prefix = created[created.index("PREFIX") + 2]
            limit = int(arguments[arguments.index("LIMIT") + 2])
            asked = np.frombuffer(arguments[arguments.index("vector") + 1], "<f4")
            rows = []
            for key in ask("KEYS", f"{prefix}:*"):
                stored = np.frombuffer(ask("HGET", key, "vector"), "<f4")
                rows.append((1 - float(asked @ stored / np.linalg.norm(asked) / np.linalg.norm(stored)), key))
            rows = sorted(rows)[:limit]
            found = [(key, [b"vector_distance", str(distance).encode(), b"record", ask("HGET", key, "record")]) for distance, key in rows]
            return [len(rows), *(part for one in found for part in one)]

    return Searching(port=port, protocol=2)


@pytest.fixture
def search(server: Server) -> Iterator[RedisSemanticBackend]:
    cache = RedisCache(searching(server.port), prefix="semantic", encryption_key=SECRET)
    yield RedisSemanticBackend(cache, model="m", dimensions=3)
    cache.client.flushdb()


@needs_redis
def test_neighbours_come_from_the_askers_scope_only(search: RedisSemanticBackend) -> None:
    for tenant in ("acme", "other"):
        for number, vector in enumerate(([1, 0, 0], [1, 1, 0], [0, 0, 1])):
            assert search.add(f"e{number}", vector, {"text": f"{tenant} {number}"}, scope=tenant)
    found = search.nearest([1, 0.1, 0], scope="acme", limit=2)
    assert [(one.id, one.record["text"]) for one in found] == [("e0", "acme 0"), ("e1", "acme 1")]
    assert found[0].similarity == pytest.approx(1 / np.sqrt(1.01), abs=1e-6)
    assert search.nearest([1, 0, 0], scope=Scope("acme", prompt_version="2")) == []
    assert search.remove(["e0", "missing"], scope="acme") == 1 and search.remove([], scope="acme") == 0
    assert [one.id for one in search.nearest([1, 0, 0], scope="acme", limit=1)] == ["e1"]
    assert [one.id for one in search.nearest([1, 0, 0], scope="other", limit=1)] == ["e0"]


@needs_redis
def test_an_index_that_was_lost_is_made_again(search: RedisSemanticBackend) -> None:
    assert search.add("e", [1, 0, 0], {}, scope="acme")
    search._cache.client.indexes.clear()
    with pytest.warns(CacheDegradedWarning):
        assert search.nearest([1, 0, 0], scope="acme") == []
    until(lambda: [one.id for one in search.nearest([1, 0, 0], scope="acme")] == ["e"])


@needs_redis
def test_an_entry_that_was_moved_between_scopes_is_not_served(search: RedisSemanticBackend) -> None:
    search.add("e", [1, 0, 0], {"text": "theirs"}, scope="other", ttl=100)
    client = search._cache.client
    theirs, mine = (f"{search.schema(scope)['index']['prefix']}:e" for scope in ("other", "acme"))
    assert 0 < client.ttl(theirs) <= 100
    client.hset(mine, mapping=client.hgetall(theirs))
    assert search.nearest([1, 0, 0], scope="acme") == []
    assert b"theirs" not in b"".join(client.hgetall(theirs).values())


@needs_redis
def test_a_search_that_goes_away_finds_nothing_and_a_removal_says_so() -> None:
    own = Server()
    backend = RedisSemanticBackend(RedisCache(searching(own.port), prefix="app"), model="m", dimensions=3)
    assert backend.add("e", [1, 0, 0], {}, scope="acme")
    own.stop()
    with pytest.warns(CacheDegradedWarning, match="ConnectionError"):
        assert backend.nearest([1, 0, 0], scope="acme") == []
    assert not backend.add("e", [1, 0, 0], {}, scope="acme")
    with pytest.raises(CacheUnavailableError, match="did not remove"):
        backend.remove(["e"], scope="acme")
    with pytest.raises(CacheUnavailableError, match="did not say"):
        RedisSemanticBackend(RedisCache(own.url, prefix="app"), model="m", dimensions=3)


@needs_redis
def test_redisvl_accepts_the_schema(search: RedisSemanticBackend) -> None:
    from redisvl.schema import IndexSchema

    names = set()
    for scope, model, dimensions in (("acme", "m", 3), ("other", "m", 3), ("acme", "n", 3), ("acme", "m", 4)):
        backend = RedisSemanticBackend(search._cache, model=model, dimensions=dimensions)
        schema = IndexSchema.from_dict(backend.schema(scope))
        assert schema.fields["vector"].attrs.dims == dimensions    # type: ignore[union-attr]
        names.add(schema.index.name)
        assert schema.index.prefix == schema.index.name and "acme" not in schema.index.name
    assert len(names) == 4


@needs_redis
@pytest.mark.parametrize("vector", [[1, 0], [0, 0, 0], [math.nan, 0, 0], [[1, 0, 0]]])
def test_vectors_that_cannot_be_searched_for_are_refused(search: RedisSemanticBackend, vector: Any) -> None:
    with pytest.raises(BadInputError, match="3 finite numbers"):
        search.nearest(vector, scope="acme")
