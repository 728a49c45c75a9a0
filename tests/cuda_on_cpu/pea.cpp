// Runs csrc/cuda/pea_kernel.cuh as csrc/cuda/pea_cuda.cu does: loss, factors, what the forward keeps of stage m (dx<m>,
// dweight<m>, dbias<m>, residual<m>, scales<m>), the backward's gradients of it (x_gradient<m> and so on).
// In: x<m>, weight<m>, bias<m>, target<m>, stage_weights, wanted (7 per stage), upstream, tf32; assistant<m>,
// projection_scale<m>, assistant_scale<m>; kept_misalignment; programs, least_split, merge_threads, narrow (see
// pea::Tuning). Or, to see only how a call would be cut: sizes (batch, tokens, in, out of each stage), channel_major,
// and type, a tensor of x's type. PEA_FEW_TYPES leaves types out: sanitizers make compiling slow.
#include "shim/cuda.h"
// The shim goes first.
#include "archive.h"
#include "cuda/pea_kernel.cuh"
#include "storage.h"

namespace transkd {
namespace pea {
CUDA_ON_CPU_DYNAMIC_SHARED(uint4, shared_memory);
}  // namespace pea
}  // namespace transkd

namespace {

using cuda_on_cpu::Archive;
using cuda_on_cpu::Array;
using cuda_on_cpu::Results;
using cuda_on_cpu::Type;
using cuda_on_cpu::type_of;
using transkd::StorageType;
using transkd::pea::Map;
using transkd::pea::Plan;
using transkd::pea::Problem;
using transkd::pea::ScaleJob;
using transkd::pea::Tuning;

enum { kX, kWeight, kBias, kTarget, kAssistant, kProjectionScale, kAssistantScale, kWanted };

Map map_of(const Array& array) {
  const auto &shape = array.shape(), &strides = array.strides();
  const bool channel_major = shape.size() == 3 && shape[1] > 1 && shape[2] > 1 && strides[1] == 1;
  return {array.data(), type_of(array), channel_major, false};
}

std::string numbered(const char* name, size_t m) { return name + std::to_string(m); }

Tuning tuning_of(const Archive& in) {
  Tuning tuning;
  if (in.has("programs")) tuning.programs = in.integer("programs");
  if (in.has("least_split")) tuning.least_split = in.integer("least_split");
  if (in.has("merge_threads")) tuning.merge_threads = in.integer("merge_threads");
  if (in.has("narrow")) tuning.narrow = in.integer("narrow") != 0;
  return tuning;
}

template <class T, class Visit>
void visit_kernel(const transkd::pea::Variant& variant, Visit visit) {
#ifdef PEA_FEW_TYPES
  if (variant.x == StorageType::kFloat && !variant.tf32) {
    visit(transkd::TypeTag<float>(), std::false_type());
  } else if (variant.x == StorageType::kBFloat16) {
    visit(transkd::TypeTag<__nv_bfloat16>(), std::false_type());
  } else {
    throw std::runtime_error("these types were left out of this driver");
  }
#else
  transkd::pea::visit_instance<T>(variant, visit);
#endif
}

// What a stage keeps, and the gradient that the backward makes of each part: one to one, but two of a residual.
struct Gradient {
  std::string name;
  const Array* kept;
  Array gradient;
  size_t place;  // in factors
};

class Call {
 public:
  Call(const Archive& in, Type compute) : in_(in), compute_(compute) {
    const std::vector<double> weights = in.reals("stage_weights");
    const std::vector<int64_t> wanted = in.integers("wanted");
    for (size_t m = 0; m < weights.size(); ++m) add(m, weights[m], wanted.data() + m * kWanted);
  }

  template <class T>
  void run(Results& out) {
    const int64_t stages = static_cast<int64_t>(problems_.size());
    Array loss(compute_, {}), factors(compute_, {stages, 3}), upstream(compute_, {});
    *upstream.as<T>() = static_cast<T>(in_.real("upstream"));
    forward<T>(loss, factors, out);
    backward<T>(factors, upstream);
    out.add("loss", std::move(loss));
    out.add("factors", std::move(factors));
    for (Gradient& g : gradients_) out.add(g.name, std::move(g.gradient));
    for (auto& [name, array] : kept_) out.add(name, std::move(array));
  }

