"""Reports: one set of figures in four formats, nothing that runs or loads, and an older report kept until the new one is whole."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from evaluated import FAILED, Facts, FakeEvaluation, evaluated, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from llmops_ref import reports as module
from llmops_ref.evaluation_data import EvaluationDataset, RowError
from llmops_ref.release_gate import Gate
from llmops_ref.reports import (
    REPORT_SCHEMA,
    ReportError,
    report_data,
    report_html,
    report_junit,
    report_markdown,
    write_report,
)
from llmops_ref.scores import Failure

ROOT = Path(__file__).resolve().parent.parent
GATE = Gate(floors={"recall": 0.5, "faithfulness": 0.9}, margins={"recall": 0.05}, max_failure_rate=0.2, name="gate.toml")
NASTY = "</script><script>alert(1)</script><img src=https://evil.example/x onerror=alert(1)> \"' & | ` @lead #12 \x00\x08\x1b[31m \u202e \ud800 [x](https://evil.example)\n\n# Heading"


def example(**changes: Any) -> FakeEvaluation:
    "Thirty rows, two metrics, a row without a value and a row that failed."
    dataset = rows(30)
    broken = dataclasses.replace(dataset.rows[3], response=None, retrieved_contexts=None, error=RowError("timeout", "TimeoutError: 30 s"))
    dataset = dataclasses.replace(dataset, rows=(*dataset.rows[:3], broken, *dataset.rows[4:]))
    values = {"recall": [1.0] * 28 + [0.0] * 2, "faithfulness": [0.9, 0.8] * 14 + [FAILED, 0.1]}
    return evaluated(values, dataset=dataset, **changes)


def nasty() -> FakeEvaluation:
    "Hostile text wherever text can come from outside."
    plain = {"id": NASTY.replace("\ud800", ""), "user_input": NASTY.replace("\ud800", ""), "response": NASTY.replace("\ud800", ""), "reference": NASTY.replace("\ud800", "")}
    dataset = rows(30)
    first = dataclasses.replace(dataset.rows[0], **plain, retrieved_contexts=(NASTY.replace("\ud800", ""),), metadata={"kind": NASTY.replace("\ud800", "")})
    dataset = EvaluationDataset((first, *dataset.rows[1:]), NASTY)
    values: dict[str, list[Any]] = {NASTY: [Failure("parse", NASTY), *[0.5] * 29]}
    return evaluated(values, {NASTY: Facts(judge=NASTY)}, dataset, environment={NASTY: NASTY, "when": math.nan})


class Seen(HTMLParser):
    "Tags, attributes and texts of a page."

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text += data


def seen(page: str) -> Seen:
    parser = Seen()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def all_floats(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for item in value.values() for number in all_floats(item)]
    if isinstance(value, list):
        return [number for item in value for number in all_floats(item)]
    return [value] if isinstance(value, float) else []


def test_every_format_shows_the_same_figures_and_verdict(tmp_path):
    evaluation = example()
    result = GATE.check(evaluation, example())
    paths = write_report(evaluation, tmp_path / "report", result, baseline=example())
    data = json.loads(paths.json.read_text(encoding="utf-8"))
    assert (data["schema"], data["gate"]["verdict"], data["gate"]["exit_code"]) == (REPORT_SCHEMA, result.verdict, result.exit_code)
    recall = data["metrics"][0]["score"]
    shown = f"{recall['estimate']:.3f} ({recall['ci_low']:.3f} to {recall['ci_high']:.3f})"
    page, text = paths.html.read_text(encoding="utf-8"), paths.markdown.read_text(encoding="utf-8")
    assert shown in page and shown in text
    assert f"{result.verdict}: fees" in page and text.startswith(f"## ❌ {result.verdict}: fees")
    cases = ElementTree.parse(paths.junit).getroot().findall(".//testcase")
    assert [case.get("name") for case in cases] == [check.name for check in result.checks]


def test_the_estimate_with_failures_as_misses_stands_beside_the_one_without():
    data = report_data(example())
    found = next(one for one in data["metrics"] if one["name"] == "faithfulness")["score"]
    assert found["failures"] == 1 and found["failure_kinds"] == {"parse": 1} and found["as_misses"]["estimate"] < found["estimate"]
    for text in (seen(report_html(data)).text, report_markdown(data)):
        assert f"{found['estimate']:.3f} (" in text and f"{found['as_misses']['estimate']:.3f} (" in text
    assert "1 parse" in seen(report_html(data)).text


def test_the_worst_rows_come_with_their_passages_and_those_without_a_value_first():
    data = report_data(example(), worst=2)
    worst = {one["metric"]: one["rows"] for one in data["worst"]}
    assert worst == {"recall": ["q028", "q029"], "faithfulness": ["q028", "q029"]}
    page = seen(report_html(data)).text
    assert "Fee 28 is £28 a month." in page and "What is fee 28?" in page and "no value: parse" in page


def test_a_row_that_failed_says_how():
    evaluation = example()
    evaluation.found["recall"]["q003"] = Failure("timeout", "TimeoutError: 30 s")
    assert "timeout: TimeoutError: 30 s" in seen(report_html(report_data(evaluation))).text


def test_a_report_without_a_gate_holds_no_verdict(tmp_path):
    paths = write_report(example(), tmp_path)
    assert paths.junit is None and not (tmp_path / "junit.xml").exists()
    assert json.loads(paths.json.read_text())["gate"] is None
    assert "no verdict" in paths.html.read_text() and "no verdict" in paths.markdown.read_text()


def test_an_old_verdict_does_not_outlive_its_report(tmp_path):
    evaluation = example()
    write_report(evaluation, tmp_path, GATE.check(evaluation, example()))
    assert (tmp_path / "junit.xml").exists()
    write_report(evaluation, tmp_path)
    assert not (tmp_path / "junit.xml").exists()


def test_nothing_hostile_runs_or_loads():
    evaluation = nasty()
    data = report_data(evaluation, Gate(floors={NASTY: 0.3}, name="gate.toml").check(evaluation))
    page = report_html(data)
    found = seen(page)
    assert {tag for tag, _ in found.tags} <= {
        "html", "head", "meta", "title", "style", "body", "header", "main", "section", "h1", "h2", "h3", "p", "div", "table", "caption", "thead", "tbody", "tr",
        "th", "td", "br", "span", "strong", "small", "b", "em", "code", "svg", "line", "circle", "rect", "details", "summary", "dl", "dt", "dd", "pre", "ol", "li",
    }  # fmt: skip
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on") or name in ("href", "src", "srcset", "style", "action")]
    assert "alert(1)" in found.text and "url(" not in page and "@import" not in page
    assert [attributes["content"] for tag, attributes in found.tags if attributes.get("http-equiv")] == [module._POLICY] and "default-src 'none'" in module._POLICY
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]", page)
    page.encode()


def test_hostile_text_stays_text_in_markdown():
    evaluation = nasty()
    text = report_markdown(report_data(evaluation, Gate(floors={NASTY: 0.3}, name="gate.toml").check(evaluation)))
    assert not re.search(r"@\w|#\d|://(?!\u200b)|<|[^\\]`|[^\\]\[|[^\\]!", text)
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert len(headings) == 2    # the title and the scores
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_junit_is_xml_whatever_the_texts_hold_and_inconclusive_is_red():
    evaluation = nasty()
    gate = Gate(floors={NASTY: 0.3}, max_failure_rate=0.5, name="g\x01ate.toml")
    root = ElementTree.fromstring(report_junit(report_data(evaluation, gate.check(evaluation))))
    assert root.get("tests") == str(len(root.findall(".//testcase")))
    result = Gate(floors={"recall": 0.93}).check(example())
    assert result.verdict == "inconclusive"
    root = ElementTree.fromstring(report_junit(report_data(example(), result)))
    assert root.get("failures") == "1" and root.find(".//failure").get("type") == "inconclusive" and root.findall(".//skipped") == []


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40), st.floats() | st.none(), st.text(max_size=20))
def test_json_and_xml_hold_whatever_comes(text, number, name):
    data = report_data(evaluated({name: [number, 0.5]}, environment={text: number, "nested": [{text: (text, number)}]}))
    whole = json.loads(module._FORMATS["report.json"](data))
    assert all(map(math.isfinite, all_floats(whole)))
    seen(report_html(whole))
    report_markdown(whole).encode()


def test_long_texts_are_cut_and_say_so():
    dataset = rows(2)
    long = dataclasses.replace(dataset.rows[0], response="x" * 3_000_000, retrieved_contexts=("y" * 3_000_000,) * 30)
    data = report_data(evaluated({"recall": [0.0, 1.0]}, dataset=EvaluationDataset((long, dataset.rows[1]), "long")))
    page = report_html(data)
    assert len(page) < 100_000 and "(3,000,000 characters in all)" in page and "22 more" in page


def test_markdown_fits_into_a_comment():
    values = {f"metric {number} " + "x" * 300: [1.0, 0.0] * 15 for number in range(300)}
    text = report_markdown(report_data(evaluated(values), Gate(max_failure_rate=0.1).check(evaluated(values))))
    assert len(text) < 65_536 and "more in the report" in text


# ---- files


@pytest.mark.parametrize("broken", ["report.html", "report.md", "junit.xml", "report.json"])
def test_an_older_report_stays_whole_when_a_new_one_cannot_be_made(tmp_path, monkeypatch, broken):
    evaluation = example()
    result = GATE.check(evaluation, example())
    write_report(evaluation, tmp_path, result)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(data: Any) -> str:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(module, "_FORMATS", {**module._FORMATS, broken: fail})
    evaluation.found["recall"] = dict.fromkeys(evaluation.found["recall"], 0.0)
    with pytest.raises(RuntimeError):
        write_report(evaluation, tmp_path, GATE.check(evaluation, example()))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("moment", [0, 3])
def test_a_process_killed_while_writing_leaves_the_older_report(tmp_path, moment):
    evaluation = example()
    write_report(evaluation, tmp_path, GATE.check(evaluation, example()))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    script = f"""
import os, pathlib, sys
sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]!r}
from test_reports import GATE, example
from llmops_ref.reports import write_report
write, left = pathlib.Path.write_text, [{moment}]
def dying(self, text, **options):
    if not left[0]:
        with open(self, "w") as file:
            file.write(text[:100])
            file.flush()
            os._exit(9)
    left[0] -= 1
    return write(self, text, **options)
pathlib.Path.write_text = dying
evaluation = example()
evaluation.found["recall"] = dict.fromkeys(evaluation.found["recall"], 0.0)
write_report(evaluation, sys.argv[1], GATE.check(evaluation, example()))
"""
    assert subprocess.run([sys.executable, "-c", script, tmp_path]).returncode == 9
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if not path.name.startswith(".")} == before


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ReportError, match=r"cannot be written.*Name a folder"):
            write_report(example(), folder)


def test_the_same_evaluation_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_report(example(), tmp_path / name, GATE.check(example(), example()))
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
