"""Networks, a family a file, by name through create_model."""

from cnnfast.models.alexnet import AlexNet, AlexNetTwoTower
from cnnfast.models.bn_inception import BNInception
from cnnfast.models.efficientnet import EfficientNet, tf_efficientnet_lite0
from cnnfast.models.googlenet import GoogLeNet
from cnnfast.models.inception_resnet_v2 import InceptionResNetV2
from cnnfast.models.inception_v3 import InceptionV3
from cnnfast.models.inception_v4 import InceptionV4
from cnnfast.models.lenet import LeNet1, LeNet5, LeNet5Simple
from cnnfast.models.mobilenet_v1 import MobileNetV1
from cnnfast.models.mobilenet_v2 import MobileNetV2
from cnnfast.models.nin import NIN
from cnnfast.models.registry import create_model, list_models, register_model
from cnnfast.models.resnet import ResNet
from cnnfast.models.resnet_cifar import CifarResNet
from cnnfast.models.senet import SENet
from cnnfast.models.vgg import VGG
from cnnfast.models.xception import XceptionFused

__all__ = [
    "NIN",
    "VGG",
    "AlexNet",
    "AlexNetTwoTower",
    "BNInception",
    "CifarResNet",
    "EfficientNet",
    "GoogLeNet",
    "InceptionResNetV2",
    "InceptionV3",
    "InceptionV4",
    "LeNet1",
    "LeNet5",
    "LeNet5Simple",
    "MobileNetV1",
    "MobileNetV2",
    "ResNet",
    "SENet",
    "XceptionFused",
    "create_model",
    "list_models",
    "register_model",
    "tf_efficientnet_lite0",
]
