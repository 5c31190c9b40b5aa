"""The groups of an inference engine: TP, PP, DP, EP, DCP and PCP."""
