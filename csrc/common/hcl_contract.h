// What the launchers of hcl ask of their arguments, on CPU and CUDA alike. transkd_fast/ops/hcl.py has checked them
// before; whoever calls the raw ops gets the same errors as from the Triton launchers.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/contract.h"
#include "common/hcl_pyramid.h"

namespace transkd {

// One stage's maps; `student` is what the op calls the student's one.
inline void check_hcl_maps(const std::string& op, const char* student_name, const Tensor& student,
                           const Tensor& teacher, bool doubles) {
  const std::string shapes = ", got " + shape_of(student) + " and " + shape_of(teacher);
  STD_TORCH_CHECK(student.dim() == 4 && teacher.dim() == 4, op, ": expected maps [B, C, H, W]", shapes);
  for (int64_t dim = 0; dim < 4; ++dim) {
    STD_TORCH_CHECK(student.size(dim) == teacher.size(dim), op,
                    ": expected maps of one shape; they differ in dimension ", dim, shapes);
  }
  STD_TORCH_CHECK(student.numel() > 0, op, ": expected maps with at least one element", shapes);
  for (const Tensor* map : {&student, &teacher}) {
    storage_type_of(op.c_str(), *map);
    STD_TORCH_CHECK(is_double(*map) == doubles, op,
                    ": float64 does not mix with other dtypes, got maps of both; convert them to one of them");
    STD_TORCH_CHECK(map->device() == student.device(), op, ": expected all maps on one device");
  }
  const Layout layout = layout_of(student), other = layout_of(teacher);
  STD_TORCH_CHECK(layout != Layout::kOther && layout == other, op,
                  ": expected both maps contiguous or both channels-last, got a ", student_name, " that is ",
                  name_of(layout), " and a teacher that is ", name_of(other));
}

inline void check_level_weights(const char* op, const std::vector<double>& level_weights) {
  STD_TORCH_CHECK(level_weights.size() == kLevels, op, ": expected ", kLevels,
                  " level weights, of the levels used in the order 4, 2, 1, got ", level_weights.size());
}

// The type of computing: the type of loss, tables and upstream gradient.
inline ScalarType hcl_compute_type(const std::vector<Tensor>& students) {
  return is_double(students[0]) ? ScalarType::Double : ScalarType::Float;
}

inline void check_hcl(const std::vector<Tensor>& students, const std::vector<Tensor>& teachers,
                      const std::vector<double>& weights, const std::vector<double>& level_weights) {
  STD_TORCH_CHECK(!students.empty() && students.size() == teachers.size() && students.size() == weights.size(),
                  "hcl: expected as many teachers and weights as students, and at least one, got ", students.size(),
                  " students, ", teachers.size(), " teachers and ", weights.size(), " weights");
  check_level_weights("hcl", level_weights);
  for (size_t m = 0; m < students.size(); ++m) {
    STD_TORCH_CHECK(students[m].device() == students[0].device(), "hcl: expected all maps on one device");
    check_hcl_maps("hcl", "student", students[m], teachers[m], is_double(students[0]));
  }
}

// A table that the forward made, in a call of the backward.
inline void check_hcl_table(const char* op, const Tensor& table, const Tensor& student, int64_t cells,
                            ScalarType type) {
  STD_TORCH_CHECK(table.dim() == 3 && table.size(0) == student.size(0) && table.size(1) == cells &&
                      table.size(2) == student.size(1) && table.scalar_type() == type && table.is_contiguous() &&
                      table.device() == student.device(),
                  op, "_bwd: expected the tables that ", op, "_fwd made, contiguous, here of shape [", student.size(0),
                  ", ", cells, ", ", student.size(1), "], got ", shape_of(table));
}

// After check_hcl; cells is called with a stage's number and gives the number of cells of its plane.
template <class Cells>
void check_hcl_backward(const Tensor& grad, const std::vector<Tensor>& students, const std::vector<Tensor>& tables,
                        Cells cells) {
  const ScalarType type = hcl_compute_type(students);
  STD_TORCH_CHECK(grad.numel() == 1 && grad.scalar_type() == type && grad.device() == students[0].device(),
                  "hcl_bwd: expected a scalar grad of the loss's dtype on the maps' device, got shape ",
                  shape_of(grad));
  STD_TORCH_CHECK(tables.size() == students.size(), "hcl_bwd: expected one table per stage, got ", tables.size(),
                  " for ", students.size());
  for (size_t m = 0; m < students.size(); ++m) check_hcl_table("hcl", tables[m], students[m], cells(m), type);
}

}  // namespace transkd
