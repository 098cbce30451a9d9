"Personal data and secrets: what is found, what is not, where it stands, and that a megabyte made to be slow is not."

import random
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmops_ref.core import BadInputError
from llmops_ref.exact_cache import Response
from llmops_ref.privacy import (
    Kind,
    NameModelMissingError,
    PersonalData,
    PersonalDataRail,
    Secrets,
    SecretsRail,
    UnknownKindError,
    identity,
    personal_data_check,
)
from llmops_ref.rails import Finding, Subject, redact

PERSONAL = PersonalData(names=["Ann Smith"])
SECRETS = Secrets()

FOUND = [
    ("CARD", "4111 1111 1111 1111"), ("CARD", "4111-1111-1111-1111"), ("CARD", "4111.1111.1111.1111"), ("CARD", "3782 822463 10005"), ("CARD", "5555555555554444"), ("CARD", "4111 - 1111 - 1111 - 1111"), ("CARD", "6011\t1111\t1111\t1117"),
    ("CARD", "2223003122003222"), ("CARD", "30569309025904"), ("CARD", "\uff14111 1111 1111 1111"), ("CARD", "4\u200b111111111111111"), ("CARD", "4111\u20131111\u20131111\u20131111"), ("IBAN", "GB82WEST12345698765432"),
    ("IBAN", "gb82 west 1234 5698 7654 32"), ("IBAN", "DE89 3704 0044 0532 0130 00"), ("IBAN", "FR14-2004-1010-0505-0001-3M02-606"), ("IBAN", "NO9386011117947"), ("IBAN", "MT84MALT011000012345MTLCAST001S"), ("EMAIL", "a.b+c@example.co.uk"),
    ("EMAIL", "o'neill@example.org"), ("EMAIL", "j\u00fcrgen@m\u00fcller.de"), ("EMAIL", '"a b"@example.com'), ("EMAIL", "name (at) example dot com"), ("EMAIL", "name[at]example[dot]com"), ("EMAIL", "x@[192.0.2.1]"), ("EMAIL", "x\uff20example.com"),
    ("PHONE", "020 7946 0958"), ("PHONE", "+44 (0)20 7946 0958"), ("PHONE", "07700 900123"), ("PHONE", "(0161) 496 0123"), ("PHONE", "0044 7700 900123"), ("PHONE", "0800 1111"), ("PHONE", "+33 1 42 68 53 00"), ("PHONE", "01632.960.123"),
    ("NATIONAL_INSURANCE", "AB 12 34 56 C"), ("NATIONAL_INSURANCE", "ab123456c"), ("NATIONAL_INSURANCE", "AB-12-34-56-C"), ("DRIVING_LICENCE", "MORGA657054SM9IJ"), ("POSTCODE", "SW1A 1AA"), ("IP_ADDRESS", "203.0.113.7"), ("PERSON", "Ms Smith"),
]


@pytest.mark.parametrize(("kind", "value"), FOUND)
@pytest.mark.parametrize("sentence", ["{}", "Please take {} and go on.", "a\n{}\nb", "({})", "**{}**", "value: {}, amount 12.50"])
def test_a_value_is_found_whole_wherever_it_stands(kind: str, value: str, sentence: str) -> None:
    text = sentence.format(value)
    assert (kind, value) in [(entity.kind, text[entity.start:entity.end]) for entity in PERSONAL.find(text)]


@pytest.mark.parametrize("text", [
    "12-34-56 12345678", "sort code 123456, account 12345678", "account 12345678, sort code 12-34-56", "12-34-56/12345678", "s/c 12 34 56 a/c 1234 5678", "sort_code,account_number\n123456,12345678", "Sort Code: 12\u201334\u201356\nAccount Number: 12345678",
    '"sortCode": "12-34-56", "accountNumber": "12345678"', "| Sort code | Account |\n|---|---|\n| 12-34-56 | 12345678 |", "name,sort,account\nAnn,21-03-24,12345678\nBob,22-03-24,87654321", "sort code 12345612345678",
])
def test_bank_details_are_found_in_every_layout(text: str) -> None:
    assert {Kind.SORT_CODE, Kind.ACCOUNT_NUMBER} <= {entity.kind for entity in PERSONAL.find(text)}


@pytest.mark.parametrize("text", [
    "order 12345678", "invoice INV-12345678", "card-like 4111 1111 1111 1112", "IBAN GB82 WEST 1234 5698 7654 33", "on 21-03-24 12345678 copies", "version 1.2.3.4", "ISBN 0-306-40615-2", "ISBN 0306406152", "978-0-306-40615-7", "2022 4111 1111 1111 1111 2026",
    "0.4111111111111111", "123e4567-e89b-12d3-a456-426614174000", "4111111a-1111-1111-1111-111111111111", "\u00a31,234,567.00", "2026-01-17T09:30:15.123456Z", "epoch 1768641015123", "lodash@4.17.21", "logo@2x.png", "git@github.com:acme/repo.git",
    "https://user:word@example.com/x", "BG123456C", "AB123456", "order 07700900123", "tracking number 4000 0000 0000 0002", "2019 2020 2021 2022 2023 2024", "12 34 56 78 90", "user@localhost", "5@3.20", "0000 0000 0000 0000", "room 12345678",
    "a table:\n1234\t5678\t9012\t3456\n4111\t1111\t1111\t1111", "What is the fee?", "",
])
def test_what_is_nobodys_is_not_found(text: str) -> None:
    assert PERSONAL.find(text) == ()


