"""inverted_residual with squeeze-excite in one launch, on thread-block clusters, run on host threads.

Fails when its bits are not those of several launches, or these are wrong; when the choice between them doesn't follow
the shape, the device and the batch; when d is in memory, or x is read more often than a cluster has blocks; or when the
order of the threads shows.
"""

import contextlib

import pytest
import torch
from cuda_host import harness
from cuda_host.cases.inverted_residual import DTYPES, case, draw_case, run
from numerics import channels_last

pytestmark = [harness.needs_toolkit, pytest.mark.usefixtures("nan_outputs", "forward_order")]
NAME = "inverted_residual_one_pass_kernel"
KINDS = {name: (dtype, False) for name, dtype in DTYPES.items()} | {"tf32": (torch.float32, True)}
kinds = pytest.mark.parametrize(("dtype", "tf32"), KINDS.values(), ids=KINDS)


def excited(*args, **more):
    return case(*args, **{"activation": "silu", "excite": True} | more)


# All channels but x's are whole vectors, as the projection on tensor cores wants them.
CASES = [
    excited(24, 144, 40, (14, 10), k=5, s=2),
    excited(16, 48, 24, (6, 1), bias=False),
    excited(8, None, 16, (7, 5), activation="relu6"),
]
SLOW = [
    excited(16, 96, 24, (14, 13), s=2),
    excited(24, 144, 24, (9, 17)),  # several tiles, with strips beyond the last column
    excited(16, 32, 16, (1, 1)),  # fewer chunks than blocks
    excited(16, 264, 40, (7, 7), k=5, n=3),  # whose hidden values are sums of parts
    excited(16, 384, 200, (17, 13), s=2, n=1),  # more blocks of output channels than blocks
    excited(7, 104, 72, (11, 13), k=5, s=2),
    excited(16, None, 72, (11, 19), k=5),
    excited(16, None, 24, (5, 6), s=2, p=(0, 1, 0, 1)),
    excited(16, 40, 200, (9, 9), p=(2, 0, 1, 3), activation="gelu"),
    excited(16, 40, 16, (2, 3), s=2, p=(3, 2, 2, 1)),  # tiles of padding alone
    excited(24, 40, 24, (7, 6), layout="nchw", residual=False),
    excited(300, 64, 16, (6, 6), k=5, n=1),  # smaller tiles
]
# EfficientNet-B0's, with the squeezed channels, and the shared memory that one_pass.cuh promises of bfloat16.
NETWORKS = [
    (excited(112, 672, 112, (14, 14), k=5, n=1), 28, 151_744),
    (excited(192, 1152, 192, (7, 7), k=5, n=1), 48, 90_992),
    (excited(40, 240, 40, (28, 28), k=5, n=1), 10, 232_368),
]


@contextlib.contextmanager
def device(host, clusters=True, multiprocessors=132):
    host.c.host_set_clusters(clusters)
    host.c.host_set_multiprocessors(multiprocessors)
    try:
        yield
    finally:
        host.c.host_set_clusters(False)
        host.c.host_set_multiprocessors(132)


def in_one_pass(host, drawn, tf32=False, **changes):
    host.kernels_run()
    with device(host):
        y = run(host, drawn, tf32, **changes)
    assert host.kernels_run() == [NAME]
    return y


def in_several(host, drawn, tf32=False, **changes):
    host.kernels_run()
    with device(host, clusters=False):
        y = run(host, drawn, tf32, **changes)
    assert len(host.kernels_run()) >= 3
    return y


def check(host, row, dtype, tf32):
    """Both ways' bits; the reference's result where float32 isn't rounded to TF32."""
    drawn = draw_case(row, dtype)
    y = in_one_pass(host, drawn, tf32)
    assert y.equal(in_several(host, drawn, tf32))
    if not tf32:
        drawn.check(y, rounded=4)  # e, d, the gates and d times these
    assert y.stride() == drawn.run(backend="cpu").stride()


@pytest.mark.proof("host-run", kernel=NAME)
@kinds
@pytest.mark.parametrize("row", CASES, ids=str)
def test_bits_of_several_launches(host, row, dtype, tf32):
    check(host, row, dtype, tf32)


@pytest.mark.slow
@kinds
@pytest.mark.parametrize("row", SLOW, ids=str)
def test_bits_of_several_launches_of_odd_shapes(host, row, dtype, tf32):
    check(host, row, dtype, tf32)


