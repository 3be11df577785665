"""lucidrains' package with its ring replaced, and with the whole gradient of its gather."""

import os

__path__.append(os.path.join(os.environ["LONGATTN_PEER"], "ring_attention_pytorch"))

from ring_attention_pytorch import distributed, whole_gather  # noqa: E402
from ring_attention_pytorch.ring_attention import RingAttention, RingTransformer, default_attention  # noqa: E402  # pyright: ignore[reportMissingImports]
from ring_attention_pytorch.ring_flash_attention import ring_flash_attn  # noqa: E402

distributed.AllGatherFunction.backward = staticmethod(whole_gather.backward)  # pyright: ignore[reportAttributeAccessIssue]

__all__ = ["RingAttention", "RingTransformer", "default_attention", "ring_flash_attn"]
