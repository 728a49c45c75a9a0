"""What networks cost: against the published figures, and closed forms."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from published_files import B0, TEACHER
from torch import nn

import transkd_fast as tf
from transkd_fast.models import complexity, convert
from transkd_fast.models.complexity import count_macs, count_parameters, measure_latency

IMAGE = (1, 3, 512, 1024)


@pytest.mark.parametrize(
    ("name", "published", "layers", "total"),
    [("segformer_b0", 13.67, 13.60, 17.77), ("segformer_b2", 113.84, 113.62, 129.19)],
)
def test_published_networks(name, published, layers, total):
    network = convert.skeleton(name, 20)
    macs = count_macs(network, IMAGE)
    assert macs.layers / 1e9 == pytest.approx(published, rel=0.01)
    assert (round(macs.layers / 1e9, 2), round(macs.total / 1e9, 2)) == (layers, total)
    assert network.training is False and not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize(("variant", "published"), [("base", 16.47), ("gl", 16.80), ("ea", 17.84)])
def test_published_students_in_training(variant, published):
    with torch.device("meta"):
        network = tf.TransKD(convert.skeleton("segformer_b0", 20), B0[0], TEACHER, variant=variant).eval()
    with tf.use_backend("eager"):
        assert count_macs(network, IMAGE).layers / 1e9 == pytest.approx(published, rel=0.01)


def test_a_folded_decoder_executes_less():
    macs = count_macs(convert.skeleton("segformer_b0", 20), IMAGE)
    width, pixels = 256, 128 * 256
    concatenated, folding = 4 * width * width * pixels, width * width * sum(B0[0])
    assert macs.executed == macs.layers - concatenated + folding


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Linear(8, 24)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x):
        x = self.depthwise(self.conv(x))
        q, k, v = self.linear(x.flatten(2).transpose(1, 2)).unflatten(-1, (2, 12)).transpose(1, 2).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v)


def test_closed_form():
    network, n = Attends(), 4 * 6
    macs = count_macs(network, (2, 3, 8, 12))
    layers = 2 * n * (8 * 27 + 8 * 9 + 8 * 24)
    assert macs == (layers, 2 * 2 * n * n * 4 * 2, layers) and macs.total == layers + macs.attention
    assert count_parameters(network) == 8 * 27 + 8 + 8 * 9 + 8 + 8 * 24 + 24


def test_quantiles_of_latency(monkeypatch):
    # The clock moves by 1, 2, 3, ... seconds during the calls and not between them.
    clock = itertools.chain([0.0], *([0.0, float(k)] for k in range(1, 12)), [0.0])
    monkeypatch.setattr(complexity.time, "perf_counter", lambda: next(clock))
    calls = []
    latency = measure_latency(lambda: calls.append(1), torch.device("cpu"), seconds=0.0, least=11)
    assert len(calls) == 2 + 11
    assert latency == (6.0, 3.0, 9.0, 11)
