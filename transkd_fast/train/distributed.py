"""Several processes that train one network, as torchrun starts them; one process alone where it did not."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from transkd_fast.train.config import ConfigError
from transkd_fast.train.settings import Config

T = TypeVar("T")

EXIT_WITHIN = 10  # seconds that a process with an error has to end by itself


@dataclass(frozen=True)
class Processes:
    """This process among those of a training.

    Args:
        rank: its number, from 0.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether it is the one that writes and logs."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all processes; alone, the tensor itself."""
        if self.count == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether a flag is set in any process."""
        return flag if self.count == 1 else bool(self.sum(torch.tensor(int(flag), device=device)))

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.count > 1:
            dist.barrier()

    def by_first(self, function: Callable[[], T]) -> T:
        """Call a function in the first process alone, and hand its result to all.

        Args:
            function: what it returns can be pickled.

        Returns:
            The result.
        """
        if self.count == 1:
            return function()
        result = [function() if self.first else None]
        dist.broadcast_object_list(result)
        return result[0]  # type: ignore[return-value]


ALONE = Processes()


@contextmanager
def joined(config: Config) -> Iterator[Processes]:
    """Join the processes that torchrun started, over NCCL on GPUs and gloo on CPUs.

    Where this process fails, the group is left as it is: the process ends, and torchrun ends the others.

    Args:
        config: gives the device.

    Yields:
        This process among them.

    Raises:
        ConfigError: if the configuration names one GPU for all processes, or legacy rules of a single process.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    if ":" in config.device:
        raise ConfigError(
            f"device: expected 'auto', 'cpu' or 'cuda' with {count} processes, each of which takes the GPU of its"
            f" number, got {config.device!r}"
        )
    for key, legacy in (
        ("distill.legacy", config.distill.legacy),
        ("legacy.quarter_labels", config.legacy.quarter_labels),
    ):
        if legacy:
            raise ConfigError(f"{key}: expected false with {count} processes, for the published training had one")
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"device: expected a GPU per process, got {torch.cuda.device_count()} for process {local} of this"
                " machine; lower --nproc-per-node"
            )
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    except BaseException:
        # The others wait for this process, which may wait for them while it ends.
        faulthandler.dump_traceback_later(EXIT_WITHIN, exit=True)
        raise
    dist.destroy_process_group()
