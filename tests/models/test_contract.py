"""What every registered network keeps, whoever adds it: maps, classifier, checkpointing, arguments, copies.

In the default run a few networks, and of all what is known without building them; the others are slow.
Fails if features_only keeps a layer that it doesn't need or returns other maps than the whole network, if an argument
is ignored, if gradient checkpointing changes a gradient, or if a mistake isn't one sentence.
"""

import copy
import pickle

import pytest
import torch
from networks import draw_batch_norms, relative
from torch import nn

import cnnfast
from cnnfast._peers import import_timm
from cnnfast.models import register_model, registry
from cnnfast.models.figures import count_parameters
from cnnfast.models.registry import model_entry
from cnnfast.nn import set_backend

NAMES = cnnfast.list_models()
LARGE = 70e6  # parameters above which a network is looked at on the meta device only


QUICK = ("cifar_resnet20", "googlenet", "lenet1", "mobilenet_v2", "nin_cifar")


@pytest.fixture(scope="module", params=[pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in NAMES])
def name(request):
    """All; by default five of as many kinds. Of the module, so that all tests of one network follow each other."""
    return request.param


@pytest.fixture(scope="module")
def meta(name):
    """The network on the meta device in eval mode, which no test changes."""
    return on_meta(name).eval()


@pytest.fixture(scope="module")
def small(name, meta):
    """The same, of the networks that are run with values."""
    if count_parameters(meta) > LARGE:
        pytest.skip("too large for a test of values")


def create(name, **options):
    """lenet5's own outputs are ten pictures of digits."""
    return cnnfast.create_model(
        name, **options, **(dict(output="linear") if name == "lenet5" and "num_classes" in options else {})
    )


def on_meta(name, **options):
    with torch.device("meta"):
        network = create(name, **options)
    set_backend(network, "reference")
    return network


def shape_of(network, batch=2):
    """A small odd resolution, or the only one that the network takes."""
    cfg = network.pretrained_cfg
    channels, *size = cfg["input_size"]
    if not cfg.get("fixed_input_size"):
        size = [max(network.min_size, 33) | 1] * 2
    return (batch, channels, *size)


def logits(y):
    """Of networks that in training return auxiliary ones too."""
    return y[0] if isinstance(y, tuple) else y


@pytest.fixture(scope="module")
def drawn(name, small):
    """With drawn statistics in eval mode."""
    torch.manual_seed(3)
    network = create(name, num_classes=11, drop_rate=0.0)
    draw_batch_norms(network, torch.randn(shape_of(network, 4)))
    return network.eval()


@pytest.fixture
def whole(name, drawn):
    """(name, network with drawn statistics in eval mode, x), of which a test changes nothing but gradients."""
    torch.manual_seed(4)
    yield name, drawn, torch.randn(shape_of(drawn))
    drawn.zero_grad()


@pytest.fixture
def own(whole):
    """The same, the test's own."""
    name, network, x = whole
    return name, copy.deepcopy(network), x


def sharing(network, name, **options):
    """Created with these options, of the weights of the whole network, whose keys it has."""
    with torch.device("meta"):
        other = create(name, **options)
    state = network.state_dict(keep_vars=True)
    other.load_state_dict({key: state[key] for key in other.state_dict()}, strict=True, assign=True)
    return other.train(network.training)


def features_of(name, network, out_indices=None):
    return sharing(network, name, features_only=True, out_indices=out_indices)


