"""How many threads the kernels use.

The first of these that exists: `set_num_threads(n)`; BITDELTA_NUM_THREADS; torch.get_num_threads() once torch is
loaded, also when it changes later; else the CPUs of the affinity mask, at most the cgroup's quota (v1 and v2,
rounded up), as they are at the first call. NumPy's BLAS, which multiplies many rows with the base, has a number of
its own: see threadpoolctl.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

from . import _C
from .errors import whole_number

MOST = 1024
VARIABLE = "BITDELTA_NUM_THREADS"

_chosen: int | None = None  # by set_num_threads or the environment; nothing else is asked then
_machine = 0  # affinity and quota; 0: not asked yet


def set_num_threads(n: int | None) -> None:
    """Sets how many threads the kernels use, the caller included; calls that run keep what they have.

    Products of many rows with the base, and of calibration with H, are NumPy's or PyTorch's: those follow
    `threadpoolctl.threadpool_limits`, OPENBLAS_NUM_THREADS or `torch.set_num_threads`, not this.

    Args:
        n: 1 to 1024, or None: the default again.

    Raises:
        TypeError: not a whole number.
        ValueError: out of range.

    >>> import bitdelta
    >>> bitdelta.set_num_threads(2)
    >>> bitdelta.get_num_threads()
    2
    >>> bitdelta.set_num_threads(None)
    """
    global _chosen, _machine
    if n is None:
        _chosen, _machine = None, 0
    else:
        _chosen = whole_number(n, "n", 1, MOST)
    sync()


def get_num_threads() -> int:
    """How many threads the next call uses, the caller included.

    >>> import bitdelta
    >>> bitdelta.get_num_threads() >= 1
    True
    """
    sync()
    return _C.get_num_threads()


def sync() -> None:
    """Brings the pool to the number that holds now; called before every use of the pool, so it is cheap."""
    n = _chosen or _default()
    if n != _C.get_num_threads():
        _C.set_num_threads(n)


def _default() -> int:
    """Without `set_num_threads`. The environment and the machine are asked once."""
    global _chosen, _machine
    if not _machine:
        _chosen = _from_environment()
        if _chosen is not None:
            return _chosen
        _machine = default_count()
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_num_threads"):  # not so while it is still loading
        return min(int(torch.get_num_threads()), MOST)
    return _machine


def let_torch_sleep() -> None:
    """Before torch is imported: its idle threads shall sleep.

    OpenMP's spin for some milliseconds after each of torch's operators, on the cores where the kernels' own threads
    are to run next. A user's OMP_WAIT_POLICY holds.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def default_count() -> int:
    """CPUs this process may use: the affinity mask, at most the cgroup's quota rounded up."""
    try:
        n = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        n = os.cpu_count() or 1
    quota = cgroup_quota()
    if quota is not None:
        n = min(n, math.ceil(quota))
    return max(1, min(n, MOST))


def cgroup_quota(proc: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> float | None:
    """CPUs' worth of time that the cgroup and its parents grant; None without a limit or without cgroups.

    v2 reads cpu.max ("MICROSECONDS PERIOD" or "max PERIOD"); v1 reads cpu.cfs_quota_us (-1: no limit) and
    cpu.cfs_period_us of the cpu controller. Inside a container the path of `proc` may not exist under `root`; then
    the nearest parent that does is the container's own group.
    """
    limits = []
    for folder in _cgroup_folders(proc, root):
        limit = _read_quota(folder)
        if limit is not None:
            limits.append(limit)
    return min(limits, default=None)


def _cgroup_folders(proc: str, root: str) -> list[Path]:
    """Every folder from the process's group up to the mount, of v2 and of v1's cpu controller."""
    try:
        lines = Path(proc).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0" and not controllers:
            mounts = [Path(root), Path(root, "unified")]
        elif "cpu" in controllers.split(","):
            mounts = [Path(root, controllers), Path(root, "cpu")]
        else:
            continue
        relative = Path(group.lstrip("/"))
        for mount in mounts:
            if ".." not in relative.parts:
                folders += [mount / parent for parent in (relative, *relative.parents)]
            else:
                folders.append(mount)
    return folders


def _read_quota(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
            return None if quota == "max" else int(quota) / int(period)
        quota = (folder / "cpu.cfs_quota_us").read_text(encoding="ascii")
        period = (folder / "cpu.cfs_period_us").read_text(encoding="ascii")
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _from_environment() -> int | None:
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    try:
        return whole_number(int(text), VARIABLE, 1, MOST)
    except ValueError:
        raise ValueError(f"{VARIABLE}: expected a whole number from 1 to {MOST}, got {text!r}") from None
