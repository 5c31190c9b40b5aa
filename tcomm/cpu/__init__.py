"""The same collectives over the same buffers, epochs and arrival words, vectorised in torch for CPUs."""
