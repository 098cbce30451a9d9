"The exact cache: keys that nothing can confuse, answers that stay in their scope, and a file that never lies."

import contextlib
import copy
import dataclasses
import enum
import json
import math
import multiprocessing
import os
import pickle
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import unicodedata
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage

from llmops_ref.core import BadInputError
from llmops_ref.exact_cache import (
    CacheDegradedWarning,
    CacheHit,
    CacheKey,
    CacheStats,
    ExactCache,
    Response,
    ResponseCache,
    Scope,
    canonical,
    normalized,
)

SCOPE = Scope("acme", model="m", prompt_version="v3", knowledge_base="k7")
KEY = SCOPE.key("What is the daily limit?")
ANSWER = Response("1000 pounds", 10, 3, 0.5, "m-1", ("d1", "d2"))
SECRET = bytes(range(32))

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
texts = st.sampled_from(["", "a", "b", "ab", "a:", "s1:a", "1", "é", "e\u0301"])
objects = st.dictionaries(texts, st.sampled_from([0, 0.0, "0", None, False, [], {}]), max_size=2)
scopes = st.fixed_dictionaries({
    "tenant": texts.filter(bool), "model": texts, "revision": texts, "parameters": objects, "tools": st.lists(objects, max_size=2),
    "tool_choice": st.sampled_from([None, "auto", "none", {"name": "a"}]), "system": texts, "prompt_version": texts,
    "knowledge_base": texts, "policy": texts, "groups": st.frozensets(texts, max_size=2), "extra": objects,
})
requests = st.tuples(scopes, st.lists(st.tuples(st.sampled_from(["user", "system", "assistant"]), texts), min_size=1, max_size=3), st.booleans())


def exact(value):
    "JSON text that tells types apart and orders keys: what equality of requests means here."
    return json.dumps(value, sort_keys=True, default=sorted)


@given(json_values, json_values)
@settings(max_examples=60)
def test_canonical_text_is_equal_for_equal_data_only(one, other):
    assert (canonical(one) == canonical(other)) == (exact(one) == exact(other))


@given(requests, requests)
@settings(max_examples=150)
def test_requests_that_differ_in_any_field_never_share_a_key(one, other):
    keys = [Scope(**scope).key(messages, normalize=normalize) for scope, messages, normalize in (one, other)]
    plain = [
        exact([scope, [[role, normalized(text) if normalize else text] for role, text in messages], normalize])
        for scope, messages, normalize in (one, other)
    ]
    assert (keys[0].digest == keys[1].digest) == (plain[0] == plain[1])


@given(scopes, st.sampled_from([field.name for field in dataclasses.fields(Scope) if field.init]), scopes)
@settings(max_examples=150)
def test_changing_one_field_of_a_scope_changes_the_key(fields, name, others):
    changed = {**fields, name: others[name]}
    same = exact(fields[name]) == exact(others[name])
    assert (Scope(**fields).key("q") == Scope(**changed).key("q")) is same
    assert (Scope(**fields) == Scope(**changed)) is same


@given(st.lists(st.tuples(texts.filter(bool), texts, objects), min_size=1, max_size=3))
def test_the_short_way_to_a_message_s_text_is_the_canonical_one(messages):
    from llmops_ref.exact_cache import _ROLES, _messages
    dicts = [{**{f"x{name}": value for name, value in rest.items()}, "role": role, "content": text} for role, text, rest in messages]
    lists = [[_ROLES.get(one["role"], one["role"]), None, one["content"], {k: v for k, v in one.items() if k[0] == "x"}] for one in dicts]
    assert _messages(dicts, False) == canonical(lists)


def test_all_forms_of_a_request_have_one_key():
    forms = ["hi", [{"role": "user", "content": "hi"}], [HumanMessage("hi", id="7")], [("human", "hi")], ({"content": "hi", "role": "human", "id": "x"},)]
    assert len({SCOPE.key(form).digest for form in forms}) == 1
    assert SCOPE.key([AIMessage("x", response_metadata={"id": 1}, usage_metadata={"input_tokens": 1, "output_tokens": 1, "total_tokens": 2})]) == SCOPE.key(
        [{"role": "assistant", "content": "x"}])


def test_what_reaches_a_model_is_in_the_key():
    call = {"name": "pay", "args": {"to": "bob"}, "id": "1"}
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    variants = [
        [HumanMessage("x")], [SystemMessage("x")], [AIMessage("x")], [ChatMessage("x", role="critic")], [HumanMessage("x", name="bob")],
        [HumanMessage([{"type": "text", "text": "x"}])], [HumanMessage([{"type": "text", "text": "x"}, image])],
        [HumanMessage([image, {"type": "text", "text": "x"}])],
        [AIMessage("x", tool_calls=[call])], [AIMessage("x", tool_calls=[{**call, "args": {"to": "eve"}}])],
        [AIMessage("x", tool_calls=[{**call, "id": "2"}])], [AIMessage("x", additional_kwargs={"reasoning_content": "r"})],
        [ToolMessage("x", tool_call_id="1")], [ToolMessage("x", tool_call_id="2")], [ToolMessage("x", tool_call_id="1", status="error")],
        [HumanMessage("x"), HumanMessage("x")], [HumanMessage("xx")], [{"role": "user", "content": "x", "cache": True}],
        [{"role": "user", "content": None}], [{"role": "user", "content": ""}],
    ]
    assert len({SCOPE.key(messages).digest for messages in variants}) == len(variants)


