"""Judges: cards that refuse what cannot be relied on, chat judges that never raise, labels that survive a crash."""

import datetime
import json
import math
import random
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from sklearn.metrics import cohen_kappa_score

from llmops_ref.corrected_estimates import ChanceJudgeError
from llmops_ref.evaluation_data import Claim, EvaluationDataset, EvaluationRow, LabelledClaim, load_labelled
from llmops_ref.judges import (
    ChatJudge,
    JudgeCard,
    JudgeCardError,
    JudgeIdentity,
    LabellingWidget,
    LabelsError,
    _kappa,
    _kappa_score,
    agreement,
    calibrate,
    claims_of,
    corrected_rate,
    identity,
    labels_hash,
    prefer,
)
from llmops_ref.scores import Failure

TODAY = datetime.date(2026, 3, 1)


def claims(texts: int = 20, each: int = 4) -> list[LabelledClaim]:
    "Half of each text's claims supported; passages in two pieces."
    return [LabelledClaim(f"{text}#{place}", Claim(f"claim {place} of {text} " + "word " * (place % 3), (f"text {text}", "more")), place % 2 == 0, f"t{text}")
            for text in range(texts) for place in range(each)]


class Rule:
    name, model, prompt, threshold = "rule", "none", "a prompt", 0.5

    def __init__(self, scores: Any) -> None:
        self.scores = scores

    def judge(self, asked: list[Claim]) -> list[Any]:
        return [self.scores(claim) for claim in asked]


LABELS = {item.claim.text: item.label for item in claims()}


def knowing(share: float) -> Rule:
    "Right on this share of the claims."
    generator = random.Random(0)
    known = {text: label if generator.random() < share else not label for text, label in LABELS.items()}
    return Rule(lambda claim: 0.8 * known[claim.text] + 0.1)


# kappa


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60))
@settings(max_examples=60, deadline=None)
def test_kappa_is_that_of_scikit_learn_and_zero_where_that_is_undefined(pairs: list[tuple[bool, bool]]) -> None:
    right, said = (np.array(side) for side in zip(*pairs, strict=True))
    if len(set(right)) == len(set(said)) == 1 and right[0] == said[0]:
        assert _kappa(right, said) == 0.0
    else:
        assert _kappa(right, said) == pytest.approx(cohen_kappa_score(right, said))


