"""What a package needs to extend tfqc: this code, and the entry points in pyproject.toml."""
