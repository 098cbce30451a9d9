"""Check the built site in `_docs/`: every chapter and module has its page, every internal link and anchor
leads somewhere, and no page loads anything from another host. Links to other hosts are not followed.

    python .ci/check_docs.py [FOLDER]
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
LOADED = {
    "script": ["src"], "img": ["src", "srcset"], "iframe": ["src"], "source": ["src", "srcset"], "video": ["src", "poster"],
    "audio": ["src"], "embed": ["src"], "object": ["data"], "image": ["href", "xlink:href"], "use": ["href", "xlink:href"],
    "input": ["src"], "track": ["src"],
}  # fmt: skip
LOADING_RELATIONS = {"stylesheet", "icon", "preload", "modulepreload", "prefetch", "preconnect", "dns-prefetch", "manifest", "apple-touch-icon"}
CSS_URL = re.compile(r"url\(\s*[\"']?([^\"')]+)|@import\s+[\"']([^\"']+)")
SCRIPT_LOAD = re.compile(r"\b(?:import|from|fetch\(|importScripts\(|import\()\s*[\"'`]((?:https?:)?//[^\"'`]+)")


@dataclass
class Page:
    "What one HTML page refers to."

    path: Path                                                    # the file
    anchors: set[str] = field(default_factory=set)                # its ids and names
    links: list[str] = field(default_factory=list)                # targets a reader can follow
    loaded: list[str] = field(default_factory=list)               # addresses the browser loads by itself


class PageParser(HTMLParser):
    "Collect anchors, links and loaded addresses of a page."

    def __init__(self, page: Page) -> None:
        super().__init__()
        self.page = page
        self.inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        self.page.anchors |= {values[name] for name in ("id", "name") if name in values}
        self.page.loaded += css_urls(values.get("style", ""))
        if tag == "a" and "href" in values:
            self.page.links.append(values["href"])
        elif tag == "link" and "href" in values and LOADING_RELATIONS & set(values.get("rel", "").split()):
            self.page.loaded.append(values["href"])
        for name in LOADED.get(tag, []):
            if name in values:
                self.page.loaded += [part.split()[0] for part in values[name].split(",")] if name == "srcset" else [values[name]]
        self.inside = tag if tag in ("style", "script") else ""

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "style":
            self.page.loaded += css_urls(data)
        elif self.inside == "script":
            self.page.loaded += SCRIPT_LOAD.findall(data)


def css_urls(
    text: str,    # a style sheet or the value of a style attribute
) -> list[str]:   # every address in it
    "Find what a style sheet loads."
    return [first or second for first, second in CSS_URL.findall(text)]


def read(
    path: Path,    # an HTML file
) -> Page:         # what it refers to
    "Parse one page."
    page = Page(path)
    parser = PageParser(page)
    parser.feed(path.read_text(encoding="utf-8"))
    return page


def is_remote(
    address: str,    # an address as written
) -> bool:           # whether a browser would ask another host
    "Tell whether an address leaves the site; `data:` and fragments do not."
    return bool(urlsplit(address).netloc) or urlsplit(address).scheme in ("http", "https", "ftp")


def target(
    site: Path,       # the folder of the site
    source: Path,     # the file that the address is written in
    address: str,     # a local address
) -> Path:            # the file it means
    "Resolve a local address to a file."
    path = unquote(urlsplit(address).path)
    found = (site / path.lstrip("/")) if path.startswith("/") else (source.parent / path if path else source)
    return found / "index.html" if found.is_dir() else found


def problems(
    site: Path,    # the folder of the site
) -> list[str]:    # one line for each thing that is wrong
    "Check the whole site."
    found: list[str] = []
    pages = {path.resolve(): read(path) for path in sorted(site.rglob("*.html"))}
    wanted = [path.with_suffix(".html").name for path in (ROOT / "nbs").glob("*.ipynb")]
    wanted += [f"api/{path.name}".replace(".py", ".html") for path in (ROOT / "llmops_ref").glob("[!_]*.py")]
    wanted += ["llms.txt", "search.json", "index.html"]
    found += [f"missing: {name}" for name in sorted(set(wanted)) if not (site / name).is_file()]
    for page in pages.values():
        name = page.path.relative_to(site)
        for address in sorted(set(page.loaded)):
            if is_remote(address):
                found.append(f"{name}: loads {address} from another host")
            elif not address.startswith(("data:", "#", "blob:")) and not target(site, page.path, address).is_file():
                found.append(f"{name}: loads {address}, which is missing")
        for address in sorted(set(page.links)):
            if is_remote(address) or urlsplit(address).scheme:
                continue
            file = target(site, page.path, address)
            anchor = unquote(urlsplit(address).fragment)
            if not file.is_file():
                found.append(f"{name}: broken link {address}")
            elif anchor and file.resolve() in pages and anchor not in pages[file.resolve()].anchors:
                found.append(f"{name}: no anchor #{anchor} in {file.relative_to(site)}")
    for path in sorted(site.rglob("*.css")):
        for address in css_urls(path.read_text(encoding="utf-8")):
            if is_remote(address):
                found.append(f"{path.relative_to(site)}: loads {address} from another host")
            elif not address.startswith(("data:", "#")) and not target(site, path, address).is_file():
                found.append(f"{path.relative_to(site)}: loads {address}, which is missing")
    return found


def main() -> int:
    "Print what is wrong; exit with 1 if anything is."
    site = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "_docs").resolve()
    found = problems(site)
    print("\n".join(found) if found else f"{len(list(site.rglob('*.html')))} pages: every link leads somewhere, nothing is loaded from another host.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
