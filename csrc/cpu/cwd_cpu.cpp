// cwd on CPU: the KL divergence of softmaxes of two maps, forward in one pass over both, backward in one pass more.
//
// With the raw maxima m, e = exp((x - m) / T), Z the sum of e and A that of e_t ((t - m_t) - (s - m_s)) / T,
//   KL = A / Z_t - ln Z_t + ln Z_s.
// Softmaxes are cut into parts, whose sums are taken about their own maxima and brought together in order. The parts do
// not depend on the number of threads: results repeat bit for bit.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/cwd_contract.h"
#include "cpu/common/gemm.h"
#include "cpu/common/parallel.h"
#include "cpu/common/tensor.h"
#include "cpu/common/values.h"
#include "cpu/cwd_loops.h"

namespace transkd {
namespace cwd {
namespace {

constexpr int64_t kRun = 4096;       // contiguous entries of a part: those of both maps fill the L1 cache
constexpr int64_t kShort = 64;       // contiguous softmaxes of fewer entries are transposed into tiles
constexpr int64_t kWidth = 128;      // columns of a tile
constexpr int64_t kTile = 4096;      // its entries, at most
constexpr int64_t kPart = 256;       // rows of a strided part: longer chains of float additions round more
constexpr int64_t kTask = 16384;     // entries of a task, about
constexpr int64_t kOperations = 32;  // for an entry

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How the softmaxes of a sample become tasks: `group` of them, a part of each.
struct Cut {
  int64_t group, groups, part, parts;
  bool tiles;

  explicit Cut(const Stage& stage) {
    const int64_t length = stage.length();
    tiles = stage.strided || length < kShort;
    const int64_t most = tiles ? kPart : kRun;
    parts = divide_up(length, most);
    part = divide_up(divide_up(length, parts), kPad) * kPad;
    parts = divide_up(length, part);
    group = tiles ? kWidth : std::max<int64_t>(1, kTask / std::min(part, length));
    group = std::min(group, stage.softmaxes());
    groups = divide_up(stage.softmaxes(), group);
  }
};

// The softmaxes [first, first + count) of a sample, the entries [begin, end) of each.
struct Task {
  int64_t sample, part, first, count, begin, end;

  Task(const Stage& stage, const Cut& cut, int64_t number) {
    sample = number / (cut.parts * cut.groups);
    part = number / cut.groups % cut.parts;
    first = number % cut.groups * cut.group;
    count = std::min(cut.group, stage.softmaxes() - first);
    begin = part * cut.part;
    end = std::min(begin + cut.part, stage.length());
  }
};

// Tiles [rows, width] of a map's entries, one softmax per column; the columns beyond are 0.
template <class T>
class Tiles {
 public:
  Tiles(const Stage& stage, const Tensor& map) : stage_(stage), reader_(map) {}

  static int64_t room() { return 2 * (kTile + kWidth + kShort * kWidth); }

  // Whether the map holds the tiles of a task as they are.
  bool there(const Task& task) const { return stage_.strided && task.count % kPad == 0 && reader_.buffer(1) == 0; }
  const T* at(const Task& task, int64_t begin) const {
    return reader_.read(task.sample * stage_.plane() + begin * stage_.columns + task.first, 1, nullptr);
  }

  void fill(const Task& task, int64_t begin, int64_t rows, int64_t width, T* room) const {
    T* const tile = room;
    T* const buffer = room + kTile + kWidth + kShort * kWidth;
    const int64_t plane = task.sample * stage_.plane();
    if (stage_.strided) {
      for (int64_t r = 0; r < rows; ++r) {
        T* const row = tile + r * width;
        const T* const from = reader_.read(plane + (begin + r) * stage_.columns + task.first, task.count, row);
        if (from != row) std::copy_n(from, task.count, row);
        std::fill(row + task.count, row + width, T(0));
      }
    } else {
      const int64_t length = stage_.columns;
      const T* const from = reader_.read(plane + task.first * length, task.count * length, buffer);
      gemm::transpose(from + begin, length, task.count, rows, tile, width);
      for (int64_t r = 0; r < rows; ++r) std::fill(tile + r * width + task.count, tile + (r + 1) * width, T(0));
    }
  }

 private:
  const Stage& stage_;
  Reader<T> reader_;
};

template <class T>
struct Rooms {
  Room<T> s, t, sums;
  Room<double> partials;

