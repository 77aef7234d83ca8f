"""How each kernel is done: one file an op, its config, knobs, validity, defaults, cost hints, launch and scratch."""
