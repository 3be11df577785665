"""lucidrains' package with its ring replaced."""

import os

__path__.append(os.path.join(os.environ["LONGATTN_PEER"], "ring_attention_pytorch"))

from ring_attention_pytorch.ring_attention import RingAttention, RingTransformer, default_attention  # noqa: E402  # pyright: ignore[reportMissingImports]
from ring_attention_pytorch.ring_flash_attention import ring_flash_attn  # noqa: E402

__all__ = ["RingAttention", "RingTransformer", "default_attention", "ring_flash_attn"]
