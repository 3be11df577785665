"""What presets go through with every flag on: copies, threads, later calls, exceptions, training, compilation."""

import copy
import gc
import pickle
import threading

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from longattn.attention import (
    MultiheadDilatedAttention,
    RingDilatedAttentionV2,
)
from longattn.attention.testing import MULTIHEAD_PRESETS, PRESET_FLAGS, PRESETS, small_inputs, small_preset

ALL = {**PRESETS, **MULTIHEAD_PRESETS}
SHAPE = {"segment_lengths": (8, 16), "dilation_rates": (1, 2)}


def everything(name):
    """Every flag that the preset takes, on; but a lightweight pool would lease nothing of this size."""
    return dict.fromkeys(PRESET_FLAGS[name], True) | {"lightweight_pool": False}


@pytest.mark.parametrize("name", ALL)
def test_copies_have_an_environment_of_their_own(name):
    """deepcopy, pickle and state_dict with every flag on: equal numbers, separate counters, the same flags."""
    module = small_preset(name, **everything(name))
    x = small_inputs(name)
    expected = module(*x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(*x), expected)
        assert twin._resources.wiring == module._resources.wiring and repr(twin) == repr(module)
        assert twin._resources is not module._resources
        assert twin._resources.environment.name != module._resources.environment.name
        if name in MULTIHEAD_PRESETS:
            assert twin._resources is twin.attention._resources
    fresh = small_preset(name)
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(*x), expected)


@pytest.mark.parametrize("name", ALL)
def test_threads_share_a_module_its_pool_and_its_cache(name, pool_leases):
    """Right answers from eight threads, and nothing stays in use."""
    module = small_preset(name, **everything(name))
    plain = small_preset(name)
    plain.load_state_dict(module.state_dict())
    jobs = [small_inputs(name, length) for length in (9, 17, 21, 30)] * 2
    expected = [plain(*x).detach() for x in jobs]
    wrong = []
    barrier = threading.Barrier(len(jobs))

    def work(at):
        barrier.wait()
        for _ in range(5):
            with torch.no_grad():
                # Not bits: a thread of ours has torch's default number of threads, and products split among them round otherwise.
                if not torch.allclose(module(*jobs[at]), expected[at], rtol=1e-5, atol=1e-5):
                    wrong.append(at)

    threads = [threading.Thread(target=work, args=(at,)) for at in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    if not name.startswith("Improved") or "V2" not in name:
        assert pool_leases()[0] == 0
    assert module._pattern_cache is None or module._pattern_cache.get_stats()["hits"] >= 30


@pytest.mark.parametrize("name", ALL)
def test_outputs_survive_later_calls(name):
    """A recycled buffer is never one that somebody still sees: outputs, views of them, gradients."""
    module = small_preset(name, **everything(name))
    outs = [module(*small_inputs(name)) for _ in range(4)]
    kept = [out.detach().clone() for out in outs]
    views = [out[:, 2:] for out in outs]
    del outs
    for _ in range(6):
        module(*small_inputs(name))
    assert all(torch.equal(view, whole[:, 2:]) for view, whole in zip(views, kept, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_gradients_are_those_without_flags(name):
    """Later forwards between a forward and its backward disturb nothing; the module may be gone by then."""
    module, plain = small_preset(name, **everything(name)), small_preset(name)
    plain.load_state_dict(module.state_dict())
    x, twin = small_inputs(name, requires_grad=True), None
    twin = tuple(t.detach().clone().requires_grad_() for t in x)
    out = module(*x)
    for _ in range(3):
        module(*small_inputs(name))
    del module
    gc.collect()
    out.square().sum().backward()
    plain(*twin).square().sum().backward()
    for a, b in zip(x, twin, strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("name", PRESETS)
def test_an_exception_inside_forward_leaves_nothing_leased(name, monkeypatch, pool_leases):
    """A row that breaks halfway: its accumulators go back, and the next call is right."""
    from longattn.kernels.eager.tiles import Tile

    module = small_preset(name, **everything(name))
    x = small_inputs(name)
    expected = small_preset(name)(*x)

    def broken(*_):
        raise RuntimeError("broken halfway")

    with monkeypatch.context() as patch:
        patch.setenv("LONGATTN_NATIVE", "0")  # the torch rows go tile by tile in Python
        patch.setattr(Tile, "merge", broken)
        with pytest.raises(RuntimeError, match="broken halfway"):
            module(*x)
    gc.collect()
    assert module.get_buffer_stats().get("outstanding", 0) == 0
    if "enable_buffer_manager" not in PRESET_FLAGS[name]:
        assert pool_leases()[0] == 0
    assert torch.equal(module(*x), expected)


@pytest.mark.parametrize("name", ALL)
def test_dropout_trains_repeatably_and_rests_in_eval(name):
    """torch.manual_seed decides what is dropped; eval drops nothing."""
    module = small_preset(name, dropout=0.4)
    x = small_inputs(name)
    torch.manual_seed(7)
    first = module(*x)
    other = module(*x)
    torch.manual_seed(7)
    assert torch.equal(module(*x), first) and not torch.equal(other, first)
    plain = small_preset(name)
    plain.load_state_dict(module.state_dict())
    assert torch.equal(module.eval()(*x), plain.eval()(*x))


@pytest.mark.parametrize("name", ALL)
def test_compiles_without_a_graph_break_with_every_flag_on(name):
    """One graph over many lengths, training with dropout included; the numbers, and what is dropped, are eager's."""
    torch._dynamo.reset()
    module = small_preset(name, dropout=0.3, **everything(name))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for length in (20, 33, 17, 48, 9):
        x = small_inputs(name, length)
        torch.manual_seed(length)
        found = compiled(*x)
        torch.manual_seed(length)
        torch.testing.assert_close(found, module(*x))
    assert counter.frame_count <= 2


def test_two_alike_layers_share_a_graph():
    """Flags do not show in traced code, so the second layer compiles nothing new."""
    torch._dynamo.reset()
    layers = [RingDilatedAttentionV2(**SHAPE, use_pattern_cache=True, enable_memory_pool=True) for _ in range(2)]
    counter = CompileCounterWithBackend("aot_eager")
    x = small_inputs("RingDilatedAttentionV2")
    for layer in layers:
        torch.compile(layer, fullgraph=True, backend=counter)(*x)
        assert layer._pattern_cache.get_stats()["hits"] == 0 and layer._pattern_cache.get_stats()["misses"] == 0
    assert counter.frame_count <= 2


def test_a_fresh_eval_instance_gives_what_was_trained():
    """Train a step with flags and dropout, load into a plain instance, compare in eval."""
    module = MultiheadDilatedAttention(16, 2, **SHAPE, dropout=0.2, enable_memory_pool=True)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        module(torch.randn(2, 20, 16)).square().mean().backward()
        optimizer.step()
    fresh = MultiheadDilatedAttention(16, 2, **SHAPE).eval()
    fresh.load_state_dict(module.state_dict())
    x = torch.randn(2, 20, 16)
    assert torch.equal(fresh(x), module.eval()(x))
