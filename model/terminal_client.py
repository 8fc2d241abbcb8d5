"""A conversation with an OpenAI-style server on a terminal, or through pipes."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .chats import Chat, Reply, to_json, to_markdown
from .remote import explain, is_too_long, read_chunk, request_fields, without_oldest
from .terminal import prepare_input

LABEL = "用户: "
HELP = """\
/clear        忘掉对话，重新开始 (forget the conversation)
/system TEXT  设置系统提示词，不写 TEXT 则取消 (set the system text; nothing: none)
/retry        重新回答上一个问题 (answer the last question again)
/save FILE    保存对话：.json 可再导入，其他为 Markdown (save the conversation)
/help         这些命令 (these commands)
exit          退出，或 Ctrl-D；Ctrl-C 停止回答 (leave; Ctrl-C stops an answer)
//TEXT        发送以 / 开头的文字 (send a text that begins with /)"""


def read_lines(label: str) -> Iterator[str]:
    """Yield the lines that a user types or a pipe holds, until exit or the end.

    Ctrl-C, which may come a moment after the answer it was for, only asks for a second one.
    """
    prepare_input()
    is_typed, was_interrupted = sys.stdin.isatty(), False
    while True:
        try:
            line = input(label if is_typed else "").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            if was_interrupted:
                return
            was_interrupted = True
            print("（再按一次 Ctrl-C 退出 / once more to leave）")
            continue
        was_interrupted = False
        if line in ("exit", "quit"):
            return
        if line:
            if not is_typed:
                print(f"{label}{line}")
            yield line


class TerminalClient:
    """Sends what a user says, prints what comes.

    Args:
        api: an ``openai.OpenAI``.
        sampling: options of ours; None leaves one to the server.
        history_cnt: messages remembered.
    """

    def __init__(
        self, api: Any, model: str, sampling: dict[str, Any], history_cnt: int, system: str = ""
    ) -> None:
        self.api = api
        self.model = model
        self.sampling = sampling
        self.history_cnt = history_cnt
        self.chat = Chat(system=system)
        self.n_errors = 0
        self._saved: set[Path] = set()  # by this client, so it may write them again

    def handle(self, line: str) -> None:
        """Do what a line says; an error is printed, not raised."""
        try:
            if line.startswith("/") and not line.startswith("//"):
                self.command(line)
            else:
                self.answer(self.chat.ask(line.removeprefix("/")))
        except KeyboardInterrupt:  # between the answer and the next line
            print()

    def command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/clear":
            self.chat = Chat(system=self.chat.system)
            print("[已清空 / cleared]\n")
        elif name == "/system":
            self.chat.system = rest
            print("[已设置系统提示词 / set]\n" if rest else "[没有系统提示词 / none]\n")
        elif name == "/retry" and self.chat.turns:
            self.answer(self.chat.answer_again())
        elif name == "/retry":
            self.error("there is no question to answer again")
        elif name == "/save":
            self.save(rest)
        elif name == "/help":
            print(HELP + "\n")
        else:
            self.error(f"{name} is no command: /help lists them, //TEXT sends a text with a slash")

    def save(self, name: str) -> None:
        if not name:
            return self.error("/save needs a file: /save chat.md, or chat.json")
        path = Path(name).expanduser()
        if path.exists() and path.absolute() not in self._saved:
            return self.error(f"{path} exists already: name another file")
        is_json = path.suffix.lower() == ".json"
        text = to_json([self.chat]) if is_json else to_markdown(self.chat)
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            return self.error(f"{path} cannot be written: {error.strerror}")
        self._saved.add(path.absolute())
        print(f"[已保存 / saved: {path}]\n")

    def answer(self, reply: Reply) -> None:
        """Have the last question answered; print the text as it comes."""
        import openai

        messages: list[dict[str, str]] | None = self.chat.messages(self.history_cnt)
        try:
            while messages:
                try:
                    self._stream(messages, reply)
                    break
                except openai.BadRequestError as error:
                    shorter = without_oldest(messages) if is_too_long(error) else None
                    if shorter is None:
                        raise
                    reply.n_left_out += len(messages) - len(shorter)
                    messages = shorter
        except KeyboardInterrupt:  # the stream is closed, so the server stops too
            reply.finish_reason = "cancelled"
            print(" … (已停止)" if reply.text else "(已停止)", end="")
        except (openai.OpenAIError, ValueError) as error:  # ValueError: a stream that is not JSON
            reply.finish_reason = "error"
            print("\n" * bool(reply.text), end="")
            return self.error(explain(error, str(self.api.base_url).rstrip("/"))[1])
        print(f"\n[{speed(reply)}]\n", flush=True)

    def _stream(self, messages: list[dict[str, str]], reply: Reply) -> None:
        sampling = dict(self.sampling)
        if sampling.get("seed") is not None:  # the same seed would give the same answer again
            sampling["seed"] += len(self.chat.turns[-1].replies) - 1
        start = time.perf_counter()
        stream = self.api.chat.completions.create(
            model=self.model,
            messages=messages,
            stream=True,
            stream_options={"include_usage": True},
            **request_fields(sampling),
        )
        with stream:
            if reply.n_left_out:
                print(f"[left out the {reply.n_left_out} oldest messages: they do not fit]")
            print("MiniMind: ", end="", flush=True)
            for chunk in stream:
                delta = read_chunk(chunk)
                now = time.perf_counter()
                if delta.text:
                    reply.text += delta.text  # first: what a user sees when pressing Ctrl-C is kept
                    print(delta.text, end="", flush=True)
                    if reply.first_token_s is None:
                        reply.first_token_s = now - start
                reply.finish_reason = delta.finish_reason or reply.finish_reason
                reply.n_tokens = delta.n_tokens or reply.n_tokens
                reply.n_prompt = delta.n_prompt or reply.n_prompt
        reply.finish_reason = reply.finish_reason or "stop"
        decode_s = time.perf_counter() - start - (reply.first_token_s or 0)
        if reply.n_tokens > 1 and decode_s > 0:
            reply.tokens_per_s = (reply.n_tokens - 1) / decode_s

    def error(self, text: str) -> None:
        """Print one line on stderr; the program goes on."""
        self.n_errors += 1
        sys.stdout.flush()
        print(f"error: {text}\n", file=sys.stderr, flush=True)


def speed(reply: Reply) -> str:
    """Return how an answer went, for people; what the server did not count is left out."""
    parts = [f"prompt {reply.n_prompt} tokens"] if reply.n_prompt else []
    if reply.first_token_s is not None:
        parts.append(f"first text after {reply.first_token_s:.2f} s")
    if reply.n_tokens:
        parts.append(f"answer {reply.n_tokens} tokens")
    if reply.tokens_per_s:
        parts.append(f"{reply.tokens_per_s:,.1f} tokens/s")
    endings = {"length": "cut at the limit", "cancelled": "stopped"}
    parts.append(endings.get(reply.finish_reason or "", ""))
    return ", ".join(filter(None, parts)) or ("done" if reply.text else "an empty answer")
