"""Print the constraints from pip's own account of an installation: every package, direct or not, at one version.

    pip install --dry-run --ignore-installed --report report.json -c constraints.txt -e ".[all,dev]"
    python .ci/lock.py report.json > constraints.txt

Run it on Linux with the lowest Python we support: it is the one that needs the most packages. A version's local
label (`+cpu`) is left out, so that each platform takes the build that its index offers.
"""

from __future__ import annotations

import json
import sys
from configparser import ConfigParser
from pathlib import Path

from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    "Print one line for each package of the report, our own left out."
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    report = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    pins = {canonicalize_name(item["metadata"]["name"]): Version(item["metadata"]["version"]).public for item in report["install"]}
    pins.pop(canonicalize_name(settings["DEFAULT"]["repo"]))
    print("# Every package that llmops-ref and its extras install, at the version CI tests. Written by .ci/lock.py.")
    for name, version in sorted(pins.items()):
        print(f"{name}=={version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