@pytest.mark.parametrize("value", [b"x", {1}, math.nan, math.inf, {1: "a"}, object(), [1, {"a": (b"",)}], {None: 1}])
def test_what_is_not_json_is_refused_with_a_remedy(value):
    with pytest.raises(BadInputError) as error:
        Scope("acme", parameters={"x": value})
    assert error.value.remedy
    with pytest.raises(BadInputError):
        SCOPE.key([{"role": "user", "content": [value]}])


def test_a_value_that_contains_itself_is_refused():
    loop = []
    loop.append(loop)
    with pytest.raises(BadInputError, match="contains itself"):
        canonical(loop)


@pytest.mark.parametrize("fields", [
    {"tenant": ""}, {"tenant": None}, {"tenant": "a", "groups": "staff"}, {"tenant": "a", "groups": [1]}, {"tenant": "a", "model": 7},
    {"tenant": "a", "tools": "search"}, {"tenant": "a", "parameters": [1]}, {"tenant": "a", "extra": None},
])
def test_bad_scopes_are_refused(fields):
    with pytest.raises(BadInputError):
        Scope(**fields)


@pytest.mark.parametrize("messages", [[], None, 7, [7], [{"content": "x"}], [("user", "a", "b")], ["text"], {"role": "user", "content": "x"}])
def test_bad_messages_are_refused(messages):
    with pytest.raises(BadInputError):
        SCOPE.key(messages)


def test_enumerations_count_as_their_values():
    class Name(str, enum.Enum):    # noqa: UP042 (its members format as their names, which is the trap)
        ACME = "acme"
        USER = "user"

    assert Scope(Name.ACME).digest == Scope("acme").digest and canonical([Name.ACME]) == canonical(["acme"])
    assert SCOPE.key([{"role": Name.USER, "content": Name.ACME}]) == SCOPE.key("acme")


def test_lone_surrogates_count_as_themselves():
    assert len({SCOPE.key(text).digest for text in ("\ud83d\ude00", "😀", "\ud83d", "\\ud83d")}) == 4


def test_a_scope_cannot_be_changed_and_survives_copying():
    parameters = {"stop": ["a"], "nested": {"x": [1]}}
    scope = Scope("acme", parameters=parameters, groups={"b", "a"})
    digest = scope.digest
    parameters["stop"].append("b")
    assert scope.parameters["stop"] == ("a",)
    for change in (lambda: scope.parameters.update(x=1), lambda: scope.parameters["nested"].pop("x"), lambda: setattr(scope, "tenant", "eve")):
        with pytest.raises((TypeError, AttributeError)):
            change()
    copies = copy.deepcopy(scope), pickle.loads(pickle.dumps(scope)), dataclasses.replace(scope), Scope.of(scope)
    assert all(one == scope and one.digest == digest and hash(one) == hash(scope) for one in copies)
    assert Scope.of("acme") == Scope("acme") and scope.groups == ("a", "b") and scope != "acme"
    with pytest.raises(BadInputError):
        Scope.of(7)


def test_normalising_is_a_choice_of_its_own():
    left, right = "ﬁne  print\n", "fine print"
    assert SCOPE.key(left, normalize=True) == SCOPE.key(right, normalize=True) != SCOPE.key(right)
    assert SCOPE.key(left) != SCOPE.key(right)
    blocks = [[{"role": "user", "content": [{"type": "text", "text": text}, "x  y", {"type": "image", "data": "a  b"}]}] for text in (left, right)]
    assert SCOPE.key(blocks[0], normalize=True) == SCOPE.key(blocks[1], normalize=True)
    blocks[1][0]["content"][2]["data"] = "a b"
    assert SCOPE.key(blocks[0], normalize=True) != SCOPE.key(blocks[1], normalize=True)
    assert SCOPE.key([{"role": "user", "content": None}], normalize=True)
    assert normalized(unicodedata.normalize("NFD", "é")) == "é"


def test_responses_round_trip_and_bad_records_are_refused():
    full = Response("t", 1, 2, 3.5, "m", ("d",), {"a": [1]}, {"b": None})
    assert Response.from_dict(json.loads(json.dumps(full.to_dict()))) == full
    assert Response.from_dict({**full.to_dict(), "later": 1}) == full
    assert Response("x", documents=["d"]).documents == ("d",)
    bad = [{}, None, {"text": 1}, {"text": "x", "input_tokens": "3"}, {"text": "x", "seconds": -1}, {"text": "x", "input_tokens": True},
           {"text": "x", "documents": [1]}, {"text": "x", "metadata": []}, {"text": "x", "seconds": math.nan}]
    for record in bad:
        with pytest.raises(BadInputError):
            Response.from_dict(record)


def test_hits_and_counts_have_a_display():
    hit = CacheHit(Response("a|b\nc"), "semantic", "1", 61.0, 0.97, 0.99, "asked")
    assert "0.970" in hit._repr_markdown_() and "a\\|b c" in hit._repr_markdown_()
    stats = CacheStats(hits=1, misses=3, degraded=("full",))
    assert stats.hit_rate == 0.25 and stats.to_dict()["degraded"] == ["full"] and "25.0%" in stats._repr_markdown_()
    json.dumps(stats.to_dict())


