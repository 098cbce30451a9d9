"""Operating an index: switching models under queries, checking, mending, erasing, moving, and dying at any moment."""

import json
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hash_embeddings import HashEmbeddings
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmops_ref import index_operations as module
from llmops_ref import knowledge_base as store_module
from llmops_ref.core import BadInputError
from llmops_ref.index_operations import (
    IndexFileError,
    SwitchError,
    check_index,
    delete_documents,
    discard,
    export_index,
    import_index,
    index_stats,
    reembed,
    repair_index,
    rollback,
    switch,
)
from llmops_ref.knowledge_base import (
    ALL_GROUPS,
    EmptyIndexError,
    IndexDamagedError,
    IndexLockedError,
    IndexMismatchError,
    KnowledgeBase,
)

pytest.importorskip("chromadb")
pytest.importorskip("pyarrow")
BLUE, GREEN = HashEmbeddings(64), HashEmbeddings(64, salt="green")    # of one size: only the probe tells them apart


def write_docs(folder: Path, count: int = 6, seed: int = 0) -> Path:
    "Documents of about six chunks each, all different."
    folder.mkdir(parents=True, exist_ok=True)
    source = random.Random(seed)
    for number in range(count):
        lines = (" ".join(source.choice(["fee", "card", "rate", "loan", "bank", "note", "term", "cash", "date", "risk"]) + str(source.randrange(99)) for _ in range(12)) + "." for _ in range(40))
        (folder / f"doc{number:03d}.md").write_text(f"# Document {number}\n\n" + "\n".join(lines))
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_docs(tmp_path / "docs")


@pytest.fixture
def base(tmp_path, folder):
    opened = KnowledgeBase.open(tmp_path / "index", BLUE)
    opened.ingest(folder, progress=False)
    return opened


def contents(base: KnowledgeBase) -> dict[str, tuple]:
    "Every row: text, metadata and vector."
    store = base._ask(lambda store: store)
    rows = store.get(list(store.metadata()), ["metadatas", "documents", "embeddings"])
    return {row[0]: row[1:] for row in zip(rows["ids"], rows["documents"], rows["metadatas"], map(tuple, np.asarray(rows["embeddings"]).round(5)), strict=True)}


def made_by(base: KnowledgeBase, model: HashEmbeddings) -> bool:
    "Whether every vector, in the store and in what readers see, is that model's."
    rows, snapshot = contents(base), base._ask(lambda store: store.snapshot)
    expected = {chunk_id: model.embed_query(module._indexed(text, row)) for chunk_id, (text, row, _) in rows.items()}
    shown = {chunk_id.decode(): snapshot.vectors[slot] for chunk_id, slot in zip(snapshot.rows["id"], snapshot.rows["slot"], strict=True)}
    return shown.keys() == rows.keys() and all(
        np.allclose(row[2], expected[chunk_id], atol=1e-4) and np.allclose(shown[chunk_id], expected[chunk_id], atol=1e-4) for chunk_id, row in rows.items())


def texts(base: KnowledgeBase) -> dict[str, tuple]:
    return {chunk_id: row[:2] for chunk_id, row in contents(base).items()}


def strip(rows: dict[str, tuple]) -> dict[str, tuple]:
    "Without the time of writing, which another ingest changes."
    return {chunk_id: (text, {**row, "written": 0}) for chunk_id, (text, row) in rows.items()}


def answer(base: KnowledgeBase) -> list[tuple[str, float]]:
    return [(passage.chunk_id, passage.score) for passage in base.search("fee1 card2 loan3", 4)]


def names(base: KnowledgeBase, **options) -> set[str]:
    return {finding.name for finding in check_index(base, **options).findings}


def script(body: str) -> str:
    paths = [str(Path(__file__).parent), str(Path(module.__file__).parents[1])]
    return f"import sys; sys.path[:0] = {paths!r}\nfrom hash_embeddings import HashEmbeddings\nfrom llmops_ref.index_operations import *\nfrom llmops_ref.knowledge_base import KnowledgeBase\n{body}"


