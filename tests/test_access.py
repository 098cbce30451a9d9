"""Who may read what, and which version of a document holds: the rules, apart from any index."""

import datetime

import numpy as np
import pytest

from llmops_ref.access import (
    ALL_GROUPS,
    EVERYONE,
    AllGroups,
    asks_for_other_versions,
    check_groups,
    document_readers,
    group_names,
    matches,
    may_read,
    read_versions,
    set_aside,
)
from llmops_ref.core import BadInputError

TODAY = datetime.date(2026, 6, 1)


@pytest.mark.parametrize(("value", "names"), [
    ("staff", ("staff",)), (["staff", "risk", "staff"], ("risk", "staff")), (("a",), ("a",)),
    (None, ()), ([], ()), ("", ()), ([""], ()), ([" "], ()), (["staff", 7], ()), ([None], ()), (7, ()), (True, ()), ({"staff": 1}, ()), ([["staff"]], ()),
])
def test_a_statement_that_is_no_list_of_names_lets_nobody_in(value, names):
    assert group_names(value) == names
    assert document_readers({"allowed_groups": value}) == names


def test_silence_is_not_a_statement_and_two_that_differ_let_nobody_in():
    assert document_readers({"title": "x"}) is None
    assert document_readers({"Allowed-Groups": ["staff"]}) == document_readers({"allowedGroups": "staff"}) == ("staff",)
    assert document_readers({"allowed_groups": ["staff"], "Allowed Groups": ["staff", "risk"]}) == ()


def test_names_are_compared_exactly_and_everyone_is_always_a_reader():
    assert check_groups(None) == check_groups([]) == check_groups(iter([])) == {EVERYONE}
    for name in ("Staff", "staff ", "staf", "staff\n", "ѕtaff", '["staff"]', "", "*", "all groups", "ALL_GROUPS"):
        assert not may_read(("staff",), check_groups([name]))
    assert may_read(("staff",), check_groups(("staff",))) and may_read((EVERYONE,), check_groups(["x"]))
    assert may_read((), check_groups(ALL_GROUPS)) and not may_read((), check_groups([EVERYONE, ""]))
    assert isinstance(ALL_GROUPS, AllGroups) and not isinstance(ALL_GROUPS, str)


@pytest.mark.parametrize("groups", ["staff", b"staff", 7, True, [7], [None], ["staff", b"x"], {"staff": True}, [ALL_GROUPS], [["staff"]]])
def test_groups_that_are_no_list_of_names_are_refused(groups):
    with pytest.raises(BadInputError, match="list"):
        check_groups(groups)


def documents(*records):
    return [{"source": source, "metadata": metadata} for source, metadata in records]


def held(found, readable=None, today=TODAY):
    readable = np.ones(len(found), dtype=bool) if readable is None else np.array(readable)
    aside = set_aside(read_versions(found), readable, today)
    return [record["source"] for record, replaced, seen in zip(found, aside, readable, strict=True) if seen and not replaced]


def test_a_newer_version_sets_the_older_ones_aside():
    found = documents(("a-2024.md", {}), ("a-2025.md", {"supersedes": "a-2024.md"}), ("a-2026.md", {"supersedes": ["a-2025.md"]}), ("b.md", {}))
    assert held(found) == ["a-2026.md", "b.md"]
    assert held(documents(("x/a.md", {}), ("y/a.md", {}), ("y/b.md", {"supersedes": "a.md"}))) == ["x/a.md", "y/b.md"], "the file beside it is meant"
    assert held(documents(("p1.md", {"doc_id": "P", "effective_date": "2025-01-01"}), ("p2.md", {"doc_id": "P", "effective_date": "2026-01-01"}),
                          ("p3.md", {"doc_id": "P", "effective_date": "2026-01-01"}), ("p4.md", {"doc_id": "P"}))) == ["p2.md", "p3.md", "p4.md"]
    assert held(documents(("new.md", {"supersedes": "P-1"}), ("old.md", {"doc_id": "P-1"}))) == ["new.md"]


def test_a_document_says_itself_that_it_was_superseded():
    assert held(documents(("old.md", {"superseded_by": "gone.md"}), ("b.md", {"superseded_by": None}), ("c.md", {"superseded_by": ""}))) == ["b.md", "c.md"]


def test_a_future_version_waits_for_its_day():
    found = documents(("old.md", {"superseded_by": "new.md"}), ("new.md", {"effective_date": "2026-07-01", "supersedes": "old.md"}))
    assert held(found) == ["old.md"]
    assert held(found, today=datetime.date(2026, 7, 1)) == ["new.md"]
    assert held(documents(("alone.md", {"effective_date": "2027-01-01"}))) == ["alone.md"], "it replaces nothing, so nothing holds instead"


def test_a_document_that_the_caller_may_not_read_changes_nothing():
    found = documents(("old.md", {}), ("secret.md", {"supersedes": "old.md"}))
    assert held(found) == ["secret.md"]
    assert held(found, readable=[True, False]) == ["old.md"]
    said = documents(("old.md", {"superseded_by": "secret.md"}), ("secret.md", {}))
    assert held(said, readable=[True, False]) == held(said[:1]) == [], "as if the other were not in the index"


def test_contradictions_hide_nothing():
    assert held(documents(("a.md", {"supersedes": "b.md"}), ("b.md", {"supersedes": "a.md"}))) == ["a.md", "b.md"]
    assert held(documents(("a.md", {"supersedes": "a.md"}))) == ["a.md"]
    assert held(documents(("a.md", {"effective_date": "2025-01-01", "supersedes": "b.md"}), ("b.md", {"effective_date": "2026-01-01"}))) == ["a.md", "b.md"]
    assert held(documents(("a.md", {"effective_date": "soon", "doc_id": 7}), ("b.md", {"effective_date": ["x"], "doc_id": 7}))) == ["a.md", "b.md"]


@pytest.mark.parametrize(("question", "asks"), [
    ("What does the Plus account cost?", False), ("What did the Plus account cost in 2025?", True), ("What does it cost in 2026?", False),
    ("What was the previous fee?", True), ("How long before my card expires?", False), ("What did it use to cost? It used to be £7.", True),
    ("Can I pay £2,025 in?", False), ("I owe 2025.50, what now?", False), ("What will the fees be next year?", True), ("How old must I be?", False),
    ("What is the ISA allowance in 2026-27?", False), ("Which rules applied last year?", True), ("Send me the old price list", True),
])
def test_questions_about_other_days_are_recognised(question, asks):
    assert asks_for_other_versions(question, TODAY) is asks


def test_conditions_on_fields():
    record = {"source": "a.md", "meta_year": 2022, "meta_tags": ["x", "y"]}
    for where in ({}, {"source": "a.md"}, {"meta_year": {"$gte": 2020, "$lt": 2023}}, {"$and": [{"source": "a.md"}, {"meta_year": 2022}]},
                  {"$or": [{"source": "b.md"}, {"meta_year": 2022}]}, {"meta_tags": {"$contains": "x"}}, {"source": {"$in": ["a.md"]}},
                  {"meta_none": {"$ne": 1}}, {"meta_year": {"$nin": [1]}}):
        assert matches(record, where)
    for where in ({"source": "b.md"}, {"meta_year": {"$gt": 2022}}, {"meta_none": {"$gt": 1}}, {"meta_year": {"$gt": "2020"}}, {"source": "a.md", "meta_year": 1}):
        assert not matches(record, where)
    for where in ("source", [], {"source": {"$regex": "."}}, {"$not": []}, {"$and": {"source": "a.md"}}, {"$or": ["source"]}):
        with pytest.raises(BadInputError, match="where"):
            matches(record, where)