def test_kappas_interval_covers_the_truth_with_clusters_and_without() -> None:
    generator, held = np.random.default_rng(0), {1: 0, 5: 0}
    for size in held:
        for _ in range(300):
            groups = np.repeat(np.arange(200 // size), size)
            easy = np.repeat(generator.random(200 // size) < 0.5, size)    # a text is easy as a whole
            right = generator.random(200) < 0.5
            said = np.where(generator.random(200) < np.where(easy, 0.95, 0.65), right, ~right)
            found = _kappa_score(right, said, list(groups), 0.95)
            held[size] += found.ci_low <= 0.6 <= found.ci_high
    assert all(0.915 <= count / 300 <= 0.985 for count in held.values()), held


# calibration


def test_a_judge_that_says_yes_to_everything_has_no_kappa_and_never_passes() -> None:
    for answer in (1.0, 0.0, 0.5):
        judge = Rule(lambda claim, answer=answer: answer)
        card = calibrate(judge, claims(), today=TODAY)
        assert card.kappa.estimate == card.kappa.ci_low == card.kappa.ci_high == 0.0 and card.auroc.ci_low == card.auroc.ci_high == 0.5
        assert any("chance" in reason for reason in card.problems(judge, min_kappa=-1.0, today=TODAY))
    assert calibrate(Rule(lambda claim: 1.0), claims()).sensitivity.estimate == 1.0


def test_a_good_judge_passes_the_bar_that_its_interval_clears() -> None:
    judge = knowing(0.95)
    card = calibrate(judge, claims(), today=TODAY)
    assert card.kappa.ci_low < card.kappa.estimate < card.kappa.ci_high and card.clusters == 20 and card.positives == 40
    assert card.problems(judge, min_kappa=0.5, today=TODAY) == []
    between = (card.kappa.ci_low + card.kappa.estimate) / 2
    assert card.problems(judge, min_kappa=between, today=TODAY)    # the estimate clears it, the lower bound does not
    assert card.auroc.estimate > 0.9 and card.failures.estimate == 0


@pytest.mark.parametrize("returned, kind", [(math.nan, "not_a_number"), (1.5, "out_of_range"), (-0.1, "out_of_range"), ("yes", "not_a_number"), (None, "not_a_number"), (Failure("timeout"), "timeout")])
def test_what_is_no_score_becomes_a_failure_of_its_kind(returned: Any, kind: str) -> None:
    judge = Rule(lambda claim: returned)
    card = calibrate(judge, claims(), today=TODAY)
    assert card.kappa.failure_kinds == {kind: 80} and card.failures.estimate == 1.0 and math.isnan(card.kappa.estimate)
    reasons = card.problems(judge, min_kappa=-1.0, max_failures=1.0, today=TODAY)
    assert reasons and "no verdict" in reasons[0]
    assert JudgeCard.from_dict(json.loads(json.dumps(card.to_dict(), allow_nan=False))).problems(judge, today=TODAY)


def test_failures_count_as_disagreements() -> None:
    hard = {item.claim.text for item in claims()[::8]}    # a judge that is right where it answers
    judge = Rule(lambda claim: Failure("parse") if claim.text in hard else 0.9 * LABELS[claim.text])
    card = calibrate(judge, claims(), today=TODAY)
    assert card.kappa.estimate == 1.0 and card.kappa.as_misses is not None and card.kappa.as_misses.estimate < 0.8
    assert card.problems(judge, min_kappa=0.9, max_failures=1.0, today=TODAY)
    assert any("12% of the claims" in reason and "10 parse" in reason for reason in card.problems(judge, min_kappa=0.1, today=TODAY))


@pytest.mark.parametrize("labelled", [[], [item for item in claims() if item.label], [item for item in claims() if not item.label], [*claims(), claims()[0]]])
def test_labels_that_nothing_can_be_measured_on_are_refused(labelled: list[LabelledClaim]) -> None:
    with pytest.raises(LabelsError):
        calibrate(knowing(1.0), labelled)


def test_a_judge_that_returns_too_few_values_is_refused() -> None:
    judge = Rule(lambda claim: 1.0)
    judge.judge = lambda asked: [1.0]  # type: ignore[method-assign]
    with pytest.raises(LabelsError, match="1 values for 80 claims"):
        calibrate(judge, claims())


# biases


def test_a_preference_for_length_and_for_its_own_is_measured_and_a_fair_judge_has_neither() -> None:
    labelled, own = claims(), {item.id for item in claims() if int(item.cluster[1:]) % 2}
    mine = {item.claim.text for item in labelled if item.id in own}
    by_length = calibrate(Rule(lambda claim: 0.1 * len(claim.text.split())), labelled, own=own)
    by_author = calibrate(Rule(lambda claim: 0.3 + 0.2 * LABELS[claim.text] + 0.25 * (claim.text in mine)), labelled, own=own)
    fair = calibrate(Rule(lambda claim: 0.8 * LABELS[claim.text]), labelled, own=own)
    assert by_length.length_bias.estimate == pytest.approx(0.5) and by_length.length_bias.ci_low > 0.4
    assert by_author.self_preference.estimate == pytest.approx(0.25) and by_author.self_preference.ci_low > 0.2
    assert abs(fair.length_bias.estimate) < 1e-9 and abs(fair.self_preference.estimate) < 1e-9
    assert calibrate(knowing(1.0), labelled).self_preference is None


class Pairwise(Rule):
    def __init__(self, chooses: Any) -> None:
        super().__init__(lambda claim: 0.9 * LABELS[claim.text])
        self.chooses, self.asked = chooses, 0

    def choose(self, question: str, first: str, second: str) -> Any:
        self.asked += 1
        return self.chooses(first, second)


def test_a_position_biased_judge_is_caught_and_averages_to_a_half() -> None:
    judge = Pairwise(lambda first, second: 0.9)
    preference = prefer(judge, "which?", "a", "b")
    assert preference.probability == pytest.approx(0.5) and preference.consistent is False
    card = calibrate(judge, claims(), pairs=10)
    assert card.position_consistency.estimate == 0.0 and card.first_place.estimate == 1.0
    assert judge.asked == 2 + 20
    better = Pairwise(lambda first, second: 0.8 if first < second else 0.2)
    assert prefer(better, "which?", "a", "b").probability == pytest.approx(0.8) and prefer(better, "which?", "b", "a").probability == pytest.approx(0.2)
    assert calibrate(better, claims()).position_consistency.estimate == 1.0


def test_a_pair_without_an_answer_in_one_order_is_a_failure() -> None:
    preference = prefer(Pairwise(lambda first, second: 0.9 if first == "a" else Failure("refused")), "which?", "a", "b")
    assert preference.probability == Failure("refused") and preference.consistent is None
    card = calibrate(Pairwise(lambda first, second: Failure("refused")), claims(), pairs=5)
    assert card.position_consistency.failures == 5


def test_a_judge_that_reads_only_the_first_passage_changes_its_mind() -> None:
    card = calibrate(Rule(lambda claim: float(claim.passages[0] == "more")), claims())
    assert card.position_consistency.estimate == 0.0 and card.first_place is None


# cards


def test_a_card_survives_the_disk_and_keeps_the_judges_identity(tmp_path: Path) -> None:
    judge = knowing(0.9)
    card = calibrate(judge, claims(), price=(1.0, 2.0), today=TODAY)
    card.save(tmp_path / "card.json")
    assert JudgeCard.load(tmp_path / "card.json") == card
    assert identity(judge) == JudgeIdentity(card.judge, card.model, card.prompt_hash, card.threshold) == identity(identity(judge))
    assert card.data_hash == labels_hash(claims()[::-1]) != labels_hash([replace(claims()[0], label=False), *claims()[1:]])
    assert card._repr_markdown_().count("\n") > 6


@pytest.mark.parametrize("field, value", [
    ("judge", ""), ("model", 3), ("prompt_hash", "abc"), ("data_hash", None), ("date", "yesterday"), ("date", "2026-02-31"), ("threshold", 2), ("threshold", True),
    ("n", 0), ("n", 2.5), ("positives", 80), ("clusters", 1000), ("kappa", None), ("kappa", {"estimate": 3}), ("failures", []), ("seconds_per_claim", "fast"),
    ("environment", None), ("position_consistency", 1),
])
def test_an_edited_card_is_refused_by_field(field: str, value: Any, tmp_path: Path) -> None:
    plain = calibrate(knowing(0.9), claims(), today=TODAY).to_dict() | {field: value}
    (tmp_path / "card.json").write_text(json.dumps(plain))
    with pytest.raises(JudgeCardError):
        JudgeCard.load(tmp_path / "card.json")


@pytest.mark.parametrize("change", [{"estimate": 1.5}, {"ci_low": 0.99, "estimate": 0.5}, {"n": "80"}, {"estimate": "high"}, {"failures": -1}])
def test_figures_that_cannot_be_are_refused(change: dict[str, Any]) -> None:
    plain = calibrate(knowing(0.9), claims(), today=TODAY).to_dict()
    plain["kappa"] = plain["kappa"] | change
    with pytest.raises(JudgeCardError, match="kappa"):
        JudgeCard.from_dict(plain)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'"card"', b"null", b"[" * 100_000])
def test_what_is_no_card_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "card.json").write_bytes(content)
    with pytest.raises(JudgeCardError):
        JudgeCard.load(tmp_path / "card.json")
    with pytest.raises(JudgeCardError):
        JudgeCard.load(tmp_path / "absent.json")


def test_every_way_of_being_stale_has_its_reason() -> None:
    judge = knowing(1.0)
    card = calibrate(judge, claims(), today=TODAY)
    who = identity(judge)
    assert card.problems(who, today=TODAY) == []
    wanted = {"the card is of": {"judge": replace(who, model="another")}, "the prompt has changed": {"judge": replace(who, prompt_hash="0" * 64)},
              "the threshold was": {"judge": replace(who, threshold=0.9)}, "other labels": {"data_hash": "0" * 64},
              "after today": {"today": TODAY - datetime.timedelta(days=1)}, "days old": {"today": TODAY + datetime.timedelta(days=181)}}
    for words, change in wanted.items():
        reasons = card.problems(**{"judge": who, "today": TODAY, **change})  # type: ignore[arg-type]
        assert len(reasons) == 1 and words in reasons[0]


# chat judges


class Scripted(BaseChatModel):
    "Says what a function of the prompt says; counts how many calls run at once."

    answer: Any
    running: Any = None

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> ChatResult:
        reply = self.answer(str(messages[-1].content))
        return ChatResult(generations=[ChatGeneration(message=reply if isinstance(reply, AIMessage) else AIMessage(reply))])


ONE = [Claim("The fee is £25.", ("The fee is £25.",))]


@pytest.mark.parametrize("said, wanted", [
    ('{"verdict": "yes"}', 1.0), ('{"verdict": "No"}', 0.0), ('Sure! {"verdict": "yes"} I hope this helps.', 1.0), ('{"verdict": true}', 1.0), ('```json\n{"verdict": "no"}\n```', 0.0),
    ("yes", "parse"), ("", "parse"), ('{"verdict": "ye', "parse"), ('{"verdict": "maybe"}', "parse"), ('{"verdict": null}', "parse"), ('{"answer": "yes"}', "parse"),
    ('{"verdict": ["yes"]}', "parse"), ("[]", "parse"), ("≋" * 1000, "parse"), ("{" * 5000 + "}" * 5000, "parse"), ("I'm sorry, I can't help with that.", "refused"),
    ("I cannot assist with this request.", "refused"), ("As an AI language model, I do not judge.", "refused"),
])
def test_each_reply_is_a_verdict_or_a_failure_of_its_kind(said: str, wanted: Any) -> None:
    (value,) = ChatJudge(Scripted(answer=lambda prompt: said)).judge(ONE)
    assert value == wanted if isinstance(wanted, float) else isinstance(value, Failure) and value.kind == wanted


@given(st.text(max_size=200))
@settings(max_examples=80, deadline=None)
def test_no_reply_raises(said: str) -> None:
    for mode in ("json", "choice"):
        (value,) = ChatJudge(Scripted(answer=lambda prompt: said), mode=mode).judge(ONE)
        assert isinstance(value, Failure) or value in (0.0, 1.0)


def logprobs(tokens: dict[str, float]) -> AIMessage:
    top = [{"token": token, "logprob": value} for token, value in tokens.items()]
    return AIMessage(next(iter(tokens)), response_metadata={"logprobs": {"content": [{**top[0], "top_logprobs": top}]}})


def test_a_choice_is_read_from_the_log_probabilities_of_the_two_words_alone() -> None:
    cases = [({"The": -0.1, " Yes": math.log(0.3), "yes": math.log(0.1), "No": math.log(0.1)}, 0.8), ({"no": -0.01}, 0.0), ({"The": -0.1, "A": -2.0}, "parse"), ({"yes": math.nan}, "parse")]
    for tokens, wanted in cases:
        (value,) = ChatJudge(Scripted(answer=lambda prompt, tokens=tokens: logprobs(tokens)), mode="choice").judge(ONE)
        assert value == pytest.approx(wanted) if isinstance(wanted, float) else isinstance(value, Failure) and value.kind == wanted
    assert ChatJudge(Scripted(answer=lambda prompt: "Yes."), mode="choice").judge(ONE) == [1.0]    # a server without them


def test_errors_of_the_server_are_failures_and_timeouts_are_told_apart() -> None:
    def raises(error: Exception) -> Any:
        def answer(prompt: str) -> str:
            raise error
        return answer

    late = ConnectionError("no answer")
    late.__cause__ = TimeoutError("read timed out")
    for error, kind in ((ConnectionError("gone"), "upstream"), (RuntimeError("500"), "upstream"), (TimeoutError(), "timeout"), (late, "timeout")):
        (value,) = ChatJudge(Scripted(answer=raises(error))).judge(ONE)
        assert isinstance(value, Failure) and value.kind == kind


def test_one_hanging_call_costs_one_claim_and_the_order_is_kept() -> None:
    released = threading.Event()

    def answer(prompt: str) -> str:
        if "number 3<" in prompt.replace("\n", "<"):
            released.wait(20)
        return '{"verdict": "yes"}' if "even" in prompt else '{"verdict": "no"}'

    asked = [Claim(f"{'even' if number % 2 == 0 else 'odd'} number {number}", ("p",)) for number in range(12)]
    values = ChatJudge(Scripted(answer=answer), workers=3, timeout=0.5).judge(asked)
    released.set()
    assert isinstance(values[3], Failure) and values[3].kind == "timeout"
    assert [value for place, value in enumerate(values) if place != 3] == [float(place % 2 == 0) for place in range(12) if place != 3]


def test_a_dead_server_is_not_asked_for_ever() -> None:
    released, calls = threading.Event(), []

    def answer(prompt: str) -> str:
        calls.append(prompt)
        released.wait(20)
        return "late"

    values = ChatJudge(Scripted(answer=answer), workers=2, timeout=0.05, patience=4).judge(ONE * 50)
    released.set()
    assert all(isinstance(value, Failure) and value.kind == "timeout" for value in values) and len(values) == 50
    assert len(calls) < 12 and values[-1].detail.startswith("not asked")


def test_calls_run_together_up_to_the_number_of_workers() -> None:
    together, most, lock, barrier = [0], [0], threading.Lock(), threading.Barrier(4, timeout=20)

    def answer(prompt: str) -> str:
        with lock:
            together[0] += 1
            most[0] = max(most[0], together[0])
        barrier.wait()    # breaks unless four are inside at once
        with lock:
            together[0] -= 1
        return '{"verdict": "yes"}'

    assert ChatJudge(Scripted(answer=answer), workers=4).judge(ONE * 8) == [1.0] * 8
    assert most[0] == 4


def test_tokens_are_counted_and_priced_and_the_prompt_changes_with_what_decides() -> None:
    def answer(prompt: str) -> AIMessage:
        return AIMessage('{"verdict": "yes"}', usage_metadata={"input_tokens": 90, "output_tokens": 10, "total_tokens": 100})

    judge = ChatJudge(Scripted(answer=answer))
    card = calibrate(judge, claims(texts=3), pairs=0, price=(2.0, 10.0))
    assert card.tokens_per_claim == 100 and card.cost_per_1000 == pytest.approx(1000 * (90 * 2 + 10 * 10) / 1e6)
    assert identity(judge) != identity(ChatJudge(Scripted(answer=answer), mode="choice")) != identity(ChatJudge(Scripted(answer=answer), mode="choice", options={"seed": 1}))
    assert isinstance(judge.judge([Claim(" ", ("p",)), Claim("c", ())])[0], Failure)


@pytest.mark.parametrize("settings", [{"threshold": 2}, {"workers": 0}, {"timeout": 0}, {"timeout": math.nan}, {"patience": 0}, {"mode": "guess"}])
def test_settings_that_make_no_judge_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="make no judge"):
        ChatJudge(Scripted(answer=str), **settings)