# --- blue and green -------------------------------------------------------------------------------------------


def test_reembed_switches_keeps_the_texts_and_rolls_back_without_the_model(base):
    before, blue = texts(base), answer(base)
    report = reembed(base, GREEN, progress=False)
    assert (report.embedded, report.chunks, report.documents) == (len(before), len(before), 6) and report.model == GREEN.model
    assert texts(base) == before and base.embedding_model == GREEN.model and base.embeddings is GREEN
    assert made_by(base, GREEN)
    green = answer(base)
    assert green != blue and not names(base)
    embedded = BLUE.embedded + GREEN.embedded
    assert rollback(base).model == BLUE.model and answer(base) == blue
    assert switch(base).model == GREEN.model and answer(base) == green
    assert BLUE.embedded + GREEN.embedded - embedded < 20, "probes only: no text was embedded again"
    with pytest.raises(SwitchError, match="reembed"):
        switch(base)
    discard(base)
    with pytest.raises(SwitchError):
        rollback(base)
    assert len(list(base.path.glob("generation-*"))) == 1 and answer(base) == green


def test_a_generation_can_wait_and_another_process_follows_the_switch(base):
    both = KnowledgeBase.open(base.path, BLUE, also=[GREEN])
    only_blue = KnowledgeBase.open(base.path, BLUE)
    blue = answer(both)
    report = reembed(base, GREEN, switch=False, progress=False)
    assert report.model == BLUE.model and report.notes and answer(both) == answer(base) == blue
    assert index_stats(base).beside == f"ready: generation {base._manifest.beside['generation']} by {GREEN.model}"
    switch(base)
    assert answer(both) == answer(base) != blue and both.embedding_model == GREEN.model
    for use in (lambda: only_blue.search("fee"), lambda: only_blue.ingest(base.path.parent / "docs"), lambda: KnowledgeBase.open(base.path, BLUE)):
        with pytest.raises(IndexMismatchError, match="also="):
            use()
    with pytest.raises(IndexMismatchError):
        rollback(KnowledgeBase.open(base.path, GREEN))
    assert rollback(KnowledgeBase.open(base.path, GREEN), BLUE).model == BLUE.model
    assert answer(only_blue) == answer(both) == blue


def test_a_waiting_generation_survives_a_settling_ingest_and_a_kept_one_does_not(base, folder, monkeypatch):
    monkeypatch.setattr(store_module, "_COMPACT_AFTER", 1)
    reembed(base, GREEN, switch=False, progress=False)
    write_docs(folder, 2, seed=5)
    base.ingest(folder, progress=False)
    assert base._manifest.beside["role"] == "ready"
    with pytest.raises(SwitchError, match="differ between the two generations: 2"):
        switch(base)
    again = reembed(base, GREEN, progress=False)
    assert 0 < again.embedded < again.chunks / 2 and not names(base), "only what has changed is embedded"
    assert made_by(base, GREEN)
    write_docs(folder, 2, seed=6)
    base.ingest(folder, progress=False)
    assert base._manifest.beside is None and not names(base)


def test_going_back_over_an_ingest_is_refused_unless_accepted(base, folder):
    reembed(base, GREEN, progress=False)
    (folder / "doc000.md").write_text("---\nallowed_groups: [board]\n---\nOnly the board may read this now.")
    (folder / "doc001.md").unlink()
    base.ingest(folder, progress=False)
    with pytest.raises(SwitchError, match="differ between the two generations: 2") as caught:
        rollback(base)
    assert "stale" in caught.value.remedy and base.embedding_model == GREEN.model
    assert "Ingest again" in rollback(base, stale=True).notes[0]
    assert names(base) == {"changed_file", "missing_file"}
    base.ingest(folder, progress=False)
    assert not names(base) and base.embedding_model == BLUE.model


