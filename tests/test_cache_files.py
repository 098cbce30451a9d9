"Cache files: bounded, whole or set aside, never wrong. What the exact cache's tests show through its interface is not repeated here."

import contextlib
import math
import os
import sqlite3
import stat
import threading
import warnings

import pytest

from llmops_ref.cache_files import (
    CacheDegradedWarning,
    CacheFile,
    Clock,
    ClockWentBack,
    DamagedFile,
    FileUnavailable,
    Vault,
)
from llmops_ref.core import BadInputError

SCHEMA = "CREATE TABLE things(number INTEGER PRIMARY KEY, value BLOB);"


@pytest.fixture
def open_file(tmp_path):
    "Open files that are closed at the end."
    opened = []

    def open_one(name="things.sqlite", **options):
        opened.append(CacheFile(tmp_path / name, **{"kind": "things/1", "schema": SCHEMA, **options}))
        return opened[-1]

    yield open_one
    for file in opened:
        file.close()


@contextlib.contextmanager
def told(*texts):
    "Exactly these warnings are given, in this order."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    messages = [str(one.message) for one in caught if one.category is CacheDegradedWarning]
    assert len(messages) == len(texts) and all(text in message for text, message in zip(texts, messages, strict=True)), messages


def store(file, number=1, value=b"x"):
    "Write one row."
    with file.writing() as connection:
        connection.execute("INSERT OR REPLACE INTO things VALUES(?, ?)", (number, value))


def load(file, number=1):
    "Read one row's value."
    with file.reading() as connection:
        row = connection.execute("SELECT value FROM things WHERE number = ?", (number,)).fetchone()
    return row and row[0]


@pytest.mark.parametrize("key", [None, bytes(32)])
def test_a_sealed_value_opens_in_its_row_only_and_unchanged_only(key):
    vault = Vault(key)
    sealed = vault.seal(b"body", 7)
    assert vault.unseal(sealed, 7) == b"body" and vault.unseal(sealed, 8) == b"" and Vault(b"1" * 32).unseal(sealed, 7) == b""
    for place in range(len(sealed)):
        for bit in range(8):
            changed = bytearray(sealed)
            changed[place] ^= 1 << bit
            assert vault.unseal(bytes(changed), 7) == b""
    for wrong in (None, 7, "text", b"", b"short", sealed[:-1], sealed + b"x"):
        assert vault.unseal(wrong, 7) == b""


def test_names_and_numbers_depend_on_the_key():
    digest = "ab" * 32
    vaults = [Vault(), Vault(bytes(32)), Vault(b"1" * 32)]
    assert len({vault.name("tag") for vault in vaults}) == len({vault.mark for vault in vaults}) == len({vault.number(digest) for vault in vaults}) == 3
    assert all(0 <= vault.number("ff" * 32) < 1 << 63 for vault in vaults) and Vault(bytes(32)).mark == vaults[1].mark
    for wrong in (b"short", "0" * 32, 7):
        with pytest.raises(BadInputError):
            Vault(wrong)


def test_a_clock_holds_small_steps_back_and_tells_large_ones():
    now = [10.0]
    clock = Clock(lambda: now[0])
    assert clock.now() == 10.0
    now[0] = 9.5
    assert clock.now() == clock.held() == 10.0
    now[0] = 5.0
    for _ in range(2):
        with pytest.raises(ClockWentBack) as error:
            clock.now()
        assert error.value.args == (5.0,)
    assert clock.held() == 10.0 and clock.accept() == 5.0 == clock.now()


def test_an_entry_lives_by_both_clocks():
    clock, other = Clock(), bytes(16)
    up = clock.up()
    assert clock.alive(1000.0, 990.0, 1001.0, up, clock.boot) and clock.alive(1000.0, 5000.0, math.inf, up, clock.boot)
    assert not clock.alive(1001.0, 990.0, 1001.0, up, clock.boot)       # its time has come
    assert not clock.alive(1000.0, 1002.0, 1062.0, up, clock.boot)      # from the future
    assert not clock.alive(1000.0, 990.0, 1001.0, up - 12.0, clock.boot)    # the other clock says so
    assert clock.alive(1000.0, 990.0, 1001.0, up - 12.0, other)         # which another boot's cannot


def test_what_is_written_is_read_after_reopening_and_private(open_file, tmp_path):
    file = open_file("deep/er/things.sqlite")
    store(file)
    assert load(file) == b"x" and file.bytes() > 0
    file.close()
    with pytest.raises(FileUnavailable):
        load(file)
    assert load(open_file("deep/er/things.sqlite")) == b"x"
    assert stat.S_IMODE((tmp_path / "deep/er/things.sqlite").stat().st_mode) == 0o600
    assert not [path for path in (tmp_path / "deep/er").iterdir() if path.suffix in (".new", ".damaged-1")]


