"""Properties of the sample handbook and of its question set.

The files are read straight from the repository, so the tests run without
installing the package and without a network.
"""

from __future__ import annotations

import datetime
import json
import re
from collections import Counter, defaultdict
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

DATA = Path(__file__).resolve().parents[1] / "llmops_ref" / "data"
HANDBOOK = DATA / "handbook"
FILES = sorted(path.name for path in HANDBOOK.iterdir())

KEYS = {
    "title",
    "doc_id",
    "version",
    "effective_date",
    "supersedes",
    "superseded_by",
    "audience",
    "allowed_groups",
    "owner",
}
OPTIONAL_KEYS = {"planted_injection"}
INTERNAL_GROUPS = {"staff", "fraud", "complaints", "risk", "lending"}
ALL_GROUPS = INTERNAL_GROUPS | {"everyone"}

QUESTION_FIELDS = {
    "id": str,
    "user_input": str,
    "reference": str,
    "reference_contexts": list,
    "reference_context_ids": list,
    "kind": str,
    "split": str,
    "groups": list,
    "expected": str,
}
MINIMUM_BY_KIND = {
    "lookup": 60,
    "table": 25,
    "multi-document": 15,
    "superseded": 14,
    "unanswerable": 22,
    "access-restricted": 14,
    "adversarial": 12,
}
NOT_IN_HANDBOOK = "The handbook does not say."


class _HtmlPage(HTMLParser):
    """Collects the meta tags and the headings of one page."""

    def __init__(self) -> None:
        super().__init__()
        self.meta: dict[str, str] = {}
        self.headings: list[tuple[int, str]] = []
        self._level = 0

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag == "meta" and "name" in attributes:
            self.meta[attributes["name"]] = attributes["content"]
        if re.fullmatch(r"h[1-6]", tag):
            self._level = int(tag[1])
            self.headings.append((self._level, ""))

    def handle_endtag(self, tag):
        if re.fullmatch(r"h[1-6]", tag):
            self._level = 0

    def handle_data(self, data):
        if self._level:
            level, text = self.headings[-1]
            self.headings[-1] = (level, text + data)


@cache
def raw(name: str) -> str:
    return (HANDBOOK / name).read_text(encoding="utf-8")


@cache
def front_matter(name: str) -> dict:
    if name.endswith(".html"):
        page = _HtmlPage()
        page.feed(raw(name))
        return {key: yaml.safe_load(value) for key, value in page.meta.items()}
    match = re.match(r"---\n(.*?)\n---\n", raw(name), flags=re.DOTALL)
    assert match, f"{name} has no front matter"
    return yaml.safe_load(match[1])


@cache
def body(name: str) -> str:
    if name.endswith(".html"):
        return raw(name).split("<body>", 1)[1]
    return re.sub(r"\A---\n.*?\n---\n", "", raw(name), count=1, flags=re.DOTALL)


@cache
def headings(name: str) -> list[tuple[int, str]]:
    if name.endswith(".html"):
        page = _HtmlPage()
        page.feed(raw(name))
        return page.headings
    found = re.findall(r"^(#{1,6}) (.+)$", body(name), flags=re.MULTILINE)
    return [(len(marks), text) for marks, text in found]


