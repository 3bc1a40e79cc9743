"""Who comes in, and in which order."""

import asyncio
import contextlib

import pytest

from rcm_jax.serve.desk import Desk, Full


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


def run(story):
    asyncio.run(asyncio.wait_for(story(), 5))


class Reader:
    """Stays until it is told to go."""

    def __init__(self, desk):
        self.places, self.inside, self.goes = [], False, asyncio.Event()
        self.task = asyncio.create_task(self._stay(desk))

    async def _stay(self, desk):
        async with desk.place(self.places.append):
            self.inside = True
            await self.goes.wait()

    async def leave(self):
        self.goes.set()
        await self.task
        await settle()

    async def vanish(self):
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task
        await settle()


def test_one_after_the_other():
    async def story():
        desk = Desk(streams=2, queue=3)
        readers = [Reader(desk) for _ in range(5)]
        await settle()
        assert [r.inside for r in readers] == [True, True, False, False, False]
        assert [r.places[-1:] for r in readers] == [[], [], [0], [1], [2]]
        await readers[0].leave()
        assert [r.inside for r in readers] == [True, True, True, False, False]
        assert [r.places[-1] for r in readers[3:]] == [0, 1]
        await readers[3].vanish()  # while it waits
        assert readers[4].places[-1] == 0
        await readers[1].vanish()  # while it is served
        assert readers[4].inside
        assert desk.active == 2
        for reader in (readers[2], readers[4]):
            await reader.leave()
        assert desk.active == 0

    run(story)


def test_no_more_than_may_wait():
    async def story():
        desk = Desk(streams=1, queue=1)
        first, second = Reader(desk), Reader(desk)
        await settle()
        with pytest.raises(Full, match="all 1 streams are taken, and 1 readers wait"):
            await desk.place(print).__aenter__()
        await second.vanish()
        third = Reader(desk)
        await settle()
        assert third.places == [0]
        await first.leave()
        assert third.inside
        await third.leave()

    run(story)


def test_a_place_is_not_lost_with_who_leaves_as_it_comes():
    async def story():
        desk = Desk(streams=1, queue=2)
        first, second, third = (Reader(desk) for _ in range(3))
        await settle()
        first.goes.set()
        await first.task  # the place is the second's now, which has not heard of it
        await second.vanish()
        assert third.inside
        await third.leave()
        assert desk.active == 0

    run(story)
