"""What only a GPU can show of every op's kernels: streams, graphs, no host synchronisation, launches, huge tensors.

Values and gradients on a GPU are tested by tests/test_<op>.py, which runs every backend that can run. An op adds itself
to CALLS.
"""

from dataclasses import dataclass, field

import pytest
import torch
from kernels_here import device_of
from op_description import fixed_like

from transkd_fast.functional import (
    BatchNorm,
    csf,
    cwd_loss,
    gl_mixer,
    hcl_bn_loss,
    hcl_loss,
    kd_kl_loss,
    pea_loss,
    seg_ce_loss,
    seg_predict,
)

BACKENDS = ("triton", "cuda")
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")


@dataclass
class Call:
    """A call of an op on tensors of its own.

    Args:
        leaves: tensors with a gradient.
        function: of no arguments: the loss or the map.
        launches: everything that forward and backward may start on the device, fills and copies included.
        changed: tensors that the op updates in place.
    """

    leaves: list
    function: object
    launches: tuple
    changed: list = field(default_factory=list)

    def __post_init__(self):
        self.start = [tensor.clone() for tensor in self.changed]
        with torch.no_grad():
            self.upstream = fixed_like(self.function()) + 0.375
        self.restart()

    def restart(self):
        """Take back what calls have changed."""
        for tensor, start in zip(self.changed, self.start, strict=True):
            tensor.copy_(start)

    def backward(self, result):
        return torch.autograd.grad(result, self.leaves, self.upstream)

    def run(self):
        result = self.function()
        return [result.detach(), *self.backward(result)]

    def results(self):
        """The same with what the call changed, from the same start each time."""
        self.restart()
        return [*self.run(), *(tensor.clone() for tensor in self.changed)]


def hcl(backend, layout="nchw", device="cuda"):
    shapes = [(2, 16, 32, 64), (2, 24, 16, 32), (2, 40, 8, 16), (2, 64, 4, 8)]
    students, teachers = (
        [torch.randn(s, device=device, dtype=torch.bfloat16).contiguous(memory_format=LAYOUTS[layout]) for s in shapes]
        for _ in range(2)
    )
    leaves = [student.requires_grad_() for student in students]
    # Forward: cuda one kernel and the fill of its counters.
    launches = {"cuda": (2, 1), "triton": (3, 1)}[backend]
    return Call(leaves, lambda: hcl_loss(leaves, teachers, (0.1, 0.1, 0.5, 1), backend=backend), launches)


def pyramid_maps(layout, device):
    shapes = [(2, 16, 32, 64), (2, 24, 16, 32), (2, 40, 8, 16), (2, 64, 3, 8)]
    students, teachers = (
        [torch.randn(s, device=device, dtype=torch.bfloat16).contiguous(memory_format=LAYOUTS[layout]) for s in shapes]
        for _ in range(2)
    )
    return [student.requires_grad_() for student in students], teachers


def hcl_bn(backend, layout="nchw", device="cuda"):
    """In training, with cumulative averages, without running statistics, and with those alone."""
    us, teachers = pyramid_maps(layout, device)
    leaves, changed, bns = list(us), [], []
    for m, u in enumerate(us):
        weight, bias, mean, var = torch.rand(4, u.shape[1], device=device) + 0.5
        leaves += [weight.requires_grad_(), bias.requires_grad_()]
        statistics = (mean, var, torch.tensor(3, device=device)) if m != 2 else (None, None, None)
        changed += statistics if m < 2 else ()
        bns.append(BatchNorm(weight, bias, *statistics, training=m != 3, momentum=None if m == 1 else 0.1))
    function = lambda: hcl_bn_loss(us, teachers, bns, (0.1, 0.1, 0.5, 1), backend=backend)  # noqa: E731
    # Forward: the maps' moments, their merge, the loss and its tables, the end.
    return Call(leaves, function, (4, 2), changed)


def cwd(backend, layout="nchw", device="cuda"):
    students, teachers = pyramid_maps(layout, device)
    return Call(students, lambda: cwd_loss(students, teachers, 4.0, (0.1, 0.1, 0.5, 1), backend=backend), (3, 1))


