"""What the networks share: the order of their layers, feature maps, classifier, the check of their input."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cnnfast.models.features import FeatureInfo
from cnnfast.models.layouts import Layouts
from cnnfast.models.layouts import renamed as renamed
from cnnfast.models.plan import NetworkChain, PooledLinear, plan_of
from cnnfast.nn import FusedModule, FusedSequential, GlobalPool
from cnnfast.nn.fused import only_calls
from cnnfast.nn.sequential import Call, Chain, fuse_run, train_run
from cnnfast.nn.sync_batch_norm import BATCH_NORMS

Step = str | tuple[str, ...]


class Network(Layouts, FusedModule):
    """A classifier: forward_features, then forward_head.

    A subclass names its layers in `steps`, in the order of calls: a module ("blocks", a Sequential opens by itself), or
    the layers that lie on the network and for inference are one call (("conv_stem", "bn1", "act1")): the network folds
    these, as timm's keys want it; blocks fold themselves. It calls `_make_head`, and defines `classifier_name`
    and `feature_info`, a list of dicts as in timm (num_chs, reduction, module).
    """

    min_size = 1  # least height and width of x
    steps: list[Step]
    feature_info: Any  # a FeatureInfo after __init__
    out_indices: tuple[int, ...] | None = None  # of the maps that forward returns instead of logits
    grad_checkpointing = False

    # head

    def _make_head(self, num_features: int, num_classes: int, drop_rate: float, global_pool: str, factory: Any) -> None:
        self.num_features = num_features
        self.drop_rate = drop_rate
        self._make_classifier(num_classes, global_pool, factory)

    def _make_classifier(self, num_classes: int, global_pool: str, factory: Any) -> None:
        self.num_classes = num_classes
        self.global_pool = GlobalPool(global_pool)
        features = self.num_features * self.global_pool.feat_mult()
        fc = nn.Linear(features, num_classes, **factory) if num_classes > 0 else nn.Identity()
        setattr(self, self.classifier_name, fc)

    def get_classifier(self) -> nn.Module:
        return self.get_submodule(self.classifier_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a fresh one of `num_classes`, or by none (0); `global_pool` None keeps the
        pooling."""
        parameter = next(self.parameters())
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self._make_classifier(num_classes, pool_type, dict(device=parameter.device, dtype=parameter.dtype))
        self.get_classifier().train(self.training)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(N, num_features, H, W) -> (N, num_classes), or the classifier's input with `pre_logits`."""
        plan = None if pre_logits else plan_of(self, "head")
        return self._head(x, pre_logits) if plan is None else plan(x)

    def _head(self, x: Tensor, pre_logits: bool) -> Tensor:
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.get_classifier()(x)

    def _head_modules(self) -> list[nn.Module]:
        """What `_head` calls, where that is average pooling and a linear layer, dropout aside; else nothing."""
        return [self.global_pool, self.get_classifier()]

    # features

    def forward(self, x: Tensor) -> Any:
        if self.out_indices is not None:
            return self.forward_intermediates(x, self.out_indices, stop_early=True, intermediates_only=True)
        plan = plan_of(self, "forward")
        if plan is None:
            return self.forward_head(self.forward_features(x))
        self._check_input(x, plan.first)
        return plan(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> (N, num_features, H / reduction, W / reduction), the last layer before the head."""
        return self._run(x)[0]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """(forward_features(x), feature maps), or the maps alone with `intermediates_only`.

        Args:
            indices: which maps of `feature_info`: all for None, the last n for an int, or those of a sequence.
            norm: as in timm, for networks that end in one; these have it in every layer.
            stop_early: leaves out the layers after the last map that is asked for; the first result is then that map.
            output_fmt: "NCHW".
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        names = [self.feature_info[i]["module"] for i in self.feature_info.taken(indices)]
        y, taps = self._run(x, names, stop_early)
        maps = [taps[name] for name in names]
        return maps if intermediates_only else (maps[-1] if stop_early else y, maps)

    def keep_features(self, out_indices: int | Sequence[int] | None = None) -> None:
        """Makes forward return the feature maps `out_indices` as a list (see create_model's features_only), and drops
        the layers behind the last of them and the classifier."""
        taken = self.feature_info.taken(out_indices, "out_indices")
        self.reset_classifier(0, "")
        last = self._tap(self.feature_info[taken[-1]]["module"])[0]
        while self._drop_last_step(last):
            pass
        self.out_indices = tuple(taken)
        self.feature_info = FeatureInfo(self.feature_info[: taken[-1] + 1], taken)
        self.drop_packing()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training keeps only the inputs of the blocks and computes the rest again for backward."""
        blocks = [name for name, call in self._calls(open_all=True) if _is_block(call)]
        if enable and not blocks:
            raise ValueError(f"enable must be False for {type(self).__name__}, which has no blocks")
        self.grad_checkpointing = enable

    def _tap(self, module: str) -> tuple[str, Call | None]:
        """The layer after which feature_info's `module` is taken, and what is done to its output, if anything."""
        return module, None

    # The order of calls

    def layers(self) -> Chain:
        return Chain([self._step(step, lambda modules: Chain([("", m) for m in modules])) for step in self.steps])

    def fuse(self) -> Chain:
        steps: list[tuple[str, Call]] = []
        for step in self.steps:
            join = functools.partial(self._fuse_step, channels_last=not steps)
            steps.append(self._step(step, join))
        return NetworkChain(steps, PooledLinear(self._head_modules(), self.backend))

    def fuse_training(self) -> Chain:
        return Chain([self._step(step, self._train_step) for step in self.steps])

    def _train_step(self, modules: list[nn.Module]) -> Call:
        return train_run(modules, self.backend)

    def _fuse_step(self, modules: list[nn.Module], channels_last: bool) -> Call:
        return fuse_run(modules, self.backend, channels_last=channels_last)

    def _step(self, step: Step, join: Callable[[list[nn.Module]], Call]) -> tuple[str, Call]:
        if isinstance(step, str):
            return step, self.get_submodule(step)
        return step[-1], join([self.get_submodule(name) for name in step])

    def folded_modules(self) -> list[nn.Module]:
        names = [name for step in self.steps if isinstance(step, tuple) for name in step]
        return [self, *(module for name in names for module in self.get_submodule(name).modules())]

    def _calls(self, taps: Sequence[str] = (), open_all: bool = False) -> list[tuple[str, Call]]:
        """What x goes through, by name. Made before the first call: see FusedModule.direct."""
        steps = (self.fused() or self.training_form() or self.layers()).steps
        return [call for name, step in steps for call in _opened(name, step, taps, open_all)]

    def _run(
        self, x: Tensor, modules: Sequence[str] = (), stop_early: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The last output and those of `modules` by name; with `stop_early` nothing behind the last of these runs."""
        self._check_input(x, self._first_conv())  # people exchange it
        sources = {module: self._tap(module) for module in modules}
        checkpointing = self.grad_checkpointing and self.training and torch.is_grad_enabled()
        calls = self._calls([source for source, _ in sources.values()], checkpointing)
        ends: dict[int, list[str]] = {}
        for module, (source, _) in sources.items():
            ends.setdefault(_last_of(source, calls), []).append(module)
        if stop_early:
            calls = calls[: max(ends) + 1]
        taps: dict[str, Tensor] = {}
        for n, (_, call) in enumerate(calls):
            x = _checkpointed(call, x) if checkpointing and _is_block(call) else call(x)
            for module in ends.get(n, ()):
                change = sources[module][1]
                taps[module] = x if change is None else change(x)
        return x, taps

    def _drop_last_step(self, last: str) -> bool:
        """Removes the last layer unless it is `last`, inside it, or holds it; whether it did."""
        step = self.steps[-1]
        layers = (step,) if isinstance(step, str) else step
        if last in layers:
            return False
        holder = layers[-1]
        if last.startswith(holder + "."):
            return _drop_after(self.get_submodule(holder), last[len(holder) + 1 :])
        for name in layers:
            parent, _, child = name.rpartition(".")
            delattr(self.get_submodule(parent), child)
        self.steps = self.steps[:-1]
        return True

    def _first_conv(self) -> nn.Conv2d:
        return next(module for module in self.modules() if isinstance(module, nn.Conv2d))

    def _check_input(self, x: Tensor, first: nn.Conv2d) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() != 4 or x.shape[1] != first.in_channels:
            raise ValueError(f"x must have shape (N, {first.in_channels}, H, W), got {tuple(x.shape)}")
        if x.shape[2] < self.min_size or x.shape[3] < self.min_size:
            raise ValueError(f"x must be at least {self.min_size} x {self.min_size}, got shape {tuple(x.shape)}")
        if x.dtype != first.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"x must have the parameters' dtype {first.weight.dtype}, got {x.dtype}")


def _opened(name: str, step: Call, taps: Sequence[str], open_all: bool) -> Iterator[tuple[str, Call]]:
    """The calls that `step` comes to: those of its children if it is a Sequential that nothing is put around, or that
    holds one of `taps`, which are then seen."""
    holds_tap = any(tap.startswith(name + ".") for tap in taps)
    if type(step) is nn.Sequential and (holds_tap or open_all or only_calls(step, nn.Sequential.forward)):
        for child_name, child in step.named_children():
            yield from _opened(f"{name}.{child_name}", child, taps, open_all)
    elif isinstance(step, FusedSequential) and (holds_tap or only_calls(step, FusedModule.forward)):
        chain = step.fused() or step.training_form() or Chain(list(step.named_children()))
        for child_name, call in chain.steps:
            yield f"{name}.{child_name}", call
    elif isinstance(step, FusedModule) and not open_all:
        yield name, step.direct()
    else:
        yield name, step


def _last_of(source: str, calls: Sequence[tuple[str, Call]]) -> int:
    """The position of the call that makes the output of the module `source`."""
    return max(n for n, (name, _) in enumerate(calls) if name == source or name.startswith(source + "."))


def _drop_after(holder: nn.Module, last: str) -> bool:
    """Removes the last layer of a Sequential unless it is `last`, inside it, or holds it; whether it did."""
    name, child = list(holder.named_children())[-1]
    if name == last or name.startswith(last + "."):
        return False
    if last.startswith(name + "."):
        return isinstance(child, nn.Sequential) and _drop_after(child, last[len(name) + 1 :])
    delattr(holder, name)
    return True


def _is_block(call: Call) -> bool:
    """Whether computing `call` again saves memory: a single layer's input is all that its gradient needs."""
    single = isinstance(call, (nn.Conv2d, *BATCH_NORMS))
    return isinstance(call, nn.Module) and not single and next(call.parameters(), None) is not None


def _checkpointed(block: Any, x: Tensor) -> Tensor:
    contexts = lambda: (contextlib.nullcontext(), _kept_statistics(block))  # noqa: E731 (forward, computing again)
    return checkpoint(block, x, use_reentrant=False, context_fn=contexts)


@contextlib.contextmanager
def _kept_statistics(block: nn.Module) -> Iterator[None]:
    """Computing a block again leaves the running statistics as its first computation made them."""
    norms = [module for module in block.modules() if isinstance(module, BATCH_NORMS)]
    kept = [[buffer.clone() for buffer in norm.buffers()] for norm in norms]
    try:
        yield
    finally:
        with torch.no_grad():
            for norm, buffers in zip(norms, kept, strict=True):
                for buffer, value in zip(norm.buffers(), buffers, strict=True):
                    buffer.copy_(value)


def make_divisible(channels: float, divisor: int = 8) -> int:
    """The multiple of `divisor` nearest to `channels`, at least `divisor` and not below 0.9 * channels."""
    nearest = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * channels else nearest


def init_by_fan_out(network: nn.Module) -> None:
    """As TensorFlow's implementations of MobileNet and EfficientNet, and timm's: convolutions normal by fan-out, the
    classifier uniform."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * math.prod(module.kernel_size) // module.groups
            nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.out_features)
            nn.init.uniform_(module.weight, -bound, bound)
            nn.init.zeros_(module.bias)
