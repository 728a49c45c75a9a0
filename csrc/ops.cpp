// The schemas of all raw ops. They are private: transkd_fast/ops/ checks the arguments, calls the raw ops and connects
// their gradients to autograd.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(transkd_fast, m) {
  m.def("hcl_fwd(Tensor[] students, Tensor[] teachers, float[] weights) -> (Tensor loss, Tensor[] tables)");
  m.def("hcl_bwd(Tensor grad, Tensor[] students, Tensor[] teachers, Tensor[] tables, float[] weights) -> Tensor[]");
  m.def("cuda_selftest(Tensor x) -> Tensor");
}
