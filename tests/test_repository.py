"""What must agree with what: notebooks and modules, extras and imports, the README and the commands it names."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import runpy
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import llmops_ref

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT / "nbs").glob("*.ipynb"))
MODULES = sorted((ROOT / "llmops_ref").glob("[!_]*.py"))
EXPORT = re.compile(r"^#\|\s*exports?\s*$", re.MULTILINE)
NOT_EVALUATED = re.compile(r"^#\|\s*eval:\s*false", re.MULTILINE | re.IGNORECASE)
MOST_CELLS = 100

chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
module = pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)


def settings() -> dict[str, str]:
    "settings.ini, as setup.py reads it."
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def extras() -> dict[str, list[Requirement]]:
    "Every extra of settings.ini, with what it requires."
    suffix = "_requirements"
    return {
        key.removesuffix(suffix): [Requirement(text) for text in value.split()]
        for key, value in settings().items()
        if key.endswith(suffix)
    }


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    "The code cells of a notebook that hold code."
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code" and cell.source.strip()]


def tracked() -> list[Path]:
    "Every file under version control, or every file where git is not at hand."
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def python(code: str) -> str:
    "Run code in a fresh interpreter and return what it prints."
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout


# ------------------------------------------------------------------ notebooks and modules


def test_modules_are_in_step_with_their_notebooks() -> None:
    done = subprocess.run([sys.executable, ".ci/notebooks.py", "check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_readme_is_in_step_with_the_index() -> None:
    done = subprocess.run([sys.executable, ".ci/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@chapter
def test_no_cell_shows_an_error(path: Path) -> None:
    assert [cell.id for cell in code_cells(path) for output in cell.outputs if output.output_type == "error"] == []


@chapter
def test_every_printing_cell_was_executed(path: Path) -> None:
    "A cell that ends in a call to print, display or a bare name must have stored what it showed."
    silent = []
    for cell in code_cells(path):
        if EXPORT.search(cell.source) or NOT_EVALUATED.search(cell.source) or cell.outputs or cell.source.startswith("%%"):
            continue
        body = ast.parse(re.sub(r"^\s*[!%].*$", "pass", cell.source, flags=re.MULTILINE)).body
        last = body[-1] if body else None
        shows = isinstance(last, ast.Expr) and (
            isinstance(last.value, ast.Name | ast.JoinedStr)
            or (isinstance(last.value, ast.Call) and getattr(last.value.func, "id", "") in {"print", "display", "Markdown", "HTML"})
        )
        if shows and not cell.source.rstrip().endswith(";"):
            silent.append(cell.id)
    assert silent == []


@chapter
def test_a_chapter_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(nbformat.read(path, as_version=4).cells) <= MOST_CELLS


@chapter
def test_most_outputs_are_checked(path: Path) -> None:
    cells = code_cells(path)
    ignored = [cell for cell in cells if "NBVAL_IGNORE_OUTPUT" in cell.source]
    assert 3 * len(ignored) < len(cells)
    assert not [cell for cell in cells if "NBVAL_SKIP" in cell.source or "NBVAL_RAISES_EXCEPTION" in cell.source]


@chapter
def test_each_exported_name_is_defined_once(path: Path) -> None:
    defined: dict[str, int] = {}
    exported = set()
    for cell in code_cells(path):
        if cell.source.lstrip().startswith(("%", "!")):
            continue
        for node in ast.parse(re.sub(r"^\s*[!%].*$", "pass", cell.source, flags=re.MULTILINE)).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                defined[node.name] = defined.get(node.name, 0) + 1
                if EXPORT.search(cell.source):
                    exported.add(node.name)
    assert [name for name in sorted(exported) if defined[name] > 1] == []


@chapter
def test_export_directives_are_well_formed(path: Path) -> None:
    assert [cell.id for cell in code_cells(path) if re.search(r"^#\|\s*exports?:", cell.source, re.MULTILINE)] == []


@chapter
def test_a_chapter_opens_with_a_title_and_a_promise(path: Path) -> None:
    lines = [line for line in nbformat.read(path, as_version=4).cells[0].source.splitlines() if line.strip()]
    assert lines[0].startswith("# ") and lines[1].startswith("> ")
    assert not re.match(r"\d", path.stem), "order comes from the sidebar; a number in the name breaks links"


@chapter
def test_notebooks_are_clean(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["metadata"] == {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    assert [cell for cell in notebook["cells"] if cell.get("execution_count") is not None] == []


def test_the_sidebar_lists_every_chapter() -> None:
    contents = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    assert sorted(entry for entry in contents if isinstance(entry, str)) == [path.name for path in CHAPTERS]


# ------------------------------------------------------------------ dependencies


def requires() -> list[tuple[str, str, str]]:
    "Each call of `require` in the library: the file, the module it imports, the extra it names."
    found = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "require":
                named = {keyword.arg: keyword.value for keyword in node.keywords}
                first = node.args[0] if node.args else None
                assert isinstance(first, ast.Constant), f"{path.name}:{node.lineno}: name the module as a string"
                assert isinstance(named.get("extra"), ast.Constant), f"{path.name}:{node.lineno}: name the extra as a string"
                found.append((path.name, first.value, named["extra"].value))
    return found


def test_every_required_module_comes_with_its_extra() -> None:
    providers = importlib.metadata.packages_distributions()
    wrong = []
    for file, name, extra in requires():
        brought = {canonicalize_name(requirement.name) for requirement in extras().get(extra, [])}
        offered = {canonicalize_name(distribution) for distribution in providers.get(name.partition(".")[0], [])}
        if not brought & offered:
            wrong.append(f"{file}: require({name!r}, extra={extra!r})")
    assert wrong == []


def test_requirements_have_no_spaces_inside() -> None:
    assert extras()  # parsing fails on a specifier that a space cut in two
    assert all(requirement.specifier for requirements in extras().values() for requirement in requirements)


def test_constraints_pin_every_direct_dependency() -> None:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            assert re.fullmatch(r"==[^*]+", str(requirement.specifier)), line
            pins[canonicalize_name(requirement.name)] = str(requirement.specifier).removeprefix("==")
    wrong = []
    wanted = [Requirement(text) for text in settings()["requirements"].split()] + [r for name in extras() for r in extras()[name]]
    for requirement in wanted:
        pin = pins.get(canonicalize_name(requirement.name))
        if pin is None or not requirement.specifier.contains(pin, prereleases=True):
            wrong.append(f"{requirement} (pinned: {pin})")
    assert wrong == []


def test_the_demo_installs_extras_that_exist() -> None:
    named = re.search(r"^DEMO_EXTRAS \?= (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert named and set(named.group(1).split(",")) <= set(extras())


def test_the_version_has_one_source() -> None:
    assert settings()["version"] == llmops_ref.__version__


def test_the_supported_versions_agree() -> None:
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")
    matrix = yaml.safe_load(workflow)["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert all(version in SpecifierSet(f">={settings()['min_python']}") for version in matrix)
    assert settings()["min_python"] in matrix


# ------------------------------------------------------------------ what an import costs


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ["numpy", "langchain", "langchain_core", "torch", "transformers", "chromadb", "onnxruntime", "pydantic", "httpx", "xllamacpp"]
    code = f"import sys, llmops_ref; print([name for name in {heavy} if name in sys.modules])"
    assert python(code).strip() == "[]"


IMPORTS = """
import importlib, json, os, sys
sys.dont_write_bytecode = True
import httpx, langchain_core.language_models, langchain_core.runnables, langchain_openai, numpy, pydantic
def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname", "socket.listen"):
        seen.append(event)
    elif event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        seen.append(f"{event} {arguments[0]}")
    elif event in ("subprocess.Popen", "os.system", "os.mkdir"):
        seen.append(event)
