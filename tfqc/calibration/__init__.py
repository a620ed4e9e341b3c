"""Running full-precision models on calibration data, and what is observed on the way."""
