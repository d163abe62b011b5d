"""One run: built from its flags, trained and recorded; a restart ends in the same bits."""
