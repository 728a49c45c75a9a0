"""GPU code, compiled on any machine: no spills, no stack, wide accesses, and the resources of the committed table.

For every architecture, or for those that GPU_CODE_ARCHS names.
"""

import ast
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from gpu_code import declare, nvcc, planted, sass, table, triton_aot

OPS = {name: op for name in declare.op_names() if (op := declare.op(name))}
BACKENDS = ("cuda", "triton")
DECLARED = [(backend, name) for name in OPS for backend in BACKENDS if getattr(OPS[name], backend)]


@pytest.fixture(scope="session")
def compiled(pytestconfig, tmp_path_factory):
    """(backend, op) -> toolchain and Resources, compiled once; skips where the compiler is missing."""
    cache = getattr(pytestconfig, "cache", None)
    folder = cache.mkdir("gpu_code") if cache else tmp_path_factory.mktemp("gpu_code")

    def measure(backend, op):
        if reason := (nvcc if backend == "cuda" else triton_aot).missing():
            pytest.skip(reason)
        return table.measure_cached(op, backend, folder)

    return measure


@pytest.mark.parametrize(("backend", "op"), DECLARED)
def test_kernels_neither_spill_nor_use_local_memory_and_move_16_bytes_at_once(compiled, backend, op):
    _, measured = compiled(backend, OPS[op])
    assert measured
    assert table.complaints(OPS[op], backend, measured) == []


@pytest.mark.parametrize(("backend", "op"), DECLARED)
def test_kernels_need_what_the_table_says(compiled, backend, op):
    version, measured = compiled(backend, OPS[op])
    found = table.differences(table.rows_of(OPS[op], backend, version, measured), table.read(declare.ARCHS))
    if found is None:
        warnings.warn(f"{version} is not in tests/gpu_code/resources.csv: of {op} only the gates hold", stacklevel=1)
    assert not found, "\n".join([*found, table.HOW])


@pytest.mark.parametrize(("backend", "op"), DECLARED)
def test_table_names_the_same_kernels_for_every_toolchain(compiled, backend, op):
    _, measured = compiled(backend, OPS[op])
    names = {name for name, _ in measured}
    rows = [row for row in table.read(declare.ARCHS) if row["backend"] == backend]
    for version in {row["toolchain"] for row in rows}:
        kept = {row["kernel"] for row in rows if (row["toolchain"], row["op"]) == (version, op)}
        assert kept == names, f"{version}: {table.HOW}"


def test_table_holds_only_declared_kernels():
    assert {(row["backend"], row["op"]) for row in table.read()} <= set(DECLARED), table.HOW


def test_a_difference_from_the_table_is_named_with_the_command_that_renews_it():
    needs = sass.Resources(registers=40, shared=0, spill=0, stack=0, ldg128=4, stg128=4, local=0, mma=0)
    op = declare.Op("some", cuda=(declare.Cuda("a"), declare.Cuda("b")))
    committed = table.rows_of(op, "cuda", "nvcc 1.2.3", {("a", 80): needs, ("b", 80): needs})

    def differences(measured, version="nvcc 1.2.3"):
        return table.differences(table.rows_of(op, "cuda", version, measured), committed)

    assert differences({("a", 80): needs, ("b", 80): needs}) == []
    # No two runs of cicc need give the same code.
    many = table.rows_of(op, "cuda", "nvcc 1.2.3", {("a", 80): replace(needs, stg128=28), ("b", 80): needs})
    for stores, same in ((28, True), (27, True), (31, True), (24, False), (32, False), (0, False)):
        measured = {("a", 80): replace(needs, stg128=stores), ("b", 80): needs}
        assert (table.differences(table.rows_of(op, "cuda", "nvcc 1.2.3", measured), many) == []) == same
    assert differences({("a", 80): replace(needs, registers=41, ldg128=0), ("c", 80): needs}) == [
        "nvcc 1.2.3: a sm_80: registers 40 in the table, 41 measured",
        "nvcc 1.2.3: a sm_80: ldg128 4 in the table, 0 measured",
        "nvcc 1.2.3: b sm_80: in the table, but not declared",
        "nvcc 1.2.3: c sm_80: not in the table",
    ]
    assert differences({("a", 80): needs}, "nvcc 1.2.4") is None
    assert "python -m gpu_code.table --write" in table.HOW
    done = subprocess.run(
        [sys.executable, "-m", "gpu_code.table", "--help"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--write" in done.stdout


def launched_triton_kernels(source):
    """Functions under @triton.jit that the same file launches: kernel[grid](...)."""
    tree = ast.parse(source)
    jitted = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list)
    }
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return jitted & {ast.unparse(called.value) for called in calls if isinstance(called, ast.Subscript)}


