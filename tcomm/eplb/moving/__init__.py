"""The weights of experts, moved between the ranks of a group from one map to the next."""
