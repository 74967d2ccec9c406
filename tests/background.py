"""What a run does beside its tests: it builds, and runs other processes, on cores that the tests leave."""

from __future__ import annotations

import shutil


def yielding(command: list[str]) -> list[str]:
    """The command at a lower priority, so that whoever runs tests one after the other doesn't wait for it."""
    return ["nice", *command] if shutil.which("nice") else command
