// Runs the kernels of csrc/cuda/hcl_bn_kernel.cuh as csrc/cuda/hcl_bn_cuda.cu does: moments, loss, tables, states,
// sums, running statistics, and gradients of u and of the parameters. In, for every stage m: u<m>, teacher<m>;
// weight<m>, bias<m>, running_mean<m>, running_var<m>, batches<m> where the stage has them; moments<m> and means<m>
// where a group of processes gives them. For all stages: norms, momenta, eps, parts, weights, level_weights, wanted;
// upstream; blocks, least_elements, most_elements, vectors (see hcl::Tuning). HCL_BN_FEW_TYPES leaves all types but
// float out: sanitizers make compiling slow.
#include "shim/cuda.h"
// The shim goes first.
#include "archive.h"
#include "cuda/hcl_bn_kernel.cuh"
#include "storage.h"

namespace transkd {
namespace hcl_bn {
CUDA_ON_CPU_DYNAMIC_SHARED(uint4, shared_memory);
}  // namespace hcl_bn
}  // namespace transkd

namespace {

using cuda_on_cpu::Archive;
using cuda_on_cpu::Array;
using cuda_on_cpu::launch;
using cuda_on_cpu::Results;
using cuda_on_cpu::Type;
using transkd::Norm;
using transkd::TypeTag;
using transkd::Values;
using namespace transkd::hcl_bn;

Tuning tuning_of(const Archive& in) {
  Tuning tuning;
  if (in.has("blocks")) tuning.blocks = in.integer("blocks");
  if (in.has("least_elements")) tuning.least_elements = in.integer("least_elements");
  if (in.has("vectors")) tuning.vectors = in.integer("vectors") != 0;
  return tuning;
}

Array copy_of(const Array& array) {
  Array copy(array.type(), array.shape());
  std::memcpy(copy.data(), array.data(), array.bytes());
  return copy;
}

// One stage: what the launcher allocates, and what the kernels change.
struct Stage {
  const Array& u;
  Array moments, table, state, sums, gradient;
  std::vector<Array> small;  // owns what the two below refer to
  int64_t rows;
  Maps maps{};

  Stage(const Archive& in, size_t m, Type compute)
      : u(in.array("u" + std::to_string(m))),
        moments(moments_of(in, m, u)),
        table(compute, {batch(), transkd::Pyramid(u.shape()[2], u.shape()[3]).cells(), channels()}),
        state(Type::f64, {2, channels()}),
        sums(Type::f64, {batch(), 2, channels()}),
        gradient(Array::like(u)),
        rows(moments.shape()[0]) {
    const std::string number = std::to_string(m);
    const Array& teacher = in.array("teacher" + number);
    maps.batch = batch();
    maps.channels = channels();
    maps.height = u.shape()[2];
    maps.width = u.shape()[3];
    maps.channels_last = channels() > 1 && pixels() > 1 && u.strides()[1] == 1;
    maps.student_type = cuda_on_cpu::type_of(u);
    maps.teacher_type = cuda_on_cpu::type_of(teacher);
    maps.weight = in.reals("weights")[m];
    maps.student = u.data();
    maps.teacher = teacher.data();
    maps.table = table.data();
    maps.bn.norm = static_cast<Norm>(in.integers("norms")[m]);
    maps.bn.eps = in.reals("eps")[m];
    maps.bn.momentum = in.reals("momenta")[m];
    maps.bn.cumulative = maps.bn.momentum < 0;
    const auto values = [&](const char* name) {
      if (!in.has(name + number)) return Values{};
      small.push_back(copy_of(in.array(name + number)));
      return Values{small.back().data(), cuda_on_cpu::type_of(small.back())};
    };
    maps.bn.weight = values("weight");
    maps.bn.bias = values("bias");
    maps.bn.running_mean = values("running_mean");
    maps.bn.running_var = values("running_var");
    if (in.has("batches" + number)) {
      small.push_back(copy_of(in.array("batches" + number)));
      maps.bn.batches = small.back().as<int64_t>();
    }
    maps.moments = moments.as<double>();
    maps.rows = rows;
    maps.state = state.as<double>();
    maps.sums = sums.as<double>();
    if (in.has("means" + number)) maps.means = in.array("means" + number).as<double>();
  }

