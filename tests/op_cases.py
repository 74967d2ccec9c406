"""One description of a call for every op, so that every test runs over all of them."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from numerics import LAYOUTS, assert_close_by_policy, channel_scales, draw, fresh_generator
from torch import Tensor

import cnnfast.ops
import cnnfast.reference
from cnnfast.ops.activations import CODES

OPS = ("depthwise_conv2d", "pointwise_conv2d", "separable_conv2d", "inverted_residual", "squeeze_excite", "conv2d")
WITH_KERNEL = (
    "depthwise_conv2d",
    "separable_conv2d",
    "inverted_residual",
    "conv2d",
)  # ops whose packed form is told its size
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ROUNDED = dict(zip(OPS, (0, 0, 1, 2, 0, 1), strict=True))  # as their docstrings say
PACKED_ROUNDED = ROUNDED | {"conv2d": 0}  # and gradients: no result of ATen's is rounded in between
WITH_SCALES = ("pointwise_conv2d", "separable_conv2d", "inverted_residual", "conv2d")  # ops whose packing takes them


@dataclass
class Case:
    """Tensors and options of one call, by argument name."""

    op: str
    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def x(self) -> Tensor:
        return self.tensors["x"]

    @property
    def absent(self) -> dict[str, None]:
        """Arguments that have no default but may be None."""
        lacks = self.op == "inverted_residual" and "expand_weight" not in self.tensors
        return {"expand_weight": None} if lacks else {}

    @property
    def reference(self) -> Callable[..., Tensor]:
        return functools.partial(getattr(cnnfast.reference, self.op), **self.absent)

    @property
    def terms(self) -> int:
        """Of the longest sum in the forward pass."""
        weights = [tensor for name, tensor in self.tensors.items() if name.endswith("weight")]
        pixels = self.x.shape[2:].numel() if any("reduce_weight" in name for name in self.tensors) else 1
        return max(pixels, *(weight[0].numel() for weight in weights))

    def run(self, **changes: Any) -> Tensor:
        return getattr(cnnfast.ops, self.op)(**{**self.absent, **self.tensors, **self.options, **changes})

    def pack(self, **scales: Tensor) -> Tensor:
        order = {"order": self.options["order"]} if "order" in self.options else {}
        return getattr(cnnfast.ops, f"pack_{self.op}")(**self.absent, **self.parameters, **order, **scales)

    def draw_scales(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Of each stage, over three decades, of both signs: what batch normalisation multiplies by."""
        dtype = torch.float64 if self.x.dtype is torch.float64 else torch.float32
        scales = {}
        for name, weight in self.tensors.items():
            if name.endswith("weight") and not name.startswith("se_"):
                scale = channel_scales(generator, weight.shape[0], 3)
                sign = torch.randint(0, 2, scale.shape, generator=generator) * 2 - 1
                scales[name.replace("weight", "scale")] = (scale * sign).to(dtype)
        return scales

    def with_biases_times(self, scales: dict[str, Tensor]) -> Case:
        """So that a bias doesn't dominate what it is added to (see make)."""
        changed = {}
        for name, scale in scales.items():
            bias = self.tensors.get(name.replace("scale", "bias"))
            if bias is not None:
                changed[name.replace("scale", "bias")] = (bias * scale).to(bias.dtype)
        return type(self)(self.op, {**self.tensors, **changed}, self.options)

    def folded(self, scales: dict[str, Tensor]) -> Case:
        """The case whose weights are multiplied by these, in float64: for `check`, not to be run."""
        folded = {}
        for name, scale in scales.items():
            weight = name.replace("scale", "weight")
            folded[weight] = self.tensors[weight].double() * scale.double()[:, None, None, None]
        return type(self)(self.op, {**self.tensors, **folded}, self.options)

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.tensors.items() if name not in ("x", "gate", "residual")}

    @property
    def packed_options(self) -> dict[str, Any]:
        """What <op>_packed takes besides x and packed."""
        tensors, options = self.tensors, dict(self.options)
        windowed = tensors.get("dw_weight", tensors["weight"] if self.op in ("depthwise_conv2d", "conv2d") else None)
        last = {"inverted_residual": "project_weight", "separable_conv2d": "pw_weight"}.get(self.op, "weight")
        if options.get("order") == "pointwise_first":
            last = "dw_weight"
        if self.op != "squeeze_excite":
            options["out_channels"] = tensors[last].shape[0]
        if windowed is not None:
            options["kernel_size"] = tuple(windowed.shape[2:])
        if self.op == "inverted_residual":
            options["expanded_channels"] = tensors["dw_weight"].shape[0]
        return options | {name: tensors[name] for name in ("gate", "residual") if name in tensors}

    def run_packed(self, packed: Tensor | None = None, **changes: Any) -> Tensor:
        packed = self.pack() if packed is None else packed
        return getattr(cnnfast.ops, f"{self.op}_packed")(
            **{"x": self.x, "packed": packed, **self.packed_options, **changes}
        )

    def to(self, change: Callable[[Tensor], Tensor]) -> Case:
        return type(self)(self.op, {name: change(t) for name, t in self.tensors.items()}, dict(self.options))

    def check(self, ours: Tensor, rounded: int | None = None, packed: bool = False) -> None:
        if rounded is None:
            rounded = (PACKED_ROUNDED if packed else ROUNDED)[self.op] + ("gate" in self.tensors)
        assert_close_by_policy(ours, self.reference, terms=self.terms, rounded=rounded, **self.tensors, **self.options)


