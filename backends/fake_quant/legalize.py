"""What runs between a pipeline and emission: torch runs every operation as it is, so nothing."""

from __future__ import annotations

from tfqc.passing import Pass


def legalize(options: object) -> tuple[Pass, ...]:
    """No passes."""
    return ()
