"""How fast would the CUDA int4 kernels be? A model from their real machine code: no GPU is used, nothing is timed.

    python bench/gpu_model.py                                      # all, JSON in bench/results/gpu-model.json
    python bench/gpu_model.py --models sdxl --archs sm_80 sm_89 --mode w4a4 --rows 40

Every kernel is compiled for its chip and disassembled (nvcc or NVRTC, and nvdisasm; a few seconds each, kept under
--work). A layer's tile is the one whose bound is least, found with the code of one kernel of its kind for each tile;
then the layer's own kernel is compiled, and its numbers are those printed. `gpu_chips.py` says what the bounds are,
`gpu_layers.py` what a step consists of. A bound is what no kernel of this kind can beat, on either side of a ratio.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, get_args

from cpu_models import ARCHITECTURES
from gpu_chips import CHIPS, LAUNCH_US, TILES, Bound, Chip, Code, best, bound, codes, fp16_bound, ruled, typical
from gpu_layers import Attention, Product, Step, step_of
from tabulate import tabulate

from tfqc.backends.cuda_int4.runtime.build import BuildError
from tfqc.backends.cuda_int4.runtime.specialise import Epilogue, Gemm, Mode, Tile

TITLE = "modelled, no GPU was used"
GOALS = {("sm_80", "w4a4"): 3.0, ("sm_89", "w4a4"): 5.0}  # of products, over fp16
L2_FACTORS = (0.6, 1.6)  # how far off the L2 bandwidths may be, which are not in whitepapers
_PLAIN = Epilogue("step", "one", residual=True)
TAIL = 0.15  # worth telling
KINDS = ("LDSM", "LDS", "LDGSTS", "IADD3", "LOP3", "SHF", "IMAD")


@dataclass(frozen=True)
class Layer:
    """A product, how often it is in a step, and what is modelled of its kernel and of fp16."""

    product: Product
    count: int
    kernel: Gemm
    code: Code
    bound: Bound
    fp16: float
    fp16_without_tails: float
    fp16_binds: str

    @property
    def binds(self) -> str:
        """What the kernel's time is, and whether multiprocessors without a block make it longer."""
        idle = self.bound.tail > TAIL and self.bound.binds not in ("DRAM", "L2", "launch")
        return self.bound.binds + (" with a tail" if idle else "")


def main() -> int:
    """Model what is asked for, print it, and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--models", nargs="+", choices=ARCHITECTURES, default=["sdxl", "sd15", "fashion", "dit"])
    parser.add_argument("--archs", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--mode", nargs="+", choices=get_args(Mode), default=list(get_args(Mode)))
    parser.add_argument("--batch", type=int, default=2, help="images; 2 is one with guidance")
    parser.add_argument("--rows", type=int, default=12, help="layers in a table, those that take longest")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "tfqc-gpu-model")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    cases: list[dict[str, Any]] = []
    try:
        for model in options.models:
            step = step_of(model, options.batch)
            for mode in options.mode:
                made = [(CHIPS[arch], layers(step, mode, CHIPS[arch], options.work)) for arch in options.archs]
                for chip, found in made:
                    if model == options.models[0]:
                        print(kernel_table(mode, chip, options.work), flush=True)
                    print(layer_table(f"{model}, {mode}", chip, found, options.rows), flush=True)
                    joined = layers(step.joined(), mode, chip, options.work)
                    rule = layers(step, mode, chip, options.work, by_rule=True)
                    cases.append(record(model, mode, options.batch, chip, step, found, joined, rule))
                    write(options.results / "gpu-model.json", cases)
                print(step_table([case for case in cases if (case["model"], case["mode"]) == (model, mode)]))
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    print(goal_table(cases))
    for case in cases:
        print(below_table(case), end="")
    return 0


def layers(step: Step, mode: Mode, chip: Chip, work: Path, by_rule: bool = False) -> list[Layer]:
    """Each quantized product with its kernel: of the best tile, or of the one that the compiler's rule says."""
    every = [(product, count) for product, count in step.products.items() if product.quantized]
    if by_rule:
        chosen = [ruled(product, mode, chip) for product, _ in every]
    else:
        kinds = [typical(product, mode, chip, tile) for product, _ in every for tile in TILES]
        codes(list({kernel.name: kernel for kernel in kinds if kernel is not None}.values()), chip.arch, work)
        chosen = [best(product, mode, chip, work) for product, _ in every]
    own = codes(list({kernel.name: kernel for kernel in chosen}.values()), chip.arch, work)
    found: list[Layer] = []
    for (product, count), kernel in zip(every, chosen, strict=True):
        code = own[kernel.name]
        modelled = bound(product, kernel, code, chip)
        if modelled is None:
            raise BuildError(f"The kernel of {product.name} with {kernel.tile} does not fit on {chip.name}.")
        found.append(Layer(product, count, kernel, code, modelled, *fp16_bound(product, chip)))
    return found


