"""`parallax_gen.compat.parallax_kernel_triton`: the code is in integrations/drop_in."""

from parallax_gen.integrations.drop_in.parallax_kernel_triton import *  # noqa: F403 - exactly the names in its __all__
from parallax_gen.integrations.drop_in.parallax_kernel_triton import __all__ as __all__
