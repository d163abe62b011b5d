"""A run's files on disk; no other code names them. Needs no torch."""