class Flaky(HashEmbeddings):
    "Fails once, after a number of texts."

    def __init__(self, limit: int) -> None:
        super().__init__(64, salt="green")
        self.limit = limit

    def embed_documents(self, texts):
        if self.embedded + len(texts) > self.limit:
            self.limit = 10**9
            raise ConnectionError("the endpoint is gone")
        return super().embed_documents(texts)


def test_reembedding_goes_on_where_it_stopped_unless_the_model_is_another(base, folder, monkeypatch):
    monkeypatch.setattr(module, "_BATCH", 8)
    before, model = texts(base), Flaky(20)
    with pytest.raises(ConnectionError):
        reembed(base, model, progress=False)
    assert base.embedding_model == BLUE.model and texts(base) == before and not names(base)
    embedded = len((base.path / "green" / "ids").read_text().split())
    assert 8 <= embedded < len(before)
    with (base.path / "green" / "vectors").open("ab") as file:
        file.write(b"torn")
    with (base.path / "green" / "ids").open("a") as file:
        file.write("0123")
    assert reembed(base, model, progress=False).embedded == len(before) - embedded
    assert made_by(base, GREEN)
    with pytest.raises(ConnectionError):
        reembed(base, Flaky(20), progress=False)
    assert reembed(base, HashEmbeddings(32), progress=False).embedded == len(before), "another model's vectors are not taken"
    assert base._manifest.dimensions == 32 and not names(base)


def test_ingests_go_on_during_the_embedding_and_are_in_the_new_generation(base, folder, monkeypatch):
    monkeypatch.setattr(store_module, "_COMPACT_AFTER", 1)    # so that the generation is replaced under the reader

    class Interrupted(HashEmbeddings):
        rounds = 0

        def embed_documents(self, texts):
            if len(texts) > 1 and self.rounds < 3:
                self.rounds += 1
                (folder / f"late{self.rounds}.md").write_text(f"A letter that came late, number {self.rounds}.")
                (folder / "doc002.md").unlink(missing_ok=True)
                KnowledgeBase.open(base.path, BLUE, lock_timeout=5).ingest(folder, progress=False)
            return super().embed_documents(texts)

    monkeypatch.setattr(module, "_BATCH", 8)
    reembed(base, Interrupted(64, salt="green"), progress=False)
    sources = {row[1]["source"] for row in contents(base).values()}
    assert {"late1.md", "late2.md", "late3.md"} <= sources and "doc002.md" not in sources and not names(base)
    assert made_by(base, GREEN)


def test_what_a_killed_write_left_is_mended_once_and_does_not_cost_the_way_back(base):
    (base.path / "writing").touch()
    blue = answer(base)
    reembed(base, GREEN, progress=False)
    assert not (base.path / "writing").exists() and not names(base)
    rollback(base)
    assert answer(base) == blue and base.embedding_model == BLUE.model


def test_an_empty_index_and_a_busy_one(tmp_path, base):
    assert check_index(KnowledgeBase.open(tmp_path / "empty", BLUE)).ok and not (tmp_path / "empty" / "generation-000001").exists()
    with pytest.raises(EmptyIndexError):
        reembed(KnowledgeBase.open(tmp_path / "empty", BLUE), GREEN, progress=False)
    impatient = KnowledgeBase.open(base.path, BLUE, lock_timeout=0.1)
    with base._writing():
        for use in (lambda: check_index(impatient), lambda: reembed(impatient, GREEN, progress=False), lambda: export_index(impatient, tmp_path / "x")):
            with pytest.raises(IndexLockedError, match=r"(?i)another process"):
                use()
    assert reembed(base, GREEN, progress=False).embedded == 0, "the vectors of the attempt that had to wait are kept"


