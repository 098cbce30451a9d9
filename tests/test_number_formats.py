"""llmops_ref.number_formats: the bytes of bitsandbytes, a bound that nothing exceeds, and damage that is noticed."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from llmops_ref.core import BadInputError, LlmopsRefError
from llmops_ref.huggingface import embedded_as_transformers
from llmops_ref.number_formats import (
    SCHEMES,
    BadBlockSizeError,
    BadWeightsError,
    CorruptTensorError,
    QuantizedTensor,
    UnknownSchemeError,
    check_scheme,
    dequantize,
    dynamic_map,
    error_bound,
    fp4_codebook,
    nf4_codebook,
    pack,
    quantize,
    unpack,
)

torch = pytest.importorskip("torch")
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
library = pytest.importorskip("bitsandbytes.functional")
modules = pytest.importorskip("bitsandbytes.nn")

QUANTIZED = SCHEMES[2:]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)    # subnormal and huge ones too
usual = st.floats(-(2.0**100), 2.0**100, width=32).map(lambda value: value if abs(value) > 2.0**-100 else 0.0)
lengths = st.integers(1, 300)


pytestmark = pytest.mark.usefixtures("one_thread")


def agree(ours: QuantizedTensor, weights: torch.Tensor) -> None:
    "Assert that bitsandbytes writes and reads `weights` exactly as `ours` was written and is read."
    if ours.scheme == "int8":
        codes, scales, _ = library.int8_vectorwise_quant(weights.reshape(-1, ours.block_size).clone())
        values = library.int8_vectorwise_dequant(codes, scales)
    else:
        name, _, double = ours.scheme.partition("-")
        flat = weights.reshape(-1)    # as a matrix, AVX-512 takes wrong scales where rows hold no whole number of blocks
        with torch.compiler.set_stance("force_eager"):    # bitsandbytes compiles its path for odd lengths
            codes, state = library.quantize_4bit(
                flat, blocksize=ours.block_size, quant_type=name, compress_statistics=bool(double)
            )
            values = library.dequantize_4bit(codes, state)
        scales = state.absmax
        if double:
            np.testing.assert_array_equal(ours.group_scales, state.state2.absmax.numpy())
            assert ours.offset == state.offset.item()
    np.testing.assert_array_equal(ours.scales, scales.numpy())
    np.testing.assert_array_equal(ours.codes, codes.numpy().reshape(-1))
    decoded = torch.from_numpy(dequantize(ours)).reshape(-1).to(values.dtype)
    assert torch.equal(decoded, values.reshape(-1))


def within_bound(weights: np.ndarray, tensor: QuantizedTensor) -> None:
    "Assert that no decoded value is further from its weight than the bound of its block."
    off = np.abs(dequantize(tensor).astype(float) - weights.astype(float)).reshape(-1)
    bound = error_bound(tensor)
    assert bound.shape == (tensor.scales.size,) and np.isfinite(bound).all()
    assert (off <= bound.repeat(tensor.block_size)[: off.size]).all()


# ------------------------------------------------------------------ codebooks


def test_codebooks_are_those_of_bitsandbytes_to_the_last_bit() -> None:
    for ours, name in ((nf4_codebook(), "nf4"), (fp4_codebook(), "fp4")):
        np.testing.assert_array_equal(ours.view(np.int32), library.get_4bit_type(name, device="cpu").numpy().view(np.int32))
    np.testing.assert_array_equal(dynamic_map(), library.create_dynamic_map().numpy())


def test_codebooks_cannot_be_changed_by_a_caller() -> None:
    for codebook in (nf4_codebook(), fp4_codebook(), dynamic_map()):
        with pytest.raises(ValueError, match="read-only"):
            codebook[0] = 1


def test_nf4_is_used_evenly_by_normal_weights() -> None:
    "Where the scale is the outermost quantile, the levels between the ends have about equal shares of a normal distribution."
    weights = np.random.default_rng(0).normal(size=200_000) / NormalDist().inv_cdf(0.9677083)
    inside = weights[np.abs(weights) < 1]
    codes = unpack(quantize(np.append(inside, 1.0), "nf4", block_size=inside.size + 1).codes, inside.size)
    shares = np.bincount(codes, minlength=16)[1:-1] / weights.size
    assert shares.min() > 0.9 / 16 and shares.max() < 1.2 / 16


# ------------------------------------------------------------------ equal to bitsandbytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", QUANTIZED)
def test_a_thousand_random_blocks(scheme: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(DTYPES.index(dtype))
    blocks = torch.randn(1000, 64, generator=generator) * 10 ** (torch.rand(1000, 1, generator=generator) * 8 - 5)
    weights = blocks.to(dtype)
    agree(quantize(weights.float().numpy(), scheme), weights)


@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 4096])
@pytest.mark.parametrize("scheme", QUANTIZED)
def test_every_block_size_of_bitsandbytes(scheme: str, block_size: int) -> None:
    weights = torch.randn(3, 8192, generator=torch.Generator().manual_seed(block_size))
    agree(quantize(weights.numpy(), scheme, block_size=block_size), weights)


@settings(max_examples=150, deadline=None)
@given(weights=arrays.arrays(np.float32, lengths, elements=usual), scheme=st.sampled_from(QUANTIZED[1:]), dtype=st.sampled_from(DTYPES))
def test_any_length_and_any_content(weights: np.ndarray, scheme: str, dtype: torch.dtype) -> None:
    "Odd lengths, short last blocks, blocks of zeros, weights exactly between two levels."
    tensor = torch.from_numpy(weights).clamp(-6e4, 6e4).to(dtype)
    agree(quantize(tensor.float().numpy(), scheme), tensor)


@settings(max_examples=100, deadline=None)
@given(arrays.arrays(np.float32, st.tuples(st.integers(1, 5), lengths), elements=usual))
def test_any_rows_in_int8(weights: np.ndarray) -> None:
    agree(quantize(weights, "int8"), torch.from_numpy(weights))


@pytest.mark.parametrize("scheme", QUANTIZED[1:])
def test_weights_exactly_on_a_midpoint(scheme: str) -> None:
    levels = np.sort(fp4_codebook() if scheme == "fp4" else nf4_codebook())
    middles = (levels[:-1] + levels[1:]) / np.float32(2)
    near = np.concatenate([middles, np.nextafter(middles, np.float32(2)), np.nextafter(middles, np.float32(-2)), [1, -0.0]])
    agree(quantize(near.astype(np.float32), scheme), torch.from_numpy(near.astype(np.float32)))


def test_many_scales() -> None:
    "From 32,768 scales on, PyTorch's mean depends on its threads: one of them gives the documented order."
    weights = torch.randn(40_000 * 64 + 7, generator=torch.Generator().manual_seed(0))
    agree(quantize(weights.numpy(), "nf4-double"), weights)


@pytest.mark.parametrize("blocks", [*range(1, 41), 255, 256, 257, 1000, 5184, 13824, 32767])
def test_double_quantization_of_any_number_of_blocks(blocks: int) -> None:
    weights = torch.randn(blocks * 32, generator=torch.Generator().manual_seed(blocks))
    agree(quantize(weights.numpy(), "nf4-double", block_size=32), weights)


@pytest.mark.slow
def test_linear_layers_of_the_embedded_model() -> None:
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(embedded_as_transformers() / "model.safetensors", framework="pt") as file:
        layers = [name for name in file.keys() if name.endswith("_proj.weight")]    # noqa: SIM118 - no mapping
        for name in layers[::3]:    # of each of the seven kinds, at ten depths
            weights = file.get_tensor(name)
            for scheme in ("int8", "fp4", "nf4-double"):
                agree(quantize(weights.numpy(), scheme), weights)
    assert len(layers) == 210


def test_the_layers_of_bitsandbytes_store_the_same() -> None:
    weights = torch.randn(64, 192, generator=torch.Generator().manual_seed(0))
    eight = modules.Int8Params(weights.clone(), requires_grad=False).to("cpu")
    np.testing.assert_array_equal(quantize(weights.numpy().astype(np.float16), "int8").codes, eight.CB.numpy().reshape(-1))
    four = modules.Params4bit(weights.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True).to("cpu")
    ours = quantize(weights.numpy(), "nf4-double")
    np.testing.assert_array_equal(ours.codes, four.data.numpy().reshape(-1))
    np.testing.assert_array_equal(ours.scales, four.quant_state.absmax.numpy())


def test_a_checkpoint_written_by_bitsandbytes_can_be_read() -> None:
    weights = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    codes, state = library.quantize_4bit(weights, quant_type="nf4", compress_statistics=True)
    tensor = QuantizedTensor(
        "nf4-double",
        tuple(state.shape),
        state.blocksize,
        codes.numpy().reshape(-1),
        state.absmax.numpy(),
        state.state2.absmax.numpy(),
        np.float32(state.offset.item()),
    )
    np.testing.assert_array_equal(dequantize(tensor), library.dequantize_4bit(codes, state).numpy())
    within_bound(weights.numpy(), tensor)


# ------------------------------------------------------------------ the bound


@settings(max_examples=400, deadline=None)
@given(
    weights=arrays.arrays(np.float32, lengths, elements=finite),
    scheme=st.sampled_from(QUANTIZED),
    block_size=st.sampled_from([None, 1, 2, 3, 16, 64, 1000]),
)
def test_no_error_exceeds_the_bound(weights: np.ndarray, scheme: str, block_size: int | None) -> None:
    tensor = quantize(weights, scheme, block_size=block_size)
    within_bound(weights, tensor)
    assert np.isfinite(dequantize(tensor)).all()


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    decades=st.tuples(st.integers(-45, 37), st.integers(-45, 37)),
    scheme=st.sampled_from(QUANTIZED),
    block_size=st.sampled_from([4, 64, 65]),
)
def test_no_error_exceeds_the_bound_where_magnitudes_are_mixed(
    seed: int, decades: tuple[int, int], scheme: str, block_size: int
) -> None:
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.uniform(min(decades), max(decades), (64, 1))
    weights = rng.uniform(-1, 1, (64, 64)) * sizes    # float64: rounding to float32 is part of the error
    within_bound(weights, quantize(weights, scheme, block_size=block_size))


@pytest.mark.parametrize("scheme", QUANTIZED)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.3, 3.4028235e38, 1.4e-45, 1e-38, 3e-37])
def test_constant_blocks_stay_within_the_bound(scheme: str, value: float) -> None:
    weights = np.full(130, value, np.float32)
    tensor = quantize(weights, scheme, block_size=64)
    within_bound(weights, tensor)
    if value == 0:
        assert not dequantize(tensor).any()


@pytest.mark.parametrize("scheme", ["int8", "fp4", "nf4"])
def test_the_bound_is_reached(scheme: str) -> None:
    "A bound that is never nearly reached would hide a fault: a weight halfway in the widest gap comes within a thousandth."
    middle = {"int8": 0.5 / 127, "fp4": (1 + 8 / 12) / 2, "nf4": float(-nf4_codebook()[:2].mean())}[scheme]
    weights = -np.array([1, middle], np.float32)
    tensor = quantize(weights, scheme)
    assert np.abs(dequantize(tensor) - weights).max() > 0.999 * error_bound(tensor)[0]


def test_quantizing_what_was_dequantized_changes_nothing() -> None:
    weights = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    for scheme in ("int8", "fp4", "nf4"):
        once = dequantize(quantize(weights, scheme))
        np.testing.assert_allclose(dequantize(quantize(once, scheme)), once, rtol=1e-6)


# ------------------------------------------------------------------ packing and the type


@given(st.lists(st.integers(0, 15), max_size=50))
def test_packing_round_trip(codes: list[int]) -> None:
    array = np.array(codes, np.uint8)
    packed = pack(array)
    assert packed.size == -(-len(codes) // 2)
    np.testing.assert_array_equal(unpack(packed, len(codes)), array)


def test_bytes_by_hand() -> None:
    "Every level is its own code, the first of two codes stands in the high half, and a missing one is that of zero."
    assert quantize(nf4_codebook(), "nf4").codes.tobytes().hex() == "0123456789abcdef"
    assert pack(np.array([1, 2, 3], np.uint8), fill=15).tobytes().hex() == "123f"
    assert quantize(np.ones(3, np.float32), "nf4").codes.tobytes().hex() == "fff7"
    assert quantize(np.array([1, -1, 0.5], np.float32), "fp4").codes.tobytes().hex() == "3b50"
    assert quantize(np.array([1, -0.5, 0], np.float32), "int8").codes.tolist() == [127, -64, 0]


@pytest.mark.parametrize("codes", [np.array([16], np.uint8), np.array([1], np.int64), np.zeros((2, 2), np.uint8)])
def test_pack_refuses_what_is_no_code(codes: Any) -> None:
    with pytest.raises(BadInputError, match="below 16"):
        pack(codes)


@pytest.mark.parametrize(("scheme", "bits"), [("int8", 8 + 32 / 512), ("fp4", 4.5), ("nf4", 4.5), ("nf4-double", 4 + 8 / 64 + 32 / 64 / 256)])
def test_bits_per_weight(scheme: str, bits: float) -> None:
    tensor = quantize(np.ones((2048, 512), np.float32), scheme)
    assert tensor.bits_per_weight == pytest.approx(bits, abs=1e-4)
    assert tensor.nbytes == tensor.bits_per_weight * 2048 * 512 / 8
    assert json.loads(json.dumps(tensor.to_dict())) == {
        "scheme": scheme,
        "shape": [2048, 512],
        "block_size": 512 if scheme == "int8" else 64,
        "nbytes": tensor.nbytes,
        "bits_per_weight": tensor.bits_per_weight,
    }
    assert "2048 × 512" in tensor._repr_markdown_()


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 5), (1, 64)])
@pytest.mark.parametrize("scheme", QUANTIZED)
def test_any_shape_comes_back(scheme: str, shape: tuple[int, ...]) -> None:
    weights = np.random.default_rng(0).normal(size=shape)
    before = weights.copy()
    restored = dequantize(quantize(weights, scheme))
    assert restored.shape == shape and restored.dtype == np.float32
    np.testing.assert_array_equal(weights, before)


def test_memory_order_does_not_matter() -> None:
    weights = np.random.default_rng(0).normal(size=(64, 128)).astype(np.float32)
    for scheme in QUANTIZED:
        np.testing.assert_array_equal(quantize(np.asfortranarray(weights), scheme).codes, quantize(weights, scheme).codes)


def test_threads_get_the_same_bytes() -> None:
    weights = np.random.default_rng(0).normal(size=(64, 640)).astype(np.float32)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: quantize(weights, "nf4-double").codes.tobytes(), range(32)))
    assert len(set(results)) == 1


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "weights",
    [
        np.array([1.0, np.nan]),
        np.array([np.inf, 1.0], np.float16),
        np.array([1e300]),
        np.array([], np.float32),
        np.float32(1),
        np.arange(4),
        np.array([True]),
        np.array([1j]),
        np.array(["a"]),
        [[1.0], [1.0, 2.0]],
        None,
        torch.ones(4, dtype=torch.bfloat16),
        torch.ones(4, requires_grad=True),
    ],
    ids=["nan", "inf", "beyond float32", "empty", "scalar", "integers", "bools", "complex", "text", "ragged", "none", "torch bf16", "torch grad"],
)
@pytest.mark.parametrize("scheme", QUANTIZED)
def test_weights_that_are_none(weights: Any, scheme: str) -> None:
    with pytest.raises(BadWeightsError) as caught:
        quantize(weights, scheme)
    assert caught.value.remedy and isinstance(caught.value, ValueError)


def test_a_nan_is_named_by_its_place() -> None:
    weights = np.ones((4, 8), np.float32)
    weights[2, 3:5] = np.nan
    with pytest.raises(BadWeightsError, match=r"2 of 32 weights .* first at \(2, 3\)"):
        quantize(weights, "nf4")


@pytest.mark.parametrize("block_size", [0, -64, 1.5, 64.0, "64", True, float("nan")])
@pytest.mark.parametrize("scheme", QUANTIZED)
def test_block_sizes_that_are_none(block_size: Any, scheme: str) -> None:
    with pytest.raises(BadBlockSizeError, match="whole number"):
        quantize(np.ones(64, np.float32), scheme, block_size=block_size)


def test_scheme_names() -> None:
    assert [check_scheme(scheme) for scheme in SCHEMES] == list(SCHEMES)
    with pytest.raises(UnknownSchemeError, match="Did you mean 'nf4-double'"):
        quantize(np.ones(4), "NF4_double")
    for scheme in ("none", "bf16"):
        with pytest.raises(UnknownSchemeError, match="keeps weights"):
            quantize(np.ones(4), scheme)


def damages() -> dict[str, dict[str, Any]]:
    "What can be wrong with a tensor of 100 weights in blocks of 64: for each, the parts to replace."
    return {
        "a byte lost": {"codes": np.zeros(49, np.uint8)},
        "a byte too many": {"codes": np.zeros(51, np.uint8)},
        "codes of another type": {"codes": np.zeros(50, np.int8)},
        "codes missing": {"codes": None},
        "codes in rows": {"codes": np.zeros((50, 1), np.uint8)},
        "a scale lost": {"scales": np.ones(1, np.float32)},
        "scales in float64": {"scales": np.ones(2)},
        "a scale not finite": {"scales": np.array([1, np.nan], np.float32)},
        "a negative scale": {"scales": np.array([1, -1], np.float32)},
        "another shape": {"shape": (10, 11)},
        "no shape": {"shape": ()},
        "a negative side": {"shape": (-10, -10)},
        "another block size": {"block_size": 32},
        "block size zero": {"block_size": 0},
        "a scheme unknown": {"scheme": "nf5"},
        "a scheme that stores nothing": {"scheme": "bf16"},
        "another scheme": {"scheme": "int8"},
        "a second level missing": {"scheme": "nf4-double", "scales": np.zeros(2, np.uint8)},
        "a second level too many": {"group_scales": np.ones(1, np.float32), "offset": np.float32(1)},
    }


@pytest.mark.parametrize("damage", damages())
def test_damage_is_noticed(damage: str) -> None:
    whole = quantize(np.random.default_rng(0).normal(size=(10, 10)), "nf4")
    broken = dataclasses.replace(whole, **damages()[damage])
    for read in (dequantize, error_bound):
        with pytest.raises(CorruptTensorError) as caught:
            read(broken)
        assert "quantize the weights again" in caught.value.remedy


@pytest.mark.parametrize(
    "parts",
    [{"offset": None}, {"offset": np.float32(np.nan)}, {"group_scales": None}, {"group_scales": np.ones(2, np.float32)}, {"scales": np.ones(2, np.float32)}],
    ids=["no offset", "offset not finite", "no group scales", "too many group scales", "float scales"],
)
def test_a_damaged_second_level_is_noticed(parts: dict[str, Any]) -> None:
    broken = dataclasses.replace(quantize(np.ones(100), "nf4-double"), **parts)
    with pytest.raises(CorruptTensorError):
        dequantize(broken)


def test_a_code_that_int8_never_writes_is_noticed() -> None:
    whole = quantize(np.ones(4), "int8")
    with pytest.raises(CorruptTensorError, match="-128"):
        dequantize(dataclasses.replace(whole, codes=np.full(4, -128, np.int8)))


def test_unpack_refuses_a_wrong_count() -> None:
    with pytest.raises(CorruptTensorError):
        unpack(np.zeros(2, np.uint8), 5)


def test_errors_have_one_root() -> None:
    for error in (BadWeightsError, BadBlockSizeError, UnknownSchemeError, CorruptTensorError):
        assert issubclass(error, LlmopsRefError) and issubclass(error, ValueError)


def test_numpy_is_all_it_needs() -> None:
    code = "import sys, llmops_ref.number_formats; print(sorted({'torch', 'bitsandbytes', 'scipy', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]" and not done.stderr


def test_bfloat16_arrays_of_numpy_are_taken() -> None:
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    weights = np.random.default_rng(0).normal(size=(8, 64)).astype(bfloat16)
    np.testing.assert_array_equal(quantize(weights, "nf4").codes, quantize(weights.astype(np.float32), "nf4").codes)