# corrected rates


def test_the_rate_is_corrected_by_labels_whatever_the_judge_says() -> None:
    labelled = claims(texts=60)
    generator = random.Random(1)
    scores = {item.id: min(1.0, 0.5 + 0.3 * item.label + 0.1 * generator.random()) for item in labelled}
    labels = {item.id: item.label for item in generator.sample(labelled, 60)}
    good = corrected_rate(scores, labels, population="these")
    flat = corrected_rate(dict.fromkeys(scores, 1.0), labels, population="these")
    assert good.uncorrected.estimate > 0.6 and good.ci_low <= 0.5 <= good.ci_high
    assert good.ci_high - good.ci_low < 0.7 * (flat.ci_high - flat.ci_low)
    assert flat.estimate == pytest.approx(np.mean(list(labels.values())))
    broken = scores | {labelled[0].id: Failure("parse")}
    assert corrected_rate(broken, labels).failures == 1


def test_the_card_corrects_and_only_its_own_judge() -> None:
    judge = knowing(0.9)
    card = calibrate(judge, claims(), today=TODAY)
    mostly = {f"r{number}": 0.9 if number < 83 else 0.1 for number in range(100)}
    found = corrected_rate(mostly, card=card, judge=judge)
    assert found.ci_low < found.estimate <= found.ci_high and found.uncorrected.estimate == pytest.approx(0.83) and found.estimate > 0.83
    with pytest.raises(JudgeCardError, match="cannot correct"):
        corrected_rate(mostly, card=card, judge=replace(identity(judge), prompt_hash="0" * 64))
    with pytest.raises(ChanceJudgeError):
        corrected_rate(mostly, card=calibrate(Rule(lambda claim: 1.0), claims()))


