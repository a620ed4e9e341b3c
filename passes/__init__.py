"""The passes that ship with tfqc, one file each. See README.md here for how to write one."""
