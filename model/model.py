"""The model: RMSNorm, rotary positions, grouped-query attention, SwiGLU, mixture of experts.

A causal language model of the Llama family with the parameter names of MiniMind v1. It is a
``transformers`` model in full and imports nothing of this project but its configuration, so that an
exported folder can carry this file along.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, MoeCausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import can_return_tuple

from .LMConfig import LMConfig

IGNORED = -100  # the label that is not learnt
Rotation = tuple[Tensor, Tensor]  # cos and sin, (B or 1, T, 1, Dh / 2), fp32
MaskFor = Callable[
    [int], Tensor | None
]  # number of keys -> (B or 1, 1, T, keys), or None: plain causal


class RMSNorm(nn.Module):
    """Root mean square normalisation (arXiv:1910.07467), statistics in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), self.weight.shape, eps=self.eps)
        return self.weight * normed.type_as(x)


class RotaryEmbedding(nn.Module):
    """Angles of rotary positions (RoFormer, arXiv:2104.09864, section 3.2.2), scaled if asked."""

    inv_freq: Tensor  # (Dh / 2,), fp32

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.config = config
        inv_freq, self.attention_scaling = self.frequencies()
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def frequencies(self) -> tuple[Tensor, float]:
        """Return the inverse frequencies (Dh / 2,) and the factor on cos and sin (1 but for
        YaRN).
        """
        parameters = self.config.rope_parameters
        if parameters["rope_type"] != "default":
            return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](self.config, None)
        exponents = (
            torch.arange(0, self.config.head_dim, 2, dtype=torch.float) / self.config.head_dim
        )
        return 1.0 / (parameters["rope_theta"] ** exponents), 1.0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Follow ``fn`` to another device, not to bf16 or fp16: by position 2,000 their rounding
        of the frequencies amounts to a third of a radian.
        """
        super()._apply(fn, recurse)
        self.inv_freq = self.frequencies()[0].to(self.inv_freq.device)
        return self

    @torch.no_grad()
    def forward(self, position_ids: Tensor) -> Rotation:
        angles = position_ids[..., None, None].float() * self.inv_freq  # (B, T, 1, Dh / 2)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn neighbouring pairs of ``x`` (B, T, H, Dh) by their positions' angles, as v1 does.

    Llama's published weights turn the halves of a head instead; export reorders the rows of q and
    k.
    """
    cos, sin = rotation
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, T, H, Dh / 2) each
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).type_as(x)


