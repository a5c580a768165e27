"""python -m bitdelta.study.gptq MODEL TOKENS.npy OUT: quantises a checkpoint by gptqmodel and writes what it computes.

The package packs the weights; here they are unpacked again, as the deltas are taken from what the quantised model
multiplies with. Run by quantize.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from .. import training
from .quantize import GROUP, linears, save

BITS = 4
BATCH = 4


def main(source: Path, tokens: Path, out: Path) -> None:
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in np.load(tokens)]
    config = QuantizeConfig(bits=BITS, group_size=GROUP, device="cpu", offload_to_disk=False)
    quantized = GPTQModel.load(str(source), config)
    quantized.quantize(rows, batch_size=BATCH)
    found = _weights(quantized.model)
    model = training.load(source)
    with torch.no_grad():
        for name, module in linears(model):
            module.weight.copy_(found[name])
    save(model, source, out)


def _weights(model: Any) -> dict[str, Any]:
    """Path of a quantised linear -> its weight [N, K]."""
    return {
        name: module.dequantize_weight().T.float()
        for name, module in model.named_modules()
        if hasattr(module, "dequantize_weight")
    }


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
