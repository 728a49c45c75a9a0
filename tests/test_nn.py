"""The modules on their own."""

import copy

import pytest
import torch
import torch.distributed as dist
from test_transkd import IMAGES, STUDENT, TEACHER, Given, outputs, small
from torch import nn

from transkd_fast.nn import CSF, CWDLoss, HCLLoss, KDLoss, SyncBatchNorm
from transkd_fast.reference._common import batch_norm
from transkd_fast.reference.cwd import cwd
from transkd_fast.reference.hcl import hcl
from transkd_fast.transkd import VARIANTS, TransKD

IN, OUT = (4, 6, 8, 10), (5, 7, 9, 11)


def maps(channels=IN, batch=2, hw=(17, 25), requires_grad=False):
    generator = torch.Generator().manual_seed(0)
    sizes = [hw]
    for _ in channels[1:]:
        sizes.append(tuple((n - 1) // 2 + 1 for n in sizes[-1]))
    tensors = [torch.randn(batch, c, *size, generator=generator) for c, size in zip(channels, sizes, strict=True)]
    return [t.requires_grad_(requires_grad) for t in tensors]


def tokens(channels=IN, **options):
    return [t.flatten(2).transpose(1, 2) for t in maps(channels, **options)]


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
def test_csf_maps_keep_size_and_take_the_teachers_channels(layout):
    torch.manual_seed(0)
    module, xs = CSF(IN, OUT, mid_channels=8), maps()
    out = module([x.contiguous(memory_format=layout) for x in xs])
    assert [t.shape for t in out] == [t.shape for t in maps(OUT)]
    assert [module[i].conv2[0].out_channels for i in range(4)] == list(reversed(OUT))


def test_csf_stages_pass_the_fused_map_on_coarse_to_fine():
    """Each output depends on its own stage and the coarser ones only."""
    module, xs = CSF(IN, OUT, mid_channels=8).eval(), maps(requires_grad=True)
    for m, output in enumerate(module(xs)):
        grads = torch.autograd.grad(output.square().sum(), xs, allow_unused=True, retain_graph=True)
        assert [g is not None and bool(g.abs().max() > 0) for g in grads] == [k >= m for k in range(4)]


@pytest.mark.parametrize("training", (True, False))
def test_csf_branches_normalised_are_its_maps(training):
    module, xs = CSF(IN, OUT, mid_channels=8).train(training), maps()
    for stage in module:
        torch.nn.init.normal_(stage.conv2[1].weight), torch.nn.init.normal_(stage.conv2[1].bias)
    module[1].conv2[1].momentum = None
    twin = copy.deepcopy(module)
    us, bns, group, samples = twin.branches(xs)
    assert group is None and samples is None
    torch.testing.assert_close([batch_norm(u, bn) for u, bn in zip(us, bns, strict=True)], module(xs))
    torch.testing.assert_close(list(twin.buffers()), list(module.buffers()))


def test_csf_with_a_last_batch_norm_that_does_more_has_no_branches():
    class Activated(nn.BatchNorm2d):
        def forward(self, input):
            return super().forward(input).relu()

    module = CSF(IN, OUT, 8)
    assert module.foldable
    module[2].conv2[1] = Activated(OUT[1])
    assert not module.foldable
    with pytest.raises(TypeError, match=r"last batch norms to be .*, got BatchNorm2d, Activated, .*; call the module"):
        module.branches(maps())
    assert (module(maps())[1] >= 0).all()


@pytest.mark.parametrize(("mid", "reduction", "squeezed"), [(64, 16, 32), (66, 2, 33), (8, 16, 32)])
def test_csf_squeeze_width(mid, reduction, squeezed):
    module = CSF(IN, OUT, mid, reduction)
    assert not hasattr(module[0], "fc")
    assert module[1].fc[0].weight.shape == module[1].fc1[0].weight.shape == (squeezed, mid, 1, 1)


def test_csf_second_squeeze_layer_is_used_in_legacy_mode_only():
    plain, old = CSF(IN, OUT, 8), CSF(IN, OUT, 8, legacy=True)
    plain.load_state_dict(old.state_dict())
    single, pair = maps(batch=1), maps(batch=2)
    plain.eval(), old.eval()
    torch.testing.assert_close(plain(pair), old(pair), rtol=0, atol=0)
    assert (plain(single)[0] - old(single)[0]).abs().max() > 1e-4
    torch.testing.assert_close(plain(single)[3], old(single)[3], rtol=0, atol=0)
    old.train()
    sum(t.square().sum() for t in old(single)).backward()
    assert old[1].fc[0].weight.grad is None and old[1].fc1[0].weight.grad is not None
    assert old[1].fc[1].num_batches_tracked == 0


def test_csf_of_a_single_pixel_in_training():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        CSF(IN, OUT, 8)(maps(batch=1, hw=(8, 8)))


def test_csf_bad_input():
    module = CSF(IN, OUT, 8)
    with pytest.raises(ValueError, match=r"CSF: expected 4 maps .* channels \[4, 6, 8, 10\]"):
        module(maps()[::-1])
    with pytest.raises(ValueError, match="CSF: expected 4 maps"):
        module(maps()[:3])
    with pytest.raises(ValueError, match="one entry per stage"):
        CSF(IN, OUT[:3])


@pytest.fixture
def two_processes(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda *args: 2)


def test_legacy_over_processes_is_rejected(two_processes):
    with pytest.raises(ValueError, match="one process with legacy=True, got 2"):
        CSF(IN, OUT, 8, legacy=True)
    with pytest.raises(ValueError, match="one process with legacy=True, got 2"):
        TransKD(nn.Identity(), IN, OUT, legacy=True)
    CSF(IN, OUT, 8)


def test_legacy_module_in_processes_started_later_is_rejected(monkeypatch):
    module = CSF(IN, OUT, 8, legacy=True)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda *args: 2)
    with pytest.raises(ValueError, match="one process with legacy=True"):
        module(maps())


ABLATIONS = {
    **{variant: {"variant": variant} for variant in VARIANTS},
    "cwd": {"feature_loss": "cwd"},
    "logits": {"logits": True},
    "no feature maps": {"features": False},
    "no embeddings": {"embeddings": ()},
    "one embedding": {"embeddings": (2,)},
    "two embeddings": {"embeddings": (1, 3)},
    "gl without feature maps": {"variant": "gl", "features": False},
    "gl with its stage alone": {"variant": "gl", "embeddings": (4,), "mixer_residual": True},
    "ea without feature maps": {"variant": "ea", "features": False},
    "ea with two embeddings": {"variant": "ea", "embeddings": (2, 4)},
}


@pytest.mark.parametrize("options", ABLATIONS.values(), ids=ABLATIONS)
@pytest.mark.parametrize("batch", (1, 2))
def test_no_parameter_is_left_without_a_gradient(options, batch):
    """DistributedDataParallel waits for every one of them."""
    model = small(Given(outputs(STUDENT, batch, requires_grad=True)), **options)
    sum(model(IMAGES[:batch], outputs(TEACHER, batch, seed=1)).losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_synchronised_batch_norms_keep_parameters_statistics_and_settings():
    model = CSF(IN, OUT, 8).eval()
    model[1].fc[1] = nn.SyncBatchNorm(32, eps=0.1, momentum=None, process_group=object())
    model[2].fc[1].qconfig = "qconfig"
    model[3].conv2[1] = nn.BatchNorm2d(5, affine=False, track_running_stats=False)
    before, modules = model.state_dict(keep_vars=True), dict(model.named_modules())
    converted = SyncBatchNorm.convert_sync_batchnorm(model)
    assert converted is model
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before) and all(after[name] is tensor for name, tensor in before.items())
    for name, layer in model.named_modules():
        if isinstance(modules[name], nn.modules.batchnorm._BatchNorm):
            assert type(layer) is SyncBatchNorm
            settings = ("num_features", "eps", "momentum", "affine", "track_running_stats", "training")
            assert all(getattr(layer, key) == getattr(modules[name], key) for key in settings)
    assert model[1].fc[1].process_group is modules["1.fc.1"].process_group and model[2].fc[1].qconfig == "qconfig"
    assert type(SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm1d(3))) is SyncBatchNorm


