"""csf on every backend that can run here, against the fp64 reference, torch's modules, golden values, differences."""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from golden_io import compare, load, tolerance
from kernels_here import device_of, interpreted
from op_checks import OpChecks, each
from op_description import LAYOUTS, Cases, Op, assert_same, random, relative
from torch import nn
from torch.autograd import gradcheck

from transkd_fast import backends
from transkd_fast.functional import BatchNorm, csf
from transkd_fast.nn import CSF
from transkd_fast.ops._registration import raw_op
from transkd_fast.reference import csf as reference

GOLDEN = load("sk_block")["cases"]


class Case(NamedTuple):
    batch: int
    channels: int
    fine: tuple[int, int]
    coarse: tuple[int, int]
    squeezed: int = 5


def make(case, dtype=torch.float32, layout="nchw", offset=0.0):
    batch, channels, fine, coarse, squeezed = case
    small = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {"z": random((batch, channels, *fine), dtype, layout, offset)}
    inputs["y"] = random((batch, channels, *coarse), dtype, layout)
    for name, count in (("", channels), ("fc_", squeezed)):
        inputs[f"{name}weight"] = 1 + random((count,), small) / 4
        inputs[f"{name}bias"] = random((count,), small) / 4
        inputs[f"{name}running_mean"] = random((count,), small)
        inputs[f"{name}running_var"] = 0.5 + random((count,), small).abs()
        inputs[f"{name}counter"] = torch.tensor(2)
    inputs["fc"] = random((squeezed, channels), small) * channels**-0.5
    for i in (0, 1):
        inputs[f"w_{i}"] = random((channels, squeezed), small) * squeezed**-0.5
        inputs[f"b_{i}"] = random((channels,), small) / 4
    return inputs


def batch_norm(inputs, prefix="", **settings):
    names = ("weight", "bias", "running_mean", "running_var", "counter")
    return BatchNorm(*(inputs.get(prefix + name) for name in names))._replace(**settings)


# Over two samples, a squeeze batch norm's gradient is what eps leaves of terms that cancel: with torch's 1e-5 it has
# few digits in float32, whoever computes it. test_a_squeeze_batch_norm_over_two_samples does that.
def call(inputs, backend, bn=None, fc_bn=None):
    return csf(
        inputs["z"],
        inputs["y"],
        batch_norm(inputs, **(bn or {"momentum": 0.2, "eps": 1e-3})),
        inputs["fc"],
        None if fc_bn == "none" else batch_norm(inputs, "fc_", **(fc_bn or {"momentum": 0.3, "eps": 0.5})),
        ((inputs["w_0"], inputs["b_0"]), (inputs["w_1"], inputs["b_1"])),
        backend=backend,
    )


def raw_calls(inputs, backend):
    """The four raw ops, of a global batch that has one sample more than this process."""
    z, y = inputs["z"], inputs["y"]
    y = y.contiguous(memory_format=torch.contiguous_format if z.is_contiguous() else torch.channels_last)
    parameters = [inputs[name] for name in PARAMETERS]
    parameters[1] = parameters[4] = None
    yield "csf_reduce", (z, y, 3)
    sums = raw_op("csf_reduce", backend)(z, y, 3)
    sums = torch.cat([sums[:1], sums])
    statistics = [inputs[name] for name in STATISTICS]
    settings = (*statistics, 3, None, 1e-5, 3, 0.1, 1e-5)
    yield "csf_fuse", (z, y, sums, 1, parameters, *settings)
    settings = (*(t.clone() for t in statistics), *settings[6:])
    v, state = raw_op("csf_fuse", backend)(z, y, sums, 1, parameters, *settings)
    yield "csf_bwd_reduce", (v, z, y, state, 2)
    sums = raw_op("csf_bwd_reduce", backend)(v, z, y, state, 2)
    sums = torch.cat([sums[:1], sums])
    wanted = [True, True, *(parameter is not None for parameter in parameters)]
    yield "csf_bwd_apply", (v, z, y, sums, state, 1, parameters, 3, 3, wanted)
    wanted = [False] * 4 + [True] + [False] * 6
    yield "csf_bwd_apply", (v, z, y, sums, state, 1, parameters, 1, 2, wanted)


