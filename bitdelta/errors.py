"""What can go wrong with files, bases and devices.

Wrong arguments are Python's own: TypeError (kind or dtype), ValueError (shape or value), BufferError (layout,
alignment, overlap or device of a tensor), MemoryError.
"""

from __future__ import annotations

import operator
from typing import Any


class Error(Exception):
    """Whatever bitdelta itself refuses; the parent of the errors below."""


class FormatError(Error):
    """A file or folder that is not what it should be: truncated, corrupted, of an unknown version."""


class BaseMismatchError(Error):
    """A delta that does not belong to this base."""


class DeviceError(Error):
    """A device that is missing or that this build cannot use."""


def whole_number(value: Any, name: str, least: int, most: int) -> int:
    """The argument as an int between least and most, or the TypeError or ValueError that names it."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected a whole number, got {type(value).__name__}") from None
    if not least <= number <= most:
        raise ValueError(f"{name}: expected {least} to {most}, got {number}")
    return number
