"""examples/finetune.py: that it learns classes of images, alone, in two processes and after kills; what it refuses."""

import random
import signal

import pytest
import torch
from example_process import run, torchrun
from networks import relative
from PIL import Image
from safetensors.torch import load_file

import cnnfast

SCRIPT = "finetune.py"
SHORT = ("--epochs", 1, "--batch", 3)  # two batches


@pytest.fixture
def folder(tmp_path):
    """Noise, more of it red or blue: classes that one look at the colour tells apart."""
    for name, colour in (("blue", (40, 40, 200)), ("red", (200, 40, 40))):
        (tmp_path / "images" / name).mkdir(parents=True)
        for n in range(5):
            noise = torch.randint(50, (30 + n, 40, 3)) + torch.tensor(colour)
            Image.fromarray(noise.to(torch.uint8).numpy()).save(tmp_path / "images" / name / f"{n}.png")
    return tmp_path / "images"


def state_of(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def test_learns_with_a_frozen_backbone(folder, tmp_path):
    """Only the new classifier has changed from the published weights; `cnnfast evaluate` agrees."""
    out = tmp_path / "out"
    arguments = (folder, "--freeze", "--epochs", 3, "--batch", 4, "--lr", 0.01, "--out", out)
    status, said, err = run(tmp_path, SCRIPT, *arguments)
    assert status == 0 and "test accuracy 100.00%" in said, err
    published = cnnfast.create_model("tf_efficientnet_lite0")
    cnnfast.load_weights(published, cnnfast.find_weights("tf_efficientnet_lite0"))
    tuned = cnnfast.create_model("tf_efficientnet_lite0", num_classes=2)
    cnnfast.load_weights(tuned, out / "weights.safetensors")
    state = tuned.state_dict()
    for key, value in published.state_dict().items():
        assert key.startswith("classifier") or torch.equal(state[key], value), key
    prepare = cnnfast.preprocessing_for("tf_efficientnet_lite0")
    with torch.no_grad():
        for target, name in enumerate(("blue", "red")):
            assert tuned.eval()(prepare.load(folder / name / "0.png")).argmax() == target


def test_a_kill_changes_nothing(folder, tmp_path):
    """With dropout, whose random numbers go on as they would have."""
    arguments = (folder, "--epochs", 1, "--batch", 2, "--save-every", 1)
    assert run(tmp_path, SCRIPT, *arguments, "--out", tmp_path / "whole")[0] == 0
    status, _, _ = run(tmp_path, SCRIPT, *arguments, "--out", tmp_path / "out", kill_at=random.randint(5, 8))
    assert status == -signal.SIGKILL
    status, _, err = run(tmp_path, SCRIPT, *arguments, "--out", tmp_path / "out")
    assert status == 0 and "going on after" in err
    assert state_of(tmp_path / "out")["losses"] == state_of(tmp_path / "whole")["losses"]
    states = [load_file(tmp_path / name / "weights.safetensors") for name in ("out", "whole")]
    assert all(torch.equal(states[0][key], value) for key, value in states[1].items())


@pytest.mark.parametrize("freeze", [pytest.param(True, marks=pytest.mark.slow), False])
def test_two_processes_have_the_losses_of_one(folder, tmp_path, freeze):
    """In float64, parts of one image and two."""
    arguments = (folder, *SHORT, "--drop-rate", 0, *["--freeze"] * freeze)
    assert run(tmp_path, SCRIPT, *arguments, "--out", tmp_path / "one", dtype="float64")[0] == 0
    job = torchrun(SCRIPT, *arguments, "--out", tmp_path / "two", dtype="float64")
    assert job.returncode == 0, job.stderr
    one, two = (state_of(tmp_path / name) for name in ("one", "two"))
    assert one["accuracies"] == two["accuracies"] and len(one["losses"]) == 2
    assert relative(*(torch.tensor(s["losses"], dtype=torch.float64) for s in (two, one))) <= 1e-9
    # AdamW divides a gradient by its size, where that is 1e-8 and more.
    assert relative(*(torch.cat([v.double().flatten() for v in s["model"].values()]) for s in (two, one))) <= 1e-7


def damaged(folder):
    file = folder / "red" / "2.png"
    file.write_bytes(file.read_bytes()[:200])
    return "2.png: damaged image"


def no_image(folder):
    (folder / "blue" / "3.png").write_text("blue")
    return "3.png: not an image"


def one_class(folder):
    (folder / "red").rename(folder.parent / "red")
    return "a folder for each of 2 classes or more, got 1"


def empty_class(folder):
    (folder / "green").mkdir()
    return "2 images or more, got 1 with fewer: green"


@pytest.mark.parametrize("fault", [damaged, no_image, one_class, empty_class])
def test_bad_data(folder, tmp_path, fault):
    says = fault(folder)
    status, out, err = run(tmp_path, SCRIPT, folder, "--batch", 8, "--freeze", "--out", tmp_path / "out")
    assert status == 2 and not out and says in err.splitlines()[-1], err


def test_other_images_are_refused(folder, tmp_path):
    arguments = (folder, *SHORT, "--freeze", "--out", tmp_path / "out")
    assert run(tmp_path, SCRIPT, *arguments)[0] == 0
    (folder / "red" / "1.png").rename(folder / "red" / "9.png")
    status, _, err = run(tmp_path, SCRIPT, *arguments)
    assert status == 2 and "checkpoint.pt must be of {'images'" in err
