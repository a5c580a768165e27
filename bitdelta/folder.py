"""A folder that appears whole or not at all.

    .NAME.partial/   beside the target while it is written; its writer holds a lock on it
    NAME/            after `publish`: every file synced, then one rename

A process that dies leaves the partial folder; the next writer of the same target takes it over. Two writers never
share it: the second is refused.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
from pathlib import Path

from .errors import Error

logger = logging.getLogger("bitdelta")


class PendingFolder:
    """The partial folder of `target`, locked; `path` is where to write. Use `publish` or `discard`, once."""

    def __init__(self, target: str | os.PathLike[str]) -> None:
        """Raises FileExistsError (the target exists), bitdelta.Error (another process writes it), OSError."""
        self.target = Path(os.path.abspath(target))
        self.path = _partial(self.target)
        refuse_existing(self.target)
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._lock = self._acquire()
        try:
            refuse_existing(self.target)  # another writer may have finished meanwhile
        except FileExistsError:
            self.discard()
            raise

    def clear(self) -> None:
        """Removes what a dead writer left."""
        for entry in os.scandir(self.path):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)

    def sync(self) -> None:
        """Waits until everything is on the disk."""
        for path in self.path.rglob("*"):
            _sync(path)
        _sync(self.path)

    def publish(self) -> None:
        """Syncs every file and renames the folder to its target."""
        self.sync()
        refuse_existing(self.target)
        self.path.rename(self.target)
        self._unlock()
        _sync(self.target.parent)
        logger.info("wrote %s", self.target)

    def discard(self) -> None:
        """Removes the folder, unless it is published."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            self._unlock()

    def _unlock(self) -> None:
        os.close(self._lock)
        self._lock = -1

    def _acquire(self) -> int:
        """A descriptor of the partial folder that holds its lock, which dies with the process."""
        while True:
            self.path.mkdir(exist_ok=True)
            try:
                descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            except FileNotFoundError:  # published or discarded since mkdir
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise Error(
                    f"{self.target}: another process is writing it now (in {self.path.name})"
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.EBADF, errno.ENOSYS):
                    raise  # those: a file system without locks, where two writers are the user's to avoid
            if _is_at(descriptor, self.path):
                return descriptor
            os.close(descriptor)


def refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists; choose another --out")


def refuse_inside(path: str | os.PathLike[str], *roots: Path) -> None:
    """An output inside an input folder would become part of the input."""
    target = Path(path).resolve()
    for root in roots:
        if target.is_relative_to(root.resolve()):
            raise ValueError(f"out: {path} lies inside {root}; choose a folder outside")


def refuse_full(path: str | os.PathLike[str], needed: int) -> None:
    """Raises OSError when the file system of `path` has less than `needed` bytes for it.

    What a dead writer holds in the partial folder counts as free: it will be taken over or removed.
    """
    folder = Path(os.path.abspath(path))
    partial = _partial(folder)
    while not folder.exists():
        folder = folder.parent
    held = (
        sum(entry.stat().st_blocks for entry in partial.rglob("*")) * 512
    )  # st_blocks is in units of 512 bytes
    free = shutil.disk_usage(folder).free + held
    if free < needed:
        raise OSError(errno.ENOSPC, f"{path}: needs {needed:,} bytes, {folder} has {free:,} free")


def write_all(descriptor: int, data: memoryview) -> None:
    """Writes every byte; os.write may write fewer."""
    while len(data):
        data = data[os.write(descriptor, data) :]


def reserve(descriptor: int, size: int) -> None:
    """Asks for the disk space of a file's first `size` bytes: twice as fast to fill, and a full disk shows early."""
    if size > 0 and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV):
                raise  # those: a file system that cannot


def full_disk(error: OSError, target: Path) -> OSError:
    """The same error, saying what could not be written; a write knows only its descriptor."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and error.filename is None:
        return OSError(error.errno, f"{os.strerror(error.errno)}; nothing was written", str(target))
    return error


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):  # a folder that cannot be synced
            raise
    finally:
        os.close(descriptor)
