"""The embedded judge of groundedness: its words, its signals, its fit, its answers, and what it says of bad input."""

import json
import threading
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmops_ref import groundedness
from llmops_ref.core import BadInputError
from llmops_ref.evaluation_data import Claim, LabelledClaim, load_labelled
from llmops_ref.groundedness import (
    FITTED,
    SIGNALS,
    Groundedness,
    GroundednessWeights,
    WeightsError,
    auroc,
    collect,
    cross_validated,
    fit_weights,
    load_signals,
    recalibrate,
    words_of,
)
from llmops_ref.scores import Failure

DATA = Path(str(resources.files("llmops_ref"))) / "data"
STORED = Path(__file__).parent.parent / "nbs" / "results" / "groundedness_signals.jsonl"
PASSAGE = (
    "## Disputes\n\nProvisional credit for disputes of £25 or more is paid within 10 working days. Cryptocurrency is not covered by the scheme. "
    "Pay in before 14:30 to avoid a payment being returned.\n\n| Account | App a day |\n|---|---|\n| Plus | £20,000 |\n| Premium | £50,000 |"
)


@pytest.fixture(scope="module")
def judge():
    return Groundedness.load()


@pytest.fixture(scope="module")
def stored():
    return load_signals(STORED)[0]


def values(judge, *texts, passages=(PASSAGE,)):
    return judge.judge([Claim(text, passages) for text in texts])


def synthetic(count=120, seed=0):
    "Rows whose first signal tells much; all others are noise."
    draw = np.random.default_rng(seed)
    return [{"set": "made", "id": str(number), "cluster": str(number // 6), "split": "dev", "label": bool(label), "kind": "", "length": 9,
             "signals": {name: float(draw.normal() + (2 * label if name == "numbers" else 0)) for name in SIGNALS}}
            for number, label in enumerate(draw.random(count) < 0.4)]


# --- words -------------------------------------------------------------------------------------------------------


def test_numbers_words_and_marks_are_read_one_way():
    def forms(text):
        return [word.form for word in words_of(text) if word.kind == "number"]

    assert forms("£1,000.00") == forms("1000 pounds") == ["1000"]
    assert forms("fourteen days") == forms("14 days") == ["14"]
    assert forms("at 14:30 on the 3rd") == ["14:30", "3"] and forms("007") == ["7"] and forms("0.50%") == ["0.5"]
    kinds = {word.form: word.kind for word in words_of("In May, Anna may not pay Premium fees")}
    assert kinds == {"in": "small", "may": "small", "anna": "name", "not": "negation", "pay": "word", "premium": "name", "fee": "word"} | {"may": kinds["may"]}
    assert [word.kind for word in words_of("In May it may rain") if word.form == "may"] == ["date", "small"]


def test_spans_of_time_agree_across_units():
    spans = {text: groundedness._durations(words_of(text)) for text in ("24 hours", "a fortnight", "14 working days", "two weeks", "£24 a day", "60 days", "two months")}
    assert spans["24 hours"] == [24] and spans["a fortnight"] == spans["14 working days"] == spans["two weeks"] == [336] and spans["£24 a day"] == []
    assert groundedness._durations(words_of("within one month")) == groundedness._durations(words_of("730 hours"))
    assert groundedness._foreign(spans["two months"], spans["60 days"]) == 0 and groundedness._foreign(spans["24 hours"], spans["60 days"]) == 1


@given(st.text(max_size=300))
@settings(max_examples=100, deadline=None)
def test_any_text_can_be_read(text):
    words = words_of(text)
    assert all(word.form for word in words)
    groundedness._durations(words)


# --- judging -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "wrong"), [
    ("Disputes of £25 or more get a provisional credit.", "Disputes of £250 or more get a provisional credit."),
    ("Cryptocurrency is not covered by the scheme.", "Cryptocurrency is covered by the scheme."),
    ("Pay in before 14:30 to avoid a returned payment.", "Pay in after 14:30 to avoid a returned payment."),
    ("Provisional credit is paid within 10 working days.", "Provisional credit is paid within 10 working hours."),
    ("Premium customers can send £50,000 a day in the app.", "Premium customers can send £80,000 a day in the app."),
])
def test_an_edit_that_makes_a_sentence_false_lowers_its_score(judge, right, wrong):
    high, low = values(judge, right, wrong)
    assert 0 <= low < high - 0.1 and high <= 1


