"""llmops_ref.huggingface: the same text streamed or not, usage that can be trusted, and a loader check that has teeth."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import HumanMessage, SystemMessage

from llmops_ref import engine as engine_module
from llmops_ref import huggingface as module
from llmops_ref.core import BadInputError, ContextTooLongError, ModelNotFetchedError
from llmops_ref.engine import CHAT_FILE, Engine, chat_folder
from llmops_ref.huggingface import ModelLoadError, TransformersChat, compare_first_tokens, embedded_as_transformers

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parent.parent
QUESTION = "What is the capital of France?"
QUESTIONS = [
    QUESTION,
    "What does a bank account cost?",
    "Name a colour.",
    "How do I report a stolen card?",
    "What is 2 + 2?",
    "Write one sentence about the sea.",
    "Who can open an account?",
    "What is an overdraft?",
]


@pytest.fixture(scope="module")
def folder():
    return embedded_as_transformers()


@pytest.fixture(scope="module")
def chat(folder):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield TransformersChat.from_pretrained(folder, device="cpu", max_tokens=12)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def engine():
    with Engine(chat_folder() / CHAT_FILE.name, threads=1, context=512) as running:
        yield running


def merge(chunks):
    "The chunks of a stream added up."
    chunks = list(chunks)
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    return total


def prompt_ids(chat, question):
    "Token ids of a question in the chat template, shape (1, tokens)."
    messages = [{"role": "user", "content": question}]
    return chat.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]


def greedy(chat, question, limit):
    "New token ids, chosen one by one without `generate`."
    ids = prompt_ids(chat, question)
    new = []
    with torch.inference_mode():
        while len(new) < limit and (not new or new[-1] != chat.tokenizer.eos_token_id):
            new.append(int(chat.model(ids).logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([[new[-1]]])], 1)
    return new


# ---- the answer


@pytest.mark.parametrize("question", [QUESTION, "What is 2 + 2?"])
def test_text_and_usage_are_those_of_plain_greedy_decoding(chat, question):
    new = greedy(chat, question, 12)
    message = chat.invoke(question)
    assert message.content == chat.tokenizer.decode(new, skip_special_tokens=True) != ""
    prompt = prompt_ids(chat, question).shape[1]
    assert message.usage_metadata == {"input_tokens": prompt, "output_tokens": len(new), "total_tokens": prompt + len(new)}


@pytest.mark.parametrize("stop", [None, ["France"], [".", "zzz"], ["never said"]])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}])
def test_a_stream_adds_up_to_the_answer(chat, stop, options):
    whole = chat.invoke(QUESTION, stop=stop, **options)
    chunks = list(chat.stream(QUESTION, stop=stop, **options))
    total = merge(chunks)
    assert total.content == whole.content
    assert total.usage_metadata == whole.usage_metadata
    assert total.response_metadata["finish_reason"] == whole.response_metadata["finish_reason"]
    assert not [string for string in stop or [] if string in total.content]
    if stop is None:
        assert len([chunk for chunk in chunks if chunk.content]) > 2


def test_callbacks_see_every_piece(chat):
    from langchain_core.callbacks import BaseCallbackHandler

    class Seen(BaseCallbackHandler):
        def __init__(self):
            self.pieces = []

        def on_llm_new_token(self, token, **named):
            self.pieces.append(token)

    seen = Seen()
    text = "".join(chunk.content for chunk in chat.stream(QUESTION, config={"callbacks": [seen]}))
    assert "".join(seen.pieces) == text != ""


def test_the_conversation_matters(chat):
    plain = chat.invoke([HumanMessage("What is your name?")])
    other = chat.invoke([SystemMessage("You are Nora, a bank clerk."), HumanMessage("What is your name?")])
    assert plain.usage_metadata["input_tokens"] != other.usage_metadata["input_tokens"]
    assert plain.content != other.content


@pytest.mark.parametrize("limit", [1, 5])
def test_an_answer_cut_off_says_so(chat, limit):
    message = chat.invoke("Write one sentence about the sea.", max_tokens=limit)
    assert message.usage_metadata["output_tokens"] == limit
    assert message.response_metadata["finish_reason"] == "length"
    assert merge(chat.stream("Write one sentence about the sea.", max_tokens=limit)).response_metadata["finish_reason"] == "length"


def test_an_answer_that_ends_by_itself_says_so(chat):
    message = chat.invoke("What is 2 + 2?", max_tokens=60)
    assert message.usage_metadata["output_tokens"] < 60
    assert message.response_metadata["finish_reason"] == "stop"


def test_an_answer_that_just_fits_is_not_called_cut_off(chat):
    needed = chat.invoke("What is 2 + 2?", max_tokens=60).usage_metadata["output_tokens"]
    message = chat.invoke("What is 2 + 2?", max_tokens=needed)
    assert message.usage_metadata["output_tokens"] == needed
    assert message.response_metadata["finish_reason"] == "stop"


def test_a_seed_repeats_and_another_differs(chat):
    texts = [chat.invoke("Write one sentence about the sea.", temperature=1.5, seed=seed).content for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1] and len(set(texts)) > 1


def test_sampling_leaves_the_callers_random_numbers_alone(chat):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    chat.invoke(QUESTION, temperature=1.0, max_tokens=2)
    assert torch.equal(torch.get_rng_state(), before)


# ---- stop strings


def without(pieces, stop):
    return list(module._without_stop_strings(pieces, stop))


LETTERS = st.text("ab€", max_size=4)


@settings(max_examples=300)
@given(st.lists(LETTERS, max_size=8), st.text("ab€", min_size=1, max_size=3))
def test_a_stop_string_ends_the_text_wherever_the_pieces_are_cut(pieces, stop):
    text = "".join(pieces)
    assert "".join(without(pieces, [stop])) == text.partition(stop)[0]


@settings(max_examples=300)
@given(st.lists(LETTERS, max_size=8), st.lists(st.text("ab€", min_size=1, max_size=3), max_size=3))
def test_several_stop_strings_never_show_and_nothing_else_is_lost(pieces, stop):
    text, shown = "".join(pieces), "".join(without(pieces, stop))
    assert text.startswith(shown)
    assert not [string for string in stop if string in shown]
    rest = text[len(shown) :]
    assert (shown == text) if not [s for s in stop if s in text] else rest.startswith(tuple(stop))


@given(st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=8))
def test_nothing_is_held_back_without_stop_strings_and_all_is_read(pieces):
    assert without(pieces, []) == pieces
    rest = iter([*pieces, "STOP", *pieces])
    without(rest, ["STOP"])
    assert list(rest) == []


def test_pieces_come_as_soon_as_they_are_safe():
    stream = module._without_stop_strings(iter(["hello ", "wor", "ld"]), ["XY"])
    assert next(stream) == "hello"


# ---- bad input


@pytest.mark.parametrize("ask", [TransformersChat.invoke, lambda *a, **n: list(TransformersChat.stream(*a, **n))])
@pytest.mark.parametrize(("question", "options"), [("fee " * 9000, {}), ("Hello", {"max_tokens": 8190})])
def test_a_prompt_without_room_is_refused_before_any_work(chat, monkeypatch, ask, question, options):
    monkeypatch.setattr(chat.model, "generate", None)
    with pytest.raises(ContextTooLongError, match=r"8192.*Shorten"):
        ask(chat, question, **options)


def test_a_base_model_is_refused(chat, monkeypatch):
    monkeypatch.setattr(chat.tokenizer, "chat_template", None)
    with pytest.raises(BadInputError, match=r"no chat template.*instruction-tuned"):
        chat.invoke("Hello")


def test_a_folder_that_holds_no_model_is_refused(tmp_path, folder):
    with pytest.raises(ModelLoadError, match=r"could not load .*config\.json"):
        TransformersChat.from_pretrained(tmp_path)
    for file in folder.iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelLoadError, match="safetensors"):
        TransformersChat.from_pretrained(tmp_path, device="cpu")


def test_a_truncated_weight_file_is_refused(tmp_path, folder):
    for file in folder.iterdir():
        with file.open("rb") as source:
            (tmp_path / file.name).write_bytes(source.read(5_000_000))
    with pytest.raises(ModelLoadError):
        TransformersChat.from_pretrained(tmp_path, device="cpu")


# ---- the conversion


def test_a_converted_model_is_found_without_torch(folder):
    script = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
from llmops_ref.huggingface import embedded_as_transformers
print(embedded_as_transformers())
"""
    paths = os.pathsep.join([os.environ["PYTHONPATH"], str(ROOT)])
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.stdout.strip() == str(folder), done.stderr


