"""The backends that ship with tfqc, one folder each. See README.md here for how to write one."""
