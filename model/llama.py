"""The model in classes that transformers ships: Llama, and ERNIE 4.5 MoE for a mixture of experts.

There and back: configuration, names of parameters, and the order of the rows of q and k. Llama
turns the two halves of a head where v1 turns neighbouring pairs; ERNIE turns pairs too, has the
same router (softmax, top k, normalised) and the same shared experts (one SwiGLU of their width).
"""

import re
from typing import Any

import torch
from torch import Tensor
from transformers import Ernie4_5_MoeConfig, LlamaConfig, PretrainedConfig

from .LMConfig import LMConfig

StateDict = dict[str, Tensor]

PARTS = {  # ours to theirs, within a layer or above all
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.shared_experts.w1": "mlp.shared_experts.gate_proj",
    "feed_forward.shared_experts.w2": "mlp.shared_experts.down_proj",
    "feed_forward.shared_experts.w3": "mlp.shared_experts.up_proj",
    "feed_forward.gate": "mlp.gate",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "tok_embeddings": "embed_tokens",
    "norm": "norm",
}
ROUTER_BIAS = "mlp.gate.moe_statics.e_score_correction_bias"  # ERNIE's; zero adds nothing


def to_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of wq or wk in each head: from neighbouring pairs to Llama's two halves."""
    pairs = weight.view(-1, head_dim // 2, 2, weight.shape[1])  # (heads, pair, member, D)
    return pairs.transpose(1, 2).reshape(weight.shape)


def to_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Undo :func:`to_halves`."""
    halves = weight.view(-1, 2, head_dim // 2, weight.shape[1])  # (heads, member, pair, D)
    return halves.transpose(1, 2).reshape(weight.shape)


def renamed(name: str, parts: dict[str, str]) -> str:
    """Return a parameter's name with its part renamed; an unknown one stays, to be refused."""
    layer, stem = re.fullmatch(r"(layers\.\d+\.)?(.*?)(?:\.weight)?", name).groups(default="")
    return f"{layer}{parts[stem]}.weight" if stem in parts else name


# ----------------------------------------------------------------------------- there


def peer_config(config: LMConfig) -> LlamaConfig | Ernie4_5_MoeConfig:
    """Return the configuration of transformers' class that computes the same.

    Raises:
        ValueError: a mixture of experts whose routing no such class has.
    """
    fields: dict[str, Any] = dict(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        intermediate_size=config.hidden_dim,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps,
        rope_parameters=dict(config.rope_parameters),
        tie_word_embeddings=True,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    if not config.use_moe:
        return LlamaConfig(**fields, attention_dropout=config.dropout)
    if not config.norm_topk_prob or config.num_experts_per_tok == 1:
        raise ValueError(
            f"--format llama: no class of transformers has {unnormalised(config)} beside shared "
            "experts: use --format minimind, which carries its own code"
        )
    return Ernie4_5_MoeConfig(
        **fields,
        moe_intermediate_size=config.hidden_dim,
        moe_k=config.num_experts_per_tok,
        moe_num_experts=config.n_routed_experts,
        moe_num_shared_experts=config.n_shared_experts,
        moe_layer_start_index=0,
        router_aux_loss_coef=config.aux_loss_alpha,
    )


def unnormalised(config: LMConfig) -> str:
    """Say why the weights of a token's experts do not add up to 1."""
    if config.num_experts_per_tok == 1:
        return "num_experts_per_tok=1, whose one weight is not normalised,"
    return f"norm_topk_prob={config.norm_topk_prob}"


def to_peer(state: StateDict, config: LMConfig) -> StateDict:
    """Give the tensors of a model (weights or gradients) the names and order of its peer's."""
    result: StateDict = {}
    for name, tensor in state.items():
        if ".experts." in name:
            continue  # below, all of a layer in one
        if name.endswith(("wq.weight", "wk.weight")) and not config.use_moe:
            tensor = to_halves(tensor, config.head_dim)
        theirs = "lm_head.weight" if name == "output.weight" else f"model.{renamed(name, PARTS)}"
        result[theirs] = tensor
    for i in range(config.n_layers if config.use_moe else 0):
        w1, w2, w3 = (stacked(state, i, w, config.n_routed_experts) for w in ("w1", "w2", "w3"))
        result[f"model.layers.{i}.mlp.experts.gate_up_proj"] = torch.cat((w1, w3), dim=1)
        result[f"model.layers.{i}.mlp.experts.down_proj"] = w2
        result[f"model.layers.{i}.{ROUTER_BIAS}"] = torch.zeros(1, config.n_routed_experts)
    return result


def stacked(state: StateDict, layer: int, matrix: str, n_experts: int) -> Tensor:
    """Return one matrix of all routed experts of a layer, (E, rows, columns)."""
    experts = f"layers.{layer}.feed_forward.experts"
    return torch.stack([state[f"{experts}.{e}.{matrix}.weight"] for e in range(n_experts)])


# ----------------------------------------------------------------------------- and back

# What our model does without; a peer's configuration that asks for it is refused by name
FIXED = {
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "hidden_act": "silu",
    "moe_layer_interval": 1,
    "moe_layer_start_index": 0,
}


def config_of_peer(peer: PretrainedConfig) -> LMConfig:
    """Return our configuration of a Llama or ERNIE 4.5 MoE.

    Raises:
        ValueError: another kind of model, or one with parts that ours lacks, each named.
    """
    if peer.model_type not in ("llama", "ernie4_5_moe"):
        raise ValueError(
            f'model_type "{peer.model_type}" is not one that can be read: expected "minimind", '
            '"llama" or "ernie4_5_moe"'
        )
    is_moe = peer.model_type == "ernie4_5_moe"
    wrong = {name: getattr(peer, name, value) for name, value in FIXED.items()}
    wrong = {name: value for name, value in wrong.items() if value != FIXED[name]}
    head_dim = getattr(peer, "head_dim", None) or peer.hidden_size // peer.num_attention_heads
    if head_dim * peer.num_attention_heads != peer.hidden_size:
        wrong["head_dim"] = head_dim
    if is_moe and peer.moe_layer_end_index != peer.num_hidden_layers - 1:
        wrong["moe_layer_end_index"] = peer.moe_layer_end_index
    kind = peer.rope_parameters.get("rope_type", "default")
    if kind not in ("default", "linear", "yarn"):
        wrong["rope_type"] = kind
    if peer.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        wrong["partial_rotary_factor"] = peer.rope_parameters["partial_rotary_factor"]
    if wrong:
        listed = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
        raise ValueError(f"our model has no {listed}: it cannot express these weights")
    fields: dict[str, Any] = dict(
        dim=peer.hidden_size,
        n_layers=peer.num_hidden_layers,
        n_heads=peer.num_attention_heads,
        n_kv_heads=peer.num_key_value_heads,
        vocab_size=peer.vocab_size,
        hidden_dim=peer.moe_intermediate_size if is_moe else peer.intermediate_size,
        norm_eps=peer.rms_norm_eps,
        max_seq_len=peer.max_position_embeddings,
        rope_scaling=dict(peer.rope_parameters),
    )
    if not is_moe:
        return LMConfig(**fields, dropout=peer.attention_dropout)
    return LMConfig(
        **fields,
        use_moe=True,
        num_experts_per_tok=peer.moe_k,
        n_routed_experts=peer.moe_num_experts,
        n_shared_experts=peer.moe_num_shared_experts,
        aux_loss_alpha=peer.router_aux_loss_coef,
    )


def from_peer(state: StateDict, config: LMConfig) -> StateDict:
    """Undo :func:`to_peer`.

    Raises:
        ValueError: a head of its own beside the embedding, or a router with a bias.
    """
    result: StateDict = {}
    for name, tensor in state.items():
        if name.endswith(ROUTER_BIAS):
            if tensor.any():
                raise ValueError(f"our model has no bias on the router, and {name} is not zero")
            continue
        name = name.removeprefix("model.")
        if ".mlp.experts." not in name:
            name = renamed(name, {theirs: ours for ours, theirs in PARTS.items()})
        if name.endswith(("wq.weight", "wk.weight")) and not config.use_moe:
            tensor = to_pairs(tensor, config.head_dim)
        if ".mlp.experts." not in name:
            result["output.weight" if name == "lm_head.weight" else name] = tensor
            continue
        experts = name.replace("mlp", "feed_forward").rpartition(".")[0]
        for e, matrix in enumerate(tensor):
            if name.endswith("down_proj"):
                result[f"{experts}.{e}.w2.weight"] = matrix
            else:
                w1, w3 = matrix.chunk(2)
                result |= {f"{experts}.{e}.w1.weight": w1, f"{experts}.{e}.w3.weight": w3}
    result.setdefault("output.weight", result["tok_embeddings.weight"])
    if not torch.equal(result["output.weight"], result["tok_embeddings.weight"]):
        raise ValueError(
            "our model has no head of its own (tie_word_embeddings=False): it cannot express these "
            "weights"
        )
    return result
