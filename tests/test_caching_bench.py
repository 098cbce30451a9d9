"The caching bench: its counts, its resumption, its errors; with fake embeddings, small sizes and no network."

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmops_ref import caching_bench as bench
from llmops_ref.caching_bench import (
    CachingBench,
    Labels,
    PeersError,
    VectorStore,
    ask_gptcache,
    bench_caching,
    by_cosine,
    judge_hits,
    peers_environment,
    replay,
    split_pairs,
    time_in_turns,
    zipf_requests,
)
from llmops_ref.core import BadInputError
from llmops_ref.hit_calibration import Pair

PAIRS = [Pair("a", "a2", True), Pair("a2", "a3", True), Pair("a", "b", False), Pair("c", "c2", True)]


def vectors_of(angles: dict[str, float]) -> dict[str, np.ndarray]:
    return {text: np.array([np.cos(angle), np.sin(angle)], np.float32) for text, angle in angles.items()}


VECTORS = vectors_of({"a": 0.0, "a2": 0.1, "a3": 0.2, "b": 0.05, "c": 2.0, "c2": 2.1})


def test_labels_join_what_is_the_same_and_part_what_is_not() -> None:
    labels = Labels(PAIRS)
    assert labels.judge("a3", "a") is True and labels.judge("b", "a3") is False    # over two steps
    assert labels.judge("a", "c") is None and labels.judge("never seen", "a") is None and labels.judge("x", "x") is True


def test_hits_are_counted_by_their_labels() -> None:
    store = VectorStore(VECTORS, ["a", "a2", "c"])
    close = judge_hits("close", PAIRS, by_cosine(store, 0.9))
    assert (close.asked, close.answerable, close.right, close.wrong, close.unlabelled) == (3, 2, 2, 1, 0)
    nothing = judge_hits("nothing", PAIRS, lambda text: None)
    assert nothing.right == nothing.wrong == 0 and nothing.hit_rate.value == 0
    assert judge_hits("odd", PAIRS, lambda text: "c").unlabelled == 2    # nobody compared a3 or b with c
    assert close.wrong_hit_rate.low < 1 / 3 < close.wrong_hit_rate.high


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8), st.booleans()), min_size=1, max_size=12))
def test_no_question_is_on_both_sides_of_the_split(rows: list[tuple[int, int, bool]]) -> None:
    seen: dict[frozenset[int], bool] = {}
    pairs = [Pair(f"t{a}", f"t{b}", seen.setdefault(frozenset((a, b)), same)) for a, b, same in rows]
    train, test = split_pairs(pairs)
    assert len(train) + len(test) == len(pairs)
    labels = Labels(pairs)
    assert not {labels.group(pair.a) for pair in train} & {labels.group(pair.a) for pair in test}


def test_a_split_of_its_own_is_kept() -> None:
    pairs = [Pair("a", "b", True, split="test"), Pair("a", "c", True, split="calibration")]
    assert split_pairs(pairs) == ([pairs[1]], [pairs[0]])


def test_a_growing_store_finds_what_a_full_one_finds() -> None:
    full, growing = VectorStore(VECTORS, list(VECTORS)), VectorStore(VECTORS)
    assert growing.nearest("a") == []
    for text in VECTORS:
        growing.add(text)
    for text in VECTORS:
        assert growing.nearest(text, 3) == full.nearest(text, 3) and full.nearest(text)[0][0] == text


def test_zipf_requests_follow_the_law_and_the_seed() -> None:
    groups = [[f"q{number}", f"q{number}'"] for number in range(20)]
    requests = zipf_requests(groups, 4000, seed=1)
    assert requests == zipf_requests(groups, 4000, seed=1) != zipf_requests(groups, 4000, seed=2)
    counts = sorted((sum(text in group for text in requests) for group in groups), reverse=True)
    share = 1 / sum(1 / rank for rank in range(1, 21))
    assert abs(counts[0] / 4000 - share) < 0.04 and counts[0] > 1.5 * counts[1] and set(requests) == {text for group in groups for text in group}
    flat = sorted((sum(text in group for text in zipf_requests(groups, 4000, seed=1, exponent=0)) for group in groups), reverse=True)
    assert flat[0] < 1.5 * flat[-1]


def test_a_replay_counts_calls_and_wrong_answers() -> None:
    store = VectorStore(VECTORS)
    found = replay(["a", "a", "b", "c", "c2", "a3"], Labels(PAIRS), by_cosine(store, 0.9), store.add)
    assert found == {"calls": [1, 1, 1, 2, 2, 2], "wrong": [0, 0, 1, 1, 1, 1], "unlabelled": [0, 0, 0, 0, 0, 0]}
    assert replay(["a", "a"], Labels(PAIRS), lambda text: None, lambda text: None)["calls"] == [1, 2]


def test_contenders_take_turns() -> None:
    order: list[str] = []
    found = time_in_turns({"one": lambda _: order.append("one"), "two": lambda _: order.append("two")}, rounds=2, calls=2)
    assert order == ["one"] * 2 + ["two"] * 4 + ["one"] * 4 + ["two"] * 2
    assert all(len(times) == 2 and min(times) >= 0 for times in found.values())


def test_one_upstream_call_and_no_sharing_in_ours(tmp_path: Path) -> None:
    rows = {row["cache"]: row for row in bench._bench_misses(tmp_path, sizes=(16,), seconds=0.1)["rows"]}
    assert rows["ours"] == {"cache": "ours", "concurrent": 16, "upstream": 1, "failed": 0, "shared": False}
    assert rows["LangChain in memory"]["upstream"] > 1 and rows["LangChain in memory"]["shared"]


