"""The command's arguments: argparse and nothing that takes long to import."""

from __future__ import annotations

import argparse
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

PATTERN_FORMS = """\
patterns:
  full                          every token sees every token before it
  window:SIZE[:SINKS]           the last SIZE tokens, and the first SINKS
  dilated:SEGMENTS:RATES        as in LongNet, such as dilated:2048,4096,8192:1,2,4
  for-length[:LAYERS]           the cheapest dilated pattern with a window that joins all tokens in LAYERS layers (default 12)
  '["name",{...}]'              any pattern, by its canonical string
  Patterns are causal; --bidirectional lets tokens see later ones too.
"""

DTYPES = ("float32", "bfloat16", "float16", "float64")
SHELLS = ("bash", "zsh", "tcsh")


def _refusal(expected: str, text: str) -> argparse.ArgumentTypeError:
    """What an argument must be and what came, cut where it is long."""
    from longattn.patterncache.spans import shortened  # numpy comes with it, which no help needs

    return argparse.ArgumentTypeError(f"{expected}, got {shortened(text)}")


def _new_file(text: str) -> str:
    """A file that can be written later: said before anything is computed for it."""
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise _refusal("must be a file in a folder that exists", text)
    return text


class _PrintCompletion(argparse.Action):
    """Print the shell's completion script, made by shtab, and stop."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        if find_spec("shtab") is None:
            parser.exit(2, "longattn: completion needs shtab: pip install shtab\n")
        print(import_module("shtab").complete(parser, shell=values))
        parser.exit()


class _PrintVersion(argparse.Action):
    """Look the version up only when it is asked for."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        print(f"longattn-attention {import_module('importlib.metadata').version('longattn-attention')}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The parser of `longattn` and its subcommands; `command` names the one that was given."""
    parser = argparse.ArgumentParser(
        prog="longattn",
        description="Long-context attention for PyTorch: what is installed, which backend serves a call, what a pattern sees, what it costs.",
        epilog="`longattn COMMAND --help` says what a command takes.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_PrintVersion, nargs=0, help="print the version")
    parser.add_argument(
        "--print-completion", action=_PrintCompletion, choices=SHELLS, help="print a completion script for this shell"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, summary: str, *, pattern: bool = False) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=PATTERN_FORMS if pattern else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        added.add_argument("--json", action="store_true", help="print JSON")
        added.add_argument("--traceback", action="store_true", help="show where an error was raised")
        if pattern:
            added.add_argument(
                "--pattern", default="for-length", metavar="PATTERN", help="who sees whom (default: %(default)s)"
            )
            added.add_argument("--bidirectional", action="store_true", help="let tokens see later ones")
            added.add_argument(
                "--length", type=positive, default=32768, metavar="N", help="tokens (default: %(default)s)"
            )
            added.add_argument(
                "--heads", type=positive, default=8, metavar="N", help="query heads (default: %(default)s)"
            )
        return added

    command("info", "print versions, processor, compiler, native level, cache folders and GPUs, and what to install")

    explain = command("explain", "say which backend serves a call, and why not the others", pattern=True)
    _add_call(explain)
    explain.add_argument(
        "--keys", type=positive, metavar="N", help="key tokens, where they are not as many as the queries"
    )
    explain.add_argument(
        "--device", default="cpu", help="device type, here or not, such as cuda (default: %(default)s)"
    )
    explain.add_argument("--architecture", metavar="NAME", help="of that device, such as sm_90 or gfx942")
    explain.add_argument(
        "--machine", metavar="NAME", help="whose memory levels --verbose counts bytes for, such as H100"
    )
    for flag, what in {
        "mask": "an attention mask",
        "bias": "an additive bias",
        "padding": "a key padding mask",
        "dropout": "dropout",
        "deterministic": "deterministic results",
    }.items():
        explain.add_argument(f"--{flag}", action="store_true", help=f"the call has {what}")
    explain.add_argument("--backend", metavar="NAME", help="the only backend that may serve")
    explain.add_argument("--verbose", action="store_true", help="also count FLOP and bytes into each level of memory")

    show = command("show", "draw a pattern, and say who sees whom, what layers join, and what it costs", pattern=True)
    show.add_argument("--head", type=whole, default=0, metavar="N", help="whose map (default: %(default)s)")
    show.add_argument(
        "--head-dim", type=positive, default=64, metavar="N", help="elements of a head, for FLOP and bytes"
    )
    show.add_argument("--dtype", choices=DTYPES, default="float32", help="for bytes (default: %(default)s)")
    show.add_argument(
        "--layers", type=positive, metavar="N", help="also say what tokens have heard of after so many layers"
    )
    show.add_argument("--png", type=_new_file, metavar="FILE", help="also draw a picture (needs matplotlib)")

    plan = command("plan", "estimate memory and time of a model, before renting hardware", pattern=True)
    for name, default, what in (
        ("layers", 12, "layers"),
        ("head-dim", 64, "elements of a head"),
        ("vocabulary", 32000, "tokens of the vocabulary"),
        ("batch", 1, "sequences"),
        ("ring", 1, "devices that share a sequence"),
    ):
        plan.add_argument(
            f"--{name}", type=positive, default=default, metavar="N", help=f"{what} (default: %(default)s)"
        )
    plan.add_argument("--kv-heads", type=positive, metavar="N", help="key and value heads (default: as query heads)")
    plan.add_argument(
        "--mlp-ratio", type=fraction, default=4.0, metavar="X", help="width of the feed-forward over the model's"
    )
    plan.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="of weights and activations (default: %(default)s)"
    )
    plan.add_argument("--train", action="store_true", help="training with Adam; else one forward of the whole sequence")
    plan.add_argument("--recompute", action="store_true", help="training keeps each layer's input only")
    plan.add_argument(
        "--machine", default="H100", metavar="NAME", help="the device (default: %(default)s; a wrong name lists them)"
    )
    plan.add_argument(
        "--efficiency",
        type=share,
        default=0.4,
        metavar="X",
        help="share of its peak that is reached: an assumption (default: %(default)s)",
    )
    plan.add_argument(
        "--link",
        type=fraction,
        default=50.0,
        metavar="GB/S",
        help="that each device receives (default: %(default)s)",
    )
    plan.add_argument(
        "--engine",
        default="ring zigzag",
        metavar="NAME",
        help="how devices share a sequence: ring contiguous, ring zigzag, ring striped, all_gather, ulysses (default: %(default)s)",
    )

    bench = command("bench", "time a call beside chosen peers, interleaved in this process", pattern=True)
    _add_call(bench)
    bench.set_defaults(length=4096)
    bench.add_argument(
        "--peers",
        default="sdpa",
        metavar="NAMES",
        help="of sdpa, sdpa-mask, flex; comma between (default: %(default)s)",
    )
    bench.add_argument(
        "--rounds",
        type=positive,
        default=5,
        metavar="N",
        help="interleaved rounds, one more warms up (default: %(default)s)",
    )
    bench.add_argument("--threads", type=positive, metavar="N", help="torch's threads (default: torch's own)")
    bench.add_argument("--csv", type=_new_file, metavar="FILE", help="also write the rows")
    bench.add_argument("--png", type=_new_file, metavar="FILE", help="also draw them (needs matplotlib)")

    demo = command(
        "demo",
        "show the main job in a few seconds: one pattern, its cost and its error beside dense attention",
        pattern=True,
    )
    demo.set_defaults(length=8192)

    memory = command("memory", "run a Python script and print what its buffers and cached patterns held")
    memory.add_argument("script", help="path of the script")
    arguments = memory.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    arguments.required = False  # argparse would name them beside a script that is missing
    return parser


def _add_call(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="sequences (default: %(default)s)")
    parser.add_argument("--kv-heads", type=positive, metavar="N", help="key and value heads (default: as query heads)")
    parser.add_argument(
        "--head-dim", type=positive, default=64, metavar="N", help="elements of a head (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of q, k and v (default: %(default)s)")
    parser.add_argument("--backward", action="store_true", help="gradients are wanted too")


def positive(text: str) -> int:
    """An integer of at least 1."""
    return _integer(text, 1)


def whole(text: str) -> int:
    """An integer of at least 0."""
    return _integer(text, 0)


def _integer(text: str, least: int) -> int:
    if not text.strip().isdecimal() or int(text) < least:
        raise _refusal(f"must be an integer >= {least}", text)
    return int(text)


def fraction(text: str) -> float:
    """A finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise _refusal("must be a number above 0", text)
    return number


def share(text: str) -> float:
    """A number above 0 and at most 1."""
    number = fraction(text)
    if number > 1:
        raise _refusal("must be above 0 and at most 1", text)
    return number