@given(st.text(alphabet=st.sampled_from("0123456789 -+()@.abGB<>\n\u200b\uff11\u00e9/,:#_'\"\\"), max_size=80))
def test_entities_are_in_order_apart_and_inside(text: str) -> None:
    entities = PERSONAL.find(text)
    edges = [place for entity in entities for place in (entity.start, entity.end)]
    assert edges == sorted(edges) and all(0 <= entity.start < entity.end <= len(text) for entity in entities)
    assert len(PERSONAL.redact(text)) >= 0


@given(st.text(max_size=200))
def test_no_text_makes_a_finder_raise(text: str) -> None:
    PERSONAL.find(text)
    SECRETS.find(text)


def test_a_finder_serves_threads_at_once() -> None:
    texts = [f"card {card}, call 07700 90012{digit}" for card, digit in zip(["4111 1111 1111 1111", "5555555555554444"] * 5, range(10), strict=True)]
    expected, wrong = [PERSONAL.find(text) for text in texts], list[int]()

    def work() -> None:
        for _ in range(20):
            wrong.extend(place for place, text in enumerate(texts) if PERSONAL.find(text) != expected[place])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_kinds_names_and_exceptions_can_be_chosen() -> None:
    text = "card 4111 1111 1111 1111, call 0800 123 4567"
    assert [entity.kind for entity in PersonalData(["card"]).find(text)] == [Kind.CARD]
    assert [entity.kind for entity in PersonalData(allow=["08001234567"]).find(text)] == [Kind.CARD]
    assert [text[entity.start:entity.end] for text in ["Dr A. Smith and Ann Smith-Jones"] for entity in PERSONAL.find(text)][:1] == ["Dr A. Smith"]
    for wrong, error in ((lambda: PersonalData(["CARDS"]), UnknownKindError), (lambda: PersonalData(["PLACE"]), UnknownKindError), (lambda: PersonalData(model="no_such"), NameModelMissingError), (lambda: PersonalData(names=[""]), BadInputError)):
        with pytest.raises(error):
            wrong()


def test_one_thing_has_one_identity() -> None:
    assert len({identity(Kind.PHONE, written) for written in ("+44 20 7946 0958", "(020) 7946 0958", "0044 20 7946 0958", "+44 (0)20-7946-0958")}) == 1
    assert identity(Kind.EMAIL, "Ann (at) Example dot com") == identity(Kind.EMAIL, "ann@example.com")
    assert identity(Kind.CARD, "4111-1111") == identity(Kind.CARD, "\uff1411 11111") != identity(Kind.CARD, "4111 1112")


def test_the_rail_redacts_input_and_refuses_what_is_blocked() -> None:
    rail = PersonalDataRail(PERSONAL, block=["CARD"])
    card, mail = rail(Subject("4111 1111 1111 1111, ann@example.com"))
    assert (card.severity, card.replacement, mail.replacement) == ("critical", None, "[EMAIL]")
    assert "4111" not in repr(card) and "ann@" not in repr(mail)
    assert redact("Mail ann@example.com.", rail(Subject("Mail ann@example.com."))) == "Mail [EMAIL]."


def test_passages_keep_what_organisations_publish() -> None:
    text = "Call 0800 123 4567 or help@example.com; the payee was 12-34-56 12345678."
    assert [text[slice(*finding.span)] for finding in PersonalDataRail(PERSONAL)(Subject(text, stage="context")) if finding.span] == ["12-34-56", "12345678"]


def test_an_answer_may_repeat_the_question_and_the_passages_in_other_words() -> None:
    rail = PersonalDataRail(PERSONAL)
    answer = Subject("Your number 020 7946 0958; ours is help@example.com; another is 07700 900123.", stage="output", question="I am at +44 (0)20 7946 0958", passages=("HELP@example.com",))
    assert [answer.text[slice(*finding.span)] for finding in rail(answer) if finding.span] == ["07700 900123"]