def selections(count):
    """out_indices, and the maps they mean."""
    yield None, list(range(count))
    yield 1, [count - 1]
    yield (0,), [0]
    yield [-1, -count, count // 2], sorted({0, count // 2, count - 1})


def test_maps_on_meta(name, meta):
    """Channels and reductions of each map; the first map alone needs fewer layers."""
    info = meta.feature_info
    x = torch.empty(shape_of(meta), device="meta")
    with torch.no_grad():
        maps = meta.forward_intermediates(x, intermediates_only=True)
        assert len(maps) == len(info) and [y.shape[1] for y in maps] == info.channels()
        for y, reduction in zip(maps, info.reduction(), strict=True):
            for side, whole_side in zip(y.shape[2:], x.shape[2:], strict=True):
                missing = whole_side / reduction - side
                assert -2 < missing < 8, "convolutions without padding cost pixels, ceil mode gains one"
        first = on_meta(name, features_only=True, out_indices=(0,)).eval()
        every = on_meta(name, features_only=True).eval()
        assert [y.shape for y in first(x)] == [maps[0].shape] and [y.shape for y in every(x)] == [y.shape for y in maps]
    assert count_parameters(first) <= count_parameters(every) < count_parameters(meta)
    assert count_parameters(first) < count_parameters(every) or len(info) == 1
    for features in (first, every):
        assert features.state_dict().keys() < meta.state_dict().keys()
        assert features.feature_info.out_indices == features.out_indices
        assert features.feature_info.channels() == [y.shape[1] for y in features(x)]


def test_arguments_on_meta(name):
    with torch.device("cpu"):
        network = create(name, num_classes=7, in_chans=2, device="meta", dtype=torch.bfloat16).eval()
    for tensor in (*network.parameters(), *network.buffers()):
        assert tensor.device.type == "meta" and (tensor.dtype == torch.bfloat16 or not tensor.is_floating_point())
    set_backend(network, "reference")
    batch, _, *size = shape_of(network)
    x = torch.empty(batch, 2, *size, device="meta", dtype=torch.bfloat16)
    with torch.no_grad():
        assert network(x).shape == (batch, 7) and network.num_classes == 7
        network.reset_classifier(0)
        assert network(x).dim() == 2 and network.num_classes == 0
        network.reset_classifier(4)
        assert network(x).shape == (batch, 4) and network(x).dtype == torch.bfloat16
    assert {p.device.type for p in network.parameters()} == {"meta"}
    try:
        network = on_meta(name, num_classes=3, global_pool="catavgmax").eval()
    except (TypeError, ValueError) as error:  # of networks that flatten
        assert "global_pool" in str(error)
    else:
        features = network.forward_features(torch.empty(shape_of(network), device="meta"))
        assert network.forward_head(features, pre_logits=True).shape == (batch, 2 * network.num_features)
    for mistake in (dict(no_such_option=1), dict(out_indices=(0,))):
        with pytest.raises((TypeError, ValueError)):
            cnnfast.create_model(name, device="meta", **mistake)


@pytest.mark.parametrize("name", NAMES)
def test_pretrained_cfg(name):
    """timm reads it as its own."""
    cfg = model_entry(name).pretrained_cfg
    resolved = import_timm().data.resolve_data_config(pretrained_cfg=cfg)
    for key in ("input_size", "mean", "std", "crop_pct", "interpolation"):
        assert resolved[key] == cfg[key], key
    assert cfg["architecture"] == name and cfg["label_set"] and cfg["num_classes"] > 1
    assert 0 < cfg["crop_pct"] <= 1 and len(cfg["mean"]) == len(cfg["std"]) == cfg["input_size"][0]
    assert model_entry(name).factory.__name__ and model_entry(name).paper.startswith("http")


def test_what_is_said_of_it(name, meta, monkeypatch):
    """pretrained_cfg is of the network, and its own; the docstring has the parameters, as counted."""
    cfg = meta.pretrained_cfg
    assert import_timm().data.resolve_model_data_config(meta)["input_size"] == cfg["input_size"]
    assert cfg["num_classes"] == meta.num_classes and cfg["classifier"] == meta.classifier_name
    assert meta.get_submodule(cfg["classifier"])
    monkeypatch.setitem(cfg, "input_size", None)
    assert model_entry(name).pretrained_cfg["input_size"]
    assert f"{count_parameters(meta):,} parameters" in model_entry(name).factory.__doc__


@pytest.mark.parametrize("grad", [False, True])
def test_mistakes_in_x(meta, grad):
    batch, channels, *size = shape_of(meta)
    for x, error, says in [
        (torch.zeros(channels, *size), ValueError, rf"\(N, {channels}, H, W\).*\({channels}, "),
        (torch.zeros(batch, channels + 1, *size), ValueError, rf"\(N, {channels}, H, W\).*\({batch}, {channels + 1}, "),
        (torch.zeros(batch, channels, *size, dtype=torch.float64), TypeError, "float32.*float64"),
        (torch.zeros(batch, channels, *size, dtype=torch.uint8), TypeError, "float32.*uint8"),
        ([[1.0]], TypeError, "Tensor.*list"),
        (torch.zeros(1, channels, size[0], 0), ValueError, rf"\(1, {channels}, {size[0]}, 0\)"),
    ]:
        with torch.set_grad_enabled(grad), pytest.raises(error, match=f"x must.*{says}") as raised:
            meta(x)
        assert "\n" not in str(raised.value)


def test_mistaken_indices(meta):
    count, x = len(meta.feature_info), torch.empty(shape_of(meta), device="meta")
    for mistake in (0, -1, count + 1, [count], [-count - 1], [], ["0"], [0.0]):
        with pytest.raises(ValueError, match=r"^indices must be") as raised:
            meta.forward_intermediates(x, mistake)
        assert "\n" not in str(raised.value)
        with pytest.raises(ValueError, match=r"^out_indices must be"):
            meta.keep_features(mistake)
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', got 'NHWC'"):
        meta.forward_intermediates(x, output_fmt="NHWC")


def test_maps(whole):
    """Those of the whole network, to the bit, whichever are asked for; fused, and with gradients layer by layer."""
    name, network, x = whole
    parts = [(*one, features_of(name, network, one[0])) for one in selections(len(network.feature_info))]
    for grad in (False, True):  # which drops what was packed
        with torch.set_grad_enabled(grad):
            y, maps = network.forward_intermediates(x)
            assert torch.equal(y, network.forward_features(x))
            for out_indices, taken, features in parts:
                expected = [maps[i] for i in taken]
                some = network.forward_intermediates(x, out_indices, intermediates_only=True)
                last, early = network.forward_intermediates(x, out_indices, stop_early=True)
                # To pack each part's weights takes longer than all else: two parts'.
                kept = features(x) if grad or out_indices in (None, (0,)) else early
                for got in (some, early, kept):
                    assert isinstance(got, list) and len(got) == len(expected)
                    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
                assert torch.equal(last, expected[-1])
                assert features.out_indices == tuple(taken)
                if grad:
                    features.zero_grad()
                    sum(one.square().mean() for one in kept).backward()
                    assert not [key for key, p in features.named_parameters() if p.grad is None]


def test_stop_early(whole):
    """What lies behind isn't called."""
    _, network, x = whole
    modules = [module for module in network.modules() if not [*module.children()]]
    calls = []
    with torch.enable_grad():
        for options in (dict(indices=[0], stop_early=True), dict(indices=[0])):
            seen = []
            hooks = [module.register_forward_hook(lambda *_, seen=seen: seen.append(1)) for module in modules]
            network.forward_intermediates(x, **options)
            calls.append(len(seen))
            for hook in hooks:
                hook.remove()
    assert 0 < calls[0] < calls[1]


def test_classifier(whole, own):
    _, network, x = whole
    with torch.no_grad():
        y, features = network(x), network.forward_features(x)
        assert y.shape == (2, 11) and torch.equal(network.forward_head(features), y)
        before = network.forward_head(features, pre_logits=True)
        if not isinstance(network.get_classifier(), nn.Conv2d):  # NIN's, which classifies before it pools
            assert relative(network.get_classifier()(before), y) <= 1e-6  # which is one call with the pooling
        other = copy.deepcopy(network)
        other.double().train().reset_classifier(3)
        assert other.get_classifier().training and logits(other(x.double())).shape == (2, 3)
        other.eval().reset_classifier(5)
        assert not other.get_classifier().training and other.forward_head(features.double()).shape == (2, 5)
        _, other, _ = own
        other.reset_classifier(0)
        assert torch.equal(other(x), before) and other.num_classes == 0
        other.reset_classifier(0, "")
        assert torch.equal(other(x), features)


def gradients(network, x):
    """Of a training step, with what it kept: (gradients, buffers, bytes of activations saved for backward)."""
    network.zero_grad()
    parameters, kept = {p.data_ptr() for p in network.parameters()}, {}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(9)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = network(x)
    (sum(one.square().mean() for one in y) if isinstance(y, tuple) else y.square().mean()).backward()
    return {n: p.grad.clone() for n, p in network.named_parameters()}, dict(network.named_buffers()), sum(kept.values())


def test_grad_checkpointing(own):
    """Same gradients and statistics, less memory; or said to be impossible."""
    _, network, x = own
    network.train()
    other = copy.deepcopy(network)
    try:
        other.set_grad_checkpointing()
    except ValueError as error:
        assert "enable must be False" in str(error) and "\n" not in str(error)
        return
    expected, statistics, whole_memory = gradients(network, x)
    got, own, memory = gradients(other, x)
    assert all(torch.equal(got[key], grad) for key, grad in expected.items())
    assert all(torch.equal(own[key], buffer) for key, buffer in statistics.items())
    assert memory < whole_memory
    other.set_grad_checkpointing(False)
    assert gradients(other, x)[2] == whole_memory


def test_drop_rates_act_in_training_only(drawn, own):
    name, without, _ = own
    x = torch.randn(shape_of(without, 4))
    with torch.no_grad():
        for option in ("drop_rate", "drop_path_rate"):
            try:
                network = sharing(copy.deepcopy(drawn), name, num_classes=11, **{"drop_rate": 0.0, option: 0.5})
            except (TypeError, ValueError) as error:
                assert option == "drop_path_rate" and option in str(error)
                continue
            assert torch.equal(network(x), drawn(x))
            training = [logits(network.train()(x)) for _ in range(2)]
            assert not torch.equal(*training)
        training = [logits(without.train()(x)) for _ in range(2)]
        assert torch.equal(*training)


def test_copies(whole):
    """Also after a fused call, whose packings are nobody else's."""
    name, network, x = whole
    with torch.no_grad():
        y = network(x)
        for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
            assert torch.equal(other(x), y) and other.pretrained_cfg == network.pretrained_cfg
            next(other.parameters()).zero_()
            assert torch.equal(network(x), y) and not torch.equal(other(x), y)
        features = features_of(name, network, [len(network.feature_info) // 2])
        assert torch.equal(*copy.deepcopy(features)(x), *features(x))


def test_hooks_on_the_last_map(whole):
    """They see its calls, in the whole network and in features_only."""
    name, network, x = whole
    with torch.no_grad():
        for index in (0, -1):
            features = features_of(name, network, [index])
            expected = features(x)[0]
            for where, run in ((features, features), (network, network.forward_features)):
                source, change = where._tap(network.feature_info[index]["module"])
                seen = []
                hook = where.get_submodule(source).register_forward_hook(lambda _, __, y, seen=seen: seen.append(y * 1))
                run(x)
                hook.remove()
                assert len(seen) == 1
                got = seen[0] if change is None else change(seen[0])
                torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
            assert torch.equal(features(x)[0], expected)


class Plain(nn.Module):
    """Somebody's network, that knows nothing of cnnfast."""

    def __init__(self, num_classes=3):
        super().__init__()
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x):
        return self.fc(x)


def test_networks_of_others(monkeypatch):
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))
    register_model("plain_of_a_user", paper="https://example.org", input_size=(1, 2, 2))(Plain)
    assert cnnfast.list_models("plain_of*") == ["plain_of_a_user"]
    network = cnnfast.create_model("plain_of_a_user", num_classes=5)
    assert network(torch.zeros(1, 4)).shape == (1, 5)
    assert network.pretrained_cfg["input_size"] == (1, 2, 2) and network.pretrained_cfg["classifier"] is None
    with pytest.raises(ValueError, match="features_only must be False for 'plain_of_a_user'") as raised:
        cnnfast.create_model("plain_of_a_user", features_only=True)
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=r"pretrained_cfg must be of .*, got colour"):
        register_model("another_of_a_user", colour="blue")(Plain)


def test_wildcards():
    assert cnnfast.list_models("*") == NAMES == sorted(NAMES)
    assert cnnfast.list_models("mobilenet_v?") == ["mobilenet_v1", "mobilenet_v2"]
    assert cnnfast.list_models("tf_*_b[12]") == ["tf_efficientnet_b1", "tf_efficientnet_b2"]
    assert cnnfast.list_models("MobileNet*") == []
