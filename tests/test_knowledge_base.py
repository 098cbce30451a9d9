"""The knowledge base: reading, splitting, updating, and surviving."""

import contextlib
import datetime
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import pytest
from hash_embeddings import HashEmbeddings
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmops_ref import knowledge_base as module
from llmops_ref.access import ALL_GROUPS
from llmops_ref.core import BadInputError
from llmops_ref.documents import read_document, split_document
from llmops_ref.knowledge_base import (
    EmptyIndexError,
    IndexDamagedError,
    IndexFormatError,
    IndexLockedError,
    IndexMismatchError,
    KnowledgeBase,
)
from llmops_ref.retrieval import Retrieval

pytest.importorskip("chromadb")
HANDBOOK = Path(module.__file__).parent / "data" / "handbook"


# --- ingest and update ------------------------------------------------------------------------------------------


@pytest.fixture
def docs(tmp_path):
    folder = tmp_path / "docs"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.md").write_text("# Alpha\n\nThe alpha fee is £5.")
    (folder / "b.txt").write_text("The beta fee is £7.")
    (folder / "sub" / "a.md").write_text("# Other alpha\n\nThe nested fee is £9.")
    return folder


def sources(base: KnowledgeBase) -> dict[str, str]:
    rows = base._ask(lambda store: store.metadata())
    return {row["source"]: row["fingerprint"] for row in rows.values()}


def check_index(base: KnowledgeBase, folder: Path) -> None:
    "Every document once, every chunk there, every chunk found by its own vector."
    rows = base._ask(lambda store: store.get(list(store.metadata()), ["metadatas", "documents", "embeddings"]))
    have = {(row["path"], row["index"]): text for row, text in zip(rows["metadatas"], rows["documents"], strict=True)}
    want = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        for number, chunk in enumerate(split_document(read_document(path), name=path.name)):
            want[(os.path.realpath(path), number)] = chunk.text
    assert len(rows["ids"]) == len(set(rows["ids"])) == len(want)
    assert have == want
    vectors = np.asarray(rows["embeddings"])
    embedded = [module._indexed(text, row) for text, row in zip(rows["documents"], rows["metadatas"], strict=True)]
    assert np.allclose(vectors, base.embeddings.embed_documents(embedded), atol=1e-4)
    snapshot = base._ask(lambda store: store.snapshot)
    assert sorted(snapshot.rows["id"]) == sorted(chunk_id.encode() for chunk_id in rows["ids"]), "the table shows what the store holds"
    for chunk_id, text, row, vector in zip(rows["ids"], rows["documents"], rows["metadatas"], vectors, strict=True):
        number = snapshot.numbers([chunk_id])[0]
        assert snapshot.record(number)["text"] == text and snapshot.cosines(np.array([number]), vector)[0] > 0.999
        found = base._ask(lambda store, vector=vector, row=row: store.nearest(row["readers"], vector, 10))
        assert chunk_id in found or snapshot.cosines(snapshot.numbers(found[-1:]), vector)[0] > 0.999, "neither found nor hidden behind ten twins"


def test_add_update_delete_and_leave_alone(tmp_path, docs):
    model = HashEmbeddings()
    base = KnowledgeBase.open(tmp_path / "index", model)
    report = base.ingest(docs, progress=False)
    assert (report.added, report.updated, report.unchanged, report.deleted, report.failed) == (3, 0, 0, 0, [])
    assert set(sources(base)) == {"a.md", "b.txt", "sub/a.md"} and report.chunks == len(base) == 3
    embedded = model.embedded
    again = base.ingest([docs], progress=False)
    assert (again.added, again.unchanged) == (0, 3) and model.embedded == embedded
    (docs / "a.md").write_text("# Alpha\n\nThe alpha fee is £6 now.")
    (docs / "b.txt").unlink()
    changed = base.ingest([docs], progress=False)
    assert (changed.added, changed.updated, changed.unchanged, changed.deleted) == (0, 1, 1, 1)
    assert set(sources(base)) == {"a.md", "sub/a.md"}
    assert "£6 now" in base.search("alpha fee", 1)[0].text
    check_index(KnowledgeBase.open(tmp_path / "index", HashEmbeddings()), docs)


def test_a_file_and_its_folder_are_one_document_and_two_roots_do_not_collide(tmp_path, docs):
    base = KnowledgeBase.open(tmp_path / "index", HashEmbeddings())
    base.ingest(docs / "a.md", progress=False)
    assert base.ingest(docs, progress=False).added == 2
    assert base.ingest(docs / "sub", progress=False).unchanged == 1, "the nested folder is known already"
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.md").write_text("Another document of the same name.")
    base.ingest(other, progress=False)
    assert set(sources(base)) == {"a.md", "b.txt", "sub/a.md", "other/a.md"}
    (docs / "a.md").unlink()
    base.ingest(docs, progress=False)
    assert set(sources(base)) == {"b.txt", "sub/a.md", "other/a.md"}, "only documents below the ingested folder vanish"


