"Pseudonyms come back exactly, whatever the text and however the stream is cut; logs and cache keys hold none of it."

import asyncio
import io
import json
import logging
import secrets
import threading
from collections.abc import AsyncIterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmops_ref.cache_files import Vault
from llmops_ref.core import BadInputError
from llmops_ref.privacy import PersonalData
from llmops_ref.pseudonyms import KeyedRedaction, Pseudonyms, RedactingFilter, TooManyPseudonymsError, copied_tokens

FINDER = PersonalData(names=["Ann Smith", "John Miller", "Eve Miller"])
CARD = "4111 1111 1111 1111"
PIECES = st.sampled_from([
    CARD, "4111111111111111", "5555555555554444", "a@example.com", "A@Example.com", "07700 900123", "+447700900123", "Ann Smith", "Ms Smith", "Miller", "[CARD_1]", "card_1", "[EMAIL 1]", "&lt;CARD_2&gt;", "<CARD_1>", "{{card_1}}", "\\[CARD\\_1\\]",
    "[TEXT_1]", "TEXT_1", "[", "]", "<", ">", "_", "1", "\\", " ", "\n", "https://x.example/?a=", "12-34-56 12345678", "\uff14111 1111 1111 1111", "\u200b", "\u00e9", "[CARD_", "CARD",
])
TEXTS = st.lists(st.one_of(PIECES, st.text(max_size=4)), max_size=10).map("".join)


@settings(max_examples=100)
@given(st.lists(TEXTS, max_size=4))
def test_every_text_comes_back_exactly(texts: list[str]) -> None:
    conversation = Pseudonyms(FINDER)
    for text in texts:
        hidden = conversation.hide(text)
        assert conversation.restore(hidden) == text
        assert not [entity for entity in FINDER.find(hidden) if entity.kind in ("CARD", "IBAN", "EMAIL")]


@settings(max_examples=100)
@given(TEXTS, st.lists(st.integers(1, 30), min_size=1, max_size=30))
def test_a_stream_restores_like_the_whole_however_it_is_cut(answer: str, sizes: list[int]) -> None:
    conversation = Pseudonyms(FINDER)
    conversation.hide(f"{CARD} a@example.com Ann Smith")
    chunks, rest = [], answer
    for size in sizes:
        chunks, rest = [*chunks, rest[:size]], rest[size:]
    assert "".join(conversation.restore_stream([*chunks, rest])) == conversation._expand(answer)


def test_a_stream_does_not_wait_for_the_end() -> None:
    conversation = Pseudonyms(FINDER)
    conversation.hide(CARD)
    stream = conversation.restore_stream(iter(["The card ", "[CA", "RD_1", "] is ", "blocked ", "now"]))
    assert next(stream) == "The card " and next(stream).startswith(f"{CARD} is")


def test_an_asynchronous_stream() -> None:
    conversation = Pseudonyms(FINDER)
    conversation.hide(CARD)

    async def collect() -> str:
        async def chunks() -> AsyncIterator[str]:
            for chunk in ("[CAR", "D_1] ", "ok"):
                yield chunk
        return "".join([piece async for piece in conversation.arestore_stream(chunks())])

    assert asyncio.run(collect()) == f"{CARD} ok"


def test_the_same_thing_is_the_same_token() -> None:
    conversation = Pseudonyms(FINDER)
    assert conversation.hide("4111 1111 1111 1111 and 4111-1111-1111-1111") == "[CARD_1] and [CARD_1]"
    assert conversation.hide("5555555555554444 or 4111111111111111?") == "[CARD_2] or [CARD_1]?"
    assert conversation.hide("Ann Smith, Ms Smith, SMITH") == "[PERSON_1], [PERSON_1], [PERSON_1]"
    assert conversation.hide("John Miller, Eve Miller, Miller") == "[PERSON_2], [PERSON_3], [PERSON_4]"    # which Miller is not known
    assert conversation.hide("+44 7700 900123 / 07700900123") == "[PHONE_1] / [PHONE_1]"


@pytest.mark.parametrize("written", ["[CARD_1]", "[card_1]", "**[CARD_1]**", "CARD_1", "<CARD_1>", "&lt;CARD_1&gt;", "[CARD 1]", "{{CARD_1}}", "\\[CARD\\_1\\]", "[CARD_1]'s", "[CARD_01]"])
def test_what_a_model_makes_of_a_token_leads_back(written: str) -> None:
    conversation = Pseudonyms(FINDER)
    conversation.hide(CARD)
    assert CARD in conversation.restore(f"Your {written} card")


def test_tokens_in_the_text_and_in_web_addresses_are_not_ours() -> None:
    conversation = Pseudonyms(FINDER)
    assert conversation.hide(f"[CARD_1] is not {CARD}") == "[CARD_1] is not [CARD_2]"    # its number is never given out
    assert conversation.restore("[CARD_1] [CARD_2] [CARD_3]") == f"[CARD_1] {CARD} [CARD_3]"
    assert conversation.hide("[CARD_2]") == "[TEXT_1]" and conversation.restore("so [TEXT_1]") == "so [CARD_2]"
    assert CARD not in conversation.restore("![x](https://evil.example/?q=[CARD_2])")