def test_exact_hits_are_timed_side_by_side_and_ours_is_faster_than_sqlite(tmp_path: Path) -> None:
    part = bench._bench_exact(tmp_path, entries=30, rounds=3, calls=30)
    table = {row["cache"]: row for row in bench._exact_table(part)}
    assert set(table) == {"ours", "LangChain SQLite", "LangChain in memory", "ours, through LangChain's invoke"}
    assert np.median(part["microseconds"]["LangChain SQLite"]) > 2 * np.median(part["microseconds"]["ours"])


def test_parts_are_files_and_a_second_run_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Path] = []

    def fake(folder: Path) -> dict[str, Any]:
        runs.append(folder)
        return {"seconds": 0.1, "rows": [{"cache": "ours", "concurrent": len(runs), "upstream": 1, "failed": 0, "shared": False}]}

    monkeypatch.setattr(bench, "_bench_misses", fake)
    first = bench_caching(tmp_path / "out", ["misses"], progress=False)
    assert json.loads((tmp_path / "out" / "caching-misses.json").read_text(encoding="utf-8")) == first.to_dict()["misses"]
    assert {"device", "date", "versions"} <= set(first.parts["misses"])
    assert bench_caching(tmp_path / "out", ["misses"], progress=False).to_dict() == first.to_dict() and len(runs) == 1
    assert bench_caching(tmp_path / "out", ["misses"], again=True, progress=False).parts["misses"]["rows"][0]["concurrent"] == 2
    assert "upstream calls: 1" in first.text() and "| ours | 1 | 1 | 0 | no |" in first._repr_markdown_()


def test_a_part_that_fails_leaves_the_others_and_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_bench_exact", lambda folder: {"entries": 1, "calls": 1, "microseconds": {"ours": [1.0]}, "invoke_microseconds": {"ours": [2.0], "in memory": [1.0]}})

    def fail(folder: Path) -> dict[str, Any]:
        raise RuntimeError("interrupted")

    monkeypatch.setattr(bench, "_bench_misses", fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        bench_caching(tmp_path, ["exact", "misses"], progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["caching-exact.json"]


def test_bad_arguments_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    for arguments in ({"parts": ["speed"]}, {"seeds": 1}):
        with pytest.raises(BadInputError):
            bench_caching(tmp_path / "none", **arguments)    # type: ignore[arg-type]
    assert not (tmp_path / "none").exists()


def test_an_interpreter_without_gptcache_is_named_in_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PeersError, match=r"no GPTCache.*--peers-python"):
        peers_environment(sys.executable)
    with pytest.raises(PeersError, match="FileNotFoundError"):
        peers_environment(tmp_path / "no-such-python")


def test_no_index_is_an_error_that_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        commands.append(command)
        failed = "install" in command
        return type("Done", (), {"returncode": int(failed), "stderr": "ERROR: No matching distribution found", "stdout": ""})()

    monkeypatch.setenv("LLMOPS_REF_CACHE", str(tmp_path))
    monkeypatch.setattr(bench.subprocess, "run", run)
    for _ in range(2):    # a failed environment is not taken for a finished one
        with pytest.raises(PeersError, match=r"No matching distribution found.*--peers"):
            peers_environment()
    assert [("venv" in command, "install" in command) for command in commands] == [(True, False), (False, True)] * 2


def test_the_worker_cannot_install_and_gives_back_places(tmp_path: Path) -> None:
    "A stand-in for GPTCache: the worker talks to it, and its attempt to install is refused."
    package = tmp_path / "gptcache"
    for name, code in {
        "__init__.py": "from gptcache.core import Cache, Config",
        "core.py": (
            "import subprocess\n"
            "try:\n    subprocess.check_call('pip install -q surprise', shell=True)\n    INSTALLED = True\n"
            "except ImportError:\n    INSTALLED = False\n"
            "class Config:\n    similarity_threshold = 0.8\n"
            "class Cache:\n    def init(self, embedding_func, config, **_):\n        self.embed, self.config, self.rows = embedding_func, config, []\n"
        ),
        "adapter/__init__.py": "",
        "adapter/api.py": (
            "import gptcache.core as core\n"
            "def put(text, answer, cache_obj):\n    assert not core.INSTALLED\n    cache_obj.rows.append((cache_obj.embed(text), answer))\n"
            "def get(text, cache_obj):\n    found = max((float(row @ cache_obj.embed(text)), answer) for row, answer in cache_obj.rows)\n"
            "    return [found[1]] if found[0] >= cache_obj.config.similarity_threshold else None\n"
        ),
        "manager.py": "def manager_factory(*a, **k): pass",
        "processor/__init__.py": "",
        "processor/post.py": "nop = None",
        "processor/pre.py": "get_prompt = None",
        "similarity_evaluation/__init__.py": "",
        "similarity_evaluation/distance.py": "class SearchDistanceEvaluation: pass",
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(code, encoding="utf-8")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}" exec "{sys.executable}" "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    rows = ask_gptcache(str(python), ["a", "c"], ["a2", "b", "c2"], VECTORS, thresholds=(0.5, 0.9999))
    assert [row["served"] for row in rows] == [[0, 0, 1], [None, None, None]]
    assert all(len(row["microseconds"]) == 3 for row in rows)
    with pytest.raises(PeersError, match="worker failed"):
        ask_gptcache(sys.executable, ["a"], ["b"], VECTORS)


def test_tables_of_the_stored_results_can_be_made() -> None:
    folder = Path(__file__).parent.parent / "nbs" / "results"
    parts = {path.stem.removeprefix("caching-"): json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("caching-*.json")}
    found = CachingBench(parts)
    assert set(bench.PARTS) <= set(parts) and all(found.tables().values()) and found.text() and "wrong among hits" in found._repr_markdown_()
