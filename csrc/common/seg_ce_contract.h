// What the launchers of seg_ce ask of their arguments, on CPU and CUDA alike, and which tensors a call makes.
// transkd_fast/ops/seg_ce.py has checked the same before, in the user's terms.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>

#include "common/contract.h"
#include "common/label_type.h"

namespace transkd {
namespace seg_ce {

// The entries of `counts`.
enum Count { kLabelled, kRight, kIgnored, kOutOfRange, kCounts };

// What sizes_of() has passed.
struct Sizes {
  int64_t batch, classes, height, width;  // of the logits
  int64_t label_height, label_width;
  bool channels_last;

  int64_t plane() const { return height * width; }
  int64_t label_plane() const { return label_height * label_width; }
  // Then a label pixel reads one source pixel: 0 times the infinite value of a neighbour would be NaN.
  bool same_size() const { return height == label_height && width == label_width; }
};

inline ScalarType compute_type(const Tensor& logits) {
  return is_double(logits) ? ScalarType::Double : ScalarType::Float;
}

namespace detail {

inline Sizes sizes_of(const char* op, const Tensor& logits, int64_t label_height, int64_t label_width) {
  STD_TORCH_CHECK(logits.dim() == 4 && logits.numel() > 0, op,
                  ": expected logits [B, K, h, w] with at least one element, got shape ", shape_of(logits));
  storage_type_of(op, logits);
  const Layout layout = layout_of(logits);
  STD_TORCH_CHECK(layout != Layout::kOther, op, ": expected logits contiguous or channels-last, got logits that are ",
                  name_of(layout));
  return {logits.size(0),
          logits.size(1),
          logits.size(2),
          logits.size(3),
          label_height,
          label_width,
          layout == Layout::kChannelsLast};
}

// As torch.empty_like, of another dtype.
inline Tensor empty_like(const Tensor& map, ScalarType type) {
  const bool channels_last = layout_of(map) == Layout::kChannelsLast;
  return torch::stable::empty(
      {map.size(0), map.size(1), map.size(2), map.size(3)}, type, std::nullopt, map.device(), std::nullopt,
      channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous);
}

}  // namespace detail

inline LabelType label_type_of(const Tensor& labels) {
  const ScalarType type = labels.scalar_type();
  if (type == ScalarType::Byte) return LabelType::kByte;
  if (type == ScalarType::Short) return LabelType::kShort;
  if (type == ScalarType::Int) return LabelType::kInt;
  STD_TORCH_CHECK(type == ScalarType::Long,
                  "seg_ce: expected uint8, int16, int32 or int64 labels; convert them with .long()");
  return LabelType::kLong;
}

// Checks all arguments of seg_ce_fwd.
inline Sizes sizes_of(const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& weight,
                      int64_t ignore_index) {
  STD_TORCH_CHECK(labels.dim() == 3 && labels.numel() > 0,
                  "seg_ce: expected labels [B, H, W] with at least one element, got shape ", shape_of(labels));
  const Sizes sizes = detail::sizes_of("seg_ce", logits, labels.size(1), labels.size(2));
  label_type_of(labels);
  STD_TORCH_CHECK(labels.size(0) == sizes.batch, "seg_ce: expected labels to have shape [", sizes.batch,
                  ", H, W], got ", shape_of(labels));
  STD_TORCH_CHECK(labels.is_contiguous(), "seg_ce: expected labels contiguous; call .contiguous() first");
  STD_TORCH_CHECK(labels.device() == logits.device(), "seg_ce: expected labels on the device of the logits");
  if (weight) {
    storage_type_of("seg_ce", *weight);
    STD_TORCH_CHECK(weight->dim() == 1 && weight->size(0) == sizes.classes, "seg_ce: expected weight to have shape [",
                    sizes.classes, "], got ", shape_of(*weight));
    STD_TORCH_CHECK(weight->is_contiguous(), "seg_ce: expected weight contiguous; call .contiguous() first");
    STD_TORCH_CHECK(weight->device() == logits.device(), "seg_ce: expected weight on the device of the logits");
  }
  STD_TORCH_CHECK(ignore_index < 0 || ignore_index >= sizes.classes,
                  "seg_ce: expected ignore_index outside the classes [0, ", sizes.classes, "), got ", ignore_index);
  return sizes;
}

// Checks all arguments of seg_ce_predict; the result's size takes the place of the labels'.
inline Sizes sizes_of(const Tensor& logits, int64_t height, int64_t width) {
  const Sizes sizes = detail::sizes_of("seg_ce_predict", logits, height, width);
  STD_TORCH_CHECK(height > 0 && width > 0, "seg_ce_predict: expected a height and width of at least 1, got ", height,
                  " and ", width);
  return sizes;
}

// What the forward keeps for the backward, not yet filled: of the logits' strides, or empty where nobody asks.
inline Tensor empty_kept(const Tensor& logits, bool keep) {
  const ScalarType type = compute_type(logits);
  return keep ? detail::empty_like(logits, type) : torch::stable::empty({0}, type, std::nullopt, logits.device());
}

// Checks all arguments of seg_ce_bwd and makes the gradient, not yet filled.
inline Tensor empty_gradient(const Tensor& grad, const Tensor& total, const Tensor& kept, int64_t dtype) {
  constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16, ScalarType::Double};
  const ScalarType type = kept.scalar_type();
  STD_TORCH_CHECK(kept.dim() == 4 && kept.numel() > 0 && (type == ScalarType::Float || type == ScalarType::Double),
                  "seg_ce_bwd: expected what seg_ce_fwd kept, [B, K, h, w], got shape ", shape_of(kept));
  STD_TORCH_CHECK(layout_of(kept) != Layout::kOther,
                  "seg_ce_bwd: expected what seg_ce_fwd kept, contiguous or channels-last");
  for (const Tensor* scalar : {&grad, &total}) {
    STD_TORCH_CHECK(scalar->numel() == 1 && scalar->scalar_type() == type && scalar->device() == kept.device(),
                    "seg_ce_bwd: expected scalars grad and total of the dtype and on the device of what was kept, got "
                    "shape ",
                    shape_of(*scalar));
  }
  STD_TORCH_CHECK(dtype >= 0 && dtype < 4, "seg_ce_bwd: expected a dtype code of 0 to 3, got ", dtype);
  STD_TORCH_CHECK((kTypes[dtype] == ScalarType::Double) == (type == ScalarType::Double),
                  "seg_ce_bwd: expected kept and gradient both float64 or neither, got dtype code ", dtype);
  return detail::empty_like(kept, kTypes[dtype]);
}

}  // namespace seg_ce
}  // namespace transkd
