"""Accuracy of a network over a folder of labelled images; see the modules.

The softmax outputs of all views of an image (crops, sizes, mirrored ones) are averaged, each with the same weight.
Needs Pillow, and torchvision for ten-crop and multi-crop.
"""

from cnnfast.evaluation.folder import ImageFolder, Sample, read_folder
from cnnfast.evaluation.predictions import Failure, Prediction, accuracy, predict
from cnnfast.evaluation.table import Table
from cnnfast.evaluation.views import MODES, Views, dense_form

__all__ = [
    "MODES",
    "Failure",
    "ImageFolder",
    "Prediction",
    "Sample",
    "Table",
    "Views",
    "accuracy",
    "dense_form",
    "predict",
    "read_folder",
]
