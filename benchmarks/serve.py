"""How fast it serves: python benchmarks/serve.py [--quick] [--only engine latency peer idle]

Compares, with the same weights (26 M, random ones if --weights names none, fp32), the bare engine
in a process of its own, my_openai_api.py, and `transformers serve` on an export of them. Every
answer has the same number of tokens; every prompt is new, of so many tokens.

engine: tokens a second of 1 to 32 streams, of the engine and through HTTP; what the server adds;
    the same of 1 and 8 with short prompts, where decoding is all but alone.
latency: time to the first text of 8 clients that ask again as soon as they are answered, and the
same where all share a system prompt.
peer: tokens a second of 8 clients, beside transformers.
idle: one stream with and without 1,000 open connections that do nothing.

On some machines torch is faster with one thread than with one a core; where that decides who is
ahead, engine and transformers are measured both ways, and the faster one counts.

The measured take turns within a round; prints medians and ranges over the rounds, and of the
ratios within a round. Writes JSON. One at a time is at work, the others wait.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from machine import describe, machine
from servers import (
    PLACE,
    SAMPLING,
    Answers,
    Body,
    Engine,
    Server,
    end,
    export,
    random_weights,
    transformers_serve,
)

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from model.tokenizer import EOS_ID, Tokenizer  # noqa: E402 (the line above finds it)

PARTS = ("engine", "latency", "peer", "idle")
STREAMS = (1, 2, 4, 8, 16, 32)
CLIENTS = 8  # in all comparisons
PEER, ONE = "transformers serve", "one thread"
SHORT = 12  # tokens of a prompt that takes no time
GIVE_UP_S = 30  # of what may not work at all
LETTERS = "的一是不了在人有我他这中大来上国个到说们为子和你地出道也时年得就那要下以生会自着去"
SYSTEM = "你是一个小巧而有用的助手，回答要简短，也要正确；不知道的就说不知道，不要编造。" * 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="3 rounds of fewer requests, up to 8 streams")
    add("--rounds", type=int, help="default 5, with --quick 3")
    add("--only", nargs="+", choices=PARTS, default=list(PARTS))
    add("--weights", help="of any model of this project (default: 26 M, random)")
    add("--prompt_tokens", type=int, default=100)
    add("--new_tokens", type=int, default=128)
    add("--requests", type=int, default=10, help="of each client in a round of latency")
    add("--connections", type=int, default=1000, help="that do nothing")
    add("--json", type=Path, default="serve.json", help="where to write the figures")
    args = parser.parse_args()
    args.streams = STREAMS
    if args.quick:
        args.requests, args.streams = 4, STREAMS[:4]
    args.rounds = args.rounds or (3 if args.quick else 5)
    facts = machine()
    print(describe(facts))
    print(f"prompts of {args.prompt_tokens} tokens, answers of {args.new_tokens}", flush=True)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bench = Bench(args, folder, stack)
        for number in range(args.rounds):
            bench.round(number)
    lines, goals = bench.tables()
    print("\n".join([*lines, *goals]))
    print(f"load at end {os.getloadavg()[0]:.2f}")
    result = {"machine": facts, "load_at_end": os.getloadavg()[0], "notes": bench.notes}
    settings = ("rounds", "prompt_tokens", "new_tokens", "requests", "connections")
    result |= {"settings": {name: getattr(args, name) for name in settings}}
    result |= {"figures": bench.figures, "summary": lines + goals}
    args.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")


# ----------------------------------------------------------------------------- what is measured


class Bench:
    """All that is measured, and the figures so far."""

    def __init__(self, args: argparse.Namespace, folder: Path, stack: contextlib.ExitStack) -> None:
        self.args = args
        self.figures: dict[str, list[float]] = defaultdict(list)
        self.notes: list[str] = []
        self.source = random.Random(0)
        self.tokenizer = Tokenizer()
        weights = args.weights or str(random_weights(folder))
        parts, n_slots = args.only, max(args.streams)
        self.engine = self.engine_alone = None
        if "engine" in parts:
            self.engine = Engine(weights, n_slots, stack)
            self.engine_alone = Engine(weights, n_slots, stack, n_threads=1)
        ours = [sys.executable, str(ROOT / "my_openai_api.py"), "--weights", weights, *PLACE]
        ours += ["--port", "0", "--max_batch"]
        self.wide = self.server = None
        if "engine" in parts:
            self.wide = Server("wide", [*ours, str(n_slots)], folder, stack)
        if set(parts) - {"engine"}:
            self.server = Server("server", [*ours, str(CLIENTS)], folder, stack)
        self.peers: dict[str, Server] = {}
        if "peer" in parts:
            exported = export(weights, folder)
            self.try_batching(exported, folder)
            for name, n_threads in ((PEER, None), (f"{PEER} {ONE}", 1)):
                self.peers[name] = transformers_serve(exported, folder, stack, n_threads=n_threads)
        # the first answers are slower, and none of the figures
        for measured in (self.engine, self.engine_alone, self.wide, self.server):
            for n_clients in (CLIENTS, 1) if measured is not None else ():
                measured.answer(self.plan(n_clients, 1, n_new=32))
        for measured in self.peers.values():
            measured.answer(self.plan(1, 1, n_new=8))

    # ---- plans ----

    def plan(
        self,
        n_clients: int,
        n_requests: int,
        *,
        n_prompt: int = 0,
        n_new: int = 0,
        system: str = "",
    ) -> list[list[Body]]:
        """Return the bodies of ``n_clients`` that ask ``n_requests`` times each."""
        n_prompt, n_new = n_prompt or self.args.prompt_tokens, n_new or self.args.new_tokens

        def body() -> Body:
            messages = self.conversation(n_prompt, system)
            # so that all answers have the same length
            known = {"max_tokens": n_new, "logit_bias": {str(EOS_ID): -100.0}, **SAMPLING}
            usage = {"include_usage": True}
            return {"messages": messages, "stream": True, "stream_options": usage, **known}

        return [[body() for _ in range(n_requests)] for _ in range(n_clients)]

    def conversation(self, n_tokens: int, system: str) -> list[dict[str, str]]:
        """Return a conversation of ``n_tokens``, its question unlike any other."""
        text = "".join(self.source.choices(LETTERS, k=n_tokens))
        while True:
            messages = [{"role": "user", "content": text}]
            messages = [{"role": "system", "content": system}] * bool(system) + messages
            surplus = -n_tokens
            surplus += len(self.tokenizer.encode_chat(messages, add_generation_prompt=True))
            if surplus == 0:
                return messages
            if surplus > 0 and not text:
                sys.exit(
                    f"a prompt has {n_tokens + surplus} tokens without a question: ask for more"
                )
            # a letter is a token at most
            text = text[surplus:] if surplus > 0 else text + self.source.choice(LETTERS)

    # ---- measuring ----

    def round(self, number: int) -> None:
        """Measure everything once; every second round in the opposite order, so that a machine
        that grows slower hits the first as much as the last.
        """
        steps: list[Callable[[], None]] = []
        if self.engine is not None:
            for n in self.args.streams:
                for name, measured in (("engine", self.engine), ("http", self.wide)):
                    key = f"{name} {n}"
                    steps.append(partial(self.speed, key, measured, n))
                    if n in (1, CLIENTS):
                        steps.append(
                            partial(self.speed, f"{key} short", measured, n, n_prompt=SHORT)
                        )
        if self.engine_alone is not None:
            key = f"engine {CLIENTS} {ONE}"
            steps.append(partial(self.speed, key, self.engine_alone, CLIENTS))
        if "latency" in self.args.only:
            steps.append(partial(self.latency, "first", ""))
            steps.append(partial(self.latency, "first shared", SYSTEM))
        if self.peers:
            steps.append(partial(self.speed, "ours", self.server, CLIENTS))
        for name, peer in self.peers.items():
            steps.append(partial(self.speed, name, peer, CLIENTS, n_requests=1))
        if "idle" in self.args.only:
            alone = partial(self.one_stream, "alone")
            steps += [alone, self.beside_idle, self.beside_idle, alone]
        for step in steps if number % 2 == 0 else steps[::-1]:
            step()

    def speed(
        self,
        key: str,
        measured: Engine | Server,
        n_clients: int,
        *,
        n_requests: int = 2,
        n_prompt: int = 0,
    ) -> None:
        """Note the tokens a second of all clients together, prompts within."""
        plan = self.plan(n_clients, n_requests, n_prompt=n_prompt)
        answers = checked(measured.answer(plan), self.args.new_tokens)
        begin = min(answer["sent_s"] for answer in answers)
        elapsed_s = max(answer["last_s"] for answer in answers) - begin
        self.note(key, sum(answer["n_tokens"] for answer in answers) / elapsed_s)
        if isinstance(measured, Server):
            self.figures[f"client share {key}"].append(measured.client_share)

    def latency(self, key: str, system: str) -> None:
        """Note each request's time to its first text."""
        plan = self.plan(CLIENTS, self.args.requests, system=system)
        answers = checked(self.server.answer(plan), self.args.new_tokens)
        waited = [answer["first_s"] - answer["sent_s"] for answer in answers]
        self.figures[key] += waited
        p50, p95 = quantile(waited, 50), quantile(waited, 95)
        print(f"  {key}: p50 {p50:.3f} s, p95 {p95:.3f} s", flush=True)

    def one_stream(self, key: str) -> None:
        """Note the tokens a second of one stream, from its first text on."""
        n_new = 2 * self.args.new_tokens
        (answer,) = checked(self.server.answer(self.plan(1, 1, n_new=n_new)), n_new)
        self.note(key, (answer["n_tokens"] - 1) / (answer["last_s"] - answer["first_s"]))

    def beside_idle(self) -> None:
        """Note the same while many connections are open that do nothing."""
        n = self.args.connections
        command = [sys.executable, str(HERE / "load_client.py"), str(self.server.port)]
        idle = subprocess.Popen(
            [*command, "--idle", str(n)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            if idle.stdout.readline().strip() != "ready":
                raise RuntimeError(f"{n} connections did not open: see above")
            self.one_stream("beside idle")
            left, _ = idle.communicate(timeout=60)
            if int(left) < n:
                self.remark(f"{n - int(left)} of {n} idle connections were closed meanwhile")
        finally:
            end(idle)

    def note(self, key: str, value: float) -> None:
        self.figures[key].append(value)
        print(f"  {key}: {value:,.1f} tokens/s", flush=True)

    def remark(self, text: str) -> None:
        self.notes.append(text)
        print(text, flush=True)

    def try_batching(self, export: Path, folder: Path) -> None:
        """Say whether the peer's own continuous batching answers at all on this machine."""
        name = "transformers serve --continuous-batching"
        with contextlib.ExitStack() as stack:
            server = transformers_serve(export, folder, stack, "--continuous-batching")
            server.limit_s = GIVE_UP_S
            try:
                self.speed(name, server, CLIENTS, n_requests=1)
                self.notes.append(f"{name}: {self.figures.pop(name)[0]:,.0f} tokens/s, once")
            except (TimeoutError, RuntimeError) as error:
                self.remark(f"{name}: {error}")

    # ---- results ----

    def tables(self) -> tuple[list[str], list[str]]:
        """Return the tables, and what became of the goals."""
        lines, goals = ["", "| measured | median | range |", "|---|---:|---:|"], [""]

        def row(name: str, values: Sequence[float], form: str = "{:,.0f}") -> float:
            cells = [form.format(f(values)) for f in (statistics.median, min, max)]
            lines.append(f"| {name} | {cells[0]} | {cells[1]} to {cells[2]} |")
            return statistics.median(values)

        def ratios(one: str, other: str) -> list[float]:
            return [a / b for a, b in zip(self.figures[one], self.figures[other], strict=True)]

        def goal(name: str, value: float, form: str, limit: float, at_least: bool) -> None:
            ok = value >= limit if at_least else value <= limit
            sign = ">=" if at_least else "<="
            shown = f"{form.format(value)} (goal {sign} {form.format(limit)})"
            goals.append(f"{'reached' if ok else 'MISSED '}  {name}: {shown}")

        if "engine" in self.args.only:
            for name in ("engine", "http"):
                for n in self.args.streams:
                    row(f"{name}, streams: {n}, tokens/s", self.figures[f"{name} {n}"])
                for end, kind in (("", ""), (" short", ", short prompts")):
                    values = ratios(f"{name} {CLIENTS}{end}", f"{name} 1{end}")
                    title = f"{name}, {CLIENTS} streams to one{kind}"
                    goal(title, row(title, values, "{:.2f}"), "{:.2f}", 4, True)
            alone = f"engine {CLIENTS} {ONE}"
            row(f"engine, {CLIENTS} streams, {ONE}, tokens/s", self.figures[alone])
            best = map(max, self.figures[f"engine {CLIENTS}"], self.figures[alone])
            pairs = zip(best, self.figures[f"http {CLIENTS}"], strict=True)
            added = [100 * (engine / http - 1) for engine, http in pairs]
            title = f"server over the faster engine, {CLIENTS} streams, %"
            goal(title, row(title, added, "{:.1f}"), "{:.1f}", 10, False)
            share = [100 * value for value in self.figures[f"client share http {CLIENTS}"]]
            row("of it the client's process, % of a core", share, "{:.1f}")
        if "latency" in self.args.only:
            for key, name in (("first", "first text"), ("first shared", "with one system prompt")):
                waited = self.figures[key]
                p50, p95 = quantile(waited, 50), quantile(waited, 95)
                lines.append(f"| {name}, p50 of {len(waited)}, s | {p50:.3f} | |")
                lines.append(f"| {name}, p95, s | {p95:.3f} | longest {max(waited):.3f} |")
                goal(f"{name}, p95, s", p95, "{:.2f}", 0.5, False)
        if self.peers:
            row(f"server, {CLIENTS} clients, tokens/s", self.figures["ours"])
            for name in self.peers:
                row(f"{name}, {CLIENTS} clients, tokens/s", self.figures[name])
            best = map(max, *(self.figures[name] for name in self.peers))
            pairs = zip(self.figures["ours"], best, strict=True)
            title = f"server to the faster {PEER}"
            goal(title, row(title, [a / b for a, b in pairs], "{:.2f}"), "{:.2f}", 5, True)
        if "idle" in self.args.only:
            row("one stream, tokens/s", self.figures["alone"], "{:.1f}")
            row(f"beside {self.args.connections} idle", self.figures["beside idle"], "{:.1f}")
            lost = [100 * (1 - ratio) for ratio in ratios("beside idle", "alone")]
            lost_percent = row("lost to them, %", lost, "{:.1f}")
            goal("lost to idle connections, %", lost_percent, "{:.1f}", 5, False)
        return lines, goals


def checked(answers: Answers, n_new: int) -> list[dict[str, float]]:
    """Return the answers of all clients, which must be as long as was asked."""
    found = [answer for client in answers for answer in client]
    if wrong := {answer["n_tokens"] for answer in found} - {n_new}:
        raise RuntimeError(f"answers of {sorted(wrong)} tokens: expected {n_new}")
    return found


def quantile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


if __name__ == "__main__":
    main()
