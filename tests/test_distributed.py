"""Statistics synchronised over processes: two gloo processes give what one process gives for both batches together."""

import copy
import datetime
import gc
import math
import multiprocessing
import queue
import time
import traceback
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from kernels_here import device_of, kernels_of
from test_transkd import Given
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from transkd_fast import CSF, StageOutputs, SyncBatchNorm, TransKD, use_backend
from transkd_fast.functional import BatchNorm, hcl_bn_loss
from transkd_fast.functional import csf as csf_op
from transkd_fast.ops import _collectives
from transkd_fast.reference import csf as reference

RANKS = 2
TIMEOUT = 60  # seconds: what a process waits for another before it is an error
IN, OUT, MID = (4, 6, 8, 10), (5, 7, 9, 11), 8
BACKENDS = ["eager", *(name for name in kernels_of("csf") if device_of(name) == "cpu")]
FAST = BACKENDS[:2]  # not Triton's interpreter, if there is another kernel
OF_HCL_BN = ["eager", *(name for name in kernels_of("hcl_bn") if device_of(name) == "cpu")]
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
CHECKS = {}


def in_both_processes(*cases):
    """Registers a check that runs in both processes, once per case, all in one pair of processes."""

    def register(check):
        for case in cases or [{}]:
            CHECKS["-".join([check.__name__, *(f"{key}={value}" for key, value in case.items())])] = check, case
        return check

    return register


