"""Fits the signs and scales of a packed delta to text, layer by layer, without gradients.

    text -> rows of tokens, an eighth of them held out
    per layer: run it (activations.py) -> inputs of its weights -> fit (fitting.py) -> held-out error -> write

A weight whose error on the held-out rows does not fall keeps what the packed delta had; so does, by itself, each expert
of a mixture, whose rows are those routed to it. In memory are one layer of
both models, its H = X^T X and the rows' hidden states. Killed, the same call goes on at the layer where it was: the
hidden states lie beside the folder that is being written. Embeddings are fitted to all their rows alike; a head that is
tied to them to its inputs. Needs PyTorch, transformers and accelerate, imported inside.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .array import to_float32
from .calibration_text import HELD_OUT, LENGTH, N_TOKENS, read_tokens
from .checkpoint import Checkpoint, open_checkpoint
from .delta import Delta
from .devices import torch_device
from .errors import BaseMismatchError, Error
from .fitting import fit as fit_weight
from .fitting import output_errors
from .fitting_device import Host, place
from .folder import refuse_existing, refuse_full, refuse_inside
from .forms import VOCABULARY
from .hidden import State
from .inputs import F32, Inputs
from .packfile import PACKED, Packfile, load
from .packfile_writer import PackfileWriter
from .progress import progress_bar
from .residual import Sums, relative, sample, squared_errors
from .spend import record
from .table import table

logger = logging.getLogger("bitdelta")
KEPT = ("base_crc32c", "fingerprint", "tied_to", "effect")  # of an entry


def calibrate(
    base: str | os.PathLike[str],
    finetuned: str | os.PathLike[str],
    delta: str | os.PathLike[str],
    text: Any,
    out_dir: str | os.PathLike[str],
    fit: str = "signs",
    inputs: str = "finetuned",
    rounds: int = 3,
    n_tokens: int = N_TOKENS,
    length: int = LENGTH,
    seed: int = 0,
    progress: bool = False,
    device: Any = None,
) -> dict[str, Any]:
    """Writes the packed delta whose layers do on the text what the fine-tune's do, as nearly as its bits allow.

    Args:
        base, finetuned: the checkpoints that the delta was made from, folders or Hub ids.
        delta: the packed delta, which says the forms; a folder or Hub id.
        text: what to calibrate on, as of `bitdelta.text`; None is the text built in.
        out_dir: the folder to write; it must not exist.
        fit: "signs" (and scales), or "scales".
        inputs: of a layer: those of the "finetuned" model, or of the one "compressed" so far.
        rounds: of fitting signs, then scales.
        n_tokens, length, seed: how many tokens, in rows of which length, drawn by which seed.
        progress: a progress bar on stderr.
        device: where layers run and are fitted, "cpu" (None) or "cuda": a name of PyTorch, or its torch.device.
            What is fitted on a GPU may differ where sums of products round apart.

    Returns:
        A dict that JSON can hold; `tensors` has the held-out output error of each, before and after, relative to
        the output of finetuned - base; `kept` names those that stay as they were, `kept_experts`
        those matrices of a stack [E, N, K].

    Raises:
        ValueError: an option out of range; NaN or Inf in weights or activations (the text names the layer).
        bitdelta.Error: a model that cannot be run; BaseMismatchError: the delta is of other checkpoints;
            DeviceError: a GPU that is not there.
        FileExistsError, OSError: `out_dir` exists or cannot be written.
    """
    start = time.perf_counter()
    _check_options(fit, inputs, rounds)
    on = place(torch_device(device))
    refuse_existing(Path(out_dir))
    packfile, source, target = load(delta), open_checkpoint(base), open_checkpoint(finetuned)
    refuse_inside(out_dir, source.root, target.root, packfile.root)
    packfile.check_base(source)
    _check_finetuned(packfile, target)
    refuse_full(out_dir, sum(entry["bytes"] for entry in packfile.entries.values()))
    tokens = read_tokens(text, target, n_tokens, length, seed)
    settings = {"fit": fit, "inputs": inputs, "rounds": rounds, "device": str(on.device)}
    key = _key(packfile, target, tokens, settings)
    with PackfileWriter(
        out_dir,
        source,
        files=target.files,
        finetuned=packfile.config.get("finetuned"),
        names=packfile.entries,
        absent=packfile.config.get("absent", ()),
        key=key,
        budget=packfile.budget,
    ) as writer:
        run = _Run(packfile, source, target, writer, tokens, key, progress, on)
        run.all()
        writer.entries = {name: writer.entries[name] for name in packfile.entries}
    return run.report(out_dir, time.perf_counter() - start)


def _check_options(fit: str, inputs: str, rounds: int) -> None:
    if fit not in ("signs", "scales"):
        raise ValueError(f"fit: expected 'signs' or 'scales', got {fit!r}")
    if inputs not in ("finetuned", "compressed"):
        raise ValueError(f"inputs: expected 'finetuned' or 'compressed', got {inputs!r}")
    if type(rounds) is not int or not 1 <= rounds <= 100:
        raise ValueError(f"rounds: expected 1 to 100, got {rounds!r}")


def _check_finetuned(packfile: Packfile, target: Checkpoint) -> None:
    for name, entry in packfile.entries.items():
        if name not in target or list(target[name].shape) != list(entry["shape"]):
            got = list(target[name].shape) if name in target else "no such tensor"
            raise BaseMismatchError(
                f"{name}: {entry['shape']} in the delta, {got} in {target.root}; it was made from another fine-tune"
            )


def _key(
    packfile: Packfile, target: Checkpoint, tokens: NDArray[np.int64], settings: dict[str, Any]
) -> dict[str, Any]:
    """What the result depends on."""
    from . import __version__

    about = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in target.weights]
    parts = [packfile.entries, about, hashlib.sha256(tokens.tobytes()).hexdigest(), list(tokens.shape)]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return {"version": __version__, "calibrated": digest, **settings}


class _Run:
    """One calibration; what is done is in the writer's entries."""

    def __init__(
        self,
        packfile: Packfile,
        source: Checkpoint,
        target: Checkpoint,
        writer: PackfileWriter,
        tokens: NDArray[np.int64],
        key: dict[str, Any],
        progress: bool,
        on: Host,
    ) -> None:
        self.on = on
        self.packfile, self.source, self.target, self.writer = packfile, source, target, writer
        self.tokens, self.settings = tokens, key
        self.n_held_out = max(1, len(tokens) // HELD_OUT)
        self.wanted = {name: e for name, e in packfile.entries.items() if e["form"] in PACKED}
        self.bar = progress_bar("calibrate", len(packfile.entries), progress, " tensors")
        self.bar.update(len(writer.entries))
        self.mode = ""
        self.fitted: dict[str, Any] = {}  # a Delta or several, of the layer at hand

    def all(self) -> None:
        from .activations import Streamed, Whole

        try:
            try:
                model = Streamed(self.target, self.tokens, self.n_held_out, self.on)
            except Error as error:
                if self.settings["inputs"] == "compressed":
                    raise Error(
                        f"inputs: compressed needs a model that runs layer by layer: {error}"
                    ) from error
                whole = Whole(self.target, self.tokens, self.n_held_out, self.on)
                self.mode = f"whole model in memory: {error}"
                self.bar.write(self.mode, file=sys.stderr)
                for weights in whole.collect(self._left()):
                    self._fit_all(weights)
            else:
                self.mode = "layer by layer"
                self._stream(model)
            self._rest()
        finally:
            self.bar.close()

    def _stream(self, model: Any) -> None:
        state = State(self.writer.out_dir, hashlib.sha256(json.dumps(self.settings).encode()).hexdigest())
        try:
            model.embed()
            first = state.restore(model.hidden)
            for i in range(first, len(model.layers)):
                self._layer(model, i)
                self.writer.flush()
                state.save(i + 1, model.hidden)
            if self._left():
                self._fit_all(model.head(self._left()))
        except BaseException:
            state.remove()
            raise
        self.writer.flush()
        state.remove()

    def _layer(self, model: Any, i: int) -> None:
        is_compressed = self.settings["inputs"] == "compressed"
        names = model.weights(i)
        wanted = [name for name in names if name in (self.wanted if is_compressed else self._left())]
        self.fitted = {}
        self._fit_all(model.run(i, dict.fromkeys(wanted), self._finetuned, keep=not is_compressed))
        if is_compressed:
            model.run(i, {}, self._compressed, keep=True)
        for name in names:
            self.source[name].release()
            self.target[name].release()

    def _left(self) -> dict[str, Any]:
        return {name: entry for name, entry in self.wanted.items() if name not in self.writer.entries}

    def _fit_all(self, weights: Iterable[Any]) -> None:
        groups: dict[int, list[Any]] = {}
        for weight in weights:
            groups.setdefault(id(weight.collected[0]), []).append(weight)
        del weights
        for key in list(groups):
            group = groups.pop(key)  # of the same inputs, which are dropped again after it
            if group[0].is_stack:
                self._fit_stack(group[0])
                continue
            inputs, held_out = group[0].inputs(0)
            for weight in group:
                if inputs is None:
                    self._keep(weight.name)
                else:
                    self._fit(weight.name, inputs, held_out, weight.is_turned)

    def _fit(self, name: str, inputs: Inputs, held_out: F32 | None, is_turned: bool = False) -> None:
        """Fits one weight and writes it; held_out None: all rows of the weight count alike."""
        before, after, plain = *self._pair(name), self.packfile[name]
        assert isinstance(plain, Delta)
        chosen, sums = self._chosen(name, before, after, plain, inputs, held_out, is_turned)
        self.fitted[name] = chosen
        if name not in self.writer.entries:
            old, new = map(relative, sums)
            self._write(name, chosen, relative(sample(before, after, chosen)), old, new)

    def _fit_stack(self, weight: Any) -> None:
        """Each expert by the rows that are routed to it; without any, or where it gains nothing, it stays."""
        name, plains = weight.name, self.packfile[weight.name]
        before, after = self.source[name].array(), self.target[name].array()
        assert isinstance(plains, tuple)
        chosen, kept = [], []
        total = [[0.0, 0.0], [0.0, 0.0]]  # before and after: wrong, of all
        for e, plain in enumerate(plains):
            inputs, held_out = weight.inputs(e)
            best = plain
            if inputs is not None:
                best, sums = self._chosen(name, before[e], after[e], plain, inputs, held_out, False)
                total = [
                    [a + b for a, b in zip(*both, strict=True)] for both in zip(total, sums, strict=True)
                ]
            if best is plain:
                kept.append(e)
            chosen.append(best)
        self.fitted[name] = tuple(chosen)
        if name not in self.writer.entries:
            old, new = (relative((wrong, of)) for wrong, of in total)
            self._write(name, chosen, relative(sample(before, after, chosen)), old, new, kept_experts=kept)

    def _keep(self, name: str) -> None:
        """No row reached it, or none that is held out."""
        self.fitted[name] = self.packfile[name]
        if name not in self.writer.entries:
            error = self.packfile.entries[name].get("relative_error")
            self._write(name, self.packfile[name], error, None, None)

    def _chosen(
        self,
        name: str,
        before: np.ndarray,
        after: np.ndarray,
        plain: Delta,
        inputs: Inputs,
        held_out: F32 | None,
        is_turned: bool,
    ) -> tuple[Delta, tuple[Sums, Sums]]:
        """The fitted delta or the plain one, whichever has the smaller error on held-out rows, and what both have."""
        entry = self.wanted[name]
        chosen = fit_weight(
            before,
            after,
            inputs,
            entry["planes"],
            entry["form"],
            self.settings["rounds"],
            self.settings["fit"],
            is_turned,
        )
        if held_out is None:
            old, new = (squared_errors(before, after, delta) for delta in (plain, chosen))
        else:
            d = to_float32(after) - to_float32(before)
            wrong, total = output_errors(d, [plain, chosen], held_out, is_turned, self.on)
            old, new = ((x, total) for x in wrong)
        return (chosen, (old, new)) if new[0] < old[0] else (plain, (old, old))

    def _pair(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        before, after = self.source[name].array(), self.target[name].array()
        n = self.wanted[name]["shape"][0] - self.wanted[name].get("rows", 0)
        return before[:n], after[:n]

    def _rest(self) -> None:
        """Embeddings, and what is copied as it is."""
        for name, entry in self._left().items():
            is_table = name.endswith(VOCABULARY) and len(entry["shape"]) == 2
            if is_table and entry["planes"] > 1 and self.settings["fit"] == "signs":
                self._fit(name, Inputs(np.ones(entry["shape"][1], np.float32)), None)
        for name, entry in self.packfile.entries.items():
            if name not in self.writer.entries:
                error, known = entry.get("relative_error"), entry.get("output_error")
                self._write(name, self.packfile[name], error, entry.get("output_error_before"), known)

    def _write(
        self, name: str, value: Any, error: float | None, old: float | None, new: float | None, **about: Any
    ) -> None:
        entry = self.packfile.entries[name]
        if entry["form"] == "tied":
            value = None
        self.writer.add(
            name,
            value,
            rows=self.packfile.rows(name) if entry["form"] in PACKED else None,
            dtype=entry["dtype"],
            shape=entry["shape"],
            relative_error=_rounded(error),
            output_error=_rounded(new),
            output_error_before=_rounded(old),
            **about,
            **{field: entry[field] for field in KEPT if field in entry},
        )
        if new is not None:
            logger.debug("calibrate: %s, output error %.4g, %.4g before", name, new, old or 0.0)
        self.bar.update()

    def _finetuned(self, name: str) -> F32:
        return np.array(to_float32(self.target[name].array()))

    def _compressed(self, name: str) -> F32:
        """The values that the packed delta stands for."""
        value = self.fitted.get(name, self.packfile[name] if name in self.packfile else None)
        if isinstance(value, Delta):
            before = self.source[name].array()
            return np.array(to_float32(value.expand(before[: value.shape[0]])))
        if isinstance(value, tuple):
            before = self.source[name].array()
            return np.stack([to_float32(one.expand(own)) for one, own in zip(value, before, strict=True)])
        return self._finetuned(name)

    def report(self, out_dir: str | os.PathLike[str], seconds: float) -> dict[str, Any]:
        entries = self.writer.entries
        tensors = [
            {"name": name, "before": e["output_error_before"], "after": e["output_error"]}
            for name, e in entries.items()
            if "output_error_before" in e
        ]
        fitted = [t for t in tensors if t["after"] < t["before"]]
        kept = [name for name in self.wanted if name not in {t["name"] for t in fitted}]
        return {
            "out": str(out_dir),
            "mode": self.mode,
            **{name: self.settings[name] for name in ("fit", "inputs", "rounds", "device")},
            "tokens": int(self.tokens.size),
            "held_out_tokens": int(self.tokens[: self.n_held_out].size),
            "fitted": len(fitted),
            "kept": kept,
            "kept_experts": {name: e["kept_experts"] for name, e in entries.items() if e.get("kept_experts")},
            "output_error_before": _mean([t["before"] for t in fitted]),
            "output_error": _mean([t["after"] for t in fitted]),
            "tensors": tensors,
            **({} if self.packfile.budget is None else {"budget": record(entries, self.packfile.budget)}),
            "seconds": round(seconds, 3),
        }


def describe(report: dict[str, Any]) -> Iterator[str]:
    """The errors of the report as a table."""
    yield ""
    rows = [[t["name"], f"{t['before']:.4f}", f"{t['after']:.4f}"] for t in report["tensors"]]
    yield from table(("tensor", ">before", ">after"), rows, "error of the output on text held out, relative")


def _rounded(error: float | None) -> float | None:
    return None if error is None else float(f"{error:.6g}")


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None
