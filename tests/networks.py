"""What tests of modules and networks share: drawn batch normalisation, recording of ops, the networks' numerics."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cnnfast.exactness import draw_batch_norms, errors, in_float64, relative
from cnnfast.models.figures import figures
from cnnfast.models.registry import create_model, list_models, model_entry

__all__ = ["draw_batch_norms", "in_float64", "relative"]  # of the package, beside what is here


# What test_networks.py looks at in depth: of each family one or two; all others are in test_twins.py. Slow: those whose
# family or blocks another network has by default, and one of large layers.
QUICK = ("efficientnet_b0", "mobilenet_v2", "tf_efficientnet_lite0", "xception")
SLOW = ("mobilenet_v1", "se_resnet50", "tf_efficientnet_b0", "tf_efficientnet_b1", "tf_efficientnet_b2")


def networks_in_depth(*quick: str) -> list:
    """Of all these, by default `quick`."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in quick)) for name in (*QUICK, *SLOW)]


def family(name: str) -> str:
    """The module (file) of the network."""
    return model_entry(name).factory.__module__


def one_of_each_family() -> list[str]:
    """Of each family of networks the one that costs least, of those that timm or torchvision has if there are any."""
    families: dict[str, list[str]] = {}
    for name in list_models():
        families.setdefault(family(name), []).append(name)
    cost = lambda name: (not model_entry(name).peers, figures(name)["macs"])  # noqa: E731
    return sorted(min(names, key=cost) for names in families.values())


def without_weights(name: str, **options) -> nn.Module:
    """For weights that are loaded: to draw those that they replace would take longer than many a test."""
    with torch.device("meta"):
        network = create_model(name, **options)
    return network.to_empty(device="cpu")


class Recorder(TorchDispatchMode):
    """Names of the cnnfast ops that run inside the with block, in order, less packing and folding."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, _, name = function._schema.name.partition("::")
        if namespace == "cnnfast" and not name.startswith("pack_"):
            self.ops.append(name)
        return function(*args, **(kwargs or {}))


def ops_of(function: Callable, *args) -> list[str]:
    with Recorder() as recorder:
        function(*args)
    return recorder.ops


def stages_of(network: nn.Module, x: Tensor, taps: Sequence[str]) -> dict[str, Tensor]:
    """What one forward gives: the feature maps `taps` by name, the last map where the package returns it, the logits.
    Of a package without feature maps the outputs of its modules of the same names are taken."""
    if hasattr(network, "forward_intermediates"):
        last, maps = network.forward_intermediates(x)
        return {**dict(zip(taps, maps, strict=True)), "last map": last, "logits": network.forward_head(last)}
    stages: dict[str, Tensor] = {}
    with contextlib.ExitStack() as stack:
        for tap in taps:
            keep = lambda module, args, y, tap=tap: stages.update({tap: y})  # noqa: E731
            stack.callback(network.get_submodule(tap).register_forward_hook(keep).remove)
        logits = network(x)
    return {**stages, "logits": logits}


def assert_as_exact_as(ours: Tensor, theirs: Tensor, ref: Tensor) -> None:
    """The numerics policy for a network's output, as cnnfast.exactness.errors has it."""
    assert_as_exact_over([(ours, theirs, ref)])


def assert_as_exact_over(outputs: list[tuple[Tensor, Tensor, Tensor]], stage: str = "outputs") -> None:
    """The same for several inputs, by the geometric means of the errors over them."""
    for ours, theirs, ref in outputs:
        assert ours.dtype == theirs.dtype and ref.dtype == torch.float64 and ours.shape == theirs.shape == ref.shape
    for error in errors(outputs):
        assert error.allowed, f"{stage}: {error.measure} error of the channel at rank {error.rank}: {error}"


def assert_same_gradients(
    ours: nn.Module, theirs: nn.Module, tolerance: float, keys: Mapping[str, str] | None = None
) -> None:
    """Relative L2, parameter by parameter. Some are 0 but for rounding (of a bias before batch normalisation): what is
    less than 1e-4 of all gradients together counts as that. `keys`: the names of ours in theirs, where they differ."""
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    total = torch.stack([grad.norm() for grad in expected.values()]).norm().item()
    for name, parameter in ours.named_parameters():
        grad = expected[keys[name] if keys else name].reshape(parameter.shape)
        assert (parameter.grad - grad).norm().item() <= tolerance * max(grad.norm().item(), 1e-4 * total), name
