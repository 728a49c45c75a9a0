"""Golden values of the published wrapper's embeddings: what pea and gl_mixer compute in it, without its features."""

import torch
from golden_io import compare, hashed, hashed_state, load, tolerance
from kernels_here import device_of
from test_transkd import Given
from torch.utils._pytree import tree_map_only

from transkd_fast import backends
from transkd_fast.models import StageOutputs
from transkd_fast.reference import legacy
from transkd_fast.transkd import TransKD

REAL = load("real_channels")


def cases(*variants, want=None):
    """The cases of some variants that align embeddings, those of small channels first."""
    small = [case for variant in variants for case in load(f"skf_{variant}")["cases"]]
    found = [*small, *(case for case in REAL["cases"] if case["variant"] in variants)]
    return [case for case in found if case["ctor"]["embed"] and want in (None, case["want"])]


def inputs_of(case):
    """What the student gives, what the teacher gives or probes, and the state of the wrapper's parameters."""
    if "input" not in case:
        params = load(f"skf_{case['variant']}")["params"][case["params_key"]]
        return case, case.get("R_proj"), lambda model: {name: params[name] for name in model.state_dict()}
    given = REAL["inputs"][case["input"]]
    seed, widths = given["seed"], case["ctor"]["out_channels"]
    maps = [(given["B"], c, *t.shape[2:]) for c, t in zip(widths, given["feats"], strict=True)]
    tokens = [(given["B"], t.shape[1], c) for c, t in zip(widths, given["embeds"], strict=True)]
    given = given | {
        "image": 2 * hashed(seed, "image", (given["B"], 3, *given["image_hw"])),
        "teacher_feats": [2 * hashed(seed, f"tfeat{k}", shape) for k, shape in enumerate(maps)],
        "teacher_embeds": [2 * hashed(seed, f"tembed{k}", shape) for k, shape in enumerate(tokens)],
    }
    probes = [hashed(seed, f"Rp{k}", shape) for k, shape in enumerate(tokens)]
    return given, probes, lambda model: hashed_state(model, case["param_seed"])


def check(case, dtype, backend, op):
    """Compares one case with an op on a backend; the wrapper's other ops are eager."""
    given, probes, state = inputs_of(case)
    given = tree_map_only(torch.Tensor, lambda t: t.to(device_of(backend), dtype), dict(given))
    embeds = [t.requires_grad_() for t in given["embeds"]]
    ctor = case["ctor"]
    stages, weights = legacy.embedding_stages(ctor["embed"])
    model = TransKD(
        Given(StageOutputs(given["feats"], embeds, None)),
        ctor["in_channels"],
        ctor["out_channels"],
        case["variant"],
        embeddings=stages,
        embedding_weights=[weights.get(m, 0.0) for m in (1, 2, 3, 4)],
        num_heads=ctor.get("num_heads", (1, 2, 5, 8))[3],
        mixer_residual=ctor.get("add", False),
        features=False,
    )
    model.load_state_dict(state(model))
    model.to(device_of(backend), dtype).train(case["train"])
    golden = case["f64"]
    expected = {name: golden[name] for name in ("grad_embeds", "proj" if case["want"] == "probe" else "pea")}
    with backends.use_backend("eager"), backends.use_backend(backend, [op]), backends.count_runs() as runs:
        if case["want"] == "probe":
            results = {"proj": model(given["image"]).projected}
            total = sum((t * r.to(t)).sum() for t, r in zip(results["proj"], probes, strict=True))
        else:
            teacher = StageOutputs(given["teacher_feats"], given["teacher_embeds"], None)
            total = model(given["image"], teacher).losses["pea"]
            results = {"pea": total}
            expected["pea"] = sum(weights[m] * mse for m, mse in zip(stages, golden["pea"], strict=True))
        total.backward()
    assert runs[op, backend] == 1
    results["grad_embeds"] = [t.grad for t in embeds]
    results["grad_params"] = {name: p.grad for name, p in model.named_parameters()}
    expected["grad_params"] = {name: golden["grad_params"][name] for name in results["grad_params"]}
    results = tree_map_only(torch.Tensor, lambda t: t.cpu(), results)
    compare(results, expected, min(tolerance(case, dtype), 1e-4), case["name"])
