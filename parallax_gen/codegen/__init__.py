"""From a spec and a config to a program: rendering, building, and the resources of the compiled kernel."""
