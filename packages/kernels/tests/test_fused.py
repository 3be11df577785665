"""`fused_attention` speaks of its own parameters."""

import pytest
import torch

from longattn.kernels import fused_attention

Q, K = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 5, 8)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_sm_scale_must_be_finite(value: float):
    with pytest.raises(ValueError, match=f"sm_scale must be None or a finite number, got {value}"):
        fused_attention(K, K, K, sm_scale=value)


@pytest.mark.parametrize("value", ["1", True, torch.tensor(1.0)])
def test_sm_scale_must_be_a_number(value: object):
    with pytest.raises(TypeError, match="sm_scale must be None or a number, got"):
        fused_attention(K, K, K, sm_scale=value)  # type: ignore[arg-type]


def test_causal_with_more_queries_than_keys():
    """It takes no position of the first query, and says which argument it can take."""
    with pytest.raises(ValueError, match="causal must be False where queries outnumber keys, got Nq=7, Nk=5") as error:
        fused_attention(Q, K, K, causal=True)
    assert "q_start" not in str(error.value)
    assert fused_attention(Q, K, K).shape == Q.shape
    with pytest.raises(TypeError, match="causal must be True or False, got None"):
        fused_attention(K, K, K, causal=None)  # type: ignore[arg-type]


def test_against_torch():
    got = fused_attention(K, K, K, causal=True, sm_scale=0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(K, K, K, is_causal=True, scale=0.3)
    torch.testing.assert_close(got, expected)
