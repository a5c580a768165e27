"""The original project's diff.pt of a small Llama, converted, gives the logits that the original's loader gives.

The file is written here as its save_diff writes it, and applied as its load_diff does (FasterDecoding/BitDelta,
bitdelta/diff.py; the formats and the arithmetic only):

    MODULE.mask, .coeff   of every *proj in self_attn and mlp; one of the scales negative, as nothing there forbids
    NAME                  every other parameter, whole; the embeddings and the head with two more tokens
    loader                W' = W + (coeff * sign).to(W.dtype), added in W's dtype
"""

import pytest
import torch
import transformers
from models import llama_config

import bitdelta
from bitdelta.cli import main
from bitdelta.model import DeltaModel

VOCABULARY, ADDED = 96, 2
BITS = torch.arange(32)


def is_packed(name):
    return name.endswith("proj.weight") and (".mlp." in name or ".self_attn." in name)


def make(folder, dtype, round_scales=False):
    """A base, and the diff of a fine-tune of it: [name -> tensor of the diff]."""
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(llama_config(hidden_size=64, intermediate_size=96)).to(dtype)
    base.save_pretrained(folder / "base")
    diff = {}
    for i, (name, weight) in enumerate(base.state_dict().items()):
        change = 0.02 * torch.randn(weight.shape).to(dtype)
        if is_packed(name):
            coeff = change.float().abs().mean()
            coeff = -coeff if i == 3 else coeff
            coeff = coeff.to(dtype).float() if round_scales else coeff
            signs = (~(change < 0)).T.reshape(-1, 32, len(weight)).long()  # [K/32, 32, N]
            words = (signs << BITS[:, None]).sum(1)
            module = name.removesuffix(".weight")
            diff[module + ".mask"] = torch.where(words < 2**31, words, words - 2**32).int()
            diff[module + ".coeff"] = torch.nn.Parameter(coeff)
        else:
            rows = ADDED if len(weight) == VOCABULARY else 0
            diff[name] = torch.cat([weight + change, torch.randn(rows, *weight.shape[1:]).to(dtype)])
    torch.save(diff, folder / "diff.pt")
    return diff


def load_as_the_original(folder, diff, dtype, exact=False):
    """Its loader's model; exact: the sum in fp32, not rounded."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    model.resize_token_embeddings(VOCABULARY + ADDED, mean_resizing=False)
    model = model.float() if exact else model
    for name, weight in model.state_dict().items():
        module = name.removesuffix(".weight")
        if is_packed(name):
            signs = (diff[module + ".mask"][:, None, :] >> BITS[:, None] & 1) * 2 - 1
            change = diff[module + ".coeff"].detach() * signs.reshape(-1, len(weight)).T
            weight += change if exact else change.to(weight.dtype)
        else:
            weight.copy_(diff[name])
    return model.eval()


@torch.no_grad()
def logits(model, **options):
    tokens = torch.randint(0, VOCABULARY + ADDED, (3, 12), generator=torch.Generator().manual_seed(1))
    return model(tokens, **options).logits


def convert(folder):
    arguments = ["import-diff", str(folder / "diff.pt"), "--base", str(folder / "base")]
    assert main([*arguments, "--out", str(folder / "delta")]) == 0
    bitdelta.merge(folder / "base", folder / "delta", folder / "merged")


def run(folder, dtype):
    model = DeltaModel.from_pretrained(folder / "base", dtype=dtype)
    model.load_delta("t", folder / "delta")
    return logits(model, delta_names="t")


def merged(folder, dtype):
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_merged_model_is_the_originals_bit_for_bit_where_its_scale_has_the_weights_dtype(tmp_path, dtype):
    """Then its two roundings, of coeff * sign and of the sum, are our one."""
    diff = make(tmp_path, dtype, round_scales=True)
    convert(tmp_path)
    theirs, ours = load_as_the_original(tmp_path, diff, dtype), merged(tmp_path, dtype)
    assert ours.config.vocab_size == VOCABULARY + ADDED
    for (name, a), (_, b) in zip(theirs.state_dict().items(), ours.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(logits(theirs), logits(ours))


def test_rows_of_a_batch_have_the_originals_logits_but_for_the_16_bits_of_an_activation(tmp_path):
    diff = make(tmp_path, torch.float32)
    convert(tmp_path)
    theirs, found = logits(load_as_the_original(tmp_path, diff, torch.float32)), run(tmp_path, torch.float32)
    assert (found - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_any_scale_over_bf16_is_nearer_to_the_sum_than_the_original_is(tmp_path):
    """The original rounds coeff * sign to bf16 and then the sum; merge rounds once; DeltaModel adds in fp32."""
    diff = make(tmp_path, torch.bfloat16)
    convert(tmp_path)
    exact = logits(load_as_the_original(tmp_path, diff, torch.bfloat16, exact=True))
    theirs = logits(load_as_the_original(tmp_path, diff, torch.bfloat16).float())
    assert (theirs - exact).abs().max() <= 2**-6 * exact.abs().max()

    def error(found):
        return (found - exact).square().mean()

    assert error(run(tmp_path, torch.float32)) < 1e-3 * error(theirs)
    assert error(logits(merged(tmp_path, torch.float32))) < 1.05 * error(theirs)
    a, b = merged(tmp_path, torch.bfloat16), load_as_the_original(tmp_path, diff, torch.bfloat16)
    for (name, x), (_, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert ((x.float() - y.float()).abs() <= 2**-7 * y.float().abs().clamp(min=2**-5)).all(), name
