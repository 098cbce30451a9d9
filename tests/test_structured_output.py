"Data from answers: what can be read is read, nothing is guessed, what is wrong is named by its path, and no text is too strange."

import json
import socket
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, field_validator

from llmops_ref.core import BadInputError
from llmops_ref.structured_output import NOTE_SCHEMA, NOTES, NonconformingError, SchemaError, conform, feedback, measure

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}, "member": {"type": "boolean"}, "kind": {"enum": ["Card", "Loan"]}, "rate": {"type": "number"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 3}, "born": {"type": "string", "format": "date"}, "note": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    },
    "required": ["name", "age"], "additionalProperties": False,
}
ADA = {"name": "Ada", "age": 3}


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ('{"name": "Ada", "age": 3}', "whole"),
        ('Here you are:\n```json\n{"name": "Ada", "age": 3}\n```\nAnything else?', "found"),
        ('```\n{"name": "Ada", "age": 3}', "found"),
        ('The answer is {"name": "Ada", "age": 3}, I think.', "found"),
        ('A set {x} and then {"name": "Ada", "age": 3}', "found"),
        ('{"name": "Ada", "age": 3,}', "repaired"),
        ("{'name': 'Ada', 'age': 3}", "repaired"),
        ('{name: "Ada", age: 3}', "repaired"),
        ('{"name": "Ada", "age": 3', "repaired"),
        ('{"name": "Ada" "age": 3}', "repaired"),
    ],
)
def test_json_is_found_and_mended(text, source):
    found = conform(text, PERSON)
    assert (found.ok, found.value, found.source, found.attempts) == (True, ADA, source, 1)
    assert bool(found.changes) == (source == "repaired")
    assert conform(text, PERSON, repair=False).ok == (source != "repaired")


def test_an_answer_that_broke_off_says_so():
    assert "cut" in conform('{"name": "Ada", "age": 3', PERSON).changes[0].says
    assert "cut" not in conform('{"name": "Ada", "age": 3,}', PERSON).changes[0].says


@pytest.mark.parametrize(
    ("field", "written", "value"),
    [("age", "41", 41), ("age", 41.0, 41), ("age", " -0 ", 0), ("rate", "2.50", 2.5), ("rate", "7", 7), ("member", "Yes", True), ("member", "false", False), ("kind", "card", "Card"), ("name", 12, "12"), ("note", "5", 5)],
)
def test_scalars_are_rewritten_where_nothing_is_lost(field, written, value):
    found = conform(json.dumps(ADA | {field: written}), PERSON)
    assert found.ok and found.value[field] == value and type(found.value[field]) is type(value)
    assert found.changes == () if written == 41.0 else [item.path for item in found.changes] == [f"$.{field}"]
    assert not conform(json.dumps(ADA | {field: written}), PERSON, repair=False).ok or written == 41.0


@pytest.mark.parametrize(
    ("field", "written"),
    [("age", "1,000"), ("age", "007"), ("age", "3.5"), ("age", 3.5), ("age", "three"), ("age", True), ("age", None), ("rate", "2,50"), ("rate", "1e400"), ("rate", "NaN"), ("member", 1), ("member", "maybe"), ("name", True), ("name", None), ("kind", "cards"), ("tags", "a"), ("born", "yesterday"), ("note", "x")],
)
def test_what_could_mean_something_else_is_left(field, written):
    found = conform(json.dumps(ADA | {field: written}), PERSON)
    assert not found.ok and found.value is None and [item.path for item in found.violations] == [f"$.{field}"]


def test_a_field_that_stands_twice_is_not_chosen_from():
    assert [item.rule for item in conform('{"name": "Ada", "age": 3, "age": 4}', PERSON).violations] == ["json"]


@pytest.mark.parametrize("text", ["", "   ", "no data here", "[1, 2", "{", "null", "NaN", '{"name": "Ada", "age": NaN}', '{"name": "Ada", "age": 1e999}', '"{}"', "[]"])
def test_what_does_not_conform_never_raises_and_never_conforms(text):
    found = conform(text, PERSON)
    assert not found.ok and found.violations and found.value is None
    with pytest.raises(NonconformingError, match=r"\$"):
        found.require()


def test_violations_have_paths_and_hold_nothing_of_the_answer():
    schema = {"type": "object", "properties": {"items": {"type": "array", "items": {"type": "object", "properties": {"unit price": {"type": "number", "maximum": 9}, "name": {"pattern": "^[a-z]+$"}}, "required": ["name"]}}}}
    found = conform('{"items": [{"name": "ok", "unit price": 3}, {"name": "SECRET"}, {"unit price": 77}]}', schema)
    assert [(item.path, item.rule) for item in found.violations] == [("$.items[1].name", "pattern"), ("$.items[2].name", "required"), ('$.items[2]["unit price"]', "maximum")]
    with pytest.raises(NonconformingError) as error:
        found.require()
    for shown in (feedback(found), str(found.to_dict()), found._repr_markdown_(), str(error.value)):
        assert "SECRET" not in shown and "77" not in shown
    extra = conform('{"name": "Ada", "age": 3, "SECRET": 1}', PERSON)
    assert [item.rule for item in extra.violations] == ["additionalProperties"] and "SECRET" not in str(extra)


