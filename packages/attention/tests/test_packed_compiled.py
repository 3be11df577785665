"""cu_seqlens in traced code: data that the op reads, so one graph serves every packing of a shape, as eager does."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from longattn.attention import LongNet, MultiheadPatternAttention, Ring, pattern_attention
from longattn.patterncache import Dilated, Full, Window

DILATED = Dilated((4, 12), (1, 2), causal=True)
PACKINGS = ([0, 5, 20], [0, 13, 20], [0, 0, 20])


@pytest.fixture(autouse=True)
def _forget_graphs():
    torch._dynamo.reset()


def qkv(nq=20, nk=20):
    """float64 leaves."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, nq, 4, 4), (1, nk, 2, 4), (1, nk, 2, 4))
    return [torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]


def gradients(out, leaves):
    """Of a loss."""
    return torch.autograd.grad(out.square().sum(), leaves)


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3, "seed": 4}, {"schedule": Ring(size=3, layout="zigzag")}])
@pytest.mark.parametrize("pattern", [DILATED, Window(3)])
def test_one_graph_serves_every_packing(pattern, options):
    """Out, lse and gradients are eager's; another packing of as many documents compiles nothing."""
    inputs, counter = qkv(), CompileCounterWithBackend("aot_eager")

    def call(q, k, v, cu_seqlens):
        return pattern_attention(q, k, v, pattern, cu_seqlens=cu_seqlens, return_lse=True, **options)

    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for packing in PACKINGS:
        ends = torch.tensor(packing, dtype=torch.int32)
        found, expected = (each(*inputs, ends) for each in (compiled, call))
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        torch.testing.assert_close(gradients(found[0], inputs), gradients(expected[0], inputs))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("pattern", "cu_q", "cu_k"),
    [(DILATED, [0, 2, 2, 7], [0, 6, 9, 20]), (Full(), [0, 20, 20, 23], [0, 3, 9, 20])],
)
def test_queries_may_have_lengths_of_their_own(pattern, cu_q, cu_k):
    """The last of each document's keys; without positions also more of them."""
    inputs = qkv(cu_q[-1])
    ends = torch.tensor(cu_k), torch.tensor(cu_q)

    def call(q, k, v, cu_seqlens, cu_seqlens_q):
        return pattern_attention(q, k, v, pattern, cu_seqlens=cu_seqlens, cu_seqlens_q=cu_seqlens_q)

    found, expected = torch.compile(call, backend="aot_eager", fullgraph=True)(*inputs, *ends), call(*inputs, *ends)
    torch.testing.assert_close([found, *gradients(found, inputs)], [expected, *gradients(expected, inputs)])


def test_modules_with_rotary_positions_and_torchscales_gradient():
    """A multihead module with queries of other lengths, and a model whose packing is a list."""
    torch.manual_seed(0)
    wide = {"rotary_base": 10.0, "dtype": torch.float64}
    module = MultiheadPatternAttention(16, 4, DILATED, merge_grad="detached", **wide)
    q, k = torch.randn(1, 7, 16, dtype=torch.float64), torch.randn(1, 20, 16, dtype=torch.float64)
    ends = {"cu_seqlens": torch.tensor([0, 6, 9, 20]), "cu_seqlens_q": torch.tensor([0, 2, 2, 7])}
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, **ends), module(q, k, **ends))
    model = LongNet(11, 16, 4, 1, (4, 12), (1, 2), 16, dtype=torch.float64)
    tokens = torch.randint(11, (1, 20))
    for packing in PACKINGS:
        found = torch.compile(model, backend="eager", fullgraph=True)(tokens, cu_seqlens=packing)
        torch.testing.assert_close(found, model(tokens, cu_seqlens=packing))


def test_an_exported_program_takes_any_packing():
    """Dynamic in tokens and in documents."""

    class Packed(torch.nn.Module):
        def forward(self, x, cu_seqlens):
            return pattern_attention(x, x, x, DILATED, cu_seqlens=cu_seqlens)

    tokens, documents = torch.export.Dim("tokens", min=2, max=1 << 20), torch.export.Dim("documents", min=2, max=999)
    x = qkv()[0].detach()
    program = torch.export.export(
        Packed(), (x, torch.tensor([0, 5, 20])), dynamic_shapes=({1: tokens}, {0: documents})
    ).module()
    for length, packing in ((20, [0, 20]), (11, [0, 1, 1, 4, 11])):
        ends = torch.tensor(packing)
        torch.testing.assert_close(program(x[:, :length], ends), Packed()(x[:, :length], ends))


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        (torch.tensor([0, 5, 19]), "cu_seqlens must end with the packed length 20, got 19"),
        (torch.tensor([0, 5, 3, 20]), "cu_seqlens must begin with 0, never fall"),
        (torch.tensor([0.0, 20.0]), "cu_seqlens must be int32 or int64, got torch.float32"),
        (torch.tensor([[0, 20]]), r"cu_seqlens must have shape \(documents \+ 1,\)"),
    ],
)
def test_a_bad_packing_is_named(ends, words):
    """What its shape says when the graph is made, what its values say when it runs."""
    inputs = [x.detach() for x in qkv()]
    compiled = torch.compile(
        lambda cu_seqlens: pattern_attention(*inputs, Full(), cu_seqlens=cu_seqlens), backend="eager", fullgraph=True
    )
    with pytest.raises(Exception, match=words):
        compiled(ends)


def test_the_other_op_takes_none():
    """One rectangle has no documents: they are a pattern there."""
    x = torch.zeros(1, 4, 1, 4)
    from longattn.kernels.interface import OpArguments, OpTensors

    asked = OpArguments(
        Full().canonical(), [0, 4, 1], [0, 4, 1], [1, 0, 1], None, 0.0, False, False, "", False, torch.float32, ""
    )
    with pytest.raises(NotImplementedError, match="takes no cu_seqlens"):
        torch.ops.longattn.attend(*OpTensors(x, x, x, cu_seqlens=torch.tensor([0, 4])), *asked)