def test_a_passage_on_something_else_supports_nothing(judge):
    off = values(judge, "Bananas are yellow and grow in warm countries.", "Paris is the capital of France.")
    assert max(off) < 0.3 < judge.threshold < values(judge, "Cryptocurrency is not covered by the scheme.")[0]


def test_an_answer_is_worth_its_weakest_sentence(judge):
    good, bad = "Cryptocurrency is not covered by the scheme.", "Disputes of £250 get a credit within 3 years."
    alone, low, both = values(judge, good, bad, f"{good} [1] {bad} I hope this helps!")
    assert both == pytest.approx(low) and low < alone
    found = judge.explain(Claim(f"1. {good} [2, 3]\n2. {bad}\nThank you for your question.", (PASSAGE,)))
    assert [sentence.text for sentence in found.sentences] == [f"{good}", bad] and found.weakest.text == bad and found.score == pytest.approx(low)
    assert "250" in found.weakest.missing and "dispute" in found.weakest.nearest
    assert list(found.weakest.pulls.values()) == sorted(found.weakest.pulls.values()) and "durations" in list(found.weakest.pulls)[:3]
    assert json.loads(json.dumps(found.to_dict()))["score"] == found.score and bad in found._repr_markdown_()


def test_a_score_does_not_depend_on_company_or_order(judge):
    claims = [Claim(text, (PASSAGE,)) for text in ("Cryptocurrency is covered.", "Plus customers send £20,000.", "Pay in early.")] + [Claim("It rains.", ("It rains in May.",))]
    together = judge.judge(claims)
    assert together == [judge.judge([claim])[0] for claim in claims] == judge.judge(claims[::-1])[::-1]
    assert judge.judge([]) == [] and judge.judge([replace(claims[0], question="Is it?")]) == together[:1]


def test_threads_share_a_judge(judge):
    claims = [Claim(f"Plus customers send £{number},000.", (PASSAGE,)) for number in (20, 30, 40)]
    wanted, found = judge.judge(claims), [None] * 4
    threads = [threading.Thread(target=lambda place=place: found.__setitem__(place, judge.judge(claims))) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [wanted] * 4


def test_signals_are_those_of_the_weakest_sentence_and_nan_where_there_is_no_score(judge):
    claims = [Claim("Cryptocurrency is not covered. Disputes of £250 get nothing.", (PASSAGE,)), Claim("", (PASSAGE,))]
    found = judge.signals(claims)
    assert set(found) == set(SIGNALS) and all(column.shape == (2,) and np.isnan(column[1]) for column in found.values())
    assert found["numbers"][0] < 0 and judge.weights.probability({name: column[0] for name, column in found.items()}) == judge.judge(claims)[0]


def test_what_decides_is_in_the_prompt(judge):
    other = Groundedness(replace(judge.weights, intercept=judge.weights.intercept + 1), threshold=0.7)
    assert other.prompt != judge.prompt == Groundedness.load().prompt and other.threshold == 0.7 and judge.name == "groundedness" and "MiniLM" in judge.model


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("claim", "kind"), [
    (Claim("", (PASSAGE,)), "missing_field"), (Claim("It is. [1]", (PASSAGE,)), "missing_field"), (Claim("I hope this helps!", (PASSAGE,)), "missing_field"),
    (Claim("Plus costs £8.", ()), "missing_field"), (Claim("Plus costs £8.", ("  \n", "")), "missing_field"), (Claim("Plus costs £8.", ("---\n***",)), "missing_field"),
    (Claim("Plus costs £8.", "one text"), "missing_field"), (Claim(None, (PASSAGE,)), "missing_field"), (Claim("Plus costs £8.", None), "missing_field"),
    (Claim("Plus costs £8.", (PASSAGE, None)), "missing_field"), (Claim("a" * 1_000_000, (PASSAGE,)), "out_of_range"), (Claim("Plus costs £8.", (PASSAGE * 1000,)), "out_of_range"),
    (Claim("Cats purr. " * 101, (PASSAGE,)), "out_of_range"), (Claim("Plus costs £8.", (" ".join(f"Account {number} is free." for number in range(1001)),)), "out_of_range"),
])
def test_a_claim_that_cannot_be_judged_fails_for_itself(judge, claim, kind):
    good = Claim("Cryptocurrency is not covered by the scheme.", (PASSAGE,))
    found = judge.judge([good, claim, good])
    assert isinstance(found[1], Failure) and found[1].kind == kind and found[1].detail and found[0] == found[2] > 0.5
    with pytest.raises(BadInputError, match="no score"):
        judge.explain(claim)


