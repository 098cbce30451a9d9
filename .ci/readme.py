"""Write README.md from the executed index chapter, or check that the two agree: no figure in it is typed.

    python .ci/readme.py [--check]
"""

from __future__ import annotations

import re
import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
LOCAL_LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)\s]+)\)")


def printed(
    cell: nbformat.NotebookNode,    # an executed code cell
) -> str:                           # Markdown for what it printed; empty when it printed nothing
    "Turn a cell's stored outputs into Markdown: a table as it is, text in a fence."
    parts, text = [], ""
    for output in [*cell.outputs, {}]:    # the last, empty one closes the fence
        data = output.get("data", {})
        if "text" in output:
            text += output["text"]        # one print may be stored in several pieces
            continue
        if text.strip():
            parts.append(f"```text\n{text.strip()}\n```")
            text = ""
        if "text/markdown" in data:
            parts.append(data["text/markdown"].strip())
        elif "text/plain" in data:
            parts.append(f"```text\n{data['text/plain'].strip()}\n```")
    return "\n\n".join(parts)


def readme() -> str:
    "The text of README.md: the index's prose, and what its cells printed."
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    repository = f"{settings['DEFAULT']['git_url']}/blob/{settings['DEFAULT']['branch']}/"
    parts = ["<!-- Written by .ci/readme.py from nbs/index.ipynb: edit that. -->"]
    for cell in nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4).cells:
        text = printed(cell) if cell.cell_type == "code" else cell.source
        if text:
            parts.append(LOCAL_LINK.sub(r"](nbs/\1)", text).replace(repository, ""))
    return "\n\n".join(parts) + "\n"


def main() -> int:
    "Write the file, or with `--check` say whether it is in step."
    path, text = ROOT / "README.md", readme()
    if "--check" not in sys.argv[1:]:
        path.write_text(text, encoding="utf-8")
    elif not path.exists() or path.read_text(encoding="utf-8") != text:
        print("README.md is not in step with nbs/index.ipynb; run: make notebooks", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
