"""What is sampled, when, and how: calibration data, schedules, one loop for every denoiser."""
