"""The backend's own passes, one file each."""
