"""The model against transformers' Llama and Mixtral, and against v1's mathematics."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from model.llama import peer_config, to_peer
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM

Build = Callable[..., MiniMindForCausalLM]
CLOSE = dict(rtol=0, atol=1e-5)  # two orders of the same fp32 sums over at most 192 terms


def tokens(B: int = 2, T: int = 12, seed: int = 1) -> Tensor:
    return torch.randint(3, 100, (B, T), generator=torch.Generator().manual_seed(seed))


def llama_of(model: MiniMindForCausalLM) -> LlamaForCausalLM:
    config = peer_config(model.config)
    config._attn_implementation = "eager"
    llama = LlamaForCausalLM(config).eval()
    llama.load_state_dict(to_peer(model.state_dict(), model.config))
    return llama


@pytest.mark.parametrize("flash_attn", (True, False))
@pytest.mark.parametrize("rope_scaling", (None, "linear:4", "yarn:4"))
@pytest.mark.parametrize("n_kv_heads", (4, 2, 1))
def test_logits_loss_and_gradients_are_llamas(
    build: Build, flash_attn: bool, rope_scaling: str | None, n_kv_heads: int
) -> None:
    model = build(flash_attn=flash_attn, rope_scaling=rope_scaling, n_kv_heads=n_kv_heads)
    llama = llama_of(model)
    ids = tokens(T=40)  # beyond the 16 positions that yarn:4 takes for the trained ones
    labels = ids.masked_fill(torch.arange(40) % 5 == 0, -100)
    ours, theirs = model(ids, labels=labels), llama(ids, labels=labels)
    torch.testing.assert_close(ours.logits, theirs.logits, **CLOSE)
    torch.testing.assert_close(ours.loss, theirs.loss, **CLOSE)
    ours.loss.backward()
    theirs.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    expected = {name: p.grad for name, p in llama.named_parameters()}
    torch.testing.assert_close(to_peer(gradients, model.config), expected, **CLOSE)


def test_another_rope_theta_is_llamas(build: Build) -> None:
    model = build(rope_theta=1e6)
    ids = tokens(T=40)
    torch.testing.assert_close(model(ids).logits, llama_of(model)(ids).logits, **CLOSE)


def test_hidden_states_and_attention_weights_are_llamas(build: Build) -> None:
    model = build()
    ids = tokens()
    ours = model(ids, output_hidden_states=True, output_attentions=True)
    theirs = llama_of(model)(ids, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(ours.hidden_states, theirs.hidden_states, **CLOSE)
    torch.testing.assert_close(ours.attentions, theirs.attentions, **CLOSE)


@pytest.mark.parametrize("flash_attn", (True, False))
def test_left_padded_logits_are_llamas(build: Build, flash_attn: bool) -> None:
    model = build(flash_attn=flash_attn)
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    ours = model(ids, attention_mask=mask).logits[mask.bool()]
    theirs = llama_of(model)(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(ours, theirs, **CLOSE)


def test_generate_says_what_llama_says(build: Build) -> None:
    model = build()
    ours, theirs = (
        m.generate(tokens(), max_new_tokens=12, do_sample=False) for m in (model, llama_of(model))
    )
    assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("training", (True, False))
def test_without_shared_experts_it_is_mixtral(build: Build, training: bool) -> None:
    model = build(use_moe=True, n_shared_experts=0, aux_loss_alpha=0.0).train(training)
    dense = copy.deepcopy(model.config)
    dense.use_moe = False  # Mixtral is Llama with experts, halves of heads and all
    fields = peer_config(dense).to_dict()
    del fields["model_type"]
    config = MixtralConfig(
        **fields,
        attn_implementation="eager",
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=None,
        router_jitter_noise=0.0,
    )
    mixtral = MixtralForCausalLM(config).train(training)
    ours = model.state_dict()
    rest = {name: tensor for name, tensor in ours.items() if "feed_forward" not in name}
    theirs = to_peer(rest, dense)
    for i in range(model.config.n_layers):
        mine, peer = f"layers.{i}.feed_forward", f"model.layers.{i}.mlp"
        w1, w2, w3 = (
            torch.stack([ours[f"{mine}.experts.{e}.{w}.weight"] for e in range(4)])
            for w in ("w1", "w2", "w3")
        )
        theirs[f"{peer}.gate.weight"] = ours[f"{mine}.gate.weight"]
        theirs[f"{peer}.experts.gate_up_proj"] = torch.cat((w1, w3), dim=1)
        theirs[f"{peer}.experts.down_proj"] = w2
    mixtral.load_state_dict(theirs)
    ids = tokens()
    got, expected = (m(ids, output_router_logits=True) for m in (model, mixtral))
    torch.testing.assert_close(got.logits, expected.logits, **CLOSE)
    torch.testing.assert_close(got.router_logits, expected.router_logits, **CLOSE)


# v1's computation, written out over its state dict: complex rotary factors on neighbouring pairs,
# repeated kv heads, a triangle of -inf, and the experts token by token.


def v1_shapes(config: LMConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of v1's parameters; ``hidden`` is v1's own formula."""
    D, V = config.dim, config.vocab_size
    hidden = config.multiple_of * (
        (int(2 * (4 * D) / 3) + config.multiple_of - 1) // config.multiple_of
    )
    kv = D // config.n_heads * config.n_kv_heads
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (V, D)}
    for i in range(config.n_layers):
        layer = f"layers.{i}"
        for name, rows in (("wq", D), ("wk", kv), ("wv", kv), ("wo", D)):
            shapes[f"{layer}.attention.{name}.weight"] = (rows, D)
        networks = [f"{layer}.feed_forward"]
        if config.use_moe:
            networks = [f"{layer}.feed_forward.experts.{e}" for e in range(config.n_routed_experts)]
            networks += [f"{layer}.feed_forward.shared_experts"]
            shapes[f"{layer}.feed_forward.gate.weight"] = (config.n_routed_experts, D)
        for network in networks:
            shapes |= {f"{network}.w1.weight": (hidden, D), f"{network}.w2.weight": (D, hidden)}
            shapes[f"{network}.w3.weight"] = (hidden, D)
        shapes |= {f"{layer}.attention_norm.weight": (D,), f"{layer}.ffn_norm.weight": (D,)}
    return shapes | {"norm.weight": (D,), "output.weight": (V, D)}


