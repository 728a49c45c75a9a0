"""How an op describes itself to its tests, and how their results are compared with the float64 reference."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from kernels_here import device_of, interpreted

from transkd_fast import backends

UPSTREAM = 0.37
# Rounding of the result's dtype, times a margin for sums over thousands of values.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
HALVES = {torch.bfloat16, torch.float16}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Cases:
    """Cases for kernels that start at once, for those that are compiled per case, and for Triton's interpreter."""

    every: Sequence
    some: Sequence
    few: Sequence


@dataclass(frozen=True)
class Op:
    """One op as its tests see it. A case is what `inputs` makes tensors of: a shape, or a tuple of shapes.

    Args:
        name: as in `transkd_fast.backends`.
        inputs: of (case, dtype, layout): the tensors by name, on the CPU, from `random`. The dtype and the layout are
            those of the activations; labels, counters and so on have their own.
        call: of (inputs, backend): the output or a tuple of outputs. Scalars are losses, float32 or float64.
        raw_calls: of (inputs, backend): yields (name, arguments) of each raw op, made from earlier ones' results.
        leaves: names of the inputs with a gradient.
        saves: names of the inputs as large as what is saved for the backward, but for one percent.
        mixed: which inputs may have which other dtypes together, the rest being float32; two entries or more.
        cases: for values and gradients; the first ones are also run in the dtypes after the first.
        sizes: for the fakes' shapes: all kinds of sizes, as small as possible.
        tiny: for finite differences, one call per element.
        even: for whatever needs a single case: one whose rows and channels divide into vectors.
        odd: the same where they do not.
        medium: thousands of values per channel, so that what is saved per channel hardly counts.
        large: enough for many threads.
        changes: names of the inputs that the op updates in place, compared like outputs.
        alone: which leaves are also the only ones that want a gradient; default all.
        dtypes: of the activations.
        layouts: names that `inputs` knows; an op of one layout takes `test_layouts_may_differ` away.
        kernels: the backends with a kernel.
        tolerance: per dtype of a result.
        poisoned: inputs into which NaN and infinities are put; default the leaves.
        eager_tolerance: the same for the reference in low precision, whose sums are torch's.
        upstream_mean: of the upstream gradients of maps; what is a single sum over them all cancels without.
        multiplied: names of the inputs to whose dtypes the GPU kernels round the operands of their matrix products.
        twice_rounded: names of the leaves whose gradients wait for the upstream gradient in their own dtype.
    """

    name: str
    inputs: Callable
    call: Callable
    raw_calls: Callable
    leaves: Sequence[str]
    saves: Sequence[str]
    mixed: Sequence[dict[str, torch.dtype]]
    cases: Cases
    sizes: Cases
    tiny: tuple
    even: tuple
    odd: tuple
    medium: tuple
    large: tuple
    changes: Sequence[str] = ()
    alone: Sequence[str] | None = None
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    layouts: Sequence[str] = tuple(LAYOUTS)
    kernels: Sequence[str] = backends.BACKENDS[1:]
    tolerance: dict[torch.dtype, float] = field(default_factory=lambda: dict(TOLERANCE))
    poisoned: Sequence[str] | None = None
    eager_tolerance: dict[torch.dtype, float] = field(default_factory=dict)
    upstream_mean: float = 0.0
    multiplied: Sequence[str] = ()
    twice_rounded: Sequence[str] = ()

    def make(self, case, dtype=torch.float32, layout=None, backend="cpu"):
        """The same values for the same case and dtype, on the backend's device."""
        torch.manual_seed(0)
        inputs = self.inputs(case, dtype, layout or self.layouts[0])
        return {name: tensor.to(device_of(backend)) for name, tensor in inputs.items()}

    def outputs(self, inputs, backend, call=None):
        outputs = (call or self.call)(inputs, backend)
        return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)

    def prepared(self, inputs, wanted=None):
        """Inputs of one call: leaves that want a gradient, copies of what the op changes."""
        fresh = {name: t.detach().clone() if name in self.changes else t.detach() for name, t in inputs.items()}
        for name in self.leaves if wanted is None else wanted:
            fresh[name].requires_grad_()
        return fresh

    def run(self, inputs, backend, wanted=None, upstream=None, call=None):
        """Outputs, gradients of the wanted leaves and inputs that the op changed, by name."""
        inputs = self.prepared(inputs, wanted)
        outputs = self.outputs(inputs, backend, call)
        values = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
        leaves = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
        for name, gradient in zip(leaves, self.gradients(outputs, leaves.values(), upstream), strict=True):
            values[f"gradient of {name}"] = gradient
        return values | {f"{name} afterwards": inputs[name] for name in self.changes}

    def gradients(self, outputs, leaves, upstream=None, **options):
        leaves = list(leaves)
        if upstream is None:
            # Like a loss scaler's: keeps float16 gradients of a mean out of the subnormal range.
            upstream = UPSTREAM * leaves[0].numel()
        outputs = [output for output in outputs if output.requires_grad]
        upstreams = [
            fixed_like(output) + self.upstream_mean if output.dim() else torch.full_like(output, upstream)
            for output in outputs
        ]
        return torch.autograd.grad(outputs, leaves, upstreams, **options)

    def differentiable_gradients(self, inputs, backend, wanted):
        """Per wanted leaf the leaf and its gradient under `create_graph=True`."""
        inputs = self.prepared(inputs, wanted)
        leaves = [inputs[name] for name in wanted]
        return list(zip(leaves, self.gradients(self.outputs(inputs, backend), leaves, create_graph=True), strict=True))

    def truth(self, inputs, wanted=None, upstream=None, call=None):
        """The same from the float64 reference, on the CPU."""
        inputs = {name: t.cpu().double() if t.is_floating_point() else t.cpu() for name, t in inputs.items()}
        return self.run(inputs, "eager", wanted, upstream, call)

    def limit(self, dtype, backend):
        if not dtype.is_floating_point:
            return torch.finfo(torch.float64).tiny
        # Triton's interpreter cuts bfloat16 off where the compiled kernel rounds.
        if backend == "eager" and dtype in self.eager_tolerance:
            return self.eager_tolerance[dtype]
        return self.tolerance[dtype] * (2 if dtype == torch.bfloat16 and interpreted(backend) else 1)

    def rounding(self, name, dtype, backend, inputs):
        """What is added to a result's limit for values that were rounded before, on their way to it."""
        more = 0
        if backend in ("triton", "cuda"):  # the CPU multiplies in the compute type
            operands = {inputs[operand].dtype for operand in self.multiplied if operand in inputs}
            # A gradient is the product of a product. Where bfloat16 is cut off, their errors do not average out.
            products = 2 if interpreted(backend) and torch.bfloat16 in operands and name.startswith("gradient") else 1
            more += products * max((self.limit(half, backend) for half in operands & HALVES), default=0)
        # float16 waits as float32: its range is too small for a gradient that is not normalised yet.
        if backend != "eager" and dtype == torch.bfloat16 and name.removeprefix("gradient of ") in self.twice_rounded:
            more += self.limit(dtype, backend)
        return more

    def check(self, inputs, backend, **options):
        """Compare a run with the truth; returns the run's values."""
        values = self.run(inputs, backend, **options)
        self.compare(values, self.truth(inputs, **options), backend, inputs)
        return values

    def compare(self, values, truth, backend, inputs=()):
        assert values.keys() == truth.keys()
        for name, true in truth.items():
            assert values[name].shape == true.shape, name
            error = relative(values[name], true)
            limit = self.limit(values[name].dtype, backend) + self.rounding(name, values[name].dtype, backend, inputs)
            assert error < limit, f"{name}: expected a relative error below {limit:.2g}, got {error:.2g}"

    def subsets(self):
        """The leaves that want a gradient: those of `alone` each, and all."""
        alone = self.leaves if self.alone is None else self.alone
        return [*([name] for name in alone), *([list(self.leaves)] if len(self.leaves) > 1 else [])]


def random(shape, dtype=torch.float32, layout="nchw", offset=0.0):
    # Distinct values are needed in half precision too, where randn alone would repeat the same few.
    values = (torch.randn(shape, dtype=torch.float64) + offset).to(dtype)
    return values.contiguous(memory_format=LAYOUTS[layout])


def fixed_like(output):
    """Upstream gradients that every dtype holds exactly."""
    eighths = torch.randint(-8, 9, output.shape, generator=torch.Generator().manual_seed(1))
    return torch.empty_like(output).copy_(eighths / 8)


def relative(value, truth):
    # Where the truth is zero, only zero is near it.
    scale = truth.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    return ((value.cpu().double() - truth).abs().max() / scale).item()


def assert_same(values, expected):
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        assert values[name].dtype == value.dtype and torch.equal(values[name], value), name