def run_checks(rank, folder, results):
    torch.set_num_threads(1)
    for i, (name, (check, case)) in enumerate(CHECKS.items()):
        # A group for each check: where a process fails, it lets go of its group, which breaks the other's connection,
        # and the next check starts anew.
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/{i}",
            rank=rank,
            world_size=RANKS,
            timeout=datetime.timedelta(seconds=TIMEOUT),
        )
        error = None
        try:
            torch.manual_seed(0)
            check(rank, **case)
        except Exception:
            error = f"process {rank}: {traceback.format_exc()}"
        dist.destroy_process_group()
        gc.collect()
        results.put((name, error))


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """What went wrong, by check, in either process."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")
        arguments = str(tmp_path_factory.mktemp("groups")), results
        processes = [context.Process(target=run_checks, args=(rank, *arguments), daemon=True) for rank in range(RANKS)]
        for process in processes:
            process.start()
    found = {name: [] for name in CHECKS}
    deadline, missing = time.monotonic() + 4 * TIMEOUT, RANKS * len(CHECKS)
    while missing and time.monotonic() < deadline:
        alive = any(process.is_alive() for process in processes)
        try:
            name, error = results.get(timeout=1)
        except queue.Empty:
            if not alive:
                break
        else:
            found[name].append(error)
            missing -= 1
    for process in processes:
        process.join(TIMEOUT if not missing else 0)
        process.kill()
    return found


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes(check, errors):
    assert not any(errors[check]), "\n".join(filter(None, errors[check]))
    assert len(errors[check]) == RANKS, "a process died or waited too long for the other, in this check or before"


def close(actual, expected, message=None, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, msg=message)


def own(tensor, rank, batches):
    return tensor[sum(batches[:rank]) : sum(batches[: rank + 1])]


def maps(batch, hw, layout=torch.contiguous_format, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    tensors = []
    for channels in IN:
        tensors.append(torch.randn(batch, channels, *hw, generator=generator, dtype=dtype).to(memory_format=layout))
        hw = [(size - 1) // 2 + 1 for size in hw]
    return tensors


def module(momentum=0.1):
    torch.manual_seed(0)
    model = CSF(IN, OUT, MID).double()
    for bn in model.modules():
        if isinstance(bn, nn.BatchNorm2d):
            bn.momentum = momentum
            nn.init.uniform_(bn.weight, 0.5, 1.5)
            nn.init.normal_(bn.bias)
    return model


def train(model, xs):
    """Two forward and backward passes: outputs and loss of the second, gradients of both."""
    leaves = [x.detach().clone().requires_grad_() for x in xs]
    for _ in range(2):
        outputs = model(leaves)
        # Channels and pixels have different weights, so that no gradient vanishes in a sum.
        weights = [torch.linspace(0, 9, out[0].numel(), dtype=out.dtype).view_as(out[0]).cos() for out in outputs]
        loss = sum((out.square() * w).sum() for out, w in zip(outputs, weights, strict=True))
        loss.backward()
    return outputs, loss.detach(), [leaf.grad for leaf in leaves]


def added(tensor):
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def compare_with_one_process(model, expected, xs, rank, batches, backend):
    """Expects of a model with its own samples what another gives with all of them."""
    with use_backend("eager"):
        outputs, loss, grads = train(expected, xs)
    with use_backend(backend):
        results = train(model, [own(x, rank, batches) for x in xs])
    close(results[0], [own(out, rank, batches) for out in outputs])
    close(added(results[1]), loss)
    close(results[2], [own(grad, rank, batches) for grad in grads])
    averaged = isinstance(model, DistributedDataParallel)
    actual = model.module if averaged else model
    for (name, parameter), ours in zip(expected.named_parameters(), actual.parameters(), strict=True):
        grad = ours.grad * RANKS if averaged else added(ours.grad)
        close(grad, parameter.grad, lambda text, name=name: f"gradient of {name}: {text}")
    for (name, buffer), ours in zip(expected.named_buffers(), actual.buffers(), strict=True):
        close(ours, buffer, lambda text, name=name: f"{name}: {text}")


LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


@in_both_processes(
    *({"backend": backend, "layout": layout} for backend in BACKENDS for layout in LAYOUTS),
    {"backend": "eager", "batches": (1, 2), "momentum": None},
    {"backend": FAST[-1], "batches": (1, 2), "momentum": None},
)
def csf_gives_what_one_process_gives(rank, backend, layout="NCHW", batches=(2, 1), momentum=0.1):
    expected, xs = module(momentum), maps(3, (9, 13), LAYOUTS[layout])
    model = SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(expected))
    compare_with_one_process(model, expected, xs, rank, batches, backend)


@in_both_processes(*({"backend": backend} for backend in BACKENDS))
def one_sample_each_are_two_values_for_the_squeeze_layer_and_for_a_map_of_one_pixel(rank, backend):
    expected = module()
    model = SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(expected))
    compare_with_one_process(model, expected, maps(2, (8, 8)), rank, (1, 1), backend)
    assert model[1].fc[1].num_batches_tracked == 2


@in_both_processes(*({"backend": backend, "frozen": i} for backend in FAST for i in ("conv1", "fc")))
def a_frozen_batch_norm_takes_its_running_statistics(rank, backend, frozen):
    expected = module()
    for stage in list(expected)[1:]:
        stage.get_submodule(frozen)[1].eval()
    model = SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(expected))
    compare_with_one_process(model, expected, maps(3, (9, 13)), rank, (2, 1), backend)
    assert model[2].get_submodule(frozen)[1].num_batches_tracked == 0


@in_both_processes({"backend": FAST[-1]})
def distributed_data_parallel_averages_the_gradients_of_one_process(rank, backend):
    expected = module()
    model = SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(expected))
    compare_with_one_process(DistributedDataParallel(model), expected, maps(3, (9, 13)), rank, (2, 1), backend)


@in_both_processes()
def torchs_synchronised_batch_norms_of_the_op_do_too(rank):
    expected = module()
    model = SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(expected))
    for stage in list(model)[1:]:
        stage.conv1[1] = nn.SyncBatchNorm.convert_sync_batchnorm(stage.conv1[1])
        stage.fc[1] = nn.SyncBatchNorm.convert_sync_batchnorm(stage.fc[1])
    compare_with_one_process(model, expected, maps(3, (9, 13)), rank, (2, 1), "eager")


@in_both_processes()
def a_group_of_one_process_takes_its_own_statistics(rank):
    groups = [dist.new_group([other]) for other in range(RANKS)]
    expected = module()
    model = SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(expected), groups[rank])
    with use_backend("eager"), counted() as calls:
        xs = maps(2, (9, 13))
        close(train(model, xs), train(expected, xs), tolerance=0)
        close(list(model.buffers()), list(expected.buffers()), tolerance=0)
    assert not calls


def stages(batch, hw, offset, affine, dtype=torch.float64):
    """Maps and teacher maps of three stages with different batch norms: tracked, cumulative, frozen."""
    generator = torch.Generator().manual_seed(1)
    us, teachers, bns = [], [], []
    for m, channels in enumerate(IN[:3]):
        size = [max(1, n // 2**m) for n in hw]
        for tensors in (us, teachers):
            tensors.append(torch.randn(batch, channels, *size, generator=generator, dtype=dtype))
        us[-1] += offset
        parameters = torch.rand(4, channels, generator=generator, dtype=dtype) + 0.5
        weight, bias = (t.clone().requires_grad_() for t in parameters[:2]) if affine else (None, None)
        tracked = *(t.clone() for t in parameters[2:]), torch.tensor(3)
        bns.append(BatchNorm(weight, bias, *tracked, training=m != 2, momentum=None if m == 1 else 0.1))
    return us, teachers, bns


@in_both_processes(
    *({"backend": backend} for backend in OF_HCL_BN),
    *({"backend": b, "layout": "channels_last", "batches": (1, 2), "offset": 1000.0} for b in OF_HCL_BN[:2]),
    {"backend": OF_HCL_BN[:2][-1], "hw": (3, 5), "affine": False},
)
def hcl_of_normalised_maps_is_that_of_one_process(
    rank, backend, layout="NCHW", batches=(2, 1), hw=(9, 13), offset=0.0, affine=True
):
    weights, levels, total = (0.1, 0.5, 1.0), (0.5, 0.0, 2.0), sum(batches)
    tolerance = 1e-10 if offset == 0 else 1e-8  # the offset's digits are lost in fp64 as well

    def run(which, **options):
        us, teachers, bns = stages(total, hw, offset, affine)
        us, teachers = ([which(t).contiguous(memory_format=LAYOUTS[layout]) for t in ts] for ts in (us, teachers))
        for u in us:
            u.requires_grad_()
        for _ in range(2):
            loss = hcl_bn_loss(us, teachers, bns, weights, level_weights=levels, **options)
            (len(us[0]) / total * loss).backward()
        parameters = [t for bn in bns for t in bn[:2] if t is not None]
        return loss.detach(), [u.grad for u in us], [p.grad for p in parameters], [t for bn in bns for t in bn[2:5]]

    truth = run(lambda t: t, backend="eager")
    group = dist.group.WORLD
    samples = batches if backend == "eager" else None
    results = run(lambda t: own(t, rank, batches), backend=backend, process_group=group, samples=samples)
    close(added(results[0] * batches[rank] / total), truth[0], tolerance=tolerance)
    close(results[1], [own(grad, rank, batches) for grad in truth[1]], tolerance=tolerance)
    close([added(grad) for grad in results[2]], truth[2], tolerance=tolerance)
    close(results[3], truth[3], tolerance=tolerance)


@in_both_processes(*({"backend": backend} for backend in OF_HCL_BN[:2]))
def transkd_folds_synchronised_batch_norms(rank, backend):
    """hcl of the branches is that of the maps of the same processes, whose batches differ in size."""
    batches, xs, teachers = (2, 1), maps(3, (9, 13)), []
    generator = torch.Generator().manual_seed(2)
    for channels, x in zip(OUT, xs, strict=True):
        teachers.append(torch.randn(3, channels, *x.shape[2:], generator=generator, dtype=x.dtype))
    features = [own(x, rank, batches).clone().requires_grad_() for x in xs]
    teacher = StageOutputs([own(t, rank, batches) for t in teachers], [], None)
    torch.manual_seed(0)
    model = TransKD(Given(StageOutputs(features, [], None)), IN, OUT, mid_channels=MID, embeddings=()).double()
    model = SyncBatchNorm.convert_sync_batchnorm(model)
    twin = copy.deepcopy(model)
    twin.student = model.student
    with use_backend("eager"):
        expected = twin.criterion(twin.skfs(features), teacher.features)
        truth = torch.autograd.grad(expected, [*features, *twin.skfs.parameters()])
        # Only the sum of the processes' shares is defined.
        truth = [*truth[: len(xs)], *map(added, truth[len(xs) :])]
    with use_backend(backend), counted() as calls:
        loss = model(None, teacher).losses["hcl"]
    # Batch sizes once, three fusing stages, the coarsest one's first batch norm, and the last ones: the kernels' all
    # together, in the reference each on its own.
    assert calls == {"all_gather_into_tensor": 1 + 3 + 1 + (4 if backend == "eager" else 1)}
    close(loss, expected)
    results = torch.autograd.grad(loss, [*features, *model.skfs.parameters()])
    close([*results[: len(xs)], *map(added, results[len(xs) :])], truth)
    close(list(model.buffers()), list(twin.buffers()))
    half = copy.deepcopy(model.skfs)
    half[2].conv2[1] = nn.BatchNorm2d(OUT[1]).double()
    raises("last batch norms of all stages to be synchronised over the same", lambda: half.branches(features))


@contextmanager
def counted():
    """Counts the collectives."""
    calls = Counter()

    def count(name, collective):
        def call(*args, **kwargs):
            calls[name] += 1
            return collective(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather", "all_gather_into_tensor", "all_reduce", "broadcast", "barrier"):
            patch.setattr(dist, name, count(name, getattr(dist, name)))
        yield calls


@in_both_processes(*({"backend": backend} for backend in FAST))
def one_collective_per_batch_norm_stage_and_direction(rank, backend):
    model, xs = SyncBatchNorm.convert_sync_batchnorm(module()), maps(rank + 1, (9, 13))
    with use_backend(backend):
        with counted() as calls:
            loss = sum(out.square().sum() for out in model([x.requires_grad_() for x in xs]))
        # Batch sizes once, three fusing stages, and five batch norms outside them.
        assert calls == {"all_gather_into_tensor": 1 + 3 + 5}
        with counted() as calls:
            loss.backward()
        # The eager reference adds where the kernels gather.
        assert sum(calls.values()) == 3 + 5
        assert calls["all_reduce"] == (3 + 5 if backend == "eager" else 5)
        model.eval()
        with counted() as calls:
            model(xs)
        assert not calls


def raises(message, call):
    with pytest.raises(ValueError, match=message):
        call()


@in_both_processes()
def bad_input_raises_in_both_processes_and_changes_nothing(rank):
    model = SyncBatchNorm.convert_sync_batchnorm(module())
    before = copy.deepcopy(model.state_dict())
    differ = r"maps of one size on all processes, got \[\[\({}, 13\), .*\], \[\({}, 13\), .*\]\] in the order of ranks"
    raises(differ.format(9, 8), lambda: model(maps(1, (9 - rank, 13))))
    coarser = [m if i != 1 else m[:, :, rank:] for i, m in enumerate(maps(1, (9, 13)))]
    raises(differ.format(9, 9), lambda: model(coarser))
    raises(r"one sample on every process, got batches of \[1, 0\]", lambda: model(maps(1 - rank, (9, 13))))
    half = copy.deepcopy(model)
    half[2].fc[1] = nn.BatchNorm2d(32).double()
    raises("conv1 and fc to be synchronised .*, got SyncBatchNorm and BatchNorm2d", lambda: half(maps(1, (9, 13))))
    theirs = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    raises("run on CPU.*use transkd_fast.nn.SyncBatchNorm", lambda: theirs(maps(1, (9, 13))))
    raises("one process with legacy=True, got 2", lambda: CSF(IN, OUT, MID, legacy=True))
    raises("samples to hold the batch sizes of 2 processes, 2 for rank", lambda: csf_op(**arguments(2, (1, 1))))
    raises("samples to hold the batch sizes of 2 processes, 2 for rank", lambda: csf_op(**arguments(2, (2, 2, 1))))
    single = nn.Sequential(SyncBatchNorm(3))
    raises("more than 1 value per channel over all processes", lambda: single(torch.zeros(1 - rank, 3)))
    assert single[0].num_batches_tracked == 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def arguments(batch, samples=None):
    generator = torch.Generator().manual_seed(1)
    z, y, fc, *heads = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((batch, 3, 5, 6), (batch, 3, 3, 4), (5, 3), (3, 5), (3,), (3, 5), (3,))
    )
    bn, fc_bn = (BatchNorm(*torch.rand(4, n, generator=generator, dtype=torch.float64) + 0.5) for n in (3, 5))
    group = {"process_group": dist.group.WORLD, "samples": samples} if samples else {}
    return {
        "z": z,
        "y": y,
        "bn": bn,
        "fc_weight": fc,
        "fc_bn": fc_bn,
        "heads": (tuple(heads[:2]), tuple(heads[2:])),
        **group,
    }


@in_both_processes(
    *({"dims": dims} for dims in NORMS),
    {"affine": False},
    {"track_running_stats": False},
    {"momentum": None},
    {"batches": (3, 0)},
    {"layout": "channels_last"},
    {"offset": 1000.0},
    {"dtype": torch.float32, "offset": 1000.0, "tolerance": 1e-4},
    {"dtype": torch.bfloat16, "tolerance": 2e-2},
)
def sync_batch_norm_is_batch_norm_of_all_samples(
    rank, dims=4, batches=(2, 1), layout="NCHW", offset=0.0, dtype=torch.float64, tolerance=1e-10, **options
):
    expected = NORMS[dims](6, **options).double()
    for parameter in expected.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    model = SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(expected)).to(torch.promote_types(dtype, torch.float32))
    x = torch.randn(sum(batches), 6, 4, 5, 3, dtype=torch.float64)[(..., *[0] * (5 - dims))] + offset
    x = x.to(dtype).contiguous(memory_format=LAYOUTS[layout])
    probe = torch.randn_like(x)
    theirs = x.double().clone().requires_grad_()
    ours = own(x, rank, batches).clone().requires_grad_()
    for _ in range(2):
        truth, out = expected(theirs), model(ours)
        (truth * probe).sum().backward()
        (out * own(probe, rank, batches)).sum().backward()
    assert out.dtype == dtype and ours.grad.dtype == dtype
    if sum(batches[: rank + 1]) > sum(batches[:rank]):
        assert out.stride() == ours.grad.stride() == ours.stride()
    close(out.double(), own(truth, rank, batches), tolerance=tolerance)
    close(ours.grad.double(), own(theirs.grad, rank, batches), tolerance=tolerance)
    for parameter, other in zip(expected.parameters(), model.parameters(), strict=True):
        close(added(other.grad).double(), parameter.grad, tolerance=10 * tolerance)
    for buffer, other in zip(expected.buffers(), model.buffers(), strict=True):
        close(other.to(buffer.dtype), buffer, tolerance=tolerance)
    close(model.eval()(ours).double(), expected.eval()(own(theirs, rank, batches)), tolerance=tolerance)


@in_both_processes()
def a_second_derivative_raises(rank):
    x = torch.randn(2, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(SyncBatchNorm(3)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not supported"):
        grad.sum().backward()


@pytest.mark.parametrize("pixels", (1, 63, 64, 65, 300, 1000))
@pytest.mark.parametrize("parts", (1, 2, 4, 16))
def test_moments_of_parts_merge_to_those_of_the_plane(pixels, parts):
    z = torch.randn(2, 3, pixels, dtype=torch.float64) + 1000
    length = math.ceil(math.ceil(pixels / parts) / 64) * 64
    pieces = [z[..., p * length : (p + 1) * length] for p in range(parts)]
    means = [piece.mean(-1) if piece.shape[-1] else torch.zeros(2, 3) for piece in pieces]
    squares = [(piece - mean[..., None]).square().sum(-1) for piece, mean in zip(pieces, means, strict=True)]
    coarse = torch.randn(parts, 2, 3, dtype=torch.float64)
    sums = torch.stack([torch.stack(means), torch.stack(squares), coarse], dim=2).transpose(0, 1)
    actual = _collectives.merge_moments(sums, pixels)
    mean = z.mean(-1)
    expected = torch.stack([mean, (z - mean[..., None]).square().sum(-1), coarse.sum(0)], dim=1)[:, None]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


def test_the_reference_with_all_samples_at_hand_is_itself():
    expected, actual = arguments(3), arguments(3)
    alone = reference.GlobalBatch(lambda rows: rows, 0)
    leaves = [[args[name].requires_grad_() for name in ("z", "y", "fc_weight")] for args in (expected, actual)]
    probe = torch.randn(3, 3, 5, 6, dtype=torch.float64)
    v, w = reference.csf(**expected), reference.csf(**actual, global_batch=alone)
    close(w, v, tolerance=1e-12)
    grads = [torch.autograd.grad((out * probe).sum(), ts) for out, ts in zip((v, w), leaves, strict=True)]
    close(grads[1], grads[0], tolerance=1e-12)
    for name in ("bn", "fc_bn"):
        close(list(actual[name][2:4]), list(expected[name][2:4]), tolerance=1e-12)
