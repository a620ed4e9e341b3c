"""Models by name, what belongs to them, and the one that ships with tfqc."""
