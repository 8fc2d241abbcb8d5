"""The mixture of experts against a loop over tokens, its balance loss against the formula."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.model import FeedForward, MiniMindForCausalLM, MOEFeedForward

Build = Callable[..., MiniMindForCausalLM]
CLOSE = dict(rtol=0, atol=1e-5)  # the same sums in another order, fp32


def block(build: Build, **fields: object) -> MOEFeedForward:
    return build(use_moe=True, n_layers=1, **fields).layers[0].feed_forward


def stream(B: int = 3, T: int = 10, D: int = 64) -> Tensor:
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(1))


def route(moe: MOEFeedForward, x: Tensor) -> tuple[list[float], list[int]]:
    """Return one token's scores and its experts, the best first."""
    exponentials = [torch.exp(row @ x) for row in moe.gate.weight]
    scores = [e / sum(exponentials) for e in exponentials]
    k = moe.gate.config.num_experts_per_tok
    return scores, sorted(range(len(scores)), key=lambda e: -scores[e].item())[:k]


def swiglu(network: FeedForward, x: Tensor) -> Tensor:
    return network.w2.weight @ (F.silu(network.w1.weight @ x) * (network.w3.weight @ x))


def token_by_token(moe: MOEFeedForward, x: Tensor, normalise: bool) -> Tensor:
    rows = []
    for token in x.flatten(0, 1):
        scores, best = route(moe, token)
        total = sum(scores[e] for e in best) if normalise else 1.0
        y = sum(scores[e] / total * swiglu(moe.experts[e], token) for e in best)
        if moe.shared_experts is not None:
            y = y + swiglu(moe.shared_experts, token)
        rows.append(y)
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
@pytest.mark.parametrize("n_shared", (0, 1, 2))
@pytest.mark.parametrize(
    ("k", "norm_topk_prob", "normalise"),
    ((2, True, True), (3, True, True), (4, True, True), (2, False, False), (1, True, False)),
)
def test_the_block_is_the_loop_over_tokens(
    build: Build, training: bool, n_shared: int, k: int, norm_topk_prob: bool, normalise: bool
) -> None:
    moe = block(
        build, n_shared_experts=n_shared, num_experts_per_tok=k, norm_topk_prob=norm_topk_prob
    ).train(training)
    if n_shared:
        assert moe.shared_experts.w1.weight.shape == (n_shared * 192, 64)
    x = stream().requires_grad_()
    expected = token_by_token(moe, x, normalise)
    y, _, _ = moe(x, None)
    torch.testing.assert_close(y, expected, **CLOSE)
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    got, wanted = (
        torch.autograd.grad((out * target).sum(), [x, *moe.parameters()]) for out in (y, expected)
    )
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)  # sums over all tokens


def test_equal_experts_are_one_network(build: Build) -> None:
    moe = block(build, n_shared_experts=0)
    for expert in moe.experts:
        expert.load_state_dict(moe.experts[0].state_dict())
    x = stream()
    torch.testing.assert_close(moe(x, None)[0], moe.experts[0](x), **CLOSE)


def formula(moe: MOEFeedForward, x: Tensor, mask: Tensor, seq_aux: bool) -> Tensor:
    """The expert-level balance loss of arXiv:2401.06066, equations 12 to 14, written plainly."""
    config = moe.gate.config
    E, k = config.n_routed_experts, config.num_experts_per_tok
    sequences = [[(b, t) for t in range(x.shape[1]) if mask[b, t]] for b in range(x.shape[0])]
    if not seq_aux:
        sequences = [sum(sequences, [])]
    total = torch.zeros(())
    for places in sequences:
        routed = [route(moe, x[place]) for place in places]
        T = len(places)
        for e in range(E):
            f = E / (k * T) * sum(e in best for _, best in routed) if T else 0.0
            P = sum(scores[e] for scores, _ in routed) / T if T else 0.0
            total = total + f * P * T
    return config.aux_loss_alpha * total / mask.sum()


