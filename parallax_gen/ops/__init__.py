"""One file per op: its config, knobs, validity, defaults, cost hints, launch and scratch.

Importing any module of this package registers all ops, in the order of `problem.spec.OPS`.
"""

from parallax_gen.ops import forward, preprocess, dkdv, dqdr, decode, decode_varlen  # noqa: F401, I001
