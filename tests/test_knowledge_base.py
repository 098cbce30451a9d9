"""The knowledge base: reading, splitting, updating, and surviving."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from hash_embeddings import HashEmbeddings

from llmops_ref import knowledge_base as module
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
        for number, chunk in enumerate(split_document(read_document(path))):
            want[(os.path.realpath(path), number)] = chunk.text
    assert len(rows["ids"]) == len(set(rows["ids"])) == len(want)
    assert have == want
    vectors = np.asarray(rows["embeddings"])
    assert np.allclose(vectors, base.embeddings.embed_documents(rows["documents"]), atol=1e-4)
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
from llmops_ref import knowledge_base as module
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
    for attempt in range(12):
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
    assert killed >= 8, "the ingests ended before the kill came: no crash was tested"
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
    final = sum(len(split_document(read_document(path))) for path in folder.iterdir())
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
