"""Packed calls recorded and run as one op.

Fails if a bit differs from the calls one by one, a value is lost before its last use or kept after it, a result is
written over what something else reads, a function that does more than packed ops is recorded, an error isn't the single
call's, or a broken program is run.
"""

import threading

import pytest
import torch
from numerics import draw, fresh_generator
from torch import nn

from cnnfast import _C
from cnnfast import nn as blocks_of
from cnnfast.models.residual import BasicBlock, Bottleneck
from cnnfast.models.senet import SEResNetBottleneck
from cnnfast.nn.fusion import fuse_pool_and_linear
from cnnfast.nn.recording import Recorded, Recorder, Value, record

pytestmark = pytest.mark.usefixtures("nan_outputs")


def always(call):
    return True


def fused_calls(dtype):
    """Each op that has a packed form, some with a residual; the last is the head of a network."""
    blocks = [
        blocks_of.FusedSequential(nn.Conv2d(3, 24, 3, 2, 1), nn.ReLU()),
        blocks_of.InvertedResidual(24, 24, squeezed_channels=6, activation="silu"),
        blocks_of.DepthwiseConv2d(24, 3, padding=1),
        blocks_of.InvertedResidual(24, 40, 5, 2),
        blocks_of.SeparableConv2d(40, 48, activation="relu"),
        blocks_of.SqueezeExcite(48, 12),
        blocks_of.PointwiseConvBN(48, 32, activation="silu"),
        Bottleneck(32, 8),
    ]
    blocks = [block.eval().to(dtype) for block in blocks]
    linear = nn.Linear(32, 10, dtype=dtype)
    with torch.no_grad():
        return [*(block.fused() for block in blocks), fuse_pool_and_linear(linear, "auto")]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_same_bits(memory_format, dtype, threads):
    calls = fused_calls(dtype)
    x = draw(fresh_generator(), (2, 3, 37, 29), dtype).to(memory_format=memory_format)
    before, torch_threads = x.clone(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            y = expected = x
            for call in calls[:-1]:
                expected = call(expected)
            joined = record(calls[:-1], always)
            for call in joined:
                y = call(y)
            assert torch.equal(y, expected) and torch.equal(x, before) and not y.isnan().any()
            # in the others dense convolutions are ATen's
            if dtype is torch.float32 or (dtype is torch.bfloat16 and _C.isa == "amx"):
                assert len(joined) == 1 and len(joined[0].packed) > len(calls)
            (head,) = record(calls[-1:], always)
            # a mean that is rounded once, and a unit of what it is multiplied to
            tolerance = {torch.float32: 1e-6, torch.float64: 1e-14}.get(dtype, 1e-2)
            torch.testing.assert_close(head(y), calls[-1](y), rtol=tolerance, atol=tolerance)
            assert isinstance(head, Recorded) and head(y).shape == (2, 10, 1, 1)
    finally:
        torch.set_num_threads(torch_threads)


def test_what_is_no_packed_op_is_called_between():
    calls = fused_calls(torch.float32)
    seen = []

    def more(x):
        seen.append(type(x))
        return calls[2](x) + 1

    with torch.no_grad():
        joined = record([*calls[:2], nn.Identity(), more, *calls[3:]], lambda call: not isinstance(call, nn.Module))
        assert [type(call).__name__ for call in joined] == ["Recorded", "Identity", "function", "Recorded"]
        x = draw(fresh_generator(), (1, 3, 20, 20), torch.float32)
        expected = calls[2](calls[1](calls[0](x))) + 1
        seen.clear()
        y = joined[2](joined[1](joined[0](x)))
        assert torch.equal(y, expected) and seen == [torch.Tensor]
        for call in calls[3:]:
            expected = call(expected)
        torch.testing.assert_close(joined[3](y), expected)
        assert record([more], always) == [more] and record(calls[:1], always) != calls[:1]


def test_values_are_dropped_after_their_last_use():
    recorder = Recorder()
    x = Value(recorder, 0)
    y = recorder.add(4, [x, None, 7])
    z = recorder.add(4, [y, x, 7])
    recorder.add(2, [z, None, y, (1, 1)])
    # how many steps; op, where it writes (an empty list: anywhere; a value: over it), its tensors and options, what no
    # later step reads
    assert recorder.program().tolist() == [
        3,
        4,
        0,
        0,
        -1,
        7,
        0,
        4,
        0,
        1,
        0,
        7,
        1,
        0,
        2,
        1,
        1,
        2,
        -1,
        1,
        2,
        1,
        1,
        2,
        1,
        2,
    ]


def test_what_is_written_over():
    """A residual that nothing reads again, nor the op itself in another place."""
    recorder = Recorder()
    x = recorder.values[0]
    a = recorder.add(5, [x, None, 7])
    b = recorder.add(5, [a, x, 7])
    c = recorder.add(2, [b, None, a, 7])
    d = recorder.add(6, [b, c, 7])
    e = recorder.add(2, [d, None, d, 7])
    recorder.add(6, [c, e, 7])
    recorder.add(1, [b, 7])
    assert recorder._places() == {2: [0], 3: [1], 6: [5]}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_over_a_residual(dtype, threads):
    """Each sum is stored once, also in rows and columns that another kernel computes than their neighbours: of NaN, Inf
    and what is too small for AMX."""
    generator, torch_threads = fresh_generator(), torch.get_num_threads()
    torch.set_num_threads(threads)
    layers = [Bottleneck(256, 64), Bottleneck(256, 64), SEResNetBottleneck(256, 64, 1, None, 16), BasicBlock(256, 256)]
    try:
        with torch.no_grad():
            for layer in layers[:3]:
                layer.conv3.weight[[5, 70, 200], 7] = torch.tensor([1e-36, 3e-31, 1e-38]).view(3, 1, 1)
            layers[1].conv2.weight[5] *= 1e-33  # of some pixels what conv3 reads is too small, of others 0
            calls = [layer.eval().to(dtype).fused() for layer in layers]
            joined = record(calls, always)
            assert len(joined) == 1 or dtype is not torch.float32  # in the others dense convolutions may be ATen's
            for shape in ((1, 256, 57, 55), (3, 256, 21, 17), (2, 256, 1, 3)):
                for special in (1.0, 1e-32, torch.nan, torch.inf):
                    x = draw(generator, shape, dtype).contiguous(memory_format=torch.channels_last)
                    x[0, 3, -1, 1] = x[-1, 9, 0, 0] = special
                    before, y, expected = x.clone(), x, x
                    for call in calls:
                        expected = call(expected)
                    for call in joined:
                        recorded = isinstance(call, Recorded)
                        y = call.op(y, call.packed, call.program) if recorded else call(y)  # not one by one instead
                    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
                    torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)
    finally:
        torch.set_num_threads(torch_threads)


