"""The CUDA C++ kernels' schemas: csrc/cuda/ops.cpp's are those of csrc/ops.cpp, and the host libraries' are the same.

Fails if one of the three says something else; the first two meet only where there is a GPU.
"""

import re

from cuda_host import harness

from cnnfast.ops import cuda_kernels

DEFINITION = re.compile(r'm\.def\(\s*((?:"[^"]*"\s*)+)\)')
LIBRARIES = [harness.HERE / f"library/{op}.cpp" for op in harness.OPS]


def schemas(*files):
    """By name."""
    texts = [
        "".join(re.findall(r'"([^"]*)"', found)) for file in files for found in DEFINITION.findall(file.read_text())
    ]
    return {text.split("(")[0]: text for text in texts}


def test_schemas_are_those_of_the_ops():
    ours, cuda = schemas(harness.CSRC / "ops.cpp"), schemas(harness.CSRC / "cuda/ops.cpp")
    assert len(cuda) >= len(cuda_kernels.KERNELS) == len(LIBRARIES)
    for name, schema in cuda.items():
        last = ", bool tf32)" if name in cuda_kernels.TAKES_TF32 else ")"
        assert schema == ours[name].replace(", int backend=0)", last)


def test_host_libraries_have_the_same():
    assert schemas(*LIBRARIES) == schemas(harness.CSRC / "cuda/ops.cpp")
