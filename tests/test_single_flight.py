"""One call for many identical misses: threads, asyncio, processes; failures, cancellations, kills; streams that ended and streams that did not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import AIMessageChunk

from llmops_ref.cache_files import CacheDegradedWarning
from llmops_ref.core import BadInputError
from llmops_ref.exact_cache import Response, Scope
from llmops_ref.single_flight import (
    FileLocks,
    ReentrantFlightError,
    SingleFlight,
    arecord_stream,
    areplay,
    is_complete,
    record_stream,
    replay,
    stream_response,
)

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 20.0    # seconds after which a test gives up: no test needs a tenth of it


def until(condition: Callable[[], bool]) -> None:
    "Wait for a condition, and fail where it does not come."
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, "the condition did not come about"
        time.sleep(0.002)


async def auntil(condition: Callable[[], bool]) -> None:
    "As `until`, for a running event loop."
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, "the condition did not come about"
        await asyncio.sleep(0.002)


class Upstream:
    "A model that counts its calls, and answers when it is told to."

    def __init__(self, errors: tuple[BaseException, ...] = ()) -> None:
        self.calls = 0
        self.errors = list(errors)
        self.store: dict[str, str] = {}
        self.go = threading.Event()

    def recall(self) -> str | None:
        return self.store.get("k")

    def compute(self) -> str:
        self.calls += 1
        assert self.go.wait(LIMIT)
        if self.errors:
            raise self.errors.pop(0)
        self.store["k"] = f"answer {self.calls}"
        return self.store["k"]

    async def acompute(self) -> str:
        self.calls += 1
        while not self.go.is_set():
            await asyncio.sleep(0.002)
        if self.errors:
            raise self.errors.pop(0)
        self.store["k"] = f"answer {self.calls}"
        return self.store["k"]


def outcome(call: Callable[[], Any]) -> Any:
    "What a call returned, or the error that it raised."
    try:
        return call()
    except Exception as error:
        return error


# ------------------------------------------------------------------ one call


def test_64_threads_make_one_call() -> None:
    upstream, flight = Upstream(), SingleFlight()
    with ThreadPoolExecutor(64) as pool:
        futures = [pool.submit(flight.run, "k", upstream.recall, upstream.compute) for _ in range(64)]
        until(lambda: flight.waiting("k") == 63)
        upstream.go.set()
        assert {future.result(LIMIT) for future in futures} == {"answer 1"}
    assert upstream.calls == 1
    assert flight.waiting("k") == 0


def test_64_tasks_make_one_call() -> None:
    async def main() -> None:
        upstream, flight = Upstream(), SingleFlight()
        tasks = [asyncio.create_task(flight.arun("k", upstream.recall, upstream.acompute)) for _ in range(64)]
        await auntil(lambda: flight.waiting("k") == 63)
        upstream.go.set()
        assert set(await asyncio.gather(*tasks)) == {"answer 1"}
        assert upstream.calls == 1

    asyncio.run(main())


@pytest.mark.parametrize("leader", ["thread", "task"])
def test_threads_and_tasks_of_two_loops_share(leader: str, tmp_path: Path) -> None:
    upstream, flight = Upstream(), SingleFlight(tmp_path)

    async def tasks(number: int) -> list[str]:
        return await asyncio.gather(*(flight.arun("k", upstream.recall, upstream.acompute) for _ in range(number)))

    with ThreadPoolExecutor(12) as pool:
        first = pool.submit(flight.run, "k", upstream.recall, upstream.compute) if leader == "thread" else pool.submit(asyncio.run, tasks(1))
        until(lambda: upstream.calls == 1)
        rest = [pool.submit(asyncio.run, tasks(8)) for _ in range(2)]
        threads = [pool.submit(flight.run, "k", upstream.recall, upstream.compute) for _ in range(8)]
        until(lambda: flight.waiting("k") == 24)
        upstream.go.set()
        answers = [first.result(LIMIT), *(answer for future in rest for answer in future.result(LIMIT)), *(t.result(LIMIT) for t in threads)]
    assert {answer if isinstance(answer, str) else answer[0] for answer in answers} == {"answer 1"}
    assert upstream.calls == 1
    assert list(tmp_path.iterdir()) == []


def test_different_keys_do_not_wait_for_each_other() -> None:
    upstream, flight = Upstream(), SingleFlight()
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(flight.run, "k", upstream.recall, upstream.compute)
        until(lambda: upstream.calls == 1)
        assert flight.run("other", lambda: None, lambda: "at once") == "at once"
        upstream.go.set()
        assert slow.result(LIMIT) == "answer 1"


def test_the_leader_looks_into_the_cache_again() -> None:
    "Between a caller's miss and its lead another one may have stored the answer."
    upstream, flight = Upstream(), SingleFlight()
    upstream.store["k"] = "stored meanwhile"
    assert flight.run("k", upstream.recall, upstream.compute) == "stored meanwhile"
    assert asyncio.run(flight.arun("k", upstream.recall, upstream.acompute)) == "stored meanwhile"
    assert upstream.calls == 0


def test_a_value_of_none_is_shared_and_asked_for_again_the_next_time() -> None:
    flight, calls = SingleFlight(), []
    for _ in range(2):
        assert flight.run("k", lambda: None, lambda: calls.append(1)) is None
    assert len(calls) == 2


WORKER = """
import json, os, sys, threading, time
from pathlib import Path
from llmops_ref.single_flight import SingleFlight

