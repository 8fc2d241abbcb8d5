"""Train a tokenizer, and measure it beside others on text that it has not seen.

python train_tokenizer.py --data_path FILE... --output_dir DIR [--compare DIR...]
python train_tokenizer.py --data_path FILE... --compare DIR...      measure only

Takes documents and conversations: .jsonl .json .csv .txt, also packed as .xz or .gz. It learns
nothing from the documents that training holds out (one in 200): those are for measuring.
"""

import argparse
import heapq
import itertools
import json
import os
import re
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.flags import positive, run_main
from model.script_parser import ScriptParser

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
OTHER_TOKENIZER_FILES = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
MIN_VOCAB_SIZE = 256 + 3  # every byte, and the special tokens
MAX_TOKEN_BYTES = 18  # six Chinese characters: keeps rules of dashes out of the vocabulary
MAX_ENGLISH_PASSES = 4  # more would fill the vocabulary with the words of a few documents
PIECE_CHARS = 10_000
HELD_OUT_BYTES = 20_000_000  # kept from --data_path for measuring
LANGUAGES = ("Chinese", "English", "mixed")
GROUPS = tuple(f"{kind}, {language}" for kind in ("text", "chats") for language in LANGUAGES)

# v1's chat text. The generation tags tell transformers and trl what the assistant says, end token
# included; llama.cpp passes over them.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- set role = message['role'] -%}
{%- set place = 'messages[' ~ loop.index0 ~ '].role is ' -%}
{%- if role == 'system' and loop.first -%}
{{- message['content'] -}}
{%- elif role == 'system' -%}
{{- raise_exception(place ~ '"system": a system text stands first') -}}
{%- elif role == 'user' -%}
{{- '<s>user\\n' + message['content'] + '</s>\\n' -}}
{%- elif role == 'assistant' -%}
{{- '<s>assistant\\n' -}}
{%- generation -%}{{- message['content'] + '</s>' -}}{%- endgeneration -%}
{{- '\\n' -}}
{%- else -%}
{{- raise_exception(place ~ '"' ~ role ~ '": use "system", "user" or "assistant"') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<s>assistant\\n' -}}{%- endif -%}
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line and say what it lacks."""
    parser = ScriptParser(__doc__)
    add = parser.add_argument
    add("--data_path", nargs="+", default=[], metavar="FILE", help="text and dialogues to learn")
    add("--held_out", nargs="+", default=[], metavar="FILE", help="measure on these files too")
    add("--output_dir", metavar="DIR", help="the folder to make; without it nothing is trained")
    add("--overwrite", action="store_true", help="replace the tokenizer in --output_dir")
    add("--compare", nargs="+", default=[], metavar="DIR", help="measure these tokenizers too")
    add("--vocab_size", type=int, default=6400, help="default: %(default)s")
    add(
        "--max_mb",
        type=positive(float),
        default=50,
        help="learn from an even sample of so many megabytes (default %(default)s); one takes "
        "about 70 MB of memory, and more than 20 change little",
    )
    add(
        "--english_share",
        type=float,
        default=0.25,
        help="repeat English documents, at most 4 times, until they are this share of the sample "
        "(default %(default)s; 0: as it comes)",
    )
    args = parser.parse_args(argv)
    if not args.output_dir and not args.compare:
        parser.error("nothing to do: --output_dir DIR trains, --compare DIR... measures")
    if args.output_dir and not args.data_path:
        parser.error("--output_dir needs --data_path FILE...: the text to learn from")
    if not args.data_path and not args.held_out:
        parser.error("nothing to measure on: give --held_out FILE... or --data_path FILE...")
    if both := sorted(set(args.data_path) & set(args.held_out)):
        parser.error(f"{both[0]} is given to --data_path and --held_out: learn from it or measure")
    if not 0 <= args.english_share <= 0.9:
        parser.error(f"--english_share {args.english_share}: expected 0 to 0.9")
    from model.tokens import MAX_VOCAB_SIZE

    if not MIN_VOCAB_SIZE <= args.vocab_size <= MAX_VOCAB_SIZE:
        parser.error(
            f"--vocab_size {args.vocab_size}: expected {MIN_VOCAB_SIZE} (256 bytes and 3 special "
            f"tokens) to {MAX_VOCAB_SIZE} (token stores keep an id in 16 bits)"
        )
    return args


def main() -> None:
    """Train, save and measure as the flags say."""
    args = parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleans up like Ctrl-C
    if args.output_dir:
        check_output(Path(args.output_dir), args.overwrite)
    tokenizers = {name: load(folder) for name, folder in short_names(args.compare).items()}
    for path in (*args.data_path, *args.held_out):
        if not Path(path).is_file():  # before the hours that the files before it may take
            raise FileNotFoundError(f"{path} does not exist: check the name")
    corpus = Corpus(int(args.max_mb * 1e6))
    for document in read_all(args.data_path):
        corpus.add(document)
    if args.output_dir:
        tokenizer = train(corpus.texts(args.english_share), args.vocab_size)
        save(tokenizer, Path(args.output_dir))
        n_tokens = tokenizer.get_vocab_size()
        print(f"{args.output_dir}: {n_tokens:,} tokens", flush=True)
        if n_tokens < args.vocab_size:
            print(
                f"warning: the text gave only {n_tokens:,} tokens of --vocab_size "
                f"{args.vocab_size:,}: give more text, or train models with this vocabulary",
                file=sys.stderr,
            )
        name = Path(args.output_dir).name
        name = f"{name} (new)" if name in tokenizers else name
        tokenizers = {name: load(args.output_dir), **tokenizers}
    held_out = itertools.chain(corpus.held_out.documents(), read_all(args.held_out))
    print(report(*measure(tokenizers, held_out), tokenizers))


# --- the text ---


@dataclass(frozen=True)
class Document:
    """A text, or the contents of a conversation's messages with their roles."""

    contents: tuple[str, ...]
    roles: tuple[str, ...] = ()

    @property
    def language(self) -> str:
        """One of ``LANGUAGES``, judged by letters and characters near the beginning."""
        start = "\n".join(text[:1000] for text in self.contents)
        n_chinese = len(re.findall("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]", start))
        n_latin = len(re.findall("[A-Za-z]", start))
        if n_chinese > 9 * n_latin:
            return "Chinese"
        return "English" if n_latin > 9 * n_chinese else "mixed"

    @property
    def group(self) -> str:
        """The line of the report that the document counts for."""
        return f"{'chats' if self.roles else 'text'}, {self.language}"


def read_all(paths: Iterable[str]) -> Iterator[Document]:
    """Yield the documents and conversations of files; print what was read and skipped.

    Raises:
        FileNotFoundError, ValueError: no such file, or a file of another format.
    """
    from tqdm import tqdm

    from model.records import read_batches
    from model.rows import (
        CONVERSATION_FORMS,
        DOCUMENT_FORMS,
        FormatCheck,
        conversations_of,
        documents_of,
    )
    from model.tally import Tally

    for path in paths:
        tally = Tally()
        check = FormatCheck(path, f"{DOCUMENT_FORMS}; or {CONVERSATION_FORMS}")
        parse = None
        size = os.path.getsize(path)
        with tqdm(total=size, unit="B", unit_scale=True, leave=False, disable=None) as bar:
            for batch in read_batches(path):
                if parse is None:  # the first megabyte tells what the file holds
                    is_chats = not has_any(documents_of(batch, Tally())) and has_any(
                        conversations_of(batch, Tally())
                    )
                    parse = conversations_of if is_chats else documents_of
                counted = Tally()
                for _, row in parse(batch, counted):
                    if isinstance(row, str):
                        yield Document((row,))
                    else:
                        contents = tuple(message["content"] for message in row)
                        yield Document(contents, tuple(message["role"] for message in row))
                tally.merge(counted)
                check.add(counted)
                bar.update(batch.file_bytes - bar.n)
        check.finish()
        print(f"{path}: {tally.report()}", flush=True)


def has_any(rows: Iterator[Any]) -> bool:
    """Return whether there is a row."""
    return next(rows, None) is not None


class Sample:
    """The documents with the smallest hashes, as many as ``max_bytes`` hold.

    It is even, takes constant memory, and does not depend on the order of the documents.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.n_bytes = self.seen_bytes = 0
        self._heap: list[tuple[int, int, int, Document]] = []  # the largest hash comes first

    def add(self, key: int, document: Document) -> None:
        """Offer a document and its hash."""
        size = sum(len(text.encode()) for text in document.contents)
        self.seen_bytes += size
        self.n_bytes += size
        heapq.heappush(self._heap, (-key, self.seen_bytes, size, document))
        while self.n_bytes - self._heap[0][2] >= self.max_bytes:
            self.n_bytes -= heapq.heappop(self._heap)[2]

    def documents(self, max_bytes: float | None = None) -> Iterator[Document]:
        """Yield the documents once, or until about ``max_bytes`` are reached, time and again."""
        heap = sorted(self._heap, key=lambda item: -item[0])
        taken = 0
        for _, _, size, document in heap if max_bytes is None else itertools.cycle(heap):
            if max_bytes is not None and taken >= max_bytes:
                return
            taken += size
            yield document


class Corpus:
    """What one pass over the training files keeps of them."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.english, self.others = Sample(max_bytes), Sample(max_bytes)
        self.held_out = Sample(HELD_OUT_BYTES)

    def add(self, document: Document) -> None:
        """Put a document where it belongs."""
        from model.encoding import content_hash
        from model.store_writer import HELD_OUT_MODULUS

        key = content_hash("\x1e".join(document.contents))  # the hash that training holds out by
        if key % HELD_OUT_MODULUS == 0:
            self.held_out.add(key, document)
            return
        sample = self.english if document.language == "English" else self.others
        if document.roles:
            sample.add(key, document)
            return
        (text,) = document.contents
        for start in range(0, len(text), PIECE_CHARS):  # no single book may fill the sample
            piece = text[start : start + PIECE_CHARS]
            sample.add(content_hash(piece), Document((piece,)))

    def texts(self, english_share: float) -> Iterator[str]:
        """Yield the texts to learn from, each a stretch that is encoded by itself.

        Raises:
            ValueError: there are none.
        """
        english, others = self.english.seen_bytes, self.others.seen_bytes
        if not english + others:
            raise ValueError("--data_path holds no text to learn from")
        natural = english / (english + others)
        share = max(english_share, natural) if english else 0.0
        n_others = min(others, self.max_bytes * (1 - share))
        n_english = min(
            n_others * share / (1 - share) if others else min(english, self.max_bytes),
            MAX_ENGLISH_PASSES * self.english.n_bytes,
        )
        total = n_others + n_english
        print(
            f"learning from {total / 1e6:,.1f} MB, {n_english / total:.0%} of it English "
            f"(the files: {(english + others) / 1e6:,.1f} MB, {natural:.0%} English)",
            flush=True,
        )
        instructions: set[str] = set()  # one is shared by thousands of conversations: learnt once
        for document in (*self.others.documents(n_others), *self.english.documents(n_english)):
            for content, role in itertools.zip_longest(document.contents, document.roles):
                if role == "system":
                    if content in instructions:
                        continue
                    instructions.add(content)
                elif role:
                    yield f"{role}\n"
                yield content


# --- training ---


def train(texts: Iterable[str], vocab_size: int) -> "Tokenizer":
    """Return a byte-level BPE learnt from ``texts``: the same texts, the same tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from model.tokenizer import SPECIAL_TOKENS

    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    # Two digits are never learnt as one token, so that a number is spelt alike wherever it stands;
    # the finished tokenizer needs no rule for it and stays GPT-2's.
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=MAX_TOKEN_BYTES,
        show_progress=sys.stderr.isatty(),
    )
    with ended_by_signals():
        tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = byte_level
    return tokenizer


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the process: Python would hear of them after the training."""
    handlers = {s: signal.signal(s, signal.SIG_DFL) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuse, before any work, a folder that cannot be made or whose files are not ours.

    Raises:
        ValueError: a file, a folder with files in it, or no right to write.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file: name a folder")
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"--output_dir {folder} cannot be made: {parent} cannot be written to")
    found = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    foreign = [name for name in found if name not in (*TOKENIZER_FILES, *OTHER_TOKENIZER_FILES)]
    if foreign:
        raise ValueError(
            f"--output_dir {folder} holds {foreign[0]!r}, which is no tokenizer file: "
            "name a folder of its own"
        )
    if found and not overwrite:
        raise ValueError(
            f"--output_dir {folder} already holds a tokenizer, which the weights trained with it "
            "need: name another folder, or replace it with --overwrite"
        )


def save(tokenizer: "Tokenizer", folder: Path) -> None:
    """Write the folder that :class:`model.tokenizer.Tokenizer` and ``AutoTokenizer`` load.

    It appears whole or not at all; an older one stands until then.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        new, old = Path(temporary, "new"), Path(temporary, "old")
        new.mkdir()  # unlike the temporary folder, readable by all
        tokenizer.save(str(new / "tokenizer.json"))
        tokenizer.model.save(str(new))  # vocab.json and merges.txt
        config = json.dumps(tokenizer_config(), ensure_ascii=False, indent=2)
        (new / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")
        try:
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
        except BaseException:
            if old.exists() and not folder.exists():
                old.rename(folder)
            raise


def tokenizer_config() -> dict[str, Any]:
    """Return v1's fields of ``tokenizer_config.json``, as far as ``transformers`` reads them."""
    from model.tokenizer import SPECIAL_TOKENS

    unk, bos, eos = SPECIAL_TOKENS
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(index): {"content": token, **flags, "special": True}
            for index, token in enumerate(SPECIAL_TOKENS)
        },
        "bos_token": bos,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": eos,
        "model_max_length": int(1e30),  # none of its own: the model's max_seq_len is the limit
        "pad_token": unk,
        "spaces_between_special_tokens": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": unk,
    }


