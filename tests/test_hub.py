"""Hub ids are found in huggingface_hub's cache, here one made by hand; nothing is downloaded."""

import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest

from bitdelta import hub
from bitdelta.checkpoint import open_checkpoint
from bitdelta.errors import Error, FormatError

pytest.importorskip("huggingface_hub")

OLD, NEW = "a" * 40, "b" * 40


def safetensors(value):
    header = json.dumps({"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    return struct.pack("<Q", len(header)) + header + np.full(2, value, np.float32).tobytes()


def snapshot(cache, name, commit, files, ref=None):
    """One snapshot as huggingface_hub lays it out: files are links to ../../blobs/HASH."""
    repository = cache / ("models--" + name.replace("/", "--"))
    folder = repository / "snapshots" / commit
    (repository / "blobs").mkdir(parents=True, exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    folder.mkdir(parents=True)
    for file, content in files.items():
        blob = repository / "blobs" / f"{commit[:8]}-{file.replace('/', '-')}"
        blob.write_bytes(content)
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).symlink_to(os.path.relpath(blob, (folder / file).parent))
    if ref:
        (repository / "refs" / ref).write_text(commit)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    files = {"config.json": b'{"model_type": "llama"}', "model.safetensors": safetensors(1)}
    snapshot(tmp_path / "hub", "owner/name", OLD, files, "v1")
    snapshot(tmp_path / "hub", "owner/name", NEW, {**files, "model.safetensors": safetensors(2)}, "main")
    return tmp_path / "hub"


@pytest.mark.parametrize(
    ("source", "revision", "commit", "value"),
    [
        ("owner/name", None, NEW, 2),
        ("owner/name@main", None, NEW, 2),
        ("owner/name@v1", None, OLD, 1),
        ("owner/name", "v1", OLD, 1),
        ("owner/name@v1", "v1", OLD, 1),
        (f"owner/name@{OLD}", None, OLD, 1),
    ],
)
def test_an_id_is_found_in_the_cache_and_its_commit_reported(cache, source, revision, commit, value):
    checkpoint = open_checkpoint(source, revision)
    assert (checkpoint.id, checkpoint.revision) == ("owner/name", commit)
    assert checkpoint.root == cache / "models--owner--name" / "snapshots" / commit
    assert checkpoint["t"].array().tolist() == [value, value]
    assert checkpoint.config == {"model_type": "llama"}
    assert list(checkpoint.files) == ["config.json"]


def test_a_snapshots_folder_knows_its_id_and_commit(cache):
    checkpoint = open_checkpoint(cache / "models--owner--name" / "snapshots" / OLD)
    assert (checkpoint.id, checkpoint.revision) == ("owner/name", OLD)


def test_a_repository_without_safetensors_gives_its_torch_files(cache, monkeypatch):
    torch = pytest.importorskip("torch")
    folder = snapshot(cache, "old", "c" * 40, {"config.json": b"{}"}, "main")
    blob = cache / "models--old" / "blobs" / "bin"
    torch.save({"t": torch.ones(2)}, blob)
    (folder / "pytorch_model.bin").symlink_to("../../blobs/bin")
    checkpoint = open_checkpoint("old")
    assert checkpoint.id == "old" and checkpoint["t"].array().tolist() == [1, 1]


def test_a_folder_wins_over_an_id(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "model.safetensors").write_bytes(safetensors(3))
    checkpoint = open_checkpoint("owner/name")
    assert checkpoint.id is None and checkpoint["t"].array()[0] == 3
    with pytest.raises(Error, match="a folder; the revision 'v1' is for Hub ids"):
        open_checkpoint("owner/name", "v1")


@pytest.mark.parametrize("source", ["owner/other", "absent", "owner/name@v2", f"owner/name@{'d' * 40}"])
def test_what_the_cache_lacks_is_an_error_that_names_both_possibilities(cache, source):
    with pytest.raises(
        Error, match=f"^{source}: no such folder, and as a Hub id: HF_HUB_OFFLINE is set"
    ) as caught:
        open_checkpoint(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "./x",
        "/x/y",
        "../x",
        "a/b/c",
        "x/",
        "",
        "a b",
        "owner/name@",
        "-x",
        "a--b",
        "a..b",
        "~/x",
        "~nobody/x",
        "a\0b",
    ],
)
def test_what_is_no_id_is_not_looked_up(cache, monkeypatch, source):
    monkeypatch.setattr(hub, "_download", lambda *arguments: pytest.fail("looked up"))
    with pytest.raises(Error, match="no such folder, and not a Hub id"):
        open_checkpoint(source)


def test_two_revisions_are_refused(cache):
    with pytest.raises(Error, match="two revisions: 'v1' and 'main'"):
        open_checkpoint("owner/name@v1", "main")


def test_an_incomplete_snapshot_names_the_missing_shard(cache):
    index = {"weight_map": {"t": "model-1.safetensors", "u": "model-2.safetensors"}}
    files = {
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model-1.safetensors": safetensors(1),
    }
    folder = snapshot(cache, "owner/half", "e" * 40, files, "main")
    with pytest.raises(FormatError, match="model-2.safetensors: missing"):
        open_checkpoint("owner/half")
    (folder / "model-2.safetensors").symlink_to("../../blobs/absent")
    with pytest.raises(FormatError, match="model-2.safetensors: missing"):
        open_checkpoint("owner/half")


def test_a_link_out_of_the_repository_is_refused(cache, tmp_path):
    folder = snapshot(cache, "owner/evil", "f" * 40, {"model.safetensors": safetensors(1)}, "main")
    (tmp_path / "secret").write_bytes(b"{}")
    (folder / "config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(FormatError, match=r"config.json: a link that leads outside"):
        _ = open_checkpoint("owner/evil").files
    (folder / "config.json").unlink()
    other = cache / "models--owner--name" / "snapshots" / OLD / "config.json"
    (folder / "config.json").symlink_to(other)
    with pytest.raises(FormatError, match=r"config.json: a link that leads outside"):
        _ = open_checkpoint("owner/evil").files


def test_only_what_is_read_is_asked_for(monkeypatch, tmp_path):
    """The patterns given to huggingface_hub, against the files of well-known repositories."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    wanted = ["config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
              "tokenizer.model", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
              "chat_template.jinja", "additional_chat_templates/tool.jinja", "merges.txt", "LICENSE",
              "adapter_config.json", "adapter_model.safetensors"]  # fmt: skip
    torch = ["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"]
    unwanted = ["consolidated.safetensors", "original/consolidated.00.pth", "original/params.json", "training_args.bin",
                "onnx/model.onnx", "model.gguf", "flax_model.msgpack", "tf_model.h5", "coreml/a.mlmodel",
                "checkpoint-5/model.safetensors", "checkpoint-5/pytorch_model.bin", "runs/1/events.out.tfevents.0",
                "optimizer.bin", "adapter_model.bin"]  # fmt: skip
    calls = []

    def download(name, *, revision, allow_patterns, ignore_patterns):
        files = [*wanted, *torch, *unwanted]
        calls.append(
            set(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        )
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    hub.resolve("owner/both")
    assert calls == [{*wanted, torch[1]}, {*wanted[:-1], *torch} - set(wanted[5:7])]
    (tmp_path / "model.safetensors").write_bytes(safetensors(1))
    hub.resolve("owner/both")
    assert len(calls) == 3, "a repository with safetensors is asked once"


def test_the_deltas_of_a_saved_model_are_asked_for(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    root = tmp_path / NEW
    root.mkdir()
    (root / hub.SAVED).write_text("{}")
    files = [
        hub.SAVED,
        "delta-0/delta_model.safetensors",
        "delta-0/tokenizer.json",
        "delta-1/adapter_model.safetensors",
    ]
    got = set()

    def download(name, revision, allow_patterns, ignore_patterns=None):
        got.update(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        assert name == "owner/many" and revision in ("v1", NEW)
        return str(root)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    hub.resolve("owner/many@v1")
    assert got == set(files)


def test_whatever_the_hub_raises_is_one_line(monkeypatch, tmp_path):
    import huggingface_hub

    def fail(*arguments, **options):
        raise RuntimeError("no route\nto host")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(
        Error, match="^owner/name: .* as a Hub id: the Hub did not give it: no route to host$"
    ):
        open_checkpoint("owner/name")


def test_without_huggingface_hub_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Error, match="no such folder; .* pip install huggingface_hub"):
        open_checkpoint("owner/name")
    (tmp_path / "model.safetensors").write_bytes(safetensors(1))
    assert len(open_checkpoint(tmp_path)) == 1


def test_the_environment_variables_of_huggingface_hub_are_obeyed(cache):
    code = "from bitdelta.checkpoint import open_checkpoint; print(open_checkpoint('owner/name').revision)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == NEW


def test_a_packed_delta_and_its_base_are_taken_from_the_cache(cache, tmp_path):
    from safetensors.numpy import save

    import bitdelta

    rng = np.random.default_rng(0)
    base = rng.normal(size=(32, 256)).astype(np.float32)
    tuned = base + rng.normal(scale=0.01, size=base.shape).astype(np.float32)
    for name, weight in (("owner/base", base), ("owner/tuned", tuned)):
        files = {
            "config.json": b"{}",
            "model.safetensors": save({"a.weight": weight}),
            "tokenizer.json": b"{}",
        }
        snapshot(cache, name, "1" * 40, files, "main")
    bitdelta.compress("owner/base", "owner/tuned", tmp_path / "delta")
    packed = {path.name: path.read_bytes() for path in (tmp_path / "delta").iterdir()}
    snapshot(cache, "owner/delta", "2" * 40, packed, "main")
    packfile = bitdelta.load("owner/delta@main")
    assert packfile.config["base"]["id"] == "owner/base" and packfile.config["base"]["revision"] == "1" * 40
    assert packfile.config["finetuned"]["id"] == "owner/tuned"
    packfile.check_base(open_checkpoint("owner/base"))
    assert packfile["a.weight"].shape == (32, 256)


def test_files_of_a_hostile_delta_are_not_followed_out_of_its_folder(tmp_path):
    import bitdelta

    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(safetensors(1))
        (tmp_path / name / "tokenizer.json").write_text(f'"{name}"')
    bitdelta.compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "delta")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "delta" / "tokenizer.json").unlink()
    (tmp_path / "delta" / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(FormatError, match=r"tokenizer.json: a link that leads outside"):
        bitdelta.merge(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")
    config = json.loads((tmp_path / "delta" / "delta_config.json").read_text())
    for name in ("model.safetensors", "../x", "x.py", ".bashrc", "tokenizer/../../x", "/tokenizer.json"):
        config["files"] = {name: {"from": "delta", "sha256": "0" * 64}}
        (tmp_path / "delta" / "delta_config.json").write_text(json.dumps(config))
        with pytest.raises(FormatError, match="files: "):
            bitdelta.load(tmp_path / "delta")
    assert not (tmp_path / "merged").exists()
