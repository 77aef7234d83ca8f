"""Drop-in replacements for other Parallax packages, with exactly their signatures and our kernels: change one import.

    compat.parallax_kernel         replaces `parallax` of parallax-kernel 0.1.1
    compat.parallax_kernel_triton  replaces `parallax.triton`
    compat.fla              replaces `fla.ops.parallax` and its `decode` of fla-core 0.6.0

Accepted arguments give the same result in the same dtype and layout, except where a module says otherwise. Refused
arguments raise the same type of error, which is also an ArgumentError. There are no hardware limits: any GPU that
Triton supports works, and CPU tensors run through the slow fp64 reference.
"""
