"""Files that load_weights refuses: no checkpoints, broken ones, and those that would run code or fill the memory.

Fails if code of a file runs, if the network isn't left as it was, or if the reason isn't one sentence.
"""

import copy
import pickle
import zipfile

import pytest
import torch
from checkpoint_cases import assert_refused, assert_state, drawn_state
from torch import nn

import cnnfast
from cnnfast.pretrained import find_weights


def truncated(path):
    data = find_weights("tf_efficientnet_lite0").read_bytes()
    path.write_bytes(data[: len(data) // 2])


class Malicious:
    def __reduce__(self):
        return print, ("code from a checkpoint ran",)


def compressed(path):
    """A zip bomb in its small."""
    torch.save({"a": torch.zeros(3)}, path.with_suffix(".whole"))
    with zipfile.ZipFile(path.with_suffix(".whole")) as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in whole.namelist():
            bomb.writestr(name, b"0" * (64 << 20) if name.endswith("data.pkl") else whole.read(name))


def foreign_pickle(path):
    with open(path, "wb") as file:
        pickle.dump({"state_dict": Malicious()}, file)


FILES = {
    "truncated.pth": truncated,
    "legacy.pth": lambda path: torch.save({"a": Malicious()}, path, _use_new_zipfile_serialization=False),
    "pickle.pth": foreign_pickle,
    "numpy.pth": lambda path: torch.save({"a": torch.zeros(3).numpy()}, path),
    "compressed.pth": compressed,
    "empty.pth": lambda path: path.write_bytes(b""),
    "empty.safetensors": lambda path: path.write_bytes(b""),
    "text.pth": lambda path: path.write_text("not a checkpoint\n" * 100),
    "code.pth": lambda path: torch.save({"state_dict": Malicious()}, path),
    "number.pth": lambda path: torch.save(3, path),
    "nothing.pth": lambda path: torch.save({}, path),
    "tensor.pth": lambda path: torch.save(torch.zeros(3), path),
    "module.pth": lambda path: torch.save(nn.Linear(2, 2), path),
    "foreign.pth": lambda path: torch.save({"optimizer": {"lr": 1}, "epoch": 3}, path),
    "text.safetensors": lambda path: path.write_text("not a checkpoint\n" * 100),
    "pickled.safetensors": lambda path: torch.save({"a": torch.zeros(3)}, path),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_checkpoints(lite0, tmp_path, name, capfd):
    FILES[name](tmp_path / name)
    before = copy.deepcopy(lite0.state_dict())
    assert_refused(lite0, tmp_path / name, "got")
    assert_state(lite0, before)
    assert "ran" not in capfd.readouterr().out


@pytest.mark.parametrize(
    "name, says",
    [
        ("code.pth", r"code.pth: it wants print, and the code of a checkpoint isn't run$"),
        ("legacy.pth", r"legacy.pth: it wants print, and the code of a checkpoint isn't run$"),
        ("module.pth", r"module.pth: it wants torch.nn.modules.linear.Linear, and the code of a checkpoint isn't run$"),
        ("pickle.pth", r"pickle.pth: it is no pickle of tensors$"),
        ("empty.pth", r"empty.pth: it is empty or cut off$"),
        ("truncated.pth", r"truncated.pth: unexpected EOF, expected \d+ more bytes$"),
        ("compressed.pth", r"compressed.pth: it is compressed"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_reasons(lite0, tmp_path, name, says):
    """None of torch's advice to load it with weights_only=False."""
    FILES[name](tmp_path / name)
    assert_refused(lite0, tmp_path / name, says)


def test_what_claims_to_be_large(tmp_path):
    """A stride of 0 makes 40 GB of a number: nothing is computed of it."""
    network = cnnfast.create_model("tf_efficientnet_lite0", in_chans=4)
    state = drawn_state(network)
    for shape in ((10**9, 3, 3, 3), (32, 3, 10**5, 10**5)):
        torch.save({**state, "conv_stem.weight": torch.zeros(1).expand(shape)}, tmp_path / "weights.pth")
        assert_refused(
            network, tmp_path / "weights.pth", r"conv_stem.weight \(\d+, 3, \d+, \d+\), not", source="cnnfast"
        )


@pytest.mark.parametrize("name", ["folder.pth", "folder.safetensors"])
def test_a_folder(lite0, tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(IsADirectoryError, match=rf"weights must be a file, got the folder .*{name}"):
        cnnfast.load_weights(lite0, tmp_path / name)


def test_no_such_file(lite0, tmp_path):
    with pytest.raises(FileNotFoundError):
        cnnfast.load_weights(lite0, tmp_path / "nothing.pth")
    with pytest.raises(FileNotFoundError):
        cnnfast.load_weights(lite0, tmp_path / "nothing.safetensors")
