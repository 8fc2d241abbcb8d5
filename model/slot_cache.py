"""Keys and values of many requests, each in a slot of its own, preallocated.

A token costs no copy of the past, and a request that joins or leaves moves nobody but, at most, one
other. A model writes and reads through a view, as if it were a cache of ``transformers``.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64  # bytes, of a cache line: products may add in another order where it differs


class SlotCache:
    """For each layer keys and values (n_slots, K, capacity, Dh), and whose tokens they are.

    Memory is reserved at the first use, when the layer's device, dtype and shape are known; an
    operating system hands it out page by page as it is written. Each layer has a tensor of its own:
    compiled code copies all of a larger one at each write.
    """

    def __init__(self, n_slots: int, capacity: int) -> None:
        self.n_slots, self.capacity = n_slots, capacity
        self.ids: list[list[int]] = [[] for _ in range(n_slots)]  # the tokens a slot holds
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, layer_id: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of all slots; ``k`` and ``v`` (…, K, T, Dh) show their shape."""
        if layer_id not in self._layers:
            shape = self.n_slots, k.shape[1], self.capacity, k.shape[3]
            both = lazy_zeros((2, *shape), k)
            self._layers[layer_id] = both[0], both[1]
            self._rows[layer_id] = both.view(-1, shape[3]), both.flatten(1, 2)
        return self._layers[layer_id]

    def rows(self, layer_id: int) -> tuple[Tensor, Tensor]:
        """Return keys and values twice: a row for each place (2 * n_slots * K * capacity, Dh), and
        slots and heads as one, (2, n_slots * K, capacity, Dh). Something was written before.
        """
        return self._rows[layer_id]

    @torch.inference_mode()
    def copy(self, source: int, target: int, n_tokens: int) -> None:
        """Let slot ``target`` hold the first ``n_tokens`` tokens of ``source``."""
        for tensors in self._layers.values():
            for tensor in tensors:
                tensor[target, :, :n_tokens] = tensor[source, :, :n_tokens]
        self.ids[target] = self.ids[source][:n_tokens]

    @torch.inference_mode()
    def swap(self, one: int, other: int) -> None:
        """Exchange what two slots hold."""
        if one == other:
            return
        longest = max(len(self.ids[one]), len(self.ids[other]))
        for tensors in self._layers.values():
            for tensor in tensors:
                kept = tensor[one, :, :longest].clone()
                tensor[one, :, :longest] = tensor[other, :, :longest]
                tensor[other, :, :longest] = kept
        self.ids[one], self.ids[other] = self.ids[other], self.ids[one]


def lazy_zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return zeros (a masked place may not be NaN); on a CPU without writing them: what comes from
    ``calloc`` is zero, and takes memory only where it is written.
    """
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    n_bytes = math.prod(shape) * like.element_size()
    memory = np.zeros(n_bytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    memory = memory[start : start + n_bytes]
    return torch.from_numpy(memory).view(like.dtype).view(*shape)


class PromptView:
    """The end of one slot, for a part of a prompt: (1, K, T, Dh) goes in after what is there."""

    def __init__(self, cache: SlotCache, slot: int) -> None:
        self.cache, self.slot = cache, slot
        self.start = len(cache.ids[slot])

    def get_seq_length(self, layer_id: int = 0) -> int:
        """Return how many positions came before this part."""
        return self.start

    def update(self, k: Tensor, v: Tensor, layer_id: int) -> tuple[Tensor, Tensor]:
        """Store ``k`` and ``v`` (1, K, T, Dh); return all of the slot, (1, K, start + T, Dh)."""
        end = self.start + k.shape[2]
        if end > self.cache.capacity:
            raise ValueError(f"{end} positions do not fit a slot of {self.cache.capacity}")
        slot = slice(self.slot, self.slot + 1)
        keys, values = self.cache.layer(layer_id, k, v)
        keys[slot, :, self.start : end] = k
        values[slot, :, self.start : end] = v
        return keys[slot, :, :end], values[slot, :, :end]


class StepView:
    """The first ``n`` slots, for one token each: (n, K, 1, Dh) goes in at each one's length."""

    def __init__(self, cache: SlotCache, n: int, device: torch.device | str) -> None:
        self.cache, self.n = cache, n
        lengths = [len(ids) for ids in cache.ids[:n]]
        self.longest = max(lengths) + 1
        self.slots = torch.arange(n, device=device)
        self.positions = torch.tensor(lengths, device=device)

    def mask(self) -> Tensor | None:
        """Return which keys each token sees, (n, 1, 1, longest); None where one sees all."""
        if self.n == 1:
            return None
        keys = torch.arange(self.longest, device=self.positions.device)
        return (keys <= self.positions[:, None])[:, None, None]

    def get_seq_length(self, layer_id: int = 0) -> int:
        """Return how many positions came before the longest slot's token."""
        return self.longest - 1

    def update(self, k: Tensor, v: Tensor, layer_id: int) -> tuple[Tensor, Tensor]:
        """Store ``k`` and ``v`` (n, K, 1, Dh); return the slots, (n, K, longest, Dh)."""
        keys, values = self.cache.layer(layer_id, k, v)
        keys[self.slots, :, self.positions] = k[:, :, 0]
        values[self.slots, :, self.positions] = v[:, :, 0]
        return keys[: self.n, :, : self.longest], values[: self.n, :, : self.longest]