@pytest.mark.parametrize("initialised", (False, True))
def test_a_synchronised_batch_norm_is_torchs_batch_norm_in_one_process(initialised, tmp_path):
    if initialised:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        expected, model = nn.BatchNorm2d(3, momentum=None), SyncBatchNorm(3, momentum=None)
        for _ in range(2):
            x = torch.randn(2, 3, 4, 5)
            torch.testing.assert_close(model(x), expected(x), rtol=0, atol=0)
        torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)
        torch.testing.assert_close(model.eval()(x), expected.eval()(x), rtol=0, atol=0)
        with pytest.raises(ValueError, match=r"input of shape \[B, 3, ...\], got \[2, 4\]"):
            model(torch.zeros(2, 4))
        if not initialised:  # elsewhere torch's own synchronised forward runs; without processes it takes any device
            assert SyncBatchNorm(3, device="meta")(torch.zeros(2, 3, 4, device="meta")).shape == (2, 3, 4)
    finally:
        if initialised:
            dist.destroy_process_group()


WEIGHTS, LEVELS = (0.1, 0.1, 0.5, 1.0), (0.25, 0.0, 1.0)


def pairs():
    return maps(OUT), [t.flip(0) for t in maps(OUT)]


def test_hcl_loss():
    student, teacher = pairs()
    stages = [hcl(s, t) for s, t in zip(student, teacher, strict=True)]
    torch.testing.assert_close(HCLLoss()(student, teacher), sum(stages))
    expected = sum(w * hcl(s, t, LEVELS) for w, s, t in zip(WEIGHTS, student, teacher, strict=True))
    loss = HCLLoss(WEIGHTS, LEVELS)
    torch.testing.assert_close(loss(student, teacher), expected)
    assert "0.5" in repr(loss) and "level_weights=(0.25, 0.0, 1.0)" in repr(loss)
    with pytest.raises(ValueError, match="HCLLoss: expected level_weights to be 3 finite numbers >= 0"):
        HCLLoss(level_weights=(1.0, -1.0, 0.0))


