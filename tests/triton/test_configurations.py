"""Which configuration a launch takes, and the file of tuned ones; no kernel runs.

Fails if a configuration depends on the batch or on what its key leaves out, a row of the table is never taken, a file
is used that is damaged or another GPU's or version's, lost in a write that fails, or touched by an import. test_faults
breaks a copy of the sources, a line at a time, and wants the same checks to fail.
"""

import functools
import os
import sys
import warnings
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from ahead_of_time import TARGETS
from fresh import run_fresh
from kernel_cases import CASES
from kernel_launches import (
    NCHW,
    NHWC,
    depthwise_conv2d,
    local_response_norm,
    pointwise_conv2d,
    scale_shift,
    scale_shift_excite,
    scale_shift_max_pool,
)
from kernel_launches import squeeze_excite as excite
from launchers import survivors
from numerics import fresh_generator

from cnnfast.bench.launches import recording
from cnnfast.kernels import configurations, stats, tuned
from cnnfast.kernels.depthwise_conv2d import depthwise_conv2d_fwd_kernel

GPU = {
    "device": "GPU 1",
    "capability": "9.0",
    "torch": "2.13.0+cu130",
    "triton": "3.7.0",
    "kernels": "0123456789abcdef",
}
META = torch.device("meta")
KEY = ("a_kernel", ("dtype", "bfloat16"), ("C", 40), ("stride", (2, 1)), ("channels_last", True))
TUNED = {KEY: {"BLOCK_P": 64, "num_warps": 8}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CNNFAST_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuned, "_entries", {})


def fresh_process(module, of=None):
    """A process that has read nothing yet, on the GPU `of`."""
    return mock.patch.multiple(module, _entries={}, identity=lambda device: of or GPU)


# ---- which configuration


@pytest.mark.parametrize(
    ("capability", "hip", "wanted"),
    [
        ((7, 0), None, "turing"),
        ((7, 5), None, "turing"),
        ((8, 0), None, "ampere"),
        ((8, 6), None, "small"),
        ((8, 7), None, "ampere"),
        ((8, 9), None, "small"),
        ((9, 0), None, "hopper"),
        ((10, 3), None, "blackwell"),
        ((12, 0), None, "small"),
        ((9, 4), "7.0", "amd"),
    ],
)
def test_device_class(capability, hip, wanted, monkeypatch):
    monkeypatch.setattr("cnnfast.kernels.launch.capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert configurations.device_class(META) == wanted


def chosen(launch, target="sm_90"):
    """[(key, blocks)] of the launches that `launch` makes, as on the target."""
    seen = []
    with recording(target), mock.patch.object(
        configurations, "tuner", lambda kernel, blocks, *rest: seen.append((blocks.key, dict(blocks))) or True
    ):  # fmt: skip
        launch()
    return seen


def with_batch(case, images):
    args = [(images, *value[1:]) if isinstance(value, tuple) else value for value in case.launch.args]
    return functools.partial(case.launch.func, *args, **case.launch.keywords)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("batch norm")])  # which has none
def test_the_batch_plays_no_part(name):
    assert chosen(with_batch(CASES[name], 1)) == chosen(with_batch(CASES[name], 37)) != []


def test_which_of_scale_and_shift_has_a_gradient_plays_no_part():
    x, weight, scale = (torch.empty(shape, device="meta") for shape in ((2, 24, 9, 9), (24, 1, 3, 3), (24,)))
    geometry = ((1, 1), (), (1, 1), 1)
    first, *others = (
        chosen(functools.partial(stats.depthwise_gradients, x, x, weight, None, scale, scale, geometry, mask))
        for mask in (0b01000, 0b10000, 0b11000)
    )
    assert all(other == first != [] for other in others)


