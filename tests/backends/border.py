"""What a loaded model does with calls that nobody should make, and in programs that nobody foresaw, in every backend.

class TestFakeQuantBorder(Border):
    target = "fake-quant"
"""

from __future__ import annotations

import copy
import io
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import tfqc.runtime
from tests.backends.conformance import compile_for
from tests.helpers import first
from tests.subjects import Subject, Subjects
from tfqc.driver import load

NAN, INF = float("nan"), float("inf")
Change = Callable[[dict[str, Any]], dict[str, Any]]


def _with(**changes: Any) -> Change:
    return lambda call: {**call, **changes}


def _resized(name: str, *shape: int) -> Change:
    return lambda call: {**call, name: torch.zeros(shape, dtype=call[name].dtype)}


# What is called, which error it is, and what its sentence says. The call has two images of 4 channels, 8 x 8.
WRONG: dict[str, tuple[Change, type[Exception], str]] = {
    "three channels": (_resized("sample", 2, 3, 8, 8), ValueError, r"sample is 2x3x8x8; this model takes Bx4x8x8"),
    "five channels": (_resized("sample", 2, 5, 8, 8), ValueError, r"sample is 2x5x8x8"),
    "another size": (_resized("sample", 2, 4, 16, 16), ValueError, r"compile it with dynamic='H,W' .--dynamic H,W. if"),
    "an odd size": (_resized("sample", 2, 4, 9, 9), ValueError, r"sample is 2x4x9x9"),
    "no batch": (_resized("sample", 4, 8, 8), ValueError, r"sample is 4x8x8; this model takes Bx4x8x8"),
    "five dimensions": (_resized("sample", 2, 4, 1, 8, 8), ValueError, r"sample is 2x4x1x8x8"),
    "no image": (_resized("sample", 0, 4, 8, 8), ValueError, r"holds nothing"),
    "one prompt for two": (_resized("encoder_hidden_states", 1, 5, 12), ValueError, r"give .*expand\(2, -1, -1"),
    "three prompts": (_resized("encoder_hidden_states", 3, 5, 12), ValueError, r"encoder_hidden_states is 3x5x12"),
    "narrow prompts": (_resized("encoder_hidden_states", 2, 5, 11), ValueError, r"encoder_hidden_states is 2x5x11"),
    "a flat prompt": (_resized("encoder_hidden_states", 5, 12), ValueError, r"encoder_hidden_states is 5x12"),
    "three timesteps": (_with(timestep=torch.tensor([1.0, 2.0, 3.0])), ValueError, r"3 timesteps for 2 images"),
    "no timesteps": (_with(timestep=torch.zeros(0)), ValueError, r"0 timesteps for 2 images"),
    "NaN as time": (_with(timestep=torch.tensor(NAN)), ValueError, r"timestep is nan, which is no timestep"),
    "infinite time": (_with(timestep=INF), ValueError, r"timestep is inf"),
    "a word as time": (_with(timestep="soon"), TypeError, r"timestep is a str, not a tensor"),
    "complex noise": (_with(sample=torch.zeros(2, 4, 8, 8, dtype=torch.complex64)), TypeError, r"sample is complex64"),
    "truth as prompt": (
        _with(encoder_hidden_states=torch.zeros(2, 5, 12) > 0), TypeError, r"is bool; this model takes float32",
    ),
    "sparse noise": (lambda c: {**c, "sample": c["sample"].to_sparse()}, TypeError, r"sample is no plain tensor"),
    "noise on meta": (lambda c: {**c, "sample": c["sample"].to("meta")}, TypeError, r"sample is no plain tensor"),
    "a list as noise": (_with(sample=[["x"]]), TypeError, r"sample is a list"),
    "no prompt": (lambda c: {k: c[k] for k in ("sample", "timestep")}, TypeError, r"needs the input 'encoder_hidden"),
    "None as prompt": (_with(encoder_hidden_states=None), TypeError, r"needs the input 'encoder_hidden_states'"),
    "a mask": (_with(attention_mask=torch.ones(2, 5)), TypeError, r"captured without 'attention_mask'"),
    "controls": (_with(added_cond_kwargs={"ids": torch.ones(2)}), TypeError, r"without 'added_cond_kwargs.ids'"),
    "nothing of ours": (_with(strength=0.5), TypeError, r"captured without 'strength'"),
}  # fmt: skip


