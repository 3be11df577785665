"""xFormers' own factory builds ours: against a stand-in with the registry of xFormers 0.0.22, written from its behaviour."""

import sys
from abc import ABCMeta, abstractmethod
from collections import namedtuple
from dataclasses import dataclass, fields
from types import ModuleType

import pytest
import torch

from longattn.attention import DilatedAttention
from longattn.attention.integrations.factory import registered_attentions
from longattn.attention.integrations.xformers import register_with_xformers
from longattn.attention.testing import small_inputs

Registry = namedtuple("Registry", ("constructor", "config"))


def stand_in():
    """`xformers.components.attention`: a registry that takes subclasses of Attention, each class name once."""
    module = ModuleType("xformers.components.attention")

    @dataclass
    class AttentionConfig:
        name: str
        dropout: float

    class Attention(torch.nn.Module, metaclass=ABCMeta):
        @classmethod
        def from_config(cls, config):
            return cls(**{f.name: getattr(config, f.name) for f in fields(config)})

        @abstractmethod
        def forward(self, q, k, v, *args, **kwargs):
            raise NotImplementedError

    registry, class_names = {}, set()

    def register_attention(name, config=AttentionConfig):
        def register(cls):
            if name in registry:
                raise ValueError(f"Cannot register duplicate item ({name})")
            if not issubclass(cls, Attention):
                raise ValueError(f"Item ({name}: {cls.__name__}) must extend the base class: {Attention.__name__}")
            if cls.__name__ in class_names:
                raise ValueError(f"Cannot register item with duplicate class name ({cls.__name__})")
            registry[name] = Registry(cls, config)
            class_names.add(cls.__name__)
            return cls

        return register

    def build_attention(config):
        if not hasattr(config, "name"):
            kind = registry[config["name"]].config
            known = {f.name for f in fields(kind)}
            config = kind(**{key: value for key, value in config.items() if key in known})
        return registry[config.name].constructor.from_config(config)

    module.__dict__.update(
        ATTENTION_REGISTRY=registry, Attention=Attention, register_attention=register_attention, build=build_attention
    )
    return module


@pytest.fixture
def xformers(monkeypatch):
    """An old xFormers, as far as it matters."""
    found = stand_in()
    for name, module in (
        ("xformers", ModuleType("xformers")),
        ("xformers.components", ModuleType("xformers.components")),
        ("xformers.components.attention", found),
    ):
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    return found


def test_xformers_builds_ours(xformers):
    """With True = keep, from a mapping too; a second call adds nothing."""
    names = register_with_xformers()
    assert {"dilated", "ring_dilated_v3", "ring_buffer"} <= set(names) <= set(registered_attentions())
    assert register_with_xformers() == ()
    built = xformers.build({"name": "dilated", "dropout": 0.0, "segment_lengths": (8, 16), "dilation_rates": (1, 2)})
    x, padding = small_inputs("DilatedAttention"), torch.rand(1, 21) > 0.6
    expected = DilatedAttention((8, 16), (1, 2))(*x, key_padding_mask=padding)
    assert type(built) is DilatedAttention and torch.equal(built(*x, key_padding_mask=~padding), expected)


def test_a_name_of_its_own_stays(xformers):
    """Nothing is replaced."""
    theirs = xformers.register_attention("dilated")(type("Theirs", (xformers.Attention,), {}))
    assert "dilated" not in register_with_xformers()
    assert xformers.ATTENTION_REGISTRY["dilated"].constructor is theirs


def test_without_xformers_nothing_happens(monkeypatch):
    """Nor with a new one, which has no components."""
    for missing in ("xformers", "xformers.components"):
        with monkeypatch.context() as patch:
            for name in ("xformers", "xformers.components", "xformers.components.attention"):
                patch.delitem(sys.modules, name, raising=False)
            patch.setattr(sys, "meta_path", [_Missing(missing)])
            patch.setitem(sys.modules, "xformers", ModuleType("xformers")) if missing != "xformers" else None
            assert register_with_xformers() == ()


def test_a_broken_xformers_is_not_taken_for_a_missing_one(monkeypatch):
    """What it fails to import shows."""
    monkeypatch.setattr(sys, "meta_path", [_Missing("pyre_extensions")])
    for name in ("xformers", "xformers.components", "xformers.components.attention"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ModuleNotFoundError, match="pyre_extensions"):
        register_with_xformers()


class _Missing:
    """A finder that finds nothing, and says what is missing."""

    def __init__(self, name):
        self.name = name

    def find_spec(self, name, path=None, target=None):
        raise ModuleNotFoundError(f"No module named {self.name!r}", name=self.name)
