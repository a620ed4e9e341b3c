"""The command line: one module for each group of commands. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from tfqc.cli import (
    bisect,
    caching,
    comparing,
    compiling,
    demo,
    env,
    exporting,
    gpu,
    inspecting,
    listing,
    opt,
    recipes,
    sampling,
)

# Threads of torch that wait must not spin: where cores are shared, spinning made sampling four times slower. It is
# read when torch is loaded, which no command has done yet.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    name="tfqc",
    help="A compiler that quantizes diffusion models and keeps their temporal features.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("compile")(compiling.compile_model)
app.command("sample")(sampling.sample)
app.command("compare")(comparing.compare)
app.command("export")(exporting.export)
app.command("opt")(opt.opt)
app.command("bisect")(bisect.bisect)
app.command("passes")(listing.passes)
app.command("backends")(listing.backends)
app.command("models")(listing.models)
app.command("inspect")(inspecting.inspect)
app.command("env")(env.env)
app.command("gpu-check")(gpu.check)
app.command("demo")(demo.demo)
app.add_typer(recipes.app)
app.add_typer(caching.app)


def _version(wanted: bool) -> None:
    if wanted:
        import tfqc

        print(f"tfqc {tfqc.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """A compiler that quantizes diffusion models and keeps their temporal features."""