def record(
    model: str,
    mode: Mode,
    batch: int,
    chip: Chip,
    step: Step,
    found: Sequence[Layer],
    joined: Sequence[Layer],
    rule: Sequence[Layer],
) -> dict[str, Any]:
    """What is written of one case; times in microseconds.

    joined: with layers of one input as one product. rule: with the tiles that the compiler chooses.
    """
    ours = sum(layer.count * layer.bound.us for layer in found)
    fp16 = sum(layer.count * layer.fp16 for layer in found)
    held: Counter[str] = Counter()
    ratios: dict[str, float] = {}
    for layer in found:
        held[layer.binds] += layer.count * layer.bound.us / ours
    for factor in L2_FACTORS:
        other = replace(chip, l2=chip.l2 * factor)
        ratios[f"L2 x {factor}"] = fp16 / _total(found, other)
    return {
        "title": TITLE,
        "model": model,
        "mode": mode,
        "batch": batch,
        "card": chip.name,
        "arch": chip.arch,
        "gemm_us": ours,
        "gemm_fp16_us": fp16,
        "gemm_fp16_without_tails_us": sum(layer.count * layer.fp16_without_tails for layer in found),
        "gemm_ratio": fp16 / ours,
        "gemm_ratio_if": ratios,
        "gemm_us_by_rule": _total(rule, chip),
        "gemm_ratio_even": fp16 / _total(found, chip, even=True),
        "joined": {
            "products": sum(step.products.values()) - sum(step.joined().products.values()),
            "gemm_us": sum(layer.count * layer.bound.us for layer in joined),
            "gemm_fp16_us": sum(layer.count * layer.fp16 for layer in joined),
        },
        "binds": dict(held.most_common()),
        "step": _step(mode, chip, step, found),
        "layers": [_line(layer) for layer in found],
    }


def _total(found: Sequence[Layer], chip: Chip, even: bool = False) -> float:
    """Microseconds of the same kernels on another chip, or with their work spread evenly."""
    again = [(layer.count, bound(layer.product, layer.kernel, layer.code, chip, even)) for layer in found]
    return sum(count * made.us for count, made in again if made)


def _line(layer: Layer) -> dict[str, Any]:
    return {
        "layer": layer.product.name,
        "count": layer.count,
        "operations": layer.product.operations,
        "tile": asdict(layer.kernel.tile),
        "body": layer.kernel.body,
        "shared_bytes": layer.kernel.shared_bytes,
        **{**asdict(layer.code), "outside": sum(layer.code.outside.values())},
        "instructions_per_imma": layer.code.per_imma,
        **asdict(layer.bound),
        "binds": layer.binds,
        "ratio": layer.fp16 / layer.bound.us,
        "fp16_us": layer.fp16,
        "fp16_without_tails_us": layer.fp16_without_tails,
        "fp16_binds": layer.fp16_binds,
    }


def _step(mode: Mode, chip: Chip, step: Step, found: Sequence[Layer]) -> dict[str, dict[str, float]]:
    """Parts of a whole step: ours, and the same network in fp16. Both have their kernels in one CUDA graph."""
    bits = 4 if mode == "w4a4" else 8

    def attend(item: Attention) -> float:
        return LAUNCH_US + max(item.operations / (chip.fp16 * chip.flash) / 1e6, item.bytes / chip.dram / 1e3)

    def memory(what: str) -> float:
        time, scale = 0.0, bits / 8 if what == "quantize" else 1
        for item, count in step.moved.items():
            if item.what == what:  # what writes nothing is a part of the kernel behind it
                time += count * ((item.read + item.written * scale) / chip.dram / 1e3 + LAUNCH_US * (item.written > 0))
        return time

    ours = {"attention": sum(count * attend(item) for item, count in step.attentions.items())}
    ours |= {what: memory(what) for what in ("norm", "pointwise")}
    rest = [(product, n) for product, n in step.products.items() if not product.quantized]
    ours["fp16 products"] = sum(n * fp16_bound(p, chip)[0] for p, n in rest if p.when == "step")
    fp16 = dict(ours)
    ours["quantize"] = memory("quantize")
    ours["int4 products"] = sum(layer.count * layer.bound.us for layer in found)
    fp16["fp16 products"] += sum(layer.count * layer.fp16 for layer in found)
    fp16 |= {"geglu": memory("geglu")} if any(item.what == "geglu" for item in step.moved) else {}
    fp16["text and time products"] = sum(n * fp16_bound(p, chip)[0] for p, n in rest if p.when != "step")
    return {"int4": ours, "fp16": fp16}


