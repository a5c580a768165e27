"""Which files of a folder count, and index files: nothing outside is followed, all else refused by name."""

import numpy as np
import pytest
from checkpoint_files import SOME, entry, raw_file, refused, write, write_index
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdelta.checkpoint import open_checkpoint
from bitdelta.errors import Error, FormatError


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "model" / "model.safetensors", SOME)
    return tmp_path / "model"


def test_an_index_that_leads_elsewhere_is_refused_by_name(tmp_path):
    secret = write(tmp_path / "secret" / "model.safetensors", SOME)
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    write(folder / "sub" / "model.safetensors", SOME)
    bad = [
        *(
            "../secret/model.safetensors",
            str(secret),
            "sub/model.safetensors",
            "./model.safetensors",
            "..",
            "",
        ),
        *("a\\b.safetensors", "a\0.safetensors", "a\n.safetensors", 3, None, ["model.safetensors"], "x.bin"),
    ]
    for name in bad:
        write_index(folder, {"model.norm.weight": name})
        refused("model.norm.weight: expected the name of a .safetensors file in this folder", folder)


def test_links_that_leave_the_folder_are_refused_and_others_followed(tmp_path, folder):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "model-1.safetensors").symlink_to(folder / "model.safetensors")
    write_index(outside, dict.fromkeys(SOME, "model-1.safetensors"))
    refused("model-1.safetensors: a link that leads outside", outside)
    (folder / "model-1.safetensors").symlink_to("model.safetensors")
    (folder / "other").symlink_to(folder)
    assert list(open_checkpoint(folder)) == list(SOME)
    (tmp_path / "alias").symlink_to(folder)
    assert list(open_checkpoint(tmp_path / "alias")) == list(SOME), "the folder itself may be a link"
    (folder / "tokenizer.json").symlink_to("/etc/hostname")
    with pytest.raises(FormatError, match="tokenizer.json: a link that leads outside"):
        _ = open_checkpoint(folder).files


def test_missing_and_foreign_shards_are_refused_by_name(tmp_path):
    write(tmp_path / "a.safetensors", SOME)
    write_index(tmp_path, {**dict.fromkeys(SOME, "a.safetensors"), "lost": "b.safetensors"})
    refused("b.safetensors: missing", tmp_path)
    write(tmp_path / "b.safetensors", {"other": np.ones(1, np.float32)})
    refused("index.json: lost is not in b.safetensors", tmp_path)
    write(
        tmp_path / "b.safetensors",
        {"lost": np.ones(1, np.float32), "model.norm.weight": SOME["model.norm.weight"]},
    )
    refused("b.safetensors: model.norm.weight is in a.safetensors too", tmp_path)
    write(tmp_path / "b.safetensors", {"lost": np.ones(1, np.float32)})
    assert len(open_checkpoint(tmp_path)) == 4
    write_index(tmp_path, {**dict.fromkeys(SOME, "b.safetensors"), "lost": "a.safetensors"})
    refused("is not in [ab].safetensors", tmp_path)


INDICES = {
    "list": ("[]", "expected a JSON object, got a list"),
    "no map": ("{}", "weight_map: expected an object"),
    "empty map": ('{"weight_map": {}}', "weight_map: expected an object"),
    "map kind": ('{"weight_map": ["a"]}', "weight_map: expected an object"),
    "not JSON": ('{"weight_map": {', "not valid JSON"),
    "escape codes": ('{"weight_map": {"\\u001b[2J": "a.safetensors"}}', "expected a printable name"),
    "twice": ('{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}', "'a' occurs twice"),
}


@pytest.mark.parametrize("case", INDICES)
def test_a_damaged_index_is_refused(tmp_path, case):
    text, words = INDICES[case]
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refused(words, tmp_path)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=8),
        st.one_of(
            st.text(max_size=12), st.sampled_from(["a.safetensors", "b.safetensors", "../c.safetensors"])
        ),
        max_size=4,
    )
)
def test_invented_indices_never_crash_or_leave_the_folder(tmp_path_factory, weight_map):
    root = tmp_path_factory.mktemp("index")
    write(root / "c.safetensors", {"a": np.ones(1, np.float32)})
    folder = root / "model"
    write(folder / "a.safetensors", {"a": np.ones(1, np.float32)})
    write_index(folder, weight_map)
    try:
        checkpoint = open_checkpoint(folder)
    except FormatError:
        return
    assert set(weight_map) == {"a"} and all(tensor.path.parent == folder for tensor in checkpoint.values())


