"""Beyond one machine: the index on a real Chroma server, and Ray Data reading for the one writer."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import pickle
import random
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from hash_embeddings import HashEmbeddings

from llmops_ref import knowledge_base as module
from llmops_ref import scaling
from llmops_ref.cli import main
from llmops_ref.core import BadInputError, LlmopsRefError
from llmops_ref.documents import read_document, split_document
from llmops_ref.knowledge_base import EmptyIndexError, IndexDamagedError, IndexFormatError, KnowledgeBase
from llmops_ref.scaling import (
    ChromaServer,
    LocalServer,
    RayIngestError,
    ServerError,
    ServerRefusedError,
    ServerUnreachableError,
    ServerVersionError,
    ingest_with_ray,
    ray_session,
)

pytest.importorskip("chromadb")

# What a chunk is, without when it was written.
Row = tuple[str, str, tuple[tuple[str, str], ...]]


@pytest.fixture(scope="module")
def local_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    server = LocalServer(tmp_path_factory.mktemp("server") / "data")
    server.start()
    yield server
    server.stop()


@pytest.fixture(params=["folder", "server"])
def place(request: pytest.FixtureRequest) -> ChromaServer | None:
    "Where the vectors of an index lie: in its folder, or on a server."
    return request.getfixturevalue("local_server").server if request.param == "server" else None


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.md").write_text("# Alpha\n\nThe alpha fee is £5.")
    (folder / "b.txt").write_text("The beta fee is £7.")
    (folder / "sub" / "a.md").write_text("# Other alpha\n\nThe nested fee is £9.")
    return folder


def write_docs(folder: Path, count: int, words: int = 400, seed: int = 0) -> Path:
    "Documents of a few chunks each, all different."
    folder.mkdir(parents=True, exist_ok=True)
    dice = random.Random(seed)
    for number in range(count):
        lines = (" ".join(dice.choice("fee card rate loan bank note term cash date risk") + str(dice.randrange(999)) for _ in range(12)) + "." for _ in range(words // 12))
        (folder / f"doc{number:03d}.md").write_text(f"# Document {number}\n\n" + "\n".join(lines))
    return folder


def rows(base: KnowledgeBase) -> dict[str, dict[str, object]]:
    "Chunk id to metadata, without the time of writing."
    found = base._ask(lambda store: store.metadata())
    return {chunk_id: {name: value for name, value in row.items() if name != "written"} for chunk_id, row in found.items()}


def check_index(base: KnowledgeBase, folder: Path) -> None:
    "Every document once, every chunk there, and found by a search for its own text."
    want = {(os.path.realpath(path), number): chunk.text for path in folder.rglob("*") if path.is_file() for number, chunk in enumerate(split_document(read_document(path)))}
    found = rows(base)
    assert sorted((str(row["path"]), int(str(row["index"]))) for row in found.values()) == sorted(want)
    assert len(base) == len(want)
    for text in random.Random(0).sample(sorted(want.values()), min(10, len(want))):
        assert text in [passage.text for passage in base.search(text[:2000], 8)]


# --- the same class, the rows elsewhere -------------------------------------------------------------------------


def test_add_update_delete_and_leave_alone(place: ChromaServer | None, tmp_path: Path, docs: Path) -> None:
    model = HashEmbeddings()
    base = KnowledgeBase.open(tmp_path / "index", model, server=place)
    with pytest.raises(EmptyIndexError):
        base.search("anything")
    report = base.ingest(docs, progress=False)
    assert (report.added, report.updated, report.deleted, report.failed, report.chunks) == (3, 0, 0, [], 3)
    embedded = model.embedded
    again = base.ingest(docs, progress=False)
    assert (again.added, again.unchanged) == (0, 3) and model.embedded == embedded
    (docs / "a.md").write_text("# Alpha\n\nThe alpha fee is £6 now.")
    (docs / "b.txt").unlink()
    changed = base.ingest(docs, progress=False)
    assert (changed.added, changed.updated, changed.unchanged, changed.deleted) == (0, 1, 1, 1)
    assert "£6 now" in base.search("alpha fee", 1)[0].text
    check_index(KnowledgeBase.open(tmp_path / "index", HashEmbeddings(), server=place), docs)
    assert bool(list((tmp_path / "index").rglob("chroma.sqlite3"))) == (place is None), "the rows lie where they should"


def ask_the_graph(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    "Documents of so many chunks that a search asks the server's graph, and does not compare all vectors itself."
    monkeypatch.setattr(module, "_EXACT", 140)
    return write_docs(tmp_path / "docs", 20, words=1000)


def test_a_server_gives_the_same_results_as_a_folder(local_server: LocalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ask_the_graph(monkeypatch, tmp_path)
    bases = [KnowledgeBase.open(tmp_path / name, HashEmbeddings(), server=server) for name, server in (("here", None), ("there", local_server.server))]
    for base in bases:
        base.ingest(folder, progress=False)
    here, there = map(rows, bases)
    assert here == there
    for question in ("card fee", "loan rate risk", "Document 7", "cash12 note"):
        one, other = (base.search(question, 6) for base in bases)
        assert [passage.chunk_id for passage in one] == [passage.chunk_id for passage in other]
        assert np.allclose([passage.score for passage in one], [passage.score for passage in other], atol=1e-4)
        assert [replace(passage, score=0.0, scores={}) for passage in one] == [replace(passage, score=0.0, scores={}) for passage in other]


def test_settling_leaves_two_generations_and_no_other_collection(place: ChromaServer | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_COMPACT_AFTER", 5)
    folder = write_docs(tmp_path / "docs", 5)
    base = KnowledgeBase.open(tmp_path / "index", HashEmbeddings(), server=place)
    reader = KnowledgeBase.open(tmp_path / "index", HashEmbeddings(), server=place)
    for number in range(3):
        (folder / "doc000.md").write_text(f"Version {number} of the document. " * 100)
        base.ingest(folder, progress=False)
        assert f"Version {number}" in reader.search(f"Version {number} of the document", 1)[0].text, "another client sees the new generation"
        check_index(base, folder)
    kept = sorted(path.name for path in (tmp_path / "index").glob("generation-*"))
    assert len(kept) == 2 and kept[-1] > "generation-000002"
    if place:
        remote = base._remote
        assert remote is not None
        assert [f"generation-{number:06d}" for number in range(1, 6) if remote.client(f"generation-{number:06d}").list_collections()] == kept


def test_an_interrupted_write_is_repaired(place: ChromaServer | None, tmp_path: Path) -> None:
    folder = write_docs(tmp_path / "docs", 4)
    base = KnowledgeBase.open(tmp_path / "index", HashEmbeddings(), server=place)
    base.ingest(folder, progress=False)
    before = rows(base)
    store = base._store
    assert store is not None
    half, row = "f" * 32, next(iter(base._ask(lambda held: held.metadata()).values()))
    store.add([half], np.ones((1, 128), np.float32), ["half a document"], [{**row, "fingerprint": "new", "chunks": 2, "written": time.time_ns()}])
    (tmp_path / "index" / "writing").touch()
    again = KnowledgeBase.open(tmp_path / "index", HashEmbeddings(), server=place)
    assert again.ingest(folder, progress=False).unchanged == 4
    assert rows(again) == before and not (tmp_path / "index" / "writing").exists()
    check_index(again, folder)


def test_two_indexes_share_a_server_and_do_not_see_each_other(local_server: LocalServer, tmp_path: Path, docs: Path) -> None:
    bases = [KnowledgeBase.open(tmp_path / name / "index", HashEmbeddings(), server=local_server.server) for name in ("one", "two")]
    bases[0].ingest(docs, progress=False)
    with pytest.raises(EmptyIndexError):
        bases[1].search("fee")
    bases[1].ingest(docs / "b.txt", progress=False)
    assert [len(base) for base in bases] == [3, 1]


def test_an_index_is_not_opened_in_the_wrong_place(local_server: LocalServer, tmp_path: Path, docs: Path) -> None:
    KnowledgeBase.open(tmp_path / "here", HashEmbeddings()).ingest(docs, progress=False)
    KnowledgeBase.open(tmp_path / "there", HashEmbeddings(), server=local_server.server).ingest(docs, progress=False)
    with pytest.raises(IndexFormatError, match="in its folder"):
        KnowledgeBase.open(tmp_path / "here", HashEmbeddings(), server=local_server.server)
    with pytest.raises(IndexFormatError, match="server=") as caught:
        KnowledgeBase.open(tmp_path / "there", HashEmbeddings())
    assert "127.0.0.1" not in str(caught.value)
    with LocalServer(tmp_path / "another server") as other:
        stranger = KnowledgeBase.open(tmp_path / "there", HashEmbeddings(), server=other)
        for action in (lambda: stranger.search("fee"), lambda: stranger.ingest(docs, progress=False)):
            with pytest.raises(IndexDamagedError, match="does not hold the vectors of this index"):
                action()
    assert len(KnowledgeBase.open(tmp_path / "there", HashEmbeddings(), server=local_server.server)) == 3


def test_the_manifest_is_enough_for_a_reader_on_another_machine(local_server: LocalServer, tmp_path: Path, docs: Path) -> None:
    base = KnowledgeBase.open(tmp_path / "index", HashEmbeddings(), server=local_server.server)
    base.ingest(docs, progress=False)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "index.json").write_bytes((tmp_path / "index" / "index.json").read_bytes())
    reader = KnowledgeBase.open(tmp_path / "elsewhere", HashEmbeddings(), server=local_server.server)
    assert reader.search("alpha fee", 3) == base.search("alpha fee", 3)


def test_ten_threads_ask_while_one_ingests(local_server: LocalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_COMPACT_AFTER", 20)
    folder = ask_the_graph(monkeypatch, tmp_path)
    base = KnowledgeBase.open(tmp_path / "index", HashEmbeddings(), server=local_server.server)
    base.ingest(folder, progress=False)
    stop, errors = threading.Event(), []

    def ask() -> None:
        while not stop.is_set():
            try:
                assert len(base.search("card fee", 4)) == 4
            except Exception as error:
                errors.append(error)
                return

    threads = [threading.Thread(target=ask) for _ in range(10)]
    for thread in threads:
        thread.start()
    for number in range(3):
        write_docs(folder, 3, words=1000, seed=number + 1)
        base.ingest(folder, progress=False)
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]
    check_index(base, folder)


# --- the server goes, and comes back ---------------------------------------------------------------------------


@pytest.mark.parametrize("settle_after", [3, 10_000], ids=["from files", "from the log"])
def test_a_killed_server_that_is_started_again_has_lost_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settle_after: int) -> None:
    monkeypatch.setattr(module, "_COMPACT_AFTER", settle_after)
    folder, server = ask_the_graph(monkeypatch, tmp_path), LocalServer(tmp_path / "server")
    try:
        address = replace(server.start(), patience=0.3)
        base = KnowledgeBase.open(tmp_path / "index", HashEmbeddings(), server=address)
        base.ingest(folder, progress=False)
        before, found = rows(base), [passage.chunk_id for passage in base.search("card fee", 5)]
        server.kill()
        with pytest.raises(ServerUnreachableError, match="does not answer"):
            base.search("card fee", 5)
        with pytest.raises(ServerUnreachableError):
            KnowledgeBase.open(tmp_path / "index", HashEmbeddings(), server=address)
        server.start()
        assert rows(base) == before and [passage.chunk_id for passage in base.search("card fee", 5)] == found
        assert base.ingest(folder, progress=False).unchanged == 20
        check_index(base, folder)
    finally:
        server.kill()


def test_a_server_killed_during_an_ingest_costs_a_second_ingest_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GROUP", 8)
    monkeypatch.setattr(module, "_COMPACT_AFTER", 30)
    folder, server = write_docs(tmp_path / "docs", 16, words=800), LocalServer(tmp_path / "server")
    try:
        base = KnowledgeBase.open(tmp_path / "index", HashEmbeddings(), server=replace(server.start(), patience=0.2))
        base.ingest(folder, progress=False)
        write_docs(folder, 16, words=800, seed=1)

        class Killing(HashEmbeddings):
            def embed_documents(self, texts: list[str]) -> list[list[float]]:
                if len(texts) > 1 and self.embedded > 40:
                    server.kill()
                return super().embed_documents(texts)

        killing = KnowledgeBase.open(tmp_path / "index", Killing(), server=replace(server.server, patience=0.2))
        with pytest.raises(ServerUnreachableError):
            killing.ingest(folder, progress=False)
        assert (tmp_path / "index" / "writing").exists()
        server.start()
        assert len(base.search("card fee", 5)) == 5, "what was there can be searched"
        report = base.ingest(folder, progress=False)
        assert report.updated + report.unchanged == 16 and report.updated and not (tmp_path / "index" / "writing").exists()
        check_index(base, folder)
    finally:
        server.kill()


def test_a_short_absence_is_waited_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ask_the_graph(monkeypatch, tmp_path)
    server = LocalServer(tmp_path / "server")
    try:
        base = KnowledgeBase.open(tmp_path / "index", HashEmbeddings(), server=replace(server.start(), patience=60))
        base.ingest(folder, progress=False)
        server.kill()
        back = threading.Timer(0.3, server.start)
        back.start()
        assert len(base.search("card fee", 5)) == 5
        back.join()
    finally:
        server.kill()


def test_a_server_that_cannot_start_says_so(tmp_path: Path, local_server: LocalServer) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ServerUnreachableError, match="did not start"):
        LocalServer(tmp_path / "file").start()


# --- what answers is not what we expect ------------------------------------------------------------------------


class Proxy(http.server.BaseHTTPRequestHandler):
    "Forwards to a Chroma server what carries the right token, after as many refusals as it was told."

    target, token, busy = "", "", 0
    protocol_version = "HTTP/1.1"

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind = type(self)
        if self.headers.get("Authorization") != f"Bearer {kind.token}":
            return self.reply(401, b'{"error": "who are you?"}')
        if kind.busy:
            kind.busy -= 1
            return self.reply(503, b"come back later")
        answer = httpx.request(self.command, kind.target + self.path, content=body, headers={"Content-Type": "application/json"}, timeout=30)
        return self.reply(answer.status_code, answer.content)

    do_GET = do_POST = do_PUT = do_DELETE = forward

    def reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def listening(handler: type[http.server.BaseHTTPRequestHandler], tls: ssl.SSLContext | None = None) -> Iterator[str]:
    "A small HTTP server on loopback; yields its address."
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http{'s' if tls else ''}://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def proxy(target: str, busy: int = 0) -> type[Proxy]:
    return type("ProxyHere", (Proxy,), {"target": target, "token": "s3cret-token", "busy": busy})


def test_headers_are_sent_and_secrets_stay_out_of_messages(local_server: LocalServer, tmp_path: Path, docs: Path) -> None:
    with listening(proxy(local_server.server.url, busy=2)) as url:
        right = ChromaServer(url, headers={"Authorization": "Bearer s3cret-token"})
        base = KnowledgeBase.open(tmp_path / "index", HashEmbeddings(), server=right)
        assert base.ingest(docs, progress=False).added == 3 and base.search("alpha fee", 1)
        for headers in ({}, {"Authorization": "Bearer wr0ng-token"}):
            with pytest.raises(ServerRefusedError, match="credentials") as caught:
                KnowledgeBase.open(tmp_path / "index", HashEmbeddings(), server=ChromaServer(url, headers))
            assert "token" not in str(caught.value)
        assert "token" not in repr(right)
        (docs / "a.md").write_text("A new version.")
        base._remote.connect()._server._session.headers["Authorization"] = "expired"
        with pytest.raises(ServerRefusedError):
            base.ingest(docs, progress=False)


def test_a_server_that_stays_busy_is_given_up_in_time(local_server: LocalServer) -> None:
    with listening(proxy(local_server.server.url, busy=10_000)) as url, pytest.raises(ServerUnreachableError, match="503"):
        ChromaServer(url, {"Authorization": "Bearer s3cret-token"}, patience=0.2).check()


def test_tls_with_a_certificate_of_our_own(local_server: LocalServer, tmp_path: Path, docs: Path) -> None:
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem"], capture_output=True, check=False) if _has("openssl") else None
    if made is None or made.returncode:
        pytest.skip("openssl is not here")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with listening(proxy(local_server.server.url), tls) as url:
        trusting = ChromaServer(url, {"Authorization": "Bearer s3cret-token"}, verify=str(tmp_path / "cert.pem"))
        base = KnowledgeBase.open(tmp_path / "index", HashEmbeddings(), server=trusting)
        assert base.ingest(docs, progress=False).added == 3 and base.search("alpha fee", 1)
        with pytest.raises(ServerUnreachableError, match="certificate"):
            replace(trusting, verify=True).check()
        assert replace(trusting, verify=False).check()


def _has(program: str) -> bool:
    import shutil

    return shutil.which(program) is not None


def answering(status: int, body: bytes) -> type[http.server.BaseHTTPRequestHandler]:
    class Fixed(Proxy):
        def forward(self) -> None:
            self.reply(status, body)

        do_GET = forward

    return Fixed


@pytest.mark.parametrize(("status", "body"), [(404, b"not found"), (410, b'{"error":"v1 only"}'), (200, b'"0.5.23"'), (200, b"<html>hello</html>"), (500, b"oops")])
def test_something_else_at_the_address_is_named(status: int, body: bytes, tmp_path: Path) -> None:
    with listening(answering(status, body)) as url, pytest.raises(ServerVersionError, match="no Chroma server of version 1"):
        KnowledgeBase.open(tmp_path / "index", HashEmbeddings(), server=ChromaServer(url))


def test_a_server_that_hangs_is_given_up_in_time() -> None:
    release = threading.Event()

    class Hanging(Proxy):
        def do_GET(self) -> None:
            release.wait(30)
            self.close_connection = True

    with listening(Hanging) as url:
        with pytest.raises(ServerUnreachableError):
            ChromaServer(url, timeout=0.2, patience=0.1).check()
        release.set()


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://user:s3cret@host:8000", ""])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(BadInputError) as caught:
        ChromaServer(url)
    assert "s3cret" not in str(caught.value)


# --- Ray ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray() -> Iterator[object]:
    "One Ray for all its tests: its start costs more than they do. The GPU is one in name only, to place actors on."
    pytest.importorskip("ray")
    with ray_session(workers=2, gpus=1, object_store=100 * 1024**2) as started:
        yield started


class Broken(HashEmbeddings):
    "Fails in a worker, in a way of its own."

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        if len(texts) > 1:
            raise ConnectionError("the endpoint is gone")
        return super().embed_documents(texts)


class Dying(HashEmbeddings):
    "Takes its process with it, as the kernel does when memory is short: at the first piece, or at each."

    def __init__(self, flag: str) -> None:
        super().__init__()
        self.flag = flag

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        if len(texts) > 1 and not (self.flag and os.path.exists(self.flag)):
            if self.flag:
                Path(self.flag).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().embed_documents(texts)


def same_index(one: KnowledgeBase, other: KnowledgeBase) -> bool:
    "The same ids, places and texts, and vectors equal to rounding."
    held = []
    for base in (one, other):
        found = base._ask(lambda store: store.get(sorted(store.metadata()), ["embeddings", "documents"]))
        held.append({chunk_id: (text, vector) for chunk_id, text, vector in zip(found["ids"], found["documents"], found["embeddings"], strict=True)})
    assert held[0].keys() == held[1].keys() and rows(one) == rows(other)
    return all(held[0][key][0] == held[1][key][0] and np.allclose(held[0][key][1], held[1][key][1], atol=1e-5) for key in held[0])


def both(tmp_path: Path, model: Callable[[], HashEmbeddings] = HashEmbeddings) -> tuple[KnowledgeBase, KnowledgeBase]:
    return KnowledgeBase.open(tmp_path / "plain", model()), KnowledgeBase.open(tmp_path / "ray", model())


def counts(report: module.IngestReport) -> dict[str, object]:
    return {name: value for name, value in report.to_dict().items() if name != "seconds"}


def test_ray_makes_the_same_index_and_the_same_report(ray: object, tmp_path: Path, docs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "_SHIP_FILES", 3)
    write_docs(docs / "many", 12)
    (docs / "many" / "zero.pdf").write_bytes(b"")
    (docs / "many" / "a.md").write_text("# A third a.md\n\nThe third fee is £11.")
    plain, spread = both(tmp_path)
    paths = [docs / "sub", docs, docs / "many"]
    assert counts(ingest_with_ray(spread, paths, progress=False, gpus_per_worker=0)) == counts(plain.ingest(paths, progress=False))
    assert same_index(plain, spread)
    (docs / "a.md").write_text("# Alpha\n\nThe alpha fee is £6 now.")
    (docs / "b.txt").unlink()
    (docs / "many" / "doc003.md").write_bytes(b"")
    shipped: list[int] = []
    real = scaling._spread
    monkeypatch.setattr(scaling, "_spread", lambda session, work, *rest: (shipped.extend(len(pickle.loads(piece)) for piece in work), real(session, work, *rest))[1])
    expected = counts(plain.ingest(paths, progress=False))
    assert counts(ingest_with_ray(spread, paths, progress=False)) == expected
    assert sum(shipped) == 3, "what is new, changed or unreadable goes to the workers, and nothing else"
    assert expected["updated"] == 1 and expected["deleted"] == 1
    assert same_index(plain, spread)


def test_ray_gives_documents_the_readers_that_the_plain_ingest_gives(ray: object, tmp_path: Path, docs: Path) -> None:
    (docs / "own.md").write_text("---\nallowed_groups: [board]\n---\n# Own\n\nThe own fee is £13.")
    plain, spread = both(tmp_path)
    for groups in (["staff"], None):
        (docs / "a.md").write_text(f"# Alpha\n\nThe alpha fee, as {groups} may read.")
        expected = counts(plain.ingest(docs, progress=False, allowed_groups=groups))
        assert counts(ingest_with_ray(spread, docs, progress=False, allowed_groups=groups, workers=1, gpus_per_worker=0)) == expected
        assert same_index(plain, spread)
    assert {passage.source for passage in spread.search("own fee", 5, groups=["board"])} == {"own.md"}


def test_ray_reads_on_cpus_for_actors_on_gpus(ray: object, tmp_path: Path, docs: Path) -> None:
    plain, spread = both(tmp_path)
    assert counts(ingest_with_ray(spread, docs, progress=False)) == counts(plain.ingest(docs, progress=False))
    assert same_index(plain, spread)


def test_a_killed_worker_is_replaced_and_nothing_is_lost(ray: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "_SHIP_FILES", 2)
    folder = write_docs(tmp_path / "docs", 6)
    flag = tmp_path / "died"
    plain, spread = both(tmp_path)
    ingest_with_ray(spread, folder, progress=False, workers=1, gpus_per_worker=0, load=DyingOnce(str(flag)))
    assert flag.exists()
    plain.ingest(folder, progress=False)
    assert same_index(plain, spread)


class DyingOnce:
    "Makes the model that dies; a class, because a lambda cannot be pickled."

    def __init__(self, flag: str) -> None:
        self.flag = flag

    def __call__(self) -> HashEmbeddings:
        return Dying(self.flag)


def test_workers_that_die_each_time_stop_the_ingest_with_a_clear_error(ray: object, tmp_path: Path, docs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "_LIVES", 1)
    _, spread = both(tmp_path)
    spread.ingest(docs / "b.txt", progress=False)
    with pytest.raises(RayIngestError, match="What was complete is kept"):
        ingest_with_ray(spread, docs, progress=False, workers=1, gpus_per_worker=0, load=DyingOnce(""))
    assert spread.search("beta fee", 1)[0].source == "b.txt"
    spread.ingest(docs, progress=False)
    check_index(spread, docs)


def test_errors_of_the_model_come_back_as_they_were(ray: object, tmp_path: Path, docs: Path) -> None:
    _, spread = both(tmp_path, model=Broken)
    with pytest.raises(ConnectionError, match="the endpoint is gone"):
        ingest_with_ray(spread, docs, progress=False)


def test_another_model_in_the_workers_is_refused(ray: object, tmp_path: Path, docs: Path) -> None:
    _, spread = both(tmp_path)
    with pytest.raises(BadInputError, match="not the index's"):
        ingest_with_ray(spread, docs, progress=False, load=SaltedModel())
    assert len(spread) == 0


class SaltedModel:
    def __call__(self) -> HashEmbeddings:
        return HashEmbeddings(salt="x")


def test_what_ray_cannot_do_is_refused(ray: object, tmp_path: Path, docs: Path) -> None:
    _, spread = both(tmp_path)
    with pytest.raises(BadInputError, match="room for 2 workers, not for 50"):
        ingest_with_ray(spread, docs, progress=False, workers=50, gpus_per_worker=0)
    with pytest.raises(BadInputError, match="workers is 0"):
        ingest_with_ray(spread, docs, workers=0)
    with pytest.raises(BadInputError, match="does not exist"):
        ingest_with_ray(spread, tmp_path / "missing", progress=False)
    spread.embeddings.lock = threading.Lock()
    with pytest.raises(BadInputError, match="cannot be sent"):
        ingest_with_ray(spread, docs, progress=False)


# --- the command line -------------------------------------------------------------------------------------------


def test_the_command_line_ingests_with_ray_into_an_index_on_a_server(
    ray: object, local_server: LocalServer, tmp_path: Path, docs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llmops_ref.models.load_embeddings", HashEmbeddings)
    monkeypatch.setenv("LLMOPS_REF_SERVER_TOKEN", "s3cret-token")
    command = ["ingest", str(docs), "--index", str(tmp_path / "index"), "--json"]
    with listening(proxy(local_server.server.url)) as url:
        assert main([*command, "--server", url, "--engine", "ray", "--workers", "1"]) == 0
        assert json.loads(capsys.readouterr().out)["added"] == 3
        assert main([*command, "--server", url]) == 0
        assert json.loads(capsys.readouterr().out)["unchanged"] == 3
        monkeypatch.setenv("LLMOPS_REF_SERVER_TOKEN", "wr0ng-token")
        assert main([*command, "--server", url]) == 2
        shown = capsys.readouterr()
        assert json.loads(shown.out)["error"] == "ServerRefusedError" and "token" not in shown.out + shown.err
    assert main(command) == 2 and "on a server" in capsys.readouterr().err
    assert main(["ask", "What is the alpha fee?", "--index", str(tmp_path / "index"), "--server", "nowhere"]) == 2
    assert "http://host:port" in capsys.readouterr().err


def test_bad_engines_and_worker_counts_are_refused(tmp_path: Path, docs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("llmops_ref.models.load_embeddings", HashEmbeddings)
    with pytest.raises(SystemExit) as stopped:
        main(["ingest", str(docs), "--engine", "spark"])
    assert stopped.value.code == 2
    assert main(["ingest", str(docs), "--index", str(tmp_path / "index"), "--engine", "ray", "--workers", "0"]) == 2
    assert "workers is 0" in capsys.readouterr().err


# --- names ---------------------------------------------------------------------------------------------------------


def test_errors_have_one_base_and_survive_a_trip_between_processes() -> None:
    for kind in (ServerUnreachableError, ServerRefusedError, ServerVersionError):
        assert issubclass(kind, ServerError) and issubclass(kind, LlmopsRefError)
        assert str(pickle.loads(pickle.dumps(kind("It is gone.", "Start it.")))) == "It is gone. Start it."


def test_the_module_imports_neither_ray_nor_chroma() -> None:
    code = "import sys, llmops_ref.scaling; print(sorted({'ray', 'chromadb', 'pandas', 'pyarrow'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
