"""docs/predictions.md is what bench/predictions.py makes of the networks and of their launchers' tiles as they are.

Fails if a tile, the model or the file was changed without the others, a kernel has no cost, or a network's ops aren't
all there; figures that were measured are left alone.
"""

import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from cnnfast.bench import costs, predictions
from cnnfast.bench.launches import is_kernel, modules

WRITTEN = (Path(__file__).parents[2] / predictions.FILE).read_text(encoding="utf-8")


def test_every_kernel_has_a_cost():
    assert set(costs.WORK) == {
        name for module in modules() for name, value in vars(module).items() if is_kernel(name, value)
    }


def assert_written(titles):
    made = predictions.keep_measured(predictions.text(titles), WRITTEN)
    sections = made.split("\n## ")[1:]
    assert len(sections) >= len(titles)
    missing = [section.splitlines()[0] for section in sections if f"\n## {section}".rstrip() not in WRITTEN]
    assert not missing, "run python -m cnnfast.bench.predictions"


def test_a_sample_of_the_file_is_up_to_date():
    assert_written(["local_response_norm in AlexNet", "mobilenet_v2 at 224, inference"])


@pytest.mark.slow
def test_file_is_up_to_date():
    assert predictions.keep_measured(predictions.text(), WRITTEN) == WRITTEN, "run python -m cnnfast.bench.predictions"


def test_measurements_are_kept_while_the_prediction_stands():
    made = "| a | 1.0 | not yet |\n| b | 2.0 | not yet |\n"
    written = "| a | 1.0 | 1.1 (H100) |\n| b | 3.0 | 3.2 (H100) |\n"
    assert predictions.keep_measured(made, written) == "| a | 1.0 | 1.1 (H100) |\n| b | 2.0 | not yet |\n"


@pytest.mark.parametrize(
    ("network", "op", "count"),
    [
        ("mobilenet_v2", "inverted_residual", 16),
        ("tf_efficientnet_b0", "inverted_residual", 16),
        ("xception", "separable_conv2d", 34),
    ],
)
def test_every_block_is_there(network, op, count):
    """MobileNetV2 has 17 bottlenecks, the first without expansion; EfficientNet-B0 16; Xception 34 separable convs."""
    calls = predictions.calls_of(network, False, 32, torch.bfloat16)
    assert sum(times for call, times in calls.times.items() if call.split()[0] == op) == count


def test_a_launch_takes_no_less_than_its_floor():
    """And the bytes of a product are those of its tensors, each once."""
    calls = predictions.calls_of("mobilenet_v2", True, 32, torch.bfloat16)
    works = [work for row in calls.rows.values() for work in row]
    assert all(work.seconds > work.floor for work in works)
    ((work,),) = [
        row
        for (call, kernel), row in calls.rows.items()
        if call == "pointwise_conv2d_stats_backward 320-1280 @7" and kernel == "pointwise_conv2d_bwd_input_kernel"
    ]
    assert work.bytes == 2 * (32 * 49 * (320 + 1280) + 320 * 1280)
    assert work.flops == 2 * 32 * 49 * 320 * 1280 <= work.multiplied


# By default the network with most ops; the others' batch normalisations on meta tensors take seconds.
CHOICES = [
    pytest.param(network, what, marks=[pytest.mark.slow] * (network != "tf_efficientnet_b0"))
    for network in predictions.NETWORKS
    for what in ("inference", "a training step")
]


@pytest.mark.parametrize(("network", "what"), CHOICES)
def test_the_choice_follows_the_predictions(network, what):
    """No call loses more than 10 %, over the batches, by going to the backend that it goes to."""
    made = predictions.sections()[f"{network} at {predictions.NETWORKS[network]}, {what}"]()
    for call in dict.fromkeys(call for calls in made.values() for call in calls.cuda):
        if "@1" in call.split():  # microseconds, launches above all; NCHW, too, and so Triton's
            continue
        for dtype in predictions.DTYPES:
            of_dtype = [made[dtype, batch] for batch in predictions.BATCHES]
            ratio = math.prod(calls.cuda_seconds(call) / calls.triton_seconds(call) for calls in of_dtype)
            taken = ratio if of_dtype[0].preferred[call] else 1 / ratio
            assert taken <= 1.1**2, (call, dtype, ratio)