  explicit Rooms(int64_t group)
      : s(std::max(Tiles<T>::room(), kRun)),
        t(std::max(Tiles<T>::room(), kRun)),
        sums(kPartials * kWidth),
        partials(kPartials * group) {}
};

// The partials of a task, [kPartials, stride].
template <class T>
void add_tiles(const Stage& stage, const Task& task, T scale, const Rooms<T>& rooms, double* partials, int64_t stride) {
  const Tiles<T> students(stage, *stage.student), teachers(stage, *stage.teacher);
  const int64_t width = divide_up(task.count, kPad) * kPad;
  const int64_t step = std::max<int64_t>(1, kTile / width);
  const bool there = students.there(task) && teachers.there(task);
  for (int64_t begin = task.begin; begin < task.end; begin += step) {
    const int64_t rows = std::min(step, task.end - begin);
    Tile<T> tile{rooms.s.get(), rooms.t.get(), rows, width, width, scale, begin == task.begin, rooms.sums.get()};
    if (there) {
      tile.s = students.at(task, begin);
      tile.t = teachers.at(task, begin);
      tile.row_step = stage.columns;
    } else {
      students.fill(task, begin, rows, width, rooms.s.get());
      teachers.fill(task, begin, rows, width, rooms.t.get());
    }
    add_tile(tile);
  }
  for (int k = 0; k < kPartials; ++k) {
    std::copy_n(rooms.sums.get() + k * width, task.count, partials + k * stride);
  }
}

template <class T>
void add_runs(const Stage& stage, const Task& task, T scale, const Rooms<T>& rooms, double* partials, int64_t stride) {
  const Reader<T> s(*stage.student), t(*stage.teacher);
  const int64_t length = task.end - task.begin;
  for (int64_t i = 0; i < task.count; ++i) {
    const int64_t offset = task.sample * stage.plane() + (task.first + i) * stage.columns + task.begin;
    add_run(Run<T>{s.read(offset, length, rooms.s.get()), t.read(offset, length, rooms.t.get()), length, scale,
                   partials + i, stride});
  }
}

// Fills statistics [B, 4, R]; returns the sum of the divergences.
template <class T>
double forward_stage(const Stage& stage, double scale, T* statistics) {
  const Cut cut(stage);
  const int64_t softmaxes = stage.softmaxes(), all = stage.batch * softmaxes;
  const int64_t work = kOperations * stage.batch * stage.plane();
  const bool whole = cut.parts == 1;
  const int64_t tasks = stage.batch * cut.parts * cut.groups;
  Room<double> partials(whole ? 0 : cut.parts * kPartials * all);
  // One divergence per task, or per group of a sample where parts come together.
  std::vector<double> divergences(stage.batch * cut.groups);
  const auto merge = [&](const Task& task, const double* from, int64_t stride) {
    divergences[task.sample * cut.groups + task.first / cut.group] =
        merge_parts(Merge<T>{from, cut.parts, kPartials * all, stride, task.count, scale,
                             statistics + task.sample * kStatistics * softmaxes + task.first, softmaxes});
  };
  over_tasks(tasks, work, [&](const auto& next) {
    const Rooms<T> rooms(cut.group);
    for (int64_t number = next(); number < tasks; number = next()) {
      const Task task(stage, cut, number);
      double* const to = whole ? rooms.partials.get()
                               : partials.get() + task.part * kPartials * all + task.sample * softmaxes + task.first;
      const int64_t stride = whole ? cut.group : all;
      if (cut.tiles) {
        add_tiles(stage, task, static_cast<T>(scale), rooms, to, stride);
      } else {
        add_runs(stage, task, static_cast<T>(scale), rooms, to, stride);
      }
      if (whole) merge(task, to, stride);
    }
  });
  if (!whole) {
    const int64_t merges = stage.batch * cut.groups;
    over_tasks(merges, kOperations * 4 * cut.parts * all, [&](const auto& next) {
      for (int64_t number = next(); number < merges; number = next()) {
        const Task task(stage, cut, number / cut.groups * cut.groups * cut.parts + number % cut.groups);
        merge(task, partials.get() + task.sample * softmaxes + task.first, all);
      }
    });
  }
  double sum = 0;
  for (const double divergence : divergences) sum += divergence;
  return sum;
}

// ---- Backward.

// Whether a gradient goes past the cache: one of this size would only push out what comes next, and a usual store reads
// it from memory first.
template <class T>
bool streams(const Stage& stage, const Tensor& gradient, const Writer<T>& out) {
  constexpr int64_t kStreamBytes = 8 << 20;
  const int64_t bytes = stage.batch * stage.plane() * static_cast<int64_t>(sizeof(T));
  const bool aligned =
      reinterpret_cast<uintptr_t>(gradient.const_data_ptr()) % 16 == 0 && stage.columns * sizeof(T) % 16 == 0;
  return bytes >= kStreamBytes && aligned && !out.buffered();
}

template <class T>
void backward_stage(const Stage& stage, double scale, T factor, const T* statistics, const Tensor& gradient) {
  const Reader<T> s(*stage.student), t(*stage.teacher);
  const Writer<T> out(gradient);
  const bool stream = streams(stage, gradient, out);
  // Blocks of whole rows, or of a part of one.
  const int64_t columns = std::min(kRun, stage.columns), rows = std::max<int64_t>(1, kRun / columns);
  const int64_t across = divide_up(stage.columns, columns), down = divide_up(stage.rows, rows);
  const int64_t blocks = stage.batch * down * across;
  over_tasks(blocks, kOperations * stage.batch * stage.plane(), [&](const auto& next) {
    const Room<T> s_room(s.buffer(kRun)), t_room(t.buffer(kRun)), out_room(out.buffer(kRun));
    for (int64_t number = next(); number < blocks; number = next()) {
      const int64_t block = blocks - 1 - number;  // what the forward read last may still be in the cache
      const int64_t sample = block / (down * across);
      const int64_t row = block / across % down * rows, column = block % across * columns;
      const int64_t count = std::min(columns, stage.columns - column), height = std::min(rows, stage.rows - row);
      const int64_t offset = (sample * stage.rows + row) * stage.columns + column, n = height * count;
      T* const to = out.place(offset, out_room.get());
      make_gradient(Gradient<T>{s.read(offset, n, s_room.get()), t.read(offset, n, t_room.get()), to, height, count,
                                statistics + sample * kStatistics * stage.softmaxes() + (stage.strided ? column : row),
                                stage.softmaxes(), stage.strided, static_cast<T>(scale), factor, stream});
      out.commit(offset, n, to);
    }
    if (stream) streamed();
  });
}

// ---- The registered ops.

template <class T>
Tensor forward(const std::vector<Stage>& stages, double temperature, std::vector<Tensor>& statistics) {
  double total = 0;
  for (const Stage& stage : stages) {
    statistics.push_back(empty_statistics(stage));
    total +=
        stage.weight * forward_stage(stage, 1 / temperature, static_cast<T*>(statistics.back().mutable_data_ptr()));
  }
  Tensor loss = torch::stable::empty({}, compute_type(*stages[0].student));
  *static_cast<T*>(loss.mutable_data_ptr()) = static_cast<T>(total);
  return loss;
}

std::tuple<Tensor, std::vector<Tensor>> cwd_fwd(std::vector<Tensor> students, std::vector<Tensor> teachers,
                                                std::vector<int64_t> dims, std::vector<double> weights,
                                                double temperature) {
  const std::vector<Stage> stages = stages_of(students, teachers, dims, weights, temperature);
  std::vector<Tensor> statistics;
  Tensor loss = is_double(students[0]) ? forward<double>(stages, temperature, statistics)
                                       : forward<float>(stages, temperature, statistics);
  return {loss, statistics};
}

template <class T>
void backward(const Tensor& grad, const std::vector<Stage>& stages, double temperature,
              const std::vector<Tensor>& statistics, const std::vector<Tensor>& gradients) {
  const T upstream = *static_cast<const T*>(grad.const_data_ptr());
  for (size_t m = stages.size(); m-- > 0;) {
    backward_stage(stages[m], 1 / temperature, static_cast<T>(upstream * (stages[m].weight / temperature)),
                   static_cast<const T*>(statistics[m].const_data_ptr()), gradients[m]);
  }
}

std::vector<Tensor> cwd_bwd(Tensor grad, std::vector<Tensor> students, std::vector<Tensor> teachers,
                            std::vector<Tensor> statistics, std::vector<int64_t> dims, std::vector<double> weights,
                            double temperature) {
  const std::vector<Stage> stages = stages_of(students, teachers, dims, weights, temperature);
  check_backward(grad, stages, statistics);
  std::vector<Tensor> gradients;
  for (const Tensor& student : students) {
    gradients.push_back(torch::stable::empty_like(student));
    use_huge_pages(gradients.back());
  }
  if (is_double(students[0])) {
    backward<double>(grad, stages, temperature, statistics, gradients);
  } else {
    backward<float>(grad, stages, temperature, statistics, gradients);
  }
  return gradients;
}

}  // namespace
}  // namespace cwd
}  // namespace transkd

STABLE_TORCH_LIBRARY_IMPL(transkd_fast, CPU, m) {
  m.impl("cwd_fwd", TORCH_BOX(&transkd::cwd::cwd_fwd));
  m.impl("cwd_bwd", TORCH_BOX(&transkd::cwd::cwd_bwd));
}
