"""Tenants: their own vocabulary, ends and rotary embeddings; and the pool that loads and evicts them."""

import threading

import pytest
import torch
import transformers
from models import llama_config, make, merged

from bitdelta.errors import BaseMismatchError, Error
from bitdelta.model import DeltaModel
from bitdelta.tenant import Tenant, TenantPool


def tokens(rows, length=7, vocabulary=96, seed=0):
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def load(root, tenants, **options):
    model = DeltaModel.from_pretrained(root / "base", dtype=torch.float32, **options)
    for i in range(tenants):
        model.load_delta(f"t{i}", root / f"delta-{i}")
    return model


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def grown(request, tmp_path_factory):
    """Tenant 0 has 3 tokens more, tenant 1 has 5 more and ends with one of them, tenant 2 has 6 fewer than the base."""

    def change(model, i):
        with torch.random.fork_rng():
            torch.manual_seed(i)
            model.resize_token_embeddings([99, 101, 90][i], mean_resizing=False)
        if i == 1:
            model.generation_config.eos_token_id = [100, 50]
            model.config.eos_token_id = [100, 50]
            model.generation_config.pad_token_id = model.config.pad_token_id = 97
        return model

    config = llama_config(tie_word_embeddings=request.param)
    return make(tmp_path_factory.mktemp("grown"), config, tenants=3, change=change)


NAMES = ["t0", None, "t1", "t2"]
WHO = [0, None, 1, 2]
SIZES = [99, 96, 101, 90]


@torch.no_grad()
def test_logits_have_the_largest_vocabulary_and_are_minus_infinity_beyond_a_rows_own(grown):
    model = load(grown, 3)
    ids = tokens(4, vocabulary=90)
    ids[0, 2], ids[2, 3] = 98, 100  # added tokens in the prompt
    logits = model(ids, delta_names=NAMES).logits
    assert logits.shape[-1] == model.config.vocab_size == 101
    for row, (who, size) in enumerate(zip(WHO, SIZES, strict=True)):
        wanted = merged(grown, who)(ids[row : row + 1]).logits[0]
        assert wanted.shape[-1] == size
        assert (logits[row, :, :size] - wanted).abs().max() <= 3e-4 * wanted.abs().max()
        assert (logits[row, :, size:] == -torch.inf).all()
    base = model(ids[1:2], delta_names=[None]).logits
    assert base.shape[-1] == 101 and (base[..., 96:] == -torch.inf).all()
    model.unload_delta("t1")
    assert model(ids[:2], delta_names=NAMES[:2]).logits.shape[-1] == model.config.vocab_size == 99


def test_rows_end_and_are_padded_as_their_own_tenant_says(grown):
    model = load(grown, 3)
    ids = tokens(4, vocabulary=90, seed=3)
    options = {"max_new_tokens": 40, "do_sample": False}
    found = model.generate(ids, delta_names=NAMES, **options)
    for row, who in enumerate(WHO):
        plain = merged(grown, who)
        wanted = plain.generate(ids[row : row + 1], **options)[0]
        assert found[row, : len(wanted)].tolist() == wanted.tolist()
        assert (found[row, len(wanted) :] == (97 if who == 1 else 0)).all()
    forced = model.generate(ids, delta_names=NAMES, eos_token_id=int(found[0, 9]), **options)
    assert forced[0, 10:].unique().tolist() in ([0], [])


@torch.no_grad()
def test_a_token_beyond_a_rows_vocabulary_is_refused_by_name(grown):
    model = load(grown, 3)
    ids = tokens(4, vocabulary=90)
    ids[3, 1] = 95
    with pytest.raises(IndexError, match="token 95 is not in the vocabulary of t2, which has 90 tokens"):
        model(ids, delta_names=NAMES)
    ids[3, 1], ids[1, 1] = 5, 97
    with pytest.raises(IndexError, match="token 97 is not in the vocabulary of the base"):
        model(ids, delta_names=NAMES)


