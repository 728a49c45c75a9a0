"""Data loaders whose epochs can be repeated: what epoch e yields depends on the seed and e alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from transkd_fast.data.transforms import collate

SampleKey = tuple[int, int]


def _derive(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Runs the body with the CPU generators of torch, numpy and Python at `seed`, and puts them back afterwards."""
    state, of_numpy, of_python = torch.get_rng_state(), np.random.get_state(), random.getstate()
    # torch.manual_seed would reseed the GPU generators too, which are not put back.
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
        np.random.set_state(of_numpy)
        random.setstate(of_python)


class EpochSampler(Sampler[SampleKey]):
    """Yields (epoch, index) keys, in an order that depends on the seed and the epoch alone.

    Args:
        length: number of frames.
        shuffle: random order; False yields 0, 1, 2, ...
        seed: seed of all orders, >= 0.
        rank: number of this process among `replicas`, each of which takes every `replicas`-th frame of the order.
        replicas: number of processes that share the frames.
        even: leave out the last frames of the order that not every process would have one of; otherwise every frame is
            taken exactly once, and some processes take one more than others.
    """

    def __init__(
        self, length: int, shuffle: bool, seed: int = 0, rank: int = 0, replicas: int = 1, even: bool = False
    ) -> None:
        self.length = length
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.replicas = replicas
        self.even = even
        self.epoch = 0
        self.skip = 0

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Chooses the epoch that the next pass over the loader yields.

        Args:
            epoch: epoch number, >= 0.
            skip: frames of the epoch, over all processes, to leave out at its start: those an interrupted run has
                already seen.
        """
        self.epoch = epoch
        self.skip = skip

    def __len__(self) -> int:
        """Number of keys in the next pass."""
        return len(self._own(range(self.length)))

    def __iter__(self) -> Iterator[SampleKey]:
        """Keys of the chosen epoch."""
        order: Any = range(self.length)
        if self.shuffle:
            generator = torch.Generator().manual_seed(_derive(self.seed, self.epoch))
            order = torch.randperm(self.length, generator=generator).tolist()
        return iter([(self.epoch, index) for index in self._own(order)])

    def _own(self, order: Any) -> Any:
        end = self.length - self.length % self.replicas if self.even else self.length
        return order[self.skip : end][self.rank :: self.replicas]


class _KeyedDataset(Dataset[Any]):
    """Reads a dataset by (epoch, index), with torch's generator seeded from the key while transforms run.

    So a random crop is the same whichever worker draws it, and persistent workers learn of the epoch with the key.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, key: SampleKey) -> Any:
        epoch, index = key
        with _seeded(_derive(self.seed, epoch, index)):
            return self.dataset[index]


def make_loader(
    dataset: Dataset[Any],
    batch_size: int,
    shuffle: bool = False,
    seed: int = 0,
    workers: int = 0,
    drop_last: bool = False,
    rank: int = 0,
    replicas: int = 1,
) -> DataLoader[Any]:
    """Loader whose epoch e depends on (dataset, seed, e) alone, whatever the workers and whatever ran before.

    Call `loader.sampler.set_epoch(e)` before each pass, as with a `DistributedSampler`; a resumed run does the same and
    gets the same batches. Random transforms draw from the generators of torch, as those of torchvision do, of numpy or
    of Python.
    Batch i of all processes together holds the frames of batch i of one process with `replicas` times the batch size.

    Args:
        dataset: map-style dataset with a length.
        batch_size: samples per batch and process.
        shuffle: a new random order every epoch; False keeps the dataset's order.
        seed: seed of orders and augmentations, >= 0.
        workers: worker processes, kept alive between epochs; 0 loads in the calling process.
        drop_last: leave out the last batch when it is not full; every process then has as many batches.
        rank: number of this process.
        replicas: number of processes that share the frames; without `drop_last` each frame goes to one of them.

    Returns:
        DataLoader of (images [B, 3, H, W], masks [B, h, w]), in pinned memory where CUDA is available.

    Raises:
        ValueError: a number out of range, or a dataset that yields no batch.
    """
    for what, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"make_loader: expected {what} >= {least}, got {value}")
    length = len(dataset)  # type: ignore[arg-type]
    if length == 0 or (drop_last and length < batch_size * replicas):
        each = f" on each of {replicas} processes" if replicas > 1 else ""
        raise ValueError(
            f"make_loader: expected enough frames for one batch of {batch_size}{each}, got a dataset of {length}; "
            "lower batch_size or set drop_last=False"
        )
    return DataLoader(
        _KeyedDataset(dataset, seed),
        batch_size=batch_size,
        sampler=EpochSampler(length, shuffle, seed, rank, replicas, even=drop_last),
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        drop_last=drop_last,
        persistent_workers=workers > 0,
    )