@pytest.mark.parametrize("seq_aux", (True, False), ids=("by sequence", "by batch"))
@pytest.mark.parametrize("lengths", (None, (10, 4, 7), (10, 0, 1)), ids=str)
def test_the_balance_loss_is_the_formula(
    build: Build, seq_aux: bool, lengths: tuple[int, ...] | None
) -> None:
    moe, x = block(build, seq_aux=seq_aux, aux_loss_alpha=0.1).train(), stream()
    mask = (
        torch.ones(3, 10) if lengths is None else torch.arange(10) < torch.tensor(lengths)[:, None]
    )
    _, balance, _ = moe(x, None if lengths is None else mask)
    torch.testing.assert_close(balance, formula(moe, x, mask, seq_aux), **CLOSE)


@pytest.mark.parametrize("seq_aux", (True, False))
def test_even_load_is_the_least(build: Build, seq_aux: bool) -> None:
    moe = block(build, num_experts_per_tok=1, seq_aux=seq_aux, aux_loss_alpha=0.5).train()
    with torch.no_grad():
        moe.gate.weight.zero_()[:, :4] = torch.eye(4) * 50  # token i of the basis goes to expert i

    def balance(*experts: int) -> float:
        return moe(torch.eye(64)[list(experts)][None], None)[1].item()

    assert balance(0, 1, 2, 3) == pytest.approx(0.5)
    assert balance(0, 0, 1, 2) == pytest.approx(0.5 * 4 * (4 + 1 + 1) / 16)
    assert balance(0, 0, 0, 0) == pytest.approx(0.5 * 4)


def test_even_over_the_batch_is_not_even_in_each_sequence(build: Build) -> None:
    x = torch.stack((torch.eye(64)[[0] * 4], torch.eye(64)[[1] * 4]))
    losses = []
    for seq_aux in (True, False):
        moe = block(build, num_experts_per_tok=1, seq_aux=seq_aux, aux_loss_alpha=1.0).train()
        with torch.no_grad():
            moe.gate.weight.zero_()[:, :4] = torch.eye(4) * 50
        losses.append(moe(x, None)[1].item())
    assert losses == pytest.approx([4.0, 2.0])


def test_the_balance_loss_evens_the_load(build: Build) -> None:
    moe, x = block(build, aux_loss_alpha=1.0).train(), stream(1, 64)
    with torch.no_grad():
        moe.gate.weight[0] += x[0].mean(dim=0)  # some experts are chosen far more often

    def most_chosen() -> int:
        return moe.gate(x, None)[1].flatten().bincount(minlength=4).max().item()

    before = most_chosen()
    optimizer = torch.optim.SGD([moe.gate.weight], lr=1.0)
    for _ in range(30):
        optimizer.zero_grad()
        moe(x, None)[1].backward()
        optimizer.step()
    assert most_chosen() < before and most_chosen() <= 40  # 32 each when even


def test_the_balance_loss_is_part_of_the_training_loss_alone(build: Build) -> None:
    model = build(use_moe=True, aux_loss_alpha=0.1)
    ids = torch.arange(3, 23).view(2, 10)
    evaluated = model(ids, labels=ids)
    trained = model.train()(ids, labels=ids)
    assert evaluated.aux_loss is None
    assert trained.aux_loss.item() > 0.1 * 2 * 0.9  # two layers, each about alpha or more
    torch.testing.assert_close(trained.loss, evaluated.loss + trained.aux_loss, **CLOSE)
    assert trained.aux_loss.requires_grad
    body = model.hidden_states(ids)
    torch.testing.assert_close(body.balance_loss, trained.aux_loss, rtol=0, atol=0)
    without = build(use_moe=True, aux_loss_alpha=0.0).train()(ids, labels=ids)
    assert without.aux_loss is None
    torch.testing.assert_close(without.loss, evaluated.loss, **CLOSE)


def test_padding_is_no_load(build: Build) -> None:
    model = build(use_moe=True, aux_loss_alpha=1.0).train()
    ids = torch.arange(3, 23).view(2, 10)
    alone = model(ids).aux_loss
    padded = torch.cat((torch.zeros(2, 6, dtype=torch.long), ids), dim=1)
    mask = (torch.arange(16) >= 6).long().expand(2, -1)
    torch.testing.assert_close(model(padded, attention_mask=mask).aux_loss, alone, **CLOSE)
    assert abs(model(padded).aux_loss - alone) > 1e-2