# --- measuring ---


def short_names(folders: Iterable[str]) -> dict[str, str]:
    """Return the folders by their last part, by their path where two would be called the same."""
    last = {folder: Path(folder).resolve().name for folder in folders}
    taken = Counter(last.values())
    return {folder if taken[name] > 1 else name: folder for folder, name in last.items()}


def load(folder: str) -> "Tokenizer":
    """Return the tokenizer of any folder with a ``tokenizer.json``.

    Raises:
        FileNotFoundError, ValueError: no such file, or not a tokenizer.
    """
    from tokenizers import Tokenizer

    path = Path(folder, "tokenizer.json")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: --compare takes a tokenizer's folder")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises a bare Exception for any malformed file
        raise ValueError(f"{path} is not a tokenizer file: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # special tokens inside a text are text
    return tokenizer


def measure(
    tokenizers: "dict[str, Tokenizer]", documents: Iterable[Document]
) -> tuple[dict[str, Counter[str]], dict[str, set[int]]]:
    """Encode ``documents`` with every tokenizer, in batches.

    Returns:
        For each of ``GROUPS`` the number of documents, characters, bytes, and tokens by tokenizer
        (``tokens NAME``); for each tokenizer the ids that came up.
    """
    counts: dict[str, Counter[str]] = {}
    used: dict[str, set[int]] = {name: set() for name in tokenizers}
    documents = iter(documents)
    while batch := list(itertools.islice(documents, 1000)):
        contents: dict[str, list[str]] = {}
        for document in batch:
            contents.setdefault(document.group, []).extend(document.contents)
            counts.setdefault(document.group, Counter())["documents"] += 1
        for group, texts in contents.items():
            count = counts[group]
            count["characters"] += sum(map(len, texts))
            count["bytes"] += sum(len(text.encode()) for text in texts)
            for name, tokenizer in tokenizers.items():
                for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                    ids = encoding.ids
                    count[f"tokens {name}"] += len(ids)
                    used[name].update(ids)
    return counts, used


def report(
    counts: dict[str, Counter[str]], used: dict[str, set[int]], tokenizers: "dict[str, Tokenizer]"
) -> str:
    """Return what :func:`measure` counted as a Markdown table."""
    if not counts:
        return "nothing measured: no document is held out of so few; give --held_out FILE..."
    rows = [["characters / bytes per token", "documents", "characters", *tokenizers]]
    total = sum(counts.values(), Counter())
    for group in (*GROUPS, "all"):
        if count := total if group == "all" else counts.get(group):
            n_tokens = [count[f"tokens {name}"] or 1 for name in tokenizers]
            cells = [f"{count['characters'] / n:.3f} / {count['bytes'] / n:.3f}" for n in n_tokens]
            rows.append([group, f"{count['documents']:,}", f"{count['characters']:,}", *cells])
    occur, never = ["ids that occur", "", ""], ["ids that never occur", "", ""]
    for name, tokenizer in tokenizers.items():
        special = {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
        n_ids = tokenizer.get_vocab_size() - len(special)
        occur.append(f"{len(used[name]):,} of {n_ids:,} ({len(used[name]) / n_ids:.1%})")
        never.append(f"{n_ids - len(used[name]):,}")
    rows += [occur, never]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for first, *others in (rows[0], rule, *rows[1:]):
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
