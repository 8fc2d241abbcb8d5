"""The token store: what goes in comes out; only a whole, matching store is ever opened."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import store_writer
from model.encoding import Documents, content_hash
from model.store_writer import HELD_OUT_MODULUS, ensure_store, write_store
from model.tokens import StaleStore, StoreKey, TokenStore, open_store, store_folder

ROOT = Path(__file__).parents[1]
VOCAB = 500


def batch(documents: list[list[int]], masks: list[list[int]] | None = None, **fields) -> Documents:
    lengths = np.array([len(document) for document in documents], np.int64)
    ids = np.array([token for document in documents for token in document], np.int64)
    mask = None if masks is None else np.array([bit for bits in masks for bit in bits], bool)
    return Documents(ids, lengths, fields.pop("text_bytes", lengths), mask=mask, **fields)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.csv"
    path.write_bytes(b"text\n" + b"some words\n" * 1000)
    return path


@pytest.fixture
def key(source: Path) -> StoreKey:
    return StoreKey("pretrain", (source,), "a" * 64, VOCAB, {"max_seq_len": 512})


@pytest.fixture
def store(source: Path, key: StoreKey) -> TokenStore:
    return write_store(store_folder(source), key, [batch([[1, 5, 2], [1, 6, 7, 2]])])


def forbidden() -> Iterator[Documents]:
    raise AssertionError("no document should have been asked for")
    yield


# ---------------------------------------------------------------- what goes in comes out


@settings(deadline=None, max_examples=12)
@given(
    batches=st.lists(
        st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=12), max_size=6), min_size=1
    ).filter(lambda batches: any(batches)),
    shard_tokens=st.sampled_from([1, 3, 10, 1000]),
    with_mask=st.booleans(),
)
def test_documents_come_back(
    tmp_path_factory, batches: list[list[list[int]]], shard_tokens: int, with_mask: bool
) -> None:
    masks = [[[t % 3 == 0 for t in d] for d in documents] for documents in batches]
    data = [batch(d, m if with_mask else None) for d, m in zip(batches, masks, strict=True)]
    folder = tmp_path_factory.mktemp("store") / "a.tokens"
    store = write_store(folder, StoreKey("sft", (), "", VOCAB), data, shard_tokens=shard_tokens)
    documents = [document for part in batches for document in part]
    assert store.n_documents == len(documents)
    assert store.n_tokens == sum(map(len, documents))
    assert [store.document(i).tolist() for i in range(len(documents))] == documents
    numbers = np.arange(len(documents))[::-1]
    assert store.lengths(numbers).tolist() == [len(document) for document in documents][::-1]
    expected = [[t % 3 == 0 or not with_mask for t in document] for document in documents]
    assert [store.mask(i).tolist() for i in range(len(documents))] == expected
    assert store.manifest["trained_tokens"] == sum(map(sum, expected))
    for i in np.flatnonzero([len(d) for d in documents])[:5]:
        assert store.document_at(store.offsets[i]) == i
    shards = sorted(folder.glob("tokens-*.bin"))
    sizes = [path.stat().st_size // 2 for path in shards]
    assert sizes == store.manifest["shards"]
    assert all(size >= shard_tokens for size in sizes[:-1])
    with pytest.raises(IndexError, match=f"document {len(documents)}"):
        store.document(len(documents))


def test_a_store_cut_off_while_in_use_is_an_error(store: TokenStore) -> None:
    os.truncate(store.folder / "tokens-00000.bin", 8)
    assert store.document(0).tolist() == [1, 5, 2]
    with pytest.raises(OSError, match="tokens-00000.bin was cut off while in use"):
        store.document(1)


def test_ids_up_to_65535_and_no_further(tmp_path: Path) -> None:
    key = StoreKey("pretrain", (), "", 65536)
    store = write_store(tmp_path / "a.tokens", key, [batch([[0, 65535]])])
    assert store.document(0).tolist() == [0, 65535]
    with pytest.raises(ValueError, match=r"vocab_size=65537 .* at most 65536"):
        replace(key, vocab_size=65537)


@pytest.mark.parametrize("token", [VOCAB, 70_000, -1])
def test_an_id_outside_the_vocabulary_is_told(tmp_path: Path, token: int) -> None:
    key = StoreKey("pretrain", (), "", VOCAB)
    data = [batch([[1, 2]] * 3), batch([[1], [], [7, token]])]
    with pytest.raises(ValueError, match=rf"document 5 holds id {token}.* {VOCAB} ids"):
        write_store(tmp_path / "a.tokens", key, data)
    assert list(tmp_path.iterdir()) == []


def test_batches_that_do_not_add_up_are_told(tmp_path: Path) -> None:
    key = StoreKey("sft", (), "", VOCAB)
    wrong = Documents(np.array([1, 2, 3]), np.array([2]), np.array([2]))
    for data in ([wrong], [batch([[1]], [[1]]), batch([[1]])], [batch([[1, 2]], [[1]])]):
        with pytest.raises(ValueError, match="does not add up|some have none"):
            write_store(tmp_path / "a.tokens", key, data)
    with pytest.raises(ValueError, match="no documents"):
        write_store(tmp_path / "a.tokens", key, [])


# ---------------------------------------------------------------- the held-out share


def test_held_out_share(tmp_path: Path) -> None:
    """A two-hundredth of the documents, chosen by their text alone; copies on one side."""
    texts = [f"text {i}" for i in range(20_000)]
    texts += texts[:5000]  # copies
    order = np.random.default_rng(0).permutation(len(texts))

    def held_out(texts: list[str], name: str) -> list[str]:
        hashes = np.array([content_hash(text) for text in texts], np.uint64)
        text_bytes = np.array([len(text) for text in texts])
        data = batch([[1, 2]] * len(texts), hashes=hashes, text_bytes=text_bytes)
        store = write_store(tmp_path / name, StoreKey("pretrain", (), "", VOCAB), [data])
        assert store.held_out_bytes.tolist() == [len(texts[i]) for i in store.held_out]
        assert np.all(np.diff(store.held_out) > 0)
        return [texts[i] for i in store.held_out]

    chosen = held_out(texts, "a.tokens")
    assert sorted(chosen) == sorted(t for t in texts if content_hash(t) % HELD_OUT_MODULUS == 0)
    assert 60 < len(set(chosen)) < 140  # 100 expected, 4 standard deviations
    assert sorted(held_out([texts[i] for i in order], "b.tokens")) == sorted(chosen)


def test_held_out_share_is_bounded(tmp_path: Path, monkeypatch) -> None:
    """Beyond the bound the smallest hashes stay, and copies still fall on one side."""
    monkeypatch.setattr(store_writer, "HELD_OUT_MAX", 10)
    hashes = np.array([200 * i for i in range(1, 9)] + [200, 800, 800, 1000], np.uint64)
    data = batch([[1, 2]] * len(hashes), hashes=hashes)
    store = write_store(tmp_path / "a.tokens", StoreKey("pretrain", (), "", VOCAB), [data])
    chosen = hashes[store.held_out] // 200
    assert sorted(chosen.tolist()) == [1, 1, 2, 3, 4, 4, 4, 5, 5, 6]
    monkeypatch.setattr(store_writer, "HELD_OUT_MAX", 6)
    store = write_store(tmp_path / "b.tokens", StoreKey("pretrain", (), "", VOCAB), [data])
    assert sorted((hashes[store.held_out] // 200).tolist()) == [1, 1, 2, 3, 5, 5]  # not 4 thrice


def test_without_a_hash_equal_ids_fall_on_one_side(tmp_path: Path) -> None:
    documents = [[i % 400, 1 + i % 400 // 2, i // 400 % 2] for i in range(4000)]
    data = [batch(documents[:1500]), batch(documents[1500:])]
    store = write_store(tmp_path / "a.tokens", StoreKey("pretrain", (), "", VOCAB), data)
    inside = {tuple(documents[i]) for i in store.held_out}
    assert inside
    copies = [i for i, document in enumerate(documents) if tuple(document) in inside]
    assert store.held_out.tolist() == copies


# ---------------------------------------------------------------- stale, foreign, broken


def test_matching_store_is_opened(store: TokenStore, key: StoreKey) -> None:
    assert open_store(store.folder, key).document(1).tolist() == [1, 6, 7, 2]
    assert ensure_store(store.folder, key, forbidden).n_documents == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokenizer_sha256": "b" * 64}, "tokenizer_sha256 'aaa.*expected 'bbb"),
        ({"kind": "sft"}, "kind 'pretrain', expected 'sft'"),
        ({"vocab_size": VOCAB + 1}, f"vocab_size {VOCAB}, expected {VOCAB + 1}"),
        ({"settings": {"max_seq_len": 1024}}, "512.*1024"),
        ({"settings": {}}, "settings"),
        ({"sources": (Path("other.csv"),)}, "corpus.csv.*other.csv"),
        ({"sources": ()}, "corpus.csv"),
    ],
)
def test_foreign_store_is_stale(
    store: TokenStore, key: StoreKey, change: dict, reason: str
) -> None:
    with pytest.raises(StaleStore, match=reason):
        open_store(store.folder, replace(key, **change))


def rewrite(path: Path, content: bytes) -> None:
    """Change a file's content but neither its size nor its time stamp."""
    stat = path.stat()
    assert len(content) == stat.st_size
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_changed_source_is_stale(store: TokenStore, key: StoreKey, source: Path) -> None:
    content = source.read_bytes()
    changed = content.replace(b"words", b"wordy", 1)
    source.write_bytes(changed)
    with pytest.raises(StaleStore, match="other content"):
        open_store(store.folder, key)
    source.write_bytes(content + b"x")
    with pytest.raises(StaleStore, match=r"11,006 bytes.*11,005"):
        open_store(store.folder, key)
    source.write_bytes(content)
    open_store(store.folder, key)
    rewrite(source, changed)
    with pytest.raises(StaleStore, match="other content"):
        open_store(store.folder, key)


