"""docs/kernels.md's second half is of these sources (slow: and its figures are nvcc's).

Fails if a kernel's code changed since `python tests/cuda_table.py` was run.
"""

import cuda_table
import kernels_file
import pytest
from cuda_host import harness

pytestmark = harness.needs_toolkit


def test_table_is_of_these_sources():
    assert cuda_table.made_with()[1] == cuda_table.digest(), "run python tests/cuda_table.py"


def test_digest_is_of_code_not_of_comments():
    code = cuda_table.code_of("int a;  // the one\nint b;\n")
    assert code == cuda_table.code_of("// the other\nint a;\n  int b;") != cuda_table.code_of("int a;\n")


@pytest.mark.slow
def test_table():
    text, wrong = cuda_table.table()
    assert not wrong
    if cuda_table.made_with()[0] == cuda_table.nvcc_version():
        assert text == kernels_file.halves()[cuda_table.TITLE], "run python tests/cuda_table.py"
