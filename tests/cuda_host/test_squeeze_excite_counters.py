"""The bytes, sectors and bank conflicts that the headers of csrc/cuda/squeeze_excite/*.cuh promise, counted.

Fails when a kernel loads more than its header says, loads something twice, or an access stops being coalesced or free
of bank conflicts.
"""

import pytest
import torch
from cuda_host import harness
from cuda_host.cases.squeeze_excite import case, run, tensors_of
from numerics import fresh_generator

pytestmark = harness.needs_toolkit
CHANNELS = {torch.bfloat16: 256, torch.float32: 128}  # 32 vectors: a warp is one pixel
SECTORS = 16  # of a request of 512 bytes


def size(tensor):
    return tensor.numel() * tensor.element_size()


def counted(host, case, dtype):
    """(tensors, {kernel: what was counted})."""
    tensors = tensors_of(case, dtype, fresh_generator())
    named = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    launches = host.count(lambda: run(host, case, tensors), **named)
    names = [launch["kernel"].removeprefix("squeeze_excite_").removesuffix("_kernel") for launch in launches]
    return tensors, dict(zip(names, launches, strict=True))


def assert_once(counts, tensor):
    """Every byte was asked for once, in whole sectors and by requests as wide as promised."""
    assert counts["bytes"] == counts["sectors"] * 32 == counts["unique_sectors"] * 32 == size(tensor)
    assert counts["most_sectors"] == SECTORS


@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
@pytest.mark.parametrize("dtype", CHANNELS, ids=str)
def test_images(host, dtype, layout):
    """Pixels that fill whole warps in both layouts; in NHWC chunks of 64."""
    promises, c = host.promises(), CHANNELS[dtype]
    assert {p.sectors_per_request for p in promises.values() if hasattr(p, "sectors_per_request")} == {SECTORS}
    tensors, launches = counted(host, case((2, c, 16, 32), 8, residual=True, layout=layout), dtype)
    suffix = "_nchw" if layout == "nchw" else ""
    pool, scale = launches[f"pool{suffix}"], launches[f"scale{suffix}"]
    assert_once(pool["counts"]["load x"], tensors["x"])
    chunks = 1 if suffix else 512 // 64
    partial = pool["counts"]["store unnamed"]
    assert partial["bytes"] == partial["unique_sectors"] * 32 == 2 * chunks * c * 4
    if layout == "channels_last":
        assert pool["grid"][:2] == [2 * chunks, 1] and pool["shared_bytes"] == 256 * 16 * (4 // dtype.itemsize)
        assert pool["counts"]["load shared"]["conflicts"] == pool["counts"]["store shared"]["conflicts"] == 0
        assert scale["counts"]["load unnamed"]["bytes"] * 8 * dtype.itemsize == size(tensors["x"]) * 4  # 8 pixels each
    for name in ("x", "residual"):
        assert_once(scale["counts"][f"load {name}"], tensors[name])
    assert_once(scale["counts"]["store unnamed"], tensors["x"])
    assert scale["shared_bytes"] == 0


def assert_weights(counts, name, tensor, times):
    weights = counts[f"load {name}"]
    assert weights["bytes"] == weights["sectors"] * 32 == weights["block_sectors"] * 32 == times * size(tensor)
    assert weights["most_sectors"] == SECTORS


@pytest.mark.parametrize("dtype", CHANNELS, ids=str)
def test_gates_in_one_launch(host, dtype):
    c = CHANNELS[dtype]
    tensors, launches = counted(host, case((3, c, 5, 5), 64), dtype)
    gate = launches["gate"]
    for name in ("reduce_weight", "expand_weight"):
        assert_weights(gate["counts"], name, tensors[name], times=3)
    assert gate["counts"]["load shared"]["conflicts"] == 0
    assert gate["shared_bytes"] == 4 * (c + 64)
    partial, gates = gate["counts"]["load unnamed"], gate["counts"]["store unnamed"]
    assert partial["bytes"] == partial["sectors"] * 32 == 3 * c * 4  # one chunk
    assert gates["bytes"] == gates["sectors"] * 32 == 3 * c * 4


@pytest.mark.parametrize("dtype", CHANNELS, ids=str)
def test_gates_in_two_launches(host, dtype):
    """5 images, so two groups of 4; 512 channels, so two slices."""
    tensors, launches = counted(host, case((5, 512, 3, 3), 128), dtype)
    reduce, expand = launches["reduce"], launches["expand"]
    assert reduce["grid"][:2] == expand["grid"][:2] == [2, 2]
    assert_weights(reduce["counts"], "reduce_weight", tensors["reduce_weight"], times=2)
    assert_weights(expand["counts"], "expand_weight", tensors["expand_weight"], times=2)
    hidden = 5 * 2 * 128 * 4
    assert reduce["counts"]["store unnamed"]["bytes"] == hidden
    assert reduce["counts"]["load unnamed"]["bytes"] == 5 * 512 * 4
    assert expand["counts"]["load unnamed"]["bytes"] == 2 * hidden
    assert (
        expand["counts"]["store unnamed"]["bytes"] == expand["counts"]["store unnamed"]["sectors"] * 32 == 5 * 512 * 4
    )
    assert reduce["shared_bytes"] == 4096 and expand["shared_bytes"] == 4096 + 16 * 128
    for launch in (reduce, expand):
        assert launch["counts"]["load shared"]["conflicts"] == 0


@pytest.mark.parametrize("squeezed", [1, 6, 10, 20, 28, 48])
def test_narrow_rows_of_weights(host, squeezed):
    """EfficientNet's: rows shorter than a warp's vectors; each sector is fetched once an image all the same."""
    tensors, launches = counted(host, case((1, 64, 3, 3), squeezed), torch.bfloat16)
    weights = launches["gate"]["counts"]["load expand_weight"]
    assert weights["bytes"] == size(tensors["expand_weight"])
    assert weights["block_sectors"] * 32 == -(-size(tensors["expand_weight"]) // 32) * 32
    assert launches["gate"]["counts"]["load shared"]["conflicts"] == 0
