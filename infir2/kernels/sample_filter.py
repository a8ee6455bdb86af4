"""Top-k, and top-p of what top-k leaves: which tokens of a row of logits may be drawn.

The plain-torch twin, which sorts; ``sample_filter_triton`` finds the same tokens without.
"""

import torch
from torch import Tensor


def filter_logits(scaled: Tensor, top_k: Tensor, top_p: Tensor, greedy: Tensor) -> Tensor:
    """``scaled`` with -inf for each token that is removed. Of equal logits the lower id is kept.

    scaled: float32 logits [rows, vocabulary], divided by the temperature. One element a row: top_k int64 (0 keeps all),
    top_p float64 (1 keeps all), greedy bool (the row is left as it is).
    """
    rows = (((top_k > 0) | (top_p < 1)) & ~greedy).nonzero().squeeze(1)
    if rows.numel() == 0:
        return scaled
    vocabulary = scaled.shape[-1]
    ordered, ids = scaled[rows].sort(dim=-1, descending=True, stable=True)
    k = torch.where(top_k[rows] > 0, top_k[rows], vocabulary)
    removed = torch.arange(vocabulary, device=scaled.device) >= k[:, None]
    probabilities = ordered.masked_fill(removed, -torch.inf).double().softmax(-1)
    # The mass in front of a token decides, so the first token always stays and the one that crosses top_p does too.
    removed |= (probabilities.cumsum(-1) - probabilities >= top_p[rows, None]) & (top_p[rows, None] < 1)
    removed[:, 0] = False
    scaled = scaled.clone()
    scaled[rows] = scaled[rows].masked_fill(torch.zeros_like(removed).scatter_(1, ids, removed), -torch.inf)
    return scaled
