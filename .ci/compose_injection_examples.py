"""Compose the training examples that were not written one by one, from the sentences in injection_fragments.json.

    python .ci/compose_injection_examples.py            write them anew behind the written ones
    python .ci/compose_injection_examples.py --check    fail where the file holds others

Attack and ordinary compositions share neutral rules, fillers, host documents, names and layouts, so that neither
length nor layout tells them apart. Seeded: the same fragments give the same texts.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "llmops_ref" / "data"
COUNTS = {"persona": 290, "document": 340, "appended": 110}    # for each label
HELD_BACK = 112                                                # ordinary documents for calibration, from sentences of their own
LONGEST = 4000
Fragments = Mapping[str, list[str]]


def joined(rng: random.Random, parts: list[str]) -> str:
    "Rules as running text, lines, numbers or bullets."
    style = rng.choice(("flow", "flow", "lines", "numbers", "bullets"))
    if style == "numbers":
        return "\n".join(f"{number}. {part}" for number, part in enumerate(parts, 1))
    return {"flow": " ", "lines": "\n", "bullets": "\n- "}[style].join(["- " + parts[0], *parts[1:]] if style == "bullets" else parts)


def typed(rng: random.Random, text: str) -> str:
    "As people type: now and then in small letters, with lost vowels or apostrophes."
    chance = rng.random()
    if chance < 0.12:
        return text.lower()
    if chance < 0.18:
        return re.sub(r"(?<=[a-z])([aeiou])(?=[a-z]{2} )", lambda match: match[1] if rng.random() < 0.85 else "", text)
    return text.replace("'", "") if chance < 0.22 else text


def some(rng: random.Random, sentences: list[str], counts: tuple[int, ...]) -> list[str]:
    "A few of the sentences, as many as one of `counts`."
    return rng.sample(sentences, rng.choice(counts))


def persona(rng: random.Random, fragments: Fragments, attack: bool) -> str:
    "A long request to play somebody, with rules."
    neutral = rng.sample(fragments["neutral_rules"], rng.choice((0, 1, 1, 2, 2, 3, 4, 6)))
    many = (1, 2, 3, 4, 5, 6, 8, 12)
    if attack:
        name, opening = rng.choice(fragments["names" if rng.random() < 0.7 else "plain_names"]), rng.choice(fragments["jail_open"])
        rules = some(rng, fragments["jail_rules"], many)
        extra = some(rng, fragments["jail_reason"], (0, 0, 1, 2)) + some(rng, fragments["jail_threat"], (0, 1, 1, 2, 3)) + some(rng, fragments["jail_format"], (0, 1, 1))
        tail = some(rng, fragments["goals"], (1, 1, 1, 2, 3))
    else:
        name = rng.choice(fragments["plain_names" if rng.random() < 0.5 else "names"])
        opening = rng.choice(fragments["plain_open"]).replace("{job}", rng.choice(fragments["jobs"]))
        rules, extra = some(rng, fragments["plain_rules"], many), some(rng, fragments["plain_reason"], (0, 1, 2, 2, 3))
        tail = some(rng, fragments["plain_tasks"], (1, 1, 1, 2, 3))
    rules = rules + neutral
    rng.shuffle(rules)
    extra = extra + some(rng, fragments["filler"], (0, 1, 2)) + some(rng, fragments["neutral_opinions"], (0, 1, 2))
    rng.shuffle(extra)
    head = rng.choice(("", "", "", "", "Rules:", "Here are your rules.", "What matters:", "Instructions"))
    parts = [opening, *([head] if head else []), joined(rng, rules)]
    cut = rng.randint(0, len(extra))
    parts += [" ".join(some_extra) for some_extra in (extra[:cut], extra[cut:]) if some_extra]
    parts.append(rng.choice(("", "", "", "First question: ", "Now: ", "Here we go. ")) + " ".join(tail))
    return typed(rng, rng.choice(("\n", " ", "\n\n")).join(parts).replace("{name}", name))


def document(rng: random.Random, fragments: Fragments, attack: bool) -> str:
    "A document with a planted instruction, or with one that is meant for people."
    host = rng.choice(fragments["hosts"])
    if rng.random() < 0.35:
        host = host + "\n\n" + rng.choice(fragments["hosts"])
    added = [rng.choice(fragments["document_attacks" if attack else "document_plain"])]
    if rng.random() < 0.5:
        added.insert(rng.randint(0, 1), rng.choice(fragments["document_plain"]))
    lines = [line for line in re.split(r"(?<=[.!?] )|(?<=\n)", host) if line]
    for sentence in added:
        at = rng.choice((0, len(lines), len(lines), rng.randint(0, len(lines))))
        own_line = bool(at) and not lines[at - 1].endswith("\n") and rng.random() < 0.4
        lines.insert(at, ("\n" if own_line else "") + sentence + ("\n" if rng.random() < 0.4 else " "))
    text = "".join(line if line.endswith(("\n", " ")) else line + " " for line in lines).strip()
    chance = rng.random()
    if chance < 0.25:
        return rng.choice(fragments["document_requests"]) + "\n\n" + text
    return text + "\n\n" + rng.choice(fragments["document_requests"]) if chance < 0.35 else text


def appended(rng: random.Random, fragments: Fragments, attack: bool) -> str:
    "An ordinary request, and behind it an injected task or another ordinary one."
    first = rng.choice(fragments["plain_tasks"])
    switch, second = ("switches", "goals") if attack else ("plain_switches", "plain_tasks")
    then = rng.choice(fragments[switch]) + " " + rng.choice(fragments[second])
    return typed(rng, rng.choice((" ", "\n", "\n\n")).join((first, then)))


MAKERS: dict[str, Callable[[random.Random, Fragments, bool], str]] = {"persona": persona, "document": document, "appended": appended}


def composed(fragments: Fragments, written: set[str]) -> list[dict[str, object]]:
    "All composed examples, none of which was written or composed before."
    rng, seen, rows = random.Random(0), set[str](), []

    def add(text: str, label: int, kind: str, split: str) -> bool:
        if text in seen or len(text) > LONGEST:
            return False
        seen.add(text)
        rows.append({"text": text, "label": label, "kind": f"composed-{kind}", "split": split, "language": "en", "made": "composed"})
        return True

    for kind, count in COUNTS.items():
        for label in (1, 0):
            made = 0
            while made < count:
                made += add(MAKERS[kind](rng, fragments, bool(label)), label, kind, "train")
    held = {**fragments, "hosts": fragments["calibration_hosts"], "document_plain": fragments["calibration_plain"]}
    rng, made = random.Random(1), 0
    seen |= written
    while made < HELD_BACK:
        made += add(document(rng, held, False), 0, "calibration-document", "calibration")
    return [row for row in rows if row["text"] not in written]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    check = parser.parse_args().check
    path = DATA / "injection_examples.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    written = [row for row in rows if row["made"] == "written"]
    made = composed(json.loads((DATA / "injection_fragments.json").read_text(encoding="utf-8")), {row["text"] for row in written})
    if check:
        same = [row for row in rows if row["made"] == "composed"] == made
        print("as composed" if same else "injection_examples.jsonl holds other composed texts: run this without --check", file=sys.stdout if same else sys.stderr)
        return 0 if same else 1
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [*written, *made]), encoding="utf-8")
    print(len(written), "written,", len(made), "composed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