def test_hidden_characters_change_nothing(judge):
    plain, hidden, wide = values(judge, "Disputes of £250 get a credit.", "Dis\u00adputes\x00 of £2\u200b50 get a\u202e cre\ud800dit.", "Disputes of £２５０ get a credit.")
    assert plain == hidden == wide


def test_long_texts_are_read_whole_in_pieces(judge):
    padding = "word " * 390
    found = judge.explain(Claim(f"{padding}the fee is £999 {padding}", (padding,)))
    assert len(found.sentences) > 3 and found.score < min(sentence.score for sentence in found.sentences if "999" not in sentence.text)
    assert isinstance(values(judge, "x" * 5000)[0], float)


@given(st.text(max_size=120), st.lists(st.text(max_size=200), max_size=2))
@settings(max_examples=40, deadline=None)
def test_any_claim_has_a_score_or_a_failure(text, passages):
    found, = Groundedness.load().judge([Claim(text, tuple(passages))])
    assert isinstance(found, Failure) or 0 <= found <= 1


def test_one_claim_is_no_list(judge):
    for wrong in ("text", Claim("text", ("text",))):
        with pytest.raises(BadInputError, match="list"):
            judge.judge(wrong)


# --- ranking -----------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=4, max_size=40).filter(lambda rows: len({label for label, _ in rows}) == 2))
@settings(max_examples=30, deadline=None)
def test_auroc_is_that_of_scikit_learn(rows):
    from sklearn.metrics import roc_auc_score

    labels, scores = zip(*rows, strict=True)
    found = auroc(labels, scores, draws=50)
    assert found.estimate == pytest.approx(roc_auc_score(labels, scores)) and found.ci_low <= found.estimate <= found.ci_high and found.n == len(rows)


