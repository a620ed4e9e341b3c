"""Complete pipelines of diffusers with small random weights, compiled in one line, called, saved and loaded.

    python bench/pipelines.py DIFFUSERS                 # goes on where bench/results/pipelines.json ends
    python bench/pipelines.py DIFFUSERS --only NAME ... # these anew

DIFFUSERS is a checkout of diffusers (`git clone https://github.com/huggingface/diffusers`): its tests make pipelines,
and say what each is called with. Each is a process of its own. What it makes with nothing quantized is compared with
the pipeline itself, at the steps that it was compiled for and at others, for two images a prompt, and for another
prompt; then W8A8 on cpu-int8, and whether a saved and loaded pipeline makes the same bits. The table goes to
bench/README.md.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from PIL import Image
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

RESULTS = HERE / "results" / "pipelines.json"
README = HERE / "README.md"
BEGIN, END = "<!-- pipelines -->\n", "<!-- end of pipelines -->\n"
SECONDS = 900
EXACT = 1e-5  # what nothing is quantized in makes within, relative
PLAIN, W8A8 = "fake-quant{weights=none activations=none}", "cpu-int8"
PROMPT = "two birds on a very long wire in the rain"
WORDS = 300  # text encoders know at least so many: their tests' tokenizers have fewer than ours
RUNS = 4  # that it is calibrated on, of other noise


@dataclass
class Tried:
    """What became of a pipeline.

    torch: why it does not run there, else empty. seconds: of `tfqc.quantize` with nothing quantized. exact: the largest
    relative error of any call. cpu_int8: of the call that it was compiled for. same: saved and loaded, the same bits.
    refused: what was tried -> sentence.
    """

    torch: str = ""
    seconds: float | None = None
    exact: float | None = None
    cpu_int8: float | None = None
    same: bool | None = None
    refused: dict[str, str] = field(default_factory=dict[str, str])


def main() -> None:
    """Try what is missing, and write the table after each pipeline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("diffusers", type=Path, help="a checkout of diffusers")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="try these anew")
    parser.add_argument("--exact", action="store_true", help="with nothing quantized alone")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    readied(options.diffusers)
    if options.one:
        module, _, kind = options.one.partition(":")
        case = getattr(importlib.import_module(module), kind)()
        print(json.dumps(asdict(tried(case, exact_only=options.exact))))
        return
    found = cases(options.diffusers)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in options.only or [name for name in found if not done(results.get(name), options.exact)]:
        results[name] = in_a_process(options.diffusers, found[name], options.exact)
        print(row(name, results[name]), flush=True)
        RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
        write(table(dict(sorted(results.items()))))


def done(its: Mapping[str, Any] | None, exact_only: bool) -> bool:
    """Whether a pipeline has gone as far as it is asked for."""
    return its is not None and (exact_only or its["cpu_int8"] is not None or bool(its["torch"] or its["refused"]))


def readied(checkout: Path) -> None:
    """Let their tests be imported, without the hub."""
    from pipelines_hub import made_here

    made_here()
    for unused in ("parameterized", "requests_mock"):  # their tests import these, and none of them runs here
        sys.modules.setdefault(unused, MagicMock())
    sys.modules.pop("tests", None)  # ours
    sys.path.insert(0, str(checkout))


def cases(checkout: Path) -> dict[str, str]:
    """Test classes (`module:Class`) that make a pipeline, by its name, and by theirs where several make one."""
    found: dict[str, Any] = {}
    for file in sorted((checkout / "tests" / "pipelines").rglob("test_*.py")):
        name = ".".join(file.relative_to(checkout).with_suffix("").parts)
        try:
            module = importlib.import_module(name)
        except Exception as error:
            print(f"{file.name}: {error}", file=sys.stderr)
            continue
        makers: set[Any] = set()
        for kind in [kind for kind in vars(module).values() if inspect.isclass(kind) and kind.__module__ == name]:
            maker = getattr(kind, "get_dummy_components", None)
            pipeline = getattr(kind, "pipeline_class", None)
            if maker is not None and inspect.isclass(pipeline) and maker not in makers:
                makers.add(maker)
                own = pipeline.__name__
                own = own if own not in found else f"{own} ({file.stem.removeprefix('test_')}, {kind.__name__})"
                found[own] = f"{name}:{kind.__name__}"
    return found


