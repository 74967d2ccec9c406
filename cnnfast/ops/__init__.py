"""The public ops: plain (differentiable) and packed (inference) forms; docs/backends: cnnfast.ops.backends."""

from cnnfast.ops.backends import can_run
from cnnfast.ops.batch_norm import batch_norm_scale_shift
from cnnfast.ops.conv2d import conv2d, conv2d_packed, pack_conv2d
from cnnfast.ops.depthwise_conv2d import (
    depthwise_conv2d,
    depthwise_conv2d_packed,
    depthwise_conv2d_squeeze,
    depthwise_conv2d_squeeze_packed,
    pack_depthwise_conv2d,
)
from cnnfast.ops.inverted_residual import inverted_residual, inverted_residual_packed, pack_inverted_residual
from cnnfast.ops.local_response_norm import local_response_norm
from cnnfast.ops.pointwise_conv2d import pack_pointwise_conv2d, pointwise_conv2d, pointwise_conv2d_packed
from cnnfast.ops.scale_shift import scale_shift, scale_shift_excite
from cnnfast.ops.scale_shift_max_pool import scale_shift_max_pool
from cnnfast.ops.separable_conv2d import pack_separable_conv2d, separable_conv2d, separable_conv2d_packed
from cnnfast.ops.squeeze_excite import pack_squeeze_excite, squeeze_excite, squeeze_excite_packed
from cnnfast.ops.stats import conv2d_stats, depthwise_conv2d_stats, pointwise_conv2d_stats, separable_conv2d_stats

__all__ = [
    "batch_norm_scale_shift",
    "can_run",
    "conv2d",
    "conv2d_packed",
    "conv2d_stats",
    "depthwise_conv2d",
    "depthwise_conv2d_packed",
    "depthwise_conv2d_squeeze",
    "depthwise_conv2d_squeeze_packed",
    "depthwise_conv2d_stats",
    "inverted_residual",
    "inverted_residual_packed",
    "local_response_norm",
    "pack_conv2d",
    "pack_depthwise_conv2d",
    "pack_inverted_residual",
    "pack_pointwise_conv2d",
    "pack_separable_conv2d",
    "pack_squeeze_excite",
    "pointwise_conv2d",
    "pointwise_conv2d_packed",
    "pointwise_conv2d_stats",
    "scale_shift",
    "scale_shift_excite",
    "scale_shift_max_pool",
    "separable_conv2d",
    "separable_conv2d_packed",
    "separable_conv2d_stats",
    "squeeze_excite",
    "squeeze_excite_packed",
]
