"""One file a command: wiring, progress and what is printed."""
