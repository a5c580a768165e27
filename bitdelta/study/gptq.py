"""python -m bitdelta.study.gptq MODEL TOKENS.npy OUT: quantises a checkpoint by gptqmodel and writes what it computes.

The package packs the weights; here its modules multiply unit vectors, as the deltas are taken from what the quantised
model computes. Run by quantize.py.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from .. import training
from ..quantized import quantized_modules, weight_of
from .quantize import GROUP, linears, save

BITS = 4
BATCH = 4


def main(source: Path, tokens: Path, out: Path) -> None:
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in np.load(tokens)]
    config = QuantizeConfig(bits=BITS, group_size=GROUP, device="cpu", offload_to_disk=False)
    quantized = GPTQModel.load(str(source), config)
    quantized.quantize(rows, batch_size=BATCH)
    with tempfile.TemporaryDirectory(prefix="bitdelta-gptq-") as folder:
        quantized.save(folder)
        quantized = GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH)
        found = quantized_modules(quantized.model)
        model = training.load(source)
        with torch.no_grad():
            for name, module in linears(model):
                module.weight.copy_(weight_of(found[name], quantized.model.dtype))
    save(model, source, out)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
