"""Chat with an OpenAI-style server: python chat_openai_api.py --base_url http://127.0.0.1:8000/v1

Start ours with `python my_openai_api.py`; any other will do too. OPENAI_BASE_URL and OPENAI_API_KEY
count where --base_url and --api_key are not given. Ctrl-C stops an answer; /help lists the
commands. Reads from a pipe as well: echo 你好 | python chat_openai_api.py
"""

import argparse
import os
import sys

from model.flags import run_main
from model.remote import DEFAULT_URL
from model.script_parser import ScriptParser
from model.terminal import check_history, history_flag, sampling_flags

SAMPLING = (
    "max_new_tokens temperature top_k top_p min_p repetition_penalty presence_penalty "
    "frequency_penalty stop seed"
).split()


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Says of options that are not given who decides."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return (action.help or "").replace("default %(default)s", "default: the server's")


def parse_args() -> argparse.Namespace:
    parser = ScriptParser(__doc__, formatter_class=Formatter)
    url = os.environ.get("OPENAI_BASE_URL") or DEFAULT_URL
    where = f"default: OPENAI_BASE_URL or {DEFAULT_URL}"
    parser.add_argument("--base_url", default=url, help=where)
    parser.add_argument("--model", default="minimind", help="its name on the server (minimind)")
    parser.add_argument(
        "--api_key",
        default=os.environ.get("OPENAI_API_KEY") or "none",
        help="default: OPENAI_API_KEY; ours asks for one only where it was started with one",
    )
    parser.add_argument("--system", default="", metavar="TEXT", help="a system text")
    history_flag(parser)
    sampling_flags(parser, **dict.fromkeys(set(SAMPLING) - {"stop"}))
    args = parser.parse_args()
    check_history(parser, args)
    if not args.base_url.startswith(("http://", "https://")):
        parser.error(f"--base_url {args.base_url} does not begin with http:// or https://")
    if not args.api_key.isascii():
        parser.error("--api_key has letters that no HTTP header may have: only ASCII")
    return args


def main() -> int:
    args = parse_args()
    from openai import OpenAI, Timeout

    from model.terminal_client import LABEL, TerminalClient, read_lines

    api = OpenAI(
        base_url=args.base_url,
        api_key=args.api_key,
        max_retries=0,  # the user sees at once what is wrong, and has /retry
        timeout=Timeout(600, connect=10),
    )
    sampling = {name: getattr(args, name) for name in SAMPLING}
    client = TerminalClient(api, args.model, sampling, args.history_cnt, args.system)
    is_typed = sys.stdin.isatty()
    if is_typed:
        print(f"{args.base_url}, model {args.model}; /help 列出命令 (commands), exit 退出\n")
    for line in read_lines(LABEL):
        client.handle(line)
    return int(bool(client.n_errors) and not is_typed)  # a script wants to know


if __name__ == "__main__":
    run_main(main)
