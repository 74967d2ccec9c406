"""What the check of packed weights sees: each kind of change, nothing where there was none, and its own errors.

tests/nn/test_fused.py has what follows from it; here each part of the check is alone, and fails if it is left out.
"""

import gc
import weakref
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import cnnfast
from cnnfast._C import Watch
from cnnfast.nn import InvertedResidual
from cnnfast.nn.watch import watch


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)  # an entry that is None
        self.bn = nn.BatchNorm2d(4)  # a buffer of integers
        self.act = nn.Sequential(nn.ReLU())

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


@pytest.fixture
def net():
    return Net().eval()


def watched(net, calls=False):
    return watch(list(net.modules()), net, calls)


def in_place(net):
    with torch.no_grad():
        net.conv.weight.mul_(2)


def in_place_twice_undone(net):
    with torch.no_grad():
        net.conv.weight.neg_().neg_()


def new_data(net):
    net.conv.weight.data = net.conv.weight.data.clone()


def removed_entry(net):
    del net.bn.bias


def rounded(net):
    net.conv.half().float()


def swapped_children(net):
    net.conv, net.bn = net.bn, net.conv


CHANGES = {
    "in_place": in_place,
    "in_place_undone": in_place_twice_undone,
    "buffer_in_place": lambda net: net.bn.running_mean.add_(1),
    "new_data": new_data,
    "new_parameter": lambda net: setattr(net.conv, "weight", nn.Parameter(net.conv.weight.detach())),
    "new_buffer": lambda net: setattr(net.bn, "running_var", net.bn.running_var.clone()),
    "new_integer_buffer": lambda net: setattr(net.bn, "num_batches_tracked", torch.tensor(0)),
    "filled_entry": lambda net: setattr(net.conv, "bias", nn.Parameter(torch.zeros(4))),
    "emptied_entry": lambda net: setattr(net.bn, "weight", None),
    "added_entry": lambda net: net.conv.register_parameter("scale", None),
    "removed_entry": removed_entry,
    "rounded": rounded,
    "loaded": lambda net: net.bn.load_state_dict(nn.BatchNorm2d(4).state_dict()),
    "new_child": lambda net: setattr(net, "bn", nn.BatchNorm2d(4).eval()),
    "new_grandchild": lambda net: net.act.__setitem__(0, nn.SiLU()),
    "added_child": lambda net: net.act.append(nn.ReLU()),
    "removed_child": lambda net: net.act.__delitem__(0),
    "swapped_children": swapped_children,
    "training": lambda net: net.bn.train(),
    "grandchild_training": lambda net: net.act[0].train(),
    "forward_hook": lambda net: net.conv.register_forward_hook(print),
    "forward_pre_hook": lambda net: net.act[0].register_forward_pre_hook(print),
    "backward_hook": lambda net: net.bn.register_full_backward_hook(print),
    "backward_pre_hook": lambda net: net.act.register_full_backward_pre_hook(print),
}
CALLS = {
    "forward": lambda net: setattr(net.act[0], "forward", torch.relu),
    "forward_of_the_block": lambda net: setattr(net, "forward", print),
    "compile": lambda net: net.bn.compile(),
    "hook_on_the_block": lambda net: net.register_forward_hook(print),
    "training_of_the_block": lambda net: setattr(net, "training", True),
}


@pytest.mark.parametrize("calls", [False, True])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_change_is_seen(net, change, calls):
    check = watched(net, calls)
    assert check.unchanged() and check.unchanged()
    change(net)
    assert not check.unchanged()


@pytest.mark.parametrize("change", CALLS.values(), ids=CALLS.keys())
def test_what_is_put_around_a_call_is_seen_where_asked_for(net, change):
    calls, weights = watched(net, calls=True), watched(net)
    assert calls.unchanged() and weights.unchanged()
    change(net)
    assert not calls.unchanged() and weights.unchanged()


def compiled_and_not(net):
    net.bn.compile()
    net.bn._compiled_call_impl = None


def hooked_and_not(net):
    net.conv.register_forward_hook(print).remove()


UNCHANGED = {
    "calls": lambda net: net(torch.randn(1, 3, 5, 5)),
    "gradients": lambda net: net(torch.randn(1, 3, 5, 5)).sum().backward(),
    "integer_buffer_in_place": lambda net: net.bn.num_batches_tracked.add_(1),
    "attribute": lambda net: setattr(net.conv, "note", 1),
    "compiled_and_not": compiled_and_not,
    "hooked_and_not": hooked_and_not,
    "trained_and_not": lambda net: net.bn.train().eval(),
}


