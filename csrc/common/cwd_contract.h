// What the launchers of cwd ask of their arguments, on CPU and CUDA alike, and how they describe a call's stages.
// transkd_fast/ops/cwd.py has checked the same before, in the user's terms.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/contract.h"

namespace transkd {
namespace cwd {

// `dims`: the axis of a view [B, M, N] along which its softmaxes run.
constexpr int64_t kStrided = 1, kContiguous = 2;

// The rows of statistics [B, 4, R]: raw maxima, and ln of the sum of exp((x - maximum) / temperature).
enum Statistic { kStudentMaximum, kStudentLogSum, kTeacherMaximum, kTeacherLogSum, kStatistics };

// One stage of a call that stages_of() has passed.
struct Stage {
  const Tensor *student, *teacher;
  double weight;
  int64_t batch, rows, columns;  // [B, M, N]
  bool strided;                  // one softmax per column, over the rows; else one per row

  int64_t plane() const { return rows * columns; }
  // R, the softmaxes of a sample, and the entries of each.
  int64_t softmaxes() const { return strided ? columns : rows; }
  int64_t length() const { return strided ? rows : columns; }
};

inline ScalarType compute_type(const Tensor& student) {
  return is_double(student) ? ScalarType::Double : ScalarType::Float;
}

namespace detail {

inline void check_map(const char* name, const Tensor& map, size_t m, const Tensor& first) {
  const std::string stage = std::string(name) + " of stage " + std::to_string(m + 1);
  storage_type_of("cwd", map);
  STD_TORCH_CHECK(map.dim() == 3 && map.numel() > 0, "cwd: expected ", stage,
                  " as a view [B, M, N] with at least one element, got shape ", shape_of(map));
  STD_TORCH_CHECK(map.is_contiguous(), "cwd: expected ", stage, " contiguous; call .contiguous() first");
  STD_TORCH_CHECK(map.device() == first.device(), "cwd: expected ", stage, " on the device of stage 1's student");
  STD_TORCH_CHECK(is_double(map) == is_double(first),
                  "cwd: float64 does not mix with other dtypes, got maps of both; convert them to one of them");
}

}  // namespace detail

// Checks all arguments of cwd_fwd and describes its stages, by pointers into the lists.
inline std::vector<Stage> stages_of(const std::vector<Tensor>& students, const std::vector<Tensor>& teachers,
                                    const std::vector<int64_t>& dims, const std::vector<double>& weights,
                                    double temperature) {
  const size_t count = students.size();
  STD_TORCH_CHECK(count > 0 && teachers.size() == count && dims.size() == count && weights.size() == count,
                  "cwd: expected as many teachers, dims and weights as students, and at least one, got ", count,
                  " students, ", teachers.size(), " teachers, ", dims.size(), " dims and ", weights.size(), " weights");
  STD_TORCH_CHECK(temperature > 0 && std::isfinite(temperature),
                  "cwd: expected temperature to be positive and finite, got ", temperature);
  std::vector<Stage> stages;
  stages.reserve(count);
  for (size_t m = 0; m < count; ++m) {
    const Tensor &student = students[m], &teacher = teachers[m];
    detail::check_map("student", student, m, students[0]);
    detail::check_map("teacher", teacher, m, students[0]);
    for (int64_t dim = 0; dim < 3; ++dim) {
      STD_TORCH_CHECK(teacher.size(dim) == student.size(dim), "cwd: expected teacher of stage ", m + 1,
                      " to have shape ", shape_of(student), " like student, got ", shape_of(teacher));
    }
    STD_TORCH_CHECK(dims[m] == kStrided || dims[m] == kContiguous, "cwd: expected dims of stage ", m + 1,
                    " to be 1 or 2, got ", dims[m]);
    stages.push_back(
        {&student, &teacher, weights[m], student.size(0), student.size(1), student.size(2), dims[m] == kStrided});
  }
  return stages;
}

// The statistics of a stage, not yet filled.
inline Tensor empty_statistics(const Stage& stage) {
  return torch::stable::empty({stage.batch, kStatistics, stage.softmaxes()}, compute_type(*stage.student), std::nullopt,
                              stage.student->device());
}

// What cwd_bwd asks beyond stages_of().
inline void check_backward(const Tensor& grad, const std::vector<Stage>& stages,
                           const std::vector<Tensor>& statistics) {
  const Tensor& first = *stages[0].student;
  const ScalarType type = compute_type(first);
  STD_TORCH_CHECK(grad.numel() == 1 && grad.scalar_type() == type && grad.device() == first.device(),
                  "cwd_bwd: expected a scalar grad of the loss's dtype on the maps' device, got shape ",
                  shape_of(grad));
  STD_TORCH_CHECK(statistics.size() == stages.size(), "cwd_bwd: expected statistics of every stage, got ",
                  statistics.size(), " for ", stages.size());
  for (size_t m = 0; m < stages.size(); ++m) {
    const Tensor& kept = statistics[m];
    STD_TORCH_CHECK(kept.dim() == 3 && kept.size(0) == stages[m].batch && kept.size(1) == kStatistics &&
                        kept.size(2) == stages[m].softmaxes() && kept.scalar_type() == type && kept.is_contiguous() &&
                        kept.device() == first.device(),
                    "cwd_bwd: expected the statistics that cwd_fwd made, contiguous, here of stage ", m + 1,
                    " and shape [", stages[m].batch, ", 4, ", stages[m].softmaxes(), "], got ", shape_of(kept));
  }
}

}  // namespace cwd
}  // namespace transkd
