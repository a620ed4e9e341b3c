"""What a loaded artifact of this backend imports, beside `tfqc.runtime`."""