def test_eight_threads_search_through_switches_without_a_failed_or_mixed_answer(base):
    reembed(base, GREEN, progress=False)
    green = answer(base)
    rollback(base)
    blue = answer(base)
    assert set(blue).isdisjoint(green), "a mixed answer could not be told"
    readers = [base, KnowledgeBase.open(base.path, BLUE, also=[GREEN]), KnowledgeBase.open(base.path, GREEN, also=[BLUE])]
    stop, failures, seen = threading.Event(), [], []

    def search(reader):
        while not stop.is_set():
            try:
                seen.append(answer(reader))
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=search, args=(readers[number % 3],)) for number in range(8)]
    for thread in threads:
        thread.start()
    writer = KnowledgeBase.open(base.path, BLUE, also=[GREEN])
    for turn in range(8):
        switch(writer) if turn % 2 == 0 else rollback(writer)
        time.sleep(0.02)
    for model in (GREEN, BLUE):    # whole generations come and go as well
        reembed(writer, model, progress=False)
        discard(writer)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    assert all(found in (blue, green) for found in seen)
    assert sum(found == blue for found in seen) > 20 and sum(found == green for found in seen) > 20


# --- counting ---------------------------------------------------------------------------------------------------


def test_stats_count_documents_labels_formats_twins_and_bytes(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.md").write_text("The fee is £5.")
    (folder / "b.txt").write_text("The fee is £5.")
    (folder / "c.md").write_text("---\nallowed_groups: [staff, board]\n---\nThe secret fee is £1.")
    base = KnowledgeBase.open(tmp_path / "index", BLUE)
    empty = index_stats(base)
    assert (empty.documents, empty.chunks, empty.characters, empty.chunks_by_access) == (0, 0, 0, {})
    base.ingest(folder, progress=False)
    stats = index_stats(base)
    assert (stats.documents, stats.chunks, stats.duplicate_chunks, stats.dimensions, stats.generation) == (3, 3, 1, 64, 1)
    assert stats.chunks_by_format == {".md": 2, ".txt": 1} and stats.chunks_by_access == {"board": 1, "everyone": 2, "staff": 1}
    assert stats.characters == sum(len(row[0]) for row in contents(base).values()) and 0 <= stats.age_seconds < 600
    parts = dict(stats.bytes_by_part)
    assert min(parts[name] for name in ("database", "texts", "vectors", "lexical")) > 0 == parts["re-embedding"]
    assert sum(parts.values()) - 2 * parts["total"] <= 0 and stats.changed.startswith("20")
    assert parts["total"] == sum(path.stat().st_size for path in base.path.rglob("*") if path.is_file())
    assert parts["other generations"] == 0
    reembed(base, GREEN, progress=False)
    again = index_stats(base)
    assert again.bytes_by_part["other generations"] > 0 and again.beside.startswith("previous") and again.model == GREEN.model
    assert json.loads(json.dumps(again.to_dict()))["chunks"] == 3 and "| chunks | 3 |" in again._repr_markdown_()


# --- checking and mending ------------------------------------------------------------------------------------------


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 0xFF
    path.write_bytes(data)


def vectors_file(base: KnowledgeBase) -> Path:
    return next(base._folder(base._manifest.generation).glob("*/data_level0.bin"))


def delete_chunk(base: KnowledgeBase) -> None:
    store = base._ask(lambda store: store)
    store.delete([next(chunk_id for chunk_id, row in store.metadata({"source": "doc003.md"}).items() if row["index"] == 1)])


def double_document(base: KnowledgeBase) -> None:
    store = base._ask(lambda store: store)
    old = store.metadata({"source": "doc004.md"})
    store.add([chunk_id[::-1] for chunk_id in old], np.asarray(BLUE.embed_documents([module._indexed("old", row) for row in old.values()])), ["old"] * len(old),
              [{**row, "fingerprint": "older", "written": 1} for row in old.values()])


def lose_the_words(base: KnowledgeBase) -> None:
    for path in base._folder(base._manifest.generation).glob("rows/lexical-*"):
        shutil.rmtree(path)


def replace_vectors(base: KnowledgeBase) -> None:
    "As a script would that overwrites in place with another model."
    store = base._ask(lambda store: store)
    for rows in store.collections().values():
        page = rows.get(include=["documents"])
        rows.update(ids=page["ids"], embeddings=GREEN.embed_documents(page["documents"]))


def add_row_of_a_stranger(base: KnowledgeBase) -> None:
    base._ask(lambda store: store.add(["0" * 32], np.asarray([BLUE.embed_query("stray")]), ["stray"], [{"readers": '["everyone"]', "note": "not ours"}]))


DAMAGE = {
    "unfinished_write": (lambda base: (base.path / "writing").touch(), False),
    "damaged_files": (lambda base: flip(vectors_file(base), 500), False),
    "incomplete_document": (delete_chunk, True),
    "doubled_document": (double_document, False),
    "orphan_row": (add_row_of_a_stranger, False),
    "damaged_snapshot": (lambda base: flip(base._folder(base._manifest.generation) / "rows" / "texts.bin", 300), False),
    "damaged_lexical": (lose_the_words, False),
    "wrong_model": (replace_vectors, False),
    "leftover_generation": (lambda base: shutil.copytree(base._folder(base._manifest.generation), base._folder(99)), False),
    "damaged_beside": (lambda base: shutil.rmtree(base._folder(base._manifest.beside["generation"])), False),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_by_name_and_mended(tmp_path, base, folder, name):
    damage, needs_files = DAMAGE[name]
    reembed(base, GREEN, progress=False)
    reembed(base, BLUE, progress=False)    # a generation whose vectors lie in files, and one beside it
    before = texts(base)
    damage(base)
    fresh = KnowledgeBase.open(base.path, BLUE)
    report = check_index(fresh)
    found = {finding.name for finding in report.findings}
    assert found - {"stale_snapshot"} == {name} and ("stale_snapshot" in found) == needs_files, "readers still see the lost chunk"
    assert name in report._repr_markdown_() and json.loads(json.dumps(report.to_dict()))["findings"][0]["name"] == name
    mended = repair_index(fresh)
    assert any(name in note for note in mended.notes)
    assert not names(fresh, files=False)
    if needs_files:
        assert "doc003.md" in mended.notes[-1] and len(texts(fresh)) < len(before)
        fresh.ingest(folder, progress=False)
    assert strip(texts(fresh)) == strip(before) and check_index(fresh).ok
    for chunk_id, (text, _) in before.items():
        assert fresh.search(text[:500], 1)[0].text == text, chunk_id
    assert repair_index(fresh).notes == (), "nothing is left to mend, and nothing is written"


def test_a_check_changes_nothing_and_notices_files(base, folder):
    reembed(base, BLUE, progress=False)    # so that the vectors lie in files
    (folder / "doc000.md").write_text("Something else.")
    (folder / "doc001.md").unlink()
    (base.path / "writing").touch()
    before = {path: path.stat().st_mtime_ns for path in [base.path / "index.json", *base._folder(base._manifest.generation).rglob("*")] if path.suffix in (".json", ".bin", ".pickle")}
    report = check_index(base)
    assert {finding.name: finding.example for finding in report.findings} == {"unfinished_write": "writing", "changed_file": "doc000.md", "missing_file": "doc001.md"}
    assert before == {path: path.stat().st_mtime_ns for path in before} and (base.path / "writing").exists()
    assert {finding.remedy for finding in report.findings} == {"repair", "ingest"} and report.searched == report.chunks
    base.ingest(folder, progress=False)
    assert check_index(base).ok


def test_broken_vectors_in_the_log_are_found_and_embedded_again(base):
    database = next(base._folder(base._manifest.generation).glob("*.sqlite3"))
    with sqlite3.connect(database) as connection:
        connection.execute("update embeddings_queue set vector = zeroblob(length(vector)) where seq_id in (select seq_id from embeddings_queue limit 3)")
    connection.close()
    fresh = KnowledgeBase.open(base.path, BLUE)
    assert names(fresh) and names(fresh) <= {"broken_vector", "unreachable_row", "wrong_model"}
    repair_index(fresh)
    assert check_index(fresh).ok
    assert made_by(fresh, BLUE)


def test_a_lost_database_is_replaced_by_an_earlier_generation_or_named_as_lost(base, folder):
    before = texts(base)
    reembed(base, GREEN, progress=False)
    for path in base._folder(base._manifest.generation).glob("*.sqlite3"):
        path.write_bytes(b"not a database" * 1000)
    fresh = KnowledgeBase.open(base.path, GREEN, also=[BLUE])
    assert "damaged_database" in names(fresh)
    assert any("took its place" in note for note in repair_index(fresh).notes)
    assert texts(fresh) == before and fresh.embedding_model == BLUE.model and check_index(fresh).ok
    discard(fresh)
    for path in fresh.path.rglob("*.sqlite3"):
        path.write_bytes(b"not a database" * 1000)
    with pytest.raises(IndexDamagedError, match="ingest the documents again"):
        repair_index(KnowledgeBase.open(base.path, BLUE))


# --- erasing --------------------------------------------------------------------------------------------------------


def files_with(folder: Path, *needles: str) -> set[str]:
    found = set()
    for path in folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            if any(form in data for needle in needles for form in (needle.encode(), needle.encode("utf-16-le"), json.dumps(needle).strip('"').encode())):
                found.add(path.name)
    return found


def test_after_a_deletion_no_byte_of_the_text_is_left(base, folder, monkeypatch):
    monkeypatch.setattr(store_module, "_COMPACT_AFTER", 10)
    secret = folder / "zoë leaver.md"
    secret.write_text("---\ntitle: Qwertyuiop file\n---\n# Zyzzyva section\n\n" + "Xylophonist Ångström lives at Quartzway 4711. " * 80)
    needles = ("Xylophonist", "Quartzway", "Ångström", "Zyzzyva", "Qwertyuiop", "zoë leaver")
    base.ingest(folder, progress=False)
    reembed(base, GREEN, progress=False)
    (folder / "doc000.md").write_text("A new version.")
    base.ingest(folder, progress=False)
    assert files_with(base.path, *needles) >= {"chroma.sqlite3", "texts.bin", "table.npz"}
    others = {row[1]["source"] for row in contents(base).values()} - {"zoë leaver.md"}
    with pytest.raises(BadInputError, match="nothing was deleted"):
        delete_documents(base, ["zoë leaver.md", "no such.md"])
    assert "zoë leaver.md" in {row[1]["source"] for row in contents(base).values()}
    report = delete_documents(base, ["zoë leaver.md"])
    assert report.documents == 1 and "still on the disk" in report.notes[0]
    left = files_with(base.path, *needles) - {"data_level0.bin"}    # Chroma fills its unused end with what memory held
    assert not left, "free pages, logs and earlier generations included"
    assert {row[1]["source"] for row in contents(base).values()} == others and len(list(base.path.glob("generation-*"))) == 1
    secret.unlink()
    assert check_index(base).ok
    with pytest.raises(SwitchError):
        rollback(base)
    delete_documents(base, [str(path.resolve()) for path in folder.iterdir()])
    assert len(base) == 0 and not files_with(base.path, "Document 1")
    with pytest.raises(BadInputError, match="not a document"):
        delete_documents(base, [])


def test_readers_go_on_while_documents_are_erased(base, folder):
    expected = {f"doc{number:03d}.md" for number in range(6)}
    failures, stop = [], threading.Event()
    reader = KnowledgeBase.open(base.path, BLUE)

    def search():
        while not stop.is_set():
            try:
                assert reader.search("fee1 card2", 4)
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=search) for _ in range(4)]
    for thread in threads:
        thread.start()
    for name in sorted(expected)[:4]:
        delete_documents(base, name)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    assert {passage.source for passage in reader.search("fee1 card2", 50)} == {"doc004.md", "doc005.md"}