def test_the_usual_name_wins_then_safetensors_then_the_only_other(tmp_path):
    one = {"t": np.ones(1, np.float32)}
    (tmp_path / "training_args.bin").write_bytes(b"PK\3\4 not weights")
    write(tmp_path / "adapter_model.safetensors", one)
    write(tmp_path / "odd.fp16.safetensors", one)
    (tmp_path / "pytorch_model.bin.bak").write_bytes(b"")
    assert open_checkpoint(tmp_path)["t"].path.name == "odd.fp16.safetensors"
    write(tmp_path / "second.safetensors", one)
    refused("expected model.safetensors or one index of shards, got 2 ", tmp_path)
    write_index(tmp_path, {"t": "second.safetensors"}, "odd.safetensors.index.json")
    assert open_checkpoint(tmp_path)["t"].path.name == "second.safetensors"
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused("pytorch_model.bin: empty", tmp_path)
    write_index(tmp_path, {"t": "odd.fp16.safetensors"})
    assert open_checkpoint(tmp_path)["t"].path.name == "odd.fp16.safetensors"
    write(tmp_path / "model.safetensors", one)
    assert open_checkpoint(tmp_path)["t"].path.name == "model.safetensors"


def put(*names):
    def build(folder):
        for name in names:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")

    return build


FOREIGN = {
    "nothing": (put(), "no weights: expected model.safetensors.*it is empty"),
    "something": (put("notes.txt"), "no weights.*it holds notes.txt"),
    "DCP": (put(".metadata", "__0_0.distcp"), "format_utils dcp_to_torch {folder} OUT"),
    "FSDP": (
        put("pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp", "scheduler.pt"),
        "accelerate merge-weights {folder}/pytorch_model_fsdp_0 OUT",
    ),
    "ZeRO": (put("zero_to_fp32.py", "latest"), "deepspeed.utils.zero_to_fp32 {folder} OUT"),
    "ZeRO step": (
        put("global_step500/mp_rank_00_model_states.pt", "latest"),
        "deepspeed.utils.zero_to_fp32 {folder} OUT",
    ),
    "ZeRO shards": (put("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"), "DeepSpeed ZeRO.*zero_to_fp32"),
    "Megatron": (put("latest_checkpointed_iteration.txt", "iter_0001000/x"), "Megatron"),
    "GGUF": (put("llama.Q4_K_M.gguf"), "GGUF.*llama.Q4_K_M.gguf"),
    "Meta": (put("consolidated.00.pth", "params.json"), "consolidated.00.pth.*convert_llama_weights_to_hf"),
    "pth": (put("model.pth"), "model.pth.*save_pretrained"),
    "Flax": (put("flax_model.msgpack"), "flax_model.msgpack.*from_flax=True"),
    "TensorFlow": (put("tf_model.h5"), "tf_model.h5.*from_tf=True"),
    "adapter": (put("adapter_config.json", "adapter_model.safetensors"), "PEFT adapter.*merge_and_unload"),
    "delta": (put("delta_config.json", "delta_model.safetensors"), "packed delta.*bitdelta merge"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_other_formats_are_refused_with_what_converts_them(tmp_path, case):
    build, words = FOREIGN[case]
    build(tmp_path)
    refused(words.format(folder=tmp_path), tmp_path)


def test_a_placeholder_of_empty_tensors_is_refused(tmp_path):
    raw_file(tmp_path / "model.safetensors", {"a": entry("BF16", [0], 0, 0)})
    refused("every tensor is empty.*zero_to_fp32", tmp_path)


def test_neither_folder_nor_hub_id(tmp_path):
    refused("no such folder, and not a Hub id", tmp_path / "absent", Error)
    (tmp_path / "file").write_text("")
    refused("a file; give the folder", tmp_path / "file", Error)
