"""The ledger: every count once, at the right price, through threads, processes, kills, forks and failing disks."""

from __future__ import annotations

import contextlib
import csv
import datetime
import json
import math
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmops_ref.cache_ledger import OUTCOMES, Ledger, Price, PriceFileError, PriceList
from llmops_ref.core import BadInputError
from llmops_ref.exact_cache import CacheDegradedWarning

CALL = {"model": "m", "input_tokens": 900, "cached_input_tokens": 500, "output_tokens": 80, "seconds": 2.0}
PRICES = PriceList.from_dict({"models": {"m": {"input": 2.0, "cached_input": 0.2, "output": 8.0}}})
ONE = (400 * 2.0 + 500 * 0.2 + 80 * 8.0) / 1e6    # what CALL costs


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


# Prices


def test_example_file_is_valid_and_names_no_real_model(tmp_path):
    PriceList.write_example(tmp_path / "prices.toml")
    prices = PriceList.from_file(tmp_path / "prices.toml")
    assert all(name.startswith("example") for name in prices.models) and prices.as_of
    with pytest.raises(PriceFileError, match="new file"):
        PriceList.write_example(tmp_path / "prices.toml")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('[models."a"]\ninput = "2.50"', ['models."a".input', "not a number", "in quotes"]),
        ('[models."a"]\noutput = 1', ['models."a".input', "missing"]),
        ('[models."a"]\ninput = true', ['models."a".input', "not a number"]),
        ('[models."a"]\ninput = nan', ['models."a".input']),
        ('[models."a"]\ninput = -0.01', ['models."a".input']),
        ('[models."a"]\ninput = 1e9', ['models."a".input']),
        ('[models."a"]\ninput = 1\ncached = 0.1', ["'cached'", "cached_input"]),
        ('[models."a"]\ninput = 1\ncached_input = 2', ['models."a".cached_input', "above input"]),
        ('[models."a"]\ninput = 1\ncurrency = "eur"', ['models."a".currency', "capitals"]),
        ("[models.name-1.5]\ninput = 1", ["'5'", "quotes"]),
        ('models = ["a"]', ["models"]),
        ('[models]\na = 3', ['models."a"', "is 3"]),
        ('[models.""]\ninput = 3', ["models"]),
        ("currency = 3", ["currency"]),
        ('as_of = "yesterday"', ["as_of"]),
        ("[prices]", ["'prices'"]),
        ("input = = 3", ["TOML", "line 1"]),
    ],
)
def test_errors_of_a_price_file_name_file_and_key(tmp_path, text, names):
    with pytest.raises(PriceFileError) as raised:
        PriceList.from_file(write(tmp_path / "mine.toml", text))
    assert all(name in str(raised.value) for name in ["mine.toml", *names]), str(raised.value)


