"""Every sample once an epoch, whoever reads it and wherever a run begins again. Arithmetic of indices alone."""

import numpy as np
import pytest

from rcm_jax.data.order import Order

COUNTS = [5, 1, 0, 17, 8, 3, 16, 16, 2, 9, 30]
TOTAL = sum(COUNTS)


def shown(order: Order, hosts: int, batch: int, start: int, stop: int) -> list[tuple[int, int]]:
    """What the hosts together read in steps start .. stop - 1, in the order of a batch's rows."""
    bounds = [batch * i // hosts for i in range(hosts + 1)]
    out = []
    for step in range(start, stop):
        for first, end in zip(bounds, bounds[1:], strict=False):
            out += [order.sample(*order.at(step * batch + row)) for row in range(first, end)]
    return out


def order_of(seed=3, window=4, **options):
    return Order(COUNTS, seed=seed, window=window, **options)


@pytest.mark.parametrize("hosts", [1, 2, 7])
@pytest.mark.parametrize("window", [1, 4, 100])
def test_every_sample_once_an_epoch_and_another_order_each(hosts, window):
    order, batch = order_of(window=window), 14
    all_of_them = {(shard, i) for shard, count in enumerate(COUNTS) for i in range(count)}
    read = shown(order, hosts, batch, 0, 3 * TOTAL // batch + 1)
    epochs = [read[e * TOTAL : (e + 1) * TOTAL] for e in range(3)]
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == TOTAL
        assert set(epoch) == all_of_them
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != sorted(epochs[0])
    assert read == shown(order_of(window=window), 1, batch, 0, 3 * TOTAL // batch + 1)


def test_a_run_that_begins_again_goes_on_with_the_same_samples():
    batch, steps = 12, 3 * TOTAL // 12
    whole = shown(order_of(), 1, batch, 0, steps)
    for stop in range(steps):
        assert shown(order_of(), 4, batch, 0, stop) + shown(order_of(), 2, batch, stop, steps) == whole


def test_samples_that_are_read_together_lie_in_few_shards():
    counts, window = [64] * 50, 4
    order = Order(counts, window=window)
    read = [order.sample(0, i)[0] for i in range(order.total)]
    for start in range(0, order.total, 64 * window):
        assert len(set(read[start : start + 64 * window])) <= window
    first = [shard for i, shard in enumerate(read) if shard not in read[:i]]
    assert first != sorted(first)


def test_seeds_differ_and_without_shuffling_names_rule():
    assert shown(order_of(0), 1, 8, 0, 9) != shown(order_of(1), 1, 8, 0, 9)
    plain = [(shard, i) for shard, count in enumerate(COUNTS) for i in range(count)]
    order = order_of(shuffle=False)
    assert [order.sample(e, i) for e in range(2) for i in range(TOTAL)] == 2 * plain


def test_the_order_is_the_same_with_every_numpy():
    """Written down: a run that is resumed after an upgrade must not see another order."""
    order = Order([3, 2, 4], seed=7, window=2)
    assert [order.sample(1, i) for i in range(9)] == PINNED


def test_a_million_samples_are_found_at_once():
    order = Order([256] * 4000)
    found = [order.sample(5, int(i)) for i in np.linspace(0, order.total - 1, 50)]
    assert len(set(found)) == 50


PINNED = [(0, 1), (0, 2), (2, 3), (2, 0), (0, 0), (2, 1), (2, 2), (1, 1), (1, 0)]
