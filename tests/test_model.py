"""DeltaModel: every row of a mixed batch is what the merged model of its tenant gives for the row alone."""

import json
import shutil

import pytest
import torch
import transformers
from models import llama_config, make, merged

import bitdelta
import bitdelta.ops
from bitdelta.errors import BaseMismatchError, Error, FormatError
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


def test_left_padding_leaves_every_row_as_it_is_alone(llama):
    _, model, plain = llama
    ids, mask = tokens(5, 9), torch.ones(5, 9, dtype=torch.long)
    for row in range(5):
        ids[row, :row], mask[row, :row] = 0, 0
    found = generated(model, ids, attention_mask=mask, delta_names=NAMES)
    for row, who in enumerate(WHO):
        wanted = generated(plain[who], ids[row : row + 1, row:])[0]
        assert found[row, : len(wanted)].tolist() == wanted.tolist()


@torch.no_grad()
def test_a_cache_filled_step_by_step_gives_the_logits_of_one_pass(llama):
    _, model, _ = llama
    ids = tokens(5)
    whole = model(ids, delta_names=NAMES).logits
    cache = model(ids[:, :4], delta_names=NAMES, use_cache=True).past_key_values
    for i in range(4, 7):
        step = model(ids[:, i : i + 1], delta_names=NAMES, past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        assert_near(step.logits[:, 0], whole[:, i])


def test_beams_of_every_row_are_those_of_its_merged_model(llama):
    _, model, plain = llama
    ids = tokens(5)
    options = {"num_beams": 3, "num_return_sequences": 2}
    found = generated(model, ids, delta_names=NAMES, **options)
    for row, who in enumerate(WHO):
        wanted = generated(plain[who], ids[row : row + 1], **options)
        for own, alone in zip(found[2 * row : 2 * row + 2], wanted, strict=True):
            length = int((alone != 0).sum())
            assert own[:length].tolist() == alone[:length].tolist() and (own[length:] == 0).all()


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"do_sample": True, "top_k": 1}], ids=["beams", "sampled"]
)
def test_several_sequences_of_padded_rows_of_many_tenants_are_those_of_each_row_alone(llama, options):
    """Sampled from the likeliest token alone, so that chance has no say."""
    _, model, plain = llama
    ids, mask = tokens(5, 9, seed=4), torch.ones(5, 9, dtype=torch.long)
    for row in range(5):
        ids[row, : 2 * row], mask[row, : 2 * row] = 0, 0
    options = options | {"num_return_sequences": 2}
    found = generated(model, ids, attention_mask=mask, delta_names=NAMES, **options)
    assert len(found) == 10
    for row, who in enumerate(WHO):
        wanted = generated(plain[who], ids[row : row + 1, 2 * row :], **options)
        for own, alone in zip(found[2 * row : 2 * row + 2], wanted, strict=True):
            length = int((alone != 0).sum())
            assert own[:length].tolist() == alone[:length].tolist() and (own[length:] == 0).all()


def test_sampled_rows_are_drawn_from_their_tenants_distribution(llama):
    _, model, plain = llama
    ids = tokens(5)
    options = {
        "do_sample": True,
        "top_k": 3,
        "temperature": 9.0,
        "max_new_tokens": 1,
        "num_return_sequences": 40,
    }
    torch.manual_seed(0)
    found = generated(model, ids, delta_names=NAMES, **options).view(5, 40)
    for row, who in enumerate(WHO):
        with torch.no_grad():
            likely = plain[who](ids[row : row + 1]).logits[0, -1].topk(3).indices
        assert set(found[row].tolist()) == set(likely.tolist())


@torch.no_grad()
def test_set_delta_names_the_rows_that_name_none(llama):
    _, model, _ = llama
    ids = tokens(2)
    wanted = model(ids, delta_names="t1").logits
    assert not torch.equal(model(ids).logits, wanted)
    model.set_delta("t1")
    assert torch.equal(model(ids).logits, wanted)
    assert torch.equal(model(ids, delta_names="__base__").logits, model(ids, delta_names=[None] * 2).logits)
    model.set_delta(None)
    assert not torch.equal(model(ids).logits, wanted)


