// Runs csrc/cuda/gl_mixer_kernel.cuh as csrc/cuda/gl_mixer_cuda.cu does, forward and backward, outputs and workspace
// full of NaNs. In: e, u, grad; conv_a_weight, conv_a_bias, conv_b_weight, conv_b_bias, attention_weight, conv_weight;
// residual, tf32; wanted, a flag per gradient, in the order of gl_mixer_contract.h; keep, blocks, least_rows, vectors
// (see gl_mixer::Tuning). GL_MIXER_FEW_TYPES leaves types out: sanitizers make compiling slow.
#include "shim/cuda.h"
// The shim goes first.
#include "archive.h"
#include "cuda/gl_mixer_kernel.cuh"
#include "storage.h"

namespace {

using cuda_on_cpu::Archive;
using cuda_on_cpu::Array;
using cuda_on_cpu::Results;
using cuda_on_cpu::Type;
using cuda_on_cpu::type_of;
using transkd::StorageType;
using transkd::TypeTag;
using namespace transkd::gl_mixer;

Values values_of(const Array& array) { return {array.data(), type_of(array)}; }

Tuning tuning_of(const Archive& in) {
  Tuning tuning;
  if (in.has("blocks")) tuning.blocks = in.integer("blocks");
  if (in.has("least_rows")) tuning.least_rows = in.integer("least_rows");
  if (in.has("vectors")) tuning.vectors = in.integer("vectors") != 0;
  return tuning;
}

Call describe(const Archive& in) {
  const auto& shape = in.array("e").shape();
  Call call{};
  call.batch = shape[0];
  call.tokens = shape[1];
  call.channels = shape[2];
  call.residual = in.integer("residual") != 0;
  call.type = type_of(in.array("e"));
  call.u = values_of(in.array("u"));
  call.weight[0] = values_of(in.array("conv_a_weight"));
  call.weight[1] = values_of(in.array("conv_b_weight"));
  call.bias[0] = values_of(in.array("conv_a_bias"));
  call.bias[1] = values_of(in.array("conv_b_bias"));
  call.attention_weight = values_of(in.array("attention_weight"));
  call.conv_weight = values_of(in.array("conv_weight"));
  call.e = in.array("e").data();
  return call;
}

template <class Visit>
void visit_here(const Pass& pass, bool tf32, Visit visit) {
#ifdef GL_MIXER_FEW_TYPES
  const auto choose = [&](auto type) {
    pass.vectors ? visit(type, std::true_type(), std::false_type()) : visit(type, std::false_type(), std::false_type());
  };
  if (pass.call.type == StorageType::kFloat && !tf32) return choose(TypeTag<float>());
  if (pass.call.type == StorageType::kBFloat16) return choose(TypeTag<__nv_bfloat16>());
  throw std::runtime_error("this type was left out of this driver");
#else
  visit_products(pass, tf32, visit);
#endif
}

void run_backward(const Plan& plan, bool tf32) {
  const Pass& pass = plan.pass();
  if (plan.gate_blocks() > 0) {
    visit_here(pass, false, [&](auto type, auto vectors, auto) {
      using E = typename decltype(type)::type;
      cuda_on_cpu::launch(dim3(plan.gate_blocks()), dim3(kGateThreads), 0,
                          [&] { gl_mixer_gate_kernel<E, decltype(vectors)::value>(pass); });
    });
  }
  if (plan.gradient_blocks() > 0) {
    visit_here(pass, tf32, [&](auto type, auto vectors, auto tensor_cores) {
      using E = typename decltype(type)::type;
      cuda_on_cpu::launch(dim3(plan.gradient_blocks()), dim3(gradient_threads(sizeof(E))), 0, [&] {
        gl_mixer_gradients_kernel<E, decltype(vectors)::value, decltype(tensor_cores)::value>(pass);
      });
    });
  }
  if (plan.merge_blocks() > 0) {
    visit_merge(plan.merge(), [&](auto type, auto vectors) {
      using T = typename decltype(type)::type;
      cuda_on_cpu::launch(dim3(plan.merge_blocks()), dim3(kMergeThreads), 0,
                          [&] { gl_mixer_merge_kernel<T, decltype(vectors)::value>(plan.merge()); });
    });
  }
}

}  // namespace

void cuda_on_cpu::drive(const Archive& in, Results& out) {
  const Array& e = in.array("e");
  const auto& shape = e.shape();
  const Type sum_type = e.type() == Type::f64 ? Type::f64 : Type::f32;
  const bool tf32 = in.integer("tf32") != 0, keep = in.integer("keep") != 0;
  Call call = describe(in);
  Array mixed(e.type(), shape), branches(sum_type, {shape[0], shape[1], 2, shape[2]});
  call.out = mixed.data();
  if (keep) call.branches = branches.data();
  const Plan forward(call, tuning_of(in));
  visit_here(forward.pass(), tf32, [&](auto type, auto vectors, auto tensor_cores) {
    using E = typename decltype(type)::type;
    cuda_on_cpu::launch(dim3(forward.forward_blocks()), dim3(kForwardThreads), 0, [&] {
      gl_mixer_forward_kernel<E, decltype(vectors)::value, decltype(tensor_cores)::value>(forward.pass());
    });
  });
  int64_t launches = 1;
  out.add("out", std::move(mixed));
  out.add("forward_vectors", static_cast<int64_t>(forward.pass().vectors));
  if (keep) {
    const char* const names[] = {
        "e", "u", "conv_a_weight", "conv_a_bias", "conv_b_weight", "conv_b_bias", "attention_weight", "conv_weight"};
    const std::vector<int64_t> wanted = in.integers("wanted");
    call = describe(in);
    call.grad = in.array("grad").data();
    call.branches = branches.data();
    void** const places[] = {
        &call.e_gradient,         &call.u_gradient,       &call.weight_gradient[0],        &call.bias_gradient[0],
        &call.weight_gradient[1], &call.bias_gradient[1], &call.attention_weight_gradient, &call.conv_weight_gradient};
    std::vector<std::pair<std::string, Array>> gradients;
    for (int k = 0; k < 8; ++k) {
      if (wanted[k] == 0) continue;
      const Array& like = in.array(names[k]);
      gradients.emplace_back(std::string(names[k]) + "_gradient", Array(like.type(), like.shape()));
      *places[k] = gradients.back().second.data();
    }
    Plan backward(call, tuning_of(in));
    Array workspace(Type::u8, {backward.workspace_bytes()});
    backward.bind(workspace.data());
    run_backward(backward, tf32);
    launches += (backward.gate_blocks() > 0) + (backward.gradient_blocks() > 0) + (backward.merge_blocks() > 0);
    for (auto& [name, gradient] : gradients) out.add(name, std::move(gradient));
    out.add("branches", std::move(branches));
    out.add("backward_vectors", static_cast<int64_t>(backward.pass().vectors));
    out.add("parts", static_cast<int64_t>(backward.pass().weight_parts_count));
    out.add("gate_parts", static_cast<int64_t>(backward.pass().gate_parts));
  }
  out.add("launches", launches);
}
