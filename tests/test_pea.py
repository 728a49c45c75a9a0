"""pea on every backend that can run here, against the fp64 reference, torch's layers, golden values, differences."""

import itertools
import math
from typing import NamedTuple

import golden_alignment
import pytest
import torch
import torch.nn.functional as F
from op_checks import VIEWS, OpChecks, compiled, each, saved_bytes
from op_description import Cases, Op, assert_same, random, relative
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck

import transkd_fast
from transkd_fast import backends
from transkd_fast.functional import pea_loss
from transkd_fast.ops import _registration
from transkd_fast.ops._precision import tf32_allowed
from transkd_fast.ops._registration import raw_op
from transkd_fast.ops.pea import _fits_triton as fits_triton
from transkd_fast.reference import pea as reference

ACTIVATIONS = ("x", "target", "assistant")
KINDS = ("x", "weight", "bias", "target", "assistant", "projection_scale", "assistant_scale")
LISTS = ("xs", "weights", "biases", "targets", "assistants", "projection_scales", "assistant_scales")
STAGES = (1, 2, 3, 4)
STAGE_WEIGHTS = (0.5, 1.25, 0.25, 2.0)
CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}


class Case(NamedTuple):
    assisted: bool
    stages: tuple  # of batch, (height, width), input and output channels


def activation(batch, hw, channels, dtype, layout):
    if layout == "tokens":
        return random((batch, math.prod(hw), channels), dtype)
    return random((batch, channels, *hw), dtype, "channels_last" if layout == "channels_last_maps" else "nchw")


def make(case, dtype=torch.float32, layout="tokens"):
    small = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {}
    for m, (batch, hw, c_in, c_out) in enumerate(case.stages, start=1):
        inputs[f"x{m}"] = activation(batch, hw, c_in, dtype, layout)
        inputs[f"weight{m}"] = random((c_out, c_in), small) * c_in**-0.5
        inputs[f"bias{m}"] = random((c_out,), small) / 4
        inputs[f"target{m}"] = activation(batch, hw, c_out, dtype, layout)
        if case.assisted:
            inputs[f"assistant{m}"] = activation(batch, hw, c_out, dtype, layout)
            inputs[f"projection_scale{m}"] = 0.75 + random((1,), small) / 8
            inputs[f"assistant_scale{m}"] = random((1,), small).abs() / 4 - 1
    return inputs


def lists_of(inputs, kinds=KINDS):
    stages = [m for m in STAGES if f"x{m}" in inputs]
    lists = {name: [inputs[f"{kind}{m}"] for m in stages if f"{kind}{m}" in inputs] for kind, name in named(kinds)}
    return {name: tensors for name, tensors in lists.items() if tensors}


def named(kinds):
    return [(kind, name) for kind, name in zip(KINDS, LISTS, strict=True) if kind in kinds]


def call(inputs, backend, stage_weights=STAGE_WEIGHTS, target_grad=True):
    lists = lists_of(inputs)
    weights = stage_weights[: len(lists["xs"])]
    return pea_loss(**lists, stage_weights=weights, target_grad=target_grad, backend=backend)


def rows(t):
    return t.flatten(2).transpose(1, 2) if t.dim() == 4 else t


def arguments_of_fwd(inputs, wanted):
    """The raw forward's arguments; wanted: kinds whose gradient is wanted in every stage."""
    lists = lists_of({name: rows(t) for name, t in inputs.items()})
    lists = [lists.get(name, []) for name in LISTS]
    stages = len(lists[0])
    flags = [kind in wanted and bool(lists[k]) for _ in range(stages) for k, kind in enumerate(KINDS)]
    return (*lists, list(STAGE_WEIGHTS[:stages]), flags, False)


