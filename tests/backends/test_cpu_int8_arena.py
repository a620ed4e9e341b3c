"""Buffers in one block of memory."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from tfqc.backends.cpu_int8.runtime.arena import ALIGNMENT, place

buffers = st.lists(st.tuples(st.integers(0, 500), st.integers(0, 12), st.integers(0, 6)), max_size=14)


@settings(deadline=None)
@given(buffers)
def test_buffers_alive_together_lie_apart(drawn: list[tuple[int, int, int]]) -> None:
    sizes = {i: size for i, (size, _, _) in enumerate(drawn)}
    spans = {i: (first, first + length) for i, (_, first, length) in enumerate(drawn)}
    offsets, total = place(sizes, spans)
    assert set(offsets) == set(sizes)
    assert all(offset >= 0 and offset % ALIGNMENT == 0 for offset in offsets.values())
    for a, b in itertools.combinations(sizes, 2):
        if spans[a][0] <= spans[b][1] and spans[b][0] <= spans[a][1] and sizes[a] and sizes[b]:
            assert offsets[a] + sizes[a] <= offsets[b] or offsets[b] + sizes[b] <= offsets[a]
    assert total == max((offsets[i] + sizes[i] for i in sizes), default=0)
    alive = [sum(sizes[i] for i in sizes if spans[i][0] <= t <= spans[i][1]) for t in range(20)]
    assert max(alive) <= total <= sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes.values())


def test_room_is_used_again() -> None:
    assert place({0: 100, 1: 100, 2: 50}, {0: (0, 1), 1: (2, 3), 2: (0, 3)}) == ({0: 0, 1: 0, 2: 128}, 178)
    assert place({}, {}) == ({}, 0)


def test_the_same_whatever_the_order() -> None:
    sizes, spans = {0: 64, 1: 64, 2: 128}, {0: (0, 2), 1: (1, 3), 2: (2, 4)}
    turned = {k: sizes[k] for k in reversed(sizes)}
    assert place(sizes, spans) == place(turned, spans)
