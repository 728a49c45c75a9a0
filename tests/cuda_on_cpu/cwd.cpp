// Runs csrc/cuda/cwd_kernel.cuh as csrc/cuda/cwd_cuda.cu does: loss, statistics and gradients of students.
// In: student<m>, teacher<m>, dims, weights, temperature, upstream; blocks, least_elements, most_elements, vectors (see
// cwd::Tuning); statistics_misalignment. Or, to see only how a call would be cut: shapes (of all stages, one after the
// other), dims, and type, a tensor of the views' type. CWD_FEW_TYPES leaves more types out, for sanitizers.
#include "shim/cuda.h"
// The shim goes first.
#include "archive.h"
#include "cuda/cwd_kernel.cuh"
#include "storage.h"

namespace {

using cuda_on_cpu::Archive;
using cuda_on_cpu::Array;
using cuda_on_cpu::Results;
using cuda_on_cpu::type_of;
using transkd::StorageType;
using transkd::cwd::Plan;
using transkd::cwd::Tuning;
using transkd::cwd::View;

constexpr int64_t kStridedAxis = 1;

View view_of(const int64_t* shape, int64_t dim, StorageType student, StorageType teacher) {
  View view{};
  view.batch = shape[0];
  view.rows = shape[1];
  view.columns = shape[2];
  view.strided = dim == kStridedAxis;
  view.student_type = student;
  view.teacher_type = teacher;
  view.weight = 1;
  return view;
}

struct Stage {
  const Array& student;
  const Array& teacher;
  int64_t dim;
  double weight;
  Array statistics, gradient;