@torch.no_grad()
def test_a_larger_tenant_merges_into_the_base(grown):
    ids = tokens(2, vocabulary=90)
    alone = load(grown, 3).merge_and_unload("t1")
    wanted = merged(grown, 1)
    assert alone.config.vocab_size == 101 and alone.generation_config.eos_token_id == [100, 50]
    assert (alone(ids).logits - wanted(ids).logits).abs().max() <= 3e-4 * wanted(ids).logits.abs().max()


def with_config(**about):
    def change(model, i):
        for key, value in about.items() if i == 0 else ():
            setattr(model.config, key, value)
        return model

    return change


@torch.no_grad()
def test_a_tenant_with_linear_rope_runs_beside_base_rows(tmp_path):
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    change = with_config(rope_parameters=rope, max_position_embeddings=256)
    model = load(make(tmp_path, llama_config(), change=change), 2)
    ids = tokens(4, 20)
    names, who = ["t0", None, "t1", "t0"], [0, None, 1, 0]
    logits = model(ids, delta_names=names).logits
    for row, i in enumerate(who):
        wanted = merged(tmp_path, i)(ids[row : row + 1]).logits[0]
        assert (logits[row] - wanted).abs().max() <= 3e-4 * wanted.abs().max()
    found = model.generate(ids, delta_names=names, max_new_tokens=8, do_sample=False)
    for row, i in enumerate(who):
        alone = merged(tmp_path, i).generate(ids[row : row + 1], max_new_tokens=8, do_sample=False)[0]
        assert found[row, : len(alone)].tolist() == alone.tolist()
    unscaled = merged(tmp_path, 0)
    unscaled.model.rotary_emb = merged(tmp_path, None).model.rotary_emb
    assert (logits[0] - unscaled(ids[:1]).logits[0]).abs().max() > 2e-3
    alone = load(tmp_path, 2).merge_and_unload("t0")
    assert (alone(ids[:1]).logits[0] - logits[0]).abs().max() <= 3e-4 * logits[0].abs().max()


def check_rows(root, cls=transformers.AutoModelForCausalLM):
    """Rows of tenant 0, whose config differs, beside others; then alone, and merged."""
    model, ids = load(root, 2), tokens(4)
    names, who = ["t0", None, "t1", "t0"], [0, None, 1, 0]
    with torch.no_grad():
        logits = model(ids, delta_names=names).logits
        for row, i in enumerate(who):
            wanted = merged(root, i, cls)(ids[row : row + 1]).logits[0]
            assert (logits[row] - wanted).abs().max() <= 3e-4 * wanted.abs().max()
        alone = model(ids, delta_names="t0").logits
        wanted = merged(root, 0, cls)(ids).logits
        assert (alone - wanted).abs().max() <= 3e-4 * wanted.abs().max()
        assert (model.merge_and_unload("t0")(ids).logits - wanted).abs().max() <= 3e-4 * wanted.abs().max()
        plain = merged(root, 0, cls)
        plain.config = merged(root, None, cls).config
        same = type(plain)(plain.config).eval()
        same.load_state_dict(plain.state_dict())
        assert (same(ids).logits - wanted).abs().max() > 1e-3 * wanted.abs().max()  # the setting matters


@pytest.mark.parametrize(("key", "value"), [("rms_norm_eps", 0.5), ("hidden_act", "gelu")])
def test_epsilon_and_activation_are_each_rows_own(tmp_path, key, value):
    make(tmp_path, llama_config(), change=with_config(**{key: value}))
    check_rows(tmp_path)


