"""The picture of a comparison of operators: fields, what models make of them, and their errors over time."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Row:
    """What is shown of one equation: an example by the names of its fields, the errors of the predictions among them,
    and for each model a curve a seed, of (seconds, error)."""

    title: str
    fields: dict[str, np.ndarray]
    errors: dict[str, np.ndarray]
    curves: dict[str, list[list[tuple[float, float]]]]


def draw(rows: list[Row], files: list[Path]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(14, 3.2 * len(rows)), layout="constrained")
    for part, row in zip(figure.subfigures(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        left, right = part.subfigures(1, 2, width_ratios=(3, 1))
        (_lines if row.fields["input"].ndim == 1 else _images)(left, row)
        axes = right.subplots()
        for number, (name, curves) in enumerate(row.curves.items()):
            for curve in curves:
                label = name if curve is curves[0] else None
                axes.semilogy(*zip(*curve, strict=True), ".-", color=f"C{number}", label=label)
        axes.set(xlabel="seconds of training", title=f"{row.title}: relative error, unseen")
        axes.legend()
    for file in files:
        figure.savefig(file, dpi=100)
    plt.close(figure)


def _lines(figure: Any, row: Row) -> None:
    """Fields on a circle."""
    styles = {"input": "C7:", "truth": "k-"}
    panels = figure.subplots(1, 2)
    for axes, shown, title in zip(panels, (row.fields, row.errors), (row.title, "errors"), strict=True):
        for name, y in shown.items():
            axes.plot(np.arange(len(y)) / len(y), y, styles.get(name, "-"), label=name)
        axes.set(xlabel="x", title=title)
        axes.legend(fontsize=8)


def _images(figure: Any, row: Row) -> None:
    """Fields on a square, and errors on a scale of their own."""
    panels = figure.subplots(1, len(row.fields) + len(row.errors))
    for group, shown in ((panels[: len(row.fields)], row.fields), (panels[len(row.fields) :], row.errors)):
        most = max(np.abs(y).max() for y in shown.values())
        for axes, (name, y) in zip(group, shown.items(), strict=True):
            image = axes.imshow(y, vmin=-most, vmax=most, cmap="RdBu_r")
            axes.set_title(name, fontsize=9)
            axes.axis("off")
        figure.colorbar(image, ax=list(group), orientation="horizontal", shrink=0.6)