 private:
  Type kept_type(Type type) const { return type == Type::f16 ? Type::f32 : type; }

  const Array& keep(const std::string& name, Array array) {
    return kept_.emplace(name, std::move(array)).first->second;
  }

  void scale(const char* name, size_t m, const Array& kept, Type type, size_t column) {
    gradients_.push_back(
        {numbered(name, m), &kept, Array(type, kept.shape(), kept.strides(), misalignment(kept)), 3 * m + column});
  }

  size_t misalignment(const Array& kept) const { return reinterpret_cast<uintptr_t>(kept.data()) % 256; }

  void add(size_t m, double weight, const int64_t* wanted) {
    const size_t shift = in_.has("kept_misalignment") ? in_.integer("kept_misalignment") : 0;
    const auto array = [&](const char* name) -> const Array& { return in_.array(numbered(name, m)); };
    const Array &x = array("x"), &target = array("target"), &matrix = array("weight");
    Problem p{};
    p.batch = x.shape()[0];
    p.tokens = x.shape()[1];
    p.in = x.shape()[2];
    p.out = target.shape()[2];
    p.loss_weight = weight;
    p.x = map_of(x);
    p.target = map_of(target);
    p.weight = map_of(matrix);
    p.bias = map_of(array("bias"));
    if (in_.has(numbered("assistant", m))) {
      p.assistant = map_of(array("assistant"));
      p.projection_scale = map_of(array("projection_scale"));
      p.assistant_scale = map_of(array("assistant_scale"));
    }
    if (wanted[kX]) {
      const Array& dx = keep(numbered("dx", m), Array(kept_type(x.type()), x.shape(), x.strides(), shift));
      p.dx = map_of(dx);
      scale("x_gradient", m, dx, x.type(), 0);
    }
    if (wanted[kWeight]) {
      const Array& dweight = keep(numbered("dweight", m), Array(compute_, {p.out, p.in}, shift));
      p.dweight = dweight.data();
      scale("weight_gradient", m, dweight, matrix.type(), 0);
    }
    if (wanted[kBias]) {
      const Array& dbias = keep(numbered("dbias", m), Array(compute_, {p.out}, shift));
      p.dbias = dbias.data();
      scale("bias_gradient", m, dbias, array("bias").type(), 0);
    }
    if (wanted[kTarget] || wanted[kAssistant]) {
      const Array& like = wanted[kTarget] ? target : array("assistant");
      const bool one_type = !(wanted[kTarget] && wanted[kAssistant]) || target.type() == array("assistant").type();
      const Array& residual = keep(numbered("residual", m), Array(one_type ? kept_type(like.type()) : compute_,
                                                                  like.shape(), like.strides(), shift));
      p.residual = map_of(residual);
      if (wanted[kTarget]) scale("target_gradient", m, residual, target.type(), 1);
      if (wanted[kAssistant]) scale("assistant_gradient", m, residual, array("assistant").type(), 2);
    }
    if (wanted[kProjectionScale] || wanted[kAssistantScale]) {
      const Array& scales = keep(numbered("scales", m), Array(compute_, {2}));
      p.scales = scales.data();
      scale("scales_gradient", m, scales, compute_, 0);
    }
    problems_.push_back(p);
  }

  template <class T>
  void forward(Array& loss, Array& factors, Results& out) {
    Plan<T> plan(problems_, in_.integer("tf32") != 0, tuning_of(in_));
    Array workspace(Type::u8, {static_cast<int64_t>(plan.workspace_bytes())});
    plan.bind(workspace.data(), loss.data(), factors.data());
    int64_t launches = 0;
    for (const auto& step : plan.steps()) {
      visit_kernel<T>(step.variant, [&](auto x, auto tf32) {
        using X = typename decltype(x)::type;
        ++launches;
        cuda_on_cpu::launch(dim3(step.blocks), dim3(transkd::pea::kThreads), step.shared_bytes,
                            [&] { transkd::pea::pea_project_kernel<X, decltype(tf32)::value>(step.launch); });
        if (step.gradient_blocks == 0) return;
        ++launches;
        cuda_on_cpu::launch(dim3(step.gradient_blocks), dim3(transkd::pea::kThreads), step.gradient_shared_bytes,
                            [&] { transkd::pea::pea_gradient_kernel<X, decltype(tf32)::value>(step.launch); });
      });
    }
    for (const auto& last : plan.lasts()) {
      ++launches;
      cuda_on_cpu::launch(dim3(last.blocks), dim3(transkd::pea::kThreads), 0,
                          [&] { transkd::pea::pea_finish_kernel<T>(last.finish); });
    }
    out.add("launches", launches);
  }

