"""Fused kernels for convolutional networks in PyTorch."""

from cnnfast import _library as _library  # first: what is missing is said here
from cnnfast import models, nn, ops, reference
from cnnfast._version import __version__
from cnnfast.checkpoints import load_weights
from cnnfast.models import XceptionFused, create_model, list_models
from cnnfast.nn import repack
from cnnfast.ops import (
    can_run,
    conv2d,
    conv2d_packed,
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

__all__ = [
    "XceptionFused",
    "__version__",
    "can_run",
    "conv2d",
    "conv2d_packed",
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
    "separable_conv2d",
    "separable_conv2d_packed",
    "separable_conv2d_stats",
    "squeeze_excite",
    "squeeze_excite_packed",
]
