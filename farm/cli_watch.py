"""`farm watch`: a run while it goes on, from anywhere that sees the store."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farm.options import Config, Override, load_config, naming

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from farm.store import Store
    from farm.watching import Watched

LOOK_SECONDS = 2.0
LINE_SECONDS = 10.0
"""Without a terminal a line is printed as often, when something has happened."""
STYLES = {
    "done": "green",
    "running": "cyan",
    "waiting": "dim",
    "failed": "red",
    "quarantined": "yellow",
    "silent": "yellow",
    "stopped": "yellow",
    "not asked for": "dim",
}
STATES = ("done", "running", "waiting", "failed", "quarantined")

RunId = Annotated[str | None, typer.Option("--run", metavar="ID", help="Not the newest run, but this one.")]


def watch(
    config: Config,
    override: Override = None,
    run_id: RunId = None,
    once: Annotated[bool, typer.Option("--once", help="Print where it stands now, and leave.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON whenever something changes.")] = False,
) -> None:
    """Follow the newest run, also from another machine: concepts by stage, rates, time left, failures.

    Ends with the run: with 0 when all went well, and with 1 when something failed, or nothing is heard of it any more.
    """
    from farm.events import need_run
    from farm.store import open_store

    loaded = load_config(config, override or [])
    with naming(config):
        store = open_store(loaded.store, loaded.cluster.store_patience_seconds)
        looks = Looks(store, loaded.name, need_run(store, loaded.name, run_id), newest=run_id is None)
    show = _json if as_json else _once if once else _live
    try:
        watched = show(iter([next(iter(looks))]) if once else iter(looks))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if not once and watched.failed:
        raise typer.Exit(1)


@dataclass
class Looks:
    """Where a run stands, looked at until it is over: three calls of the store each. newest: go on to a newer run."""

    store: Store
    farm: str
    run_id: str
    newest: bool

    def __iter__(self) -> Iterator[tuple[Watched, bool]]:
        """What has been told so far, and whether any of it is new."""
        from farm.events import Feed, newest_run
        from farm.watching import GONE_SECONDS, Watched

        feed, watched = Feed(self.store, self.run_id), Watched(self.run_id)
        while True:
            if self.newest and (newest := newest_run(self.store, self.farm)) and newest != watched.run_id:
                feed, watched = Feed(self.store, newest), Watched(newest)
            news = feed.news()
            watched.add(news)
            yield watched, bool(news)
            if watched.end or watched.silence(datetime.now(UTC)) > GONE_SECONDS:
                return
            time.sleep(LOOK_SECONDS)


def _json(looks: Iterator[tuple[Watched, bool]]) -> Watched:
    state = ""
    for watched, news in looks:
        facts = watched.facts(datetime.now(UTC))
        if news or facts["state"] != state:
            state = facts["state"]
            print(json.dumps(facts, ensure_ascii=False), flush=True)
    return watched


def _once(looks: Iterator[tuple[Watched, bool]]) -> Watched:
    from rich.console import Console

    watched, _ = next(looks)
    console = Console()
    console.print(table(watched.facts(datetime.now(UTC)), console))
    return watched


def _live(looks: Iterator[tuple[Watched, bool]]) -> Watched:
    """A table that stays in its place; where there is no terminal, a line now and then."""
    from rich.console import Console
    from rich.live import Live

    console = Console()
    if not console.is_terminal:
        return _lines(looks)
    with Live(console=console, auto_refresh=False) as live:
        for watched, _ in looks:
            live.update(table(watched.facts(datetime.now(UTC)), console), refresh=True)
    return watched


def _lines(looks: Iterator[tuple[Watched, bool]]) -> Watched:
    printed, state = -LINE_SECONDS, ""
    for watched, news in looks:
        facts = watched.facts(datetime.now(UTC))
        now = time.monotonic()
        if facts["state"] != state or (news and now - printed >= LINE_SECONDS):
            printed, state = now, facts["state"]
            print(summary(facts), flush=True)
    return watched


def summary(facts: dict[str, Any]) -> str:
    """Where a run stands, in a line."""
    parts = [f"{facts['run']} {facts['state']}"]
    for stage in facts["stages"]:
        if stage["state"] == "running":
            parts.append(" ".join(filter(None, (stage["name"], _amount(stage), _left(stage), stage["text"]))))
    if facts["concepts"]:
        published = facts["concepts"]["published"]
        parts.append(f"{published['done']} of {sum(published.values())} published")
    if facts["failures"]:
        parts.append(f"{len(facts['failures'])} failed: {', '.join(row['concept'] for row in facts['failures'][:5])}")
    if facts["error"]:
        parts.append(facts["error"])
    return "; ".join(parts)


def table(facts: dict[str, Any], console: Console) -> RenderableType:
    """A run as a screen of tables, no higher than the terminal."""
    from rich.console import Group
    from rich.text import Text

    taken = 6 + len(facts["stages"]) + 7 * bool(facts["concepts"]) + bool(facts["error"]) + bool(facts["report"])
    parts: list[RenderableType] = [_head(facts), _stages(facts)]
    if facts["concepts"]:
        parts.append(_concepts(facts["concepts"]))
    shown = facts["failures"][: max(1, console.height - taken - 2)]
    for row in shown:
        style = STYLES[row["state"]]
        line = Text.assemble((f"{row['state']}: {row['concept']}", style), f"  {row['stage']}: {row['error']}")
        parts.append(_one_line(line))
    if len(facts["failures"]) > len(shown):
        parts.append(Text(f"and {len(facts['failures']) - len(shown)} more: `farm logs` shows them all", "dim"))
    if facts["error"]:
        parts.append(Text(facts["error"], "red"))
    if facts["report"]:
        parts.append(Text(f"report: {facts['report']}"))
    return Group(*parts)


def _head(facts: dict[str, Any]) -> RenderableType:
    from rich.text import Text

    state, seconds = facts["state"], facts["seconds"]
    head = Text.assemble((facts["farm"] or "", "bold"), f"  run {facts['run']}  ", (state, STYLES[state]))
    if seconds is not None:
        head.append(f"  {_clock(seconds)}")
    if state == "silent":
        head.append(f"  nothing heard for {_clock(facts['silent_seconds'])}: its driver may be gone", "yellow")
    rates = []
    if facts["units_per_second"]:
        rates.append(f"{facts['units_per_second']:.2g} units/s")
    if facts["adapters_per_hour"]:
        rates.append(f"{facts['adapters_per_hour']:.4g} adapters/h")
    if facts["busy"] is not None and facts["device"]:
        rates.append(
            f"{facts['busy']:.1f} GPUs at work ({facts['device']}, up to {facts['device_memory']:.0%} of memory)"
        )
    if facts["retried"]:
        rates.append(f"{facts['retried']} retried")
    if rates:
        head.append("\n" + ", ".join(rates), "dim")
    return head


def _stages(facts: dict[str, Any]) -> RenderableType:
    from rich import box
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    grid = Table("stage", "", "", "done", "time", "left", "", box=box.SIMPLE_HEAD, pad_edge=False)
    grid.columns[2].width = 20
    for place, width in ((1, 13), (3, 9), (4, 7), (5, 14)):
        grid.columns[place].min_width = width  # that nothing moves about as numbers grow
    for column in grid.columns[:6]:
        column.no_wrap = True  # the last one gives way
    for stage in facts["stages"]:
        done, total = stage["done"] or 0, stage["total"] or 0
        if stage["state"] == "done":
            done = total = 1
        bar = ProgressBar(total=total or 1, completed=done, width=20) if stage["state"] in ("running", "done") else ""
        state = Text(stage["state"], STYLES[stage["state"]])
        spent = _clock(stage["seconds"]) if stage["seconds"] is not None else ""
        grid.add_row(stage["name"], state, bar, _amount(stage), spent, _left(stage), _one_line(Text(stage["text"])))
    return grid


def _concepts(counts: dict[str, dict[str, int]]) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = [state for state in STATES if state == "done" or any(states.get(state) for states in counts.values())]
    grid = Table("concepts", *shown, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in grid.columns[1:]:
        column.justify = "right"
    for kind, states in counts.items():
        cells = [Text(str(states.get(state, 0)), STYLES[state] if states.get(state) else "dim") for state in shown]
        grid.add_row(kind, *cells)
    return grid


def _one_line(text: Any) -> Any:
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _amount(stage: dict[str, Any]) -> str:
    return f"{stage['done']}/{stage['total']}" if stage["total"] is not None else ""


def _left(stage: dict[str, Any]) -> str:
    return f"about {_clock(stage['eta_seconds'])}" if stage["eta_seconds"] else ""


def _clock(seconds: float) -> str:
    """45 s, 3:20, 2:03:20, 3 d 4 h."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if whole < 60:
        return f"{whole} s"
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
