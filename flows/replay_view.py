"""What a replay shows: a live panel while it runs, a table and a picture when it is done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from flows.replay_promise import Moment, course

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["LiveView", "draw_picture", "picture", "print_summary"]

PHASES = {1: "collect", 2: "shadow", 3: "serve"}
_BLOCKS = "▁▂▃▄▅▆▇█"
# Colours of the Okabe-Ito palette, which stay apart for colour-blind readers.
_REMOTE, _TRUST, _SPEND, _WITHOUT = "#D55E00", "#0072B2", "#009E73", "#999999"
_PHASE_SHADES = {1: "#f3f3f3", 2: "#e3eef6", 3: "#e2f2ea"}
_REAL = "#333333"
_LABEL_ROW = 12.0  # points
_MOST_LABEL_ROWS = 3
_SENTENCE: dict[str, Any] = {"loc": "left", "fontsize": 11, "parse_math": False}  # dollars are dollars
_KINDS = {"refit": "heads fitted", "train": "adapters trained"}
_FEWEST = 20


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
    table.add_row("  to check a local answer", f"{summary['checks']:,}")
    table.add_row("  since the local model was not sure", f"{summary['deferred']:,}")
    table.add_row("answered locally", f"{summary['requests'] - summary['remote_calls']:,}")
    for promise in summary["promises"]:
        table.add_row(f"  {promise['figure']}", _kept(promise))
    table.add_row("agreement with the recorded answers", f"{summary['agreement']:.1%}")
    local = summary["agreement_local"]
    table.add_row("  of what was answered locally", "-" if local is None else f"{local:.1%}")
    for entry in summary["phases"]:
        table.add_row(f"phase {entry['phase']} {PHASES[entry['phase']]}", f"from request {entry['from_request']:,}")
    for kind, what in _KINDS.items():
        made = [version for version in summary["versions"] if version["kind"] == kind]
        if made:
            table.add_row(what, f"{len(made)}, {sum(version['promoted'] for version in made)} promoted")
        for version in made:
            if not version["promoted"]:
                table.add_row(f"  {version['version']}", f"not promoted: {version['reason']}")
    table.add_row("spent", f"${summary['spend']:.4f}")
    table.add_row("without Apprentice", f"${summary['spend_without']:.4f}")
    table.add_row("saved", f"[green]{_saved(summary):.1%}[/green]")
    table.add_row("wall time", f"{summary['wall_seconds']:.0f} s")
    console.print(table)
    console.print(Text(f"remote share  {_sparkline([float(m.asked_remote) for m in moments])}", _REMOTE))
    known = [max(0.0, m.correlation) for m in moments if m.correlation is not None]
    if known:
        pad = round(60 * (len(moments) - len(known)) / len(moments))
        console.print(Text(f"correlation   {' ' * pad}{_sparkline(known, 60 - pad)}", _TRUST))


def _saved(summary: dict[str, Any]) -> float:
    return 1 - summary["spend"] / summary["spend_without"] if summary["spend_without"] else 0.0


def _kept(promise: dict[str, Any]) -> str:
    """What came of a promise, and what it was."""
    known = promise["realised"] is not None
    found = f"{promise['realised']:.2f} ({promise['low']:.2f} to {promise['high']:.2f})" if known else "unknown"
    return f"{found}, promised {promise['bound']} {promise['limit']:.2f}"


def draw_picture(path: Path, moments: Sequence[Moment], summary: dict[str, Any], title: str) -> None:
    """`picture` as a PNG."""
    picture(moments, summary, title).savefig(path, dpi=110)


def picture(moments: Sequence[Moment], summary: dict[str, Any], title: str) -> Figure:
    """Remote share, quality beside what is promised, cost and versions over the stream, each under what came of it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(h_pad=0.09)  # type: ignore[union-attr, call-arg]
    share, trust, cost, made = figure.subplots(4, 1, sharex=True, height_ratios=(1.1, 1.1, 1, 0.36))
    x = [m.i + 1 for m in moments]
    for axes in (share, trust, cost, made):
        for entry, nxt in zip(summary["phases"], [*summary["phases"][1:], None], strict=True):
            end = nxt["from_request"] if nxt else len(moments)
            axes.axvspan(entry["from_request"], end, color=_PHASE_SHADES[entry["phase"]], lw=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", lw=0.6)
        axes.set_axisbelow(True)
        axes.set_xlim(0, max(1, len(moments)))
    window = max(20, min(100, len(moments) // 8))
    share.plot(x, rolling([100.0 * m.asked_remote for m in moments], window), color=_REMOTE, lw=2)
    share.set_ylabel(f"% of the last {window}")
    share.set_ylim(0, 104)
    _draw_quality(trust, moments, summary)
    cost.plot(x, [float(m.spend_without) for m in moments], color=_WITHOUT, lw=1.6, label="without Apprentice")
    cost.plot(x, [float(m.spend) for m in moments], color=_SPEND, lw=2.2, label="with Apprentice")
    cost.fill_between(
        x, [float(m.spend) for m in moments], [float(m.spend_without) for m in moments], color=_SPEND, alpha=0.12, lw=0
    )
    cost.set_ylabel("USD")
    cost.legend(frameon=False, loc="upper left")
    spent = f"Spent: ${summary['spend']:.2f} instead of ${summary['spend_without']:.2f}, {_saved(summary):.0%} saved"
    cost.set_title(spent, **_SENTENCE)
    _draw_versions(made, summary["versions"])
    made.set_xlabel("request")
    figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold", parse_math=False)
    rows = _label_phases(figure, share, summary["phases"])
    asked = f"Requests that the remote answers: {summary['remote_share_tail']:.0%} of the last third"
    share.set_title(asked, pad=8 + _LABEL_ROW * rows, **_SENTENCE)
    return figure


def _draw_quality(axes: Axes, moments: Sequence[Moment], summary: dict[str, Any]) -> None:
    """What was promised of the answers and what they turned out to be, beside what the checks could tell."""
    promise = summary["promises"][0]
    figure, limit = promise["figure"], promise["limit"]
    x = [m.i + 1 for m in moments]
    lowest, highest = 0.0, 1.0
    if figure == "correlation":
        checked = [float("nan") if m.correlation is None else m.correlation for m in moments]
        axes.plot(x, checked, color=_TRUST, lw=2, label="estimated from checks")
        lowest = min([0.0, *(m.correlation for m in moments if m.correlation is not None)])
    real = [float("nan") if one is None or one.n < _FEWEST else one.value for one in course(moments, figure)]
    axes.plot(x, real, color=_REAL, lw=1.6, label="of all so far")
    axes.axhline(limit, color=_REMOTE, lw=1.2, ls="--", label=f"promised: {promise['bound']} {limit:.2f}")
    if figure != "correlation":
        highest = min(1.0, 2.0 * max([limit, 0.05, *(value for value in real if value == value)]))
    axes.set_ylim(lowest - 0.02 * highest, 1.04 * highest)
    axes.set_ylabel("correlation" if figure == "correlation" else "share")
    axes.legend(frameon=False, loc="lower right" if figure == "correlation" else "upper right", ncol=3)
    what = "Local answers beside the remote's: correlation" if figure == "correlation" else f"{figure.capitalize()}:"
    axes.set_title(f"{what} {_kept(promise)}", **_SENTENCE)


def _draw_versions(axes: Axes, versions: Sequence[dict[str, Any]]) -> None:
    """Where each version was made: a row for each kind, filled where it was promoted."""
    names = list(_KINDS.values())
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(len(names) - 0.4, -0.6)
    for promoted, fill, name in ((True, _TRUST, "promoted"), (False, "white", "refused by the gate")):
        some = [version for version in versions if version["promoted"] is promoted]
        rows = [list(_KINDS).index(version["kind"]) for version in some]
        axes.scatter(
            [v["at_request"] for v in some], rows, s=34, c=fill, edgecolors=_TRUST, label=name, zorder=3, clip_on=False
        )
    axes.set_title("Versions", **_SENTENCE)
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 0.95), ncol=2, fontsize=9, handletextpad=0.2)


def _label_phases(figure: Figure, axes: Axes, phases: Sequence[dict[str, Any]]) -> int:
    """Name each phase above ``axes`` where it begins; returns how many rows of names that took.

    A name that would run into the one before it stands a row higher, and one that fits in none is left out: its shade
    tells it.
    """
    figure.draw_without_rendering()  # lays the axes out, without which nothing has a place
    at, (left, right) = axes.transData, axes.get_window_extent().intervalx
    ends: list[float] = []
    for entry in phases:
        label = axes.annotate(
            f"{entry['phase']} {PHASES[entry['phase']]}",
            (entry["from_request"], 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=9,
            color="#444444",
        )
        width = label.get_window_extent().width
        begins = max(left, min(at.transform((entry["from_request"], 0))[0], right - width))
        row = next((i for i, end in enumerate(ends) if end < begins), len(ends))
        if row == _MOST_LABEL_ROWS:
            label.remove()
            continue
        ends[row : row + 1] = [begins + width * 1.1]
        shift = (begins - at.transform((entry["from_request"], 0))[0]) * 72 / figure.dpi
        label.set_position((shift, 4 + _LABEL_ROW * row))
    return len(ends)
