"""The commands: parse, call, print. Each module has `main(argv=None) -> int`."""
