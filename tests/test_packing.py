"""Packing: nothing lost, nothing twice, no row longer; rows read = rows put together by hand."""

import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import packing
from model.encoding import Documents
from model.packing import cut_documents, open_plan, pack, read_rows
from model.store_writer import write_store
from model.tokens import StoreKey, TokenStore

VOCAB = 1000


def make_store(
    folder: Path, documents: list[list[int]], masks: list[list[int]] | None = None, **kwargs
) -> TokenStore:
    """Write documents in batches of five; every document's text has 3 bytes a token."""
    key = StoreKey("pretrain", (), "hash of a tokenizer", VOCAB)
    batches = []
    for i in range(0, len(documents), 5):
        part = documents[i : i + 5]
        lengths = np.array([len(document) for document in part], np.int64)
        ids = np.array([token for document in part for token in document], np.int64)
        mask = None
        if masks is not None:
            mask = np.array([bit for bits in masks[i : i + 5] for bit in bits], bool)
        batches.append(Documents(ids, lengths, 3 * lengths, mask=mask))
    return write_store(folder / "a.tokens", key, batches, **kwargs)


def random_documents(seed: int, n: int, longest: int) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(0, longest + 1, n)
    return [generator.integers(0, VOCAB, length).tolist() for length in lengths]


some_lengths = st.lists(st.one_of(st.integers(0, 12), st.integers(0, 100)), max_size=80)


@given(lengths=some_lengths, row_tokens=st.integers(2, 40))
def test_each_token_but_the_first_is_a_target_once(lengths: list[int], row_tokens: int) -> None:
    targets: list[list[int]] = [[] for _ in lengths]
    for document, start, length in zip(*cut_documents(lengths, row_tokens), strict=True):
        assert 1 <= length <= row_tokens
        assert 0 <= start and start + length <= lengths[document]
        targets[document] += range(start + 1, start + length)
    assert targets == [list(range(1, length)) for length in lengths]


@given(lengths=some_lengths, row_tokens=st.integers(2, 40))
def test_a_document_is_cut_only_if_longer_than_a_row(lengths: list[int], row_tokens: int) -> None:
    documents, _, pieces = cut_documents(lengths, row_tokens)
    for document, length in enumerate(lengths):
        n_pieces = (documents == document).sum()
        if length <= row_tokens:
            assert n_pieces == (length > 0)
        else:
            assert n_pieces > 1 and pieces[documents == document].min() > 1  # each has a target