@torch.no_grad()
def test_wrong_input_is_refused_by_name_and_the_model_goes_on(llama, tmp_path):
    root, model, _ = llama
    ids = tokens(3)
    before = model(ids, delta_names=["t0", "t1", None]).logits
    with pytest.raises(ValueError, match="expected 3 names, one per row, got 2"):
        model(ids, delta_names=["t0", "t1"])
    with pytest.raises(ValueError, match="expected 3 names, one per row, got 2"):
        model.generate(ids, delta_names=["t0", "t1"])
    for wrong, words in (
        (5, "got int"),
        (["t0", 1, None], "got '1'"),
        ([["t0"], None, None], "for the base, got"),
    ):
        with pytest.raises(TypeError, match=f"delta_names: expected .*{words}"):
            model(ids, delta_names=wrong)
    with pytest.raises(KeyError, match="t7: no such delta; loaded: t0, t1"):
        model.generate(ids, delta_names=["t0", "t7", None])
    with pytest.raises(KeyError, match="t7"):
        model.set_delta("t7")
    with pytest.raises(KeyError, match="t7"):
        model.unload_delta("t7")
    with pytest.raises(ValueError, match="t0: a delta of this name is loaded"):
        model.load_delta("t0", root / "delta-1")
    with pytest.raises(ValueError, match="__base__"):
        model.load_delta("__base__", root / "delta-1")
    with pytest.raises(Error, match="no such folder"):
        model.load_delta("new", root / "nowhere")
    with pytest.raises(FormatError, match="not a packed delta"):
        model.load_delta("new", root / "base")
    with pytest.raises(TypeError, match="expected a folder or a Hub id, got bytes"):
        model.load_delta("new", b"delta")
    with pytest.raises(IndexError, match="token -1 is not in the vocabulary of t1"):
        model(torch.tensor([[3, 4], [5, -1]]), delta_names=[None, "t1"])
    shutil.copytree(root / "base", tmp_path / "odd")
    config = json.loads((root / "base" / "config.json").read_text()) | {"architectures": ["LlamaForPoetry"]}
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config))
    with pytest.raises(Error, match="transformers .* has no LlamaForPoetry"):
        DeltaModel.from_pretrained(tmp_path / "odd")
    with pytest.raises(TypeError, match="model: expected a model of transformers, got Linear"):
        DeltaModel(torch.nn.Linear(2, 2), root / "base")
    assert model.deltas == ["t0", "t1"]
    assert torch.equal(model(ids, delta_names=["t0", "t1", None]).logits, before)


def test_the_delta_of_another_base_is_refused(llama, tmp_path):
    root, model, plain = llama
    make(tmp_path, llama_config(), tenants=1, seed=5)
    with pytest.raises(BaseMismatchError, match=r"weight: .* (has other values|has no such tensor)"):
        model.load_delta("other", tmp_path / "delta-0")
    assert model.deltas == ["t0", "t1"]
    with torch.no_grad():
        assert_near(model(tokens(1), delta_names=["t0"]).logits, plain[0](tokens(1)).logits)


@torch.no_grad()
def test_a_tenant_of_a_running_batch_is_not_unloaded(llama):
    root, _, _ = llama
    model, ids = load(root), tokens(2)
    before = model(ids, delta_names=["t0", "t1"]).logits
    with model.batch(["t0", None], 2):
        with pytest.raises(Error, match="t0: a batch is running with it"):
            model.unload_delta("t0")
        model.unload_delta("t1")
    model.load_delta("t1", root / "delta-1")
    assert torch.equal(model(ids, delta_names=["t0", "t1"]).logits, before)
    model.unload_delta("t0")
    assert model.deltas == ["t1"]


@torch.no_grad()
def test_nan_stays_in_its_row_and_generate_names_it(llama):
    _, model, _ = llama
    x, names = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1)), ["t1", "t0", None]
    wanted = model(inputs_embeds=x, delta_names=names).logits
    bad = x.clone()
    bad[1, 2, 3] = torch.nan
    found = model(inputs_embeds=bad, delta_names=names).logits
    assert found[1, 2:].isnan().all() and torch.equal(found[[0, 2]], wanted[[0, 2]])
    with pytest.raises(Error, match=r"row 1 \(t0\): NaN in its logits"):
        model.generate(inputs_embeds=bad, delta_names=names, max_new_tokens=2, num_return_sequences=1)
    assert torch.equal(model(inputs_embeds=x, delta_names=names).logits, wanted)


@torch.no_grad()
def test_a_module_that_cannot_run_rows_of_several_tenants_is_refused_by_name(tmp_path):
    config = transformers.GptOssConfig(
        vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=64,
    )  # fmt: skip
    make(tmp_path, config, transformers.GptOssForCausalLM, tenants=1)
    model, ids = load(tmp_path, 0), tokens(2)
    with pytest.raises(Error, match="self_attn: GptOssAttention holds changed parameters itself and takes"):
        model.load_delta("t0", tmp_path / "delta-0")
    assert model.deltas == []
    assert torch.equal(model(ids).logits, merged(tmp_path, None)(ids).logits)


