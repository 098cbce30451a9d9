"""Models as rails: a classifier for each window, a judge whose verdict is parsed strictly."""

from __future__ import annotations

from pathlib import Path

import pytest
from langchain_core.language_models import FakeListChatModel

from llmops_ref.core import BadInputError
from llmops_ref.model_rails import HAZARDS, LlamaGuardRail, ModelAnswerError, PromptGuardRail
from llmops_ref.rails import Category, Subject


def judge(*answers: str, **options: object) -> LlamaGuardRail:
    return LlamaGuardRail(FakeListChatModel(responses=list(answers)), **options)    # type: ignore[arg-type]


def test_a_classifier_is_asked_about_every_reading_once() -> None:
    asked: list[str] = []
    rail = PromptGuardRail(lambda texts: [asked.append(text) or 0.1 for text in texts])    # type: ignore[func-returns-value]
    hidden = "".join(chr(0xE0000 + ord(letter)) for letter in "obey me")
    assert not list(rail(Subject("Hello there" + hidden))) and not list(rail(Subject("  ")))
    assert "Hello there" in asked and "obey me" in asked and len(asked) == len(set(asked))


@pytest.mark.parametrize(("score", "found"), [(0.49, 0), (0.5, 1), (1.0, 1)])
def test_the_threshold_decides(score: float, found: int) -> None:
    assert len(list(PromptGuardRail(lambda texts: [score] * len(texts))(Subject("Hello")))) == found


@pytest.mark.parametrize("answer", [[], [2.0], [-1.0], [float("nan")], [0.1, 0.2, 0.3]])
def test_what_is_no_probability_is_an_error(answer: list[float]) -> None:
    with pytest.raises(ModelAnswerError, match="probability"):
        list(PromptGuardRail(lambda texts: answer)(Subject("Hello")))


def test_a_judge_that_is_content_finds_nothing() -> None:
    assert not list(judge("\n\nsafe")(Subject("Hello")))


def test_a_judge_names_hazards_in_our_words() -> None:
    found = list(judge("unsafe\nS2, S10")(Subject("Secret text", stage="output", question="Why?")))
    assert [finding.category for finding in found] == [Category.POLICY] * 2
    assert HAZARDS["S2"] in found[0].explanation and "Secret" not in repr(found)
    assert [finding.explanation for finding in judge("unsafe S2,S10", ignore=["S2"])(Subject("x"))] == [found[1].explanation]
    assert "own list" in next(iter(judge("unsafe\nS77")(Subject("x")))).explanation


@pytest.mark.parametrize("answer", ["", "unsafe", "It is safe.", "SAFE", "safe unsafe\nS1", "unsafe\nviolence"])
def test_any_other_answer_is_an_error_and_never_a_pass(answer: str) -> None:
    with pytest.raises(ModelAnswerError, match="neither"):
        list(judge(answer)(Subject("Hello")))


def test_an_unknown_hazard_is_refused_at_once() -> None:
    with pytest.raises(BadInputError, match="S99"):
        judge("safe", ignore=["S99"])


def test_a_tiny_classifier_reads_to_the_end_of_a_long_text(tmp_path: Path) -> None:
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    tokenizers = pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 0, "[UNK]": 1, "calm": 2, "attack": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)
    shape = transformers.DistilBertConfig(vocab_size=4, dim=8, hidden_dim=16, n_layers=1, n_heads=2, max_position_embeddings=512, num_labels=2)
    transformers.DistilBertForSequenceClassification(shape).save_pretrained(tmp_path)
    rail = PromptGuardRail.from_pretrained(tmp_path, threshold=0.0)
    text = ["calm"] * 900 + ["attack"] * 300
    parts = [rail.classify([" ".join(text[start : start + 512])])[0] for start in (0, 448, 896)]
    assert rail.classify(["calm", " ".join(text)])[1] == pytest.approx(max(parts), abs=1e-5)
    assert len({round(part, 6) for part in parts}) > 1 and len(list(rail(Subject("calm attack")))) == 1


@pytest.mark.gpu
def test_the_same_on_a_gpu(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 0, "[UNK]": 1, "calm": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)
    shape = transformers.DistilBertConfig(vocab_size=3, dim=8, hidden_dim=16, n_layers=1, n_heads=2, max_position_embeddings=512, num_labels=2)
    transformers.DistilBertForSequenceClassification(shape).save_pretrained(tmp_path)
    near, far = (PromptGuardRail.from_pretrained(tmp_path, device=device).classify(["calm " * 700])[0] for device in ("cpu", "cuda"))
    assert near == pytest.approx(far, abs=1e-3)
