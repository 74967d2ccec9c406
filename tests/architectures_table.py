"""docs/architectures.md: its table of all networks, made by `python tests/architectures_table.py` from the package's
table of figures (`python -m cnnfast.models.figures`); the text around it is written by hand. test_architectures.py
holds both to the networks."""

import re
from pathlib import Path
from typing import Any

from cnnfast.models.figures import table
from cnnfast.models.registry import model_entry

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docs/architectures.md"
HEADER = "| network | paper | input | parameters | MACs | the same as | tests |\n|---|---|---|---:|---:|---|---|\n"

TESTED_WITH = {  # families that share a file of tests
    "bn_inception": "googlenet",
    "inception_v3": "inception",
    "inception_v4": "inception",
    "inception_resnet_v2": "inception",
    "mobilenet_v1": "mobilenet",
    "mobilenet_v2": "mobilenet",
    "resnet_cifar": "resnet",
}


def row(name: str, figures: dict[str, Any]) -> str:
    """`figures`: as cnnfast.models.figures has them."""
    entry = model_entry(name)
    size = " x ".join(map(str, entry.pretrained_cfg["input_size"][1:]))
    peers = ", ".join(f"{package} `{theirs}`" for package, theirs in entry.peers.items()) or "-"
    paper = f"[{entry.year}]({entry.paper})"
    counts = f"{figures['parameters']:,} | {figures['macs']:,}"
    return f"| `{name}` | {paper} | {size} | {counts} | {peers} | {tests_of(name)} |\n"


def tests_of(name: str) -> str:
    """The family's file, and test_twins.py where timm or torchvision has the network."""
    family = model_entry(name).factory.__module__.rpartition(".")[2]
    files = [f"tests/models/test_{TESTED_WITH.get(family, family)}.py"]
    files += ["tests/models/test_twins.py"] if model_entry(name).peers else []
    return ", ".join(f"[{Path(file).stem.removeprefix('test_')}](../{file})" for file in files)


def rows() -> dict[str, str]:
    """By name, of the table as it stands in the file."""
    found = re.findall(r"^(\| `(\w+)` \| \[.*\n)", FILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name: line for line, name in found}


def main() -> None:
    text = FILE.read_text(encoding="utf-8")
    lines = HEADER + "".join(row(name, figures) for name, figures in table().items())
    start = text.index(HEADER.split("\n")[0])
    end = start + len(re.match(r"(\|.*\n)+", text[start:])[0])
    FILE.write_text(text[:start] + lines + text[end:], encoding="utf-8")


if __name__ == "__main__":
    main()
