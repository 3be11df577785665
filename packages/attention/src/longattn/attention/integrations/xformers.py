"""Into the registry of an xFormers old enough to have one (`xformers.components.attention`, gone in its later releases)."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import nn

from longattn.attention.integrations.factory import build_attention, find_attention, registered_attentions

_HOME = "xformers.components.attention"


def register_with_xformers() -> tuple[str, ...]:
    """Register our attentions there, so that xFormers' own `build_attention` builds them, with its convention on padding.

    Returns:
        The names now known to it; none where xFormers is not installed, or has no such registry. A name that it has already, of its
        own or from an earlier call, is left as it is.
    """
    try:
        registry: Any = import_module(_HOME)
    except ModuleNotFoundError as error:
        # A broken xFormers is none of our business, but not to be mistaken for a missing one.
        if error.name is None or not _HOME.startswith(error.name):
            raise
        return ()
    registered: list[str] = []
    for name in registered_attentions():
        if name not in registry.ATTENTION_REGISTRY:
            registry.register_attention(name, find_attention(name)[1])(_constructor(name, registry.Attention))
            registered.append(name)
    return tuple(registered)


def _constructor(name: str, base: type[nn.Module]) -> type[nn.Module]:
    """What xFormers asks for: a class below its own, with `from_config`. It builds ours and has no instances of its own."""

    def from_config(_: type, config: Any) -> nn.Module:
        return build_attention(config)

    title = "".join(part.title() for part in name.split("_"))
    return type(f"Longattn{title}Attention", (base,), {"from_config": classmethod(from_config), "__module__": __name__})