@pytest.mark.parametrize("labels", [None, {}, {"nowhere": True}, {"0#0": True}])
def test_labels_that_cannot_correct_are_refused(labels: Any) -> None:
    with pytest.raises(LabelsError):
        corrected_rate({item.id: 0.5 for item in claims()}, labels)


# labelling


def test_labels_are_on_disk_at_once_and_a_new_session_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    asked = [item.claim for item in claims(texts=3)]
    widget = LabellingWidget(asked, path, annotator="anna")
    order = []
    for number in range(5):
        order.append(widget.current.claim)
        (widget.supported if number % 2 else widget.not_supported)()
        assert len(load_labelled(path)) == number + 1
    kept = load_labelled(path)
    assert [item.claim for item in kept] == order and [item.label for item in kept] == [False, True, False, True, False] and {item.annotator for item in kept} == {"anna"}
    again = LabellingWidget(asked, path)
    assert len(again.file.labels) == 5 and again.current.claim == widget.current.claim
    while again.current:
        again.supported()
    again.supported()    # nothing is left: nothing happens
    assert len(load_labelled(path)) == len(asked) and "12 of 12" in again.text()


def test_undo_takes_back_also_what_an_earlier_session_wrote_and_skip_writes_nothing(tmp_path: Path) -> None:
    path, asked = tmp_path / "labels.jsonl", [item.claim for item in claims(texts=2)]
    first = LabellingWidget(asked, path)
    before = first.current
    first.supported()
    second = LabellingWidget(asked, path)
    second.undo()
    assert second.current.claim == before.claim and path.read_bytes() == b""
    second.undo()    # nothing left to undo
    second.skip()
    assert second.current.claim != before.claim and path.read_bytes() == b""
    for _ in range(len(asked) - 1):
        second.skip()
    assert second.current.claim == before.claim


