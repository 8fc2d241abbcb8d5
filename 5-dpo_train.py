"""Stage 5, preference tuning: python 5-dpo_train.py --data_path dataset/dpo/train_data.json

Direct preference optimisation (DPO, arXiv:2305.18290): makes the answers that people chose likelier
than those they rejected, measured against the fine-tuned model it starts from. Reads the table of
data_process.py or any raw form of it. Leaves out/rl_<dim>.pth, or with --lora an adapter in
out/lora_rl_<dim>/.
"""

import argparse

from model.flags import (
    lora_flags,
    non_negative,
    parse_training_args,
    positive,
    quick_imports,
    quiz_flag,
    run_main,
    training_parser,
)

SAMPLE_CHAT = [{"role": "user", "content": "你是谁？"}]  # answered after each validation


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = training_parser(
        __doc__,
        data_path="dataset/dpo/train_data.json",
        epochs=1.0,
        batch_size=4,
        learning_rate=5e-5,
        weight_decay=0.0,
        v1={"learning_rate": 1e-5, "batch_size": 8, "accumulation_steps": 1},
    )
    add = parser.add_argument_group("preferences (DPO)").add_argument
    add("--beta", type=positive(float), default=0.1, help="how close to stay (default %(default)s)")
    add(
        "--label_smoothing",
        type=non_negative(float),
        default=0.0,
        help="share of pairs thought to be the wrong way round (default %(default)s)",
    )
    add(
        "--reference",
        choices=("precomputed", "live"),
        default="precomputed",
        help="measure the start once and keep it beside the data, or keep it in memory",
    )
    lora = lora_flags(parser)
    lora.add_argument(
        "--lora",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="train an adapter: a new one, or the one in FOLDER",
    )
    quiz_flag(parser)
    args = parse_training_args(parser, argv)
    if args.label_smoothing >= 0.5:
        parser.error(f"--label_smoothing {args.label_smoothing} is not below 0.5")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from copy import deepcopy  # torch comes in here

    with quick_imports():
        from model.checkpoint import start_adapter, weights_digest
        from model.lora import describe
        from model.losses import PreferenceLoss
        from model.opening import open_stage
        from model.pairs import dpo_data
        from model.quiz import BeforeAndAfter, load_quizzes
        from model.trainer import train

    quizzes = load_quizzes(args.quiz)
    runtime, start, data = open_stage(args, after="full_sft_single", make_data=dpo_data)
    if args.show_samples:
        runtime.log(data.show(args.show_samples, args.seed))
        return 0
    if args.lora is not None:
        start_adapter(start, args, runtime.dtype)
        runtime.log(f"adapter     {describe(start.model)}")
    start.model.to(runtime.device)
    data.reference_digest = weights_digest(start.model)
    reference = None
    if args.reference == "live":
        reference = deepcopy(start.model).eval().requires_grad_(False)
    elif not args.dry_run:
        data.measure_reference(start.model, runtime)
    quiz = BeforeAndAfter(start, {} if args.dry_run else quizzes, runtime)
    code = train(
        start,
        data,
        args,
        runtime,
        stage="dpo" if args.lora is None else "lora_dpo",
        loss_fn=PreferenceLoss(args.beta, args.label_smoothing, reference),
        sample_prompt=start.tokenizer.encode_chat(SAMPLE_CHAT, add_generation_prompt=True),
        validate_first=True,
    )
    if code == 0:  # not after a stop: the resumed run tells
        quiz.tell()
    return code


if __name__ == "__main__":
    run_main(main)
