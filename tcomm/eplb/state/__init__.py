"""The state of expert balancing."""
