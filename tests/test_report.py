"""Before the first step: the batch that fits, and the run that does not."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_runs import pretrain, pretrain_flags, records, run_ranks, same_weights, write_corpus

from model.memory import fitting_batch, free_on_machine


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


# ----------------------------------------------------------------------------- what fits


def takes(fixed: int, row: int) -> Callable[[int], int]:
    return lambda size: fixed + row * size


@pytest.mark.parametrize("n_rows", (1, 12, 97, 512))
def test_what_is_picked_fits_and_the_next_larger_divisor_does_not(n_rows: int) -> None:
    divisors = [size for size in range(1, n_rows + 1) if n_rows % size == 0]
    needed = takes(1000, 90)
    for room in range(0, 1000 + 120 * n_rows, 61):
        size = fitting_batch(n_rows, needed, room)
        fits = [d for d in divisors if needed(d) <= 0.9 * room]
        assert size == (max(fits) if fits else None)
    assert fitting_batch(n_rows, needed, None) is None


@pytest.mark.slow
def test_auto_makes_the_same_updates_from_what_fits(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """4 usual rows x 4 fit at once: the weights are those of a batch of as many."""
    given = "--max_steps 6 --accumulation_steps 4"
    assert pretrain(corpus, tmp_path / "auto", given, "--batch_size auto") == 0
    assert "batch       64 rows at once, 1 times an update" in capsys.readouterr().out
    assert pretrain(corpus, tmp_path / "whole", "--max_steps 6 --batch_size 64") == 0
    assert same_weights(tmp_path / "auto/pretrain_32.pth", tmp_path / "whole/pretrain_32.pth")
    assert pretrain(corpus, tmp_path / "parts", given, "--batch_size 16") == 0
    for one, other in zip(records(tmp_path / "auto"), records(tmp_path / "parts"), strict=True):
        assert (one["step"], one["tokens"]) == (other["step"], other["tokens"])
        assert one.get("loss", 0) == pytest.approx(other.get("loss", 0), rel=1e-4)


@pytest.mark.slow
def test_ranks_pick_the_same_and_share_the_machine(corpus: Path, tmp_path: Path) -> None:
    given = [*pretrain_flags(corpus, tmp_path / "out"), "--batch_size auto --max_steps 2"]
    assert run_ranks(2, "1-pretrain.py", *given, log=tmp_path / "log") == [0, 0]
    shown = (tmp_path / "log").read_text("utf-8")
    assert shown.count("16 rows at once, 1 times an update") == 1
    assert "a rank of " in shown


# ----------------------------------------------------------------------------- what does not


@pytest.mark.parametrize("dry", ("--dry_run", ""))
def test_what_cannot_fit_is_refused_with_what_would(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture, dry: str
) -> None:
    given = f"--max_steps 1 --batch_size {2**30} --accumulation_steps 2 {dry}"
    with pytest.raises(ValueError) as caught:
        pretrain(corpus, tmp_path, given)
    assert "memory      about" in capsys.readouterr().out  # the report comes all the same
    message = str(caught.value)
    assert f"--batch_size {2**30} takes about" in message and "there is" in message
    words = message.split()
    size = int(words[words.index("use") + 2])
    times = int(words[words.index("--accumulation_steps") + 1].strip(","))
    assert size * times == 2 * 2**30
    assert pretrain(corpus, tmp_path, f"--max_steps 1 --batch_size {size} --dry_run") == 0
    assert list(tmp_path.iterdir()) == []


def test_where_not_even_a_row_fits_it_says_what_to_lower(corpus: Path, tmp_path: Path) -> None:
    flags = "--max_seq_len 1000000 --hidden_dim 20000 --batch_size 1 --max_steps 1"  # 1.2 TB
    with pytest.raises(ValueError, match="one row of 1000000 tokens alone .* --max_seq_len"):
        pretrain(corpus, tmp_path, flags)


def test_a_model_beyond_memory_is_refused_before_it_takes_any(corpus: Path, tmp_path: Path) -> None:
    """Terabytes: whoever builds it first does not live to tell."""
    with pytest.raises(ValueError, match=r"the weights of [\d,]+ parameters alone take [\d.]+ TB"):
        pretrain(corpus, tmp_path, "--dim 32768 --n_layers 48 --dry_run")


def test_more_rows_than_there_are_need_no_room(corpus: Path, tmp_path: Path) -> None:
    assert pretrain(corpus, tmp_path, f"--batch_size {2**30} --epochs 1 --dry_run") == 0


# ----------------------------------------------------------------------------- what there is


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def test_free_memory_is_the_kernels_figure_or_what_a_group_leaves(tmp_path: Path) -> None:
    assert free_on_machine(tmp_path) is None  # no Linux
    write(tmp_path / "proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    4000 kB")
    assert free_on_machine(tmp_path) == 4000 * 1024
    group = tmp_path / "sys/fs/cgroup/jobs"
    write(tmp_path / "proc/self/cgroup", "0::/jobs/mine")
    write(group / "memory.max", 3_000_000)
    write(group / "memory.current", 2_500_000)
    write(group / "memory.stat", "anon 2000000\ninactive_file 400000")
    write(group / "mine/memory.max", "max")
    assert free_on_machine(tmp_path) == 900_000  # cached files give way
    write(group / "memory.max", 10**12)
    assert free_on_machine(tmp_path) == 4000 * 1024
    write(tmp_path / "proc/self/cgroup", "4:cpu,memory:/not/seen/here\n0::/")
    top = tmp_path / "sys/fs/cgroup/memory"
    write(top / "memory.limit_in_bytes", 2_000_000)
    write(top / "memory.usage_in_bytes", 1_999_999)
    write(top / "memory.stat", "total_inactive_file 0")
    assert free_on_machine(tmp_path) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_room_is_what_is_free_of_it() -> None:
    from model.memory import own_room
    from model.runtime import Runtime

    room = own_room(Runtime(torch.device("cuda"), torch.bfloat16))
    assert 0 < room <= torch.cuda.get_device_properties(0).total_memory
