"""`Capability`: what a row of the dispatch table declares. Choice, error text, docs and the test grid are read from it."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch

import torch

from longattn.kernels.problem import AttentionProblem

FLOAT32_WITHIN = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (2e-5, 2e-5),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1.6e-2, 1.6e-2),
}
"""`Capability.tolerance` of rows that compute in float32 (float64 for float64) and round inputs and results alone."""

ROUNDED_WITHIN = FLOAT32_WITHIN | {torch.float16: (4e-3, 4e-3), torch.bfloat16: (3e-2, 3e-2)}
"""The same of rows that also round softmax weights to the dtype of q, before their product with v."""


def dtype_name(dtype: torch.dtype) -> str:
    """The name without its module: float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class Capability:
    """What a row can compute, and how near to the oracle.

    Attributes:
        devices: device types; empty is any.
        dtypes: element types per device type; the key "" is every other device.
        max_head_dim: largest head_dim of q and k, and of v; None is any.
        listed, attention_mask, bias, bias_grad, key_padding, dropout, gqa, backward: whether supported.
        softcap, by_distance, by_distance_grad: whether score terms are: a Softcap; an Alibi or RelativeBias; the gradient of what those hold.
        decode: whether it serves decode steps, over the slots of a cache in any order.
        deterministic: device types on which equal inputs give equal bits; empty is any.
        architectures: patterns of the architectures that can run it, such as "sm_9?"; empty is any. Asked only where one is named.
        skips_padding: never reads padded rows of k and v, so that it is handed them as they are; others get copies with zeros there.
        tolerance: dtype -> (absolute, relative) error of outputs against the oracle on unit normal inputs; gradients get 4x.
    """

    devices: tuple[str, ...]
    dtypes: dict[str, tuple[torch.dtype, ...]]
    tolerance: dict[torch.dtype, tuple[float, float]]
    max_head_dim: int | None = None
    listed: bool = True
    attention_mask: bool = True
    bias: bool = True
    bias_grad: bool = False
    softcap: bool = False
    by_distance: bool = False
    by_distance_grad: bool = False
    dropout: bool = False
    key_padding: bool = True
    gqa: bool = True
    backward: bool = True
    decode: bool = False
    deterministic: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    skips_padding: bool = False

    def dtypes_on(self, device: str) -> tuple[torch.dtype, ...]:
        """Element types on a device type."""
        return self.dtypes.get(device, self.dtypes.get("", ()))

    def reasons(self, problem: AttentionProblem) -> list[str]:
        """Why this row cannot serve the problem, a sentence each; empty when it can."""
        sentences: list[str] = []
        if self.devices and problem.device not in self.devices:
            sentences.append(f"device={problem.device} is not in {{{', '.join(self.devices)}}}")
        elif problem.dtype not in self.dtypes_on(problem.device):
            names = ", ".join(dtype_name(d) for d in self.dtypes_on(problem.device))
            sentences.append(f"dtype={dtype_name(problem.dtype)} is not in {{{names}}} on {problem.device}")
        architecture = problem.architecture if self.architectures else ""
        if architecture and not any(fnmatch(architecture, pattern) for pattern in self.architectures):
            sentences.append(f"architecture={architecture} is not in {{{', '.join(self.architectures)}}}")
        widths = [("head_dim", problem.head_dim)]
        if problem.value_width != problem.head_dim:
            widths.append(("value_head_dim", problem.value_width))
        for name, width in widths:
            if self.max_head_dim is not None and width > self.max_head_dim:
                sentences.append(f"{name}={width} is over {self.max_head_dim}")
        if problem.kv_heads != problem.heads and not self.gqa:
            sentences.append(
                f"kv_heads={problem.kv_heads} differs from heads={problem.heads} and grouped kv heads are not supported"
            )
        for name, sentence in _FEATURES.items():
            if getattr(problem, name) and not getattr(self, name):
                sentences.append(sentence)
        if problem.deterministic and self.deterministic and problem.device not in self.deterministic:
            sentences.append(f"deterministic=True is not supported on {problem.device}")
        return sentences


_FEATURES = {
    "decode": "decode steps, over the slots of a cache in any order, are not supported",
    "listed": "the pattern's plan lists rows and only strided rows are supported",
    "attention_mask": "attention_mask is not supported",
    "bias": "a floating attention_mask (bias) is not supported",
    "bias_grad": "the gradient of a floating attention_mask (bias) is not supported",
    "softcap": "score_terms with a Softcap is not supported",
    "by_distance": "score_terms with an Alibi or RelativeBias is not supported",
    "by_distance_grad": "the gradient of an Alibi's slopes or a RelativeBias's table is not supported",
    "dropout": "dropout is not supported",
    "key_padding": "key_padding_mask is not supported",
    "backward": "gradients are not supported",
}
