"""`tfqc cache`: what is kept to be used again, and room made."""

from __future__ import annotations

from typing import Annotated

import typer

from tfqc.cli import options
from tfqc.cli.output import guarded, show

app = typer.Typer(
    name="cache",
    help="What is kept in the user's cache: built kernels and modules, calibration trajectories.",
    no_args_is_help=True,
)


@app.command("ls")
@guarded
def ls(as_json: options.AsJson = False) -> None:
    """List what is kept, the last used first."""
    import time

    from tfqc.report.tables import size, table
    from tfqc.runtime.cache import cache_root
    from tfqc.runtime.pruning import contents

    found = contents()
    total = sum(kept.bytes for kept in found)
    entries = [{"kind": k.kind, "name": k.path.name, "bytes": k.bytes, "used": k.used} for k in found]
    value = {"directory": str(cache_root()), "bytes": total, "entries": entries}
    rows = [(k.kind, k.path.name, size(k.bytes), f"{max(time.time() - k.used, 0) / 86400:.1f}") for k in found]
    text = table(("kind", "name", "size", "days since it was used"), rows, right=(2, 3)) + "\n\n" if rows else ""
    show(value, f"{text}{cache_root()}: {size(total)}", as_json)


@app.command("clean")
@guarded
def clean(
    limit: Annotated[
        str | None, typer.Option(help="Remove the oldest until so much is left, such as 500M or 2G; 0 without options.")
    ] = None,
    days: Annotated[float | None, typer.Option(min=0, help="Remove what was not used for so many days.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Remove all that is kept, or what is too old or too much.

    By themselves, commands that add something keep to 10 GiB and 30 days, or to TFQC_CACHE_LIMIT and TFQC_CACHE_DAYS.
    """
    from tfqc.errors import TfqcError
    from tfqc.report.tables import size
    from tfqc.runtime import pruning
    from tfqc.runtime.cache import cache_root

    try:
        most = None if limit is None else pruning.size(limit)
    except ValueError as error:
        raise TfqcError(f"--limit: {error}") from error
    if most is None and days is None:
        most = 0
    removed = pruning.prune(
        limit=1 << 62 if most is None else most, days=float("inf") if days is None else days, in_use=0
    )
    total = sum(kept.bytes for kept in removed)
    value = {"directory": str(cache_root()), "removed": len(removed), "bytes": total}
    show(value, f"{cache_root()}: {len(removed)} removed, {size(total)}", as_json)