def test_edit_between_the_samples_of_a_large_source_is_seen(tmp_path: Path) -> None:
    source = tmp_path / "large.jsonl"
    content = bytearray(np.random.default_rng(0).bytes(6 << 20))
    source.write_bytes(content)
    key = StoreKey("pretrain", (source,), "", VOCAB)
    write_store(store_folder(source), key, [batch([[1]])])
    middle = (len(content) - 2**16) * 31 // 63 + 2**16 + 100  # between two sampled blocks
    content[middle] ^= 1
    source.write_bytes(content)
    with pytest.raises(StaleStore, match="other content"):
        open_store(store_folder(source), key)


def test_touched_or_copied_source_is_read_once_and_trusted(
    store: TokenStore, key: StoreKey, source: Path, monkeypatch
) -> None:
    from model import tokens

    os.utime(source, ns=(1, 12345))
    assert open_store(store.folder, key).manifest["sources"][0]["mtime_ns"] == 12345
    monkeypatch.delattr(tokens, "_full_hash")  # not called again
    open_store(store.folder, key)


def test_store_outlives_its_source(store: TokenStore, key: StoreKey, source: Path) -> None:
    source.unlink()
    assert open_store(store.folder, key).n_documents == 2
    with pytest.raises(FileNotFoundError, match="corpus.csv does not exist"):
        ensure_store(store.folder, replace(key, kind="sft"), forbidden, log=lambda _: None)


