"""`use_pattern`: a pattern for a model of transformers, proven by one small call."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch

from longattn.attention.integrations import transformers_saved as saved
from longattn.attention.integrations.huggingface import register_with_transformers
from longattn.attention.integrations.transformers_bias import declare_bias, withdraw_bias
from longattn.attention.validate import check_pattern_argument
from longattn.patterncache import Full, Pattern, parse_pattern
from longattn.patterncache.spans import shortened

Assignment = Pattern | Mapping[int | str, Pattern]


def use_pattern(
    model: Any, pattern: Assignment | None = None, *, inputs: Mapping[str, Any] | None = None
) -> tuple[str, ...]:
    """Give a model of transformers a pattern, and prove by one small call that its layers compute it.

    The pattern is kept in the model's configuration: `save_pretrained` saves it, and a checkpoint loads with it where
    `register_with_transformers()` was called before, and not at all where it was not. Patterns for each layer need one
    `use_pattern(model)` after loading.

    Args:
        model: a PreTrainedModel.
        pattern: of all its attention layers; or by layer, where a key is the number of a layer (in every stack) or a shell pattern
            of module names (`"decoder.*self_attn"`), and other layers are dense. Causality is the model's to say. Default None: what
            the configuration says.
        inputs: keywords of the call. Default: a few tokens, an image or sounds of silence, from the configuration.

    Returns:
        The names of the layers that have the pattern.

    Raises:
        TypeError: not such arguments.
        ValueError: a layer attends in its own way, or does not call its attention function; or the call cannot be made. The model is then
            left as it was.

    Example:
        >>> use_pattern(model, Dilated((512, 2048), (1, 4)))
        ('model.layers.0.self_attn', 'model.layers.1.self_attn')
    """
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "set_attn_implementation"):
        raise TypeError(f"model must be a PreTrainedModel of transformers, got {type(model).__name__}")
    entry = _config_entry(model, pattern)
    layers, foreign = attention_layers(model)
    by_layer = _patterns_by_layer(entry, layers | foreign)
    foreign_names = [name for name in by_layer if name in foreign]
    if foreign_names or not layers:
        names = "none of its layers"
        if foreign_names:
            names = f"layers {', '.join(foreign_names[:3])} ({type(foreign[foreign_names[0]]).__name__})"
        raise ValueError(
            f"model must hand attention to a registered function, got {type(model).__name__}, where {names} "
            f"{'do not' if foreign_names else 'does'}; a pattern by layer may leave layers out"
        )
    register_with_transformers({})
    config_state, layer_patterns = _config_state(model), {name: saved.of_layer(layer) for name, layer in layers.items()}
    declared = {name for name, layer in layers.items() if "compute_bias" in vars(layer)}
    try:
        saved.assign(model.config, entry)
        _set_implementation(model)
        for name, layer in layers.items():
            saved.set_layer(layer, by_layer.get(name, Full().canonical()))
            declare_bias(layer)
        with saved.calls() as called:
            _probe(model, inputs)
        silent = [name for name in layers if id(layers[name]) not in called]
        if silent:
            raise ValueError(
                f"inputs must reach every attention layer, got a call where {', '.join(silent[:3])} "
                f"({len(silent)} of {len(layers)}) did not call its attention function"
            )
    except BaseException:
        _restore_configs(config_state)
        for name, layer in layers.items():
            saved.set_layer(layer, layer_patterns[name])
            if name not in declared:
                withdraw_bias(layer)
        raise
    return tuple(name for name in layers if name in by_layer)


def attention_layers(model: torch.nn.Module) -> tuple[dict[str, torch.nn.Module], dict[str, torch.nn.Module]]:
    """(layers that call a registered attention function, layers that attend in their own way), by name."""
    modules: list[tuple[str, torch.nn.Module]] = list(cast(Any, model).named_modules())
    ours = {name: module for name, module in modules if _calls_interface(module)}
    parents = {name[:at] for name in ours for at, letter in enumerate(name) if letter == "."} | {""}
    foreign: dict[str, torch.nn.Module] = {}
    for name, module in modules:
        within = any(name.startswith(f"{outer}.") for outer in [*ours, *foreign])
        if "Attention" in type(module).__name__ and name not in ours and name not in parents and not within:
            foreign[name] = module
    return ours, foreign


def _calls_interface(module: torch.nn.Module) -> bool:
    """Whether a method of the module's class or of a parent asks for the registered function."""
    methods = (
        inspect.unwrap(value) for base in type(module).__mro__ for value in vars(base).values() if callable(value)
    )
    codes = (getattr(method, "__code__", None) for method in methods)
    return any(code is not None and {"ALL_ATTENTION_FUNCTIONS", "get_interface"} <= {*code.co_names} for code in codes)


