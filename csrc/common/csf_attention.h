// The part of csf that works on [samples, channels] only: statistics, squeeze layers, attention, and their gradients.
// It is a few thousand numbers, so it is computed in double throughout: the squeeze layer's batch norm over two samples
// can amplify an error a thousandfold.
//
// The functions are run by a team of threads: a `Team` has each(count, f), which calls f(0) ... f(count - 1) in any
// order, on any thread, and returns when all are done. So one text serves CPU (one thread) and CUDA (one block).
#pragma once

#include <cmath>
#include <cstdint>

#include "common/batch_norm.h"
#include "common/host_device.h"

namespace transkd {
namespace csf {

// The parameters' gradients have the same form.
struct Layers {
  Values fc;                            // [squeezed, channels]
  Values head_weight[2], head_bias[2];  // [channels, squeezed], [channels]
};

struct Sizes {
  int64_t samples;       // of the global batch, over which the squeeze layer normalises
  int64_t first, batch;  // our own: [first, first + batch)
  int64_t channels, squeezed;
  int64_t pixels;  // of a plane of z

  TRANSKD_INLINE int64_t planes() const { return samples * channels; }
  TRANSKD_INLINE int64_t entries() const { return samples * squeezed; }
  TRANSKD_INLINE double values() const { return static_cast<double>(samples) * static_cast<double>(pixels); }
  TRANSKD_INLINE bool own(int64_t sample) const { return sample >= first && sample < first + batch; }
};

// How a plane is cut into parts of whole runs of 64 pixels; the last ones may be empty.
struct Parts {
  int64_t pixels, length;

  TRANSKD_INLINE Parts(int64_t plane_pixels, int64_t count)
      : pixels(plane_pixels), length(((plane_pixels + count - 1) / count + 63) / 64 * 64) {}
  TRANSKD_INLINE int64_t begin(int64_t part) const { return part * length < pixels ? part * length : pixels; }
  TRANSKD_INLINE int64_t size(int64_t part) const { return begin(part + 1) - begin(part); }
};

// What the forward leaves for the backward: one vector of doubles in sections.
struct State {
  double *mean, *invstd;            // [channels]
  double* fc_invstd;                // [squeezed]
  double *logit, *pooled, *centre;  // [samples, channels]: l_0 - l_1; g; mean of z less the channel's
  double* squeezed;                 // [samples, squeezed]: normalised, before affine and ReLU

  TRANSKD_INLINE State(double* data, const Sizes& sizes)
      : mean(data),
        invstd(mean + sizes.channels),
        fc_invstd(invstd + sizes.channels),
        logit(fc_invstd + sizes.squeezed),
        pooled(logit + sizes.planes()),
        centre(pooled + sizes.planes()),
        squeezed(centre + sizes.planes()) {}

  static int64_t size(const Sizes& sizes) {
    return 2 * sizes.channels + sizes.squeezed + 3 * sizes.planes() + sizes.entries();
  }
};

// What the large passes read: rows [batch, channels] of the compute type.
//   v  = scale (z - shift) + offset + up_weight up(y)
//   dz = grad_weight G + z_weight (z - shift) + constant,  dy = up_weight (sum of G over the window) + pixel_share m
template <class T>
struct Coefficients {
  T *scale, *shift, *offset, *up_weight;
  T *grad_weight, *z_weight, *constant, *pixel_share;

  static constexpr int64_t kRows = 8;
  Coefficients() = default;
  TRANSKD_INLINE Coefficients(T* data, const Sizes& sizes) {
    T** const rows[kRows] = {&scale, &shift, &offset, &up_weight, &grad_weight, &z_weight, &constant, &pixel_share};
    for (int64_t k = 0; k < kRows; ++k) *rows[k] = data + k * sizes.batch * sizes.channels;
  }
};

// The softmax of (l_0, l_1) from l_0 - l_1; also the small one of the two is exact.
struct Attention {
  double first, second;

  TRANSKD_INLINE explicit Attention(double logit) {
    const double ratio = exp(-fabs(logit)), large = 1 / (1 + ratio), small = ratio * large;
    first = logit < 0 ? small : large;
    second = logit < 0 ? large : small;
  }
};

TRANSKD_INLINE bool is_minus_infinity(double x) { return x < 0 && x - x != 0; }

// Passes NaN, as torch's ReLU does.
TRANSKD_INLINE double relu(double x) { return x <= 0 ? 0 : x; }

// Sums over the parts [first, last) of a plane that csf_reduce cut, additive over ranges of parts.
struct Moments {
  double z = 0, squares = 0, y = 0;  // z and squares about `about`

