// The Python module transkd_fast._C_cuda; see ../module.cpp.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include "build_config.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["torch"] = TRANSKD_BUILD_TORCH;
  info["cuda_toolkit"] = CUDART_VERSION;
  info["archs"] = TRANSKD_BUILD_CUDA_ARCHS;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m) { m.def("build_info", &build_info, "What was built: torch, CUDA toolkit, architectures."); }