def make(
    op: str,
    generator: torch.Generator,
    *,
    n: int = 2,
    c: int = 8,
    size: Sequence[int] = (9, 8),
    out: int = 12,
    k: Sequence[int] = (3, 3),
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = "same",
    dilation: int | Sequence[int] = 1,
    activation: str | None = "relu",
    multiplier: int = 1,
    expand: bool = True,
    excite: bool = False,
    pointwise_first: bool = False,
    bias: bool = True,
    residual: bool = True,
    dtype: torch.dtype = torch.float32,
    layout: str = "channels_last",
    decades: float = 0.0,
    away_from_kinks: bool = False,
) -> Case:
    """A case with drawn tensors; what an op hasn't (residual of depthwise, kernel of pointwise) is left out.

    Weights are drawn so that pre-activations have a standard deviation of about 2: relu6 saturates now and then.
    """

    def parameters(prefix: str, *shape: int, scale_in: Tensor | float = 1.0) -> dict[str, Tensor]:
        """Weight and bias, scaled by output channel; the bias an eighth of what it is added to.

        A bias that dominates the sum makes every later rounding as large as itself: float32's
        error then grows as 2 sqrt(K), PyTorch's as much as ours, and the bound of numerics.py is for other sums.
        """
        scale = channel_scales(generator, shape[0], decades)
        fan_in = torch.Size(shape[1:]).numel()
        tensors = {f"{prefix}weight": draw(generator, shape, dtype, scale=2 / fan_in**0.5 * scale.reshape(-1, 1, 1, 1))}
        if bias:
            tensors[f"{prefix}bias"] = draw(generator, shape[:1], dtype, scale=scale * scale_in / 8)
        scales.append(scale * scale_in)
        return tensors

    geometry: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
    scales = [channel_scales(generator, c, decades)]  # of each stage's output
    x = draw(generator, (n, c, *size), dtype, scale=scales[0].reshape(-1, 1, 1), away_from_kinks=away_from_kinks)
    tensors = {"x": x}
    if op == "depthwise_conv2d":
        tensors |= parameters("", c * multiplier, 1, *k, scale_in=scales[0].repeat_interleave(multiplier))
        options = {**geometry, "pre_activation": activation, "activation": activation}
    elif op == "conv2d":
        tensors |= parameters("", out, c, *k, scale_in=scales[0].square().mean().sqrt())
        options = {**geometry, "activation": activation}
    elif op == "pointwise_conv2d":
        tensors |= parameters("", out, c, 1, 1)
        if excite:
            tensors["gate"] = draw(generator, (n, c, 1, 1), torch.float64).sigmoid().to(dtype)
        options = {"stride": stride, "activation": activation}
    elif op == "separable_conv2d":
        if pointwise_first:
            tensors |= parameters("pw_", out, c, 1, 1)
            tensors |= parameters("dw_", out * multiplier, 1, *k, scale_in=scales[-1].repeat_interleave(multiplier))
            geometry["order"] = "pointwise_first"
        else:
            tensors |= parameters("dw_", c * multiplier, 1, *k, scale_in=scales[0].repeat_interleave(multiplier))
            tensors |= parameters("pw_", out, c * multiplier, 1, 1)
        options = {**geometry, "pre_activation": activation, "mid_activation": activation, "activation": activation}
    elif op == "squeeze_excite":
        tensors |= parameters("reduce_", c // 4 + 1, c, 1, 1)
        tensors |= parameters("expand_", c, c // 4 + 1, 1, 1)
        options = {"activation": activation, "gate_activation": "sigmoid", "post_activation": activation}
    else:
        expanded = c * multiplier + 3 if expand else c  # any number, not only multiples of c
        if expand:
            tensors |= parameters("expand_", expanded, c, 1, 1)
        tensors |= parameters("dw_", expanded, 1, *k, scale_in=scales[-1])
        if excite:
            tensors |= parameters("se_reduce_", expanded // 4 + 1, expanded, 1, 1)
            tensors |= parameters("se_expand_", expanded, expanded // 4 + 1, 1, 1)
        tensors |= parameters("project_", out, expanded, 1, 1)
        options = {**geometry, "activation": activation, "se_activation": activation, "gate_activation": "sigmoid"}
    tensors = {name: LAYOUTS[layout](t) if t.dim() == 4 and name == "x" else t for name, t in tensors.items()}
    case = Case(op, tensors, options)
    if residual and op != "depthwise_conv2d":
        shape = case.reference(**tensors, **options).shape
        case.tensors["residual"] = LAYOUTS[layout](draw(generator, shape, dtype, scale=scales[-1].reshape(-1, 1, 1)))
    return case


def arguments_of(overload: Any, tensors: dict[str, Tensor], options: dict[str, Any]) -> tuple[Any, ...]:
    """The positional arguments of an op's overload, by the schema's argument names; padding 'same', no pooling."""
    values = {**tensors, "padding": [-1], "max_pool": [-1], "output_mask": 2**12 - 1}
    values["pointwise_first"] = options.get("order") == "pointwise_first"
    values |= {name: CODES[value] for name, value in options.items() if name.endswith("activation")}
    for name in ("stride", "dilation", "kernel_size"):
        if name in options:
            value = options[name]
            values[name] = [value] * 2 if isinstance(value, int) else list(value)
    values["dilation"] = values.get("dilation", [1, 1])
    values |= {name: options[name] for name in ("out_channels", "expanded_channels") if name in options}
    return tuple(values.get(a.name) for a in overload._schema.arguments if a.name != "backend")


def schema_arguments(case: Case, name: str) -> list[Any]:
    """The positional arguments of torch.ops.cnnfast.<name> for this case."""
    options = {**case.options, **(case.packed_options if name.endswith("_packed") else {})}
    values = dict(case.tensors)
    if "packed" in name:
        values["packed"] = case.pack()
    if "backward" in name:
        values["grad"] = draw(fresh_generator(), case.run().shape, case.x.dtype)
        values = {key: v.detach() if isinstance(v, Tensor) else v for key, v in values.items()}
    return arguments_of(getattr(torch.ops.cnnfast, name).default, values, options)


def drawn_away_from_kinks(make_case: Callable[[], Case]) -> Case:
    """A case none of whose pre-activations is so near 0 or 6 that a rounding flips a gradient; 0 itself is exact."""
    for _ in range(100):
        case = make_case()
        doubles = {name: tensor.double() for name, tensor in case.tensors.items()}
        last = "post_activation" if "post_activation" in case.options else "activation"
        y = case.reference(**doubles, **{**case.options, last: None})
        near = ((y.abs() < 1e-5) & (y != 0)) | ((y - 6).abs() < 1e-5)
        if case.options[last] not in ("relu", "relu6") or not near.any():
            return case
    raise AssertionError("no draw is away from the kinks")


def moved_from_last_kinks(case: Case) -> Case:
    """By its residual, so far that rounding an intermediate to x's dtype moves nothing over a kink.

    A case without residual gets None as its last activation instead.
    """
    if case.options["activation"] not in ("relu", "relu6") or case.x.dtype in (torch.float32, torch.float64):
        return case
    if "residual" not in case.tensors:
        case.options["activation"] = None
        return case
    margin = 64 * torch.finfo(case.x.dtype).eps
    doubles = {name: tensor.double() for name, tensor in case.tensors.items()}
    y = case.reference(**doubles, **{**case.options, "activation": None})
    for kink in (0, 6):
        push = torch.where(y < kink, -2 * margin, 2 * margin)
        case.tensors["residual"] += torch.where((y - kink).abs() < margin, push, 0).to(case.x.dtype)
    return case


def with_exact_gate(case: Case) -> Case:
    """The gates as powers of two: x * gate is exact then, so that rounding it moves no pre-activation over a kink."""
    if "gate" in case.tensors:
        case.tensors["gate"] = case.tensors["gate"].log2().round().exp2()
    return case


def padded_copy(x: torch.Tensor, dim: int) -> torch.Tensor:
    """x as a slice of something larger."""
    shape = list(x.shape)
    shape[dim] += 5
    layout = torch.channels_last if not x.is_contiguous() else torch.contiguous_format
    larger = torch.full(shape, math.nan, dtype=x.dtype).contiguous(memory_format=layout)
    part = larger.narrow(dim, 2, x.shape[dim])
    part.copy_(x)
    return part


def every_second(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((x, torch.full_like(x, math.nan)), dim=-1).flatten(-2)[..., ::2]


def off_by_one(x: torch.Tensor) -> torch.Tensor:
    buffer = torch.full((x.numel() + 1,), math.nan, dtype=x.dtype)
    part = buffer[1:].as_strided(x.shape, x.stride(), 1)
    part.copy_(x)
    return part


NONCONTIGUOUS = {
    "slice of channels": lambda x: padded_copy(x, 1),
    "slice of rows": lambda x: padded_copy(x, 2),
    "slice of columns": lambda x: padded_copy(x, 3),
    "every second column": every_second,
    "storage offset": off_by_one,
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded batch": lambda x: x[:1].expand(x.shape),
    "expanded channels": lambda x: x[:, :1].expand(x.shape),
}


def all_pairs(factors: dict[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Few combinations in which every two values of every two factors meet; the same each time (greedy)."""
    items = {name: [(name, i) for i in range(len(values))] for name, values in factors.items()}
    missing = {
        frozenset(pair) for a, b in itertools.combinations(factors, 2) for pair in itertools.product(items[a], items[b])
    }

    def new_pairs(item: tuple[str, int], row: dict[str, int]) -> int:
        return sum(frozenset((item, other)) in missing for other in row.items())

    rows = []
    while missing:
        row = dict(min(missing, key=sorted))
        for name in factors:
            if name not in row:
                row |= [max(items[name], key=functools.partial(new_pairs, row=dict(row)))]
        missing -= {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
        rows.append({name: factors[name][row[name]] for name in factors})
    return rows


def identifier(row: dict[str, Any]) -> str:
    return "-".join(f"{value}".replace("torch.", "").replace(" ", "") for value in row.values())