def drawn_launch(generator):
    pick = lambda *options: options[torch.randint(len(options), (), generator=generator)]  # noqa: E731
    size, channels, dtype = pick(1, 7, 14, 19, 56), pick(3, 24, 40, 256, 512, 728), pick(*tuned_dtypes())
    shape, common = (pick(1, 5), channels, size, pick(size, 20)), dict(dtype=dtype, memory_format=pick(NHWC, NCHW))
    activation = pick(0, 1, 4)
    return pick(
        lambda: pointwise_conv2d(
            shape, pick(16, 24, 512, 728), pick(1, 2), gate=pick(True, False), residual=pick(True, False),
            activation=activation, tf32=pick(True, False), **common,
        ),
        lambda: depthwise_conv2d(shape, pick(1, 3, 5, 7), pick(1, 2), activation=activation, **common),
        lambda: excite(shape, 16, residual=pick(True, False), post_activation=activation, **common),
        lambda: local_response_norm(shape, pick(3, 5, 19), **common),
        lambda: scale_shift(shape, residual=pick(True, False), activation=activation, **common),
        lambda: scale_shift_excite(shape, 16, activation=activation, **common),
        lambda: scale_shift_max_pool(shape, max_pool=(3, pick(1, 2), 1), activation=activation, **common),
    )  # fmt: skip


def tuned_dtypes():
    return torch.float32, torch.bfloat16, torch.float16, torch.float64


@pytest.mark.parametrize("target", ("sm_75", "sm_86", "sm_90", "gfx942"))
def test_the_key_says_all(target):
    """Two launches of one key have one configuration, or a tuned one would be put in the place of another."""
    generator = fresh_generator()
    assert distinct_keys([drawn_launch(generator) for _ in range(150)], target) > 100


def distinct_keys(launches, target):
    known = {}
    for launch in launches:
        for key, blocks in chosen(launch, target):
            assert known.setdefault(key, blocks) == blocks, key
    return len(known)


def test_launchers_that_would_be_wrong_are_seen():
    def by_batch(kernel, x, formula, /, **shape):
        return configurations.configuration(kernel, x, formula, images=x.shape[0], **shape)

    def without_channels(kernel, x, formula, /, **shape):
        return configurations.configuration(kernel, x, formula, **shape | {"K": 0})

    with mock.patch("cnnfast.kernels.channels.configuration", by_batch), pytest.raises(AssertionError):
        test_the_batch_plays_no_part("squeeze-excite 256 @ 56, bf16")
    with mock.patch("cnnfast.kernels.depthwise_conv2d.configuration", without_channels), pytest.raises(AssertionError):
        sizes = [(2, channels, 14, 14) for channels in (3, 728)]
        distinct_keys([functools.partial(depthwise_conv2d, size, 3, 1, torch.float32) for size in sizes], "sm_90")


def test_every_row_of_the_table_is_taken():
    """By one of the cases that are compiled ahead of time."""
    taken = set()
    from_table = configurations.from_table

    def noted(kernel, x, default, shape):
        device = configurations.device_class(x.device)
        rows = configurations.TABLE.get(kernel.__name__, ())
        fitting = [row for row in rows if device in row.devices and row.where(**shape)]
        taken.update((kernel.__name__, device, id(row)) for row in fitting[:1])
        return from_table(kernel, x, default, shape)

    with mock.patch.object(configurations, "from_table", noted):
        for target in TARGETS:
            for name in CASES:
                if name.startswith(("pointwise", "depthwise 3x3")):
                    chosen(CASES[name].launch, target)
    rows = {
        (kernel, device, id(row))
        for kernel, rows in configurations.TABLE.items()
        for row in rows
        for device in row.devices
    }
    assert taken == rows


@pytest.mark.parametrize(
    ("target", "changed"),
    [
        ("sm_75", {}),
        ("sm_80", {"BLOCK_C": 32, "num_stages": 4}),
        ("sm_90", {"BLOCK_K": 256, "num_stages": 4}),
        ("gfx942", {"num_stages": 2}),
    ],
)
def test_the_table_changes_the_formula(target, changed):
    launch = functools.partial(pointwise_conv2d, (4, 728, 19, 19), 728, activation=1)
    (_, ours), *_ = chosen(launch, target)
    with mock.patch.object(configurations, "TABLE", {}):
        (_, formula), *_ = chosen(launch, target)
    assert ours == {**formula, **changed}


# ---- the file


