"""The PEP 517 backend: setuptools', which also asks for torch where the target environment has none.

An isolated build needs torch's headers and nothing else of it. They come from the torch of the environment that is
being installed into (`sysconfig.get_path("purelib")` names it even inside the isolated build), so that a torch already
there is neither replaced nor downloaded again.
"""

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks that stay as they are

from build_backend.toolchain import find_torch, pinned


def _with_torch(requirements: list[str]) -> list[str]:
    torch = find_torch()
    return requirements if torch is not None and torch.is_supported else [*requirements, pinned("torch")]


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return _with_torch(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return _with_torch(build_meta.get_requires_for_build_editable(config_settings))
