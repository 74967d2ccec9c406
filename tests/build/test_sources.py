"""Rules that the sources keep. Fails when one is broken: each is a line that someone could write by habit."""

import ast
import functools
import importlib.metadata
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRACKED = [
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
]
SOURCES = [path for path in TRACKED if path.exists()]
PYTHON = [path for path in SOURCES if path.suffix == ".py"]
NATIVE = [path for path in SOURCES if path.parts[len(ROOT.parts)] == "csrc"]


@functools.cache
def imported(path: Path) -> set[str]:
    """Absolute names of modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
    return names


def test_there_are_sources():
    assert len(PYTHON) > 10 and len(NATIVE) > 3


@pytest.mark.parametrize("folder", ["kernels", "bench"])
def test_nobody_imports_the_bare_folder(folder):
    """`import kernels` at the repository's root would be a second module object beside cnnfast.kernels."""
    guilty = [path for path in PYTHON if any(name.split(".")[0] == folder for name in imported(path))]
    assert not guilty


def test_kernels_import_nothing_of_cnnfast():
    kernels = [path for path in PYTHON if path.parts[len(ROOT.parts)] == "kernels"]
    others = {path.name: [n for n in imported(path) if re.match(r"cnnfast(?!\.kernels)(\.|$)", n)] for path in kernels}
    assert not any(others.values()), others


def test_no_source_is_built_for_this_machine_alone():
    """-march=native makes a file that dies on an older CPU."""
    building = [path for path in SOURCES if path.parts[len(ROOT.parts)] in ("setup.py", "build_backend", "csrc", ".ci")]
    guilty = [path for path in building if re.search(r"-m(arch|tune|cpu)=native", path.read_text())]
    assert building and not guilty


def test_csrc_includes_only_the_stable_headers():
    stable = r"torch/(csrc/stable/|headeronly/|csrc/inductor/aoti_torch/c/)"
    for path in NATIVE:
        for header in re.findall(r'#\s*include\s*[<"]([^>"]+)[>"]', path.read_text()):
            foreign = re.match(r"(torch|ATen|c10|caffe2)/", header) and not re.match(stable, header)
            assert not foreign, f"{path.relative_to(ROOT)} includes {header}"


def test_isa_objects_and_bindings_include_no_torch():
    bindings = ("bindings.cpp", "packing.h", "watch.cpp", "watch.h")
    torchless = [path for path in NATIVE if "kernels" in path.parts or path.name in bindings]
    assert torchless
    assert not [path for path in torchless if re.search(r'#\s*include\s*[<"]torch/', path.read_text())]


def test_constraints_pin_every_direct_dependency():
    requirements = importlib.metadata.requires("cnnfast")
    names = {re.match(r"[\w.-]+", requirement)[0] for requirement in requirements} - {"cnnfast"}
    pins = set(re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert names >= {"torch", "pytest", "ruff"}
    assert names <= pins, names - pins