  // sums [samples, parts, 3, channels].
  TRANSKD_INLINE static const double* entry(const double* sums, int64_t sample, int64_t part, int64_t parts,
                                            int64_t channel, int64_t channels) {
    return sums + (sample * parts + part) * 3 * channels + channel;
  }

  TRANSKD_INLINE void add(const double* entry, int64_t channels, double pixels, double about) {
    if (pixels == 0) {
      y += entry[2 * channels];
      return;
    }
    const double distance = entry[0] - about;
    z += pixels * distance;
    squares += entry[channels] + pixels * distance * distance;
    y += entry[2 * channels];
  }
};

// Calls then(i, the sum of term(i, k) over k < length) for all i < count. CUDA's team has an overload, by which several
// threads share a sum.
template <class Team, class Term, class Then>
TRANSKD_INLINE void each_sum(const Team& team, int64_t count, int64_t length, Term term, Then then) {
  team.each(count, [&](int64_t i) {
    double sum = 0;
    for (int64_t k = 0; k < length; ++k) sum += term(i, k);
    then(i, sum);
  });
}

// Likewise of the entries of a table: then(row, column, the sum of term(row, column, k)). CPU's team has an overload
// without the divisions.
template <class Team, class Term, class Then>
TRANSKD_INLINE void each_sum(const Team& team, int64_t rows, int64_t columns, int64_t length, Term term, Then then) {
  each_sum(
      team, rows * columns, length, [&](int64_t i, int64_t k) { return term(i / columns, i % columns, k); },
      [&](int64_t i, double sum) { then(i / columns, i % columns, sum); });
}

// Where the merged moments of all planes stand before attention(): in sections of the state that it fills later.
TRANSKD_INLINE void put_moments(const State& state, const Sizes& sizes, int64_t plane, const Moments& moments,
                                double about) {
  const double pixels = static_cast<double>(sizes.pixels);
  state.centre[plane] = about + moments.z / pixels;
  state.logit[plane] = moments.squares - moments.z * (moments.z / pixels);
  state.pooled[plane] = moments.y / pixels;
}

// The forward, after put_moments() of every plane: fills state and the coefficients of the forward, updates running
// statistics and counters.
template <class Team, class T>
TRANSKD_INLINE void attention(const Team& team, const Sizes& sizes, const BatchNorm& bn, const BatchNorm& fc_bn,
                              const Layers& layers, const State& state, const Coefficients<T>& out) {
  const int64_t channels = sizes.channels, squeezed = sizes.squeezed;
  team.each(channels, [&](int64_t c) {
    double mean, variance;
    if (of_batch(bn.norm)) {
      double sum = 0, squares = 0;
      for (int64_t b = 0; b < sizes.samples; ++b) sum += state.centre[b * channels + c];
      mean = sum / static_cast<double>(sizes.samples);
      for (int64_t b = 0; b < sizes.samples; ++b) {
        const double distance = state.centre[b * channels + c] - mean;
        squares += state.logit[b * channels + c] + static_cast<double>(sizes.pixels) * distance * distance;
      }
      variance = squares / sizes.values();
      track(bn, c, mean, variance, sizes.values());
    } else {
      mean = bn.running_mean[c];
      variance = bn.running_var[c];
    }
    const double invstd = 1 / sqrt(variance + bn.eps);
    const double scale = bn.weight.get(c, 1) * invstd, bias = bn.bias.get(c, 0);
    state.mean[c] = mean;
    state.invstd[c] = invstd;
    for (int64_t b = 0; b < sizes.samples; ++b) {
      const int64_t plane = b * channels + c;
      state.centre[plane] -= mean;
      state.pooled[plane] += scale * state.centre[plane] + bias;
    }
  });
  each_sum(
      team, sizes.samples, squeezed, channels,
      [&](int64_t b, int64_t l, int64_t c) { return layers.fc[l * channels + c] * state.pooled[b * channels + c]; },
      [&](int64_t b, int64_t l, double sum) { state.squeezed[b * squeezed + l] = sum; });
  team.each(squeezed, [&](int64_t l) {
    double mean = 0, invstd = 1;
    if (of_batch(fc_bn.norm)) {
      const double count = static_cast<double>(sizes.samples);
      double sum = 0, squares = 0;
      for (int64_t b = 0; b < sizes.samples; ++b) sum += state.squeezed[b * squeezed + l];
      mean = sum / count;
      for (int64_t b = 0; b < sizes.samples; ++b) {
        const double distance = state.squeezed[b * squeezed + l] - mean;
        squares += distance * distance;
      }
      invstd = 1 / sqrt(squares / count + fc_bn.eps);
      track(fc_bn, l, mean, squares / count, count);
    } else if (fc_bn.norm == Norm::kRunning) {
      mean = fc_bn.running_mean[l];
      invstd = 1 / sqrt(fc_bn.running_var[l] + fc_bn.eps);
    }
    state.fc_invstd[l] = invstd;
    for (int64_t b = 0; b < sizes.samples; ++b) {
      double& entry = state.squeezed[b * squeezed + l];
      entry = (entry - mean) * invstd;
    }
  });
  // The softmax over two heads depends on the difference of their logits only.
  const auto term = [&](int64_t b, int64_t c, int64_t l) {
    const int64_t entry = c * squeezed + l;
    const double s = state.squeezed[b * squeezed + l];
    return (layers.head_weight[0][entry] - layers.head_weight[1][entry]) *
           relu(fc_bn.weight.get(l, 1) * s + fc_bn.bias.get(l, 0));
  };
  each_sum(team, sizes.samples, channels, squeezed, term, [&](int64_t b, int64_t c, double sum) {
    const int64_t plane = b * channels + c;
    // No channel reads the counters any more.
    if (plane == 0 && bn.norm == Norm::kTracked && bn.batches) ++*bn.batches;
    if (plane == 0 && fc_bn.norm == Norm::kTracked && fc_bn.batches) ++*fc_bn.batches;
    const double difference = sum + (layers.head_bias[0][c] - layers.head_bias[1][c]);
    // A bias of minus infinity switches a branch off, as in torch's softmax; any other infinity shall show.
    const bool switched_off = is_minus_infinity(layers.head_bias[0][c]) || is_minus_infinity(layers.head_bias[1][c]);
    const double logit = switched_off ? difference : difference + 0 * difference;
    state.logit[plane] = logit;
    if (!sizes.own(b)) return;
    const int64_t row = plane - sizes.first * channels;
    const double mean = state.mean[c], scale = bn.weight.get(c, 1) * state.invstd[c];
    const Attention weight(logit);
    const T shift = static_cast<T>(mean);
    out.shift[row] = shift;
    out.scale[row] = static_cast<T>(weight.first * scale);
    out.offset[row] = static_cast<T>(weight.first * (bn.bias.get(c, 0) - scale * (mean - static_cast<double>(shift))));
    out.up_weight[row] = static_cast<T>(weight.second);
  });
}

// Scratch of the backward, in doubles.
struct Scratch {
  double *grad, *grad_z;   // [samples, channels]: sums of G and G (z - mean)
  double* grad_y;          // [samples, channels]: sums of G up(y), then dL/dg
  double* activation;      // [samples, squeezed]: dL/dr, then dL/ds
  double* logit;           // [samples, channels]: dL/dlogit
  double *first, *second;  // [samples, channels]: the attention
  double* squeezed;        // [samples, squeezed]: r

