"""Fused kernels for convolutional networks in PyTorch."""

from cnnfast import _library as _library  # first: what is missing is said here
from cnnfast import ops, reference
from cnnfast._version import __version__
from cnnfast.ops import (
    can_run,
    depthwise_conv2d,
    depthwise_conv2d_packed,
    inverted_residual,
    inverted_residual_packed,
    pack_depthwise_conv2d,
    pack_inverted_residual,
    pack_pointwise_conv2d,
    pack_separable_conv2d,
    pointwise_conv2d,
    pointwise_conv2d_packed,
    separable_conv2d,
    separable_conv2d_packed,
)
from cnnfast.preprocess import preprocessing_for
from cnnfast.pretrained import find_weights, imagenet_labels

__all__ = [
    "__version__",
    "can_run",
    "depthwise_conv2d",
    "depthwise_conv2d_packed",
    "find_weights",
    "imagenet_labels",
    "inverted_residual",
    "inverted_residual_packed",
    "ops",
    "pack_depthwise_conv2d",
    "pack_inverted_residual",
    "pack_pointwise_conv2d",
    "pack_separable_conv2d",
    "pointwise_conv2d",
    "pointwise_conv2d_packed",
    "preprocessing_for",
    "reference",
    "separable_conv2d",
    "separable_conv2d_packed",
]
