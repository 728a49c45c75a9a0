"""gl_mixer on every backend that can run here, against the fp64 reference, products written out, golden values."""

import itertools
import math

import golden_alignment
import pytest
import torch
from op_checks import OpChecks, compiled, each
from op_description import Cases, Op, assert_same, random, relative
from torch.autograd import gradcheck

import transkd_fast
from transkd_fast import backends
from transkd_fast.functional import gl_mixer
from transkd_fast.ops._registration import raw_op
from transkd_fast.reference import gl_mixer as reference

LEAVES = (
    "e",
    "u",
    "conv_a_weight",
    "conv_a_bias",
    "conv_b_weight",
    "conv_b_bias",
    "attention_weight",
    "conv_weight",
)
WEIGHTS = ("conv_a_weight", "conv_b_weight")


def make(case, dtype=torch.float32, layout="tokens"):
    batch, tokens, channels = case
    small = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {name: random((batch, tokens, channels), dtype, offset=0.25) for name in ("e", "u")}
    for branch in ("conv_a", "conv_b"):
        inputs[f"{branch}_weight"] = random((channels, channels, 3), small) * (3 * channels) ** -0.5
        inputs[f"{branch}_bias"] = random((channels,), small, offset=2.0) / 4
    inputs["attention_weight"] = 0.75 + random((1,), small) / 8
    inputs["conv_weight"] = random((1,), small).abs() / 4 - 1.5
    return inputs


def call(inputs, backend, residual=True):
    return gl_mixer(*(inputs[name] for name in LEAVES), residual=residual, backend=backend)


def without_residual(inputs, backend):
    return call(inputs, backend, residual=False)


def raw_calls(inputs, backend):
    arguments = [inputs[name] for name in LEAVES]
    e, u, *parameters = arguments
    for residual, keep in ((True, True), (False, True), (True, False)):
        yield "gl_mixer_fwd", (*arguments, residual, keep, False)
    out, branches = raw_op("gl_mixer_fwd", backend)(*arguments, True, True, False)
    for wanted in ([True] * 8, [name in ("u", "conv_b_weight", "conv_weight") for name in LEAVES], [False] * 8):
        yield "gl_mixer_bwd", (out, e, u, branches, *parameters, True, wanted, False)


# Tokens and channels that fill no tile; samples that end within one.
FEW = [(3, 7, 5), (2, 45, 10), (2, 1, 66)]
EVERY = [
    *FEW,
    (2, 45, 66),
    (1, 45, 160),
    (1, 1, 1),
    (5, 2, 3),
    (3, 2, 1),
    (2, 130, 32),
    (2, 300, 16),
    (3, 64, 64),
    (2, 33, 256),
]
SIZES = [(batch, tokens, channels) for batch in (1, 3) for tokens in (1, 2, 7) for channels in (1, 5, 16)]
GL_MIXER = Op(
    name="gl_mixer",
    inputs=make,
    call=call,
    raw_calls=raw_calls,
    leaves=LEAVES,
    poisoned=("e", "u", "conv_a_weight", "conv_a_bias", "attention_weight", "conv_weight"),
    # Its inputs, and what both convolutions give.
    saves=("e", "u", "e", "e", *WEIGHTS),
    multiplied=("e",),
    # The two scalars' gradients are sums over all elements.
    upstream_mean=1.0,
    mixed=(
        {"e": torch.bfloat16, "u": torch.float32},
        {"e": torch.float32, "u": torch.float16, "conv_a_weight": torch.bfloat16, "conv_b_bias": torch.float16},
        {"e": torch.float16, "u": torch.bfloat16, "conv_b_weight": torch.float16, "conv_weight": torch.bfloat16},
        {name: torch.bfloat16 for name in LEAVES},
        {name: torch.float64 if name in ("e", "u") else torch.bfloat16 for name in LEAVES},
    ),
    cases=Cases(every=EVERY, some=[*FEW, (2, 45, 66), (2, 130, 32)], few=FEW),
    sizes=Cases(every=SIZES, some=SIZES[::4], few=SIZES[::5]),
    tiny=(2, 3, 3),
    even=(2, 12, 16),
    odd=(3, 9, 10),
    medium=(2, 128, 8),
    large=(2, 500, 48),
    layouts=("tokens",),
)