def test_peak_of_a_sequence_is_no_higher_than_of_its_calls():
    """Ten blocks of one size: two values live at once, whatever their number."""
    block = blocks_of.PointwiseConvBN(64, 64, activation="relu").eval()
    with torch.no_grad():
        call = block.fused()
        program = record([call] * 10, always)[0].program.tolist()[1:]
    drops = [program[end - 1] for end in range(len(program) // 10, len(program) + 1, len(program) // 10)]
    assert drops == list(range(10))  # each step's x, x of the first included


@pytest.mark.parametrize(
    ("shape", "dtype", "error", "says"),
    [
        ((1, 4, 9, 9), torch.float32, ValueError, r"x must have shape \(N, 3, H, W\), got \(1, 4, 9, 9\)"),
        ((1, 3, 9, 9), torch.int32, TypeError, "x must be float32, float64, bfloat16 or float16, got torch.int32"),
        ((1, 3, 9, 9), torch.float64, TypeError, "x must have the dtype of the weights"),
    ],
    ids=str,
)
def test_errors_are_those_of_the_single_call(shape, dtype, error, says):
    calls = fused_calls(torch.float32)
    with torch.no_grad(), pytest.raises(error, match=says):
        record(calls, always)[0](torch.zeros(shape, dtype=dtype))


BROKEN = {
    "ends within a step": [1, 5],
    "ends within a list": [1, 100, 0, 0, 5, 0],
    "more packed ops": [2, 100, 0, 0, 0, 5, 0, 1, -1, 24, 2, 3, 3, 2, 2, 2, 4, 1, 1, 1, 1, 2, 1, 1, 0, 0, 0],
    "a step 77 that is none": [1, 77, 0, 0, 0],
    "a value that is not there": [1, 100, 0, 3, 0],
    "drops no value": [1, 100, 0, 0, 1, 9],
    "drops its result": [1, 100, 0, 0, 1, 1],
    "without an x": [1, 100, 0, -1, 0],
    "goes on after its last step": [1, 100, 0, 0, 0, 100, 0, 0, 0],
    "a part without its place": [1, 100, 2, 2, 0, 0, 0],
    "over a value that it reads again": [
        3,
        *(102, 0, 0, 2, 1, 1, 2, 1, 1, 2, 0, 0, 0, 0),
        *(102, 1, 1, 0, 2, 1, 1, 2, 1, 1, 2, 0, 0, 0, 0),
        *(100, 0, 2, 0),
    ],
    "concatenates nothing": [1, 101, 0, 0, 0],
    "joins images that don't fit": [2, 100, 0, 0, 0, 101, 0, 2, 0, 1, 0],
    "images that don't fit": [2, 102, 3, 2, 1, 3, 0, 2, 1, 1, 2, 1, 1, 2, 0, 0, 0, 0, 101, 0, 1, 1, 0],
    "at most half the kernel": [1, 102, 0, 0, 2, 3, 3, 2, 1, 1, 2, 0, 2, 0, 0],
    "larger than the padded input": [1, 102, 0, 0, 2, 10, 3, 2, 1, 1, 2, 0, 0, 0, 0],
    "pairs of sizes": [1, 103, 0, 0, 1, 3, 2, 1, 1, 2, 0, 0, 0, 1, 0],
}


@pytest.mark.parametrize("says", BROKEN)
def test_broken_programs(says):
    op = torch.ops.cnnfast.packed_sequence
    with pytest.raises(RuntimeError, match=says):
        op(torch.zeros(1, 3, 9, 9), [], torch.tensor(BROKEN[says]))
    with pytest.raises(RuntimeError, match="int64"):
        op(torch.zeros(1, 3, 9, 9), [], torch.tensor(BROKEN[says], dtype=torch.int32))


def test_dropped_values_are_not_read():
    with pytest.raises(RuntimeError, match="a value that is not there"):
        torch.ops.cnnfast.packed_sequence(torch.zeros(1, 3, 9, 9), [], torch.tensor([2, 100, 0, 0, 1, 0, 100, 0, 0, 0]))


def test_results_are_their_own_memory():
    """Those of a call stay what they are during the next ones, also a result that a step only passes on."""
    generator = fresh_generator()
    x = draw(generator, (2, 3, 33, 29), torch.float32).contiguous(memory_format=torch.channels_last)
    calls = fused_calls(torch.float32)
    with torch.no_grad():
        (whole,) = record(calls[:-1], always)
        (passing_on,) = record([calls[0], lambda y: y.contiguous(memory_format=torch.channels_last)], always)
        for sequence in (whole, passing_on):
            first = sequence(x)
            kept = first.clone()
            for shape in ((1, 3, 40, 40), (3, 3, 17, 12), (0, 3, 9, 9), (2, 3, 33, 29)):
                sequence(draw(generator, shape, torch.float32).contiguous(memory_format=torch.channels_last))
            assert torch.equal(first, kept) and torch.equal(sequence(x), kept)


def test_after_an_error_and_on_other_threads():
    calls = fused_calls(torch.float32)
    x = draw(fresh_generator(), (2, 3, 33, 29), torch.float32)
    with torch.no_grad():
        (whole,) = record(calls[:-1], always)
        expected = whole(x)
        results = []

        def work():
            with torch.no_grad(), pytest.raises(RuntimeError, match="a step 77"):
                torch.ops.cnnfast.packed_sequence(x, [], torch.tensor([2, 100, 0, 0, 0, 77, 0, 0, 0]))
            with torch.no_grad():
                results.extend(whole(x) for _ in range(3))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 12 and all(torch.equal(result, expected) for result in results)
