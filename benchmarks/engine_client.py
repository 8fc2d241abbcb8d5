"""The engine without a server: python benchmarks/engine_client.py --weights FILE --max_batch 32

Answers plans like those of load_client.py, one in each line of its standard input, through an
EngineThread in this process, which does nothing else; prints a line of times for each. A plan is
{"clients": [[messages, ...], ...], "options": {...}}, the options being those of SamplingOptions.
"""

import argparse
import json
import queue
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.checkpoint import load_for_inference  # noqa: E402 (the line above finds it)
from model.engine_thread import EngineThread, apart  # noqa: E402
from model.flags import weights_flags  # noqa: E402
from model.generation import Answer, Engine, Piece  # noqa: E402
from model.sampling import SamplingOptions  # noqa: E402

Times = dict[str, float | int]


def answer_plan(
    thread: EngineThread, clients: list[list[list[int]]], options: SamplingOptions
) -> list[list[Times]]:
    """Let all clients ask at once, and each its next prompt when its last answer has ended."""
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()
    answers: list[list[Answer]] = [[] for _ in clients]

    def ask(client: int) -> None:
        def on_piece(_: Answer, piece: Piece) -> None:
            if piece.is_last:
                ended.put(client)

        prompt_ids = clients[client][len(answers[client])]
        answers[client].append(thread.submit(prompt_ids, options, on_piece))

    for client in range(len(clients)):
        ask(client)
    for _ in range(sum(map(len, clients))):
        client = ended.get()
        if len(answers[client]) < len(clients[client]):
            ask(client)
    return [[times_of(answer) for answer in client] for client in answers]


def times_of(answer: Answer) -> Times:
    if answer.error:
        raise answer.error
    return {
        "sent_s": answer.submitted_at,
        "first_s": answer.first_token_at,
        "last_s": answer.last_token_at,
        "n_tokens": len(answer.tokens),
        "n_prompt": len(answer.prompt_ids),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--max_batch", type=int, default=8)
    weights_flags(parser)
    args = parser.parse_args()
    loaded = apart(lambda: load_for_inference(args))
    thread = EngineThread(Engine(loaded.model, loaded.tokenizer, max_batch=args.max_batch))
    thread.start()
    print("ready", flush=True)
    for line in sys.stdin:
        plan = json.loads(line)
        bias = {int(id): value for id, value in plan["options"].pop("logit_bias", {}).items()}
        options = SamplingOptions(**plan["options"], logit_bias=bias)
        clients = [
            [loaded.tokenizer.encode_chat(messages, add_generation_prompt=True) for messages in c]
            for c in plan["clients"]
        ]
        print(json.dumps({"answers": answer_plan(thread, clients, options)}), flush=True)
    thread.close()


if __name__ == "__main__":
    main()
