"""`python -m tfqc` is the command `tfqc`."""

from tfqc.cli import app

if __name__ == "__main__":
    app(prog_name="tfqc")