def test_failed_files_are_rows_and_stop_nothing(tmp_path, docs):
    (docs / "zero.pdf").write_bytes(b"")
    (docs / "binary.txt").write_bytes(bytes(range(256)))
    (docs / "skipped.xyz").write_text("unsupported")
    (docs / ".hidden.md").write_text("hidden")
    base = KnowledgeBase.open(tmp_path / "index", HashEmbeddings())
    report = base.ingest(docs, progress=False)
    assert report.added == 3 and {Path(item.path).name for item in report.failed} == {"zero.pdf", "binary.txt"}
    assert all(item.reason for item in report.failed) and json.loads(json.dumps(report.to_dict()))["added"] == 3
    assert "binary.txt" in report._repr_markdown_()
    (docs / "a.md").write_bytes(b"")
    assert len(base.ingest(docs, progress=False).failed) == 3
    assert "a.md" in sources(base), "a document whose new version cannot be read keeps its old one"


def test_bad_paths_are_refused_before_any_work(tmp_path, docs):
    base = KnowledgeBase.open(tmp_path / "index", HashEmbeddings())
    (tmp_path / "empty").mkdir()
    for paths in ([docs, tmp_path / "missing"], [docs, tmp_path / "empty"], []):
        with pytest.raises(BadInputError):
            base.ingest(paths, progress=False)
    assert len(base) == 0


def test_passages_carry_place_span_and_metadata(tmp_path, docs):
    (docs / "m.md").write_text("---\ntitle: Overdrafts\nallowed_groups: [staff]\neffective_date: 2026-02-01\n---\n# Overdraft\n\nThe overdraft rate is 39.9%.")
    base = KnowledgeBase.open(tmp_path / "index", HashEmbeddings())
    base.ingest(docs, progress=False)
    passage = base.search("What is the overdraft rate?", 2, groups=["staff"])[0]
    assert passage.source == "m.md" and passage.section == "Overdraft" and passage.page is None
    assert passage.metadata == {"title": "Overdrafts", "allowed_groups": ["staff"], "effective_date": "2026-02-01"}
    assert read_document(docs / "m.md").text[passage.start:passage.end] == passage.text
    assert passage.place == "m.md, Overdraft" and 0 < passage.score <= 1
    view = base.view(["staff"])
    dense = view.dense(view.embed(["fee"])[0], 4)
    assert [item.score for item in dense] == sorted((item.score for item in dense), reverse=True) and len(dense) == 4


def test_questions_that_are_none_and_indexes_that_are_none(tmp_path, docs):
    base = KnowledgeBase.open(tmp_path / "index", HashEmbeddings())
    with pytest.raises(EmptyIndexError, match="ingest"):
        base.search("anything")
    base.ingest(docs, progress=False)
    for question in ("", " \n", "x" * 100_000):
        with pytest.raises(BadInputError):
            base.search(question)
    with pytest.raises(BadInputError):
        base.search("fee", 0)
    with pytest.raises(IndexFormatError):
        KnowledgeBase.open(docs, HashEmbeddings())
    with pytest.raises(IndexFormatError):
        KnowledgeBase.open(docs / "a.md", HashEmbeddings())
    assert sorted(path.name for path in docs.iterdir()) == ["a.md", "b.txt", "sub"], "a refused folder stays as it was"


def test_another_model_is_refused_and_the_same_under_another_name_is_not(tmp_path, docs):
    KnowledgeBase.open(tmp_path / "index", HashEmbeddings()).ingest(docs, progress=False)
    for model in (HashEmbeddings(64), HashEmbeddings(128, salt="x")):
        with pytest.raises(IndexMismatchError, match="hash-128"):
            KnowledgeBase.open(tmp_path / "index", model)
    renamed = HashEmbeddings()
    renamed.model = "renamed"
    assert len(KnowledgeBase.open(tmp_path / "index", renamed)) == 3
    manifest = tmp_path / "index" / "index.json"
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 99'))
    with pytest.raises(IndexFormatError, match="99"):
        KnowledgeBase.open(tmp_path / "index", HashEmbeddings())


# --- settling, damage, crashes, concurrency -------------------------------------------------------------------