  TRANSKD_INLINE Scratch(double* data, const Sizes& sizes)
      : grad(data),
        grad_z(grad + sizes.planes()),
        grad_y(grad_z + sizes.planes()),
        activation(grad_y + sizes.planes()),
        logit(activation + sizes.entries()),
        first(logit + sizes.planes()),
        second(first + sizes.planes()),
        squeezed(second + sizes.planes()) {}

  static int64_t size(const Sizes& sizes) { return 6 * sizes.planes() + 2 * sizes.entries(); }
};

// Gradients of a batch norm's affine parameters.
struct AffineGradients {
  Values weight, bias;
};

// The backward, after the sums of every plane stand in scratch.grad, grad_z and grad_y. Gradients of parameters are our
// own samples' share, those that are not given are left out; coefficients are those of the backward.
template <class Team, class T>
TRANSKD_INLINE void attention_backward(const Team& team, const Sizes& sizes, const BatchNorm& bn,
                                       const BatchNorm& fc_bn, const Layers& layers, const State& state,
                                       const Scratch& scratch, const AffineGradients& bn_gradients,
                                       const AffineGradients& fc_bn_gradients, const Layers& gradients,
                                       const Coefficients<T>& out) {
  const int64_t channels = sizes.channels, squeezed = sizes.squeezed;
  team.each(channels, [&](int64_t c) {
    const double scale = bn.weight.get(c, 1) * state.invstd[c], bias = bn.bias.get(c, 0);
    for (int64_t b = 0; b < sizes.samples; ++b) {
      const int64_t plane = b * channels + c;
      const Attention weight(state.logit[plane]);
      scratch.first[plane] = weight.first;
      scratch.second[plane] = weight.second;
      scratch.logit[plane] = weight.first * weight.second *
                             (scale * scratch.grad_z[plane] + bias * scratch.grad[plane] - scratch.grad_y[plane]);
    }
  });
  each_sum(
      team, sizes.samples, squeezed, channels,
      [&](int64_t b, int64_t l, int64_t c) {
        const int64_t entry = c * squeezed + l;
        return scratch.logit[b * channels + c] * (layers.head_weight[0][entry] - layers.head_weight[1][entry]);
      },
      [&](int64_t b, int64_t l, double sum) {
        const int64_t entry = b * squeezed + l;
        const double activation = fc_bn.weight.get(l, 1) * state.squeezed[entry] + fc_bn.bias.get(l, 0);
        scratch.squeezed[entry] = relu(activation);
        scratch.activation[entry] = activation <= 0 ? 0 : sum;
      });
  team.each(squeezed, [&](int64_t l) {
    double sum = 0, product = 0, own_sum = 0, own_product = 0;
    for (int64_t b = 0; b < sizes.samples; ++b) {
      const double value = scratch.activation[b * squeezed + l];
      sum += value;
      product += value * state.squeezed[b * squeezed + l];
      if (sizes.own(b)) {
        own_sum += value;
        own_product += value * state.squeezed[b * squeezed + l];
      }
    }
    fc_bn_gradients.weight.set(l, own_product);
    fc_bn_gradients.bias.set(l, own_sum);
    if (fc_bn.norm == Norm::kNone) return;
    const double scale = fc_bn.weight.get(l, 1) * state.fc_invstd[l], count = static_cast<double>(sizes.samples);
    for (int64_t b = 0; b < sizes.samples; ++b) {
      double& value = scratch.activation[b * squeezed + l];
      if (of_batch(fc_bn.norm)) value -= sum / count + state.squeezed[b * squeezed + l] * (product / count);
      value *= scale;
    }
  });
  each_sum(
      team, sizes.samples, channels, squeezed,
      [&](int64_t b, int64_t c, int64_t l) {
        return scratch.activation[b * squeezed + l] * layers.fc[l * channels + c];
      },
      [&](int64_t b, int64_t c, double sum) { scratch.grad_y[b * channels + c] = sum; });
  each_sum(
      team, squeezed, channels, sizes.batch,
      [&](int64_t l, int64_t c, int64_t k) {
        const int64_t b = sizes.first + k;
        return scratch.activation[b * squeezed + l] * state.pooled[b * channels + c];
      },
      [&](int64_t l, int64_t c, double sum) { gradients.fc.set(l * channels + c, sum); });
  each_sum(
      team, channels, squeezed, sizes.batch,
      [&](int64_t c, int64_t l, int64_t k) {
        const int64_t b = sizes.first + k;
        return scratch.logit[b * channels + c] * scratch.squeezed[b * squeezed + l];
      },
      [&](int64_t c, int64_t l, double sum) {
        gradients.head_weight[0].set(c * squeezed + l, sum);
        gradients.head_weight[1].set(c * squeezed + l, -sum);
      });
  team.each(channels, [&](int64_t c) {
    const double pixels = static_cast<double>(sizes.pixels);
    double sum = 0, product = 0, own_sum = 0, own_product = 0, head = 0;
    for (int64_t b = 0; b < sizes.samples; ++b) {
      const int64_t plane = b * channels + c;
      const double weight = scratch.first[plane], pooled = scratch.grad_y[plane];
      const double dx = weight * scratch.grad[plane] + pooled;
      const double dx_z = weight * scratch.grad_z[plane] + pooled * state.centre[plane];
      sum += dx;
      product += dx_z;
      if (sizes.own(b)) {
        own_sum += dx;
        own_product += dx_z;
        head += scratch.logit[plane];
      }
    }
    const double invstd = state.invstd[c], mean = state.mean[c], scale = bn.weight.get(c, 1) * invstd;
    bn_gradients.weight.set(c, own_product * invstd);
    bn_gradients.bias.set(c, own_sum);
    gradients.head_bias[0].set(c, head);
    gradients.head_bias[1].set(c, -head);
    const bool batch = of_batch(bn.norm);
    const double z_weight = batch ? -scale * invstd * (product * invstd / sizes.values()) : 0;
    const double constant = batch ? sum / sizes.values() : 0;
    for (int64_t b = sizes.first; b < sizes.first + sizes.batch; ++b) {
      const int64_t plane = b * channels + c, row = plane - sizes.first * channels;
      const T shift = static_cast<T>(mean);
      const double pooled = scratch.grad_y[plane] / pixels;
      out.shift[row] = shift;
      out.grad_weight[row] = static_cast<T>(scale * scratch.first[plane]);
      out.z_weight[row] = static_cast<T>(z_weight);
      out.constant[row] = static_cast<T>(scale * (pooled - constant) + z_weight * (static_cast<double>(shift) - mean));
      out.up_weight[row] = static_cast<T>(scratch.second[plane]);
      out.pixel_share[row] = static_cast<T>(pooled);
    }
  });
}

}  // namespace csf
}  // namespace transkd