def edit_manifest(**changes) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: (f / "manifest.json").unlink(), "no manifest"),
        (lambda f: (f / "manifest.json").write_text("{"), "not the manifest"),
        (lambda f: (f / "manifest.json").write_text("[1]"), "not the manifest"),
        (lambda f: (f / "manifest.json").write_text('{"format": 1}'), "not the manifest"),
        (edit_manifest(format=0), "format 0"),
        (edit_manifest(documents=3), "offsets.bin has 24 bytes, expected 32"),
        (lambda f: (f / "tokens-00000.bin").unlink(), "tokens-00000.bin is missing"),
        (lambda f: os.truncate(f / "tokens-00000.bin", 12), "tokens-00000.bin has 12 bytes"),
        (lambda f: os.truncate(f / "offsets.bin", 16), "offsets.bin has 16 bytes"),
        (edit_manifest(has_mask=True), "mask-00000.bin is missing"),
    ],
)
def test_broken_store_is_stale_and_built_anew(
    store: TokenStore, key: StoreKey, damage: Callable[[Path], None], reason: str
) -> None:
    damage(store.folder)
    with pytest.raises(StaleStore, match=reason):
        open_store(store.folder, key)
    said: list[str] = []
    new = ensure_store(store.folder, key, lambda: [batch([[9]])], log=said.append)
    assert new.document(0).tolist() == [9]
    assert len(said) == 1 and str(store.folder) in said[0]
    assert sorted(path.name for path in store.folder.parent.iterdir()) == [
        "corpus.csv",
        "corpus.tokens",
    ]


