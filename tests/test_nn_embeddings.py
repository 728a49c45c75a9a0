"""The modules over patch embeddings: PEA, the GL-Mixer, the embedding assistant."""

import pytest
import torch
import torch.nn.functional as F
from test_nn import IN, OUT, maps, tokens
from torch import nn

from transkd_fast.nn import PEA, EmbeddingAssistant, GLMixer, PatchEmbedding, SelfAttention


def test_pea():
    module, xs, targets = PEA(IN, OUT), tokens(), tokens(OUT)
    projected = module(xs)
    weights = (0.5, 1.0, 2.0, 4.0)
    expected = sum(w * F.mse_loss(p, t) for w, p, t in zip(weights, projected, targets, strict=True))
    torch.testing.assert_close(module.loss(xs, targets, weights), expected)
    torch.testing.assert_close(module.loss(maps(), maps(OUT), weights), expected)
    assert list(module.state_dict()) == [f"{m}.{p}" for m in range(4) for p in ("weight", "bias")]
    torch.testing.assert_close(module(maps()), projected)


@pytest.mark.parametrize("layout", ("tokens", "nchw"))
def test_pea_with_assistants(layout):
    torch.manual_seed(0)
    module, assistant, xs, targets = PEA(IN, OUT), EmbeddingAssistant(IN, OUT), tokens(), tokens(OUT)
    terms = [t.flip(1).requires_grad_() for t in tokens(OUT)]
    scales = assistant.projection_scales, assistant.assistant_scales
    mixes = [f_p * p + f_a * a for f_p, p, f_a, a in zip(scales[0], module(xs), scales[1], terms, strict=True)]
    leaves = [*module.parameters(), *scales[0], *scales[1], *terms]
    weights = (0.5, 1.0, 2.0, 4.0)
    expected = sum(w * F.mse_loss(p, t) for w, p, t in zip(weights, mixes, targets, strict=True))
    given = (xs, targets) if layout == "tokens" else (maps(), maps(OUT))
    loss = module.loss(*given, weights, terms, *scales)
    torch.testing.assert_close(loss, expected)
    gradients = (torch.autograd.grad(value, leaves) for value in (loss, expected))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


PEA_LOSS = {
    "embeddings": ((tokens()[:3], tokens(OUT)), "PEA: expected 4 embeddings, one per stage, got 3"),
    "targets": ((tokens(), tokens(OUT)[:3]), "expected targets to have 4 entries like xs, got 3"),
    "stage weights": ((tokens(), tokens(OUT), (1.0,)), "expected stage_weights to have 4 entries like xs, got 1"),
    "assistants": (
        (tokens(), tokens(OUT), (1.0,) * 4, tokens(OUT)[:2], [torch.ones(1)] * 4, [torch.ones(1)] * 4),
        "expected assistants to have 4 entries like xs, got 2",
    ),
    "no scales": ((tokens(), tokens(OUT), (1.0,) * 4, tokens(OUT)), "all together or none, got only assistants"),
    "channels": (
        (tokens((4, 7, 8, 10)), tokens(OUT)),
        r"PEA: stage 2: expected xs\[1\] to be tokens \[B, N, 6\] or a map \[B, 6, H, W\],"
        r" got shape \[2, 117, 7\]",
    ),
    "target channels": (
        (tokens(), tokens((5, 7, 8, 11))),
        r"stage 3: expected targets\[2\] to have shape \[2, 35, 9\], got \[2, 35, 8\]",
    ),
    "pixels": (
        (tokens(), maps(OUT, hw=(17, 27))),
        r"stage 1: expected targets\[0\] to have H W = 425 .* got shape \[2, 5, 17, 27\]",
    ),
    "trainable teacher": (
        (tokens(), tokens(OUT, requires_grad=True)),
        r"targets\[0\] \(stage 1\) not to require a gradient.*torch\.no_grad\(\), or pass target_grad=True",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), PEA_LOSS.values(), ids=PEA_LOSS)
