"""Predictions of memory, held against transformers and bitsandbytes: exact counts, real caches, replayed forwards, refusals."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import pickle
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from llmops_ref import model_memory
from llmops_ref.core import BadInputError, ContextTooLongError
from llmops_ref.model_memory import (
    AlreadyQuantizedError,
    BadConfigError,
    MemoryEstimate,
    UnsupportedArchitectureError,
    count_parameters,
    fits,
    known_configs,
    load_config,
    predict_memory,
    recommend,
    stored_bytes,
    trace_prefill,
)
from llmops_ref.number_formats import SCHEMES, UnknownSchemeError

PROPERTY = settings(    # no shrinking: each example builds a model, and the drawn config is in the report as it is
    deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.generate)
)
FAMILIES = sorted(model_memory._FAMILIES)
QUANTIZED = ("int8", "fp4", "nf4", "nf4-double")
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"vocab_size": 160, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 4, "num_attention_heads": 4, **TOKENS}
LATENT = {"kv_lora_rank": 20, "q_lora_rank": 12, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10, "num_key_value_heads": 4}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
EXTRA: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2, "num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "qwen2_moe": EXPERTS | {"num_experts": 5, "shared_expert_intermediate_size": 30, "num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "qwen3_moe": EXPERTS | {"num_experts": 5, "num_key_value_heads": 2},
    "gemma": {"num_key_value_heads": 2, "head_dim": 16},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 16},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 16},
    "deepseek_v2": EXPERTS | LATENT | {"n_routed_experts": 5, "first_k_dense_replace": 1},
    "deepseek_v3": EXPERTS | LATENT | {"n_routed_experts": 8, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
}


def small(kind: str, **others: Any) -> dict[str, Any]:
    "A tiny config of a model type, complete enough for transformers."
    return {"model_type": kind, **SMALL, **EXTRA.get(kind, {}), **others}


@pytest.fixture(scope="module")
def torch() -> Any:
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def transformers(torch: Any) -> Any:
    module = pytest.importorskip("transformers")
    module.utils.logging.set_verbosity_error()
    module.utils.logging.disable_progress_bar()
    return module


def real_config(transformers: Any, config: dict[str, Any]) -> Any:
    return transformers.AutoConfig.for_model(**json.loads(json.dumps(config)))


def meta_model(torch: Any, transformers: Any, config: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(real_config(transformers, config))


# --- the shipped facts ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", known_configs())
def test_shipped_config_gives_the_published_parameter_count(name: str) -> None:
    facts = json.loads((resources.files("llmops_ref") / "data" / "model_configs" / f"{name}.json").read_text())
    assert set(facts) == {"source", "parameters", "config"}
    assert facts["source"].startswith("https://huggingface.co/") and facts["source"].endswith("/blob/main/config.json")
    assert count_parameters(name)["total"] == facts["parameters"] == predict_memory(name, "bf16").parameters


def test_load_config_hands_out_copies() -> None:
    load_config("llama-3.1-8b")["hidden_size"] = 1
    assert load_config("llama-3.1-8b")["hidden_size"] == 4096
    given = {"model_type": "llama"}
    load_config(given)["model_type"] = "other"
    assert given == {"model_type": "llama"}


# --- weights, held against transformers -------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", FAMILIES)
def test_defaults_are_those_of_the_config_class(transformers: Any, kind: str) -> None:
    family = model_memory._FAMILIES[kind]
    fields = {field.name: field.default for field in dataclasses.fields(transformers.CONFIG_MAPPING[kind])}
    for name, default in family.defaults.items():
        if name in fields:
            assert default == fields[name], name
    assert transformers.AutoModelForCausalLM._model_mapping[transformers.CONFIG_MAPPING[kind]].__name__ == family.architecture


def switches(kind: str) -> dict[str, st.SearchStrategy[Any]]:
    "Every optional field that can change a size, with values to try."
    choices: dict[str, st.SearchStrategy[Any]] = {
        "tie_word_embeddings": st.booleans(), "attention_bias": st.booleans(), "mlp_bias": st.booleans(), "qkv_bias": st.booleans(),
        "head_dim": st.sampled_from([8, 16, 24]), "num_key_value_heads": st.sampled_from([1, 2, 4]),
        "use_sliding_window": st.booleans(), "sliding_window": st.sampled_from([None, 6]), "max_window_layers": st.integers(0, 4),
        "decoder_sparse_step": st.integers(1, 3), "mlp_only_layers": st.sampled_from([[], [0], [1, 3]]),
        "first_k_dense_replace": st.integers(0, 5), "n_shared_experts": st.integers(1, 3),
        "q_lora_rank": st.sampled_from([None, 12]), "kv_lora_rank": st.integers(4, 24), "v_head_dim": st.sampled_from([6, 10]),
    }
    own = set(model_memory._FAMILIES[kind].defaults) | set(EXTRA.get(kind, {}))
    if kind.startswith("deepseek"):    # its heads' widths are the latent ones
        own -= {"head_dim", "num_key_value_heads"}
    if kind.startswith("gemma") or model_memory._FAMILIES[kind].slides is None:    # needs a window, or must have none
        own -= {"sliding_window"}
    if kind == "qwen2_moe":    # slides where its switch says so, whether or not there is a window: without one it is refused
        choices["sliding_window"] = st.just(6)
    return {name: values for name, values in choices.items() if name in own}


@pytest.mark.parametrize("kind", FAMILIES)
@settings(PROPERTY, max_examples=20)
@given(data=st.data())
def test_counts_equal_the_real_model(torch: Any, transformers: Any, kind: str, data: st.DataObject) -> None:
    config = small(kind)
    for name, values in switches(kind).items():
        if data.draw(st.booleans(), label=f"{name} given"):
            config[name] = data.draw(values, label=name)
    for name in ("vocab_size", "intermediate_size"):
        config[name] = data.draw(st.integers(20, 200), label=name)
    config["num_hidden_layers"] = data.draw(st.integers(1, 6), label="layers")
    model = meta_model(torch, transformers, config)
    head = model.get_output_embeddings()
    linear = sum(module.weight.numel() for module in model.modules() if type(module) is torch.nn.Linear and module is not head)
    linear += sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name and parameter.dim() == 3)
    buffers = sum(module._buffers[name].nbytes for module in model.modules() for name in module._buffers
                  if name not in module._non_persistent_buffers_set)
    counts = count_parameters(config)
    assert counts["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert counts["linear"] == linear and counts["kept"] == counts["total"] - linear
    assert predict_memory(config, "bf16").weights == 2 * counts["total"] + buffers


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_saved_config_and_a_config_object_give_the_same_answer(transformers: Any, tmp_path: Path, kind: str) -> None:
    config = small(kind)
    real = real_config(transformers, config)
    real.save_pretrained(tmp_path)    # leaves out what equals a default
    answers = [predict_memory(given, "nf4", context=100) for given in (config, real, tmp_path, str(tmp_path / "config.json"))]
    assert len({(answer.weights, answer.kv_cache, answer.activations) for answer in answers}) == 1


# --- bytes of quantized layers, held against bitsandbytes ---------------------------------------------------------------

def quantized_layer(torch: Any, weights: Any, scheme: str) -> Any:
    from bitsandbytes.nn import Int8Params, Params4bit

    layer = torch.nn.Module()
    if scheme == "int8":
        layer.weight = Int8Params(weights, requires_grad=False, has_fp16_weights=False).to("cpu")
    else:
        kind = "fp4" if scheme == "fp4" else "nf4"
        layer.weight = Params4bit(weights, requires_grad=False, quant_type=kind, compress_statistics=scheme == "nf4-double").to("cpu")
    return layer


@pytest.mark.parametrize("scheme", QUANTIZED)
@settings(PROPERTY, max_examples=25)
@given(rows=st.integers(1, 300), columns=st.integers(1, 300))
def test_a_layer_takes_the_predicted_bytes(torch: Any, scheme: str, rows: int, columns: int) -> None:
    pytest.importorskip("bitsandbytes")
    layer = quantized_layer(torch, torch.ones(rows, columns, dtype=torch.bfloat16), scheme)
    assert stored_bytes(layer) == model_memory._linear_bytes(rows, columns, scheme, 2)


def load_quantized(torch: Any, transformers: Any, folder: Path, scheme: str) -> Any:
    options: dict[str, Any] = {"load_in_8bit": True} if scheme == "int8" else {
        "load_in_4bit": True, "bnb_4bit_quant_type": scheme[:3], "bnb_4bit_use_double_quant": scheme == "nf4-double"}
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map="cpu", quantization_config=transformers.BitsAndBytesConfig(**options))


def rotary_bytes(model: Any) -> int:
    return sum(buffer.nbytes for name, buffer in model.named_buffers() if "inv_freq" in name or "embed_scale" in name)


@pytest.mark.parametrize("scheme", QUANTIZED)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "phi3", "mixtral", "qwen2_moe", "deepseek_v3"])
def test_a_quantized_model_takes_the_predicted_bytes(torch: Any, transformers: Any, tmp_path: Path, kind: str, scheme: str) -> None:
    pytest.importorskip("bitsandbytes")
    config = small(kind, num_hidden_layers=2, tie_word_embeddings=kind == "qwen2")
    transformers.AutoModelForCausalLM.from_config(real_config(transformers, config)).save_pretrained(tmp_path)
    model = load_quantized(torch, transformers, tmp_path, scheme)
    measured = stored_bytes(model) - rotary_bytes(model)
    for name, parameter in model.named_parameters():    # transformers leaves experts in 16 bits; this library does not
        if ".experts." in name and parameter.dim() == 3:
            measured -= parameter.nbytes
            measured += sum(stored_bytes(quantized_layer(torch, matrix.data.clone(), scheme)) for matrix in parameter)
    assert predict_memory(config, scheme).weights == measured


def test_stored_bytes_counts_a_storage_once_and_after_a_call(torch: Any, transformers: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = small("llama", tie_word_embeddings=True)
    plain = transformers.AutoModelForCausalLM.from_config(real_config(transformers, config), dtype=torch.float32)
    assert stored_bytes(plain) == 4 * count_parameters(config)["total"] + rotary_bytes(plain)
    plain.save_pretrained(tmp_path)
    model = load_quantized(torch, transformers, tmp_path, "int8")
    before = stored_bytes(model)
    with torch.inference_mode():
        model(torch.ones(1, 3, dtype=torch.long))    # moves scales from the weights to the layers
    assert stored_bytes(model) == before
    meta = meta_model(torch, transformers, config)    # no memory, but sizes
    assert stored_bytes(meta) == stored_bytes(plain)


def test_4_bit_without_double_quantization_takes_the_same_in_both_codes() -> None:
    for name in known_configs():
        sizes = [predict_memory(name, scheme).weights for scheme in ("bf16", "int8", "nf4", "nf4-double")]
        assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
        assert predict_memory(name, "fp4").weights == predict_memory(name, "nf4").weights


# --- the cache, held against real ones ----------------------------------------------------------------------------------

SLIDING = {
    "mistral": {"sliding_window": 7},
    "mixtral": {"sliding_window": 7},
    "qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    "qwen2_moe": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3},
    "qwen3": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen3_moe": {"use_sliding_window": True, "sliding_window": 7},
    "gemma2": {"sliding_window": 7},
    "gemma3_text": {"sliding_window": 7, "sliding_window_pattern": 3},
    "phi3": {"sliding_window": 7},
    "smollm3": {"use_sliding_window": True, "sliding_window": 7, "no_rope_layer_interval": 2},
}
CACHES = [(kind, {}) for kind in FAMILIES] + list(SLIDING.items())


@pytest.mark.parametrize(("kind", "others"), CACHES, ids=[f"{kind}-{'sliding' if others else 'plain'}" for kind, others in CACHES])
def test_the_cache_takes_the_predicted_bytes(torch: Any, transformers: Any, kind: str, others: dict[str, Any]) -> None:
    config = small(kind, **others)
    model = transformers.AutoModelForCausalLM.from_config(real_config(transformers, config)).eval()
    prompt, sizes = 15, []
    with torch.inference_mode():
        tokens = torch.ones(2, prompt, dtype=torch.long)
        cache = None
        for _ in range(2):
            cache = model(tokens, past_key_values=cache, use_cache=True).past_key_values
            parts = [part.untyped_storage() for layer in cache.layers for part in (layer.keys, layer.values)]
            sizes.append(sum({part.data_ptr(): part.nbytes() for part in parts}.values()))
            tokens = tokens[:, :1]
    kept, surplus = model_memory._cache_bytes(model_memory._shape(config), prompt, 2, 4)
    assert sizes[0] == kept + surplus
    assert sizes[1] == predict_memory(config, "bf16", context=prompt + 1, batch=2, kv_dtype="fp32").kv_cache
    assert (surplus > 0) == (kind in SLIDING and bool(others))


@pytest.mark.parametrize(("kv_dtype", "size"), [("fp32", 4), ("bf16", 2), ("fp16", 2), ("fp8", 1), ("int8", 1)])
def test_the_cache_of_llama_by_hand(kv_dtype: str, size: int) -> None:
    estimate = predict_memory("llama-3.1-8b", "bf16", context=1000, batch=3, kv_dtype=kv_dtype)
    assert estimate.kv_cache == 32 * 2 * 8 * 128 * 1000 * 3 * size


# --- activations, held against a replayed forward -----------------------------------------------------------------------

SHAPES = {
    **{name: load_config(name) for name in ("llama-3.1-8b", "qwen2.5-7b", "qwen3-0.6b", "smollm2-1.7b", "mistral-7b-v0.1",
                                            "mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v2-lite")},
    "gemma2-2b": {"model_type": "gemma2", "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216,
                  "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
    "gemma3-1b": {"model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912,
                  "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512},
    "phi3-mini": {"model_type": "phi3", "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 32,
                  "sliding_window": 2047, **TOKENS},
    "olmo2-7b": {"model_type": "olmo2", "vocab_size": 100352, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
                 "max_position_embeddings": 4096, **TOKENS},
    "deepseek-v3": {"model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
                    "moe_intermediate_size": 2048, "num_attention_heads": 128, "n_routed_experts": 256, "num_experts_per_tok": 8},
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("context", "batch"), [(512, 1), (4096, 1), (512, 3)])
def test_activations_equal_a_replayed_forward(transformers: Any, name: str, context: int, batch: int) -> None:
    config = SHAPES[name] | {"num_hidden_layers": 4}
    estimate = predict_memory(config, "bf16", context=context, batch=batch)
    replayed = trace_prefill(config, context=context, batch=batch)
    assert 0.995 < (estimate.kv_cache + estimate.activations) / replayed < 1.05


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind not in ("mixtral", "qwen2_moe", "qwen3_moe")])
@settings(PROPERTY, max_examples=6)
@given(data=st.data())
def test_activations_of_odd_shapes_are_not_underestimated(transformers: Any, kind: str, data: st.DataObject) -> None:
    config = small(kind, intermediate_size=data.draw(st.sampled_from([16, 96, 512])), num_hidden_layers=3, sliding_window=40
                   if kind in ("gemma2", "gemma3_text") else None)
    if not kind.startswith("deepseek"):
        config |= {"head_dim": data.draw(st.sampled_from([16, 64])), "num_key_value_heads": data.draw(st.sampled_from([1, 2, 4]))}
    else:
        config |= {"first_k_dense_replace": 3, "qk_nope_head_dim": data.draw(st.sampled_from([8, 64]))}
    context, batch = data.draw(st.sampled_from([8, 64])), data.draw(st.integers(1, 3))
    estimate = predict_memory(config, "bf16", context=context, batch=batch)
    assert estimate.kv_cache + estimate.activations >= 0.99 * trace_prefill(config, context=context, batch=batch)


def test_quantized_layers_need_a_workspace_and_all_logits_more() -> None:
    plain, four, eight = (predict_memory("llama-3.1-8b", scheme, context=2048) for scheme in ("bf16", "nf4", "int8"))
    assert four.activations == plain.activations + 2 * 4096 * 14336    # the widest layer, unpacked
    assert eight.activations > plain.activations
    every = predict_memory("llama-3.1-8b", "bf16", context=2048, all_logits=True)
    assert every.activations > 2048 * 128256 * 2 > plain.activations


# --- refusals -----------------------------------------------------------------------------------------------------------

BASE = load_config("llama-3.1-8b")
MIXTRAL = load_config("mixtral-8x7b")


@pytest.mark.parametrize("config", [
    {"model_type": "t5"}, {"model_type": "mamba"}, {"model_type": "gemma3", "text_config": {}}, {"model_type": "gpt_oss"}, {}, {"model_type": 3},
    {"model_type": ["llama"]},
    BASE | {"vision_config": {"hidden_size": 4}}, BASE | {"is_encoder_decoder": True}, BASE | {"num_kv_shared_layers": 2},
    BASE | {"attention_chunk_size": 8192}, BASE | {"sliding_window": 4096}, BASE | {"per_layer_config": {"0": {}}},
    BASE | {"architectures": ["LlamaForSequenceClassification"]}, BASE | {"layer_types": ["linear_attention"] * 32},
    load_config("deepseek-v2-lite") | {"moe_layer_freq": 2},
], ids=str)
def test_architectures_outside_the_table_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedArchitectureError) as caught:
        predict_memory(config, "bf16")
    assert "measure" in caught.value.remedy


@pytest.mark.parametrize("config", [
    {key: value for key, value in BASE.items() if key != "vocab_size"},
    {key: value for key, value in MIXTRAL.items() if key != "num_local_experts"},
    BASE | {"hidden_size": 0}, BASE | {"hidden_size": -1}, BASE | {"hidden_size": "4096"}, BASE | {"hidden_size": 4096.0},
    BASE | {"hidden_size": True}, BASE | {"hidden_size": None}, BASE | {"hidden_size": float("nan")}, BASE | {"num_hidden_layers": 10**6},
    BASE | {"num_attention_heads": 31}, BASE | {"num_key_value_heads": 5}, BASE | {"tie_word_embeddings": "yes"},
    BASE | {"tie_word_embeddings": None}, BASE | {"layer_types": ["full_attention"]}, BASE | {"layer_types": "full_attention"},
    BASE | {"architectures": "LlamaForCausalLM"}, MIXTRAL | {"num_experts": 3}, MIXTRAL | {"num_experts_per_tok": 9},
    load_config("mistral-7b-v0.1") | {"sliding_window": "4096"}, small("gemma2", sliding_window=None),
    small("qwen2_moe", use_sliding_window=True, sliding_window=None),
    small("smollm3", use_sliding_window=True, sliding_window=4, no_rope_layers=[1]),
    small("qwen3_moe", mlp_only_layers="all"), small("qwen2", use_sliding_window=True, max_window_layers=-1),
], ids=lambda config: str({key: value for key, value in config.items() if BASE.get(key) != value})[:60])
def test_values_that_cannot_be_sizes_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(BadConfigError) as caught:
        predict_memory(config, "nf4")
    assert caught.value.remedy


@pytest.mark.parametrize("method", [{"quant_method": "awq"}, {"quant_method": "fp8", "weight_block_size": [128, 128]}, {"bits": 4}, "gptq"])
def test_a_quantized_checkpoint_is_refused_by_name(method: Any) -> None:
    with pytest.raises(AlreadyQuantizedError, match="already quantized") as caught:
        predict_memory(BASE | {"quantization_config": method}, "bf16")
    if isinstance(method, dict) and "quant_method" in method:
        assert method["quant_method"] in str(caught.value)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "torn.json").write_text('{"model_type": "lla')
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").mkdir()
    for name in ("torn.json", "list.json", "deep.json", "binary.json", "empty", "absent.json"):
        with pytest.raises(BadConfigError):
            load_config(tmp_path / name)
    with pytest.raises(BadConfigError, match=r"Did you mean 'qwen2.5-7b'\?"):
        load_config("qwen-2.5-7b")
    for odd in (None, 3, ["llama"]):
        with pytest.raises(BadConfigError):
            load_config(odd)


def test_arguments_are_checked() -> None:
    with pytest.raises(ContextTooLongError, match="131,072"):
        predict_memory(BASE, "bf16", context=131_073)
    assert predict_memory(BASE, "bf16", context=131_072).context == 131_072
    assert predict_memory(BASE, "bf16").context == 8192 and predict_memory(small("olmo2"), "bf16").context == 2048
    with pytest.raises(UnknownSchemeError, match="nf4"):
        predict_memory(BASE, "nf-4")
    for option in ({"batch": 0}, {"batch": -1}, {"batch": 1.5}, {"batch": True}, {"batch": "2"}, {"context": 0}, {"context": 2.0},
                   {"kv_dtype": "fp4"}, {"kv_dtype": None}, {"compute_dtype": "int8"}):
        with pytest.raises(BadInputError):
            predict_memory(BASE, "nf4", **option)  # type: ignore[arg-type]
    for gpu in (0, -1, math.nan, math.inf, "24", None, True):
        with pytest.raises(BadInputError):
            fits(gpu, BASE, "nf4")  # type: ignore[arg-type]
        with pytest.raises(BadInputError):
            recommend(BASE, gpu)  # type: ignore[arg-type]
    for reserve in (-0.1, 1, math.nan, "0"):
        with pytest.raises(BadInputError):
            fits(24, BASE, "nf4", reserve=reserve)  # type: ignore[arg-type]
    with pytest.raises(BadInputError):
        recommend(BASE, 24, 8192, 0)


def test_dtypes_of_what_is_not_quantized(torch: Any) -> None:
    half = predict_memory(BASE, "bf16").weights
    assert predict_memory(BASE, "none").weights == half
    assert predict_memory(BASE | {"torch_dtype": "float32"}, "none").weights == 2 * half
    assert predict_memory(BASE | {"torch_dtype": torch.float32}, "none").weights == 2 * half
    wide, narrow = (predict_memory(BASE, "nf4", compute_dtype=dtype).weights for dtype in (torch.float32, "fp16"))
    assert wide - narrow == 2 * count_parameters(BASE)["kept"]
    unknown = {key: value for key, value in BASE.items() if key != "torch_dtype"}
    with pytest.raises(BadConfigError, match="dtype"):
        predict_memory(unknown, "none")
    assert predict_memory(unknown, "none", compute_dtype="float16").weights == half
    with pytest.raises(BadInputError, match="not float32"):
        predict_memory(BASE, "bf16", compute_dtype="float32")
    with pytest.raises(BadInputError):
        predict_memory(BASE | {"torch_dtype": "float8_e4m3fn"}, "none")


JUNK = st.one_of(st.none(), st.booleans(), st.integers(-5, 10**13), st.floats(), st.text(max_size=5), st.lists(st.integers(0, 3), max_size=3),
                 st.dictionaries(st.text(max_size=3), st.integers(), max_size=2))


@settings(PROPERTY, max_examples=250)
@given(kind=st.sampled_from(FAMILIES), data=st.data())
def test_any_config_is_answered_or_refused_with_a_reason(kind: str, data: st.DataObject) -> None:
    names = sorted({*small(kind), *model_memory._FAMILIES[kind].defaults, *model_memory._UNMODELLED, "layer_types", "architectures",
                    "quantization_config", "torch_dtype", "moe_layer_freq", "_name_or_path", "num_experts", "num_local_experts"} - {"model_type"})
    config = small(kind)
    for name in data.draw(st.lists(st.sampled_from(names), max_size=3, unique=True)):
        config[name] = data.draw(JUNK, label=name)
    try:
        estimate = predict_memory(config, data.draw(st.sampled_from(SCHEMES)))
    except BadInputError as error:
        assert error.problem and error.remedy
    else:
        parts = (estimate.weights, estimate.kv_cache, estimate.activations, estimate.overhead)
        assert all(isinstance(part, int) and part > 0 for part in parts) and estimate.total == sum(parts)


# --- decisions ----------------------------------------------------------------------------------------------------------

@settings(PROPERTY, max_examples=60)
@given(name=st.sampled_from(known_configs()), scheme=st.sampled_from(SCHEMES), context=st.integers(1, 8000), batch=st.integers(1, 50),
       more=st.integers(1, 150))
def test_more_tokens_or_requests_never_need_less(name: str, scheme: str, context: int, batch: int, more: int) -> None:
    one = predict_memory(name, scheme, context=context, batch=batch)
    assert predict_memory(name, scheme, context=context + more, batch=batch).total >= one.total
    assert predict_memory(name, scheme, context=context, batch=batch + more).total >= one.total
    assert predict_memory(name, scheme, context=context, batch=batch, kv_dtype="fp8").total <= one.total


@settings(PROPERTY, max_examples=60)
@given(name=st.sampled_from(known_configs()), gpu=st.floats(1, 200), context=st.integers(1, 8192), concurrency=st.integers(1, 20))
def test_the_recommended_scheme_is_the_first_that_fits(name: str, gpu: float, context: int, concurrency: int) -> None:
    answer = recommend(name, gpu, context, concurrency)
    order = list(answer.estimates)
    assert order == ["bf16", "int8", "nf4", "nf4-double"]
    fitting = [scheme for scheme in order if fits(gpu, name, scheme, context=context, batch=concurrency)]
    assert answer.scheme == (fitting[0] if fitting else None)
    assert [answer.estimates[scheme].fits(gpu) for scheme in order] == [scheme in fitting for scheme in order]
    json.dumps(answer.to_dict())


def test_the_ways_out_are_true_and_tight() -> None:
    answer = recommend("qwen2.5-32b", 24, 8192, 2)
    assert answer.scheme is None
    sentence = next(reason for reason in answer.reasons if "context of at most" in reason)
    tokens = int(sentence.split("at most ")[1].split()[0].replace(",", ""))
    assert fits(24, "qwen2.5-32b", "nf4-double", context=tokens, batch=2)
    assert not fits(24, "qwen2.5-32b", "nf4-double", context=tokens + 1, batch=2)
    other = next(reason for reason in answer.reasons if "largest shipped model" in reason).rstrip(".").split(" fits is ")[1]
    name, scheme = other.split(" in ")
    assert fits(24, name, scheme, context=8192, batch=2) and count_parameters(name)["total"] < count_parameters("qwen2.5-32b")["total"]


def test_room_for_more_requests_is_true_and_tight() -> None:
    answer = recommend("llama-3.1-8b", 24, 4096)
    assert answer.scheme == "bf16"
    sentence = next(reason for reason in answer.reasons if "room for" in reason)
    most = int(sentence.split("room for ")[1].split()[0].replace(",", ""))
    assert fits(24, "llama-3.1-8b", "bf16", context=4096, batch=most)
    assert not fits(24, "llama-3.1-8b", "bf16", context=4096, batch=most + 1)


def test_nothing_fits_on_a_tiny_gpu_and_the_answer_says_so() -> None:
    answer = recommend("llama-3.1-70b", 0.5, 8192)
    assert answer.scheme is None and "no scheme fits" in str(answer)
    assert not any("would fit on" in reason for reason in answer.reasons)    # activations alone are too much for each GPU


def test_the_reserve_counts() -> None:
    total = predict_memory("llama-3.1-8b", "bf16", context=512).total
    gib = total / 2**30
    assert fits(gib * (1 + 1e-12), "llama-3.1-8b", "bf16", context=512, reserve=0)
    assert not fits(gib, "llama-3.1-8b", "bf16", context=512)


# --- shapes of the results ------------------------------------------------------------------------------------------------

def test_estimates_print_themselves(tmp_path: Path) -> None:
    estimate = predict_memory("mixtral-8x7b", "nf4", context=4096, batch=2)
    assert isinstance(estimate, MemoryEstimate)
    for text in (str(estimate), estimate._repr_markdown_()):
        assert "mixtral-8x7b" in text and f"{estimate.total / 2**30:.2f} GiB" in text and "8 experts" in text
    record = json.loads(json.dumps(estimate.to_dict()))
    assert record["total"] == record["weights"] + record["kv_cache"] + record["activations"] + record["overhead"]
    assert pickle.loads(pickle.dumps(estimate)) == estimate
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(BASE))
    for source in (folder, folder / "config.json", BASE | {"_name_or_path": str(folder)}):
        assert predict_memory(source, "bf16").model == "my-model"    # a name, never a path of this machine


def test_errors_survive_pickling() -> None:
    with pytest.raises(UnsupportedArchitectureError) as caught:
        predict_memory({"model_type": "t5"}, "bf16")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_predictions_need_neither_torch_nor_transformers() -> None:
    program = (
        "import sys\n"
        "from llmops_ref.model_memory import predict_memory, recommend\n"
        "predict_memory('llama-3.1-8b', 'nf4'); recommend('qwen2.5-72b', 24, 4096, 2)\n"
        "assert not {'torch', 'transformers', 'bitsandbytes'} & set(sys.modules), 'heavy imports'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