def test_missing_store_is_stale(tmp_path: Path) -> None:
    with pytest.raises(StaleStore, match="does not exist"):
        open_store(tmp_path / "none.tokens")
    (tmp_path / "file.tokens").write_text("")
    with pytest.raises(StaleStore):
        open_store(tmp_path / "file.tokens")


def test_open_store_survives_its_replacement(store: TokenStore, key: StoreKey) -> None:
    new_key = replace(key, tokenizer_sha256="b")
    write_store(store.folder, new_key, [batch([[3, 3, 3, 3, 3, 3, 3]])])
    assert store.document(1).tolist() == [1, 6, 7, 2]
    assert open_store(store.folder, new_key).n_documents == 1


# ---------------------------------------------------------------- killed, twice at once, disk full


def test_failing_source_leaves_the_old_store(store: TokenStore, key: StoreKey) -> None:
    def failing() -> Iterator[Documents]:
        yield batch([[1]])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(store.folder, key, failing())
    assert open_store(store.folder, key).n_documents == 2
    assert sorted(path.name for path in store.folder.parent.iterdir()) == [
        "corpus.csv",
        "corpus.tokens",
    ]


def test_source_that_grows_meanwhile_is_told(tmp_path: Path, source: Path, key: StoreKey) -> None:
    def growing() -> Iterator[Documents]:
        yield batch([[1]])
        with source.open("ab") as file:
            file.write(b"more\n")

    with pytest.raises(ValueError, match="corpus.csv changed while it was tokenised"):
        write_store(store_folder(source), key, growing())
    assert not store_folder(source).exists()


FILLER = """
    import resource, sys
    import numpy as np
    from model.encoding import Documents
    from model.store_writer import write_store
    from model.tokens import StoreKey

    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    ones = np.ones(1000, int)
    documents = (Documents(ones, ones, ones) for _ in iter(int, 1))  # no end
    try:
        write_store(sys.argv[1], StoreKey("pretrain", (), "", 500), documents)
    except OSError as error:
        print(error)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on file sizes")
def test_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    """The limit on file sizes stands in for a full disk: writing fails, and closing fails again."""
    command = [sys.executable, "-c", textwrap.dedent(FILLER), str(tmp_path / "a.tokens")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stderr == ""
    assert re.search(r"a\.tokens does not fit on the disk .*free some space", result.stdout)
    assert list(tmp_path.iterdir()) == []


def test_other_errors_of_the_system_keep_their_name(source: Path, key: StoreKey) -> None:
    def failing() -> Iterator[Documents]:
        yield batch([[1]])
        raise ConnectionError("the network folder went away")

    with pytest.raises(ConnectionError, match="network folder"):
        write_store(store_folder(source), key, failing())


def test_a_disk_that_is_too_small_is_told_before(source: Path, key: StoreKey) -> None:
    os.truncate(source, 4 * shutil.disk_usage(source.parent).free)  # a hole: no disk is used
    with pytest.raises(OSError, match=r"will need about .* GB and .* GB are free: free some space"):
        write_store(store_folder(source), key, forbidden())


BUILDER = """
    import sys, time
    import numpy as np
    from pathlib import Path
    from model.encoding import Documents
    from model.store_writer import ensure_store
    from model.tokens import StoreKey

    source, pause, tokenizer = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]

    def documents():
        print("building", flush=True)
        for i in range(50):
            lengths = np.full(20, 40)
            yield Documents(np.full(800, i), lengths, lengths)
            time.sleep(pause)

    key = StoreKey("pretrain", (source,), tokenizer, 500)
    folder = source.with_suffix(".tokens")
    store = ensure_store(folder, key, documents, log=lambda _: None, shard_tokens=3000)
    print("ready", store.n_documents, int(store.document(999)[39]), flush=True)