SECRET = [
    "AKIA" + "IOSFODNN7EXAMPLE", "ghp_" + "a1B2c3D4e5" * 3 + "f6G7h8", "xoxb-" + "2345678901-" * 2 + "abcdefghij", "sk_live_" + "4eC39HqLyjWDarjtT1zdp7dc", "sk-" + "proj-" + "Ab1" * 14, "postgres://svc:" + "s3cr3tWord" + "@db/main",
    "password: " + "hunter2", "my password is " + "Tr0ub4dor&3", "PIN: " + "4921", "api_key = '" + "A8d9F7s6D5f4G3h2" + "'", "AccountKey=" + "a1B2" * 21 + "ab==", "glpat-" + "a1B2c3D4e5F6g7H8i9J0", "Bearer " + "abcDEF0123456789abcDEF0123",
    "-----BEGIN RSA " + "PRIVATE KEY-----\nMIIEow\n-----END RSA " + "PRIVATE KEY-----", "-----BEGIN OPENSSH " + "PRIVATE KEY-----\nb3BlbnNzaC1rZXk", "eyJhbGciOiJIUzI1NiJ9" + ".eyJzdWIiOiIxIn0" + ".c2lnbmF0dXJl", "client_secret=" + "x8Q~abcDEF123456", "AIza" + "a1B2c3D4e5" * 3 + "f6G7h",
]


@pytest.mark.parametrize("value", SECRET)
def test_secrets_are_found_in_a_sentence(value: str) -> None:
    text = f"Hello, here it is: {value} and thank you."
    (finding,) = SecretsRail(SECRETS)(Subject(text))
    assert finding.span and finding.replacement == "[SECRET]" and finding.severity == "critical"
    found = text[slice(*finding.span)]
    assert found not in redact(text, [finding]) and found not in repr(finding) and len(found) >= 4 and redact(text, [finding]).startswith("Hello, here it is: ")


@pytest.mark.parametrize("text", [
    "The password is required.", "Your password: at least eight characters.", "Reset your password: it takes two minutes.", "password: <your password>", "password=****", "Your PIN has 4 digits.", "PIN: 4 digits", "The pin is 4 digits long.",
    "sha256 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", "'9fceb02d0ae598e95dc970b74767f19372d61af8'", "![x](data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk)", "id 123e4567-e89b-12d3-a456-426614174000",
    "The bearer of this letter is my brother.", "api_key=${API_KEY}", "Secret: our best-kept recipe.", "token: required",
])
def test_ordinary_text_holds_no_secret(text: str) -> None:
    assert SECRETS.find(text) == ()


def test_the_settings_of_detect_secrets_are_not_touched() -> None:
    settings = pytest.importorskip("detect_secrets.settings")
    before = settings.get_settings().json()
    Secrets().find(SECRET[0])
    assert settings.get_settings().json() == before


STREAMED = ["Some words come first. ", "card 4111 1111 1111 1111 ", "12-34-56, account 12345678 ", "write to ann.lee@example.co.uk ", "GB82 WEST 1234 5698 7654 32 ", "name (at) example dot com ", "call +44 (0)20 7946 0958 ", "10 Downing Street ", SECRET[0], " ", SECRET[6], " "]


@settings(max_examples=40)
@given(st.lists(st.sampled_from(STREAMED), max_size=6), st.randoms(use_true_random=False))
def test_what_is_not_held_is_decided(pieces: list[str], rng: random.Random) -> None:
    text = "".join(pieces)
    for rail in (PersonalDataRail(PERSONAL), SecretsRail(SECRETS)):
        whole = [finding.span for finding in rail(Subject(text, stage="output")) if finding.span]
        for _ in range(3):
            part = text[:rng.randrange(len(text) + 1)]
            seen = [finding.span for finding in rail(Subject(part, stage="output")) if finding.span]
            for start, _end in whole:
                assert start >= rail.held(part) or any(begin <= start < stop for begin, stop in seen)


def test_a_check_for_the_write_gate_names_kinds_only() -> None:
    check = personal_data_check(PERSONAL)
    reason = check("What is my limit?", Response("4111 1111 1111 1111", data={"note": "password: hunter2", "passages": ["ann@example.com"]}))
    assert reason == "Prompt or answer holds a card number, a secret."
    assert check("What is the limit?", Response("500 pounds.")) is None
    assert personal_data_check(PERSONAL, published=True)("Where?", Response("Call 0800 123 4567.")) is None


@pytest.mark.parametrize("piece", ["1", "1 ", "4111 ", "4111-1111-1111-1112 ", "12-34-56 12345678 ", "a@", "a@b.", "a(at)b(dot)", "GB82 ", "sort code ", "(0", "1:", "-----BEGIN PRIVATE" + " KEY-----", "eyJ", "eyJa.", "password: ", "a_", "sk-", "://a:b", "x", '"a'])
def test_time_grows_with_the_text_and_not_with_its_square(piece: str) -> None:
    def seconds(size: int) -> float:
        text, start = (piece * (size // len(piece) + 1))[:size], time.process_time()
        PERSONAL.find(text)
        SECRETS.find(text)
        return time.process_time() - start

    seconds(4_000)
    assert seconds(64_000) < 60 * max(seconds(8_000), 1e-3)    # 8 times the text; its square would be 64 times, from the first pattern that is not linear


def test_a_text_that_is_too_long_is_refused_rather_than_searched() -> None:
    for rail in (PersonalDataRail(PERSONAL), SecretsRail(SECRETS)):
        (finding,) = rail(Subject("1 " * rail.most))
        assert isinstance(finding, Finding) and finding.span is None and finding.replacement is None
