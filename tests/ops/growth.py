"""By how much an op's call makes the process grow, for test_memory.py: a line of JSON a case.

Every case is in a process of its own, forked from one that has imported everything and started no thread, so that no
memory of an earlier case is used again unseen. Images are large, weights small: a temporary of the size of x, of the
output or of an intermediate is several times what a thread may keep.
"""

import itertools
import json
import os
import sys
from collections.abc import Callable

import torch
from numerics import fresh_generator
from op_cases import OPS, Case, make

import cnnfast.ops
from cnnfast import _C
from cnnfast.bench.timing import peak_growth

TILE_BYTES = 2_500_000  # of a band: csrc/cpu/stages.h's kTileBytes, four times it where halos are large; rows; panels
CHANNELS, EXPAND = 64, 6


def call_of(op: str, form: str, weights: Case) -> Callable[[Case], torch.Tensor]:
    """What is measured, of a case with these weights."""
    if form == "packed":
        packed = weights.pack()
        return lambda case: case.run_packed(packed)
    plain = Case.run if op in OPS else lambda case: cnnfast.ops.local_response_norm(case.x, 5)
    if form == "plain":
        return plain

    def copying(case: Case) -> torch.Tensor:
        """A mistake that has to be seen."""
        copied = case.x.clone()
        return plain(Case(case.op, case.tensors | {"x": copied}, case.options))

    return copying


def with_images(case: Case, images: int, height: int, width: int) -> Case:
    """The same weights for other images, in channels_last."""

    def drawn() -> torch.Tensor:
        return torch.randn(images, height, width, CHANNELS).to(case.x.dtype).permute(0, 3, 1, 2)

    images_of = {name: drawn() for name in ("x", "residual") if name in case.tensors}
    return Case(case.op, case.tensors | images_of, case.options)


def measure(op: str, form: str, dtype: str) -> dict[str, object]:
    """op: as OPS, or "local_response_norm", or "inverted_residual with squeeze_excite"."""
    name, _, excite = op.partition(" with ")
    options = dict(c=CHANNELS, out=CHANNELS, multiplier=EXPAND if name == "inverted_residual" else 1)
    drawn_for = name if name in OPS else "pointwise_conv2d"
    case = make(drawn_for, fresh_generator(), **options, excite=bool(excite), dtype=getattr(torch, dtype))
    size, tile = (4, 128, 128), TILE_BYTES
    if excite:  # wants an image's depthwise result as a whole, and that of all rows of x
        size = (32, 56, 56)
        tile += 56 * 56 * (case.tensors["dw_weight"].shape[0] + 32 + CHANNELS) * 4
    if name == "conv2d" and _C.isa == "amx" and dtype != "bfloat16":  # the band again, as three bfloat16 (amx_planes.h)
        tile += 4 * 290_000 * 6 // 4
    call = call_of(name, form, case)
    call(with_images(case, 2, 16, 16))  # code is loaded, threads are there
    large = with_images(case, *size)
    y, growth = peak_growth(lambda: call(large))
    assert growth is not None, "the kernel won't reset the peak of this process's memory"
    output = y.numel() * y.element_size()
    allowed = output + torch.get_num_threads() * tile
    return {"case": f"{op}, {form}, {dtype}", "growth": growth, "output": output, "allowed": allowed}


def main(forms: str, dtypes: str) -> None:
    ops = (*OPS, "inverted_residual with squeeze_excite", "local_response_norm")
    for dtype, op, form in itertools.product(dtypes.split(","), ops, forms.split(",")):
        if op == "local_response_norm" and form == "packed":
            continue
        if not (child := os.fork()):
            try:
                print(json.dumps(measure(op, form, dtype)), flush=True)
                os._exit(0)
            except BaseException as error:
                print(f"{op}, {form}, {dtype}: {error!r}", file=sys.stderr, flush=True)
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert status == 0, f"{op}, {form}, {dtype} failed"


if __name__ == "__main__":
    main(*sys.argv[1:])