def _config_entry(model: Any, pattern: Assignment | None) -> str | dict[str, str]:
    """The entry of the configuration: one canonical string, or one by layer."""
    if pattern is None:
        entry = getattr(model.config, saved.FIELD, None)
        if entry is None:
            raise ValueError(f"pattern must be given where the configuration has no {saved.FIELD}, got None")
        return entry
    if isinstance(pattern, Mapping):
        for key, value in pattern.items():
            if isinstance(key, bool) or not isinstance(cast(object, key), (int, str)):
                raise TypeError(
                    f"pattern must have layer numbers or names as keys, got {shortened(key)} ({type(key).__name__})"
                )
            check_pattern_argument(value)
        return {str(key): value.canonical() for key, value in pattern.items()}
    check_pattern_argument(pattern)
    return pattern.canonical()


def _patterns_by_layer(entry: str | dict[str, str], layers: Mapping[str, Any]) -> dict[str, str]:
    """The canonical string of each layer that the entry names."""
    if isinstance(entry, str):
        parse_pattern(entry)
        return dict.fromkeys(layers, entry)
    by_layer: dict[str, str] = {}
    for text, canonical in entry.items():
        key = int(text) if text.lstrip("-").isdigit() else text
        members = [name for name in layers if saved.matches(key, name)]
        if not members:
            raise ValueError(
                f"pattern must have keys that are layers, such as {next(iter(layers), None)!r}, got {shortened(key)}"
            )
        for name in members:
            if by_layer.setdefault(name, canonical) != canonical:
                raise ValueError(f"pattern must name a layer once, got {shortened(name)} under two patterns")
    return by_layer


def _configs(config: Any) -> list[Any]:
    """A configuration and those within it."""
    children = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return [config, *(inner for child in children if child is not None for inner in _configs(child))]


def _config_state(model: Any) -> list[tuple[Any, dict[str, Any]]]:
    """Every configuration of the model, with the values that `use_pattern` changes."""
    configs = {id(c): c for m in model.modules() if hasattr(m, "config") for c in _configs(m.config)}
    names = ("_attn_implementation_internal", "attn_implementation", saved.FIELD)
    return [(c, {name: c.__dict__[name] for name in names if name in c.__dict__}) for c in configs.values()]


def _restore_configs(states: list[tuple[Any, dict[str, Any]]]) -> None:
    for config, values in states:
        for name in ("_attn_implementation_internal", "attn_implementation", saved.FIELD):
            config.__dict__.pop(name, None)
        config.__dict__.update(values)


def _set_implementation(model: Any) -> None:
    """Set the name in every configuration that a layer reads."""
    model.set_attn_implementation(saved.IMPLEMENTATION)
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation_internal"):
            if getattr(config, saved.FIELD, None) != getattr(model.config, saved.FIELD):
                saved.assign(config, getattr(model.config, saved.FIELD))
            config._attn_implementation_internal = saved.IMPLEMENTATION


def _probe(model: Any, inputs: Mapping[str, Any] | None) -> None:
    """Call the model once, without gradients or dropout; modes and random state are restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), cast(Any, torch.random).fork_rng(devices=[]):
            model(**(small_inputs(model) if inputs is None else dict(inputs)))
    finally:
        for module, mode in modes:
            module.training = mode


def small_inputs(model: Any) -> dict[str, Any]:
    """Keywords for one small call of a model, from its main input and its configuration.

    Raises:
        ValueError: its main input is not tokens, an image or a spectrogram.
    """
    config, name = model.config, model.main_input_name
    parameter = next(model.parameters())
    text_config = config.get_text_config()
    if name == "input_ids":
        ids = torch.ones(1, 8, dtype=torch.int64, device=parameter.device)
        inputs: dict[str, Any] = {"input_ids": ids % max(2, getattr(text_config, "vocab_size", 2))}
    elif name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", None)
        sides = (size, size) if isinstance(size, int) else tuple(size or ())
        if len(sides) != 2:
            raise ValueError(
                f"inputs must be given for {type(model).__name__}, whose configuration has no image_size, got None"
            )
        shape = (1, getattr(vision, "num_channels", 3), *sides)
        inputs = {name: torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)}
    elif name == "input_features" and hasattr(config, "num_mel_bins"):
        frames = 2 * getattr(config, "max_source_positions", 32)
        inputs = {name: torch.zeros(1, config.num_mel_bins, frames, dtype=parameter.dtype, device=parameter.device)}
    elif name == "input_values" and hasattr(config, "conv_stride"):
        inputs = {name: torch.zeros(1, 4000, dtype=parameter.dtype, device=parameter.device)}
    else:
        raise ValueError(f"inputs must be given for {type(model).__name__}, whose main input is {name!r}, got None")
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.ones(1, 8, dtype=torch.int64, device=parameter.device)
    return inputs