def test_pea_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        PEA(IN, OUT).loss(*arguments)


def test_pea_bad_embeddings_and_channels():
    module = PEA(IN, OUT)
    with pytest.raises(ValueError, match="PEA: expected 4 embeddings, one per stage, got 3"):
        module(tokens()[:3])
    with pytest.raises(ValueError, match=r"PEA: stage 1: expected xs\[0\] to be tokens \[B, N, 4\]"):
        module(tokens()[::-1])
    with pytest.raises(TypeError, match=r"PEA: expected xs\[1\] to be float16, bfloat16, float32 or float64"):
        module([t.long() if m == 1 else t for m, t in enumerate(tokens())])
    with pytest.raises(ValueError, match="one entry per stage"):
        PEA(IN, OUT[:3])


def test_a_trainable_teacher_gets_its_gradient_where_that_is_asked_for():
    module, xs, targets = PEA(IN, OUT), tokens(), tokens(OUT, requires_grad=True)
    loss = module.loss(xs, targets, target_grad=True)
    expected = sum(w * F.mse_loss(*p) for w, *p in zip((0.1, 0.1, 0.5, 1.0), module(xs), targets, strict=True))
    gradients = (torch.autograd.grad(value, targets) for value in (loss, expected))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_self_attention_is_torchs():
    torch.manual_seed(0)
    module, theirs = SelfAttention(16, 4), nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.in_proj_weight.data.copy_(module.qkv.weight)
    theirs.in_proj_bias.data.zero_()
    theirs.out_proj.load_state_dict(module.proj.state_dict())
    x = torch.randn(2, 7, 16)
    torch.testing.assert_close(module(x), theirs(x, x, x)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("residual", (False, True))
def test_gl_mixer(residual):
    torch.manual_seed(0)
    module, e = GLMixer(16, num_heads=4, residual=residual), torch.randn(2, 7, 16)
    assert module.attention_weight.item() == module.conv_weight.item() == 1
    channels_first = e.transpose(1, 2)
    local = (module.conv_a(channels_first) * module.conv_b(channels_first).sigmoid()).transpose(1, 2)
    torch.testing.assert_close(module(e), module.attention(e) + local + (e if residual else 0), rtol=1e-5, atol=1e-6)


GL_MIXER_INPUTS = {
    "channels first": (torch.zeros(2, 16, 7), ValueError, r"e to have shape \[B, N, 16\], got \[2, 16, 7\]"),
    "a map": (torch.zeros(2, 16, 7, 5), ValueError, r"e to have shape \[B, N, 16\], got \[2, 16, 7, 5\]"),
    "no tokens": (torch.zeros(2, 0, 16), ValueError, r"e to have at least one element, got shape \[2, 0, 16\]"),
    "labels": (torch.zeros(2, 7, 16, dtype=torch.int64), TypeError, r"e to be float16, .*, got torch\.int64"),
}


@pytest.mark.parametrize(("e", "error", "message"), GL_MIXER_INPUTS.values(), ids=GL_MIXER_INPUTS)
def test_gl_mixer_bad_input(e, error, message):
    with pytest.raises(error, match=f"GLMixer: expected {message}"):
        GLMixer(16, num_heads=4)(e)


def test_attention_bad_input():
    with pytest.raises(ValueError, match=r"SelfAttention: expected x to have shape \[B, N, 16\], got \[2, 7, 8\]"):
        SelfAttention(16, 4)(torch.zeros(2, 7, 8))
    with pytest.raises(ValueError, match="num_heads to divide dim 16, got 3"):
        GLMixer(16, 3)


def test_embedding_assistant():
    torch.manual_seed(0)
    module, images = EmbeddingAssistant(IN, OUT, image_channels=2), torch.randn(2, 2, 65, 97)
    xs = maps()
    for embedding, conv, out in zip(module.embeddings, (images, *xs[:3]), module(images, xs), strict=True):
        weight, bias = embedding.proj.weight.contiguous(), embedding.proj.bias
        stride, padding = (4, 3) if conv is images else (2, 1)
        expected = F.conv2d(conv, weight, bias, stride, padding).flatten(2).transpose(1, 2)
        expected = F.layer_norm(expected, expected.shape[2:], embedding.norm.weight, embedding.norm.bias, 1e-5)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert [t.shape for t in module(images, xs)] == [t.shape for t in tokens(OUT)]
    assert [p.item() for p in (*module.projection_scales, *module.assistant_scales)] == pytest.approx(
        [0.1 * i for i in range(1, 9)]
    )


def test_embedding_assistant_bad_input():
    module, images, xs = EmbeddingAssistant(IN, OUT, image_channels=2), torch.randn(2, 2, 65, 97), maps()
    with pytest.raises(ValueError, match="EmbeddingAssistant: expected 4 maps"):
        module(images, xs[:3])
    with pytest.raises(
        ValueError, match=r"stage 1: expected images to have shape \[B, 2, H, W\], got \[2, 3, 65, 97\]"
    ):
        module(torch.randn(2, 3, 65, 97), xs)
    with pytest.raises(
        ValueError, match=r"stage 3: expected features\[1\] to have shape \[B, 6, H, W\], got \[2, 117, 6\]"
    ):
        module(images, [xs[0], tokens()[1], *xs[2:]])
    with pytest.raises(ValueError, match="one entry per stage"):
        EmbeddingAssistant(IN, OUT[:3])


@pytest.mark.parametrize(("stride", "patch_size"), [(4, 7), (2, 3)])
@pytest.mark.parametrize("size", [(1, 1), (7, 9), (8, 10), (64, 33)])
def test_patch_embedding_knows_how_many_tokens_it_makes(stride, patch_size, size):
    module, x = PatchEmbedding(3, 8, patch_size, stride), torch.zeros(2, 3, *size)
    assert module.tokens_of(x) == module(x).shape[1]


COPIES = ("aten::copy_", "aten::clone", "aten::contiguous", "aten::_to_copy")


def copies(profiler):
    """Of every copy how many elements it copies, and the names of what it is part of."""
    for event in profiler.events():
        if event.name in COPIES:
            inside, parent = [], event.cpu_parent
            while parent is not None:
                inside.append(parent.name)
                parent = parent.cpu_parent
            yield torch.Size(event.input_shapes[0]).numel(), " in ".join(inside)


# Where oneDNN has no bf16 convolution (AVX2), torch's own copies whatever it is given: there is nothing to see of ours.
@pytest.mark.parametrize("autocast", (False, True) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else (False,))
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
@pytest.mark.parametrize("loaded", (False, True))
def test_embedding_assistants_make_tokens_and_gradients_without_a_copy(loaded, layout, autocast):
    """Copied is only what a convolution copies of its input: to its own layout and, under autocast, to its dtype."""
    module = EmbeddingAssistant(IN, OUT)
    if loaded:
        module.load_state_dict({name: t.contiguous() for name, t in EmbeddingAssistant(IN, OUT).state_dict().items()})
    images = torch.randn(2, 3, 65, 97).contiguous(memory_format=layout)
    xs = [t.contiguous(memory_format=layout).requires_grad_() for t in maps()]
    leaves = [*module.embeddings.parameters(), *xs[:3]]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            outputs = module(images, xs)
        gradients = torch.autograd.grad(outputs, leaves, [torch.ones_like(t) for t in outputs])
    assert all(t.is_contiguous() for t in outputs)
    assert all(g.is_contiguous(memory_format=torch.channels_last) for g in gradients[-3:])
    made, given = ({t.numel() for t in tensors} for tensors in (outputs, (images, *xs)))
    found = list(copies(profiler))
    assert found and not made & given
    assert [where for size, where in found if size in made] == []
    of_inputs = [where for size, where in found if size in given]
    assert all("conv" in where or (autocast and "ToCopyBackward" in where) for where in of_inputs)
    assert autocast or layout is torch.contiguous_format or not of_inputs