def codes_of(arguments):
    lists, flags = arguments[: len(KINDS)], arguments[-2]
    codes = []
    for m in range(len(lists[0])):
        wanted = flags[len(KINDS) * m : len(KINDS) * (m + 1)]
        codes += [CODES[lists[k][m].dtype] if wanted[k] else -1 for k in range(5)]
        double = lists[0][0].dtype == torch.float64
        codes.append((CODES[torch.float64] if double else CODES[torch.float32]) if any(wanted[5:]) else -1)
    return codes


def raw_calls(inputs, backend):
    for wanted in (KINDS, ("weight", "assistant", "assistant_scale"), ()):
        arguments = arguments_of_fwd(inputs, wanted)
        yield "pea_fwd", arguments
        loss, factors, kept = raw_op("pea_fwd", backend)(*arguments)
        if wanted:
            yield "pea_bwd", (loss, factors, kept, codes_of(arguments))


def leaves_of(*stages):
    return tuple(f"{kind}{m}" for m in stages for kind in KINDS)


# Tokens and channels that fill no tile, single ones among them; several stages that differ.
FEW = [
    Case(True, ((2, (5, 9), 10, 66), (3, (1, 7), 66, 5))),
    Case(True, ((3, (1, 1), 5, 160), (2, (3, 4), 8, 16))),
]
EVERY = [
    *FEW,
    Case(True, ((1, (9, 5), 160, 10), (2, (1, 7), 5, 5))),
    Case(True, ((2, (8, 16), 32, 64), (2, (4, 8), 64, 128))),
    Case(True, ((1, (1, 1), 1, 1), (2, (1, 1), 1, 7))),
    Case(True, ((5, (3, 4), 1, 3), (2, (16, 16), 16, 1))),
    Case(True, ((2, (33, 65), 32, 64), (1, (61, 1), 24, 40))),
    Case(True, ((2, (65, 67), 8, 16), (1, (90, 92), 16, 3))),  # more tokens than the CPU sums up in one go
    Case(True, ((4, (2, 4), 160, 320), (2, (4, 8), 256, 512))),
]
SIZES = [
    Case(True, ((batch, hw, c_in, c_out), (1, (2, 2), 3, 2)))
    for batch in (1, 3)
    for hw in ((1, 1), (1, 7))
    for c_in, c_out in ((1, 5), (10, 1), (66, 8))
]
EVEN = Case(True, ((2, (4, 8), 8, 16), (2, (2, 4), 16, 8)))
PEA = Op(
    name="pea",
    inputs=make,
    call=call,
    raw_calls=raw_calls,
    leaves=leaves_of(1, 2),
    alone=leaves_of(2),
    poisoned=leaves_of(1),
    # What is saved is as large as these: their gradients, and a residual that target and assistant share.
    saves=tuple(f"{kind}{m}" for m in (1, 2) for kind in ("x", "weight", "bias", "target")),
    multiplied=tuple(f"x{m}" for m in STAGES),
    twice_rounded=tuple(f"{kind}{m}" for kind in ACTIVATIONS for m in STAGES),
    mixed=(
        {"x1": torch.bfloat16, "target2": torch.bfloat16, "assistant1": torch.float16, "weight2": torch.bfloat16},
        {"x2": torch.float16, "target1": torch.float16, "assistant1": torch.float16, "assistant_scale1": torch.float16},
        {"x1": torch.float16, "x2": torch.bfloat16, "weight1": torch.float16, "bias2": torch.bfloat16},
        {"assistant2": torch.bfloat16, "target2": torch.bfloat16, "target1": torch.bfloat16},
        {
            name: torch.float64 if name[:-1] in ("x", "target", "assistant") else torch.bfloat16
            for name in leaves_of(1, 2)
        },
    ),
    cases=Cases(every=EVERY, some=[*FEW, EVERY[3], EVERY[6]], few=FEW),
    sizes=Cases(every=SIZES, some=SIZES[:4], few=SIZES[:3]),
    tiny=Case(True, ((2, (1, 3), 2, 3), (1, (2, 2), 3, 2))),
    even=EVEN,
    odd=Case(True, ((3, (5, 9), 5, 10), (2, (1, 7), 10, 3))),
    medium=Case(True, ((2, (16, 16), 4, 8), (2, (8, 16), 8, 4))),
    large=Case(True, ((2, (65, 97), 32, 48), (3, (33, 49), 48, 33))),
    # Sums over thousands of tokens are torch's own there.
    eager_tolerance={torch.float32: 4e-6},
    layouts=("tokens", "maps"),
)