"""


def start_builder(source: Path, pause: float, tokenizer: str = "a") -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(BUILDER), str(source), str(pause), tokenizer],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_killed_build_leaves_no_store(source: Path) -> None:
    """kill -9 at many moments: either no store or a whole one; the next build succeeds."""
    folder = store_folder(source)
    key = StoreKey("pretrain", (source,), "a", 500)
    n_unfinished = 0
    for delay in np.linspace(0, 0.35, 8):
        process = start_builder(source, 0.005)
        assert process.stdout.readline() == "building\n"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if folder.exists():
            assert open_store(folder, key).n_documents == 1000
            folder.rename(folder.with_suffix(".done"))
            break
        n_unfinished += 1
    assert n_unfinished > 3
    assert start_builder(source, 0).communicate(timeout=60)[0] == "building\nready 1000 49\n"
    names = sorted(path.name for path in source.parent.iterdir() if path.suffix != ".done")
    assert names == ["corpus.csv", "corpus.tokens"]


@pytest.mark.slow
def test_two_processes_build_once(source: Path) -> None:
    builders = [start_builder(source, 0.02) for _ in range(3)]
    said = [builder.communicate(timeout=60)[0] for builder in builders]
    assert sorted(said) == ["building\nready 1000 49\n"] + ["ready 1000 49\n"] * 2
    assert sorted(p.name for p in source.parent.iterdir()) == ["corpus.csv", "corpus.tokens"]


READER = """
    import sys
    import numpy as np
    from pathlib import Path
    from model.order import Sampler
    from model.packing import open_plan, read_rows
    from model.tokens import open_store

    def resident_mb():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * 4096 / 1e6

    store = open_store(sys.argv[1])
    small = open_store(sys.argv[2])
    read_rows(small, open_plan(small, 513), np.arange(1))  # what numpy itself needs
    before = resident_mb()
    plan = open_plan(store, 513)
    planned = resident_mb()
    sampler, most = Sampler(plan.n_rows, 1), planned
    for position in range(0, 200_000, 64):
        rows = read_rows(store, plan, sampler.share(position, 64))
        most = max(most, resident_mb())
    assert rows.tokens.shape == (64, 513) and plan.utilisation > 0.98
    print(planned - before, most - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc/self/statm")
def test_memory_does_not_grow_with_the_store(tmp_path: Path) -> None:
    """A billion tokens, 100 million of them read in random order: less than 50 MB."""
    lengths = np.random.default_rng(0).integers(50, 510, 3_600_000)
    offsets = np.cumsum([0, *lengths]).astype("<u8")
    small = write_store(
        tmp_path / "small.tokens", StoreKey("pretrain", (), "", VOCAB), [batch([[1] * 9] * 99)]
    )
    folder = tmp_path / "large.tokens"
    folder.mkdir()
    n_tokens = int(offsets[-1])
    assert n_tokens > 10**9
    half = int(offsets[1_800_000])
    for i, n in enumerate((half, n_tokens - half)):
        with open(folder / f"tokens-{i:05d}.bin", "wb") as file:
            file.truncate(2 * n)  # a hole: no disk is used
    (folder / "offsets.bin").write_bytes(offsets.tobytes())
    manifest = small.manifest | {
        "documents": len(lengths),
        "tokens": n_tokens,
        "shards": [half, n_tokens - half],
        "lengths_hash": "0",
        "held_out": {"documents": [], "text_bytes": []},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(READER), str(folder), str(small.folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    planned, most = map(float, result.stdout.split())
    assert planned < 50
    assert most < 50
