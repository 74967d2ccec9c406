"""The closing summary of a test run: what was proven how, and what still waits.

A test says what it proves with a marker, once per kernel:

    @pytest.mark.proof("interpreted", kernel="depthwise_conv2d_fwd_kernel")       run in Triton's interpreter
    @pytest.mark.proof("host-run", kernel="depthwise_conv2d_fwd")                 CUDA source run on the host
    @pytest.mark.proof("compiled", kernel="depthwise_conv2d_fwd_kernel", target="sm_90")      compiled ahead of time

or, where only the run knows, with `record_proof("compiled", kernel=..., target=...)` (a fixture). A kernel counts once
one of its tests passed and none failed. `--proofs-json FILE` writes the proofs of a run, so that a test that runs
pytest in another process (the interpreter's flag is read at import) can record them in its own run.

With `-n` (pytest-xdist) tests run in workers: their reports come here, and what they deselected comes at their end.
"""

import json
from collections import defaultdict

import pytest

HOWS = {
    "interpreted": "Triton kernels run in the interpreter",
    "host-run": "CUDA kernels run on the host harness",
    "compiled": "kernels compiled ahead of time",
}


def proof_of(how, *, kernel, target=None):
    if how not in HOWS:
        raise pytest.UsageError(f"proof is {how!r}: want one of {', '.join(HOWS)}")
    return ("proof", [how, kernel, target])


def pytest_addoption(parser):
    parser.addoption("--proofs-json", metavar="FILE", help="write what this run proved to FILE")


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "proof(how, *, kernel, target=None): what a passing test proves; counted in the closing summary"
    )
    config.pluginmanager.register(Summary(config), "proof-summary")


def pytest_collection_modifyitems(items):
    for item in items:
        item.user_properties += [proof_of(*mark.args, **mark.kwargs) for mark in item.iter_markers("proof")]
        item.user_properties += [("waits", why) for why in ("gpu", "slow") if item.get_closest_marker(why)]


@pytest.fixture
def record_proof(record_property):
    """A function with the marker's arguments, for tests that learn at run time what they prove."""
    return lambda how, **where: record_property(*proof_of(how, **where))


class Summary:
    def __init__(self, config):
        self.json_path = config.getoption("--proofs-json")
        self.for_controller = getattr(config, "workeroutput", None)  # of a worker
        self.passed, self.failed = defaultdict(int), set()  # by (how, kernel, target)
        self.skipped, self.deselected = ({"gpu": 0, "slow": 0} for _ in range(2))

    @property
    def waiting(self):
        return {why: self.skipped[why] + self.deselected[why] for why in self.skipped}

    def pytest_deselected(self, items):
        for why in self.deselected:
            self.deselected[why] += sum(item.get_closest_marker(why) is not None for item in items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        """Each worker collects, and deselects, the same."""
        self.deselected = getattr(node, "workeroutput", {}).get("deselected", self.deselected)

    def pytest_runtest_logreport(self, report):
        if report.skipped and not hasattr(report, "wasxfail"):
            for name, why in report.user_properties:
                if name == "waits":
                    self.skipped[why] += 1
        if report.when == "teardown" and not report.failed:
            return  # teardown repeats the user properties of the call
        proofs = [tuple(value) for name, value in report.user_properties if name == "proof"]
        for proof in proofs:
            if report.failed:
                self.failed.add(proof)
            elif report.when == "call" and report.passed:
                self.passed[proof] += 1

    def proven(self, how):
        """{(kernel, target): number of tests}, without those that failed."""
        return {p[1:]: n for p, n in self.passed.items() if p[0] == how and p not in self.failed}

    def pytest_sessionfinish(self):
        if self.for_controller is not None:
            self.for_controller["deselected"] = self.deselected
        elif self.json_path:
            with open(self.json_path, "w", encoding="utf-8") as file:
                json.dump([proof for proof in self.passed if proof not in self.failed], file)

    def pytest_terminal_summary(self, terminalreporter):
        write = terminalreporter.write_line
        if not (self.passed or self.failed or any(self.waiting.values())):
            return
        terminalreporter.section("what was proven how")
        for how, meaning in HOWS.items():
            proven = self.proven(how)
            kernels = sorted({kernel for kernel, _ in proven})
            targets = sorted({target for _, target in proven if target}, key=lambda t: (len(t), t))
            line = f"{len(kernels):4} {meaning}"
            if targets:
                line += f" for {len(targets)} targets ({', '.join(targets)})"
            if kernels:
                line += f", {sum(proven.values())} tests: {', '.join(kernels)}"
            write(line)
            failed = sorted({proof[1] for proof in self.failed if proof[0] == how})
            if failed:
                write(f"     not counted, a test of theirs failed: {', '.join(failed)}")
        write(f"{self.waiting['gpu']:4} tests wait for a GPU")
        write(f"{self.waiting['slow']:4} slow tests were not run")