def check_file(tuned):
    """Of a module tuned.py: what is kept comes back, in another process too, and nothing else does."""
    with fresh_process(tuned):
        assert tuned.entries(META) == {}
        tuned.keep(META, TUNED)
        assert tuned.entries(META) == TUNED
        file = tuned.path(GPU)
        assert [*file.parent.iterdir()] == [file], "something besides the file"
    good = file.read_text()
    with fresh_process(tuned):
        assert tuned.entries(META) == TUNED
        other = {("b_kernel", *KEY[1:]): {"num_warps": 2}}
        first = dict(tuned.entries(META))
        with fresh_process(tuned):  # another process, meanwhile
            tuned.keep(META, other)
        tuned.keep(META, {KEY: {"BLOCK_P": 32, "num_warps": 4}})
        assert first == TUNED
    with fresh_process(tuned):
        assert tuned.entries(META) == {**other, KEY: {"BLOCK_P": 32, "num_warps": 4}}
    good = file.read_text()
    for name in GPU:  # another GPU or version looks for another file; what is in it must agree with its name
        of = GPU | {name: "9"}
        with fresh_process(tuned, of):
            assert tuned.path(of) != file and tuned.entries(META) == {}
        with fresh_process(tuned, of):
            tuned.path(of).write_text(good)
            assert refused(tuned) == f"it is for {name} {GPU[name]!r}, here is '9'"
            tuned.path(of).unlink()
    for damaged in (good[:-20], "", "[]", "{}", good.replace('"BLOCK_P": 32', '"BLOCK_P": 33'), good + "x", "\0\xff"):
        file.write_text(damaged)
        with fresh_process(tuned):
            assert refused(tuned)
    with fresh_process(tuned), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned.keep(META, TUNED)  # a damaged one is written anew
    with fresh_process(tuned):
        assert tuned.entries(META) == TUNED
        for broken in ("os.replace", "json.dump"):
            with mock.patch(broken, side_effect=OSError("no space left")), pytest.raises(OSError):
                tuned.keep(META, other)
            assert [*file.parent.iterdir()] == [file]
    with fresh_process(tuned):
        assert tuned.entries(META) == TUNED, "a write that failed has left its traces"
        assert tuned.clear() == [file] and tuned.entries(META) == {} and tuned.clear() == []


def refused(tuned):
    """The reason that the one warning gives; the second look says nothing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert tuned.entries(META) == {} and tuned.entries(META) == {}
    (warning,) = caught
    text = str(warning.message)
    assert text.startswith("cnnfast doesn't use the tuned configurations in ") and "\n" not in text
    return text.split(".json: ")[1].split(" (`cnnfast tune --clear`")[0]


def test_file():
    check_file(tuned)


def test_what_cannot_be_read_is_said():
    with fresh_process(tuned):
        tuned.path(GPU).mkdir(parents=True)
        assert refused(tuned)


def test_tensors_on_no_gpu_have_no_entries(monkeypatch):
    monkeypatch.setattr(tuned, "read", None)
    assert tuned.entries(META) == tuned.entries(torch.device("cpu")) == {}
    with pytest.raises(ValueError, match="device must be a GPU, got cpu"):
        tuned.keep(torch.device("cpu"), TUNED)


def test_identity_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, device.index))
    first, second = (tuned.identity(torch.device("cuda", index)) for index in (0, 1))
    assert first["device"] == "GPU 0" and second["capability"] == "9.1" and tuned.path(first) != tuned.path(second)
    assert first["torch"] == torch.__version__ and first["kernels"] == tuned.sources() and len(tuned.sources()) == 16


def test_a_tuned_configuration_is_taken():
    x = torch.empty(2, 24, 4, 4, dtype=torch.float16, device="meta")
    look = functools.partial(configurations.configuration, depthwise_conv2d_fwd_kernel, x, lambda: {"BLOCK_P": 64})
    with fresh_process(tuned):
        key = look(C=24, stride=(1, 1)).key
        tuned.keep(META, {key: {"BLOCK_P": 16}})
        assert look(C=24, stride=(1, 1)) == {"BLOCK_P": 16} and look(C=23, stride=(1, 1)) == {"BLOCK_P": 64}


def test_a_launcher_takes_what_was_tuned_since_its_last_call():
    """One that keeps its formula's answers."""
    launch = CASES["pointwise, depthwise 3x3, 24 -> 144, bf16"].launch
    with fresh_process(tuned):
        ((key, blocks),) = chosen(launch)
        other = blocks | {"num_warps": 2 * blocks["num_warps"]}
        tuned.keep(META, {key: other})
        assert chosen(launch) == [(key, other)]
    assert chosen(launch) == [(key, blocks)]