def write(file: Path, cases: Sequence[dict[str, Any]]) -> None:
    """JSON, a case a line, written beside and renamed; cases of the file that are not modelled anew stay."""
    key = itemgetter("model", "mode", "batch", "arch")
    old = json.loads(file.read_text())["cases"] if file.exists() else []
    rounded = json.loads(json.dumps(cases), parse_float=lambda number: float(f"{float(number):.4g}"))
    every = {key(case): json.dumps(case) for case in (*old, *rounded)}
    file.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({"title": TITLE, "chips": [asdict(chip) for chip in CHIPS.values()]})
    part = file.with_suffix(".part")
    part.write_text(f'{head[:-1]}, "cases": [\n' + ",\n".join(every.values()) + "\n]}\n")
    part.rename(file)


def kernel_table(mode: Mode, chip: Chip, work: Path) -> str:
    """The main loop of a linear layer's kernel with each tile."""
    product = Product("linear", 4096, 1280, 1280, 4096 * 1280, 2, _PLAIN, None, "step", True)
    rows: list[list[Any]] = []
    for tile in TILES:
        kernel = typical(product, mode, chip, tile)
        if kernel is None:
            continue
        code = codes([kernel], chip.arch, work)[kernel.name]
        made = bound(product, kernel, code, chip)
        imma = code.loop["IMMA"]
        mix = [f"{code.loop.get(kind, 0) / imma:.2f}" for kind in KINDS]
        other = (sum(code.loop.values()) - imma - sum(code.loop.get(kind, 0) for kind in KINDS)) / imma
        fit = made.resident if made is not None else "does not fit"
        resources = [code.registers, code.spills, f"{kernel.shared_bytes / 1024:.0f}", fit]
        rows.append([_tile(tile), kernel.body, *resources, imma, f"{code.per_imma:.2f}", *mix, f"{other:.2f}"])
    head = ["tile", "body", "registers", "spills", "shared KiB", "blocks/SM", "IMMA", "instructions/IMMA", *KINDS]
    return _table(f"Main loops, {mode} on {chip.arch}, counted in SASS (blocks/SM: {TITLE})", [*head, "other"], rows)


def layer_table(what: str, chip: Chip, found: Sequence[Layer], rows: int) -> str:
    """The layers that take longest."""
    lines: list[list[Any]] = []
    slowest = sorted(found, key=lambda layer: -layer.count * layer.bound.us)[:rows]
    for layer in slowest:
        made, code = layer.bound, layer.code
        resources = [f"{code.registers}/{code.spills}", f"{layer.kernel.shared_bytes / 1024:.0f}", made.resident]
        line = [layer.product.name, layer.count, f"{layer.product.operations / 1e9:.1f}", f"{made.bytes / 1e6:.1f}"]
        line += [_tile(layer.kernel.tile), *resources, f"{made.waves:.2f}", f"{100 * made.tail:.0f}%"]
        line += [
            f"{code.per_imma:.2f}" if code.loop else "no loop",
            f"{made.us:.1f}",
            layer.binds,
            f"{layer.fp16:.1f}",
            layer.fp16_binds,
        ]
        lines.append([*line, f"{layer.fp16 / made.us:.2f}"])
    head = ["layer m x n x k", "count", "GOP", "DRAM MB", "tile", "registers/spills", "shared KiB", "blocks/SM"]
    head += ["waves", "tail", "instructions/IMMA", "modelled µs", "binds", "modelled fp16 µs", "fp16 binds", "× fp16"]
    return _table(f"{what} on {chip.name}: {len(slowest)} of {len(found)} layer shapes, {TITLE}", head, lines)