class TestPEA(OpChecks):
    op = PEA

    PLAIN = Case(False, ((2, (5, 9), 5, 10), (3, (1, 7), 10, 5)))

    @each(
        "dtype layout",
        list(itertools.product(PEA.dtypes, PEA.layouts)),
        few=[(torch.float32, "maps"), (torch.bfloat16, "tokens")],
        eager=True,
    )
    def test_without_assistants(self, dtype, layout, backend):
        inputs = self.op.make(self.PLAIN, dtype, layout, backend)
        self.op.check(inputs, backend, wanted=list(inputs))

    @each(few=[])
    def test_four_stages_of_real_channels(self, backend):
        channels = ((32, 64), (64, 128), (160, 320), (256, 512))
        stages = tuple((2, (8 >> m, 16 >> m), *sizes) for m, sizes in enumerate(channels))
        inputs = self.op.make(Case(False, stages), torch.bfloat16, backend=backend)
        self.op.check(inputs, backend, wanted=[name for name in inputs if not name.startswith("target")])

    MIXED = [
        ("tokens", "maps", "channels_last_maps"),
        ("maps", "tokens", "maps"),
        ("maps", "channels_last_maps", "tokens"),
        ("channels_last_maps", "maps", "maps"),
    ]

    @each(
        "layouts dtype",
        list(itertools.product(MIXED, (torch.float32, torch.bfloat16))),
        few=[(MIXED[0], torch.bfloat16), (MIXED[1], torch.float32)],
        eager=True,
    )
    def test_maps_and_tokens_mixed_within_a_call(self, layouts, dtype, backend):
        inputs = self.op.make(self.op.odd, dtype, backend=backend)
        for kind, first, second in zip(ACTIVATIONS, layouts, layouts[1:] + layouts[:1], strict=True):
            for m, layout in ((1, first), (2, second)):
                other = self.op.make(self.op.odd, dtype, layout, backend)
                inputs[f"{kind}{m}"] = other[f"{kind}{m}"]
        self.op.check(inputs, backend)

    @each("view", [(view,) for view in VIEWS], few=[("transposed",), ("rows_of_tokens",)])
    def test_views_of_maps(self, view, backend):
        inputs = self.op.make(self.op.even, layout="maps", backend=backend)
        self.op.check({name: VIEWS[view][1](t) if t.dim() == 4 else t for name, t in inputs.items()}, backend)

    @each("kinds", [(pair,) for pair in itertools.combinations(KINDS, 2)], few=[(KINDS[:2],), (KINDS[3:5],)])
    def test_every_pair_of_gradients(self, kinds, backend):
        inputs = self.op.make(self.op.odd, backend=backend)
        wanted = [f"{kinds[0]}1", f"{kinds[1]}1", f"{kinds[0]}2"]
        values = self.op.check(inputs, backend, wanted=wanted)
        assert {name for name in values if name.startswith("gradient")} == {f"gradient of {name}" for name in wanted}

    @each("dtypes", [((torch.float16, torch.float16),), ((torch.bfloat16, torch.float32),)], few=[])
    def test_target_and_assistant_share_one_residual(self, dtypes, backend):
        inputs = self.op.make(self.op.medium, backend=backend)
        for m in (1, 2):
            inputs[f"target{m}"], inputs[f"assistant{m}"] = (
                inputs[f"{kind}{m}"].to(dtype) for kind, dtype in zip(("target", "assistant"), dtypes, strict=True)
            )
        wanted = ["target1", "assistant1", "target2", "assistant2"]
        self.op.check(inputs, backend, wanted=wanted)
        _, saved = saved_bytes(lambda: call(self.op.prepared(inputs, wanted), backend))
        assert saved < 1.01 * 4 * (inputs["target1"].numel() + inputs["target2"].numel())

    @each("dtype", [(torch.float32,), (torch.bfloat16,)], few=[(torch.bfloat16,)])
    def test_saves_no_more_than_the_gradients_that_it_returns(self, dtype, backend):
        inputs = self.op.make(self.op.medium, dtype, backend=backend)
        wanted = [name for name in self.op.leaves if not name.startswith("target")]
        fresh = self.op.prepared(inputs, wanted)
        loss, saved = saved_bytes(lambda: call(fresh, backend, target_grad=False))
        gradients = torch.autograd.grad(loss, [fresh[name] for name in wanted])
        # The factors of three multiplications per stage are all that comes on top.
        assert saved <= sum(g.numel() * g.element_size() for g in gradients) + 2 * 3 * 4

    @each()
    def test_does_no_gradient_work_where_no_gradient_is_asked_for(self, monkeypatch, backend):
        inputs = self.op.prepared(self.op.make(self.op.odd, backend=backend))
        flags, real = [], _registration.raw_op

        def recording(name, backend):
            def run(*arguments):
                flags.append(arguments[-2])
                results = real(name, backend)(*arguments)
                assert bool(results[2]) == any(arguments[-2])
                return results

            return run

        monkeypatch.setattr(_registration, "raw_op", recording)
        with torch.no_grad():
            call(inputs, backend)
        call({name: t.detach() for name, t in inputs.items()}, backend)
        call({name: t if name == "bias2" else t.detach() for name, t in inputs.items()}, backend)
        assert [[KINDS[k % len(KINDS)] for k, flag in enumerate(wanted) if flag] for wanted in flags] == [
            [],
            [],
            ["bias"],
        ]

    @each()
    def test_backward_leaves_what_is_saved_as_it_is(self, backend):
        saved = []

        def pack(tensor):
            saved.append((tensor, tensor.clone(), tensor._version))
            return tensor

        inputs = self.op.prepared(self.op.make(self.op.even, backend=backend))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = call(inputs, backend)
        torch.autograd.grad(loss, [inputs[name] for name in self.op.leaves], torch.tensor(3.0).to(loss))
        assert len(saved) > 8
        for tensor, before, version in saved:
            assert torch.equal(tensor, before) and tensor._version == version

    @each("upstream", [(0.0,), (-3.0,), (1e30,), (1e-30,)], few=[(-3.0,), (0.0,)], eager=True)
    def test_any_upstream_gradient(self, upstream, backend):
        self.op.check(self.op.make(self.op.odd, backend=backend), backend, upstream=upstream)

    @each("weights", [((0.0, 1.0),), ((-2.0, 0.5),), ((1e-20, 1e10),)], few=[((0.0, -2.0),)], eager=True)
    def test_any_stage_weights(self, weights, backend):
        def weighted(inputs, backend):
            return call(inputs, backend, weights)

        values = self.op.check(self.op.make(self.op.odd, backend=backend), backend, call=weighted)
        for name, value in values.items():
            assert not name.endswith("1") or bool(value.any()) == bool(weights[0]), name

    @each("dtype", [(torch.float16,), (torch.bfloat16,)], few=[(torch.float16,)])
    def test_small_gradients_wait_unnormalised(self, dtype, backend):
        """Normalised before the loss scaler's factor comes, all of float16's would be flushed to zero."""

        def tiny(inputs, backend):
            return call(inputs, backend, (1e-9, 1e-9))

        inputs = self.op.make(self.op.odd, dtype, backend=backend)
        values = self.op.check(inputs, backend, upstream=2e10, call=tiny)
        assert all(value.any() for value in values.values())

    @each("dtype", [(torch.float16,), (torch.bfloat16,)], few=[(torch.float16,)])
    def test_large_gradients_wait_without_overflow(self, dtype, backend):
        """Unnormalised they are beyond float16's range."""
        inputs = self.op.make(Case(True, ((2, (6, 8), 16, 160),) * 2), dtype, backend=backend)
        inputs = {name: 300 * t if t.dim() == 3 else t for name, t in inputs.items()}
        inputs |= {f"weight{m}": 16 * inputs[f"weight{m}"] for m in (1, 2)}
        _, _, kept = raw_op("pea_fwd", backend)(*arguments_of_fwd(inputs, ("x",)))
        assert min(t.abs().max() for t in kept) > 2 * torch.finfo(torch.float16).max
        values = self.op.check(inputs, backend, upstream=1.0)
        assert all(value.isfinite().all() for value in values.values())

    @each(eager=True)
    def test_target_gradients_only_on_request(self, backend):
        inputs = self.op.prepared(self.op.make(self.op.even, backend=backend), ["x1", "target2"])
        message = r"pea: expected targets\[1\] \(stage 2\) not to require a gradient.*pass target_grad=True"
        with pytest.raises(ValueError, match=message):
            call(inputs, backend, target_grad=False)
        call(inputs | {"target2": inputs["target2"].detach()}, backend, target_grad=False)

    @each(
        "case dtype",
        lambda op: itertools.product(range(len(GOLDEN)), (torch.float64, torch.float32)),
        few=lambda op: [(cheapest("ea"), torch.float64), (cheapest("gl"), torch.float32)],
        eager=True,
    )
    def test_golden_values(self, case, dtype, backend):
        golden_alignment.check(GOLDEN[case], dtype, backend, "pea")

    @each(few=[])
    def test_one_embedding_in_two_stages_compiles(self, backend):
        """torch.compile takes no Function with the same tensor twice among its inputs."""

        def twice(inputs, backend):
            return call(inputs | {name: inputs[name.replace("2", "1")] for name in leaves_of(2)}, backend)

        inputs = self.op.make(self.op.odd, backend=backend)
        wanted = list(leaves_of(1))
        step = compiled(twice, backend="aot_eager")
        assert_same(self.op.run(inputs, backend, wanted, call=step), self.op.run(inputs, backend, wanted, call=twice))
        self.op.check(inputs, backend, wanted=wanted, call=twice)

    @each()
    def test_raw_ops_repeat_the_contract(self, backend):
        inputs = self.op.make(self.op.even, backend=backend)
        arguments = arguments_of_fwd(inputs, KINDS)

        def changed(place, stage, value):
            lists = list(arguments)
            lists[place] = [value if m == stage else t for m, t in enumerate(lists[place])]
            return lists

        def of_stage_2(kind, name):
            return rf"expected ({kind} of stage 2 |{name}\[1\])"

        x, weight, bias, target = (arguments[k][1] for k in range(4))
        for bad, message in (
            (changed(0, 1, x[0]), of_stage_2("x", "xs")),
            (changed(0, 1, x[:, ::2]), of_stage_2("x", "xs") + ".*contiguous"),
            (changed(0, 1, x.double()), "float64 does not mix"),
            (changed(1, 1, weight[:, 1:].contiguous()), of_stage_2("weight", "weights")),
            (changed(1, 1, weight.t().contiguous().t()), of_stage_2("weight", "weights") + ".*contiguous"),
            (changed(2, 1, bias[1:]), of_stage_2("bias", "biases")),
            (changed(3, 1, target[:, 1:].contiguous()), of_stage_2("target", "targets")),
            (changed(4, 1, target[:, :, 1:].contiguous()), of_stage_2("assistant", "assistants")),
            (changed(5, 1, bias), of_stage_2("projection_scale", "projection_scales") + ".* one .*element"),
            ([*arguments[:1], arguments[1][:1], *arguments[2:]], "as many weights.* got 2 xs"),
            ([*arguments[:4], [], *arguments[5:]], "expected assistants, projection_scales and assistant_scales"),
            ([*arguments[:4], [], [], [], *arguments[7:]], "assistant.* a gradient of .* wanted"),
            ([*arguments[:7], [1.0], *arguments[8:]], "stage.weights as xs"),
            ([*arguments[:8], [True], False], "7 flags of wanted gradients per stage, got 1"),
        ):
            with pytest.raises(RuntimeError, match=message):
                raw_op("pea_fwd", backend)(*bad)
        loss, factors, kept = raw_op("pea_fwd", backend)(*arguments)
        codes = codes_of(arguments)
        for bad, message in (
            ((loss, factors[:, :2].contiguous(), kept, codes), "expected the factors that pea_fwd made"),
            ((loss.double(), factors, kept, codes), "expected a scalar grad"),
            ((loss, factors, kept[:-1], codes), "kept tensor"),
            ((loss, factors, [*kept, kept[0]], codes), "expected 10 kept tensors for these dtypes, got 11"),
            ((loss, factors, kept, codes[1:]), "6 dtype.* per stage"),
            ((loss, factors, kept, [7, *codes[1:]]), "dtype.* -1 to 3"),
        ):
            with pytest.raises(RuntimeError, match=message):
                raw_op("pea_bwd", backend)(*bad)

    @each(
        "dtype layout",
        itertools.product([torch.float32, torch.bfloat16, torch.float16], PEA.layouts),
        few=[(torch.float32, "maps"), (torch.bfloat16, "tokens")],
    )
    def test_float64_parameters_of_narrower_embeddings(self, dtype, layout, backend):
        inputs = self.op.make(self.op.even, dtype, layout, backend)
        inputs |= {name: t.double() for name, t in inputs.items() if t.dim() < 3}
        truth = self.op.truth(inputs)
        for name, value in self.op.run(inputs, backend).items():
            kind, _, leaf = name.partition(" of ")
            assert kind != "gradient" or value.dtype == inputs[leaf].dtype, name
            limit = self.op.limit(dtype, backend) + self.op.rounding(name, dtype, backend, inputs)
            assert relative(value, truth[name]) < limit, name


