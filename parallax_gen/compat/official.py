"""`parallax_gen.compat.official`, whose code is in integrations/drop_in."""

from parallax_gen.integrations.drop_in.official import *  # noqa: F403 - all that its __all__ names
from parallax_gen.integrations.drop_in.official import __all__ as __all__
