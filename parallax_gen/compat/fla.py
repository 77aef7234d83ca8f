"""`parallax_gen.compat.fla`, whose code is in integrations/drop_in."""

from parallax_gen.integrations.drop_in.fla import *  # noqa: F403 - all that its __all__ names
from parallax_gen.integrations.drop_in.fla import __all__ as __all__
