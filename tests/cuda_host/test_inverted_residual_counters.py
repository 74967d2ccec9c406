"""The bytes, sectors and bank conflicts that the headers of csrc/cuda/inverted_residual/*.cuh promise, counted.

Fails when a kernel loads more than its header says, the expanded tensor gets into global memory, or an access stops
being coalesced or free of bank conflicts.
"""

import pytest
import torch
from cuda_host import harness
from cuda_host.cases.inverted_residual import case, draw_case, run

pytestmark = [harness.needs_toolkit, pytest.mark.usefixtures("forward_order")]
TYPES = [(torch.bfloat16, False), (torch.float32, False), (torch.float32, True)]
BLOCKS, CHUNKS = 4, 2  # of the problems here: 16 x 16 outputs, 128 bytes of expanded channels


def size(tensor):
    return tensor.numel() * tensor.element_size()


def whole(counts, name, bytes_, times=1):
    """All of a tensor was asked for so many times, by whole sectors."""
    assert counts[name]["bytes"] == times * bytes_
    assert counts[name]["unique_sectors"] * 32 == bytes_
    assert counts[name]["sectors"] * 32 == counts[name]["bytes"]


def count(host, k, s, dtype, tf32, **more):
    """(the case, its first launch's counts): no padding, so that every load is made, and whole tiles and chunks."""
    inputs = 15 * s + k
    row = dict(n=1, bias=False) | more
    drawn = draw_case(case(128 // dtype.itemsize, 128 // dtype.itemsize, 64, (inputs, inputs), k, s, p=0, **row), dtype)
    launch = host.count(lambda: run(host, drawn, tf32), **drawn.tensors)[0]
    assert launch["grid"] == [BLOCKS, 1]
    return drawn, launch["counts"]


def check_inputs(drawn, counts, k, s):
    tensors = drawn.tensors
    halo = (7 * s + k) ** 2 * tensors["x"].shape[1] * tensors["x"].element_size()
    assert counts["load x"]["bytes"] == BLOCKS * halo
    assert counts["load x"]["unique_sectors"] * 32 == size(tensors["x"])
    assert counts["load x"]["sectors"] * 32 == counts["load x"]["bytes"]
    assert counts["load x"]["requests"] == BLOCKS * -(-halo // 512) and counts["load x"]["most_sectors"] == 16
    whole(counts, "load expand_weight", size(tensors["expand_weight"]), BLOCKS)
    whole(counts, "load dw_weight", size(tensors["dw_weight"]), BLOCKS)


def check_conflicts(counts, k, s, dtype):
    """In float32 e's stores, of 8 bytes a lane: 8 of 16 pixels x 16 channels in two passes instead of one."""
    of_e = BLOCKS * CHUNKS * -(-((7 * s + k) ** 2) // 16) * 8
    assert counts["load shared"]["conflicts"] == 0
    assert counts["store shared"]["conflicts"] == (of_e if dtype is torch.float32 else 0)


@pytest.mark.parametrize(("dtype", "tf32"), TYPES, ids=str)
@pytest.mark.parametrize(("k", "s"), [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_fused(host, k, s, dtype, tf32):
    drawn, counts = count(host, k, s, dtype, tf32)
    wanted = ("x", "expand_weight", "dw_weight", "project_weight", "residual")
    assert set(counts) == {*(f"load {name}" for name in wanted), "load shared", "store shared", "store unnamed"}
    check_inputs(drawn, counts, k, s)
    whole(counts, "load project_weight", size(drawn.tensors["project_weight"]), BLOCKS)
    whole(counts, "load residual", size(drawn.tensors["residual"]))
    whole(counts, "store unnamed", size(drawn.tensors["residual"]))
    assert counts["load residual"]["most_sectors"] == counts["store unnamed"]["most_sectors"] == 16
    check_conflicts(counts, k, s, dtype)


@pytest.mark.parametrize(("dtype", "tf32"), TYPES, ids=str)
@pytest.mark.parametrize(("k", "s"), [(3, 1), (5, 2)])
def test_squeeze(host, k, s, dtype, tf32):
    drawn, counts = count(host, k, s, dtype, tf32, excite=True)
    wanted = ("x", "expand_weight", "dw_weight")
    assert set(counts) == {*(f"load {name}" for name in wanted), "load shared", "store shared", "store unnamed"}
    check_inputs(drawn, counts, k, s)
    expanded = drawn.tensors["dw_weight"].shape[0]
    whole(counts, "store unnamed", 256 * expanded * dtype.itemsize + BLOCKS * expanded * 4)  # d and its sums
    check_conflicts(counts, k, s, dtype)


def test_weights_are_loaded_once_for_a_tile_without_expansion(host):
    drawn = draw_case(case(64, None, 64, (16, 16), bias=False, n=1), torch.bfloat16)
    [launch] = host.count(lambda: run(host, drawn), **drawn.tensors)
    counts = launch["counts"]
    assert counts["load x"]["bytes"] == BLOCKS * 9 * 9 * 128  # the halo less the padding
    whole(counts, "load project_weight", size(drawn.tensors["project_weight"]), BLOCKS)


def test_shared_memory(host):
    drawn = draw_case(case(24, 144, 24, (56, 56), n=1), torch.bfloat16)
    host.c.host_only_block_from_end(0)  # of 49, which the launch has all the same
    try:
        [launch] = host.count(lambda: run(host, drawn))
    finally:
        host.c.host_only_block_from_end(-1)
    assert launch["shared_bytes"] == 30_784 and launch["grid"] == [49, 1]
