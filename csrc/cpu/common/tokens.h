// Blocks of rows of an embedding [B, N, C] as matrices of the compute type, and back; how it lies in memory and its
// dtype matter only here. Token-major, all B N rows are one slab; channel-major, each sample is a slab [C, N].
#pragma once

#include <algorithm>

#include "cpu/common/gemm.h"
#include "cpu/common/tensor.h"
#include "cpu/common/values.h"

namespace transkd {

// A block of rows of a slab.
struct Rows {
  int64_t slab, first, count;
};

struct TokenShape {
  int64_t tokens, channels;
  bool channel_major;

  // Offset of a row token-major; slab_rows is the number of rows of a slab, which others may cut finer.
  int64_t row(const Rows& rows, int64_t slab_rows) const { return (rows.slab * slab_rows + rows.first) * channels; }
  // Offset of a channel's run of the block.
  int64_t run(const Rows& rows, int64_t channel) const {
    return (rows.slab * channels + channel) * tokens + rows.first;
  }
};

template <class T>
class TokenReader {
 public:
  TokenReader(const Tensor& tensor, bool channel_major, int64_t slab_rows)
      : reader_(tensor), shape_{tensor.size(1), tensor.size(2), channel_major}, slab_rows_(slab_rows) {}

  // Elements of room that blocks of so many rows need.
  int64_t room(int64_t rows) const {
    return shape_.channel_major ? rows * (shape_.channels + kRuns) : reader_.buffer(rows * shape_.channels);
  }

  // The memory of a block, where it is one run.
  gemm::Ahead ahead(const Rows& rows) const {
    if (shape_.channel_major) return {};
    return {reader_.at(shape_.row(rows, slab_rows_)), rows.count * shape_.channels * reader_.element_size()};
  }

  // The block as [rows, channels].
  const T* read(const Rows& rows, T* room) const {
    if (!shape_.channel_major) return reader_.read(shape_.row(rows, slab_rows_), rows.count * shape_.channels, room);
    T* const runs = room + rows.count * shape_.channels;
    for (int64_t c = 0; c < shape_.channels; c += kRuns) {
      const int64_t some = std::min(kRuns, shape_.channels - c);
      if (reader_.buffer(1) == 0) {
        gemm::transpose(reader_.read(shape_.run(rows, c), 1, nullptr), shape_.tokens, some, rows.count, room + c,
                        shape_.channels);
      } else {
        for (int64_t k = 0; k < some; ++k) reader_.read(shape_.run(rows, c + k), rows.count, runs + k * rows.count);
        gemm::transpose(runs, rows.count, some, rows.count, room + c, shape_.channels);
      }
    }
    return room;
  }

 private:
  static constexpr int64_t kRuns = 16;  // channels converted at a time
  Reader<T> reader_;
  TokenShape shape_;
  int64_t slab_rows_;
};

template <class T>
class TokenWriter {
 public:
  TokenWriter(const Tensor& tensor, bool channel_major, int64_t slab_rows)
      : writer_(tensor), shape_{tensor.size(1), tensor.size(2), channel_major}, slab_rows_(slab_rows) {}

  int64_t room(int64_t rows) const {
    return shape_.channel_major ? rows * (shape_.channels + kRuns) : writer_.buffer(rows * shape_.channels);
  }

  // Where to make the block [rows, channels]: the tensor itself or the room.
  T* place(const Rows& rows, T* room) const {
    return shape_.channel_major ? room : writer_.place(shape_.row(rows, slab_rows_), room);
  }

  // Writes a block that lies anywhere.
  void write(const Rows& rows, const T* from, T* room) const {
    T* const to = place(rows, room);
    if (!shape_.channel_major) {
      if (writer_.buffered()) {
        writer_.commit(shape_.row(rows, slab_rows_), rows.count * shape_.channels, from);
      } else if (to != from) {
        std::copy_n(from, rows.count * shape_.channels, to);
      }
      return;
    }
    T* const runs = room + rows.count * shape_.channels;
    for (int64_t c = 0; c < shape_.channels; c += kRuns) {
      const int64_t some = std::min(kRuns, shape_.channels - c);
      if (writer_.buffered()) {
        gemm::transpose(from + c, shape_.channels, rows.count, some, runs, rows.count);
        for (int64_t k = 0; k < some; ++k) writer_.commit(shape_.run(rows, c + k), rows.count, runs + k * rows.count);
      } else {
        gemm::transpose(from + c, shape_.channels, rows.count, some, writer_.place(shape_.run(rows, c), nullptr),
                        shape_.tokens);
      }
    }
  }

 private:
  static constexpr int64_t kRuns = 16;
  Writer<T> writer_;
  TokenShape shape_;
  int64_t slab_rows_;
};

}  // namespace transkd
