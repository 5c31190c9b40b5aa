"""Objects as bytes: a codec over a closed set of types, and authenticated frames. Nothing is unpickled."""