  View view(bool backward) const {
    View view = view_of(student.shape().data(), dim, type_of(student), type_of(teacher));
    view.weight = weight;
    view.student = student.data();
    view.teacher = teacher.data();
    view.statistics = statistics.data();
    if (backward) view.gradient = gradient.data();
    return view;
  }
};

template <class S>
bool is(StorageType type) {
  return type == (std::is_same_v<S, double>   ? StorageType::kDouble
                  : std::is_same_v<S, float>  ? StorageType::kFloat
                  : std::is_same_v<S, __half> ? StorageType::kHalf
                                              : StorageType::kBFloat16);
}

// visit_instance() with fewer types: every one takes its time to compile.
template <class T, class Visit>
void visit_kernel(const transkd::cwd::Variant& variant, Visit visit) {
  const auto visit_pair = [&](auto student, auto teacher) {
    const StorageType types[2] = {variant.student, variant.teacher};
    if (!is<typename decltype(student)::type>(types[0]) || !is<typename decltype(teacher)::type>(types[1]))
      return false;
    transkd::cwd::visit_variant<typename decltype(student)::type, typename decltype(teacher)::type>(
        variant, [&](auto width, auto strided) { visit(student, teacher, width, strided); });
    return true;
  };
  const transkd::TypeTag<__nv_bfloat16> bfloat16;
  bool found;
  if constexpr (std::is_same_v<T, double>) {
    found = visit_pair(transkd::TypeTag<double>(), transkd::TypeTag<double>());
  } else {
    found = visit_pair(transkd::TypeTag<float>(), transkd::TypeTag<float>()) ||
            visit_pair(bfloat16, transkd::TypeTag<float>());
#ifndef CWD_FEW_TYPES
    found =
        found || visit_pair(bfloat16, bfloat16) || visit_pair(transkd::TypeTag<__half>(), transkd::TypeTag<__half>());
#endif
  }
  if (!found) throw std::runtime_error("these types were left out of this driver");
}

Tuning tuning_of(const Archive& in) {
  Tuning tuning;
  if (in.has("blocks")) tuning.blocks = in.integer("blocks");
  if (in.has("least_elements")) tuning.least_elements = in.integer("least_elements");
  if (in.has("most_elements")) tuning.most_elements = in.integer("most_elements");
  if (in.has("vectors")) tuning.vectors = in.integer("vectors") != 0;
  return tuning;
}

// One row per stage, in the order of the launches; the columns are CUTTING in test_cuda_on_cpu_cwd.py.
template <class T>
void add_cutting(const Plan<T>& plan, int64_t stages, Results& out) {
  constexpr int64_t kColumns = 9;
  Array cutting(cuda_on_cpu::Type::i64, {stages, kColumns});
  int64_t* row = cutting.as<int64_t>();
  for (size_t k = 0; k < plan.steps().size(); ++k) {
    const auto& step = plan.steps()[k];
    for (uint32_t m = 0; m < step.launch.stages; ++m, row += kColumns) {
      const auto& stage = step.launch.stage[m];
      const uint32_t last = m + 1 < step.launch.stages ? step.launch.stage[m + 1].first_block : step.blocks;
      const int64_t values[kColumns] = {static_cast<int64_t>(k),
                                        last - stage.first_block,
                                        step.variant.strided,
                                        step.variant.vector,
                                        stage.lanes,
                                        stage.parts,
                                        stage.part_length,
                                        stage.groups,
                                        stage.length};
      std::copy(values, values + kColumns, row);
    }
  }
  out.add("cutting", std::move(cutting));
  out.add("launches", static_cast<int64_t>(plan.steps().size() + plan.merges().size()));
  out.add("workspace_bytes", static_cast<int64_t>(plan.workspace_bytes()));
}

template <class T>
void forward(const std::vector<Stage>& stages, double temperature, const Tuning& tuning, Array& loss, Results& out) {
  std::vector<View> views;
  for (const Stage& stage : stages) views.push_back(stage.view(false));
  Plan<T> plan(views, temperature, tuning);
  Array workspace(cuda_on_cpu::Type::u8, {static_cast<int64_t>(plan.workspace_bytes())});
  plan.bind_forward(workspace.data(), loss.data());
  for (const auto& step : plan.steps()) {
    visit_kernel<T>(step.variant, [&](auto student, auto teacher, auto width, auto strided) {
      using A = typename decltype(student)::type;
      using B = typename decltype(teacher)::type;
      cuda_on_cpu::launch(dim3(step.blocks), dim3(transkd::cwd::kThreads), 0, [&] {
        transkd::cwd::cwd_forward_kernel<A, B, decltype(width)::value, decltype(strided)::value>(step.launch);
      });
    });
  }
  for (const auto& step : plan.merges()) {
    cuda_on_cpu::launch(dim3(step.blocks), dim3(transkd::cwd::kMergeThreads), 0,
                        [&] { transkd::cwd::cwd_merge_kernel<T>(step.merge); });
  }
  add_cutting(plan, static_cast<int64_t>(stages.size()), out);
}

template <class T>
void backward(const std::vector<Stage>& stages, double temperature, const Tuning& tuning, const Array& upstream) {
  std::vector<View> views;
  for (const Stage& stage : stages) views.push_back(stage.view(true));
  Plan<T> plan(views, temperature, tuning);
  plan.bind_backward(upstream.data());
  for (const auto& step : plan.steps()) {
    visit_kernel<T>(step.variant, [&](auto student, auto teacher, auto width, auto strided) {
      using A = typename decltype(student)::type;
      using B = typename decltype(teacher)::type;
      cuda_on_cpu::launch(dim3(step.blocks), dim3(transkd::cwd::kThreads), 0, [&] {
        transkd::cwd::cwd_backward_kernel<A, B, decltype(width)::value, decltype(strided)::value>(step.launch);
      });
    });
  }
}

template <class T>
void run(const Archive& in, Results& out, cuda_on_cpu::Type type) {
  const std::vector<double> weights = in.reals("weights");
  const std::vector<int64_t> dims = in.integers("dims");
  const double temperature = in.real("temperature");
  const Tuning tuning = tuning_of(in);
  const size_t shift = in.has("statistics_misalignment") ? in.integer("statistics_misalignment") : 0;
  std::vector<Stage> stages;
  for (size_t m = 0; m < weights.size(); ++m) {
    const Array &student = in.array("student" + std::to_string(m)), &teacher = in.array("teacher" + std::to_string(m));
    const auto& shape = student.shape();
    stages.push_back({student, teacher, dims[m], weights[m],
                      Array(type, {shape[0], 4, dims[m] == kStridedAxis ? shape[2] : shape[1]}, shift),
                      Array::like(student)});
  }
  Array loss(type, {}), upstream(type, {});
  *upstream.as<T>() = static_cast<T>(in.real("upstream"));
  forward<T>(stages, temperature, tuning, loss, out);
  backward<T>(stages, temperature, tuning, upstream);
  for (size_t m = 0; m < stages.size(); ++m) {
    out.add("statistics" + std::to_string(m), std::move(stages[m].statistics));
    out.add("gradient" + std::to_string(m), std::move(stages[m].gradient));
  }
  out.add("loss", std::move(loss));
}

template <class T>
void plan_only(const Archive& in, Results& out) {
  const std::vector<int64_t> shapes = in.integers("shapes"), dims = in.integers("dims");
  const StorageType type = type_of(in.array("type"));
  std::vector<View> views;
  for (size_t m = 0; m < dims.size(); ++m) views.push_back(view_of(shapes.data() + 3 * m, dims[m], type, type));
  const Plan<T> plan(views, 1.0, tuning_of(in));
  add_cutting(plan, static_cast<int64_t>(views.size()), out);
}

}  // namespace

void cuda_on_cpu::drive(const Archive& in, Results& out) {
  const bool planned = in.has("shapes");
#ifndef CWD_FEW_TYPES
  if (in.array(planned ? "type" : "student0").type() == Type::f64) {
    return planned ? plan_only<double>(in, out) : run<double>(in, out, Type::f64);
  }
#endif
  planned ? plan_only<float>(in, out) : run<float>(in, out, Type::f32);
}
