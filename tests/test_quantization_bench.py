"""The quantization bench on tiny shapes: what it builds, what it counts, what it writes, and how it fails."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import llmops_ref.quantization_bench as bench
from llmops_ref.core import BadInputError, ContextTooLongError
from llmops_ref.model_memory import UnsupportedArchitectureError, stored_bytes
from llmops_ref.number_formats import UnknownSchemeError
from llmops_ref.quantization_bench import (
    BENCH_SCHEMES,
    MODES,
    BenchResults,
    BenchRow,
    NoDeviceError,
    ResultsFileError,
    bench_quantization,
    copy_bandwidth,
    grouped_attention,
    load_results,
    random_model,
    results_table,
    step_bytes,
)

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 512,
}
LLAMA_3 = {
    **LLAMA,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}  # fmt: skip
TIED = {**LLAMA, "tie_word_embeddings": True}
QWEN = {**LLAMA, "model_type": "qwen2"}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
SHAPES = {"llama": LLAMA, "llama-3 positions": LLAMA_3, "tied": TIED, "qwen with biases": QWEN, "mixtral": MIXTRAL}
QUANTIZED = [scheme for scheme in BENCH_SCHEMES if scheme != "bf16"]


@pytest.fixture(autouse=True)
def one_quiet_thread() -> Iterator[None]:
    "Tiny products on many threads mostly wait for each other, and the library warns about its casts."
    threads, logger = torch.get_num_threads(), logging.getLogger("bitsandbytes.autograd._functions")
    level = logger.level
    torch.set_num_threads(1)
    logger.setLevel(logging.ERROR)
    yield
    torch.set_num_threads(threads)
    logger.setLevel(level)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(LLAMA), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def quick_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: copy_bandwidth(device, size=2**20))


def small(out: Path, config_file: Path, **changes: Any) -> BenchResults:
    "The bench on the tiny shape."
    grid: dict[str, Any] = {
        "models": [str(config_file)], "schemes": ["bf16", "nf4"], "batches": [1], "contexts": [16], "modes": ["eager"],
        "new_tokens": 2, "repeats": 1, "progress": False,
    }  # fmt: skip
    return bench_quantization(out, **{**grid, **changes})


def ids(batch: int = 2, length: int = 9) -> Any:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(1))


# --- random models


def dequantized(model: Any) -> dict[str, Any]:
    "The state of an ordinary model with the same weights, its quantized matrices made whole again."
    import bitsandbytes

    def whole(layer: Any) -> Any:
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
        if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
            return layer.weight.data.float() * layer.weight.SCB[:, None] / 127
        return layer.weight.detach().float()

    state = {}
    for name, module in model.named_modules():
        if hasattr(module, "gate_up"):
            state[f"{name}.gate_up_proj"] = torch.stack([whole(layer) for layer in module.gate_up])
            state[f"{name}.down_proj"] = torch.stack([whole(layer) for layer in module.down])
        elif not any(part in name for part in (".gate_up.", ".down.")):
            for part, tensor in module.named_parameters(recurse=False):
                state[f"{name}.{part}"] = whole(module) if part == "weight" else tensor.detach().float()
    return state


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scheme", BENCH_SCHEMES)
def test_a_random_model_computes_what_an_ordinary_model_with_its_weights_computes(shape: str, scheme: str) -> None:
    # float32 leaves nothing but the rounding of int8's activations; wrong positions would show at once
    model = random_model(SHAPES[shape], scheme, compute_dtype=torch.float32)
    ordinary = transformers.AutoModelForCausalLM.from_config(model.config).float().eval()
    missing = ordinary.load_state_dict(dequantized(model), strict=False)
    assert set(missing.missing_keys) <= {"lm_head.weight"} and not missing.unexpected_keys
    with torch.no_grad():
        expected, got = ordinary(ids()).logits, model(ids()).logits
    # on processors with bfloat16 units bitsandbytes rounds block scales and activations to bfloat16 at the first call
    tolerance = 1e-5 if scheme == "bf16" else 2e-2
    assert torch.linalg.norm(got - expected) <= tolerance * torch.linalg.norm(expected)


def test_tied_tables_are_one_tensor_norms_are_ones_and_the_seed_decides() -> None:
    model, same, other = (random_model(TIED, "nf4", seed=seed) for seed in (0, 0, 1))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.model.norm.weight, torch.ones(64, dtype=torch.bfloat16))
    assert torch.equal(model.model.embed_tokens.weight, same.model.embed_tokens.weight)
    assert not torch.equal(model.model.embed_tokens.weight, other.model.embed_tokens.weight)
    spread = model.model.embed_tokens.weight.float().std().item()
    assert spread == pytest.approx(model.config.initializer_range, rel=0.05)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_building_a_model_leaves_the_callers_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    random_model(LLAMA, "bf16", seed=9)
    assert torch.equal(torch.rand(2), expected)


def test_the_head_stays_unquantized_and_every_other_matrix_is_quantized() -> None:
    model = random_model(LLAMA, "nf4")
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if name.endswith(("_proj", "lm_head"))}
    assert kinds.pop("lm_head") == "Linear"
    assert set(kinds.values()) == {"Linear4bit"} and len(kinds) == 14


class LiveBytes(TorchDispatchMode):
    "Counts the bytes of all tensors alive that were made inside the block, and the most there ever were."

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self.watch(tensor.untyped_storage())
        return result

    def watch(self, storage: Any) -> None:
        size, name = storage.nbytes(), storage._cdata
        if name not in self.known:
            self.known.add(name)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.forget, name, size)

    def forget(self, name: int, size: int) -> None:
        self.known.discard(name)
        self.now -= size


@pytest.mark.parametrize("scheme", QUANTIZED)
@pytest.mark.parametrize("shape", ["llama", "mixtral"])
def test_no_copy_of_the_whole_model_ever_exists(shape: str, scheme: str) -> None:
    config = {**SHAPES[shape], "num_hidden_layers": 12, "hidden_size": 128, "intermediate_size": 256}
    with LiveBytes() as live:
        model = random_model(config, scheme)
    settings = model.config
    whole = sum(2 * tensor.numel() for tensor in transformers.AutoModelForCausalLM.from_config(settings).parameters())
    largest = 2 * 2 * settings.intermediate_size * settings.hidden_size    # one matrix in 16 bits
    assert stored_bytes(model) < 0.7 * whole
    # one matrix, and the copies that quantizing it needs
    assert live.most <= stored_bytes(model) + 8 * largest < 0.9 * whole


def test_a_config_can_be_an_object_a_mapping_a_file_or_a_folder(config_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    configs = [LLAMA, transformers.LlamaConfig(**LLAMA), config_file, str(folder)]
    assert len({random_model(config, "nf4").num_parameters() for config in configs}) == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "not valid JSON"), ("[]", "no JSON object"), ('{"model_type": "no-such"}', "cannot read"), ("{}", "cannot read"),
     ('{"model_type": "vit"}', "no causal language model")],
)  # fmt: skip
def test_a_file_that_is_no_config_is_refused_with_the_reason(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadInputError, match=reason):
        random_model(path, "nf4")


def test_wrong_schemes_names_and_devices_are_refused() -> None:
    with pytest.raises(UnknownSchemeError, match="nf4"):
        random_model(LLAMA, "nf5")
    with pytest.raises(BadInputError):
        random_model("no-such-shape", "nf4")
    with pytest.raises(BadInputError, match="'tpu'"):
        random_model(LLAMA, "nf4", device="tpu")
    with pytest.raises(NoDeviceError, match="--device cpu"):
        random_model(LLAMA, "nf4", device="cuda:99")


# --- what a step must read


def test_the_bytes_of_a_step_are_those_counted_by_hand() -> None:
    model = random_model(LLAMA, "bf16")
    attention = 64 * 64 + 2 * 64 * 32 + 64 * 64     # q, k, v, o
    layer = attention + 3 * 64 * 128 + 2 * 64       # and the gated block, and two norms
    positions = 2 * 8 * 4                           # two copies of eight float32 frequencies
    weights = 2 * (2 * layer + 64 + 256 * 64) + positions
    cache = 2 * 2 * 2 * 16 * 2 * 3 * 10             # layers, keys and values, heads, width, bytes, batch, length
    assert step_bytes(model, 3, 10) == weights + 3 * 64 * 2 + cache    # three rows of the input table


def test_a_tied_table_is_read_whole_because_it_is_the_head() -> None:
    model = random_model(TIED, "bf16")
    assert step_bytes(model, 1, 7) == stored_bytes(model) + 2 * 2 * 2 * 16 * 2 * 7


@pytest.mark.parametrize("scheme", ["bf16", "nf4"])
def test_of_the_experts_only_the_share_that_is_touched_counts(scheme: str) -> None:
    model = random_model(MIXTRAL, scheme)
    experts = sum(stored_bytes(layer.mlp.experts) for layer in model.model.layers)
    one, two, many = (step_bytes(model, batch, 1) for batch in (1, 2, 1000))
    more = 64 * 2 + 2 * 2 * 2 * 16 * 2    # each further sequence's row of the table, and its one token in the cache
    assert many - one == pytest.approx(experts / 2 + 999 * more, abs=2)    # one token touches two of four, many all
    assert two - one == pytest.approx(experts / 4 + more, abs=2)


def test_the_roofline_is_bytes_over_bandwidth_over_time() -> None:
    row = BenchRow("m", "nf4", 4, 100, "eager", 8, step_ms=20.0, step_bytes=1e9, bandwidth=1e11, first_token_ms=50.0)
    assert row.roofline == pytest.approx(0.5)    # ten milliseconds at the ceiling, twenty measured
    assert row.decode_rate == pytest.approx(200)
    assert row.prefill_rate == pytest.approx(8000)


def test_bandwidth_counts_reading_and_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    class HalfSecond(bench._Clock):
        def milliseconds(self) -> list[float]:
            return [500.0] * (len(self._marks) - 1)

    monkeypatch.setattr(bench, "_Clock", HalfSecond)
    assert copy_bandwidth("cpu", size=1000, repeats=3) == 4000


# --- decoding


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", [48, 50])
def test_grouped_attention_equals_the_librarys(groups: int, length: int) -> None:
    query = torch.randn(3, 4, 1, 16)
    key, value = torch.randn(2, 3, groups, length, 16)
    mask = (torch.arange(length) < 30)[None, None, None, :].expand(3, 1, 1, length)
    repeated = [tensor.repeat_interleave(4 // groups, 1) for tensor in (key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=mask).transpose(1, 2)
    got, _ = grouped_attention(torch.nn.Identity(), query, key, value, mask)
    torch.testing.assert_close(got, expected)


def decoded(model: Any, mode: str, prompt: Any, count: int, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    "The tokens that one run of a mode of our own step makes."
    made: list[Any] = []
    original = bench._next_token
    monkeypatch.setattr(bench, "_next_token", lambda *inputs: made.append(original(*inputs)) or made[-1])
    if mode == "compiled":
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    row = BenchRow("m", "bf16", prompt.shape[0], prompt.shape[1], mode, count)
    (_, run), *_ = bench._runners(model, row, prompt)
    with bench._use_grouped_attention(model):
        run(bench._Clock("cpu"))
        made.clear()
        run(bench._Clock("cpu"))    # the second run starts on the cache of the first
    return made


@pytest.mark.parametrize("shape", ["llama", "tied", "mixtral"])
@pytest.mark.parametrize("most", [8, 2**16])
def test_our_step_writes_what_generate_writes(shape: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(SHAPES[shape], "bf16", compute_dtype=torch.float32)
    monkeypatch.setattr(bench, "_PREFILL_TOKENS", most)    # eight: the prompt is read in pieces
    prompt = ids(2, 12)
    expected = model.generate(prompt, max_new_tokens=6)[:, 12:]
    tokens = decoded(model, "compiled", prompt, 5, monkeypatch)
    pieces = 3 if most == 8 else 1
    assert torch.equal(torch.cat(tokens[pieces - 1 :], dim=1), expected)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.slow
def test_the_step_compiles_whole_for_quantized_weights() -> None:
    model = random_model(LLAMA, "nf4")
    row = bench._measure(model, BenchRow("m", "nf4", 1, 16, "compiled", 3), "cpu", repeats=1)
    assert "in pieces" not in row.detail and row.step_ms is not None and row.step_ms > 0


@pytest.mark.parametrize("most", [8, 2**16])
@pytest.mark.parametrize("mode", ["eager", "static"])
def test_generate_is_timed_from_the_prompt_and_for_every_step(mode: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_PREFILL_TOKENS", most)
    model = random_model(LLAMA, "bf16")
    (_, run), *_ = bench._runners(model, BenchRow("m", "bf16", 2, 9, mode, 4), ids())
    clock = bench._Clock("cpu")
    run(clock)
    assert len(clock.milliseconds()) == 1 + 4 and min(clock.milliseconds()) > 0


@pytest.mark.parametrize("mode", ["eager", "static"])
def test_a_random_prompt_may_hold_the_padding_token(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(LLAMA, "bf16", compute_dtype=torch.float32)
    prompt = torch.zeros(1, 8, dtype=torch.long)    # nothing but the padding token
    written: list[Any] = []
    original = model.generate
    monkeypatch.setattr(model, "generate", lambda *inputs, **options: written.append(original(*inputs, **options)))
    (_, run), *_ = bench._runners(model, BenchRow("m", "bf16", 1, 8, mode, 6), prompt)
    run(bench._Clock("cpu"))
    tokens = prompt
    with torch.no_grad():
        for _ in range(7):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(written[0], tokens)


def test_double_quantized_weights_are_counted_after_the_first_call_too(tmp_path: Path, config_file: Path) -> None:
    # on processors with bfloat16 units the first call unpacks the scales of nf4-double
    rows = small(tmp_path / "cpu.json", config_file, schemes=["nf4-double"], modes=["eager", "static"]).rows
    assert [row.status for row in rows] == ["ok", "ok"], [row.detail for row in rows]


# --- the bench


def test_rows_are_whole_and_the_file_says_how_they_were_made(tmp_path: Path, config_file: Path) -> None:
    out = tmp_path / "cpu.json"
    results = small(out, config_file, modes=["eager", "static"], batches=[1, 2])
    assert load_results(tmp_path / "none") == []
    assert bench._read_results(out) == results
    assert [row.again for row in results.rows].count(True) == 1
    assert {(row.scheme, row.batch, row.mode) for row in results.rows} == {
        (scheme, batch, mode) for scheme in ("bf16", "nf4") for batch in (1, 2) for mode in ("eager", "static")
    }
    for row in results.rows:
        assert row.status == "ok", row.detail
        assert row.step_ms_low <= row.step_ms <= row.step_ms_high    # type: ignore[operator]
        assert row.roofline is not None and row.predicted_bytes and row.weight_bytes and row.kv_bytes
    text = out.read_text(encoding="utf-8")
    assert str(tmp_path) not in text and "--out cpu.json" in results.command and "--model tiny" in results.command
    assert {"torch", "transformers", "bitsandbytes", "threads"} <= results.versions.keys()


def test_the_most_wanted_rows_come_first() -> None:
    plan = bench._plan(["a", "b"], BENCH_SCHEMES, [1, 8], [512, 8192], MODES, 4)
    first = {(row.model, row.scheme, row.batch) for row in plan[:16]}
    assert first == {("a", "nf4", 1), ("a", "bf16", 1)}
    assert len(plan) == 2 * (5 * 2 * 2 * 4 + 1) and len({row.key for row in plan}) == len(plan)
    assert plan[len(plan) // 2 - 1].again


def test_a_second_run_measures_nothing_again_unless_forced(
    tmp_path: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[BenchRow] = []
    monkeypatch.setattr(
        bench._Session, "measure", lambda session, row: measured.append(row) or dataclasses.replace(row, step_ms=1.0)
    )
    out = tmp_path / "cpu.json"
    small(out, config_file)
    assert len(measured) == 3
    before = out.read_bytes()
    small(out, config_file)
    assert len(measured) == 3 and out.read_bytes() == before
    small(out, config_file, contexts=[16, 32])
    assert len(measured) == 5
    small(out, config_file, force=True)
    assert len(measured) == 8 and len(bench._read_results(out).rows) == 5


def test_a_row_that_failed_is_kept_tried_again_and_stops_nobody(
    tmp_path: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, original = tmp_path / "cpu.json", bench._measure

    def broken(model: Any, row: BenchRow, device: str, repeats: int) -> BenchRow:
        if row.model and row.scheme == "nf4":
            raise RuntimeError("the compiler gave up\nand said a lot")
        return original(model, row, device, repeats)

    monkeypatch.setattr(bench, "_measure", broken)
    rows = {row.key: row for row in small(out, config_file).rows}
    assert [row.status for row in rows.values()] == ["error", "ok", "ok"]
    assert [row.detail for row in rows.values() if row.status == "error"] == ["RuntimeError: the compiler gave up"]
    monkeypatch.setattr(bench, "_measure", original)
    assert {row.status for row in small(out, config_file).rows} == {"ok"}


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried"), torch.OutOfMemoryError("x")])
def test_running_out_of_memory_is_a_result(
    tmp_path: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*arguments: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(bench._Session, "_measure", full)
    rows = small(tmp_path / "cpu.json", config_file).rows
    assert {row.status for row in rows} == {"out of memory"}
    assert all(row.predicted_bytes for row in rows)


def test_a_shape_that_cannot_fit_is_not_even_tried(
    tmp_path: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_device_memory", lambda device: 1000)
    monkeypatch.setattr(bench._Session, "_measure", lambda *arguments: pytest.fail("tried"))
    rows = small(tmp_path / "cpu.json", config_file).rows
    assert {row.status for row in rows} == {"out of memory"} and "not tried" in rows[0].detail


def test_what_cannot_work_says_why() -> None:
    config = transformers.LlamaConfig(**LLAMA)
    mixture = transformers.MixtralConfig(**{**MIXTRAL, "sliding_window": None})
    row = BenchRow("m", "nf4", 1, 8, "cuda-graph", 4)
    assert "CUDA device" in bench._impossible(config, row, "cpu")
    assert bench._impossible(config, row, "cuda") == ""
    assert "outliers" in bench._impossible(config, dataclasses.replace(row, scheme="int8"), "cuda")
    assert "router" in bench._impossible(mixture, row, "cuda")
    assert bench._impossible(mixture, dataclasses.replace(row, scheme="bf16"), "cuda") == ""
    assert bench._impossible(mixture, dataclasses.replace(row, mode="eager"), "cuda") == ""


def test_no_row_is_started_after_the_time_limit(tmp_path: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 100000, 50))    # every look at the clock is 50 seconds later
    monkeypatch.setattr(bench.time, "monotonic", lambda: float(next(now)))
    monkeypatch.setattr(bench._Session, "__init__", lambda *arguments: None)
    monkeypatch.setattr(bench._Session, "measure", lambda session, row: row)
    assert len(small(tmp_path / "cpu.json", config_file, contexts=[16, 32], minutes=2).rows) == 2


def test_a_killed_bench_loses_no_finished_row_and_goes_on(tmp_path: Path, config_file: Path) -> None:
    out = tmp_path / "cpu.json"
    script = (
        "import sys; import llmops_ref.quantization_bench as bench; bench.copy_bandwidth = lambda device: 1e9\n"
        "bench.bench_quantization(sys.argv[1], models=[sys.argv[2]], schemes=['bf16', 'nf4'], batches=[1], contexts=[16],"
        " modes=['eager', 'static'], new_tokens=60, repeats=4, progress=False)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(out), str(config_file)], start_new_session=True)
    deadline = time.monotonic() + 120
    while not out.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    kept = bench._read_results(out).rows
    assert 1 <= len(kept) < 5
    grid = {"modes": ["eager", "static"], "new_tokens": 60, "repeats": 1}
    after = small(out, config_file, **grid).rows
    assert after[: len(kept)] == kept and len(after) == 5
    assert {row.status for row in after} == {"ok"}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"device": "cuda:99"}, NoDeviceError, "--device cpu"),
        ({"device": "gpu"}, BadInputError, "cuda:NUMBER"),
        ({"schemes": ["nf44"]}, UnknownSchemeError, "'nf4'"),
        ({"schemes": ["none"]}, BadInputError, "bf16, int8"),
        ({"schemes": []}, BadInputError, "at least one"),
        ({"modes": ["egaer"]}, BadInputError, "eager, static"),
        ({"batches": [0]}, BadInputError, "batch is 0"),
        ({"batches": [1.5]}, BadInputError, "whole number"),
        ({"contexts": [-1]}, BadInputError, "context is -1"),
        ({"new_tokens": 0}, BadInputError, "new_tokens is 0"),
        ({"repeats": 0}, BadInputError, "repeats is 0"),
        ({"models": ["no-such-shape"]}, BadInputError, "no-such-shape"),
        ({"contexts": [511]}, ContextTooLongError, "512"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(
    tmp_path: Path, config_file: Path, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    out = tmp_path / "cpu.json"
    with pytest.raises(error, match=words):
        small(out, config_file, **changes)
    assert not out.exists()


def test_an_architecture_whose_bytes_cannot_be_counted_is_refused(tmp_path: Path) -> None:
    odd = tmp_path / "odd.json"
    odd.write_text(json.dumps({"model_type": "gpt2", "n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 64}), encoding="utf-8")
    with pytest.raises(UnsupportedArchitectureError):
        small(tmp_path / "cpu.json", odd)


def test_two_models_of_one_name_are_refused(tmp_path: Path, config_file: Path) -> None:
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / config_file.name
    twin.write_text(json.dumps(TIED), encoding="utf-8")
    with pytest.raises(BadInputError, match="same name"):
        small(tmp_path / "cpu.json", config_file, models=[str(config_file), str(twin)])


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": 1}', '{"schema": 2, "rows": []}', '{"schema": 1, "rows": [{}]}'])
def test_a_damaged_file_is_refused_and_left_as_it_is(tmp_path: Path, config_file: Path, text: str) -> None:
    out = tmp_path / "cpu.json"
    out.write_text(text, encoding="utf-8")
    for force in (False, True):
        with pytest.raises(ResultsFileError, match=r"cpu\.json"):
            small(out, config_file, force=force)
    with pytest.raises(ResultsFileError, match=r"cpu\.json"):
        load_results(tmp_path, pattern="*.json")
    assert out.read_text(encoding="utf-8") == text


def test_rows_of_another_machine_or_version_are_never_mixed(tmp_path: Path, config_file: Path) -> None:
    here = bench._open_results(tmp_path / "new.json", "cpu", "")
    for changes, word in (({"device": "NVIDIA H100"}, "device"), ({"versions": {**here.versions, "torch": "1.0"}}, "version")):
        out = tmp_path / f"{word}.json"
        bench._write_results(out, dataclasses.replace(here, **changes))
        with pytest.raises(ResultsFileError, match=f"another {word}"):
            small(out, config_file, force=True)


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path: Path, config_file: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResultsFileError, match="cannot be written"):
        small(tmp_path / "file" / "cpu.json", config_file)
    with pytest.raises(ResultsFileError, match="cannot be written"):
        small(tmp_path, config_file)


# --- the table


def test_the_table_sets_every_row_beside_bf16_and_eager() -> None:
    def row(scheme: str, mode: str, step: float | None, **more: Any) -> BenchRow:
        return BenchRow("m", scheme, 1, 8, mode, 4, step_ms=step, step_ms_low=step, step_ms_high=step, **more)

    rows = (
        row("nf4", "static", 5.0),
        row("bf16", "eager", 20.0),
        row("bf16", "static", 10.0),
        row("nf4", "eager", 40.0),
        row("bf16", "eager", 25.0, again=True),
        row("int8", "eager", None, status="out of memory", detail="a | b", predicted_bytes=2**31),
    )
    head, _, *lines = results_table(BenchResults("d", "cpu", {}, rows)).splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, *lines)]
    assert {len(line) for line in table} == {16}
    names = table[0]
    cells = {(line[1], line[4]): dict(zip(names, line, strict=True)) for line in table[1:]}
    assert [(line[1], line[4]) for line in table[1:]] == [
        ("bf16", "eager"), ("int8", "eager"), ("nf4", "eager"), ("bf16 (again)", "eager"), ("bf16", "static"), ("nf4", "static"),
    ]  # fmt: skip
    assert cells["nf4", "static"]["of bf16"] == "2.00" and cells["nf4", "static"]["of eager"] == "8.00"
    assert cells["nf4", "eager"]["of bf16"] == "0.50"
    assert cells["bf16 (again)", "eager"]["of bf16"] == "0.80"
    assert "out of memory: a / b" in cells["int8", "eager"]["first token, ms"]
    assert cells["int8", "eager"]["predicted, GiB"] == "2.000"


def test_the_committed_results_can_be_read_and_hold_no_path() -> None:
    folder = Path(__file__).parents[1] / "nbs" / "results"
    for path, results in zip(sorted(folder.glob("quantization-*.json")), load_results(folder), strict=True):
        assert results.rows and results.command.startswith("llmops-ref bench quantization")
        assert not {"/work", "/root", "/home", "/tmp"} & {f"/{part}" for part in path.read_text().split("/")}
        assert all(row.date for row in results.rows)


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scheme", BENCH_SCHEMES)
def test_every_mode_runs_on_a_gpu(tmp_path: Path, config_file: Path, scheme: str) -> None:
    rows = small(tmp_path / "cuda.json", config_file, device="cuda", schemes=[scheme], modes=MODES, new_tokens=8).rows
    statuses = {row.mode: (row.status, row.detail) for row in rows}
    expected = "not possible" if scheme == "int8" else "ok"
    assert statuses["cuda-graph"][0] == expected, statuses
    assert {statuses[mode][0] for mode in ("eager", "static", "compiled")} == {"ok"}, statuses
    assert all(row.peak_bytes for row in rows if row.status == "ok")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["compiled", "cuda-graph"])
@pytest.mark.parametrize("scheme", ["bf16", "nf4", "nf4-double"])
def test_a_recorded_step_writes_what_generate_writes(scheme: str, mode: str) -> None:
    model = random_model(LLAMA, scheme, device="cuda", compute_dtype=torch.float32)
    prompt = ids(2, 12).to("cuda")
    expected = model.generate(prompt, max_new_tokens=9)[:, 12:]
    made: list[Any] = []

    row = BenchRow("m", scheme, 2, 12, mode, 8)
    (_, run), *_ = bench._runners(model, row, prompt)
    token = next(cell.cell_contents for cell in run.__closure__ if isinstance(cell.cell_contents, torch.Tensor))

    class Reading(bench._Clock):
        def mark(self) -> None:
            super().mark()
            made.append(token.clone())

    with bench._use_grouped_attention(model):
        run(bench._Clock("cuda"))
        run(Reading("cuda"))
    assert torch.equal(torch.cat(made[1:], dim=1), expected)


def test_the_folder_of_the_results_is_made(tmp_path: Path, config_file: Path) -> None:
    small(tmp_path / "new" / "deeper" / "cpu.json", config_file)
    assert load_results(tmp_path / "new" / "deeper", pattern="cpu.json")[0].rows
