"""Adapters of low rank (LoRA) given to what is compiled already: branches beside products, tables computed anew."""

from tfqc.adapters.adapted import adapted, check_adapters
from tfqc.adapters.low_rank import LowRank

__all__ = ["LowRank", "adapted", "check_adapters"]
