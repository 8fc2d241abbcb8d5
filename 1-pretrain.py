"""Stage 1, pretraining: python 1-pretrain.py --data_path dataset/pretrain_data.csv

Reads the table that data_process.py writes (or any .jsonl or .txt of documents), tokenises it once
into a token store beside it, and leaves the weights in out/pretrain_<dim>.pth.
"""

import argparse

from model.flags import parse_training_args, quick_imports, run_main, training_parser

SAMPLE_TEXT = "中国的"  # continued after each validation


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = training_parser(
        __doc__,
        data_path="dataset/pretrain_data.csv",
        optimizer="muon",
        learning_rate=4e-3,
        min_updates=128,
        v1={"epochs": 5.0},
    )
    return parse_training_args(parser, argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with quick_imports():
        from model.dataset import pretrain_data  # torch comes in here: after --help and wrong flags
        from model.opening import open_stage
        from model.trainer import train

    runtime, start, data = open_stage(args, after=None, make_data=pretrain_data)
    if args.show_samples:
        runtime.log(data.show(args.show_samples, args.seed))
        return 0
    return train(
        start,
        data,
        args,
        runtime,
        stage="pretrain",
        sample_prompt=start.tokenizer.encode_document(SAMPLE_TEXT)[:-1],
    )


if __name__ == "__main__":
    run_main(main)
