// Runs csrc/cuda/hcl_kernel.cuh as csrc/cuda/hcl_cuda.cu does: loss, tables, gradients of students and of teachers.
// In: student<m>, teacher<m>, weights, level_weights, upstream; blocks, least_elements, most_elements, vectors (see
// hcl::Tuning); table_misalignment. Or, to see only how a call would be cut: shapes (of all stages, one after the
// other), channels_last, sums (see hcl::Plan), and type, a tensor of the maps' type. HCL_FEW_TYPES leaves types out:
// sanitizers make compiling slow.
#include "shim/cuda.h"
// The shim goes first.
#include "archive.h"
#include "cuda/hcl_kernel.cuh"
#include "storage.h"

namespace transkd {
namespace hcl {
CUDA_ON_CPU_DYNAMIC_SHARED(uint4, shared_memory);
}  // namespace hcl
}  // namespace transkd

namespace {

using cuda_on_cpu::Archive;
using cuda_on_cpu::Array;
using cuda_on_cpu::Results;
using cuda_on_cpu::type_of;
using transkd::StorageType;
using transkd::hcl::Maps;
using transkd::hcl::Plan;
using transkd::hcl::Tuning;

bool is_channels_last(const Array& map) {
  const auto &shape = map.shape(), &strides = map.strides();
  return shape[1] > 1 && shape[2] * shape[3] > 1 && strides[1] == 1;
}

struct Stage {
  const Array& student;
  const Array& teacher;
  double weight;
  Array table, student_gradient, teacher_gradient;