STATISTICS = tuple(prefix + name for prefix in ("", "fc_") for name in ("running_mean", "running_var", "counter"))
PARAMETERS = ("weight", "bias", "fc", "fc_weight", "fc_bias", "w_0", "b_0", "w_1", "b_1")
FEW = [
    Case(2, 3, (9, 13), (5, 7)),
    Case(3, 33, (6, 8), (3, 4)),
    Case(1, 2, (7, 5), (3, 2)),
    Case(2, 5, (4, 3), (6, 5)),
]
# Twice the size (one less for odd sizes), other ratios up and down, equal sizes, single rows, columns and pixels,
# channels off the vector width. From 2 to 82 torch's rule differs from integer division.
EVERY = [
    *FEW,
    Case(2, 64, (32, 64), (16, 32), 32),
    Case(2, 8, (65, 127), (33, 64)),
    Case(2, 66, (17, 25), (9, 13), 32),
    Case(3, 64, (8, 16), (4, 8), 32),
    Case(1, 8, (30, 500), (15, 250)),
    Case(2, 7, (12, 18), (4, 6)),
    Case(2, 16, (10, 10), (10, 10)),
    Case(2, 5, (7, 82), (3, 2)),
    Case(2, 3, (4, 164), (2, 2)),
    Case(2, 8, (5, 6), (11, 13)),
    Case(2, 17, (1, 9), (1, 5)),
    Case(2, 9, (9, 1), (5, 1)),
    Case(2, 64, (1, 1), (1, 1), 32),
    Case(3, 4, (1, 2), (3, 3)),
    Case(2, 1, (12, 16), (6, 8), 1),
    Case(1, 300, (6, 10), (3, 5), 40),
    Case(5, 6, (16, 24), (8, 12)),
]
SIZES = [
    Case(batch, 3, fine, coarse, squeezed)
    for batch in (1, 2)
    for squeezed in (1, 4)
    for fine, coarse in (((4, 6), (2, 3)), ((5, 1), (5, 2)), ((2, 2), (3, 1)))
]
TINY = Case(2, 3, (5, 6), (3, 4), 4)
CSF_OP = Op(
    name="csf",
    inputs=make,
    call=call,
    raw_calls=raw_calls,
    leaves=("z", "y", *PARAMETERS),
    alone=("z", "y", "weight", "fc", "b_1"),
    poisoned=("z", "y"),
    saves=("z", "y"),
    changes=STATISTICS,
    mixed=(
        {"z": torch.bfloat16, "y": torch.float32},
        {"z": torch.float32, "y": torch.float16, "weight": torch.bfloat16, "fc": torch.float16, "b_1": torch.bfloat16},
        {"z": torch.float16, "y": torch.bfloat16, "fc_weight": torch.float16, "w_0": torch.bfloat16},
        {"running_mean": torch.bfloat16, "bias": torch.float16, "fc_running_var": torch.float16},
    ),
    cases=Cases(every=EVERY, some=[*FEW, *EVERY[4:9]], few=FEW),
    sizes=Cases(every=SIZES, some=SIZES, few=SIZES[:4]),
    tiny=TINY,
    even=Case(2, 8, (8, 16), (4, 8)),
    odd=Case(3, 5, (9, 13), (5, 7)),
    medium=Case(2, 16, (64, 64), (32, 32), 4),
    large=Case(2, 48, (65, 97), (33, 49)),
    # In channels-last torch's own batch norm loses as much in float32: 5.5e-5 on 1 x 8 x 30 x 500.
    eager_tolerance={torch.float32: 1e-4},
)


