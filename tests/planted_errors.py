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
    Mutant("hcl", "cpu", "unaligned vector", "csrc/cpu/hcl_cpu.cpp",
           "% 16 == 0 && run * sizeof(T) % 16 == 0", "% 16 == 0", HCL_CPU_LARGE,
           "Fatal Python error: Segmentation fault"),
    Mutant("hcl", "triton", "sign forward", "kernels/hcl.py",
           "    return s - t\n", "    return s + t\n", HCL_TRITON),
    Mutant("hcl", "triton", "sign backward", "kernels/hcl.py",
           "alpha * d + level[None, :]", "alpha * d - level[None, :]", HCL_TRITON),
    Mutant("hcl", "triton", "off-by-one row", "kernels/hcl.py",
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
    Mutant("csf", "cpu", "biased variance tracked", "csrc/common/csf_attention.h",
           "variance * (count / (count - 1))", "variance", CSF_CPU),
    Mutant("csf", "cpu", "cumulative average over the batches before", "csrc/common/csf_attention.h",
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
]  # fmt: skip
