"""Draw loss curves: python images/make/curves.py [FOLDER...]

FOLDERs are runs' records with a metrics.jsonl, drawn from left to right, each over its own tokens:
the loss of training and the held-out loss, in nats per trained token, for preferences the loss of
DPO. Their points are kept in images/make/curves.json; without FOLDERs those are drawn again. The
points there are of the demo's three stages on one thread: the commands that make demo prints, with
--log_interval 10, 20, 1 and --eval_interval 20, 100, 5 for more points. After make demo itself:

    python images/make/curves.py out/demo/logs/{pretrain_192,full_sft_multi_192,dpo_192}
"""

import argparse
import json
import math
import sys
from pathlib import Path

from style import BLUE, FAINT, IMAGES, ORANGE, chart, save

sys.path.insert(0, str(IMAGES.parent))

from model.metrics import Reference  # noqa: E402

POINTS = Path(__file__).with_suffix(".json")
TITLES = {"pretrain": "pretraining", "full_sft": "fine-tuning", "dpo": "preferences"}


def read_run(folder: Path) -> dict:
    """Return the points of a run: tokens and loss of training and of what was held out."""
    records = Reference(str(folder)).records
    curves = {
        name: [[r["tokens"], round(r[key], 4)] for r in records if key in r]
        for name, key in (("training", "loss"), ("held out", "val_loss"))
    }
    return {"run": folder.name, **curves}


def draw(runs: list[dict]) -> None:
    figure, panels = chart(8.4, 3.1, len(runs))
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    for axes, run in zip(panels, runs, strict=True):
        last = run["held out"][-1]
        thousands = [[[t / 1000, loss] for t, loss in run[k]] for k in ("training", "held out")]
        axes.plot(*zip(*thousands[0], strict=True), color=BLUE, linewidth=1.2, label="training")
        axes.plot(*zip(*thousands[1], strict=True), color=ORANGE, linewidth=1.6, marker="o",
                  markersize=3, label="held out")  # fmt: skip
        axes.set_title(f"{last[1]:.3f}", fontsize=10, color=ORANGE, loc="right")
        axes.set_xlim(left=0)
        if run["run"].startswith("dpo"):
            axes.axhline(math.log(2), color=FAINT, linestyle=(0, (4, 3)), linewidth=1)
            axes.annotate("log 2", (last[0] / 1000, math.log(2)), xytext=(0, -4), fontsize=9,
                          textcoords="offset points", ha="right", va="top")  # fmt: skip
            axes.set_ylabel("loss of DPO, nats per pair")
        else:
            axes.set_ylim(bottom=0)
            axes.set_ylabel("loss, nats per token")
        title = next((t for start, t in TITLES.items() if run["run"].startswith(start)), run["run"])
        axes.set_title(title, fontsize=11, fontweight="bold", loc="left")
        axes.set_xlabel("thousand tokens seen")
    panels[0].legend(loc="upper right")
    save(figure, "curves")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    if args.folders:
        runs = [read_run(folder) for folder in args.folders]
        POINTS.write_text("[\n " + ",\n ".join(json.dumps(run) for run in runs) + "\n]\n")
    draw(json.loads(POINTS.read_text()))


if __name__ == "__main__":
    main()