class TestCSF(OpChecks):
    op = CSF_OP

    @each("layout", [(layout,) for layout in LAYOUTS], few=[])
    def test_maps_larger_than_a_cache(self, layout, backend):
        """From 8 MB on the CPU kernel stores past the cache, where 16 bytes fit."""
        for case in (Case(1, 64, (190, 192), (95, 96)), Case(1, 60, (190, 193), (95, 97))):
            self.op.check(self.op.make(case, layout=layout, backend=backend), backend)

    @each("layout", [(layout,) for layout in LAYOUTS], few=[("nchw",)])
    def test_a_single_pixel_and_a_larger_coarse_map(self, layout, backend):
        """z is in both layouts at once, y in one of them."""
        self.op.check(self.op.make(Case(3, 4, (1, 1), (3, 2)), layout=layout, backend=backend), backend)

    KINDS = {
        "running": {"training": False},
        "batch": {"running_mean": None, "running_var": None},
        "tracked": {"momentum": 0.1},
        "cumulative": {"momentum": None},
        "uncounted": {"num_batches_tracked": None},
        "not_affine": {"weight": None, "bias": None},
        "no_shift": {"bias": None},
    }

    @each(
        "kind fc_kind",
        [*itertools.product(KINDS, ("tracked", "running", "none")), *(("tracked", fc_kind) for fc_kind in KINDS)],
        few=[("running", "none"), ("batch", "cumulative"), ("cumulative", "running"), ("not_affine", "not_affine")],
    )
    def test_every_kind_of_normalisation(self, kind, fc_kind, backend):
        bn = {"eps": 1e-3, **self.KINDS[kind]}
        fc_bn = "none" if fc_kind == "none" else {"eps": 0.5, **self.KINDS[fc_kind]}

        def of_kind(inputs, backend):
            return call(inputs, backend, bn, fc_bn)

        unused = {name for name in PARAMETERS if name.removeprefix("fc_") in bn and name in ("weight", "bias")}
        unused |= {"fc_weight", "fc_bias"} if fc_bn == "none" else {f"fc_{name}" for name in fc_bn} & set(PARAMETERS)
        wanted = [name for name in self.op.leaves if name not in unused]
        inputs = self.op.make(Case(3, 8, (9, 16), (5, 8)), backend=backend)
        self.op.check(inputs, backend, wanted=wanted, call=of_kind)

    @each("training", [(True,), (False,)])
    def test_a_single_sample(self, training, backend):
        """The squeeze batch norm, with a single value per channel, takes its running statistics and leaves them."""

        def of_kind(inputs, backend):
            return call(inputs, backend, {"training": training}, {"training": training})

        inputs = self.op.make(Case(1, 8, (6, 8), (3, 4)), backend=backend)
        values = self.op.check(inputs, backend, call=of_kind)
        for name in ("running_mean", "running_var", "counter"):
            assert torch.equal(values[f"fc_{name} afterwards"], inputs[f"fc_{name}"])
            assert torch.equal(values[f"{name} afterwards"], inputs[name]) != training

    @each(
        "dtype layout",
        list(itertools.product([torch.float32, torch.bfloat16], LAYOUTS)),
        few=[(torch.float32, "nchw")],
    )
    def test_a_large_mean_costs_no_digits(self, dtype, layout, backend):
        case = Case(2, 8, (8, 16), (4, 8)) if interpreted(backend) else Case(2, 8, (32, 64), (16, 32))
        inputs = make(case, dtype, layout, offset=1000.0)
        self.op.check({name: t.to(device_of(backend)) for name, t in inputs.items()}, backend)

    @each("shift", [(18.0,), (-18.0,), (60.0,), (-60.0,)], few=[(-60.0,)])
    def test_nearly_saturated_attention_keeps_its_digits(self, shift, backend):
        inputs = self.op.make(TINY, backend=backend)
        inputs["b_0"] = inputs["b_0"] + shift
        truth = self.op.truth(inputs, call=by_logarithms)
        self.op.compare(self.op.run(inputs, backend), truth, backend)

    @each("shift", [(1000.0,), (-1000.0,)])
    def test_saturated_attention_passes_one_branch(self, shift, backend):
        inputs = self.op.make(Case(2, 3, (5, 6), (5, 6)), backend=backend)
        inputs["b_0"] = inputs["b_0"] + shift
        values = self.op.check(inputs, backend, wanted=["z", "weight"] if shift > 0 else ["y"])
        if shift < 0:
            assert torch.equal(values["output 0"], inputs["y"])
        silent = ["y", "fc", "w_0", "b_1"] if shift > 0 else ["z", "weight", "fc", "w_0", "b_1"]
        for name, value in self.op.run(inputs, backend, silent).items():
            assert not name.startswith("gradient") or not value.any(), name

    @each("bad", [(math.nan,), (math.inf,), (-math.inf,)], few=[(math.inf,)])
    def test_parameters_that_are_not_finite_show(self, bad, backend):
        """Where exactly is a matter of the order of terms in torch's batch norm and softmax."""
        for name in PARAMETERS[2:] if interpreted(backend) else PARAMETERS:
            inputs = self.op.make(self.op.even, backend=backend)
            inputs[name][tuple(size // 2 for size in inputs[name].shape)] = bad
            shows = [not call(inputs, which).isfinite().all() for which in ("eager", backend)]
            assert shows[0] or not math.isnan(bad)
            assert shows[1] or not shows[0], name

    @each("layout", [(layout,) for layout in LAYOUTS])
    def test_float64_parameters_of_float32_maps(self, layout, backend):
        inputs = self.op.make(self.op.even, layout=layout, backend=backend)
        inputs |= {n: t.double() for n, t in inputs.items() if t.is_floating_point() and n not in ("z", "y")}
        truth = self.op.truth(inputs)
        for name, value in self.op.run(inputs, backend).items():
            kind, _, leaf = name.partition(" of ")
            assert kind != "gradient" or value.dtype == inputs[leaf].dtype, name
            assert relative(value, truth[name]) < self.op.limit(torch.float32, backend), name

    @each("layout", [(layout,) for layout in LAYOUTS], few=[("nchw",)])
    def test_a_squeeze_batch_norm_over_two_samples(self, layout, backend):
        """Ill-conditioned in float32: no result is further from the truth than eager's, or it is as exact as others."""

        def with_torchs_eps(inputs, backend):
            return call(inputs, backend, {"eps": 1e-5}, {"eps": 1e-5})

        inputs = self.op.make(Case(2, 16, (16, 24), (8, 12), 8), layout=layout, backend=backend)
        truth = self.op.truth(inputs, call=with_torchs_eps)
        eager = self.op.run(inputs, "eager", call=with_torchs_eps)
        values = self.op.run(inputs, backend, call=with_torchs_eps)
        for name, true in truth.items():
            limit = max(self.op.limit(values[name].dtype, backend), relative(eager[name], true))
            assert relative(values[name], true) <= limit, name

    @each("dtype", [(torch.float64,), (torch.float32,)], eager=True)
    def test_golden_stage(self, dtype, backend):
        for case in GOLDEN[:: 4 if interpreted(backend) else 1]:
            with backends.use_backend(backend, ["csf"]):
                results = golden_results(case, dtype, device_of(backend))
            compare(results, case["f64"], tolerance(case, dtype), case["name"])

    @each()
    def test_parameters_and_statistics_that_are_views(self, backend):
        inputs = self.op.make(self.op.even, backend=backend)
        expected = self.op.run(inputs, backend)
        strided = {name: torch.stack([t, t], dim=-1)[..., 0] for name, t in inputs.items() if t.dim() in (1, 2)}
        fresh = self.op.prepared(inputs | strided)
        v = call(fresh | {name: strided[name] for name in self.op.changes if name in strided}, backend)
        assert torch.equal(v, expected["output 0"])
        for name in self.op.changes:
            if name in strided:
                assert not strided[name].is_contiguous()
                assert torch.equal(strided[name], expected[f"{name} afterwards"])

    @each("training fc_training", [(True, True), (True, False), (False, True), (False, False)])
    @pytest.mark.parametrize("strided", [False, True])
    def test_changes_are_counted_for_autograd(self, strided, training, fc_training, backend):
        """Who saved the running statistics for a backward is told when they changed, and only then."""
        inputs = self.op.make(TINY, backend=backend)
        if strided:
            inputs |= {n: torch.stack([inputs[n]] * 2, dim=-1)[..., 0] for n in self.op.changes if inputs[n].dim()}
        before = {name: inputs[name]._version for name in self.op.changes}
        call(inputs, backend, {"training": training}, {"training": fc_training})
        for name, version in before.items():
            changed = fc_training if name.startswith("fc_") else training
            assert (inputs[name]._version > version) == changed, name

    @each("layout", [(layout,) for layout in LAYOUTS])
    @pytest.mark.parametrize("bad", [math.nan, 1e12])
    def test_coarse_pixels_that_no_fine_pixel_reads_count_nowhere(self, layout, bad, backend):
        inputs = self.op.make(Case(2, 8, (4, 6), (8, 12)), layout=layout, backend=backend)
        expected = self.op.check(inputs, backend)
        inputs["y"][:, :, 1::2] = inputs["y"][:, :, :, 1::2] = bad
        assert_same(self.op.run(inputs, backend), expected)

    @each("layout", [(layout,) for layout in LAYOUTS], few=[])
    def test_very_many_channels(self, layout, backend):
        self.op.check(self.op.make(Case(2, 32769, (2, 2), (1, 1), 2), layout=layout, backend=backend), backend)

    @each("branch", [(0,), (1,)], eager=True)
    def test_a_branch_that_is_switched_off(self, branch, backend):
        inputs = self.op.make(self.op.even, backend=backend)
        inputs[f"b_{branch}"] = torch.full_like(inputs["b_0"], -math.inf)
        self.op.check(inputs, backend, wanted=["z", "weight", "bias"] if branch else ["y"])

    @each()
    def test_one_map_and_one_parameter_twice_compile(self, backend):
        def shared(inputs, backend):
            return call(inputs | {"y": inputs["z"], "bias": inputs["weight"]}, backend)

        inputs = self.op.make(self.op.odd, backend=backend)
        wanted = [name for name in self.op.leaves if name not in ("y", "bias")]
        torch.compiler.reset()
        compiled = torch.compile(shared, fullgraph=True, backend="aot_eager")
        assert_same(
            self.op.run(inputs, backend, wanted, call=compiled), self.op.run(inputs, backend, wanted, call=shared)
        )
        self.op.check(inputs, backend, wanted=wanted, call=shared)

    @each()
    def test_raw_ops_repeat_the_contract(self, backend):
        inputs = self.op.make(self.op.even, backend=backend)
        z, y = inputs["z"], inputs["y"]
        calls = {name: arguments for name, arguments in raw_calls(inputs, backend)}

        def changed(name, place, value):
            arguments = list(calls[name])
            arguments[place] = value
            raw_op(name, backend)(*arguments)

        for name, place, value, message in (
            ("csf_reduce", 1, y[:, :3].contiguous(), r"expected z \[B, M, H, W\] and y \[B, M, h, w\]"),
            ("csf_reduce", 1, y.double(), "float64 does not mix"),
            ("csf_reduce", 1, y.contiguous(memory_format=torch.channels_last), "in z's layout"),
            ("csf_reduce", 0, z[..., ::2], "contiguous or channels-last"),
            ("csf_reduce", 2, 0, "part"),
            ("csf_fuse", 2, calls["csf_fuse"][2].float(), "float64 sums"),
            ("csf_fuse", 3, 2, "samples from 2 on"),
            ("csf_fuse", 4, [None] * 8, "expected 9 parameters"),
            ("csf_fuse", 4, [*calls["csf_fuse"][4][:5], None, *calls["csf_fuse"][4][6:]], r"head.* weight.*got None"),
            ("csf_fuse", 5, None, "batch norm.*got None"),
            ("csf_fuse", 7, None, "counter"),
            ("csf_fuse", 11, 4, "kind of normalisation"),
            ("csf_bwd_reduce", 0, z[:, :, 1:].contiguous(), "expected grad .*z.* shape"),
            ("csf_bwd_reduce", 0, z.bfloat16(), "expected grad .*z.* shape"),
            ("csf_bwd_apply", 4, calls["csf_bwd_apply"][4][:-1].contiguous(), "the state that csf_fuse made"),
            ("csf_bwd_apply", 9, [True] * 11, "None and has no gradient"),
            ("csf_bwd_apply", 9, [True] * 10, "flags"),
        ):
            with pytest.raises(RuntimeError, match=message):
                changed(name, place, value)


def by_logarithms(inputs, backend):
    """csf with the weights of the branches as exp(logsigmoid): exact also where softmax's gradient cancels."""
    x = F.batch_norm(inputs["z"], None, None, inputs["weight"], inputs["bias"], training=True, eps=1e-3)
    up = F.interpolate(inputs["y"], x.shape[2:], mode="nearest")
    s = F.linear((x + up).mean(dim=(2, 3)), inputs["fc"])
    r = F.batch_norm(s, None, None, inputs["fc_weight"], inputs["fc_bias"], training=True, eps=0.5).relu()
    logits = [F.linear(r, inputs[f"w_{i}"], inputs[f"b_{i}"]) for i in (0, 1)]
    call(inputs, "eager")  # for the running statistics
    a_0, a_1 = (F.logsigmoid(sign * (logits[0] - logits[1])).exp()[..., None, None] for sign in (1, -1))
    return a_0 * x + a_1 * up


def golden_results(case, dtype, device):
    ctor = case["ctor"]
    pair = [ctor["in_channel"]] * 2, [ctor["out_channel"]] * 2
    module = CSF(*pair, ctor["mid_channel"], ctor["reduce"], legacy=True)[int(ctor["fuse"])].to(device, dtype)
    module.load_state_dict(case["params"])
    module.train(case["train"])
    x = case["x"].to(device, dtype).requires_grad_()
    y = None if case["y"] is None else case["y"].to(device, dtype).requires_grad_()
    out, res = module(x, y)
    probe = (out * case["R_out"].to(device)).sum() + (res * case["R_res"].to(device)).sum()
    probe.backward()
    results = {
        "out": out,
        "res": res,
        "probe": probe,
        "grad_x": x.grad,
        "grad_y": None if y is None else y.grad,
        "grad_params": {name: p.grad for name, p in module.named_parameters()},
        "buffers_after": {name: b.clone() for name, b in module.named_buffers()},
    }
    module(x, y)
    results["buffers_after_two"] = dict(module.named_buffers())
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.cpu(), results)


def arguments(batch=2, mid=3, squeezed=5, hw=(5, 6), hw_y=(3, 4), dtype=torch.float64, training=True, momentum=0.1):
    torch.manual_seed(0)

    def bn(channels):
        counter = torch.tensor(2)
        values = torch.rand(4, channels, dtype=torch.float64) + 0.5
        return BatchNorm(*values.to(dtype), counter, training, momentum)

    z, y = torch.randn(batch, mid, *hw, dtype=torch.float64), torch.randn(batch, mid, *hw_y, dtype=torch.float64)
    fc = torch.randn(squeezed, mid, dtype=torch.float64)
    heads = [torch.randn(shape, dtype=torch.float64) for shape in ((mid, squeezed), (mid,)) * 2]
    z, y, fc, w_0, b_0, w_1, b_1 = (t.to(dtype) for t in (z, y, fc, *heads))
    return {
        "z": z,
        "y": y,
        "bn": bn(mid),
        "fc_weight": fc,
        "fc_bn": bn(squeezed),
        "heads": ((w_0, b_0), (w_1, b_1)),
    }


def modules_like(bn):
    module = nn.BatchNorm2d(bn.weight.numel(), bn.eps, bn.momentum).to(bn.weight.dtype)
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        getattr(module, name).data.copy_(getattr(bn, name))
    return module.train(bn.training)


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("momentum", (0.1, None))
@pytest.mark.parametrize("batch", (2, 3))
def test_agrees_with_torch_modules(training, momentum, batch):
    args = arguments(batch, training=training, momentum=momentum)
    bn, fc_bn = modules_like(args["bn"]), modules_like(args["fc_bn"])
    for _ in range(2):
        v = csf(**args)
        x, up = bn(args["z"]), F.interpolate(args["y"], (5, 6), mode="nearest")
        r = fc_bn(F.conv2d((x + up).mean((2, 3), keepdim=True), args["fc_weight"][..., None, None])).relu()
        l_0, l_1 = (F.conv2d(r, w[..., None, None], b) for w, b in args["heads"])
        a = (l_0 - l_1).sigmoid()
        torch.testing.assert_close(v, a * x + (1 - a) * up, rtol=1e-12, atol=1e-12)
    for ours, theirs in ((args["bn"], bn), (args["fc_bn"], fc_bn)):
        torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-12, atol=1e-12)
        assert ours.num_batches_tracked == theirs.num_batches_tracked == (4 if training else 2)


