"""Calls as programs without this library's Python: AOTInductor's packages, and what TorchScript, ONNX and one graph cannot hold."""

import shutil

import pytest
import torch

from longattn.attention import MultiheadPatternAttention, PatternAttention, Ring, pattern_attention
from longattn.kernels import attend
from longattn.patterncache import Dilated, Full, Window

LONGNET = Dilated((8, 16), (1, 2), causal=True)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Several(torch.nn.Module):
    """Calls with and without padding, a start and a played ring, behind one input."""

    def __init__(self):
        super().__init__()
        self.longnet = PatternAttention(LONGNET)
        self.ring = PatternAttention(LONGNET, schedule=Ring(size=2))

    def forward(self, q, k, padding):
        first = self.longnet(q, k, k, key_padding_mask=padding) + self.ring(k, k, k)[:, -q.shape[1] :]
        return first + pattern_attention(q, k, k, Full(), q_start=0) + attend(q, k, k, Window(5)).out


def exported(module, length=20):
    q, k = randn(1, length // 2, 2, 4), randn(1, length, 2, 4, seed=1)
    padding = torch.zeros(1, length, dtype=torch.bool)
    half = torch.export.Dim("half", min=2, max=64)
    shapes = ({1: half}, {1: 2 * half}, {1: 2 * half})
    return torch.export.export(module, (q, k, padding), dynamic_shapes=shapes, strict=False)


def check_program(call, module):
    """Other lengths than the exported one, and what padding hides."""
    for length in (20, 34):
        q, k = randn(1, length // 2, 2, 4, seed=2), randn(1, length, 2, 4, seed=3)
        padding = torch.arange(length)[None] < 3
        torch.testing.assert_close(call(q, k, padding), module(q, k, padding))


def test_exported_ops_get_no_empty_list():
    """A package's runtime hands an empty list of integers to an op as None."""
    program = exported(Several())
    calls = [n for n in program.graph.nodes if "longattn" in str(n.target)]
    assert len(calls) == 4
    assert not any(isinstance(x, (list, tuple)) and not x for n in calls for x in (*n.args, *n.kwargs.values()))
    check_program(program.module(), Several())


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="AOTInductor needs a C++ compiler, none is installed"
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_package_of_aotinductor_runs(tmp_path):
    """Compiled, saved as .pt2, loaded and called with other lengths: the module's numbers."""
    module = Several()
    program = exported(module)
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "attention.pt2"))
        check_program(torch._inductor.aoti_load_package(path), module)


X = randn(1, 20, 2, 4)
LAYERS = {
    "module": (PatternAttention(LONGNET), (X, X, X)),
    "ring": (PatternAttention(LONGNET, schedule=Ring(size=2)), (X, X, X)),
    "multihead": (MultiheadPatternAttention(8, 2, LONGNET), (randn(1, 20, 8),) * 3),
    "kernels": (lambda q, k, v: attend(q, k, v, Window(5)).out, (X, X, X)),
}
WAY_OUT = r"cannot be recorded by torch\.jit\.trace or exported to ONNX.*use torch\.export\.export"


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_tracing_to_torchscript_says_what_to_use(name):
    """Recorded, the one length would be a constant."""
    call, inputs = LAYERS[name]
    with pytest.raises(NotImplementedError, match=WAY_OUT):
        torch.jit.trace(call, inputs)
    assert call(*inputs) is not None


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_export_to_onnx_says_what_to_use(tmp_path, monkeypatch):
    """By TorchScript, and by torch.export, of which only the flag is set here: the exporter needs packages of its own."""
    layer, inputs = LAYERS["module"]
    with pytest.raises(NotImplementedError, match=WAY_OUT):
        torch.onnx.export(layer, inputs, str(tmp_path / "attention.onnx"), dynamo=False)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with pytest.raises(NotImplementedError, match=WAY_OUT):
        torch.export.export(layer, inputs, strict=False)
