"""Build the site: stage the executed chapters, write the API pages, render into `_docs/`.

Staging is nbdev's, with one change: nbdev drops exported cells from the page and puts signatures in their
place, and runs code to do so. A book that teaches shows its code, and the API pages carry the signatures.
So exported cells stay, marked with the module they go to, and nothing runs.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbdev.serve
import yaml
from execnb.nbio import mk_cell
from nbdev.config import get_config
from nbdev.doclinks import _build_modidx
from nbdev.process import Processor
from nbdev.processors import FilterDefaults, FrontmatterProc, hide_line, populate_language, strip_ansi
from nbdev.quarto import refresh_quarto_yml

ROOT = Path(__file__).resolve().parent.parent
HIDDEN = {"hide", "default_exp"}
EXPORTED = {"export", "exports", "exporti"}
DIRECTIVE = re.compile(r"^#\|\s*(export|exports|exporti|hide|default_exp|eval|exec_doc)\b.*\n?", re.MULTILINE)
NBVAL = re.compile(r"^# NBVAL_\w+\n?", re.MULTILINE)
REMOTE_IMPORT = re.compile(r"@import\s+url\(\s*[\"']?(?:https?:)?//[^)]*\)[^;]*;")


class FrontMatter(FrontmatterProc):
    "nbdev's front matter from the first heading and quotation, without the key that only nbdev's own rendering needs."

    def end(self) -> None:
        self.nb.frontmatter_ = self.fm
        if self.fm:
            self.nb.cells.insert(0, mk_cell(f"---\n{yaml.safe_dump(self.fm, allow_unicode=True)}---\n", "raw"))


def only_imports(
    source: str,    # of a cell
) -> bool:
    "Whether a cell does nothing but import, so that a reader can do without seeing it first."
    try:
        statements = ast.parse(source).body
    except SyntaxError:    # a magic
        return False
    flat = [inner for outer in statements for inner in (outer.body if isinstance(outer, ast.If) else [outer])]
    return bool(flat) and all(isinstance(statement, ast.Import | ast.ImportFrom) for statement in flat)


class ShowExports(Processor):
    "Keep exported code on the page, marked with its module; fold imports; drop cells that only serve the build."

    def begin(self) -> None:
        modules = [cell.directives_["default_exp"][0] for cell in self.nb.cells if "default_exp" in cell.directives_]
        module = f"llmops_ref.{modules[0]}" if modules else ""
        cells = []
        for cell in self.nb.cells:
            directives = cell.directives_.keys()
            if directives & HIDDEN:
                continue
            if cell.cell_type == "code":
                cell.source = NBVAL.sub("", DIRECTIVE.sub("", cell.source)).strip("\n")
                if only_imports(cell.source):
                    cell.source = f'#| code-fold: true\n#| code-summary: "Imports"\n{cell.source}'
            elif not cell.source.strip():
                continue
            if module and directives & EXPORTED and "code-fold" not in cell.source:
                cells.append(mk_cell(f"::: {{.exported}}\nexported to `{module}`\n:::", "markdown"))
            cells.append(cell)
        self.nb.cells = cells


class ChapterFilter(FilterDefaults):
    "nbdev's staging without the steps that hide exported code, run it, or link to the published site."

    def base_procs(self) -> list[Any]:
        return [FrontMatter, populate_language, ShowExports, strip_ansi, hide_line]


def stage() -> Path:
    "Write nbs/nbdev.yml and the index of names, and stage every chapter and its files in `_proc/`."
    refresh_quarto_yml()
    _build_modidx()
    nbdev.serve.FilterDefaults = ChapterFilter
    return Path(nbdev.serve.proc_nbs(force=True, n_workers=0))


def render(
    staged: Path,    # the folder that holds the staged site
) -> Path:           # the folder of the rendered site
    "Render with Quarto where it is installed, else with smalldocs; either way after smalldocs' API pages."
    smalldocs = [sys.executable, "-m", "smalldocs.cli"]
    subprocess.run([*smalldocs, "api", "build", "--dir", str(staged)], check=True)
    quarto = shutil.which("quarto")
    command = [quarto, "render", str(staged), "--no-execute"] if quarto else [*smalldocs, "render", str(staged)]
    subprocess.run(command, check=True)
    return staged / get_config().doc_path.name


def without_remote_fonts(
    site: Path,    # the rendered site; its style sheets are changed in place
) -> None:
    "Take the web fonts out of the themes: the pages ask no other host for anything."
    for path in site.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        local = REMOTE_IMPORT.sub("", text)
        if local != text:
            path.write_text(local, encoding="utf-8")


def main() -> int:
    "Build the site."
    os.chdir(ROOT)
    site = render(stage())
    without_remote_fonts(site)
    target = get_config().doc_path
    shutil.rmtree(target, ignore_errors=True)
    shutil.move(site, target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
