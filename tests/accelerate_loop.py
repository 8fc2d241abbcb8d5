"""A training loop as its users write it: accelerate launch accelerate_loop.py FOLDER

Trains the model saved in the folder on its rows.pt, two micro-batches of eight rows a step over all
processes, and leaves there what each process ends with.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from model.model import MiniMindForCausalLM

LEARNING_RATE, EPOCHS, ROWS = 0.3, 3, 8


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = MiniMindForCausalLM.from_pretrained(folder).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    rows = DataLoader(torch.load(folder / "rows.pt"), batch_size=ROWS // accelerator.num_processes)
    model, optimizer, rows = accelerator.prepare(model, optimizer, rows)
    losses = []
    for _ in range(EPOCHS):
        for batch in rows:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(accelerator.gather(loss.detach()).mean().item())
    state = accelerator.unwrap_model(model).state_dict()
    torch.save({"losses": losses, "state": state}, folder / f"{accelerator.process_index}.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
