"""Plots of what patterns cost in quality, from the rows of `examples.quality` and its predictions."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from tools.pages.quality import by_stretch, predicted, runs
from tools.pages.rows import records

CHECK, BATCH = 100, 16
"""Steps between two accuracies of a curve, and sequences of a step, as `examples.quality.training` has them."""


def curves() -> Figure:
    """Accuracy of recall against steps, and against the work of training."""
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    by_step, by_work = figure.subplots(1, 2, sharey=True)
    for number, (family, own) in enumerate(runs().items()):
        for row in own:
            values = [float(value) for value in row["curve"].split()]
            steps = [min(CHECK * (at + 1), int(row["steps"])) for at in range(len(values))]
            style = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--", "linewidth": 1}
            label = family if row is own[0] else None
            by_step.plot(steps, values, label=label, **style)
            # A step goes forward once and backward for twice as much.
            work = 3 * int(row["flops"]) * int(row["length"]) * BATCH / 1e12
            by_work.plot([step * work for step in steps], values, **style)
    by_step.set_xlabel("steps", fontsize=8)
    by_work.set_xlabel("TFLOP of training", fontsize=8)
    by_step.set_ylabel("answers recalled", fontsize=8)
    figure.legend(loc="outside right upper", fontsize=7)
    return figure


def predictions() -> Figure:
    """Accuracy that came out against the accuracy that was predicted, a point for each family and task."""
    figure = Figure(figsize=(5.4, 5.0), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    for task, length, layers in dict.fromkeys(key[:3] for key in predicted()):
        own = runs(task, length, layers)
        places = [float(predicted()[task, length, layers, family]["predicted_accuracy"]) for family in own]
        means = [sum(float(row["accuracy"]) for row in rows) / len(rows) for rows in own.values()]
        more = f", {length} tokens" * (length != 128) + f", {layers} layers" * (layers != 2)
        axes.scatter(places, means, label=task + more, s=18)
    axes.set_xlabel("predicted from pairs seen directly", fontsize=8)
    axes.set_ylabel("came out", fontsize=8)
    axes.legend(fontsize=7)
    return figure


def losses_above(curves: dict[str, dict[int, list[float]]], base: str, places: str) -> Figure:
    """Mean losses over seeds above those of one curve."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    means = {name: {at: sum(v) / len(v) for at, v in own.items()} for name, own in curves.items()}
    for name, own in means.items():
        axes.plot(list(own), [loss - means[base][at] for at, loss in own.items()], marker="o", label=name)
    axes.set_xlabel(places, fontsize=8)
    axes.set_ylabel(f"nats a byte above {base}", fontsize=8)
    axes.legend(fontsize=7)
    return figure


PLOTS: dict[str, Callable[[], Figure]] = {
    "quality-curves": curves,
    "quality-predictions": predictions,
    "quality-positions": lambda: losses_above(
        by_stretch(records("quality-text"), "family", "begin"), "dense", "bytes before"
    ),
    "quality-fidelity": lambda: losses_above(
        by_stretch(records("quality-fidelity-curves"), "way", "step"), "exact", "steps"
    ),
}
