"""`longattn info`: what is installed, what this machine has, and what to install and why."""

from __future__ import annotations

import platform
from argparse import Namespace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from longattn.attention.cli.report import NO_PICTURES, Report, Table
from longattn.kernels import installation

PACKAGES = ("longattn-bufmgr", "longattn-patterncache", "longattn-kernels", "longattn-attention", "torch", "numpy")
EXTRAS = ("triton", "matplotlib", "rich", "transformers")


def run(options: Namespace) -> Report:
    """Versions, processor, native level, GPUs, folders, and advice."""
    found = installation()
    versions = {name: _version(name) for name in (*PACKAGES, *EXTRAS)}
    versions["triton"] = found["triton"]["version"]
    advice = _advice(found, versions)
    native, triton = found["native"], found["triton"]
    rows = [
        ("Python", platform.python_version()),
        *((name, number or "not installed") for name, number in versions.items()),
        ("processor", found["processor"]),
        ("threads", f"{found['threads']} (torch)"),
        (
            "native level",
            f"{native['level']}, {native['chosen_by']}" + (f"; {native['remark']}" if native["remark"] else ""),
        ),
        ("native library", native["refusal"] or native["library"] or "not built yet: the first call builds it"),
        ("compiler", native["compiler"] or "none"),
        ("Triton rows", triton["refusal"] or "can serve"),
        ("GPUs", ", ".join(f"{device['name']} ({device['architecture']})" for device in found["devices"]) or "none"),
        ("cache folder", found["cache_folder_refusal"] or found["cache_folder"]),
        ("choice of a row", found["choice"]),
        ("settings", ", ".join(f"{name}={value}" for name, value in found["settings"].items()) or "none"),
    ]
    parts: list[Table | str] = [Table("", ("what", "here"), rows)]
    parts += [f"to do: {sentence}" for sentence in advice] or ["nothing is missing"]
    return Report({"python": platform.python_version(), "versions": versions, **found, "advice": advice}, parts)


def _advice(found: dict[str, Any], versions: dict[str, str | None]) -> list[str]:
    """A sentence for each thing that would make something faster or possible."""
    native = found["native"]
    advice: list[str] = []
    if native["refusal"] is not None:
        advice.append(f"the native CPU row cannot be had ({native['refusal']}); slower rows in plain torch serve")
    elif native["library"] is None:
        advice.append(
            "`python -m longattn.kernels build` compiles the native CPU row now, rather than in the first call"
        )
    if torch.cuda.is_available() and found["triton"]["refusal"] is not None:
        advice.append(f"GPU kernels cannot serve ({found['triton']['refusal']})")
    if versions["matplotlib"] is None:
        advice.append(NO_PICTURES)
    if versions["rich"] is None:
        advice.append("tables in colour need rich: pip install rich")
    return advice


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
