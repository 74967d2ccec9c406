"""The ninja file: which source becomes which object with which flags, and what is linked from them."""

from dataclasses import dataclass, field
from pathlib import Path


def _escape(path: str | Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _flags(flags) -> str:
    return " ".join(str(flag).replace("$", "$$") for flag in flags)


RULES = """\
ninja_required_version = 1.8
rule cxx
  command = {cxx} -MMD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $out
rule link
  command = {cxx} -shared $in -o $out $flags
  description = $out
"""

CUDA_RULES = """\
rule nvcc
  command = {nvcc} -MMD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $out
rule nvcc_link
  command = {nvcc} -shared $in -o $out $flags
  description = $out
"""


@dataclass
class NinjaFile:
    lines: list[str] = field(default_factory=list)

    def rules(self, text: str) -> None:
        self.lines.append(text)

    def build(self, rule: str, output: str, inputs, flags) -> str:
        """One output of one rule; returns the output's name, to be linked."""
        names = " ".join(_escape(name) for name in inputs)
        self.lines += [f"build {_escape(output)}: {rule} {names}", f"  flags = {_flags(flags)}"]
        return output

    def write(self, path: Path) -> None:
        text = "\n".join(self.lines) + "\n"
        if not path.exists() or path.read_text() != text:  # an unchanged file keeps its time stamp
            path.write_text(text)
