"""The oracle: each op in a few lines of plain torch, with the signature of the public function less `backend`.

Differentiable, runs on any device and in any dtype that torch's own layers take; what every kernel is compared with.
"""

from cnnfast.reference.conv2d import conv2d
from cnnfast.reference.depthwise_conv2d import depthwise_conv2d, depthwise_conv2d_squeeze
from cnnfast.reference.inverted_residual import inverted_residual
from cnnfast.reference.local_response_norm import local_response_norm
from cnnfast.reference.pointwise_conv2d import pointwise_conv2d
from cnnfast.reference.scale_shift import (
    batch_norm_scale_shift,
    scale_shift,
    scale_shift_excite,
    scale_shift_max_pool,
)
from cnnfast.reference.separable_conv2d import separable_conv2d
from cnnfast.reference.squeeze_excite import squeeze_excite
from cnnfast.reference.stats import conv2d_stats, depthwise_conv2d_stats, pointwise_conv2d_stats, separable_conv2d_stats

__all__ = [
    "batch_norm_scale_shift",
    "conv2d",
    "conv2d_stats",
    "depthwise_conv2d",
    "depthwise_conv2d_squeeze",
    "depthwise_conv2d_stats",
    "inverted_residual",
    "local_response_norm",
    "pointwise_conv2d",
    "pointwise_conv2d_stats",
    "scale_shift",
    "scale_shift_excite",
    "scale_shift_max_pool",
    "separable_conv2d",
    "separable_conv2d_stats",
    "squeeze_excite",
]
