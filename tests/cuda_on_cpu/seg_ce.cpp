// Runs csrc/cuda/seg_ce_kernel.cuh as csrc/cuda/seg_ce_cuda.cu does: loss, total, counts, what is kept, gradient,
// classes.
// In: logits, labels (int16 ones as float16), label_type (as LabelType), ignore_index, weight if there is one, keep,
// upstream, gradient (a tensor like the gradient); threads, blocks (see seg_ce::Tuning). Or, to see only how a call
// would be cut: sizes (B, K, h, w, H, W), keep, and type, a tensor of the logits' type. SEG_CE_FEW_TYPES leaves float64
// out: sanitizers make compiling slow.
#include "shim/cuda.h"
// The shim goes first.
#include "archive.h"
#include "cuda/seg_ce_kernel.cuh"
#include "storage.h"

namespace {

using cuda_on_cpu::Archive;
using cuda_on_cpu::Array;
using cuda_on_cpu::launch;
using cuda_on_cpu::Results;
using cuda_on_cpu::Type;
using cuda_on_cpu::type_of;
using transkd::seg_ce::kFinishThreads;
using transkd::seg_ce::kThreads;
using transkd::seg_ce::Maps;
using transkd::seg_ce::Plan;
using transkd::seg_ce::Tuning;

bool is_channels_last(const Array& map) {
  const auto &shape = map.shape(), &strides = map.strides();
  return shape[1] > 1 && shape[2] * shape[3] > 1 && strides[1] == 1;
}

Tuning tuning_of(const Archive& in) {
  Tuning tuning;
  if (in.has("threads")) tuning.threads = in.integer("threads");
  if (in.has("blocks")) tuning.blocks = in.integer("blocks");
  return tuning;
}

// The columns are CUTTING in test_cuda_on_cpu_seg_ce.py.
template <class T>
void add_cutting(const Plan<T>& plan, Results& out) {
  const auto& l = plan.launch;
  const int64_t values[] = {
      plan.blocks,    plan.side, l.tile_rows, l.tile_columns,     l.row_tiles,
      l.column_tiles, l.shares,  l.rounds,    plan.weight_blocks, static_cast<int64_t>(plan.workspace_bytes())};
  Array cutting(Type::i64, {static_cast<int64_t>(std::size(values))});
  std::copy(std::begin(values), std::end(values), cutting.as<int64_t>());
  out.add("cutting", std::move(cutting));
}

template <class T>
void forward(const Maps& maps, const Tuning& tuning, const Array& loss, const Array& total, const Array& counts,
             Results& out) {
  Plan<T> plan(maps, tuning);
  const Array workspace(Type::u8, {static_cast<int64_t>(plan.workspace_bytes())});
  plan.bind(workspace.data(), loss.data(), total.data(), counts.data());
  if (plan.weight_blocks > 0) {
    launch(dim3(plan.weight_blocks), dim3(kFinishThreads), 0,
           [&] { transkd::seg_ce::seg_ce_weights_kernel<T>(plan.weights); });
  }
  transkd::seg_ce::visit_side<T>(plan.side, [&](auto side) {
    launch(dim3(plan.blocks), dim3(kThreads), 0,
           [&] { transkd::seg_ce::seg_ce_forward_kernel<decltype(side)::value, T>(plan.launch); });
  });
  launch(dim3(1), dim3(kFinishThreads), 0, [&] { transkd::seg_ce::seg_ce_finish_kernel<T>(plan.finish); });
  add_cutting(plan, out);
}

template <class T>
void predict(const Maps& maps, const Tuning& tuning) {
  const Plan<T> plan(maps, tuning);
  transkd::seg_ce::visit_side<T>(plan.side, [&](auto side) {
    launch(dim3(plan.blocks), dim3(kThreads), 0,
           [&] { transkd::seg_ce::seg_ce_predict_kernel<decltype(side)::value, T>(plan.launch); });
  });
}

template <class T>
void run(const Archive& in, Results& out, Type type) {
  const Array &logits = in.array("logits"), &labels = in.array("labels");
  const auto& shape = logits.shape();
  const bool keep = in.integer("keep") != 0;
  Array loss(type, {}), total(type, {}), counts(Type::i64, {4});
  Maps maps{};
  maps.batch = shape[0];
  maps.classes = shape[1];
  maps.height = shape[2];
  maps.width = shape[3];
  maps.label_height = labels.shape()[1];
  maps.label_width = labels.shape()[2];
  maps.channels_last = is_channels_last(logits);
  maps.type = type_of(logits);
  maps.logits = logits.data();

  Array predicted(Type::i64, labels.shape());
  maps.predicted = predicted.data();
  predict<T>(maps, tuning_of(in));
  out.add("predicted", std::move(predicted));

  maps.predicted = nullptr;
  maps.labels = labels.data();
  maps.label_type = static_cast<transkd::LabelType>(in.integer("label_type"));
  maps.ignore_index = in.integer("ignore_index");
  if (in.has("weight")) {
    maps.weight = in.array("weight").data();
    maps.weight_type = type_of(in.array("weight"));
  }
  Array kept(type, shape, logits.strides(), in.integer("kept_misalignment"));
  if (keep) maps.kept = kept.data();
  forward<T>(maps, tuning_of(in), loss, total, counts, out);
  if (keep) {
    Array upstream(type, {}), gradient = Array::like(in.array("gradient"));
    *upstream.as<T>() = static_cast<T>(in.real("upstream"));
    const transkd::StorageType to = type_of(gradient);
    const auto scale =
        transkd::seg_ce::plan_scale<T>(upstream.data(), total.data(), kept.data(), gradient.data(), kept.count());
    transkd::visit_storage<T>(to, [&](auto tag) {
      launch(dim3(transkd::seg_ce::scale_blocks(scale.count, to)), dim3(transkd::seg_ce::kScaleThreads), 0,
             [&] { transkd::seg_ce::seg_ce_scale_kernel<T, typename decltype(tag)::type>(scale); });
    });
    out.add("kept", std::move(kept));
    out.add("gradient", std::move(gradient));
  }
  out.add("loss", std::move(loss));
  out.add("total", std::move(total));
  out.add("counts", std::move(counts));
}

template <class T>
void plan_only(const Archive& in, Results& out) {
  const std::vector<int64_t> sizes = in.integers("sizes");
  char some = 0;
  Maps maps{};
  maps.batch = sizes[0];
  maps.classes = sizes[1];
  maps.height = sizes[2];
  maps.width = sizes[3];
  maps.label_height = sizes[4];
  maps.label_width = sizes[5];
  maps.kept = in.integer("keep") != 0 ? &some : nullptr;
  add_cutting(Plan<T>(maps, tuning_of(in)), out);
}

}  // namespace

void cuda_on_cpu::drive(const Archive& in, Results& out) {
  const bool planned = in.has("sizes");
#ifndef SEG_CE_FEW_TYPES
  if (in.array(planned ? "type" : "logits").type() == Type::f64) {
    return planned ? plan_only<double>(in, out) : run<double>(in, out, Type::f64);
  }
#endif
  planned ? plan_only<float>(in, out) : run<float>(in, out, Type::f32);
}