@pytest.mark.slow
@pytest.mark.parametrize(("row", "squeezed", "shared_bytes"), NETWORKS, ids=str)
def test_networks(host, row, squeezed, shared_bytes):
    drawn = draw_case(row, torch.bfloat16)
    for name in ("se_reduce_weight", "se_reduce_bias"):
        drawn.tensors[name] = drawn.tensors[name][:squeezed].contiguous()
    drawn.tensors["se_expand_weight"] = drawn.tensors["se_expand_weight"][:, :squeezed].contiguous()
    with device(host):
        host.kernels_run()
        [launch] = host.count(lambda: run(host, drawn))
        y = run(host, drawn)
    assert launch["kernel"] == NAME and launch["shared_bytes"] == shared_bytes and launch["grid"][0] == 8
    assert y.equal(in_several(host, drawn))
    drawn.check(y, rounded=4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("row", [*CASES, SLOW[1], SLOW[3]], ids=str)
def test_order_of_threads_does_not_show(host, row, dtype):
    drawn = draw_case(row, dtype)
    wanted = in_one_pass(host, drawn)
    for order in (harness.REVERSE, harness.WARPS):
        host.order(order)
        assert in_one_pass(host, drawn).equal(wanted)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_nan_and_inf(host, activation):
    drawn = draw_case(excited(8, 16, 8, (7, 9), activation=activation), torch.float32, decades=0.0)
    for value, at in ((torch.nan, (0, 1, 2, 3)), (torch.inf, (1, 2, 6, 3))):
        drawn.tensors["x"][at] = value
    y, wanted = in_one_pass(host, drawn), in_several(host, drawn)
    assert y[0].isnan().any()
    assert y.isnan().equal(wanted.isnan()) and y.nan_to_num().equal(wanted.nan_to_num())


def test_batch_chooses_and_an_image_does_not_depend_on_it(host):
    drawn = draw_case(CASES[0], torch.bfloat16, n=3)  # 5 chunks: 4 blocks an image
    for multiprocessors, one_pass in ((5, False), (6, True)):  # two blocks each
        with device(host, multiprocessors=multiprocessors):
            host.kernels_run()
            together = run(host, drawn)
            assert (host.kernels_run() == [NAME]) == one_pass
        alone = {
            name: channels_last(drawn.tensors[name][2:3].clone()) for name in ("x", "residual") if name in drawn.tensors
        }
        assert in_one_pass(host, drawn, **alone).equal(together[2:3])


@pytest.mark.parametrize(
    "row",
    [
        excited(8, 16, 8, (5, 5), k=7),
        excited(8, 16, 8, (5, 5), k=(3, 5)),
        excited(8, 16, 8, (5, 5), s=3, p=1),
        excited(8, 16, 8, (7, 7), dilation=2),
        excited(8, 20, 8, (5, 5)),
        excited(8, 16, 12, (5, 5)),
        excited(8, 16, 8, (90, 60), n=1),  # shared memory
    ],
    ids=str,
)
def test_what_takes_several_launches(host, row):
    drawn = draw_case(row, torch.bfloat16)
    with device(host):
        host.kernels_run()
        run(host, drawn)
        assert NAME not in host.kernels_run()


@pytest.mark.slow
def test_misaligned_tensors(host):
    """Those that the projection on tensor cores doesn't take go to several launches."""
    drawn = draw_case(CASES[0], torch.float32)
    for name, tensor in drawn.tensors.items():
        shifted = torch.empty(tensor.numel() + 1)[1:].as_strided(tensor.shape, tensor.stride()).copy_(tensor)
        with device(host):
            host.kernels_run()
            y = run(host, drawn, **{name: shifted})
            one_pass = host.kernels_run() == [NAME]
        assert one_pass == (name not in ("project_weight", "project_bias", "residual")), name
        assert y.equal(in_several(host, drawn, **{name: shifted})), name


def size(*tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize(
    ("dtype", "of_y", "of_e"),
    [(torch.bfloat16, 192, 0), (torch.float32, 128, 640)],  # conflicts: y's way through shared memory, and e's stores
)
def test_bytes_and_conflicts(host, dtype, of_y, of_e):
    """x once a block, y once, weights once a tile or image, d through the cluster alone."""
    chunk = 64 // dtype.itemsize
    drawn = draw_case(excited(2 * chunk, 5 * chunk, 48, (8, 16)), dtype)
    t = drawn.tensors
    with device(host):
        [launch] = host.count(lambda: run(host, drawn), **t)
    counts, ranks, tiles, images = launch["counts"], 4, 2, len(t["x"])
    assert launch["grid"][0] == images * ranks and launch["kernel"] == NAME
    blocks = 3  # that have chunks: 2, 2 and 1
    assert {kind for kind in counts if kind.startswith("store ")} == {"store shared", "store unnamed"}
    y = size(t["x"]) // (2 * chunk) * 48
    assert counts["store unnamed"]["bytes"] == y == counts["store unnamed"]["sectors"] * 32
    assert counts["load x"]["bytes"] == blocks * size(t["x"]) == counts["load x"]["sectors"] * 32
    for name in ("expand_weight", "dw_weight"):
        assert counts[f"load {name}"]["bytes"] == images * size(t[name])
    assert counts["load se_expand_weight"]["bytes"] == images * size(t["se_expand_weight"])
    assert counts["load se_reduce_weight"]["bytes"] == images * size(t["se_reduce_weight"])
    assert counts["load project_weight"]["bytes"] == images * tiles * size(t["project_weight"])
    means_and_hidden = 4 * (5 * chunk + len(t["se_reduce_weight"]))
    d = images * tiles * 64 * 5 * chunk * dtype.itemsize  # by two blocks of output channels
    assert counts["load cluster"]["bytes"] == 2 * d + images * ranks * means_and_hidden
    assert "load unnamed" not in counts
    assert counts["load shared"]["conflicts"] == of_y
    assert counts["store shared"]["conflicts"] == of_y + of_e
