"""What only a GPU can show of every op's kernels: streams, graphs, no host synchronisation, launches, huge tensors.

Values and gradients on a GPU are tested by tests/test_<op>.py, which runs every backend that can run. An op adds itself
to CALLS.
"""

import pytest
import torch
from kernels_here import device_of

from transkd_fast.functional import hcl_loss

BACKENDS = ("triton", "cuda")
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")


def hcl(backend, layout="nchw", device="cuda"):
    """Leaves, a function of them that gives the loss, and the launches (forward, backward) it may take."""
    shapes = [(2, 16, 32, 64), (2, 24, 16, 32), (2, 40, 8, 16), (2, 64, 4, 8)]
    students, teachers = (
        [torch.randn(s, device=device, dtype=torch.bfloat16).contiguous(memory_format=LAYOUTS[layout]) for s in shapes]
        for _ in range(2)
    )
    leaves = [student.requires_grad_() for student in students]
    launches = {"cuda": (1, 1), "triton": (3, 1)}[backend]
    return leaves, lambda: hcl_loss(leaves, teachers, (0.1, 0.1, 0.5, 1), backend=backend), launches


CALLS = {"hcl": hcl}


def parametrize(function):
    for name, values in (("layout", LAYOUTS), ("backend", BACKENDS), ("op", CALLS)):
        function = pytest.mark.parametrize(name, list(values))(function)
    return function


def run(leaves, call):
    loss = call()
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@parametrize
def test_work_goes_to_the_current_stream(op, backend, layout):
    leaves, call, _ = CALLS[op](backend, layout)
    expected = run(leaves, call)
    values = [leaf.detach().clone() for leaf in leaves]
    with torch.no_grad():
        for leaf in leaves:
            leaf.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # a launch on another stream would read the zeros
        with torch.no_grad():
            for leaf, value in zip(leaves, values, strict=True):
                leaf.copy_(value)
        results = run(leaves, call)
    stream.synchronize()
    for value, true in zip(results, expected, strict=True):
        assert torch.equal(value, true)


@parametrize
def test_nothing_waits_for_the_device(op, backend, layout):
    leaves, call, _ = CALLS[op](backend, layout)
    run(leaves, call)  # compiles and loads
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(leaves, call)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@parametrize
def test_a_cuda_graph_replays_on_new_values(op, backend, layout):
    leaves, call, _ = CALLS[op](backend, layout)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(leaves, call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(leaves, call)
    for _ in range(2):
        with torch.no_grad():
            for leaf in leaves:
                leaf.copy_(torch.randn_like(leaf))
        graph.replay()
        for value, true in zip(captured, run(leaves, call), strict=True):
            assert torch.equal(value, true)


@parametrize
def test_launches_are_few(op, backend, layout):
    leaves, call, launches = CALLS[op](backend, layout)
    run(leaves, call)
    loss = call()
    steps = (call, lambda: torch.autograd.grad(loss, leaves))
    counts = []
    for step in steps:
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
            torch.cuda.synchronize()
        on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        counts.append(sum("memset" not in e.name.lower() and "memcpy" not in e.name.lower() for e in on_device))
    assert 0 < counts[0] <= launches[0] and 0 < counts[1] <= launches[1] + 1  # and one to make the upstream gradient


@parametrize
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices are visible")
def test_the_tensors_device_counts_not_the_current_one(op, backend, layout):
    leaves, call, _ = CALLS[op](backend, layout, "cuda:1")
    with torch.cuda.device(1):
        expected = run(leaves, call)
    with torch.cuda.device(0):
        results = run(leaves, call)
    for value, true in zip(results, expected, strict=True):
        assert value.device == torch.device("cuda:1") and torch.equal(value, true)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_hcl_beyond_two_to_the_31_elements(layout, backend):
    shape = (10, 8192, 164, 164)
    free = torch.cuda.mem_get_info()[0]
    needed = 2 * 4 * 10 * 8192 * 164 * 164
    if free < needed:
        pytest.skip("less GPU memory is free than two to the 31 elements need")
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