@pytest.mark.parametrize("fc_bn", (True, False))
@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize(("batch", "hw", "hw_y"), [(2, (5, 4), (3, 2)), (1, (4, 4), (2, 2)), (3, (2, 3), (5, 4))])
def test_gradcheck(batch, hw, hw_y, training, fc_bn):
    args = arguments(batch, hw=hw, hw_y=hw_y, training=training)
    leaves = [args["z"], args["y"], args["fc_weight"], *args["heads"][0], *args["heads"][1]]
    leaves += [args["bn"].weight, args["bn"].bias, args["fc_bn"].weight, args["fc_bn"].bias]

    def op(z, y, fc_weight, w_0, b_0, w_1, b_1, weight, bias, fc_gamma, fc_beta):
        bn = args["bn"]._replace(weight=weight, bias=bias)
        squeeze = args["fc_bn"]._replace(weight=fc_gamma, bias=fc_beta) if fc_bn else None
        # Copies: gradcheck calls many times, and training moves the running statistics.
        bn, squeeze = (b and BatchNorm(*b[:2], *(t.clone() for t in b[2:5]), *b[5:]) for b in (bn, squeeze))
        return reference.csf(z, y, bn, fc_weight, squeeze, ((w_0, b_0), (w_1, b_1)))

    assert gradcheck(op, [t.clone().requires_grad_() for t in leaves])