def test_converting_what_was_not_fetched_says_how_to_fetch_it(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMOPS_REF_CACHE", str(tmp_path))

    def refuse(*arguments, **named):
        raise AssertionError("a download began")

    monkeypatch.setattr(engine_module, "_download_wheel", refuse)
    with pytest.raises(ModelNotFetchedError, match="fetch-models"):
        embedded_as_transformers()


# ---- threads, abandoned streams and errors on the way


def workers():
    return {thread for thread in threading.enumerate() if thread.name.endswith("(work)")}


def test_an_abandoned_stream_stops_generating(chat, monkeypatch):
    lengths, original = [], chat.model.generate

    def recorded(**arguments):
        ids = original(**arguments)
        lengths.append(ids.shape[1] - arguments["input_ids"].shape[1])
        return ids

    monkeypatch.setattr(chat.model, "generate", recorded)
    stream = chat.stream("Write a long story about the sea.", max_tokens=300)
    while not next(stream).content:
        pass
    assert len(workers()) == 1
    stream.close()
    assert workers() == set() and len(lengths) == 1 and lengths[0] < 100
    assert chat.invoke(QUESTION, max_tokens=2).content


@pytest.mark.parametrize("after", [0, 1])
def test_an_error_while_generating_reaches_the_reader_and_frees_the_model(chat, after):
    def broken(**arguments):
        for _ in range(after):
            arguments["streamer"].put(arguments["input_ids"])
            arguments["streamer"].put(torch.tensor([504]))
        raise RuntimeError("out of memory")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat.model, "generate", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            list(chat.stream(QUESTION))
        if not after:
            with pytest.raises(RuntimeError, match="out of memory"):
                chat.invoke(QUESTION)
    assert workers() == set()
    assert chat.invoke(QUESTION, max_tokens=2).content


def test_threads_share_a_model_one_generation_at_a_time(chat, monkeypatch):
    jobs = [(question, seed) for seed in (1, 2) for question in QUESTIONS[:3]]
    ask = lambda job: chat.invoke(job[0], temperature=1.0, seed=job[1], max_tokens=6).content    # noqa: E731
    serial = [ask(job) for job in jobs]
    inside, most, original = [], [], chat.model.generate

    def counted(**arguments):
        inside.append(1)
        most.append(len(inside))
        try:
            return original(**arguments)
        finally:
            inside.pop()

    monkeypatch.setattr(chat.model, "generate", counted)
    with ThreadPoolExecutor(4) as pool:
        streamed = pool.submit(lambda: "".join(c.content for c in chat.stream(QUESTION, max_tokens=6)))
        assert list(pool.map(ask, jobs)) == serial
    assert streamed.result() == chat.invoke(QUESTION, max_tokens=6).content
    assert max(most) == 1


# ---- the parity check


def test_both_engines_agree_on_tokens_and_nearly_on_probabilities(chat, engine):
    results = compare_first_tokens(chat, engine, QUESTIONS)
    assert len(results) == len(QUESTIONS) and all(result.same_tokens for result in results)
    divergences = [result.divergence for result in results]
    assert np.median(divergences) < 0.05 and min(divergences) >= 0
    assert all(result.same_choice for result in results if result.gap > 1)


def test_a_damaged_model_stands_out(chat, engine):
    sound = np.median([result.divergence for result in compare_first_tokens(chat, engine, QUESTIONS[:4])])
    weight = chat.model.model.layers[10].mlp.down_proj.weight
    original = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.mul_(4)
        damaged = np.median([result.divergence for result in compare_first_tokens(chat, engine, QUESTIONS[:4])])
    finally:
        with torch.no_grad():
            weight.copy_(original)
    assert damaged > 5 * sound and damaged > 0.1


def test_another_tokenizer_is_noticed(chat, engine, monkeypatch):
    monkeypatch.setattr(type(engine), "tokenize", lambda self, text: [1, 2, 3])
    assert not compare_first_tokens(chat, engine, [QUESTION])[0].same_tokens


@settings(max_examples=100)
@given(st.lists(st.floats(-8, 8), min_size=12, max_size=12), st.lists(st.floats(-8, 8), min_size=12, max_size=12), st.integers(1, 12))
def test_divergence_is_zero_for_equals_and_never_negative(one, other, top):
    p, q = (np.array(logits) - np.logaddexp.reduce(logits) for logits in (one, other))
    best = np.argsort(-q)[:top]
    listed = {int(i): float(q[i]) for i in best}
    exact = float(np.sum(np.exp(p) * (p - q)))
    assert -1e-9 <= module._divergence(p, listed) <= exact + 1e-6
    assert module._divergence(q, listed) == pytest.approx(0, abs=1e-6)
    if top == 12:
        assert module._divergence(p, listed) == pytest.approx(exact, abs=1e-6)