def test_claims_that_share_a_text_widen_the_interval():
    draw = np.random.default_rng(1)
    luck = np.repeat(draw.normal(size=20), 10)
    labels = luck + 0.3 * draw.normal(size=200) > 0
    scores = np.repeat(draw.normal(size=20), 10) + luck + 0.3 * draw.normal(size=200)
    alone, clustered = auroc(labels, scores), auroc(labels, scores, np.arange(200) // 10)
    assert alone.estimate == clustered.estimate and clustered.ci_high - clustered.ci_low > 1.3 * (alone.ci_high - alone.ci_low)
    assert clustered.clusters == 20 and alone.clusters is None and "clusters" in clustered.method


def test_the_interval_holds_the_truth_as_often_as_it_says():
    draw, held = np.random.default_rng(2), 0
    for _ in range(200):
        shift = draw.normal(size=40)[:, None]
        labels = draw.random((40, 6)) < 0.4
        scores = labels + shift + draw.normal(size=labels.shape)
        found = auroc(labels.ravel(), scores.ravel(), np.repeat(np.arange(40), 6), draws=400)
        held += found.ci_low <= 0.6915 <= found.ci_high    # P(N(1, 2 * 2) > 0) = Phi(1 / 2)
    assert 0.89 <= held / 200 <= 0.99


def test_failures_are_counted_and_ranked_wrong():
    labels, scores = [True, True, True, False, False, False], [0.9, 0.8, Failure("timeout"), 0.1, float("nan"), 0.3]
    found = auroc(labels, scores)
    assert found.estimate == 1 and found.n == 4 and found.failures == 2 and found.failure_kinds == {"not_a_number": 1, "timeout": 1}
    assert found.as_misses.estimate == pytest.approx(4 / 9) and found.as_misses.failures == 0
    assert found.ci_low < 0.9    # four claims in perfect order are no proof


def test_auroc_refuses_what_cannot_be_ranked():
    for labels, scores, clusters in (([True, True], [1, 2], None), ([True, False], [1], None), ([True, False], [1, 2], ["a"]), ([], [], None), ([True, False], [1, Failure("parse")], None)):
        with pytest.raises(BadInputError):
            auroc(labels, scores, clusters)


# --- fitting -----------------------------------------------------------------------------------------------------


def test_the_shipped_weights_follow_from_the_stored_signals(tmp_path, stored):
    again, shipped = recalibrate(STORED, tmp_path / "weights.json"), GroundednessWeights.load()
    assert np.allclose(again.weights, shipped.weights, atol=1e-4) and GroundednessWeights.load(tmp_path / "weights.json") == again
    assert shipped.names == FITTED and {"claims", "sha256", "from"} <= set(shipped.fitted_on["wikibio"]) == set(shipped.fitted_on["handbook"])
    assert not any(set(row) - {"set", "id", "cluster", "split", "label", "kind", "length", "signals"} for row in stored)    # no text


def test_the_stored_signals_are_those_of_the_code(stored):
    claims = {item.id: item for item in load_labelled(DATA / "groundedness_claims.jsonl")}
    rows = [row for row in stored if row["set"] == "handbook" and row["kind"] != "elsewhere"]
    assert [row["id"] for row in rows] == list(claims)
    for row, again in zip(rows[::20], collect([claims[row["id"]] for row in rows[::20]], elsewhere=False), strict=True):
        assert again["signals"] == pytest.approx(row["signals"], abs=2e-3) and again["label"] == row["label"] and again["cluster"] == row["cluster"]


def test_the_judge_ranks_better_than_chance_where_it_has_not_looked(stored):
    dev, weights = [row for row in stored if row["split"] == "dev"], GroundednessWeights.load()
    chances = cross_validated(dev, rounds=1)
    for name, floor in (("wikibio", 0.73), ("handbook", 0.7)):
        mask = [row["set"] == name and row["kind"] != "elsewhere" for row in dev]
        part = [row for row, kept in zip(dev, mask, strict=True) if kept]
        assert auroc([row["label"] for row in part], chances[mask], [row["cluster"] for row in part], draws=200).estimate > floor
    test = [row for row in stored if row["split"] == "test" and row["kind"] != "elsewhere"]
    found = auroc([row["label"] for row in test], [weights.probability(row["signals"]) for row in test], [row["cluster"] for row in test], draws=500)
    cosine = auroc([row["label"] for row in test], [row["signals"]["cosine"] for row in test], draws=10)
    assert found.ci_low > 0.6 and found.estimate > cosine.estimate + 0.1
    assert not {row["cluster"] for row in test} & {row["cluster"] for row in dev}


def test_cross_validation_finds_the_signal_and_never_sees_the_cluster():
    rows = synthetic()
    labels = [row["label"] for row in rows]
    assert auroc(labels, cross_validated(rows)).estimate > 0.85
    marked = [{**row, "signals": {**dict.fromkeys(SIGNALS, 0.0), "numbers": float(row["label"]) if row["cluster"] == "0" else 0.0}} for row in rows]
    held = cross_validated(marked, rounds=1, folds=20)    # only cluster 0 tells its labels: weights that saw it would use them
    first = [row["cluster"] == "0" for row in rows]
    assert np.ptp(held[first]) < 1e-6


def test_both_kinds_weigh_the_same_in_each_set():
    rows = synthetic(300)
    doubled = rows + [{**row, "id": row["id"] + "b"} for row in rows if row["label"]]
    one, two = fit_weights(rows), fit_weights(doubled)
    chances = np.array([[weights.probability(row["signals"]) for row in rows] for weights in (one, two)])
    assert np.abs(chances[0] - chances[1]).mean() < 0.02 and one.fitted_on["made"]["claims"] == 300
    assert np.mean([chances[0][[row["label"] is label for row in rows]].mean() for label in (True, False)]) == pytest.approx(0.5, abs=0.02)


def test_supported_claims_beside_another_text_are_unsupported():
    labelled = [LabelledClaim("a1", Claim("Cats purr.", ("Cats purr loudly.",)), True, "a"), LabelledClaim("b1", Claim("Dogs moo.", ("Dogs bark.",)), False, "b")]
    rows = collect(labelled, source="pets")
    assert [(row["id"], row["label"], row["kind"]) for row in rows] == [("a1", True, ""), ("b1", False, ""), ("a1~elsewhere", False, "elsewhere")]
    assert rows[0]["signals"]["share in one"] == 1 and rows[2]["signals"]["share in one"] == 0
    assert len(collect(labelled[:1])) == len(collect(labelled[:1], elsewhere=False)) == 1


def test_weights_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(WeightsError, match="too few"):
        fit_weights(synthetic(12))
    with pytest.raises(BadInputError, match="a9"):
        collect([LabelledClaim("a9", Claim("", ("text",)), True, "a")])
    good = json.loads((DATA / "groundedness.json").read_text(encoding="utf-8"))
    broken = [None, "{", "[]", json.dumps(good | {"weights": good["weights"][1:]}), json.dumps(good | {"scales": [0.0] * len(good["names"])}),
              json.dumps(good | {"names": ["unknown", *good["names"][1:]]}), json.dumps(good | {"intercept": float("nan")}), json.dumps(good | {"extra": 1})]
    for text in broken:
        path = tmp_path / "weights.json"
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text, encoding="utf-8")
        with pytest.raises(WeightsError, match="cannot be read"):
            Groundedness.load(path)


