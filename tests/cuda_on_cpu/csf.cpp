// Runs csrc/cuda/csf_kernel.cuh as csrc/cuda/csf_cuda.cu does, forward and backward, outputs and workspaces full of
// NaNs. In: z, y, grad; parameter<k> for k of csf_contract.h's Parameter, those that are given; running_mean,
// running_var, batches and fc_running_mean, fc_running_var, fc_batches, where there are any; norm, fc_norm, eps,
// fc_eps; momentum, fc_momentum, or none for the cumulative average; parts; wanted, a flag per gradient; threads, run,
// vectors (see csf::Tuning). For a batch that is a part of a larger one: first, and sums and backward_sums of all its
// samples. CSF_FEW_TYPES leaves types out: sanitizers make compiling slow.
#include "shim/cuda.h"
// The shim goes first.
#include "archive.h"
#include "cuda/csf_kernel.cuh"
#include "storage.h"

namespace transkd {
namespace csf {
CUDA_ON_CPU_DYNAMIC_SHARED(uint4, stage_memory);
}  // namespace csf
}  // namespace transkd

namespace {

using cuda_on_cpu::Archive;
using cuda_on_cpu::Array;
using cuda_on_cpu::Results;
using cuda_on_cpu::Type;
using cuda_on_cpu::type_of;
using transkd::BatchNorm;
using transkd::Norm;
using transkd::StorageType;
using transkd::Values;
using namespace transkd::csf;

constexpr int kParameters = 9;

Values values_of(const Archive& in, const std::string& name) {
  if (!in.has(name)) return {};
  return {in.array(name).data(), type_of(in.array(name))};
}

bool is_channels_last(const Array& map) {
  const auto &shape = map.shape(), &strides = map.strides();
  return shape[1] > 1 && shape[2] * shape[3] > 1 && strides[1] == 1;
}

template <class T, class Visit>
void visit_kernel(const Variant& variant, Visit visit) {
#ifdef CSF_FEW_TYPES
  const auto visit_layouts = [&](auto type) {
    const auto choose = [&](auto vector) {
      variant.channels_last ? visit(type, vector, std::true_type()) : visit(type, vector, std::false_type());
    };
    variant.vector ? choose(std::true_type()) : choose(std::false_type());
  };
  if (variant.type == StorageType::kFloat) return visit_layouts(transkd::TypeTag<float>());
  if (variant.type == StorageType::kBFloat16) return visit_layouts(transkd::TypeTag<__nv_bfloat16>());
  throw std::runtime_error("this type was left out of this driver");
#else
  visit_instance<T>(variant, visit);
#endif
}

// Kernel::run<Z, vector, channels_last>(pass) runs a thread.
template <class Kernel, class T>
void launch(const Step<T>& step) {
  visit_kernel<T>(step.variant, [&](auto type, auto vector, auto channels_last) {
    using Z = typename decltype(type)::type;
    cuda_on_cpu::launch(dim3(step.blocks), dim3(step.threads), 0, [&] {
      Kernel::template run<Z, decltype(vector)::value, decltype(channels_last)::value>(step.pass);
    });
  });
}

#define KERNEL(name)                                             \
  struct name {                                                  \
    template <class Z, bool kVector, bool kChannelsLast>         \
    static void run(const Pass<transkd::ComputeType<Z>>& pass) { \
      csf_##name##_kernel<Z, kVector, kChannelsLast>(pass);      \
    }                                                            \
  };
KERNEL(reduce)
KERNEL(fuse)
KERNEL(backward_reduce)
KERNEL(apply)
#undef KERNEL

Tuning tuning_of(const Archive& in) {
  Tuning tuning;
  if (in.has("threads")) {
    tuning.threads = tuning.channels_last_reduce_threads = tuning.attention_threads = in.integer("threads");
  }
  if (in.has("run")) tuning.run = in.integer("run");
  if (in.has("vectors")) tuning.vectors = in.integer("vectors") != 0;
  return tuning;
}

BatchNorm batch_norm_of(const Archive& in, const std::string& prefix, int weight) {
  BatchNorm bn{};
  bn.norm = static_cast<Norm>(in.integer(prefix + "norm"));
  bn.weight = values_of(in, "parameter" + std::to_string(weight));
  bn.bias = values_of(in, "parameter" + std::to_string(weight + 1));
  bn.running_mean = values_of(in, prefix + "running_mean");
  bn.running_var = values_of(in, prefix + "running_var");
  if (in.has(prefix + "batches")) bn.batches = in.array(prefix + "batches").as<int64_t>();
  bn.eps = in.real(prefix + "eps");
  bn.cumulative = !in.has(prefix + "momentum");
  if (!bn.cumulative) bn.momentum = in.real(prefix + "momentum");
  return bn;
}

Layers layers_of(const Values (&parameters)[kParameters]) {
  return {parameters[2], {parameters[5], parameters[7]}, {parameters[6], parameters[8]}};
}

Array copy_of(const Array& array) {
  Array copy = Array::like(array);
  std::memcpy(copy.data(), array.data(), array.bytes());
  return copy;
}

template <class T>
void run(const Archive& in, Results& out, Type type) {
  const Array &z = in.array("z"), &y = in.array("y"), &grad = in.array("grad");
  const auto &shape = z.shape(), &coarse = y.shape();
  const int64_t batch = shape[0], channels = shape[1], parts = in.integer("parts");
  const Maps maps{batch,      channels,   shape[2], shape[3], coarse[2], coarse[3], is_channels_last(z),
                  type_of(z), type_of(y), z.data(), y.data(), nullptr,   nullptr,   nullptr};
  const Tuning tuning = tuning_of(in);

  Array sums(Type::f64, {batch, parts, 3, channels});
  const Step<T> reduced = Plan<T>(maps, tuning).reduce(parts, sums.as<double>());
  launch<reduce>(reduced);
  const Array& all = in.has("sums") ? in.array("sums") : sums;

  BackwardCall call{};
  call.sizes = {all.shape()[0], in.has("first") ? in.integer("first") : 0, batch,
                channels,       in.array("parameter2").shape()[0],         shape[2] * shape[3]};
  call.bn = batch_norm_of(in, "", 0);
  call.fc_bn = batch_norm_of(in, "fc_", 3);
  Values parameters[kParameters];
  for (int k = 0; k < kParameters; ++k) parameters[k] = values_of(in, "parameter" + std::to_string(k));
  call.layers = layers_of(parameters);
  call.sums = all.as<double>();
  call.parts = all.shape()[1];
  Array state(Type::f64, {State::size(call.sizes)}), v = Array::like(z);
  call.state = state.as<double>();
  Array table(type, {Coefficients<T>::kRows, batch, channels});
  const Coefficients<T> coefficients(table.as<T>(), call.sizes);
  const dim3 attention_threads(tuning.attention_threads);
  cuda_on_cpu::launch(dim3(1), attention_threads, kStageBytes, [&] { csf_attention_kernel<T>(call, coefficients); });
  Maps fused_maps = maps;
  fused_maps.out = v.data();
  const Step<T> fused = Plan<T>(fused_maps, tuning).fuse(coefficients);
  launch<fuse>(fused);

  Maps backward_maps = maps;
  backward_maps.grad = grad.data();
  Array backward_sums(Type::f64, {batch, parts, 3, channels});
  const Step<T> backward_reduced = Plan<T>(backward_maps, tuning).reduce(parts, backward_sums.as<double>(), call.state);
  launch<backward_reduce>(backward_reduced);

  const Array& all_backward = in.has("backward_sums") ? in.array("backward_sums") : backward_sums;
  const std::vector<int64_t> wanted = in.integers("wanted");
  std::vector<std::pair<std::string, Array>> gradients;
  const auto gradient_of = [&](int k, const char* name, const Array& like) -> void* {
    if (!wanted[k]) return nullptr;
    gradients.emplace_back(name, Array::like(like));
    return gradients.back().second.data();
  };
  backward_maps.out = gradient_of(0, "z_gradient", z);
  backward_maps.y_gradient = gradient_of(1, "y_gradient", y);
  Values of[kParameters];
  for (int k = 0; k < kParameters; ++k) {
    const std::string name = "parameter" + std::to_string(k);
    if (in.has(name)) of[k] = {gradient_of(2 + k, (name + "_gradient").c_str(), in.array(name)), parameters[k].type};
  }
  call.bn_gradients = {of[0], of[1]};
  call.fc_bn_gradients = {of[3], of[4]};
  call.gradients = layers_of(of);
  call.sums = all_backward.as<double>();
  call.parts = all_backward.shape()[1];
  Array scratch(Type::f64, {Scratch::size(call.sizes)}), backward_table(type, table.shape());
  call.scratch = scratch.as<double>();
  const Coefficients<T> of_backward(backward_table.as<T>(), call.sizes);
  if (backward_maps.out == nullptr || !of_batch(call.bn.norm)) backward_maps.z = nullptr;
  const Step<T> applied = Plan<T>(backward_maps, tuning).apply(of_backward);
  cuda_on_cpu::launch(dim3(1), attention_threads, kStageBytes,
                      [&] { csf_attention_backward_kernel<T>(call, of_backward); });
  if (backward_maps.out != nullptr || backward_maps.y_gradient != nullptr) launch<apply>(applied);

  Array vector(Type::i64, {4});
  vector.as<int64_t>()[0] = reduced.variant.vector;
  vector.as<int64_t>()[1] = fused.variant.vector;
  vector.as<int64_t>()[2] = backward_reduced.variant.vector;
  vector.as<int64_t>()[3] = applied.variant.vector;
  out.add("vector", std::move(vector));
  for (const char* name : {"running_mean", "running_var", "batches"}) {
    for (const std::string prefix : {"", "fc_"}) {
      if (in.has(prefix + name)) out.add(prefix + name, copy_of(in.array(prefix + name)));
    }
  }
  for (auto& [name, gradient] : gradients) out.add(name, std::move(gradient));
  out.add("sums", std::move(sums));
  out.add("backward_sums", std::move(backward_sums));
  out.add("state", std::move(state));
  out.add("v", std::move(v));
}

}  // namespace

void cuda_on_cpu::drive(const Archive& in, Results& out) {
#ifndef CSF_FEW_TYPES
  if (in.array("z").type() == Type::f64) return run<double>(in, out, Type::f64);
#endif
  run<float>(in, out, Type::f32);
}
