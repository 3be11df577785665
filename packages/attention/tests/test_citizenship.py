"""Presets at home in torch: transforms, export, mixed precision, accumulation, determinism, the meta device."""

import pytest
import torch
from torch.func import functional_call, grad, vmap

from longattn.attention import (
    BlockSparseRingDilatedAttention,
    ImprovedMultiheadDilatedAttention,
    LongNet,
    MultiheadDilatedAttention,
    RingDilatedAttentionV2,
)
from longattn.attention.testing import MULTIHEAD_PRESETS, PRESET_FLAGS, PRESETS, small_inputs, small_preset

ALL = {**PRESETS, **MULTIHEAD_PRESETS}
SHAPE = {"segment_lengths": (8, 16), "dilation_rates": (1, 2)}


def everything(name):
    """Every flag that the preset takes, on; but a lightweight pool would lease nothing of this size."""
    return dict.fromkeys(PRESET_FLAGS[name], True) | {"lightweight_pool": False}


@pytest.mark.parametrize("name", [*PRESETS, "ImprovedMultiheadDilatedAttention"])
def test_gradcheck(name):
    """Numeric and analytic gradients agree, with every flag on, for inputs and, through the module, for its parameters."""
    multihead = name in MULTIHEAD_PRESETS
    module = small_preset(name, causal=True, **everything(name)).double()
    x = tuple(t[:, :9].detach().requires_grad_() for t in small_inputs(name, dtype=torch.float64))
    weights = tuple(module.parameters()) if multihead else ()
    names = [n for n, _ in module.named_parameters()]

    def call(*given):
        return functional_call(module, dict(zip(names, given[len(x) :], strict=True)), given[: len(x)])

    assert torch.autograd.gradcheck(call, (*x, *weights), fast_mode=True)


@pytest.mark.parametrize("name", ALL)
def test_meta_device(name):
    """Shapes without data: parameters and calls."""
    options = {"device": "meta"} if name in MULTIHEAD_PRESETS else {}
    out = small_preset(name, **options)(*small_inputs(name, device="meta"))
    assert out.device.type == "meta" and out.shape == small_inputs(name)[0].shape


@pytest.mark.parametrize("name", ["RingDilatedAttentionV2", "ImprovedMultiheadDilatedAttention"])
def test_export_with_dynamic_length(name):
    """One exported program serves other lengths with the module's numbers."""
    options = {"ring_size": 2} if name.startswith("Ring") else {}
    module = small_preset(name, causal=True, **everything(name), **options).eval()
    length = torch.export.Dim("length", min=4, max=64)
    x = small_inputs(name)
    shapes = [{1: length} for _ in x]
    program = torch.export.export(module, x, dynamic_shapes=None if not shapes else tuple(shapes), strict=False)
    for n in (21, 40, 9):
        inputs = small_inputs(name, n)
        torch.testing.assert_close(program.module()(*inputs), module(*inputs))


@pytest.mark.parametrize("name", ALL)
def test_autocast(name):
    """Under bfloat16 autocast: outputs in it, near those of float32, and gradients in float32."""
    module, x = small_preset(name, **everything(name)), small_inputs(name, requires_grad=True)
    expected = module(*x)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(*x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=0.1, rtol=0.1)
    out.float().square().sum().backward()
    assert all(t.grad.dtype == torch.float32 and t.grad.isfinite().all() for t in x)


def test_grad_scaler_changes_no_step():
    """Scaled and unscaled training give the same parameters; a step with an overflow is skipped."""
    start = MultiheadDilatedAttention(16, 2, **SHAPE).state_dict()
    x, ends = torch.randn(2, 20, 16), []
    for enabled in (False, True):
        module = ImprovedMultiheadDilatedAttention(16, 2, **SHAPE, enable_memory_pool=True)
        module.load_state_dict(start)
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        for scale in (1.0, float("inf"), 1.0) if enabled else (1.0, 1.0):
            optimizer.zero_grad()
            scaler.scale(module(x).square().mean() * scale).backward()
            scaler.step(optimizer)
            scaler.update()
        ends.append(module.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value)


def test_accumulated_gradients_are_the_whole_batchs():
    """Four backwards before a step; buffers of one do not disturb the next."""
    module = ImprovedMultiheadDilatedAttention(16, 2, **SHAPE, dtype=torch.float64, enable_memory_pool=True)
    x = torch.randn(4, 20, 16, dtype=torch.float64)
    expected = torch.autograd.grad(module(x).square().mean(), list(module.parameters()))
    parts = [module(part).square().mean() / 4 for part in x.split(1)]
    for part in parts:
        part.backward()
    for parameter, whole in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, whole)


def test_gradients_per_sample():
    """vmap(grad) over a batch is each sample's own gradient."""
    module = ImprovedMultiheadDilatedAttention(16, 2, **SHAPE, dtype=torch.float64)
    parameters = dict(module.named_parameters())
    x = torch.randn(3, 12, 16, dtype=torch.float64)

    def loss(given, sample):
        return functional_call(module, given, (sample.unsqueeze(0),)).square().sum()

    found = vmap(grad(loss), (None, 0))(parameters, x)
    for at, sample in enumerate(x):
        each = torch.autograd.grad(module(sample[None]).square().sum(), list(parameters.values()))
        for value, expected in zip(found.values(), each, strict=True):
            torch.testing.assert_close(value[at], expected)


@pytest.mark.parametrize("preset", [RingDilatedAttentionV2, BlockSparseRingDilatedAttention])
def test_vmap_over_a_further_axis(preset):
    """Presets without parameters, too."""
    module = preset(**SHAPE, causal=True)
    q, k, v = torch.randn(3, 4, 2, 12, 2, 8)
    expected = torch.stack([module(*x) for x in zip(q, k, v, strict=True)])
    torch.testing.assert_close(vmap(module)(q, k, v), expected)


@pytest.mark.parametrize("name", ALL)
def test_deterministic_algorithms(name):
    """Nothing is refused, and two runs give the same bits, gradients included."""
    module, runs = small_preset(name, dropout=0.2, **everything(name)), []
    x = small_inputs(name, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            torch.manual_seed(3)
            out = module(*x)
            runs.append([out, *torch.autograd.grad(out.square().sum(), x)])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_inference_mode_and_back():
    """Buffers first used in inference mode serve training afterwards, and the reverse."""
    module = small_preset("ImprovedMultiheadDilatedAttentionV2", **everything("ImprovedMultiheadDilatedAttentionV2"))
    (x,) = small_inputs("ImprovedMultiheadDilatedAttentionV2")
    expected = module(x).detach()
    for _ in range(2):
        with torch.inference_mode():
            torch.testing.assert_close(module(x).clone(), expected)
        module(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_longnet_moves_between_dtypes():
    """to(bfloat16) and back to float32: the model runs in each."""
    model = LongNet(50, 16, 2, 2, **SHAPE, dim_feedforward=32)
    tokens = torch.randint(50, (1, 20))
    expected = model(tokens)
    torch.testing.assert_close(model.to(torch.bfloat16)(tokens).float(), expected, atol=0.3, rtol=0.3)
    assert model.to(torch.float32)(tokens).dtype == torch.float32
