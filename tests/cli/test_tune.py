"""`cnnfast tune` as far as it goes without a GPU; tests/triton/interpreted/test_tuning.py has what it does with one.

Fails if a machine without a GPU gets more than one sentence, an unknown name ends in a traceback, or `--clear` leaves
a file or takes one that isn't tune's.
"""

import pytest
import torch

from cnnfast import info
from cnnfast.cli import tune
from cnnfast.cli.main import build_parser, main

tuned = pytest.importorskip("cnnfast.kernels.tuned", reason="triton is not installed")
GPU = dict(device="GPU 1", capability="9.0", torch="2", triton="3", kernels="0")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU that answers questions, and runs nothing."""
    monkeypatch.setenv("CNNFAST_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "GPU 1")
    monkeypatch.setattr(tuned, "_entries", {})
    monkeypatch.setattr(tuned, "identity", lambda device: GPU if device.type == "cuda" else None)
    monkeypatch.setattr(tune, "parse_device", torch.device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    assert main(["tune", "mobilenet_v2"]) == 2
    assert capsys.readouterr().err == "cnnfast tune: error: torch sees no CUDA device to tune for\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--op", "conv3d"], "no op conv3d to tune; there are depthwise_conv2d"),
        (["lenet"], "no network lenet; there are alexnet"),
        (["--device", "cpu"], "--device is cpu: want a GPU, such as cuda or cuda:1"),
    ],
)
def test_what_cannot_be_tuned(arguments, said, gpu, capsys):
    assert main(["tune", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cnnfast tune: error: ") and said in line


def test_an_op_without_triton_kernels(gpu, capsys, monkeypatch):
    monkeypatch.setattr("cnnfast.ops.can_run", lambda op, backend, device: ["nobody wrote it"])
    assert main(["tune", "--op", "squeeze_excite"]) == 2
    assert "--op squeeze_excite: nobody wrote it" in capsys.readouterr().err


def test_the_calls(monkeypatch):
    """Of every op with Triton kernels, forward or with gradients; of a network; run here by the CPU's kernels."""
    monkeypatch.setattr("cnnfast.ops.can_run", lambda op, backend, device: [])
    cpu, parse = torch.device("cpu"), build_parser().parse_args
    for train in ([], ["--train"]):
        args = parse(["tune", "--op", "pointwise_conv2d", "--batch", "2", "--dtype", "float32", *train])
        works = dict(tune.op_works(args, cpu))
        assert all(name.startswith("pointwise_conv2d ") for name in works) and len(works) == 5
        monkeypatch.setattr(
            "cnnfast.bench.conv_ops.ConvCase.op", lambda case, plain, backend: plain if backend == "triton" else 0
        )
        y, *gradients = works["pointwise_conv2d 576-96 @14 (mobilenetv2)"]()()
        assert y.shape == (2, 96, 14, 14) and len(gradients) == (3 if train else 0)
        args = parse(["tune", "mobilenet_v2", "--size", "32", "--batch", "2", "--dtype", "float32", *train])
        ((name, work),) = tune.network_works(args, cpu)
        (logits,) = work()()
        assert name == "mobilenet_v2" and logits.shape == (2, 1000)


def test_clear(gpu, tmp_path, capsys):
    (tmp_path / "mine.json").touch()
    tuned.keep(torch.device("cuda"), {("kernel", ("C", 1)): {"num_warps": 4}})
    file = tuned.path(GPU)
    assert main(["tune", "--clear"]) == 0 and capsys.readouterr().err == f"removed: {file}\n"
    assert [*tmp_path.iterdir()] == [tmp_path / "mine.json"]
    assert main(["tune", "--clear"]) == 0 and capsys.readouterr().err == "nothing was kept\n"


def test_info(gpu):
    assert info.tuned_facts() == [{"entries": 0, "file": str(tuned.path(GPU))}]
    tuned.keep(torch.device("cuda", 0), {("kernel", ("C", 1)): {"num_warps": 4}})
    assert info.tuned_facts() == [{"entries": 1, "file": str(tuned.path(GPU))}]
    assert "1 of the Triton kernels' configurations" in info.render()


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["tune", "--help"])
    assert "cnnfast tune mobilenet_v2 --train" in " ".join(capsys.readouterr().out.split())