def in_a_process(checkout: Path, case: str, exact_only: bool) -> dict[str, Any]:
    """A pipeline that takes too long, or brings its process down, is refused for that."""
    command = [sys.executable, __file__, str(checkout), "--one", case, *(["--exact"] if exact_only else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return asdict(Tried(refused={"process": f"not done after {SECONDS} s"}))
    if done.returncode:
        return asdict(Tried(refused={"process": (done.stderr.strip().splitlines() or ["no word"])[-1][:400]}))
    return json.loads(done.stdout.strip().splitlines()[-1])


def tried(case: Any, exact_only: bool) -> Tried:
    """Take a pipeline the whole way; what fails is told, and the next is tried."""
    import tfqc

    warnings.simplefilter("ignore")
    found = Tried()
    try:
        pipe = made(case)
        ways = dict(calls(case, pipe))
        wanted = {"steps": images(pipe, ways.pop("steps"))}
        again = images(pipe, inputs(case))
        if relative(again, wanted["steps"]) > 0:
            found.torch = "makes other images each time"
        if not any(array.std() for array in again):
            found.torch = "makes the same number everywhere"
        if found.torch:
            return found
    except Exception as error:  # whatever it is: the pipeline does not run
        found.torch = said(error)
        return found
    for what, call in ways.items():
        with suppress(Exception):  # what the pipeline itself refuses is not asked for
            wanted[what] = images(pipe, call)
    try:
        began = time.perf_counter()
        tfqc.quantize(pipe, PLAIN, calibration=[inputs(case)])
        found.seconds = round(time.perf_counter() - began, 1)
    except Exception as error:
        found.refused["quantize"] = said(error)
        return found
    for what, call in [(what, call) for what, call in calls(case, pipe) if what in wanted]:
        try:
            found.exact = max(found.exact or 0.0, relative(images(pipe, call), wanted[what]))
        except Exception as error:
            found.refused[what] = said(error)
    if exact_only:
        return found
    try:
        pipe = made(case)
        tfqc.quantize(pipe, W8A8, calibration=[inputs(case, seed) for seed in range(RUNS)])
        got = images(pipe, inputs(case))
        found.cpu_int8 = relative(got, wanted["steps"])
    except Exception as error:
        found.refused[W8A8] = said(error)
        return found
    try:
        with tempfile.TemporaryDirectory() as directory:
            found.same = relative(images(saved_and_loaded(pipe, directory), inputs(case)), got) == 0
    except Exception as error:
        found.refused["save"] = said(error)
    return found


def made(case: Any) -> Any:
    """The pipeline, the same weights each time, none of them zeros."""
    from tfqc.models.find import denoisers_in

    torch.manual_seed(0)
    pipe = case.pipeline_class(**case.get_dummy_components())
    for part in pipe.components.values():
        if isinstance(part, PreTrainedModel) and part.can_generate() | hasattr(part.config, "vocab_size"):
            part.resize_token_embeddings(max(WORDS, part.get_input_embeddings().num_embeddings))
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name in denoisers_in(pipe):
        for parameter in getattr(pipe, name).parameters():
            if not bool(parameter.any()) or not bool(parameter.isfinite().all()):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    pipe.set_progress_bar_config(disable=True)
    pipe.wanted = wanted_of(pipe)
    return pipe


def wanted_of(pipe: Any) -> dict[str, Any]:
    """Latents where a pipeline gives them: an image of random weights is often of one colour."""
    takes = inspect.signature(pipe.__call__).parameters
    gives = 'output_type == "latent"' in inspect.getsource(type(pipe).__call__)
    return {"output_type": "latent"} if gives and "output_type" in takes else {}


def inputs(case: Any, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of a call, with other noise for each seed."""
    takes = inspect.signature(case.get_dummy_inputs).parameters
    given = dict(case.get_dummy_inputs(*(["cpu"] if "device" in takes else [])))
    if given.get("generator") is not None or "generator" in inspect.signature(case.pipeline_class.__call__).parameters:
        given["generator"] = torch.Generator().manual_seed(seed)
    return given


def calls(case: Any, pipe: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """As it was compiled for, and in the ways in which its users call it."""
    takes = inspect.signature(pipe.__call__).parameters
    yield "steps", inputs(case)
    own = inputs(case)
    if isinstance(own.get("num_inference_steps"), int):
        yield "other steps", own | {"num_inference_steps": own["num_inference_steps"] + 1}
    two = next((n for n in ("num_images_per_prompt", "num_videos_per_prompt") if n in takes), None)
    if two is not None:
        yield "two images", inputs(case) | {two: 2}
    if isinstance(own.get("prompt"), str):
        yield "another prompt", inputs(case) | {"prompt": PROMPT}


def images(pipe: Any, call: Mapping[str, Any]) -> list[np.ndarray]:
    """All arrays of numbers that a call returns."""
    torch.manual_seed(0)
    np.random.seed(0)
    made = pipe(**{**call, **pipe.wanted})
    leaves = pytree.tree_leaves(made.to_tuple() if hasattr(made, "to_tuple") else made)
    kinds = (torch.Tensor, np.ndarray, Image.Image)
    arrays = [np.asarray(v.float() if isinstance(v, torch.Tensor) else v) for v in leaves if isinstance(v, kinds)]
    return [array.astype(np.float64) for array in arrays if array.dtype.kind in "fiu"]


def relative(got: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """The largest ‖y - ŷ‖ / ‖y - mean(y)‖; infinite where they have not the same form, or are no numbers."""
    if [a.shape for a in got] != [a.shape for a in wanted] or not all(np.isfinite(a).all() for a in (*got, *wanted)):
        return float("inf")
    pairs = zip(got, wanted, strict=True)
    return max((float(np.linalg.norm(a - b) / (np.linalg.norm(b - b.mean()) + 1e-30)) for a, b in pairs), default=0.0)


def saved_and_loaded(pipe: Any, directory: str) -> Any:
    """Through files, as any pipeline."""
    pipe.save_pretrained(directory)
    absent = {name: None for name, part in pipe.components.items() if part is None}
    made = type(pipe).from_pretrained(directory, **absent)
    made.set_progress_bar_config(disable=True)
    made.wanted = pipe.wanted
    return made


def said(error: Exception) -> str:
    """What it says, in a line."""
    from tfqc.errors import TfqcError

    kind = "" if isinstance(error, TfqcError) else f"{type(error).__name__}: "
    notes = [str(note) for note in getattr(error, "__notes__", ())[:2]]
    return " | ".join([f"{kind}{error}".strip()[:400], *(note[:200] for note in notes)])


def table(results: Mapping[str, Any]) -> str:
    """Totals, and a row for each pipeline."""
    runs = [each for each in results.values() if not each["torch"]]
    exact = sum(each["exact"] is not None and each["exact"] <= EXACT and not each["refused"] for each in runs)
    lines = [
        f"{len(results)} pipelines, of which {len(runs)} run in torch here. With nothing quantized {exact} of them "
        f"make the same images to {EXACT:g}, however they were called.",
        "",
        "| pipeline | compiled, s | nothing quantized | cpu-int8 | saved and loaded | |",
        "|---|---|---|---|---|---|",
        *(row(name, each) for name, each in results.items()),
    ]
    return "\n".join(lines) + "\n"


def row(name: str, its: Mapping[str, Any]) -> str:
    """A line of the table."""
    numbers = [its["seconds"], its["exact"], its["cpu_int8"]]
    cells = ["" if n is None else f"{n:.2g}" for n in numbers]
    cells.append({None: "", True: "same bits", False: "other bits"}[its["same"]])
    refused = "; ".join(f"{what}: {why}" for what, why in its["refused"].items())
    text = f"does not run in torch: {its['torch']}" if its["torch"] else refused
    return f"| {' | '.join([name, *cells, text.replace('|', '/').replace(chr(10), ' ')[:300]])} |"


def write(text: str) -> None:
    """Put the table where the README has it."""
    before, _, rest = README.read_text().partition(BEGIN)
    README.write_text(f"{before}{BEGIN}{text}{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
