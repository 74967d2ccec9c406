"""Compiles Triton kernels for GPUs that aren't here, with the arguments that their launchers pass.

A launcher runs on meta tensors while its launches are recorded (bench/launches.py); each is then specialised by
Triton's own rules (alignment, integers that are 1) and compiled for a target. Not under TRITON_INTERPRET, which is read
when a kernel is decorated: an interpreted kernel can't be compiled.
"""

import pathlib
import re
import subprocess
import tempfile
from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (75, 80, 86, 89, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
# Bytes of shared memory (LDS) that one program may use.
SHARED_LIMIT = dict(sm_75=65_536, sm_80=166_912, sm_86=101_376, sm_89=101_376, sm_90=232_448, sm_100=232_448)
SHARED_LIMIT |= dict(sm_120=101_376, gfx942=65_536)


@dataclass
class Compiled:
    registers: int
    spilled: int  # bytes of stack or local memory a thread; 0 wanted
    shared: int  # bytes a program
    narrowest_load: int  # bytes a thread, from global memory, in loops where there are any
    instructions: int
    assembly: str


def compile_for(launch, target_name):
    target = TARGETS[target_name]
    backend = make_backend(target)
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    bound, specialization, options = bind(*launch.args, **launch.kwargs, debug=False)
    options, signature, constexprs, attrs = launch.kernel._pack_args(
        backend, dict(launch.kwargs), bound, specialization, options
    )
    source = ASTSource(launch.kernel, signature, constexprs, attrs)
    built = triton.compile(source, target=target, options=options.__dict__)
    return (amd_resources if target.backend == "hip" else nvidia_resources)(built)


def in_loops(assembly):
    """Its lines from a label to a later branch to it; all if there is no loop."""
    lines = assembly.splitlines()
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"(\$?\.?L\w+):", line))}
    inside = set()
    for i, line in enumerate(lines):
        target = re.search(r"\b(?:bra|s_c?branch)\S*\s+(\S+?);?(?:\s|$)", line)
        if target and labels.get(target[1], i) < i:
            inside.update(range(labels[target[1]], i))
    return "\n".join(lines[i] for i in sorted(inside)) if inside else assembly


def narrowest(widths):
    """Of the loads in the code, but those that together load less than a quarter of its bytes, such as a gate."""
    return min(width for width in widths if widths.count(width) * width * 4 >= sum(widths))


def nvidia_resources(built):
    """From the machine code, by the tools that come with Triton."""
    tools = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(built.asm["cubin"])
        cubin.flush()
        run = lambda tool, *args: subprocess.run([tools / tool, *args, cubin.name], capture_output=True, text=True)  # noqa: E731
        usage = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", run("cuobjdump", "-res-usage").stdout))
        assembly = run("nvdisasm", "-c").stdout
    code = in_loops(built.asm["ptx"])
    loads = re.findall(r"\bld\.global[.\w:]*?(?:\.v(\d))?\.b(\d+)", code)
    copies = re.findall(r"\bcp\.async\.c[ag]\.shared\.global [^;]*?\], (0x\w+)", code)
    return Compiled(
        registers=int(usage["REG"]),
        spilled=int(usage["STACK"]) + int(usage["LOCAL"]),
        shared=built.metadata.shared,
        narrowest_load=narrowest([int(n or 1) * int(bits) // 8 for n, bits in loads] + [int(n, 16) for n in copies]),
        instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", assembly, re.M)),
        assembly=assembly,
    )


def amd_resources(built):
    """From the assembler's notes on the kernel."""
    assembly = built.asm["amdgcn"]
    note = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", assembly).group(1))  # noqa: E731
    widths = dict(dwordx4=16, dwordx3=12, dwordx2=8, dword=4, ushort=2, ubyte=1)
    loads = re.findall(r"(?:global|buffer)_load_([a-z0-9]+)", in_loops(assembly))
    return Compiled(
        registers=note("vgpr_count"),
        spilled=4 * note("vgpr_spill_count") + note("private_segment_fixed_size"),
        shared=built.metadata.shared,
        narrowest_load=narrowest([widths[load] for load in loads]),
        instructions=len(re.findall(r"^\t[vs]_|^\t(?:global|buffer|ds)_", assembly, re.M)),
        assembly=assembly,
    )