# --- moving --------------------------------------------------------------------------------------------------------


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_is_exported_is_what_is_imported(tmp_path_factory, data):
    place = tmp_path_factory.mktemp("moved")
    (place / "docs").mkdir()
    words = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=12)
    for number in range(data.draw(st.integers(1, 4))):
        groups = data.draw(st.lists(st.sampled_from(["staff", "board", "日本"]), max_size=2, unique=True))
        head = json.dumps({"title": data.draw(words), "allowed_groups": groups, "year": number, "rate": number / 7, "live": number % 2 == 0}, ensure_ascii=False)
        (place / "docs" / f"d{number}.md").write_text(f"---\n{head}\n---\n# H\n\n" + " ".join(data.draw(st.lists(words, min_size=1, max_size=40))) + " word", encoding="utf-8")
    base = KnowledgeBase.open(place / "index", BLUE)
    base.ingest(place / "docs", progress=False)
    assert len(base)
    export_index(base, place / "x.parquet")
    copy = KnowledgeBase.open(place / "copy", HashEmbeddings(64))
    report = import_index(copy, place / "x.parquet")
    assert contents(copy) == contents(base) and report.chunks == len(base) and check_index(copy).ok
    for groups in (None, ["staff"], ["board", "日本"], ALL_GROUPS):
        found = [{passage.chunk_id: replace(passage, scores={}) for passage in opened.search("word", 99, groups=groups)} for opened in (copy, base)]
        assert found[0] == found[1]    # the order of equals may differ
    assert copy.ingest(place / "docs", progress=False).unchanged == report.documents, "documents are known by their content"


