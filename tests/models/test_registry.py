"""Names of networks. Fails if a name is lost or a mistake isn't explained."""

import pytest
import torch

import cnnfast
from cnnfast.models import register_model

NAMES = """
alexnet alexnet_two_tower bn_inception cifar_resnet110 cifar_resnet1202 cifar_resnet20 cifar_resnet32
cifar_resnet44 cifar_resnet56 efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4
efficientnet_b5 efficientnet_b6 efficientnet_b7 efficientnet_b8 efficientnet_l2 efficientnet_lite0
efficientnet_lite1 efficientnet_lite2 efficientnet_lite3 efficientnet_lite4 googlenet googlenet_bn
inception_resnet_v2 inception_v3 inception_v4 lenet1 lenet5 lenet5_simple mobilenet_v1 mobilenet_v1_025
mobilenet_v1_050 mobilenet_v1_075 mobilenet_v1_125 mobilenet_v2 mobilenet_v2_035 mobilenet_v2_050
mobilenet_v2_075 mobilenet_v2_140 nin nin_cifar plain18 plain34 resnet101 resnet152 resnet18 resnet34 resnet50
se_bn_inception se_resnet101 se_resnet152 se_resnet18 se_resnet34 se_resnet50 senet154 tf_efficientnet_b0
tf_efficientnet_b1 tf_efficientnet_b2 tf_efficientnet_b3 tf_efficientnet_b4 tf_efficientnet_b5
tf_efficientnet_b6 tf_efficientnet_b7 tf_efficientnet_b8 tf_efficientnet_l2 tf_efficientnet_lite0
tf_efficientnet_lite1 tf_efficientnet_lite2 tf_efficientnet_lite3 tf_efficientnet_lite4 vgg11 vgg11_bn
vgg11_lrn vgg13 vgg13_bn vgg16 vgg16_bn vgg16_c vgg19 vgg19_bn xception
"""


def test_list_models():
    assert cnnfast.list_models() == NAMES.split()
    assert cnnfast.list_models("*lite0") == ["efficientnet_lite0", "tf_efficientnet_lite0"]
    assert cnnfast.list_models("nothing*") == []


@pytest.mark.parametrize(
    "name, options, class_name, parameters",
    [
        ("alexnet", {}, "AlexNet", 61_100_840),
        ("alexnet_two_tower", {}, "AlexNetTwoTower", 60_965_224),
        ("bn_inception", {}, "BNInception", 11_295_240),
        ("lenet1", {}, "LeNet1", 2_578),
        ("lenet5", {}, "LeNet5", 60_000),
        ("lenet5", dict(output="linear"), "LeNet5", 60_850),
        ("lenet5_simple", {}, "LeNet5Simple", 61_706),
        ("nin", {}, "ImageNetNIN", 7_595_176),
        ("nin_cifar", {}, "CifarNIN", 966_986),
        ("vgg11", {}, "VGG", 132_863_336),
        ("vgg11_bn", {}, "VGG", 132_868_840),
        ("vgg11_lrn", {}, "VGG", 132_863_336),
        ("vgg13", {}, "VGG", 133_047_848),
        ("vgg13_bn", {}, "VGG", 133_053_736),
        ("vgg16", {}, "VGG", 138_357_544),
        ("vgg16_bn", {}, "VGG", 138_365_992),
        ("vgg16_c", {}, "VGG", 133_638_952),
        ("vgg19", {}, "VGG", 143_667_240),
        ("vgg19_bn", {}, "VGG", 143_678_248),
        ("efficientnet_b0", {}, "EfficientNet", 5_288_548),
        ("googlenet", {}, "GoogLeNet", 6_998_552),
        ("googlenet", dict(aux_logits=True), "GoogLeNet", 13_378_280),
        ("googlenet_bn", {}, "GoogLeNet", 6_624_904),
        ("inception_resnet_v2", {}, "InceptionResNetV2", 55_843_464),
        ("inception_v3", {}, "InceptionV3", 23_834_568),
        ("inception_v3", dict(aux_logits=True), "InceptionV3", 27_161_264),
        ("inception_v4", {}, "InceptionV4", 42_679_816),
        ("tf_efficientnet_b0", {}, "EfficientNet", 5_288_548),
        ("tf_efficientnet_b1", {}, "EfficientNet", 7_794_184),
        ("tf_efficientnet_b2", {}, "EfficientNet", 9_109_994),
        ("mobilenet_v1", {}, "MobileNetV1", 4_231_976),
        ("mobilenet_v1", dict(width_mult=1.25), "MobileNetV1", 6_270_840),
        ("mobilenet_v1", dict(head_conv=True), "MobileNetV1", 5_282_600),
        ("mobilenet_v2", {}, "MobileNetV2", 3_504_872),
        ("mobilenet_v2", dict(width_mult=1.4), "MobileNetV2", 6_108_776),
        ("se_resnet50", {}, "SENet", 28_088_024),
        ("se_bn_inception", {}, "BNInception", 11_931_622),
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
