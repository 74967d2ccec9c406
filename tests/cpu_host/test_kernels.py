"""The kernels of each ISA without torch: kernels.cpp here, under ASan + UBSan, and for aarch64 in qemu-user.

On older CPUs, in qemu-user too: which ISA is chosen there, and that the generic kernels need no newer instruction.
(Not AVX2's there: qemu 7.2 reads whole registers where a masked load ends at a guard page.)

Fails if a kernel of any ISA computes a wrong element, writes one that isn't its own, reads past an operand's end, or
rounds otherwise than to the nearest; if the generic kernels don't compile or compute for aarch64.
"""

import platform
import random
import shutil

import pytest
from cpu_host import host

from build_backend.toolchain import X86
from cnnfast import _C

FUNCTIONS = (
    *("depthwise", "depthwise_output_gradient", "depthwise_input", "depthwise_input_gradient", "depthwise_taps"),
    *("widen", "gemm", "activation_grad"),
    *("unpair", "channel_sums", "scale_channels", "gap", "rounding", "winograd_input", "winograd_output"),
    *("max_pool2d", "avg_pool2d", "operand", "grad_input", "transpose"),
)
# In the sources, what drawn cases have to find: file, what stands there, what stands there instead.
FAULTS = {
    "padding before an activation": (
        "depthwise_conv2d.h",
        "iw >= t.width) continue;\n      const T*",
        "false) continue; const T*",
    ),
    "a tap beside the row": (
        "depthwise_conv2d_taps.h",
        "if (iw < 0 || iw >= t.width) continue;",
        "if (iw >= t.width) continue;",
    ),
    "a row's sums instead of those before": (
        "depthwise_conv2d_backward.h",
        "if (sums) store(p, add(load<S>(p), of_row));",
        "if (sums) store(p, of_row);",
    ),
    "a gradient of x before its scale": (
        "depthwise_conv2d_backward.h",
        "affine.scaled ? mul(dz, affine.scale) : dz",
        "dz",
    ),
    "channels of the wrong plane": (
        "depthwise_conv2d_backward.h",
        "widen(p[i * step])",
        "widen(p[i])",
    ),
    "the first chain of a long sum": ("pointwise_conv2d.h", "if (done > 0)", "if (false)"),
    "the scale of every second depth": (
        "pointwise_conv2d.h",
        "widen(from[2 * c + 1]) * factors[c]",
        "widen(from[2 * c + 1])",
    ),
    "a tail that is stored whole": ("vec.h", "i < count; ++i) p[i] = narrow", "i < kPanel; ++i) p[i] = narrow"),
    "ties that are rounded up": ("vec.h", "(bits + 0x7fffu + (bits >> 16 & 1u))", "(bits + 0x8000u)"),
    "NaN that a maximum drops": ("vec.h", "b.v > a.v || b.v != b.v", "b.v > a.v"),
    "a sign of Winograd's input": ("conv2d_winograd.h", "v[3] = sub(d[1], d[3])", "v[3] = sub(d[3], d[1])"),
    "a sign of Winograd's output": ("conv2d_winograd.h", "sub(difference, m[3])", "add(difference, m[3])"),
    "a column that is kept too long": ("pool2d.h", "|| w.kernel_w > kKept", ""),
    "a window beyond the padding": (
        "pool2d.h",
        "smaller(left + w.kernel_w, t.width + w.pad_left)",
        "(left + w.kernel_w)",
    ),
    "padding that counts": ("pool2d.h", "t.count_include_pad ?", "true ?"),
    "pooled channels beside each other": ("pool2d.h", "y + ow * t.y_pixel", "y + ow * t.channels"),
    "Winograd's channels beside each other": ("conv2d_winograd.h", "pixel * t.y_pixel", "pixel * t.channels"),
    "a tile beyond the image": ("conv2d_winograd.h", "h < t.out_height && w < t.out_width", "h < t.out_height"),
}


def seed() -> str:
    drawn = str(random.SystemRandom().randrange(2**32))
    print(f"seed {drawn}")
    return drawn


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return host.program(tmp_path_factory.mktemp("kernels"), "kernels")


