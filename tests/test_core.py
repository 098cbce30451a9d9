"""llmops_ref.core: whole files or none, errors that survive a process boundary, telemetry off unless asked for."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmops_ref import core
from llmops_ref.core import (
    BadInputError,
    ContextTooLongError,
    HashMismatchError,
    LlmopsRefError,
    MissingExtraError,
    ModelNotFetchedError,
    atomic_path,
    cache_dir,
    check_sha256,
    disable_telemetry,
    require,
    sha256_file,
)

ROOT = Path(__file__).resolve().parent.parent
ERRORS = [LlmopsRefError, BadInputError, ContextTooLongError, MissingExtraError, ModelNotFetchedError, HashMismatchError]


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    "Run a script in a process of its own, which imports this checkout."
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], str(ROOT)])}
    return subprocess.run([sys.executable, "-c", script, *map(str, arguments)], env=environment, capture_output=True, text=True)


# ---- errors


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_keep_problem_and_remedy_through_pickle(kind):
    copy = pickle.loads(pickle.dumps(kind("It broke.", "Mend it.")))
    assert type(copy) is kind
    assert (copy.problem, copy.remedy, str(copy)) == ("It broke.", "Mend it.", "It broke. Mend it.")
    assert str(kind("It broke.")) == "It broke."


def _fail(text: str) -> None:
    raise ModelNotFetchedError(text, "Fetch it.")


def test_an_error_crosses_a_process_boundary():
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool, pytest.raises(ModelNotFetchedError) as caught:
        pool.submit(_fail, "Gone.").result()
    assert (caught.value.problem, caught.value.remedy) == ("Gone.", "Fetch it.")


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [(BadInputError, ValueError), (ContextTooLongError, ValueError), (MissingExtraError, ImportError), (ModelNotFetchedError, FileNotFoundError)],
)
def test_errors_are_also_what_a_stranger_would_catch(kind, builtin):
    assert issubclass(kind, builtin) and issubclass(kind, LlmopsRefError)


# ---- optional dependencies


def test_require_returns_the_module():
    assert require("os.path", extra="dev") is os.path


@pytest.mark.parametrize("module", ["llmops_ref_absent_package", "llmops_ref_absent_package.inner"])
def test_a_missing_package_names_its_extra(module):
    with pytest.raises(MissingExtraError, match=r"'llmops_ref_absent_package'.*llmops-ref\[gpu\]"):
        require(module, extra="gpu")


@pytest.mark.parametrize("line", ["import llmops_ref_absent_package", "raise ImportError('a shared library is missing')", "1 / 0"])
def test_a_package_that_is_there_and_broken_is_not_called_missing(tmp_path, monkeypatch, line):
    name = f"broken_{abs(hash(line))}"
    (tmp_path / f"{name}.py").write_text(line)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises((ImportError, ZeroDivisionError)) as caught:
        require(name, extra="gpu")
    assert not isinstance(caught.value, MissingExtraError)


# ---- where things are


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMOPS_REF_CACHE", str(tmp_path / "elsewhere"))
    assert cache_dir() == (tmp_path / "elsewhere").resolve()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LLMOPS_REF_CACHE", "~/models")
    assert cache_dir() == (tmp_path / "models").resolve()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMOPS_REF_CACHE", "here")
    assert cache_dir().is_absolute() and cache_dir() == (tmp_path / "here").resolve()


@pytest.mark.parametrize("value", [None, ""])
def test_without_an_override_it_is_the_users_own(monkeypatch, value):
    monkeypatch.delenv("LLMOPS_REF_CACHE", raising=False)
    if value is not None:
        monkeypatch.setenv("LLMOPS_REF_CACHE", value)
    assert cache_dir().name == "llmops-ref" and cache_dir().is_absolute()


def test_asking_for_the_cache_folder_makes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMOPS_REF_CACHE", str(tmp_path / "new"))
    cache_dir()
    assert list(tmp_path.iterdir()) == []


# ---- atomic files


def test_the_file_appears_whole_and_only_at_the_end(tmp_path):
    final = tmp_path / "made" / "when missing" / "file.bin"
    with atomic_path(final) as temporary:
        temporary.write_bytes(b"half")
        assert not final.exists() and temporary.parent == final.parent
        temporary.write_bytes(b"whole")
    assert final.read_bytes() == b"whole"
    assert list(final.parent.iterdir()) == [final]
    assert final.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_what_was_there(tmp_path, error):
    final = tmp_path / "file"
    final.write_bytes(b"old")
    with pytest.raises(error), atomic_path(final) as temporary:
        temporary.write_bytes(b"new")
        raise error
    assert final.read_bytes() == b"old" and list(tmp_path.iterdir()) == [final]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=300), st.booleans()), min_size=1, max_size=6))
def test_the_content_is_always_that_of_the_last_success(writes):
    with tempfile.TemporaryDirectory() as folder:
        final, expected = Path(folder) / "file", None
        for content, succeeds in writes:
            try:
                with atomic_path(final) as temporary:
                    temporary.write_bytes(content)
                    if not succeeds:
                        raise RuntimeError
                expected = content
            except RuntimeError:
                pass
            assert (final.read_bytes() if final.exists() else None) == expected
        assert len(os.listdir(folder)) == (expected is not None)


@pytest.mark.parametrize("old", [None, b"old"])
def test_kill_nine_leaves_no_final_file_and_no_damage(tmp_path, old):
    final = tmp_path / "file"
    if old is not None:
        final.write_bytes(old)
    script = """
