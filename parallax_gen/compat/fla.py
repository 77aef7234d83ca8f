"""`parallax_gen.compat.fla`: the code is in integrations/drop_in."""

from parallax_gen.integrations.drop_in.fla import *  # noqa: F403 - exactly the names in its __all__
from parallax_gen.integrations.drop_in.fla import __all__ as __all__
