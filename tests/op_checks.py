"""What every op promises, as tests that an op inherits: it describes itself once and adds what only it promises.

    from op_checks import OpChecks, each
    from op_description import Op

    CWD = Op(name="cwd", inputs=cwd_inputs, call=cwd_call, leaves=("student",), ...)

    class TestCWD(OpChecks):
        op = CWD

        @each("temperature", [(0.5,), (4.0,)])
        def test_what_is_particular(self, temperature, backend): ...

tests/test_hcl.py is the example. `test_... = None`, with the reason, takes away a promise that an op does not make.
"""

import itertools
import math
from importlib.util import find_spec

import pytest
import torch
from kernels_here import affordable, device_of, interpreted, kernels_of
from op_description import Cases, Op, assert_same, relative
from torch.autograd.function import FunctionCtx
from torch.utils._pytree import tree_leaves, tree_map_only

import transkd_fast
from transkd_fast import backends
from transkd_fast.ops._registration import raw_op


def saved_bytes(function):
    """What a function returns, and the bytes that autograd keeps for its backward."""
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return result, sum(saved.values())


def compiled(function, **options):
    # torch.compile counts the recompilations of one function over all tests, and refuses the ninth.
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, **options)


def each(names="", cases=((),), few=None, some=None, eager=False):
    """Parametrizes a method of an OpChecks with cases and, last, `backend`.

    Args:
        names: of the arguments before `backend`, separated by spaces.
        cases: tuples of their values, or a function of the op that gives them.
        few: fewer of them for Triton's interpreter; default `cases`.
        some: fewer of them for compiled Triton; default `cases`.
        eager: whether the reference is a backend here.
    """

    # Every backend goes through them anew; an iterator would be empty for all but the first.
    every, some, few = (given if given is None or callable(given) else list(given) for given in (cases, some, few))

    def mark(function):
        chosen = Cases(every, every if some is None else some, every if few is None else few)
        function.each = names.split(), chosen, eager
        return function

    return mark


def values_and_gradients(kind):
    def cases(op):
        shapes = getattr(op.cases, kind)
        also = {"every": len(shapes), "some": 2, "few": 1}[kind]
        return [
            *itertools.product(shapes, op.dtypes[:1], op.layouts),
            *itertools.product(shapes[:also], op.dtypes[1:], op.layouts),
        ]

    return cases


def id_of(value):
    if isinstance(value, dict):
        return "-".join(map(id_of, value.values()))
    if isinstance(value, tuple):
        sizes = all(isinstance(size, int) for size in value)
        return "x".join(map(str, value)) if sizes else "_".join(id_of(entry) or str(entry) for entry in value)
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def inside(tensor, dim, before, after=0, step=1):
    """The same values, standing in every `step`-th place of a larger tensor."""
    shape = list(tensor.shape)
    shape[dim] = before + step * shape[dim] + after
    strided = tensor.new_zeros(shape).narrow(dim, before, step * tensor.shape[dim])
    strided = strided.unflatten(dim, (tensor.shape[dim], step)).select(dim if dim < 0 else dim + 1, 0)
    return strided.copy_(tensor)


