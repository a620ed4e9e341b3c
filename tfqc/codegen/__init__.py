"""From a lowered program to an artifact and back: backends, targets, files, emitted Python."""
