"""Start a Llama model with the attention patterns that recall is made of, so that a small one learns to recall soon.

Transformers that learn to copy from their context first form heads that look one token back, then heads that find the
earlier place of the current token and read what came after it ("In-context Learning and Induction Heads", Olsson et al.
2022). That takes most of a short training. Here both are written into the random start, roughly, and training refines
them; the idea of a start that imitates trained attention is that of "Mimetic Initialization of Self-Attention Layers",
Trockman and Kolter 2023.

Four heads of layer 0 look one, two, three and about five tokens back and write what they see into subspaces of their
own (position alone decides: they see a part that all embeddings have in common). Heads of layer 1 look for the place
that stands as far behind a token as the current place does, or a little further: behind the current token, and behind
the last, the one before it and the one before that; one of layer 2 does the first again. RoPE planes i turn by
10000^(-i/half) per token.
"""

import math

import torch
from transformers import LlamaForCausalLM

ROPE_BASE = 10000.0
LOOK_BACK = ((1, 0, 8, 25.0), (2, 0, 8, 25.0), (3, 0, 8, 25.0), (5, 4, 12, 14.0))
"""Of each head in layer 0: tokens back, first and last (excluded) RoPE plane used, attention logit at the peak."""
MATCH = ((1, 0, None, 0), (1, 1, 0, 1), (1, 2, 1, 2), (1, 3, 2, 3), (2, 0, None, 0))
"""Layer, head, whose writing the query reads (None: the current token's own embedding), whose writing the key reads."""
MATCH_LOGIT = 35.0


def _write_head(model: LlamaForCausalLM, layer: int, head: int, weights: dict[str, torch.Tensor]) -> None:
    """Set q, k, v [head_dim, hidden] and o [hidden, head_dim] of one attention head."""
    attention = model.model.layers[layer].self_attn
    rows = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
    for name in "qkv":
        getattr(attention, f"{name}_proj").weight.data[rows] = weights[name]
    attention.o_proj.weight.data[:, rows] = weights["o"]


def _look_back(common_H: torch.Tensor, head_dim: int, length: float, how: tuple[int, int, int, float]) -> torch.Tensor:
    """Return q and k [2, head_dim, hidden] that attend a fixed number of tokens back, by direction `common_H` alone."""
    back, first, last, peak = how
    half = head_dim // 2
    amplitude = math.sqrt(peak * math.sqrt(head_dim) / (last - first)) / length
    turns = back * ROPE_BASE ** (-torch.arange(half) / half)
    q, k = torch.zeros(2, head_dim, len(common_H))
    for plane in range(first, last):
        q[plane] = amplitude * common_H
        k[plane], k[plane + half] = (
            amplitude * math.cos(turns[plane]) * common_H,
            amplitude * math.sin(turns[plane]) * common_H,
        )
    return torch.stack((q, k))


def start_recall_heads(model: LlamaForCausalLM, seed: int) -> None:
    """Write the heads into the freshly drawn float32 `model` in place; the random parts come from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    hidden, head_dim = model.config.hidden_size, model.config.hidden_size // model.config.num_attention_heads

    def orthonormal(columns: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(hidden, columns, generator=generator))[0]

    common_H = torch.nn.functional.normalize(torch.randn(hidden, generator=generator), dim=0)
    embeddings_VH = model.model.embed_tokens.weight.data
    length = embeddings_VH.norm(dim=1).mean()
    embeddings_VH += common_H * length
    without_common = torch.eye(hidden) - torch.outer(common_H, common_H)
    normed, share = math.sqrt(hidden / 2), math.sqrt(head_dim / hidden)
    written = orthonormal(len(LOOK_BACK) * head_dim).split(head_dim, dim=1)
    read = orthonormal(head_dim).T @ without_common
    for head, (how, write) in enumerate(zip(LOOK_BACK, written, strict=True)):
        scale = math.sqrt(length / (normed * share))
        q, k = _look_back(common_H, head_dim, normed, how)
        _write_head(model, 0, head, {"q": q, "k": k, "v": read * scale, "o": write * scale})
    slow = torch.zeros(head_dim, 1)
    slow[head_dim // 4 : head_dim // 2] = slow[3 * head_dim // 4 :] = 1
    normed = math.sqrt(hidden / (2 + len(LOOK_BACK)))
    amplitude = math.sqrt(MATCH_LOGIT * math.sqrt(head_dim)) / (normed * share * math.sqrt(0.5))
    for layer, head, asked, found in MATCH:
        copied = orthonormal(head_dim).T @ without_common
        scale = math.sqrt(2 * length / (normed * share))
        query = read if asked is None else share * written[asked].T
        q, k = amplitude * slow * query, amplitude * share * slow * written[found].T
        _write_head(model, layer, head, {"q": q, "k": k, "v": copied * scale, "o": copied.T * scale})
