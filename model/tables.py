"""Raw files to the tables that training reads: filters, CSV and JSON writers, several processes."""

import csv
import io
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import rows
from .records import Batch, check_file, read_batches
from .rows import FormatCheck, Message
from .tally import Place, Tally

SMALL_BYTES = 8 << 20  # less input than this is done before other processes have started
CHINESE = re.compile("[\u4e00-\u9fff]+")  # v1's range: the characters in daily use
TURNS = ("all", "single", "multi")


@dataclass(frozen=True)
class Filters:
    """Which good rows to keep; the defaults keep all. Lengths are in characters.

    ``min_question`` and ``min_answer`` are the shortest allowed; a document counts as an answer. A
    text needs at least the share ``min_chinese_ratio`` of Chinese characters. Of a conversation the
    last question and answer are judged, of a preference pair all texts.
    """

    min_question: int = 0
    min_answer: int = 0
    max_chars: int | None = None
    min_chinese_ratio: float = 0.0

    def problem(self, questions: Iterable[str], answers: Iterable[str]) -> str:
        """Return why a row with these texts is not wanted, "" if it is."""
        for least, texts in ((self.min_question, questions), (self.min_answer, answers)):
            for text in texts:
                if len(text) < least:
                    return f"shorter than {least} characters"
                if self.max_chars is not None and len(text) > self.max_chars:
                    return f"longer than {self.max_chars} characters"
                if self.min_chinese_ratio and chinese_ratio(text) < self.min_chinese_ratio:
                    return f"too little Chinese (--min_chinese_ratio {self.min_chinese_ratio:.4g})"
        return ""


V1_FILTERS = {
    "pretrain": Filters(max_chars=512),
    "sft": Filters(  # v1 wanted more than half
        min_question=10, min_answer=5, max_chars=512, min_chinese_ratio=math.nextafter(0.5, 1)
    ),
    "rl": Filters(max_chars=520),
}


def chinese_ratio(text: str) -> float:
    """Return the share of Chinese characters in a text; 0 for an empty one."""
    return (len(text) - len(CHINESE.sub("", text))) / len(text) if text else 0.0


@dataclass(frozen=True)
class Job:
    """What to make: ``stage`` is pretrain, sft or rl; ``turns`` has one of TURNS an output."""

    stage: str
    filters: Filters = Filters()
    turns: tuple[str, ...] = ("all",)


@dataclass
class Converted:
    """What a batch gave: the bytes and the number of rows of each output, and the counts."""

    path: str
    file_bytes: int
    data: list[bytes]
    n_rows: list[int]
    tally: Tally


def convert_batch(batch: Batch, job: Job) -> Converted:
    """Return the rows of a batch as they stand in the outputs; nothing else decides them."""
    tally = Tally()
    outputs = STAGES[job.stage].encode(batch, job, tally)
    data, n_rows = [data for data, _ in outputs], [n for _, n in outputs]
    return Converted(batch.path, batch.file_bytes, data, n_rows, tally)


Encoded = list[tuple[bytes, int]]  # for each output its bytes and its number of rows


def _encode_documents(batch: Batch, job: Job, tally: Tally) -> Encoded:
    kept = [
        (text,)
        for place, text in rows.documents_of(batch, tally)
        if _is_wanted(job.filters.problem((), (text,)), place, tally)
    ]
    return [(_csv(kept), len(kept))]


def _encode_conversations(batch: Batch, job: Job, tally: Tally) -> Encoded:
    outputs: list[list[tuple[str, ...]]] = [[] for _ in job.turns]
    for place, messages in rows.conversations_of(batch, tally):
        row = table_row(messages)
        number = "single" if row[0] == "[]" else "multi"
        wanting = [
            kept for kept, turns in zip(outputs, job.turns, strict=True) if turns in ("all", number)
        ]
        problem = job.filters.problem(row[1:2], row[2:3]) if wanting else f"{number}-turn"
        if _is_wanted(problem, place, tally):
            for kept in wanting:
                kept.append(row)
    return [(_csv(kept), len(kept)) for kept in outputs]


def _encode_preferences(batch: Batch, job: Job, tally: Tally) -> Encoded:
    kept = []
    for place, pair in rows.preferences_of(batch, tally):
        prompt = pair["prompt"]
        questions = [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]
        problem = job.filters.problem(questions, (pair["chosen"], pair["rejected"]))
        if _is_wanted(problem, place, tally):
            kept.append(json.dumps(pair, ensure_ascii=False))
    return [(",\n".join(kept).encode(), len(kept))]


def _is_wanted(problem: str, place: Place, tally: Tally) -> bool:
    if problem:
        tally.filter(problem, place)
    return not problem


def table_row(messages: Sequence[Message]) -> tuple[str, str, str, str]:
    """Return a conversation as ``history, q, a, system``; history is JSON, a list of pairs."""
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    texts = [message["content"] for message in messages if message["role"] != "system"]
    history = [texts[i : i + 2] for i in range(0, len(texts) - 2, 2)]
    return json.dumps(history, ensure_ascii=False), texts[-2], texts[-1], system


def _csv(table: list[tuple[str, ...]]) -> bytes:
    # Every field in quotes: older Pythons leave a lone CR bare, and readers end the row there.
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(table)
    return text.getvalue().encode()


@dataclass(frozen=True)
class Stage:
    """How a stage's rows are read and written."""

    encode: Callable[[Batch, Job, Tally], Encoded]
    expected: str
    suffix: str
    header: bytes
    separator: bytes = b""  # between batches
    trailer: bytes = b""


