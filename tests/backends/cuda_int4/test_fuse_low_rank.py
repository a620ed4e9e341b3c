"""fuse-low-rank: branches go into their products, other sums stay."""

from __future__ import annotations

from tests.helpers import args_of, find
from tests.lowered import apply, before, parts, round_trip
from tests.passes.test_split_low_rank import BRANCHES, RANK
from tests.subjects import of_example
from tfqc.ir.render import render

W4 = "calibrate-weights{bits=4 method=min-max}"
SPLIT = f"split-low-rank{{rank={RANK}}},{W4}"
A8 = "calibrate-activations{bits=8 mode=per-step}"
TARGET = "cuda-int4{mode=w4a8}"


def test_every_branch() -> None:
    its = of_example("branches", BRANCHES)
    old = before("fuse-low-rank", its, TARGET, SPLIT, A8)
    program = apply("fuse-low-rank", old)
    branches = {n.name: n.kwargs for n in find(program, "tfqc.qlinear") if n.kwargs.get("up") is not None}
    ups = {name: has["up"].target for name, has in branches.items()}
    assert sorted(ups.values()) == ["k.weight.up", "out.weight.up", "q.weight.up"]
    lows = {str(has["up"].target)[0]: has["low"] for has in branches.values()}
    assert lows["q"] is lows["k"] and lows["q"] is not lows["o"]
    assert len(find(program, "aten.matmul")) == 2 and len(find(old, "aten.matmul")) == 5
    round_trip(its, program)


def test_a_product_that_others_read_keeps_its_sum() -> None:
    its = of_example("branches", BRANCHES)
    old = before("fuse-low-rank", its, TARGET, SPLIT, A8)
    add = next(n for n in find(old, "aten.add") if n.name.endswith("_whole"))
    product = args_of(add)[0]
    (reader, *_) = add.users
    twice = old.insert(reader, add.target, (add, product), name="twice")  # reads the product once more
    reader.replace_input_with(add, twice)
    program = apply("fuse-low-rank", old)
    assert program.node(add.name).target is add.target
    assert sum(n.kwargs.get("up") is not None for n in find(program, "tfqc.qlinear")) == 2


def test_sums_without_a_branch_stay() -> None:
    old = before("fuse-low-rank", parts(), TARGET, W4, A8)
    assert find(old, "aten.add")
    assert render(apply("fuse-low-rank", old)) == render(old)
