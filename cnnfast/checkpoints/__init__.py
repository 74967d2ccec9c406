"""Checkpoints into our networks and back: read (files), told apart by their keys (recognise), checked whole (faults),
loaded, saved."""

from cnnfast.checkpoints.faults import same_numbers
from cnnfast.checkpoints.load import load_weights
from cnnfast.checkpoints.save import save_weights

__all__ = ["load_weights", "same_numbers", "save_weights"]