@torch.no_grad()
def test_merge_and_unload_gives_the_plain_merged_model(llama):
    root, _, plain = llama
    ids = tokens(2)
    model = load(root)
    alone = model.merge_and_unload("t1")
    assert type(alone) is type(plain[1])
    assert_near(alone(ids).logits, plain[1](ids).logits)
    assert torch.equal(load(root).merge_and_unload()(ids).logits, plain[None](ids).logits)


@torch.no_grad()
def test_save_pretrained_writes_what_from_pretrained_reads(llama, tmp_path):
    root, model, _ = llama
    model.save_pretrained(tmp_path / "saved")
    again = DeltaModel.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert again.deltas == ["t0", "t1"]
    ids = tokens(5)
    assert torch.equal(again(ids, delta_names=NAMES).logits, model(ids, delta_names=NAMES).logits)
    with pytest.raises(FileExistsError):
        model.save_pretrained(tmp_path / "saved")
    for folder in (llama[0] / "base", llama[0] / "delta-0"):
        with pytest.raises(ValueError, match="lies inside .*; choose a folder outside"):
            model.save_pretrained(folder / "saved")


def test_push_to_hub_uploads_the_saved_folder(llama, monkeypatch):
    import huggingface_hub

    _, model, _ = llama
    seen = {}

    class Api:
        def __init__(self, token=None):
            seen["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            seen.update(repo=repo_id, private=private)

        def upload_folder(self, repo_id, folder_path):
            seen["files"] = sorted(str(path.relative_to(folder_path)) for path in folder_path.rglob("*.json"))
            return f"https://huggingface.co/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert model.push_to_hub("me/many", private=True, token="t").endswith("me/many")
    assert seen["repo"] == "me/many" and seen["private"] and seen["token"] == "t"
    assert {"bitdelta_model.json", "delta-0/delta_config.json", "delta-1/delta_config.json"} <= set(
        seen["files"]
    )


@torch.no_grad()
def test_hub_ids_of_bases_deltas_adapters_and_saved_models_are_read_from_the_cache(
    llama, tmp_path, monkeypatch
):
    from huggingface_hub import constants
    from test_hub import snapshot
    from test_lora import adapter

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(name, folder, commit="1" * 40, ref="main"):
        files = {
            str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
        snapshot(tmp_path / "hub", name, commit, files, ref)

    root, model, _ = llama
    adapter(root, tmp_path / "adapter")
    for name, folder in (
        ("base", root / "base"),
        ("delta", root / "delta-0"),
        ("lora", tmp_path / "adapter"),
    ):
        put(f"me/{name}", folder)
    again = DeltaModel.from_pretrained("me/base", dtype=torch.float32, max_resident=1)
    again.load_delta("t0", "me/delta@main")
    again.load_delta("lora", "me/lora")
    assert again.base.id == "me/base" and again.source("t0") == "me/delta@main"
    ids = tokens(2)
    wanted = model(ids, delta_names="t0").logits
    assert torch.equal(again(ids, delta_names="t0").logits, wanted)
    low_rank = again(ids, delta_names="lora").logits
    put(
        "me/delta", root / "delta-1", "2" * 40
    )  # the branch moves on; a tenant that was evicted is the same again
    assert torch.equal(again(ids, delta_names="t0").logits, wanted)
    again.save_pretrained(tmp_path / "saved")
    put("me/many", tmp_path / "saved")
    saved = DeltaModel.from_pretrained("me/many", dtype=torch.float32)
    assert saved.base.id == "me/base" and saved.deltas == ["t0", "lora"]
    assert torch.equal(saved(ids, delta_names="t0").logits, wanted)
    assert torch.equal(saved(ids, delta_names="lora").logits, low_rank)


@pytest.mark.parametrize(
    "about",
    [{"format_version": 2}, {"base": 5}, {"revision": 5}, {"deltas": ["t0"]}, {"deltas": {"t0": 5}}],
    ids=str,
)
def test_a_saved_model_that_is_not_one_is_refused_by_name(llama, tmp_path, about):
    _, model, _ = llama
    model.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "bitdelta_model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | about))
    with pytest.raises(
        FormatError, match="bitdelta_model.json: expected format_version 1, base, revision and deltas"
    ):
        DeltaModel.from_pretrained(tmp_path / "saved")
    path.write_text(json.dumps({"format_version": 1, "base": "x", "deltas": {"t0": "../delta-0"}}))
    with pytest.raises(FormatError, match="leads outside"):
        DeltaModel.from_pretrained(tmp_path / "saved")


def test_attributes_of_the_base_are_there():
    assert bitdelta.DeltaModel is DeltaModel


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A base and fine-tunes stored in bf16."""
    root = tmp_path_factory.mktemp("half")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(llama_config()).bfloat16().save_pretrained(root / "base")
    return make(root, llama_config(), keep_base=True)


@torch.no_grad()
def test_in_bf16_the_logits_are_as_near_as_its_rounding_allows(half):
    model = DeltaModel.from_pretrained(half / "base")
    for i in range(2):
        model.load_delta(f"t{i}", half / f"delta-{i}")
    assert model.dtype == torch.bfloat16
    ids = tokens(5)
    logits = model(ids, delta_names=NAMES).logits
    for row, who in enumerate(WHO):
        wanted = merged(half, who)(ids[row : row + 1]).logits[0]
        assert (logits[row] - wanted).abs().mean() <= 0.02 * wanted.abs().mean()
    alone = model(ids[:1], delta_names=["t0"]).logits[0].float()
    assert (logits[0] - alone).abs().max() <= 0.05 * alone.abs().max()


@torch.no_grad()
def test_few_base_rows_of_a_half_type_have_the_same_products_alone_and_beside_tenants(half, monkeypatch):
    model = DeltaModel.from_pretrained(half / "base")
    ids = tokens(2, 1)
    plain = model(ids).logits
    model.load_delta("t0", half / "delta-0")
    alone, made, product = model(ids).logits, [], bitdelta.ops.linear

    def linear(*args):
        made.append(product(*args))
        return made[-1]

    monkeypatch.setattr(bitdelta.ops, "linear", linear)
    assert torch.equal(model(ids).logits, alone)
    base, made[:] = list(made), []
    mixed = model(ids, delta_names=["t0", None]).logits
    assert len(base) == len(made) == 15
    assert torch.equal(base[0][1], made[0][1])  # the first projection of queries
    for logits in (alone, mixed[1:]):
        assert (logits[-1] - plain[-1]).abs().max() <= 0.05 * plain[-1].abs().max()


def test_inputs_have_the_gradients_of_the_merged_models(llama):
    _, model, plain = llama
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))
    names, who = ["t1", None, "t0"], [1, None, 0]
    own = x.clone().requires_grad_()
    model(inputs_embeds=own, delta_names=names).logits.square().sum().backward()
    for row, i in enumerate(who):
        alone = x[row : row + 1].clone().requires_grad_()
        plain[i](inputs_embeds=alone).logits.square().sum().backward()
        assert (own.grad[row] - alone.grad[0]).abs().max() <= 3e-3 * alone.grad.abs().max()


@torch.no_grad()
def test_long_prompts_may_be_multiplied_with_expanded_weights(half, monkeypatch):
    import bitdelta.linear_forward

    models = {kind: DeltaModel.from_pretrained(half / "base", prefill=kind) for kind in ("exact", "merged")}
    for model in models.values():
        for i in range(2):
            model.load_delta(f"t{i}", half / f"delta-{i}")
    seen = []
    product = bitdelta.linear_forward.linear

    def linear(*args, **kwargs):
        seen.append(kwargs["precision"])
        return product(*args, **kwargs)

    monkeypatch.setattr(bitdelta.linear_forward, "linear", linear)
    ids, names = tokens(3, 32), ["t0", None, "t1"]
    monkeypatch.setattr(bitdelta.linear_forward, "MERGED_ROWS", 32)
    exact, found = (models[kind](ids, delta_names=names).logits for kind in ("exact", "merged"))
    assert seen == ["merged"] * 15  # seven linears a layer, and the head
    for row, who in enumerate([0, None, 1]):
        wanted = merged(half, who)(ids[row : row + 1]).logits[0]
        assert (found[row] - wanted).abs().mean() <= 0.02 * wanted.abs().mean()
    short = ids[:, :31]
    seen.clear()
    assert torch.equal(
        models["exact"](short, delta_names=names).logits, models["merged"](short, delta_names=names).logits
    )
    assert not seen and not torch.equal(exact, found)
    with pytest.raises(ValueError, match="prefill: expected 'exact' or 'merged', got 'fast'"):
        DeltaModel.from_pretrained(half / "base", prefill="fast")
