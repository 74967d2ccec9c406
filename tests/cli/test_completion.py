"""`cnnfast completion`: the scripts, and bash completing with one. Every command's help.

Fails if a command, an option, a choice, a network or a file isn't completed, or a command has no example in its help.
"""

import contextlib
import shutil
import subprocess

import pytest

import cnnfast
from cnnfast.cli.main import SUBCOMMANDS, main

pytest.importorskip("shtab")


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """What bash offers after `cnnfast WORD...`, of which the last is begun, in an own folder."""
    bash = shutil.which("bash") or pytest.skip("needs bash")
    folder = tmp_path_factory.mktemp("completion")
    with (folder / "cnnfast.bash").open("w") as script, contextlib.redirect_stdout(script):
        assert main(["completion", "bash"]) == 0
    (folder / "weights.pth").touch()
    (folder / "photos").mkdir()

    def offered(*words):
        line = " ".join(f"'{word}'" for word in ("cnnfast", *words))
        code = f"""
        source ./cnnfast.bash
        function=$(complete -p cnnfast | sed -E 's/.*-F ([^ ]+).*/\\1/')
        COMP_WORDS=({line}); COMP_CWORD={len(words)}
        "$function" cnnfast '{words[-1]}' '{words[-2] if len(words) > 1 else "cnnfast"}'
        printf '%s\\n' "${{COMPREPLY[@]}}"
        """
        run = subprocess.run([bash, "-c", code], cwd=folder, check=True, capture_output=True, text=True, timeout=60)
        return run.stdout.split()

    return offered


def test_commands(complete):
    assert set(complete("")) >= set(SUBCOMMANDS)
    assert complete("cla") == ["classify"]


def test_options_and_choices(complete):
    assert complete("verify", "--aga") == ["--against"]
    assert complete("classify", "--dtype", "bf") == ["bfloat16"]
    assert complete("completion", "z") == ["zsh"]
    assert complete("bench", "mod") == ["models"]


@pytest.mark.parametrize("words", [("verify",), ("classify", "--model"), ("tune",), ("bench", "models", "--model")])
def test_networks(complete, words):
    assert complete(*words, "mobilenet_") == cnnfast.list_models("mobilenet_*")


def test_files(complete):
    assert complete("verify", "--weights", "wei") == ["weights.pth"]
    assert set(complete("classify", "")) >= {"weights.pth", "photos"}


def test_zsh(capsys):
    assert main(["completion", "zsh"]) == 0
    script = capsys.readouterr().out
    assert script.startswith("#compdef cnnfast") and "_files" in script
    assert f"compadd {' '.join(cnnfast.list_models())}\n" in script


def test_without_shtab(monkeypatch, capsys):
    find = cnnfast.cli.errors.importlib.util.find_spec
    monkeypatch.setattr(
        "cnnfast.cli.errors.importlib.util.find_spec", lambda name: None if name == "shtab" else find(name)
    )
    assert main(["completion", "bash"]) == 2
    assert 'pip install "cnnfast[completion]"' in capsys.readouterr().err


@pytest.mark.parametrize("command", [*SUBCOMMANDS, *(f"bench {kind}" for kind in ("ops", "models", "gpu"))])
def test_help_has_an_example(command, capsys, monkeypatch):
    """A whole line, so that it can be copied, that begins with the command."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and max(map(len, out.splitlines())) <= 80
    first, *others = out[out.rindex("\nexample") :].strip().splitlines()
    examples = [line.strip() for line in others] or [first.removeprefix("example: ")]
    assert examples[0].startswith(f"cnnfast {command} ")
    for line, before in zip(examples, ["", *examples], strict=False):
        assert line.startswith("cnnfast ") or before.endswith("\\"), line
