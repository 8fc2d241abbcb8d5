"""Files of every kind as numbered records, in constant memory, with a count of what was lost."""

import codecs
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .tally import BadRecord, Place, Tally

BATCH_BYTES = 1 << 20  # what one worker gets at a time
MAX_RECORD_BYTES = 32 << 20  # one record; a novel of ten million Chinese characters still fits
SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".txt")


@dataclass
class Batch:
    """About ``BATCH_BYTES`` of a file, cut between records: the unit of work for one process.

    ``content`` is whole lines as bytes (``kind`` "json" or "text") or a list of places and values;
    ``tally`` counts what was met while cutting; ``file_bytes`` is how much of the file, packed if
    it is, has been read.
    """

    path: str
    kind: str
    first_line: int
    content: bytes | list[tuple[Place, Any]]
    tally: Tally
    file_bytes: int = 0


def read_batches(path: str | Path) -> Iterator[Batch]:
    """Cut a ``.jsonl .json .csv .txt`` file, plain or packed (xz, gzip), into batches in its order.

    Raises:
        FileNotFoundError, ValueError: no such file, or nothing that can be read as its name says.
    """
    suffix = check_file(path)
    with Path(path).open("rb") as raw:
        source = _Source(path, raw)
        if suffix == ".csv":
            batches = _table_batches(source)
        elif suffix == ".txt":
            batches = _line_batches(source, "text")
        elif _begins_array(source.first, suffix):
            batches = _array_batches(source)
        else:
            batches = _line_batches(source, "json")
        for batch in batches:
            if source.has_bom:
                batch.tally.change("byte order mark removed", Place(source.path, 1))
                source.has_bom = False
            batch.file_bytes = raw.tell()
            yield batch


