"""tests/triton/interpreted, in processes of its own, and counts here what it proves.

Fails if a test there fails, or if none runs.
"""

import pytest
from interpreted import Interpreted


@pytest.mark.timeout(600)
def test_interpreted(interpreted, record_proof):
    proofs = interpreted.proofs()
    assert proofs
    for how, kernel, _ in proofs:
        record_proof(how, kernel=kernel)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_interpreted_slow():
    runs = Interpreted("-m", "slow")
    try:
        runs.proofs()
    finally:
        runs.stop()