@pytest.fixture(params=[None, SECRET], ids=["plain", "encrypted"])
def options(request):
    "Without and with encryption."
    return {"encryption_key": request.param}


@pytest.fixture
def path(tmp_path):
    "Where a cache may lie."
    return tmp_path / "exact.sqlite"


@pytest.fixture
def cache(path, options):
    "An open cache."
    with ExactCache(path, **options) as opened:
        yield opened


@pytest.fixture(autouse=True)
def degraded_is_an_error():
    "A warning that no test asks for fails it."
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheDegradedWarning)
        yield


@contextlib.contextmanager
def degraded(text):
    "The warnings given meanwhile; at least one must hold `text`."
    told = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield told
    told.extend(str(one.message) for one in caught if one.category is CacheDegradedWarning)
    assert any(text in one for one in told), told


def text_of(cache, key=KEY):
    "The answer served, or None."
    hit = cache.get(key)
    return hit and hit.response.text


def test_an_answer_is_served_to_its_own_request_and_after_a_restart(path, options):
    with ExactCache(path, **options) as cache:
        assert isinstance(cache, ResponseCache) and cache.get(KEY) is None and cache.put(KEY, ANSWER)
        hit = cache.get(KEY)
        assert (hit.response, hit.kind, hit.id, hit.similarity, hit.prompt) == (ANSWER, "exact", KEY.digest, 1.0, None) and hit.age >= 0
        assert cache.get(dataclasses.replace(SCOPE, tenant="eve").key("What is the daily limit?")) is None
        assert cache.get(CacheKey(KEY.digest, Scope("eve"))) is None    # the digest alone opens nothing
        stats = cache.stats()
        assert (stats.entries, stats.hits, stats.misses, stats.stored, stats.degraded) == (1, 1, 3, 1, ()) and stats.bytes > 0
    with ExactCache(path, **options) as again:
        assert text_of(again) == "1000 pounds" and text_of(again) == "1000 pounds"
        again.put(KEY, Response("900 pounds"))
        assert text_of(again) == "900 pounds" and again.stats().entries == 1


def test_what_a_caller_does_to_a_hit_changes_nobody_else_s(cache):
    cache.put(KEY, dataclasses.replace(ANSWER, data={"citations": [1]}, metadata={"a": [1]}))
    for _ in range(3):
        hit = cache.get(KEY)
        assert hit.response.data == {"citations": [1]} and hit.response.metadata == {"a": [1]}
        hit.response.data["citations"].append(2)
        hit.response.metadata["a"] = "changed"
    cache.put(KEY, ANSWER)
    cache.get(KEY).response.metadata["x"] = 1
    assert cache.get(KEY).response.metadata == {}


def test_a_folder_gets_a_file_and_only_the_owner_reads_it(tmp_path, options):
    with ExactCache(tmp_path, **options) as cache:
        cache.put(KEY, ANSWER)
        assert cache.path == tmp_path / "exact.sqlite"
        for file in tmp_path.glob("exact.sqlite*"):
            assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0 or file.name.endswith(".lock"), file.name


def test_bad_arguments_are_refused(cache, tmp_path):
    for wrong in (
        lambda: cache.get("key"), lambda: cache.get(CacheKey("zz", SCOPE)), lambda: cache.get(CacheKey("ab", SCOPE)),
        lambda: cache.put(KEY, "text"), lambda: cache.put("key", ANSWER), lambda: cache.put(KEY, Response("x", data={1})),
        lambda: cache.put(KEY, Response("x", metadata={"a": math.nan})), lambda: cache.put(KEY, ANSWER, ttl=0),
        lambda: cache.put(KEY, ANSWER, ttl=True), lambda: cache.put(KEY, ANSWER, ttl=math.nan), lambda: cache.put(KEY, ANSWER, tags="tag"),
        lambda: cache.put(KEY, ANSWER, tags=[1]), lambda: cache.put(KEY, ANSWER, ticket="x"), lambda: cache.put(KEY, ANSWER, ticket=7),
        lambda: cache.invalidate(), lambda: cache.invalidate(tag=""), lambda: cache.invalidate(before="yesterday"), lambda: cache.invalidate(before=math.nan),
        lambda: ExactCache(tmp_path / "x", ttl=-1), lambda: ExactCache(tmp_path / "x", max_bytes=1000),
        lambda: ExactCache(tmp_path / "x", max_bytes=1e9), lambda: ExactCache(tmp_path / "x", encryption_key=b"short"),
        lambda: ExactCache(tmp_path / "x", encryption_key="0" * 32),
    ):
        with pytest.raises(BadInputError):
            wrong()
    assert cache.stats().entries == 0


def test_a_time_to_live_ends(path, options):
    now = [1000.0]
    with ExactCache(path, ttl=60, clock=lambda: now[0], **options) as cache:
        for name, ttl in (("default", None), ("short", 5), ("always", math.inf)):
            cache.put(SCOPE.key(name), Response(name), ttl=ttl)
        for when, served in ((1004.9, {"default", "short", "always"}), (1005.0, {"default", "always"}), (1060.0, {"always"}), (1e9, {"always"})):
            now[0] = when
            assert {name for name in ("default", "short", "always") if cache.get(SCOPE.key(name))} == served
        assert cache.stats().expired == 2 and cache.get(SCOPE.key("always")).age == 1e9 - 1000