def test_a_shape_costs_the_formula_once(monkeypatch):
    """On a GPU; and what is tuned afterwards comes before."""
    monkeypatch.setattr(configurations, "_computed", {})
    monkeypatch.setattr("cnnfast.kernels.launch.capability", lambda device: (9, 0))
    first, second = (SimpleNamespace(dtype=torch.float16, device=torch.device("cuda", index)) for index in (0, 1))
    asked = []
    look = functools.partial(configurations.configuration, depthwise_conv2d_fwd_kernel)
    with fresh_process(tuned):
        for x, channels, times in ((first, 8, 1), (first, 8, 1), (first, 9, 2), (second, 8, 3)):
            blocks = look(x, lambda: asked.append(1) or {"BLOCK_P": 64}, C=channels)
            assert blocks == {"BLOCK_P": 64} and len(asked) == times and blocks.device == x.device
        tuned.keep(first.device, {look(first, dict, C=8).key: {"BLOCK_P": 32}})
        assert look(first, dict, C=8) == {"BLOCK_P": 32} and look(second, dict, C=8) == {"BLOCK_P": 64}


@pytest.mark.parametrize(
    ("platform", "environment", "wanted"),
    [
        ("linux", {"CNNFAST_CACHE_DIR": "/c"}, "/c"),
        ("linux", {}, "/home/a/.cache/cnnfast"),
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/cnnfast"),
        ("darwin", {"XDG_CACHE_HOME": "/x"}, "/home/a/Library/Caches/cnnfast"),
        ("win32", {"LOCALAPPDATA": "/l"}, "/l/cnnfast"),
        ("win32", {}, "/home/a/AppData/Local/cnnfast"),
    ],
)
def test_folder(platform, environment, wanted, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    with mock.patch.dict(os.environ, {"HOME": "/home/a", **environment}, clear=True):
        assert tuned.folder().as_posix() == wanted


def test_import_reads_and_writes_no_file(tmp_path):
    """Nor does a look at what `info` says; what times launches isn't even imported."""
    code = (
        "import sys; seen = []\n"
        "sys.addaudithook(lambda event, args: seen.append(str(args[0])) if event in ('open', 'os.mkdir') else None)\n"
        "import cnnfast, cnnfast.kernels.pointwise_conv2d, cnnfast.info; cnnfast.info.collect()\n"
        f"print([name for name in seen if name.startswith({str(tmp_path)!r})], 'cnnfast.kernels.tuning' in sys.modules)"
    )
    assert run_fresh(code, CNNFAST_CACHE_DIR=str(tmp_path / "cache"))[0] == "[] False"


FAULTS = {
    "any file is good": ("if content.get(name) != value:", "if False:"),
    "the version of Triton plays no part": ("of.values()", "[v for v in of.values() if v != of['triton']]"),
    "a damaged file is used": ("content.get(\"checksum\") != checksum(content.get(\"entries\"))", "False"),
    "pairs come back as lists": ("tuple(part) if isinstance(part, list) else part", "part"),
    "written where it is read": ("os.replace(written.name, file)", "file.write_text(Path(written.name).read_text())"),
    "a temporary file stays": ("os.unlink(written.name)", "pass"),
    "another process's entries are lost": ("**entries(device), **read(of), **new", "**entries(device), **new"),
    "what is new is lost": ("**read(of), **new", "**read(of)"),
    "old before new": ("**entries(device), **read(of), **new", "**new, **entries(device), **read(of)"),
    "asked again each time": ("found = _entries[device] = {} if", "found = {} if"),
    "cleared, but not forgotten": ("_entries.clear()", "pass"),
}  # fmt: skip


def test_faults(tmp_path, monkeypatch):
    def check_module(module):
        cache = tmp_path / f"cache of {module.__name__}"
        monkeypatch.setenv("CNNFAST_CACHE_DIR", str(cache))
        try:
            check_file(module)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise AssertionError from error

    assert not survivors("tuned", FAULTS, check_module, tmp_path, monkeypatch)
