"""Names of networks. Fails if a name is lost or a mistake isn't explained."""

import pytest
import torch

import cnnfast
from cnnfast.models import register_model


def test_list_models():
    assert cnnfast.list_models() == [
        *(f"efficientnet_b{n}" for n in range(9)),
        "efficientnet_l2",
        *(f"efficientnet_lite{n}" for n in range(5)),
        "mobilenet_v1",
        *(f"mobilenet_v1_{percent}" for percent in ("025", "050", "075", "125")),
        "mobilenet_v2",
        *(f"mobilenet_v2_{percent}" for percent in ("035", "050", "075", "140")),
        "se_resnet50",
        *(f"tf_efficientnet_b{n}" for n in range(9)),
        "tf_efficientnet_l2",
        *(f"tf_efficientnet_lite{n}" for n in range(5)),
        "xception",
    ]
    assert cnnfast.list_models("*lite0") == ["efficientnet_lite0", "tf_efficientnet_lite0"]
    assert cnnfast.list_models("nothing*") == []


@pytest.mark.parametrize(
    "name, options, class_name, parameters",
    [
        ("efficientnet_b0", {}, "EfficientNet", 5_288_548),
        ("tf_efficientnet_b0", {}, "EfficientNet", 5_288_548),
        ("tf_efficientnet_b1", {}, "EfficientNet", 7_794_184),
        ("tf_efficientnet_b2", {}, "EfficientNet", 9_109_994),
        ("mobilenet_v1", {}, "MobileNetV1", 4_231_976),
        ("mobilenet_v1", dict(width_mult=1.25), "MobileNetV1", 6_270_840),
        ("mobilenet_v1", dict(head_conv=True), "MobileNetV1", 5_282_600),
        ("mobilenet_v2", {}, "MobileNetV2", 3_504_872),
        ("mobilenet_v2", dict(width_mult=1.4), "MobileNetV2", 6_108_776),
        ("se_resnet50", {}, "SEResNet50", 28_088_024),
        ("tf_efficientnet_lite0", {}, "EfficientNet", 4_652_008),
        ("xception", {}, "XceptionFused", 22_855_952),
    ],
)
def test_create_model(name, options, class_name, parameters):
    with torch.device("meta"):
        network = cnnfast.create_model(name, **options)
    assert type(network).__name__ == class_name
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize(
    "name, suggestion",
    [
        ("efficientnetlite0", "efficientnet_lite0"),
        ("legacy_xception", "xception"),
        ("mobilenetv2_100", "mobilenet_v2"),
        (3, "xception"),
    ],
)
def test_unknown_name(name, suggestion):
    with pytest.raises(ValueError, match=f"{suggestion}.*got {name!r}") as error:
        cnnfast.create_model(name)
    assert "\n" not in str(error.value)


def test_a_name_is_given_once():
    with pytest.raises(ValueError, match="xception"):
        register_model("xception")(lambda: None)
