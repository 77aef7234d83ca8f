"""`parallax_gen.compat.official_triton`, whose code is in integrations/drop_in."""

from parallax_gen.integrations.drop_in.official_triton import *  # noqa: F403 - all that its __all__ names
from parallax_gen.integrations.drop_in.official_triton import __all__ as __all__