def test_price_file_that_is_missing_or_not_utf8(tmp_path):
    with pytest.raises(PriceFileError, match="cannot be read"):
        PriceList.from_file(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes('# £\xe9'.encode("latin-1"))
    with pytest.raises(PriceFileError, match="UTF-8"):
        PriceList.from_file(tmp_path / "latin.toml")


def test_the_name_beats_the_longest_pattern_and_that_beats_the_shorter():
    prices = PriceList.from_dict({"models": {"big": {"input": 1}, "big-*": {"input": 2}, "big-x*": {"input": 3}, "big-xl": {"input": 4}}})
    assert [prices.price(name).input for name in ("big", "big-a", "big-xy", "big-xl")] == [1, 2, 3, 4]
    assert prices.price("small") is None and prices.price("BIG") is None


def test_embedded_models_cost_nothing_a_token_under_the_names_they_report():
    from llmops_ref.embeddings import MODEL_NAME
    from llmops_ref.engine import CHAT_MODEL_NAME

    for name in (CHAT_MODEL_NAME, MODEL_NAME, f"{MODEL_NAME}/int8/abc", "embedded", "embedded:int8"):
        assert PriceList().price(name).of(10**6, 10**6) == 0
    assert PriceList.from_dict({"models": {CHAT_MODEL_NAME: {"input": 1}}}).price(CHAT_MODEL_NAME).input == 1


def test_cached_input_is_charged_at_its_own_price():
    assert Price(2.0, 8.0, 0.2).of(900, 80, 500) == pytest.approx(ONE)
    assert Price(2.0, 8.0).of(900, 80, 500) == pytest.approx((900 * 2 + 80 * 8) / 1e6)


# Counting


def test_summary_counts_values_and_takes_wrong_hits_back(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite3", PRICES)
    for outcome, times in {"hit": 10, "shared": 2, "miss": 7, "error": 1, "shadow": 3, "refused": 4, "wrong": 2, "right": 6}.items():
        for _ in range(times):
            ledger.record(outcome, tenant="acme", kind="semantic" if outcome in ("wrong", "right") else "exact", **CALL)
    for _ in range(20):
        ledger.record("overhead", tenant="acme", kind="semantic", model="all-MiniLM-L6-v2", input_tokens=9, seconds=0.01)
    total = ledger.summary().total
    assert (total.requests, total.hits, total.misses, total.shared, total.errors) == (20, 10, 7, 2, 1)
    assert (total.shadow, total.refused, total.wrong, total.right) == (3, 4, 2, 6)
    assert total.input_tokens == (12 - 2) * 900 and total.output_tokens == (12 - 2) * 80
    assert total.seconds == pytest.approx(10 * 2 - 2 * 2 - 20 * 0.01) and total.overhead_seconds == pytest.approx(0.2)
    assert total.money == {"USD": pytest.approx(10 * ONE)} and total.wrong_money == {"USD": pytest.approx(2 * ONE)}
    assert total.hit_rate.value == 0.5 and total.hit_rate.low < 0.5 < total.hit_rate.high
    assert total.wrong_hit_rate.value == 0.2 and total.judged_wrong_rate.value == 0.25 and total.judged_wrong_rate.n == 8


def test_an_unknown_model_is_unpriced_and_never_free(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite3", PRICES)
    ledger.record("hit", tenant="a", **CALL | {"model": "new"})
    assert ledger.summary().total.money is None and ledger.summary().total.unpriced == 1
    assert "not known" in str(ledger.summary()) and "1 unpriced" in ledger.summary()._repr_markdown_()
    ledger.record("hit", tenant="a", **CALL)
    total = ledger.summary().total
    assert total.money == {"USD": pytest.approx(ONE)} and total.unpriced == 1


def test_currencies_are_never_added_up(tmp_path):
    prices = PriceList.from_dict({"currency": "EUR", "models": {"a": {"input": 1}, "b": {"input": 1, "currency": "USD"}}})
    ledger = Ledger(tmp_path / "l.sqlite3", prices)
    for model in ("a", "b"):
        ledger.record("hit", tenant="t", model=model, input_tokens=10**6)
    assert ledger.summary().total.money == {"EUR": 1.0, "USD": 1.0}


def test_groups(tmp_path):
    clock = [0.0]
    ledger = Ledger(tmp_path / "l.sqlite3", PRICES, clock=lambda: clock[0])
    for day, (tenant, kind) in enumerate([("a", "exact"), ("b", "semantic"), ("b", "exact")]):
        clock[0] = day * 86400.0 + 5
        ledger.record("hit", tenant=tenant, kind=kind, **CALL)
        ledger.record("miss", tenant=tenant, **CALL)
    hits = {by: {row.name: row.hits for row in ledger.summary(by).rows} for by in ("tenant", "model", "day", "kind")}
    assert hits == {"tenant": {"a": 1, "b": 2}, "model": {"m": 3}, "day": {"1970-01-01": 1, "1970-01-02": 1, "1970-01-03": 1}, "kind": {"exact": 2, "semantic": 1}}
    assert [row.hit_rate.n for row in ledger.summary("kind").rows] == [6, 6]    # of all requests
    assert ledger.summary(since=86400.0).total.hits == 2
    assert ledger.summary(since=datetime.date(1970, 1, 3)).total.hits == 1
    assert ledger.summary(since=datetime.datetime(1970, 1, 3, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=1)))).total.hits == 1
    assert ledger.summary(since=1e11).rows == []
    for bad in ("week", "day; DROP TABLE counts"):
        with pytest.raises(BadInputError, match="Use one of"):
            ledger.summary(bad)
    for moment in ("yesterday", True, math.nan, 1e13):
        with pytest.raises(BadInputError, match="no moment"):
            ledger.summary(since=moment)


def test_an_empty_ledger_claims_nothing(tmp_path):
    total = Ledger(tmp_path / "l.sqlite3").summary().total
    assert (total.hit_rate, total.wrong_hit_rate, total.judged_wrong_rate) == (None, None, None) and total.money == {}
    assert not (tmp_path / "l.sqlite3").exists()
    json.dumps(Ledger(tmp_path / "l.sqlite3").summary().to_dict(), allow_nan=False)


@pytest.mark.parametrize("change", [
    {"outcome": "hits"}, {"outcome": ["hit"]}, {"tenant": ""}, {"tenant": None}, {"kind": "fuzzy"}, {"input_tokens": -1}, {"input_tokens": "9"}, {"output_tokens": 1e13},
    {"input_tokens": 1, "cached_input_tokens": 2}, {"seconds": math.nan}, {"seconds": math.inf}, {"seconds": -1}, {"output_tokens": None},
])
def test_a_record_that_cannot_be_one_is_refused_and_not_counted(tmp_path, change):
    ledger = Ledger(tmp_path / "l.sqlite3")
    with pytest.raises(BadInputError):
        ledger.record(**{"outcome": "hit", "tenant": "a"} | change)
    assert ledger.summary().total.requests == 0


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(sorted(OUTCOMES)), st.text(st.characters(), min_size=1, max_size=5), st.text(max_size=5), st.integers(0, 10**9), st.floats(0, 1e6)), max_size=20))
def test_any_events_come_back_as_they_were(tmp_path, events):
    "Any text as a tenant or a model, half surrogate pairs and zero bytes included: no event is lost, none doubled."
    file = tmp_path / "any.sqlite3"
    for end in ("", "-wal", "-shm"):
        file.with_name(file.name + end).unlink(missing_ok=True)
    with Ledger(file) as ledger:
        for outcome, tenant, model, tokens, seconds in events:
            ledger.record(outcome, tenant=tenant, model=model, input_tokens=tokens, seconds=seconds)
        total = Ledger(file).summary() if not events else ledger.summary()
    count = Counter(outcome for outcome, *_ in events)
    found = total.total
    assert (found.hits, found.misses, found.shared, found.wrong) == tuple(count[name] for name in ("hit", "miss", "shared", "wrong"))
    tokens = sum(number * {"hit": 1, "shared": 1, "wrong": -1}.get(outcome, 0) for outcome, _, _, number, _ in events)
    assert found.input_tokens == tokens and not total.degraded
    json.dumps(total.to_dict(), allow_nan=False)


