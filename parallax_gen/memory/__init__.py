"""What is known about configs: measurements of this machine and of others, and the ranking that chooses between them.

place     the key of a call: GPU, kernel spec and size bucket (place.py)
result    what one trial of one config at one place gave: a time, a failure or a prediction (result.py)
evidence  in a result: the measured kernel, and what compiled and timed it
record    a result that is kept: a row of the user's database (store.py), or a line of a shipped file (shipped.py)
search    the results of one place, toolchain and timing protocol
seed      a config that a tune tries first, because it was fast elsewhere
"""
