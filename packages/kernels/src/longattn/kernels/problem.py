"""`AttentionProblem`: a call without its data, as rows of the dispatch table judge it."""

# torch's own types are partial.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class AttentionProblem:
    """Everything a row may refuse, hashable, so that a choice is remembered.

    Attributes:
        device: device type, such as "cpu" or "cuda".
        dtype: of q, k, v.
        heads, kv_heads, head_dim: of q; of k and v; of q and k.
        value_head_dim: of v; None: that of q and k.
        listed: the plan names rows by lists, not by strides alone.
        attention_mask, bias, key_padding, dropout: whether given; a floating attention_mask is a bias.
        bias_grad: whether the bias needs a gradient.
        softcap: whether scores are capped. by_distance: whether score terms add something for each distance, and by_distance_grad: with gradient.
        prior: whether a state is merged in.
        backward: whether gradients will be wanted.
        decode: one query row for each head, over the slots of a cache in any order, rather than a plan's rows.
        deterministic: whether equal inputs must give equal bits.
        architecture: of the device, such as "sm_90" or "gfx942"; "" where it has no name or none was given.
    """

    device: str
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    listed: bool = False
    attention_mask: bool = False
    bias: bool = False
    bias_grad: bool = False
    softcap: bool = False
    by_distance: bool = False
    by_distance_grad: bool = False
    key_padding: bool = False
    dropout: bool = False
    prior: bool = False
    backward: bool = False
    decode: bool = False
    deterministic: bool = False
    architecture: str = ""
    value_head_dim: int | None = None

    @property
    def value_width(self) -> int:
        """The head_dim of v."""
        return self.head_dim if self.value_head_dim is None else self.value_head_dim

    def __str__(self) -> str:
        features = [f.name for f in fields(self) if getattr(self, f.name) is True]
        where = f"{self.device} {self.architecture}".rstrip()
        heads = f"heads={self.heads} kv_heads={self.kv_heads} head_dim={self.head_dim}"
        if self.value_width != self.head_dim:
            heads += f" value_head_dim={self.value_width}"
        return " ".join([f"device={where} dtype={str(self.dtype).removeprefix('torch.')} {heads}", *features])


@lru_cache
def architecture_of(device: torch.device) -> str:
    """The architecture of a device that is here: "sm_90" for CUDA, "gfx942" for ROCm, "" elsewhere."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return ""
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"
