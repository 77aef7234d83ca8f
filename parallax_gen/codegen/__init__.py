"""From a spec and a config to a program: render, build, and what the compiled program needs."""
