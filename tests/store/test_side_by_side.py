"""Files are moved a few at a time."""

import asyncio

import pytest

from dagger_operator.store.side_by_side import AT_ONCE, each


class Work:
    """Counts what is under way; fails at what is said."""

    def __init__(self, *failing: int) -> None:
        self.failing, self.begun, self.ended, self.most = set(failing), list[int](), list[int](), 0

    async def __call__(self, number: int) -> None:
        self.begun.append(number)
        self.most = max(self.most, len(self.begun) - len(self.ended))
        try:
            await asyncio.sleep(0.001 if number in self.failing else 0.02)
            if number in self.failing:
                raise OSError(f"no {number}")
        finally:
            self.ended.append(number)


async def test_all_are_done_and_never_more_than_a_few_at_once() -> None:
    work = Work()
    await each(range(3 * AT_ONCE), work)
    assert sorted(work.ended) == list(range(3 * AT_ONCE))
    assert work.most == AT_ONCE
    await each([], work)


async def test_after_a_failure_none_is_begun_and_what_is_under_way_ends_first() -> None:
    work = Work(1)
    with pytest.raises(OSError, match="no 1"):
        await each(range(3 * AT_ONCE), work)
    assert sorted(work.ended) == work.begun == list(range(AT_ONCE))


async def test_cancelled_nothing_goes_on() -> None:
    work = Work()
    task = asyncio.create_task(each(range(3 * AT_ONCE), work))
    await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(work.ended) == list(range(AT_ONCE))
    await asyncio.sleep(0.03)
    assert len(work.begun) == AT_ONCE