def test_the_handbook_claims_rest_on_the_handbook():
    records = [json.loads(line) for line in (DATA / "groundedness_claims.jsonl").read_text(encoding="utf-8").splitlines()]
    split = {record["cluster"]: record["split"] for record in records}
    assert all(record["split"] == split[record["cluster"]] and (DATA / "handbook" / record["cluster"]).is_file() for record in records)
    assert abs(sum(record["label"] for record in records) - len(records) / 2) < 5 and len({record["text"] for record in records}) == len(records)
    for record in records[::10]:
        raw = " ".join((DATA / "handbook" / record["cluster"]).read_text(encoding="utf-8").split())
        assert all(" ".join(passage.split())[-60:] in raw for passage in record["passages"])


# --- a language model --------------------------------------------------------------------------------------------


def test_what_the_passages_explain_is_measured_by_likelihoods():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from types import SimpleNamespace

    from llmops_ref.groundedness import likelihood_signals

    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=2048)
    model = transformers.LlamaForCausalLM(config).eval()

    class Bytes:
        "One token a byte."

        def __call__(self, text, **options):
            return SimpleNamespace(input_ids=torch.tensor([list(text.encode())]))

        def apply_chat_template(self, messages, **options):
            return "".join(f"<{message['role']}>{message['content']}" for message in messages) + "<assistant>"

    chat = SimpleNamespace(model=SimpleNamespace(device="cpu", __call__=None), tokenizer=Bytes())
    chat.model = model
    claims = [Claim("Cats purr.", ("Cats purr loudly.",)), Claim("Dogs bark.", ("Cats purr loudly.",))]
    found = likelihood_signals(claims, chat)
    assert found["explained"].shape == found["yes"].shape == (2,) and np.isfinite([*found["explained"], *found["yes"]]).all()

    def surprise(prefix, text):    # the same, without a stored prefix
        ids = Bytes()(prefix + text).input_ids
        logs = model(ids).logits[0].float().log_softmax(-1)
        start = len(prefix.encode())
        return -sum(logs[place - 1, ids[0, place]].item() for place in range(start, ids.shape[1]))

    head = "<system>You check facts.<user>Passage:"
    with torch.inference_mode():
        wanted = 1 - surprise(f"{head} Cats purr loudly.\n\nSentence: ", "Cats purr.") / surprise(f"{head}\n\nSentence: ", "Cats purr.")
    assert found["explained"][0] == pytest.approx(wanted, abs=1e-4)


def test_a_constant_score_ranks_like_a_coin_and_nothing_is_added_to_that():
    found = auroc([True, False] * 10, [0.7] * 20)
    assert (found.ci_low, found.estimate, found.ci_high) == (0.5, 0.5, 0.5)