  template <class T>
  void backward(const Array& factors, const Array& upstream) {
    std::vector<ScaleJob> jobs;
    for (Gradient& g : gradients_) {
      ScaleJob job{};
      job.from = g.kept->data();
      job.to = g.gradient.data();
      job.count = g.kept->count();
      job.from_type = type_of(*g.kept);
      job.to_type = type_of(g.gradient);
      job.place = static_cast<uint32_t>(g.place);
      jobs.push_back(job);
    }
    for (const auto& launch : transkd::pea::plan_backward<T>(jobs, upstream.data(), factors.data())) {
      cuda_on_cpu::launch(dim3(launch.blocks), dim3(transkd::pea::kThreads), 0,
                          [&] { transkd::pea::pea_scale_kernel<T>(launch); });
    }
  }

  const Archive& in_;
  Type compute_;
  std::vector<Problem> problems_;
  std::map<std::string, Array> kept_;
  std::vector<Gradient> gradients_;
};

// One row per stage; the columns are CUTTING in test_cuda_on_cpu_pea.py.
template <class T>
void plan_only(const Archive& in, Results& out) {
  constexpr int64_t kColumns = 6;
  const std::vector<int64_t> sizes = in.integers("sizes");
  std::vector<Problem> problems;
  char* const somewhere = reinterpret_cast<char*>(uintptr_t{256});
  const StorageType type = type_of(in.array("type"));
  for (size_t i = 0; i < sizes.size(); i += 4) {
    const Map map{somewhere, type, in.integer("channel_major") != 0, false};
    Problem p{};
    p.batch = sizes[i];
    p.tokens = sizes[i + 1];
    p.in = sizes[i + 2];
    p.out = sizes[i + 3];
    p.loss_weight = 1;
    p.x = p.target = p.dx = map;
    p.weight = p.bias = {somewhere, StorageType::kFloat, false, false};
    p.dweight = p.dbias = somewhere;
    problems.push_back(p);
  }
  const Plan<T> plan(problems, false, tuning_of(in));
  Array cutting(Type::i64, {static_cast<int64_t>(problems.size()), kColumns});
  int64_t *row = cutting.as<int64_t>(), launches = static_cast<int64_t>(plan.lasts().size()), shared_bytes = 0;
  for (const auto& step : plan.steps()) {
    launches += 1 + (step.gradient_blocks > 0);
    shared_bytes = std::max<int64_t>(
        {shared_bytes, static_cast<int64_t>(step.shared_bytes), static_cast<int64_t>(step.gradient_shared_bytes)});
    for (uint32_t m = 0; m < step.launch.stages; ++m, row += kColumns) {
      const auto& stage = step.launch.stage[m];
      const int64_t values[kColumns] = {stage.narrow,    stage.tiles,  stage.narrow ? stage.programs : stage.out_tiles,
                                        stage.dx_blocks, stage.splits, stage.x.wide};
      std::copy(values, values + kColumns, row);
    }
  }
  out.add("cutting", std::move(cutting));
  out.add("launches", launches);
  out.add("shared_bytes", shared_bytes);
  out.add("workspace_bytes", static_cast<int64_t>(plan.workspace_bytes()));
}

}  // namespace

void cuda_on_cpu::drive(const Archive& in, Results& out) {
  const bool planned = in.has("sizes");
  const Type type = in.array(planned ? "type" : "x0").type();
#ifndef PEA_FEW_TYPES
  if (type == Type::f64) return planned ? plan_only<double>(in, out) : Call(in, Type::f64).run<double>(out);
#endif
  planned ? plan_only<float>(in, out) : Call(in, Type::f32).run<float>(out);
}
