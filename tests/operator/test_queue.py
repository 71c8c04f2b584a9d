"""The queue of keys, against a clock that the test turns."""

import asyncio
import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dagger_operator.cluster.places import Places
from dagger_operator.cluster.queue import Backoff, WorkQueue

KEYS = st.sampled_from("abc")
SPACING = 1.0


class AnyOrder(RuleBasedStateMachine):
    """Whatever is asked for, worked on and failed in whatever order: nothing is lost, and nothing is done twice at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.queue: WorkQueue[str] = WorkQueue(lambda: self.now, spacing=SPACING, chance=lambda: 0.5)
        self.wanted: dict[str, float] = {}
        """Keys that have to be worked on, and by when they are due at the latest."""
        self.working: set[str] = set()
        self.started: dict[str, float] = {}

    @rule(key=KEYS, after=st.sampled_from([0.0, 0.5, 3.0]))
    def ask(self, key: str, after: float) -> None:
        self.queue.add(key, after)
        self._want(key, self.now + after)

    @rule(seconds=st.sampled_from([0.0, 0.3, 1.0, 10.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def take(self) -> None:
        key = self.queue.take()
        if key is None:
            late = [one for one, due in self.wanted.items() if one not in self.working and due <= self.now]
            assert not late
            return
        assert key not in self.working
        assert self.wanted.pop(key) <= self.now
        assert self.now - self.started.get(key, -SPACING) >= SPACING - 1e-9  # 2.3 less 1.3 is a little less than 1
        self.working.add(key)
        self.started[key] = self.now

    @precondition(lambda self: self.working)
    @rule(data=st.data(), again=st.sampled_from([None, 0.0, 2.0]))
    def done(self, data: st.DataObject, again: float | None) -> None:
        key = data.draw(st.sampled_from(sorted(self.working)))
        self.working.discard(key)
        self.queue.done(key, again_after=again)
        if again is not None:
            self._want(key, self.now + again)

    @precondition(lambda self: self.working)
    @rule(data=st.data())
    def failed(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.working)))
        self.working.discard(key)
        self._want(key, self.now + self.queue.failed(key))

    def _want(self, key: str, due: float) -> None:
        due = max(due, self.started.get(key, -SPACING) + SPACING)
        self.wanted[key] = min(due, self.wanted.get(key, due))

    @invariant()
    def tells_what_waits(self) -> None:
        due = [self.now - when for key, when in self.wanted.items() if key not in self.working and when <= self.now]
        assert self.queue.depth == len(due)
        assert self.queue.oldest == pytest.approx(max(due, default=0.0))

    def teardown(self) -> None:
        for key in sorted(self.working):
            self.queue.done(key)
        self.now += 1000.0
        drained = set()
        while (key := self.queue.take()) is not None:
            drained.add(key)
            self.queue.done(key)
        assert drained == set(self.wanted)
        self.now += SPACING
        assert self.queue.take() is None
        assert not self.queue._entries, "a key that nobody asks for costs no memory"


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_two_starts_of_a_key_are_apart_also_where_it_was_asked_for_at_a_time_that_counts_no_more() -> None:
    now = 0.0
    queue: WorkQueue[str] = WorkQueue(lambda: now, spacing=SPACING)
    queue.add("a", 0.5)
    queue.add("a")
    assert queue.take() == "a"
    queue.done("a")
    now = 0.6
    assert queue.take() is None
    queue.add("a")
    assert queue.take() is None
    now = SPACING
    assert queue.take() == "a"


def test_failures_in_a_row_wait_twice_as_long_each_and_a_success_forgets_them() -> None:
    now = 0.0
    queue: WorkQueue[str] = WorkQueue(lambda: now, Backoff(first=1.0, longest=8.0, jitter=0.0))
    waits = []
    queue.add("a")
    for _ in range(6):
        assert queue.take() == "a"
        waits.append(queue.failed("a"))
        now += waits[-1]
    assert waits == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    assert queue.take() == "a"
    queue.done("a")
    queue.add("a")
    assert queue.take() == "a"
    assert queue.failed("a") == 1.0


def test_jitter_takes_from_the_wait_and_never_adds() -> None:
    backoff = Backoff(first=1.0, longest=8.0, jitter=0.5)
    assert backoff.seconds(1, 0.0) == 1.0
    assert backoff.seconds(1, 1.0) == 0.5
    assert backoff.seconds(10_000, 0.0) == 8.0


def test_a_long_queue_is_no_standstill_as_long_as_something_is_finished() -> None:
    now = 0.0
    queue: WorkQueue[str] = WorkQueue(lambda: now)
    for key in "ab":
        queue.add(key)
    assert queue.take() == "a"
    now = 400.0
    assert queue.standstill == 400.0
    queue.done("a")
    assert (queue.oldest, queue.standstill) == (400.0, 0.0)


def test_a_key_that_hangs_is_told_of_for_as_long_as_it_does_whatever_else_is_finished() -> None:
    now = 0.0
    queue: WorkQueue[str] = WorkQueue(lambda: now)
    queue.add("hangs")
    assert queue.longest == 0.0
    assert queue.take() == "hangs"
    now = 2000.0
    queue.add("other")
    assert queue.take() == "other"
    queue.done("other")
    assert (queue.standstill, queue.longest) == (0.0, 2000.0)
    queue.failed("hangs")
    assert queue.longest == 0.0


async def test_workers_are_bounded_and_one_key_has_one_worker() -> None:
    queue: WorkQueue[int] = WorkQueue(time.monotonic, Backoff(first=0.001))
    at_work: list[int] = []
    seen: dict[int, int] = {}
    most = 0
    finished = asyncio.Event()

    async def work(key: int) -> float | None:
        nonlocal most
        assert key not in at_work
        at_work.append(key)
        most = max(most, len(at_work))
        await asyncio.sleep(0)
        queue.add((key + 1) % 20)
        await asyncio.sleep(0)
        at_work.remove(key)
        seen[key] = seen.get(key, 0) + 1
        if seen[key] == 2:
            raise RuntimeError("once")
        if len(seen) == 20 and min(seen.values()) >= 3:
            finished.set()
        return None

    for key in range(20):
        queue.add(key)
    running = asyncio.create_task(queue.run(work, Places(4)))
    async with asyncio.timeout(30):
        await finished.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert most <= 4
