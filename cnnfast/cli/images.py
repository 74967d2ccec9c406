"""Paths of a command line as image files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cnnfast.preprocess import images_under


def find_images(paths: Iterable[str]) -> tuple[list[Path], list[tuple[str, str]]]:
    """The images under `paths`, in order and once each, and (path, reason) of what led to none.

    A directory is walked for files with an image's suffix; a file is taken whatever it is called.
    """
    images: dict[Path, None] = {}  # a dict keeps the order
    failures = []
    for name in paths:
        path = Path(name)
        if path.is_dir():
            found = images_under(path)
            if not found:
                failures.append((name, "no images in this directory"))
            images.update(dict.fromkeys(found))
        elif path.exists():
            images[path] = None
        else:
            failures.append((name, "no such file or directory"))
    return list(images), failures
