"""Progress of long work: a bar with rate and ETA on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lasar.ranks import ranks

_LINE_EVERY_SECONDS = 15.0

Advance = Callable[..., None]


@contextmanager
def progress(description: str, *, total: int, start: int = 0, unit: str = "it") -> Iterator[Advance]:
    """Yield `advance(count=1, note="")`.

    Args:
        description: what is being done.
        total: amount of work, in `unit`.
        start: amount done before (a resumed stage); not counted in the rate.
        unit: what is counted.
    """
    if ranks().rank:
        yield _say_nothing
        return
    console = Console(stderr=True)
    if console.is_terminal:
        with Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
            console=console,
        ) as bar:  # fmt: skip
            task = bar.add_task(description, total=total, completed=start, rate="", note="")
            began = time.perf_counter()
            done = 0

            def advance(count: int = 1, note: str = "") -> None:
                nonlocal done
                done += count
                rate = done / max(time.perf_counter() - began, 1e-9)
                bar.update(task, advance=count, rate=f"{rate:,.1f} {unit}/s", note=note)

            yield advance
        return
    yield _line_printer(description, total, start, unit)


def _say_nothing(count: int = 1, note: str = "") -> None:
    """In all processes but the first."""


def _line_printer(description: str, total: int, start: int, unit: str) -> Advance:
    began = printed = time.perf_counter()
    done = 0

    def advance(count: int = 1, note: str = "") -> None:
        nonlocal done, printed
        done += count
        now = time.perf_counter()
        if now - printed < _LINE_EVERY_SECONDS:
            return
        printed = now
        rate = done / max(now - began, 1e-9)
        eta = max(total - start - done, 0) / max(rate, 1e-9)
        line = f"{description}: {start + done:,}/{total:,} {unit}, {rate:,.1f} {unit}/s, ETA {eta:,.0f} s"
        print(f"{line}  {note}".rstrip(), file=sys.stderr, flush=True)

    return advance
