"""Other Parallax packages' functions over our kernels, to the letter of their signatures: users change one import.

    parallax_gen.compat.official         stands in for `parallax`, of parallax-kernel 0.1.1
    parallax_gen.compat.official_triton  for `parallax.triton`
    parallax_gen.compat.fla              for `fla.ops.parallax` and its `decode`, of fla-core 0.6.0

What those take gives the same result here, in the same dtype and layout, but for what each module names; what they
refuse is refused with the same type of error, which is an ArgumentError too. Their limits of the machine are not kept:
any card that Triton compiles for will do, and CPU tensors run through the slow fp64 reference.
"""
