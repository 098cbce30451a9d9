"""llmops_ref.quantization: ratios that survive a busy machine, quality against its definitions, and refusals."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmops_ref import quantization as module
from llmops_ref.core import BadInputError, ContextTooLongError
from llmops_ref.engine import CHAT_FILE, Engine, chat_folder
from llmops_ref.huggingface import embedded_as_transformers
from llmops_ref.quantization import (
    ChoiceQuestion,
    Measurement,
    NotFiniteError,
    QualityDelta,
    Spread,
    choose,
    compare_qualities,
    compare_quality,
    handbook_questions,
    measure,
    measure_together,
    quality_table,
)
from llmops_ref.quantized_loading import load_quantized

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ["A customer may hold at most three current accounts in a sole name.", "A lost card is replaced within five working days."]


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(embedded_as_transformers())


@pytest.fixture(scope="module")
def embedded():
    return {scheme: load_quantized("embedded", scheme, device="cpu") for scheme in ("none", "bf16", "nf4")}


def tiny(tokenizer, seed=0, **fields):
    "A small random model over the embedded model's vocabulary."
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256}
    config = transformers.LlamaConfig(**{**shape, "vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, **fields})
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


# --- speed --------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10), st.floats(0.1, 10)), min_size=1, max_size=7))
def test_what_slows_both_models_of_a_round_does_not_touch_the_ratio(rounds):
    plain = Spread(tuple(a for a, _, _ in rounds)).over(Spread(tuple(b for _, b, _ in rounds)))
    slowed = Spread(tuple(a * slow for a, _, slow in rounds)).over(Spread(tuple(b * slow for _, b, slow in rounds)))
    assert slowed.values == pytest.approx(plain.values)
    assert plain.low <= plain.median <= plain.high


def test_ratios_of_different_rounds_are_refused():
    with pytest.raises(BadInputError, match="same rounds"):
        Spread((1.0, 2.0)).over(Spread((1.0,)))


def test_rounds_are_interleaved_and_a_slower_model_is_seen_to_be_slower(tokenizer, monkeypatch):
    models = {"fast": tiny(tokenizer), "slow": tiny(tokenizer)}
    order = []
    real = module._generate

    def generate(model, ids, new_tokens):
        order.append("slow" if model is models["slow"] else "fast")
        return real(model, ids, new_tokens)

    def wait(*arguments):
        time.sleep(0.02)

    models["slow"].register_forward_pre_hook(wait)
    monkeypatch.setattr(module, "_generate", generate)
    found = measure_together(models, tokenizer, prompts=TEXTS, new_tokens=4, repeats=3, warmup=2, progress=False)
    assert order == ["fast", "fast", "slow", "slow"] * 5
    assert len(found["fast"].decode.values) == 3    # warm-up rounds are not kept
    assert found["slow"].decode.over(found["fast"].decode).high < 1
    assert found["slow"].first_token.median > found["fast"].first_token.median


def test_a_measurement_counts_prompt_and_new_tokens(tokenizer, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(clock)))    # every look at the clock takes a second
    ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids
    run = module._generate(tiny(tokenizer), ids, 5)
    assert run.prompt_tokens == ids.shape[1] and run.new_tokens == 5
    assert (run.first_token, run.decode_seconds) == (2.0, 4.0)    # prompt and first token; then four more
    prefill, decode = module._spreads([[run, run]])[1:]
    assert prefill.values == (ids.shape[1] / 2,) and decode.values == (1.0,)


def test_measure_reports_memory_load_time_and_versions(embedded, tokenizer):
    found = measure(embedded["nf4"], tokenizer, prompts=TEXTS[:1], new_tokens=3, repeats=2, progress=False)
    assert isinstance(found, Measurement) and found.name == "nf4" and found.load_seconds > 0
    assert found.peak_memory is None or found.peak_memory >= 0.9 * found.weights
    assert {"torch", "transformers", "bitsandbytes"} <= set(found.versions) and found.device == "cpu" and found.threads == 1
    assert json.loads(json.dumps(found.to_dict()))["weights"] == found.weights
    assert "| nf4 |" in found._repr_markdown_()


def test_where_no_peak_can_be_had_the_warm_up_runs_all_the_same(tokenizer, monkeypatch):
    calls = []
    real = module._generate
    monkeypatch.setattr(module, "_generate", lambda *arguments: calls.append(1) or real(*arguments))
    monkeypatch.setattr(module.Path, "write_text", lambda *arguments: (_ for _ in ()).throw(PermissionError()))
    found = measure(tiny(tokenizer), tokenizer, prompts=TEXTS[:1], new_tokens=2, repeats=2, progress=False)
    assert found.peak_memory is None and len(calls) == 3 and len(found.decode.values) == 2


def test_the_embedded_engine_is_measured_beside_the_others(embedded, tokenizer):
    with Engine(chat_folder() / CHAT_FILE.name, threads=1, context=512) as engine:
        found = measure_together({"bf16": embedded["bf16"], "engine": engine}, tokenizer, prompts=TEXTS[:1], new_tokens=4, repeats=1, progress=False)
    assert found["engine"].weights == (chat_folder() / CHAT_FILE.name).stat().st_size
    assert found["engine"].peak_memory is None and found["engine"].decode.median > 0


@pytest.mark.parametrize(
    ("prompts", "error", "text"),
    [
        ([], BadInputError, "no prompts"),
        ("one string", BadInputError, "no prompts"),
        (["a fee", "  "], BadInputError, "Text 1 is empty"),
        (["fee " * 300], ContextTooLongError, "Text 0 has 30[0-9] tokens and 4 more .* takes 256"),
    ],
)
def test_prompts_that_cannot_be_measured_are_refused(tokenizer, prompts, error, text):
    with pytest.raises(error, match=text):
        measure(tiny(tokenizer), tokenizer, prompts=prompts, new_tokens=4, progress=False)


@pytest.mark.parametrize("options", [{"repeats": 0}, {"warmup": 0}, {"new_tokens": 1}])
def test_too_few_rounds_or_tokens_are_refused(tokenizer, options):
    with pytest.raises(BadInputError, match="Too few"):
        measure(tiny(tokenizer), tokenizer, prompts=TEXTS, progress=False, **options)


# --- quality ------------------------------------------------------------------------------------------------------


def test_a_model_loses_nothing_against_itself(embedded):
    delta = compare_quality(embedded["bf16"], embedded["bf16"], TEXTS, questions=handbook_questions(2), progress=False)
    assert delta.divergence.value == 0 and delta.top1_agreement.value == 1 and delta.perplexity_ratio.value == 1
    assert delta.accuracy == delta.reference_accuracy and delta.mcnemar_p == 1.0
    assert delta.texts == 2 and delta.questions == 2


def test_the_figures_are_those_of_the_definitions(embedded, tokenizer):
    reference, candidate = embedded["none"], embedded["nf4"]
    delta = compare_quality(reference, candidate, TEXTS, questions=(), progress=False)
    losses, divergences, agreed = {"r": [], "c": []}, [], []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.inference_mode():
            p, q = (torch.log_softmax(model(ids).logits[0].double(), -1)[:-1] for model in (reference, candidate))
        for name, logs in (("r", p), ("c", q)):
            losses[name] += [-float(logs[place, token]) for place, token in enumerate(ids[0, 1:])]
        divergences += torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).tolist()
        agreed += (p.argmax(-1) == q.argmax(-1)).tolist()
    assert delta.tokens == len(agreed)
    assert delta.reference_perplexity == pytest.approx(math.exp(np.mean(losses["r"])), rel=1e-4)
    assert delta.perplexity == pytest.approx(math.exp(np.mean(losses["c"])), rel=2e-2)    # bfloat16 kernels
    assert delta.divergence.value == pytest.approx(np.mean(divergences), rel=0.1)
    assert delta.top1_agreement.value == pytest.approx(np.mean(agreed), abs=0.08)
    assert delta.divergence.low <= delta.divergence.value <= delta.divergence.high
    assert delta.accuracy is None and delta.mcnemar_p is None


def test_more_noise_means_more_loss(tokenizer):
    reference = tiny(tokenizer)
    candidates = {}
    for size in (0.001, 0.01, 0.1):
        candidates[str(size)] = candidate = tiny(tokenizer)
        torch.manual_seed(5)
        with torch.no_grad():
            for weight in candidate.parameters():
                weight += size * torch.randn_like(weight)
    found = compare_qualities(reference, candidates, TEXTS, tokenizer=tokenizer, questions=(), progress=False)
    divergences = [delta.divergence.value for delta in found.values()]
    assert divergences == sorted(divergences) and divergences[0] > 0
    assert all(name in quality_table(found) for name in candidates)


def test_each_candidate_gets_its_own_figures(embedded):
    together = compare_qualities(embedded["none"], {"a": embedded["bf16"], "b": embedded["nf4"]}, TEXTS, questions=(), progress=False)
    alone = compare_quality(embedded["none"], embedded["nf4"], TEXTS, questions=(), progress=False)
    assert isinstance(alone, QualityDelta) and together["b"] == alone and together["a"] != alone
    assert json.loads(json.dumps(alone.to_dict()))["texts"] == 2


def test_lost_and_won_questions_are_counted_on_the_right_side(embedded, monkeypatch):
    right = {id(embedded["none"]): [1, 1, 1, 0], id(embedded["nf4"]): [1, 0, 0, 1]}
    asked = {key: iter(values) for key, values in right.items()}
    monkeypatch.setattr(module, "choose", lambda model, tokenizer, question: next(asked[id(model)]))
    questions = [ChoiceQuestion("c", "q", ("a", "b"), 1)] * 4
    delta = compare_quality(embedded["none"], embedded["nf4"], TEXTS[:1], questions=questions, progress=False)
    assert (delta.reference_accuracy, delta.accuracy) == (0.75, 0.5)
    assert (delta.only_reference_right, delta.only_candidate_right) == (2, 1) and delta.mcnemar_p == 1.0
    assert delta.accuracy_difference.value == -0.25 and delta.accuracy_difference.low < -0.25 < delta.accuracy_difference.high


@pytest.mark.parametrize(
    ("texts", "options", "error", "text"),
    [
        ([], {}, BadInputError, "no prompts"),
        (["fine", ""], {}, BadInputError, "Text 1 is empty"),
        (["a", "two tokens"], {}, BadInputError, "Text 0 is a single token"),
        (TEXTS, {"max_tokens": 1}, ContextTooLongError, "takes? 2 to 256"),
        (TEXTS, {"max_tokens": 257}, ContextTooLongError, "takes? 2 to 256"),
    ],
)
def test_texts_that_cannot_be_compared_are_refused(tokenizer, texts, options, error, text):
    with pytest.raises(error, match=text):
        compare_quality(tiny(tokenizer), tiny(tokenizer), texts, tokenizer=tokenizer, questions=(), progress=False, **options)


def test_models_of_different_vocabularies_are_refused(tokenizer):
    with pytest.raises(BadInputError, match="different vocabularies"):
        compare_quality(tiny(tokenizer), tiny(tokenizer, vocab_size=300), TEXTS, tokenizer=tokenizer, questions=(), progress=False)


def test_a_model_that_answers_nan_is_refused(tokenizer):
    broken = tiny(tokenizer)
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with pytest.raises(NotFiniteError, match="NaN or infinite"):
        compare_quality(tiny(tokenizer), broken, TEXTS, tokenizer=tokenizer, questions=(), progress=False)
    with pytest.raises(NotFiniteError):
        choose(broken, tokenizer, ChoiceQuestion("A fee.", "What?", ("a", "b"), 0))


# --- choices ------------------------------------------------------------------------------------------------------


def test_handbook_questions_are_answerable_from_their_context():
    questions = handbook_questions(count=1000)
    assert len(questions) > 20 and len({one.question for one in questions}) == len(questions)
    for one in questions:
        assert len(one.choices) == 4 and 0 <= one.answer < 4
    assert len({one.answer for one in questions}) == 4    # the right one has no fixed place
    assert handbook_questions(5) == handbook_questions(5) and len(handbook_questions(5)) == 5


def test_a_choice_is_scored_as_if_it_were_alone(embedded, tokenizer):
    choices = ["Three.", "At most three current accounts in a sole name.", "No."]
    together = module._choice_log_probabilities(embedded["none"], tokenizer, "How many accounts?", choices)
    alone = [module._choice_log_probabilities(embedded["none"], tokenizer, "How many accounts?", [choice])[0] for choice in choices]
    assert together == pytest.approx(alone, abs=1e-3)


def test_an_obvious_choice_is_made(embedded, tokenizer):
    context = "A lost card is replaced within five days. The branch in Harbour Street opens at nine. A Plus account costs 4 pounds a month."
    choices = ("The branch opens at nine.", "A lost card is replaced within five days.", "A Plus account costs 4 pounds a month.")
    for answer, question in enumerate(("When does the branch open?", "How fast is a lost card replaced?", "What does a Plus account cost?")):
        assert choose(embedded["none"], tokenizer, ChoiceQuestion(context, question, choices, answer)) == answer


def test_a_question_beyond_the_window_is_refused(tokenizer):
    with pytest.raises(ContextTooLongError, match="takes 256"):
        choose(tiny(tokenizer), tokenizer, ChoiceQuestion("fee " * 300, "What?", ("a", "b"), 0))


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(4)))
def test_the_order_of_the_choices_does_not_matter(embedded, tokenizer, order):
    question = handbook_questions(3)[1]
    moved = ChoiceQuestion(question.context, question.question, tuple(question.choices[index] for index in order), 0)
    assert moved.choices[choose(embedded["bf16"], tokenizer, moved)] == question.choices[choose(embedded["bf16"], tokenizer, question)]