class TestGLMixer(OpChecks):
    op = GL_MIXER
    # Tokens come [B, N, C]; Python copies what lies otherwise (test_views).
    test_layouts_may_differ = None

    @each(
        "case dtype",
        list(itertools.product([(2, 45, 10), (3, 1, 16), (2, 2, 66)], GL_MIXER.dtypes)),
        few=[((2, 7, 5), torch.float32), ((3, 2, 16), torch.bfloat16)],
        eager=True,
    )
    def test_without_residual(self, case, dtype, backend):
        self.op.check(self.op.make(case, dtype, backend=backend), backend, call=without_residual)

    @each("kinds", [(pair,) for pair in itertools.combinations(LEAVES, 2)], few=[(("e", "u"),), (WEIGHTS,)])
    def test_every_pair_of_gradients(self, kinds, backend):
        values = self.op.check(self.op.make(self.op.odd, backend=backend), backend, wanted=list(kinds))
        assert {name for name in values if name.startswith("gradient")} == {f"gradient of {name}" for name in kinds}

    @each(
        "case dtype",
        list(itertools.product([(3, 1, 5), (3, 2, 16), (4, 7, 10), (3, 64, 32)], (torch.float32, torch.bfloat16))),
        few=[((3, 7, 10), torch.float32), ((3, 1, 16), torch.bfloat16)],
        eager=True,
    )
    def test_samples_do_not_leak_into_each_other(self, case, dtype, backend):
        inputs = self.op.make(case, dtype, backend=backend)
        expected = self.op.run(inputs, backend)
        for name in ("e", "u"):
            poisoned = inputs | {name: inputs[name].clone()}
            poisoned[name][1] = math.nan
            values = self.op.run(poisoned, backend)
            for result in ("output 0", "gradient of e", "gradient of u"):
                others = [sample for sample in range(case[0]) if sample != 1]
                assert torch.equal(values[result][others], expected[result][others]), (name, result)
            assert values["output 0"][1].isnan().all()

    @each("case dtype", [((3, 6, 10), torch.float32), ((2, 4, 16), torch.bfloat16)], eager=True)
    def test_upstream_gradients_do_not_leak_into_other_samples(self, case, dtype, backend):
        inputs = self.op.prepared(self.op.make(case, dtype, backend=backend))
        out = call(inputs, backend)
        upstream = torch.zeros_like(out)
        upstream[1] = 1
        for gradient in torch.autograd.grad(out, [inputs["e"], inputs["u"]], upstream):
            assert gradient[1].all() and not gradient[0].any() and not gradient[2:].any()

    @each(
        "gate dtype",
        list(itertools.product((200.0, -200.0, math.inf, -math.inf), GL_MIXER.dtypes)),
        few=[(200.0, torch.float16), (-200.0, torch.float32)],
        eager=True,
    )
    def test_saturated_gates_pass_or_stop_everything(self, gate, dtype, backend):
        inputs = self.op.make((2, 7, 16), dtype, backend=backend)
        inputs["conv_b_bias"] = inputs["conv_b_bias"] + gate
        open_gate = ["e", "u", "conv_a_weight", "conv_a_bias", "attention_weight", "conv_weight"]
        wanted = open_gate if gate > 0 else ["u", "attention_weight"]
        self.op.check(inputs, backend, wanted=wanted)
        values = self.op.run(inputs, backend)
        assert all(value.isfinite().all() for value in values.values())
        silent = {"conv_b_weight", "conv_b_bias"} if gate > 0 else set(LEAVES[2:6]) | {"conv_weight"}
        for name in silent:
            assert values[f"gradient of {name}"].abs().max() < 1e-80 + torch.finfo(dtype).tiny, name

    @each("dtype", [(torch.float16,), (torch.float32,)], few=[(torch.float16,)], eager=True)
    def test_gates_beyond_any_exponential_stay_finite(self, dtype, backend):
        """Products of 100 channels reach gates of 1e4 and more in either direction."""
        inputs = self.op.make((2, 7, 16), dtype, backend=backend)
        inputs["conv_b_weight"] = 1e4 * inputs["conv_b_weight"]
        assert all(value.isfinite().all() for value in self.op.run(inputs, backend).values())
        self.op.check(inputs, backend, wanted=["u", "attention_weight", "conv_a_bias", "conv_weight"])

    @each(eager=True)
    def test_branches_beyond_float16_stay_finite(self, backend):
        """What the convolutions give is kept in the compute type; only the mix is rounded."""
        inputs = self.op.make((2, 7, 16), torch.float16, backend=backend)
        inputs["e"] = 32 * inputs["e"]
        inputs["conv_a_weight"] = 2**13 * inputs["conv_a_weight"]
        inputs["conv_b_weight"] = 2**-5 * inputs["conv_b_weight"]
        inputs["conv_weight"] = 2**-9 * inputs["conv_weight"]
        values = self.op.check(inputs, backend, wanted=["e", "u", "conv_b_bias"])
        assert values["output 0"].abs().max().item() * 2**9 > 2 * torch.finfo(torch.float16).max

    @each(
        "case dtype",
        lambda op: itertools.product(range(len(GOLDEN)), (torch.float64, torch.float32)),
        few=lambda op: [(0, torch.float64), (1, torch.float32)],
        eager=True,
    )
    def test_golden_values(self, case, dtype, backend):
        golden_alignment.check(GOLDEN[case], dtype, backend, "gl_mixer")

    @each(few=[])
    def test_one_tensor_in_several_places_compiles(self, backend):
        """torch.compile takes no Function with the same tensor twice among its inputs."""

        def shared(inputs, backend):
            same = {name.replace("_a_", "_b_"): inputs[name] for name in ("conv_a_weight", "conv_a_bias")}
            return call(inputs | {"u": inputs["e"]} | same, backend)

        inputs = self.op.make(self.op.odd, backend=backend)
        wanted = ["e", "conv_a_weight", "conv_a_bias", "attention_weight", "conv_weight"]
        step = compiled(shared, backend="aot_eager")
        assert_same(self.op.run(inputs, backend, wanted, call=step), self.op.run(inputs, backend, wanted, call=shared))
        self.op.check(inputs, backend, wanted=wanted, call=shared)

    @each("dtype", [(torch.float32,), (torch.bfloat16,), (torch.float16,)])
    def test_float64_parameters_of_narrower_tokens(self, dtype, backend):
        inputs = self.op.make(self.op.even, dtype, backend=backend)
        inputs |= {name: t.double() for name, t in inputs.items() if name not in ("e", "u")}
        truth = self.op.truth(inputs)
        for name, value in self.op.run(inputs, backend).items():
            kind, _, leaf = name.partition(" of ")
            assert kind != "gradient" or value.dtype == inputs[leaf].dtype, name
            limit = self.op.limit(dtype, backend) + self.op.rounding(name, dtype, backend, inputs)
            assert relative(value, truth[name]) < limit, name

    @each()
    def test_raw_ops_repeat_the_contract(self, backend):
        inputs = self.op.make(self.op.even, backend=backend)
        forward, backward = raw_op("gl_mixer_fwd", backend), raw_op("gl_mixer_bwd", backend)
        e, u, weight, vector = (inputs[name] for name in ("e", "u", "conv_a_weight", "conv_a_bias"))

        def changed(**changes):
            return [(inputs | changes)[name] for name in LEAVES]

        for arguments, message in (
            (changed(e=e[0]), "expected e "),
            (changed(e=e[:, :0], u=u[:, :0]), "expected e "),
            (changed(e=e[:, ::2], u=u[:, ::2].contiguous()), "expected e "),
            (changed(u=u[:, 1:].contiguous()), "expected u "),
            (changed(u=u.double()), "float64 does not mix"),
            (changed(u=u.transpose(1, 2).contiguous().transpose(1, 2)), "expected u "),
            (changed(conv_a_weight=weight[:, :, :1].contiguous()), "expected conv_a_weight "),
            (changed(conv_b_weight=weight[:-1]), "expected conv_b_weight "),
            (
                changed(conv_b_weight=weight.transpose(0, 1)),
                "expected conv_b.* contiguous",
            ),
            (changed(conv_b_bias=vector[1:]), "expected conv_b_"),
            (changed(attention_weight=vector), "expected attention_weight "),
            (changed(conv_weight=vector), "expected conv_weight "),
        ):
            with pytest.raises(RuntimeError, match=message):
                forward(*arguments, False, True, False)
        out, branches = forward(*changed(), False, True, False)
        parameters = changed()[2:]
        for arguments, wanted, message in (
            ((out[:, 1:].contiguous(), e, u, branches), [True] * 8, "expected grad "),
            ((out.bfloat16(), e, u, branches), [True] * 8, "expected grad of e's dtype"),
            ((out, e, u, branches.new_empty(0)), [True] * 8, "branches"),
            ((out, e, u, branches.double()), [True] * 8, "branches"),
            ((out, e, u, branches), [True] * 7, "8 flags"),
        ):
            with pytest.raises(RuntimeError, match=message):
                backward(*arguments, *parameters, False, wanted, False)


