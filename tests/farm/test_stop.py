"""Being asked to stop."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import typer

from farm.options import resumable
from farm.stop import Stop, StoppedError


def test_a_stop_is_asked_for_once_and_is_over_after_the_grace_period(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    stop = Stop(grace_seconds=20)
    stop.check()
    assert not stop.asked and not stop.over
    stop.ask()
    now += 19
    stop.ask()  # an impatient operator does not lengthen it
    assert stop.asked and not stop.over
    with pytest.raises(StoppedError):
        stop.check()
    now += 1
    assert stop.over


def test_sigterm_asks_and_the_handler_before_comes_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop = Stop()
    with stop.on_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked and stop.over
    assert signal.getsignal(signal.SIGTERM) is before


def test_off_the_main_thread_signals_are_left_alone() -> None:
    handlers = []

    def enter() -> None:
        with Stop().on_sigterm():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)]


@pytest.mark.parametrize(
    ("signal_number", "word", "status"), [(signal.SIGTERM, "stopped", 143), (signal.SIGINT, "interrupted", 130)]
)
def test_what_goes_on_from_the_store_ends_with_a_word(
    capsys: pytest.CaptureFixture[str], signal_number: int, word: str, status: int
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored in the background
    try:
        with pytest.raises(typer.Exit) as left, resumable(grace_seconds=5) as stop:
            os.kill(os.getpid(), signal_number)
            stop.check()
    finally:
        signal.signal(signal.SIGINT, before)
    assert left.value.exit_code == status
    assert capsys.readouterr().err == f"{word}; the same command goes on from here\n"
