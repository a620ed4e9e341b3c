"""Where buffers lie in one block of memory: buffers that are needed at the same time do not overlap."""

from __future__ import annotations

from collections.abc import Mapping

ALIGNMENT = 64


def place(sizes: Mapping[int, int], spans: Mapping[int, tuple[int, int]]) -> tuple[dict[int, int], int]:
    """Offset of each buffer, and the bytes of the whole block.

    The largest buffer is placed first, each as low as those that live with it allow (greedy by size, as in
    TensorFlow Lite). Spans are first and last position of use, both included.
    """
    offsets: dict[int, int] = {}
    for buffer in sorted(sizes, key=lambda b: (-sizes[b], spans[b], b)):
        first, last = spans[buffer]
        taken = sorted(
            (offsets[b], offsets[b] + sizes[b]) for b in offsets if spans[b][0] <= last and first <= spans[b][1]
        )
        offset = 0
        for begin, end in taken:
            if offset + sizes[buffer] <= begin:
                break
            offset = max(offset, -(-end // ALIGNMENT) * ALIGNMENT)
        offsets[buffer] = offset
    return offsets, max((offsets[b] + sizes[b] for b in offsets), default=0)