def check_file(path: str | Path) -> str:
    """Return the suffix that tells a file's format, ``.xz`` and ``.gz`` taken off.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or the suffix is none of ``SUFFIXES``.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path} is not a file: check the name; data_process.py --help lists what it reads"
        )
    name = Path(path).name.lower().removesuffix(".xz").removesuffix(".gz")
    suffix = Path(name).suffix
    if suffix not in SUFFIXES:
        raise ValueError(
            f"{path} ends in {suffix!r}; expected {' '.join(SUFFIXES)}, with .xz or .gz if packed"
        )
    return suffix


def read_records(batch: Batch, tally: Tally) -> Iterator[tuple[Place, Any]]:
    """Yield each readable record of a batch with its place: what JSON held, or a line of text."""
    tally.merge(batch.tally)
    if isinstance(batch.content, list):
        for place, value in batch.content:
            tally.read += 1
            yield place, value
        return
    lines = batch.content.split(b"\n")
    if not lines[-1]:
        lines.pop()
    for number, data in enumerate(lines, batch.first_line):
        tally.read += 1
        place = Place(batch.path, number)
        try:
            value = _parse_line(data, batch.kind, place, tally)
        except BadRecord as bad:
            tally.skip(bad.reason, place, bad.detail)
        else:
            yield place, value


def _parse_line(data: bytes, kind: str, place: Place, tally: Tally) -> Any:
    if len(data) > MAX_RECORD_BYTES:
        raise BadRecord(f"longer than {MAX_RECORD_BYTES >> 20} MiB", f"{len(data):,} bytes")
    if not data or data.isspace():
        raise BadRecord("blank line")
    try:
        line = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord("not valid UTF-8", f"byte {error.start + 1}") from None
    if line[0] == "\ufeff":
        tally.change("byte order mark removed", place)
        line = line[1:]
    if kind == "text":
        return line.removesuffix("\r")
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError also for a number of 5,000 digits
        raise BadRecord("broken JSON", _brief(error)) from None


def _brief(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at character {error.pos + 1}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)[:60]


class _Source:
    """The unpacked bytes of a file in blocks; a packed file that breaks off gives what it holds."""

    def __init__(self, path: str | Path, raw: BinaryIO) -> None:
        self.path = str(path)
        magic = raw.peek(6)[:6]
        self.packed = (
            "xz" if magic == b"\xfd7zXZ\x00" else "gzip" if magic[:2] == b"\x1f\x8b" else ""
        )
        self.stream = (
            lzma.open(raw) if self.packed == "xz" else gzip.open(raw) if self.packed else raw
        )
        self.damage = ""
        self.first = self._read()
        if self.damage and not self.first:
            raise ValueError(
                f"{path} is not a readable {self.packed} file ({self.damage}): download it again"
            )
        if self.first[:2] in (b"\xff\xfe", b"\xfe\xff") or self.first[:4] == b"PAR1":
            kind = "Parquet" if self.first[:4] == b"PAR1" else "UTF-16"
            raise ValueError(f"{path} holds {kind}, expected text in UTF-8: convert it first")
        self.has_bom = self.first.startswith(codecs.BOM_UTF8)
        if self.has_bom:
            self.first = self.first[len(codecs.BOM_UTF8) :]

    def blocks(self) -> Iterator[bytes]:
        """Yield the whole content, about ``BATCH_BYTES`` at a time."""
        block, self.first = self.first, b""
        while block:
            yield block
            block = self._read()

    def note_damage(self, tally: Tally, line: int) -> None:
        """Count a packed file that broke off, once its readable part has been given out."""
        if self.damage:
            tally.read += 1
            tally.skip("packed file breaks off here", Place(self.path, line), self.damage)
            self.damage = ""

    def _read(self) -> bytes:
        pieces: list[bytes] = []
        missing = BATCH_BYTES
        while missing > 0 and not self.damage:
            try:
                piece = self.stream.read1(missing)  # read() would lose what comes before the damage
            except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
                self.damage = str(error)
                break
            if not piece:
                break
            pieces.append(piece)
            missing -= len(piece)
        return b"".join(pieces)


def _line_batches(source: _Source, kind: str) -> Iterator[Batch]:
    """Yield whole lines; one beyond the limit is passed over without being held in memory."""
    held: list[bytes] = []
    n_held = 0
    line = 1
    is_passing_over = False
    tally = Tally()
    for block in source.blocks():
        end = block.rfind(b"\n") + 1
        if is_passing_over:
            if not end:
                continue
            start = block.find(b"\n") + 1
            is_passing_over = False
            line += 1
            block, end = block[start:], end - start
        if end:
            data = b"".join((*held, block[:end]))
            yield Batch(source.path, kind, line, data, tally)
            line += data.count(b"\n")
            tally, held, n_held, block = Tally(), [], 0, block[end:]
        held.append(block)
        n_held += len(block)
        if n_held > MAX_RECORD_BYTES:
            tally.read += 1
            tally.skip(f"longer than {MAX_RECORD_BYTES >> 20} MiB", Place(source.path, line))
            is_passing_over, held, n_held = True, [], 0
    source.note_damage(tally, line)
    if n_held or tally.read:
        yield Batch(source.path, kind, line, b"".join(held), tally)


class _TableLines:
    """Feeds the csv module line by line and knows where in the file it is."""

    def __init__(self, source: _Source) -> None:
        self.first_line = 0  # of the record being read
        self.problem = ""  # of the record being read
        self.tally = Tally()
        self._line = 0
        self._is_inside = False
        self._lines = self._read(source)

    def begin_record(self) -> None:
        """Forget the record before; the next line begins a new one."""
        self.problem, self._is_inside = "", False

    def __iter__(self) -> Iterator[str]:
        return self._lines

    def _read(self, source: _Source) -> Iterator[str]:
        for batch in _line_batches(source, "table"):
            if batch.tally.skipped and self._is_inside:
                self.problem = "CSV row with a line left out"
            self.tally.merge(batch.tally)
            self._line = batch.first_line - 1
            for data in io.BytesIO(batch.content):  # splits on \n alone and keeps it
                self._line += 1
                if not self._is_inside:
                    self.first_line, self._is_inside = self._line, True
                yield self._decode(data)

    def _decode(self, data: bytes) -> str:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            self.problem = "not valid UTF-8"
            return data.decode("utf-8", "replace")


def _table_batches(source: _Source) -> Iterator[Batch]:
    """Yield rows of a CSV as dicts by the header's names.

    ``strict`` parsing fails at a stray quote and goes on with the next line; without it, a quote
    that nobody closed would swallow the rows after it in silence.
    """
    csv.field_size_limit(MAX_RECORD_BYTES)
    lines = _TableLines(source)
    reader = csv.reader(lines, strict=True)
    header: list[str] | None = None
    rows: list[tuple[Place, Any]] = []
    n_chars = 0
    is_at_end = False
    while not is_at_end:
        lines.begin_record()
        try:
            cells = next(reader, None)
            is_at_end = cells is None
            if header is None and cells:
                header = [name.strip() for name in cells]
            elif cells is not None:
                row = _table_row(cells, header, lines.problem)
                rows.append((Place(source.path, lines.first_line), row))
                n_chars += sum(map(len, cells))
        except (BadRecord, csv.Error) as error:
            bad = error if isinstance(error, BadRecord) else BadRecord("broken CSV row", str(error))
            lines.tally.read += 1
            lines.tally.skip(bad.reason, Place(source.path, lines.first_line), bad.detail)
        if n_chars > BATCH_BYTES // 2 or len(rows) >= 10_000 or is_at_end:
            yield Batch(source.path, "table", 0, rows, lines.tally)
            rows, n_chars, lines.tally = [], 0, Tally()


def _table_row(cells: list[str], header: list[str] | None, problem: str) -> dict[str, str]:
    if problem:
        raise BadRecord(problem)
    if not cells or header is None:
        raise BadRecord("blank line")
    if len(cells) != len(header):
        raise BadRecord("wrong number of CSV fields", f"{len(cells)}, expected {len(header)}")
    return dict(zip(header, cells, strict=True))


def _begins_array(first: bytes, suffix: str) -> bool:
    head = first.removeprefix(codecs.BOM_UTF8).lstrip()
    if suffix == ".json":
        return head[:1] == b"["
    return re.match(rb"\[\s*\{", head) is not None  # in JSON lines "[" alone may be a broken line


def _array_batches(source: _Source) -> Iterator[Batch]:
    """Yield the elements of one JSON array, holding a few MiB of it at a time.

    After an element that does not parse, reading goes on at the next place that looks like the
    borders between elements before it.
    """
    text = _ArrayText(source)
    tally = Tally()
    decoder = json.JSONDecoder()
    elements: list[tuple[Place, Any]] = []
    n_elements = n_chars = 0
    while text.find_element():
        n_elements += 1
        place = Place(source.path, text.line, n_elements)
        try:
            value, n_read = text.decode(decoder)
            elements.append((place, value))
            n_chars += n_read
        except BadRecord as bad:
            tally.read += 1
            tally.skip(bad.reason, place, bad.detail)
        if n_chars > BATCH_BYTES // 2 or len(elements) >= 10_000:
            yield Batch(source.path, "array", 0, elements, tally)
            elements, n_chars, tally = [], 0, Tally()
    if not text.is_closed:
        tally.read += 1
        tally.skip('the array has no end ("]")', Place(source.path, text.line))
    source.note_damage(tally, text.line)
    yield Batch(source.path, "array", 0, elements, tally)


SEPARATORS = re.compile(r"[\s,]*")


class _ArrayText:
    """A window on the text of a JSON array that moves forward only."""

    def __init__(self, source: _Source) -> None:
        self.line = 1
        self.is_closed = False
        self._blocks = source.blocks()
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text = ""
        self._at = 0
        self._is_complete = False
        self._border = ""  # what stands between two elements
        self._read(1)
        self._advance(self._text.index("[") + 1)

    def find_element(self) -> bool:
        """Go to the next element; false at the end of the array."""
        while True:
            end = SEPARATORS.match(self._text, self._at).end()
            is_closed = self._text[end : end + 1] == "]" and not self._text[end + 1 :].strip()
            if self._is_complete or not (is_closed or end == len(self._text)):
                break
            self._read(BATCH_BYTES)
        border = self._text[self._at : end]
        self._advance(end)
        self.is_closed = is_closed
        if is_closed or end == len(self._text):
            return False
        if not self._border or "," in border:
            self._border = border if "," in border else "," + border
        return True

    def decode(self, decoder: json.JSONDecoder) -> tuple[Any, int]:
        """Return the element here and its length, and go behind it, also when it is broken."""
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._at)
                break
            except (ValueError, RecursionError) as error:
                n_pending = len(self._text) - self._at
                if self._is_complete or n_pending > MAX_RECORD_BYTES:
                    self._pass_over()
                    raise BadRecord("broken JSON", _brief(error)) from None
                self._read(max(BATCH_BYTES, n_pending))  # doubled, so it is parsed few times
        element = self._text[self._at : end]
        self._advance(end)
        try:
            element.encode()
        except UnicodeEncodeError:
            raise BadRecord("not valid UTF-8") from None
        return value, len(element)

    def _pass_over(self) -> None:
        border = "}" + self._border + "{"
        while True:
            found = self._text.find(border, self._at)
            if found >= 0 or self._is_complete:
                break
            self._advance(max(self._at, len(self._text) - len(border)))
            self._read(BATCH_BYTES)
        self._advance(found + 1 if found >= 0 else len(self._text))

    def _advance(self, position: int) -> None:
        self.line += self._text.count("\n", self._at, position)
        self._at = position

    def _read(self, n_chars: int) -> None:
        pieces = [self._text[self._at :]]
        while n_chars > 0 and not self._is_complete:
            block = next(self._blocks, b"")
            self._is_complete = not block
            pieces.append(self._decoder.decode(block, final=self._is_complete))
            n_chars -= len(pieces[-1])
        self._text, self._at = "".join(pieces), 0