GOLDEN = golden_alignment.cases("gl")


def arguments(batch=2, tokens=5, channels=4, dtype=torch.float64):
    torch.manual_seed(0)
    return make((batch, tokens, channels), dtype)


def shifted_convolution(e, weight, bias):
    """Sums per sample, so that nothing can leak over its ends."""
    out = bias.expand(e.shape).clone()
    for shift, tap in zip((-1, 0, 1), weight.unbind(2), strict=True):
        for n in range(e.shape[1]):
            if 0 <= n + shift < e.shape[1]:
                out[:, n] += e[:, n + shift] @ tap.T
    return out


@pytest.mark.parametrize("residual", (False, True))
@pytest.mark.parametrize(("batch", "tokens"), [(2, 5), (1, 1), (3, 2)])
def test_reference_is_shifted_products(batch, tokens, residual):
    args = arguments(batch, tokens)
    value = shifted_convolution(args["e"], args["conv_a_weight"], args["conv_a_bias"])
    gate = shifted_convolution(args["e"], args["conv_b_weight"], args["conv_b_bias"])
    expected = args["attention_weight"] * args["u"] + args["conv_weight"] * value / (1 + (-gate).exp())
    expected = expected + args["e"] if residual else expected
    torch.testing.assert_close(reference.gl_mixer(**args, residual=residual), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("residual", (False, True))
def test_gradcheck_of_the_reference(residual):
    leaves = [t.requires_grad_() for t in arguments(channels=3).values()]
    assert gradcheck(lambda *tensors: reference.gl_mixer(*tensors, residual=residual), leaves)


def test_the_default_adds_no_residual():
    args = arguments()
    torch.testing.assert_close(gl_mixer(**args), reference.gl_mixer(**args, residual=False), rtol=1e-12, atol=1e-12)


def test_float64_beside_float32_is_passed_over_and_refused():
    args = arguments()
    args["u"] = args["u"].float()
    assert gl_mixer(**args).dtype == torch.float64
    assert backends.choose("gl_mixer", list(args.values())) == "eager"
    with pytest.raises(transkd_fast.BackendError, match="float64 tokens do not mix"):
        gl_mixer(**args, backend="cpu")


BAD = {
    "no bias": ({"conv_a_bias": None}, TypeError, "expected conv_a_bias to be a tensor, got None"),
    "u's shape": ({"u": torch.zeros(2, 4, 4)}, ValueError, r"gl_mixer: expected u to have shape \[2, 5, 4\]"),
    "a map": ({"e": torch.zeros(2, 4, 5, 5)}, ValueError, r"expected e to have shape \[B, N, C\], got \[2, 4, 5, 5\]"),
    "empty": ({"e": torch.zeros(2, 0, 4), "u": torch.zeros(2, 0, 4)}, ValueError, "at least one element"),
    "kernel 1": ({"conv_a_weight": torch.zeros(4, 4, 1)}, ValueError, r"conv_a_weight to have shape \[4, 4, 3\]"),
    "gate's channels": ({"conv_b_weight": torch.zeros(4, 5, 3)}, ValueError, r"conv_b_weight.*got \[4, 5, 3\]"),
    "bias": ({"conv_b_bias": torch.zeros(3)}, ValueError, r"conv_b_bias to have shape \[4\], got \[3\]"),
    "a vector for a scalar": ({"conv_weight": torch.zeros(4)}, ValueError, "conv_weight to have one element"),
    "a number for a scalar": ({"attention_weight": 1.0}, TypeError, "attention_weight to be a tensor, got float"),
    "integers": ({"e": torch.zeros(2, 5, 4).long()}, TypeError, "expected e"),
    "device": ({"u": torch.zeros(2, 5, 4, device="meta")}, ValueError, "expected u on cpu"),
    "a scalar's device": (
        {"conv_weight": torch.zeros(1, device="meta")},
        ValueError,
        r"expected conv_weight on cpu like e, got meta; move it with .to\(\)",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        gl_mixer(**(arguments(dtype=torch.float32) | change))


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend"):
        gl_mixer(**arguments(), backend="fastest")
