"""docs/predictions.md is what bench/predictions.py makes of the launchers' tiles as they are.

Fails if a tile, the model or the file was changed without the others; figures that were measured are left alone.
"""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_file_is_up_to_date():
    pytest.importorskip("triton")
    from cnnfast.bench import predictions

    written = (ROOT / predictions.FILE).read_text(encoding="utf-8")
    assert predictions.keep_measured(predictions.text(), written) == written, "run python -m cnnfast.bench.predictions"


def test_measurements_are_kept_while_the_prediction_stands():
    from cnnfast.bench.predictions import keep_measured

    made = "| a | 1.0 | not yet |\n| b | 2.0 | not yet |\n"
    written = "| a | 1.0 | 1.1 (H100) |\n| b | 3.0 | 3.2 (H100) |\n"
    assert keep_measured(made, written) == "| a | 1.0 | 1.1 (H100) |\n| b | 2.0 | not yet |\n"


@pytest.mark.parametrize(("network", "layers"), [("MobileNetV2", 17), ("EfficientNet-B0 and -Lite0", 16)])
def test_every_block_is_there(network, layers):
    """17 bottlenecks in MobileNetV2, 16 in EfficientNet-B0; each has one depthwise convolution."""
    from cnnfast.bench import predictions

    assert sum(layer.times for layer in predictions.NETWORKS[network]) == layers
