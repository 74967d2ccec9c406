"""What a network is called, key by key, in the checkpoints of each package that has it."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

# "cnnfast": a network's own names, which are also those of its key_source.
SOURCES = ("cnnfast", "torchvision", "timm", "efficientnet_lite_pytorch", "efficientnet_pytorch", "pretrainedmodels")
MARK = "cnnfast_source"  # in a state dict's or a file's metadata: "source:name", of what network these weights are


class Layouts(nn.Module):
    """A network's names in checkpoints. A subclass overrides checkpoint_keys for the packages that it knows."""

    classifier_name: str
    key_source = "timm"  # whose state-dict keys these are
    in_pretrainedmodels = False  # whether that package has it: the classifier is `last_linear` there, the rest as here
    pretrained_cfg: dict[str, Any]
    # Where two networks of a package have the same keys and shapes: a pattern of the names there that mean this one.
    told_apart: Mapping[str, str] = {}
    # Of the published checkpoints' network, where the defaults make one that lacks layers: {"aux_logits": True}.
    published_options: Mapping[str, Any] = {}
    # create_model's call that made this network: by it load_weights sees what one without classifier or last stages
    # lacks.
    made_by: functools.partial | None = None

    @property
    def classifiers(self) -> tuple[str, ...]:
        """The layers that have a row for each class."""
        return (self.classifier_name,)

    def checkpoint_keys(self, source: str) -> dict[str, str]:
        """The names of this network's own keys in the checkpoints of `source`; none if it doesn't have the network."""
        if source == "pretrainedmodels" and self.in_pretrainedmodels:
            return renamed(self.state_dict(), {self.classifier_name: "last_linear"})
        return {key: key for key in self.state_dict()} if source in ("cnnfast", self.key_source) else {}

    def checkpoint_shapes(self, source: str) -> dict[str, tuple[int, ...]]:
        """Of those of its own keys whose tensors have another shape in `source`, that shape, as for reshape: of a
        linear layer that is a convolution there."""
        return {}

    def is_called(self, name: str, source: str) -> bool:
        """Whether `name`, in the package `source`, means this network; a tag (tf_efficientnet_b0.ns_jft_in1k) tells
        what it was trained on."""
        from cnnfast.models.registry import model_entry

        name = name.partition(".")[0]
        own = self.architecture
        if own is not None and name == (own if source == "cnnfast" else model_entry(own).peers.get(source)):
            return True
        if own is None and source not in self.told_apart:
            return True  # built without create_model: there is nothing to compare with
        return fnmatch.fnmatchcase(name, self.told_apart.get(source, ""))

    @property
    def architecture(self) -> str | None:
        """The name by which create_model made this network, if it did."""
        return getattr(self, "pretrained_cfg", {}).get("architecture")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.architecture and hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]][MARK] = f"cnnfast:{self.architecture}"


def renamed(keys: Iterable[str], modules: Mapping[str, str]) -> dict[str, str]:
    """Each key, and its name once each module has the name that `modules` gives it."""
    parts = {key: key.rpartition(".") for key in keys}
    return {key: f"{modules.get(module, module)}.{name}" for key, (module, _, name) in parts.items()}
