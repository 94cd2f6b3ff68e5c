"""The loss as training goes on, and how much of each basis the next one keeps. With --diagnostics also what
each refresh found in the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints import write_atomically
from methods import METHODS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, SOFT, FAINT = "#222222", "#5f5f5f", "#9a9a9a"
STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#ececec",
    "axes.axisbelow": True,
}
FOUND = {
    "captured_energy": ("Energy of the gradient that the new basis captures", "‖PᵀG‖²/‖G‖², mean over the projected matrices."),
    "effective_rank": ("Effective rank of the gradient", "(Σσ²)²/Σσ⁴, mean over the projected matrices."),
}
"""What --diagnostics adds to the rows of refreshes, with the title and explanation of its panel."""
MANY = 6
"""More curves than this get thinner lines, labels of one line, and a taller picture."""
POINTS = {"linewidth": 1.7, "marker": "o", "markersize": 4.5, "markeredgecolor": "white", "markeredgewidth": 0.7, "clip_on": False}


def draw(path: Path, runs: dict[str, list[dict[str, Any]]], *, title: str, subtitle: str, random_overlap: float) -> None:
    """Saves a PNG of the metrics rows of each optimizer. `random_overlap` = r / m is what two unrelated
    subspaces share on average."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    overlaps, *found = (_of_refreshes(runs, key) for key in ("overlap", *FOUND))
    with plt.rc_context(STYLE):
        many, lines = len(runs) > MANY, 2 if all(found) else 1
        width, height = (13.5, 6.5) if many else (11.5, 5.2)
        figure, axes = plt.subplots(lines, 2 if overlaps else 1, figsize=(width, height * lines), squeeze=False)
        right = 0.88 if many or not overlaps else 0.925
        figure.subplots_adjust(
            left=0.055, right=right, bottom=0.1 / lines, top=1 - 0.26 / lines, wspace=0.62 if many else 0.38, hspace=0.42
        )
        figure.text(0.055, 1 - 0.055 / lines, title, fontsize=14, fontweight="bold", va="center")
        figure.text(0.055, 1 - 0.108 / lines, subtitle, color=SOFT, va="center")
        _draw_loss(axes[0][0], runs)
        if overlaps:
            _draw_overlap(axes[0][1], overlaps, random_overlap)
        for place, (points, (what, explanation)) in enumerate(zip(found, FOUND.values(), strict=True) if lines == 2 else ()):
            _draw_found(axes[1][place], points, what, explanation)
        write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=160, facecolor="white"))
        plt.close(figure)


def _of_refreshes(runs: dict[str, list[dict[str, Any]]], key: str) -> dict[str, list[tuple[int, float]]]:
    """Optimizer → (steps before the refresh, figure) of each refresh that has that figure."""
    each = {method: [(row["step"] - 1, row[key]) for row in rows if row.get(key) is not None] for method, rows in runs.items()}
    return {method: points for method, points in each.items() if points}


