"""A folder of class folders, and which output of the network each of them stands for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cnnfast.preprocess import images_under
from cnnfast.pretrained import imagenet_labels, imagenet_synsets

_LABEL = re.compile(r"(?:(n\d{8})(?![^\s,])[\s,]*)?(.*)")  # WordNet id, names
_SHOWN = 3  # folders named in an error


@dataclass(frozen=True)
class Sample:
    """An image, its path below the data folder ("/" on every system), and the index of its class."""

    file: Path
    path: str
    target: int


@dataclass(frozen=True)
class ImageFolder:
    """The images of `folder`, whose class folders are the classes `targets`; `names` has one for every output."""

    folder: Path
    targets: dict[str, int]
    names: tuple[str, ...]
    matched: str  # how folders and classes were matched, in words
    samples: list[Sample]

    def limited(self, count: int) -> list[Sample]:
        """`count` of the samples, spread evenly over all of them: over the classes then too."""
        total = len(self.samples)
        return self.samples if count >= total else [self.samples[i * total // count] for i in range(count)]


def read_folder(
    folder: Path, num_classes: int, labels: Path | None = None, label_set: str = "imagenet-1k"
) -> ImageFolder:
    """The images in the class folders of `folder`, at any depth, sorted.

    A class folder is named for its class: by the class's name or WordNet id in `labels`, or without it, for networks
    with ImageNet's 1000 classes (`label_set` "imagenet-1k"), by imagenet_labels or imagenet_synsets; case, "_" and "-"
    don't matter. Or by the index of the network's output ("0" to "999"). Where no folder's name is known and there are
    as many as the network has classes, the n-th in sorted order is output n, as in torchvision's ImageFolder.

    Args:
        num_classes: outputs of the network.
        labels: a text file with a line for each output, in order: its WordNet id, its name, or names separated by
            commas or tabs.

    Raises:
        ValueError: no class folders, or they can't be matched.
    """
    if not folder.is_dir():
        raise ValueError(f"data must be a folder of class folders, got {folder}")
    folders = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise ValueError(f"data must have a folder for each class, got {folder}, which has no folders")
    lines = _known_names(num_classes, labels, label_set)
    names, targets, matched = _match(folders, lines, num_classes)
    samples = [
        Sample(file, file.relative_to(folder).as_posix(), targets[name])
        for name in folders
        for file in images_under(folder / name)
    ]
    return ImageFolder(folder, targets, names, matched, samples)


def _known_names(num_classes: int, labels: Path | None, label_set: str) -> list[list[str]] | None:
    """Of each output the names it is known by, the one to be printed first."""
    if labels is not None:
        lines = [line.strip() for line in labels.read_text(encoding="utf-8").splitlines() if line.strip()]
        if len(lines) != num_classes:
            raise ValueError(f"labels must have {num_classes} lines, one for each class, got {len(lines)} in {labels}")
        return [_names_of(line) for line in lines]
    if num_classes == 1000 and label_set == "imagenet-1k":
        return [list(both) for both in zip(imagenet_labels(), imagenet_synsets(), strict=True)]
    return None


def _names_of(line: str) -> list[str]:
    """ "n01440764 tench, Tinca tinca": tench, Tinca tinca, both as they stand there, n01440764."""
    synset, names = _LABEL.fullmatch(line).groups()  # type: ignore[union-attr]  # it matches any line
    parts = [part.strip() for part in re.split(r"[,\t]", names)]
    return [name for name in (*parts, names, synset) if name]


def _match(
    folders: Sequence[str], known: list[list[str]] | None, num_classes: int
) -> tuple[tuple[str, ...], dict[str, int], str]:
    """Names of the outputs, the output of each folder, and how that was found."""
    indices: dict[str, set[int]] = {}
    for index, names in enumerate(known or []):
        for name in names:
            indices.setdefault(_plain(name), set()).add(index)
    printed = tuple(names[0] for names in known) if known else tuple(f"class {n}" for n in range(num_classes))
    found = [name for name in folders if _plain(name) in indices]
    if len(found) == len(folders):
        return printed, {name: _only(name, indices[_plain(name)]) for name in folders}, "names"
    if found:
        strangers = [name for name in folders if _plain(name) not in indices]
        raise ValueError(f"class folders must all be named for classes, got {_some(strangers)}")
    if all(name.isdecimal() for name in folders):
        return printed, _by_number(folders, num_classes), "numbers"
    if len(folders) != num_classes:
        raise ValueError(
            f"class folders must be named for classes, or be {num_classes}, one for each class in sorted order, got"
            f" {len(folders)}, among them {_some(folders)}"
        )
    return (printed if known else tuple(folders)), {name: n for n, name in enumerate(folders)}, "sorted order"


def _by_number(folders: Sequence[str], num_classes: int) -> dict[str, int]:
    targets = {name: int(name) for name in folders}
    if beyond := [name for name, target in targets.items() if target >= num_classes]:
        raise ValueError(f"class folders named by numbers must be 0 to {num_classes - 1}, got {_some(beyond)}")
    if len(folders) == num_classes and list(targets.values()) != list(range(num_classes)):
        # "10" before "2" is the order of the classes of a network that was trained through torchvision's ImageFolder.
        raise ValueError(
            f"class folders named by numbers must sort as the numbers do ('02', not '2'), got {_some(folders)}:"
            " say by labels which class each of them is"
        )
    return targets


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _only(name: str, indices: set[int]) -> int:
    if len(indices) > 1:
        raise ValueError(f"class folders must be named for one class, got {name!r}: classes {sorted(indices)}")
    return next(iter(indices))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more
