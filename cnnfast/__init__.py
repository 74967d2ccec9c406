"""Fused kernels for convolutional networks in PyTorch."""

from cnnfast import _library as _library  # first: what is missing is said here
from cnnfast._version import __version__

__all__ = ["__version__"]
