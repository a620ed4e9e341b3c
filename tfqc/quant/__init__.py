"""Number grids, rounding, and the parameters of quantizers."""
