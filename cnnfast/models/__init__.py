"""Networks, a family a file, by name through create_model."""

from cnnfast.models.efficientnet import EfficientNet, tf_efficientnet_lite0
from cnnfast.models.mobilenet_v1 import MobileNetV1
from cnnfast.models.mobilenet_v2 import MobileNetV2
from cnnfast.models.registry import create_model, list_models, register_model
from cnnfast.models.senet import SEResNet50
from cnnfast.models.xception import XceptionFused

__all__ = [
    "EfficientNet",
    "MobileNetV1",
    "MobileNetV2",
    "SEResNet50",
    "XceptionFused",
    "create_model",
    "list_models",
    "register_model",
    "tf_efficientnet_lite0",
]