class Attention(nn.Module):
    """Causal grouped-query attention (GQA, arXiv:2305.13245); the cache belongs to the caller."""

    def __init__(self, config: LMConfig, layer_id: int) -> None:
        super().__init__()
        self.config = config
        self.layer_id = layer_id
        kv_dim = config.n_kv_heads * config.head_dim
        self.wq = nn.Linear(config.dim, config.dim, bias=False)
        self.wk = nn.Linear(config.dim, kv_dim, bias=False)
        self.wv = nn.Linear(config.dim, kv_dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, rotation: Rotation, mask_for: MaskFor, fused: bool, cache: Cache | None
    ) -> tuple[Tensor, Tensor | None]:
        """Attend ``x`` (B, T, D); return also the weights (B, H, T, keys) unless ``fused``."""
        head_dim = self.config.head_dim
        q = rotate(self.wq(x).unflatten(-1, (-1, head_dim)), rotation).transpose(
            1, 2
        )  # (B, H, T, Dh)
        k = rotate(self.wk(x).unflatten(-1, (-1, head_dim)), rotation).transpose(
            1, 2
        )  # (B, K, T, Dh)
        v = self.wv(x).unflatten(-1, (-1, head_dim)).transpose(1, 2)  # (B, K, T, Dh)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_id)  # (B, K, past + T, Dh)
        mask = mask_for(k.shape[2])
        if mask is not None:
            mask = mask.to(q.device)  # layers may live on several devices
        dropout = self.config.dropout if self.training else 0.0
        weights = None
        if fused:
            out = F.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=mask is None and q.shape[2] > 1, enable_gqa=True
            )
        else:
            out, weights = plain_attention(q, k, v, mask, dropout)
        out = out.transpose(1, 2).flatten(2)  # (B, T, D)
        return self.resid_dropout(self.wo(out)), weights


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    """Attention written out: the result (B, H, T, Dh) and the weights (B, H, T, keys)."""
    _, H, T, head_dim = q.shape
    k, v = (t.repeat_interleave(H // t.shape[1], dim=1) for t in (k, v))
    scores = (q @ k.transpose(2, 3)).float() * head_dim**-0.5  # (B, H, T, keys)
    if mask is None and T > 1:
        mask = torch.ones(T, k.shape[2], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min  # not -inf: a row without any key would be NaN
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    weights = F.dropout(scores.softmax(dim=-1), dropout).type_as(q)
    return weights @ v, weights


class FeedForward(nn.Module):
    """SwiGLU (GLU Variants, arXiv:2002.05202, section 2)."""

    def __init__(self, config: LMConfig, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, hidden_dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class MoEGate(nn.Module):
    """Chooses the routed experts of each token and keeps their load even.

    The balance loss is DeepSeekMoE's expert-level loss (arXiv:2401.06066, section 3.3), taken over
    each sequence (``seq_aux``) or over the whole batch.
    """

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.dim))

    def forward(
        self, x: Tensor, token_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Route ``x`` (B, T, D); ``token_mask`` (B, T) is false on padding, which does not count as
        load.

        Returns weights and expert ids (B, T, k); in training the balance loss: the mean over
        tokens of their sequence's loss, so that parts of a batch add up by their number of tokens;
        and the logits (B, T, E) from which it all comes.
        """
        E, k = self.config.n_routed_experts, self.config.num_experts_per_tok
        logits = F.linear(x, self.weight)  # (B, T, E)
        scores = logits.softmax(dim=-1, dtype=torch.float)
        weights, expert_ids = scores.topk(k, dim=-1, sorted=False)
        if self.config.norm_topk_prob and k > 1:  # a single weight of 1 would not train the gate
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        balance = None
        if self.training and self.config.aux_loss_alpha > 0:
            chosen = F.one_hot(expert_ids, E).sum(dim=2).float()  # (B, T, E)
            if token_mask is None:
                token_mask = torch.ones(x.shape[:2], device=x.device)
            valid = token_mask.to(scores.dtype)[..., None]  # (B, T, 1)
            if not self.config.seq_aux:
                chosen, scores, valid = (t.flatten(0, 1)[None] for t in (chosen, scores, valid))
            n_tokens = valid.sum(dim=1)  # (B, 1)
            per_token = valid / n_tokens.clamp(min=1)[:, None]  # (B, T, 1)
            load = (chosen * per_token).sum(dim=1) * (E / k)  # (B, E), 1 everywhere when even
            importance = (scores * per_token).sum(dim=1)  # (B, E)
            per_sequence = (load * importance).sum(dim=1, keepdim=True)  # (B, 1)
            mean = (per_sequence * n_tokens).sum() / n_tokens.sum().clamp(min=1)
            balance = self.config.aux_loss_alpha * mean
        return weights.type_as(x), expert_ids, balance, logits


class MOEFeedForward(nn.Module):
    """Routed SwiGLU experts beside a shared one that every token passes (arXiv:2401.06066, section
    3).
    """

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            FeedForward(config, config.hidden_dim) for _ in range(config.n_routed_experts)
        )
        self.gate = MoEGate(config)
        self.shared_experts = None
        if config.n_shared_experts:
            self.shared_experts = FeedForward(config, config.n_shared_experts * config.hidden_dim)

    def forward(self, x: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        B, T, D = x.shape
        weights, expert_ids, balance, router_logits = self.gate(x, token_mask)
        k = expert_ids.shape[-1]
        # One sort brings each expert's tokens together; an expert without tokens still runs on none
        # of them, so that every parameter has a gradient on every rank.
        order = expert_ids.flatten().argsort(stable=True)  # (B * T * k,)
        counts = expert_ids.flatten().bincount(minlength=len(self.experts)).tolist()
        rows = x.flatten(0, 1)[order // k].split(counts)
        out = torch.cat([expert(part) for expert, part in zip(self.experts, rows, strict=True)])
        out = torch.empty_like(out).index_copy(0, order, out)  # back in token order
        y = (out.view(B, T, k, D) * weights[..., None]).sum(dim=2).type_as(x)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        return y, balance, router_logits


class TransformerBlock(GradientCheckpointingLayer):
    """Attention and feed-forward, each behind a norm and beside the residual stream."""

    def __init__(self, config: LMConfig, layer_id: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer_id)
        self.feed_forward = (
            MOEFeedForward(config) if config.use_moe else FeedForward(config, config.hidden_dim)
        )
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        mask_for: MaskFor,
        token_mask: Tensor | None,
        fused: bool,
        past_key_values: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        attended, weights = self.attention(
            self.attention_norm(x), rotation, mask_for, fused, past_key_values
        )
        x = x + attended
        if isinstance(self.feed_forward, MOEFeedForward):
            fed, balance, router_logits = self.feed_forward(self.ffn_norm(x), token_mask)
        else:
            fed, balance, router_logits = self.feed_forward(self.ffn_norm(x)), None, None
        return x + fed, balance, weights, router_logits


@dataclass
class HiddenStatesOutput(BaseModelOutputWithPast):
    """What comes before the head, and in training an MoE's balance loss, summed over its layers."""

    balance_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None  # of each layer (B * T, E), where asked for


class MiniMindForCausalLM(PreTrainedModel, GenerationMixin):
    """MiniMind v1, dense or mixture of experts, with the head tied to the embedding."""

    config_class = LMConfig
    base_model_prefix = ""  # parameters are flat, as in v1's files
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["TransformerBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _tied_weights_keys = {"output.weight": "tok_embeddings.weight"}
    _input_embed_layer = "tok_embeddings"

    def __init__(self, config: LMConfig | None = None) -> None:
        config = config or LMConfig()
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(TransformerBlock(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.rotary = RotaryEmbedding(config)
        # GPT-2's scaling of what is added to the residual stream, once for each of its 2 * n_layers
        # terms
        for name, module in self.named_modules():
            if name.endswith((".wo", ".w2")):
                module.init_scale = (2 * config.n_layers) ** -0.5
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding | MoEGate):
            nn.init.normal_(module.weight, std=0.02 * getattr(module, "init_scale", 1.0))
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(
            module, RotaryEmbedding
        ):  # not in any file, so from_pretrained asks for it here
            module.inv_freq.copy_(module.frequencies()[0])

    @property
    def base_model(self) -> Callable[..., HiddenStatesOutput]:
        """Everything before the head: what trainers with a loss of their own call (trl 1.x)."""
        return self.hidden_states

    def get_output_embeddings(self) -> nn.Linear:
        return self.output

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.output = value

    def hidden_states(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_router_logits: bool = False,
        token_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> HiddenStatesOutput:
        """Run everything before the head.

        Args:
            input_ids: tokens (B, T); or ``inputs_embeds`` (B, T, D) in their place.
            attention_mask: (B, past + T), 0 on padding; or (B, 1, T, keys), true where a key is
                seen (added to the scores where it is floating point).
            position_ids: (B, T); by default they go on from the cache's length. Without mask and
                cache, where they start again another sequence begins that sees nothing before it.
            past_key_values: any ``transformers`` cache, or an object with its ``update`` and
                ``get_seq_length``; it belongs to the caller.
            token_mask: (B, T), false on padding, which an MoE does not count as load; by default
                what a 2D ``attention_mask`` says.

        Returns:
            ``last_hidden_state`` (B, T, D), normed.

        Raises:
            ValueError: neither or both of ``input_ids`` and ``inputs_embeds``; an attention mask
                that does not cover the cache.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, exactly one of them")
        x = self.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        B, T, _ = x.shape
        if position_ids is not None and attention_mask is None and past_key_values is None:
            attention_mask = mask_of_packed(position_ids)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = (torch.arange(T, device=x.device) + past)[None]  # (1, T)
        mask_for = build_mask(attention_mask, past, T, x)
        if token_mask is None and attention_mask is not None and attention_mask.dim() == 2:
            token_mask = attention_mask[:, -T:]
        rotation = self.rotary(position_ids)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        eager = output_attentions or self.config._attn_implementation == "eager"
        fused = self.config.flash_attn and not eager  # fused kernels do not give the weights
        x = self.dropout(x)
        all_states: list[Tensor] = []
        all_weights: list[Tensor | None] = []
        balance_losses: list[Tensor] = []
        all_router_logits: list[Tensor] = []
        for layer in self.layers:
            all_states.append(x)
            x, balance, weights, router_logits = layer(
                x, rotation, mask_for, token_mask, fused, past_key_values=past_key_values
            )
            all_weights.append(weights)
            if balance is not None:
                balance_losses.append(balance)
            if router_logits is not None and output_router_logits:
                all_router_logits.append(router_logits.flatten(0, 1))
        x = self.norm(x)
        return HiddenStatesOutput(
            last_hidden_state=x,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*all_states, x) if output_hidden_states else None,
            attentions=tuple(all_weights) if output_attentions else None,
            # layers may live on several devices
            balance_loss=sum(b.to(x.device) for b in balance_losses) if balance_losses else None,
            router_logits=tuple(all_router_logits) or None,
        )

    # transformers asks its base model for parallel plans; there are none
    hidden_states._tp_plan = hidden_states._pp_plan = None

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_router_logits: bool = False,
        token_mask: Tensor | None = None,
        targets: Tensor | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Return logits (B, T, V), or of the positions that ``logits_to_keep`` names.

        ``targets`` (B, T), the ids that follow, -100 where nothing is learnt, give their summed
        cross-entropy in nats as ``loss``, and no logits.

        ``labels`` (B, T) are the inputs themselves, -100 where nothing is learnt; they are shifted
        here. The loss is the mean in nats per label plus, in training, an MoE's balance loss
        (``aux_loss``); with ``num_items_in_batch``, the labels of a whole accumulated batch, it is
        this part's share of both. The other arguments are those of :meth:`hidden_states`.
        """
        out = self.hidden_states(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_router_logits=output_router_logits,
            token_mask=token_mask,
        )
        x = out.last_hidden_state
        if targets is not None:
            return MoeCausalLMOutputWithPast(
                loss=self.summed_loss(x, targets), aux_loss=out.balance_loss
            )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.output(x[:, keep])
        loss = None
        if labels is not None or kwargs.get("shift_labels") is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
            if out.balance_loss is not None:
                balance = part_of_batch(out.balance_loss, labels, **kwargs)
                loss = loss + balance.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=out.balance_loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            router_logits=out.router_logits,
        )

    def summed_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy of ``targets`` (B, T) after normed states ``x`` (B, T, D),
        summed in fp32, in nats.
        """
        return masked_cross_entropy(self.output(x), targets)


def masked_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the summed cross-entropy in nats over the targets that are not -100.

    A sum and not a mean: the caller divides by the number of trained tokens of the whole update, so
    that neither micro-batches nor accumulation nor ranks change the mathematics.

    Args:
        logits: (B, T, V), any float type; the sum is taken in fp32.
        targets: (B, T), ids or -100.
    """
    flat = logits.flatten(0, 1).float()
    return F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORED, reduction="sum")


def part_of_batch(
    balance_loss: Tensor,
    labels: Tensor | None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    **kwargs: Any,
) -> Tensor:
    """Weigh the balance loss by how many of an accumulated batch's labels are these.

    ``Trainer`` adds up the losses of its micro-batches as they are, so each may bring only its part
    of what is a mean over all.
    """
    if num_items_in_batch is None:
        return balance_loss
    targets = labels[:, 1:] if shift_labels is None else shift_labels
    share = (targets != IGNORED).sum() / num_items_in_batch
    return balance_loss * share.to(balance_loss.device)


def mask_of_packed(position_ids: Tensor) -> Tensor | None:
    """Return the mask (B or 1, 1, T, T) of rows in which several sequences stand one after another,
    each with positions of its own; None where no row holds more than one.

    trl and transformers' collators pack like that, without a mask.
    """
    starts = position_ids[:, 1:] <= position_ids[:, :-1]
    if not torch.compiler.is_compiling() and not starts.any():  # compiled code cannot ask
        return None
    sequences = F.pad(starts, (1, 0)).cumsum(dim=1)  # (B, T)
    return (sequences[:, :, None] == sequences[:, None, :]).tril()[:, None]


def build_mask(attention_mask: Tensor | None, past: int | Tensor, T: int, x: Tensor) -> MaskFor:
    """Return a function that gives the mask for a number of keys, made once for all layers.

    Only the cache knows how many keys it hands out (a static one always hands out all its places),
    and says so at its update. Where plain causal attention does, the mask is None and the fast
    kernels run.
    """
    if attention_mask is not None and attention_mask.dim() == 2 and isinstance(past, int):
        columns = attention_mask.shape[1]
        if columns < past + T:
            raise ValueError(
                f"attention_mask has {columns} columns, expected {past + T}: one for each of the "
                f"{past} cached and {T} new tokens"
            )
    # now, not when a layer asks: a static cache counts up its length in place at the first update
    queries = torch.arange(T, device=x.device)[:, None] + past  # (T, 1)
    made: dict[int, Tensor | None] = {}

    def mask_for(n_keys: int) -> Tensor | None:
        if n_keys in made:
            return made[n_keys]
        if attention_mask is not None and attention_mask.dim() == 4:
            mask = attention_mask[..., :n_keys]
            mask = mask if mask.is_floating_point() else mask.bool()
        elif (
            attention_mask is None
            and isinstance(past, int)
            and n_keys == past + T
            and 1 in (T, past + 1)
        ):
            mask = None  # nothing before, or a single query that sees every key
        else:
            keys = torch.arange(n_keys, device=x.device)
            mask = (keys <= queries)[None, None]  # (1, 1, T, keys)
            if attention_mask is not None:
                seen = attention_mask.to(x.device, torch.bool)
                seen = F.pad(seen, (0, n_keys - seen.shape[1]))[:, None, None]  # (B, 1, 1, keys)
                # a padded query sees itself: a row without any key would be NaN and spread
                mask = (mask & seen) | (keys == queries)
        made[n_keys] = mask
        return mask

    return mask_for