for name in NAMES:
    if not os.fork():    # each in a process of its own, where none of ours was imported before
        seen = []
        sys.addaudithook(watch)
        importlib.import_module(f"llmops_ref.{name}")
        heavy = [one for one in ("torch", "transformers", "chromadb", "onnxruntime", "xllamacpp") if one in sys.modules]
        os.write(1, (json.dumps([name, heavy, list(seen)]) + "\\n").encode())
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, list[list[str]]]:
    "By module: which heavy packages its import loads, and what it does besides. What they share is loaded once."
    names = [path.stem for path in MODULES]
    lines = python(IMPORTS.replace("NAMES", repr(names))).splitlines()
    return {name: found for name, *found in map(json.loads, lines)}


@module
def test_importing_a_module_touches_no_network_and_no_file(path: Path, imported: dict[str, list[list[str]]]) -> None:
    assert imported[path.stem] == [[], []]


# ------------------------------------------------------------------ what the text promises


def test_commands_in_the_text_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    names = r"ingest|ask|demo|doctor|fetch-models"
    source = (ROOT / "llmops_ref" / "cli.py").read_text(encoding="utf-8") if (ROOT / "llmops_ref" / "cli.py").exists() else None
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        spans = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL))
        assert {target for target in re.findall(r"\bmake ([a-z-]+)", spans)} <= targets, name
        for command in set(re.findall(r"\bllmops-ref ([a-z][a-z-]+)", spans)):
            assert re.fullmatch(names, command) or (source and f'"{command}"' in source), f"{name}: llmops-ref {command}"


def test_every_subcommand_in_the_readme_answers_to_help() -> None:
    pytest.importorskip("llmops_ref.cli")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in sorted(set(re.findall(r"\bllmops-ref ([a-z][a-z-]+)", text))):
        code = f"import sys; sys.argv = ['llmops-ref', {command!r}, '--help']; from llmops_ref.cli import main; sys.exit(main())"
        assert command in python(code)


def test_links_between_the_files_lead_somewhere() -> None:
    broken = []
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        broken += [
            f"{name}: {link}"
            for link in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text)
            if not (ROOT / link).exists()
        ]
    assert broken == []


def test_a_bare_make_lists_the_targets() -> None:
    done = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = re.findall(r"^  make (\S+) ", done.stdout, re.MULTILINE)
    assert listed == ["help", "demo", "test", "lab", "docs", "serve-docs", "export", "notebooks", "lint", "doctor", "clean"]


