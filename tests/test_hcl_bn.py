"""hcl_bn on every backend that can run here, against torch's batch norm and the fp64 reference of hcl."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from kernels_here import device_of, interpreted
from op_checks import OpChecks, each
from op_description import Cases, Op, random
from torch import nn

from transkd_fast.functional import BatchNorm, hcl_bn_loss, hcl_loss
from transkd_fast.ops._registration import raw_op
from transkd_fast.ops.hcl_bn import kept_shapes, stages_of
from transkd_fast.reference.hcl import hcl as hcl_reference

LEVELS = [0.5, 0.25, 0.125]
STATISTICS = ("running_mean", "running_var", "counter")


def make(shape, dtype=torch.float32, layout="nchw", offset=0.0):
    small = torch.float64 if dtype == torch.float64 else torch.float32
    channels = (shape[1],)
    return {
        "u": random(shape, dtype, layout, offset) * 3,
        "teacher": random(shape, dtype, layout),
        "weight": 1 + random(channels, small) / 4,
        "bias": random(channels, small) / 4,
        "running_mean": random(channels, small),
        "running_var": 0.5 + random(channels, small).abs(),
        "counter": torch.tensor(2),
    }


def batch_norm(inputs, **settings):
    bn = BatchNorm(*(inputs[name] for name in ("weight", "bias", *STATISTICS)), momentum=0.2, eps=1e-3)
    return bn._replace(**settings)


def call(inputs, backend, **settings):
    return hcl_bn_loss([inputs["u"]], [inputs["teacher"]], [batch_norm(inputs, **settings)], backend=backend)


def raw_calls(inputs, backend):
    """Three stages: statistics that are updated, those of a batch alone, running ones; sizes and dtypes differ."""
    us, teachers = ([inputs[name], inputs[name][:, :, :4].bfloat16(), inputs[name]] for name in ("u", "teacher"))
    yield "hcl_bn_reduce", (us[:2], [2, 3])
    moments = raw_op("hcl_bn_reduce", backend)(us[:2], [2, 3])
    moments = [*moments, moments[0].new_empty((0, 3, us[2].shape[1]))]
    affine = [inputs["weight"], None, None, inputs["bias"], inputs["weight"], inputs["bias"]]
    running = [inputs["running_mean"], inputs["running_var"]] * 2
    settings = [3, 2, 1], [-1.0, 0.1, 0.1], [1e-5, 1e-3, 1e-5], [1.0, 0.5, 2.0], LEVELS

    def forward():
        changed = [t.clone() for t in running], [inputs["counter"].clone()]
        return us, teachers, moments, affine, *changed, *settings

    yield "hcl_bn_fwd", forward()
    loss, *flats = raw_op("hcl_bn_fwd", backend)(*forward())
    kept = [stages_of(flat, shapes) for flat, shapes in zip(flats, kept_shapes(us), strict=True)]
    wanted = [True, True, False, True, False, True, True, True, True]
    backward = us, teachers, *kept
    yield "hcl_bn_bwd", (loss, *backward, [], affine, settings[0], *settings[3:], wanted)
    means = [torch.zeros_like(state) for state in kept[1]]
    wanted = [False, True, False, True, False, False, False, False, True]
    yield "hcl_bn_bwd", (loss, *backward, means, affine, settings[0], *settings[3:], wanted)


FEW = [(2, 3, 9, 7), (3, 33, 6, 6), (2, 7, 3, 4)]
HCL_BN = Op(
    name="hcl_bn",
    inputs=make,
    call=call,
    raw_calls=raw_calls,
    leaves=("u", "weight", "bias"),
    saves=("u", "teacher"),
    changes=STATISTICS,
    mixed=(
        {"u": torch.bfloat16, "weight": torch.bfloat16},
        {"teacher": torch.float16, "running_mean": torch.bfloat16},
        {"u": torch.float16, "teacher": torch.bfloat16},
    ),
    cases=Cases(
        every=[
            (2, 64, 32, 64),
            (2, 3, 128, 256),
            (3, 33, 6, 6),
            (1, 5, 17, 25),
            (2, 17, 5, 5),
            (2, 8, 3, 4),
            (2, 3, 9, 2),
            (2, 3, 1, 9),
            (3, 40, 1, 1),
            (1, 500, 6, 5),
        ],
        some=[*FEW, (2, 64, 32, 64), (3, 40, 1, 1)],
        few=FEW,
    ),
    sizes=Cases(
        every=[(2, 2, height, width) for height in (1, 2, 3, 4, 5, 6, 7, 8, 9) for width in (1, 3, 4, 5, 6, 7, 8, 12)],
        some=[(2, 2, height, width) for height in (2, 5, 9) for width in (1, 6, 8)],
        few=[(2, 2, height, width) for height in (2, 9) for width in (1, 6, 8)],
    ),
    tiny=(2, 3, 6, 5),
    even=(2, 8, 10, 12),
    odd=(2, 5, 9, 13),
    medium=(2, 16, 32, 64),
    large=(2, 48, 65, 97),
    eager_tolerance={torch.float32: 2e-5},  # torch's batch norm adds float32 in one chain where channels are last
)

MODES = {
    "running": {"training": False},
    "cumulative": {"momentum": None},
    "untracked": {"running_mean": None, "running_var": None, "num_batches_tracked": None},
    "uncounted": {"num_batches_tracked": None},
    "not_affine": {"weight": None, "bias": None},
}


class TestHCLBN(OpChecks):
    op = HCL_BN

    @each(
        "mode layout",
        list(itertools.product(MODES, HCL_BN.layouts)),
        list(zip(MODES, itertools.cycle(HCL_BN.layouts))),
    )
    def test_batch_norms_of_every_kind(self, mode, layout, backend):
        inputs = self.op.make(self.op.odd, layout=layout, backend=backend)
        wanted = ["u"] if mode == "not_affine" else None
        self.op.check(inputs, backend, wanted=wanted, call=partial(call, **MODES[mode]))

    @each("shape layout", list(itertools.product([(1, 64, 190, 192), (1, 60, 190, 193)], HCL_BN.layouts)), few=[])
    def test_maps_larger_than_a_cache(self, shape, layout, backend):
        """Above 8 MB the CPU kernel stores past the cache, where 16 bytes fit."""
        self.op.check(self.op.make(shape, layout=layout, backend=backend), backend)

    @each("training", [(True,), (False,)], eager=True)
    def test_is_hcl_of_torchs_batch_norm(self, training, backend):
        inputs = self.op.make(self.op.odd, torch.float64, backend=backend)
        module = nn.BatchNorm2d(5, eps=1e-3, momentum=0.2).double().train(training)
        names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        state = dict(zip(names, (inputs[name].cpu().clone() for name in ("weight", "bias", *STATISTICS)), strict=True))
        module.load_state_dict(state)
        u = inputs["u"].cpu().clone().requires_grad_()
        expected = hcl_reference(module(u), inputs["teacher"].cpu())
        expected.backward()
        values = self.op.run(inputs, backend, upstream=1.0, call=partial(call, training=training))
        found = {"output 0": expected, "gradient of u": u.grad, "gradient of weight": module.weight.grad}
        found |= {"gradient of bias": module.bias.grad, "running_mean afterwards": module.running_mean}
        found |= {"running_var afterwards": module.running_var, "counter afterwards": module.num_batches_tracked}
        for name, value in found.items():
            torch.testing.assert_close(values[name].cpu(), value.detach(), rtol=1e-11, atol=1e-14, msg=name)

    @each(
        "dtype layout",
        list(itertools.product([torch.float32, torch.bfloat16], HCL_BN.layouts)),
        few=[(torch.float32, "nchw")],
    )
    def test_a_large_mean_costs_no_digits(self, dtype, layout, backend):
        shape = (2, 8, 8, 16) if interpreted(backend) else (2, 8, 32, 32)
        inputs = make(shape, dtype, layout, offset=1000.0)
        self.op.check({name: t.to(device_of(backend)) for name, t in inputs.items()}, backend)

    @each(eager=True)
    def test_stages_are_summed_with_their_weights(self, backend):
        stages = [self.op.make(shape, backend=backend) for shape in ((2, 4, 16, 16), (2, 6, 8, 8), (2, 8, 5, 6))]
        kinds = ({}, {"training": False}, MODES["untracked"])
        inputs = {f"{name} {m}": t for m, stage in enumerate(stages) for name, t in stage.items()}
        levels = (0.3, 0.0, 2.0)

        def norm(inputs, m):
            return batch_norm({name: inputs[f"{name} {m}"] for name in ("weight", "bias", *STATISTICS)}, **kinds[m])

        def together(inputs, backend):
            us, teachers = ([inputs[f"{name} {m}"] for m in range(3)] for name in ("u", "teacher"))
            bns = [norm(inputs, m) for m in range(3)]
            return hcl_bn_loss(us, teachers, bns, (0.1, 0.5, 2.0), level_weights=levels, backend=backend)

        def one_by_one(inputs, backend):
            alone = [
                hcl_bn_loss([inputs[f"u {m}"]], [inputs[f"teacher {m}"]], [norm(inputs, m)], None, "eager", levels)
                for m in range(3)
            ]
            return sum(w * loss for w, loss in zip((0.1, 0.5, 2.0), alone, strict=True))

        wanted = ["u 0", "u 2", "weight 0", "bias 1", "weight 2"]
        op = replace(self.op, changes=[f"{name} {m}" for name in STATISTICS for m in range(3)])
        values = op.run(inputs, backend, wanted, call=together)
        op.compare(values, op.truth(inputs, wanted, call=one_by_one), backend)

    @each()
    def test_views_of_running_statistics_are_updated(self, backend):
        inputs = self.op.make(self.op.odd, backend=backend)
        wide = {name: torch.stack([inputs[name], inputs[name]], dim=1) for name in STATISTICS[:2]}
        views = inputs | {name: t[:, 0] for name, t in wide.items()} | {"counter": inputs["counter"].clone()}
        call(views, backend)
        expected = self.op.run(inputs, backend)
        for name in STATISTICS[:2]:
            assert torch.equal(views[name], expected[f"{name} afterwards"])
            assert torch.equal(wide[name][:, 1], inputs[name])

    @each()
    def test_autograd_notices_that_statistics_changed(self, backend):
        inputs = self.op.make(self.op.odd, backend=backend)
        before = [inputs[name]._version for name in STATISTICS]
        call(inputs, backend)
        assert all(inputs[name]._version > version for name, version in zip(STATISTICS, before, strict=True))
        before = [inputs[name]._version for name in STATISTICS]
        call(inputs, backend, training=False)
        assert [inputs[name]._version for name in STATISTICS] == before

    @each()
    def test_no_gradient_flows_into_the_teacher(self, backend):
        inputs = self.op.make(self.op.odd, backend=backend)
        inputs["teacher"].requires_grad_()
        inputs["u"].requires_grad_()
        call(inputs, backend).backward()
        assert inputs["teacher"].grad is None and inputs["u"].grad.abs().sum() > 0

    @each()
    def test_raw_ops_repeat_the_contract(self, backend):
        inputs = self.op.make((1, 2, 6, 6), backend=backend)
        u, teacher = inputs["u"], inputs["teacher"]
        reduce, forward = raw_op("hcl_bn_reduce", backend), raw_op("hcl_bn_fwd", backend)
        with pytest.raises(RuntimeError, match=r"hcl_bn: expected .*parts"):
            reduce([u], [0])
        moments = reduce([u], [1])
        settings = [2], [0.1], [1e-5], [1.0], LEVELS
        with pytest.raises(RuntimeError, match="differ in dimension 2"):
            forward([u], [teacher[:, :, 1:].contiguous()], moments, [None, None], [], [], *settings)
        with pytest.raises(RuntimeError, match=r"hcl_bn: expected .*moments"):
            forward([u], [teacher], [moments[0][:, :2].contiguous()], [None, None], [], [], *settings)
        with pytest.raises(RuntimeError, match=r"hcl_bn: expected .*running"):
            forward([u], [teacher], moments, [None, None], [], [], [3], *settings[1:])
        with pytest.raises(RuntimeError, match="3 level weights"):
            forward([u], [teacher], moments, [None, None], [], [], *settings[:-1], LEVELS[:2])


MAPS = torch.zeros(2, 3, 8, 8)
BN = BatchNorm(torch.ones(3), torch.zeros(3), torch.zeros(3), torch.ones(3), torch.tensor(0))
BAD = {
    "no stage": (([], [], []), {}, ValueError, "at least one stage"),
    "teachers": (([MAPS], [], [BN]), {}, ValueError, "teacher_maps to have 1 entries"),
    "batch norms": (([MAPS], [MAPS], []), {}, ValueError, "bns to have 1 entries"),
    "sizes": (([MAPS] * 2, [MAPS, MAPS[..., 1:]], [BN] * 2), {}, ValueError, "stage 2: .*hcl_loss with resize_student"),
    "channels": (([MAPS], [MAPS[:, 1:]], [BN]), {}, ValueError, r"stage 1: expected teacher .* \[2, 3, 8, 8\]"),
    "empty": (([MAPS[:0]], [MAPS[:0]], [BN]), {}, ValueError, "at least one element"),
    "integers": (([MAPS.int()], [MAPS], [BN]), {}, TypeError, "expected u to be float16"),
    "norm's channels": (([MAPS[:, 1:]], [MAPS[:, 1:]], [BN]), {}, ValueError, r"bn.weight to have shape \[2\]"),
    "a module": (([MAPS], [MAPS], [nn.BatchNorm2d(3)]), {}, TypeError, "expected bn to be a BatchNorm"),
    "single value": (([MAPS[:1, :, :1, :1]],) * 2 + ([BN],), {}, ValueError, "more than 1 value per channel in u"),
    "statistics twice": (([MAPS] * 2, [MAPS] * 2, [BN] * 2), {}, ValueError, "running statistics of its own for every"),
    "one running variance": (
        ([MAPS] * 2, [MAPS] * 2, [BN, BN._replace(running_mean=torch.zeros(3))]),
        {},
        ValueError,
        "running statistics of its own for every",
    ),
    "momentum": (([MAPS], [MAPS], [BN._replace(momentum=-0.5)]), {}, ValueError, r"bn.momentum to be in \[0, 1\]"),
    "stage weights": (([MAPS], [MAPS], [BN], [torch.nan]), {}, ValueError, "stage_weights to be finite numbers"),
    "levels": (([MAPS], [MAPS], [BN]), {"level_weights": (1, 2)}, ValueError, "level_weights to be 3 finite"),
}


@pytest.mark.parametrize(("args", "options", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(args, options, error, message):
    with pytest.raises(error, match=message):
        hcl_bn_loss(*args, **options)


def test_agrees_with_hcl_of_normalised_maps():
    inputs = make((2, 3, 9, 7))
    module = nn.BatchNorm2d(3).train()
    bn = BatchNorm(module.weight, module.bias, None, None)
    torch.testing.assert_close(
        hcl_bn_loss([inputs["u"]], [inputs["teacher"]], [bn]),
        hcl_loss([module(inputs["u"])], [inputs["teacher"]]),
        rtol=1e-5,
        atol=0,
    )
