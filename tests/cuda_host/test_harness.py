"""Proof that what the sanitizers, the reversed order of threads and the counters are for is found by them.

Fails when the harness no longer sees a planted fault.
"""

import json
import subprocess

import pytest
from cuda_host import harness

pytestmark = harness.needs_toolkit


def execute(program, *arguments):
    command = [str(harness.built("harness", program)), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def fault(name, order):
    """(output, counts) of the kernel that faults.cpp calls by this name."""
    done = execute("faults", name, order)
    assert done.returncode == 0, done.stderr
    output, counted = done.stdout.split("\n", 1)
    return output.split(), json.loads(counted)[0]["counts"]


@pytest.mark.parametrize(
    ("sanitizer", "name", "found"),
    [
        ("asan", "write_past_shared", "heap-buffer-overflow"),
        ("asan", "write_past_output", "heap-buffer-overflow"),
        ("asan", "misaligned", "misaligned address"),
        ("tsan", "missing_barrier", "data race"),
        ("tsan", "missing_cluster_barrier", "data race"),
    ],
)
def test_planted_fault_is_found(sanitizer, name, found):
    done = execute(sanitizer, name, harness.THREADS)
    assert done.returncode != 0 and found in done.stderr


@pytest.mark.parametrize("sanitizer", ["asan", "tsan"])
@pytest.mark.parametrize("name", ["reverse", "reverse_in_cluster", "coalesced", "sum"])
def test_sound_kernel_passes(sanitizer, name):
    done = execute(sanitizer, name, harness.THREADS)
    assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.parametrize(
    "sound, faulty", [("reverse", "missing_barrier"), ("reverse_in_cluster", "missing_cluster_barrier")]
)
def test_missing_barrier_shows_in_the_order_of_threads(sound, faulty):
    assert fault(sound, harness.FORWARD)[0] == fault(sound, harness.REVERSE)[0] == [str(63 - i) for i in range(64)]
    assert fault(faulty, harness.FORWARD)[0] != fault(faulty, harness.REVERSE)[0]


@pytest.mark.parametrize("order", [harness.THREADS, harness.FORWARD, harness.REVERSE])
def test_shuffles_and_atomics(order):
    assert fault("sum", order)[0][0] == str(63 * 64 // 2)


def test_deadlock_is_an_error():
    done = execute("faults", "deadlock", harness.FORWARD)
    assert done.returncode != 0 and "deadlock" in done.stderr


def test_strided_access_costs_sectors():
    assert fault("coalesced", harness.FORWARD)[1]["load x"]["sectors"] == 8  # 256 bytes
    assert fault("strided", harness.FORWARD)[1]["load x"]["sectors"] == 16  # the same 8, twice in each of two warps


def test_reads_of_other_blocks_are_counted():
    counts = fault("reverse_in_cluster", harness.FORWARD)[1]["load cluster"]
    assert (counts["requests"], counts["bytes"], counts["sectors"]) == (2, 256, 8)


def test_bank_conflicts_are_counted():
    assert fault("no_bank_conflict", harness.FORWARD)[1]["load shared"]["conflicts"] == 0
    assert fault("bank_conflict", harness.FORWARD)[1]["load shared"]["conflicts"] == 2 * 31
