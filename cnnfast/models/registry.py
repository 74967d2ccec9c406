"""The networks by name."""

from __future__ import annotations

import difflib
import fnmatch
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INCEPTION_MEAN = INCEPTION_STD = (0.5, 0.5, 0.5)
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CROP_MODES = ("center", "squash", "tensorflow")  # cnnfast.preprocess.Preprocessing's

_CFG: dict[str, Any] = dict(
    input_size=(3, 224, 224),
    crop_pct=0.875,
    crop_mode="center",
    interpolation="bicubic",
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    num_classes=1000,
    label_set="imagenet-1k",
    fixed_input_size=False,
)
Factory = TypeVar("Factory", bound=Callable[..., nn.Module])


@dataclass(frozen=True)
class Entry:
    """What is known of a name without building the network."""

    factory: Callable[..., nn.Module]
    paper: str  # address
    year: int | None
    peers: dict[str, str]  # package -> its name of the same network, of plain layers
    pretrained_cfg: dict[str, Any]


_MODELS: dict[str, Entry] = {}
_EXAMPLES = ("mobilenet_v2", "resnet50", "xception")  # for who asks for a name like none of them


def register_model(
    name: str,
    *,
    paper: str = "",
    year: int | None = None,
    timm: str | None = None,
    torchvision: str | None = None,
    **pretrained_cfg: Any,
) -> Callable[[Factory], Factory]:
    """Decorator: makes a function or class that returns a network known as `name`.

    Args:
        paper, year: where and when the network was published.
        timm, torchvision: the same network's name there, if they have it.
        pretrained_cfg: what of the input differs from input_size (3, 224, 224), crop_pct 0.875, crop_mode "center"
            ("squash", "tensorflow": see cnnfast.preprocess.Preprocessing), interpolation "bicubic", ImageNet's mean and
            std (of values 0 to 1), num_classes 1000, label_set "imagenet-1k", fixed_input_size False (True: the network
            takes no other size).
    """

    def register(factory: Factory) -> Factory:
        if name in _MODELS:
            raise ValueError(f"name must be new, got {name!r}, which is {_MODELS[name].factory.__qualname__}")
        unknown = pretrained_cfg.keys() - _CFG.keys()
        if unknown:
            raise ValueError(f"pretrained_cfg must be of {', '.join(_CFG)}, got {', '.join(sorted(unknown))}")
        peers = {package: theirs for package, theirs in (("timm", timm), ("torchvision", torchvision)) if theirs}
        _MODELS[name] = Entry(factory, paper, year, peers, {"architecture": name, **_CFG, **pretrained_cfg})
        return factory

    return register


def list_models(pattern: str = "*") -> list[str]:
    """Names of the networks, sorted; `pattern` may hold wildcards: list_models("*lite*")."""
    return fnmatch.filter(sorted(_MODELS), pattern)


def model_entry(name: str) -> Entry:
    """What is known of the network `name` without building it."""
    if name not in _MODELS:
        close = difflib.get_close_matches(str(name), _MODELS) or _EXAMPLES
        raise ValueError(f"name must be one of cnnfast.list_models(), such as {' or '.join(close)}, got {name!r}")
    return _MODELS[name]


def create_model(
    name: str, *, features_only: bool = False, out_indices: int | Sequence[int] | None = None, **options: Any
) -> nn.Module:
    """The network `name`, with fresh weights; see list_models. Weights come by cnnfast.load_weights.

    Args:
        features_only: the network without what follows its last feature map; forward returns the maps as a list.
            `feature_info` says of each its channels, its reduction (the input's pixels per pixel) and the layer.
        out_indices: with features_only, which maps: their indices, or how many of the last; None for all.
        options: go to the network: num_classes, in_chans, drop_rate, global_pool, device, dtype, and where it has them
            drop_path_rate, output_stride, aux_logits, ...

    Returns:
        A network with `pretrained_cfg`: the input that published weights of this name were trained for.

    Raises:
        ValueError: a name that list_models doesn't have, or an option that the network can't be built with.
        TypeError: an option that the network doesn't have.
    """
    entry = model_entry(name)
    if out_indices is not None and not features_only:
        raise ValueError(f"out_indices must be None without features_only, got {out_indices!r}")
    network = entry.factory(**options)
    if not isinstance(network, nn.Module):
        raise TypeError(f"name must be of a factory that makes a torch.nn.Module, got {name!r}, which made {network!r}")
    cfg = dict(entry.pretrained_cfg)
    cfg["classifier"] = getattr(network, "classifier_name", None)
    network.pretrained_cfg = cfg  # type: ignore[assignment]
    network.made_by = functools.partial(create_model, name, **options)  # type: ignore[assignment]
    if features_only:
        if not hasattr(network, "keep_features"):
            raise ValueError(f"features_only must be False for {name!r}, whose {type(network).__name__} has no maps")
        network.keep_features(out_indices)  # type: ignore[operator]
    return network
