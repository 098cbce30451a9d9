"""Print the constraints: the version installed here of everything that the package and its extras need.

    python .ci/lock.py > constraints.txt
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from configparser import ConfigParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PLATFORMS = ["linux", "darwin"]
PYTHONS = ["3.11", "3.12", "3.13"]


def wanted() -> list[Requirement]:
    "What settings.ini asks for: the requirements and every extra."
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    keys = [key for key in settings["DEFAULT"] if key == "requirements" or key.endswith("_requirements")]
    return [Requirement(text) for key in keys for text in settings["DEFAULT"][key].split()]


def applies(
    requirement: Requirement,    # one dependency of a distribution
    extras: set[str],            # the extras of that distribution that were asked for
) -> bool:                       # whether any platform and Python that we support installs it
    "Evaluate a requirement's marker for every environment that the lock is for."
    if requirement.marker is None:
        return True
    return any(
        requirement.marker.evaluate({"extra": extra, "python_version": python, "python_full_version": f"{python}.9", "sys_platform": platform, "platform_system": platform.capitalize()})
        for extra in extras | {""}
        for python in PYTHONS
        for platform in PLATFORMS
    )


def closure() -> tuple[dict[str, str], list[str]]:
    "The pins of everything needed, by name, and the names that are needed somewhere but not installed here."
    pins: dict[str, str] = {}
    missing: set[str] = set()
    todo = wanted()
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            missing.add(name)
            continue
        pins[name] = re.sub(r"\+.*", "", distribution.version)
        needs = [Requirement(text) for text in distribution.requires or []]
        todo += [need for need in needs if applies(need, set(requirement.extras))]
    return dict(sorted(pins.items())), sorted(missing)


def main() -> int:
    "Print the lock; name on stderr what other platforms or versions need and this environment lacks."
    pins, missing = closure()
    print("# Every package that llmops-ref and its extras install, at the version CI tests. Written by .ci/lock.py.")
    for name, version in pins.items():
        print(f"{name}=={version}")
    if missing:
        print("not installed here, so not pinned:", ", ".join(missing), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
