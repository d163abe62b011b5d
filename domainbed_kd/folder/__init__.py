"""What a run leaves on disk, and the only code that names those files. Needs no torch."""
