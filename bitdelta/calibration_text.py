"""What a delta is calibrated on: rows of a text in the fine-tune's tokens, the last eighth of them held out."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checkpoint import Checkpoint
from .errors import Error

HELD_OUT = 8  # one row of so many
N_TOKENS, LENGTH = 16384, 128


def read_tokens(
    text: Any, target: Checkpoint, n_tokens: int = N_TOKENS, length: int = LENGTH, seed: int = 0
) -> NDArray[np.int64]:
    """Rows of the text in the fine-tune's tokens; `calibrate` holds the last eighth of them out."""
    from .text import load_tokens, needs_tokenizer

    try:
        from transformers.utils import logging

        from .tokenizer import load_tokenizer
    except ImportError as error:
        raise Error(
            f"calibration needs PyTorch and transformers ({error}): pip install 'bitdelta[torch]'"
        ) from error
    logging.set_verbosity_error()
    tokenizer = None
    if needs_tokenizer(text):
        tokenizer = load_tokenizer(target.root)
        if tokenizer is None:
            raise Error(f"{target.root}: calibration needs its tokenizer, or as text an array of tokens")
    tokens = load_tokens(text, tokenizer, n_tokens, length, seed)
    if len(tokens) < 2:
        raise ValueError(
            f"text: {tokens.size} tokens are too few: two rows of {tokens.shape[1]} are the least"
        )
    return tokens
