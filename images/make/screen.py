"""A terminal without a window: what a command's output leaves on the screen, row by row."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
import unicodedata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONTROL = re.compile(r"\x1b\[([?0-9;]*)([@-~])|\x1b[()].|\x1b[=>]|\x1b\][^\x07]*\x07")


def columns_of(text: str) -> int:
    """Return how many cells a text takes: two for a Chinese character or full-width sign."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


class Screen:
    """Rows of cells, endless downwards; understands what readline and tqdm write."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.cells: list[dict[int, str]] = [{}]
        self.row = self.column = 0

    def feed(self, text: str) -> None:
        """Take output in as it comes; control sequences must not be cut."""
        at = 0
        while at < len(text):
            control = CONTROL.match(text, at)
            if control:
                self.control(control.group(1) or "", control.group(2) or "")
                at = control.end()
                continue
            self.put(text[at])
            at += 1

    def control(self, numbers: str, kind: str) -> None:
        count = int(numbers) if numbers.isdigit() else 1
        if kind == "K":
            kept = {c: sign for c, sign in self.cells[self.row].items() if c < self.column}
            self.cells[self.row] = {} if numbers == "2" else kept
        elif kind == "A":
            self.row = max(0, self.row - count)
        elif kind == "B":
            self.move_down(count)
        elif kind == "C":
            self.column += count
        elif kind == "D":
            self.column = max(0, self.column - count)

    def put(self, sign: str) -> None:
        if sign == "\n":
            self.move_down(1)
        elif sign == "\r":
            self.column = 0
        elif sign == "\b":
            self.column = max(0, self.column - 1)
        elif sign >= " ":
            width = columns_of(sign)
            if self.column + width > self.columns:
                self.move_down(1)
                self.column = 0
            row = self.cells[self.row]
            row[self.column] = sign
            if width == 2:
                row[self.column + 1] = ""
            self.column += width

    def move_down(self, count: int) -> None:
        self.row += count
        while len(self.cells) <= self.row:
            self.cells.append({})

    def rows(self) -> list[str]:
        """Return the rows as text, without blanks at their ends and empty rows below."""
        rows = ["".join(r.get(c, " ") for c in range(max(r, default=-1) + 1)) for r in self.cells]
        rows = [row.rstrip() for row in rows]
        while rows and not rows[-1]:
            rows.pop()
        return rows


class Command:
    """A command in a terminal of its own."""

    def __init__(self, command: list[str], columns: int) -> None:
        self.screen = Screen(columns)
        self.text, self.raw = "", b""
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        environment = {**os.environ, "TERM": "xterm", "LC_ALL": "C.UTF-8", "LANG": "C.UTF-8"}
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)

    def read(self, wait_s: float) -> bool:
        """Take in what the command writes next; false where it wrote nothing."""
        if not select.select([self.master], [], [], wait_s)[0]:
            return False
        try:
            self.raw += os.read(self.master, 65536)
        except OSError:  # the other end has gone
            return False
        while True:  # a character may be cut
            try:
                self.text, self.raw = self.text + self.raw.decode(), b""
                return True
            except UnicodeDecodeError as error:
                whole, self.raw = self.raw[: error.start], self.raw[error.start :]
                self.text += whole.decode()
                return True

    def until(self, text: str, timeout_s: float = 120) -> None:
        """Wait until ``text`` is the end of what is on the screen, or appears in it."""
        seen, deadline = len(self.text), time.monotonic() + timeout_s
        while text not in self.text[seen:]:
            self.read(0.2)
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise SystemExit(f"{text!r} did not appear; this did:\n{self.text[-2000:]}")

    def type(self, line: str) -> None:
        os.write(self.master, f"{line}\r".encode())

    def finish(self) -> list[str]:
        """Wait for the end; return the rows."""
        while self.process.poll() is None:
            self.read(0.2)
        while self.read(0.2):
            pass
        return self.rows()

    def rows(self) -> list[str]:
        screen = Screen(self.screen.columns)
        screen.feed(self.text)
        return screen.rows()
