"""Where the files lie that are not Python: the templates and the tuning database that ships."""

from __future__ import annotations

from pathlib import Path

from parallax_gen.errors import ParallaxGenError

PACKAGE = Path(__file__).resolve().parent


def data_dir(name: str) -> Path:
    """The folder `name` ("templates", "tuning_db"): inside the package of a wheel, beside it in a checkout.

    Raises ParallaxGenError if it is in neither place.
    """
    places = (PACKAGE / name, PACKAGE.parent / name)
    for folder in places:
        if folder.is_dir():
            return folder
    looked = " or ".join(map(str, places))
    raise ParallaxGenError(f"the data folder {name!r} is missing: not at {looked}; install parallax-gen again")
