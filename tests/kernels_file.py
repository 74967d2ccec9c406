"""docs/kernels.md: one half by kernels_table.py (Triton), one by cuda_table.py (CUDA C++), each under its own title."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docs/kernels.md"
TITLES = ("# Triton kernels, compiled ahead of time", "# CUDA C++ kernels, compiled ahead of time")


def halves() -> dict[str, str]:
    """By title, which each begins with; empty where it isn't there yet."""
    text = FILE.read_text(encoding="utf-8") if FILE.exists() else ""
    parts = [part.strip() + "\n" for part in re.split(r"^(?=# )", text, flags=re.MULTILINE) if part.strip()]
    return dict.fromkeys(TITLES, "") | {part.split("\n", 1)[0]: part for part in parts}


def write(half: str) -> None:
    """Puts it in the place of the one with its title."""
    every = halves() | {half.split("\n", 1)[0]: half}
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text("\n".join(every[title] for title in TITLES if every[title]), encoding="utf-8")