GOLDEN = golden_alignment.cases("base", "gl", "ea", want="train")


def cheapest(variant):
    return next(i for i, case in enumerate(GOLDEN) if case["variant"] == variant)


def arguments(assisted=False, dtype=torch.float64):
    torch.manual_seed(0)
    stages = ((2, (4, 6), 3, 5), (2, (2, 3), 4, 7))
    return lists_of(make(Case(assisted, stages), torch.float64)) | {"stage_weights": (0.25, 1.5)}


@pytest.mark.parametrize("assisted", (False, True))
def test_reference_is_mse_of_linear(assisted):
    args = arguments(assisted)
    expected = 0.0
    for m, weight in enumerate(args["stage_weights"]):
        projection = F.linear(args["xs"][m], args["weights"][m], args["biases"][m])
        if assisted:
            projection = args["projection_scales"][m] * projection
            projection = projection + args["assistant_scales"][m] * args["assistants"][m]
        expected = expected + weight * F.mse_loss(projection, args["targets"][m])
    torch.testing.assert_close(reference.pea(**args), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("maps", (("xs",), ("targets",), ("xs", "targets"), ("xs", "targets", "assistants")))
def test_reference_takes_maps_as_tokens(maps):
    args = arguments("assistants" in maps)
    expected = reference.pea(**args)
    for name in maps:
        args[name] = [as_map(t, hw).contiguous() for t, hw in zip(args[name], ((4, 6), (2, 3)), strict=True)]
    torch.testing.assert_close(reference.pea(**args), expected, rtol=1e-12, atol=0)


def as_map(tokens, hw):
    return tokens.transpose(1, 2).unflatten(2, hw)


@pytest.mark.parametrize("assisted", (False, True))
def test_gradcheck_of_the_reference(assisted):
    args = arguments(assisted)
    names = [name for name in args if name != "stage_weights"]
    leaves = [t.requires_grad_() for name in names for t in args[name]]

    def op(*tensors):
        lists = {name: tensors[2 * i : 2 * i + 2] for i, name in enumerate(names)}
        return reference.pea(**lists, stage_weights=(0.25, 1.5))

    assert gradcheck(op, leaves)


def test_default_weights_are_the_published_ones():
    x, weight, bias, target = torch.zeros(1, 2, 3), torch.zeros(4, 3), torch.zeros(4), torch.ones(1, 2, 4)
    loss = pea_loss([x] * 4, [weight] * 4, [bias] * 4, [target * s for s in (1, 2, 4, 8)])
    assert loss.item() == pytest.approx(0.1 + 0.1 * 4 + 0.5 * 16 + 64)


def test_float64_beside_float32_is_passed_over_and_refused():
    args = arguments()
    args["targets"] = [t.float() for t in args["targets"]]
    assert pea_loss(**args).dtype == torch.float64
    assert backends.choose("pea", [args["xs"][0], args["targets"][0]]) == "eager"
    with pytest.raises(transkd_fast.BackendError, match="float64 embeddings do not mix"):
        pea_loss(**args, backend="cpu")


def test_tf32_is_taken_where_torchs_own_switch_allows_it():
    with FakeTensorMode():
        on_gpu = torch.empty(2, device="cuda")
        others = [on_gpu.half(), on_gpu.double(), torch.empty(2)]
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "highest"):
            torch.set_float32_matmul_precision(precision)
            assert tf32_allowed(on_gpu) == (precision == "high")
            assert not any(map(tf32_allowed, others))
    finally:
        torch.set_float32_matmul_precision(before)


