"""The chat page: python fast_inference.py

Opens on http://127.0.0.1:8501; the same by streamlit's own command, whose flags come before the --:
streamlit run fast_inference.py -- --weights FILE --out_dir out

It talks to the best weights below --out_dir, or to what --weights or --load_from names; others,
with adapters and exported folders, are chosen on the page. --base_url connects it to an
OpenAI-style server instead, such as my_openai_api.py.
"""

import argparse
import os
import sys

from model.flags import positive, run_main, weights_flags
from model.script_parser import ScriptParser
from model.terminal import check_history, history_flag, sampling_flags


def parse_args(argv: list[str] | None = None, *, in_page: bool = False) -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    if in_page:  # to be shown there, where nobody reads stderr
        parser.error = raise_value_error
    page = parser.add_argument_group("page")
    page.add_argument("--host", default="127.0.0.1", help="0.0.0.0: for other machines too")
    page.add_argument("--port", type=positive(int), help="default 8501, or the next free one")
    page.add_argument("--base_url", metavar="URL", help="talk to this OpenAI-style server")
    page.add_argument(
        "--api_key",
        help="for --base_url, and sent nowhere else; visitors use it and do not see it (default: "
        "OPENAI_API_KEY)",
    )
    history_flag(page)
    weights_flags(parser)
    sampling_flags(parser, max_new_tokens=512, temperature=0.7, top_k=16)
    args = parser.parse_args(argv)
    check_history(parser, args)
    if args.api_key and not args.base_url:
        parser.error("--api_key needs --base_url, the only address that it is sent to")
    if args.base_url and args.api_key is None:
        args.api_key = os.environ.get("OPENAI_API_KEY")
    return args


def raise_value_error(message: str) -> None:
    raise ValueError(message)


def check_named(args: argparse.Namespace) -> None:
    """Raise now, not on the page, if a flag names a model that is not there."""
    if args.weights or args.load_from or args.lora:
        from model.lora import read_adapter_config
        from model.model_list import chosen_model

        chosen_model(args)
        if args.lora:
            read_adapter_config(args.lora)


def is_page() -> bool:
    """Say whether streamlit runs this file, not the user."""
    if "streamlit" not in sys.modules:
        return False
    from streamlit.runtime.scriptrunner import get_script_run_ctx

    return get_script_run_ctx(suppress_warning=True) is not None


def show() -> None:
    """Draw the page, once for each click."""
    import streamlit as st

    try:
        args = parse_args(in_page=True)
    except ValueError as error:
        st.error(f"启动参数有误 / wrong flags: {error}")
        st.stop()
    from model.page import show_page

    show_page(args)


def main() -> None:
    """Run this file as streamlit runs a page; does not return."""
    args = parse_args()
    check_named(args)
    from streamlit.web import cli

    options = {
        "server.address": args.host,
        "browser.gatherUsageStats": "false",
        "server.showEmailPrompt": "false",
        "server.fileWatcherType": "none",
        "client.toolbarMode": "viewer",
        "runner.fastReruns": "false",  # true stops an answer at any click, see model/page.py
        "theme.light.primaryColor": "#3b6fd4",
        "theme.dark.primaryColor": "#7aa2f7",
    }
    if args.port:
        options["server.port"] = str(args.port)
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    cli.main(["run", os.path.abspath(__file__), *flags, "--", *sys.argv[1:]])


if __name__ == "__main__":
    if is_page():  # a statement: streamlit shows the value of a line that is an expression
        show()
    else:
        run_main(main)