class Border:
    """Tests that a backend inherits."""

    target: ClassVar[str]

    @pytest.fixture(scope="class")
    def its(self, subject: Subjects) -> Subject:
        return subject("unet-sd")

    @pytest.fixture(scope="class")
    def directory(self, its: Subject, tmp_path_factory: pytest.TempPathFactory) -> Path:
        work = tmp_path_factory.mktemp("border")
        return compile_for(its, self.target, "fold", work / "work")[1].save(work / "out")

    @pytest.fixture
    def model(self, directory: Path) -> nn.Module:
        return load(directory)

    @pytest.fixture
    def call(self, its: Subject) -> dict[str, Any]:
        return its.call([750.0, 750.0])

    # -- calls ------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("wrong", WRONG)
    def test_wrong_calls_get_a_sentence(self, wrong: str, model: nn.Module, call: dict[str, Any]) -> None:
        change, error, sentence = WRONG[wrong]
        with pytest.raises(error, match=sentence) as caught:
            model(**change(call))
        assert "\n" not in str(caught.value)

    def test_what_changes_nothing_is_taken(self, model: nn.Module, call: dict[str, Any]) -> None:
        want = first(model(**call))
        idle = {
            "class_labels": None,
            "cross_attention_kwargs": {},
            "added_cond_kwargs": {"ids": None},
            "return_dict": True,
        }
        assert torch.equal(first(model(**call, **idle)), want)
        assert torch.equal(first(model(call["sample"], call["timestep"], call["encoder_hidden_states"])), want)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_every_float_in_and_the_same_out(self, dtype: torch.dtype, model: nn.Module, call: dict[str, Any]) -> None:
        rounded = {k: v.to(dtype).to(v.dtype) if k != "timestep" else v for k, v in call.items()}
        want = first(model(**rounded))
        for _ in range(2):
            got = first(model(**{k: v.to(dtype) if k != "timestep" else v for k, v in call.items()}))
            assert got.dtype == dtype
            assert torch.equal(got, want.to(dtype))

    def test_a_changed_request_of_another_dtype_is_seen(self, model: nn.Module, call: dict[str, Any]) -> None:
        call = {k: v.to(torch.bfloat16) if k != "timestep" else v for k, v in call.items()}
        before = first(model(**call))
        call["encoder_hidden_states"].mul_(-1)
        assert not torch.equal(first(model(**call)), before)

    # -- what is not finite -----------------------------------------------------------------------------------------

    @pytest.mark.parametrize("name", ["sample", "encoder_hidden_states"])
    @pytest.mark.parametrize("value", [NAN, INF, -INF])
    def test_not_finite_in_is_seen_out(self, name: str, value: float, model: nn.Module, call: dict[str, Any]) -> None:
        want = first(model(**call))
        broken = call[name].clone()
        broken[1].view(-1)[3] = value
        got = first(model(**{**call, name: broken}))
        assert bool(got[1].isnan().all())
        assert torch.equal(got[0], want[0])
        model.check_finite = True
        with pytest.raises(FloatingPointError, match=rf"input '{name}' holds NaN or infinity at timestep 750"):
            model(**{**call, name: broken})
        assert torch.equal(first(model(**call)), want)

    def test_check_finite_names_the_layer(self, directory: Path, call: dict[str, Any]) -> None:
        """A table that was damaged: its line in model.py, and the module that it stands for."""
        model = load(directory, check_finite=True)
        name = model.plan.tables[0].tensor
        damaged = model.get_tensor(name).clone()
        damaged[0].view(-1)[0] = INF
        model.set_tensor(name, damaged)
        model.check_finite = False
        assert bool(first(model(**{**call, "timestep": torch.tensor(500)})).isfinite().all())
        model.check_finite = True
        with pytest.raises(FloatingPointError, match=r"at timestep 750; first in down_blocks.0.resnets.0\S*: \w+ = .*"):
            model(**call)

    # -- as a module among others -----------------------------------------------------------------------------------

    def test_it_moves_or_refuses(self, model: nn.Module, call: dict[str, Any]) -> None:
        want = first(model(**call))
        for change in (nn.Module.half, nn.Module.double, nn.Module.bfloat16):
            with pytest.raises(ValueError, match=r"cannot be turned into"):
                change(model)
        with pytest.raises(ValueError, match=r"meta"):
            model.to("meta")
        for same in (
            model.to("cpu"),
            model.float(),
            model.eval(),
            model.to(torch.float32),
            model.requires_grad_(False),
        ):
            assert torch.equal(first(same(**call)), want)
        assert model.state_dict()
        with pytest.raises(RuntimeError, match=r"takes no other weights"):
            model.load_state_dict(model.state_dict())

    def test_copies(self, model: nn.Module, call: dict[str, Any]) -> None:
        want = first(model(**call))
        saved = io.BytesIO()
        torch.save(model, saved)
        saved.seek(0)
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)
        for other in copies:
            assert other is not model
            assert torch.equal(first(other(**call)), want)

    def test_a_copy_by_its_own_code(self, directory: Path, model: nn.Module, call: dict[str, Any]) -> None:
        want = first(model(**call))
        trusted = tfqc.runtime.load(directory, trust_code=True)
        for other in (trusted, pickle.loads(pickle.dumps(trusted))):
            assert torch.equal(first(other(**call)), want)
        with pytest.raises(ValueError, match=r"trust_code=True"):
            tfqc.runtime.load(directory)

    @pytest.mark.parametrize("method", ["fork", "spawn"])
    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_in_another_process(self, method: str, model: nn.Module, call: dict[str, Any]) -> None:
        """After the threads of this one have run; there it has one, and gives what one gives here."""
        _check_elsewhere(method, model, call, _call, model)

    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_loaded_in_a_fork(self, directory: Path, model: nn.Module, call: dict[str, Any]) -> None:
        _check_elsewhere("fork", model, call, _load, directory)

    def test_no_plain_tensor_after_a_plain_one(self, model: nn.Module, call: dict[str, Any]) -> None:
        model(**call)
        for name in call:
            for strange in (call[name].to("meta"), call[name].float().to_sparse()):
                with pytest.raises(TypeError, match=rf"{name} is no plain tensor"):
                    model(**{**call, name: strange})
        with pytest.raises(ValueError, match=r"is not emptied"):
            model.to_empty(device="cpu")

    def test_modes_of_torch(self, model: nn.Module, call: dict[str, Any]) -> None:
        """What one mode leaves behind serves the others."""
        want = first(model(**call))

        def check(**other: Any) -> None:
            assert torch.equal(first(model(**{**call, **other})), want)

        with torch.inference_mode():
            made = {k: v.clone() for k, v in call.items()}
            check()
            check(**made)
            model(**{**call, "timestep": torch.tensor(33.0)})
        check(**made)
        model(**{**call, "timestep": torch.tensor(34.0)})
        with torch.no_grad():
            check()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            check()
        with torch.inference_mode():
            model(**{**call, "timestep": torch.tensor(35.0)})
            check()
        check()

    def test_around_it_torch_compile(self, model: nn.Module, call: dict[str, Any]) -> None:
        """It is left as it is: nothing of it is traced."""
        want = first(model(**call))
        compiled = torch.compile(model, backend=_refuse)
        for _ in range(2):
            assert torch.equal(first(compiled(**call)), want)

    # -- threads ----------------------------------------------------------------------------------------------------

    def test_threads_get_what_each_would_get_alone(self, directory: Path, its: Subject, model: nn.Module) -> None:
        """Known and unknown timesteps, prompts of their own, batches of their own."""
        alone = load(directory)
        calls = [
            {**its.call(t), "encoder_hidden_states": its.call(t)["encoder_hidden_states"] * scale}
            for scale in (1.0, 0.5)
            for t in ([750.0], [500.0, 0.0], [33.0], [33.5, 750.0, 12.0], [250.0, 250.0, 250.0], [999.0, 1.0])
        ]
        want = [first(alone(**c)) for c in calls]
        wrong: list[Any] = []

        def work(number: int) -> None:
            try:
                for turn in range(3 * len(calls)):
                    at = (turn * (number + 1) + number) % len(calls)
                    got = first(model(**calls[at]))
                    if not torch.equal(got, want[at]):
                        wrong.append((at, float((got - want[at]).abs().max())))
            except Exception as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


def _check_elsewhere(method: str, model: nn.Module, call: dict[str, Any], work: Any, subject: Any) -> None:
    """`work` on `subject` in a process that is made after this one's threads have run gives what one thread gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model(**call)
        torch.ones(1000, 1000) @ torch.ones(1000, 1000)
        context: Any = multiprocessing.get_context(method)
        queue = context.Queue()
        process = context.Process(target=work, args=(subject, call, queue))
        process.start()
        got = torch.tensor(queue.get(timeout=100))
        process.join(100)
    finally:
        torch.set_num_threads(1)
        want = first(model(**call))
        torch.set_num_threads(threads)
    assert process.exitcode == 0
    assert torch.equal(got, want)


def _call(model: nn.Module, call: dict[str, Any], queue: Any) -> None:
    if multiprocessing.get_start_method() == "spawn":
        torch.set_num_threads(1)  # a fork does that by itself
    queue.put(first(model(**call)).tolist())
    queue.close()
    queue.join_thread()
    os._exit(0)


def _load(directory: Path, call: dict[str, Any], queue: Any) -> None:
    _call(load(directory), call, queue)


def _refuse(graph: Any, inputs: list[Tensor]) -> Any:
    raise AssertionError("torch.compile traced the model")
