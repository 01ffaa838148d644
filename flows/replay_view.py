"""What a replay shows: a live panel while it runs, a table and a picture when it is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

__all__ = ["LiveView", "Moment", "draw_picture", "print_summary"]

PHASES = {1: "collect", 2: "shadow", 3: "serve"}
_BLOCKS = "▁▂▃▄▅▆▇█"
# Colours of the Okabe-Ito palette, which stay apart for colour-blind readers.
_REMOTE, _TRUST, _SPEND, _WITHOUT = "#D55E00", "#0072B2", "#009E73", "#999999"
_PHASE_SHADES = {1: "#f3f3f3", 2: "#e3eef6", 3: "#e2f2ea"}


@dataclass(frozen=True, slots=True)
class Moment:
    """The replay after one request, at Unix time ``at``. ``score`` compares what was returned with the recording."""

    i: int
    phase: int
    asked_remote: bool
    score: float
    spend: Decimal
    spend_without: Decimal
    sampling_rate: float
    threshold: float | None
    correlation: float | None
    at: float


def rolling(values: Sequence[float], window: int) -> list[float]:
    """The mean over the last ``window`` values at each position (fewer at the start)."""
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        means.append(total / min(i + 1, window))
    return means


class LiveView:
    """The panel while a replay runs. On a terminal it is redrawn in place; elsewhere it is a line now and then."""

    def __init__(self, console: Console, total: int, title: str) -> None:
        self._console = console
        self._title = title
        self._moments: list[Moment] = []
        columns = (TextColumn("{task.description}"), BarColumn(None), TaskProgressColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, expand=True)
        self._requests = self._progress.add_task("requests", total=total)
        self._training = self._progress.add_task("training", total=1.0, visible=False)
        self._total = total
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self._render)
        self._last_training = ""

    def __enter__(self) -> LiveView:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def show(self, moment: Moment) -> None:
        """One more request is answered."""
        self._moments.append(moment)
        self._progress.update(self._requests, completed=moment.i + 1)
        if not self._console.is_terminal and (moment.i + 1) % 100 == 0:
            self._console.print(self._line(moment), soft_wrap=True)

    def train(self, step: str, done: float) -> None:
        """A training run is at ``step``, ``done`` of it in [0, 1]."""
        self._progress.update(self._training, visible=True, completed=done, description=f"training: {step}")
        if not self._console.is_terminal and step != self._last_training:
            self._console.print(f"  training: {step}")
            self._last_training = step

    def trained(self, message: str) -> None:
        """A training run is over."""
        self._progress.update(self._training, visible=False, completed=0.0)
        self._last_training = ""
        self._console.print(f"  {message}", soft_wrap=True)

    def _line(self, moment: Moment) -> str:
        share = sum(m.asked_remote for m in self._moments[-100:]) / min(100, len(self._moments))
        correlation = "-" if moment.correlation is None else f"{moment.correlation:.2f}"
        return (
            f"{moment.i + 1:>6}/{self._total}  phase {moment.phase} {PHASES[moment.phase]:<7}  remote {share:4.0%}  "
            f"correlation {correlation:>5}  spent ${moment.spend:.4f} of ${moment.spend_without:.4f}"
        )

    def _render(self) -> Panel:
        if not self._moments:
            return Panel(self._progress, title=self._title)
        now = self._moments[-1]
        recent = self._moments[-100:]
        grid = Table.grid(padding=(0, 3))
        for _ in range(4):
            grid.add_column()
        saved = now.spend_without - now.spend
        grid.add_row("phase", Text(f"{now.phase} {PHASES[now.phase]}", "bold"), "spent", f"${now.spend:.4f}")
        share = sum(m.asked_remote for m in recent) / len(recent)
        grid.add_row("remote share, last 100", f"{share:.0%}", "without Apprentice", f"${now.spend_without:.4f}")
        correlation = "-" if now.correlation is None else f"{now.correlation:.3f}"
        grid.add_row("correlation", correlation, "saved", Text(f"${saved:.4f}", "green"))
        agreement = sum(m.score for m in recent) / len(recent)
        grid.add_row("agreement, last 100", f"{agreement:.1%}", "sampling rate", f"{now.sampling_rate:.0%}")
        chart = _sparkline([float(m.asked_remote) for m in self._moments])
        return Panel(Group(grid, Text(f"remote share  {chart}", _REMOTE), self._progress), title=self._title)


def _sparkline(values: Sequence[float], width: int = 60) -> str:
    """``values`` as a row of blocks, averaged down to ``width``; each value in [0, 1]."""
    cells = min(width, len(values))
    blocks = []
    for c in range(cells):
        part = values[c * len(values) // cells : (c + 1) * len(values) // cells]
        blocks.append(_BLOCKS[round(max(0.0, min(1.0, sum(part) / len(part))) * (len(_BLOCKS) - 1))])
    return "".join(blocks)


def print_summary(console: Console, summary: dict[str, Any], moments: Sequence[Moment]) -> None:
    """The table and the picture in the terminal."""
    table = Table(title="Replay", title_style="bold", show_header=False, min_width=62)
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_row("requests", f"{summary['requests']:,}")
    share = (
        f"{summary['remote_calls']:,}  ({summary['remote_share']:.1%}; last third {summary['remote_share_tail']:.1%})"
    )
    table.add_row("answered by the remote", share)
    table.add_row("agreement with the recorded answers", f"{summary['agreement']:.1%}")
    local = summary["agreement_local"]
    table.add_row("  of what was answered locally", "-" if local is None else f"{local:.1%}")
    table.add_row("coverage in phase 3", "-" if summary["coverage"] is None else f"{summary['coverage']:.1%}")
    for entry in summary["phases"]:
        table.add_row(f"phase {entry['phase']} {PHASES[entry['phase']]}", f"from request {entry['from_request']:,}")
    for version in summary["versions"]:
        verdict = "promoted" if version["promoted"] else f"not promoted: {version['reason']}"
        table.add_row(f"version {version['version']}", f"{version['trained_on']} examples, {verdict}")
    table.add_row("spent", f"${summary['spend']:.4f}")
    table.add_row("without Apprentice", f"${summary['spend_without']:.4f}")
    saved = 1 - summary["spend"] / summary["spend_without"] if summary["spend_without"] else 0.0
    table.add_row("saved", f"[green]{saved:.1%}[/green]")
    table.add_row("wall time", f"{summary['wall_seconds']:.0f} s")
    console.print(table)
    console.print(Text(f"remote share  {_sparkline([float(m.asked_remote) for m in moments])}", _REMOTE))
    known = [max(0.0, m.correlation) for m in moments if m.correlation is not None]
    if known:
        pad = round(60 * (len(moments) - len(known)) / len(moments))
        console.print(Text(f"correlation   {' ' * pad}{_sparkline(known, 60 - pad)}", _TRUST))


def draw_picture(path: Path, moments: Sequence[Moment], summary: dict[str, Any], title: str) -> None:
    """Remote share, correlation and cumulative cost over the stream, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    share, trust, cost = figure.subplots(3, 1, sharex=True, height_ratios=(1.1, 1, 1))
    x = [m.i + 1 for m in moments]
    for axes in (share, trust, cost):
        for entry, nxt in zip(summary["phases"], [*summary["phases"][1:], None], strict=True):
            end = nxt["from_request"] if nxt else len(moments)
            axes.axvspan(entry["from_request"], end, color=_PHASE_SHADES[entry["phase"]], lw=0)
        for version in summary["versions"]:
            axes.axvline(version["at_request"], color="#555555", lw=0.8, ls=":" if not version["promoted"] else "--")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", lw=0.6)
        axes.set_axisbelow(True)
    for entry in summary["phases"]:
        label = f"{entry['phase']} {PHASES[entry['phase']]}"
        share.annotate(
            label, (entry["from_request"], 1.03), xycoords=("data", "axes fraction"), fontsize=9, color="#444444"
        )
    window = max(20, min(100, len(moments) // 8))
    share.plot(x, rolling([100.0 * m.asked_remote for m in moments], window), color=_REMOTE, lw=2)
    share.set_ylabel(f"asked the remote, %\n(last {window} requests)")
    share.set_ylim(0, 104)
    trust.plot(x, [m.correlation if m.correlation is not None else float("nan") for m in moments], color=_TRUST, lw=2)
    trust.plot(x, rolling([m.score for m in moments], window), color=_WITHOUT, lw=1.2)
    trust.set_ylabel("correlation of the local model\n(grey: agreement of answers)")
    trust.set_ylim(min(0.0, *[m.correlation for m in moments if m.correlation is not None], 0.0) - 0.02, 1.04)
    cost.plot(x, [float(m.spend_without) for m in moments], color=_WITHOUT, lw=1.6, label="without Apprentice")
    cost.plot(x, [float(m.spend) for m in moments], color=_SPEND, lw=2.2, label="with Apprentice")
    cost.fill_between(
        x, [float(m.spend) for m in moments], [float(m.spend_without) for m in moments], color=_SPEND, alpha=0.12, lw=0
    )
    cost.set_ylabel("spent, USD")
    cost.set_xlabel("request   (dashed: a version was promoted; dotted: one was trained and not promoted)")
    cost.legend(frameon=False, loc="upper left")
    share.set_title(title, loc="left", fontsize=13, fontweight="bold", pad=22)
    figure.savefig(path, dpi=110)
