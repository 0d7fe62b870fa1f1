"""What a person sees while a run goes on: a live picture on a terminal, plain lines elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from simulator.live.observer import Observer

REFRESH_PER_S: Final = 4
LINE_EVERY_S: Final = 2.0
NEWS_SHOWN: Final = 7
_BAR_WIDTH: Final = 36

BANDS: Final = (
    # what the fleet is doing, in the order in which an update passes through it, with a terminal colour
    ("runs v0", "grey62"),
    ("runs v1", "grey74"),
    ("fetching", "dodger_blue2"),
    ("offline", "grey42"),
    ("killed", "magenta"),
    ("installing", "dark_cyan"),
    ("trial", "gold3"),
    ("rolled back", "dark_orange3"),
    ("runs v3", "red3"),
    ("runs v2", "green3"),
)


@dataclass(frozen=True, slots=True)
class Progress:
    """Figures beside those of the observer.

    Attributes:
        air_bytes: That reached the devices since the first rollout.
        full_bytes: What whole files would take for all that was asked for so far.
        rollouts: A line per rollout.
    """

    air_bytes: int = 0
    full_bytes: int = 0
    rollouts: tuple[str, ...] = ()


class Display(Protocol):
    """Shows a run."""

    def tell(self, text: str) -> None:
        """Say something that is no news of the fleet: what is being set up."""


class LineDisplay:
    """Plain lines, for logs and pipes: news as they come, and every two seconds the state of the fleet."""

    def __init__(self, observer: Observer, progress: Callable[[], Progress], console: Console) -> None:
        self._observer = observer
        self._progress = progress
        self._console = console
        self._shown = 0
        self._last = ("", 0.0)

    def tell(self, text: str) -> None:
        """As `Display.tell`."""
        self._line(text)

    def refresh(self) -> None:
        """Print what is new."""
        news = list(self._observer.news)
        fresh = self._observer.news_count - self._shown
        self._shown += fresh
        for _, text in news[len(news) - min(fresh, len(news)) :]:
            self._line(text)
        now = time.monotonic()
        if self._observer.sights and now - self._last[1] >= LINE_EVERY_S:
            bands = self._observer.bands()
            states = ", ".join(f"{bands[name]} {name}" for name, _ in BANDS if bands[name])
            progress = self._progress()
            text = f"{states}; {progress.air_bytes / 1e6:.1f} MB over the air"
            if text != self._last[0]:
                self._line(text)
            self._last = (text, now)

    def _line(self, text: str) -> None:
        self._console.print(
            f"{self._observer.now_ms / 1000:6.1f} s  {text}", highlight=False, markup=False, soft_wrap=True
        )


class LiveDisplay:
    """A picture that changes in place."""

    def __init__(self, observer: Observer, progress: Callable[[], Progress], title: str) -> None:
        self._observer = observer
        self._progress = progress
        self._title = title

    def tell(self, text: str) -> None:
        """As `Display.tell`."""
        self._observer.tell(text)

    def __rich__(self) -> RenderableType:
        observer, progress = self._observer, self._progress()
        head = Text.assemble(
            (observer.phase or "Setting up", "bold"), f"   {observer.now_ms / 1000:.0f} s", style="default"
        )
        parts: list[RenderableType] = [head]
        if observer.sights:
            parts += [Text(), self._bars(), Text(), self._figures(progress)]
        parts += [Text(line) for line in progress.rollouts]
        parts += [Text(), self._news()]
        return Panel(Group(*parts), title=self._title, title_align="left", border_style="grey50")

    def _bars(self) -> Table:
        bands = self._observer.bands()
        total = max(1, len(self._observer.sights))
        table = Table.grid(padding=(0, 1))
        table.add_column(justify="right", width=12)
        table.add_column(justify="right", width=4)
        table.add_column()
        for name, colour in BANDS:
            if name in {"runs v0", "runs v3"} and not bands[name]:
                continue
            count = bands[name]
            filled = -(-count * _BAR_WIDTH // total)
            bar = Text("\N{FULL BLOCK}" * filled, style=colour)
            bar.append("\N{MIDDLE DOT}" * (_BAR_WIDTH - filled), style="grey30")
            table.add_row(Text(name, style=colour if count else "grey50"), str(count), bar)
        return table

    def _figures(self, progress: Progress) -> Table:
        totals = self._observer.totals()
        table = Table.grid(padding=(0, 2))
        air = f"{progress.air_bytes / 1e6:.1f} MB"
        if progress.full_bytes:
            air += f" (whole files: {progress.full_bytes / 1e6:.1f} MB)"
        table.add_row(
            "over the air",
            Text(air, style="bold"),
            "chunks stored",
            Text(f"{totals['chunks']:,}", style="bold"),
        )
        failed = Text(f"{totals['answered']:,} answered, {totals['failed']:,} failed", style="bold")
        disturbed = Text(f"{totals['cuts']} connections lost, {totals['kills']} killed", style="bold")
        table.add_row("inference", failed, "mid-update", disturbed)
        return table

    def _news(self) -> Text:
        lines = list(self._observer.news)[-NEWS_SHOWN:]
        text = Text(overflow="ellipsis", no_wrap=True)
        for at_ms, line in lines:
            text.append(f"{at_ms / 1000:6.1f} s  ", style="grey50")
            text.append(line + "\n")
        return text


@contextlib.contextmanager
def shown(
    observer: Observer, progress: Callable[[], Progress], title: str, console: Console
) -> Iterator[tuple[Display, Callable[[], None]]]:
    """Show a run for as long as the context lasts; yields the display and what has to be called now and then."""
    if console.is_terminal:
        picture = LiveDisplay(observer, progress, title)
        with Live(picture, console=console, refresh_per_second=REFRESH_PER_S, transient=True):
            yield picture, lambda: None
        return
    lines = LineDisplay(observer, progress, console)
    yield lines, lines.refresh
    lines.refresh()
