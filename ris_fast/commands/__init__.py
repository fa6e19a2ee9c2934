"""The command line: one file a command; `cli` only parses."""
