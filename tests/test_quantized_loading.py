"""llmops_ref.quantized_loading: every scheme loads and answers, and what cannot work says so before the weights are read."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmops_ref import quantized_loading as module
from llmops_ref.core import BadInputError
from llmops_ref.huggingface import ModelLoadError, TransformersChat, embedded_as_transformers
from llmops_ref.model_memory import AlreadyQuantizedError, predict_memory, stored_bytes
from llmops_ref.models import load_chat_model
from llmops_ref.number_formats import SCHEMES, UnknownSchemeError, dequantize, quantize
from llmops_ref.quantized_loading import (
    NotEnoughMemoryError,
    QuantizationBackendError,
    UnsupportedSchemeError,
    load_quantized,
    load_record,
    quantize_experts,
    quantized_linear,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.usefixtures("one_thread")
QUANTIZED = [scheme for scheme in SCHEMES if scheme not in ("none", "bf16")]


def tiny(kind="llama", **fields):
    "A small random model of one architecture, in bfloat16."
    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**shape, **fields})
    return transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("tiny")
    tiny().save_pretrained(target)
    return target


@pytest.fixture
def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def logits(model):
    with torch.inference_mode():
        return model(torch.arange(3, 40)[None]).logits.float()


MIXTURES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16, "decoder_sparse_step": 1},
}


# --- what loads ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_local_folder_loads_in_every_scheme_and_answers_almost_as_before(folder, scheme):
    reference = logits(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))
    loaded = load_quantized(folder, scheme, device="cpu")
    error = float((logits(loaded) - reference).norm() / reference.norm())
    assert error <= {"none": 0.0, "bf16": 0.0, "int8": 0.03}.get(scheme, 0.3)
    assert (error > 0) == (scheme in QUANTIZED)    # else nothing was quantized
    assert load_record(loaded).scheme == scheme and load_record(loaded).seconds > 0
    assert not loaded.training


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_embedded_model_has_the_predicted_footprint(scheme):
    loaded = load_quantized("embedded", scheme, device="cpu")
    predicted = predict_memory(embedded_as_transformers() / "config.json", scheme, context=1).weights
    assert stored_bytes(loaded) == load_record(loaded).weights == pytest.approx(predicted, rel=0.02)


@pytest.mark.parametrize("scheme", QUANTIZED)
@pytest.mark.parametrize("kind", MIXTURES)
def test_the_experts_of_a_mixture_are_quantized_too(kind, scheme, tmp_path):
    model = tiny(kind, **MIXTURES[kind])
    model.save_pretrained(tmp_path)
    loaded = load_quantized(tmp_path, scheme, device="cpu")
    reference = logits(model)
    assert float((logits(loaded) - reference).norm() / reference.norm()) < 0.3
    share = 0.75 if scheme == "int8" else 0.6    # embeddings and head stay, and they are a good part of a tiny model
    assert stored_bytes(loaded) < share * stored_bytes(model)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 12), st.integers(0, 1000))
def test_replaced_experts_compute_what_the_fused_ones_did(top_k, tokens, seed):
    torch.manual_seed(seed)
    model = tiny("mixtral", **{**MIXTURES["mixtral"], "num_experts_per_tok": top_k}).float()
    ids = torch.randint(0, 300, (1, tokens))
    with torch.inference_mode():
        before = model(ids).logits

        def as_linear(weight):
            layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight = torch.nn.Parameter(weight.clone())
            return layer

        assert quantize_experts(model, as_linear) == 2
        assert torch.allclose(model(ids).logits, before, atol=1e-5)


@pytest.mark.parametrize("scheme", QUANTIZED)
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (33, 20), (128, 48), (64, 33), (20, 128)])
def test_a_layer_of_any_shape_multiplies_with_its_dequantized_weights(scheme, shape):
    torch.manual_seed(1)
    weight, x, bias = torch.randn(shape), torch.randn(5, shape[1]), torch.randn(shape[0])
    layer = quantized_linear(weight, scheme, compute_dtype=torch.float32, bias=bias)
    stored = torch.from_numpy(dequantize(quantize(weight.half().float().numpy() if scheme == "int8" else weight.numpy(), scheme)))
    wanted = x @ stored.reshape(shape).T + bias
    with torch.inference_mode():
        assert float((layer(x) - wanted).norm() / wanted.norm()) < 0.02    # 8-bit activations, or bfloat16 products


def test_the_compute_dtype_is_that_of_what_stays_unquantized(folder):
    loaded = load_quantized(folder, "nf4", compute_dtype=torch.float32, device="cpu")
    assert loaded.get_input_embeddings().weight.dtype == torch.float32
    assert load_quantized(folder, "nf4", device="cpu").get_input_embeddings().weight.dtype == torch.bfloat16


# --- as a chat model ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat():
    return load_chat_model("huggingface:embedded", quantization="nf4", device="cpu", max_tokens=8)


def test_a_quantized_chat_streams_what_it_answers_and_counts_its_tokens(chat):
    assert isinstance(chat, TransformersChat) and chat.model_name == "embedded-nf4"
    whole = chat.invoke("What is the capital of France?")
    pieces = list(chat.stream("What is the capital of France?"))
    total = pieces[0]
    for piece in pieces[1:]:
        total += piece
    assert total.content == whole.content and total.usage_metadata == whole.usage_metadata
    assert whole.usage_metadata["output_tokens"] == 8 and whole.response_metadata["finish_reason"] == "length"


def test_a_quantized_chat_keeps_to_seeds_and_stop_strings(chat):
    sampled = [chat.invoke("Name a colour.", temperature=1.0, seed=seed).content for seed in (1, 1, 2, 3)]
    assert sampled[0] == sampled[1] and len(set(sampled)) > 1
    whole = chat.invoke("What is the capital of France?").content
    cut = whole[3:6]
    assert chat.invoke("What is the capital of France?", stop=[cut]).content == whole[: whole.index(cut)]


def test_the_embedded_weights_are_had_through_transformers_without_a_scheme():
    chat = load_chat_model("huggingface:embedded", device="cpu")
    assert chat.model.dtype == torch.float32


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "meant"), [("nf5", "nf4"), ("NF4", "nf4"), ("4bit", "Use one of"), ("nf4_double", "nf4-double"), ("", "Use one of")])
def test_a_misspelt_scheme_is_refused_with_the_nearest_name(folder, name, meant):
    with pytest.raises(UnknownSchemeError, match=meant):
        load_quantized(folder, name)
    with pytest.raises(UnknownSchemeError):
        load_chat_model(f"huggingface:{folder}", quantization=name)


def test_a_device_that_is_not_there_is_refused(folder):
    absent = "cuda:7" if torch.cuda.is_available() else "cuda"
    with pytest.raises(QuantizationBackendError, match="no device"):
        load_quantized(folder, "nf4", device=absent)
    with pytest.raises(BadInputError, match="no kind of device"):
        load_quantized(folder, "nf4", device="gpu0")
    with pytest.raises(QuantizationBackendError):
        load_quantized(folder, "bf16", device="meta")


def test_a_device_without_kernels_is_refused_for_quantized_schemes_alone(folder, monkeypatch):
    monkeypatch.setattr(module, "_bitsandbytes", lambda: SimpleNamespace(supported_torch_devices={"cuda"}))
    with pytest.raises(QuantizationBackendError, match="no nf4 kernels for 'cpu'"):
        load_quantized(folder, "nf4", device="cpu")
    load_quantized(folder, "bf16", device="cpu")


def test_a_model_that_does_not_fit_is_refused_with_what_it_needs(folder, monkeypatch):
    need = predict_memory(folder, "nf4", context=1).weights
    psutil = pytest.importorskip("psutil")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=need - 1))
    with pytest.raises(NotEnoughMemoryError, match=r"need .* GiB in nf4, and .* GiB are free"):
        load_quantized(folder, "nf4", device="cpu")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * need))
    load_quantized(folder, "nf4", device="cpu")


def test_a_wider_compute_dtype_is_part_of_what_is_needed(folder, monkeypatch):
    psutil = pytest.importorskip("psutil")
    need = predict_memory(folder, "nf4", context=1, compute_dtype="float32").weights
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=need - 1))
    load_quantized(folder, "nf4", device="cpu")
    with pytest.raises(NotEnoughMemoryError):
        load_quantized(folder, "nf4", compute_dtype=torch.float32, device="cpu")


def test_a_config_whose_memory_cannot_be_predicted_loads_all_the_same(copy_of):
    config = json.loads((copy_of / "config.json").read_text())
    del config["dtype"]
    (copy_of / "config.json").write_text(json.dumps(config))
    assert load_record(load_quantized(copy_of, "none", device="cpu")).scheme == "none"


def test_running_out_of_memory_while_loading_is_the_same_error(folder, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(NotEnoughMemoryError, match="which needs"):
        load_quantized(folder, "nf4", device="cpu")


def test_a_quantized_checkpoint_is_not_quantized_again(copy_of):
    config = json.loads((copy_of / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (copy_of / "config.json").write_text(json.dumps(config))
    with pytest.raises(AlreadyQuantizedError, match="quantized already"):
        load_quantized(copy_of, "int8", device="cpu")


def test_experts_of_another_layout_are_refused_with_the_share_that_would_stay(tmp_path):
    tiny("gpt_oss", num_local_experts=4, num_experts_per_tok=2, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e4}).save_pretrained(
        tmp_path
    )
    with pytest.raises(UnsupportedSchemeError, match=r"leave \d+% of the weights .*experts"):
        load_quantized(tmp_path, "nf4", device="cpu")
    load_quantized(tmp_path, "bf16", device="cpu")


@pytest.mark.parametrize(("sparse", "apart"), [([], True), ([0, 1], False)])
def test_experts_are_taken_apart_where_the_model_has_some_whatever_its_config_counts(sparse, apart):
    config = tiny("qwen3_moe", **MIXTURES["qwen3_moe"], mlp_only_layers=sparse).config
    assert module.check_architecture(config, "nf4") is apart
    assert module.check_architecture(config, "bf16") is False


def test_a_kernel_that_cannot_take_the_architecture_is_found_out_at_once(folder, monkeypatch):
    def refuse(self, x):
        raise RuntimeError("shape '[64, 0]' is invalid")

    monkeypatch.setattr(module._bitsandbytes().nn.Linear4bit, "forward", refuse)
    with pytest.raises(UnsupportedSchemeError, match="cannot run LlamaForCausalLM in nf4 on cpu"):
        load_quantized(folder, "nf4", device="cpu")


def test_a_folder_without_weights_or_config_is_refused(copy_of, tmp_path):
    (copy_of / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="no weights"):
        load_quantized(copy_of, "nf4", device="cpu")
    (copy_of / "config.json").unlink()
    with pytest.raises(ModelLoadError, match=r"no config.json"):
        load_quantized(copy_of, "nf4", device="cpu")
    with pytest.raises(ModelLoadError, match="no folder"):
        load_quantized(tmp_path / "absent", "nf4", device="cpu")


def test_pickled_weights_are_not_opened(copy_of):
    (copy_of / "model.safetensors").rename(copy_of / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="does not unpickle"):
        load_quantized(copy_of, "bf16", device="cpu")


@settings(max_examples=20, deadline=None)
@given(keep=st.floats(0, 0.99))
def test_a_cut_off_file_is_refused(folder, tmp_path_factory, keep):
    broken = shutil.copytree(folder, tmp_path_factory.mktemp("cut") / "model")
    whole = (folder / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(ModelLoadError, match="damaged"):
        load_quantized(broken, "nf4", device="cpu")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("scheme", ["bf16", "int8", "nf4"])
def test_weights_that_are_not_finite_are_refused_by_name(folder, tmp_path, value, scheme):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=r"model.layers.1.mlp.up_proj.weight .* NaN or infinite"):
        load_quantized(tmp_path, scheme, device="cpu")


def test_a_checkpoint_that_lacks_a_tensor_is_refused(folder, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    safetensors.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"lacks weights: model.layers.1.mlp.up_proj.weight"):
        load_quantized(tmp_path, "nf4", device="cpu")


def test_a_config_of_no_known_kind_is_refused(copy_of):
    config = json.loads((copy_of / "config.json").read_text())
    (copy_of / "config.json").write_text(json.dumps({**config, "model_type": "no-such-model"}))
    with pytest.raises(ModelLoadError, match="could not load"):
        load_quantized(copy_of, "nf4", device="cpu")


def test_bf16_computes_in_bf16(folder):
    with pytest.raises(BadInputError, match="bf16"):
        load_quantized(folder, "bf16", compute_dtype=torch.float32, device="cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["llama", *MIXTURES])
def test_every_scheme_loads_on_a_gpu(tmp_path, kind, scheme):
    model = tiny(kind, **MIXTURES.get(kind, {}))
    model.save_pretrained(tmp_path)
    loaded = load_quantized(tmp_path, scheme, device="cuda")
    with torch.inference_mode():
        found = loaded(torch.arange(3, 40, device="cuda")[None]).logits.float().cpu()
    assert float((found - logits(model)).norm() / logits(model).norm()) < 0.3
