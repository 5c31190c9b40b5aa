"""Exchanging tokens between the ranks that route them and the ranks that hold their experts."""
