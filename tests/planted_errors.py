"""The errors that are planted in the kernels, and the tests that catch them; tests/test_mutations*.py run them."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Mutant:
    """One planted error.

    Args:
        op: whose kernel.
        backend: which one.
        error: what kind of error.
        file: the source, relative to the repository.
        old: text that stands there once...
        new: ...and what stands there instead.
        tests: arguments of pytest that catch it.
        shows: what their output must then say.
    """

    op: str
    backend: str
    error: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    shows: str = "assert "

    @property
    def name(self) -> str:
        return f"{self.op}-{self.backend}-{self.error}"


def without_each(call, error, op, file, tests, shows):
    """A mutant for every place of a file of device code where a function is called, without that call."""
    source = (ROOT / file).read_text(encoding="utf-8")
    for number, match in enumerate(re.finditer(re.escape(call), source), start=1):
        # Everything before belongs to the text, so that it stands there once.
        old = source[: match.end()]
        new = old.removesuffix(call)
        yield Mutant(op, "cuda", f"{error} {number} of {Path(file).name}", file, old, new, tests, shows)


HCL_CPU = ("tests/test_hcl.py", "-k", "test_value_and_gradients and cpu and float32")
HCL_CPU_LARGE = ("tests/test_hcl.py", "-k", "larger_than_a_cache and cpu")
HCL_TRITON = ("tests/test_hcl.py", "-k", "test_value_and_gradients and triton and float32 and (2x3x9x7 or 2x5x8x12)")
ON_CPU = "tests/cuda_on_cpu/test_cuda_on_cpu_hcl.py"
HCL_CUDA = (ON_CPU, "-k", "test_sanitizers_find_nothing and asan and usual and float32")
HCL_CUDA_MISALIGNED = (ON_CPU, "-k", "test_misaligned_bases and asan and nchw")
HCL_CUDA_TSAN = (ON_CPU, "-k", "test_sanitizers_find_nothing and tsan and cells and float32")

CSF_CPU = ("tests/test_csf.py", "-k", "test_value_and_gradients and cpu and float32 and 2_3_9x13")
CSF_CPU_LARGE = ("tests/test_csf.py", "-k", "larger_than_a_cache and cpu and nchw")
CSF_CPU_OFFSET = ("tests/test_csf.py", "-k", "test_a_large_mean_costs_no_digits and cpu and float32")
CSF_CPU_CUMULATIVE = ("tests/test_csf.py", "-k", "test_every_kind_of_normalisation and cumulative-tracked and cpu")
CSF_CPU_RATIO = ("tests/test_csf.py", "-k", "test_value_and_gradients and cpu and float32 and 2_5_7x82")
CSF_TRITON = ("tests/test_kernels_triton_csf.py", "-k", "test_several_programs_per_plane and nchw")
CSF_TRITON_SHARES = ("tests/test_kernels_triton_csf.py", "-k", "test_shares_of_two_processes and nchw")
CSF_ON_CPU = "tests/cuda_on_cpu/test_cuda_on_cpu_csf.py"
# ThreadSanitizer's driver compiles fastest, whatever is looked for.
CSF_CUDA = (CSF_ON_CPU, "-k", "test_sanitizers_find_nothing and nchw and tsan and float32")
CSF_CUDA_MISALIGNED = (CSF_ON_CPU, "-k", "test_misaligned_bases and nchw and float32")
CSF_CUDA_SHARES = (CSF_ON_CPU, "-k", "test_a_part_of_a_global_batch and nchw and float32")

PEA_CPU = ("tests/test_pea.py", "-k", "test_value_and_gradients and cpu and float32 and 5x9_10_66")
PEA_CPU_MANY = ("tests/test_pea.py", "-k", "test_value_and_gradients and cpu and float32 and 65x67")
PEA_CPU_HALF = ("tests/test_pea.py", "-k", "test_large_gradients_wait and cpu and float16")
PEA_TRITON = ("tests/test_pea.py", "-k", "test_value_and_gradients and triton and float32 and 5x9_10_66 and maps")
PEA_TRITON_HALF = ("tests/test_pea.py", "-k", "test_large_gradients_wait and triton and float16")
PEA_ON_CPU = "tests/cuda_on_cpu/test_cuda_on_cpu_pea.py"
PEA_CUDA = (PEA_ON_CPU, "-k", "test_sanitizers_find_nothing and tsan and usual")
PEA_CUDA_WIDE = (PEA_ON_CPU, "-k", "test_sanitizers_find_nothing and tsan and wide")
PEA_CUDA_ASAN = (PEA_ON_CPU, "-k", "test_sanitizers_find_nothing and asan and usual")
PEA_CUDA_MISALIGNED = (PEA_ON_CPU, "-k", "test_misaligned_bases and t-asan")

GL_MIXER_CPU = ("tests/test_gl_mixer.py", "-k", "test_value_and_gradients and cpu and float32 and 3x7x5")
GL_MIXER_TRITON = ("tests/test_gl_mixer.py", "-k", "test_value_and_gradients and triton and float32 and 3x7x5")
GL_MIXER_ON_CPU = "tests/cuda_on_cpu/test_cuda_on_cpu_gl_mixer.py"
GL_MIXER_CUDA = (GL_MIXER_ON_CPU, "-k", "test_sanitizers_find_nothing and tsan and float32")
GL_MIXER_CUDA_MISALIGNED = (GL_MIXER_ON_CPU, "-k", "test_misaligned_bases and float32")

HCL_BN_CPU = ("tests/test_hcl_bn.py", "-k", "test_value_and_gradients and cpu and float32 and (1x5x17x25 or 2x8x3x4)")
HCL_BN_CPU_LARGE = ("tests/test_hcl_bn.py", "-k", "larger_than_a_cache and cpu")
HCL_BN_TRITON = "tests/test_kernels_triton_hcl_bn.py"
HCL_BN_ON_CPU = "tests/cuda_on_cpu/test_cuda_on_cpu_hcl_bn.py"
HCL_BN_CUDA = (HCL_BN_ON_CPU, "-k", "test_sanitizers_find_nothing and nchw and tsan")
HCL_BN_CUDA_ASAN = (HCL_BN_ON_CPU, "-k", "test_sanitizers_find_nothing and nchw and asan and usual")
HCL_BN_CUDA_MISALIGNED = (HCL_BN_ON_CPU, "-k", "test_misaligned_bases and nchw")
HCL_BN_CUDA_OFFSET = (HCL_BN_ON_CPU, "-k", "test_a_large_mean and nchw")
CWD_CPU = ("tests/test_cwd.py", "-k", "test_value_and_gradients and cpu and float32 and (2x8x3x4 or 1x5x17x25)")
CWD_CPU_LARGE = ("tests/test_cwd.py", "-k", "larger_than_a_cache and cpu and channels_last")
CWD_CPU_WIDE = ("tests/test_cwd.py", "-k", "test_value_and_gradients and cpu and float32 and 2x64x32x64")
CWD_CPU_LONG = ("tests/test_cwd.py", "-k", "test_value_and_gradients and cpu and float32 and 1x2x30x5001")
CWD_TRITON = "tests/test_kernels_triton_cwd.py"
CWD_TRITON_PARTS = (CWD_TRITON, "-k", "test_softmaxes_in_many_parts and 1-")
CWD_ON_CPU = "tests/cuda_on_cpu/test_cuda_on_cpu_cwd.py"
CWD_CUDA = (CWD_ON_CPU, "-k", "test_sanitizers_find_nothing and tsan and parts")
CWD_CUDA_ASAN = (CWD_ON_CPU, "-k", "test_sanitizers_find_nothing and asan and usual")
CWD_CUDA_MISALIGNED = (CWD_ON_CPU, "-k", "test_misaligned_bases and 2-4")
SEG_CE_TRITON = "tests/test_kernels_triton_seg_ce.py"
SEG_CE_ON_CPU = "tests/cuda_on_cpu/test_cuda_on_cpu_seg_ce.py"
SEG_CE_CUDA = (SEG_CE_ON_CPU, "-k", "test_value_and_gradients_plain and nchw and 19")
SEG_CE_CUDA_ELEMENTS = (SEG_CE_ON_CPU, "-k", "test_gradients_of_many_elements and asan and float32")
SEG_CE_CUDA_TSAN = (SEG_CE_ON_CPU, "-k", "test_sanitizers_find_nothing and tsan and nchw")
SEG_CE_CPU = ("tests/test_seg_ce.py", "-k", "test_value_and_gradients and cpu and float32 and (5_3x4 or 2_6x9)")
SEG_CE_CPU_LARGE = ("tests/test_seg_ce.py", "-k", "test_value_and_gradients and cpu and float32 and 19_16x32")

RACE = "ThreadSanitizer: data race"

# What is planted at least. Barriers are CUDA C++'s own: Triton's interpreter runs a program as one thread, so that a
# `tl.debug_barrier` that is missing does not show.
KINDS = {
    "cpu": ("sign", "off-by-one row", "unaligned vector"),
    "triton": ("sign", "off-by-one row", "unaligned vector"),
    "cuda": ("sign", "off-by-one row", "unaligned vector", "missing barrier"),
}
# op, backend, error, file, old, new, tests
MUTANTS = [
    Mutant("hcl", "cpu", "sign forward", "csrc/cpu/hcl_loops.h",
           "  d.lanes -= other.lanes;\n", "  d.lanes += other.lanes;\n", HCL_CPU),
    Mutant("hcl", "cpu", "sign backward", "csrc/cpu/hcl_loops.h",
           "alpha * (s[i] - t[i]) + add", "alpha * (s[i] - t[i]) - add", HCL_CPU),
    Mutant("hcl", "cpu", "off-by-one row forward", "csrc/cpu/hcl_cpu.cpp",
           "r < piece.bottom; ++r", "r + 1 < piece.bottom; ++r", HCL_CPU),
    Mutant("hcl", "cpu", "off-by-one row backward", "csrc/cpu/hcl_cpu.cpp",
           "std::upper_bound(rows.edge, rows.edge + rows.segments + 1, r)",
           "std::lower_bound(rows.edge + 1, rows.edge + rows.segments, r)", HCL_CPU),
    Mutant("hcl", "cpu", "unaligned vector", "csrc/cpu/hcl_stage.h",
           "% 16 == 0 && run * sizeof(T) % 16 == 0", "% 16 == 0", HCL_CPU_LARGE,
           "Fatal Python error: Segmentation fault"),
    Mutant("hcl", "triton", "sign forward", "kernels/hcl.py",
           "    return s - t\n", "    return s + t\n", HCL_TRITON),
    Mutant("hcl", "triton", "sign backward", "kernels/hcl.py",
           "alpha * d + level[None, :]", "alpha * d - level[None, :]", HCL_TRITON),
    Mutant("hcl", "triton", "off-by-one row", "kernels/_hcl_cells.py",
           "tl.minimum(first + length, end)", "tl.minimum(first + length, end - 1)", HCL_TRITON),
    Mutant("hcl", "triton", "unaligned vector", "kernels/_common.py",
           "min(size & -size, ", "min(size, ", HCL_TRITON),
    Mutant("hcl", "cuda", "sign forward", "csrc/cuda/hcl_kernel.cuh",
           "- widen(t[u].element[v]);\n          sums[", "+ widen(t[u].element[v]);\n          sums[", HCL_CUDA_TSAN),
    Mutant("hcl", "cuda", "sign backward", "csrc/cuda/hcl_kernel.cuh",
           "narrow(alpha * d + entries", "narrow(alpha * d - entries", HCL_CUDA_TSAN),
    Mutant("hcl", "cuda", "off-by-one row", "csrc/cuda/hcl_kernel.cuh",
           "(stage.edge_row[i + 1] - top) * row_vectors", "(stage.edge_row[i + 1] - top - 1) * row_vectors",
           HCL_CUDA_TSAN),
    Mutant("hcl", "cuda", "off-by-one row past the end", "csrc/cuda/hcl_kernel.cuh",
           "(stage.edge_row[i + 1] - top) * row_vectors", "(stage.edge_row[i + 1] - top + 1) * row_vectors",
           HCL_CUDA, "AddressSanitizer"),
    Mutant("hcl", "cuda", "unaligned vector, bases", "csrc/cuda/hcl_plan.h",
           "bool fits = aligned(m.student, width * size_of(m.student_type)) &&", "bool fits =", HCL_CUDA_MISALIGNED,
           "misaligned address"),
    Mutant("hcl", "cuda", "unaligned vector, rows", "csrc/cuda/hcl_plan.h",
           "fits = fits && pyramid.columns.edge[j] % width == 0;", "fits = fits && j >= 0;", HCL_CUDA,
           "runtime error"),
    *without_each("__syncthreads();", "missing barrier", "hcl", "csrc/cuda/hcl_kernel.cuh", HCL_CUDA_TSAN, RACE),
    *without_each("__syncthreads();", "missing barrier", "hcl", "csrc/cuda/common/reduce.cuh", HCL_CUDA_TSAN, RACE),
    *without_each("__threadfence();", "missing fence", "hcl", "csrc/cuda/common/reduce.cuh", HCL_CUDA_TSAN, RACE),
    Mutant("csf", "cpu", "sign forward", "csrc/cpu/csf_loops.h",
           "(L(z + x) - shift) * scale + L(up + x)", "(L(z + x) - shift) * scale - L(up + x)", CSF_CPU),
    Mutant("csf", "cpu", "sign backward", "csrc/cpu/csf_loops.h",
           "(L(z + place) - shift) + constant)", "(L(z + place) - shift) - constant)", CSF_CPU),
    Mutant("csf", "cpu", "off-by-one row forward", "csrc/cpu/csf_passes.h",
           "expand(coarse, next - i, maps.columns.in, maps.column_source.data(), maps.columns.out,",
           "expand(coarse, next - i - 1, maps.columns.in, maps.column_source.data(), maps.columns.out,", CSF_CPU),
    Mutant("csf", "cpu", "off-by-one row backward", "csrc/cpu/csf_passes.h",
           "maps.row_source[(range.end - 1) / width] + 1;", "maps.row_source[(range.end - 1) / width];", CSF_CPU),
    Mutant("csf", "cpu", "unaligned vector", "csrc/cpu/csf_passes.h",
           "% 16 == 0 && row % 16 == 0;", "% 16 == 0 && row > 0;", CSF_CPU_LARGE,
           "Fatal Python error: Segmentation fault"),
    Mutant("csf", "cpu", "squares about zero", "csrc/cpu/csf_passes.h",
           "shift[c] = sum[c] / static_cast<T>(some);", "shift[c] = 0;", CSF_CPU_OFFSET),
    Mutant("csf", "cpu", "biased variance tracked", "csrc/common/batch_norm.h",
           "variance * (count / (count - 1))", "variance", CSF_CPU),
    Mutant("csf", "cpu", "cumulative average over the batches before", "csrc/common/batch_norm.h",
           "static_cast<double>(*bn.batches + 1)", "static_cast<double>(*bn.batches)", CSF_CPU_CUMULATIVE),
    Mutant("csf", "cpu", "gradient past ReLU", "csrc/common/csf_attention.h",
           "<= 0 ? 0 : sum;", "<= 0 ? sum : sum;", CSF_CPU),
    Mutant("csf", "cpu", "sources in whole numbers", "csrc/common/nearest.h",
           "static_cast<Index>(floorf(static_cast<float>(fine) * scale))", "fine * in / out", CSF_CPU_RATIO),
    Mutant("csf", "triton", "sign forward", "kernels/_csf_passes.py",
           "(scale * (upper - shift) + rest)", "(scale * (upper - shift) - rest)", CSF_TRITON),
    Mutant("csf", "triton", "sign backward", "kernels/_csf_passes.py",
           "value = p * gs[k] + r\n", "value = p * gs[k] - r\n", CSF_TRITON),
    Mutant("csf", "triton", "off-by-one row", "kernels/_csf_passes.py",
           "tl.cdiv(tl.cdiv(last, width), 2), TILE[4]", "last // width // 2, TILE[4]", CSF_TRITON),
    Mutant("csf", "triton", "unaligned vector", "kernels/_csf_plan.py",
           "    vector = _common.vector_length(inner, itemsize)\n    elements =",
           "    vector = _common.VECTOR_BYTES // itemsize\n    elements =", CSF_TRITON),
    Mutant("csf", "triton", "biased variance tracked", "kernels/_csf_attention.py",
           "running[2], channel, in_channels, unbiased,", "running[2], channel, in_channels, variance,", CSF_TRITON),
    Mutant("csf", "triton", "gradients of the whole batch", "kernels/_csf_attention.py",
           "tl.sum(tl.where(own, of_r, 0), axis=0)", "tl.sum(of_r, axis=0)", CSF_TRITON_SHARES),
    Mutant("csf", "cuda", "sign forward", "csrc/cuda/csf_kernel.cuh",
           "+ offset.get(c) + up_weight.get(c) * up", "+ offset.get(c) - up_weight.get(c) * up", CSF_CUDA),
    Mutant("csf", "cuda", "sign backward", "csrc/cuda/csf_gradients.cuh",
           "z_weight * distance + constant)", "z_weight * distance - constant)", CSF_CUDA),
    Mutant("csf", "cuda", "off-by-one row forward", "csrc/cuda/csf_sums.cuh",
           "pass.rows.start(walk.row + 1) - pass.rows.start(walk.row);",
           "pass.rows.start(walk.row + 1) - pass.rows.start(walk.row) - 1;", CSF_CUDA),
    Mutant("csf", "cuda", "off-by-one row backward", "csrc/cuda/csf_gradients.cuh",
           "min(pass.rows.out - 2 * row, 2u)", "2", CSF_CUDA, RACE),
    Mutant("csf", "cuda", "unaligned vector, bases", "csrc/cuda/csf_plan.h",
           "if (!aligned(m.z, 16) || ", "if (", CSF_CUDA_MISALIGNED, "misaligned address"),
    Mutant("csf", "cuda", "gradients of the whole batch", "csrc/common/csf_attention.h",
           "fc_bn_gradients.bias.set(l, own_sum);", "fc_bn_gradients.bias.set(l, sum);", CSF_CUDA_SHARES),
    *without_each("__syncthreads();", "missing barrier", "csf", "csrc/cuda/csf_block.cuh", CSF_CUDA, RACE),
    *without_each("__syncthreads();", "missing barrier", "csf", "csrc/cuda/csf_team.cuh", CSF_CUDA, RACE),
    Mutant("pea", "cpu", "sign forward", "csrc/cpu/pea_loops.h",
           "a * assistant_factor - L(target + i);", "a * assistant_factor + L(target + i);", PEA_CPU),
    Mutant("pea", "cpu", "sign backward", "csrc/cpu/pea_cpu.cpp",
           "= -factors[kProjectionFactor];", "= factors[kProjectionFactor];", PEA_CPU),
    Mutant("pea", "cpu", "off-by-one row", "csrc/cpu/pea_cpu.cpp",
           "std::min(cut_.group, block.count - r)};", "std::min(cut_.group, block.count - r - 1)};", PEA_CPU),
    Mutant("pea", "cpu", "unaligned vector", "csrc/cpu/gemm.cpp",
           "if (columns - left >= kColumns && valid == R::kRows) {", "if (valid == R::kRows) {", PEA_CPU),
    Mutant("pea", "cpu", "samples of a map as one list", "csrc/cpu/pea_cpu.cpp",
           "by_sample ? stage.batch : 1;", "by_sample ? 1 : stage.batch;", PEA_CPU),
    Mutant("pea", "cpu", "scale left out of dx", "csrc/cpu/pea_cpu.cpp",
           "scale(weight_.data(), f_p_,", "scale(weight_.data(), T(1),", PEA_CPU),
    Mutant("pea", "cpu", "sums of a block again", "csrc/cpu/pea_cpu.cpp",
           "        columns[c] = 0;\n", "", PEA_CPU_MANY),
    Mutant("pea", "cpu", "unnormalised gradient in float16", "csrc/common/pea_contract.h",
           "type == ScalarType::Half ? ScalarType::Float : type;", "type;", PEA_CPU_HALF),
    Mutant("pea", "triton", "sign forward", "kernels/_pea_tiles.py",
           "tl.where(inside, mixed - wanted, 0)", "tl.where(inside, mixed + wanted, 0)", PEA_TRITON),
    Mutant("pea", "triton", "sign backward", "kernels/pea.py",
           "tl.store(factors + 3 * m + 1, -factor)", "tl.store(factors + 3 * m + 1, factor)", PEA_TRITON),
    Mutant("pea", "triton", "off-by-one row", "kernels/_pea_tiles.py",
           "(first + lane < tokens)[:, None]", "(first + lane + 1 < tokens)[:, None]", PEA_TRITON),
    Mutant("pea", "triton", "unaligned vector", "kernels/_pea_plan.py",
           "vector = _common.vector_length(tokens if of.channel_major else of.shape[2], dtype.itemsize)",
           "vector = _common.VECTOR_BYTES // dtype.itemsize", PEA_TRITON),
    Mutant("pea", "triton", "samples of a map as one list", "kernels/_pea_plan.py",
           "if not any(one.channel_major for one in activations):", "if activations:", PEA_TRITON),
    Mutant("pea", "triton", "scale left out of dweight", "kernels/pea.py",
           "    total *= factor\n", "", PEA_TRITON),
    Mutant("pea", "triton", "unnormalised gradient in float16", "kernels/_pea_plan.py",
           "return torch.float32 if dtype == torch.float16 else dtype", "return dtype", PEA_TRITON_HALF),
    Mutant("pea", "cuda", "sign forward", "csrc/cuda/pea_parts.cuh",
           ": projection) - target_[k][e];", ": projection) + target_[k][e];", PEA_CUDA),
    Mutant("pea", "cuda", "sign backward", "csrc/cuda/pea_kernel.cuh",
           "factors[1] = -factor;", "factors[1] = factor;", PEA_CUDA),
    Mutant("pea", "cuda", "off-by-one row", "csrc/cuda/pea_tiles.cuh",
           ": token < tokens.count;", ": token + 1 < tokens.count;", PEA_CUDA),
    Mutant("pea", "cuda", "unaligned vector, bases", "csrc/cuda/pea_plan.h",
           "map.wide = aligned(map.data) && ", "map.wide = ", PEA_CUDA_MISALIGNED, "misaligned address"),
    Mutant("pea", "cuda", "unaligned vector, rows", "csrc/cuda/pea_plan.h",
           "aligned(map.data) && row * size_of(map.type) % 16 == 0;", "aligned(map.data);", PEA_CUDA_ASAN,
           "misaligned address"),
    Mutant("pea", "cuda", "scale left out of dx", "csrc/cuda/pea_parts.cuh",
           "values[e] = f_p * from[e * step];", "values[e] = from[e * step];", PEA_CUDA),
    Mutant("pea", "cuda", "missing barrier after the product", "csrc/cuda/pea_kernel.cuh",
           "projection.store(made, kTileLeading<T>);\n      __syncthreads();",
           "projection.store(made, kTileLeading<T>);", PEA_CUDA, RACE),
    Mutant("pea", "cuda", "missing barrier after the residuals", "csrc/cuda/pea_kernel.cuh",
           "made, residual_tile, sums);\n      __syncthreads();", "made, residual_tile, sums);", PEA_CUDA, RACE),
    Mutant("pea", "cuda", "missing barrier after the wide tiles", "csrc/cuda/pea_kernel.cuh",
           "    weight.put(weight_tile);\n    __syncthreads();\n    if (in_tile + 1 < stage.in_tiles) {",
           "    weight.put(weight_tile);\n    if (in_tile + 1 < stage.in_tiles) {", PEA_CUDA_WIDE, RACE),
    Mutant("gl_mixer", "cpu", "sign forward", "csrc/cpu/gl_mixer_loops.h",
           "+ conv * (a * Gate<T>(g).open);", "- conv * (a * Gate<T>(g).open);", GL_MIXER_CPU),
    Mutant("gl_mixer", "cpu", "sign backward", "csrc/cpu/gl_mixer_loops.h",
           "slope = e * q * q;", "slope = -e * q * q;", GL_MIXER_CPU),
    Mutant("gl_mixer", "cpu", "off-by-one row", "csrc/cpu/gl_mixer_cpu.cpp",
           "token = chunk.first + place - 1;", "token = chunk.first + place;", GL_MIXER_CPU),
    Mutant("gl_mixer", "cpu", "row of the next sample", "csrc/cpu/gl_mixer_cpu.cpp",
           "f(token < tokens ? token : -1, place);", "f(token, place);", GL_MIXER_CPU),
    Mutant("gl_mixer", "cpu", "unaligned vector", "csrc/cpu/gemm.cpp",
           "if (columns - left >= kColumns && valid == R::kRows) {", "if (valid == R::kRows) {", GL_MIXER_CPU),
    Mutant("gl_mixer", "cpu", "taps in the forward's order", "csrc/cpu/gl_mixer_cpu.cpp",
           "const int64_t place = kTaps - 1 - tap;", "const int64_t place = tap;", GL_MIXER_CPU),
    Mutant("gl_mixer", "cpu", "sums without the last chunk", "csrc/cpu/gl_mixer_cpu.cpp",
           "i < chunks_.count; ++i) sum += sums_[", "i + 1 < chunks_.count; ++i) sum += sums_[", GL_MIXER_CPU),
    Mutant("gl_mixer", "triton", "sign forward", "kernels/gl_mixer.py",
           "mix += tl.load(scalars[1])", "mix -= tl.load(scalars[1])", GL_MIXER_TRITON),
    Mutant("gl_mixer", "triton", "sign backward", "kernels/gl_mixer.py",
           "d_gate = of_convolution * g", "d_gate = -of_convolution * g", GL_MIXER_TRITON),
    Mutant("gl_mixer", "triton", "off-by-one row", "kernels/_gl_mixer_products.py",
           "(position >= 0) & (position < length)", "(position > 0) & (position < length)", GL_MIXER_TRITON),
    Mutant("gl_mixer", "triton", "row of the next sample", "kernels/_gl_mixer_products.py",
           "(position >= 0) & (position < length)", "(position >= 0) & (row + shift < end)", GL_MIXER_TRITON),
    Mutant("gl_mixer", "triton", "unaligned vector", "kernels/_gl_mixer_plan.py",
           "vector = min(channels & -channels, LARGEST_VECTOR)", "vector = LARGEST_VECTOR", GL_MIXER_TRITON),
    Mutant("gl_mixer", "triton", "taps in the forward's order", "kernels/_gl_mixer_products.py",
           "rows, 2, 1, sizes, VECTOR)", "rows, 2, -1, sizes, VECTOR)", GL_MIXER_TRITON),
    Mutant("gl_mixer", "triton", "gates exchanged", "kernels/_gl_mixer_products.py",
           "return tl.where(x < 0, below, above), tl.where(x < 0, above, below)", "return above, below",
           GL_MIXER_TRITON),
    Mutant("gl_mixer", "cuda", "sign forward", "csrc/cuda/gl_mixer_kernel.cuh",
           "* u[v] + conv_weight * (value *", "* u[v] - conv_weight * (value *", GL_MIXER_CUDA),
    Mutant("gl_mixer", "cuda", "sign backward", "csrc/cuda/gl_mixer_kernel.cuh",
           "gate_gradient = weighted * (", "gate_gradient = -weighted * (", GL_MIXER_CUDA),
    Mutant("gl_mixer", "cuda", "off-by-one row", "csrc/cuda/gl_mixer_kernel.cuh",
           "min((part + 1) * pass.gate_share, pass.rows);", "min((part + 1) * pass.gate_share, pass.rows - 1);",
           GL_MIXER_CUDA),
    Mutant("gl_mixer", "cuda", "row of the next sample", "csrc/cuda/gl_mixer_tiles.cuh",
           "row_there % pass.tokens + shift >= pass.tokens)", "row_there + shift >= pass.rows)", GL_MIXER_CUDA),
    Mutant("gl_mixer", "cuda", "unaligned vector", "csrc/cuda/gl_mixer_plan.h",
           "tuning.vectors && vectors_fit();", "tuning.vectors;", GL_MIXER_CUDA_MISALIGNED, "misaligned address"),
    Mutant("gl_mixer", "cuda", "missing barrier before the product", "csrc/cuda/gl_mixer_kernel.cuh",
           "__syncthreads();\n      if (first + kDepth < pass.channels)", "if (first + kDepth < pass.channels)",
           GL_MIXER_CUDA, RACE),
    Mutant("gl_mixer", "cuda", "missing barrier after the product", "csrc/cuda/gl_mixer_kernel.cuh",
           "      product.add(a, kLeading, b, kLeading, kLength);\n      __syncthreads();",
           "      product.add(a, kLeading, b, kLeading, kLength);", GL_MIXER_CUDA, RACE),
    Mutant("gl_mixer", "cuda", "missing barrier before the mix", "csrc/cuda/gl_mixer_kernel.cuh",
           "    product.store(sums, kLeadingSum);\n    __syncthreads();", "    product.store(sums, kLeadingSum);",
           GL_MIXER_CUDA, RACE),
    Mutant("hcl_bn", "cpu", "sign forward", "csrc/cpu/hcl_bn_loops.h",
           "d.lanes = w.lanes * k.scale + k.offset - d.lanes;", "d.lanes = w.lanes * k.scale + k.offset + d.lanes;",
           HCL_BN_CPU),
    Mutant("hcl_bn", "cpu", "sign backward", "csrc/cpu/hcl_bn_loops.h",
           "* u_weight + (L(t + begin + x)", "* u_weight - (L(t + begin + x)", HCL_BN_CPU),
    Mutant("hcl_bn", "cpu", "off-by-one row", "csrc/cpu/hcl_bn_loops.h",
           "r < rows; ++r, u += columns.size, t += columns.size) {",
           "r + 1 < rows; ++r, u += columns.size, t += columns.size) {", HCL_BN_CPU),
    Mutant("hcl_bn", "cpu", "unaligned vector", "csrc/cpu/hcl_stage.h",
           "% 16 == 0 && run * sizeof(T) % 16 == 0", "% 16 == 0", HCL_BN_CPU_LARGE,
           "Fatal Python error: Segmentation fault"),
    Mutant("hcl_bn", "cpu", "mean of the gradient left out", "csrc/cpu/hcl_bn_cpu.cpp",
           "for (double& sum : of_g) sum /= count;", "for (double& sum : of_g) sum = 0 * count;", HCL_BN_CPU),
    Mutant("hcl_bn", "cpu", "sums without the pooled terms", "csrc/cpu/hcl_bn_cpu.cpp",
           "sum[c] += pixels * static_cast<double>(level[c]);", "", HCL_BN_CPU),
    Mutant("hcl_bn", "triton", "sign forward", "kernels/_hcl_bn_passes.py",
           "products += d * centred\n", "products -= d * centred\n", (HCL_BN_TRITON, "-k", "test_sums_are_those"),
           "not close"),
    Mutant("hcl_bn", "triton", "sign backward", "kernels/_hcl_bn_passes.py",
           "+ level[None, :]", "- level[None, :]", (HCL_BN_TRITON, "-k", "test_several_programs and channels_last")),
    Mutant("hcl_bn", "triton", "off-by-one row", "kernels/_hcl_bn_statistics.py",
           "tl.minimum(first + length, values)", "tl.minimum(first + length, values - 1)",
           (HCL_BN_TRITON, "-k", "test_parts_hold")),
    Mutant("hcl_bn", "triton", "unaligned vector", "kernels/_hcl_bn_plan.py",
           "vector_length(pixels, itemsize)", "vector_length(length, itemsize)",
           (HCL_BN_TRITON, "-k", "test_parts_hold and nchw")),
    Mutant("hcl_bn", "triton", "biased variance tracked", "kernels/_hcl_bn_statistics.py",
           "inside, unbiased, settings[0]", "inside, variance, settings[0]",
           (HCL_BN_TRITON, "-k", "test_rows_of_other"), "not close"),
    Mutant("hcl_bn", "triton", "rows merged without their means", "kernels/_hcl_bn_statistics.py",
           "squares += centred + of_row * distance * distance", "squares += centred",
           (HCL_BN_TRITON, "-k", "test_rows_of_other"), "not close"),
    Mutant("hcl_bn", "triton", "mean of g left out", "kernels/_hcl_bn_statistics.py",
           "scale * (mean_g + distance * invstd * mean_product)", "scale * (distance * invstd * mean_product)",
           (HCL_BN_TRITON, "-k", "test_means_of_a_group and nchw"), "not close"),
    Mutant("hcl_bn", "triton", "squares about zero", "kernels/_hcl_bn_statistics.py",
           "shift = tl.sum(x, axis=AXIS) /", "shift = 0 * tl.sum(x, axis=AXIS) /",
           (HCL_BN_TRITON, "-k", "test_moments_do_not_lose")),
    Mutant("hcl_bn", "cuda", "sign forward", "csrc/cuda/hcl_bn_kernel.cuh",
           "+ offset.get(c) - teacher.get(v)", "+ offset.get(c) + teacher.get(v)", HCL_BN_CUDA),
    Mutant("hcl_bn", "cuda", "sign backward", "csrc/cuda/hcl_bn_kernel.cuh",
           "u_weight.get(c) * e + (", "u_weight.get(c) * e - (", HCL_BN_CUDA),
    Mutant("hcl_bn", "cuda", "off-by-one row of moments", "csrc/cuda/hcl_bn_statistics.cuh",
           "row < stage.rows; row +=", "row + 1 < stage.rows; row +=", HCL_BN_CUDA),
    Mutant("hcl_bn", "cuda", "off-by-one row past the end", "csrc/cuda/hcl_bn_statistics.cuh",
           "min(stage.share, stage.units - begin);", "min(stage.share, stage.units + 1 - begin);", HCL_BN_CUDA_ASAN,
           "AddressSanitizer"),
    Mutant("hcl_bn", "cuda", "unaligned vector", "csrc/cuda/hcl_bn_plan.h",
           "vectors && width > 1 && aligned(m.u, 16) && (", "vectors && width > 1 && (", HCL_BN_CUDA_MISALIGNED,
           "misaligned address"),
    Mutant("hcl_bn", "cuda", "mean of the gradient left out", "csrc/cuda/hcl_bn_statistics.cuh",
           "scale * (alpha * bias - mean_grad)", "scale * (alpha * bias)", HCL_BN_CUDA),
    Mutant("hcl_bn", "cuda", "rounded mean not corrected", "csrc/cuda/hcl_bn_statistics.cuh",
           "bn.bias.get(channel, 0) - scale * (statistics.mean - shift)", "bn.bias.get(channel, 0)",
           HCL_BN_CUDA_OFFSET),
    Mutant("hcl_bn", "cuda", "batch not counted", "csrc/cuda/hcl_bn_kernel.cuh",
           "++*norm.batches;", ";", HCL_BN_CUDA),
    *without_each("__syncthreads();", "missing barrier", "hcl_bn", "csrc/cuda/hcl_bn_statistics.cuh", HCL_BN_CUDA,
                  RACE),
    *without_each("__syncthreads();", "missing barrier", "hcl_bn", "csrc/cuda/hcl_bn_kernel.cuh", HCL_BN_CUDA, RACE),
    Mutant("cwd", "cpu", "sign forward", "csrc/cpu/cwd_loops.h",
           "difference = t.lanes - s.lanes;", "difference = s.lanes - t.lanes;", CWD_CPU),
    Mutant("cwd", "cpu", "sign backward", "csrc/cpu/cwd_loops.h",
           "factor * (s.lanes - t.lanes);", "factor * (t.lanes - s.lanes);", CWD_CPU),
    Mutant("cwd", "cpu", "off-by-one row", "csrc/cpu/cwd_loops.h",
           "    for (int64_t i = c; i < tile.rows * step; i += step) {\n      s.load(tile.s + i);\n"
           "      t.load(tile.t + i);\n      add_entries",
           "    for (int64_t i = c; i < tile.rows * step - step; i += step) {\n      s.load(tile.s + i);\n"
           "      t.load(tile.t + i);\n      add_entries", CWD_CPU),
    Mutant("cwd", "cpu", "unaligned vector", "csrc/cpu/cwd_cpu.cpp",
           "% 16 == 0 && stage.columns * sizeof(T) % 16 == 0;", "% 16 == 0;", CWD_CPU_LARGE,
           "Fatal Python error: Segmentation fault"),
    Mutant("cwd", "cpu", "zeros beside the last entries", "csrc/cpu/cwd_loops.h",
           "i < count ? from[i] : -std::numeric_limits<T>::infinity();", "i < count ? from[i] : T(0);", CWD_CPU),
    Mutant("cwd", "cpu", "old sums at their old scale", "csrc/cpu/cwd_loops.h",
           "s_sum.lanes *= s_old.lanes;", "", CWD_CPU_WIDE),
    Mutant("cwd", "cpu", "parts merged without their peaks", "csrc/cpu/cwd_loops.h",
           "t.lanes * (cross_part.lanes + t_part.lanes * moved);", "t.lanes * cross_part.lanes;", CWD_CPU_LONG),
    Mutant("cwd", "triton", "sign forward", "kernels/_cwd_numbers.py",
           "e_t * (below_t - below_s)", "e_t * (below_t + below_s)", (CWD_TRITON, "-k", "test_stages_of_all_kinds")),
    Mutant("cwd", "triton", "sign backward", "kernels/cwd.py",
           "cast(scale * (p_s - p_t)", "cast(scale * (p_s + p_t)", CWD_TRITON_PARTS),
    Mutant("cwd", "triton", "off-by-one row", "kernels/cwd.py",
           "tl.minimum(first + steps * STEP, rows)", "tl.minimum(first + steps * STEP, rows - 1)", CWD_TRITON_PARTS),
    Mutant("cwd", "triton", "unaligned vector", "kernels/_cwd_plan.py",
           "vector = _common.vector_length(columns, smallest)", "vector = _common.vector_length(2 * columns, smallest)",
           (CWD_TRITON, "-k", "test_softmaxes_in_many_parts and 2-")),
    Mutant("cwd", "triton", "part lost", "kernels/cwd.py",
           "mask = (part < parts) & inside", "mask = (part < parts - 1) & inside", CWD_TRITON_PARTS),
    Mutant("cwd", "triton", "sign in the merge", "kernels/_cwd_numbers.py",
           "z_t * (below_t - below_s))", "z_t * (below_t + below_s))", CWD_TRITON_PARTS),
    Mutant("cwd", "triton", "infinite difference under a weight of 0", "kernels/_cwd_numbers.py",
           "tl.where(z_t == 0, 0, a * shrink + z_t * (below_t - below_s))", "a * shrink + z_t * (below_t - below_s)",
           (CWD_TRITON, "-k", "test_a_student_beyond")),
    Mutant("cwd", "triton", "32-bit offsets", "kernels/cwd.py",
           "(pid // parts).to(tl.int64) * ROWS", "(pid // parts) * ROWS", (CWD_TRITON, "-k", "test_offsets_go")),
    Mutant("cwd", "cuda", "sign forward", "csrc/cuda/cwd_numbers.cuh",
           "e_t * (below_t - below_s)", "e_t * (below_t + below_s)", CWD_CUDA),
    Mutant("cwd", "cuda", "sign backward", "csrc/cuda/cwd_kernel.cuh",
           "scale * (p_s - p_t)", "scale * (p_s + p_t)", CWD_CUDA),
    Mutant("cwd", "cuda", "old sums at their old scale", "csrc/cuda/cwd_numbers.cuh",
           "a * shrink + z_t", "a + z_t", CWD_CUDA),
    Mutant("cwd", "cuda", "off-by-one row", "csrc/cuda/cwd_kernel.cuh",
           "? begin + length : (", "? begin + length - 1 : (", CWD_CUDA),
    Mutant("cwd", "cuda", "off-by-one row past the end", "csrc/cuda/cwd_kernel.cuh",
           "? begin + length : (", "? begin + length + 1 : (", CWD_CUDA_ASAN, "AddressSanitizer"),
    Mutant("cwd", "cuda", "unaligned vector", "csrc/cuda/cwd_plan.h",
           "v.columns % width == 0 && aligned(v.student, width * size_of(v.student_type)) &&",
           "v.columns % width == 0 &&", CWD_CUDA_MISALIGNED, "misaligned address"),
    *without_each("__syncthreads();", "missing barrier", "cwd", "csrc/cuda/cwd_kernel.cuh", CWD_CUDA, RACE),
    Mutant("seg_ce", "cpu", "sign forward", "csrc/cpu/seg_ce_loops.h",
           "(log.lanes + (highest[r].lanes - picked[r].lanes))", "(log.lanes - (highest[r].lanes - picked[r].lanes))",
           SEG_CE_CPU),
    Mutant("seg_ce", "cpu", "sign backward", "csrc/cpu/seg_ce_loops.h",
           "+ i] -= subtract[i];", "+ i] += subtract[i];", SEG_CE_CPU),
    Mutant("seg_ce", "cpu", "off-by-one row", "csrc/cpu/seg_ce_cpu.cpp",
           "to = vertical.start(row + 1);", "to = vertical.start(row + 1) - 1;", SEG_CE_CPU, "IndexError"),
    Mutant("seg_ce", "cpu", "unaligned vector", "csrc/cpu/seg_ce_cpu.cpp",
           "columns.end - columns.begin, columns.width, sizes.classes", "columns.width, columns.width, sizes.classes",
           SEG_CE_CPU, "IndexError"),
    Mutant("seg_ce", "cpu", "edges of bands left out", "csrc/cpu/seg_ce_cpu.cpp",
           "if (kept != nullptr) Gradients<T>(g, kept, edge.get()).add_edges();", "", SEG_CE_CPU_LARGE),
    Mutant("seg_ce", "triton", "sign forward", "kernels/seg_ce.py",
           "((best - own) + logarithm)", "((best - own) - logarithm)", (SEG_CE_TRITON, "-k", "test_storage_types")),
    Mutant("seg_ce", "triton", "sign backward", "kernels/seg_ce.py",
           "upper += (1 - down) * slope", "upper -= (1 - down) * slope", (SEG_CE_TRITON, "-k", "test_storage_types")),
    Mutant("seg_ce", "triton", "off-by-one row of a strip", "kernels/seg_ce.py",
           "    y = first if DOWN[0] else tl.maximum(first - 1, 0)", "    y = first",
           (SEG_CE_TRITON, "-k", "test_many_programs")),
    Mutant("seg_ce", "triton", "unaligned vector past a label row", "kernels/seg_ce.py",
           "valid = inside & (found >= 0) & (found < classes)", "valid = (found >= 0) & (found < classes)",
           (SEG_CE_TRITON, "-k", "test_storage_types")),
    Mutant("seg_ce", "triton", "left neighbour of the first column", "kernels/seg_ce.py",
           "has_left = inside & (at // step % width > 0)", "has_left = inside & (at >= step)",
           (SEG_CE_TRITON, "-k", "test_only_the_tensors")),
    Mutant("seg_ce", "triton", "last row left out", "kernels/seg_ce.py",
           "        if y == height - 1:", "        if y == height:", (SEG_CE_TRITON, "-k", "test_storage_types")),
    Mutant("seg_ce", "triton", "infinite maximum", "kernels/seg_ce.py",
           'tl.where(best == float("inf"), float("nan"), total), own', "total, own",
           (SEG_CE_TRITON, "-k", "test_what_is_not_finite")),
    Mutant("seg_ce", "triton", "NaN lower than numbers", "kernels/seg_ce.py",
           "better = ((value > best) | (value != value)) & (best == best)", "better = value > best",
           (SEG_CE_TRITON, "-k", "test_the_first_of_equal")),
    Mutant("seg_ce", "triton", "32-bit offsets", "kernels/seg_ce.py",
           "tl.cast(y, tl.int64) * row_stride", "y * row_stride", (SEG_CE_TRITON, "-k", "test_offsets_go")),
    Mutant("seg_ce", "triton", "sign of a clamped fraction", "kernels/_seg_ce_axes.py",
           "tl.maximum(rest, 0).to(dtype)", "rest.to(dtype)", (SEG_CE_TRITON, "-k", "test_storage_types")),
    Mutant("seg_ce", "cuda", "sign", "csrc/cuda/seg_ce_kernel.cuh",
           "slope[i] -= weight;", "slope[i] += weight;", SEG_CE_CUDA),
    Mutant("seg_ce", "cuda", "off-by-one row", "csrc/cuda/seg_ce_tile.cuh",
           "r < launch.tile_rows &&", "r + 1 < launch.tile_rows &&", SEG_CE_CUDA),
    Mutant("seg_ce", "cuda", "halo counted twice", "csrc/cuda/seg_ce_tile.cuh",
           "(row < launch.row_step ||", "(row <= launch.row_step ||",
           (SEG_CE_ON_CPU, "-k", "test_tiles_meet and nchw and True")),
    Mutant("seg_ce", "cuda", "clamped neighbour", "csrc/cuda/seg_ce_tile.cuh",
           "source < 0 ? 1 : source", "source < 0 ? 0 : source", (SEG_CE_ON_CPU, "-k", "test_nan_and_inf")),
    Mutant("seg_ce", "cuda", "unaligned vector", "csrc/cuda/seg_ce_plan.h",
           "aligned(kept) && aligned(gradient)", "aligned(kept, 4) && aligned(gradient, 4)", SEG_CE_CUDA_ELEMENTS,
           "misaligned address"),
    *without_each("__syncthreads();", "missing barrier", "seg_ce", "csrc/cuda/seg_ce_kernel.cuh", SEG_CE_CUDA_TSAN,
                  "AssertionError"),
]  # fmt: skip