def kd_kl(backend, layout="nchw", device="cuda"):
    student, teacher = (
        torch.randn(2, 19, 24, 33, device=device, dtype=torch.bfloat16).contiguous(memory_format=LAYOUTS[layout])
        for _ in range(2)
    )
    return Call([student.requires_grad_()], lambda: kd_kl_loss(student, teacher, 4.0, backend=backend), (3, 1))


def seg_ce(backend, layout="nchw", device="cuda"):
    logits = torch.randn(2, 19, 24, 33, device=device, dtype=torch.bfloat16).contiguous(memory_format=LAYOUTS[layout])
    # Of every kind: classes, ignored, out of range.
    labels = torch.randint(22, (2, 96, 130), device=device)
    labels = labels.where(labels != 20, 255).to(torch.uint8)
    weight = torch.rand(19, device=device) + 0.5
    return Call([logits.requires_grad_()], lambda: seg_ce_loss(logits, labels, weight, backend=backend), (3, 1))


def csf_in_training(*arguments):
    return fusion((2, 64, 32, 64), (16, 32), *arguments)


def csf_with_cumulative_averages(*arguments):
    return fusion((3, 16, 15, 31), (8, 16), *arguments, momentum=None)


def csf_in_eval_mode(*arguments):
    return fusion((2, 16, 9, 14), (7, 20), *arguments, training=False)


def fusion(shape, coarse, backend, layout="nchw", device="cuda", **settings):
    channels, squeezed = shape[1], 32

    def random(*shape):
        return torch.randn(shape, device=device)

    def norm(count):
        weight, bias, mean, var = 1 + random(count) / 8, random(count), random(count), 1 + random(count).square()
        leaves.extend((weight, bias))
        changed.extend((mean, var, torch.tensor(3, device=device)))
        return BatchNorm(*leaves[-2:], *changed[-3:], **settings)

    maps = [random(*s).to(torch.bfloat16, memory_format=LAYOUTS[layout]) for s in (shape, (*shape[:2], *coarse))]
    weights = [random(squeezed, channels), *(random(channels, squeezed) / 8 for _ in range(2))]
    leaves, changed = [*maps, *weights, random(channels), random(channels)], []
    fc_weight, heads = weights[0], tuple(zip(weights[1:], leaves[5:7], strict=True))
    bn, fc_bn = norm(channels), norm(squeezed)
    for leaf in leaves:
        leaf.requires_grad_()
    return Call(leaves, lambda: csf(*maps, bn, fc_weight, fc_bn, heads, backend=backend), (3, 3), changed)


# Per stage height and width, the student's channels, the teacher's: as in SegFormer, and what fills no tile.
STAGES = ((32, 64, 32, 64), (16, 32, 64, 128), (8, 16, 160, 320), (4, 8, 256, 512))
ODD_STAGES = ((9, 13, 10, 66), (7, 5, 66, 5), (1, 7, 24, 40), (1, 1, 5, 160))


def pea(*arguments):
    return alignment(STAGES, False, *arguments)


def pea_with_assistants(*arguments):
    return alignment(ODD_STAGES, True, *arguments)


def alignment(stages, assisted, backend, layout="nchw", device="cuda"):
    def random(*shape):
        return torch.randn(shape, device=device)

    def embeddings(place):
        shapes = [(2, stage[place], *stage[:2]) for stage in stages]
        return [random(*s).to(torch.bfloat16, memory_format=LAYOUTS[layout]) for s in shapes]

    xs, targets = embeddings(2), embeddings(3)
    weights = [random(c_out, c_in) * c_in**-0.5 for *_, c_in, c_out in stages]
    lists = [xs, weights, [random(c_out) for *_, c_out in stages]]
    terms = {}
    if assisted:
        terms = {"assistants": embeddings(3)}
        terms |= {name: [1 + random(1) / 8 for _ in stages] for name in ("projection_scales", "assistant_scales")}
    leaves = [leaf.requires_grad_() for tensors in (*lists, *terms.values()) for leaf in tensors]
    # Forward: Triton one kernel per stage and one that adds up, cuda two for all stages and one that adds up.
    launches = {"cuda": (3, 1), "triton": (len(stages) + 1, 1)}[backend]
    return Call(leaves, lambda: pea_loss(*lists, targets, **terms, backend=backend), launches)


