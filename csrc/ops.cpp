// The schemas of all raw ops. They are private: transkd_fast/ops/ checks the arguments, calls the raw ops and connects
// their gradients to autograd.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(transkd_fast, m) {
  m.def(
      "hcl_fwd(Tensor[] students, Tensor[] teachers, float[] weights, float[] level_weights)"
      " -> (Tensor loss, Tensor[] tables)");
  m.def(
      "hcl_bwd(Tensor grad, Tensor[] students, Tensor[] teachers, Tensor[] tables, float[] weights,"
      " float[] level_weights) -> Tensor[]");
  m.def("hcl_bn_reduce(Tensor[] us, int[] parts) -> Tensor[]");
  m.def(
      "hcl_bn_fwd(Tensor[] us, Tensor[] teachers, Tensor[] moments, Tensor?[] affine, Tensor(a!)[] running,"
      " Tensor(b!)[] batches, int[] norms, float[] momenta, float[] eps, float[] weights, float[] level_weights)"
      " -> (Tensor loss, Tensor tables, Tensor states, Tensor sums)");
  m.def(
      "hcl_bn_bwd(Tensor grad, Tensor[] us, Tensor[] teachers, Tensor[] tables, Tensor[] states, Tensor[] sums,"
      " Tensor[] means, Tensor?[] affine, int[] norms, float[] weights, float[] level_weights, bool[] wanted)"
      " -> Tensor[]");
  m.def("csf_reduce(Tensor z, Tensor y, int parts) -> Tensor");
  m.def(
      "csf_fuse(Tensor z, Tensor y, Tensor sums, int first, Tensor?[] parameters, Tensor(a!)? running_mean,"
      " Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, Tensor(d!)? fc_running_mean,"
      " Tensor(e!)? fc_running_var, Tensor(f!)? fc_num_batches_tracked, int norm, float? momentum, float eps,"
      " int fc_norm, float? fc_momentum, float fc_eps) -> (Tensor v, Tensor state)");
  m.def("csf_bwd_reduce(Tensor grad, Tensor z, Tensor y, Tensor state, int parts) -> Tensor");
  m.def(
      "csf_bwd_apply(Tensor grad, Tensor z, Tensor y, Tensor sums, Tensor state, int first, Tensor?[] parameters,"
      " int norm, int fc_norm, bool[] wanted) -> Tensor[]");
  m.def(
      "pea_fwd(Tensor[] xs, Tensor[] weights, Tensor[] biases, Tensor[] targets, Tensor[] assistants,"
      " Tensor[] projection_scales, Tensor[] assistant_scales, float[] stage_weights, bool[] wanted, bool tf32)"
      " -> (Tensor loss, Tensor factors, Tensor[] kept)");
  m.def("pea_bwd(Tensor grad, Tensor factors, Tensor[] kept, int[] dtypes) -> Tensor[]");
  m.def(
      "gl_mixer_fwd(Tensor e, Tensor u, Tensor conv_a_weight, Tensor conv_a_bias, Tensor conv_b_weight,"
      " Tensor conv_b_bias, Tensor attention_weight, Tensor conv_weight, bool residual, bool keep, bool tf32)"
      " -> (Tensor out, Tensor branches)");
  m.def(
      "gl_mixer_bwd(Tensor grad, Tensor e, Tensor u, Tensor branches, Tensor conv_a_weight, Tensor conv_a_bias,"
      " Tensor conv_b_weight, Tensor conv_b_bias, Tensor attention_weight, Tensor conv_weight, bool residual,"
      " bool[] wanted, bool tf32) -> Tensor[]");
  m.def(
      "cwd_fwd(Tensor[] students, Tensor[] teachers, int[] dims, float[] weights, float temperature)"
      " -> (Tensor loss, Tensor[] statistics)");
  m.def(
      "cwd_bwd(Tensor grad, Tensor[] students, Tensor[] teachers, Tensor[] statistics, int[] dims, float[] weights,"
      " float temperature) -> Tensor[]");
  m.def(
      "seg_ce_fwd(Tensor logits, Tensor labels, Tensor? weight, int ignore_index, bool keep)"
      " -> (Tensor loss, Tensor counts, Tensor total, Tensor kept)");
  m.def("seg_ce_bwd(Tensor grad, Tensor total, Tensor kept, int dtype) -> Tensor");
  m.def("seg_ce_predict(Tensor logits, int height, int width) -> Tensor");
  m.def("cuda_selftest(Tensor x) -> Tensor");
}