def skip_unless_here(isa: str) -> None:
    if isa not in _C.cpu_features:
        pytest.skip(f"this CPU has no {isa}")


@pytest.mark.parametrize("isa", _C.isas_built)
def test_kernels(kernels, isa):
    skip_unless_here(isa)
    done = host.run(kernels, isa, "150", seed())
    assert done.returncode == 0 and done.stdout.endswith("ok\n"), done.stdout + done.stderr


@pytest.mark.parametrize("function", FUNCTIONS)
def test_each_function_is_looked_at(kernels, function):
    done = host.run(kernels, "generic", "30", "1", KERNELS_FAULT=function)
    assert done.returncode == 1 and "wanted" in done.stdout, done.stdout
    assert function == "gap" or done.stdout.startswith(f"generic {function}: ")


@pytest.mark.parametrize("function", ["gemm_bf16", "split_rows", "split_panels", "gemm_planes", "operand_bf16"])
def test_products_of_amx_are_looked_at(kernels, function):
    skip_unless_here("amx")
    done = host.run(kernels, "amx", "30", "1", KERNELS_FAULT=function)
    assert done.returncode == 1 and done.stdout.startswith(f"amx {function}: "), done.stdout


def test_isa_that_is_not_there(kernels):
    assert host.run(kernels, "sse9", "1", "1").stderr == "no kernels for sse9 here\n"


needs_qemu = pytest.mark.skipif(
    platform.machine() not in X86 or not host.qemu("x86_64"), reason="needs qemu-x86_64-static on x86-64"
)


@needs_qemu
def test_isa_chosen_on_older_cpus(tmp_path):
    choose = host.program(tmp_path, "choose_isa")
    for cpu, has in (("Nehalem", ["generic"]), ("Haswell", ["generic", "avx2"])):
        old = (host.qemu("x86_64"), "-cpu", cpu)
        has = [isa for isa in has if isa in _C.isas_built]
        assert host.run(*old, choose).stdout == f"{has[-1]}\n"
        for isa in _C.isas_built:
            done = host.run(*old, choose, CNNFAST_ISA=isa)
            if isa in has:
                assert done.stdout == f"{isa}\n"
            else:
                assert done.returncode == 1
                assert done.stderr.splitlines()[-1] == f"CNNFAST_ISA={isa} can't run: this CPU lacks it"


@needs_qemu
def test_generic_kernels_on_a_cpu_without_avx(kernels):
    done = host.run(host.qemu("x86_64"), "-cpu", "Nehalem", kernels, "generic", "10", seed())
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow  # compiles the kernels
@pytest.mark.parametrize("isa", _C.isas_built)
def test_sanitized(tmp_path, isa):
    skip_unless_here(isa)
    if isa == "amx":
        pytest.skip("its tiles are read by instructions that sanitizers don't see; guard pages do")
    program = host.program_with(tmp_path, "kernels", isa, *host.SANITIZED)
    done = host.run(program, isa, "100", seed())
    assert done.returncode == 0 and done.stdout.endswith("ok\n"), done.stdout + done.stderr[:4000]


@pytest.mark.slow
@pytest.mark.skipif(not host.CAN_RUN_AARCH64, reason=f"needs {host.AARCH64} and qemu-aarch64-static")
def test_aarch64(tmp_path):
    program = host.aarch64_program(tmp_path, "kernels")
    for _ in range(3):
        done = host.run(host.qemu("aarch64"), program, "generic", "30", seed())
        assert done.returncode == 0 and done.stdout.endswith("ok\n"), done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(fault, tmp_path):
    file, sound, faulty = FAULTS[fault]
    folder = tmp_path / "csrc" / "cpu" / "kernels"
    shutil.copytree(host.ROOT / "csrc", tmp_path / "csrc")
    source = (folder / file).read_text()
    assert source.count(sound) == 1
    (folder / file).write_text(source.replace(sound, faulty))
    program = host.program_with(tmp_path, "kernels", "generic", "-O1", kernels=folder)
    done = host.run(program, "generic", "150", seed())
    assert done.returncode != 0, done.stdout
