"""Progress: lines now and then where there is no terminal, a bar where there is one."""

import io

import pytest
from rich.console import Console

from lasar import progress as module
from lasar.progress import progress


class Clock:
    """A time that moves only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "Console", lambda **_: Console(file=io.StringIO(), force_terminal=False))
    return clock


def test_short_work_prints_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("work", total=3) as advance:
        for _ in range(3):
            clock.now += 1
            advance()
    assert capsys.readouterr() == ("", "")


def test_long_work_prints_a_line_with_rate_and_time_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("embed", total=10_000, unit="items") as advance:
        clock.now += 20
        advance(2_000)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "embed: 2,000/10,000 items, 100.0 items/s, ETA 80 s\n"


def test_a_line_every_now_and_then_only(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("work", total=60) as advance:
        for _ in range(60):
            clock.now += 1
            advance(note="loss 1.5")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["15/60", "30/60", "45/60", "60/60"]
    assert all(line.endswith("  loss 1.5") for line in lines)


def test_resumed_work_counts_from_where_it_was_but_not_in_the_rate(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("work", total=1_000, start=800) as advance:
        clock.now += 20
        advance(100)
    assert capsys.readouterr().err == "work: 900/1,000 it, 5.0 it/s, ETA 20 s\n"


def test_more_work_than_announced(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("work", total=10) as advance:
        clock.now += 20
        advance(20)
    assert "20/10 it, 1.0 it/s, ETA 0 s" in capsys.readouterr().err


def test_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(
        module, "Console", lambda **_: Console(file=screen, force_terminal=True, width=120, color_system=None)
    )
    with progress("embed", total=40, start=10, unit="items") as advance:
        advance(30, note="loss 1.5")
    shown = screen.getvalue()
    for part in ("embed", "40/40", "items/s", "loss 1.5"):
        assert part in shown


def test_errors_pass_through(clock: Clock) -> None:
    with pytest.raises(ValueError, match="stop"), progress("work", total=1):
        raise ValueError("stop")