def _draw_loss(axes: Axes, runs: dict[str, list[dict[str, Any]]]) -> None:
    ends, shown = [], []
    steps = max(row["step"] for rows in runs.values() for row in rows)
    many = len(runs) > MANY
    for method, rows in runs.items():
        color, label = METHODS[method].color, METHODS[method].title
        train = [row["loss"] for row in rows if row["event"] == "step"]
        smooth = _running_mean(train, reach=steps // 30)
        val = [(row["step"], row["val_loss"]) for row in rows if row["event"] == "eval"]
        if not many:
            axes.plot(range(1, len(smooth) + 1), smooth, color=color, linewidth=1, alpha=0.35)
        axes.plot(*zip(*val, strict=True), color=color, **_line(method, many))
        state = [f"{', ' if many else chr(10)}{row['state_bytes'] / 1e6:.2f} MB" for row in rows if row["event"] == "end"]
        ends.append((val[-1][1], f"{label} {val[-1][1]:.3f}{''.join(state)}", color))
        shown += smooth[len(smooth) // 10 :] + [loss for _, loss in val]  # the plunge of the first steps would flatten all the rest
    margin = 0.06 * (max(shown) - min(shown)) or 0.1
    axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.set_xlim(0, steps)
    thin = "" if many else " Thin: training batches."
    _title(axes, "Loss, nats per byte", f"Points: held-out text, with optimizer state.{thin}")
    axes.set_xlabel("step")
    _label_ends(axes, ends, lines=1 if many else 2)


def _draw_overlap(axes: Axes, overlaps: dict[str, list[tuple[int, float]]], random_overlap: float) -> None:
    ends = []
    axes.axhline(random_overlap, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        f"unrelated subspaces share r/m = {random_overlap:.2f}",
        (0, random_overlap),
        xycoords=axes.get_yaxis_transform(),
        xytext=(4, -4),
        textcoords="offset points",
        va="top",
        color=SOFT,
        fontsize=9,
    )
    for method, points in overlaps.items():
        axes.plot(*zip(*points, strict=True), color=METHODS[method].color, **_line(method, len(overlaps) > MANY))
        ends.append((points[-1][1], METHODS[method].title, METHODS[method].color))
    axes.set_ylim(0, 1)
    axes.set_xlim(0, max(step for points in overlaps.values() for step, _ in points))
    _title(axes, "Overlap of each new basis with the one it replaces", "‖PᵀQ‖²/r, mean over the projected matrices; 1 = the same subspace.")
    axes.set_xlabel("step of the refresh")
    _label_ends(axes, ends)


def _draw_found(axes: Axes, found: dict[str, list[tuple[int, float]]], title: str, explanation: str) -> None:
    for method, points in found.items():
        axes.plot(*zip(*points, strict=True), color=METHODS[method].color, **_line(method, len(found) > MANY))
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, max(1, *(step for points in found.values() for step, _ in points)))
    _title(axes, title, explanation)
    axes.set_xlabel("step of the refresh")
    _label_ends(axes, [(points[-1][1], METHODS[method].title, METHODS[method].color) for method, points in found.items()])


def _line(method: str, many: bool) -> dict[str, Any]:
    """How a method's curve is drawn: with I3S's bases dashed."""
    style = POINTS | ({"linewidth": 1.3, "markersize": 3} if many else {})
    return style | ({"linestyle": (0, (4, 2))} if METHODS[method].dashed else {})


def _title(axes: Axes, title: str, explanation: str) -> None:
    for text, height, style in ((title, 22, {"fontsize": 11, "fontweight": "bold"}), (explanation, 8, {"fontsize": 9, "color": SOFT})):
        axes.annotate(text, (0, 1), xycoords="axes fraction", xytext=(0, height), textcoords="offset points", **style)


def _running_mean(values: Sequence[float], reach: int) -> list[float]:
    """Mean of each value and `reach` values on either side. Near the start fewer values are averaged. The
    list stops where fewer than `reach` values follow."""
    sums = [0.0, *accumulate(values)]
    sides = (min(i, reach) for i in range(len(values) - reach))
    return [(sums[i + side + 1] - sums[i - side]) / (2 * side + 1) for i, side in enumerate(sides)]


def _label_ends(axes: Axes, ends: list[tuple[float, str, str]], lines: int = 1) -> None:
    """Names each line at its right end. Labels of lines that end close together are pushed apart, evenly up
    and down."""
    low, high = axes.get_ylim()
    gap = 0.055 * lines * (high - low)
    ends = sorted(ends)
    heights = [y for y, _, _ in ends]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    shift = sum(height - y for height, (y, _, _) in zip(heights, ends, strict=True)) / len(ends)
    shift = max(min(shift, heights[0] - low), heights[-1] - high)  # none of them beyond the axes
    for height, (_, label, color) in zip(heights, ends, strict=True):
        axes.annotate(
            label,
            (1, height - shift),
            xycoords=axes.get_yaxis_transform(),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            color=color,
            fontweight="bold",
            annotation_clip=False,
        )
