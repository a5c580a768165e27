"""The option `device`: what it may be, and what is said about one that is not there."""

import pytest
import torch

from bitdelta import _C, DeviceError
from bitdelta.cli import main
from bitdelta.devices import torch_device


def test_a_device_is_pytorchs_and_by_default_the_cpu():
    assert torch_device() == torch_device("cpu") == torch.device("cpu")
    assert torch_device(torch.device("meta")) == torch.device("meta")


@pytest.mark.parametrize("name", ["gpu", "cuda:one", 1.5, ""])
def test_another_name_is_refused(name):
    with pytest.raises(ValueError, match=f"device: expected a name such as .* got {name!r}"):
        torch_device(name)


def test_a_gpu_that_is_not_there_is_named_with_what_is_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    missing = _C.cuda_missing() or "PyTorch finds no GPU"
    with pytest.raises(DeviceError) as caught:
        torch_device("cuda")
    assert str(caught.value) == f"device cuda: {missing}"


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "BASE", "--prompt", ":hi"],
        ["eval", "BASE"],
        ["distill", "BASE", "BASE", "BASE", "--out", "OUT"],
        ["calibrate", "BASE", "BASE", "BASE", "--out", "OUT"],
    ],
    ids=lambda command: command[0],
)
def test_commands_name_a_gpu_that_is_not_there(command, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = [{"BASE": str(tmp_path), "OUT": str(tmp_path / "out")}.get(word, word) for word in command]
    assert main([*arguments, "--device", "cuda"]) == 2
    assert "device cuda: " in capsys.readouterr().err
    assert main([*arguments, "--device", "gpu"]) == 2
    assert "device: expected a name such as 'cpu' or 'cuda:0', got 'gpu'" in capsys.readouterr().err


def test_processes_of_torchrun_have_gpus_of_their_own(monkeypatch):
    monkeypatch.setattr("bitdelta.devices._C.cuda_missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert torch_device("cuda") == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert torch_device("cuda") == torch.device("cuda:1")
    assert torch_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(DeviceError, match="device cuda:2: there are 2 GPUs"):
        torch_device("cuda:2")
