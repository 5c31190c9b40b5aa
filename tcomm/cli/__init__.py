"""The command line: `python -m tcomm`. Each command parses, calls one function and prints."""
