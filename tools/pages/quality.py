"""Tables and plots of what patterns cost in quality, from the rows of `examples.quality` and its predictions."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable

from matplotlib.figure import Figure

from tools.pages.rows import RESULTS, records, table

PREDICTIONS = RESULTS.parents[1] / "examples" / "quality" / "predictions.csv"
CHECK, BATCH = 100, 16
"""Steps between two accuracies of a curve, and sequences of a step, as `examples.quality.training` has them."""
Runs = list[dict[str, str]]


def spread(values: Iterable[float], digits: int = 2) -> str:
    """The mean, and the least and greatest of several."""
    given = list(values)
    mean = f"{sum(given) / len(given):.{digits}f}"
    return mean if len(given) == 1 else f"{mean} ({min(given):.{digits}f} to {max(given):.{digits}f})"


def runs(
    task: str = "recall", length: int = 128, layers: int = 2, rate: float = 0.003, equal: str = "parameters"
) -> dict[str, Runs]:
    """By family, in the order of the predictions."""
    wanted = {"task": task, "length": str(length), "layers": str(layers), "equal": equal}
    by_family: dict[str, Runs] = {}
    for row in records("quality"):
        if all(row[name] == value for name, value in wanted.items()) and float(row["rate"]) == rate:
            by_family.setdefault(row["family"], []).append(row)
    order = [family for *_, family in predicted()]
    return dict(sorted(by_family.items(), key=lambda item: order.index(item[0])))


def predicted() -> dict[tuple[str, int, int, str], dict[str, str]]:
    """(task, length, layers, family) -> its row of `predictions.csv`."""
    with PREDICTIONS.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {(row["task"], int(row["length"]), int(row["layers"]), row["family"]): row for row in rows}


def accuracies(task: str = "recall", length: int = 128, layers: int = 2) -> str:
    """What came out beside what was predicted."""
    heads = ("family", "keys a query", "seen directly", "predicted", "accuracy", "seeds", "steps to it", "CPU s")
    lines = []
    for family, own in runs(task, length, layers).items():
        before = predicted()[task, length, layers, family]
        lines.append(
            (
                family,
                before["keys_per_query"],
                f"{100 * float(before['answers_seen_directly']):.0f} %",
                before["predicted_accuracy"],
                spread(float(row["accuracy"]) for row in own),
                str(len(own)),
                spread((int(row["best_step"]) for row in own), 0),
                spread((float(row["seconds"]) for row in own), 0),
            )
        )
    return table(heads, lines)


def distances() -> str:
    """One fact, asked at each distance, among others and alone: accuracy, and what was predicted."""
    by_task = {task: runs(task) for task in dict.fromkeys(task for task, *_ in predicted()) if "fact" in task}
    by_task = {task: own for task, own in by_task.items() if own}
    lines = []
    for family in dict.fromkeys(family for *_, family in predicted()):
        cells = []
        for task, own in by_task.items():
            before = predicted().get((task, 128, 2, family), {}).get("predicted_accuracy")
            came = spread(float(row["accuracy"]) for row in own[family]) if family in own else "not run"
            cells.append(f"{came}, {before}")
        if any(family in own for own in by_task.values()):
            lines.append((family, *cells))
    return table(("family", *by_task), lines)


def positions() -> dict[str, list[tuple[int, float]]]:
    """family -> (begin, nats a byte in the mean over seeds), of each stretch of positions."""
    by_family: dict[str, dict[int, list[float]]] = {}
    for row in records("quality-text"):
        by_family.setdefault(row["family"], {}).setdefault(int(row["begin"]), []).append(float(row["loss"]))
    return {
        family: [(begin, sum(losses) / len(losses)) for begin, losses in sorted(own.items())]
        for family, own in by_family.items()
    }


def text() -> str:
    """Nats a byte: of all, of the first stretch, of the last quarter."""
    keys = {row["family"]: row["keys_per_query"] for row in records("quality-text")}
    lines = []
    for family, own in positions().items():
        losses = [loss for _, loss in own]
        quarter = losses[-len(losses) // 4 :]
        means = (sum(part) / len(part) for part in (losses, losses[:1], quarter))
        lines.append((family, keys[family], *(f"{mean:.3f}" for mean in means)))
    return table(("family", "keys a query", "all bytes", "first 128", "last quarter"), lines)


def gradients() -> str:
    """Errors of one call's gradients beside float64's, over seeds; the losses at the end of training."""
    ends: dict[str, list[float]] = {}
    curves = records("quality-fidelity-curves")
    last = max(int(row["step"]) for row in curves)
    for row in curves:
        if int(row["step"]) == last:
            ends.setdefault(row["way"], []).append(float(row["loss"]))
    lines = []
    for way, losses in ends.items():
        cells = []
        for gradient in ("q", "v"):
            for scale in ("1.0", "2.0"):
                own = [
                    float(row["error"])
                    for row in records("quality-fidelity")
                    if (row["way"], row["gradient"], row["scale"]) == (way, gradient, scale)
                ]
                cells.append(f"{sum(own) / len(own):.1e}")
        lines.append((way, *cells, spread(losses, 3)))
    heads = ("gradient", "dq, scores of 1", "dq, scores of 4", "dv, 1", "dv, 4", f"nats a byte after {last} steps")
    return table(heads, lines)


def adapted() -> str:
    """A pretrained encoder under each pattern, before and after its fine-tune."""
    heads = ("pattern", "keys a query", "cosine to dense", "after", "same document", "after")
    names = ("pattern", "keys_per_query", "cosine_before", "cosine", "same_document_before", "same_document")
    return table(heads, (tuple(row[name] for name in names) for row in records("quality-adapted")))


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
    for task in dict.fromkeys(task for task, *_ in predicted()):
        own = runs(task)
        places = [float(predicted()[task, 128, 2, family]["predicted_accuracy"]) for family in own]
        means = [sum(float(row["accuracy"]) for row in rows) / len(rows) for rows in own.values()]
        axes.scatter(places, means, label=task, s=18)
    axes.set_xlabel("predicted from pairs seen directly", fontsize=8)
    axes.set_ylabel("came out", fontsize=8)
    axes.legend(fontsize=7)
    return figure


def by_position() -> Figure:
    """Loss above that of dense attention, by how many bytes came before."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    dense = dict(positions()["dense"])
    for family, own in positions().items():
        axes.plot([begin for begin, _ in own], [loss - dense[begin] for begin, loss in own], marker="o", label=family)
    axes.set_xlabel("bytes before", fontsize=8)
    axes.set_ylabel("nats a byte above dense", fontsize=8)
    axes.legend(fontsize=7)
    return figure


def fidelity() -> Figure:
    """Losses of training with each way of merging branches, above those of exact gradients in float32."""
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    losses: dict[str, dict[int, list[float]]] = {}
    for row in records("quality-fidelity-curves"):
        losses.setdefault(row["way"], {}).setdefault(int(row["step"]), []).append(float(row["loss"]))
    means = {way: {step: sum(v) / len(v) for step, v in own.items()} for way, own in losses.items()}
    for way, own in means.items():
        axes.plot(list(own), [loss - means["exact"][step] for step, loss in own.items()], marker="o", label=way)
    axes.set_xlabel("steps", fontsize=8)
    axes.set_ylabel("nats a byte above exact", fontsize=8)
    axes.legend(fontsize=7)
    return figure


TABLES: dict[str, Callable[[], str]] = {
    "quality recall": accuracies,
    "quality distances": distances,
    "quality text": text,
    "quality gradients": gradients,
    "quality adapted": adapted,
}
PLOTS: dict[str, Callable[[], Figure]] = {
    "quality-curves": curves,
    "quality-predictions": predictions,
    "quality-positions": by_position,
    "quality-fidelity": fidelity,
}
