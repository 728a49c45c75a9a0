"""Reads the golden values: portable pseudo-random tensors, digests of large results, and comparisons with both."""

import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

FOLDER = Path(__file__).parent / "golden"
FP64_TOLERANCE = 1e-9


@lru_cache
def load(name):
    return torch.load(FOLDER / f"{name}.pt", weights_only=True)


def tolerance(case, dtype):
    """Allowed relative deviation: the float32 one is that of the original's own float32 run, with a margin."""
    return FP64_TOLERANCE if dtype == torch.float64 else 10 * case["f32_vs_f64"]["worst"] + 1e-5


def _splitmix64(z):
    with np.errstate(over="ignore"):
        z = z + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def hashed(seed, name, shape, dtype=torch.float64):
    """Pseudo-random values k / 2048 in [-1, 1), a function of seed and name alone, exact in every float dtype."""
    count = int(np.prod(shape))
    start = _splitmix64(np.array([(seed << 32) ^ zlib.crc32(name.encode())], dtype=np.uint64))
    with np.errstate(over="ignore"):
        bits = _splitmix64(start + np.arange(count, dtype=np.uint64))
    values = ((bits >> np.uint64(52)).astype(np.int64) - 2048) / 2048.0
    return torch.from_numpy(values.reshape(shape)).to(dtype)


def _hashed_entry(key, tensor, norms, seed):
    module, _, leaf = key.rpartition(".")
    values = hashed(seed, key, tuple(tensor.shape))
    coarse = torch.floor(values * 128) / 128
    if leaf == "num_batches_tracked":
        return torch.zeros_like(tensor)
    if leaf == "running_mean":
        return 0.25 * values
    if leaf == "running_var":
        return 1 + 0.5 * coarse
    if module in norms:
        return 1 + 0.25 * coarse if leaf == "weight" else 0.25 * values
    if leaf == "bias":
        return 0.125 * values
    if tensor.dim() == 1:
        return 0.5 + 0.25 * coarse
    fan_in = tensor[0].numel()
    return values * 2.0 ** int(np.ceil(np.log2(np.sqrt(2 / fan_in))))


def hashed_state(module, seed, exclude=""):
    """State dict of a module with values that are a function of seed and key alone."""
    norms = {name for name, m in module.named_modules() if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm))}
    state = module.state_dict()
    return {k: _hashed_entry(k, t, norms, seed) for k, t in state.items() if not (exclude and k.startswith(exclude))}


def digest(tensor, samples=48):
    """Five summaries of a tensor that is too large to store."""
    flat = tensor.detach().double().flatten()
    count = flat.numel()
    picked = min(samples, count)
    return {
        "n": count,
        "sum": flat.sum().item(),
        "l1": flat.abs().sum().item(),
        "l2": flat.square().sum().sqrt().item(),
        "dot": (flat * hashed(777, "digest", (count,))).sum().item(),
        "sample": flat[(torch.arange(picked) * count) // picked],
    }


def _compare_digest(actual, expected, rtol, where):
    got = digest(actual, len(expected["sample"]))
    assert got["n"] == expected["n"], f"{where}: {got['n']} elements, expected {expected['n']}"
    rms = expected["l2"] / max(expected["n"], 1) ** 0.5
    scales = {"sum": expected["l1"], "l1": expected["l1"], "dot": expected["l1"], "l2": expected["l2"]}
    for name, scale in scales.items():
        assert abs(got[name] - expected[name]) <= rtol * scale, f"{where}.{name}: {got[name]} != {expected[name]}"
    scale = max(rms, expected["sample"].abs().max().item())
    error = (got["sample"] - expected["sample"]).abs().max().item()
    assert error <= rtol * scale, f"{where}.sample: off by {error / scale:.2e}"


def compare(actual, expected, rtol, where=""):
    """Asserts that results agree with golden ones (tensors, digests, numbers, None, lists and dicts of these).

    Tensors are compared in the maximum norm, relative to the expected tensor's maximum.
    """
    if expected is None:
        assert actual is None, f"{where}: expected None"
    elif isinstance(expected, dict) and "l2" in expected:
        _compare_digest(actual, expected, rtol, where)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), f"{where}: keys {sorted(actual.keys() ^ expected.keys())} differ"
        for key, value in expected.items():
            compare(actual[key], value, rtol, f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), f"{where}: {len(actual)} entries, expected {len(expected)}"
        for i, value in enumerate(expected):
            compare(actual[i], value, rtol, f"{where}[{i}]")
    else:
        assert actual is not None, f"{where}: got None"
        actual, expected = (torch.as_tensor(t, dtype=torch.float64).detach() for t in (actual, expected))
        assert actual.shape == expected.shape, f"{where}: shape {list(actual.shape)}, expected {list(expected.shape)}"
        finite = expected.isfinite()
        torch.testing.assert_close(actual[~finite], expected[~finite], equal_nan=True, msg=f"{where}: not as infinite")
        if not finite.any():
            return
        actual, expected = actual[finite], expected[finite]
        error, scale = (actual - expected).abs().max().item(), expected.abs().max().item()
        assert error <= rtol * scale, f"{where}: off by {error:.2e} at scale {scale:.2e}, allowed {rtol:.1e}"