class Person(BaseModel):
    name: str
    age: int

    @field_validator("age")
    @classmethod
    def even(cls, value: int) -> int:
        if value % 2:
            raise ValueError(f"{value} is odd")
        return value


def test_a_pydantic_model_gives_an_instance():
    assert conform('{"name": "Ada", "age": "4"}', Person).require() == Person(name="Ada", age=4)
    found = conform('{"name": "Ada", "age": 31}', Person)
    assert [(item.path, item.rule) for item in found.violations] == [("$.age", "value_error")] and "31" not in str(found)


def test_references_within_the_schema_are_followed_and_others_refused(monkeypatch):
    monkeypatch.setattr(socket, "socket", lambda *a, **k: pytest.fail("a schema was fetched"))
    schema = {"$defs": {"n": {"type": "integer"}}, "type": "object", "properties": {"a": {"$ref": "#/$defs/n"}}, "required": ["a"]}
    assert conform('{"a": "3"}', schema).value == {"a": 3}
    loop = {"$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"}
    assert conform('{"n": {"n": {}}}', loop).ok
    with pytest.raises(SchemaError, match="another document"):
        conform("{}", {"$ref": "https://schemas.example/x.json"})


@pytest.mark.parametrize("schema", [{"type": "nothing"}, {"properties": 3}, "schema", None, {"const": {1, 2}}, {"minimum": "a"}])
def test_a_wrong_schema_is_told(schema):
    with pytest.raises(SchemaError):
        conform("{}", schema)


def test_retry_is_bounded_and_hears_what_was_wrong():
    heard: list[str] = []

    def again(said: str) -> str:
        heard.append(said)
        return '{"name": "Ada", "age": 3}' if len(heard) == 2 else "{}"

    found = conform('{"name": "Ada", "age": "SECRET"}', PERSON, retry=again)
    assert found.ok and found.attempts == 3 and "$.age must be of type integer" in heard[0] and "SECRET" not in heard[0] and "$.name is missing" in heard[1]
    heard.clear()
    assert conform("x", PERSON, retry=lambda said: heard.append(said) or "x", attempts=3).attempts == 4 and len(heard) == 3
    assert conform(json.dumps(ADA), PERSON, retry=lambda said: pytest.fail("asked without need")).attempts == 1
    with pytest.raises(ZeroDivisionError):
        conform("x", PERSON, retry=lambda said: str(1 / 0))
    for wrong in ({"attempts": -1}, {"attempts": 99}, {"attempts": True}):
        with pytest.raises(BadInputError, match="attempts"):
            conform("x", PERSON, **wrong)


@settings(max_examples=80, deadline=None)
@given(st.one_of(st.text(max_size=80), st.lists(st.sampled_from([*"{}[]:,\"'\\ \n", "name", "age", "3", "```", "null", "//", "true"]), max_size=40).map("".join)))
def test_no_answer_is_too_strange(text):
    found = conform(text, PERSON)
    assert found.ok == (not found.violations)
    if found.ok:
        assert set(found.value) >= {"name", "age"} and type(found.value["age"]) is int


@settings(max_examples=60, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=10), lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4), max_leaves=12))
def test_whole_json_comes_back_as_it_is(value):
    assert conform(json.dumps(value), {}).value == value


@pytest.mark.parametrize("flood", ["[", "{", '{"a":', "{}", '"', "{[", "'", "```\n"])
def test_floods_are_answered_without_reading_them_for_ever(flood):
    for size in (20_000, 90_000, 1_000_000):
        started = time.process_time()
        assert not conform((flood * size)[:size], PERSON).ok
        if size == 20_000:
            short = max(time.process_time() - started, 0.05)
    assert time.process_time() - started < 5 * short    # the longest is refused unread


def test_the_measurement_asks_both_ways_and_writes_what_it_got(tmp_path):
    class Chat:
        def invoke(self, messages, **options):
            asked.append(options)
            return type("Message", (), {"content": json.dumps(NOTES[0][1])})

    asked: list = []
    result = measure(Chat(), tmp_path / "result.json", NOTES[:2])
    assert [row["way"] for row in result["rows"]] == ["free", "after an example", "constrained"] * 2 and json.loads((tmp_path / "result.json").read_text()) == result
    assert asked[2]["response_format"]["json_schema"]["schema"] == NOTE_SCHEMA and asked[:2] == [{}, {}]
    assert all(conform(json.dumps(right), NOTE_SCHEMA).ok for _, right in NOTES)
