"""Stage 3, supervised fine-tuning: python 3-full_sft.py --data_path dataset/sft_data_single.csv

Teaches a pretrained model to answer. --chat single starts from out/pretrain_<dim>.pth and leaves
out/single_chat/full_sft_<dim>.pth; --chat multi starts from there and leaves
out/multi_chat/full_sft_<dim>.pth. Trained are the assistant's words and their end token, of every
turn.
"""

import argparse
from pathlib import Path

from model.flags import parse_training_args, quick_imports, run_main, training_parser

SAMPLE_CHAT = [{"role": "user", "content": "你是谁？"}]  # answered after each validation


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = training_parser(
        __doc__,
        data_path="dataset/sft_data_single.csv",
        epochs=2.0,
        learning_rate=6e-4,
        v1={"epochs": 6.0, "learning_rate": 1e-5, "batch_size": 32, "accumulation_steps": 1},
    )
    parser.add_argument(
        "--chat",
        choices=("single", "multi"),
        help="default: single where the table's name says so, multi otherwise",
    )
    args = parse_training_args(parser, argv)
    if args.chat is None:
        args.chat = "single" if "single" in Path(args.data_path).stem else "multi"
    if args.chat == "multi" and args.recipe == "v1" and "epochs" in args.from_recipe:
        args.epochs = 5.0
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with quick_imports():
        from model.dataset import sft_data  # torch comes in here: after --help and wrong flags
        from model.opening import open_stage
        from model.trainer import train

    after = "pretrain" if args.chat == "single" else "full_sft_single"
    runtime, start, data = open_stage(args, after=after, make_data=sft_data)
    if args.show_samples:
        runtime.log(data.show(args.show_samples, args.seed))
        return 0
    return train(
        start,
        data,
        args,
        runtime,
        stage=f"full_sft_{args.chat}",
        sample_prompt=start.tokenizer.encode_chat(SAMPLE_CHAT, add_generation_prompt=True),
    )


if __name__ == "__main__":
    run_main(main)
