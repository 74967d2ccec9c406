"""csrc/cpu/threads.cpp under TSan and under ASan + UBSan, driven by threads.cpp here, and proof that they would find
what is easiest to get wrong in it.

Fails if a part runs twice or never, reads what isn't written yet, outlives its job, or if a part that throws leaves a
thread waiting.
"""

import subprocess
from pathlib import Path

import pytest

from build_backend.toolchain import ROOT, find_compiler

CPU = ROOT / "csrc" / "cpu"
SANITIZERS = {
    "asan": ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "tsan": ("-O1", "-fsanitize=thread"),
}
# Each opens, for a moment that a sleep prolongs, what the owner of a job and its helpers close for each other's sake.
SLEEP = "std::this_thread::sleep_for(std::chrono::microseconds(50));"
FAULTS = {
    "the owner doesn't wait for its helpers": ("for (Wait wait; seat.helpers.load() > 0;) wait.once();", ""),
    "a helper looks without having registered": (
        "Job* job = seat.job.load();",
        f"seat.helpers.fetch_sub(1); Job* job = seat.job.load(); {SLEEP}",
    ),
    "a job is published before it is complete": (
        "Team::Job job{run, part, count, team_.shares(), {}};",
        f"Team::Job job{{run, part, count, team_.shares(), {{}}}}; team_.seats_[seat_].job.store(&job); {SLEEP}",
    ),
}


def build(folder: Path, sanitizer: str, source: str | None = None) -> Path:
    program, threads = folder / f"threads-{sanitizer}", folder / "threads.cpp"
    threads.write_text(source or (CPU / "threads.cpp").read_text())
    command = find_compiler().command
    flags = ("-std=c++20", "-g", "-pthread", *SANITIZERS[sanitizer], f"-I{ROOT / 'csrc'}", f"-I{CPU}")
    driver = Path(__file__).with_name("threads.cpp")
    done = subprocess.run([*command, *flags, driver, threads, "-o", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


def execute(program: Path, scenario: str, threads: int) -> subprocess.CompletedProcess:
    return subprocess.run([program, scenario, str(threads)], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module", params=[pytest.param("asan", marks=pytest.mark.slow), "tsan"])
def program(request, tmp_path_factory):
    return build(tmp_path_factory.mktemp("threads"), request.param)


@pytest.mark.parametrize("threads", [1, 2, 3, 8, 11])  # 11: more than a job has shares
@pytest.mark.parametrize("scenario", ["stages", "one thread", "throw"])
def test_each_part_runs_once(program, scenario, threads):
    done = execute(program, scenario, threads)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stdout + done.stderr[:4000]


@pytest.mark.parametrize("threads", [2, 5])
def test_idle_threads_help(program, threads):
    done = execute(program, "help", threads)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stdout + done.stderr[:4000]


@pytest.mark.slow  # a build each
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(fault, tmp_path):
    sound, faulty = FAULTS[fault]
    source = (CPU / "threads.cpp").read_text()
    assert source.count(sound) == 1
    program = build(tmp_path, "tsan", source.replace(sound, faulty))
    runs = (execute(program, "help", threads) for threads in (2, 3, 8))
    assert any("data race" in done.stderr or done.stdout != "ok\n" for done in runs)
