"""What each way to store each tensor does to the logits, measured on text for a budget (budget.py).

    sensitivity.py      how an error in each output changes the logits, on the rows held out
    per layer           inputs of its weights (activations.py) -> a quick fit of every candidate -> its error, held out

The error of a candidate is the mean squared change of a logit that its output error makes, to first order, with
errors of different tokens and outputs taken to be independent. Planes are tried from two below the budget to three
above, other scale forms than rows next to it. Weights that no known layer multiplies with, such as stacks of experts,
are taken to matter as much as the others do on average for a change of the same norm. In memory is what calibration
needs; killed, the same call goes on at the layer where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .array import to_float32
from .budget import Candidate
from .collected import Routed
from .delta import Delta, extract
from .errors import Error
from .fitting import ROWS
from .fitting import fit as fit_weight
from .fitting_device import HOST, Host
from .fitting_rows import expand_rows
from .forms import VOCABULARY, Plan, packable, packed_bytes, with_form, without
from .hidden import State
from .inputs import F32, Inputs
from .packfile import MAX_PLANES
from .residual import sampled_errors
from .sensitivity import Sensitivity, measure_streamed, measure_whole

BELOW, ABOVE = 2, 3  # planes that are tried around the budget
ROUNDS = 1  # of the quick fit, without sweeps

F64 = NDArray[np.float64]


@dataclass
class Measured:
    """One tensor.

    Attributes:
        effect: the mean squared change of a logit that its delta makes.
        norm: ||d||^2.
        is_seen: whether its inputs were; otherwise the effect is estimated from the norm.
        candidates: the ways to store it.
    """

    effect: float
    norm: float
    is_seen: bool
    candidates: list[Candidate]


class Measuring:
    """Measures the tensors of `plans`, all of which can be packed, by `all`.

    Args:
        plans: by name.
        target: the fine-tune's checkpoint.
        tokens: [rows, length]; the last `n_held_out` rows are held out.
        bits: the budget.
        fit: "signs" or "scales".
        seed: of the random signs of logits.
        out_dir: of the delta that is to be; what is measured lies in `.NAME.budget` beside it until `forget`.
        bar: counts tensors.
        on: where layers run and candidates are fitted; the sensitivity is measured on the CPU.
    """

    def __init__(
        self,
        plans: Mapping[str, Plan],
        target: Any,
        tokens: NDArray[np.int64],
        n_held_out: int,
        bits: float,
        fit: str,
        seed: int,
        out_dir: Path,
        bar: Any,
        on: Host,
    ) -> None:
        self.on = on
        self.plans, self.target, self.tokens, self.n_held_out = plans, target, tokens, n_held_out
        self.bits, self.fit, self.seed, self.bar = bits, fit, seed, bar
        self.state = State(out_dir, self._key(), "budget")
        self.path = self.state.folder / f"{self.state.key}.jsonl"
        self.found: dict[str, Measured] = {}
        self.sensitivity = Sensitivity()

    def _key(self) -> str:
        from . import __version__

        pairs = [(p.finetuned, p.base) for p in self.plans.values()]
        files = sorted({tensor.path for pair in pairs for tensor in pair if tensor is not None})
        about = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
        entries = [[name, plan.entry] for name, plan in self.plans.items()]
        settings = [__version__, self.bits, self.fit, self.seed, self.n_held_out, list(self.tokens.shape)]
        text = hashlib.sha256(self.tokens.tobytes()).hexdigest()
        return hashlib.sha256(json.dumps([settings, about, entries, text]).encode()).hexdigest()

    def all(self) -> dict[str, Measured]:
        """Every tensor.

        Raises:
            ValueError: NaN or Inf in weights or activations.
            bitdelta.Error: a model that cannot be run.
        """
        from .activations import Streamed, Whole

        if not self.path.exists():
            self.state.remove()
        self.state.folder.mkdir(exist_ok=True)
        self._restore()
        probes = self.tokens[-self.n_held_out :]
        try:
            model = Streamed(self.target, self.tokens, self.n_held_out, self.on)
        except Error:
            whole = Whole(self.target, probes, 0)
            self._sense(lambda: measure_whole(whole, self.seed))
            whole = Whole(self.target, self.tokens, self.n_held_out, self.on)
            for weights in whole.collect(self._left()):
                self._measure_all(weights)
        else:
            streamed = partial(Streamed, self.target, probes, 0)
            self._sense(lambda: measure_streamed(streamed(), self.state.folder, self.seed))
            model.embed()
            for i in range(self.state.restore(model.hidden), len(model.layers)):
                wanted = [name for name in model.weights(i) if name in self._left()]
                self._measure_all(model.run(i, dict.fromkeys(wanted), self._values, keep=True))
                self.state.save(i + 1, model.hidden)
            self._measure_all(model.head(self._left()))
        self._rest()
        return {name: self.found[name] for name in self.plans}

    def _restore(self) -> None:
        lines = self.path.read_text(encoding="utf-8").split("\n")[:-1] if self.path.exists() else []
        for line in map(json.loads, lines):
            name, about = line
            self.found[name] = Measured(
                **{**about, "candidates": [Candidate(**each) for each in about["candidates"]]}
            )
        self.bar.update(len(self.found))

    def _sense(self, run: Any) -> None:
        """The sensitivity, measured or from the file that an earlier run left."""
        path = self.state.folder / f"{self.state.key}.npz"
        if not path.exists():
            run().save(path)
        self.sensitivity = Sensitivity.load(path)

    def _left(self) -> dict[str, Plan]:
        return {name: plan for name, plan in self.plans.items() if name not in self.found}

    def _values(self, name: str) -> F32:
        return np.array(to_float32(self.target[name].array()))

    def _keep(self, name: str, measured: Measured) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps([name, asdict(measured)]) + "\n")
        self.found[name] = measured
        self.bar.update()

    def _measure_all(self, weights: Iterable[Any]) -> None:
        known: dict[int, Inputs] = {}
        for weight in weights:
            collected = weight.collected[0]
            if isinstance(collected, Routed):  # an expert: estimated
                continue
            try:
                inputs = known.setdefault(id(collected), collected.inputs())
            except ValueError:
                raise ValueError(f"{weight.name}: NaN or Inf in the activations that reach it") from None
            x = np.concatenate(collected.held_out)
            self._measure(weight.name, inputs, x, weight.is_turned)

    def _measure(self, name: str, inputs: Inputs | None, x: F32 | None, is_turned: bool = False) -> None:
        """Fits and measures every candidate; without inputs, of a table."""
        plan = self.plans[name]
        before, after = _pair(plan)
        d = to_float32(after) - to_float32(before)
        error = partial(self._error, name, d, x, is_turned)
        effect = error(None)
        candidates = [] if without(plan) is None else [Candidate("same", 0, 0, effect)]
        for form, planes in self._ways(plan) if d.any() else ():
            try:
                delta = self._fitted(before, after, inputs, form, planes, is_turned)
            except ValueError as problem:  # NaN or Inf
                raise ValueError(f"{name}: {problem}") from problem
            candidates.append(
                Candidate(form, planes, packed_bytes(with_form(plan, form, planes)), error(delta))
            )
        norm = float(np.square(d, dtype=np.float64).sum())
        self._keep(name, Measured(effect, norm, True, candidates))
        self._release(plan)

    def _fitted(
        self, before: Any, after: Any, inputs: Inputs | None, form: str, planes: int, is_turned: bool
    ) -> Delta:
        """What calibration would make of it, but for the number of rounds."""
        if inputs is None and (planes == 1 or self.fit == "scales"):
            return extract(before, after, planes, form)
        if inputs is None:
            inputs = Inputs(np.ones(after.shape[1], np.float32))
        return fit_weight(before, after, inputs, planes, form, ROUNDS, self.fit, is_turned, sweeps=0)

    def _error(self, name: str, d: F32, x: F32 | None, is_turned: bool, delta: Delta | None) -> float:
        """The mean squared change of a logit that is left; delta None: of all of d."""
        total = 0.0
        weight = self.sensitivity.weight(name, is_table=False)
        if x is not None and weight is not None:
            count = self.n_held_out * self.tokens.shape[1]
            total += float(weight @ output_powers(d, delta, x, is_turned, self.on)) / count
        weight = self.sensitivity.weight(name, is_table=True)
        if weight is not None:
            share = self.sensitivity.shares(name, len(d))
            for begin in range(0, len(d), ROWS):
                rows = slice(begin, min(begin + ROWS, len(d)))
                left = d[rows] if delta is None else d[rows] - expand_rows(delta, rows)
                total += float(share[rows] @ np.square(left, dtype=np.float64) @ weight)
        return total

    def _ways(self, plan: Plan) -> list[tuple[str, int]]:
        """The forms and planes to try: those around the budget that are smaller than the tensor itself."""
        one = (
            8 * packed_bytes(with_form(plan, "tensor", 1)) / packable(plan.entry)
        )  # bits of a plane, padding too
        near = int(self.bits / one)
        ways = [("row", p) for p in range(max(1, near - BELOW), min(MAX_PLANES, near + ABOVE) + 1)]
        if not plan.name.endswith(VOCABULARY) and not plan.entry.get("rows"):
            around = [p for p in (near, near + 1) if 1 <= p <= MAX_PLANES]
            ways += [(form, p) for form in ("tensor", "rank1") for p in around]
        return [way for way in ways if with_form(plan, *way).nbytes < plan.finetuned.nbytes]

    def _rest(self) -> None:
        """Tables, and what is not seen to multiply with anything."""
        for name in [
            name for name in self._left() if self.sensitivity.weight(name, is_table=True) is not None
        ]:
            if len(self.plans[name].entry["shape"]) == 2:
                self._measure(name, None, None)
        seen = [measured for measured in self.found.values() if measured.is_seen]
        norm = sum(measured.norm for measured in seen)
        effect = sum(measured.effect for measured in seen) / norm if norm else 1.0
        for name, plan in self._left().items():
            self._estimate(name, plan, effect)

    def _estimate(self, name: str, plan: Plan, effect: float) -> None:
        """`effect` of every unit of ||d||^2; what planes leave of it is what they leave of the norm, on a sample."""
        pairs = _matrices(plan)
        norm = sum(float(np.square(to_float32(f) - to_float32(b), dtype=np.float64).sum()) for b, f in pairs)
        candidates = [] if without(plan) is None else [Candidate("same", 0, 0, effect * norm)]
        for form, planes in self._ways(plan) if norm else ():
            ends = [pairs[0], pairs[-1]]
            deltas = [extract(before, after, planes, form) for before, after in ends]
            parts = [sampled_errors(*pair, delta) for pair, delta in zip(ends, deltas, strict=True)]
            wrong, total = (sum(part[i] for part in parts) for i in (0, 1))
            error = effect * norm * (wrong / total if total else 1.0)
            candidates.append(Candidate(form, planes, packed_bytes(with_form(plan, form, planes)), error))
        self._keep(name, Measured(effect * norm, norm, False, candidates))
        self._release(plan)

    def _release(self, plan: Plan) -> None:
        for tensor in (plan.base, plan.finetuned):
            if tensor is not None:
                tensor.release()


def output_powers(d: F32, delta: Delta | None, x: F32, is_turned: bool, on: Host = HOST) -> F64:
    """Of every output the sum over the inputs x of the squares of x (d - delta)^T; turned, of x (d - delta)."""
    placed, powers = on.put(x), []
    for begin in range(0, len(d), len(d) if is_turned else ROWS):
        rows = slice(begin, len(d) if is_turned else min(begin + ROWS, len(d)))
        left = on.put(d[rows])
        if delta is not None:
            left = left - on.expand(delta.sign, delta.scale, delta.column, delta.shape, rows)
        y = placed @ (left if is_turned else left.T)
        powers.append(on.column_dots(y, y))
    return np.concatenate(powers)


def _pair(plan: Plan) -> tuple[Any, Any]:
    assert plan.base is not None
    before, after = plan.base.array(), plan.finetuned.array()
    n = min(before.shape[-2], after.shape[-2])
    return before[..., :n, :], after[..., :n, :]


def _matrices(plan: Plan) -> list[tuple[Any, Any]]:
    before, after = _pair(plan)
    return [(before, after)] if after.ndim == 2 else list(zip(before, after, strict=True))
