"""The bounds of the values of a record, which may come from an untrusted file or database.

The bounds are wide: no measured value is near them. A value beyond them is a mistake or a forgery, which code that
reads records cannot handle: SQLite has integers of 64 bits, and a time of 1e-320 us makes a rate infinite.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping

from parallax_gen.errors import ArgumentError

MIN_US, MAX_US = 1e-3, 1e12  # from a nanosecond to eleven days
MAX_SECONDS = 1e9
MAX_INT = 2**31 - 1
LONGEST_LINE, LONGEST_DETAIL = 500, 50_000  # characters

INTS = ("registers", "spills", "shared_bytes")  # like the keys of NUMBERS, fields of a record
# Field -> (minimum, maximum). An error is infinite if an output was not finite.
NUMBERS = {
    "time_us": (MIN_US, MAX_US),
    "time_us_p20": (MIN_US, MAX_US),
    "time_us_p80": (MIN_US, MAX_US),
    "compile_s": (0.0, MAX_SECONDS),
    "error": (0.0, math.inf),
}

# A GPU's name is part of a file's name: no path separator, and no longer than a file's name may be.
_GPU = re.compile("[A-Za-z0-9][ -.0-~]{0,99}")
_DIGEST = re.compile("([0-9a-f]{32})?")
# The format of `datetime.isoformat` in UTC, in which a later time is a greater string.
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?\+00:00")

_shown = reprlib.Repr()
_shown.maxstring = _shown.maxlong = _shown.maxother = LONGEST_SHOWN = 80


def shown(value: object) -> str:
    """A short repr of a value for error messages, however long or deep the value is."""
    text = _shown.repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 3]}..."


def check_text(name: str, value: object) -> None:
    """Raises ArgumentError unless the value of a text field is valid."""
    if not isinstance(value, str):
        raise ArgumentError(name, shown(value), "text")
    if name in ("kernel", "text") and not _DIGEST.fullmatch(value):
        raise ArgumentError(name, shown(value), "32 hex digits, or an empty text")
    if name == "gpu" and not _GPU.fullmatch(value):
        raise ArgumentError(name, shown(value), "a name of at most 100 ASCII characters and without /, such as h200")
    if name == "created_at" and not _TIME.fullmatch(value):
        raise ArgumentError(name, shown(value), "a time in UTC, such as 2026-01-31T12:00:00+00:00")
    if name == "detail":
        if len(value) > LONGEST_DETAIL or not _is_unicode(value):
            raise ArgumentError(name, shown(value), f"at most {LONGEST_DETAIL} characters of Unicode")
    elif len(value) > LONGEST_LINE or not value.isprintable():
        raise ArgumentError(name, shown(value), f"one line of at most {LONGEST_LINE} printable characters")


def check_int(name: str, value: object, minimum: int = 0) -> None:
    """Raises ArgumentError unless a field's value is an int from `minimum` to MAX_INT."""
    if type(value) is not int or not minimum <= value <= MAX_INT:
        raise ArgumentError(name, shown(value), f"an int from {minimum} to {MAX_INT}")


def check_number(name: str, value: object) -> None:
    """Raises ArgumentError unless a field's value is a number within its bounds in NUMBERS."""
    minimum, maximum = NUMBERS[name]
    # An int beyond the range of a float does not fit in a column of SQLite, even if the maximum is infinite.
    number = value if isinstance(value, float) or (type(value) is int and value <= MAX_US) else math.nan
    if not minimum <= number <= maximum:
        raise ArgumentError(name, shown(value), f"a number from {minimum:g} to {maximum:g}")


def check_flat(name: str, data: Mapping[str, object]) -> None:
    """Raises ArgumentError if a field of a part of a record is an object or a list: no field is."""
    for field, value in data.items():
        if isinstance(value, dict | list):
            raise ArgumentError(f"{name}'s {shown(field)}", shown(value), "a number, text, true, false or null")


def truncated_detail(text: str) -> str:
    """A failure's text, made valid for a record: a compiler may print anything, at any length."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")[:LONGEST_DETAIL]


def _is_unicode(text: str) -> bool:
    """Whether a text has no lone surrogate: JSON may contain one, but no file and no database accepts it."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)