def test_cwd_loss():
    student, teacher = pairs()
    stages = [cwd(s, t, 4.0) for s, t in zip(student, teacher, strict=True)]
    torch.testing.assert_close(CWDLoss(4.0)(student, teacher), sum(stages))
    expected = sum(w * loss for w, loss in zip(WEIGHTS, stages, strict=True))
    torch.testing.assert_close(CWDLoss(4.0, WEIGHTS)(student, teacher), expected)
    assert "temperature=4.0" in repr(CWDLoss(4.0))
    for call, message in (
        (lambda: CWDLoss(-1.0), "temperature to be positive"),
        (lambda: CWDLoss()([], []), "at least one stage"),
        (lambda: CWDLoss()(student, teacher[:3]), "teacher_maps to have 4 entries"),
        (lambda: CWDLoss(1.0, (1.0,))(student, teacher), "stage_weights to have 4 entries"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("loss", (HCLLoss, CWDLoss))
def test_student_maps_are_resized_only_where_that_is_asked_for(loss):
    student, teacher = maps(OUT), maps(OUT, hw=(20, 30))
    with pytest.raises(ValueError, match=r"stage 1: expected teacher to have shape .*; resize_student=True resizes"):
        loss()(student, teacher)
    resized = [
        nn.functional.interpolate(s, t.shape[2:], mode="bilinear") for s, t in zip(student, teacher, strict=True)
    ]
    torch.testing.assert_close(loss(resize_student=True)(student, teacher), loss()(resized, teacher))


def test_kd_loss():
    student, teacher = (t[0] for t in pairs())
    expected = (teacher / 4).softmax(1) * ((teacher / 4).log_softmax(1) - (student / 4).log_softmax(1))
    torch.testing.assert_close(KDLoss(4.0)(student, teacher), 16 * expected.sum(1).mean())
    assert "temperature=4.0" in repr(KDLoss(4.0))
    with pytest.raises(ValueError, match="KDLoss: expected temperature to be positive"):
        KDLoss(0.0)
    with pytest.raises(ValueError, match="kd_kl_loss: expected teacher to have shape"):
        KDLoss()(student, teacher[:, :3])


def test_a_batch_norm_that_does_more_is_not_converted():
    class Activated(nn.BatchNorm2d):
        def forward(self, input):
            return super().forward(input).relu()

    model = nn.Sequential(nn.BatchNorm2d(2), nn.Sequential(Activated(2)))
    with pytest.raises(TypeError, match=r"got Activated in '1\.0'"):
        SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d


def test_tracking_that_is_switched_off_leaves_statistics_alone():
    csf = CSF([4, 8], [6, 6], mid_channels=5).train()
    stage = csf[1]
    for bn in (stage.conv1[1], stage.fc[1]):
        bn.track_running_stats = False
    csf([torch.randn(2, 4, 4, 6), torch.randn(2, 8, 2, 3)])
    for bn in (stage.conv1[1], stage.fc[1]):
        assert bn.num_batches_tracked == 0 and not bn.running_mean.any()