def gl_mixer_call(shape, backend, layout="nchw", device="cuda"):
    channels = shape[2]

    def random(*shape):
        return torch.randn(shape, device=device)

    tokens = [random(*shape).to(torch.bfloat16) for _ in range(2)]
    parameters = [random(*s) * (3 * channels) ** -0.5 for s in ((channels, channels, 3), (channels,)) * 2]
    leaves = [leaf.requires_grad_() for leaf in (*tokens, *parameters, 1 + random(1) / 8, 1 + random(1) / 8)]
    # Tokens have one layout: what is called another one here is the mix with the residual.
    residual = layout == "channels_last"
    return Call(leaves, lambda: gl_mixer(*leaves, residual=residual, backend=backend), (1, 3))


def gl_mixer_of_stage_4(*arguments):
    return gl_mixer_call((2, 512, 256), *arguments)


def gl_mixer_of_odd_tokens(*arguments):
    return gl_mixer_call((3, 45, 66), *arguments)


CALLS = {
    "csf": (csf_in_training, csf_with_cumulative_averages, csf_in_eval_mode),
    "cwd": (cwd, kd_kl),
    "gl_mixer": (gl_mixer_of_stage_4, gl_mixer_of_odd_tokens),
    "hcl": (hcl,),
    "hcl_bn": (hcl_bn,),
    "pea": (pea, pea_with_assistants),
    "seg_ce": (seg_ce,),
}


def parametrize(function):
    made = [make for makers in CALLS.values() for make in makers]
    for name, values in (("layout", LAYOUTS), ("backend", BACKENDS)):
        function = pytest.mark.parametrize(name, list(values))(function)
    return pytest.mark.parametrize("make", made, ids=lambda make: make.__name__)(function)


def assert_equal(results, expected):
    for value, true in zip(results, expected, strict=True):
        assert value.device == true.device and torch.equal(value, true)


@parametrize
def test_work_goes_to_the_current_stream(make, backend, layout):
    call = make(backend, layout)
    expected = call.results()
    values = [leaf.detach().clone() for leaf in call.leaves]
    with torch.no_grad():
        for leaf in call.leaves:
            leaf.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # a launch on another stream would read the zeros
        with torch.no_grad():
            for leaf, value in zip(call.leaves, values, strict=True):
                leaf.copy_(value)
        results = call.results()
    stream.synchronize()
    assert_equal(results, expected)


@parametrize
def test_nothing_waits_for_the_device(make, backend, layout):
    call = make(backend, layout)
    call.run()  # compiles and loads
    torch.cuda.set_sync_debug_mode("error")
    try:
        call.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@parametrize
def test_a_cuda_graph_replays_on_new_values(make, backend, layout):
    call = make(backend, layout)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call.run()
    for _ in range(2):
        with torch.no_grad():
            for leaf in call.leaves:
                leaf.copy_(torch.randn_like(leaf))
        call.restart()
        graph.replay()
        replayed = [*captured, *(tensor.clone() for tensor in call.changed)]
        assert_equal(replayed, call.results())
    states = []
    for step in (graph.replay, call.run):
        call.restart()
        step()
        step()  # goes on from what the first one changed
        states.append([tensor.clone() for tensor in call.changed])
    assert_equal(*states)


@parametrize
def test_launches_are_few(make, backend, layout):
    call = make(backend, layout)
    call.run()
    result = call.function()
    counts = []
    for step in (call.function, lambda: call.backward(result)):
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
            torch.cuda.synchronize()
        counts.append(sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events()))
    assert 0 < counts[0] <= call.launches[0] and 0 < counts[1] <= call.launches[1]


@parametrize
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices are visible")
def test_the_tensors_device_counts_not_the_current_one(make, backend, layout):
    call = make(backend, layout, "cuda:1")
    with torch.cuda.device(1):
        expected = call.results()
    with torch.cuda.device(0):
        results = call.results()
    assert all(value.device == torch.device("cuda:1") for value in results)
    assert_equal(results, expected)


