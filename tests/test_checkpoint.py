"""Checkpoint folders: what is read equals what transformers, torch and the safetensors library wrote."""

import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import SOME, entry, raw_file, write, write_index
from safetensors import safe_open

from bitdelta.array import BFloat16Array, to_float32
from bitdelta.checkpoint import Tensor, open_checkpoint
from bitdelta.errors import FormatError


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "model" / "model.safetensors", SOME)
    return tmp_path / "model"


def test_a_single_file_is_read_as_the_safetensors_library_reads_it(folder):
    checkpoint = open_checkpoint(folder)
    with safe_open(folder / "model.safetensors", "np") as file:
        assert set(checkpoint) == set(file.keys())
        for name in ("model.norm.weight", "model.layers.0.mlp.up_proj.weight"):
            np.testing.assert_array_equal(checkpoint[name].array(), file.get_tensor(name))
    embedding = checkpoint["model.embed_tokens.weight"].array()
    assert isinstance(embedding, BFloat16Array) and embedding.shape == (3, 4)
    np.testing.assert_array_equal(embedding.bits, SOME["model.embed_tokens.weight"])
    assert checkpoint.root == folder and checkpoint.id is None and checkpoint.revision is None
    assert checkpoint.config == {} and checkpoint.files == {} and checkpoint.aliases == {}
    assert checkpoint.nbytes == 24 + 16 + 16 and len(checkpoint) == 3


def test_tensors_come_in_the_order_of_their_bytes(tmp_path):
    header = {"z": entry("U8", [2], 4, 6), "a": entry("U8", [1], 3, 4), "m": entry("U8", [3], 0, 3)}
    raw_file(tmp_path / "model.safetensors", header, bytes(range(6)))
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint) == ["m", "a", "z"]
    assert [checkpoint[name].array().tolist() for name in checkpoint] == [[0, 1, 2], [3], [4, 5]]


def test_shards_are_one_checkpoint(tmp_path):
    names = list(SOME)
    write(tmp_path / "model-00001-of-00002.safetensors", {name: SOME[name] for name in names[:2]})
    write(tmp_path / "model-00002-of-00002.safetensors", {names[2]: SOME[names[2]]})
    weight_map = dict.fromkeys(names[:2], "model-00001-of-00002.safetensors")
    write_index(tmp_path, {**weight_map, names[2]: "model-00002-of-00002.safetensors"})
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint) == names and len(checkpoint.weights) == 2
    np.testing.assert_array_equal(checkpoint[names[2]].array(), SOME[names[2]])


# what transformers and torch write


@pytest.fixture(scope="module")
def llama():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=50,
        tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).bfloat16()


@pytest.mark.parametrize("size", ["1GB", "20KB"], ids=["single", "sharded"])
def test_transformers_folders_hold_the_models_bits(tmp_path, llama, size):
    llama.save_pretrained(tmp_path, max_shard_size=size)
    checkpoint = open_checkpoint(tmp_path)
    assert (len(checkpoint.weights) > 1) == (size == "20KB")
    assert set(checkpoint) == set(llama.state_dict()) - {"lm_head.weight"}
    for name, tensor in checkpoint.items():
        np.testing.assert_array_equal(to_float32(tensor.array()), llama.state_dict()[name].float().numpy())
    assert checkpoint.config["tie_word_embeddings"] is True
    assert set(checkpoint.files) == {"config.json", "generation_config.json"}


@pytest.mark.parametrize("shards", [1, 3])
def test_torch_folders_hold_the_models_bits_and_show_tied_weights(tmp_path, llama, shards):
    import torch

    state = llama.state_dict()
    llama.config.save_pretrained(tmp_path)
    if shards == 1:
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        names, weight_map = list(state), {}
        names.remove("lm_head.weight")
        names.insert(1, "lm_head.weight")  # beside the embeddings that it is tied to, as transformers shards
        for i in range(shards):
            file = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
            part = names[i * 7 : i * 7 + 7]
            torch.save({name: state[name] for name in part}, tmp_path / file)
            weight_map.update(dict.fromkeys(part, file))
        write_index(tmp_path, weight_map, "pytorch_model.bin.index.json")
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint) == set(state)
    assert set(checkpoint.aliases.items()) == {("lm_head.weight", "model.embed_tokens.weight")}
    assert (
        checkpoint.nbytes == sum(t.nbytes for t in checkpoint.values()) - checkpoint["lm_head.weight"].nbytes
    )
    for name, tensor in checkpoint.items():
        np.testing.assert_array_equal(to_float32(tensor.array()), state[name].float().numpy())


def test_formats_agree_on_fingerprints(tmp_path, llama):
    import torch

    llama.save_pretrained(tmp_path / "one")
    llama.save_pretrained(tmp_path / "many", max_shard_size="10KB")
    (tmp_path / "bin").mkdir()
    state = llama.state_dict()
    turned = {name: t.t().contiguous().t() if t.ndim == 2 else t for name, t in state.items()}
    torch.save(turned, tmp_path / "bin" / "pytorch_model.bin")
    one, many, torched = (open_checkpoint(tmp_path / name) for name in ("one", "many", "bin"))
    assert torched["model.embed_tokens.weight"].strides == (1, 50)
    for name in one:
        assert one[name].fingerprint() == many[name].fingerprint() == torched[name].fingerprint()


def test_safetensors_win_over_torch_files(tmp_path, llama):
    import torch

    llama.save_pretrained(tmp_path)
    torch.save({"other": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert "other" not in open_checkpoint(tmp_path)


def test_nothing_here_imports_torch(folder):
    import subprocess

    code = (
        "import sys; from bitdelta.checkpoint import open_checkpoint; c = open_checkpoint(sys.argv[1]);"
        "[(t.array(), t.fingerprint()) for t in c.values()]; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)


def test_a_tensor_says_what_it_is():
    tensor = Tensor("a", "F32", (2,), 8, Path("x"), 64)
    assert tensor.span == 8 and tensor.strides is None and "F32" in repr(tensor)


def test_config_and_tokenizer_travel_and_nothing_else(folder):
    travel = ["added_tokens.json", "additional_chat_templates/tool.jinja", "chat_template.jinja", "config.json",
              "generation_config.json", "merges.txt", "modeling_x.py", "preprocessor_config.json",
              "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json",
              "LICENSE.txt"]  # fmt: skip
    stay = ["README.md", ".gitattributes", ".git/config", "optimizer.pt", "trainer_state.json", "training_args.bin",
            "rng_state.pth", "runs/events", "all_results.json", "adapter_config.json", "delta_config.json", ".env",
            "train.py", "setup.py", "tokenizer.safetensors", "tokenizer/tokenizer.json", "checkpoint-5/config.json",
            "model.safetensors.index.json.lock"]  # fmt: skip
    for name in travel + stay:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "merges.txt").write_text("")
    files = open_checkpoint(folder).files
    assert sorted(files) == sorted(travel)
    assert (
        files["additional_chat_templates/tool.jinja"] == folder / "additional_chat_templates" / "tool.jinja"
    )


def test_a_bad_config_is_refused(folder):
    (folder / "config.json").write_text("[]")
    with pytest.raises(FormatError, match=r"config.json: .*expected a JSON object"):
        _ = open_checkpoint(folder).config
    (folder / "config.json").write_text('{"vocab_size": 3}')
    assert open_checkpoint(folder).config == {"vocab_size": 3}
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    with pytest.raises(FormatError, match=r"tokenizer.json: a Git LFS pointer"):
        _ = open_checkpoint(folder).files