STAGES = {
    "pretrain": Stage(_encode_documents, rows.DOCUMENT_FORMS, ".csv", b"text\n"),
    "sft": Stage(_encode_conversations, rows.CONVERSATION_FORMS, ".csv", b"history,q,a,system\n"),
    "rl": Stage(_encode_preferences, rows.PREFERENCE_FORMS, ".json", b"[\n", b",\n", b"\n]\n"),
}


class Output:
    """A file that gets its name when it is complete; until then it ends in ``.tmp``."""

    def __init__(self, path: str | Path, stage: Stage) -> None:
        self.path = Path(path)
        self.n_rows = 0
        self._temporary = self.path.with_name(self.path.name + ".tmp")
        self._stage = stage
        self._n_bytes = 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._temporary.open("wb")
        self._put(stage.header)

    def write(self, data: bytes, n_rows: int) -> None:
        """Add the rows of a batch."""
        if n_rows:
            self._put(self._stage.separator + data if self.n_rows else data)
            self.n_rows += n_rows

    def finish(self) -> None:
        """Make the file durable and give it its name."""
        self._put(self._stage.trailer, is_last=True)
        self._file.close()
        os.replace(self._temporary, self.path)

    def discard(self) -> None:
        """Remove what was written, unless it is finished."""
        try:
            self._file.close()  # flushes, so a full disk speaks up again
        except OSError:
            pass
        self._temporary.unlink(missing_ok=True)

    def _put(self, data: bytes, is_last: bool = False) -> None:
        try:
            self._file.write(data)
            self._n_bytes += len(data)
            if is_last:
                self._file.flush()
                os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(
                f"{self.path} could not be written ({error.strerror}, after "
                f"{self._n_bytes / 1e6:,.0f} MB): make room, or name another place with --output"
            ) from error


def convert(
    inputs: Sequence[str | Path],
    outputs: Sequence[str | Path],
    job: Job,
    *,
    workers: int | None = None,
    progress: Callable[[int], None] = lambda n_bytes: None,
) -> tuple[Tally, list[int]]:
    """Write what ``inputs`` hold to ``outputs`` (one for each of ``job.turns``), all or nothing.

    The result does not depend on ``workers`` (default: the cores, one for small inputs).
    ``progress`` is told how many bytes of the inputs are done. Memory does not grow with them.

    Returns:
        the counts, and the number of rows in each output.

    Raises:
        FileNotFoundError, ValueError: an input is missing or of another format, or no row is left.
        OSError: an output cannot be written.
    """
    stage = STAGES[job.stage]
    for path in inputs:
        check_file(path)
    sizes = {str(path): os.path.getsize(path) for path in inputs}
    tally = Tally()
    check: FormatCheck | None = None
    n_bytes_before = 0  # of the files that are done
    files: list[Output] = []
    try:
        files += (Output(path, stage) for path in outputs)
        for converted in _convert_batches(inputs, job, workers or _auto_workers(sizes.values())):
            if check is None or check.path != converted.path:
                if check is not None:
                    check.finish()
                    n_bytes_before += sizes[check.path]
                check = FormatCheck(converted.path, stage.expected)
            tally.merge(converted.tally)
            check.add(converted.tally)
            for file, data, n_rows in zip(files, converted.data, converted.n_rows, strict=True):
                file.write(data, n_rows)
            progress(n_bytes_before + converted.file_bytes)
        if check is not None:
            check.finish()
        if not tally.kept:
            raise ValueError(f"no row is left for {files[0].path}: {tally.report()}")
        for file in files:
            file.finish()
    finally:
        for file in files:
            file.discard()
    return tally, [file.n_rows for file in files]


def _auto_workers(sizes: Iterable[int]) -> int:
    if sum(sizes) < SMALL_BYTES:
        return 1
    # Not the machine's cores but the ones that this process may use, where the system tells.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _convert_batches(inputs: Sequence[str | Path], job: Job, workers: int) -> Iterator[Converted]:
    """Yield what the batches of all inputs gave, in their order."""
    batches = (batch for path in inputs for batch in read_batches(path))
    if workers == 1:
        for batch in batches:
            yield convert_batch(batch, job)
        return
    # spawn: the same on every system, and safe beside threads
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)
    waiting: deque[Any] = deque()
    try:
        for batch in batches:
            with _interrupts_held():  # a submission may start a worker
                waiting.append(pool.submit(convert_batch, batch, job))
            if len(waiting) > 2 * workers:  # bounds the memory
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise OSError(
            "a worker process was killed, perhaps for want of memory: try again with --workers 1"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Keep Ctrl-C until the end of the block, and from processes that are started in it for good.

    A worker that is still importing when the terminal interrupts all would print a traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for systems without signal masks
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)  # the parent was killed: nobody waits for the result

    threading.Thread(target=follow, daemon=True).start()


class Progress:
    """A bar over the bytes of the inputs on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, n_bytes: int, label: str) -> None:
        self._n_bytes, self._label = n_bytes, label
        self._begin = self._last = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=n_bytes, desc=label, unit="B", unit_scale=True)

    def __call__(self, n_done: int) -> None:
        """Show that ``n_done`` bytes have been dealt with."""
        if self._bar is not None:
            self._bar.update(n_done - self._bar.n)
        elif time.monotonic() - self._last >= 10:
            self._last = time.monotonic()
            speed = n_done / (self._last - self._begin)
            left_s = (self._n_bytes - n_done) / speed
            print(
                f"{self._label}: {n_done / self._n_bytes:.0%}, {speed / 1e6:.1f} MB/s of input, "
                f"{left_s:,.0f} s left",
                file=sys.stderr,
            )

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