def skip_without_memory(needed):
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip("less GPU memory is free than two to the 31 elements need")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_hcl_beyond_two_to_the_31_elements(layout, backend):
    shape = (10, 8192, 164, 164)
    skip_without_memory(2 * 4 * 10 * 8192 * 164 * 164)
    student = torch.zeros(shape, dtype=torch.bfloat16, device=device_of(backend), memory_format=LAYOUTS[layout])
    teacher = torch.zeros_like(student)
    with torch.no_grad():
        student[-1, -1, 100:, 100:] = torch.randn(64, 64, device="cuda").bfloat16()
    corner = student[-1:, -1:].double().cpu()
    loss = hcl_loss([student.requires_grad_()], [teacher], backend=backend)
    (gradient,) = torch.autograd.grad(loss, student, torch.tensor(1e9, device="cuda"))
    exact = corner.clone().requires_grad_()
    truth = hcl_loss([exact], [torch.zeros_like(exact)], backend="eager")
    (slope,) = torch.autograd.grad(truth, exact, torch.tensor(1e9, dtype=torch.float64))
    planes = shape[0] * shape[1]
    assert loss.item() == pytest.approx(truth.item() / planes, rel=1e-5)
    difference = gradient[-1:, -1:].double().cpu() - slope / planes
    assert difference.abs().max() < 2**-8 * slope.abs().max() / planes
    assert not gradient[:-1].any() and not gradient[-1, :-1].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_csf_beyond_two_to_the_31_elements(layout, backend):
    shape = (3, 5472, 364, 364)
    skip_without_memory(1.2 * 2 * 4.5 * 3 * 5472 * 364 * 364)
    check_first_and_last_channel(shape, layout, backend)


