"""The state of expert balancing: loads over the last steps, maps, and when they change."""