def test_a_line_torn_by_a_crash_is_repaired_and_other_files_are_never_touched(tmp_path: Path) -> None:
    path, asked = tmp_path / "labels.jsonl", [item.claim for item in claims(texts=2)]
    LabellingWidget(asked, path).supported()
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:40])
    assert len(LabellingWidget(asked, path).file.labels) == 1 and path.read_bytes() == whole
    others = {"notes": b"my notes\n", "data": b'{"id": 1, "reference": "x"}\n', "unfinished": b"not json", "binary": b"\xff\xfe\x00", "other": whole.replace(b"claim", b"thing"), "list": b"[1]\n"}
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(LabelsError, match=name):
            LabellingWidget(asked, tmp_path / name)
        assert (tmp_path / name).read_bytes() == content


def test_two_windows_on_one_file_do_not_mix(tmp_path: Path) -> None:
    path, asked = tmp_path / "labels.jsonl", [item.claim for item in claims(texts=2)]
    one, two = LabellingWidget(asked, path), LabellingWidget(asked, path)
    one.supported()
    for action in (two.supported, two.not_supported):
        with pytest.raises(LabelsError, match="Somebody else"):
            action()
    assert len(load_labelled(path)) == 1


def test_the_widget_is_blind_escapes_and_has_working_buttons(tmp_path: Path) -> None:
    item = LabelledClaim("a", Claim("<b>fee</b> & more", ("<script>alert(1)</script>",), "what?"), True, "c")
    blind = LabellingWidget([item], tmp_path / "a.jsonl")
    assert "score" not in blind.text() and "<script>" not in blind.text() and "&lt;b&gt;fee" in blind.text() and "what?" in blind.text()
    assert "0.73" in LabellingWidget([item], tmp_path / "b.jsonl", scores={"a": 0.73}).text()
    shown, buttons = blind.widget().children
    supported = next(button for button in buttons.children if button.description == "supported")
    supported.click()
    assert "1 of 1" in shown.value and load_labelled(tmp_path / "a.jsonl")[0].label is True
    next(button for button in buttons.children if button.description == "undo").click()
    assert "0 of 1" in shown.value


