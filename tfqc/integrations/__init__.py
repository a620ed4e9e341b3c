"""tfqc in the place of what other libraries have."""

from __future__ import annotations


def be_there() -> None:
    """Nothing, but to call it torch has imported tfqc: an entry point of the group `torch.backends`.

    Diffusers takes a class that `model_index.json` names from modules that have been imported, and imports none itself.
    """