def steps(tensor):
    """The strides that count: one of a single element leads nowhere."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


# Per view the fewest dimensions that it needs, and the tensor of the same shape.
VIEWS = {
    "every_second_column": (1, lambda t: inside(t, -1, 0, step=2)),
    "columns_from_one_on": (1, lambda t: inside(t, -1, 1)),
    "part_of_the_channels": (2, lambda t: inside(t, 1, 1, 1)),
    "transposed": (2, lambda t: t.transpose(-2, -1).contiguous().transpose(-2, -1)),
    "expanded_channels": (3, lambda t: t[:, :1].expand_as(t)),
    "rows_of_tokens": (3, lambda t: inside(t.movedim(1, -1), 1, 2).movedim(-1, 1) if t.dim() == 4 else inside(t, 1, 2)),
}


class OpChecks:
    """Base of an op's test class; a subclass sets `op`."""

    op: Op

    def pytest_generate_tests(self, metafunc):
        if not hasattr(metafunc.function, "each"):
            return
        names, cases, eager = metafunc.function.each
        arguments = []
        for backend in [*["eager"] * eager, *kernels_of(self.op.name)]:
            chosen = getattr(cases, affordable(backend))
            arguments += [(*case, backend) for case in (chosen(self.op) if callable(chosen) else chosen)]
        metafunc.parametrize([*names, "backend"], arguments, ids=id_of)

    def test_the_kernels_that_can_run_here_do(self):
        available = kernels_of(self.op.name)
        on_gpu = torch.cuda.is_available() and transkd_fast.build_info()["extensions"]["_C_cuda"]["loaded"]
        possible = {"cpu": True, "triton": find_spec("triton") is not None, "cuda": on_gpu}
        for backend in self.op.kernels:
            if possible[backend]:
                assert backend in available, backends.why_not(self.op.name, backend)

    @each(
        "case dtype layout",
        values_and_gradients("every"),
        values_and_gradients("few"),
        values_and_gradients("some"),
        eager=True,
    )
    def test_value_and_gradients(self, case, dtype, layout, backend):
        inputs = self.op.make(case, dtype, layout, backend)
        values = self.op.check(inputs, backend)
        for name, value in values.items():
            kind, _, leaf = name.partition(" of ")
            if kind == "gradient":
                assert value.dtype == inputs[leaf].dtype, name
                assert backend == "eager" or steps(value) == steps(inputs[leaf]), name
            elif kind.startswith("output") and value.is_floating_point():
                loss = torch.float64 if dtype == torch.float64 else torch.float32
                assert value.dtype == (dtype if value.dim() else loss), name

    @each("layout", lambda op: [(layout,) for layout in op.layouts], lambda op: [(op.layouts[0],)])
    def test_gradcheck(self, layout, backend):
        op, inputs = self.op, self.op.make(self.op.tiny, torch.float64, layout, backend)
        leaves = [inputs[name].requires_grad_() for name in op.leaves]

        def differentiable(*leaves):
            fresh = {name: inputs[name].clone() for name in op.changes}
            outputs = op.outputs(inputs | fresh | dict(zip(op.leaves, leaves, strict=True)), backend)
            return tuple(output for output in outputs if output.requires_grad)

        fast = interpreted(backend)  # one direction instead of one per element
        assert torch.autograd.gradcheck(differentiable, leaves, fast_mode=fast)

    @each(
        "dtypes layout",
        lambda op: itertools.product(op.mixed, op.layouts),
        lambda op: zip(op.mixed[:2], itertools.cycle(op.layouts)),
    )
    def test_mixed_dtypes(self, dtypes, layout, backend):
        inputs = self.op.make(self.op.even, torch.float32, layout, backend)
        inputs |= {name: inputs[name].to(dtype) for name, dtype in dtypes.items()}
        values = self.op.check(inputs, backend)
        for name in self.op.leaves:
            assert values[f"gradient of {name}"].dtype == inputs[name].dtype

    @each("view", [(view,) for view in VIEWS])
    def test_views(self, view, backend):
        needed, function = VIEWS[view]
        inputs = self.op.make(self.op.even, backend=backend)
        inputs = {name: function(t) if t.dim() >= needed else t for name, t in inputs.items()}
        assert not all(t.is_contiguous() for t in inputs.values())
        self.op.check(inputs, backend)

    @each()
    def test_layouts_may_differ(self, backend):
        for layout, other in itertools.permutations(self.op.layouts, 2):
            inputs, others = (self.op.make(self.op.even, layout=name, backend=backend) for name in (layout, other))
            for name in self.op.leaves:
                if inputs[name].stride() != others[name].stride():
                    self.op.check(inputs | {name: others[name]}, backend)

    @each("layout", lambda op: [(layout,) for layout in op.layouts])
    def test_only_the_gradients_asked_for(self, layout, backend):
        inputs = self.op.make(self.op.even, layout=layout, backend=backend)
        for wanted in self.op.subsets():
            values = self.op.check(inputs, backend, wanted=wanted)
            assert [name for name in self.op.leaves if f"gradient of {name}" in values] == wanted

    @each()
    def test_saves_no_more_than_it_needs(self, backend):
        inputs = self.op.make(self.op.medium, backend=backend)
        _, saved = saved_bytes(lambda: self.op.outputs(self.op.prepared(inputs), backend))
        expected = sum(inputs[name].numel() * inputs[name].element_size() for name in self.op.saves)
        assert expected <= saved < 1.01 * expected, f"expected to save {expected} bytes, got {saved}"

    @each()
    def test_saves_nothing_where_no_gradient_is_asked_for(self, monkeypatch, backend):
        inputs = self.op.make(self.op.even, backend=backend)
        kept, save = [], FunctionCtx.save_for_backward

        def save_and_record(ctx, *tensors):
            kept.extend(tensors)
            save(ctx, *tensors)

        # Without a graph torch drops what a Function saves; nothing should have been made for it either.
        monkeypatch.setattr(FunctionCtx, "save_for_backward", save_and_record)

        def call(wanted):
            return self.op.outputs(self.op.prepared(inputs, wanted), backend)

        expected, saved = saved_bytes(lambda: call([]))
        assert saved == 0
        with torch.no_grad():
            outputs, saved = saved_bytes(lambda: call(self.op.leaves))
        assert saved == 0 and not any(output.requires_grad for output in outputs)
        with torch.inference_mode():
            in_inference = call([])
        assert not kept
        for output, *others in zip(expected, outputs, in_inference, strict=True):
            assert all(torch.equal(output, other) for other in others)

    @each()
    def test_a_second_backward_gives_the_same_gradients(self, backend):
        inputs = self.op.prepared(self.op.make(self.op.odd, backend=backend))
        leaves = [inputs[name] for name in self.op.leaves]
        outputs = self.op.outputs(inputs, backend)
        first = self.op.gradients(outputs, leaves, retain_graph=True)
        kept = [gradient.clone() for gradient in first]
        second = self.op.gradients(outputs, leaves)
        for gradients in zip(first, kept, second, strict=True):
            assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[1], gradients[2])

    @each()
    def test_double_backward_is_refused(self, backend):
        inputs = self.op.make(self.op.tiny, backend=backend)
        for wanted in self.op.subsets():
            true = self.op.differentiable_gradients(inputs, "eager", wanted)
            results = self.op.differentiable_gradients(inputs, backend, wanted)
            for (_, true_gradient), (leaf, gradient) in zip(true, results, strict=True):
                if not true_gradient.requires_grad:
                    continue  # a linear leaf: its gradient is a constant
                # A penalty on the gradient must not pass for a constant either.
                for total in (gradient.sum(), leaf.square().sum() + gradient.norm()):
                    with pytest.raises(RuntimeError, match=f"{self.op.name}: second derivatives are not supported"):
                        torch.autograd.grad(total, leaf, retain_graph=True)

    @each(
        "dtype layout",
        lambda op: itertools.product(op.dtypes[:2], op.layouts),
        lambda op: zip(op.dtypes[:2], itertools.cycle(op.layouts)),
    )
    def test_results_repeat_bit_for_bit_with_any_number_of_threads(self, dtype, layout, backend):
        case = self.op.odd if interpreted(backend) else self.op.large
        inputs = self.op.make(case, dtype, layout, backend)
        first = self.op.run(inputs, backend)
        threads = torch.get_num_threads()
        try:
            for count in (1, 2, 3, 7) if backend == "cpu" else (threads,):
                torch.set_num_threads(count)
                assert_same(self.op.run(inputs, backend), first)
        finally:
            torch.set_num_threads(threads)

    @each("layout", lambda op: [(layout,) for layout in op.layouts])
    def test_nothing_uninitialised_is_read(self, layout, backend):
        inputs = self.op.make(self.op.odd, layout=layout, backend=backend)
        expected = self.op.run(inputs, backend)
        torch.use_deterministic_algorithms(True)  # with it, torch fills every fresh tensor with NaN
        try:
            assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(5).isnan().all()
            assert_same(self.op.run(inputs, backend), expected)
        finally:
            torch.use_deterministic_algorithms(False)

    @each(
        "bad dtype layout",
        lambda op: itertools.product([math.nan, math.inf, -math.inf], op.dtypes[:3], op.layouts),
        lambda op: zip([math.nan, math.inf], op.dtypes, itertools.cycle(op.layouts)),
    )
    def test_nan_and_inf_come_out_where_they_do_in_eager(self, bad, dtype, layout, backend):
        for name in self.op.poisoned or self.op.leaves:
            inputs = self.op.make(self.op.even, dtype, layout, backend)
            inputs[name][tuple(size // 2 for size in inputs[name].shape)] = bad
            truth, values = self.op.truth(inputs), self.op.run(inputs, backend)
            assert not truth["output 0"].isfinite().all()
            for result, value in values.items():
                assert torch.equal(value.isfinite().cpu(), truth[result].isfinite()), f"{name}: {result}"

    @each("layout", lambda op: [(layout,) for layout in op.layouts], lambda op: [(op.layouts[0],)])
    def test_raw_ops_pass_opcheck(self, layout, backend):
        inputs = self.op.make(self.op.odd, layout=layout, backend=backend)
        for name, arguments in self.op.raw_calls(inputs, backend):
            torch.library.opcheck(raw_op(name, backend).default, arguments)

    @each()
    def test_fakes_agree_with_the_kernels_on_every_size(self, backend):
        def description(results):
            return [(t.shape, t.dtype, t.stride()) for t in tree_leaves(results)]

        for case in getattr(self.op.sizes, affordable(backend)):
            for name, arguments in self.op.raw_calls(self.op.make(case, backend=backend), backend):
                fakes = tree_map_only(torch.Tensor, lambda t: t.to("meta"), arguments)
                results = [description(raw_op(name, backend)(*given)) for given in (arguments, fakes)]
                assert results[0] == results[1], (case, name)

    @each("dynamic", [(False,), (True,)], few=[(True,)])
    def test_compiles_without_graph_breaks(self, dynamic, backend):
        step = compiled(self.op.call, dynamic=dynamic, backend="aot_eager")
        for case in (self.op.even, self.op.odd):
            inputs = self.op.make(case, backend=backend)
            assert_same(self.op.run(inputs, backend, call=step), self.op.run(inputs, backend))

    @each()
    def test_auto_is_a_kernel_also_inside_a_compiled_graph(self, backend):
        inputs = self.op.make(self.op.even, backend=backend)
        graphs = []

        def collect(graph, inputs):
            graphs.append(str(graph.graph))
            return graph

        compiled(self.op.call, backend=collect)(inputs, None)
        assert f"transkd_fast.{self.op.name}_" in graphs[0]

    @each(eager=True)
    def test_autocast_changes_nothing(self, backend):
        inputs = self.op.make(self.op.odd, backend=backend)
        plain = self.op.run(inputs, backend)
        autocast = torch.autocast(device_of(backend), dtype=torch.bfloat16)
        runs = [self.op.run(inputs, backend, call=autocast(self.op.call))]
        if backend != "eager":  # whose backward is torch's, which warns against autocast there
            with autocast:
                runs.append(self.op.run(inputs, backend))
        for values in runs:
            if self.op.multiplied and device_of(backend) == "cuda":  # whose products are TF32's there
                for name, value in plain.items():
                    assert relative(values[name], value.cpu().double()) < 2**-9, name
            else:
                assert_same(values, plain)
