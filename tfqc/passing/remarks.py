"""Remarks: what passes want users to read, as data; the sentences are made here, from one table.

A template is a format string over a remark's numbers: `{fused}` is the number, `{fused:|value|values}` the word that
goes with it, `{loss:.4g}` any format. `{*:# *}` stands for all numbers, sorted by name, each as it says: `#` is the
number, `*` its name, and a word may follow in both forms: `{*:* for # |feature|features}`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tfqc.errors import PassError, suggest

Number = int | float | str

_TEMPLATES: dict[str, str] = {
    # the driver and backends
    "random-conditions": "calibrated on random conditions: give your own for quality that counts",
    "fixed-argument": "{argument} is {value}, as in the example inputs: a call that leaves it out gets that, too",
    "times-not-recorded": "what {pipeline} calls its model with could not be recorded ({why}): taken for the times of "
    "its scheduler; give schedule=SamplingSchedule.of(scheduler, steps, times=...) where they are others",
    "instruction": "{mode} on {arch}: {instruction}",
    "another-way": "{at}: {because}",
    "another-way-each": "{count} x {operation} ({places}): {because}",
    "float-product": "{at}: {operation} {does} @{weight} in floating point: {why}",
    # passes
    "features": "{features} temporal {features:|feature|features}: {compile_time} known at compile time, "
    "{per_request} per request",
    "timeless": "{model} is told no time that is one number for each image: it has no temporal features",
    "step-inputs": "what depends on {names} is computed at each step: no table can have rows for it",
    "maintenance": "maintenance: {*:* for # |feature|features}",
    "observed": "observed {values} {values:|value|values} over {steps} {steps:|step|steps} of {images} "
    "{images:|image|images} in one run, at most {mebibytes:.0f} MiB of activations and statistics",
    "concat-split": "split into parts by concatenated values: {count} "
    "{count:|linear or convolution|linears and convolutions}",
    "split-off": "split off rank {rank}: {linears} {linears:|linear|linears}",
    "reconstructed-blocks": "BRECQ: {better} of {blocks} {blocks:|block|blocks} better; error of a block {before:.3g} "
    "before, {after:.3g} after",
    "reconstructed": "TIAR: loss {nearest:.4g} with nearest rounding, {reconstructed:.4g} reconstructed",
    "not-reconstructed": "TIAR: loss {nearest:.4g} with nearest rounding, {reconstructed:.4g} reconstructed; "
    "nearest rounding kept",
    "time-scales": "learned steps of {inputs} {inputs:|input|inputs} as functions of time: error in outputs "
    "{learned:.3g}, {single:.3g} with the best single step of each, {each:.3g} with the best for each time",
    "folded": "fold: {before} {before:|operation|operations} a step became {after}",
    "hoisted": "hoist: {operations} {operations:|operation runs|operations run} once per image, giving {values} "
    "{values:|value|values}",
    "left-in-float": "left in floating point: {*:# *}",
    "protected-steps": "protected steps: {count} {count:|input stays|inputs stay} in floating point at {protected} of "
    "{steps} {steps:|step|steps}; at the others values are rounded, and multiplied in floating point, too: no kernel "
    "takes both",
    "lowered": "lowered to {to}: {count} {count:|linear or convolution|linears and convolutions}",
    "low-rank-fused": "branches of low rank in products: {count}",
    "fused": "fused into products: {count} {count:|activation, gate or addition|activations, gates and additions}",
    "quantized-at-source": "quantized where it is computed: {fused} of {values} {values:|value|values}",
    "stored": "stored in {form}: {count} {count:|value|values}",
    "memory": "memory: {values} {values:|value|values}, {shared} of them in place of what {shared:|it adds|they add} "
    "to",
}


@dataclass(frozen=True)
class Remark:
    """One remark. `str` gives the sentence.

    `pass_name` is the pass that spoke, or a backend, or `compile`; `number` is the pass's place in the pipeline, from
    1, 0 for who is no pass. `kind` says which template of the table renders it, `node` the node that it is about, if
    it is about one. `numbers` are what it says: numbers and names.
    """

    pass_name: str
    kind: str
    node: str = ""
    numbers: Mapping[str, Number] = field(default_factory=dict[str, Number])
    number: int = 0

    def __str__(self) -> str:
        if self.kind not in _TEMPLATES:
            raise PassError(f"There is no kind of remark {self.kind!r}.{suggest(self.kind, list(_TEMPLATES))}")
        values = {name: _Value(value) for name, value in self.numbers.items()}
        try:
            return _TEMPLATES[self.kind].format_map({**values, "*": _All(self.numbers)})
        except (KeyError, IndexError, ValueError) as error:
            raise PassError(
                f"A remark {self.kind!r} with {', '.join(self.numbers) or 'no numbers'} does not fit "
                f"{_TEMPLATES[self.kind]!r}: {error}."
            ) from error

    def to_json(self) -> dict[str, Any]:
        """An object of its fields; numbers that JSON has not become text."""
        numbers = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in self.numbers.items()}
        return {**asdict(self), "numbers": numbers}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Remark:
        """Inverse of `to_json`."""
        return cls(**value)


def remark_kind(kind: str, template: str) -> str:
    """Make a kind of remark known, with the sentence that it is rendered as. Returns the kind.

    Raises:
        PassError: the kind has another sentence already.
    """
    if _TEMPLATES.setdefault(kind, template) != template:
        raise PassError(f"The kind of remark {kind!r} is known as {_TEMPLATES[kind]!r}: take another name.")
    return kind


def remark_kinds() -> Mapping[str, str]:
    """All kinds that are known, and their templates."""
    return dict(_TEMPLATES)


class _Value:
    """A number in a template."""

    def __init__(self, value: Number) -> None:
        self.value = value

    def __format__(self, spec: str) -> str:
        if spec.startswith("|"):
            one, many = spec[1:].split("|")
            return one if self.value == 1 else many
        return str(self.value) if isinstance(self.value, str) else format(self.value, spec)


class _All:
    """All numbers in a template."""

    def __init__(self, numbers: Mapping[str, Number]) -> None:
        self.numbers = numbers

    def __format__(self, spec: str) -> str:
        each, *words = spec.split("|")
        parts = [
            "".join({"#": str(value), "*": name}.get(c, c) for c in each) + (words[value != 1] if words else "")
            for name, value in sorted(self.numbers.items())
        ]
        return ", ".join(parts)
