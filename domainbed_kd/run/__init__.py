"""One run: built from its flags, trained step by step, recorded; restartable to the bit."""
