"""Ratios, means and their intervals, turns, the growth of peak memory.

Fails if a ratio is upside down, an interval misses the known ratio or doesn't know of a second peer, or an allocation
isn't seen. Nothing here asserts on a time that was measured.
"""

import pytest
import torch

from cnnfast.bench import timing


def test_speedup_is_peer_over_ours_with_its_interval():
    ours = [[1.0, 1.1, 0.9, 1.0, 5.0]] * 3  # one bad round in five doesn't matter
    peer = [[2.0, 2.2, 1.8, 2.0, 10.0]] * 3
    ratio = timing.speedup(ours, peer)
    assert ratio.low == pytest.approx(2.0) == ratio.high and ratio.value == pytest.approx(2.0)
    noisy = timing.speedup([[1.0] * 5] * 2, [[1.0, 2.0, 3.0, 4.0, 5.0]] * 2)
    assert noisy.low < noisy.value < noisy.high and noisy.value == pytest.approx(3.0)


def test_between_processes_counts():
    """Two processes that agree within and differ between: the interval spans both."""
    ratio = timing.speedup([[1.0] * 50, [1.0] * 50], [[1.0] * 50, [2.0] * 50])
    assert ratio.low == 1.0 and ratio.high == 2.0


def test_quantiles():
    assert timing.quantiles([[float(i) for i in range(11)]]) == timing.Quantiles(2.0, 5.0, 8.0)
    assert timing.quantiles([[3.0]]) == timing.Quantiles(3.0, 3.0, 3.0)


def test_interleave_of_nobody():
    """Where no contender's output is right, there is nothing to time; the report says why."""
    assert timing.interleave({}, 3, 0.001) == {}


def test_interleave_rotates():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    samples = timing.interleave(calls, rounds=3, seconds=0.0)
    assert {name: len(s) for name, s in samples.items()} == {"a": 3, "b": 3, "c": 3}
    assert "".join(order[-9:]) == "abcbcacab"


@pytest.mark.skipif(timing.peak_growth(lambda: None)[1] is None, reason="/proc/self/clear_refs can't be written here")
def test_peak_growth_sees_what_a_call_allocates():
    result, growth = timing.peak_growth(lambda: torch.ones(8 << 20).sum().item())  # 32 MB, freed again
    assert result == 8 << 20 and 30e6 < growth < 60e6
    assert timing.peak_growth(lambda: torch.ones(8).sum())[1] < 4e6


def test_the_best_peer_and_means_have_intervals():
    """Peers 1.2 and 1.5 times as slow, each 1 % off at most, on a machine that is up to 50 % slower in some rounds: the
    ratio's interval is that of the 1 %, a mean's is narrower still."""

    def up_to(share):
        return 1 + share * torch.rand(3, 15, dtype=torch.float64)

    rows = []
    for _ in range(9):
        machine = up_to(0.5)
        ours, near, far = (machine * factor * up_to(0.01) for factor in (1, 1.2, 1.5))
        rows.append((ours.tolist(), [far.tolist(), near.tolist()]))
    alone = [timing.speedup(ours, *peers) for ours, peers in rows]
    for best in alone:
        assert best.low < best.value < best.high and best.value == pytest.approx(1.2, rel=0.01)
        assert 1e-4 < best.high - best.low < 0.012
    mean = timing.mean_speedup(rows)
    assert mean.low < mean.value < mean.high and mean.value == pytest.approx(1.2, rel=0.003)
    assert mean.high - mean.low < 0.6 * sum(best.high - best.low for best in alone) / len(alone)


def test_an_interval_does_not_know_which_of_two_equal_peers_is_best():
    """Each is faster in half of the rounds: the draws' minimum lies below both medians."""
    rounds = [[1.0, 2.0] * 10, [2.0, 1.0] * 10]
    alone, both = timing.speedup([[1.0] * 20], [rounds[0]]), timing.speedup([[1.0] * 20], *([one] for one in rounds))
    assert alone.low == both.low == 1.0 and alone.high == 2.0 and both.high == pytest.approx(1.5)