import os, sys
from llmops_ref.core import atomic_path
with atomic_path(sys.argv[1]) as temporary:
    temporary.write_bytes(b"half")
    os.kill(os.getpid(), 9)
"""
    assert run(script, final).returncode == -9
    assert (final.read_bytes() if final.exists() else None) == old
    with atomic_path(final) as temporary:
        temporary.write_bytes(b"new")
    assert final.read_bytes() == b"new"


def test_readers_never_see_a_mixture(tmp_path):
    final, mixtures, done = tmp_path / "file", [], threading.Event()

    def write(letter: bytes) -> None:
        for _ in range(40):
            with atomic_path(final) as temporary:
                temporary.write_bytes(letter * 100_000)

    def read() -> None:
        while not done.is_set():
            content = final.read_bytes()
            if len(content) != 100_000 or len(set(content)) != 1:
                mixtures.append(len(content))

    with atomic_path(final) as temporary:
        temporary.write_bytes(b"0" * 100_000)
    writers = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b", b"c")]
    reader = threading.Thread(target=read)
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert mixtures == [] and list(tmp_path.iterdir()) == [final]


# ---- hashes


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=70_000), st.integers(0, 7), st.data())
def test_the_hash_is_of_the_bytes_and_one_bit_changes_it(content, bit, data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(content)
        digest = sha256_file(path)
        assert digest == hashlib.sha256(content).hexdigest()
        check_sha256(path, digest)
        if content:
            position = data.draw(st.integers(0, len(content) - 1))
            changed = bytearray(content)
            changed[position] ^= 1 << bit
            path.write_bytes(changed)
            with pytest.raises(HashMismatchError, match=f"(?s)file .*{digest}.*fetch-models"):
                check_sha256(path, digest)


# ---- telemetry


def test_telemetry_is_off_unless_the_user_says_otherwise(monkeypatch):
    names = list(core._TELEMETRY_SWITCHES)
    assert {"ANONYMIZED_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "RAGAS_DO_NOT_TRACK"} <= set(names)
    for name in names:
        monkeypatch.setenv(name, "to be undone")
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAGAS_DO_NOT_TRACK", "false")
    disable_telemetry()
    assert {name: os.environ[name] for name in names} == {**core._TELEMETRY_SWITCHES, "RAGAS_DO_NOT_TRACK": "false"}


def test_importing_the_package_is_light_and_changes_no_environment():
    script = """
import os, sys
before = dict(os.environ)
import llmops_ref.core
print(before == dict(os.environ), sorted({"numpy", "torch", "httpx", "langchain_core", "chromadb"} & set(sys.modules)))
"""
    assert run(script).stdout.strip() == "True []"
