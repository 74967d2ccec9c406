"""docs/architectures.md says what the networks are: a row for each, as tests/architectures_table.py makes it, and tests
that exist behind each of its facts.

Fails if a network has no row, a figure is out of date, a link leads nowhere, or a fact names a test that isn't there.
"""

import re

import pytest
from architectures_table import FILE, ROOT, row, rows

import cnnfast
from cnnfast.models.figures import count

SAMPLE = ("xception", "mobilenet_v2")


def test_every_network_has_its_row():
    assert list(rows()) == cnnfast.list_models()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in SAMPLE)) for n in cnnfast.list_models()]
)
def test_rows(name):
    assert rows()[name] == row(name, count(name)), "run python tests/architectures_table.py"


def test_links_and_named_tests():
    text = FILE.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(\.\./([^)#]+)\)", text):
        assert (ROOT / target).exists(), target
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) >= 20
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), (file, test)
