"""Bottom-up attention (Eq. 8)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def bottom_up_attention(embeddings: Tensor, reference: Tensor, lengths: Tensor | None = None) -> Tensor:
    """0.5 (1 - cos(x(t), x_ref)) (Eq. 8), (B, T)."""
    return 0.5 * (1 - F.cosine_similarity(embeddings, reference.to(embeddings.dtype), dim=2))