def step_table(cases: Sequence[dict[str, Any]]) -> str:
    """Whole steps in milliseconds."""
    lines: list[list[Any]] = []
    parts = list(dict.fromkeys(name for case in cases for kind in case["step"].values() for name in kind))
    for case in cases:
        totals = {kind: sum(values.values()) for kind, values in case["step"].items()}
        for kind, values in case["step"].items():
            speed = f"{totals['fp16'] / totals['int4']:.2f}" if kind == "int4" else ""
            cells = [f"{values[name] / 1e3:.2f}" if name in values else "" for name in parts]
            name = case["mode"] if kind == "int4" else kind
            lines.append([case["card"], name, *cells, f"{totals[kind] / 1e3:.2f}", speed])
    title = f"{cases[0]['model']}, one step, batch {cases[0]['batch']}: milliseconds, {TITLE}"
    return _table(title, ["card", "step", *parts, "modelled step", "× fp16"], lines)


def goal_table(cases: Sequence[dict[str, Any]]) -> str:
    """The honest limit: quantized products over fp16, and what holds them."""
    lines: list[list[Any]] = []
    for case in cases:
        goal = GOALS.get((case["arch"], case["mode"]))
        held = ", ".join(f"{name} {100 * share:.0f}%" for name, share in list(case["binds"].items())[:4])
        ideal = case["gemm_fp16_without_tails_us"] / case["gemm_us"]
        verdict = "" if goal is None else f"≥ {goal:.0f}: {'yes' if case['gemm_ratio'] >= goal else 'no'}"
        others = [f"{ratio:.2f}" for ratio in case["gemm_ratio_if"].values()]
        line = [case["model"], case["mode"], case["card"], f"{case['gemm_us'] / 1e3:.2f}"]
        both, theirs = case["joined"], case["gemm_fp16_us"]
        levers = [case["gemm_ratio_even"], theirs / both["gemm_us"], both["gemm_fp16_us"] / both["gemm_us"]]
        others += [f"{ratio:.2f}" for ratio in levers]
        others += [f"{100 * (case['gemm_us_by_rule'] / case['gemm_us'] - 1):.1f}%"]
        lines.append([*line, f"{case['gemm_ratio']:.2f}", f"{ideal:.2f}", *others, verdict, held])
    head = ["model", "mode", "card", "modelled ms", "× fp16", "× fp16 without tails"]
    head += [f"× fp16 if L2 × {factor}" for factor in L2_FACTORS]
    head += ["if work were even", "with q, k, v joined", "in fp16 too", "tiles by rule slower by"]
    return _table(
        f"Quantized products over fp16, and what holds them, {TITLE}", [*head, "goal", "time by what binds"], lines
    )


def below_table(case: dict[str, Any], rows: int = 8) -> str:
    """Layers below the goal, those that take longest, and the times of what holds them most."""
    goal = GOALS.get((case["arch"], case["mode"]), 0.0)
    below = sorted((r for r in case["layers"] if r["ratio"] < goal), key=lambda r: -r["count"] * r["us"])
    lines: list[list[Any]] = []
    for row in below[:rows]:
        parts = sorted(row["parts"].items(), key=lambda item: -item[1])[:3]
        holds = ", ".join(f"{name} {us:.1f}" for name, us in parts) + f" of {row['us']:.1f} µs"
        share = f"{100 * row['count'] * row['us'] / case['gemm_us']:.0f}%"
        lines.append([row["layer"], share, f"{row['ratio']:.2f}", f"{100 * row['tail']:.0f}%", holds])
    time = sum(row["count"] * row["us"] for row in below) / case["gemm_us"]
    title = f"{case['model']}, {case['mode']} on {case['card']}: {time:.0%} of the products' time is below {goal:.0f}"
    return _table(f"{title}, {TITLE}", ["layer", "of time", "× fp16", "tail", "held by"], lines) if lines else ""


def _tile(tile: Tile) -> str:
    return f"{tile.m}x{tile.n} {tile.row_bytes}B"


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return f"\n{title}\n\n{tabulate(rows, head, tablefmt='github', disable_numparse=True)}\n"


if __name__ == "__main__":
    sys.exit(main())
