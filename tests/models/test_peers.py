"""cnnfast._peers imports timm and torchvision beside any torch, and steps in only for the one known failure.

Fails if the helper hides another error, or declares schemas where torchvision loads by itself.
"""

import subprocess
import sys
import textwrap


def run(code):
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)


def test_import():
    result = run("""
        from cnnfast._peers import import_timm, import_torchvision
        timm = import_timm()
        assert import_timm() is timm
        assert import_torchvision().models.mobilenet_v2(weights=None, num_classes=3)
        assert timm.create_model("tf_efficientnet_lite0", num_classes=3)
    """)
    assert result.returncode == 0, result.stderr


def test_it_steps_in_only_for_the_known_failure():
    """A torchvision that works, and one that fails otherwise, are left alone."""
    result = run("""
        import sys, types
        import cnnfast._peers as peers

        sys.modules["torchvision"] = working = types.ModuleType("torchvision")
        assert peers.import_torchvision() is working and not peers._declared

        del sys.modules["torchvision"]
        class Broken:
            def find_spec(self, name, path=None, target=None):
                if name == "torchvision":
                    raise RuntimeError("something else")
        sys.meta_path.insert(0, Broken())
        try:
            peers.import_torchvision()
        except RuntimeError as error:
            assert str(error) == "something else"
        else:
            raise AssertionError("hidden")
        assert not peers._declared
    """)
    assert result.returncode == 0, result.stderr
