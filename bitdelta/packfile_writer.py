"""Writes a packed delta tensor by tensor; the folder appears whole, or not at all.

    .NAME.partial/journal       one JSON line for what is made of what, then one per finished tensor
    .NAME.partial/signs-1       the file to be: room for the header, then the signs
    .NAME.partial/rest-1        scales and whole tensors, in the order they came
    NAME/                       at the end: rest appended to signs by falling alignment, header, config, card; renamed

The safetensors format has no holes and its header comes first, so room for it is kept from the names and shapes that
may come; it is padded with spaces. A killed writer leaves its partial folder. A writer with the same `key` takes
over the tensors whose checksums are good, so the result has the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .card import model_card
from .entry import Value, bytes_of, describe
from .folder import PendingFolder, full_disk, refuse_inside, write_all
from .info import delta_bytes
from .packfile import (
    ALIGNMENT,
    CARD,
    CONFIG,
    FORMAT_VERSION,
    INDEX,
    MODEL,
    Spec,
    is_plain,
    keys_of,
    spec_bytes,
)
from .shard import Shard
from .spend import record

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

MAX_PENDING = 2  # tensors that wait to be written, while the next is extracted
MAX_SHARD_BYTES = 40 << 30  # below the 50 GB that the Hub allows a file


class PackfileWriter:
    """Context manager; on leaving it the folder `out_dir` is there, or after an exception nothing is.

    Args:
        out_dir: the folder to write; it must not exist.
        base: the base's checkpoint.
        config: the fine-tune's config.json, where it is not one of `files`.
        files: the fine-tune's other files, name -> path; default the base's. Those that differ travel.
        finetuned: id, revision and name of the fine-tune, for the config and the card.
        names: what `add` may be called with besides the base's names: name -> entry, or None for any form.
        absent: names of the base that the fine-tune does not have.
        key: what the result depends on, as JSON; a partial folder with the same key is taken over.
        budget: the `bits` that the forms were chosen for, or the record of them; see spend.py.
        max_shard_bytes: a file is closed when it holds so much.

    Raises:
        FileExistsError, ValueError: `out_dir` exists, or lies in the base's folder.
        bitdelta.Error: another process writes to it now.
        OSError: it cannot be written.
    """

    def __init__(
        self,
        out_dir: str | os.PathLike[str],
        base: Checkpoint,
        config: dict[str, Any] | None = None,
        files: Mapping[str, Path] | None = None,
        *,
        finetuned: Mapping[str, str | None] | None = None,
        names: Mapping[str, Mapping[str, Any] | None] | None = None,
        absent: Iterable[str] = (),
        key: Any = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        budget: Mapping[str, Any] | None = None,
    ) -> None:
        self.base = base
        self.out_dir = Path(out_dir)
        self.entries: dict[str, dict[str, Any]] = {}
        self.absent = list(absent)
        self.finetuned = dict(finetuned or {})
        self._config = config
        self._files = dict(base.files if files is None else files)
        self._key = {"format_version": FORMAT_VERSION, "key": key, "max_shard_bytes": max_shard_bytes}
        self._names: dict[str, Mapping[str, Any] | None] = (
            dict.fromkeys(base) if names is None else dict(names)
        )
        self._room = header_room(base, self._names)
        known = {name: entry for name, entry in self._names.items() if entry is not None}
        self._planned = sum(
            spec_bytes(spec) for name in known for spec in keys_of(name, known[name]).values()
        )
        self._max = max_shard_bytes
        self._budget = budget
        self._shards: list[Shard] = []
        self._journal = -1
        self._thread = ThreadPoolExecutor(1, "bitdelta-writer")
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> PackfileWriter:
        refuse_inside(self.out_dir, self.base.root)
        self._folder = PendingFolder(self.out_dir)
        try:
            if self._key["key"] is None or not self._resume():
                self._start()
        except BaseException as error:
            self._close()
            self._folder.discard()
            if isinstance(error, OSError):
                raise full_disk(error, self.out_dir) from error
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if kind is None:
                self._finish()
        except OSError as failure:
            kind = type(failure)
            raise full_disk(failure, self.out_dir) from failure
        except BaseException as failure:
            kind = type(failure)
            raise
        finally:
            self._close()
            if kind is not None:
                self._folder.discard()
        if isinstance(error, OSError):
            told = full_disk(error, self.out_dir)
            if told is not error:
                raise told from error

    def add(
        self,
        name: str,
        value: Value,
        *,
        rows: np.ndarray | None = None,
        done: Callable[[], None] | None = None,
        **about: Any,
    ) -> dict[str, Any]:
        """Writes one tensor.

        Args:
            name: the tensor's name in the fine-tune; each once.
            value: Delta, a sequence of Deltas (a stack of matrices), an array (stored whole), or None (the same as
                the base's).
            rows: [A, K], the fine-tune's rows below those of the Delta.
            done: called in the writer's thread when the tensor is written.
            about: what else the entry says: dtype (of the fine-tune; default the base's or the array's), shape,
                base_crc32c, relative_error; tied_to, which makes the tensor tied (value None).

        Arrays are written in a thread of the writer's, so they must not change afterwards.

        Returns:
            The tensor's entry; its sha256 is there once it is written.
        """
        if name in self.entries:
            raise ValueError(f"add: {name} is already there")
        if name not in self._names:
            raise ValueError(f"add: {name} is not a tensor of the base, nor one of `names`")
        entry, arrays = describe(name, value, rows, self.base.get(name), self.entries, about)
        keys = keys_of(name, entry)
        data = [bytes_of(key, spec, array) for (key, spec), array in zip(keys.items(), arrays, strict=True)]
        self.entries[name] = entry
        self._pending.append(self._thread.submit(self._write, name, entry, keys, data, done))
        while len(self._pending) > MAX_PENDING:
            self._pending.popleft().result()
        return entry

    def _write(
        self,
        name: str,
        entry: dict[str, Any],
        keys: dict[str, Spec],
        data: list[memoryview],
        done: Callable[[], None] | None,
    ) -> None:
        """Runs in the writer's thread, one tensor after the other."""
        digest = hashlib.sha256()
        shard = self._shard(sum(map(spec_bytes, keys.values())))
        for (key, spec), part in zip(keys.items(), data, strict=True):
            digest.update(part)
            shard.append(key, spec, part)
        if keys:
            entry["sha256"] = digest.hexdigest()
        self._log({"name": name, "shard": len(self._shards), "entry": entry})
        if done is not None:
            done()

    def _shard(self, size: int) -> Shard:
        if self._shards and self._shards[-1].size + size <= self._max:
            return self._shards[-1]
        if self._shards and not self._shards[-1].keys:
            return self._shards[-1]
        self._shards.append(Shard(self._folder.path, len(self._shards) + 1, self._room))
        self._reserve()
        return self._shards[-1]

    def _reserve(self) -> None:
        """Disk space for what is still to come into this shard, where that is known."""
        before = sum(shard.size for shard in self._shards[:-1])
        self._shards[-1].reserve(min(self._planned - before, self._max))

    def _start(self) -> None:
        self._folder.clear()
        self._open_journal(0)
        self._log(self._key)
        self._shard(0)

    def _log(self, line: dict[str, Any]) -> None:
        write_all(self._journal, memoryview(json.dumps(line).encode() + b"\n"))

    def _resume(self) -> bool:
        """Takes over the finished tensors of a dead writer with the same key; False if there are none."""
        path = self._folder.path / "journal"
        lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
        if len(lines) < 2 or json.loads(lines[0]) != json.loads(json.dumps(self._key)):
            return False
        good = len(lines[0]) + 1
        self._shards = [Shard(self._folder.path, 1, self._room)]
        for line in lines[1:]:
            try:
                if not self._take_over(json.loads(line)):
                    break
            except (ValueError, KeyError, TypeError):  # a journal that the machine lost half of
                break
            good += len(line) + 1
        for stale in self._folder.path.glob("*-*"):
            if int(stale.name.rpartition("-")[2]) > len(self._shards):
                stale.unlink()
        for shard in self._shards:
            shard.truncate()
        self._open_journal(good)
        self._reserve()
        return True

    def _open_journal(self, end: int) -> None:
        self._journal = os.open(self._folder.path / "journal", os.O_WRONLY | os.O_CREAT, 0o666)
        os.ftruncate(self._journal, end)
        os.lseek(self._journal, end, os.SEEK_SET)

    def _take_over(self, line: dict[str, Any]) -> bool:
        """Whether the tensor's bytes are on the disk as the journal says."""
        if line["shard"] > len(self._shards):
            self._shards.append(Shard(self._folder.path, line["shard"], self._room))
        shard, entry = self._shards[-1], line["entry"]
        keys = keys_of(line["name"], entry)
        digest = hashlib.sha256()
        before = shard.position()
        for key, spec in keys.items():
            shard.skip(key, spec, digest)
        if keys and digest.hexdigest() != entry["sha256"]:
            shard.back(before)
            return False
        self.entries[line["name"]] = entry
        return True

    def flush(self) -> None:
        """Waits until what was added is written, so that a successor takes it over."""
        while self._pending:
            self._pending.popleft().result()

    def _finish(self) -> None:
        self.flush()
        path = self._folder.path
        for entry in path.iterdir():  # what an interrupted finish left
            if entry.name != "journal" and not entry.name.startswith(("signs-", "rest-")):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        names = [MODEL]
        if len(self._shards) > 1:
            count = len(self._shards)
            names = [f"delta_model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
            weight_map = {
                key: name for shard, name in zip(self._shards, names, strict=True) for key in shard.keys
            }
            total = sum(shard.size for shard in self._shards)
            _write_json(path / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        for shard in self._shards:
            shard.assemble()
        config = {
            "format_version": FORMAT_VERSION,
            "tool_version": _version(),
            "base": self.base.origin,
            "finetuned": self.finetuned,
            "files": self._copy_files(path),
            "absent": self.absent,
            **({} if self._budget is None else {"budget": record(self.entries, self._budget)}),
            "tensors": self.entries,
        }
        _write_json(path / CONFIG, config)
        (path / CARD).write_text(model_card(config, delta_bytes(path)), encoding="utf-8")
        self._folder.sync()  # before the folder looks whole to anyone
        (path / "journal").unlink()  # from here on a successor starts anew
        for shard, name in zip(self._shards, names, strict=True):
            shard.rest_path.unlink()
            shard.signs_path.rename(path / name)
        self._close()
        self._folder.publish()

    def _copy_files(self, path: Path) -> dict[str, dict[str, str]]:
        """Copies the fine-tune's files that differ from the base's; where each file of the fine-tune is found."""
        found: dict[str, dict[str, str]] = {}
        contents = {name: source.read_bytes() for name, source in self._files.items() if is_plain(name)}
        if self._config is not None and self._config != self.base.config:
            contents["config.json"] = (json.dumps(self._config, indent=2) + "\n").encode()
        for name, content in sorted(contents.items()):
            digest = hashlib.sha256(content).hexdigest()
            at_base = self.base.files.get(name)
            is_same = at_base is not None and hashlib.sha256(at_base.read_bytes()).hexdigest() == digest
            found[name] = {"from": "base" if is_same else "delta", "sha256": digest}
            if not is_same:
                (path / name).parent.mkdir(exist_ok=True)
                (path / name).write_bytes(content)
        return found

    def _close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        for shard in self._shards:
            shard.close()
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1


def header_room(base: Checkpoint, names: Mapping[str, Mapping[str, Any] | None]) -> int:
    """Where the data start: an upper bound of the header, up to the next multiple of 64 bytes."""
    specs: dict[str, Spec] = {}
    for name, entry in names.items():
        if entry is None:
            shape, added = base[name].shape, 0
            form = "rank1" if len(shape) in (2, 3) and all(shape) else "whole"
            entry = {"form": form, "planes": 8, "shape": shape, "dtype": base[name].dtype}
            if len(shape) == 2:
                added = shape[0]  # a grown vocabulary
                entry |= {"shape": (shape[0] + added, shape[1]), "rows": added}
        specs |= keys_of(name, entry)
    end = 2 * sum(map(spec_bytes, specs.values())) + 1
    header = {
        key: {"dtype": "F8_E4M3FNUZ", "shape": list(shape), "data_offsets": [end, end]}
        for key, (_, shape) in specs.items()
    }
    text = json.dumps(
        {"__metadata__": "x" * 64, **header}, separators=(",", ":"), ensure_ascii=False
    ).encode()
    return -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """Objects of the second level one line each: small, and still to be read by people."""

    def text(part: Any) -> str:
        return json.dumps(part, ensure_ascii=False, allow_nan=False)

    lines = []
    for key, part in value.items():
        if isinstance(part, dict) and any(isinstance(item, dict) for item in part.values()):
            inner = ",\n".join(f"{text(name)}: {text(item)}" for name, item in part.items())
            lines.append(f"{text(key)}: {{\n{inner}\n}}")
        else:
            lines.append(f"{text(key)}: {text(part)}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _version() -> str:
    from . import __version__

    return f"bitdelta {__version__}"