def test_an_error_rolls_back_and_lets_the_next_one_in(open_file):
    file = open_file()
    store(file)
    with pytest.raises(ZeroDivisionError), file.writing() as connection:
        connection.execute("UPDATE things SET value = x'00'")
        raise ZeroDivisionError
    assert load(file) == b"x"
    store(file, 2)
    assert load(file, 2) == b"x" and not file.degraded


@pytest.mark.parametrize("raised", [DamagedFile("unlike ours"), sqlite3.DatabaseError("no code")])
def test_only_damage_sets_a_file_aside(open_file, tmp_path, raised):
    file = open_file()
    store(file)
    damaged = isinstance(raised, DamagedFile)
    with told("set aside as things.sqlite.damaged-1" if damaged else "SQLite says"), pytest.raises(FileUnavailable), file.reading():
        raise raised
    assert (tmp_path / "things.sqlite.damaged-1").exists() is damaged
    assert load(file) == (None if damaged else b"x")


def test_a_second_damage_gets_another_name(open_file, tmp_path):
    for number in (1, 2):
        (tmp_path / "things.sqlite").write_bytes(b"notes of somebody" * number)
        with told(f"damaged-{number}"), pytest.raises(FileUnavailable):
            load(open_file())
    assert (tmp_path / "things.sqlite.damaged-1").read_bytes() == b"notes of somebody"


def test_another_kind_another_key_and_another_program_are_left_alone(open_file, tmp_path):
    store(open_file())
    with sqlite3.connect(tmp_path / "theirs.sqlite") as connection:
        connection.execute("CREATE TABLE accounts(name TEXT)")
    for name, options, text in (
        ("things.sqlite", {"kind": "others/1"}, "holds things/1, not others/1"), ("things.sqlite", {"vault": b"another"}, "another encryption key"),
        ("theirs.sqlite", {}, "another program"),
    ):
        before = (tmp_path / name).read_bytes()
        file = open_file(name, **options)
        with told(text):
            for _ in range(3):
                with pytest.raises(FileUnavailable):
                    store(file)
        assert (tmp_path / name).read_bytes() == before
    assert not list(tmp_path.glob("*damaged*")) and load(open_file()) == b"x"


def test_a_journal_without_its_database_is_not_played_into_a_new_one(open_file, tmp_path):
    file = open_file()
    store(file, 1, b"old")
    os.unlink(tmp_path / "things.sqlite")
    assert (tmp_path / "things.sqlite-wal").stat().st_size > 0
    assert load(file) is None
    store(file, 2, b"new")
    assert (load(file, 1), load(file, 2)) == (None, b"new") and (tmp_path / "things.sqlite.damaged-1-wal").exists()


def test_giving_up_stops_every_process_s_link(open_file):
    one, other = open_file(), open_file()
    store(one)
    assert load(other) == b"x"
    with told("could not be done. It was set aside"):
        one.give_up("something could not be done")
    assert load(other) is None and load(one) is None    # the empty file that takes its place


def test_a_file_that_cannot_be_opened_is_not_asked_at_every_call(open_file, tmp_path, monkeypatch):
    (tmp_path / "folder").write_text("a file")
    file, opened = open_file("folder/things.sqlite"), []
    connect = CacheFile.__init__.__globals__["_Link"]._open
    monkeypatch.setattr("llmops_ref.cache_files._Link._open", lambda link: opened.append(1) or connect(link))
    with told("cannot be opened"):
        for _ in range(5):
            with pytest.raises(FileUnavailable):
                load(file)
        assert len(opened) == 1
        file.retry()
        with pytest.raises(FileUnavailable):
            load(file)
        assert len(opened) == 2
    os.unlink(tmp_path / "folder")
    file.retry()
    store(file)
    assert load(file) == b"x"


def test_durable_deletes_leave_nothing_in_the_file(open_file, tmp_path):
    file = open_file()
    store(file, 1, b"a very secret thing" * 100)
    with file.writing(durable=True) as connection:
        connection.execute("DELETE FROM things")
    file.empty_journal()
    assert b"very secret" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())


def test_the_bound_counts_the_journal(open_file):
    file = open_file(max_bytes=1 << 18)
    with told("disk is full"):
        for number in range(200):
            with contextlib.suppress(FileUnavailable):
                store(file, number, b"x" * 5000)
            assert file.bytes() <= 1 << 18
    assert load(file, 0) == b"x" * 5000
    for wrong in (0, 1000, 1e9, True, "1"):
        with pytest.raises(BadInputError):
            open_file("other.sqlite", max_bytes=wrong)


def test_a_reader_does_not_wait_for_a_writer(open_file):
    file, ready, done = open_file(), threading.Event(), threading.Event()
    store(file)

    def write():
        with file.writing() as connection:
            connection.execute("UPDATE things SET value = x'00'")
            ready.set()
            done.wait(10)

    thread = threading.Thread(target=write)
    thread.start()
    assert ready.wait(10) and load(file) == b"x"
    done.set()
    thread.join()
    assert load(file) == b"\x00"
