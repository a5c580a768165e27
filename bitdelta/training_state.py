"""The saved state of a distillation: scales, the optimiser's moments, step and losses, in one safetensors file.

NAME.value, NAME.mean, NAME.square     of every trained parameter
metadata: key (the hash of all that decides the result), step, curve
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

Parameters = dict[str, torch.nn.Parameter]


class TrainingState:
    """The saved state of a run: appears whole or not at all, and belongs to one key."""

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.key = key

    def save(
        self, parameters: Parameters, optimizer: torch.optim.Optimizer, step: int, curve: list[float]
    ) -> None:
        from safetensors.torch import save

        tensors = {}
        for name, parameter in parameters.items():
            moments = optimizer.state[parameter]
            tensors[f"{name}.value"] = parameter.detach()
            tensors[f"{name}.mean"], tensors[f"{name}.square"] = moments["exp_avg"], moments["exp_avg_sq"]
        tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        about = {"key": self.key, "step": str(step), "curve": json.dumps(curve)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_name(self.path.name + ".partial")
        with open(scratch, "wb") as file:
            file.write(save(tensors, about))
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(self.path)

    def load(self, parameters: Parameters, optimizer: torch.optim.Optimizer) -> tuple[int, list[float]]:
        """The step to go on from, and the losses before; (0, []) without a state of this key."""
        from safetensors import safe_open

        if not self.path.is_file():
            return 0, []
        with safe_open(self.path, "pt") as file, torch.no_grad():
            about = file.metadata()
            if about["key"] != self.key:
                return 0, []
            step = int(about["step"])
            for name, parameter in parameters.items():
                parameter.copy_(file.get_tensor(f"{name}.value"))
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": file.get_tensor(f"{name}.mean").to(parameter.device),
                    "exp_avg_sq": file.get_tensor(f"{name}.square").to(parameter.device),
                }
        return step, json.loads(about["curve"])