def changed(name, stage, change):
    """A change of one stage's tensor."""
    return lambda args: {name: [change(t) if m == stage else t for m, t in enumerate(args[name])]}


BAD = {
    "no bias": (lambda args: {"biases": [args["biases"][0], None]}, TypeError, r"biases\[1\] to be a tensor, got None"),
    "no x": (lambda args: {"xs": [None, args["xs"][1]]}, TypeError, r"xs\[0\] to be a tensor, got None"),
    "no stage": (lambda args: {name: [] for name in args}, ValueError, "pea: expected xs to have at least one stage"),
    "a target missing": (
        lambda args: {"targets": args["targets"][:1]},
        ValueError,
        "expected targets to have 2 entries like xs, got 1",
    ),
    "stage weights": (lambda args: {"stage_weights": (1.0,)}, ValueError, "expected stage_weights to have 2 entries"),
    "assistants of one stage": (
        lambda args: {"assistants": args["assistants"][:1]},
        ValueError,
        "expected assistants to have 2 entries",
    ),
    "assistants alone": (
        lambda args: {"projection_scales": None, "assistant_scales": None},
        ValueError,
        "assistants, projection_scales, assistant_scales all together or none, got only assistants",
    ),
    "tokens that are not H W": (
        lambda args: {"targets": [as_map(t, hw)[..., 1:] for t, hw in zip(args["targets"], HW, strict=True)]},
        ValueError,
        r"pea: stage 1: expected targets\[0\] to have H W = 24 pixels like the tokens of xs\[0\] \[2, 24, 3\],"
        r" got shape \[2, 5, 4, 5\]",
    ),
    "target's tokens": (
        changed("targets", 1, lambda t: t[:, 1:]),
        ValueError,
        r"stage 2: expected targets\[1\] to have shape \[2, 6, 7\], got \[2, 5, 7\]",
    ),
    "target's tokens beside a map": (
        lambda args: (
            {"xs": [as_map(x, hw) for x, hw in zip(args["xs"], HW, strict=True)]}
            | changed("targets", 0, lambda t: t[:, 2:])(args)
        ),
        ValueError,
        r"stage 1: expected targets\[0\] to have shape \[2, 24, 5\], got \[2, 22, 5\]",
    ),
    "target's pixels": (
        lambda args: {
            name: [as_map(x, hw if name == "xs" else hw[::-1]) for x, hw in zip(args[name], HW, strict=True)]
            for name in ("xs", "targets")
        },
        ValueError,
        r"stage 1: expected targets\[0\] to have shape \[2, 5, 4, 6\], got \[2, 5, 6, 4\]",
    ),
    "target's channels": (
        changed("targets", 1, lambda t: t[..., 1:]),
        ValueError,
        r"stage 2: expected targets\[1\] to have shape \[2, 6, 7\], got \[2, 6, 6\]",
    ),
    "target's batch": (
        changed("targets", 1, lambda t: t[1:]),
        ValueError,
        r"stage 2: expected targets\[1\] to have shape \[2, 6, 7\], got \[1, 6, 7\]",
    ),
    "weight's channels": (
        changed("weights", 0, lambda t: t[:, 1:]),
        ValueError,
        r"stage 1: expected weights\[0\] to have shape \[C_out, 3\], got \[5, 2\]",
    ),
    "bias": (
        changed("biases", 1, lambda t: t[1:]),
        ValueError,
        r"stage 2: expected biases\[1\] to have shape \[7\], got \[6\]",
    ),
    "assistant": (
        changed("assistants", 1, lambda t: t[:, :-1]),
        ValueError,
        r"stage 2: expected assistants\[1\] to have shape \[2, 6, 7\], got \[2, 5, 7\]",
    ),
    "scale": (
        changed("assistant_scales", 0, lambda t: t.expand(2)),
        ValueError,
        r"stage 1: expected assistant_scales\[0\] to have one element, got shape \[2\]",
    ),
    "no tokens": (changed("xs", 1, lambda t: t[:, :0]), ValueError, r"stage 2: expected xs\[1\] to have at least one"),
    "no channels come out": (changed("weights", 1, lambda t: t[:0]), ValueError, r"weights\[1\] to have at least one"),
    "x of two dimensions": (
        changed("xs", 1, lambda t: t[0]),
        ValueError,
        r"stage 2: expected xs\[1\] to be tokens \[B, N, C_in\] or a map \[B, C_in, H, W\], got shape \[6, 4\]",
    ),
    "integers": (changed("xs", 0, lambda t: t.long()), TypeError, r"expected xs\[0\] to be float16.*got torch.int64"),
    "a number for a scalar": (
        changed("projection_scales", 1, float),
        TypeError,
        r"expected projection_scales\[1\] to be a tensor, got float",
    ),
    "device": (changed("targets", 1, lambda t: t.to("meta")), ValueError, r"expected targets\[1\] on cpu like xs\[1\]"),
    "device of a stage": (
        lambda args: {name: [t.to("meta") if m else t for m, t in enumerate(args[name])] for name in LISTS},
        ValueError,
        r"expected xs\[1\] on cpu like xs\[0\], got meta",
    ),
}
HW = ((4, 6), (2, 3))


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(change, error, message):
    args = arguments(True)
    with pytest.raises(error, match=message):
        pea_loss(**(args | change(args)))


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend"):
        pea_loss(**arguments(), backend="fastest")


def test_triton_is_passed_over_beyond_what_it_counts():
    wide, long = torch.empty(1, 1, 2**14 + 1, device="meta"), torch.empty(2, 2**29 + 1, 4, device="meta")
    for tensor in (wide, long, wide.transpose(1, 2).unsqueeze(3), wide[0], wide[0, 0]):
        assert "2^30 tokens and 2^14 channels" in fits_triton([tensor])
    for tensor in (wide[..., 1:], long[:, 1:], long[:, 1:].transpose(1, 2).unsqueeze(3), wide[0, :, 1:]):
        assert fits_triton([tensor]) is None
