"""The checks that decide against serving a stored answer: what each finds, what all let pass, and that nothing makes them fail."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmops_ref.core import BadInputError
from llmops_ref.hit_verification import CHECKS, FEATURES, VERSION, Signature, features, signature, verify

ROOT = Path(__file__).resolve().parent.parent
PAIRS = [json.loads(line) for line in (files("llmops_ref") / "data" / "near_misses.jsonl").read_text(encoding="utf-8").splitlines()]

WORDS = st.lists(
    st.sampled_from([
        "what", "is", "the", "fee", "a", "£25", "$", "25", "k", "1,000", "1.000", "3.5", "5", "march", "may", "2026-03-05", "31/12/2024", "from", "Rome", "to", "Paris", "not", "don't", "n't", "'s",
        "half", "an", "hour", "two", "hundred", "dozen", "one", "and", "a", "half", "10:30", "pm", "12", "th", "%", "1/0", "U.S.", "C++", "日本", "Привет", "١٢", "😀", "if", "by", "than", "of", "in",
        "Anna", "Ben", "```", '"', "'", "?", ".", ",", "https://x.example/y", "a@b.example", "minutes", "5m", "per", "day", "World", "War", "II", "x", "or", "-5", "007"]),
    max_size=14)
TEXTS = st.one_of(st.text(max_size=60), WORDS.map(" ".join), WORDS.map("".join))


def objecting(a: str, b: str) -> set[str]:
    "The checks that object."
    return {one.check for one in verify(a, b)}


# ------------------------------------------------------------------ the same said in other words

@pytest.mark.parametrize(("a", "b"), [
    ("How much is £25 in euros?", "How much is 25 pounds in euros?"),
    ("Can I withdraw £25k?", "Can I withdraw £25,000?"),
    ("Can I send twenty-five thousand pounds?", "Can I send £25,000?"),
    ("Book a room for two hundred and five people", "Book a room for 205 people"),
    ("What happens on 5 March 2026?", "What happens on March 5th, 2026?"),
    ("What happens on 5 March 2026?", "What happens on 2026-03-05?"),
    ("Set an alarm for 7 am", "Set an alarm for 7:00 a.m."),
    ("How far do I get in 90 minutes?", "How far do I get in 1.5 hours?"),
    ("How far do I get in half an hour?", "How far do I get in 30 minutes?"),
    ("Is 5 km far?", "Is 5000 metres far?"),
    ("What is the fee per year?", "What is the annual fee?"),
    ("Is 5% of it mine?", "Is five per cent of it mine?"),
    ("flights from rome to paris", "Flights to Paris from Rome"),
    ("Can Ben pay Anna?", "Can Anna be paid by Ben?"),
    ("What is the limit for withdrawals?", "What is the withdrawal limit?"),
    ("How do I replace my card?", "How can I get my card replaced?"),
    ("If I lose my card, what should I do?", "What should I do if I lose my card?"),
    ("What is the difference between TCP and UDP?", "What's the difference between UDP and TCP?"),
    ("Is it possible to pay by card?", "Can I pay by card?"),
    ("What is the reason my card was declined?", "Why was my card declined?"),
    ("How do I close my account?", "What is the process for closing an account?"),
    ("When did World War II end?", "When did the second world war end?"),
    ("How do I read a file in C++?", "how can i read a file in c++"),
])
def test_says_the_same(a: str, b: str) -> None:
    assert verify(a, b) == verify(b, a) == ()


@pytest.mark.parametrize("b", [
    "What’s Anna’s limit — £25 or 30 %?", "What's Anna's limit - £２５ or ٣٠%?", "What's  Аnna's\nlimit - £25 or 30%?", "\u200bWhat's Anna's limit - £25 or 30%?",
], ids=["curly", "digits of other scripts", "a Cyrillic letter in a Latin word", "invisible"])
def test_one_spelling_for_what_looks_the_same(b: str) -> None:
    assert verify("What's Anna's limit - £25 or 30%?", b) == ()


# ------------------------------------------------------------------ one difference, and who finds it

@pytest.mark.parametrize(("check", "a", "b"), [
    ("language", "Translate hello to German", "Translate hello to French"),
    ("language", "What is the capital of Peru?", "Was ist die Hauptstadt von Peru?"),
    ("numbers", "Where is order 1234?", "Where is order 1235?"),
    ("numbers", "What is 15% of it?", "What is 50% of it?"),
    ("numbers", "Who was Henry VII?", "Who was Henry VIII?"),
    ("numbers", "Is 1,000 enough?", "Is 1.000 enough?"),
    ("numbers", "Is 007 the code?", "Is 7 the code?"),
    ("amounts", "Can I send £500?", "Can I send $500?"),
    ("amounts", "Can I send £500?", "Can I send 500?"),
    ("amounts", "What is it in euros?", "What is it in yen?"),
    ("units", "Set a timer for 10 minutes", "Set a timer for 10 seconds"),
    ("units", "What is the limit per day?", "What is the limit per month?"),
    ("dates", "What happened in 2019?", "What happened in 2021?"),
    ("dates", "Is it open on 5 March?", "Is it open on 6 March?"),
    ("dates", "Does it leave at 7:30?", "Does it leave at 7:45?"),
    ("codes", "Does the A320 fly there?", "Does the B320 fly there?"),
    ("codes", "What is 12 + 5?", "What is 12 * 5?"),
    ("codes", "Summarise https://a.example/1", "Summarise https://a.example/2"),
    ("codes", "What does this do? ```x = 1```", "What does this do? ```x = 2```"),
    ("format", "Explain recursion", "Explain recursion as JSON"),
    ("negation", "Does the card work abroad?", "Doesn't the card work abroad?"),
    ("negation", "Can I travel with a passport?", "Can I travel without a passport?"),
    ("quantifiers", "Are all employees insured?", "Are some employees insured?"),
    ("quantifiers", "Is it at least five?", "Is it at most five?"),
    ("quantifiers", "Do you accept tea and coffee?", "Do you accept tea or coffee?"),
    ("comparison", "Which phone is cheap?", "Which phone is cheapest?"),
    ("modals", "Can I bring a passport?", "Must I bring a passport?"),
    ("time", "Is the branch open?", "Was the branch open?"),
    ("time", "What did they decide last week?", "What did they decide this week?"),
    ("question", "When was Mozart born?", "Where was Mozart born?"),
    ("question", "Can I close it?", "How do I close it?"),
    ("person", "How do I see my balance?", "How do I see your balance?"),
    ("direction", "How do I check in?", "How do I check out?"),
    ("antonyms", "How do I enable it?", "How do I disable it?"),
    ("antonyms", "Which accounts are protected?", "Which accounts are unprotected?"),
    ("names", "Is Anna in the office?", "Is Maria in the office?"),
    ("order", "Can Anna pay Ben?", "Can Ben pay Anna?"),
    ("order", "flights from rome to paris", "flights from paris to rome"),
    ("order", "Does inflation cause unemployment?", "Does unemployment cause inflation?"),
    ("order", "Who called Peter?", "Who was called by Peter?"),
    ("order", "a room for 2 adults and 3 children", "a room for 3 adults and 2 children"),
    ("order", "a letter to my landlord", "a letter from my landlord"),
    ("order", "Is gold dearer than silver?", "Is silver dearer than gold?"),
    ("order", "What time is it in Tokyo when it is 9 AM in London?", "What time is it in London when it is 9 AM in Tokyo?"),
    ("content", "What is the overdraft fee?", "What is the overdraft limit?"),
    ("content", "What causes chest pain?", "What causes leg pain?"),
    ("content", "What is the fee?", "What is the fee for students?"),
    ("length", "word " * 3000 + "Rome", "word " * 3000 + "Paris"),
])
def test_one_difference_is_found(check: str, a: str, b: str) -> None:
    assert check in objecting(a, b)
    assert objecting(a, b) == objecting(b, a)
    assert {one.check for one in verify(a, b, checks=[check])} == {check}


def test_every_check_has_an_example_above() -> None:
    marks = [mark for mark in test_one_difference_is_found.pytestmark if mark.name == "parametrize"]    # type: ignore[attr-defined]
    assert {one[0] for one in marks[0].args[1]} == set(CHECKS)


def test_a_mismatch_says_what_differs_on_both_sides() -> None:
    (found,) = verify("Can I send £500?", "Can I send £5,000?")
    assert (found.check, found.asked, found.stored) == ("amounts", "GBP 500", "GBP 5000")
    (turned,) = verify("Can I send £5,000?", "Can I send £500?")
    assert (turned.asked, turned.stored) == (found.stored, found.asked)
    assert "GBP 500 against GBP 5000" in str(found)


def test_few_near_misses_pass_and_most_paraphrases() -> None:
    wrong, true = ([pair for pair in PAIRS if pair["same"] is same] for same in (False, True))
    assert len(wrong) > 300 and len(true) > 150
    assert sum(not verify(pair["a"], pair["b"]) for pair in wrong) <= len(wrong) // 100
    assert sum(not verify(pair["a"], pair["b"]) for pair in true) >= 0.75 * len(true)


# ------------------------------------------------------------------ languages, statements

def test_other_languages_pass_only_word_for_word() -> None:
    assert verify("Wie hoch ist die Gebühr?", "wie hoch ist die Gebühr") == ()
    (found,) = verify("Wie hoch ist die Gebühr?", "Wie teuer ist das?")
    assert found.check == "language" and "not covered" in found.explanation
    assert objecting("Какая комиссия?", "Какой лимит?") == {"language"}
    assert "numbers" in objecting("Wie viel kostet es für 5 Tage mit 30 Personen?", "Wie viel kostet es für 5 Tage mit 50 Personen?")


def test_between_statements_details_are_left_to_the_score() -> None:
    a = "The airline said on Monday that it would cut the number of its flights to London."
    b = "The airline announced that it would reduce flights to London from its smaller airports."
    assert signature(a).statement and signature(b).statement
    assert verify(a, b) == ()
    assert {"content"} <= {one.check for one in verify(a, b, checks=CHECKS)}
    assert objecting(a, a.replace("London", "Madrid")) == {"names"}
    assert objecting(a, a.replace("would", "would not")) == {"negation"}
    assert "antonyms" in objecting(a, a.replace("cut", "increase"))


COPY = "Shares of Intel rose 3 percent to $21 on Monday after Dell said it would buy 500 million chips within two years."


@pytest.mark.parametrize(("change", "to", "check"), [
    ("3 percent", "5 percent", "numbers"), ("$21", "€21", "amounts"), ("million", "billion", "numbers"), ("two years", "two months", "units"), ("Monday", "Friday", "time"), ("after", "before", "time"),
    ("rose", "fell", "antonyms"), ("would", "would not", "negation"), ("Dell", "Apple", "names"), ("Intel", "Apple", "names"), ("Monday", "Apple", "names"),
])
def test_one_change_in_a_near_copy_of_a_statement_is_found(change: str, to: str, check: str) -> None:
    assert signature(COPY).statement
    assert check in objecting(COPY, COPY.replace(change, to))
    assert objecting(COPY, COPY.replace(change, to)) == objecting(COPY.replace(change, to), COPY)


def test_words_that_change_places_in_a_statement_are_found() -> None:
    assert "order" in objecting(COPY, COPY.replace("Intel", "_").replace("Dell", "Intel").replace("_", "Dell"))
    plain = "The company sued the regulator on Monday over the failed merger of both banks."
    assert "order" in objecting(plain, "The regulator sued the company on Monday over the failed merger of both banks.")
    assert objecting("There are not one but two claims, and no claim is new.", "There are not one but two claims, and no claim is not new.") == {"negation"}


def test_what_one_statement_leaves_out_is_no_conflict() -> None:
    assert verify(COPY, COPY.replace(" on Monday", "")) == ()
    assert verify(COPY, COPY.replace("Shares of Intel", "Shares of chip maker Intel")) == ()


@pytest.mark.parametrize("text", [
    "Is the airline going to cut the number of its flights?", "Write a poem about the sea in the style of a sailor.", "My card was stolen in Spain and the bank is closed.",
    "cheap hotels in berlin with breakfast near the main station.", "The app shows an error when I open it on the train.", "Recipe for pancakes with oat milk and no sugar at all", "It is open."])
def test_prompts_are_no_statements(text: str) -> None:
    assert not signature(text).statement


# ------------------------------------------------------------------ properties

@given(TEXTS, TEXTS)
def test_identity_symmetry_and_no_exception(a: str, b: str) -> None:
    assert verify(a, a) == ()
    assert objecting(a, b) == objecting(b, a)
    assert features(a, b) == features(b, a)
    assert all(math.isfinite(value) for value in features(a, b).values())


@given(TEXTS)
def test_a_signature_is_json(text: str) -> None:
    one = signature(text)
    assert Signature.from_dict(json.loads(json.dumps(one.to_dict()))) == one


@given(WORDS.map(" ".join), st.integers(0, 10**9), st.integers(0, 10**9))
def test_another_number_is_found(rest: str, first: int, second: int) -> None:
    assert bool(verify(f"Is {first} enough for {rest}", f"Is {second} enough for {rest}")) == (first != second)


@given(st.permutations(["£", "$", "€", "¥"]), st.integers(1, 10**6), st.sampled_from(["Can I send {} abroad?", "Why was {} taken?", "pay {} to Anna"]))
def test_another_currency_is_found(signs: list[str], amount: int, template: str) -> None:
    assert "amounts" in objecting(template.format(f"{signs[0]}{amount}"), template.format(f"{signs[1]}{amount}"))


@given(st.sampled_from(["Anna", "Ben", "the landlord", "the tenant", "my bank", "the shop"]), st.sampled_from(["Carl", "Dora", "the court", "my employer", "the police"]),
       st.sampled_from(["pay", "sue", "call", "trust", "warn", "invite", "chase"]))
def test_turned_roles_are_found(one: str, other: str, verb: str) -> None:
    assert verify(f"Can {one} {verb} {other}?", f"Can {other} {verb} {one}?")


@given(st.text(st.characters(categories=["L"], max_codepoint=127), min_size=3, max_size=9), st.text(st.characters(categories=["L"], max_codepoint=127), min_size=3, max_size=9))
def test_an_unknown_word_is_another_question(one: str, other: str) -> None:
    one, other = "Qv" + one.lower() + "k", "Qw" + other.lower() + "k"
    assert verify(f"What is the price of {one} in spring?", f"What is the price of {other} in spring?")


# ------------------------------------------------------------------ long and hostile prompts

def test_a_long_prompt_costs_no_more_than_its_beginning() -> None:
    one = signature("What does this mean? " * 100_000)
    assert len(one.words) <= 8_000
    hostile = ["a@" * 4_000, "1," * 4_000, "'" * 8_000, "```" + "x" * 8_000, "a." * 4_000, "five hundred " * 620, "-5" * 4_000, "if a of b " * 800, "x" * 8_000, "((" * 4_000]
    plain = max(_seconds("Can I send money from my account to Anna? " * 190) for _ in range(3))
    assert max(min(_seconds(text) for _ in range(3)) for text in hostile) < 50 * plain


def _seconds(text: str) -> float:
    started = time.process_time()
    verify(signature(text), signature(text[::-1]))
    return time.process_time() - started


# ------------------------------------------------------------------ bad input, versions

@pytest.mark.parametrize("attempt", [
    lambda: signature(None),    # type: ignore[arg-type]
    lambda: verify("Is it open?", 5),    # type: ignore[arg-type]
    lambda: verify("Is it open?", "Is it shut?", checks=["antonym"]),
    lambda: verify("Is it open?", Signature.from_dict({**signature("Is it open?").to_dict(), "version": "0"})),
])
def test_bad_input_is_named(attempt: Any) -> None:
    with pytest.raises(BadInputError) as caught:
        attempt()
    assert caught.value.remedy


@pytest.mark.parametrize("change", [{"words": None}, {"facts": []}, {"roles": [["", ""]]}, {"words": ["a", "b", "c"]}, {"kinds": ""}])
def test_a_damaged_record_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BadInputError):
        Signature.from_dict({**signature("Is the bank open?").to_dict(), **change})
    with pytest.raises(BadInputError):
        Signature.from_dict({})


def test_the_version_does_not_depend_on_the_process() -> None:
    code = "from llmops_ref import hit_verification as h; print(h.VERSION, h.signature('Are withdrawals of payments cheaper?').to_dict())"
    seen = {subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True).stdout for seed in "123"}
    assert len(seen) == 1 and seen.pop().startswith(VERSION)


def test_features_have_their_names_and_order() -> None:
    same, other = features("Is the bank open?", "Is the bank open?"), features("What is the overdraft fee?", "What is the overdraft limit?")
    assert tuple(same) == tuple(other) == FEATURES
    assert same["shared"] == 1 and same["mismatches"] == 0
    assert other["shared"] < 1 and other["mismatches"] > 0 and other["one_sided_most"] == 1
