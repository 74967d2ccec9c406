"""A gradient that is wanted alone, of each op that has several. Fails if it is another than comes among all, bitwise,
or if one comes that isn't wanted."""

import itertools

import op_cases
import pytest
import scale_shift_cases
import stats_cases
import torch
from numerics import draw, fresh_generator, nan_filled


def call_of(op, options):
    """A function of tensors by name that returns all outputs, and such tensors."""
    if op in op_cases.OPS:
        case = op_cases.make(op, fresh_generator(), **options)
        return lambda tensors: [case.run(**tensors)], case.tensors
    if op in stats_cases.OPS:
        tensors, options = stats_cases.make(op, **options)
        return lambda tensors: stats_cases.run(op, tensors, options), tensors
    tensors, options = scale_shift_cases.make(op, **options)
    return lambda tensors: [scale_shift_cases.run(op, tensors, options)], tensors


@pytest.mark.parametrize(
    "op, options",
    [
        *itertools.product(op_cases.OPS, ({"activation": None}, {"activation": "relu"})),
        *((op, {}) for op in (*stats_cases.OPS, *scale_shift_cases.OPS)),
    ],
    ids=str,
)
def test_only_what_is_wanted(op, options):
    call, tensors = call_of(op, options)
    grads = [draw(fresh_generator(), y.shape, y.dtype) for y in call(tensors)]

    def gradients(wanted):
        leaves = {name: t.detach().clone().requires_grad_(name in wanted) for name, t in tensors.items()}
        with nan_filled():
            torch.autograd.backward(call(leaves), grads)
        return {name: leaf.grad for name, leaf in leaves.items()}

    together = gradients(tensors)
    for name in tensors:
        alone = gradients({name})
        assert [other for other, gradient in alone.items() if gradient is not None] == [name]
        assert torch.equal(alone[name], together[name]), name