@pytest.mark.parametrize("seen", ["by this object", "by another", "before a restart"])
def test_an_expired_entry_stays_expired_when_the_clock_goes_back(path, options, seen):
    now = [1000.0]
    cache = ExactCache(path, ttl=60, clock=lambda: now[0], **options)
    cache.put(KEY, ANSWER)
    cache.put(SCOPE.key("kept"), ANSWER, ttl=math.inf)
    now[0] = 1100.0
    other = cache if seen == "by this object" else ExactCache(path, ttl=60, clock=lambda: now[0], **options)
    assert other.get(KEY) is None
    if seen == "before a restart":
        cache.close(), other.close()
    now[0] = 1010.0
    last = ExactCache(path, clock=lambda: now[0], **options) if seen == "before a restart" else other
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CacheDegradedWarning)
        assert last.get(KEY) is None and last.get(SCOPE.key("kept"))


def test_a_clock_set_back_drops_what_can_expire_and_says_so(path, options):
    now = [1000.0]
    cache = ExactCache(path, ttl=60, clock=lambda: now[0], **options)
    cache.put(KEY, ANSWER)
    now[0] = 999.5
    assert cache.get(KEY).age == 0.0    # a jitter is held, not believed
    now[0] = 500.0
    with degraded("went back 500 s"):
        assert cache.get(KEY) is None
    assert cache.put(KEY, ANSWER) and cache.get(KEY)
    now[0] = 560.0
    assert cache.get(KEY) is None
    cache.close()
    now[0] = 100.0    # set back while nobody looked
    reopened = ExactCache(path, ttl=60, clock=lambda: now[0], **options)
    with degraded("went back"):
        assert reopened.get(KEY) is None


def test_the_clock_that_cannot_be_set_ends_a_life_too(path, monkeypatch):
    with ExactCache(path, ttl=3600) as cache:
        cache.put(KEY, ANSWER)
        assert cache.get(KEY)
        up = time.clock_gettime(time.CLOCK_BOOTTIME)
        monkeypatch.setattr("llmops_ref.cache_files.time.clock_gettime", lambda clock: up + 3601)
        assert cache.get(KEY) is None


