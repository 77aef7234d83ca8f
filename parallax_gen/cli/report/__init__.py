"""What `parallax-gen report` reads, works out and writes: one file an idea, `command.py` the command itself."""