def check_first_and_last_channel(shape, layout, backend):
    """Compares two channels' results with csf of these channels alone: heads that ignore the squeeze uncouple them."""
    batch, channels, height, width = shape
    device, squeezed = device_of(backend), 4
    form = {"device": device, "dtype": torch.bfloat16, "memory_format": LAYOUTS[layout]}
    z, y, upstream = (
        torch.empty((batch, channels, h, w), **form).normal_(mean=1)
        for h, w in ((height, width), (height // 2, width // 2), (height, width))
    )
    weight, bias, *biases = torch.randn(4, channels, device=device)
    mean, var = torch.zeros(channels, device=device), torch.ones(channels, device=device)
    # Per sum over all of a channel's pixels a tolerance; maps are rounded to bf16.
    small, rounded = 1e-4, 2**-7

    def run(pick, convert, backend):
        leaves = [convert(pick(t)).requires_grad_() for t in (z, y, weight, bias)]
        running = [convert(pick(t)).clone() for t in (mean, var)]
        count, options = leaves[0].shape[1], {"dtype": leaves[2].dtype, "device": leaves[0].device}
        heads = tuple((torch.zeros(count, squeezed, **options), convert(pick(b))) for b in biases)
        bn = BatchNorm(*leaves[2:], *running)
        v = csf(*leaves[:2], bn, torch.zeros(squeezed, count, **options), None, heads, backend=backend)
        return [v.detach(), *torch.autograd.grad(v, leaves, convert(pick(upstream))), *running]

    results = run(lambda t: t, lambda t: t.detach(), backend)
    for channel in (0, channels - 1):

        def pick(t, of=slice(channel, channel + 1)):
            return t[:, of] if t.dim() == 4 else t[of]

        truth = run(pick, lambda t: t.detach().cpu().double(), "eager")
        for value, true in zip(results, truth, strict=True):
            value = pick(value).cpu().double()
            tolerance = rounded if true.dim() == 4 else small
            assert (value - true).abs().max() < tolerance * true.abs().max().clamp(min=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pea_beyond_two_to_the_31_elements(layout, backend):
    skip_without_memory(1.2 * 2 * (3 * 32 + 16) * 2**27)
    check_last_tokens((2, 2**13 + 1, 2**13), 16, layout, backend)


def check_last_tokens(shape, channels, layout, backend):
    """All embeddings but those of the last tokens are zero: with no bias, only these have a part in the results."""
    batch, height, width = shape
    device, tokens, last = device_of(backend), height * width, 100
    form = {"device": device, "dtype": torch.bfloat16}

    def embedding(width):
        values = torch.zeros((batch, width, tokens) if layout == "nchw" else (batch, tokens, width), **form)
        values = values.transpose(1, 2) if layout == "nchw" else values
        values[-1, -last:] = torch.randn((last, width), device=device).bfloat16()
        return values

    x, target = embedding(2 * channels), embedding(channels)
    weight = torch.randn(channels, 2 * channels, device=device).bfloat16().float() / 8
    bias = torch.zeros(channels, device=device)
    scale = float(batch * tokens * channels)

    def run(convert, pick, factor, backend):
        leaves = [convert(pick(x)), convert(weight), convert(bias)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        loss = pea_loss(*([leaf] for leaf in leaves), [convert(pick(target))], (1.0,), backend=backend)
        return [loss.detach() * factor, *torch.autograd.grad(loss, leaves, torch.full_like(loss, factor))]

    results = run(lambda t: t.detach(), lambda t: t, scale, backend)
    truth = run(
        lambda t: t.detach().cpu().double(), lambda t: t[-1:, -last:] if t.dim() == 3 else t, last * channels, "eager"
    )
    assert not results[1][:-1].any() and not results[1][-1, :-last].any()
    results[1] = results[1][-1:, -last:]
    for value, true in zip(results, truth, strict=True):
        # Operands of products and the gradient of x are rounded to bf16.
        assert (value.cpu().double() - true).abs().max() < 2**-6 * true.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gl_mixer_beyond_two_to_the_31_elements(backend):
    skip_without_memory(1.2 * (2 * 7 + 4 * 4) * (2**31 + 2**24))
    check_first_and_last_sample((129, 2**19, 32), backend)


def check_first_and_last_sample(shape, backend):
    """Only tokens at the end of the first and the last sample have upstream gradients."""
    device, channels = device_of(backend), shape[2]
    e, u = (torch.empty(shape, device=device, dtype=torch.bfloat16).normal_() for _ in range(2))
    parameters = [
        torch.randn(s, device=device).bfloat16().float() / 8
        for s in ((channels, channels, 3), (channels,), (channels, channels, 3), (channels,), (1,), (1,))
    ]
    upstream = torch.zeros_like(e)
    for sample in (0, -1):
        upstream[sample, -200:] = torch.randn((200, channels), device=device).bfloat16()

    def run(convert, pick, backend):
        leaves = [convert(pick(e)), convert(pick(u)), *map(convert, parameters)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        out = gl_mixer(*leaves, residual=True, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, leaves, convert(pick(upstream)))]

    def pick(t):
        return t[[0, -1], -300:]  # and their neighbours; the first one's is cut off in the truth

    results = run(lambda t: t.detach(), lambda t: t, backend)
    truth = run(lambda t: t.detach().cpu().double(), pick, "eager")
    for value, true in zip(results, truth, strict=True):
        if true.dim() == 3 and true.shape[1] == 300:
            value, true = pick(value)[:, 1:], true[:, 1:]
        assert (value.cpu().double() - true).abs().max() < 2**-6 * true.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_hcl_bn_beyond_two_to_the_31_elements(layout, backend):
    skip_without_memory(1.2 * 3 * 2 * 10 * 8192 * 164 * 164)
    check_folded_first_and_last_channel((10, 8192, 164, 164), layout, backend)


def check_folded_first_and_last_channel(shape, layout, backend):
    """Compares two channels' gradients with those of these channels alone: but for its mean, the loss is their sum."""
    form = {"device": device_of(backend), "dtype": torch.bfloat16, "memory_format": LAYOUTS[layout]}
    u, teacher = (torch.empty(shape, **form).normal_(mean=1) for _ in range(2))
    parameters = torch.rand(4, shape[1], device=u.device) + 0.5
    factor = 1e6

    def run(pick, convert, channels, backend):
        leaves = [convert(pick(t)).requires_grad_() for t in (u, *parameters[:2])]
        running = [convert(pick(t)).clone() for t in parameters[2:]]
        loss = hcl_bn_loss([leaves[0]], [convert(pick(teacher))], [BatchNorm(*leaves[1:], *running)], backend=backend)
        return [*torch.autograd.grad(loss, leaves, torch.full_like(loss, factor * channels)), *running]

    results = run(lambda t: t, lambda t: t.detach(), shape[1], backend)
    for channel in (0, shape[1] - 1):

        def pick(t, of=slice(channel, channel + 1)):
            return t[:, of] if t.dim() == 4 else t[of]

        truth = run(pick, lambda t: t.detach().cpu().double(), 1, "eager")
        for value, true in zip(results, truth, strict=True):
            tolerance = 2**-7 if true.dim() == 4 else 1e-4
            assert (pick(value).cpu().double() - true).abs().max() < tolerance * true.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", ("cwd", "kd_kl"))
def test_cwd_beyond_two_to_the_31_elements(loss, layout, backend):
    skip_without_memory(1.2 * 3 * 2 * 10 * 8192 * 164 * 164)
    check_last_corner((10, 8192, 164, 164), loss, layout, backend)


def check_last_corner(shape, loss, layout, backend):
    """Student and teacher differ in the last sample's last channel and row only, where alone there are gradients."""
    student = torch.zeros(shape, dtype=torch.bfloat16, device=device_of(backend))
    student = student.contiguous(memory_format=LAYOUTS[layout])
    teacher = torch.zeros_like(student)
    with torch.no_grad():
        student[-1, -1, -1] = torch.randn(shape[3], device=student.device).bfloat16()
    factor = 1e6

    def run(s, t, samples, channels, pixels, backend):
        s = s.detach().requires_grad_()
        value = cwd_loss([s], [t], backend=backend) if loss == "cwd" else kd_kl_loss(s, t, backend=backend)
        scale = samples * (channels if loss == "cwd" else pixels)
        return torch.autograd.grad(value, s, torch.full_like(value, factor * scale))[0]

    rows = slice(-1, None) if loss == "kd_kl" else slice(None)
    channels = slice(-1, None) if loss == "cwd" else slice(None)
    gradient = run(student, teacher, shape[0], shape[1], shape[2] * shape[3], backend)
    part = student[-1:, channels, rows].cpu().double()
    true = run(part, torch.zeros_like(part), 1, part.shape[1], part.shape[2] * part.shape[3], "eager")
    assert (gradient[-1:, channels, rows].cpu().double() - true).abs().max() < 2**-7 * true.abs().max()
    gradient[-1:, channels, rows] = 0
    assert not gradient.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_seg_ce_beyond_two_to_the_31_elements(layout, backend):
    skip_without_memory(1.2 * (2 * 2 + 4) * 3 * 8192 * 300 * 300)
    check_last_pixels((3, 8192, 300, 300), layout, backend)


def check_last_pixels(shape, layout, backend):
    """Only pixels of the last sample's last corner are labelled."""
    device, (batch, classes, height, width) = device_of(backend), shape
    logits = torch.zeros(shape, dtype=torch.bfloat16, device=device).contiguous(memory_format=LAYOUTS[layout])
    labels = torch.full((batch, 2 * height, 2 * width), -1, dtype=torch.int32, device=device)
    with torch.no_grad():
        logits[-1, :, -4:, -4:] = torch.randn(classes, 4, 4, device=device).bfloat16()
    labels[-1, -4:, -4:] = classes - 1

    def run(logits, labels, backend):
        logits = logits.detach().requires_grad_()
        value = seg_ce_loss(logits, labels, ignore_index=-1, backend=backend)
        return [value.detach(), torch.autograd.grad(value, logits, torch.full_like(value, 1e3))[0]]

    value, gradient = run(logits, labels, backend)
    true, slope = run(logits[-1:, :, -4:, -4:].cpu().double(), labels[-1:, -8:, -8:].cpu(), "eager")
    assert value.item() == pytest.approx(true.item(), rel=1e-5)
    assert (gradient[-1:, :, -4:, -4:].cpu().double() - slope).abs().max() < 2**-7 * slope.abs().max()
    assert not gradient[:-1].any() and not gradient[-1, :, :-4].any()
    found = seg_predict(logits, (2 * height, 2 * width), backend)
    expected = seg_predict(logits[-1:, :, -4:, -4:].cpu().double(), (8, 8), "eager")
    assert torch.equal(found[-1:, -4:, -4:].cpu(), expected[:, -4:, -4:]) and not found[:-1].any()
