"""What is kept of values while a model runs, and how parts of it become one."""
