"""One token for each of several requests, in as few operations as it can be done.

At this size and on CPUs a token takes about as long to arrange as to compute: the model's own
forward is some 600 operations, this is about 250. It computes the same from the same packed
weights; the model itself is for prompts, for mixtures of experts and for other devices.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model import FeedForward, MiniMindForCausalLM
from .packed import PackedLinear, Part, Product, UnitNorm, gain_of
from .slot_cache import SlotCache

HIDDEN = -1e30  # added to the score of a key that is not seen


@dataclass(frozen=True)
class Layer:
    """The products of a block, norms' weights within."""

    qkv: Product
    wo: Product
    w13: Product
    w2: Product


class FastStep:
    """The forward of a packed dense model for one token a request; see :func:`fast_step`."""

    def __init__(self, model: MiniMindForCausalLM) -> None:
        config = model.config
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        self.head_dim, self.n_layers = config.head_dim, config.n_layers
        self.embedding = model.tok_embeddings.weight.detach()
        self.layers = [
            Layer(
                block.attention.wq.joined.product,
                block.attention.wo.product,
                block.feed_forward.w1.joined.product,
                block.feed_forward.w2.product,
            )
            for block in model.layers
        ]
        self.norm, self.gain, self.head = UnitNorm(model.norm), gain_of(model.norm), model.output
        cos, sin = model.rotary(torch.arange(config.max_seq_len))
        self.turns = torch.complex(cos, sin)  # (context, 1, Dh / 2)
        self.unmasked = torch.zeros(1, 1, 1)

    def __call__(self, cache: SlotCache, ids: list[int], first: int = 0) -> Tensor:
        """Append a token to each of the slots from ``first`` on; return the logits (n, V).

        The slots have been written before: by a prompt.
        """
        n, K, Dh = len(ids), self.n_kv_heads, self.head_dim
        group = self.n_heads // K  # query heads that share a key
        lengths = [len(held) for held in cache.ids[first : first + n]]
        longest = max(lengths) + 1
        positions = torch.tensor(lengths)
        turn = self.turns[positions]  # (n, 1, Dh / 2)
        # slots and heads are one dimension; values come after all keys
        heads = torch.arange(first * K, (first + n) * K).view(n, 1, K)
        heads = torch.cat((heads, heads + cache.n_slots * K), dim=1)  # (n, 2, K)
        places = (heads * cache.capacity + positions[:, None, None]).flatten()
        mask, seen = self.unmasked, 0
        if n > 1:
            hidden = torch.arange(longest) > positions[:, None]
            mask, seen = hidden.float().mul_(HIDDEN).repeat_interleave(K, dim=0)[:, None], 1
        width = self.n_heads * Dh
        turned = n, self.n_heads + K, Dh // 2, 2
        strides = width + 2 * K * Dh, Dh, 2, 1
        span = slice(first * K, (first + n) * K)
        least, norm = self.norm.least, torch.linalg.vector_norm
        x = F.embedding(torch.tensor(ids), self.embedding)  # (n, D)
        for layer_id, layer in enumerate(self.layers):
            qkv = layer.qkv(x / norm(x, dim=-1, keepdim=True).hypot_(least))
            torch.view_as_complex(qkv.as_strided(turned, strides)).mul_(turn)  # q and k in place
            q = qkv[:, :width].reshape(-1, group, Dh)  # (n * K, group, Dh)
            rows, both = cache.rows(layer_id)
            rows.index_copy_(0, places, qkv[:, width:].reshape(-1, Dh))
            keys, values = both[:, span, :longest].unbind()  # (n * K, longest, Dh)
            scores = torch.baddbmm(mask, q, keys.transpose(1, 2), beta=seen, alpha=Dh**-0.5)
            out = torch.bmm(scores.softmax(dim=-1), values)
            x = x + layer.wo(out.view(n, width))
            gate, up = layer.w13(x / norm(x, dim=-1, keepdim=True).hypot_(least)).chunk(2, dim=-1)
            x += layer.w2(F.silu(gate).mul_(up))
        return self.head.product(self.norm(x) * self.gain)


def fast_step(model: nn.Module) -> FastStep | None:
    """Return the short way for a model that has one: dense, packed."""
    if not isinstance(model, MiniMindForCausalLM) or not isinstance(model.output, PackedLinear):
        return None
    blocks_fit = all(
        isinstance(block.attention.wq, Part) and type(block.feed_forward) is FeedForward
        for block in model.layers
    )
    return FastStep(model) if blocks_fit else None