def cuda_kernels(source):
    nested = r"\([^()]*\)"
    for _ in range(2):
        nested = rf"\((?:[^()]|{nested})*\)"
    bounds = rf"(?:__launch_bounds__\s*{nested}\s*)?"
    return set(re.findall(rf"__global__\s+{bounds}void\s+{bounds}(\w+)\s*\(", source))


@pytest.mark.parametrize("op", declare.op_names())
def test_every_kernel_in_the_sources_is_compiled(compiled, op):
    assert op in OPS, f"add tests/gpu_code/{op}.py (README.md there says how)"
    # hcl_bn_*.cuh are not hcl's.
    longer = tuple(f"{other}_" for other in OPS if other.startswith(f"{op}_"))
    headers = [path for path in declare.ROOT.glob(f"csrc/cuda/{op}_*.cuh") if not path.name.startswith(longer)]
    module = declare.ROOT / f"kernels/{op}.py"
    if headers:
        found = set().union(*(cuda_kernels(path.read_text(encoding="utf-8")) for path in headers))
        assert found == {kernel.name.partition("<")[0] for kernel in OPS[op].cuda}
    if module.exists() and 90 in declare.ARCHS:  # which every kernel is compiled for
        found = launched_triton_kernels(module.read_text(encoding="utf-8"))
        _, measured = compiled("triton", OPS[op])
        assert found == {name.partition(" ")[0] for name, _ in measured}


def test_kernels_are_found_in_the_sources():
    cuda = """
        template <int V> __global__ void one(int n) {}
        __global__ void __launch_bounds__(threads(sizeof(T)), 2) two(int n) {}
        __global__ __launch_bounds__(kThreads, 2) void
        three(int n) {}
        __device__ void none(int n) {}"""
    assert cuda_kernels(cuda) == {"one", "two", "three"}
    python = "@triton.jit\ndef one(x): helper(x)\n@triton.jit\ndef helper(x): pass\ndef f(): one[(1,)](2); other[1](3)"
    assert launched_triton_kernels(python) == {"one"}


