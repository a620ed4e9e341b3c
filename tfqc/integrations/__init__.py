"""tfqc in the place of what other libraries have."""
