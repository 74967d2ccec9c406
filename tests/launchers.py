"""What every op's tests under the interpreter share: a case of op_cases.py through cnnfast.kernels' launchers.

Outputs and scratch are NaN-filled. A `module` other than the op's own is a copy with a fault in it.
"""

import importlib
import itertools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from numerics import assert_gradients_by_policy, draw, nan_filled
from op_cases import Case, drawn_away_from_kinks, make, with_exact_gate

import cnnfast.kernels
from cnnfast.ops import activations, backends
from cnnfast.ops._registration import empty_image
from cnnfast.ops.arguments import edges, pair

COPIES = itertools.count()  # of kernels, in this process


def kernels_of(op: str) -> ModuleType:
    return importlib.import_module(backends.triton_module(op))


def arguments(case: Case, name: str, **more: Any) -> list[Any]:
    """Those of the schema of `name` (the op or its `_backward`), in its order, less `backend`."""
    values = {**case.tensors, **more, "pointwise_first": case.options.get("order") == "pointwise_first"}
    for option, value in case.options.items():
        if option.endswith("activation"):
            values[option] = activations.code(option, value)
        elif option == "padding":
            values[option] = edges(value)
        elif option in ("stride", "dilation"):
            values[option] = pair(option, value)
        else:
            values.setdefault(option, value)
    schema = getattr(torch.ops.cnnfast, name).default._schema
    return [values.get(argument.name) for argument in schema.arguments if argument.name != "backend"]


def run(case: Case, module: ModuleType | None = None) -> Any:
    with nan_filled():
        return getattr(module or kernels_of(case.op), case.op)(*arguments(case, case.op))


def check(case: Case, module: ModuleType | None = None) -> None:
    """Values by the policy, and the memory format that the fakes promise."""
    ours, x = run(case, module), case.x
    case.check(ours)
    nhwc = x.shape[1] > 1 and x.stride(1) == 1 and not x.is_contiguous()
    assert ours.is_contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)


def gradients(
    case: Case, grad: torch.Tensor, output_mask: int = -1, module: ModuleType | None = None, **more: torch.Tensor
) -> dict[str, torch.Tensor]:
    """By argument name, those of absent tensors left out; they must have no elements. more: further arguments."""
    name = f"{case.op}_backward"
    with nan_filled():
        computed = getattr(module or kernels_of(case.op), name)(
            *arguments(case, name, grad=grad, output_mask=output_mask, **more)
        )
    arguments_ = getattr(torch.ops.cnnfast, case.op).default._schema.arguments
    tensors = [argument.name for argument in arguments_ if "Tensor" in str(argument.type)]
    by_name = dict(zip(tensors, computed, strict=True))
    for absent in [name for name in tensors if name not in case.tensors]:
        assert by_name.pop(absent).numel() == 0, absent
    return by_name


def check_gradients(
    case: Case, generator: torch.Generator, terms: Callable[[Case, torch.Size], dict[str, int]],
    rounded: int = 0, module: ModuleType | None = None,
) -> None:  # fmt: skip
    """terms: of the longest sum in each tensor's gradient, from the case and the result's shape."""
    shape = case.reference(**case.tensors, **case.options).shape
    grad = draw(generator, shape, case.x.dtype)
    ours = gradients(case, grad, module=module)
    for name, gradient in ours.items():
        assert gradient.dtype is case.tensors[name].dtype, name
        if name in ("x", "residual"):  # what the fakes promise
            tensor = case.tensors[name]
            assert gradient.stride() == empty_image(tensor, tensor.shape).stride(), name
    assert_gradients_by_policy(
        ours, case.reference, grad, case.tensors, case.options, terms=terms(case, shape), rounded=rounded
    )


def away_from_kinks(op: str, generator: torch.Generator, **row: Any) -> Case:
    return drawn_away_from_kinks(lambda: with_exact_gate(make(op, generator, away_from_kinks=True, **row)))


def padded_by_nan(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor inside a larger NaN-filled one, so that a read over its edges is seen and is none over the heap's."""
    flat = torch.full((3 * tensor.numel() + 256,), float("nan"), dtype=tensor.dtype)
    inside = flat.as_strided(tensor.shape, tensor.stride(), tensor.numel() + 128)
    return inside.copy_(tensor)


def survivors(
    op: str,
    faults: dict[str, tuple[str, str]],
    check_module: Callable[[ModuleType], None],
    folder: Path,
    monkeypatch: Any,
) -> list[str]:
    """The faults that `check_module` doesn't see: a text, and what its first occurrence becomes, in kernels/<op>.py or
    else in <op>_weight.py, spatial.py, products.py."""
    source = Path(cnnfast.kernels.__file__).parent
    monkeypatch.syspath_prepend(folder)

    def passes(old: str = "", new: str = "") -> bool:
        package = folder / f"{op}_{next(COPIES)}"  # a name that no other test's copy has: modules are kept by name
        package.mkdir()
        for file in source.glob("*.py"):
            (package / file.name).write_text(file.read_text())
        files = [package / f"{stem}.py" for stem in (op, f"{op}_weight", "spatial", "products")]
        faulty = next((file for file in files if file.exists() and old in file.read_text()), None)
        assert faulty, f"no longer in the kernels: {old}"
        faulty.write_text(faulty.read_text().replace(old, new, 1))
        module = importlib.import_module(f"{package.name}.{op}")
        try:
            check_module(module)
        except AssertionError:
            return False
        return True

    assert passes(), "the copy without a fault is wrong"
    return [name for name, (old, new) in faults.items() if passes(old, new)]