def v1_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def v1_swiglu(x: Tensor, state: dict[str, Tensor], network: str) -> Tensor:
    w1, w2, w3 = (state[f"{network}.{w}.weight"] for w in ("w1", "w2", "w3"))
    gate = x @ w1.T
    return (gate * torch.sigmoid(gate) * (x @ w3.T)) @ w2.T


def v1_experts(x: Tensor, state: dict[str, Tensor], layer: str, config: LMConfig) -> Tensor:
    y = torch.zeros_like(x)
    for b, t in torch.cartesian_prod(torch.arange(x.shape[0]), torch.arange(x.shape[1])).tolist():
        scores = torch.exp(state[f"{layer}.gate.weight"] @ x[b, t])
        scores = scores / scores.sum()
        best = sorted(range(len(scores)), key=lambda e: -scores[e])[: config.num_experts_per_tok]
        total = sum(scores[e] for e in best) if len(best) > 1 else 1.0  # one alone keeps its score
        for e in best:
            y[b, t] += scores[e] / total * v1_swiglu(x[b, t], state, f"{layer}.experts.{e}")
    return y + v1_swiglu(x, state, f"{layer}.shared_experts")


def v1_logits(state: dict[str, Tensor], ids: Tensor, config: LMConfig) -> Tensor:
    B, T = ids.shape
    head_dim = config.dim // config.n_heads
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.outer(torch.arange(T), frequencies)
    pos_cis = torch.polar(torch.ones_like(angles), angles)[:, None]  # (T, 1, Dh / 2), complex

    def turn(x: Tensor) -> Tensor:
        return torch.view_as_real(
            torch.view_as_complex(x.unflatten(-1, (-1, 2))) * pos_cis
        ).flatten(-2)

    x = state["tok_embeddings.weight"][ids]
    for i in range(config.n_layers):
        layer = f"layers.{i}"
        normed = v1_norm(x, state[f"{layer}.attention_norm.weight"], config.norm_eps)
        q, k, v = (
            (normed @ state[f"{layer}.attention.{w}.weight"].T).view(B, T, -1, head_dim)
            for w in ("wq", "wk", "wv")
        )
        q, k = turn(q), turn(k)
        k, v = (t.repeat_interleave(config.n_heads // config.n_kv_heads, dim=2) for t in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) / head_dim**0.5
        scores = scores + torch.full((T, T), float("-inf")).triu(1)
        out = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).reshape(B, T, -1)
        x = x + out @ state[f"{layer}.attention.wo.weight"].T
        normed = v1_norm(x, state[f"{layer}.ffn_norm.weight"], config.norm_eps)
        network = f"{layer}.feed_forward"
        x = x + (
            v1_experts(normed, state, network, config)
            if config.use_moe
            else v1_swiglu(normed, state, network)
        )
    return v1_norm(x, state["norm.weight"], config.norm_eps) @ state["output.weight"].T


@pytest.mark.parametrize("flash_attn", (True, False))
@pytest.mark.parametrize(
    "fields",
    (
        {},
        {"n_kv_heads": None},
        {"use_moe": True, "n_shared_experts": True},
        {"use_moe": True, "n_shared_experts": 1, "num_experts_per_tok": 1},
    ),
    ids=("dense", "every head its kv", "moe", "moe, one expert a token"),
)
def test_a_v1_file_loads_strictly_and_gives_v1s_logits(
    flash_attn: bool, fields: dict[str, object]
) -> None:
    tiny = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=100)
    config = LMConfig(**(tiny | fields), flash_attn=flash_attn)
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(shape, generator=generator) * 0.125 + (len(shape) == 1)
        for name, shape in v1_shapes(config).items()
    }
    state["output.weight"] = state["tok_embeddings.weight"]  # v1 ties them and stores both
    model = MiniMindForCausalLM(config).eval()
    model.load_state_dict(state, strict=True)
    ids = tokens(T=20)
    torch.testing.assert_close(model(ids).logits, v1_logits(state, ids, config), rtol=0, atol=1e-4)
