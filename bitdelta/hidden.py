"""Hidden states of a run through a model's layers, kept beside the folder that is being written.

.NAME.KIND/KEY-I.npy    what layer I takes; a run of the same key goes on there after a kill
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np

from .inputs import F32


class State:
    """The hidden states before a layer, in `.NAME.KIND` beside the target NAME."""

    def __init__(self, out_dir: Path, key: str, kind: str = "activations") -> None:
        target = Path(os.path.abspath(out_dir))
        self.folder = target.parent / f".{target.name}.{kind}"
        self.key = key[:16]

    def restore(self, hidden: list[F32]) -> int:
        """The layer to go on with; `hidden` becomes what it takes."""
        found = {int(path.stem.rpartition("-")[2]): path for path in self.folder.glob(f"{self.key}-*.npy")}
        if not found:
            return 0
        with open(found[max(found)], "rb") as file:
            for at in range(len(hidden)):
                hidden[at] = np.load(file)
        return max(found)

    def save(self, i: int, hidden: list[F32]) -> None:
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"{self.key}-{i}.npy"
        with open(self.folder / "new", "wb") as file:
            for batch in hidden:
                np.save(file, batch)
        os.replace(self.folder / "new", path)
        for other in self.folder.glob("*.npy"):
            if other != path:
                other.unlink()

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
