"""Knowledge Review's fusion, against the same written stage by stage in float64."""

from __future__ import annotations

import pytest
import torch

from transkd_fast.nn import Review

STUDENT, TEACHER = (4, 6, 10), (5, 7, 9)


def maps(seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(13, 18), (7, 9), (4, 5)]  # odd ones: no whole ratio
    return [torch.randn(2, c, *size, generator=generator).double() for c, size in zip(STUDENT, sizes, strict=True)]


def normalised(x, norm):
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


def pointwise(x, conv):
    y = torch.einsum("oi,bihw->bohw", conv.weight[:, :, 0, 0], x)
    return y if conv.bias is None else y + conv.bias[:, None, None]


def by_hand(module, xs):
    outputs, carried = [], None
    for stage, x in zip(module, reversed(xs), strict=True):
        fused = normalised(pointwise(x, stage.conv1[0]), stage.conv1[1])
        if carried is not None:
            (height, width), (h, w) = fused.shape[2:], carried.shape[2:]
            rows = torch.arange(height) * h // height
            columns = torch.arange(width) * w // width
            up = carried[:, :, rows][:, :, :, columns]
            scores = pointwise(torch.cat([fused, up], 1), stage.attention)
            weight_x, weight_up = 1 / (1 + (-scores[:, 0:1]).exp()), 1 / (1 + (-scores[:, 1:2]).exp())
            fused = weight_x * fused + weight_up * up
        patches = torch.nn.functional.unfold(fused, 3, padding=1)
        wide = torch.einsum("ok,bkn->bon", stage.conv2[0].weight.flatten(1), patches)
        outputs.insert(0, normalised(wide.unflatten(2, fused.shape[2:]), stage.conv2[1]))
        carried = fused
    return outputs


def test_maps_as_by_hand_and_every_parameter_learns():
    module = Review(STUDENT, TEACHER).double()
    for norm in module.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
            torch.nn.init.uniform_(norm.bias)
    xs = maps()
    outputs = module(xs)
    assert [t.shape for t in outputs] == [(2, c, *x.shape[2:]) for c, x in zip(TEACHER, xs, strict=True)]
    for output, truth in zip(outputs, by_hand(module, xs), strict=True):
        torch.testing.assert_close(output, truth, rtol=1e-10, atol=1e-10)
    sum(output.square().sum() for output in outputs).backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


def test_the_width_is_the_deepest_stages_at_most_512():
    assert Review((4, 600), (4, 4))[0].conv1[0].out_channels == 512
    assert Review((4, 20), (4, 4))[1].conv1[0].out_channels == 20
    assert Review((4, 20), (4, 4), mid_channels=6)[1].conv1[0].out_channels == 6


def test_wrong_maps_are_refused():
    with pytest.raises(ValueError, match="one entry per stage"):
        Review((4, 6), (4,))
    module = Review(STUDENT, TEACHER).double()
    with pytest.raises(ValueError, match=r"expected 3 maps .* channels \[4, 6, 10\]"):
        module(maps()[:2])
    with pytest.raises(ValueError, match="fine to coarse"):
        module(list(reversed(maps())))
