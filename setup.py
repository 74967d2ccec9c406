"""Packages and the build of the extensions; everything declarative is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

sys.path.insert(0, str(Path(__file__).parent))

from build_backend.command import BuildExtensions

# Installed as cnnfast.kernels and cnnfast.bench: a bare `kernels` is another project.
ELSEWHERE = {"cnnfast.kernels": "kernels", "cnnfast.bench": "bench"}

packages = [*find_packages(include=["cnnfast", "cnnfast.*"]), "cnnfast.data"]
for name, folder in ELSEWHERE.items():
    packages += [name, *(f"{name}.{sub}" for sub in find_packages(folder))]

setup(
    license="Apache-2.0",
    packages=packages,
    package_dir={"": ".", **ELSEWHERE},
    ext_modules=[Extension("cnnfast._C", sources=[])],  # a wheel for this platform; BuildExtensions does the rest
    cmdclass={"build_ext": BuildExtensions},
)
