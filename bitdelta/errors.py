"""What can go wrong with files, bases and devices.

Wrong arguments are Python's own: TypeError (kind or dtype), ValueError (shape or value), BufferError (layout,
alignment, overlap or device of a tensor), MemoryError.
"""

from __future__ import annotations


class Error(Exception):
    """Whatever bitdelta itself refuses; the parent of the errors below."""


class FormatError(Error):
    """A file or folder that is not what it should be: truncated, corrupted, of an unknown version."""


class BaseMismatchError(Error):
    """A delta that does not belong to this base."""


class DeviceError(Error):
    """A device that is missing or that this build cannot use."""
