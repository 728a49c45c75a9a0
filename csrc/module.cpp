// The Python module transkd_fast._C. Importing it runs the op registrations of every other file of the extension; what
// it offers itself is the record of the build.
#include <pybind11/pybind11.h>

#include "build_config.h"
#include "cpu/common/clones.h"

namespace py = pybind11;

namespace {

const char* running_instruction_set() {
#ifdef TRANSKD_HAS_CLONES
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3";
#endif
  return "default";
}

py::dict build_info() {
  py::dict info;
  info["torch"] = TRANSKD_BUILD_TORCH;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  info["instruction_sets"] = TRANSKD_CLONE_NAMES;
  info["instruction_set_here"] = running_instruction_set();
  info["cuda"] = TRANSKD_BUILD_CUDA_STATE;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) { m.def("build_info", &build_info, "What was built: torch, compiler, instruction sets, CUDA."); }
