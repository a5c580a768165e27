"""Decoding for many tenants: tokens/s, time a step and memory against the number of tenants.

    merged     one merged model a tenant, run in turn, a row each
    lora r     base rows with an adapter each, in one batch (decode.LoraRows)
    peft r     the same by PEFT itself, where it is installed
    deltas     DeltaModel, one batch, every row another tenant

A base and deltas of random bits in the shapes of a named model, with fewer layers and tokens; no two tenants share
signs. All merged models take the time of one that is larger than the caches, so one stands for all of them, over the
cache of keys and values of each tenant. On a small model, first tokens are compared with those of merged models, and
LoRA's logits with those of weights that have the adapters added.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import _C
from ..batch import current
from ..checkpoint import open_checkpoint
from ..errors import Error
from ..merge import merge
from ..model import DeltaModel
from ..packfile import load
from .decode import Decoder, LoraRows, PeftRows, twin
from .random_model import config_of, write_base, write_delta
from .timing import Case, Sample, interleaved, seconds_of

CONTEXT = 64  # tokens in the cache
RANKS = 16, 64, 128
SECONDS, MIN_ROUNDS = 20.0, 5  # of one number of tenants
LORA_TOLERANCE = 1e-4  # sums in fp32; the adapters move the logits by far more
LOADS = 9
LOAD_PAUSE = 0.4  # seconds between two loads beside a running batch
Log = Callable[[str], None]


def measure(
    shape: str, layers: int, tenants: int, quick: bool, limits: dict[str, Any], log: Log
) -> tuple[list[dict[str, Any]], float]:
    """Rows of kind merged, deltas, lora, peft, base rows, plain and load; and what `limits` allow (`best_ratio`)."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with torch.no_grad(), tempfile.TemporaryDirectory(prefix="bitdelta-bench-") as folder:
        root = Path(folder)
        check(root / "check", log)
        log(f"making {shape} of {layers} layers and {tenants} deltas in {root}")
        write_base(root / "base", config_of(shape, layers))
        base = open_checkpoint(root / "base")
        for i in range(tenants):
            write_delta(root / f"delta-{i}", base, i)
        bench = Bench(root, tenants, quick, log)
        rows = bench.loading()
        for count in counts(tenants):
            rows += bench.decoding(count)
        if bench.resident is not None and not quick:
            rows.append({"kind": "resident", "tenants": tenants, "bytes": bench.resident})
        return rows, bench.best_ratio(limits)


