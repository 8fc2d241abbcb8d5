"""Device, precision, seeds, signals."""

import os
import signal
import threading

import pytest
import torch

from model.runtime import (
    Runtime,
    StopRequest,
    inference_dtype,
    pick_device,
    setup,
    training_dtype,
)

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def test_a_device_that_is_not_there_is_told() -> None:
    assert pick_device("cpu") == CPU
    with pytest.raises(ValueError, match="--device gpu is unknown: use auto, cpu, cuda"):
        pick_device("gpu")
    with pytest.raises(ValueError, match="--device cuda:99 is not on this machine: use --device"):
        pick_device("cuda:99")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    assert torch.backends.mps.is_available() or pick_device("auto").type == best


def test_a_dtype_is_what_was_asked_for() -> None:
    for name in ("float32", "bfloat16"):
        assert training_dtype(name, CPU) == training_dtype(name, CUDA) == getattr(torch, name)
    assert training_dtype("float16", CUDA) == torch.float16
    with pytest.raises(ValueError, match="--dtype float16 trains on a GPU only"):
        training_dtype("float16", CPU)
    assert training_dtype("auto", CPU) in (torch.float32, torch.bfloat16)
    assert inference_dtype("auto", CPU) == torch.float32
    assert inference_dtype("float16", CPU) == torch.float16  # no gradients to lose


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_products_are_made_in_the_dtype(dtype: torch.dtype) -> None:
    a = torch.ones(2, 2)
    with Runtime(CPU, dtype).autocast():
        assert (a @ a).dtype == dtype
    assert (a @ a).dtype == torch.float32


def test_setup_seeds_so_that_weights_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYON_NUM_THREADS", raising=False)
    draws = []
    for seed in (1, 1, 2):
        runtime = setup("cpu", "float32", seed, num_workers=3)
        draws.append(torch.rand(4).tolist())
    assert draws[0] == draws[1] != draws[2]
    assert (runtime.device, runtime.dtype, runtime.is_main) == (CPU, torch.float32, True)
    assert os.environ["RAYON_NUM_THREADS"] == "3"


def test_results_and_warnings_go_their_ways(capsys: pytest.CaptureFixture) -> None:
    for rank in (0, 1):
        runtime = Runtime(CPU, torch.float32, rank=rank, world_size=2)
        runtime.log("loss")
        runtime.warn("careful")
    assert capsys.readouterr() == ("loss\n", "warning: careful\n")  # of rank 0 alone


def test_a_signal_is_noted_and_a_second_one_ends() -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    stop = StopRequest()
    with pytest.raises(KeyboardInterrupt):
        with stop:
            assert not stop
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop and stop.signal == signal.SIGTERM
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_what_a_launcher_sends_twice_counts_once() -> None:
    with StopRequest(grace_s=60) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGINT
    with pytest.raises(KeyboardInterrupt), StopRequest(grace_s=1e-9):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)


def test_another_thread_leaves_signals_alone() -> None:
    def work() -> None:
        with StopRequest() as stop:  # only the main thread may set handlers
            seen.append(bool(stop))

    seen: list[bool] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
