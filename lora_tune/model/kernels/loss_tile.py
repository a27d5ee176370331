"""Cross-entropy of a tile of logits that become their own gradient, in rows that stay in the processor's cache."""

from __future__ import annotations

import torch

from lora_tune.model.footprint import LOSS_BLOCK

_SMALLEST = 1e-30  # a probability below which its logarithm is taken from the logits (a loss above 69)


def loss_tile(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, *, softcap: float = 0.0, multiplier: float = 1.0
) -> torch.Tensor:
    """Cross-entropy (N, nats, float32) of N tokens over the whole vocabulary; the logits become their own gradient.

    The loss is that of z = multiplier · logits, or softcap · tanh(multiplier · logits / softcap) where softcap is not
    0. Afterwards `logits_NV` holds d loss_n / d logits_nv in its dtype: (softmax(z) − one(target)) · dz / dlogits.
    A negative target is not trained: loss 0, gradient 0. Each logit is read from memory once and written once.
    """
    rows, vocabulary = logits_NV.shape
    step = min(rows, max(1, LOSS_BLOCK.get(logits_NV.device.type, LOSS_BLOCK["cuda"]) // vocabulary))
    loss_N = torch.empty(rows, dtype=torch.float32, device=logits_NV.device)
    space = torch.empty(2, step, vocabulary, dtype=torch.float32, device=logits_NV.device)
    for start in range(0, rows, max(1, step)):
        block = slice(start, min(rows, start + step))
        own = space[:, : block.stop - start]
        loss_N[block] = _block(logits_NV[block], targets_N[block], own, softcap, multiplier)
    return loss_N


def _block(
    logits_RV: torch.Tensor, targets_R: torch.Tensor, space_2RV: torch.Tensor, softcap: float, multiplier: float
) -> torch.Tensor:
    """The losses of some rows, whose logits are replaced by their gradient; computed in `space_2RV`."""
    z_RV, d_RV = space_2RV
    z_RV.copy_(logits_RV)
    if multiplier != 1.0:
        z_RV.mul_(multiplier)
    slope_RV: torch.Tensor | None = None
    if softcap:
        z_RV.div_(softcap).tanh_()
        slope_RV = 1 - z_RV.square()
        z_RV.mul_(softcap)
    ignored_R, chosen_R1 = targets_R < 0, targets_R.clamp_min(0).unsqueeze(1)
    torch.softmax(z_RV, dim=1, out=d_RV)
    loss_R1 = d_RV.gather(1, chosen_R1)
    on_cpu = d_RV.device.type == "cpu"  # where a question to a tensor does not wait for a GPU
    if on_cpu and bool((loss_R1 > _SMALLEST).all()):
        loss_R1.log_().neg_()
    else:
        loss_R1 = z_RV.logsumexp(dim=1, keepdim=True) - z_RV.gather(1, chosen_R1)
    d_RV.scatter_add_(1, chosen_R1, d_RV.new_full((1, 1), -1.0).expand_as(chosen_R1))
    if slope_RV is not None:
        d_RV.mul_(slope_RV)
    if multiplier != 1.0:
        d_RV.mul_(multiplier)
    if not on_cpu or bool(ignored_R.any()):
        d_RV.masked_fill_(ignored_R.unsqueeze(1), 0.0)
        loss_R1.masked_fill_(ignored_R.unsqueeze(1), 0.0)
    logits_RV.copy_(d_RV)
    return loss_R1.squeeze(1)