folder, threads, mode = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
flight = SingleFlight(folder / "locks", timeout=60)
calls, store = folder / "calls", folder / "store"

def recall():
    return store.read_text() if store.exists() else None

def compute():
    with calls.open("a") as file:
        file.write(f"{os.getpid()}\\n")
    if mode == "hang":
        time.sleep(60)
    time.sleep(0.2)
    if mode != "unstored":
        temporary = folder / f"store.{os.getpid()}"
        temporary.write_text("answer")
        temporary.rename(store)
    return "answer"

print("ready", flush=True)
sys.stdin.readline()
answers = []
workers = [threading.Thread(target=lambda: answers.append(flight.run("k", recall, compute))) for _ in range(threads)]
for worker in workers: worker.start()
print("started", flush=True)
for worker in workers: worker.join()
print(json.dumps(answers), flush=True)
"""


def worker(folder: Path, threads: int, mode: str = "store") -> subprocess.Popen[str]:
    "A process that is ready to ask."
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(folder), str(threads), mode], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )
    assert process.stdout is not None
    return process


def go(process: subprocess.Popen[str]) -> None:
    "Let a ready process ask."
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("go\n")
    process.stdin.flush()


def calls(folder: Path) -> int:
    "How many upstream calls all processes made."
    return len((folder / "calls").read_text().splitlines()) if (folder / "calls").exists() else 0


def test_64_callers_in_4_processes_make_one_call(tmp_path: Path) -> None:
    processes = [worker(tmp_path, 16) for _ in range(4)]
    for process in processes:
        go(process)
    answers = [json.loads(process.communicate(timeout=LIMIT)[0].splitlines()[-1]) for process in processes]
    assert answers == [["answer"] * 16] * 4
    assert calls(tmp_path) == 1
    assert list((tmp_path / "locks").iterdir()) == []


def test_a_killed_leader_costs_one_more_call(tmp_path: Path) -> None:
    leader, followers = worker(tmp_path, 1, "hang"), [worker(tmp_path, 8) for _ in range(2)]
    go(leader)
    until(lambda: calls(tmp_path) == 1)
    for process in followers:
        go(process)
        assert process.stdout is not None and process.stdout.readline() == "started\n"
    leader.send_signal(signal.SIGKILL)
    leader.communicate(timeout=LIMIT)
    answers = [json.loads(process.communicate(timeout=LIMIT)[0].splitlines()[-1]) for process in followers]
    assert answers == [["answer"] * 8] * 2
    assert calls(tmp_path) == 2
    assert list((tmp_path / "locks").iterdir()) == []


def test_where_nothing_can_be_stored_each_process_makes_one_call(tmp_path: Path) -> None:
    processes = [worker(tmp_path, 8, "unstored") for _ in range(2)]
    for process in processes:
        go(process)
    assert [json.loads(process.communicate(timeout=LIMIT)[0].splitlines()[-1]) for process in processes] == [["answer"] * 8] * 2
    assert calls(tmp_path) == 2


@pytest.mark.parametrize("seed", range(4))
def test_a_crowd_that_fails_and_gives_up_at_random_never_calls_twice_at_once_and_never_hangs(seed: int, tmp_path: Path) -> None:
    "Threads and tasks of two loops on three keys; callers fail, are cancelled and come again. Nobody hangs, nothing is left."
    flight, inside, chance = SingleFlight(tmp_path, attempts=100), dict.fromkeys("abc", 0), random.Random(seed)
    plans = [[(chance.choice("abc"), chance.choice(["ok", "ok", "fail", "slow"]), chance.random() / 200) for _ in range(8)] for _ in range(24)]

    @contextlib.contextmanager
    def leading(key: str, fate: str) -> Iterator[None]:
        inside[key] += 1
        assert inside[key] == 1, "two leaders"
        try:
            yield
        finally:
            inside[key] -= 1
        if fate == "fail":
            raise ConnectionError

    def thread(plan: list[tuple[str, str, float]]) -> int:
        answered = 0
        for key, fate, pause in plan:
            def compute(key: str = key, fate: str = fate, pause: float = pause) -> str:
                with leading(key, fate):
                    time.sleep(pause)
                return key
            with contextlib.suppress(ConnectionError):
                answered += flight.run(key, lambda: None, compute) == key
        return answered

    async def task(plan: list[tuple[str, str, float]]) -> int:
        answered = 0
        for key, fate, pause in plan:
            async def compute(key: str = key, fate: str = fate, pause: float = pause) -> str:
                with leading(key, fate):
                    await asyncio.sleep(pause)
                return key
            with contextlib.suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(pause if fate == "slow" else LIMIT):    # cancelled in the middle, as leader or as follower
                    answered += await flight.arun(key, lambda: None, compute) == key
        return answered

    async def tasks(some: list[list[tuple[str, str, float]]]) -> list[int]:
        return await asyncio.gather(*map(task, some))

    with ThreadPoolExecutor(10) as pool:
        loops = [pool.submit(asyncio.run, tasks(plans[start : start + 8])) for start in (0, 8)]
        threads = [pool.submit(thread, plan) for plan in plans[16:]]
        assert all(number >= 1 for one in loops for number in one.result(LIMIT)) and all(one.result(LIMIT) >= 1 for one in threads)
    assert flight._flights.table == {} and set(inside.values()) == {0}
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ failures


def run_all(flight: SingleFlight, upstream: Upstream, callers: int) -> list[Any]:
    "What each of many concurrent callers got, the leader first."
    with ThreadPoolExecutor(callers) as pool:
        futures = [pool.submit(outcome, lambda: flight.run("k", upstream.recall, upstream.compute)) for _ in range(callers)]
        until(lambda: flight.waiting("k") == callers - 1)
        upstream.go.set()
        return [future.result(LIMIT) for future in futures]


def test_a_failed_leader_does_not_poison_the_followers() -> None:
    upstream = Upstream((ConnectionError("first"), ConnectionError("second")))
    results = run_all(SingleFlight(), upstream, 12)
    assert sorted(str(result) for result in results if isinstance(result, Exception)) == ["first", "second"]
    assert [result for result in results if not isinstance(result, Exception)] == ["answer 3"] * 10
    assert upstream.calls == 3


def test_a_dead_upstream_is_not_asked_once_for_each_follower() -> None:
    upstream = Upstream(tuple(ConnectionError(f"call {number}") for number in range(1, 13)))
    results = run_all(SingleFlight(attempts=3), upstream, 12)
    assert sorted(map(str, results)) == ["call 1", "call 2", *["call 3"] * 10]
    assert all(type(result) is ConnectionError for result in results)
    assert upstream.calls == 3


def test_a_permanent_failure_is_shared_at_once() -> None:
    upstream = Upstream((ValueError("this prompt is too long"),))
    results = run_all(SingleFlight(permanent=lambda error: isinstance(error, ValueError)), upstream, 6)
    assert [str(result) for result in results] == ["this prompt is too long"] * 6
    assert upstream.calls == 1


def test_a_failure_is_forgotten_once_nobody_waits() -> None:
    upstream, flight = Upstream((ConnectionError("once"),)), SingleFlight(attempts=1)
    upstream.go.set()
    with pytest.raises(ConnectionError):
        flight.run("k", upstream.recall, upstream.compute)
    assert flight.run("k", upstream.recall, upstream.compute) == "answer 2"


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_leader_hands_over(kind: type[BaseException]) -> None:
    upstream, flight = Upstream((kind(),)), SingleFlight(attempts=1)
    with ThreadPoolExecutor(5) as pool:
        futures = [pool.submit(flight.run, "k", upstream.recall, upstream.compute) for _ in range(5)]
        until(lambda: flight.waiting("k") == 4)
        upstream.go.set()
        errors = [future.exception(LIMIT) for future in futures]
    assert [type(error) for error in errors if error] == [kind]
    assert upstream.calls == 2


def test_a_cancelled_leader_hands_over_and_a_cancelled_follower_harms_nobody() -> None:
    async def main() -> None:
        upstream, flight = Upstream(), SingleFlight(attempts=1)
        tasks = [asyncio.create_task(flight.arun("k", upstream.recall, upstream.acompute)) for _ in range(6)]
        await auntil(lambda: flight.waiting("k") == 5)
        tasks[3].cancel()
        await auntil(lambda: flight.waiting("k") == 4)
        tasks[0].cancel()
        await auntil(lambda: upstream.calls == 2)
        upstream.go.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [asyncio.CancelledError, str, str, asyncio.CancelledError, str, str]
        assert upstream.calls == 2

    asyncio.run(main())


def test_a_follower_that_is_cancelled_just_as_it_is_given_the_lead_passes_it_on() -> None:
    async def main() -> None:
        upstream, flight = Upstream((ConnectionError("leader"),)), SingleFlight()
        with ThreadPoolExecutor(1) as pool:
            leader = pool.submit(flight.run, "k", upstream.recall, upstream.compute)
            await auntil(lambda: upstream.calls == 1)
            heir, next_one = (asyncio.create_task(flight.arun("k", upstream.recall, upstream.acompute)) for _ in range(2))
            await auntil(lambda: flight.waiting("k") == 2)
            upstream.go.set()
            until(leader.done)    # this loop stands still meanwhile: the heir has the lead and does not know it
            heir.cancel()
            assert await next_one == "answer 2"
        with pytest.raises(asyncio.CancelledError):
            await heir

    asyncio.run(main())


def test_a_follower_does_not_wait_for_ever_and_others_follow_the_one_that_lost_patience() -> None:
    stuck, upstream, flight = threading.Event(), Upstream(), SingleFlight(timeout=0.1)
    upstream.go.set()
    with ThreadPoolExecutor(9) as pool:
        leader = pool.submit(flight.run, "k", upstream.recall, lambda: stuck.wait(LIMIT) and "late")
        until(lambda: flight._flights.table.get("k") is not None)
        futures = [pool.submit(flight.run, "k", upstream.recall, upstream.compute) for _ in range(8)]
        assert {future.result(LIMIT) for future in futures} == {"answer 1"}
        stuck.set()
        assert leader.result(LIMIT) == "late"
    assert upstream.calls == 1


def test_a_lock_that_is_never_released_delays_and_no_more(tmp_path: Path) -> None:
    release = FileLocks(tmp_path).take("k")
    assert release is not None
    upstream, flight = Upstream(), SingleFlight(tmp_path, timeout=0.1)
    upstream.go.set()
    with ThreadPoolExecutor(4) as pool:
        assert {future.result(LIMIT) for future in [pool.submit(flight.run, "k", upstream.recall, upstream.compute) for _ in range(4)]} == {"answer 1"}
    assert upstream.calls == 1
    release()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_call_that_needs_itself_is_an_error_and_not_a_deadlock(asynchronous: bool) -> None:
    flight = SingleFlight()

    async def nested() -> str:
        return await flight.arun("k", lambda: None, nested)

    with pytest.raises(ReentrantFlightError, match="wait for itself"):
        if asynchronous:
            asyncio.run(nested())
        else:
            flight.run("k", lambda: None, lambda: flight.run("k", lambda: None, lambda: ""))
    assert flight.run("k", lambda: None, lambda: flight.run("inner", lambda: None, lambda: "fine")) == "fine"


def test_a_task_that_outlives_the_call_that_started_it_may_ask_again() -> None:
    async def main() -> None:
        flight, tasks = SingleFlight(), []

        async def later() -> str:
            await asyncio.sleep(0.02)
            return await flight.arun("k", lambda: None, lambda: "second")

        async def compute() -> str:
            tasks.append(asyncio.create_task(later()))
            return "first"

        assert await flight.arun("k", lambda: None, compute) == "first"
        assert await tasks[0] == "second"

    asyncio.run(main())


def test_a_synchronous_call_inside_a_running_loop_does_not_deadlock() -> None:
    async def main() -> None:
        upstream, flight = Upstream(), SingleFlight(timeout=LIMIT)
        leader = asyncio.create_task(flight.arun("k", upstream.recall, upstream.acompute))
        await auntil(lambda: upstream.calls == 1)
        began = time.monotonic()
        assert flight.run("k", lambda: None, lambda: "its own") == "its own"
        assert time.monotonic() - began < LIMIT / 2
        upstream.go.set()
        assert await leader == "answer 1"

    asyncio.run(main())


def test_a_caller_that_blocks_a_loop_is_served_before_the_tasks_of_that_loop() -> None:
    async def main() -> None:
        upstream, flight = Upstream((ConnectionError("leader"),)), SingleFlight(timeout=LIMIT)
        with ThreadPoolExecutor(2) as pool:
            leader = pool.submit(flight.run, "k", upstream.recall, upstream.compute)
            await auntil(lambda: upstream.calls == 1)
            task = asyncio.create_task(flight.arun("k", upstream.recall, upstream.acompute))
            await auntil(lambda: flight.waiting("k") == 1)
            pool.submit(lambda: (until(lambda: flight.waiting("k") == 2), upstream.go.set()))
            assert flight.run("k", upstream.recall, upstream.compute) == "answer 2"
            assert await task == "answer 2"
            assert isinstance(leader.exception(LIMIT), ConnectionError)

    asyncio.run(main())


# ------------------------------------------------------------------ locks


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_neither_inherits_flights_nor_keeps_the_parents_lock(tmp_path: Path) -> None:
    upstream, flight = Upstream(), SingleFlight(tmp_path, timeout=LIMIT)
    with ThreadPoolExecutor(1) as pool:
        leader = pool.submit(flight.run, "k", upstream.recall, upstream.compute)
        until(lambda: upstream.calls == 1)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                os.close(reader)
                held = FileLocks(tmp_path).take("k") is None     # the parent's lock is respected
                fresh = flight.waiting("k") == 0 and flight.run("other", lambda: None, lambda: "child") == "child"
                os.write(writer, b"1" if held and fresh else b"0")
                time.sleep(0.5)    # the child lives on while the parent releases
                code = 0
            os._exit(code)
        os.close(writer)
        assert os.read(reader, 1) == b"1"
        upstream.go.set()
        assert leader.result(LIMIT) == "answer 1"
        release = FileLocks(tmp_path).take("k")
        assert release is not None, "a copy in the child kept the lock"
        release()
        assert os.waitpid(child, 0)[1] == 0
        os.close(reader)


def test_locks_exclude_and_leave_nothing_behind(tmp_path: Path) -> None:
    one, two, inside, most = FileLocks(tmp_path), FileLocks(tmp_path), [0], [0]

    def work(locks: FileLocks) -> None:
        for _ in range(60):
            while (release := locks.take("k")) is None:
                time.sleep(0)
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0)
            inside[0] -= 1
            release()
            release()    # twice does no harm

    threads = [threading.Thread(target=work, args=(locks,)) for locks in (one, two, one, two)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert most == [1]
    assert list(tmp_path.iterdir()) == []


def test_files_that_killed_processes_left_are_swept(tmp_path: Path) -> None:
    release = FileLocks(tmp_path).take("held")
    for path in (*tmp_path.iterdir(), tmp_path / "left.lock", tmp_path / "notes.txt"):
        path.touch()
        os.utime(path, (time.time() - 7200,) * 2)
    (tmp_path / "fresh.lock").touch()
    FileLocks(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"fresh.lock", "notes.txt"} < names and "left.lock" not in names and len(names) == 3
    assert release is not None
    release()


def test_a_folder_that_was_removed_is_made_again(tmp_path: Path) -> None:
    locks = FileLocks(tmp_path / "locks")
    for _ in range(2):
        release = locks.take("k")
        assert release is not None and FileLocks(tmp_path / "locks").take("k") is None
        release()
        (tmp_path / "locks").rmdir()


def test_a_folder_that_cannot_be_used_is_said_once_and_costs_only_sharing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    flight = SingleFlight(tmp_path / "file")
    with pytest.warns(CacheDegradedWarning, match="each makes its own") as caught:
        assert [flight.run(key, lambda: None, lambda: "answer") for key in ("one", "two")] == ["answer"] * 2
    assert len(caught) == 1


@pytest.mark.parametrize("arguments", [{"timeout": 0}, {"timeout": float("nan")}, {"attempts": 0}, {"folder": "x", "locks": FileLocks}])
def test_bad_settings_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(BadInputError):
        SingleFlight(**arguments)


def test_a_cache_key_is_a_key() -> None:
    upstream, flight, key = Upstream(), SingleFlight(), Scope("acme").key("What is the fee?")
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(flight.run, one, upstream.recall, upstream.compute) for one in (key, key.digest, key)]
        until(lambda: flight.waiting(key) == 2)
        upstream.go.set()
        assert {future.result(LIMIT) for future in futures} == {"answer 1"}


def test_a_copy_in_another_process_meets_at_the_same_folder(tmp_path: Path) -> None:
    "As `multiprocessing` hands it over: with its settings and its folder, without those who wait here."
    upstream, flight = Upstream(), SingleFlight(tmp_path, timeout=7.0, attempts=2)
    with ThreadPoolExecutor(1) as pool:
        leader = pool.submit(flight.run, "k", upstream.recall, upstream.compute)
        until(lambda: upstream.calls == 1)
        copy = pickle.loads(pickle.dumps(flight))
        assert (copy._timeout, copy._flights.attempts, copy.waiting("k")) == (7.0, 2, 0)
        assert copy._locks.take("k") is None
        upstream.go.set()
        assert leader.result(LIMIT) == "answer 1" == copy.run("k", upstream.recall, upstream.compute)
    assert upstream.calls == 1


@pytest.mark.parametrize("key", ["", None, 7])
def test_bad_keys_are_refused(key: Any) -> None:
    with pytest.raises(BadInputError):
        SingleFlight().run(key, lambda: None, lambda: "")
    with pytest.raises(BadInputError):
        asyncio.run(SingleFlight().arun(key, lambda: None, lambda: ""))


def test_no_limit_at_all_is_possible() -> None:
    upstream, flight = Upstream(), SingleFlight(timeout=float("inf"))
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(flight.run, "k", upstream.recall, upstream.compute) for _ in range(2)]
        until(lambda: flight.waiting("k") == 1)
        upstream.go.set()
        assert {future.result(LIMIT) for future in futures} == {"answer 1"}


# ------------------------------------------------------------------ streams

FINISHED = [
    AIMessageChunk(content="The fee ", id="run-1"),
    AIMessageChunk(content="is 5.", id="run-1"),
    AIMessageChunk(
        content="", id="run-1", response_metadata={"finish_reason": "stop", "model_name": "m"},
        usage_metadata={"input_tokens": 7, "output_tokens": 4, "total_tokens": 11}, chunk_position="last",
    ),
]
TOOLS = [
    AIMessageChunk(content="", tool_call_chunks=[{"name": "lookup", "args": '{"a": ', "id": "1", "index": 0, "type": "tool_call_chunk"}]),
    AIMessageChunk(content="", tool_call_chunks=[{"name": None, "args": "1}", "id": None, "index": 0, "type": "tool_call_chunk"}]),
    AIMessageChunk(content="", response_metadata={"finish_reason": "tool_calls"}),
]
MAPPINGS = [
    {"model": "m", "choices": [{"index": 0, "delta": {"content": "Five."}, "finish_reason": None}]},
    {"model": "m", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    {"model": "m", "choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 4}},
]


def cut(reason: str) -> list[AIMessageChunk]:
    "A LangChain stream that ended for a reason."
    return [FINISHED[0], AIMessageChunk(content="", response_metadata={"finish_reason": reason})]


@pytest.mark.parametrize("chunks", [["The fee ", "is 5."], FINISHED, TOOLS, MAPPINGS], ids=["text", "messages", "tools", "mappings"])
def test_a_stream_that_ended_is_recorded_and_replayed_as_it_was(chunks: list[Any]) -> None:
    kept: list[Response] = []
    assert list(record_stream(iter(chunks), lambda all_of_it: kept.append(stream_response(all_of_it)))) == chunks
    stored = Response.from_dict(json.loads(json.dumps(kept[0].to_dict())))
    played = list(replay(stored))
    assert played == chunks
    assert [type(chunk) for chunk in played] == [type(chunk) for chunk in chunks]

    async def again() -> list[Any]:
        return [chunk async for chunk in areplay(stored)]

    assert asyncio.run(again()) == chunks


def test_text_tokens_and_model_of_a_stream_are_kept() -> None:
    for chunks, text in ((FINISHED, "The fee is 5."), (MAPPINGS, "Five.")):
        response = stream_response(chunks, seconds=1.5, documents=["fees"])
        assert (response.text, response.input_tokens, response.output_tokens, response.model) == (text, 7, 4, "m")
        assert (response.seconds, response.documents) == (1.5, ("fees",))


@pytest.mark.parametrize("chunks", [
    [], cut("length"), cut("content_filter"), cut("MAX_TOKENS"), cut("SAFETY"), cut("of a kind that nobody knows"), MAPPINGS[:1],
    [*MAPPINGS[:1], {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}],
], ids=["empty", "length", "filter", "MAX_TOKENS", "SAFETY", "unknown", "connection lost", "mapping length"])
def test_an_answer_that_is_not_whole_is_not_recorded(chunks: list[Any]) -> None:
    assert not is_complete(chunks)
    assert list(record_stream(chunks, lambda _: pytest.fail("recorded"))) == chunks


def test_a_stream_that_was_cut_off_is_not_recorded() -> None:
    closed = []

    def source(fails: bool) -> Iterator[str]:
        try:
            yield "a"
            if fails:
                raise ConnectionError
            yield "b"
        finally:
            closed.append(fails)

    done: list[list[str]] = []
    failing = record_stream(source(True), done.append)
    assert next(failing) == "a"
    with pytest.raises(ConnectionError):
        next(failing)
    stopped = record_stream(source(False), done.append)
    assert next(stopped) == "a"
    stopped.close()
    last_chunk_read = record_stream(source(False), done.append)
    assert [next(last_chunk_read), next(last_chunk_read)] == ["a", "b"]
    del last_chunk_read    # its end was never seen
    assert done == [] and closed == [True, False, False]
    assert list(record_stream(source(False), done.append)) == ["a", "b"]
    assert done == [["a", "b"]]


def test_an_asynchronous_stream_that_was_cut_off_is_not_recorded() -> None:
    async def source(closed: list[int]) -> AsyncIterator[str]:
        try:
            yield "a"
            await asyncio.sleep(0)
            yield "b"
        finally:
            closed.append(1)

    async def main() -> None:
        done: list[list[str]] = []
        closed: list[int] = []

        async def keep(chunks: list[str]) -> None:
            done.append(chunks)

        stopped = arecord_stream(source(closed), keep)
        assert await anext(stopped) == "a"
        await stopped.aclose()
        assert closed == [1]

        async def read() -> None:
            async for _ in arecord_stream(source(closed), keep):
                await asyncio.sleep(LIMIT)

        task = asyncio.create_task(read())
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task])
        assert done == []
        assert [chunk async for chunk in arecord_stream(source(closed), keep)] == ["a", "b"]
        assert done == [["a", "b"]]

    asyncio.run(main())


@settings(max_examples=40)
@given(text=st.text(alphabet="ab.é \n\t\u3000", max_size=30))
def test_an_answer_without_chunks_is_replayed_word_by_word(text: str) -> None:
    assert "".join(replay(Response(text))) == text


def test_what_cannot_be_replayed_is_said() -> None:
    with pytest.raises(BadInputError, match="cannot be stored"):
        stream_response([object()])
    for record in (None, {"AIMessageChunk": {"content": 7}}, {"constructor": {}}, {"lc": 1, "type": "constructor", "id": [], "kwargs": {}}):
        with pytest.raises(BadInputError, match="no known kind"):
            list(replay(Response("", data={"chunks": [record]})))
    with pytest.raises(BadInputError, match="pace"):
        list(replay(Response("a"), pace=float("nan")))


def test_readers_of_a_replay_cannot_change_what_is_stored() -> None:
    stored = stream_response(MAPPINGS)
    for chunk in replay(stored):
        chunk["choices"].append("changed")
    assert list(replay(stored)) == MAPPINGS


def test_concurrent_readers_share_one_stream() -> None:
    opened, go_on, flight = [], threading.Event(), SingleFlight()

    def source() -> Iterator[str]:
        opened.append(1)
        yield "a"
        assert go_on.wait(LIMIT)
        yield "b"

    with ThreadPoolExecutor(8) as pool:
        readers = [pool.submit(lambda: list(flight.stream("k", lambda: None, source))) for _ in range(8)]
        until(lambda: flight.waiting("k") == 7)
        go_on.set()
        assert [reader.result(LIMIT) for reader in readers] == [["a", "b"]] * 8
    assert len(opened) == 1


def test_a_reader_that_stops_hands_its_stream_over() -> None:
    opened, flight = [], SingleFlight(attempts=1)

    def source() -> Iterator[str]:
        opened.append(1)
        yield "a"
        yield "b"

    leader = flight.stream("k", lambda: None, source)
    assert next(leader) == "a"
    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(lambda: list(flight.stream("k", lambda: None, source))) for _ in range(3)]
        until(lambda: flight.waiting("k") == 3)
        leader.close()
        assert [reader.result(LIMIT) for reader in readers] == [["a", "b"]] * 3
    assert len(opened) == 2


def test_asynchronous_readers_share_one_stream_and_a_cancelled_one_hands_over() -> None:
    async def main() -> None:
        opened: list[int] = []
        flight = SingleFlight(attempts=1)

        async def source() -> AsyncIterator[str]:
            opened.append(1)
            yield "a"
            await asyncio.sleep(0.02 if len(opened) > 1 else LIMIT)
            yield "b"

        async def read() -> list[str]:
            return [chunk async for chunk in flight.astream("k", lambda: None, source)]

        tasks = [asyncio.create_task(read()) for _ in range(6)]
        await auntil(lambda: flight.waiting("k") == 5)
        tasks[0].cancel()
        assert await asyncio.gather(*tasks[1:]) == [["a", "b"]] * 5
        assert len(opened) == 2
        assert [chunk async for chunk in flight.astream("k", lambda: areplay(Response("c d")), source)] == ["c ", "d"]
        assert len(opened) == 2

    asyncio.run(main())


def test_a_stream_that_asks_for_itself_is_an_error() -> None:
    flight = SingleFlight()

    def source() -> Iterator[str]:
        yield from flight.stream("k", lambda: None, lambda: ["b"])

    with pytest.raises(ReentrantFlightError):
        list(flight.stream("k", lambda: None, source))
    between = flight.stream("k", lambda: None, lambda: ["a", "b"])
    assert next(between) == "a"
    assert flight.run("other", lambda: None, lambda: "between two chunks") == "between two chunks"
    assert list(between) == ["b"]


def test_importing_costs_no_langchain() -> None:
    code = "import sys, llmops_ref.single_flight; print('langchain_core' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout == "False\n"


def test_warnings_are_errors_here() -> None:
    "Nothing above leaves a future that was never asked, or a coroutine that was never awaited."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        test_64_tasks_make_one_call()
        test_a_cancelled_leader_hands_over_and_a_cancelled_follower_harms_nobody()
