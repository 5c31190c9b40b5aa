"""What one GPU can show of tcomm, in eight minutes: `python -m perf.gpu`."""
