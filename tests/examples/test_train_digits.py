"""examples/train_digits.py: what it reaches, that kills and several processes change nothing, what it refuses."""

import random
import signal
import time

import pytest
import torch
from example_process import run, start, torchrun
from networks import relative
from safetensors.torch import load_file

import cnnfast

SCRIPT = "train_digits.py"
SHORT = ("--epochs", 2, "--batch", 33)  # of `few`: three batches an epoch
MODELS = [pytest.param("lenet5"), pytest.param("mobilenet_v2", marks=pytest.mark.slow)]


def state_of(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_same_bits(a, b):
    """Of nested checkpoints."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_bits(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same_bits(one, other)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    else:
        assert a == b


@pytest.fixture
def few(tmp_path):
    """130 images, of which 104 to train on."""
    torch.save((torch.rand(130, 8, 8), torch.arange(130) // 3 % 10), tmp_path / "few.pt")
    return {"digits": str(tmp_path / "few.pt")}


@pytest.fixture
def trained(tmp_path):
    """What a run of `arguments` that nothing disturbs leaves."""

    def train(*arguments, **options):
        status, out, err = run(tmp_path, SCRIPT, *arguments, "--out", tmp_path / "whole", **options)
        assert status == 0 and "test accuracy" in out, err
        return tmp_path / "whole"

    return train


def test_what_it_leaves(trained, tmp_path):
    """The weights recognise as many digits as it says; the loss falls; a second call has nothing to do."""
    folder = trained("--epochs", 3, "--batch", 64)
    state = state_of(folder)
    assert len(state["losses"]) == 3 * (1437 // 64) and len(state["accuracies"]) == 3
    assert state["losses"][-1] < 0.7 * state["losses"][0] and state["accuracies"][-1] > 0.6
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    model = cnnfast.create_model("lenet5", output="linear")
    cnnfast.load_weights(model, folder / "weights.safetensors")
    assert_same_bits(dict(model.state_dict()), dict(state["model"]))
    status, out, err = run(tmp_path, SCRIPT, "--epochs", 3, "--batch", 64, "--out", folder)
    assert status == 0 and f"test accuracy {state['accuracies'][-1]:.2%}" in out and "going on after 66 of 66" in err
    assert_same_bits(state_of(folder), state)


@pytest.mark.parametrize("model", MODELS)
def test_kills_change_nothing(trained, tmp_path, few, model):
    """Killed in the middle of a file that it writes, before and after that takes its place, and in training: it goes on
    from the last checkpoint and ends with the same bits."""
    arguments = ("--model", model, *SHORT, "--save-every", 2)
    whole, out = trained(*arguments, **few), tmp_path / "out"
    progress = []
    for moment in (random.randint(1, 3), 4, 5, 2, random.randint(4, 9)):  # of 6 + 3 * 4: passes, files
        status, _, err = run(tmp_path, SCRIPT, *arguments, "--out", out, kill_at=moment, **few)
        progress += [line for line in err.splitlines() if line.startswith("going on")]
        assert status == -signal.SIGKILL
    status, _, err = run(tmp_path, SCRIPT, *arguments, "--out", out, **few)
    assert status == 0 and "going on" in err and len(progress) >= 2, err
    assert_same_bits(state_of(out), state_of(whole))
    assert_same_bits(load_file(out / "weights.safetensors"), load_file(whole / "weights.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["lenet5", "mobilenet_v2"])
def test_kills_at_any_time_change_nothing(trained, tmp_path, model):
    """By the clock, wherever that finds it, until it is done."""
    arguments = ("--model", model, "--epochs", 3, "--batch", 64, "--save-every", 3)
    before = time.monotonic()
    whole, out = trained(*arguments), tmp_path / "out"
    seconds, kills = time.monotonic() - before, 0
    for _ in range(100):
        process = start(tmp_path, SCRIPT, *arguments, "--out", out)
        process.join(seconds * random.uniform(0.2, 0.8))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        kills += 1
    assert process.exitcode == 0 and kills
    assert_same_bits(state_of(out), state_of(whole))


def test_two_processes_have_the_losses_of_one(trained, tmp_path, few):
    """In float64, with synchronised batch normalisation, parts of unequal sizes (16 and 17); killed and resumed."""
    arguments = ("--model", "mobilenet_v2", *SHORT, "--save-every", 2)
    expected, out = state_of(trained(*arguments, dtype="float64", **few)), tmp_path / "out"
    killed = torchrun(SCRIPT, *arguments, "--out", out, dtype="float64", kill_at=6, **few)
    assert killed.returncode != 0 and len(state_of(out)["losses"]) == 2, killed.stderr
    job = torchrun(SCRIPT, *arguments, "--out", out, dtype="float64", **few)
    assert job.returncode == 0 and job.stdout.count("test accuracy") == 1, job.stderr
    got = state_of(out)
    assert got["settings"]["processes"] == 2 and got["accuracies"] == expected["accuracies"]
    assert relative(*(torch.tensor(s["losses"], dtype=torch.float64) for s in (got, expected))) <= 1e-9
    assert relative(*(torch.cat([v.double().flatten() for v in s["model"].values()]) for s in (got, expected))) <= 1e-9


def test_a_process_that_dies_ends_the_job(tmp_path, few):
    """Instead of leaving the others waiting for it: torchrun returns (else TimeoutExpired), and says which."""
    job = torchrun(SCRIPT, *SHORT, "--out", tmp_path, kill_at=3, rank=1, **few)
    assert job.returncode != 0 and "SIGKILL" in job.stderr and "test accuracy" not in job.stdout


def bad_digits():
    images, classes = torch.rand(50, 8, 8), torch.arange(50) % 10
    return {
        "finite": (images.index_fill(0, torch.tensor([3]), torch.nan), classes, "must be finite, got 64 values"),
        "classes": (images, classes.clamp(max=8), "all of 0 to 9, got [0, 1, 2, 3, 4, 5, 6, 7, 8]"),
        "shape": (images, classes[1:], "got (50, 8, 8) and (49,)"),
        "constant": (torch.ones(50, 8, 8), classes, "must differ, got 1.0 everywhere"),
    }


@pytest.mark.parametrize("fault", bad_digits())
def test_bad_data(tmp_path, fault):
    images, classes, says = bad_digits()[fault]
    torch.save((images, classes), tmp_path / "digits.pt")
    status, out, err = run(tmp_path, SCRIPT, "--out", tmp_path, digits=str(tmp_path / "digits.pt"))
    assert status == 2 and not out and says in err and len(err.splitlines()) == 1


def test_refusals(trained, tmp_path, few):
    folder = trained(*SHORT, **few)
    before = state_of(folder)
    for arguments, says in (
        ((*SHORT, "--lr", 0.1), "must be of {'lr': 0.1}, got {'lr': 0.005} (--restart replaces it)"),
        ((*SHORT, "--device", "gpu"), "--device gpu: "),
        (("--batch", 105), "--batch must be 1 (processes) to 104 (training images), got 105"),
        ((*SHORT, "--restart", "--lr", 1e30), "loss must be finite"),
    ):
        status, _, err = run(tmp_path, SCRIPT, *arguments, "--out", folder, **few)
        assert status == 2 and says in err, err
        assert_same_bits(state_of(folder), before)
    (folder / "checkpoint.pt").write_bytes((folder / "checkpoint.pt").read_bytes()[:-1000])
    status, _, err = run(tmp_path, SCRIPT, *SHORT, "--out", folder, **few)
    assert status == 2 and "is no checkpoint (--restart replaces it)" in err


@pytest.mark.slow
@pytest.mark.parametrize("model", ["lenet5", "mobilenet_v2"])
def test_accuracy(trained, model):
    """At its defaults."""
    assert state_of(trained("--model", model))["accuracies"][-1] >= 0.98