@pytest.mark.parametrize("target", ["demo", "test", "docs", "lint", "notebooks", "export", "doctor"])
def test_an_installed_environment_is_left_alone(target: str, tmp_path: Path) -> None:
    stamps = {"STAMP": tmp_path / "all", "DEMO_STAMP": tmp_path / "demo"}
    command = ["make", "-n", target, *(f"{name}={path}" for name, path in stamps.items())]
    fresh = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for path in stamps.values():
        path.touch()
        os.utime(path, (2**32, 2**32))
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert fresh.count("-m pip install") == 1 and "-c constraints.txt" in fresh
    assert again and "pip install" not in again


def test_an_unsupported_python_gets_a_sentence(tmp_path: Path) -> None:
    old = tmp_path / "python-old"
    old.write_text(f'#!/bin/sh\ncode="import sys; sys.version_info = (3, 9, 1); exec(sys.argv[1])"\nexec {sys.executable} -c "$code" "$2"\n')
    old.chmod(0o755)
    command = ["make", "doctor", f"DEMO_STAMP={tmp_path / 'stamp'}", f"VENV={tmp_path / 'venv'}", f"PYTHON={old}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "needs Python 3.11, 3.12 or 3.13" in done.stderr and "3.9" in done.stderr
    assert not (tmp_path / "venv").exists()


# ------------------------------------------------------------------ what must not be committed

# Written in pieces, so that this file does not find itself.
FORBIDDEN = {
    "a path of one machine": re.compile(r"(?<![\w.])/(?:work|root|home/\w+|Users/\w+)/\w|/tmp/" + r"bash_jobs"),
    "a package registry's host": re.compile(r"https?://[^\s\"'<>]*(?:artifactory|nexus|/simple/|--index-" + "url)"),
    "a private key": re.compile("-----BEGIN [A-Z ]*PRIVATE" + " KEY-----"),
    "an access token": re.compile(r"\b(?:sk-[A-Za-z0-9]{20,}|ghp_[A-Za-z0-9]{20,}|hf_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16}|xox[bp]-\w{10,})"),
}


def test_nothing_private_is_committed() -> None:
    found = []
    for path in tracked():
        text = path.read_bytes().decode("utf-8", "ignore")
        if path.suffix in {".pdf", ".png", ".docx", ".onnx"}:
            continue
        for what, pattern in FORBIDDEN.items():
            if match := pattern.search(text):
                found.append(f"{path.relative_to(ROOT)}: {what}: {match.group()[:60]}")
    assert found == []


def test_no_task_is_left_in_the_text() -> None:
    marker = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    assert [str(path.relative_to(ROOT)) for path in tracked() if path.suffix in {".py", ".md", ".ipynb"} and marker.search(path.read_text(encoding="utf-8"))] == []


def test_the_top_level_is_small() -> None:
    allowed = {
        "README.md", "settings.ini", "_quarto.yml", "nbs", "llmops_ref", "tests", "pyproject.toml", "setup.py", "Makefile",
        "constraints.txt", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", ".ci", ".github", ".gitignore",
    }  # fmt: skip
    assert {path.relative_to(ROOT).parts[0] for path in tracked()} <= allowed


# ------------------------------------------------------------------ the site's own check


@pytest.fixture
def check_docs() -> dict[str, object]:
    "The functions of .ci/check_docs.py."
    return runpy.run_path(str(ROOT / ".ci" / "check_docs.py"))


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ('<a href="nowhere.html">x</a>', "broken link nowhere.html"),
        ('<a href="#nowhere">x</a>', "no anchor #nowhere"),
        ('<script src="https://cdn.example.org/x.js"></script>', "from another host"),
        ('<link rel="stylesheet" href="//fonts.example.org/css">', "from another host"),
        ('<img srcset="https://example.org/a.png 2x">', "from another host"),
        ('<style>@import "https://example.org/x.css";</style>', "from another host"),
        ('<p style="background: url(https://example.org/x.png)">x</p>', "from another host"),
        ("<script>import m from 'https://cdn.example.org/m.mjs';</script>", "from another host"),
        ('<img src="missing.png">', "which is missing"),
        ('<a href="https://example.org/">x</a><a href="#here" id="here">y</a><img src="data:image/png;base64,AA">', None),
    ],
)
def test_the_site_check_finds_what_it_should(check_docs: dict[str, object], tmp_path: Path, body: str, complaint: str | None) -> None:
    (tmp_path / "index.html").write_text(f"<html><body>{body}</body></html>", encoding="utf-8")
    found = [line for line in check_docs["problems"](tmp_path.resolve()) if not line.startswith("missing:")]  # type: ignore[operator]
    assert (found == []) if complaint is None else (len(found) == 1 and complaint in found[0]), found


def test_the_site_check_misses_no_page(check_docs: dict[str, object], tmp_path: Path) -> None:
    found = check_docs["problems"](tmp_path.resolve())  # type: ignore[operator]
    assert {"missing: core.html", "missing: api/core.html", "missing: llms.txt"} <= set(found)
