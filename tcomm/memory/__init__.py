"""Symmetric memory, and the protocol core that every collective is made of."""
