"""Parameter groups, optimizers, learning-rate schedules."""

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

COOLDOWN_SHARE = (
    0.6  # of the run, in the "linear" schedule: long cool-downs measure best at this size
)
COSINE_FLOOR = 0.1  # v1 ends at a tenth of the peak
# Polar Express (arXiv:2505.16932, section 3.3, algorithm 1): what each iteration does to a singular
# value x, a x + b x^3 + c x^5, so that after five all from 0.001 to 1 are near 1
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
BETAS = (0.9, 0.98)  # of AdamW: small batches want a long memory
EMBEDDING_RATE = 8.0  # times that of the matrices: measured, benchmarks/LOG.md
AT_ONCE = 8  # matrices: more make no product faster, and each takes four times itself meanwhile
LARGEST = 1.01  # no singular value may be above 1 at first: room for rounding


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return the trainable parameters in two groups: matrices decay, embeddings and norms do
    not.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    ids = {id(p) for p in decayed}
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in ids], "weight_decay": 0.0},
    ]


def make_optimizer(
    model: nn.Module,
    name: str,
    learning_rate: float,
    weight_decay: float,
    dtype: torch.dtype = torch.float32,
) -> torch.optim.Optimizer:
    """Return ``adamw`` (arXiv:1711.05101), ``muon`` or v1's
    ``adam``.

    Args:
        dtype: what the run multiplies matrices in, :class:`Muon` too.

    Raises:
        ValueError: another name.
    """
    groups = parameter_groups(model, weight_decay)
    device_types = {p.device.type for g in groups for p in g["params"]}
    fused = device_types <= {"cpu", "cuda", "mps"}
    if name == "muon":
        groups = with_matrices_apart(model, groups)
    groups = [g for g in groups if g["params"]]
    if name == "muon":
        if not any(group["orthogonal"] for group in groups):
            raise ValueError(
                "--optimizer muon finds no matrix between hidden states among what is trained, an "
                "adapter has none: use adamw"
            )
        return Muon(groups, learning_rate, dtype, fused=fused)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, fused=fused)
    if name == "adam":
        return torch.optim.Adam(groups, lr=learning_rate, fused=fused)
    raise ValueError(f'optimizer={name!r} is unknown: use "adamw", "muon" or "adam"')


def with_matrices_apart(model: nn.Module, groups: list[dict]) -> list[dict]:
    """Return the groups, first those of matrices between hidden states, ``orthogonal``;
    embeddings and norms learn faster.
    """
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    linear -= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices, others = [], []
    # of what decays, a mixture's gate is left
    for group, factor in zip(groups, (1.0, EMBEDDING_RATE), strict=True):
        parts = {True: [], False: []}
        for parameter in group["params"]:
            parts[id(parameter) in linear].append(parameter)
        matrices.append({**group, "params": parts[True], "orthogonal": True})
        others.append({**group, "params": parts[False], "orthogonal": False, "rate_factor": factor})
    return matrices + others


class Muon(torch.optim.Optimizer):
    """Muon for matrices between hidden states: the update is the momentum with all its singular
    values set to 1 (kellerjordan.github.io/posts/muon; arXiv:2502.16982, section 2). Scaled to
    AdamW's usual size (there section 2.2), so that learning rate and decay are like those of AdamW,
    which the other parameters get.

    Matrices of one shape, lying or standing, go through the iterations as one batch.

    Args:
        groups: of parameters; those that are ``orthogonal`` are matrices.
        dtype: what the iterations are computed in if it is bf16; otherwise they are in fp32.
        fused: AdamW in one kernel.
    """

    def __init__(
        self,
        groups: list[dict],
        lr: float,
        dtype: torch.dtype = torch.float32,
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = BETAS,
        fused: bool = False,
    ) -> None:
        # in the groups ``load_state_dict`` looks whether the counts of steps are on the device
        super().__init__(groups, {"lr": lr, "fused": fused})
        self.momentum, self.betas = momentum, betas
        self.dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Make an update; a ``closure`` is not taken.

        Raises:
            ValueError: there is one.
        """
        if closure is not None:
            raise ValueError("Muon takes no closure: compute the gradients before step()")
        for group in self.param_groups:
            if group["orthogonal"]:
                self.step_matrices(group)
            else:
                self.step_others(group)

    def step_others(self, group: dict) -> None:
        """Update what is no matrix as AdamW does."""
        parameters = [p for p in group["params"] if p.grad is not None]
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                on = parameter.device if group["fused"] else None
                state["step"] = torch.zeros((), dtype=torch.float32, device=on)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        if not parameters:
            return
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],
            *([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq")),
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
        )

    def step_matrices(self, group: dict) -> None:
        """Update the matrices of a group."""
        batches: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                batches[tuple(sorted(parameter.shape))].append(parameter)
        for parameters in batches.values():
            for i in range(0, len(parameters), AT_ONCE):
                self.step_batch(parameters[i : i + AT_ONCE], group["lr"], group["weight_decay"])

    def step_batch(self, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        """Update matrices of one shape, some of them lying and some standing."""
        momenta = []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffer = state["momentum_buffer"]
            buffer.lerp_(parameter.grad, 1 - self.momentum)
            momentum = parameter.grad.lerp(buffer, self.momentum)  # Nesterov's
            momenta.append(lying(momentum).to(self.dtype))
        updates = orthogonalized(torch.stack(momenta))
        # of that shape, with singular values of 1: a root mean square of 1 / sqrt(longer side)
        rate = lr * 0.2 * max(parameters[0].shape) ** 0.5
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.mul_(1 - lr * weight_decay)
            is_lying = parameter.shape[0] <= parameter.shape[1]
            parameter.add_(update if is_lying else update.T, alpha=-rate)


def lying(matrix: Tensor) -> Tensor:
    """Return a matrix, or its transpose, with no more rows than columns."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def orthogonalized(matrices: Tensor) -> Tensor:
    """Return (n, M, N) matrices, M <= N, with their singular values moved to about 1."""
    norms = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)
    x = matrices / (norms * LARGEST + 1e-7)
    for a, b, c in POLAR_EXPRESS:
        squared = x @ x.mT  # (n, M, M)
        polynomial = torch.baddbmm(squared, squared, squared, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def learning_rate_at(
    step: int, n_steps: int, peak: float, schedule: str, warmup_steps: int
) -> float:
    """Return the rate of update ``step`` (from 0) of ``n_steps``.

    All schedules rise linearly over ``warmup_steps``. ``linear`` stays, then falls to 0 over the
    last 60 % of the run; ``cosine`` falls from the peak to a tenth of it; ``constant`` stays.

    Raises:
        ValueError: another schedule.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    if schedule == "cosine":
        progress = (step - warmup_steps) / max(1, n_steps - warmup_steps)
        floor = COSINE_FLOOR * peak
        return floor + (peak - floor) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
    if schedule == "linear":
        left = (n_steps - step) / max(1.0, COOLDOWN_SHARE * n_steps)
        return peak * max(0.0, min(1.0, left))
    raise ValueError(f'schedule={schedule!r} is unknown: use "linear", "cosine" or "constant"')