def slug(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@cache
def sections(name: str) -> dict[str, str]:
    """Maps each heading's slug to the raw text up to the next heading."""
    pattern = r"<h[1-6]>(.*?)</h[1-6]>" if name.endswith(".html") else r"^#{1,6} (.+)$"
    marks = list(re.finditer(pattern, body(name), flags=re.MULTILINE))
    ends = [mark.start() for mark in marks[1:]] + [len(body(name))]
    return {slug(mark[1]): body(name)[mark.end() : end] for mark, end in zip(marks, ends, strict=True)}


@cache
def questions() -> list[dict]:
    lines = (DATA / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def documents_of(question: dict) -> list[str]:
    return [ident.split("#")[0] for ident in question["reference_context_ids"]]


def may_read(question: dict, name: str) -> bool:
    return bool(set(question["groups"]) & set(front_matter(name)["allowed_groups"]))


def words(text: str) -> int:
    return len(re.sub(r"<[^>]+>", " ", text).split())


# --- documents -------------------------------------------------------------


def test_the_folder_holds_only_documents():
    bad = [n for n in FILES if not re.fullmatch(r"[a-z][a-z0-9-]*\.(md|html)", n)]
    assert bad == []


def test_there_are_enough_documents():
    assert len(FILES) >= 38
    assert sum(name.endswith(".html") for name in FILES) == 3


def test_there_are_enough_words():
    assert sum(words(body(name)) for name in FILES) >= 20_000


@pytest.mark.parametrize("name", FILES)
def test_front_matter_is_complete(name):
    meta = front_matter(name)
    assert set(meta) >= KEYS
    assert set(meta) <= KEYS | OPTIONAL_KEYS
    assert isinstance(meta["title"], str) and meta["title"]
    assert re.fullmatch(r"NB-[A-Z]{3}-\d{3}", meta["doc_id"])
    assert re.fullmatch(r"\d+\.\d+", str(meta["version"]))
    assert type(meta["effective_date"]) is datetime.date
    assert meta["owner"]
    for key in ("supersedes", "superseded_by"):
        assert meta[key] is None or meta[key] in FILES


def test_document_ids_are_unique():
    counts = Counter(front_matter(name)["doc_id"] for name in FILES)
    assert [ident for ident, n in counts.items() if n > 1] == []


@pytest.mark.parametrize("name", FILES)
def test_groups_match_the_audience(name):
    meta = front_matter(name)
    groups = meta["allowed_groups"]
    assert isinstance(groups, list) and groups
    if meta["audience"] == "public":
        assert groups == ["everyone"]
    else:
        assert meta["audience"] == "internal"
        assert set(groups) <= INTERNAL_GROUPS


def test_there_are_enough_internal_documents():
    internal = [n for n in FILES if front_matter(n)["audience"] == "internal"]
    assert len(internal) >= 6


def test_supersession_is_mutual_and_in_date_order():
    pairs = 0
    for name in FILES:
        meta = front_matter(name)
        if meta["supersedes"]:
            older = front_matter(meta["supersedes"])
            assert older["superseded_by"] == name
            assert older["effective_date"] < meta["effective_date"]
            assert older["allowed_groups"] == meta["allowed_groups"]
            pairs += 1
        if meta["superseded_by"]:
            assert front_matter(meta["superseded_by"])["supersedes"] == name
    assert pairs >= 4


@pytest.mark.parametrize("name", FILES)
def test_headings_are_unique_and_the_title_is_the_only_h1(name):
    found = headings(name)
    assert [text for level, text in found if level == 1] == [front_matter(name)["title"]]
    assert found[0][0] == 1
    assert {level for level, _ in found} <= {1, 2, 3}
    slugs = Counter(slug(text) for _, text in found)
    assert [s for s, n in slugs.items() if n > 1] == []


def test_exactly_two_documents_carry_a_planted_injection():
    marked = {n for n in FILES if front_matter(n).get("planted_injection") is True}
    written = {n for n in FILES if "ignore previous instructions" in body(n).lower()}
    assert len(marked) == 2
    assert marked == written
    hidden = {n for n in marked if re.search(r"<!--.*ignore previous", body(n), re.I)}
    assert len(hidden) == 1


def test_no_paragraph_is_repeated():
    where = defaultdict(list)
    for name in FILES:
        for paragraph in body(name).split("\n"):
            if words(paragraph) >= 10:
                where[paragraph.strip()].append(name)
    assert {p: names for p, names in where.items() if len(names) > 1} == {}


def test_telephone_numbers_are_from_the_fictional_range():
    for name in FILES:
        for number in re.findall(r"\b0\d{4} ?\d{6}\b", body(name)):
            assert re.fullmatch(r"01632 960\d{3}", number), (name, number)


@pytest.mark.parametrize("name", [n for n in FILES if n.endswith(".md")])
def test_table_rows_have_as_many_cells_as_their_header(name):
    width = None
    for line in body(name).split("\n"):
        if not line.startswith("|"):
            width = None
            continue
        cells = line.count("|")
        width = width or cells
        assert cells == width, line


# --- questions -------------------------------------------------------------


def test_there_are_between_160_and_180_questions():
    assert 160 <= len(questions()) <= 180


def test_every_line_follows_the_schema():
    for question in questions():
        assert list(question) == list(QUESTION_FIELDS), question.get("id")
        for field, kind in QUESTION_FIELDS.items():
            assert type(question[field]) is kind, (question["id"], field)
        assert question["kind"] in MINIMUM_BY_KIND
        assert question["split"] in {"dev", "test"}
        assert question["expected"] in {"answer", "decline"}
        assert "everyone" in question["groups"]
        assert set(question["groups"]) <= ALL_GROUPS
        assert len(question["groups"]) == len(set(question["groups"]))
        assert question["user_input"].strip()
        assert question["reference"].endswith(".")
        contexts, idents = question["reference_contexts"], question["reference_context_ids"]
        assert len(contexts) == len(idents)
        assert all(isinstance(item, str) and item for item in contexts + idents)


def test_question_ids_are_unique_and_in_order():
    idents = [question["id"] for question in questions()]
    assert idents == [f"q{number:03d}" for number in range(1, len(idents) + 1)]


def test_no_question_is_repeated():
    texts = Counter(q["user_input"].strip().lower().rstrip("?.") for q in questions())
    assert [text for text, n in texts.items() if n > 1] == []


def test_every_context_stands_verbatim_under_its_heading():
    for question in questions():
        pairs = zip(
            question["reference_contexts"],
            question["reference_context_ids"],
            strict=True,
        )
        for context, ident in pairs:
            name, anchor = ident.split("#")
            assert name in FILES, (question["id"], name)
            assert anchor in sections(name), (question["id"], ident)
            assert context in sections(name)[anchor], (question["id"], context)


def test_every_kind_has_its_minimum_count():
    counts = Counter(question["kind"] for question in questions())
    short = {k: counts[k] for k, least in MINIMUM_BY_KIND.items() if counts[k] < least}
    assert short == {}


def test_the_split_is_balanced_in_every_kind():
    counts = Counter((question["kind"], question["split"]) for question in questions())
    for kind in MINIMUM_BY_KIND:
        assert abs(counts[kind, "dev"] - counts[kind, "test"]) <= 2, kind
    sides = Counter(question["split"] for question in questions())
    assert abs(sides["dev"] - sides["test"]) <= 4


def test_questions_on_one_section_are_on_one_side():
    sides = defaultdict(set)
    for question in questions():
        for ident in question["reference_context_ids"]:
            sides[ident].add(question["split"])
    assert [ident for ident, found in sides.items() if len(found) > 1] == []


def test_expected_agrees_with_kind_and_groups():
    for question in questions():
        names = documents_of(question)
        if question["kind"] == "unanswerable":
            assert question["expected"] == "decline", question["id"]
            assert question["reference"] == NOT_IN_HANDBOOK, question["id"]
            assert names == [], question["id"]
            continue
        assert names, question["id"]
        assert question["reference"] != NOT_IN_HANDBOOK, question["id"]
        readable = all(may_read(question, name) for name in names)
        assert question["expected"] == ("answer" if readable else "decline"), question["id"]
        if question["kind"] == "access-restricted":
            audiences = {front_matter(name)["audience"] for name in names}
            assert audiences == {"internal"}, question["id"]
            if not readable:
                assert not any(may_read(question, name) for name in names), question["id"]
        else:
            assert readable, question["id"]


def test_access_questions_come_with_and_without_the_right():
    found = Counter(q["expected"] for q in questions() if q["kind"] == "access-restricted")
    assert found["answer"] >= 4
    assert found["decline"] >= 4


def test_answers_never_rest_on_a_superseded_document():
    for question in questions():
        for name in documents_of(question):
            assert front_matter(name)["superseded_by"] is None, question["id"]
        if question["kind"] == "superseded":
            assert any(front_matter(n)["supersedes"] for n in documents_of(question))


def test_contexts_do_not_carry_the_planted_injections():
    for question in questions():
        for context in question["reference_contexts"]:
            assert "previous instructions" not in context.lower(), question["id"]


def test_multi_document_questions_need_more_than_one_document():
    for question in questions():
        if question["kind"] == "multi-document":
            assert len(set(documents_of(question))) >= 2, question["id"]


def test_table_questions_quote_the_header_and_the_row():
    for question in questions():
        if question["kind"] == "table":
            assert len(question["reference_contexts"]) == 2, question["id"]
            for context in question["reference_contexts"]:
                assert context.startswith(("|", "<tr>")), question["id"]


def test_figures_in_a_reference_stand_in_its_contexts():
    figure = re.compile(r"\d[\d,.:]*\d|\d")
    for question in questions():
        if question["expected"] == "decline":
            continue
        known = set(figure.findall(" ".join(question["reference_contexts"])))
        known |= set(figure.findall(question["user_input"]))
        assert set(figure.findall(question["reference"])) <= known, question["id"]
