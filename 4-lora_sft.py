"""Stage 4, an adapter for your own data: python 4-lora_sft.py --data_path my.jsonl

Freezes the fine-tuned model and trains small low-rank matrices beside its layers (LoRA). Reads
{"messages": […]}, ShareGPT conversations, alpaca instruction/input/output, or the CSVs of
data_process.py, and says how it read them. Leaves an adapter in PEFT's format in out/lora_<dim>/:
python 2-eval.py --lora out/lora_512 --interactive

The example that ships makes the demo model another one, and measures what it costs:
python 4-lora_sft.py --data_path dataset/demo/identity.jsonl --out_dir out/demo \\
    --init_from out/demo/rl_192.pth --batch_size 4 \\
    --quiz dataset/demo/identity_quiz.jsonl dataset/demo/quiz.jsonl
"""

import argparse

from model.flags import (
    lora_flags,
    parse_training_args,
    quick_imports,
    quiz_flag,
    run_main,
    training_parser,
)

SAMPLE_CHAT = [{"role": "user", "content": "你是谁？"}]  # answered after each validation
ENOUGH_UPDATES = 200  # what a few dozen rows take to be learnt; --epochs says otherwise


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = training_parser(
        __doc__,
        data_path="dataset/sft_data_single.csv",
        epochs=3.0,
        learning_rate=5e-4,
        weight_decay=0.0,
        v1={"epochs": 20.0, "batch_size": 32, "accumulation_steps": 1},
    )
    lora = lora_flags(parser)
    lora.add_argument("--lora", metavar="FOLDER", help="an adapter to go on with (default: new)")
    quiz_flag(parser)
    return parse_training_args(parser, argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with quick_imports():
        from model.checkpoint import start_adapter  # torch comes in here
        from model.dataset import sft_data
        from model.lora import describe
        from model.opening import open_stage
        from model.quiz import BeforeAndAfter, load_quizzes
        from model.trainer import train

    quizzes = load_quizzes(args.quiz)
    runtime, start, data = open_stage(args, after="full_sft_single", make_data=sft_data)
    if args.show_samples:
        runtime.log(data.show(args.show_samples, args.seed))
        return 0
    if "epochs" in args.from_recipe and args.recipe == "best":
        if "batch_size" in args.from_recipe:  # no row twice in an update
            args.batch_size = min(args.batch_size, max(1, data.n_rows // runtime.world_size))
        n_update = args.batch_size * args.accumulation_steps * runtime.world_size
        args.epochs = max(args.epochs, ENOUGH_UPDATES * n_update / data.n_rows)
    start_adapter(start, args, runtime.dtype)
    runtime.log(f"adapter     {describe(start.model)}")
    quiz = BeforeAndAfter(start, {} if args.dry_run else quizzes, runtime)
    code = train(
        start,
        data,
        args,
        runtime,
        stage="lora",
        sample_prompt=start.tokenizer.encode_chat(SAMPLE_CHAT, add_generation_prompt=True),
        validate_first=True,
    )
    if code == 0:  # not after a stop: the resumed run tells
        quiz.tell()
    return code


if __name__ == "__main__":
    run_main(main)