  Maps maps(bool exchanged) const {
    const Array &of = exchanged ? teacher : student, &other = exchanged ? student : teacher;
    Maps maps{};
    maps.batch = of.shape()[0];
    maps.channels = of.shape()[1];
    maps.height = of.shape()[2];
    maps.width = of.shape()[3];
    maps.channels_last = is_channels_last(of);
    maps.student_type = type_of(of);
    maps.teacher_type = type_of(other);
    maps.weight = weight;
    maps.student = of.data();
    maps.teacher = other.data();
    maps.table = table.data();
    return maps;
  }
};

template <class T, class Visit>
void visit_kernel(const transkd::hcl::Variant& variant, Visit visit) {
#ifdef HCL_FEW_TYPES
  const auto visit_same = [&](auto type) {
    using S = typename decltype(type)::type;
    transkd::hcl::visit_variant<S, S>(variant,
                                      [&](auto width, auto channels_last) { visit(type, type, width, channels_last); });
  };
  if (variant.student == StorageType::kFloat && variant.teacher == StorageType::kFloat) {
    visit_same(transkd::TypeTag<float>());
  } else if (variant.student == StorageType::kBFloat16 && variant.teacher == StorageType::kBFloat16) {
    visit_same(transkd::TypeTag<__nv_bfloat16>());
  } else {
    throw std::runtime_error("these types were left out of this driver");
  }
#else
  transkd::hcl::visit_instance<T>(variant, visit);
#endif
}

Tuning tuning_of(const Archive& in) {
  Tuning tuning;
  if (in.has("blocks")) tuning.blocks = in.integer("blocks");
  if (in.has("least_elements")) tuning.least_elements = in.integer("least_elements");
  if (in.has("most_elements")) tuning.most_elements = in.integer("most_elements");
  if (in.has("vectors")) tuning.vectors = in.integer("vectors") != 0;
  return tuning;
}

std::vector<double> level_weights_of(const Archive& in) {
  if (in.has("level_weights")) return in.reals("level_weights");
  return {std::begin(transkd::kPublishedWeights), std::end(transkd::kPublishedWeights)};
}

// One row per stage, in the order of the launches; the columns are CUTTING in test_cuda_on_cpu_hcl.py.
template <class T>
Array cutting_of(const Plan<T>& plan, int64_t stages) {
  constexpr int64_t kColumns = 10;
  Array cutting(cuda_on_cpu::Type::i64, {stages, kColumns});
  int64_t* row = cutting.as<int64_t>();
  for (size_t k = 0; k < plan.steps().size(); ++k) {
    const auto& step = plan.steps()[k];
    for (uint32_t m = 0; m < step.launch.stages; ++m, row += kColumns) {
      const auto& stage = step.launch.stage[m];
      const int64_t values[kColumns] = {static_cast<int64_t>(k),
                                        step.blocks,
                                        static_cast<int64_t>(step.shared_bytes),
                                        step.variant.channels_last,
                                        step.variant.vector,
                                        stage.group_planes,
                                        stage.cell_parts,
                                        stage.strips,
                                        stage.cuts,
                                        stage.lanes};
      std::copy(values, values + kColumns, row);
    }
  }
  return cutting;
}

template <class T>
void forward(const std::vector<Stage>& stages, const Archive& in, Array& loss, Results& out) {
  std::vector<Maps> maps;
  for (const Stage& stage : stages) maps.push_back(stage.maps(false));
  Plan<T> plan(maps, level_weights_of(in), tuning_of(in));
  Array workspace(cuda_on_cpu::Type::u8, {static_cast<int64_t>(plan.workspace_bytes())});
  plan.bind_forward(workspace.data(), loss.data());
  std::memset(workspace.data(), 0, plan.counter_bytes());
  for (const auto& step : plan.steps()) {
    visit_kernel<T>(step.variant, [&](auto student, auto teacher, auto width, auto channels_last) {
      using A = typename decltype(student)::type;
      using B = typename decltype(teacher)::type;
      cuda_on_cpu::launch(dim3(step.blocks), dim3(transkd::hcl::kThreads), step.shared_bytes, [&] {
        transkd::hcl::hcl_forward_kernel<A, B, decltype(width)::value, decltype(channels_last)::value>(step.launch);
      });
    });
  }
  out.add("cutting", cutting_of(plan, static_cast<int64_t>(stages.size())));
}

template <class T>
void backward(std::vector<Stage>& stages, const Archive& in, const Array& upstream, bool exchanged) {
  std::vector<Maps> maps;
  for (Stage& stage : stages) {
    maps.push_back(stage.maps(exchanged));
    maps.back().gradient = (exchanged ? stage.teacher_gradient : stage.student_gradient).data();
  }
  Plan<T> plan(maps, level_weights_of(in), tuning_of(in));
  plan.bind_backward(upstream.data());
  for (const auto& step : plan.steps()) {
    visit_kernel<T>(step.variant, [&](auto student, auto teacher, auto width, auto channels_last) {
      using A = typename decltype(student)::type;
      using B = typename decltype(teacher)::type;
      cuda_on_cpu::launch(dim3(step.blocks), dim3(transkd::hcl::kThreads), 0, [&] {
        transkd::hcl::hcl_backward_kernel<A, B, decltype(width)::value, decltype(channels_last)::value>(step.launch);
      });
    });
  }
}

template <class T>
void run(const Archive& in, Results& out, cuda_on_cpu::Type type) {
  const std::vector<double> weights = in.reals("weights");
  std::vector<Stage> stages;
  for (size_t m = 0; m < weights.size(); ++m) {
    const Array &student = in.array("student" + std::to_string(m)), &teacher = in.array("teacher" + std::to_string(m));
    const auto& shape = student.shape();
    const int64_t cells = transkd::Pyramid(shape[2], shape[3]).cells();
    const size_t shift = in.has("table_misalignment") ? in.integer("table_misalignment") : 0;
    stages.push_back({student, teacher, weights[m], Array(type, {shape[0], cells, shape[1]}, shift),
                      Array::like(student), Array::like(teacher)});
  }
  Array loss(type, {}), upstream(type, {});
  *upstream.as<T>() = static_cast<T>(in.real("upstream"));
  forward<T>(stages, in, loss, out);
  backward<T>(stages, in, upstream, false);
  for (size_t m = 0; m < stages.size(); ++m) {
    Array table(type, stages[m].table.shape());
    std::memcpy(table.data(), stages[m].table.data(), table.bytes());
    out.add("table" + std::to_string(m), std::move(table));
    T* entries = stages[m].table.as<T>();
    for (int64_t i = 0; i < stages[m].table.count(); ++i) entries[i] = -entries[i];
  }
  backward<T>(stages, in, upstream, true);
  for (size_t m = 0; m < stages.size(); ++m) {
    out.add("student_gradient" + std::to_string(m), std::move(stages[m].student_gradient));
    out.add("teacher_gradient" + std::to_string(m), std::move(stages[m].teacher_gradient));
  }
  out.add("loss", std::move(loss));
}

template <class T>
void plan_only(const Archive& in, Results& out) {
  const std::vector<int64_t> shapes = in.integers("shapes");
  std::vector<Maps> maps;
  for (size_t i = 0; i < shapes.size(); i += 4) {
    Maps m{};
    m.batch = shapes[i];
    m.channels = shapes[i + 1];
    m.height = shapes[i + 2];
    m.width = shapes[i + 3];
    m.channels_last = in.integer("channels_last") != 0;
    m.student_type = m.teacher_type = type_of(in.array("type"));
    m.weight = 1;
    maps.push_back(m);
  }
  const int sums = in.has("sums") ? static_cast<int>(in.integer("sums")) : 1;
  const Plan<T> plan(maps, level_weights_of(in), tuning_of(in), sums);
  out.add("cutting", cutting_of(plan, static_cast<int64_t>(maps.size())));
  out.add("workspace_bytes", static_cast<int64_t>(plan.workspace_bytes()));
}

}  // namespace

void cuda_on_cpu::drive(const Archive& in, Results& out) {
  const bool planned = in.has("shapes");
#ifndef HCL_FEW_TYPES
  if (in.array(planned ? "type" : "student0").type() == Type::f64) {
    return planned ? plan_only<double>(in, out) : run<double>(in, out, Type::f64);
  }
#endif
  planned ? plan_only<float>(in, out) : run<float>(in, out, Type::f32);
}
