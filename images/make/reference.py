"""Draw the reference curves of docs/reference: python images/make/reference.py"""

import sys

from style import IMAGES, chart, save

sys.path.insert(0, str(IMAGES.parent))

from model.metrics import REFERENCES, points, read_records  # noqa: E402

PANELS = {
    "pretrain_512": "1-pretrain.py, 26.9 M parameters, real text",
    "demo_pretrain_192": "1-pretrain.py, the demo",
    "demo_full_sft_multi_192": "3-full_sft.py, the demo",
}


def main() -> None:
    figure, panels = chart(10.0, 3.2, columns=len(PANELS))
    for axes, (name, title) in zip(panels, PANELS.items(), strict=True):
        records = read_records(REFERENCES / f"{name}.jsonl")
        axes.plot(*zip(*points(records, "loss"), strict=True), linewidth=1, label="training")
        axes.plot(
            *zip(*points(records, "val_loss"), strict=True), "o-", markersize=3, label="held out"
        )
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("million tokens")
        axes.set_ylim(bottom=0 if "demo" in name else None)
    panels[0].set_ylabel("loss, nats per trained token")
    panels[0].legend()
    save(figure, "reference")


if __name__ == "__main__":
    main()
