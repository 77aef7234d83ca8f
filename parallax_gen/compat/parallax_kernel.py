"""`parallax_gen.compat.parallax_kernel`: the code is in integrations/drop_in."""

from parallax_gen.integrations.drop_in.parallax_kernel import *  # noqa: F403 - exactly the names in its __all__
from parallax_gen.integrations.drop_in.parallax_kernel import __all__ as __all__
