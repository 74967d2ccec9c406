"""Ctrl-C is kept until a step is done; the second one isn't.

Fails if a step is interrupted in its middle, if Ctrl-C is lost, or if the handler stays after the run.
"""

import os
import signal

import pytest

from cnnfast.cli.interrupts import deferred_interrupts


def press():
    os.kill(os.getpid(), signal.SIGINT)


def test_the_step_is_finished():
    before = signal.getsignal(signal.SIGINT)
    steps = []
    with pytest.raises(KeyboardInterrupt), deferred_interrupts() as stop_if_interrupted:
        for n in range(5):
            if n == 2:
                press()
            steps.append(n)
            stop_if_interrupted()
    assert steps == [0, 1, 2] and signal.getsignal(signal.SIGINT) is before


def test_the_second_does_not_wait():
    before = signal.getsignal(signal.SIGINT)
    steps = []
    with pytest.raises(KeyboardInterrupt), deferred_interrupts():
        press()
        steps.append("first")
        press()
        steps.append("second")
    assert steps == ["first"] and signal.getsignal(signal.SIGINT) is before


def test_nothing_happens_without():
    with deferred_interrupts() as stop_if_interrupted:
        stop_if_interrupted()
