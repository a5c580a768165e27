"""DeltaModel: every row of a mixed batch is what the merged model of its tenant gives for the row alone."""

import pytest
import torch
from models import llama_config, make, merged

from bitdelta.model import DeltaModel

NAMES = ["t0", None, "t1", "__base__", "t0"]
WHO = [0, None, 1, None, 0]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def llama(request, tmp_path_factory):
    root = make(tmp_path_factory.mktemp("llama"), llama_config(tie_word_embeddings=request.param))
    return root, load(root), {i: merged(root, i) for i in (None, 0, 1)}


def load(root, tenants=2, **options):
    model = DeltaModel.from_pretrained(root / "base", dtype=torch.float32, **options)
    for i in range(tenants):
        model.load_delta(f"t{i}", root / f"delta-{i}")
    return model


def tokens(rows, length=7, vocabulary=96, seed=0):
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def assert_near(found, wanted):
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 3e-4 * wanted.abs().max()


def generated(model, ids, **options):
    options = {"max_new_tokens": 10, "do_sample": False} | options
    return model.generate(ids, **options)[:, ids.shape[1] :]


@torch.no_grad()
def test_logits_of_every_row_are_those_of_its_merged_model(llama):
    _, model, plain = llama
    ids = tokens(5)
    logits = model(ids, delta_names=NAMES).logits
    for row, who in enumerate(WHO):
        assert_near(logits[row], plain[who](ids[row : row + 1]).logits[0])
    base = plain[None](ids).logits
    assert (logits[1] - base[1]).abs().max() <= 1e-5 * base.abs().max()


@torch.no_grad()
def test_a_batch_of_base_rows_has_the_bits_of_the_plain_model(llama):
    _, model, plain = llama
    ids = tokens(3)
    assert torch.equal(model(ids, delta_names=[None] * 3).logits, plain[None](ids).logits)


def test_greedy_tokens_of_every_row_are_those_of_its_merged_model(llama):
    _, model, plain = llama
    ids = tokens(5)
    found = generated(model, ids, delta_names=NAMES)
    for row, who in enumerate(WHO):
        wanted = generated(plain[who], ids[row : row + 1])[0]
        assert found[row, : len(wanted)].tolist() == wanted.tolist()
        assert (found[row, len(wanted) :] == 0).all()  # the padding token
