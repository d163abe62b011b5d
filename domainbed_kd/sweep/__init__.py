"""Many runs: which jobs a sweep has, how far they are, what they cost, and who runs them."""
