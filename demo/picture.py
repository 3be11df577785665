"""The picture of who sees whom: the whole sequence at reduced size, and true positions one by one for each rate."""

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from demo.refusal import RefusalError
from longattn.patterncache import Dilated, Rectangle, Span
from longattn.patterncache.analysis.reduced import reduced_counts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import SubFigure
    from matplotlib.image import AxesImage

_ZOOM = 64
_PANELS = 6
_INK, _BLANK = "#26303a", "#f4f5f7"
_HEADS = 16


def mean_counts(pattern: Dilated, seq_len: int, heads: int) -> npt.NDArray[np.float64]:
    """`reduced_counts` of at most 16 heads, averaged; neighbours as many as the rates' common multiple (at most 16) hold every residue.

    Returns:
        (cells, cells) float64, at most 256 x 256; rows are queries, columns keys.
    """
    run = min(math.lcm(*pattern.dilation_rates), 16)
    sampled = min(heads, _HEADS)
    # One head at a time: the counts of all heads at once would be the demo's largest array.
    maps = (reduced_counts(pattern, seq_len, heads, head=head, neighbours=run) for head in range(sampled))
    return sum(maps, np.zeros(())) / sampled


def zoom_start(pattern: Dilated, seq_len: int) -> int:
    """First position of the neighbourhood shown one by one: around the first segment border if the text reaches it."""
    span = min(_ZOOM, seq_len)
    return max(0, min(min(pattern.segment_lengths) - span // 2, seq_len - span))


def zoomed_counts(pattern: Dilated, seq_len: int, heads: int, head: int, start: int) -> npt.NDArray[np.int64]:
    """True counts of one head among up to 64 neighbouring positions from `start`; (positions, positions) int64."""
    span = Span(start, min(_ZOOM, seq_len))
    return pattern.counts(Rectangle(num_heads=heads, queries=(span,), keys=(span,), heads=Span(head, 1)))[0]


def draw(pattern: Dilated, seq_len: int, heads: int, path: Path) -> None:
    """Write the PNG.

    Raises:
        RefusalError: the file cannot be written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = min(_PANELS, len(pattern.dilation_rates)) + 1
    columns = math.ceil(panels / 2)
    figure = plt.figure(figsize=(6.6 + 3.2 * columns, 7.2), layout="constrained", facecolor="white")
    left, right = np.ravel(np.asarray(figure.subfigures(1, 2, width_ratios=(6.6, 3.2 * columns))))
    _overview(left, mean_counts(pattern, seq_len, heads), seq_len, heads)
    _neighbourhood(right, (2, columns), pattern, seq_len, heads)
    figure.suptitle("Who sees whom: causal dilated attention", color=_INK, fontsize=15, fontweight="bold")
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise RefusalError(f"--png {path}: {error.strerror or error}") from error
    finally:
        plt.close(figure)


def _neighbourhood(figure: "SubFigure", shape: tuple[int, int], pattern: Dilated, seq_len: int, heads: int) -> None:
    """A panel per rate, then all of them together, at the same true positions."""
    import matplotlib as mpl
    from matplotlib.colors import BoundaryNorm, ListedColormap, Normalize

    start, head = zoom_start(pattern, seq_len), heads - 1
    places = [figure.add_subplot(*shape, at + 1) for at in range(min(_PANELS, len(pattern.dilation_rates)) + 1)]
    hues = mpl.colormaps["viridis"](np.linspace(0.15, 0.8, len(places) - 1))
    branches = zip(pattern.segment_lengths, pattern.dilation_rates, strict=True)
    for axes, (segment, rate), hue in zip(places, branches, hues, strict=False):
        counts = zoomed_counts(
            replace(pattern, segment_lengths=(segment,), dilation_rates=(rate,)), seq_len, heads, head, start
        )
        _positions(
            axes, counts, start, f"segment {segment}, rate {rate}", ListedColormap([_BLANK, hue]), Normalize(0, 1)
        )
    counts = zoomed_counts(pattern, seq_len, heads, head, start)
    top = max(1, int(counts.max()))
    shades = ListedColormap([_BLANK, *mpl.colormaps["magma_r"](np.linspace(0.25, 0.9, top))])
    norm = BoundaryNorm([n - 0.5 for n in range(top + 2)], top + 1)
    image = _positions(places[-1], counts, start, "together", shades, norm)
    bar = figure.colorbar(image, ax=places[-1], shrink=0.8, ticks=range(top + 1))
    bar.set_label("times seen", color=_INK)
    _quiet(bar.ax)
    figure.suptitle(f"Head {head}, {len(counts)} positions one by one from {start}", color=_INK, fontsize=11)


def _overview(figure: "SubFigure", mean: npt.NDArray[np.float64], seq_len: int, heads: int) -> None:
    """The whole sequence, tiles of positions averaged into pixels."""
    from matplotlib.colors import PowerNorm

    axes = figure.add_subplot()
    # Sparse far regions matter as much as the diagonal: the power scale keeps both visible.
    norm = PowerNorm(0.5, 0, max(1e-9, float(mean.max())))
    image = axes.imshow(np.ma.masked_equal(mean, 0), cmap="magma_r", norm=norm, extent=(0, seq_len, seq_len, 0))
    axes.set_facecolor(_BLANK)
    axes.set_xlabel("key position", color=_INK)
    axes.set_ylabel("query position", color=_INK)
    _quiet(axes)
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label("times a query sees a key, mean", color=_INK)
    _quiet(bar.ax)
    tile = max(1, seq_len // mean.shape[0])
    figure.suptitle(f"All {seq_len} positions, {tile} x {tile} a pixel, mean over heads", color=_INK, fontsize=11)


def _positions(
    axes: "Axes", counts: npt.NDArray[np.int64], start: int, title: str, cmap: "Colormap", norm: "Normalize"
) -> "AxesImage":
    """One square of true positions."""
    end = start + len(counts)
    extent = (start, end, end, start)
    image = axes.imshow(counts, cmap=cmap, norm=norm, extent=extent, interpolation="nearest")
    axes.set_title(title, color=_INK, fontsize=10)
    axes.locator_params(nbins=4)
    _quiet(axes)
    return image


def _quiet(axes: "Axes") -> None:
    axes.tick_params(colors=_INK, labelsize=8)
    for spine in axes.spines.values():
        spine.set_color("#c9ced6")
