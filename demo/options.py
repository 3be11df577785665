"""The command line of the demo, and the checks that need nothing but what was typed."""

import argparse
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from demo.refusal import RefusalError
from longattn.patterncache import Dilated, Pattern

LAYERS = 12
"""In how many layers the joined pattern lets every token hear of all before it."""

DTYPES = ("float32", "bfloat16", "float16", "float64")
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Options:
    """What to run. `seq_len` is in tokens, one byte of text each; None takes the whole text, at most 32768 of it."""

    file: str | None
    seq_len: int | None
    device: str
    dtype: str
    segments: tuple[int, ...]
    rates: tuple[int, ...]
    heads: int
    head_dim: int
    seed: int
    png: str

    @property
    def pattern(self) -> Dilated:
        """Causal dilated attention in which every head does every branch."""
        return Dilated(self.segments, self.rates, heads="shared", causal=True)

    @property
    def joined(self) -> Pattern:
        """The cheapest dilated pattern with a window that joins all tokens in `LAYERS` layers; `seq_len` must be known."""
        assert self.seq_len is not None, "the text decides the length before anything is planned"
        return Dilated.for_length(self.seq_len, layers=LAYERS, num_heads=self.heads)

    @property
    def input_bytes(self) -> int:
        """Size of q, k and v together; `seq_len` must be known."""
        assert self.seq_len is not None, "the text decides the length before anything is sized"
        return 3 * self.seq_len * self.heads * self.head_dim * _BYTES[self.dtype]

    def to_json(self) -> str:
        """For the worker's command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Options":
        """The inverse of `to_json`."""
        fields = json.loads(text)
        fields["segments"], fields["rates"] = tuple(fields["segments"]), tuple(fields["rates"])
        return cls(**fields)


class _OneLineParser(argparse.ArgumentParser):
    """argparse, except that a mistake is one line and not the usage text as well."""

    def error(self, message: str) -> NoReturn:
        raise RefusalError(f"{message} (python -m demo --help lists the options)")


def parse(argv: Sequence[str] | None) -> Options:
    """Read the command line.

    Raises:
        RefusalError: an unknown option or a value out of range; one line that names it.
    """
    parser = _parser()
    given = parser.parse_args(argv)
    options = Options(
        file=given.file,
        seq_len=given.seq_len,
        device=given.device,
        dtype=given.dtype,
        segments=tuple(n for part in given.segments for n in part),
        rates=tuple(n for part in given.rates for n in part),
        heads=given.heads,
        head_dim=given.head_dim,
        seed=given.seed,
        png=given.png,
    )
    _check(options)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog="python -m demo",
        description="Causal dilated attention, forward and backward, on a real text, beside a gather-and-scatter "
        "baseline and dense attention.",
        allow_abbrev=False,
    )
    shown = "(default: %(default)s)"
    parser.add_argument("--file", metavar="PATH", help="text to read (default: the Python standard library's sources)")
    parser.add_argument(
        "--seq-len",
        type=_length,
        default=32768,
        metavar="N",
        help=f"tokens, one byte of text each, or auto: the whole text, up to 32768 {shown}",
    )
    parser.add_argument("--device", default="cpu", help=f"cpu, cuda or cuda:INDEX {shown}")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help=f"of q, k and v {shown}")
    parser.add_argument(
        "--segments",
        type=_positives,
        nargs="+",
        default=[[2048, 4096, 8192]],
        metavar="S",
        help="segment lengths (default: 2048 4096 8192)",
    )
    parser.add_argument(
        "--rates", type=_positives, nargs="+", default=[[1, 2, 4]], metavar="R", help="dilation rates (default: 1 2 4)"
    )
    parser.add_argument("--heads", type=_positive, default=8, metavar="H", help=f"attention heads {shown}")
    parser.add_argument("--head-dim", type=_positive, default=64, metavar="D", help=f"width of a head {shown}")
    parser.add_argument("--seed", type=_seed, default=0, help=f"of the embedding and the projections {shown}")
    parser.add_argument("--png", default="who_sees_whom.png", metavar="PATH", help=f"picture to write {shown}")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _positives(text: str) -> list[int]:
    # 2048,4096 and 2048 4096 are both natural to type.
    return [_positive(part) for part in text.split(",")]


def _length(text: str) -> int | None:
    return None if text == "auto" else _positive(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2**63 - 1, got {text!r}")
    return int(text)


def _check(options: Options) -> None:
    if len(options.segments) != len(options.rates):
        raise RefusalError(
            f"--rates must have as many numbers as --segments, got {len(options.rates)} and {len(options.segments)}"
        )
    kind, _, index = options.device.partition(":")
    if kind not in ("cpu", "cuda") or not (index == "" or index.isdecimal()) or options.device.endswith(":"):
        raise RefusalError(f"--device must be cpu, cuda or cuda:INDEX, got {options.device!r}")
    for module in ("matplotlib", "rich"):
        if importlib.util.find_spec(module) is None:
            raise RefusalError(f"{module} is not installed; ./run demo installs what the demo needs")
    _check_png(Path(options.png))


def _check_png(path: Path) -> None:
    if path.is_dir():
        raise RefusalError(f"--png must name a file, got the directory {path}")
    if path.suffix.lower() != ".png":
        raise RefusalError(f"--png must end in .png, got {str(path)!r}")
    if not path.parent.is_dir():
        raise RefusalError(f"--png needs an existing directory, got {path.parent}")
