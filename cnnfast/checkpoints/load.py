"""Other people's checkpoints into our networks: recognised by their keys, checked whole, then loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from cnnfast.checkpoints.faults import find_faults
from cnnfast.checkpoints.files import describe, read, unwrap
from cnnfast.checkpoints.recognise import Layout, layout_of, recognise
from cnnfast.models.layouts import Layouts


def load_weights(
    model: nn.Module,
    weights: Mapping[str, Any] | str | os.PathLike,
    source: str | None = None,
    *,
    load_classifier: bool = True,
) -> None:
    """Loads a checkpoint strictly: every parameter and buffer of `model` gets its value, or nothing does.

    Where `model` has other in_chans than the checkpoint, the filters of its first layer are summed over their channels
    (in_chans 1) or repeated and scaled so that a grey image gives what it gave, as timm does. A linear layer's weights
    may come as those of a convolution over all it sees, and the other way round. Networks without a classifier or with
    features_only take whole checkpoints, and those of 1000 classes pretrainedmodels' of 1001, without their first,
    the background.

    Args:
        model: a network of cnnfast.create_model.
        weights: a state dict, or a file of one: .safetensors, or what torch.save wrote (read with weights_only=True: no
            code runs). What training scripts wrap it in is taken off: {"state_dict": ...}, {"model": ...}, those of
            moving averages, which are preferred ("state_dict_ema", "model_ema", "ema"), keys that begin with "module.".
        source: whose keys they are: "timm", "torchvision", "efficientnet_lite_pytorch", "efficientnet_pytorch",
            "pretrainedmodels", or "cnnfast", this package's own; None to find out, by what cnnfast marked in the file
            or else by the keys. With the network's name there, "timm:tf_efficientnet_b0", where the package has two
            with the same keys and shapes.
        load_classifier: False leaves the classifier, and the last layer of auxiliary ones, as it is, for weights of
            another number of classes.

    Raises:
        ValueError: a file that isn't a checkpoint; keys that are missing or not wanted, other shapes or dtypes, values
            that aren't finite; or a source that has to be said. The model is then as it was.
        FileNotFoundError: no such file.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    own = model.state_dict()
    if any(value.is_meta for value in own.values()):
        raise ValueError("model must have its tensors on a device that holds values, got meta")
    given = None if source is None else layout_of(model, source)
    state, mark = unwrap(read(weights) if isinstance(weights, (str, os.PathLike)) else weights)
    layout, doubt = recognise(model, state, mark) if given is None else (given, None)
    what = describe(state)
    theirs = dict(layout.names)
    classes: list[str] = []  # the classifier's keys, if it is to be loaded
    if isinstance(model, Layouts):
        left_out = _lacked(model, layout)
        classes = [key for key in own if key.startswith(tuple(f"{name}." for name in model.classifiers))]
        if not load_classifier:
            left_out |= {theirs.pop(key) for key in classes}
            classes = []
        state = {name: tensor for name, tensor in state.items() if name not in left_out}
        state.update(_fitted_to_channels(model, own, theirs, state))
        state.update(_without_background(model, layout, own, classes, state))
    faults = list(find_faults(own, theirs, state))
    if faults:
        helps = classes and not list(find_faults(*_less(classes, own, theirs, state)))
        faults += ["load_classifier=False loads all but the classifier"] if helps else []
        raise ValueError(f"weights must be those of this {type(model).__name__}, got {what}: {'; '.join(faults)}")
    if doubt:
        raise ValueError(doubt)
    values = {key: state[name].reshape(own[key].shape) for key, name in theirs.items() if name in state}
    model.load_state_dict({**own, **values})


def _less(
    classes: list[str], own: Mapping[str, Tensor], theirs: Mapping[str, str], state: Mapping[str, Tensor]
) -> tuple[Mapping[str, Tensor], dict[str, str], dict[str, Tensor]]:
    """find_faults's arguments without the classifier's."""
    names = {theirs[key] for key in classes}
    rest = {key: name for key, name in theirs.items() if name not in names}
    return own, rest, {name: tensor for name, tensor in state.items() if name not in names}


def _lacked(model: Layouts, layout: Layout) -> set[str]:
    """The names of what a published network has and `model`, without classifier, last stages or auxiliary classifiers,
    has not."""
    cut = getattr(model, "out_indices", None) is not None or not getattr(model, "num_classes", 1)
    if model.made_by is None or not (cut or model.published_options):
        return set()
    options = dict(model.published_options, device="meta")
    if not model.made_by.keywords.get("num_classes", 1):
        options["num_classes"] = 1
    whole = model.made_by(**options)
    return set(whole.checkpoint_keys(layout.source).values()) - set(layout.names.values())


def _without_background(
    model: Layouts, layout: Layout, own: Mapping[str, Tensor], classes: list[str], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The classifier of ImageNet's classes, where pretrainedmodels has another class before them."""
    rows = {name: state[name] for key in classes if (name := layout.names[key]) in state and state[name].dim()}
    counts = {(len(own[key]), len(rows[name])) for key in classes if (name := layout.names[key]) in rows}
    if counts != {(1000, 1001)} or layout.names != model.checkpoint_keys("pretrainedmodels"):
        return {}
    return {name: tensor[1:] for name, tensor in rows.items()}


def _fitted_to_channels(
    model: Layouts, own: Mapping[str, Tensor], theirs: Mapping[str, str], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The first layer's filters for as many channels as the model's have, if the checkpoint's are for those that the
    published network has."""
    key = next(f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    name = theirs[key]
    if name not in state or state[name].dim() != 4 or not state[name].is_floating_point():
        return {}
    channels = getattr(model, "pretrained_cfg", {}).get("input_size", (3,))[0]
    (filters, wanted, *kernel), got = own[key].shape, state[name].shape[1]
    if state[name].shape != (filters, got, *kernel):
        return {}
    if got != channels or wanted == got or model.get_submodule(key.removesuffix(".weight")).groups != 1:
        return {}
    weight = state[name].float()
    if wanted == 1:
        weight = weight.sum(1, keepdim=True)
    else:
        weight = weight.repeat(1, math.ceil(wanted / got), 1, 1)[:, :wanted] * (got / wanted)
    return {name: weight.to(state[name].dtype)}
