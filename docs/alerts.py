"""Writes docs/alerts.md from the kinds of events: `python docs/alerts.py`. A test holds the two equal."""

from __future__ import annotations

from pathlib import Path

from apprentice.events.emitter import CLOSE_S, PAUSES_S, QUIET_S
from apprentice.events.kinds import LEVELS, EventKind
from apprentice.events.sinks import message
from apprentice.store.records import EventRecord

HEAD = f"""\
# Alerts and other events

Whatever an operator should hear of is an event: in the store, as a line in the log, and at every sink in the section
`alerts` of apprentice.yaml. This page is written by `docs/alerts.py` from `apprentice/events/kinds.py`.

- **Once.** The same matter (kind, task, and version, run or cap if there is one) is told once in {QUIET_S:g} seconds,
  among all processes on one store.
- **Never at a request's expense.** A request hands its event to a background thread. What a transaction records (a
  phase, a promotion, a mark of a cap) is told when it is committed, and not if it is rolled back.
- **Again, if need be.** A sink that times out or answers 408, 409, 425, 429 or 5xx is tried again after
  {", ".join(f"{pause:g}" for pause in PAUSES_S)} seconds (or when its Retry-After says), then given up with an error
  in the log; any other 4xx is given up at once. An event that the store cannot take is sent to the sinks all the
  same, and tried again.
- **At the end too.** A process that ends waits up to {CLOSE_S:g} seconds for what is still on its way.
- **Without secrets.** Keys, passwords, tokens and the webhook's own URL are replaced by `***` in every text.

## alerts.webhook

gets each event as a JSON POST, if it is at least `alerts.level` (`warning` by default; `info` adds promotions and
phases), and every all-clear. `text` is what Slack, Mattermost and Teams' incoming webhooks show. `id` is the event's in
the store: after a time-out the same one may arrive twice. Sinks of other packages stand under `alerts.sinks`:
[Extending](extending.md#an-alert-sink).

| field | holds |
| --- | --- |
"""
_FIELDS = {
    "id": "text, unique in the store",
    "at": "time in UTC, ISO 8601",
    "host": "the machine that tells it",
    "task": "the task's name, or null if it concerns all",
    "kind": "one of the kinds below",
    "level": "`info`, `warning` or `critical`",
    "text": "level, task, kind and meaning in one line",
    "remedy": "what to do, or empty",
    "evidence": "an object: the numbers, names and causes behind it",
}


def render() -> str:
    """The whole page."""
    fields = message(EventRecord("", None, "drift", "warning", {}, 0.0))
    lines = [HEAD + "\n".join(f"| `{name}` | {_FIELDS[name]} |" for name in fields), ""]
    for level in reversed(LEVELS):
        lines += ["", f"## {level}", "", "| kind | meaning | what to do |", "| --- | --- | --- |"]
        for kind in sorted(k for k in EventKind if k.level == level):
            clear = " All-clear." if kind.all_clear else ""
            lines.append(f"| `{kind}` | {kind.meaning}{clear} | {kind.remedy or 'nothing'} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "alerts.md").write_text(render())