def counts(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    found = [1 << i for i in range(most.bit_length())]
    return found if found[-1] == most else [*found, most]


def check(root: Path, log: Log) -> None:
    """Greedy tokens of a small model's mixed batch against those of its merged models.

    Raises:
        bitdelta.Error: one differs.
    """
    root.mkdir()
    write_base(root / "base", config_of("tiny", 2))
    base = open_checkpoint(root / "base")
    model = DeltaModel.from_pretrained(root / "base", dtype=torch.float32)
    prompt = torch.randint(3, 512, (4, 6), generator=torch.Generator().manual_seed(1))
    names = [None, "0", "1", "0"]
    for name in ("0", "1"):
        write_delta(root / name, base, int(name))
        merge(root / "base", root / name, root / f"merged-{name}")
        model.load_delta(name, root / name)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(prompt, delta_names=names, **options)
    for row, who in enumerate(names):
        folder = root / ("base" if who is None else f"merged-{who}")
        alone = type(model.model).from_pretrained(folder, dtype=torch.float32)
        wanted = alone.generate(prompt[row : row + 1], **options)[0]
        if found[row].tolist() != wanted.tolist():
            raise Error(f"row {row} ({who}): {found[row].tolist()}, its merged model says {wanted.tolist()}")
    _check_lora(model.model, prompt)
    log(f"checked {found[:, 6:].numel()} greedy tokens of {len(names)} rows against merged models: all equal")


def _check_lora(model: Any, prompt: torch.Tensor) -> None:
    """Logits of gathered adapters against those of models whose weights have them added; PEFT's of a mixed batch
    against those of each adapter alone.
    """
    adapted = twin(model)
    lora = LoraRows(adapted, len(prompt), RANKS[0])
    with lora.installed():
        found = adapted(prompt).logits
    for row in range(len(prompt)):
        merged = deepcopy(model)
        for path, (a, b) in lora.pairs.items():
            merged.get_submodule(path).weight += b[row] @ a[row]
        _near(f"LoRA row {row}", found[row], merged(prompt[row : row + 1]).logits[0])
    peft = _peft(twin(model), len(prompt))
    if peft is not None:
        found = peft.forward(prompt).logits
        for row, name in enumerate(peft.names):
            peft.model.set_adapter(name)
            _near(f"PEFT row {row}", found[row], peft.model(prompt[row : row + 1]).logits[0])


def _near(what: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    distance = float((found - wanted).norm() / wanted.norm())
    if not distance <= LORA_TOLERANCE:
        raise Error(f"{what}: logits {distance:.2g} of their norm away from those of the adapter alone")


class Bench:
    """One base and its tenants."""

    def __init__(self, root: Path, tenants: int, quick: bool, log: Log) -> None:
        self.root, self.tenants, self.quick, self.log = root, tenants, quick, log
        self.names = [f"t{i}" for i in range(tenants)]
        before = _resident_bytes()
        self.model = DeltaModel.from_pretrained(root / "base")
        # as a user has it, and one for adapters; neither looks at the batch
        self.plain, self.adapted = twin(self.model.model), twin(self.model.model)
        self.base_bytes = sum(parameter.nbytes for parameter in self.plain.parameters())
        for name, i in zip(self.names, range(tenants), strict=True):
            self.model.load_delta(name, root / f"delta-{i}")
        step = Decoder(self.model.model, tenants, CONTEXT).step
        with self.model.batch(self.names, tenants):
            step()
        self.resident = _resident_bytes() - before if before else None
        self.delta_bytes = self.model.pool.resident[0].nbytes

    def loading(self) -> list[dict[str, Any]]:
        """Hot-loads: their time, and that of a batch that decodes meanwhile, whose tokens must not change."""
        self.log("loading deltas beside a running batch")
        folder = self.root / "delta-0"
        seconds: list[float] = []
        floor: list[float] = []
        for _ in range(LOADS):
            floor.append(seconds_of(lambda: _map_and_copy(folder)))
            seconds.append(seconds_of(lambda: self.model.load_delta("again", folder)))
            self.model.unload_delta("again")
        decoder = Decoder(self.model.model, self.tenants, CONTEXT)
        with self.model.batch(self.names, self.tenants):
            wanted = decoder.step()
            alone = [seconds_of(decoder.step) for _ in range(LOADS)]
            with self._loads(folder) as count:
                beside = [seconds_of(decoder.step) for _ in range(LOADS)]
                if not torch.equal(decoder.step(), wanted):
                    raise Error("the tokens of a running batch changed while a delta was loaded")
        load, map_copy = statistics.median(seconds), statistics.median(floor)
        slower = statistics.median(beside) / statistics.median(alone)
        return [
            {"kind": "load", "microseconds": load * 1e6, "times": load / map_copy, "floor": map_copy * 1e6},
            {
                "kind": "beside",
                "microseconds": statistics.median(beside) * 1e6,
                "times": slower,
                "loads": count[0],
            },
        ]

    @contextmanager
    def _loads(self, folder: Path) -> Iterator[list[int]]:
        """Another thread loads and unloads a delta, again and again."""
        stop, count = threading.Event(), [0]

        def run() -> None:
            while not stop.wait(LOAD_PAUSE):
                self.model.load_delta("new", folder)
                self.model.unload_delta("new")
                count[0] += 1

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield count
        finally:
            stop.set()
            thread.join()

    def decoding(self, count: int) -> list[dict[str, Any]]:
        """All kinds, a row for each of `count` tenants."""
        self.log(f"decoding for {count} tenant{'s' if count > 1 else ''}")
        names, none = self.names[:count], [None] * count
        cases: dict[tuple[str, int], Any] = {}
        sizes: dict[tuple[str, int], int] = {}
        alone = [Decoder(self.plain, 1, CONTEXT, i) for i in range(count)]
        cases["merged", 0] = lambda: [decoder.step() for decoder in alone]
        sizes["merged", 0] = count * self.base_bytes
        mixed = Decoder(self.model.model, count, CONTEXT)
        cases["deltas", 0] = self._within(names, mixed.step)
        sizes["deltas", 0] = self.base_bytes + count * self.delta_bytes
        cases["base rows", 0] = self._within(none, mixed.step)
        cases["plain", 0] = Decoder(self.plain, count, CONTEXT).step
        sizes["base rows", 0] = sizes["plain", 0] = self.base_bytes
        for rank in RANKS:
            lora, decoder = LoraRows(self.adapted, count, rank), Decoder(self.adapted, count, CONTEXT)
            cases["lora", rank] = _inside(lora.installed, decoder.step)
            sizes["lora", rank] = self.base_bytes + lora.nbytes
        if (peft := _peft(twin(self.plain), count)) is not None:
            cases["peft", RANKS[0]] = Decoder(peft.base, count, CONTEXT, forward=peft.forward).step
            sizes["peft", RANKS[0]] = self.base_bytes + peft.nbytes
        seconds, rounds = (0.1, 2) if self.quick else (SECONDS, MIN_ROUNDS)
        isa = _C.isa()
        timed = {key: Case(_any_turn(call), sizes[key], isa) for key, call in cases.items()}
        samples = interleaved(timed, seconds, rounds)
        return [_row(key, count, sample, sizes[key], samples) for key, sample in samples.items()]

    def best_ratio(self, limits: dict[str, Any]) -> float:
        """Merged models that read at the measured bandwidth against a batch whose base product runs at the peak.

        The deltas' own arithmetic is left out: nothing on this machine can be faster with fp32 sums.
        """
        table = self.plain.get_input_embeddings().weight
        weights = (
            self.base_bytes - table.nbytes
        )  # of a step; half as many, in bf16, are multiplied by each row
        merged = self.tenants * weights / limits["bandwidth"]
        product = self.tenants * weights / limits["flops"]
        reading = (weights + self.tenants * self.delta_bytes) / limits["bandwidth"]
        return float(merged / max(product, reading))

    def _within(self, names: list[Any], step: Callable[[], Any]) -> Callable[[], Any]:
        """A step of a batch that stays the same, as in `generate`."""
        with self.model.batch(names, len(names)) as batch:
            pass

        def run() -> Any:
            token = current.set(batch)
            try:
                return step()
            finally:
                current.reset(token)

        return run


def _any_turn(call: Callable[[], object]) -> Callable[[int], object]:
    return lambda turn: call()


def _inside(context: Callable[[], Any], call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with context():
            return call()

    return run


def _peft(model: Any, count: int) -> PeftRows | None:
    try:
        return PeftRows(model, count, RANKS[0])
    except ImportError:
        return None


def _row(
    key: tuple[str, int], count: int, sample: Sample, n_bytes: int, samples: dict[tuple[str, int], Sample]
) -> dict[str, Any]:
    kind, rank = key
    against = "plain" if kind == "base rows" else "merged"
    return {
        "kind": kind,
        "rank": rank or None,
        "tenants": count,
        "microseconds": sample.median * 1e6,
        "spread": sample.spread,
        "calls": sample.calls,
        "tokens_per_second": count / sample.median,
        "bytes": n_bytes,
        "speed": samples[against, 0].median / sample.median,  # times as many tokens/s as `against`
    }


def _map_and_copy(folder: Path) -> int:
    """What a load cannot do without: map the file, read its header and config, copy what is stored whole."""
    packfile = load(folder)
    values = [packfile[name] for name in packfile]
    return sum(np.array(value).nbytes for value in values if isinstance(value, np.ndarray))


def _resident_bytes() -> int:
    """Of this process, mapped files included; 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
