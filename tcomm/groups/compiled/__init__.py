"""Collectives as torch operators: for torch.compile, and with gradients."""