def pack_slowly(lengths: list[int], row_tokens: int) -> list[list[int]]:
    """First-fit decreasing as the textbook has it: each item into the first row that has room."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        row = next((row for row in rows if sum(row) + length <= row_tokens), None)
        if row is None:
            rows.append(row := [])
        row.append(length)
    return rows


@given(
    lengths=st.lists(st.integers(1, 64), max_size=200),
    row_tokens=st.sampled_from([64, 65, 100, 513, 70_000]),
)
def test_packing_is_first_fit_decreasing(lengths: list[int], row_tokens: int) -> None:
    order, sizes = pack(np.array(lengths, np.int64), row_tokens)
    assert sorted(order.tolist()) == list(range(len(lengths)))  # nothing lost, nothing twice
    rows = np.split(np.array(lengths, np.int64)[order], np.cumsum(sizes)[:-1]) if lengths else []
    assert all(row.sum() <= row_tokens for row in rows)
    found = sorted(sorted(row.tolist()) for row in rows)
    assert found == sorted(sorted(row) for row in pack_slowly(lengths, row_tokens))


def test_packing_grows_with_the_fillings_not_with_the_pieces() -> None:
    """A million pieces take 0.03 s; row by row it would be 1.5 s."""
    lengths = np.random.default_rng(0).integers(2, 514, 1_000_000)
    start = time.process_time()
    _, sizes = pack(lengths, 513)
    assert time.process_time() - start < 0.5
    assert lengths.sum() / (len(sizes) * 513) > 0.99


def test_long_documents_must_fit_where_they_may_not_be_cut() -> None:
    assert cut_documents([3, 8], 8, cut=False)[2].tolist() == [3, 8]
    with pytest.raises(ValueError, match="9 tokens, but a row 8"):
        cut_documents([3, 9], 8, cut=False)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 60),
    longest=st.sampled_from([5, 30, 90]),
    row_tokens=st.integers(2, 40),
    shard_tokens=st.sampled_from([1, 20, 10**6]),
    window=st.sampled_from([1, 7, 10**6]),
    with_mask=st.booleans(),
)
def test_rows_are_what_a_reader_by_hand_gives(
    tmp_path_factory,
    seed: int,
    n: int,
    longest: int,
    row_tokens: int,
    shard_tokens: int,
    window: int,
    with_mask: bool,
) -> None:
    """Across shards and windows, each row is its pieces one after another, and all is there."""
    documents = [*random_documents(seed, n, longest), [5, 6]]
    masks = None
    if with_mask:
        masks = [[token % 2 for token in document] for document in documents]
    folder = tmp_path_factory.mktemp("store")
    store = make_store(folder, documents, masks, shard_tokens=shard_tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "WINDOW_DOCUMENTS", window)
        plan = open_plan(store, row_tokens, hold_out=False)
    rows = read_rows(store, plan, np.arange(plan.n_rows))
    assert rows.tokens.shape == rows.segments.shape == (plan.n_rows, row_tokens)

    targets: list[list[int]] = [[] for _ in documents]
    for row in range(plan.n_rows):
        positions, lengths, _ = plan.pieces(np.array([row]))
        tokens, segments, mask = [], [], []
        for number, (position, length) in enumerate(zip(positions, lengths, strict=True)):
            document = int(store.document_at(position))
            start = int(position - store.bounds(document, document)[0])
            tokens += documents[document][start : start + length]
            mask += masks[document][start : start + length] if masks else []
            segments += [number] * int(length)
            targets[document] += range(start + 1, start + int(length))
        padding = row_tokens - len(tokens)
        assert rows.tokens[row].tolist() == tokens + [0] * padding
        assert rows.segments[row].tolist() == segments + [-1] * padding
        if masks:
            assert rows.mask[row].tolist() == [bool(bit) for bit in mask] + [False] * padding
    assert [sorted(t) for t in targets] == [list(range(1, len(d))) for d in documents]
    assert plan.n_tokens == (rows.segments >= 0).sum()
    assert plan.utilisation == pytest.approx((rows.segments >= 0).mean())

    some = np.random.default_rng(seed).permutation(plan.n_rows)[:5]  # any rows, in any order
    again = read_rows(store, plan, some)
    assert np.array_equal(again.tokens, rows.tokens[some])
    assert np.array_equal(again.segments, rows.segments[some])
    assert again.mask is None if masks is None else np.array_equal(again.mask, rows.mask[some])


def test_held_out_documents_are_in_no_row(tmp_path: Path) -> None:
    documents = [[i % VOCAB] * (1 + i % 9) + [i // VOCAB, 999] for i in range(3000)]
    store = make_store(tmp_path, documents)
    held_out = store.held_out
    assert 2 < len(held_out) < 60
    plan = open_plan(store, 33)
    positions, _, _ = plan.pieces(np.arange(plan.n_rows))
    trained = np.sort([store.document_at(position) for position in positions])
    assert np.array_equal(trained, np.setdiff1d(np.arange(3000), held_out))
    everything = open_plan(store, 33, hold_out=False)
    assert everything.n_pieces == 3000


def test_a_document_alone_in_its_row(tmp_path: Path) -> None:
    documents = random_documents(0, 40, 30)
    store = make_store(tmp_path, documents)
    plan = open_plan(store, 11, alone=True, hold_out=False)
    rows = read_rows(store, plan, np.arange(plan.n_rows))
    found = [row[used == 0].tolist() for row, used in zip(*rows[:2], strict=True)]
    expected = [
        d[start : start + 11] for d in documents for start in range(0, max(len(d) - 1, 1), 10)
    ]
    assert found == [piece for piece in expected if piece]
    assert plan.n_rows == plan.n_pieces


def test_plan_is_kept_and_damage_is_seen(tmp_path: Path) -> None:
    store = make_store(tmp_path, random_documents(1, 200, 50))
    plan = open_plan(store, 33)
    written = plan.path.stat().st_mtime_ns
    assert open_plan(store, 33).path.stat().st_mtime_ns == written
    content = plan.path.read_bytes()
    for damaged in (content[:-8], content[:20], b"", b"\0" * len(content)):
        plan.path.write_bytes(damaged)
        again = open_plan(store, 33)
        assert again.path.read_bytes() == content  # made anew, and the same
    assert not list(store.folder.glob("*.tmp"))
    different = {open_plan(store, 33, **k).path for k in ({"alone": True}, {"hold_out": False}, {})}
    assert len(different) == 3
    assert open_plan(store, 34).path != plan.path


def test_a_plan_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    store = make_store(tmp_path, random_documents(1, 20, 50))
    store.folder.rename(tmp_path / "gone")
    with pytest.raises(OSError, match="cannot write .*plan-33.* make the folder writable"):
        open_plan(store, 33)


def test_a_plan_of_other_lengths_is_not_taken(tmp_path: Path) -> None:
    one = make_store(tmp_path / "1", random_documents(1, 200, 50))
    other = make_store(tmp_path / "2", random_documents(2, 200, 50))
    plans = [open_plan(store, 33, hold_out=False) for store in (one, other)]
    assert plans[0].path.name != plans[1].path.name
    right = plans[0].path.read_bytes()
    plans[0].path.write_bytes(plans[1].path.read_bytes())  # even under the right name
    assert open_plan(one, 33, hold_out=False).path.read_bytes() == right


def test_plan_is_the_same_each_time_and_in_other_places(tmp_path: Path) -> None:
    documents = random_documents(3, 300, 60)
    plans = [open_plan(make_store(tmp_path / str(i), documents), 25) for i in range(2)]
    assert plans[0].path.read_bytes() == plans[1].path.read_bytes()


def test_giant_documents_are_planned_in_parts(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(packing, "WINDOW_DOCUMENTS", 10)
    documents = [[7] * 500, *random_documents(4, 20, 10), [8] * 333, [9] * 501]
    store = make_store(tmp_path, documents)
    windows = list(packing._windows(store, np.empty(0, np.int64), 5, True))
    assert len(windows) > 3  # documents of 125, 83, 125 pieces do not share one
    plan = open_plan(store, 5, hold_out=False)
    targets = plan.n_tokens - plan.n_pieces
    assert targets == sum(max(len(document) - 1, 0) for document in documents)


def test_plan_and_store_travel_to_other_processes(tmp_path: Path) -> None:
    store = make_store(tmp_path, random_documents(5, 50, 30), shard_tokens=100)
    plan = open_plan(store, 20)
    copies = pickle.loads(pickle.dumps((store, plan)))
    rows = np.arange(plan.n_rows)
    assert np.array_equal(read_rows(*copies, rows).tokens, read_rows(store, plan, rows).tokens)


def test_bad_arguments_are_told(tmp_path: Path) -> None:
    store = make_store(tmp_path, [[1, 2, 3]])
    for row_tokens in (1, 2**20):
        with pytest.raises(ValueError, match=f"row_tokens={row_tokens}"):
            open_plan(store, row_tokens)
    plan = open_plan(store, 8, hold_out=False)
    with pytest.raises(IndexError, match="plan that has 1"):
        read_rows(store, plan, np.array([1]))
    assert read_rows(store, plan, np.array([], np.int64)).tokens.shape == (0, 8)


@pytest.mark.parametrize("row_tokens", [257, 513, 1025, 2049])
def test_rows_of_ordinary_documents_are_nearly_full(row_tokens: int) -> None:
    """Lengths as in web text: many short, a long tail."""
    lengths = np.random.default_rng(0).lognormal(5.2, 1.1, 20_000).astype(int) + 2
    _, _, pieces = cut_documents(lengths, row_tokens)
    _, sizes = pack(pieces, row_tokens)
    assert pieces.sum() / (len(sizes) * row_tokens) > 0.98