def write_docs(folder: Path, count: int, words: int = 400, seed: int = 0) -> Path:
    "Documents of a few chunks each, all different."
    folder.mkdir(parents=True, exist_ok=True)
    source = random.Random(seed)
    for number in range(count):
        lines = (" ".join(source.choice("fee card rate loan bank note term cash date risk") + str(source.randrange(999)) for _ in range(12)) + "." for _ in range(words // 12))
        (folder / f"doc{number:03d}.md").write_text(f"# Document {number}\n\n" + "\n".join(lines))
    return folder


def test_settled_indexes_open_from_files_and_old_generations_go(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_COMPACT_AFTER", 5)
    folder = write_docs(tmp_path / "docs", 8)
    base = KnowledgeBase.open(tmp_path / "index", HashEmbeddings())
    for number in range(4):
        (folder / "doc000.md").write_text(f"Version {number} of the document. " * 100)
        base.ingest(folder, progress=False)
        check_index(base, folder)
        check_index(KnowledgeBase.open(tmp_path / "index", HashEmbeddings()), folder)
    kept = sorted(path.name for path in (tmp_path / "index").glob("generation-*"))
    assert len(kept) == 2 and kept[-1] > "generation-000002"


@pytest.mark.parametrize("damage", ["truncate", "garbage", "remove", "empty_pickle"])
def test_damaged_vector_files_give_a_clear_error_and_the_next_ingest_rebuilds(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(module, "_COMPACT_AFTER", 5)
    folder = write_docs(tmp_path / "docs", 4)
    KnowledgeBase.open(tmp_path / "index", HashEmbeddings()).ingest(folder, progress=False)
    current = max((tmp_path / "index").glob("generation-*"))
    files = [path for path in current.rglob("*") if path.is_file() and path.suffix != ".sqlite3"]
    assert any(path.name == "index_metadata.pickle" for path in files), "the vectors lie in files"
    for path in files:
        if damage == "truncate" and path.name == "data_level0.bin":
            path.write_bytes(path.read_bytes()[:100])
        elif damage == "garbage" and path.name == "header.bin":
            path.write_bytes(b"\xff" * 100)
        elif damage == "remove" and path.name == "index_metadata.pickle":
            path.unlink()
        elif damage == "empty_pickle" and path.name == "index_metadata.pickle":
            path.write_bytes(b"")
    script = f"""
import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(module.__file__).parents[1])]!r}
from hash_embeddings import HashEmbeddings
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llmops_ref.core import LlmopsRefError
from llmops_ref.knowledge_base import KnowledgeBase
base = KnowledgeBase.open({str(tmp_path / "index")!r}, HashEmbeddings())
try:
    print(len(base.search("fee card", 3)))
except LlmopsRefError as error:
    print(type(error).__name__, error)
"""
    searched = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert searched.returncode == 0, searched.stderr
    assert ("IndexDamagedError" in searched.stdout and "ingest again" in searched.stdout) or searched.stdout.strip() == "3"
    base = KnowledgeBase.open(tmp_path / "index", HashEmbeddings())
    base.ingest(folder, progress=False)
    check_index(base, folder)


INGEST = """
import sys, time; sys.path[:0] = [{tests!r}, {package!r}]
from hash_embeddings import HashEmbeddings
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llmops_ref import knowledge_base as module
from llmops_ref.access import ALL_GROUPS
class Slow(HashEmbeddings):
    def embed_documents(self, texts):
        time.sleep({pause})
        return super().embed_documents(texts)
module._COMPACT_AFTER, module._GROUP = {compact}, 100
base = module.KnowledgeBase.open({index!r}, Slow(), lock_timeout={timeout})
print("open", flush=True)
report = base.ingest({folder!r}, progress=False)
print(report.added, report.updated, report.unchanged, report.deleted, flush=True)
"""


def start_ingest(index: Path, folder: Path, pause: float = 0.01, compact: int = 60, timeout: float = 30.0) -> subprocess.Popen[str]:
    script = INGEST.format(tests=str(Path(__file__).parent), package=str(Path(module.__file__).parents[1]), pause=pause,
                           compact=compact, index=str(index), folder=str(folder), timeout=timeout)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "open", process.stderr.read()
    return process


def test_kill_nine_at_random_moments_loses_and_doubles_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_COMPACT_AFTER", 60)
    folder, index = write_docs(tmp_path / "docs", 120, words=1500), tmp_path / "index"
    dice, killed = random.Random(7), 0
    for attempt in range(6):
        for number in dice.sample(range(120), 25):    # also updates, so that old and new versions meet
            write_docs(tmp_path / "fresh", 1, words=1500, seed=1000 * attempt + number)
            (folder / f"doc{number:03d}.md").write_text((tmp_path / "fresh" / "doc000.md").read_text())
        process = start_ingest(index, folder)
        time.sleep(dice.uniform(0.0, 1.2))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        reader = KnowledgeBase.open(index, HashEmbeddings())
        try:
            passages = reader.search("card fee loan", 10)
            seen = {}
            for passage in passages:
                seen.setdefault(passage.source, set()).add((passage.start, passage.text))
            assert all(len({text for _, text in spans}) == len({start for start, _ in spans}) for spans in seen.values())
        except EmptyIndexError:
            pass
    assert killed >= 4, "the ingests ended before the kill came: no crash was tested"
    base = KnowledgeBase.open(index, HashEmbeddings())
    base.ingest(folder, progress=False)
    check_index(base, folder)
    assert not (index / "writing").exists()
    again = base.ingest(folder, progress=False)
    assert (again.added, again.updated, again.unchanged, again.deleted) == (0, 0, 120, 0)


def test_a_second_writer_waits_or_gets_a_clear_error(tmp_path):
    folder, index = write_docs(tmp_path / "docs", 40, words=1500), tmp_path / "index"
    first = start_ingest(index, folder, pause=0.5)
    deadline = time.monotonic() + 20
    impatient = KnowledgeBase.open(index, HashEmbeddings(), lock_timeout=0.2)
    locked = False
    while not locked and first.poll() is None and time.monotonic() < deadline:
        try:
            impatient.ingest(folder / "doc000.md", progress=False)
        except IndexLockedError as error:
            locked = "another process" in str(error).lower()
    assert locked
    patient = KnowledgeBase.open(index, HashEmbeddings(), lock_timeout=60)
    report = patient.ingest(folder, progress=False)
    assert report.unchanged == 40 and first.wait() == 0, first.stderr.read()
    check_index(patient, folder)


READ = """
import sys, time; sys.path[:0] = [{tests!r}, {package!r}]
from hash_embeddings import HashEmbeddings
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llmops_ref.knowledge_base import EmptyIndexError, KnowledgeBase
base = KnowledgeBase.open({index!r}, HashEmbeddings())
print("open", flush=True)
sizes = []
end = time.time() + {seconds}
while time.time() < end:
    try:
        assert base.search("card fee loan", 5)
        if len(sizes) % 7 == 3:
            base = KnowledgeBase.open({index!r}, HashEmbeddings())
    except EmptyIndexError:
        pass
    sizes.append(len(base))
while time.time() < end + 90 and len(base) < {final}:
    time.sleep(0.1)
print(len(sizes), max(sizes), len(base), flush=True)
"""


def test_two_processes_read_while_one_writes(tmp_path):
    folder, index = write_docs(tmp_path / "docs", 40, words=1000), tmp_path / "index"
    final = sum(len(split_document(read_document(path), name=path.name)) for path in folder.iterdir())
    KnowledgeBase.open(index, HashEmbeddings()).ingest(folder / "doc000.md", progress=False)
    script = READ.format(tests=str(Path(__file__).parent), package=str(Path(module.__file__).parents[1]), index=str(index), seconds=4, final=final)
    readers = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for reader in readers:
        assert reader.stdout.readline().strip() == "open"
    writer = start_ingest(index, folder, pause=0.3)
    out, error = writer.communicate(timeout=150)
    assert writer.returncode == 0, error
    for reader in readers:
        out, error = reader.communicate(timeout=150)
        assert reader.returncode == 0, error
        assert int(out.split()[-1]) == final, "a reader sees the new documents"
    check_index(KnowledgeBase.open(index, HashEmbeddings()), folder)


def test_threads_search_while_one_ingests(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_COMPACT_AFTER", 40)
    folder = write_docs(tmp_path / "docs", 30)
    base = KnowledgeBase.open(tmp_path / "index", HashEmbeddings())
    base.ingest(folder, progress=False)
    stop, errors = threading.Event(), []

    def search():
        while not stop.is_set():
            try:
                assert len(base.search("card fee", 4)) == 4
                time.sleep(0.01)
            except Exception as error:
                errors.append(error)
                return

    threads = [threading.Thread(target=search) for _ in range(6)]
    for thread in threads:
        thread.start()
    for number in range(5):
        write_docs(folder, 30, seed=number + 1)
        base.ingest(folder, progress=False)
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]
    check_index(base, folder)


def test_an_error_in_the_model_leaves_a_usable_index(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_GROUP", 100)
    folder = write_docs(tmp_path / "docs", 30, words=1500)
    class Failing(HashEmbeddings):
        def embed_documents(self, texts):
            if self.embedded > 300:
                raise ConnectionError("the endpoint is gone")
            return super().embed_documents(texts)

    base = KnowledgeBase.open(tmp_path / "index", Failing())
    with pytest.raises(ConnectionError):
        base.ingest(folder, progress=False)
    healthy = KnowledgeBase.open(tmp_path / "index", HashEmbeddings())
    assert len(healthy) > 0 and healthy.search("card")
    healthy.ingest(folder, progress=False)
    check_index(healthy, folder)


def test_an_unreadable_database_is_a_clear_error(tmp_path, docs):
    KnowledgeBase.open(tmp_path / "index", HashEmbeddings()).ingest(docs, progress=False)
    next((tmp_path / "index").rglob("chroma.sqlite3")).write_bytes(b"not a database" * 1000)
    with pytest.raises(IndexDamagedError, match="Delete"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        KnowledgeBase.open(tmp_path / "index", HashEmbeddings()).search("fee")


# --- who may read what ------------------------------------------------------------------------------------------

GROUPS = ["everyone", "staff", "risk", "fraud"]
FAST = Retrieval(candidates=6, glossary=None, one_per_page=False)


def write(folder: Path, name: str, body: str, **front: object) -> Path:
    "A Markdown file with front matter."
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in front.items()) + f"---\n{body}\n")
    return path


def found(base: KnowledgeBase, question: str, **options: object) -> set[str]:
    with contextlib.suppress(EmptyIndexError):
        return {passage.source for passage in base.search(question, 20, **options)}
    return set()


def test_a_search_without_groups_finds_what_anyone_may_read(tmp_path):
    folder = tmp_path / "docs"
    for name, front in {"open": {}, "everyone": {"allowed_groups": ["everyone"]}, "staff": {"allowed_groups": "staff"}, "two": {"allowed_groups": ["risk", "staff"]},
                        "empty": {"allowed_groups": []}, "null": {"allowed_groups": None}, "number": {"allowed_groups": [1]}, "other": {"Allowed-Groups": ["risk"]}}.items():
        write(folder, f"{name}.md", f"# Fees\n\nThe {name} fee is £5.", **front)
    base = KnowledgeBase.open(tmp_path / "index", HashEmbeddings())
    report = base.ingest(folder, progress=False)
    assert sorted(Path(path).name for path in report.closed) == ["empty.md", "null.md", "number.md"] and "nobody may read" in report._repr_markdown_()
    anyone = {"open.md", "everyone.md"}
    for groups, more in ((None, set()), ([], set()), (["Staff", "staff "], set()), (["staff"], {"staff.md", "two.md"}), (("risk",), {"two.md", "other.md"})):
        assert found(base, "fee", groups=groups) == anyone | more
        assert {record["source"] for record in base.view(groups).documents()} == anyone | more
    assert len(found(base, "fee", groups=ALL_GROUPS)) == 8
    with pytest.raises(BadInputError, match="list"):
        base.search("fee", groups="staff")
    with pytest.raises(BadInputError, match="list"):
        base.ingest(folder, allowed_groups="staff", progress=False)


def test_an_index_in_which_a_caller_may_read_nothing_answers_with_nothing(tmp_path):
    write(tmp_path / "docs", "secret.md", "The vault code is 4711.", allowed_groups=["staff"])
    base = KnowledgeBase.open(tmp_path / "index", HashEmbeddings())
    base.ingest(tmp_path / "docs", progress=False)
    assert base.search("The vault code is 4711.") == [] and base.view().documents() == ()


def test_groups_given_at_ingest_are_for_documents_that_name_none_and_stay(tmp_path):
    folder = tmp_path / "docs"
    write(folder, "silent.md", "The silent fee is £5.")
    write(folder, "open.md", "The open fee is £5.", allowed_groups=["everyone"])
    model = HashEmbeddings()
    base = KnowledgeBase.open(tmp_path / "index", model)
    base.ingest(folder, progress=False, allowed_groups=["staff"])
    assert found(base, "fee") == {"open.md"} and found(base, "fee", groups=["staff"]) == {"open.md", "silent.md"}
    assert base.ingest(folder, progress=False).unchanged == 2 and found(base, "fee") == {"open.md"}, "a nightly run without the option opens nothing"
    write(folder, "silent.md", "The silent fee is £6.")
    base.ingest(folder, progress=False)
    assert found(base, "fee") == {"open.md"}, "nor does a new version"
    assert base.ingest(folder, progress=False, allowed_groups=["everyone"]).updated == 1
    assert found(base, "fee") == {"open.md", "silent.md"}
    base.ingest(folder, progress=False, allowed_groups=[])
    assert found(base, "fee", groups=GROUPS) == {"open.md"} and len(base) == 2


def test_a_change_of_readers_takes_effect_in_one_step(tmp_path):
    folder = tmp_path / "docs"
    base = KnowledgeBase.open(tmp_path / "index", HashEmbeddings())
    other = KnowledgeBase.open(tmp_path / "index", HashEmbeddings())
    for number in range(4):
        readers, outsiders = ("staff", "risk") if number % 2 else ("risk", "staff")
        write(folder, "a.md", "The vault code is 4711.", allowed_groups=[readers])
        base.ingest(folder, progress=False)
        for reader in (base, other, KnowledgeBase.open(tmp_path / "index", HashEmbeddings())):
            assert found(reader, "vault", groups=[readers]) == {"a.md"} and found(reader, "vault", groups=[outsiders]) == set()


def test_a_reader_sees_one_version_of_readers_and_text_while_they_change(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_COMPACT_AFTER", 50)
    folder = tmp_path / "docs"

    def version(number):
        for name in range(12):
            write(folder, f"d{name}.md", f"Document {name} says version{number} about the fee. " * 4, allowed_groups=["even" if number % 2 == 0 else "odd"])

    version(0)
    base = KnowledgeBase.open(tmp_path / "index", HashEmbeddings())
    base.ingest(folder, progress=False)
    stop, wrong, asked = threading.Event(), [], [0] * 10

    def ask(place):
        while not stop.is_set():
            try:
                texts = [passage.text for passage in base.search("version fee document", 12, groups=["even", "odd"], retrieval=FAST)]
                versions = {text.split("version")[1].split()[0] for text in texts}
                if len(texts) != 12 or len(versions) != 1:
                    wrong.append((len(texts), versions))
                for passage in base.search("version fee document", 12, groups=["even"], retrieval=FAST):
                    if int(passage.text.split("version")[1].split()[0]) % 2:
                        wrong.append(passage.text)
            except Exception as error:
                wrong.append(error)
            asked[place] += 1
            time.sleep(0.005)

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(10)]
    for thread in threads:
        thread.start()
    for number in range(1, 9):
        version(number)
        base.ingest(folder, progress=False)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]
    assert all(asked)


WORDS = [f"word{number}" for number in range(40)]


@st.composite
def libraries(draw):
    "Documents as (readers, secret, words), and what is asked by whom."
    readers = st.one_of(st.lists(st.sampled_from(GROUPS), max_size=3), st.sampled_from([None, 7, "staff", "nobody", [""], {"a": 1}]))
    texts = st.lists(st.sampled_from(WORDS), min_size=3, max_size=12).map(" ".join)
    found = [(draw(readers), f"zq{number}xsecret", draw(texts)) for number in range(draw(st.integers(1, 8)))]
    questions = st.one_of(texts, st.sampled_from([f"{secret} {text}" for _, secret, text in found]), st.just("allowed_groups staff Title"))
    asked = draw(st.lists(st.tuples(questions, st.one_of(st.none(), st.lists(st.sampled_from([*GROUPS, "Staff", ""]), max_size=3))), min_size=1, max_size=4))
    return found, asked


def allowed(readers: object, groups: object) -> bool:
    "The rule, written a second time."
    names = [readers] if isinstance(readers, str) else readers
    if not isinstance(names, list) or not names or any(not isinstance(name, str) or not name.strip() for name in names):
        return False
    return bool(set(names) & {"everyone", *(groups or [])})


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(libraries(), st.sampled_from([0, 4000]))
def test_no_output_shows_a_byte_of_a_document_outside_the_callers_groups(tmp_path_factory, caplog, capfd, library, exact):
    documents, asked = library
    root = tmp_path_factory.mktemp("library")
    for number, (readers, secret, text) in enumerate(documents):
        front = {"title": f"title {secret}", "doc_id": "D", "effective_date": f"2026-01-{number + 1:02d}"} if number % 3 == 0 else {"title": f"title {secret}"}
        write(root / "docs", f"{secret}.md", f"# Section {secret}\n\n{text} {secret}", **front, allowed_groups=readers)
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.DEBUG):
        patch.setattr(module, "_EXACT", exact)
        base = KnowledgeBase.open(root / "index", HashEmbeddings(), today=lambda: datetime.date(2026, 6, 1))
        base.ingest(root / "docs", progress=False)
        everything = base.view(ALL_GROUPS).dense(np.array(base.embeddings.embed_query("x")), 100)
        caplog.clear()
        capfd.readouterr()
        for question, groups in asked:
            hidden = [secret for readers, secret, _ in documents if not allowed(readers, groups)]
            view = base.view(groups)
            shown: list[object] = [view.documents(), [view.siblings(passage) for passage in everything if any(secret in passage.source for secret in hidden)]]
            shown += [view.similarity(np.ones(128, dtype=np.float32), everything).astype(bool).sum() <= len(everything) - len(hidden), repr(base)]
            for options in ({}, {"retrieval": FAST}, {"where": {"source": {"$in": [f"{secret}.md" for secret in hidden]}}}, {"where": {"$no": 1}}, {"where": {"meta_title": {"$gt": ""}}}):
                try:
                    passages = base.search(question, 5, groups=groups, **options)
                    shown += [[passage.to_dict() for passage in passages], passages, [view.siblings(passage) for passage in passages]]
                except Exception as error:
                    shown += [repr(error), "".join(traceback.format_exception(error))]
            text = repr(shown) + caplog.text + "".join(capfd.readouterr())
            assert not [secret for secret in hidden if secret in text] and not any(item is False for item in shown)


def test_ten_thousand_questions_of_random_groups_leak_nothing(tmp_path, monkeypatch):
    folder, dice = tmp_path / "docs", random.Random(3)
    readers = {}
    for number in range(60):
        names = dice.sample(GROUPS, dice.randint(0, 3))
        body = " ".join(dice.choice(WORDS) for _ in range(30))
        readers[f"d{number}.md"] = names, body
        write(folder, f"d{number}.md", f"# Part\n\n{body} secret{number}", allowed_groups=names)
    base = KnowledgeBase.open(tmp_path / "index", HashEmbeddings())
    base.ingest(folder, progress=False)
    seen = 0
    for number in range(10_000):
        if number == 9700:    # and the last ones through the graph of each label
            monkeypatch.setattr(module, "_EXACT", 0)
        groups = dice.sample(GROUPS, dice.randint(0, 3)) or None
        name = f"d{dice.randrange(60)}.md"
        question = readers[name][1] if number % 2 else " ".join(dice.choice(WORDS) for _ in range(5))
        passages = base.search(question, 3, groups=groups, retrieval=FAST)
        assert all(allowed(readers[passage.source][0], groups) for passage in passages)
        if number % 2 and allowed(readers[name][0], groups):
            assert passages[0].source == name, "who may read it does find it"
            seen += 1
    assert seen > 1000


def test_versions_of_a_document_in_a_search(tmp_path):
    folder = tmp_path / "docs"
    write(folder, "fees-2025.md", "The Plus fee is £7 a month.", effective_date="2025-01-01")
    write(folder, "fees-2026.md", "The Plus fee is £8 a month.", effective_date="2026-01-01", supersedes="fees-2025.md")
    write(folder, "fees-2027.md", "The Plus fee is £9 a month.", effective_date="2027-01-01", supersedes="fees-2026.md")
    write(folder, "secret.md", "The Plus fee is £1 a month.", effective_date="2026-02-01", supersedes="fees-2026.md", allowed_groups=["staff"])
    days = [datetime.date(2026, 6, 1)]
    base = KnowledgeBase.open(tmp_path / "index", HashEmbeddings(), today=lambda: days[0])
    base.ingest(folder, progress=False)
    assert found(base, "What is the Plus fee?") == {"fees-2026.md"}
    assert found(base, "What is the Plus fee?", groups=["staff"]) == {"secret.md"}
    assert found(base, "What was the Plus fee in 2025?") == {"fees-2025.md", "fees-2026.md", "fees-2027.md"}
    days[0] = datetime.date(2027, 1, 1)
    assert found(base, "What is the Plus fee?") == {"fees-2027.md"}
    (folder / "fees-2027.md").unlink()
    base.ingest(folder, progress=False)
    assert found(base, "What is the Plus fee?") == {"fees-2026.md"}, "what replaced it is gone, so it holds again"


def test_conditions_narrow_a_search(tmp_path):
    folder = tmp_path / "docs"
    for year in (2021, 2022, 2023):
        write(folder, f"r{year}.md", f"The revenue of the year was £{year}m.", fiscal_year=year, company="Acme")
    base = KnowledgeBase.open(tmp_path / "index", HashEmbeddings())
    base.ingest(folder, progress=False)
    assert found(base, "revenue", where={"meta_fiscal_year": {"$gte": 2022}}) == {"r2022.md", "r2023.md"}
    assert found(base, "revenue", where={"source": "r2021.md"}) == {"r2021.md"}
    assert found(base, "revenue", where={"meta_fiscal_year": 1999}) == set()
    with pytest.raises(BadInputError, match="where"):
        base.search("revenue", where={"meta_company": {"$regex": "A.*"}})


# --- the snapshot: speed that is derived, and can be derived again ----------------------------------------------


def test_graph_and_comparison_find_the_same_rows(tmp_path, monkeypatch):
    folder = write_docs(tmp_path / "docs", 60, words=900)
    for number in range(0, 60, 3):
        path = folder / f"doc{number:03d}.md"
        path.write_text(f"---\nallowed_groups: [{'staff' if number % 2 else 'risk'}]\nkind: {number % 4}\n---\n{path.read_text()}")
    base = KnowledgeBase.open(tmp_path / "index", HashEmbeddings())
    base.ingest(folder, progress=False)
    for groups, where in ((None, None), (["staff"], None), (ALL_GROUPS, None), (ALL_GROUPS, {"meta_kind": 2})):
        view, vector = base.view(groups), np.asarray(base.embeddings.embed_query("card12 fee77 loan3"))
        exact = [passage.chunk_id for passage in view.dense(vector, 10, where)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_EXACT", 120)
            by_graph = [passage.chunk_id for passage in view.dense(vector, 10, where)]
        assert len(exact) == 10 and len(set(exact) & set(by_graph)) >= 9


@pytest.mark.parametrize("damage", ["table", "texts", "vectors", "lexical", "all"])
def test_a_missing_or_damaged_snapshot_is_derived_from_the_rows_and_mended_by_the_next_ingest(tmp_path, docs, damage):
    base = KnowledgeBase.open(tmp_path / "index", HashEmbeddings())
    base.ingest(docs, progress=False)
    wanted = base.search("beta fee", 3)
    rows = max((tmp_path / "index").glob("generation-*")) / "rows"
    if damage == "table":
        (rows / "table.npz").write_bytes((rows / "table.npz").read_bytes()[:-30])
    elif damage in ("texts", "vectors"):
        data = bytearray((rows / f"{damage}.bin").read_bytes())
        data[len(data) // 2] ^= 1
        (rows / f"{damage}.bin").write_bytes(data)
    for path in rows.rglob("*") if damage in ("lexical", "all") else ():
        if path.is_file() and (damage == "all" or path.parent.name.startswith("lexical")):
            path.write_bytes(b"\xff" * 20)
    reader = KnowledgeBase.open(tmp_path / "index", HashEmbeddings())
    assert reader.search("beta fee", 3) == wanted
    writer = KnowledgeBase.open(tmp_path / "index", HashEmbeddings())
    assert writer.ingest(docs, progress=False).unchanged == 3
    mended = KnowledgeBase.open(tmp_path / "index", HashEmbeddings())
    assert mended.search("beta fee", 3) == wanted and not mended._store.snapshot.damaged
    check_index(mended, docs)


def test_a_text_that_changed_under_an_open_index_is_an_error_and_not_an_answer(tmp_path, docs):
    base = KnowledgeBase.open(tmp_path / "index", HashEmbeddings())
    base.ingest(docs, progress=False)
    base.search("beta fee")
    path = next((tmp_path / "index").rglob("texts.bin"))
    data = path.read_bytes().replace("£7".encode(), "£8".encode())
    with path.open("r+b") as file:
        file.write(data)
    with pytest.raises(IndexDamagedError, match="ingest"):
        base.search("beta fee")


def test_an_index_of_the_old_format_says_what_to_do(tmp_path):
    folder = tmp_path / "index"
    folder.mkdir()
    (folder / "index.json").write_text(json.dumps({"format": 1, "generation": 1, "changes": 0, "model": "m", "dimensions": 128, "probe": [], "files": {}}))
    with pytest.raises(IndexFormatError, match="new folder"):
        KnowledgeBase.open(folder, HashEmbeddings())


def test_context_is_indexed_and_never_shown(tmp_path, docs, monkeypatch):
    split = module.split_document
    monkeypatch.setattr(module, "split_document", lambda document, name: [module.replace(chunk, context="Zanzibar | fiscal 2022") for chunk in split(document)])
    model = HashEmbeddings()
    base = KnowledgeBase.open(tmp_path / "index", model)
    base.ingest(docs, progress=False)
    passage = base.search("Zanzibar", 1)[0]
    assert passage.context == "Zanzibar | fiscal 2022" and "Zanzibar" not in passage.text and passage.scores["lexical"] > 0
    assert base.view().similarity(np.array(model.embed_query(f"{passage.context}\n{passage.text}")), [passage])[0] > 0.999
    monkeypatch.setattr(module, "_COMPACT_AFTER", 1)
    (docs / "b.txt").write_text("The beta fee is £8.")
    base.ingest(docs, progress=False)
    assert base.search("Zanzibar", 1)[0].context == "Zanzibar | fiscal 2022", "it survives a new generation"


def test_siblings_are_the_passages_of_the_same_section_in_order(tmp_path):
    folder = tmp_path / "docs"
    write(folder, "a.md", "# One\n\n" + "The first part speaks about fees and cards at length. " * 40 + "\n\n# Two\n\nThe second part.")
    base = KnowledgeBase.open(tmp_path / "index", HashEmbeddings())
    base.ingest(folder, progress=False)
    passage = base.search("first part fees cards", 1)[0]
    family = base.view().siblings(passage)
    assert len(family) > 1 and {item.section for item in family} == {"One"} and [item.start for item in family] == sorted(item.start for item in family)


def test_file_names_with_newlines_and_emoji_and_symlink_loops_survive(tmp_path, docs):
    (docs / "two\nlines 🏦.md").write_text("The gamma fee is £3.")
    (docs / "bad\nname.pdf").write_bytes(b"no")
    (docs / "loop").symlink_to(docs)
    (docs / "self.md").symlink_to(docs / "self.md")
    with contextlib.suppress(OSError):
        Path(os.fsdecode(os.fsencode(docs) + b"/raw\xff.md")).write_text("The delta fee is £4.")
    base = KnowledgeBase.open(tmp_path / "index", HashEmbeddings())
    report = base.ingest(docs, progress=False)
    assert report.added == 4 and len(report.failed) in (2, 3)
    assert all(item.path.isprintable() for item in report.failed) and "\n" not in "".join(item.path for item in report.failed)
    assert "two\\nlines 🏦.md" in found(base, "gamma fee")
    assert base.ingest(docs, progress=False).unchanged == 4
