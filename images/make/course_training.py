"""Draw learning rates, the loss of three small runs, and what optimizers make of a gradient:
python images/make/course_training.py

The runs are of the project's model, data, loss, schedule and optimizers, 80 updates each on
dataset/demo/pretrain.jsonl: half a minute on one core.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from style import BLUE, FAINT, GREEN, ORANGE, chart, save

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from model.dataset import TrainingData, pretrain_data  # noqa: E402
from model.LMConfig import LMConfig  # noqa: E402
from model.losses import language_model_loss  # noqa: E402
from model.model import MiniMindForCausalLM  # noqa: E402
from model.optim import learning_rate_at, lying, make_optimizer, orthogonalized  # noqa: E402
from model.order import Sampler  # noqa: E402
from model.tokenizer import Tokenizer  # noqa: E402

STEPS, ROWS, WARMUP = 80, 4, 4
RUNS = {  # optimizer, peak rate, colour
    "AdamW, 2e-3": ("adamw", 2e-3, FAINT),
    "AdamW, 8e-3": ("adamw", 8e-3, ORANGE),
    "Muon, 4e-3": ("muon", 4e-3, BLUE),
}


def train(data: TrainingData, name: str, peak: float) -> tuple[list[float], dict]:
    """Return the losses of a run, and the optimizer's state of one matrix."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(LMConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2))
    optimizer = make_optimizer(model, name, peak, weight_decay=0.1)
    sampler = Sampler(data.n_rows, seed=1, epochs=2)
    losses = []
    for step in range(STEPS):
        lr = learning_rate_at(step, STEPS, peak, "linear", WARMUP)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("rate_factor", 1.0)
        batch = data.batch(sampler.rows(range(step * ROWS, step * ROWS + ROWS)))
        loss = language_model_loss(model, batch).loss / batch.n_units
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    matrix = model.layers[0].feed_forward.w1.weight
    return losses, optimizer.state[matrix]


def singular_values(matrix: torch.Tensor) -> np.ndarray:
    """Return a matrix's singular values as shares of the largest, falling."""
    values = torch.linalg.svdvals(matrix.double())
    return (values / values[0]).numpy().round(4)


def draw_schedules(axes) -> None:
    for schedule, colour in (("linear", BLUE), ("cosine", ORANGE), ("constant", FAINT)):
        rates = [learning_rate_at(step, STEPS, 1.0, schedule, WARMUP) for step in range(STEPS)]
        axes.plot(rates, color=colour, label=schedule)
    axes.set_title("rate, of the peak", fontsize=10)
    axes.set_xlabel("update")
    axes.legend(fontsize=8, loc="lower left")


def main() -> None:
    torch.set_num_threads(1)  # the same sums in the same order
    figure, (schedules, losses, spectra) = chart(7.6, 3.2, columns=3)
    draw_schedules(schedules)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(shutil.copy(ROOT / "dataset/demo/pretrain.jsonl", folder))
        data = pretrain_data(path, Tokenizer(), max_seq_len=128, log=lambda text: None)
        for label, (name, peak, colour) in RUNS.items():
            values, state = train(data, name, peak)
            losses.plot(np.round(values, 2), color=colour, label=label)
    losses.set_title("training loss, nats", fontsize=10)
    losses.set_xlabel("update")
    losses.legend(fontsize=8)

    momentum = lying(state["momentum_buffer"])  # of the last run, Muon's
    spectra.plot(singular_values(momentum), color=FAINT, label="momentum")
    spectra.plot(singular_values(momentum.sign()), color=ORANGE, label="its signs")
    spectra.plot(singular_values(orthogonalized(momentum[None])[0]), color=GREEN, label="Muon")
    spectra.set_title("singular values, sorted", fontsize=10)
    spectra.set_ylim(0, 1.05)
    spectra.set_xlabel("number")
    spectra.legend(fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.72))
    save(figure, "course/training")


if __name__ == "__main__":
    main()