def test_claims_come_from_the_answers_of_a_data_set_in_random_order(tmp_path: Path) -> None:
    rows = [EvaluationRow(f"q{number}", "How much?", f"The fee is £{number}. It is due monthly.", retrieved_contexts=("The fee.",), metadata={"document": "fees.md"}) for number in range(10)]
    dataset = EvaluationDataset((*rows, EvaluationRow("none", "What?", None), EvaluationRow("declined", "What?", "I cannot.", retrieved_contexts=("x",), metadata={"refused": True})))
    found = claims_of(dataset)
    assert len(found) == 20 and {item.cluster for item in found} == {"fees.md"} and len({item.id for item in found}) == 20
    widget = LabellingWidget(dataset, tmp_path / "labels.jsonl")
    assert [item.id for item in widget.claims] != [item.id for item in found] and sorted(item.id for item in widget.claims) == sorted(item.id for item in found)
    for bad in ([], [found[0], found[0]]):
        with pytest.raises(LabelsError):
            LabellingWidget(bad, tmp_path / "x.jsonl")


def test_agreement_of_two_annotators(tmp_path: Path) -> None:
    asked, paths = [item.claim for item in claims(texts=10)], [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for slip, path in enumerate(paths):
        widget = LabellingWidget(asked, path)
        while widget.current:
            wrong = slip and len(widget.file.labels) % 10 == 0
            (widget.supported if LABELS[widget.current.claim.text] != bool(wrong) else widget.not_supported)()
    found = agreement(*paths)
    assert found.estimate == pytest.approx(0.8, abs=0.02) and found.n == 40 and found.ci_low < found.estimate < found.ci_high
    assert agreement(paths[0], paths[0]).estimate == 1.0
    (tmp_path / "c.jsonl").write_text(json.dumps({"id": "z", "text": "t", "passages": ["p"], "label": True}) + "\n")
    with pytest.raises(LabelsError):
        agreement(paths[0], tmp_path / "c.jsonl")