def test_the_file_is_one_private_table_in_groups_that_others_can_read(base, tmp_path, monkeypatch):
    import pyarrow.parquet as parquet

    monkeypatch.setattr(module, "_PAGE", 10)
    path = tmp_path / "out" / "x.parquet"
    report = export_index(base, path)
    file = parquet.ParquetFile(path)
    assert file.num_row_groups == -(-report.chunks // 10) > 1 and path.stat().st_mode & 0o777 == 0o600
    assert file.schema_arrow.names == ["id", "text", "context", "source", "page", "section", "metadata", "allowed_groups", "vector"]
    assert str(file.schema_arrow.field("vector").type) == "fixed_size_list<element: float>[64]" and [item.name for item in path.parent.iterdir()] == ["x.parquet"]
    about = json.loads(file.metadata.metadata[b"llmops_ref"])
    assert about["model"] == BLUE.model and about["chunks"] == report.chunks and len(about["sha256"]) == 64
    other = KnowledgeBase.open(tmp_path / "other", BLUE)
    other.ingest(write_docs(tmp_path / "more", 2, seed=9), progress=False)
    with pytest.raises(BadInputError, match="not empty"):
        import_index(other, path)
    import_index(other, path, replace_all=True)
    assert contents(other) == contents(base) and not names(other)


def test_a_file_that_is_damaged_or_forged_changes_nothing(base, tmp_path):
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    path, bad = tmp_path / "x.parquet", tmp_path / "bad.parquet"
    export_index(base, path)
    target = KnowledgeBase.open(tmp_path / "target", BLUE)
    target.ingest(write_docs(tmp_path / "more", 1, seed=9), progress=False)
    before, data, dice = contents(target), path.read_bytes(), random.Random(3)

    def refused():
        with pytest.raises(IndexFileError):
            import_index(target, bad, replace_all=True)
        assert contents(target) == before and not names(target)

    for _ in range(6):
        bad.write_bytes(data)
        flip(bad, dice.randrange(len(data) * 3 // 4))    # in the values
        refused()
    for content in (b"", b"PAR1", data[:len(data) // 2], b"\x80\x04\x95not a pickle."):
        bad.write_bytes(content)
        refused()
    bad.unlink()
    refused()
    table = parquet.read_table(path)
    about = json.loads(parquet.read_metadata(path).metadata[b"llmops_ref"])

    def forge(table, **changes):
        parquet.write_table(table.replace_schema_metadata({"llmops_ref": json.dumps({**about, **changes})}), bad)
        refused()

    forge(table.slice(1), chunks=table.num_rows - 1)
    forge(table.drop_columns(["section"]))
    forge(arrow.concat_tables([table, table]), chunks=2 * table.num_rows)
    forge(table, format=99)
    forge(table, probe="none")
    forge(table.set_column(0, table.schema.field("id"), arrow.array(["../../etc"] * table.num_rows)))
    forge(table.set_column(1, table.schema.field("text"), arrow.array(["other words"] * table.num_rows)))
    with pytest.raises(IndexMismatchError):
        import_index(KnowledgeBase.open(tmp_path / "green", GREEN), path)
    import_index(target, path, replace_all=True)
    assert contents(target) == contents(base)


# --- dying ----------------------------------------------------------------------------------------------------------

OPERATE = """
import random, time
from pathlib import Path
index, folder, exported, seed = sys.argv[1:]
class Slow(HashEmbeddings):
    def embed_documents(self, texts):
        time.sleep(len(texts) / 1000)
        return super().embed_documents(texts)
blue, green = Slow(64), Slow(64, salt="green")
base = KnowledgeBase.open(index, blue, also=[green])
dice = random.Random(int(seed))
def erase():
    delete_documents(base, "doc000.md")
    base.ingest(folder, progress=False)
def mend():
    (base.path / "writing").touch()
    repair_index(base)
def move():
    if base.embedding_model == blue.model:
        import_index(base, exported, replace_all=True)
def there_and_back():
    reembed(base, green if base.embedding_model == blue.model else blue, progress=False)
    rollback(base)
    switch(base)
repair_index(base)
print("open", flush=True)
while True:
    dice.choice([erase, mend, move, there_and_back])()
    print(end=".", flush=True)
"""


def test_kill_nine_at_random_moments_loses_nothing(tmp_path):
    folder, index, exported = write_docs(tmp_path / "docs", 10), tmp_path / "index", tmp_path / "x.parquet"
    base = KnowledgeBase.open(index, BLUE, also=[GREEN])
    base.ingest(folder, progress=False)
    export_index(base, exported)
    before, dice = texts(base), random.Random(11)
    for attempt in range(4):
        arguments = [sys.executable, "-c", script(OPERATE), str(index), str(folder), str(exported), str(attempt)]
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout.readline().strip() == "open", process.stderr.read()
        began, operations = time.monotonic(), dice.randrange(1, 4)
        assert process.stdout.read(operations) == "." * operations, process.stderr.read()
        time.sleep(dice.uniform(0, 1.5 * (time.monotonic() - began) / operations))    # somewhere in the next one or two
        process.send_signal(signal.SIGKILL)
        error = process.communicate()[1]
        assert process.returncode == -signal.SIGKILL, error
        survivor = KnowledgeBase.open(index, BLUE, also=[GREEN])
        assert len(survivor.search("fee1 card2", 5)) == 5
        found = names(survivor)
        assert found <= {"unfinished_write", "leftover_generation", "doubled_document"}, found
        repair_index(survivor)
        assert check_index(survivor).ok
        missing = strip(before).keys() - strip(texts(survivor)).keys()
        assert {before[chunk_id][1]["source"] for chunk_id in missing} <= {"doc000.md"}, "only what was being erased"
    survivor.ingest(folder, progress=False)
    assert strip(texts(survivor)) == strip(before) and check_index(survivor).ok
