"""What a person sees: progress during a run, and a table at the end. A terminal gets bars, a log gets plain
lines."""

from __future__ import annotations

import math
import time
from statistics import mean, median
from typing import Any

from methods import METHODS
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

QUIET_S = 30.0  # a log gets a line at least this often


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One run's metrics rows → its figures. None stands for what was not measured.

    step_ms is the median over steps that refreshed no basis. refresh_ms is the median over steps that did
    (RSO: drew new subspaces), less step_ms. The first step counts in neither, because it allocates the
    states. overlap is the mean over refreshes from the second on.
    """
    end = rows[-1]
    steps = [row for row in rows if row["event"] == "step"]
    ordinary_ms = [row["optimizer_ms"] for row in steps[1:] if not row.get("refresh")]
    refresh_ms = [row["optimizer_ms"] for row in steps[1:] if row.get("refresh")]
    overlaps = [row["overlap"] for row in steps if row.get("overlap") is not None]
    val_loss = [row["val_loss"] for row in rows if row["event"] == "eval"][-1]
    step_ms = median(ordinary_ms) if ordinary_ms else None
    return {
        "val_loss": val_loss,
        "perplexity_per_byte": math.exp(val_loss),
        "bits_per_byte": val_loss / math.log(2),
        "overlap": mean(overlaps) if overlaps else None,
        "step_ms": step_ms,
        "refresh_ms": median(refresh_ms) - step_ms if refresh_ms and step_ms is not None else None,
        "state_bytes": end["state_bytes"],
        "gradient_bytes": end.get("gradient_bytes"),
        "sent_bytes": mean(sent) if (sent := [row["sent_bytes"] for row in steps if "sent_bytes" in row]) else None,
        "activation_bytes": end.get("activation_bytes"),
        "peak_bytes": end["peak_bytes"],
        "wall_s": end["wall_s"],
    }


# label, key of `summarize`, how to print it
TABLE_ROWS = [
    ("held-out loss, nats per byte", "val_loss", "{:.4f}".format),
    ("perplexity per byte", "perplexity_per_byte", "{:.3f}".format),
    ("bits per byte", "bits_per_byte", "{:.4f}".format),
    ("overlap of adjacent bases, mean", "overlap", "{:.3f}".format),
    ("optimizer step, median ms", "step_ms", "{:.2f}".format),
    ("refresh, median ms over a step", "refresh_ms", "{:.2f}".format),
    ("optimizer state, MB", "state_bytes", lambda n: f"{n / 1e6:.2f}"),
    ("gradients, MB", "gradient_bytes", lambda n: f"{n / 1e6:.2f}"),
    ("sent by a process, mean MB a step", "sent_bytes", lambda n: f"{n / 1e6:.2f}"),
    ("activations saved for backward, MB", "activation_bytes", lambda n: f"{n / 1e6:.2f}"),
    ("peak memory of the run, MB", "peak_bytes", lambda n: f"{n / 1e6:.0f}"),
    ("whole run, s", "wall_s", "{:.1f}".format),
]


def table(summaries: dict[str, dict[str, Any]], title: str) -> Table:
    """One column an optimizer. "–": does not apply; "n/a": could not be measured here."""
    result = Table(title=title, title_justify="left", title_style="bold", caption=_caption(summaries), caption_justify="left")
    result.add_column("")
    for method in summaries:
        result.add_column(METHODS[method].title, justify="right", style=METHODS[method].color)
    for label, key, form in TABLE_ROWS:
        missing = "n/a" if key == "peak_bytes" else "–"
        cells = [missing if summary[key] is None else form(summary[key]) for summary in summaries.values()]
        if any(cell != "–" for cell in cells):
            result.add_row(label, *cells)
    return result


def _caption(summaries: dict[str, dict[str, Any]]) -> str:
    lines = []
    if "adamw" in summaries:
        lines += [_cost(method, summary, summaries["adamw"]) for method, summary in summaries.items() if method != "adamw"]
    if len(summaries) > 1:
        lines.append("One seed: runs that differ only by --seed scatter too, so a small gap in loss is not a ranking.")
    if any(summary["overlap"] is not None for summary in summaries.values()):
        lines.append("Overlap = ‖PᵀQ‖²/r of a basis P and its successor Q: 1 is the same subspace again.")
    return "\n".join(lines)


def _cost(method: str, summary: dict[str, Any], full: dict[str, Any]) -> str:
    """What low rank costs and saves in one run."""
    loss = summary["val_loss"] - full["val_loss"]
    parts = [f"loss {loss:+.3f} nats ({loss / full['val_loss']:+.1%})"]
    for key, name in (("state_bytes", "optimizer state"), ("activation_bytes", "saved activations")):
        if summary[key] is not None and full[key]:
            parts.append(f"{name} × {summary[key] / full[key]:.2f}")
    return f"{METHODS[method].title} against AdamW, full rank: {', '.join(parts)}."


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f} steps/s", style="dim")


class Reporter:
    """Shows the rows of one run after another. Use it as a context manager."""

    def __init__(self, console: Console, steps: int):
        self.console = console
        self._steps = steps
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("held-out {task.fields[val]}"),
            _Speed(),
            TimeRemainingColumn(),
            console=console,
        )
        self._live = console.is_terminal

    def __enter__(self) -> Reporter:
        if self._live:
            self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._bars.stop()

    def start(self, method: str, lr: float) -> None:
        self._title, self._color, self._lr = METHODS[method].title, METHODS[method].color, lr
        self._started = False  # the first row tells how many steps a checkpoint already holds
        self._last_line_s = -math.inf
        self._loss = self._val = "–"

    def _first_row(self, done_before: int) -> None:
        self._started, self._done_before, self._first_row_s = True, done_before, time.perf_counter()
        if self._live:
            self._task = self._bars.add_task(
                f"[{self._color}]{self._title:<7}[/] lr {self._lr:g}", total=self._steps, completed=done_before, loss="–", val="–"
            )
        else:
            resumed = f", from its checkpoint at step {done_before}" if done_before else ""
            self.console.print(f"{self._title}: {self._steps} steps at lr {self._lr:g}{resumed}", highlight=False)

    def row(self, row: dict[str, Any]) -> None:
        """One row of the metrics."""
        if not self._started:
            self._first_row(row["step"] - 1)
        if row["event"] == "step":
            self._loss = f"{row['loss']:.3f}"
        elif row["event"] == "eval":
            self._val = f"{row['val_loss']:.3f}"
        if self._live:
            self._bars.update(self._task, completed=row["step"], loss=self._loss, val=self._val)
        elif row["event"] == "eval" or time.perf_counter() - self._last_line_s > QUIET_S:
            self._line(row["step"])

    def _line(self, step: int) -> None:
        self._last_line_s = time.perf_counter()
        steps_since_first = step - 1 - self._done_before
        pace = ""
        if steps_since_first:  # the first step loads and compiles, so its pace says nothing about the others
            per_s = steps_since_first / (self._last_line_s - self._first_row_s)
            left_s = int((self._steps - step) / per_s)
            pace = f"  {per_s:.1f} steps/s  {left_s // 60}:{left_s % 60:02} left"
        self.console.print(
            f"  {self._title:<7} step {step:>{len(str(self._steps))}}/{self._steps}  loss {self._loss}  held-out {self._val}{pace}",
            highlight=False,
        )
