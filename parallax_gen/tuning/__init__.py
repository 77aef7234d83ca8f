"""The tuner: proposes configs, compiles, checks and times them, and stores the result of each."""