def test_epsilons_of_layer_norms_are_each_rows_own(tmp_path):
    config = transformers.GPT2Config(
        vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    make(tmp_path, config, transformers.GPT2LMHeadModel, change=with_config(layer_norm_epsilon=0.5))
    check_rows(tmp_path)


GROUPED = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
REFUSED = {
    "sliding_window": ("Mistral", {"sliding_window": 8}, {"sliding_window": 16}),
    "logit_softcapping": ("Gemma2", {}, {"final_logit_softcapping": 10.0}),
    "attention_softcapping": ("Gemma2", {}, {"attn_logit_softcapping": 10.0}),
    "query_scale": ("Gemma2", {}, {"query_pre_attn_scalar": 64}),
    "experts_activation": ("Mixtral", {"num_local_experts": 2}, {"hidden_act": "gelu"}),
    "experts_per_token": ("Mixtral", {"num_local_experts": 2}, {"num_experts_per_tok": 1}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_config_that_changes_the_computation_otherwise_is_refused_by_name_and_merge_accepts_it(
    tmp_path, name
):
    family, about, changes = REFUSED[name]
    cls = getattr(transformers, f"{family}ForCausalLM")
    config = getattr(transformers, f"{family}Config")(**GROUPED, **about)
    make(tmp_path, config, cls, tenants=1, change=with_config(**changes))
    ((key, value),) = changes.items()
    assert getattr(merged(tmp_path, 0).config, key) == value
    with pytest.raises(BaseMismatchError, match=f"{key}: .* changes it to {value}.*merge"):
        load(tmp_path, 1)


@torch.no_grad()
def test_a_tenant_that_ties_its_head_runs_over_an_untied_base(tmp_path):
    def change(model, i):
        model.config.tie_word_embeddings = True
        model.tie_weights()
        return model

    make(tmp_path, llama_config(), tenants=1, change=change)
    ids = tokens(2)
    logits = load(tmp_path, 1)(ids, delta_names=["t0", None]).logits
    for row, i in enumerate([0, None]):
        wanted = merged(tmp_path, i)(ids[row : row + 1]).logits[0]
        assert (logits[row] - wanted).abs().max() <= 3e-4 * wanted.abs().max()


@pytest.fixture(scope="module")
def sampling(tmp_path_factory):
    """Tenant 0 draws from its three best tokens, tenant 1 dislikes repetition, tenant 2 is as the base: greedy."""

    def change(model, i):
        settings = [{"do_sample": True, "top_k": 3, "temperature": 3.0}, {"repetition_penalty": 4.0}, {}]
        for key, value in settings[i].items():
            setattr(model.generation_config, key, value)
        return model

    return make(
        tmp_path_factory.mktemp("sampling"), llama_config(eos_token_id=None), tenants=3, change=change
    )


def test_rows_are_drawn_as_their_own_tenants_generation_config_says(sampling):
    model, ids = load(sampling, 3), tokens(4)
    names, who = ["t1", "t0", None, "t2"], [1, 0, None, 2]
    torch.manual_seed(0)
    found = model.generate(ids, delta_names=names, max_new_tokens=12)
    for row, i in enumerate(who):
        if i != 0:
            alone = merged(sampling, i).generate(ids[row : row + 1], max_new_tokens=12)[0]
            assert found[row].tolist() == alone.tolist()
    greedy = merged(sampling, 1).generate(ids[:1], max_new_tokens=12, repetition_penalty=1.0)[0]
    assert found[0].tolist() != greedy.tolist()  # the penalty matters
    drawn = model.generate(ids, delta_names=names, max_new_tokens=1, num_return_sequences=40)[40:80, -1]
    with torch.no_grad():
        best = merged(sampling, 0)(ids[1:2]).logits[0, -1].topk(3).indices
    assert set(drawn.tolist()) == set(best.tolist())


def test_one_tenants_rows_are_drawn_as_its_generation_config_says(sampling):
    model, ids = load(sampling, 3), tokens(2)
    torch.manual_seed(0)
    found = model.generate(ids, delta_names="t0", max_new_tokens=8)
    torch.manual_seed(0)
    assert found.tolist() == merged(sampling, 0).generate(ids, max_new_tokens=8).tolist()


def test_what_the_caller_gives_is_for_all_rows(sampling):
    model, ids = load(sampling, 3), tokens(3)
    names, who = ["t0", "t1", None], [0, 1, None]
    options = {"max_new_tokens": 8, "do_sample": False, "repetition_penalty": 2.0}
    config = transformers.GenerationConfig(**options, pad_token_id=0)
    for found in (
        model.generate(ids, delta_names=names, **options),
        model.generate(ids, delta_names=names, generation_config=config),
    ):
        for row, i in enumerate(who):
            alone = merged(sampling, i).generate(ids[row : row + 1], **options)[0]
            assert found[row].tolist() == alone.tolist()


def tenant(name):
    return lambda: Tenant(name, "delta", {}, None)


def test_the_least_recently_used_tenant_is_evicted_and_loaded_again_when_named():
    pool = TenantPool(max_resident=2)
    for name in "abc":
        pool.load(name, tenant(name))
    assert pool.names == ["a", "b", "c"] and [t.name for t in pool.resident] == ["b", "c"]
    with pool.use(["b"]):
        pass
    with pool.use(["a"]) as (found,):
        assert found.name == "a"
    assert [t.name for t in pool.resident] == ["b", "a"]
    assert (pool.n_loads, pool.n_evictions) == (4, 2)


def test_pinned_and_running_tenants_are_never_evicted():
    pool = TenantPool(max_resident=2)
    pool.load("a", tenant("a"), pin=True)
    pool.load("b", tenant("b"))
    with pool.use(["b"]) as (running,):
        with pytest.raises(Error, match="c: no room: max_resident is 2, .* in use: a, b"):
            pool.load("c", tenant("c"))
        assert running in pool.resident and pool.names == ["a", "b"]
        with pytest.raises(Error, match="b: a batch is running with it"):
            pool.unload("b")
    pool.load("c", tenant("c"))
    assert [t.name for t in pool.resident] == ["a", "c"]
    pool.pin("a", False)
    pool.load("d", tenant("d"))
    assert [t.name for t in pool.resident] == ["c", "d"]
    with pytest.raises(Error, match="no room"), pool.use(["a", "b", "c"]):
        pass
    with pool.use(["a", "b"]):
        pass


def test_a_load_that_fails_leaves_the_pool_as_it_was():
    pool = TenantPool(max_resident=1)
    pool.load("a", tenant("a"))
    with pytest.raises(ZeroDivisionError):
        pool.load("b", lambda: Tenant("b", "delta", {}, 1 // 0))
    assert pool.names == ["a"]
    with pool.use(["a"]) as (found,):
        assert found.name == "a"


@pytest.mark.parametrize("number", [0, -1, 1.5, True])
def test_max_resident_is_a_number_from_one(number):
    with pytest.raises(ValueError, match="max_resident: expected a number from 1"):
        TenantPool(number)


def test_threads_run_batches_of_their_own_while_tenants_come_and_go(tmp_path):
    root = make(tmp_path, llama_config(), tenants=3)
    model = load(root, 3, max_resident=2)
    ids = tokens(2)
    with torch.no_grad():
        wanted = {i: merged(root, i)(ids).logits for i in (None, 0, 1, 2)}
    wrong = []

    def run(first, second):
        for _ in range(6):
            with torch.no_grad():
                try:
                    logits = model(
                        ids, delta_names=[first and f"t{first - 1}", second and f"t{second - 1}"]
                    ).logits
                except Error as error:
                    assert "no room" in str(error)
                    continue
            for row, who in enumerate((first, second)):
                near = wanted[who - 1 if who else None][row]
                if (logits[row] - near).abs().max() > 3e-4 * near.abs().max():
                    wrong.append((first, second, row))

    threads = [threading.Thread(target=run, args=pair) for pair in ((1, 2), (3, None), (1, None), (2, 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(model.pool.resident) <= 2


def test_the_least_recently_used_of_a_models_tenants_is_loaded_again(tmp_path):
    root = make(tmp_path, llama_config(), tenants=3)
    model = load(root, 3, max_resident=2)
    ids = tokens(1)
    assert [t.name for t in model.pool.resident] == ["t1", "t2"]
    with torch.no_grad():
        found, wanted = model(ids, delta_names=["t0"]).logits, merged(root, 0)(ids).logits
    assert (found - wanted).abs().max() <= 3e-4 * wanted.abs().max()
    assert [t.name for t in model.pool.resident] == ["t2", "t0"]
