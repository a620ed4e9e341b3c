"""What a backend is: which operations it runs, how it wants programs, what it writes, how that is loaded.

Writing an artifact is apart from building and running it, so code generation is tested without hardware.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import fx

from tfqc.codegen.artifact import Artifact
from tfqc.codegen.rebuild import rebuild
from tfqc.codegen.support import Support
from tfqc.errors import TfqcError
from tfqc.ir.program import Program
from tfqc.passing.base import Pass
from tfqc.passing.remarks import Remark
from tfqc.progress import Progress


class Backend(ABC):
    """Base of all backends.

    Class attributes:
        name: kebab-case, the name in targets.
        options: the frozen dataclass of a target's options.
        files: names of the files that each of its artifacts has; `time.safetensors` may lie beside them. Nothing
            else is loaded. Empty: it does not say.
        simulates: True if it has no kernels, so that nothing of it is real.
        adapts: True if operations may be put into what it has lowered, and `legalize` brings that to its kernels again.
    """

    name: ClassVar[str]
    options: ClassVar[type[Any]]
    files: ClassVar[frozenset[str]] = frozenset()
    simulates: ClassVar[bool] = False
    adapts: ClassVar[bool] = False

    @classmethod
    def notes(cls) -> str:
        """What `tfqc backends NAME` shows below the options: what each of them means on which hardware."""
        return ""

    def remarks(self, options: Any) -> list[Remark]:
        """What users should know of a target before it is compiled for; the report begins with it."""
        return []

    @abstractmethod
    def supports(self, program: Program, node: fx.Node, options: Any) -> Support:
        """Whether a node of a lowered program runs here."""

    @abstractmethod
    def pipeline(self, options: Any, strategy: str) -> str:
        """The pipeline, as text, that brings a captured program to what `legalize` expects, keeping temporal features
        by `strategy` (`tfqc.codegen.recipes.STRATEGIES`)."""

    @abstractmethod
    def legalize(self, options: Any) -> tuple[Pass, ...]:
        """Passes that run after any pipeline, until only operations that this backend claims are left."""

    @abstractmethod
    def emit(self, program: Program, options: Any) -> Artifact:
        """Source files and tensors of a lowered program. Pure: no compiler, no device, the same result twice."""

    def load(self, directory: Path) -> torch.nn.Module:
        """A callable module from a saved artifact whose hashes have been checked. May compile, may use a device.

        As it stands here it emits anew for the artifact's `program.ir` and imports that `model.py`, so that nothing in
        the directory is run. A backend that overrides it has to take the directory for data, too.
        """
        return rebuild(self, directory)

    def check(self, artifact: Path | None, progress: Progress) -> dict[str, Any]:
        """What the device of this machine says of the backend's kernels, and of an artifact; `tfqc gpu-check` shows it.

        JSON with `measured`: False where there is no device, with `because`; else `passed`, `chips` (name, arch, ..),
        `vectors` (kernel, differing, of, most, passed), `notes`, and `cases` with the times of `layers`.
        """
        raise TfqcError(f"The backend {self.name!r} has no device to check.")
