"""What a network costs: parameters, multiply-accumulates, time."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

Forward = Callable[[nn.Module, Tensor], Any]

# Products of two activations; a layer's product with its weights is never one of them.
_ACTIVATION_PRODUCTS = ("bmm", "baddbmm", "_scaled_dot_product")


class Macs(NamedTuple):
    """Multiply-accumulates of one forward pass.

    Attributes:
        layers: Those of convolutions and linear layers, as published figures count.
        attention: Those of attention's two products, of queries with keys and of weights with values.
        executed: Of `layers`, those that are left where a network folds layers that commute into one another.
    """

    layers: int
    attention: int
    executed: int

    @property
    def total(self) -> int:
        """Layers and attention."""
        return self.layers + self.attention


class Latency(NamedTuple):
    """Quantiles of a call's times, in seconds."""

    median: float
    p20: float
    p80: float
    calls: int


def count_parameters(module: nn.Module) -> int:
    """Counts parameters, buffers left out.

    Args:
        module: The module.

    Returns:
        Their number, shared ones once.
    """
    return sum(parameter.numel() for parameter in module.parameters())


def count_macs(module: nn.Module, shape: Sequence[int], forward: Forward | None = None) -> Macs:
    """Counts the multiply-accumulates of a forward pass in evaluation mode; nothing is computed.

    Args:
        module: The module; stays as it is.
        shape: Shape of the images.
        forward: Runs the module on images; None calls it.

    Returns:
        The counts. `layers` has every layer's own, also of those that the network folds into one another: layers
        with hooks are called one by one.

    Source: torch.utils.flop_counter; the figures of TransKD's table of model sizes leave out attention's products.
    """
    # On the meta device attention is two products; the CPU's fused attention is an operator that is not counted.
    shadow = copy.deepcopy(module).to("meta").eval()
    images = torch.empty(*shape, device="meta")

    def run() -> None:
        shadow(images) if forward is None else forward(shadow, images)

    executed, _ = _count(run)
    for layer in shadow.modules():
        layer.register_forward_hook(_ignore)
    layers, attention = _count(run)
    return Macs(layers, attention, executed)


def _ignore(module: nn.Module, inputs: Any, output: Any) -> None:
    """Does nothing: a module with a hook is to be called."""


def _count(run: Callable[[], None]) -> tuple[int, int]:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    counts = {str(op).removeprefix("aten."): n // 2 for op, n in counter.get_flop_counts()["Global"].items()}
    attention = sum(n for op, n in counts.items() if op.startswith(_ACTIVATION_PRODUCTS))
    return sum(counts.values()) - attention, attention


def measure_latency(call: Callable[[], Any], device: torch.device, seconds: float = 3.0, least: int = 5) -> Latency:
    """Times a call, after two that are not counted.

    Args:
        call: What is timed.
        device: Where it runs; a GPU is waited for before the clock is read.
        seconds: Time after which no further call is started.
        least: Number of calls even where they take longer.

    Returns:
        Median, 20 % and 80 % quantiles, number of calls.
    """

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(2):
        call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    quantiles = torch.tensor((0.2, 0.5, 0.8), dtype=torch.float64)
    p20, median, p80 = torch.tensor(times, dtype=torch.float64).quantile(quantiles).tolist()
    return Latency(median, p20, p80, len(times))