@pytest.mark.parametrize("max_bytes", [1 << 17, 1 << 20])
def test_the_bytes_on_disk_stay_within_the_bound_and_the_oldest_goes_first(path, options, max_bytes):
    rng = random.Random(0)
    with ExactCache(path, max_bytes=max_bytes, **options) as cache:
        cache.put(SCOPE.key("kept"), ANSWER)
        for number in range(max_bytes // 2500):
            assert cache.put(SCOPE.key(f"q{number}"), Response("x" * rng.randrange(7000)), tags=[f"t{number % 5}"])
            assert cache.get(SCOPE.key("kept"))
            if number % 10 == 0:
                assert sum(file.stat().st_size for file in path.parent.iterdir()) <= max_bytes
        assert cache.stats().evicted > 0 and cache.get(SCOPE.key("q0")) is None
        assert not cache.put(KEY, Response("x" * max_bytes)) and cache.stats().refused == 1
        cache.clear()
        assert cache.stats().entries == 0 and sum(file.stat().st_size for file in path.parent.iterdir()) <= max_bytes


def filled(cache):
    "Entries of two tenants, two models, two prompts and some documents; their names."
    names = {}
    for tenant in ("acme", "eve"):
        for model in ("m", "n"):
            for prompt in ("v1", "v2"):
                scope = Scope(tenant, model=model, prompt_version=prompt)
                names[tenant, model, prompt] = scope.key("q")
                cache.put(scope.key("q"), Response("x", documents=(f"{tenant}-doc", "shared")), tags=[f"mine:{prompt}"])
    return names


@pytest.mark.parametrize(("condition", "gone"), [
    ({"tenant": "acme"}, lambda tenant, model, prompt: tenant == "acme"),
    ({"model": "n"}, lambda tenant, model, prompt: model == "n"),
    ({"prompt": "v2"}, lambda tenant, model, prompt: prompt == "v2"),
    ({"document": "eve-doc"}, lambda tenant, model, prompt: tenant == "eve"),
    ({"document": "shared"}, lambda tenant, model, prompt: True),
    ({"tag": "mine:v1"}, lambda tenant, model, prompt: prompt == "v1"),
    ({"tag": "tenant:eve"}, lambda tenant, model, prompt: tenant == "eve"),
    ({"tenant": "acme", "model": "n"}, lambda tenant, model, prompt: tenant == "acme" and model == "n"),
    ({"document": "nobody"}, lambda tenant, model, prompt: False),
    ({"before": 1e12}, lambda tenant, model, prompt: True),
    ({"before": 1.0}, lambda tenant, model, prompt: False),
    ({"tenant": "eve", "before": 1e12}, lambda tenant, model, prompt: tenant == "eve"),
])
@pytest.mark.parametrize("index", ["whole", "lost"])
def test_invalidated_entries_are_never_served_again(path, options, condition, gone, index):
    with ExactCache(path, **options) as cache, ExactCache(path, **options) as other:
        names = filled(cache)
        assert all(other.get(key) for key in names.values())
        if index == "lost":    # the rows that find entries by tag are damaged: the record alone must do
            with sqlite3.connect(path) as connection:
                connection.execute("DELETE FROM tags")
                connection.execute("UPDATE entries SET created = 9e12")
        removed = cache.invalidate(**condition)
        left = {name for name in names if not gone(*name)}
        assert {name for name, key in names.items() if other.get(key)} == {name for name, key in names.items() if cache.get(key)} == left
        if index == "whole":
            assert removed == len(names) - len(left) == cache.stats().invalidated
    with ExactCache(path, **options) as again:
        assert {name for name, key in names.items() if again.get(key)} == left


def test_the_model_that_answered_is_a_tag_too(cache):
    cache.put(KEY, ANSWER)
    assert cache.invalidate(model="m-1") == 1 and cache.get(KEY) is None


def test_an_answer_that_began_before_an_invalidation_is_not_stored(path, options):
    with ExactCache(path, **options) as cache, ExactCache(path, **options) as other:
        ticket, untouched = cache.begin(), Scope("eve").key("q")
        other.invalidate(document="d2")
        assert not cache.put(KEY, ANSWER, ticket=ticket) and cache.get(KEY) is None and other.get(KEY) is None
        assert cache.put(untouched, Response("x"), ticket=ticket) and cache.get(untouched)    # not what was taken back
        assert cache.put(KEY, ANSWER, ticket=cache.begin()) and text_of(other) == "1000 pounds"
        assert cache.put(KEY, ANSWER) and text_of(other)
        ticket = cache.begin()
        other.clear()
        assert not cache.put(KEY, ANSWER, ticket=ticket) and cache.get(KEY) is None
        ticket = cache.begin()
        other.invalidate(before=1.0)    # in flight counts as before
        assert not cache.put(KEY, ANSWER, ticket=ticket)
    path.unlink()
    with ExactCache(path, **options) as fresh:
        for _ in range(5):
            fresh.invalidate(tag="x")
        assert not fresh.put(KEY, ANSWER, ticket=ticket)    # a ticket of a file that is gone


def test_forgotten_invalidations_make_old_entries_misses(path, options, monkeypatch):
    monkeypatch.setattr("llmops_ref.exact_cache._REMEMBERED", 8)
    with ExactCache(path, **options) as cache:
        cache.put(KEY, ANSWER)
        ticket = cache.begin()
        for number in range(8):
            cache.invalidate(tag=f"t{number}")
        assert cache.get(KEY)
        for _ in range(8):
            cache.invalidate(tag="t0")    # the same again takes no room
        assert cache.get(KEY)
        for number in range(8, 16):
            cache.invalidate(tag=f"t{number}")
        assert cache.get(KEY) is None and not cache.put(KEY, ANSWER, ticket=ticket) and cache.put(KEY, ANSWER) and cache.get(KEY)


def test_a_damaged_list_of_invalidations_sets_the_file_aside(path, options):
    with ExactCache(path, **options) as cache:
        cache.put(KEY, ANSWER)
        cache.put(Scope("eve").key("q"), ANSWER)
        cache.invalidate(tenant="eve")
        with sqlite3.connect(path) as connection:
            connection.execute("DELETE FROM invalidations")
        with degraded("set aside"), ExactCache(path, **options) as other:
            assert other.get(KEY) is None


def test_a_hundred_thousand_operations_never_cross_tenants(path):
    rng = random.Random(0)
    tenants = [f"tenant-{number}" for number in range(5)]
    keys = {(tenant, number): Scope(tenant).key(f"question {number}") for tenant in tenants for number in range(40)}
    stored, served = {}, 0
    places = list(keys)
    with ExactCache(path) as cache:
        for step in range(100_000):
            place = places[rng.randrange(200)]
            chance = rng.random()
            if chance < 0.9:
                hit = cache.get(keys[place])
                assert (hit and hit.response.text) == stored.get(place), step
                served += hit is not None
            elif chance < 0.999:
                stored[place] = f"{place} at {step}"
                cache.put(keys[place], Response(stored[place], documents=(f"doc-{place[1]}",)))
            elif chance < 0.9995:
                cache.invalidate(tenant=place[0])
                stored = {other: text for other, text in stored.items() if other[0] != place[0]}
            else:
                cache.invalidate(document=f"doc-{place[1]}")
                stored = {other: text for other, text in stored.items() if other[1] != place[1]}
    assert served > 10_000


@pytest.mark.parametrize("change", [
    lambda data: random.Random(1).randbytes(100) + data[100:], lambda data: b"not a database, but somebody's notes", lambda data: data[: len(data) // 2],
    lambda data: data[:100] + bytes(len(data) - 100),
], ids=["header", "notes", "cut off", "zeros"])
def test_a_damaged_file_is_set_aside_and_not_lost(path, options, change):
    with ExactCache(path, **options) as cache:
        cache.put(KEY, ANSWER)
    before = change(path.read_bytes())
    path.write_bytes(before)
    with degraded("set aside") as caught:
        cache = ExactCache(path, **options)
        assert cache.get(KEY) is None
        assert cache.put(KEY, ANSWER) and text_of(cache) == "1000 pounds"
        cache.close()
    assert len(caught) == 1 and path.with_name("exact.sqlite.damaged-1").read_bytes() == before


def test_an_empty_file_is_taken_for_damaged(path, options):
    path.touch()
    with degraded(""), ExactCache(path, **options) as cache:
        cache.get(KEY)
        assert cache.put(KEY, ANSWER) and cache.get(KEY)


def test_flipped_bits_never_make_a_wrong_answer(tmp_path, options):
    original = tmp_path / "original"
    with ExactCache(original, **options) as cache:
        for number in range(60):
            cache.put(SCOPE.key(f"q{number}"), Response(f"answer {number} " * 30), tags=[f"t{number % 5}"])
    data, rng, hits = original.read_bytes(), random.Random(0), 0
    for trial in range(16):
        path = tmp_path / f"flipped-{trial}"
        flipped = bytearray(data)
        for place in rng.sample(range(len(data)), 1 + trial * 2):
            flipped[place] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        warnings.simplefilter("ignore", CacheDegradedWarning)
        with ExactCache(path, **options) as cache:
            for number in range(60):
                hit = cache.get(SCOPE.key(f"q{number}"))
                assert hit is None or hit.response.text == f"answer {number} " * 30
                hits += hit is not None
            cache.invalidate(tag="t3")
            assert not any(cache.get(SCOPE.key(f"q{number}")) for number in range(3, 60, 5))
            cache.put(KEY, ANSWER)
    assert hits > 100


def test_entries_cannot_be_swapped_or_edited(path, options):
    with ExactCache(path, **options) as cache:
        for text in ("one", "two"):
            cache.put(SCOPE.key(text), Response(text))
        with sqlite3.connect(path) as connection:
            connection.execute("UPDATE entries SET value = (SELECT value FROM entries ORDER BY entry LIMIT 1)")
        with degraded("entry is damaged"):
            served = [text_of(cache, SCOPE.key(text)) for text in ("one", "two")]
        assert served.count(None) == 1 and all(answer in (None, text) for answer, text in zip(served, ("one", "two"), strict=True))


def test_another_program_s_database_is_left_alone(path, options):
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE accounts(name TEXT)")
    before = path.read_bytes()
    with degraded("another program") as caught, ExactCache(path, **options) as cache:
        assert cache.get(KEY) is None and not cache.put(KEY, ANSWER) and cache.invalidate(tenant="acme") == 0
    assert path.read_bytes() == before and not list(path.parent.glob("*damaged*"))
    assert [one for one in caught if "nothing was invalidated" in one]


@pytest.mark.parametrize(("written", "read"), [(SECRET, bytes(32)), (SECRET, None), (None, SECRET)], ids=["other", "none", "needless"])
def test_a_wrong_key_misses_with_a_warning_and_harms_nothing(path, written, read):
    with ExactCache(path, encryption_key=written) as cache:
        cache.put(KEY, ANSWER)
    with degraded("another encryption key"), ExactCache(path, encryption_key=read) as wrong:
        assert wrong.get(KEY) is None and not wrong.put(KEY, ANSWER) and wrong.stats().entries == 0
        wrong.clear()
    with ExactCache(path, encryption_key=written) as again:
        assert text_of(again) == "1000 pounds"


def test_nothing_is_readable_in_an_encrypted_file(path):
    with ExactCache(path, encryption_key=SECRET) as cache:
        cache.put(KEY, Response("a secret answer", documents=("secret-document",)), tags=["secret-tag"])
        cache.invalidate(tag="other-secret")
        content = b"".join(file.read_bytes() for file in path.parent.iterdir())
    for secret in (b"secret", b"acme", b"document", bytes.fromhex(KEY.digest), KEY.digest.encode(), bytes.fromhex(SCOPE.digest), SECRET):
        assert secret not in content
    with ExactCache(path.with_name("plain"), encryption_key=None) as cache:
        cache.put(KEY, Response("an answer"))
        content = b"".join(file.read_bytes() for file in path.parent.glob("plain*"))
    assert b"an answer" in content and b"daily limit" not in content    # prompts are in neither


def test_what_is_invalidated_is_wiped_from_the_disk(path):
    with ExactCache(path) as cache:
        cache.put(KEY, Response("the account of Ada " * 50))
        cache.put(Scope("eve").key("q"), Response("x"))
        cache.invalidate(tenant="acme")
        assert b"account of Ada" not in b"".join(file.read_bytes() for file in path.parent.iterdir())


def test_a_file_in_place_of_the_folder_degrades_to_no_cache(tmp_path, options):
    (tmp_path / "file").write_text("x")
    with degraded("cannot be opened") as caught:
        cache = ExactCache(tmp_path / "file" / "exact.sqlite", **options)
        for _ in range(3):
            assert cache.get(KEY) is None and not cache.put(KEY, ANSWER) and cache.invalidate(tenant="acme") == 0
        assert cache.warm([(KEY, ANSWER)]) == 0 and cache.stats().degraded and cache.stats().refused == 4
        cache.clear()
        cache.close()
    assert len(caught) == 1


def test_a_read_only_file_serves_but_does_not_store(path, options, monkeypatch):
    with ExactCache(path, **options) as cache:
        cache.put(KEY, ANSWER)
    connect = sqlite3.connect

    def read_only(database, **settings):
        return connect(f"file:{database}?mode=ro", uri=True, **settings)

    monkeypatch.setattr("llmops_ref.cache_files.sqlite3.connect", read_only)
    with ExactCache(path, **options) as cache:
        assert text_of(cache) == "1000 pounds"
        with degraded("read-only") as caught:
            assert not cache.put(Scope("eve").key("q"), ANSWER) and not cache.put(KEY, Response("new"))
        assert len(caught) == 1 and text_of(cache) == "1000 pounds"
        with degraded("set aside"):
            cache.invalidate(tenant="acme")    # cannot be written: nothing is served from it again
        assert cache.get(KEY) is None


def test_where_nothing_can_be_written_or_renamed_the_cache_stops(path, options, monkeypatch):
    cache = ExactCache(path, **options)
    cache.put(KEY, ANSWER)
    connection = cache._file._writer._connection
    connection.execute("PRAGMA query_only=ON")
    monkeypatch.setattr("llmops_ref.cache_files.os.rename", lambda *_: (_ for _ in ()).throw(PermissionError(1, "denied")))
    with degraded("cannot be renamed"):
        for _ in range(2):
            assert cache.invalidate(tenant="acme") == 0
        assert cache.get(KEY) is None and not cache.put(KEY, ANSWER)


FULL_DISK = """
import resource, sys, warnings
from llmops_ref.exact_cache import ExactCache, Response, Scope
warnings.simplefilter("always")
key = Scope("acme").key
cache = ExactCache(sys.argv[1])
cache.put(key("first"), Response("kept"))
cache.get(key("first"))
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
stored = [cache.put(key(str(number)), Response("x" * 3000)) for number in range(60)]
print(stored[0], stored[-1], cache.get(key("first")).response.text)
cache.invalidate(tenant="acme")
print(cache.get(key("first")), cache.get(key("0")))
"""


def test_a_full_disk_costs_hits_and_an_invalidation_still_holds(path):
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["True False kept", "None None"]
    assert 1 <= done.stderr.count("CacheDegradedWarning:") <= 2
    with ExactCache(path) as again:
        assert again.get(Scope("acme").key("first")) is None and again.put(KEY, ANSWER)


def test_sqlite_s_own_full_is_a_refused_write(path, options):
    with ExactCache(path, max_bytes=1 << 20, **options) as cache:
        cache.put(KEY, ANSWER)
        connection = cache._file._writer._connection
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count={pages}")
        with degraded("disk is full"):
            assert not cache.put(SCOPE.key("large"), Response("x" * 50_000))
        assert text_of(cache) == "1000 pounds" and cache.put(SCOPE.key("large"), Response("x" * 50_000))    # a new connection, room again


KILLED = """
import itertools, sys
from llmops_ref.exact_cache import ExactCache, Response, Scope
cache = ExactCache(sys.argv[1], max_bytes=1 << 19)
for number in itertools.count():
    cache.put(Scope("acme").key(str(number % 200)), Response(f"{number} " * 300, documents=(f"d{number % 7}",)))
    if number % 50 == 49:
        cache.invalidate(document=f"d{number % 7}")
    print(number, flush=True)
"""


def test_kill_minus_nine_while_writing_tears_nothing(path):
    for rounds in (15, 33, 71):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
        for _ in range(rounds):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        with ExactCache(path, max_bytes=1 << 19) as cache:
            answers = {number: text_of(cache, Scope("acme").key(str(number))) for number in range(200)}
            found = {number: text for number, text in answers.items() if text}
            assert len(found) >= min(rounds, 49) - 8
            assert all(text == text.split()[0] + " " + (text.split()[0] + " ") * 299 and int(text.split()[0]) % 200 == number for number, text in found.items())
            assert cache.put(KEY, ANSWER) and cache.get(KEY) and cache.stats().degraded == ()


def other_process(path, number, queue):
    "Store, read and invalidate in a process of its own."
    with ExactCache(path) as cache:
        wrong = 0
        for step in range(60):
            cache.put(Scope(f"tenant-{number}").key(str(step)), Response(f"{number}/{step}"))
            for tenant in range(4):
                text = text_of(cache, Scope(f"tenant-{tenant}").key(str(step)))
                wrong += text not in (None, f"{tenant}/{step}")
        removed = cache.invalidate(tenant=f"tenant-{number}") if number == 3 else 0
        queue.put((number, wrong, removed, cache.stats().degraded))


def test_four_processes_share_one_file(path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=other_process, args=(path, number, queue)) for number in range(4)]
    for process in processes:
        process.start()
    results = sorted(queue.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    assert [(wrong, degraded) for _, wrong, _, degraded in results] == [(0, ())] * 4 and results[3][2] == 60
    with ExactCache(path) as cache:
        assert cache.stats().entries == 180
        assert all(text_of(cache, Scope(f"tenant-{tenant}").key("59")) == f"{tenant}/59" for tenant in range(3))
        assert not any(cache.get(Scope("tenant-3").key(str(step))) for step in range(60))


def test_threads_share_one_object(cache):
    errors = []

    def work(tenant):
        for step in range(40):
            cache.put(Scope(tenant).key(str(step)), Response(f"{tenant}/{step}"))
            for other in "abcd":
                text = text_of(cache, Scope(other).key(str(step)))
                if text not in (None, f"{other}/{step}"):
                    errors.append(text)

    threads = [threading.Thread(target=work, args=(tenant,)) for tenant in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = cache.stats()
    assert errors == [] and stats.entries == 160 and stats.hits + stats.misses == 640 and stats.stored == 160


def test_a_forked_child_makes_its_own_connections(cache):
    cache.put(KEY, ANSWER)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        ok = text_of(cache) == "1000 pounds" and cache.put(SCOPE.key("child"), Response("from the child"))
        os.write(writing, b"1" if ok else b"0")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 1) == b"1" and text_of(cache, SCOPE.key("child")) == "from the child" and text_of(cache) == "1000 pounds"


def test_a_file_that_is_replaced_or_deleted_is_opened_anew(path, options):
    with ExactCache(path, **options) as cache:
        cache.put(KEY, ANSWER)
        assert cache.get(KEY)
        for file in path.parent.glob("exact.sqlite*"):
            file.unlink()
        assert cache.get(KEY) is None and cache.put(KEY, ANSWER) and cache.get(KEY)
        assert path.exists()


def test_a_file_locked_by_another_is_waited_for_and_then_missed(path, options, monkeypatch):
    monkeypatch.setattr("llmops_ref.cache_files._WAIT", 0.05)
    with ExactCache(path, **options) as cache:
        cache.put(KEY, ANSWER)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with degraded("locked"):
            assert not cache.put(SCOPE.key("x"), ANSWER)
        assert text_of(cache) == "1000 pounds"    # readers do not wait
        other.rollback()
        assert cache.put(SCOPE.key("x"), ANSWER)
        other.close()


def test_export_and_import_carry_what_may_still_be_served(path, options, tmp_path):
    now = [1000.0]
    export, line = tmp_path / "answers.jsonl", {"role": "user", "content": "q"}
    with ExactCache(path, clock=lambda: now[0], **options) as cache:
        cache.put(KEY, dataclasses.replace(ANSWER, data={"a": "é\ud83d"}), ttl=100)
        cache.put(SCOPE.key([line]), Response("short"), ttl=10)
        cache.put(Scope("eve").key("q"), Response("taken back"), tags=["bad"])
        now[0] = 1020.0
        assert cache.export(export) == 2
    assert stat.S_IMODE(export.stat().st_mode) == 0o600 and "daily limit" not in export.read_text(errors="surrogatepass")
    with ExactCache(tmp_path / "other", encryption_key=bytes(32), clock=lambda: now[0]) as other:
        assert other.import_(export) == 2 and cache.get(KEY) is None
        assert other.get(KEY).response.data == {"a": "é\ud83d"} and other.get(KEY).age == 20.0
        other.invalidate(tag="bad")
        assert other.import_(export) == 1 and other.get(Scope("eve").key("q")) is None    # an export does not bring it back
        assert other.invalidate(document="d1") == 1
        now[0] = 1100.0
        assert other.import_(export) == 0


@pytest.mark.parametrize("lines", [
    [], ["{}"], ["not json"], ["HEAD", "not json"], ["HEAD", "{}"], ["HEAD", "[]"],
    ["HEAD", '{"digest":"zz","scope":"","created":1,"expires":null,"tags":[],"response":{"text":"x"}}'],
    ["HEAD", '{"digest":"' + "0" * 64 + '","scope":"' + "0" * 64 + '","created":1,"expires":null,"tags":"x","response":{"text":"x"}}'],
])
def test_a_bad_export_is_refused_by_line(cache, tmp_path, lines):
    head = json.dumps({"format": "llmops-ref exact cache", "version": 1})
    (tmp_path / "bad.jsonl").write_text("\n".join(lines).replace("HEAD", head))
    with pytest.raises(BadInputError, match="bad"):
        cache.import_(tmp_path / "bad.jsonl")
    assert cache.stats().entries == 0


def test_warming_stores_many(cache):
    assert cache.warm((SCOPE.key(str(number)), Response(str(number))) for number in range(600)) == 600
    assert all(text_of(cache, SCOPE.key(str(number))) == str(number) for number in (0, 255, 256, 599)) and cache.stats().entries == 600


def test_a_closed_cache_misses_and_does_not_pretend_to_invalidate(path):
    cache = ExactCache(path)
    cache.put(KEY, ANSWER)
    cache.close()
    cache.close()
    assert cache.get(KEY) is None and not cache.put(KEY, ANSWER) and cache.begin() and cache.stats().entries == 0
    with pytest.raises(BadInputError, match="closed"):
        cache.invalidate(tenant="acme")


def test_the_cache_s_own_key_follows_its_option(tmp_path):
    with ExactCache(tmp_path / "a", normalize=True) as loose, ExactCache(tmp_path / "b") as strict:
        assert loose.key("a  b", scope="acme") == Scope("acme").key("a b", normalize=True) != strict.key("a b", scope=Scope("acme"))


def test_a_hit_is_cheaper_than_langchain_s(path):
    cache_module = pytest.importorskip("langchain_community.cache")
    from langchain_core.outputs import ChatGeneration
    theirs = cache_module.SQLiteCache(str(path.with_name("langchain.db")))
    theirs.update("x" * 600, "settings", [ChatGeneration(message=AIMessage("1000 pounds"))])
    messages = [SystemMessage("x" * 560), HumanMessage("What is the daily limit?")]
    with ExactCache(path) as cache, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache.put(SCOPE.key(messages), ANSWER)
        taken = {"ours": [], "theirs": []}
        for _ in range(40):
            for name, call in (("ours", lambda: cache.get(SCOPE.key(messages))), ("theirs", lambda: theirs.lookup("x" * 600, "settings"))):
                start = time.thread_time_ns()
                assert call()
                taken[name].append(time.thread_time_ns() - start)
    assert sorted(taken["theirs"])[20] > 4 * sorted(taken["ours"])[20]    # measured: far more; see the chapter


def test_importing_touches_no_file(tmp_path):
    code = "import llmops_ref.exact_cache, os; print(os.listdir('.'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