NARROW = {"lacks 128-bit global loads", "lacks 128-bit global stores"}
NO_TENSOR_CORES = {"uses no tensor cores"}
STACK = {"uses a stack frame", "touches local memory"}
# Each gate must fail on a kernel with its fault and pass its sound twin.
FAULTS = {
    "cuda": {
        "copy<4>": set(),
        "copy<1>": NARROW,
        "stack_frame": STACK,
        "spill": {"spills registers", *STACK},
        "product<__nv_bfloat16, false>": set(),
        "product<float, true>": set(),
        "product<float, false>": NO_TENSOR_CORES,
    },
    "triton": {
        "copy aligned": set(),
        "copy unaligned": NARROW,
        "stack_frame index": STACK,
        "spill tile": {"spills registers", *STACK},
        "product bf16": set(),
        "product tf32": set(),
        "product fp32": NO_TENSOR_CORES,
    },
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_gates_find_planted_faults_and_pass_a_sound_kernel(compiled, backend):
    _, measured = compiled(backend, planted.OP)
    assert {name for name, _ in measured} == set(FAULTS[backend])
    assert {arch for _, arch in measured} >= {80, 90} & set(declare.ARCHS)
    for (name, arch), needs in measured.items():
        declared = planted.OP.wide(backend, name), needs, planted.OP.tensor_cores(backend, name)
        found = {complaint.partition(" (")[0] for complaint in sass.gate(*declared)}
        assert found == FAULTS[backend][name], f"{name} sm_{arch}: {needs}"


def test_a_kernel_that_does_not_exist_or_compile_is_an_error(tmp_path):
    if reason := nvcc.missing():
        pytest.skip(reason)
    for name in ("copy<4, 4>", "nothing"):
        with pytest.raises(AssertionError, match=r"planted\.cu.*error"):
            nvcc.measure(replace(planted.OP, cuda=(declare.Cuda(name),)), tmp_path)


@pytest.mark.parametrize(
    ("line", "opcode"),
    [
        (
            "        /*00d0*/                   LDG.E.CONSTANT R3, [R2.64] ;       /* 0x0000000402037981 */",
            "LDG.E.CONSTANT",
        ),
        (
            "        /*0070*/               @!P0 LDG.E.EF.128 R4, desc[UR4][R2.64] ;  /* 0x0000000000000942 */",
            "LDG.E.EF.128",
        ),
        ("        /*1070*/               @P6 STL.64 [R1+0x8], R4 ;   /* 0x0000000000000942 */", "STL.64"),
        ("        /*1070*/              @!UP0 UIADD3 UR4, UR4, 0x1, URZ ;   /* 0x0000000000000942 */", "UIADD3"),
        ("        /*00f0*/              @!PT LDS RZ, [RZ] ;   /* 0x0000000000000942 */", "LDS"),
    ],
)
def test_opcodes_are_read_with_and_without_a_predicate(line, opcode):
    sass_text = f"\tcode for sm_90a\n\t\tFunction : kernel\n{line}\n{' ' * 88}/* 0x000ee2000c1e1d00 */\n"
    assert sass.opcodes(sass_text) == {(90, "kernel"): [opcode]}


def test_wide_accesses_are_told_from_narrow_and_other_ones():
    wide = ["LDG.E.128", "LDG.E.128.CONSTANT", "LDG.E.EF.128", "LDG.E.ENL2.256", "LDGSTS.E.BYPASS.128"]
    narrow = ["LDG.E.64", "LDG.E.U8", "LDG.E", "LDS.128", "LD.E.128", "STG.E.128"]
    assert sass.instruction_counts(wide + narrow) == {"ldg128": 5, "stg128": 1, "local": 0, "mma": 0}
    assert sass.instruction_counts(["LDL", "STL.64", "LDL.LU"])["local"] == 3


def test_tensor_cores_are_told_from_other_arithmetic():
    used = ["HMMA.16816.F32.BF16", "HMMA.1684.F32.TF32", "HGMMA.64x64x16.F32.BF16", "UTCHMMA", "UTCQMMA.2CTA"]
    others = ["HFMA2.MMA", "FFMA", "DMMA.8x8x4", "IMMA.16816.S8.S8", "UTCBAR", "HADD2"]
    assert sass.instruction_counts(used)["mma"] == len(used)
    assert sass.instruction_counts(others)["mma"] == 0


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("_ZN7transkd15selftest_kernelEPKfPfl", "selftest_kernel"),
        ("_ZN7transkd11copy_kernelI13__nv_bfloat16Li8ELb0EEEvPKT_PS2_l", "copy_kernel<__nv_bfloat16, 8, false>"),
        ("triton_kernel", "triton_kernel"),
    ],
)
def test_kernels_are_known_by_the_name_in_the_source(symbol, name):
    assert sass.kernel_name(symbol) == name


def test_the_built_extension_holds_code_for_the_architectures_it_names():
    binary, archs = built_extension()
    wanted = re.findall(r"(\d+)\.(\d+)([af]?)(\+PTX)?", archs)
    assert wanted, f"expected build_info to name architectures such as 9.0, got {archs!r}"
    tool = nvcc.find_cuobjdump()
    elf, ptx = sass.cuobjdump(tool, "-lelf", binary), sass.cuobjdump(tool, "-lptx", binary)
    assert set(re.findall(r"\.sm_(\w+)\.cubin", elf)) == {f"{major}{minor}{kind}" for major, minor, kind, _ in wanted}
    wanted_ptx = {f"{major}{minor}{kind}" for major, minor, kind, plus in wanted if plus}
    assert set(re.findall(r"\.sm_(\w+)\.ptx", ptx)) == wanted_ptx


def test_no_kernel_of_the_built_extension_uses_a_stack_frame():
    binary, _ = built_extension()
    usage = sass.cuobjdump(nvcc.find_cuobjdump(), "-res-usage", binary)
    frames = re.findall(r"Function (\w+):\s+REG:\d+ STACK:(\d+)", usage)
    assert frames, f"expected cuobjdump -res-usage to name kernels, got:\n{usage}"
    assert {sass.demangle(name): int(stack) for name, stack in frames if stack != "0"} == {}


def built_extension():
    import transkd_fast

    build = transkd_fast.build_info().get("cuda_build")
    if build is None:
        pytest.skip("transkd_fast._C_cuda is not loaded here")
    if nvcc.find_cuobjdump() is None:
        pytest.skip(nvcc.NO_CUOBJDUMP)
    return Path(find_spec("transkd_fast._C_cuda").origin), build["archs"]
