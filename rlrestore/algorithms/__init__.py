"""One file a method, over the pure functions in `objectives`."""
