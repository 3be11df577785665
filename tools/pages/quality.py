"""Tables of what patterns cost in quality, from the rows of `examples.quality` and its predictions."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable

from tools.pages.rows import RESULTS, records, table

PREDICTIONS = RESULTS.parents[1] / "examples" / "quality" / "predictions.csv"
Runs = list[dict[str, str]]


def spread(values: Iterable[float], digits: int = 2) -> str:
    """The mean, and the least and greatest of several."""
    given = list(values)
    mean = f"{sum(given) / len(given):.{digits}f}"
    return mean if len(given) == 1 else f"{mean} ({min(given):.{digits}f} to {max(given):.{digits}f})"


def runs(
    task: str = "recall", length: int = 128, layers: int = 2, rate: float | None = 0.003, equal: str = "parameters"
) -> dict[str, Runs]:
    """By family, in the order of the predictions; None takes every rate."""
    wanted = {"task": task, "length": str(length), "layers": str(layers), "equal": equal}
    by_family: dict[str, Runs] = {}
    for row in records("quality"):
        if all(row[name] == value for name, value in wanted.items()) and rate in (None, float(row["rate"])):
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
                accuracy_of(own),
                str(len(own)),
                steps_of(own),
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
            cells.append(f"{accuracy_of(own[family]) if family in own else 'not run'}, {before}")
        if any(family in own for own in by_task.values()):
            lines.append((family, *cells))
    return table(("family", *by_task), lines)


def rates() -> str:
    """Accuracy and steps at each learning rate, seed 0."""
    by_family = {family: [row for row in own if row["seed"] == "0"] for family, own in runs(rate=None).items()}
    swept = {family: own for family, own in by_family.items() if len(own) > 1}
    values = sorted({float(row["rate"]) for own in swept.values() for row in own})
    lines = []
    for family, own in swept.items():
        cells = {float(row["rate"]): f"{float(row['accuracy']):.2f} in {row['best_step']}" for row in own}
        lines.append((family, *(cells.get(value, "not run") for value in values)))
    return table(("family", *(f"{value:g}" for value in values)), lines)


def flops() -> str:
    """Families whose model gets another width at equal FLOPs, beside the same family at the width of equal parameters."""
    heads = (
        "family",
        "tokens",
        "width",
        "kFLOP a token",
        "accuracy",
        "seeds",
        "steps to it",
        "width",
        "accuracy",
        "steps to it",
    )
    lines = []
    for length in (128, 256):
        alike = runs(length=length)
        for family, own in runs(length=length, equal="flops").items():
            lines.append(
                (
                    family,
                    str(length),
                    own[0]["width"],
                    f"{int(own[0]['flops']) / 1000:.0f}",
                    accuracy_of(own),
                    str(len(own)),
                    steps_of(own),
                )
                + (
                    ("64", accuracy_of(alike[family]), steps_of(alike[family]))
                    if family in alike
                    else ("64", "not run", "not run")
                )
            )
    return table(heads, lines)


def accuracy_of(own: Runs) -> str:
    """Accuracy over seeds."""
    return spread(float(row["accuracy"]) for row in own)


def steps_of(own: Runs) -> str:
    """Steps to the best accuracy over seeds."""
    return spread((int(row["best_step"]) for row in own), 0)


def by_stretch(rows: Runs, name: str, at: str) -> dict[str, dict[int, list[float]]]:
    """What `name` says -> place -> the loss there with each seed, in the order of places."""
    curves: dict[str, dict[int, list[float]]] = {}
    for row in sorted(rows, key=lambda row: int(row[at])):
        curves.setdefault(row[name], {}).setdefault(int(row[at]), []).append(float(row["loss"]))
    return curves


def text() -> str:
    """Nats a byte: of all, of the first stretch, of the last quarter, and how much that quarter's differ from dense attention's with the same seed."""
    keys = {row["family"]: row["keys_per_query"] for row in records("quality-text")}
    curves = by_stretch(records("quality-text"), "family", "begin")
    ends = {}
    lines = []
    for family, own in curves.items():
        by_seed = list(zip(*own.values(), strict=True))
        parts = (by_seed, [losses[:1] for losses in by_seed], [losses[-len(losses) // 4 :] for losses in by_seed])
        means = [[sum(losses) / len(losses) for losses in part] for part in parts]
        ends[family] = means[-1]
        above = [ours - dense for ours, dense in zip(means[-1], ends["dense"], strict=False)]
        lines.append((family, keys[family], str(len(by_seed)), *(spread(mean, 3) for mean in means), spread(above, 3)))
    heads = ("family", "keys a query", "seeds", "all bytes", "first 128", "last quarter", "above dense there")
    return table(heads, lines)


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


TABLES: dict[str, Callable[[], str]] = {
    "quality recall": accuracies,
    "quality 256": lambda: accuracies(length=256),
    "quality flops": flops,
    "quality mixtures": lambda: accuracies(layers=4),
    "quality rates": rates,
    "quality distances": distances,
    "quality text": text,
    "quality gradients": gradients,
    "quality adapted": adapted,
}