@pytest.mark.parametrize("calls", [False, True])
@pytest.mark.parametrize("change", UNCHANGED.values(), ids=UNCHANGED.keys())
def test_nothing_is_seen_where_nothing_changed(net, change, calls):
    check = watched(net, calls)
    change(net)
    assert check.unchanged()


def test_inference_tensors(net):
    """They count no versions: only another address or object tells."""
    with torch.inference_mode():
        net = Net().eval()
    check = watched(net)
    assert check.unchanged()
    with torch.inference_mode():
        net.conv.weight.data = net.conv.weight.data.clone()
    assert not check.unchanged()


def test_no_other_tensor_gets_the_address(net):
    """The address of a freed storage goes to another tensor of its size: the watch keeps it from being freed."""
    array = np.zeros((4, 3, 3, 3), np.float32)
    storage = weakref.ref(array)
    net.conv.weight.data = torch.from_numpy(array)
    del array
    check = watched(net)
    net.conv.weight.data = torch.zeros(4, 3, 3, 3)
    assert storage() is not None and not check.unchanged()
    del check
    assert storage() is None


def plain(tensor, version=Tensor._version, data_ptr=Tensor.data_ptr):
    rest = dict(members=[], unversioned=[], aliases=[], hooks=[], instances=[], calls=False)
    return Watch(versioned=[tensor], version=version, data_ptr=data_ptr, **rest)


def test_other_kinds_of_attributes():
    """A torch that has a property and a function where today's has descriptors of C functions."""
    x = torch.zeros(3)
    for change in (lambda: x.add_(1), lambda: setattr(x, "data", torch.zeros(3))):
        check = plain(x, property(lambda tensor: tensor._version), lambda tensor: tensor.data_ptr())
        assert check.unchanged()
        change()
        assert not check.unchanged()


class Refusing(TorchFunctionMode):
    def __init__(self, refused):
        super().__init__()
        self.refused = refused

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.refused:
            raise RuntimeError("refused")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("refused", [Tensor._version.__get__, Tensor.data_ptr], ids=["version", "data_ptr"])
def test_errors_of_torch_are_raised(refused):
    check = plain(torch.zeros(3))
    with Refusing([refused]), pytest.raises(RuntimeError, match="refused"):
        check.unchanged()
    assert check.unchanged()


def test_errors_of_other_attributes_are_raised():
    answers = iter([0])
    check = plain(torch.zeros(3), property(lambda tensor: 0), lambda tensor: next(answers))
    with pytest.raises(StopIteration):
        check.unchanged()
    answers = iter([0, "0"])
    check = plain(torch.zeros(3), property(lambda tensor: 0), lambda tensor: next(answers))
    with pytest.raises(TypeError):
        check.unchanged()


def test_missing_mode_is_an_error(net):
    check = watched(net)
    del net.bn.training
    with pytest.raises(KeyError, match="training"):
        check.unchanged()


def test_only_tensors_are_taken():
    with pytest.raises(TypeError, match="TensorBase"):
        plain(OrderedDict())


def test_network_that_ran_is_freed():
    block = InvertedResidual(6, 6, 3, expand_ratio=2).eval()
    network = cnnfast.create_model("mobilenet_v2", num_classes=3).eval()
    with torch.no_grad():
        block(torch.randn(1, 6, 5, 5))
        network(torch.randn(1, 3, 32, 32))
    assert block._packing is not None and network._packing is not None
    left = [weakref.ref(object) for object in (block, network, *network.modules(), *network.parameters())]
    del block, network
    gc.collect()
    assert not [reference for reference in left if reference() is not None]


@pytest.mark.parametrize("calls", [False, True])
def test_module_that_holds_its_watch_is_freed(calls):
    net = Net().eval()
    net.check = watched(net, calls)
    left = [weakref.ref(object) for object in (*net.modules(), *net.parameters())]
    del net
    gc.collect()
    assert not [reference for reference in left if reference() is not None]


def test_collection_while_one_is_made(net):
    """The collector may come before the constructor has run, or when it has failed."""
    watches = [Watch.__new__(Watch) for _ in range(3)]
    gc.collect()
    with pytest.raises(TypeError):
        Watch()
    with pytest.raises(TypeError):
        plain(OrderedDict())
    del watches
    gc.collect()
    assert watched(net).unchanged()