def test_squeeze_of_a_single_value_uses_running_statistics_unchanged():
    training, evaluation = arguments(1), arguments(1)
    evaluation["fc_bn"] = evaluation["fc_bn"]._replace(training=False)
    before = [t.clone() for t in training["fc_bn"][2:5]]
    torch.testing.assert_close(csf(**training), csf(**evaluation), rtol=0, atol=0)
    for tensor, old in zip(training["fc_bn"][2:5], before, strict=True):
        assert torch.equal(tensor, old)
    assert training["bn"].num_batches_tracked == 3


BAD = {
    "y of other channels": (
        {"y": torch.zeros(2, 4, 3, 4)},
        ValueError,
        r"csf: expected y to have shape \[2, 3, h, w\]",
    ),
    "y of another batch": ({"y": torch.zeros(3, 3, 3, 4)}, ValueError, "expected y"),
    "z without a batch": ({"z": torch.zeros(3, 5, 6)}, ValueError, "expected z"),
    "z empty": ({"z": torch.zeros(0, 3, 5, 6), "y": torch.zeros(0, 3, 3, 4)}, ValueError, "at least one element"),
    "y empty": ({"y": torch.zeros(2, 3, 0, 4)}, ValueError, "at least one element"),
    "z of integers": ({"z": torch.zeros(2, 3, 5, 6, dtype=torch.int32)}, TypeError, "expected z to be float16"),
    "z no tensor": ({"z": [1.0]}, TypeError, "expected z to be a tensor, got list"),
    "y on another device": ({"y": torch.zeros(2, 3, 3, 4, device="meta")}, ValueError, "expected y on cpu"),
    "squeeze layer": ({"fc_weight": torch.zeros(5, 4)}, ValueError, "expected fc_weight"),
    "three heads": ({"heads": ((torch.zeros(3, 5), torch.zeros(3)),) * 3}, ValueError, "2 entries"),
    "head's width": ({"heads": ((torch.zeros(3, 4), torch.zeros(3)),) * 2}, ValueError, r"heads\[0\] weight"),
    "no batch norm": ({"bn": nn.BatchNorm2d(3)}, TypeError, "expected bn to be a BatchNorm"),
    "batch norm's width": ({"bn": BatchNorm(*torch.ones(4, 2))}, ValueError, "bn.weight"),
    "squeeze batch norm's width": ({"fc_bn": BatchNorm(*torch.ones(4, 3))}, ValueError, "fc_bn.weight"),
    "half the statistics": ({"bn": BatchNorm(*torch.ones(3, 3), None)}, ValueError, "both running_mean"),
    "counter of floats": ({"bn": BatchNorm(*torch.ones(4, 3), torch.zeros(()))}, ValueError, "one int64 on cpu, got"),
    "two counters": ({"bn": BatchNorm(*torch.ones(4, 3), torch.zeros(2).long())}, ValueError, "one int64 on cpu, got"),
    "counter elsewhere": (
        {"fc_bn": BatchNorm(*torch.ones(4, 5), torch.zeros((), dtype=torch.int64, device="meta"))},
        ValueError,
        "fc_bn.num_batches_tracked to be one int64 on cpu, got .* meta",
    ),
    "shared statistics": (
        {"bn": BatchNorm(None, None, torch.zeros(1).expand(3), torch.ones(3))},
        ValueError,
        "bn.running_mean to have its own memory",
    ),
    "sizes of no group": ({"samples": (2, 1)}, ValueError, "expected a process_group with samples"),
    "uncounted average": ({"bn": BatchNorm(*torch.ones(4, 3), momentum=None)}, ValueError, "num_batches_tracked"),
    "single value": ({"z": torch.zeros(1, 3, 1, 1), "y": torch.zeros(1, 3, 1, 1)}, ValueError, "more than 1 value"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(change, error, message):
    args = arguments(dtype=torch.float32) | change
    with pytest.raises(error, match=message):
        csf(**args)


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend"):
        csf(**arguments(), backend="fastest")
