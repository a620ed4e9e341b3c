"""The tensors of a loaded model, and the forms of them that kernels read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

Make = Callable[[Tensor], Tensor]


class Tensors:
    """Tensors by name. Those that get more rows (`grow`) lie in room for twice as many, so that captured graphs, which
    know addresses, stay right until the room is used up: `moved` is called then.
    """

    def __init__(self, directory: Path, moved: Callable[[], None]) -> None:
        self._directory, self._moved = directory, moved
        self._tensors = load_file(directory / "weights.safetensors")
        self._forms: dict[tuple[str, object], tuple[Make, Tensor]] = {}
        self.device = torch.device("cpu")

    def get(self, name: str) -> Tensor:
        """A tensor as it is; those of the time function are read when it is first called."""
        if name not in self._tensors:
            found = load_file(self._directory / "time.safetensors")
            self._tensors |= {name: value.to(self.device) for name, value in found.items()}
        return self._tensors[name]

    def all(self) -> dict[str, Tensor]:
        """Those that have been read, by name."""
        return dict(self._tensors)

    def put(self, name: str, value: Tensor) -> None:
        """Replace a tensor, or add one."""
        self._tensors[name] = value
        for key in [k for k in self._forms if k[0] == name]:
            make, room = self._forms[key]
            form = make(value)
            if len(form) <= len(room):
                room[: len(form)].copy_(form)
            else:
                self._forms[key] = (make, _with_room(form))
                self._moved()

    def form(self, name: str, key: object, make: Make = lambda x: x) -> Tensor:
        """What `make` gives of a tensor, kept; it may have rows to spare. `key` says which form of the tensor it is."""
        if (name, key) not in self._forms:
            self._forms[name, key] = (make, _with_room(make(self.get(name))))
        return self._forms[name, key][1]

    def to(self, device: torch.device) -> None:
        """Move all of them; forms are made anew."""
        if device != self.device:
            self.device = device
            self._tensors = {name: value.to(device) for name, value in self._tensors.items()}
            self._forms.clear()
            self._moved()


def _with_room(form: Tensor) -> Tensor:
    """A copy with rows for a power of two of them."""
    room = form.new_zeros(1 << (len(form) - 1).bit_length(), *form.shape[1:])
    room[: len(form)].copy_(form)
    return room