# Display and export


def test_exports(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite3", PRICES)
    for tenant in ("acme|x", "=SUM(A1)"):
        ledger.record("hit", tenant=tenant, **CALL)
    ledger.summary().save(tmp_path / "s.csv")
    with open(tmp_path / "s.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["'=SUM(A1)", "acme|x", "total"]
    assert float(rows[2]["money_USD"]) == pytest.approx(2 * ONE) and float(rows[2]["hit_rate_low"]) < 1
    ledger.summary().save(tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text()) == json.loads(json.dumps(ledger.summary().to_dict()))
    assert "acme\\|x" in ledger.summary()._repr_markdown_() and ledger._repr_markdown_() == ledger.summary()._repr_markdown_()
    with pytest.raises(BadInputError, match=r"\.csv"):
        ledger.summary().save(tmp_path / "s.xlsx")


def test_no_text_of_a_request_can_get_in():
    import inspect

    assert set(inspect.signature(Ledger.record).parameters) == {"self", "outcome", "tenant", "kind", "model", "input_tokens", "output_tokens", "cached_input_tokens", "seconds"}


# Threads, processes, kills


def test_threads_lose_nothing(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite3", interval=0.005)

    def work():
        for _ in range(2000):
            ledger.record("hit", tenant="a", input_tokens=3)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        ledger.flush()
        ledger.summary()
    for thread in threads:
        thread.join()
    ledger.close()
    total = Ledger(tmp_path / "l.sqlite3").summary().total
    assert (total.hits, total.input_tokens) == (16000, 48000)


def test_written_without_a_call(tmp_path):
    "The thread of its own writes soon after a record."
    ledger = Ledger(tmp_path / "l.sqlite3", interval=0.02)
    for expected in (1, 2):
        ledger.record("hit", tenant="a")
        until = time.monotonic() + 10
        while Ledger(tmp_path / "l.sqlite3").summary().total.hits < expected and time.monotonic() < until:
            time.sleep(0.02)
        assert Ledger(tmp_path / "l.sqlite3").summary().total.hits == expected


RECORDING = "import sys; from llmops_ref.cache_ledger import Ledger; l = Ledger(sys.argv[1]); [l.record('hit', tenant='a', input_tokens=7) for _ in range({})]; print('done', flush=True); {}"


def test_processes_share_a_file_and_exit_writes_the_rest(tmp_path):
    file = str(tmp_path / "l.sqlite3")
    children = [subprocess.Popen([sys.executable, "-c", RECORDING.format(1000, ""), file], stdout=subprocess.DEVNULL) for _ in range(3)]
    assert [child.wait(60) for child in children] == [0, 0, 0]
    total = Ledger(file).summary().total
    assert (total.hits, total.input_tokens) == (3000, 21000)


def test_a_killed_process_leaves_whole_rows_and_all_but_the_last_second(tmp_path):
    file = str(tmp_path / "l.sqlite3")
    more = "import time; time.sleep(1.0); print('later', flush=True); [l.record('hit', tenant='a', input_tokens=7) for _ in range(10**9)]"
    child = subprocess.Popen([sys.executable, "-c", RECORDING.format(5000, more), file], stdout=subprocess.PIPE, text=True)
    assert [child.stdout.readline().strip() for _ in range(2)] == ["done", "later"]
    time.sleep(0.7)    # in the middle of recording and writing
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    total = Ledger(file).summary().total
    assert total.hits >= 5000 and total.input_tokens == 7 * total.hits
    with contextlib.closing(sqlite3.connect(file)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    with Ledger(file) as again:
        again.record("hit", tenant="a", input_tokens=7)
    assert Ledger(file).summary().total.hits == total.hits + 1


def _count_in_child(ledger):
    for _ in range(5):
        ledger.record("miss", tenant="child")
    ledger.close()


def test_a_forked_child_counts_its_own_and_not_its_parents(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite3", interval=60)
    for _ in range(10):
        ledger.record("hit", tenant="parent")
    child = multiprocessing.get_context("fork").Process(target=_count_in_child, args=(ledger,))
    child.start()
    child.join()
    assert child.exitcode == 0
    total = ledger.summary().total
    assert (total.hits, total.misses) == (10, 5)


# Disks and clocks


def degraded(action):
    "Run an action; the texts of the warnings that it gave."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    assert all(item.category is CacheDegradedWarning for item in caught)
    return [str(item.message) for item in caught]


def test_a_file_that_is_no_database_costs_one_warning_and_no_count(tmp_path):
    file = write(tmp_path / "l.sqlite3", "no database" * 200)
    ledger = Ledger(file, interval=0.01)

    def work():
        for _ in range(5):
            ledger.record("hit", tenant="a")
            assert not ledger.flush()
        assert ledger.summary().total.hits == 5 and "not a database" in ledger.summary().degraded

    texts = degraded(work)
    assert len(texts) == 1 and "l.sqlite3" in texts[0] and str(tmp_path) not in texts[0]
    assert file.read_text() == "no database" * 200    # never overwritten
    file.unlink()
    assert ledger.flush() and Ledger(file).summary().total.hits == 5 and not ledger.summary().degraded


def test_a_full_disk(tmp_path, monkeypatch):
    from llmops_ref import cache_ledger as module

    def full(*_):
        raise sqlite3.OperationalError("database or disk is full")

    ledger = Ledger(tmp_path / "l.sqlite3", interval=60)
    ledger.record("hit", tenant="a")
    with monkeypatch.context() as patch:
        patch.setattr(module, "_write", full)
        assert "full" in degraded(ledger.flush)[0] and ledger.summary().total.hits == 1
    ledger.record("hit", tenant="a")
    assert ledger.flush() and Ledger(tmp_path / "l.sqlite3").summary().total.hits == 2


def test_a_disk_that_stays_full_does_not_fill_the_memory(tmp_path, monkeypatch):
    from llmops_ref import cache_ledger as module

    monkeypatch.setattr(module, "_MANY", 50)
    file = write(tmp_path / "l.sqlite3", "no database" * 200)
    ledger = Ledger(file, interval=60)
    for number in range(200):
        ledger.record("hit", tenant=f"t{number}")
    degraded(ledger.flush)
    assert len(ledger._held) == 50
    ledger.record("hit", tenant="t1")
    degraded(ledger.flush)
    assert ledger._held[next(key for key in ledger._held if key[1] == "t1")][0] == 2
    ledger._held.clear()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path):
    file = tmp_path / "ro" / "l.sqlite3"
    with Ledger(file) as ledger:
        ledger.record("hit", tenant="a")
    file.parent.chmod(0o500)
    try:
        assert Ledger(file).summary().total.hits == 1
        other = Ledger(file)
        other.record("hit", tenant="a")
        assert len(degraded(other.flush)) == 1 and other.summary().total.hits == 2
    finally:
        file.parent.chmod(0o700)


def test_a_path_below_a_file(tmp_path):
    write(tmp_path / "file", "")
    ledger = Ledger(tmp_path / "file" / "l.sqlite3", interval=60)
    ledger.record("hit", tenant="a")
    assert len(degraded(ledger.flush)) == 1 and ledger.summary().total.hits == 1
    ledger._held.clear()


def test_a_later_format_is_left_alone(tmp_path):
    file = tmp_path / "l.sqlite3"
    with Ledger(file) as ledger:
        ledger.record("hit", tenant="a")
    with contextlib.closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA user_version=2")
    later = Ledger(file, interval=60)
    later.record("hit", tenant="a")
    assert "format 2" in degraded(later.flush)[0] and "format 2" in later.summary().degraded
    later._held.clear()


def test_another_programs_database_is_left_alone(tmp_path):
    file = tmp_path / "l.sqlite3"
    with contextlib.closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE counts (x)")
    ledger = Ledger(file, interval=60)
    ledger.record("hit", tenant="a")
    assert len(degraded(ledger.flush)) == 1 and ledger.summary().total.hits == 1
    ledger._held.clear()


def test_where_warnings_are_errors_nothing_is_raised(tmp_path):
    ledger = Ledger(write(tmp_path / "l.sqlite3", "no database" * 200), interval=60)
    ledger.record("hit", tenant="a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not ledger.flush()
    ledger._held.clear()


def test_a_clock_that_goes_backwards_loses_nothing(tmp_path):
    clock = [1e9]
    ledger = Ledger(tmp_path / "l.sqlite3", clock=lambda: clock[0])
    for at in (1e9, 1e9 - 1e6, -5.0, math.nan, 1e9 + 60):
        clock[0] = at
        ledger.record("hit", tenant="a", seconds=1.0)
    assert (ledger.summary().total.hits, ledger.summary().total.seconds) == (5, 5.0)


def test_prune(tmp_path):
    clock = [100 * 86400.0]
    ledger = Ledger(tmp_path / "l.sqlite3", clock=lambda: clock[0])
    assert ledger.prune(days=1) == 0
    ledger.record("hit", tenant="old")
    clock[0] += 50 * 86400
    ledger.record("hit", tenant="new")
    assert ledger.prune(days=60) == 0 and ledger.prune(days=30) == 1
    assert [row.name for row in ledger.summary().rows] == ["new"]
    assert b"old" not in (tmp_path / "l.sqlite3").read_bytes()    # rewritten, not only marked as free
    clock[0] += 10_000 * 86400
    assert ledger.prune(days=30) == 0    # a clock that ran ahead
    for bad in (-1, math.nan, math.inf, True, "30"):
        with pytest.raises(BadInputError):
            ledger.prune(bad)


def test_recording_after_close_is_counted(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite3", interval=0.02)
    ledger.record("hit", tenant="a")
    ledger.close()
    ledger.close()
    ledger.record("hit", tenant="a")
    ledger.close()
    assert Ledger(tmp_path / "l.sqlite3").summary().total.hits == 2


def test_an_unused_ledger_can_go(tmp_path):
    import gc
    import weakref

    ledger = Ledger(tmp_path / "l.sqlite3", interval=0.01)
    ledger.record("hit", tenant="a")
    ledger.flush()
    gone = weakref.ref(ledger)
    del ledger
    until = time.monotonic() + 5
    while gone() is not None and time.monotonic() < until:
        gc.collect()
        time.sleep(0.01)
    assert gone() is None


@pytest.mark.benchmark
def test_recording_is_far_cheaper_than_an_insert(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite3", interval=60)
    with contextlib.closing(sqlite3.connect(tmp_path / "d.sqlite3", isolation_level=None)) as direct:
        direct.execute("PRAGMA journal_mode=WAL")
        direct.execute("CREATE TABLE e (at REAL, tenant TEXT)")
        best = {}
        for name, action in {"record": lambda: ledger.record("hit", tenant="a", **CALL), "insert": lambda: direct.execute("INSERT INTO e VALUES (1.0, 'a')")}.items():
            rounds = []
            for _ in range(5):
                start = time.process_time()
                for _ in range(300):
                    action()
                rounds.append(time.process_time() - start)
            best[name] = min(rounds)
    assert best["record"] * 3 < best["insert"]


def test_a_bad_interval(tmp_path):
    for interval in (0, -1, 61, math.nan):
        with pytest.raises(BadInputError):
            Ledger(tmp_path / "l.sqlite3", interval=interval)