  int64_t batch() const { return u.shape()[0]; }
  int64_t channels() const { return u.shape()[1]; }
  int64_t pixels() const { return u.shape()[2] * u.shape()[3]; }

  // No rows where running statistics normalise.
  static Array moments_of(const Archive& in, size_t m, const Array& u) {
    if (in.has("moments" + std::to_string(m))) return copy_of(in.array("moments" + std::to_string(m)));
    const bool of_batch = transkd::of_batch(static_cast<Norm>(in.integers("norms")[m]));
    return Array(Type::f64, {of_batch ? in.integers("parts")[m] : 0, 3, u.shape()[1]});
  }
};

// The types that this driver has kernels for, of those that the launcher chooses from.
template <class A, class B>
constexpr bool built() {
#ifdef HCL_BN_FEW_TYPES
  return std::is_same_v<A, float> && std::is_same_v<B, float>;
#else
  return std::is_same_v<A, B> ? !std::is_same_v<A, __nv_bfloat16>
                              : std::is_same_v<A, __nv_bfloat16> && std::is_same_v<B, float>;
#endif
}

template <class T, class Visit>
void visit_kernel(const Variant& variant, Visit visit) {
  visit_maps_instance<T>(variant, [&](auto u, auto teacher, auto width, auto channels_last) {
    if constexpr (built<typename decltype(u)::type, typename decltype(teacher)::type>()) {
      visit(u, teacher, width, channels_last);
    } else {
      throw std::runtime_error("these types were left out of this driver");
    }
  });
}

template <class T>
void reduce(const Archive& in, std::vector<Stage>& stages) {
  std::vector<ReduceMap> maps;
  for (size_t m = 0; m < stages.size(); ++m) {
    Stage& stage = stages[m];
    if (!transkd::of_batch(stage.maps.bn.norm) || in.has("moments" + std::to_string(m))) continue;
    maps.push_back({stage.batch(), stage.channels(), stage.pixels(), stage.maps.channels_last, stage.maps.student_type,
                    stage.u.data(), stage.rows, stage.moments.as<double>()});
  }
  for (const ReduceStep& step : plan_reduce(maps, tuning_of(in).vectors)) {
    visit_reduce_instance<T>(step.variant, [&](auto type, auto vector, auto channels_last) {
      using S = typename decltype(type)::type;
      if constexpr (built<S, S>() || built<S, float>()) {
        launch(dim3(step.blocks), dim3(kThreads), 0,
               [&] { hcl_bn_reduce_kernel<S, decltype(vector)::value, decltype(channels_last)::value>(step.launch); });
      }
    });
  }
}

// One row per stage, in the order of the launches; the columns are CUTTING in test_cuda_on_cpu_hcl_bn.py.
template <class T>
Array cutting_of(const ForwardPlan<T>& plan, size_t stages) {
  constexpr int64_t kColumns = 5;
  Array cutting(Type::i64, {static_cast<int64_t>(stages), kColumns});
  int64_t* row = cutting.as<int64_t>();
  for (const auto& step : plan.steps()) {
    for (uint32_t m = 0; m < step.launch.maps.stages; ++m, row += kColumns) {
      const auto& stage = step.launch.maps.stage[m];
      const int64_t values[kColumns] = {static_cast<int64_t>(step.shared_bytes), step.variant.vector, stage.cell_parts,
                                        stage.strips, stage.cuts};
      std::copy(values, values + kColumns, row);
    }
  }
  return cutting;
}

template <class T>
void forward(const Archive& in, const std::vector<Maps>& maps, Array& loss, Results& out) {
  ForwardPlan<T> plan(maps, in.reals("level_weights"), tuning_of(in));
  Array workspace(Type::u8, {static_cast<int64_t>(plan.workspace_bytes())});
  plan.bind(workspace.data(), loss.data());
  for (const auto& statistics : plan.statistics()) {
    launch(dim3(statistics.blocks), dim3(kThreads), 0, [&] { hcl_bn_statistics_kernel<T>(statistics); });
  }
  for (const auto& step : plan.steps()) {
    visit_kernel<T>(step.variant, [&](auto u, auto teacher, auto width, auto channels_last) {
      using A = typename decltype(u)::type;
      using B = typename decltype(teacher)::type;
      launch(dim3(step.blocks), dim3(kThreads), step.shared_bytes,
             [&] { hcl_bn_forward_kernel<A, B, decltype(width)::value, decltype(channels_last)::value>(step.launch); });
    });
  }
  out.add("cutting", cutting_of(plan, maps.size()));
}

template <class T>
void backward(const Archive& in, const std::vector<Maps>& maps, const Array& upstream) {
  BackwardPlan<T> plan(maps, in.reals("level_weights"), tuning_of(in));
  Array workspace(Type::u8, {static_cast<int64_t>(plan.workspace_bytes())});
  plan.bind(workspace.data(), upstream.data());
  for (const auto& coefficients : plan.coefficients()) {
    launch(dim3(coefficients.blocks), dim3(kThreads), 0, [&] { hcl_bn_coefficients_kernel<T>(coefficients); });
  }
  for (const auto& step : plan.steps()) {
    visit_kernel<T>(step.variant, [&](auto u, auto teacher, auto width, auto channels_last) {
      using A = typename decltype(u)::type;
      using B = typename decltype(teacher)::type;
      launch(dim3(step.blocks), dim3(kThreads), 0, [&] {
        hcl_bn_backward_kernel<A, B, decltype(width)::value, decltype(channels_last)::value>(step.launch);
      });
    });
  }
}

std::vector<Maps> maps_of(const std::vector<Stage>& stages) {
  std::vector<Maps> maps;
  for (const Stage& stage : stages) maps.push_back(stage.maps);
  return maps;
}

template <class T>
void run(const Archive& in, Results& out, Type compute) {
  std::vector<Stage> stages;
  stages.reserve(in.reals("weights").size());
  for (size_t m = 0; m < in.reals("weights").size(); ++m) stages.emplace_back(in, m, compute);
  reduce<T>(in, stages);
  Array loss(compute, {}), upstream(compute, {});
  *upstream.as<T>() = static_cast<T>(in.real("upstream"));
  forward<T>(in, maps_of(stages), loss, out);

  const std::vector<int64_t> wanted = in.integers("wanted");
  std::vector<Maps> maps = maps_of(stages);
  const auto add = [&](const char* name, size_t m, Array array) {
    out.add(name + std::to_string(m), std::move(array));
  };
  std::vector<Array> of_weight, of_bias;
  for (size_t m = 0; m < maps.size(); ++m) {
    const auto gradient = [&](std::vector<Array>& into, const char* name, bool want) {
      if (!want) {
        into.emplace_back(compute, std::vector<int64_t>{0});
        return Values{};
      }
      into.push_back(Array::like(in.array(name + std::to_string(m))));
      return Values{into.back().data(), cuda_on_cpu::type_of(into.back())};
    };
    if (wanted[3 * m] != 0) maps[m].gradient = stages[m].gradient.data();
    maps[m].weight_gradient = gradient(of_weight, "weight", wanted[3 * m + 1] != 0);
    maps[m].bias_gradient = gradient(of_bias, "bias", wanted[3 * m + 2] != 0);
  }
  backward<T>(in, maps, upstream);
  for (size_t m = 0; m < stages.size(); ++m) {
    Stage& stage = stages[m];
    if (wanted[3 * m + 1] != 0) add("dweight", m, std::move(of_weight[m]));
    if (wanted[3 * m + 2] != 0) add("dbias", m, std::move(of_bias[m]));
    if (wanted[3 * m] != 0) add("du", m, std::move(stage.gradient));
    const auto find = [&](const void* data) -> Array& {
      return *std::find_if(stage.small.begin(), stage.small.end(), [&](Array& array) { return array.data() == data; });
    };
    const transkd::BatchNorm& bn = stage.maps.bn;
    if (bn.running_mean.given()) add("running_mean", m, copy_of(find(bn.running_mean.data)));
    if (bn.running_var.given()) add("running_var", m, copy_of(find(bn.running_var.data)));
    if (bn.batches != nullptr) add("batches", m, copy_of(find(bn.batches)));
    add("moments", m, std::move(stage.moments));
    add("table", m, std::move(stage.table));
    add("state", m, std::move(stage.state));
    add("sums", m, std::move(stage.sums));
  }
  out.add("loss", std::move(loss));
}

}  // namespace

void cuda_on_cpu::drive(const Archive& in, Results& out) {
#ifndef HCL_BN_FEW_TYPES
  if (in.array("u0").type() == Type::f64) return run<double>(in, out, Type::f64);
#endif
  run<float>(in, out, Type::f32);
}
