"""Fused kernels for convolutional networks in PyTorch."""

from typing import TYPE_CHECKING, Any

from cnnfast import _library as _library  # first: what is missing is said here
from cnnfast import models, nn, ops, reference
from cnnfast._version import __version__
from cnnfast.checkpoints import load_weights, save_weights
from cnnfast.models import XceptionFused, create_model, list_models
from cnnfast.nn import repack
from cnnfast.ops import (
    can_run,
    conv2d,
    conv2d_packed,
    conv2d_stats,
    depthwise_conv2d,
    depthwise_conv2d_packed,
    depthwise_conv2d_squeeze,
    depthwise_conv2d_squeeze_packed,
    depthwise_conv2d_stats,
    inverted_residual,
    inverted_residual_packed,
    local_response_norm,
    pack_conv2d,
    pack_depthwise_conv2d,
    pack_inverted_residual,
    pack_pointwise_conv2d,
    pack_separable_conv2d,
    pack_squeeze_excite,
    pointwise_conv2d,
    pointwise_conv2d_packed,
    pointwise_conv2d_stats,
    separable_conv2d,
    separable_conv2d_packed,
    separable_conv2d_stats,
    squeeze_excite,
    squeeze_excite_packed,
)
from cnnfast.preprocess import preprocessing_for
from cnnfast.pretrained import find_weights, imagenet_labels

if TYPE_CHECKING:
    from cnnfast.transforms import transforms_for as transforms_for

__all__ = [
    "XceptionFused",
    "__version__",
    "can_run",
    "conv2d",
    "conv2d_packed",
    "conv2d_stats",
    "create_model",
    "depthwise_conv2d",
    "depthwise_conv2d_packed",
    "depthwise_conv2d_squeeze",
    "depthwise_conv2d_squeeze_packed",
    "depthwise_conv2d_stats",
    "find_weights",
    "imagenet_labels",
    "inverted_residual",
    "inverted_residual_packed",
    "list_models",
    "load_weights",
    "local_response_norm",
    "models",
    "nn",
    "ops",
    "pack_conv2d",
    "pack_depthwise_conv2d",
    "pack_inverted_residual",
    "pack_pointwise_conv2d",
    "pack_separable_conv2d",
    "pack_squeeze_excite",
    "pointwise_conv2d",
    "pointwise_conv2d_packed",
    "pointwise_conv2d_stats",
    "preprocessing_for",
    "reference",
    "repack",
    "save_weights",
    "separable_conv2d",
    "separable_conv2d_packed",
    "separable_conv2d_stats",
    "squeeze_excite",
    "squeeze_excite_packed",
]


def __getattr__(name: str) -> Any:
    if name == "transforms_for":  # needs torchvision, which nothing else here does; so it is not in __all__
        from cnnfast.transforms import transforms_for

        return transforms_for
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