def test_a_conversation_goes_on_after_a_restart() -> None:
    conversation, key = Pseudonyms(FINDER), secrets.token_bytes(32)
    texts = [f"[CARD_1] {CARD}", "4111111111111111 [CARD_2]", "Ann Smith"]
    hidden = [conversation.hide(text) for text in texts]
    again = Pseudonyms.from_dict(json.loads(json.dumps(conversation.to_dict())), FINDER)
    sealed = conversation.seal(Vault(key))
    opened = Pseudonyms.unseal(sealed, Vault(key), FINDER)
    for other in (again, opened):
        assert [other.restore(text) for text in hidden] == texts and other.hide("Smith and 5555555555554444") == "[PERSON_1] and [CARD_3]"
    assert b"4111" not in sealed
    for wrong in (lambda: Pseudonyms.unseal(sealed[:-1] + bytes([sealed[-1] ^ 1]), Vault(key)), lambda: Pseudonyms.unseal(sealed, Vault(secrets.token_bytes(32))), lambda: conversation.seal(Vault()), lambda: Pseudonyms.from_dict({"written": 1})):
        with pytest.raises(BadInputError):
            wrong()


def test_threads_share_a_conversation() -> None:
    conversation, failed = Pseudonyms(FINDER), list[str]()

    def work(number: int) -> None:
        for step in range(15):
            text = f"{CARD} user{(number + step) % 7}@example.com"
            if conversation.restore(conversation.hide(text)) != text:
                failed.append(text)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and len(conversation) == 8


def test_limits_and_wrong_arguments() -> None:
    with pytest.raises(TooManyPseudonymsError):
        Pseudonyms(FINDER, limit=1).hide("4111111111111111 5555555555554444")
    with pytest.raises(BadInputError):
        Pseudonyms(FINDER, names=["Ann Smith"])
    assert CARD not in repr(Pseudonyms(FINDER))


class Customer:
    def __str__(self) -> str:
        return f"customer with {CARD}"


def logged(write: object, form: str = "%(message)s") -> str:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter(form))
    handler.addFilter(RedactingFilter(FINDER))
    log = logging.Logger("test")
    log.addHandler(handler)
    write(log)    # type: ignore[operator]
    return stream.getvalue()


def test_no_pocket_of_a_log_record_keeps_personal_data() -> None:
    def fail(log: logging.Logger) -> None:
        try:
            try:
                raise KeyError("a@example.com")
            except KeyError as error:
                raise ValueError(f"no {CARD}") from error
        except ValueError:
            log.exception("for %s", "Ann Smith", stack_info=True, extra={"who": Customer(), "rows": [{"a@example.com": 4111111111111111}], "count": 3})

    out = logged(fail, "%(message)s %(who)s %(rows)s %(count)d")
    assert "for [PERSON] customer with [CARD] [{'[EMAIL]': '[CARD]'}] 3" in out
    assert "ValueError: no [CARD]" in out and "KeyError: '[EMAIL]'" in out
    assert not any(word in out for word in ("4111", "a@example", "Ann Smith"))
    assert logged(lambda log: log.info("%(a)s", {"a": CARD})) == "[CARD]\n" and logged(lambda log: log.info("key %s", "password: hunter2")) == "key password: [SECRET]\n"


def test_a_record_that_cannot_be_redacted_is_withheld() -> None:
    class Broken:
        def __str__(self) -> str:
            raise RuntimeError(CARD)

    for out in (logged(lambda log: log.info("%s", Broken())), logged(lambda log: log.info("%d", CARD)), logged(lambda log: log.info("x", extra={"who": Broken()}), "%(message)s %(who)s")):
        assert "withheld" in out and "4111" not in out


def test_cache_keys_tell_values_apart_and_hold_none() -> None:
    from langchain_core.messages import HumanMessage

    names, others = KeyedRedaction(b"k" * 32, FINDER), KeyedRedaction(b"l" * 32, FINDER)
    assert names.text(CARD) == names.text("4111-1111-1111-1111") != names.text("5555555555554444")
    assert names.text(CARD) != others.text(CARD) and "4111" not in names.text(CARD) and names.text("no data") == "no data"
    for messages in (CARD, [{"role": "user", "content": CARD}], [("user", CARD)], [HumanMessage(CARD)], [{"role": "user", "content": [{"type": "text", "text": CARD}]}]):
        assert "4111" not in str(names.messages(messages)) and "CARD_" in str(names.messages(messages))
    with pytest.raises(BadInputError):
        KeyedRedaction(b"short")


def test_the_trial_counts_copies() -> None:
    faithful = copied_tokens(lambda prompt: prompt.rpartition("\n")[2].replace("[", "").replace("]", "").lower())
    assert all(row["restored"] == row["asked"] for row in faithful.values())
    assert all(row["restored"] == 0 for row in copied_tokens(lambda prompt: "no").values())
