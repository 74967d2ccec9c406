"""Modules made of cnnfast's ops: one fused call in eval mode with grad disabled, in training a few that take batch
normalisation in."""

from cnnfast.nn.conv2d import ConvBN
from cnnfast.nn.depthwise_conv2d import DepthwiseConv2d
from cnnfast.nn.fused import FusedModule, repack, set_backend
from cnnfast.nn.inverted_residual import InvertedResidual
from cnnfast.nn.layers import Conv2dSame, DropPath, GlobalPool, PointwiseConv2d
from cnnfast.nn.local_response_norm import LocalResponseNorm
from cnnfast.nn.pointwise_conv2d import PointwiseConvBN
from cnnfast.nn.separable_conv2d import SeparableConv2d
from cnnfast.nn.sequential import FusedSequential
from cnnfast.nn.squeeze_excite import SqueezeExcite
from cnnfast.nn.sync_batch_norm import SyncBatchNorm2d, convert_sync_batchnorm

__all__ = [
    "Conv2dSame",
    "ConvBN",
    "DepthwiseConv2d",
    "DropPath",
    "FusedModule",
    "FusedSequential",
    "GlobalPool",
    "InvertedResidual",
    "LocalResponseNorm",
    "PointwiseConv2d",
    "PointwiseConvBN",
    "SeparableConv2d",
    "SqueezeExcite",
    "SyncBatchNorm2d",
    "convert_sync_batchnorm",
    "repack",
    "set_backend",
]
