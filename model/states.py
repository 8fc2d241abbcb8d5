"""Training states: whole or absent, checked on load; and the atomic write of any file."""

import hashlib
import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

STATE_FILE, MANIFEST_FILE = "state.pt", "manifest.json"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; sync and rename it when the block ends well.

    A crash or a full disk leaves the old file as it was and nothing half-written under its name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{escape(path.name)}.*.tmp"):  # of a killed process
        leftover.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(value: Any, path: Path) -> None:
    """Write a value as indented JSON, complete or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")


def save_tensors(value: Any, path: Path) -> None:
    """Write what ``torch.load`` reads, onto the disk.

    Raises:
        OSError: it could not be written in full.
    """
    try:
        torch.save(value, path)
    except RuntimeError as error:  # what torch makes of a failed write
        reason = str(error).splitlines()[0]
        raise OSError(f"{path} could not be written, the disk may be full ({reason})") from error
    sync(path)


def load_tensors(path: Path) -> Any:
    """Read what :func:`save_tensors` wrote, tensors and plain values; never any code.

    Raises:
        pickle.UnpicklingError: it holds something else, which is not loaded.
        ValueError: it is packed, so that a small file could fill the memory; torch packs nothing.
        Exception: torch raises many kinds for a damaged file.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            unpacked = sum(member.file_size for member in file.infolist())
        if unpacked > path.stat().st_size:
            raise ValueError(f"it would unpack to {unpacked:,} bytes")
    return torch.load(path, map_location="cpu", weights_only=True)


def sync(path: Path) -> None:
    """Force a file or a folder's entries to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no handle on a folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class States:
    """The training states of one run: ``step_<n>/`` folders, each whole or absent.

    A state is written to a temporary folder, synced and renamed; its manifest holds the size and
    hash of its data, so that a truncated or damaged one is noticed.
    """

    def __init__(self, folder: Path, keep_last: int, warn: Callable[[str], None]) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.warn = warn
        self._damaged: set[int] = set()  # steps, as far as they have been looked at

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process out of this run; the lock of a killed process is gone with it.

        Raises:
            ValueError: another process has it.
        """
        if fcntl is None:
            yield
            return
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        path = self.folder.with_name(f".{self.folder.name}.lock")  # not in what --overwrite removes
        with open(path, "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise ValueError(
                    f"{self.folder} is in use by process {file.read() or '?'}: wait for it, stop "
                    "it, or keep both apart with --run_name"
                ) from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def steps(self) -> list[int]:
        """Return the steps with a state, newest first."""
        found = (re.fullmatch(r"step_(\d+)", p.name) for p in self.folder.glob("step_*"))
        return sorted((int(m[1]) for m in found if m), reverse=True)

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write the state of ``step``; of the whole ones only the ``keep_last`` newest stay.

        Damaged ones go: they must not push out whole ones.

        Raises:
            OSError: the disk is full; older states stay.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".step_*.tmp"):  # of a run that was killed while saving
            shutil.rmtree(leftover)
        temporary = self.folder / f".step_{step}.{os.getpid()}.tmp"
        try:
            temporary.mkdir()
            save_tensors(state, temporary / STATE_FILE)
            manifest = {"step": step, **fingerprint(temporary / STATE_FILE)}
            (temporary / MANIFEST_FILE).write_text(json.dumps(manifest) + "\n", "utf-8")
            sync(temporary / MANIFEST_FILE)
            sync(temporary)
            final = self.folder / f"step_{step}"
            if final.exists():
                shutil.rmtree(final)
            os.replace(temporary, final)
            sync(self.folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._damaged.discard(step)
        whole = [found for found in self.steps() if found not in self._damaged]
        for other in set(self.steps()) - set(whole[: self.keep_last]):
            shutil.rmtree(self.folder / f"step_{other}")
        return final

    def load_newest(self) -> dict[str, Any] | None:
        """Return the newest state that is whole, None where there is none; damaged ones are
        named.

        Raises:
            ValueError: one holds what only code could load.
        """
        for step in self.steps():
            folder = self.folder / f"step_{step}"
            try:
                manifest = json.loads((folder / MANIFEST_FILE).read_text("utf-8"))
                if manifest != {"step": step, **fingerprint(folder / STATE_FILE)}:
                    raise ValueError("step, size or hash are not what its manifest says")
                state = load_tensors(folder / STATE_FILE)
                if not isinstance(state, dict):
                    raise ValueError(f"it holds a {type(state).__name__}, no state")
                return state
            except pickle.UnpicklingError as error:  # its hash is right: no disk did this
                raise ValueError(
                    f"{folder / STATE_FILE} holds more than weights and settings, which could be "
                    f"code and is never loaded: it is not of this program; remove {folder}"
                ) from error
            except Exception as error:  # torch raises many kinds for a damaged file
                self._damaged.add(step)
                self.warn(f"{folder} is damaged ({error}); falling back to the state before")
        return None


def fingerprint(path: Path) -> dict[str, Any]:
    """Return size in bytes and SHA-256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk that ``path`` is or would be on."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
