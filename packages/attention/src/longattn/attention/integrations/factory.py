"""Attention by name: `create_attention` for our own calls, `register_attention` and `build_attention` as xFormers' factory has them.

The convention on padding decides between the two: a module of `create_attention` takes ours, True = padding; one of `build_attention`
takes xFormers', True = keep, and xFormers' name `att_mask`. It is the same class with one hook on its calls.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from longattn.attention.integrations import attention_config as configs
from longattn.attention.integrations.catalog import MULTIHEAD_PRESETS, TABLE
from longattn.attention.validate import check_type
from longattn.patterncache.spans import shortened

T = TypeVar("T", bound=type[nn.Module])


@dataclass(frozen=True)
class Registered:
    """A kind of attention: its class and its config's, or where to import them from when they are asked for.

    Attributes:
        source: (module, class, config class), or the two classes.
    """

    source: tuple[str, str, str] | tuple[type[nn.Module], type[Any]]

    def load(self) -> tuple[type[nn.Module], type[Any]]:
        """(class, config class)."""
        if len(self.source) == 2:
            return self.source
        module, constructor, config = self.source
        return getattr(import_module(module), constructor), getattr(import_module(module), config)


def registered_name(constructor: type | str) -> str:
    """The name of a class of ours: "ring_dilated_v2" for RingDilatedAttentionV2, "ring_buffer" for RingBufferAttention."""
    name = constructor if isinstance(constructor, str) else constructor.__name__
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.replace("Attention", "")).lower()


_REGISTRY: dict[str, Registered] = {
    **{registered_name(row.single): Registered((row.single, row.config)) for row in TABLE},
    **{registered_name(name): Registered((cls, configs.MultiheadConfig)) for name, cls in MULTIHEAD_PRESETS.items()},
    "ring_buffer": Registered(("longattn.attention", "RingBufferAttention", "RingBufferConfig")),
}


def registered_attentions() -> tuple[str, ...]:
    """The names that `build_attention` and `create_attention` know."""
    return tuple(_REGISTRY)


def register_attention(name: str, config: type = configs.AttentionConfig) -> Callable[[T], T]:
    """A decorator that registers an nn.Module under a name, as xFormers' does.

    Args:
        name: not taken yet, unless by the same class.
        config: dataclass of its arguments. Default AttentionConfig: `dropout` alone.

    Raises:
        TypeError: no string, no dataclass, or (from the decorator) no nn.Module.
        ValueError: the name is taken.

    Example:
        >>> @register_attention("mine", MyConfig)
        ... class MyAttention(nn.Module): ...
        >>> build_attention({"name": "mine", "dropout": 0.1})
    """
    check_type("name", name, str, "a string")
    if not is_dataclass(check_type("config", config, type, "a dataclass")):
        raise TypeError(f"config must be a dataclass, got {shortened(config)} ({type(config).__name__})")

    def register(constructor: T) -> T:
        if not issubclass(check_type("constructor", constructor, type, "an nn.Module"), nn.Module):
            raise TypeError(f"constructor must be an nn.Module, got {shortened(constructor)}")
        if name in _REGISTRY and _REGISTRY[name].load()[0] is not constructor:
            raise ValueError(
                f"name must not be taken, got {shortened(name)} ({_REGISTRY[name].load()[0].__qualname__})"
            )
        _REGISTRY[name] = Registered((constructor, config))
        return constructor

    return register


def find_attention(name: object) -> tuple[type[nn.Module], type[Any]]:
    """(class, config class) of a registered name, or of a class's own name such as "DilatedAttention".

    Raises:
        TypeError: no string. ValueError: not registered.
    """
    name = check_type("name", name, str, "a string")
    registered = _REGISTRY.get(name) or _REGISTRY.get(registered_name(name))
    if registered is None:
        raise ValueError(f"name must be one of {', '.join(_REGISTRY)}, got {shortened(name)}")
    return registered.load()


def create_attention(name: str, **options: Any) -> nn.Module:
    """The attention of that name, with our own conventions.

    Args:
        name: a class's name, "RingDilatedAttentionV3", or its registered one, "ring_dilated_v3".
        options: of its constructor; for a class that takes a config, the config's fields.

    Raises:
        TypeError, ValueError: an unknown name, or a bad option, by name.
    """
    constructor, config = find_attention(name)
    if issubclass(config, configs.AttentionConfig):
        return constructor(**options)
    return _construct(constructor, configs.config_from(config, _named(config, name, options)))


def build_attention(config: Mapping[str, Any] | Any) -> nn.Module:
    """The attention that a config describes, with xFormers' conventions: key_padding_mask True = keep, masks by `att_mask`.

    Args:
        config: of a registered class, or a mapping with its `name` and its fields.

    Raises:
        TypeError, ValueError: no config, an unknown name, or a bad field, by name.
    """
    module = _construct(*_resolve_config(config))
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    mask_name = "attention_mask" if "att_mask" not in names else "att_mask"
    padding_index = names.index("key_padding_mask") if "key_padding_mask" in names else None
    module.register_forward_pre_hook(
        functools.partial(_translate_masks, padding_index=padding_index, mask_name=mask_name), with_kwargs=True
    )
    return module


def _construct(constructor: type[nn.Module], config: Any) -> nn.Module:
    """By its own `from_config`, by arguments where the config is one of ours, else from the config itself."""
    from_config = getattr(constructor, "from_config", None)
    if from_config is not None:
        return from_config(config)
    if isinstance(config, configs.AttentionConfig):
        return constructor(**configs.arguments_of(config))
    return constructor(config)


def _resolve_config(config: Any) -> tuple[type[nn.Module], Any]:
    """(class, config) of a config or of a mapping that names one."""
    if isinstance(config, Mapping):
        entries = cast("Mapping[str, Any]", config)
        constructor, kind = find_attention(entries.get("name"))
        return constructor, configs.config_from(kind, _named(kind, entries["name"], entries))
    name = getattr(config, "name", None)
    if name is None and is_dataclass(config):
        name = next((n for n in _REGISTRY if _REGISTRY[n].load()[1] is type(config)), None)
    if name is None:
        raise TypeError(
            f"config must be a mapping with a name, or a registered config, got {shortened(config)} ({type(config).__name__})"
        )
    return find_attention(name)[0], config


def _named(config: type, name: str, entries: Mapping[str, Any]) -> dict[str, Any]:
    """The entries with the name, for a config that has such a field, else without it."""
    without_name = {key: value for key, value in entries.items() if key != "name"}
    return {"name": name, **without_name} if "name" in {f.name for f in fields(config)} else without_name


def _translate_masks(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, padding_index: int | None, mask_name: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Hook before a call: inverts key_padding_mask (xFormers: True = keep) and passes att_mask under the module's name for it."""
    if padding_index is not None and padding_index < len(args):
        args = (*args[:padding_index], _inverted(args[padding_index]), *args[padding_index + 1 :])
    keywords = {(mask_name if name == "att_mask" else name): value for name, value in kwargs.items()}
    if "key_padding_mask" in keywords:
        keywords["key_padding_mask"] = _inverted(keywords["key_padding_mask"])
    return args, keywords


def _inverted(mask: Any) -> Any:
    return mask.logical_not() if isinstance(mask, Tensor) else mask
