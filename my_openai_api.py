"""Serve models with OpenAI's API: python my_openai_api.py [--weights FILE] [--port 8000]

Then, with any client of that API, its base URL being http://127.0.0.1:8000/v1:

    curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\
      -d '{"model": "any", "messages": [{"role": "user", "content": "你好"}], "stream": true}'

Without --weights or --load_from it takes the best chat model in out/, as 2-eval.py does. What a
request does not say (temperature, top_k, ...) is as the sampling flags say.
"""

import argparse
import os

from model.flags import non_negative, positive, quick_imports, run_main, weights_flags
from model.script_parser import ScriptParser
from model.terminal import sampling_flags

KEY_VARIABLE = "MINIMIND_API_KEY"


def port(text: str) -> int:
    """Parse a TCP port, as an argparse type."""
    value = int(text)
    if not 0 <= value < 65536:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 (any free one) and 65535")
    return value


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    group = parser.add_argument_group("server")
    add = group.add_argument
    add("--host", default="127.0.0.1", help="default %(default)s; 0.0.0.0: the whole network")
    add("--port", type=port, default=8000, help="default %(default)s; 0: any free one")
    add(
        "--add_model",
        action="append",
        default=[],
        metavar="[NAME=]PATH[+ADAPTER]",
        help="another model that requests can name; repeatable",
    )
    add("--strict_model", action="store_true", help="404 for unknown names, not the first model")
    add("--max_batch", type=positive(int), default=8, help="answers at once (default %(default)s)")
    add("--max_queue", type=positive(int), default=64, help="that may wait (default %(default)s)")
    add(
        "--deterministic",
        action="store_true",
        help="answers do not depend on what else is being answered, bit for bit; slower",
    )
    add(
        "--api_key",
        metavar="KEY",
        help=f"what clients must send; better in the environment, as {KEY_VARIABLE}",
    )
    add(
        "--allowed_origins",
        nargs="+",
        default=["*"],
        metavar="ORIGIN",
        help="web pages that may call from a browser (default: all)",
    )
    add("--max_body_mb", type=positive(float), default=8.0, help="default %(default)s")
    add(
        "--drain_s",
        type=non_negative(float),
        default=30.0,
        help="seconds for answers under way after SIGTERM or Ctrl-C (default %(default)s)",
    )
    weights_flags(parser)
    sampling_flags(parser, max_new_tokens=None, temperature=0.7, top_k=16)
    args = parser.parse_args(argv)
    if args.api_key is not None and not args.api_key.strip():
        parser.error("--api_key is empty: give a key, or leave it out to serve without")
    args.api_key = args.api_key or os.environ.get(KEY_VARIABLE) or None
    return args


def main() -> None:
    args = parse_args()
    with quick_imports():
        from model.api_run import serve  # torch comes in here

    serve(args)


if __name__ == "__main__":
    run_main(main)
