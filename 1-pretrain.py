"""Stage 1, pretraining: python 1-pretrain.py --data_path dataset/pretrain_data.csv

Reads the table that data_process.py writes (or any .jsonl or .txt of documents), tokenises it once
into a token store beside it, and leaves the weights in out/pretrain_<dim>.pth.
"""

import argparse
from pathlib import Path

from model.flags import parse_training_args, run_main, training_parser

SAMPLE_TEXT = "中国的"  # continued after each validation


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = training_parser(
        __doc__, data_path="dataset/pretrain_data.csv", epochs=1.0, v1={"epochs": 5.0}
    )
    return parse_training_args(parser, argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from model.checkpoint import start_model  # torch comes in here: after --help and wrong flags
    from model.dataset import pretrain_data
    from model.runtime import setup
    from model.trainer import train

    where = args.device, args.dtype, args.seed, args.num_workers
    runtime = setup(*where, zero_stage=args.zero_stage)
    start = start_model(args, after=None)
    with runtime.main_first():  # the others find the token store that it makes
        data = pretrain_data(
            Path(args.data_path),
            start.tokenizer,
            start.model.config.max_seq_len,
            val_path=args.val_data_path and Path(args.val_data_path),
            recipe=args.recipe,
            log=runtime.log,
        )
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
