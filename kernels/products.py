"""What kernels that multiply pixels x channels by a matrix share: which are a program's, and the product itself."""

import triton
import triton.language as tl

from .activation import activate, scaled
from .launch import cdiv, dense, fitting_power, memory_format, next_power_of_2, output_size, vector

SIZES = ["H", "W", "OW", "pixel_vectors", "c_vectors", "k_vectors"]  # one compiled kernel serves every size


@triton.constexpr_function
def sums_in(dtype):
    return tl.float64 if dtype == tl.float64 else tl.float32


@triton.jit
def locate(pixels, channels, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr):
    """This program's (tile of all images, image, pixel [BP], channel [BK])."""
    n_k = tl.cdiv(channels, BLOCK_K)
    n_p = tl.cdiv(pixels, BLOCK_P)
    i_tile = tl.program_id(0) // n_k
    o_p = i_tile % n_p * BLOCK_P + tl.arange(0, BLOCK_P)
    o_k = tl.program_id(0) % n_k * BLOCK_K + tl.arange(0, BLOCK_K)
    return i_tile, (i_tile // n_p).to(tl.int64), o_p, o_k


@triton.jit
def sampled(o_p, W, OW, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr):
    """The pixel of x that pixel o_p of y is made of."""
    if STRIDE_H * STRIDE_W == 1:
        return o_p
    else:
        return o_p // OW * STRIDE_H * W + o_p % OW * STRIDE_W


@triton.jit
def elements(i_n, o_p, o_c, pixels, channels, CHANNELS_LAST: tl.constexpr):
    """Offsets of an image's [pixel, channel]."""
    if CHANNELS_LAST:
        return i_n * pixels * channels + (o_p.to(tl.int64) * channels)[:, None] + o_c[None, :]
    else:
        return i_n * pixels * channels + o_p[:, None] + (o_c.to(tl.int64) * pixels)[None, :]


@triton.jit
def times_gate(b_x, gate, i_n, o_c, m_c, C):
    """x * gate, rounded once."""
    b_gate = tl.load(gate + i_n * C + o_c, m_c, 0.0)
    dtype: tl.constexpr = sums_in(b_x.dtype)
    return (b_x.to(dtype) * b_gate.to(dtype)[None, :]).to(b_x.dtype)


@triton.jit
def enter(b_x, b_scale, b_shift, PRE_ACTIVATION: tl.constexpr):
    """pre_activation(x * scale + shift), rounded once."""
    return activate(scaled(b_x.to(sums_in(b_x.dtype)), b_scale, b_shift), PRE_ACTIVATION).to(b_x.dtype)


@triton.jit
def multiply_add(a, b, acc, TENSOR_CORES: tl.constexpr):
    """acc + a b, on tensor cores in the dtype of a and b, else in acc's."""
    if TENSOR_CORES:
        return tl.dot(a, b, acc, input_precision="tf32", out_dtype=acc.dtype)
    else:
        return tl.dot(a.to(acc.dtype), b.to(acc.dtype), acc, input_precision="ieee", out_dtype=acc.dtype)


def side(size, most):
    """Of a tile of so many channels: one block if `most` allows it, tl.dot's 16 at least."""
    return max(next_power_of_2(size), 16) if size <= most else fitting_power(size, 64, most)


class Geometry:
    """Pixels as the kernels see them: images and pixels of each, and the constants that go with them."""

    def __init__(self, x, weight, gate, stride):
        self.x, channels_last = dense(x)
        self.format = memory_format(channels_last)
        N, _, H, W = self.x.shape
        OH, OW, _, _ = output_size((H, W), (1, 1), stride, (0, 0, 0, 0), (1, 1))
        self.y_shape, self.image = (N, weight.shape[0], OH, OW), OH * OW
        channels_last |= H * W == 1  # where both formats are one
        together = channels_last and stride[0] * stride[1] == 1 and gate is None
        self.images = 1 if together else N
        self.pixels = N * H * W if together else OH * OW
        v = 1 if channels_last else vector(self.pixels, x)
        self.sizes = (H, W, OW, self.pixels // v)
        self.constants = dict(
            PIXEL_VECTOR=v, STRIDE_H=stride[0], STRIDE_W=stride[1], CHANNELS_LAST=channels_last,
        )  # fmt: skip

    def tiles(self, blocks):
        return self.images * cdiv(self.pixels, blocks["BLOCK_P"])

    def channels(self, C, K):
        """The arguments that say how many channels there are."""
        c, k = vector(C, self.x), vector(K, self.x)
        return (C // c, K // k), dict(C_VECTOR=c, K_VECTOR=k)