def test_padding_beside_a_mask_of_pairs_is_no_load(build: Build) -> None:
    """As in packed chats, whose attention mask says nothing about the padded tail."""
    model = build(use_moe=True).train()
    tokens = torch.randint(3, 100, (2, 8), generator=torch.Generator().manual_seed(2))
    token_mask = torch.ones(2, 8, dtype=torch.bool)
    token_mask[:, 5:] = False
    pairs = torch.ones(2, 1, 8, 8, dtype=torch.bool).tril()
    edited = torch.where(token_mask, tokens, (tokens + 20) % 90)
    was, now, counted = (
        model(ids, attention_mask=pairs, token_mask=mask).aux_loss
        for ids, mask in ((tokens, token_mask), (edited, token_mask), (edited, None))
    )
    torch.testing.assert_close(now, was, rtol=0, atol=0)
    assert not torch.equal(counted, was)


def test_parts_of_a_batch_add_up_by_their_tokens(build: Build) -> None:
    model = build(use_moe=True, aux_loss_alpha=1.0).train()
    ids = torch.arange(3, 33).view(3, 10)
    lengths = torch.tensor([10, 4, 7])
    mask = (torch.arange(10) < lengths[:, None]).long()
    whole = model(ids, attention_mask=mask).aux_loss
    parts = [model(ids[i : i + 1, : lengths[i]]).aux_loss * lengths[i] for i in range(3)]
    torch.testing.assert_close(whole, sum(parts) / lengths.sum(), **CLOSE)


def test_parts_of_an_accumulated_batch_share_it_by_their_labels(build: Build) -> None:
    """``Trainer`` adds up the losses of parts that it tells the number of all labels."""
    model = build(use_moe=True, aux_loss_alpha=1.0).train()
    ids = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(torch.tensor([[True] * 8 + [False] * 4, [False] * 12]), -100)
    parts, n_labels = ids.split(1), (4, 11)  # nothing is before the first of the second
    pairs = list(zip(parts, labels.split(1), strict=True))
    got = [model(part, labels=label, num_items_in_batch=15).loss for part, label in pairs]
    means = [model(part, labels=label).loss for part, label in pairs]
    expected = sum(n / 15 * mean for n, mean in zip(n_labels, means, strict=True))
    torch.testing.assert_close(sum(got), expected, **CLOSE)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    for part, label, loss in zip(parts, shifted.split(1), got, strict=True):
        again = model(part, shift_labels=label, num_items_in_batch=torch.tensor(15)).loss
        torch.testing.assert_close(again, loss, **CLOSE)


def test_an_idle_expert_has_a_gradient_of_zero(build: Build) -> None:
    model = build(use_moe=True).train()  # DDP waits for ever for a parameter without one
    ids = torch.tensor([[5]])  # one token: two of four experts are idle
    model(ids, labels=torch.tensor([[5]]), shift_labels=torch.tensor([[6]])).loss.backward()
    for layer in model.layers:
        experts = layer.feed_forward.experts
        assert all(p.grad is not None for p in experts.parameters())
        busy = sum(bool(expert.w2.weight.grad.any()) for expert in experts)
        assert busy == 2


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
def test_it_runs_in_any_dtype(build: Build, dtype: torch.dtype, training: bool) -> None:
    moe, x = block(build).to(dtype).train(training), stream().to(dtype)
    y, balance, _ = moe(x, None)
    assert y.dtype == dtype
    expected = token_by_token(moe.float(), x.float(), normalise=True)
    # a token whose second and third expert nearly tie may be routed otherwise when rounded
    near = (y.float() - expected).abs().amax(dim=-1) < 30 * torch.finfo(
        dtype
    ).eps * expected.abs().max()
    assert near.float().mean() > 0.9
    assert (balance is None) is not training
    assert balance is None or balance.dtype == torch.float32
