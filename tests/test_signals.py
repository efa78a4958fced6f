"""Signals that ask a run to stop: noted at first, obeyed at once when repeated."""

import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from training import signals
from training.signals import REPEAT_SECONDS, SIGNALS, StopSignal

NAMES = [number.name for number in SIGNALS]

WAIT = """
import sys
sys.path.insert(0, sys.argv[1])
from training.signals import StopSignal

with StopSignal() as stop:
    print("ready", flush=True)
    sys.stdin.read()  # as a step that does not end
print(stop.name)
"""

# signals sent, and in the end the exit code and the name that the trainer read
SEQUENCES = {
    ("TERM", "TERM"): (128 + signal.SIGTERM, ""),
    ("INT", "INT"): (128 + signal.SIGINT, ""),
    ("USR1", "TERM", "TERM"): (128 + signal.SIGTERM, ""),
    ("USR1", "TERM"): (0, "SIGUSR1"),
    ("INT", "TERM"): (0, "SIGINT"),
    ("USR1", "USR1", "USR1"): (0, "SIGUSR1"),
}


def test_the_signals_are_those_of_a_terminal_and_of_slurm():
    assert NAMES == ["SIGINT", "SIGTERM", "SIGUSR1"]


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_is_noted_by_name(name):
    with StopSignal() as stop:
        assert stop.name is None
        signal.raise_signal(signal.Signals[name])
        assert stop.name == name
        for other in SIGNALS:
            if other.name != name:
                signal.raise_signal(other)
        assert stop.name == name


def start_waiting():
    process = subprocess.Popen(
        [sys.executable, "-c", WAIT, ROOT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_repeated_signal_ends_a_process_that_hangs():
    """More than a second apart; a SIGTERM after SLURM's warning is the first of its kind."""
    processes = {sequence: start_waiting() for sequence in SEQUENCES}
    for turn in range(3):
        for sequence, process in processes.items():
            if turn < len(sequence):
                process.send_signal(signal.Signals[f"SIG{sequence[turn]}"])
        time.sleep(REPEAT_SECONDS + 0.2)
    for sequence, process in processes.items():
        output, _ = process.communicate()
        assert (process.returncode, output.strip()) == SEQUENCES[sequence], sequence


def test_the_same_signal_delivered_twice_is_one():
    """torchrun passes on a signal that the terminal or SLURM gave to all processes."""
    process = start_waiting()
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    output, _ = process.communicate()
    assert (process.returncode, output.strip()) == (0, "SIGTERM")


def test_only_the_time_since_the_first_counts(monkeypatch):
    exits, now = [], [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(signals.os, "_exit", exits.append)
    with StopSignal():
        for seconds in (0, 0.4, 0.9, 1.1):
            assert not exits
            now[0] = 100 + seconds
            signal.raise_signal(signal.SIGINT)
    assert exits == [130]


def test_handlers_are_as_they_were():
    def ours(*_):
        pass

    before = {number: signal.signal(number, ours) for number in SIGNALS}
    try:
        with StopSignal():
            assert ours not in [signal.getsignal(number) for number in SIGNALS]
        assert [signal.getsignal(number) for number in SIGNALS] == [ours] * 3
        with pytest.raises(KeyError), StopSignal():
            raise KeyError
        assert [signal.getsignal(number) for number in SIGNALS] == [ours] * 3
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_handlers_from_outside_python_are_no_obstacle(monkeypatch):
    """signal.signal returns None for them, and does not take it."""
    honest = signal.signal

    def set_handler(number, handler):
        before = honest(number, handler)
        return None if number == signal.SIGUSR1 else before

    before = [signal.getsignal(number) for number in SIGNALS]
    with monkeypatch.context() as patch:
        patch.setattr(signals.signal, "signal", set_handler)
        with StopSignal():
            pass
    assert [signal.getsignal(number) for number in SIGNALS][:2] == before[:2]
    signal.signal(signal.SIGUSR1, before[2])
