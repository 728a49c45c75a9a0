// Calls every variant of csrc/cpu/gemm.cpp that this machine runs. In, from stdin: 4 or 8 (bytes of an element), then
// calls. Out: the names of the variants in a line, then per call and variant the array c as the call left it.
#include "cpu/gemm.cpp"  // its variants are static

#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

namespace transkd {
namespace gemm {
namespace {

template <class T>
struct Variant {
  const char* name;
  void (*pack_panels)(const T*, int64_t, int64_t, int64_t, T*, int64_t);
  void (*pack_strips)(const T*, int64_t, int64_t, int64_t, T*, int64_t);
  void (*transpose)(const T*, int64_t, int64_t, int64_t, T*, int64_t);
  void (*multiply)(const T*, int64_t, int64_t, int64_t, const T*, int64_t, T*, int64_t, bool, const Ahead&);
  void (*multiply_transposed)(const T*, int64_t, int64_t, int64_t, const T*, int64_t, int64_t, T*, int64_t, bool);
};

// The clones of the other functions have no names of their own.
#define TRANSKD_MOVES(of, target)                                                                                \
  template <class T>                                                                                             \
  target void panels_##of(const T* from, int64_t ld, int64_t k, int64_t n, T* to, int64_t stride) {              \
    pack<panel_width<T>()>(from, ld, k, n, to, stride);                                                          \
  }                                                                                                              \
  template <class T>                                                                                             \
  target void strips_##of(const T* from, int64_t ld, int64_t k, int64_t m, T* to, int64_t stride) {              \
    pack<kTileRows>(from, ld, k, m, to, stride);                                                                 \
  }                                                                                                              \
  template <class T>                                                                                             \
  target void turned_##of(const T* from, int64_t from_ld, int64_t rows, int64_t columns, T* to, int64_t to_ld) { \
    transpose_with(from, from_ld, rows, columns, to, to_ld);                                                     \
  }
TRANSKD_MOVES(usual, )
#ifdef TRANSKD_HAS_CLONES
TRANSKD_MOVES(v3, __attribute__((target("arch=x86-64-v3"))))
TRANSKD_MOVES(v4, __attribute__((target("arch=x86-64-v4"))))
#endif

template <class T>
std::vector<Variant<T>> variants() {
  std::vector<Variant<T>> here = {
      {"chosen", pack_panels, pack_strips, transpose, multiply, multiply_transposed},
      {"usual", panels_usual<T>, strips_usual<T>, turned_usual<T>, multiply_usual, transposed_usual}};
#ifdef TRANSKD_HAS_CLONES
  if (level() >= 3) here.push_back({"v3", panels_v3<T>, strips_v3<T>, turned_v3<T>, multiply_v3, transposed_v3});
  if (level() >= 4) here.push_back({"v4", panels_v4<T>, strips_v4<T>, turned_v4<T>, multiply_v4, transposed_v4});
#endif
  return here;
}

// An array: how many elements it has, where its matrix begins, how far apart the rows, panels or strips are.
struct Place {
  int64_t begin, elements, stride;
};
struct Call {
  int64_t function, rows, columns, depth, add, ahead;
  Place a, b, c;
};

bool read(void* to, size_t bytes) { return std::fread(to, 1, bytes, stdin) == bytes; }
void write(const void* from, size_t bytes) {
  if (std::fwrite(from, 1, bytes, stdout) != bytes) throw std::runtime_error("the results cannot be written");
}

// Buffers of their own size on the heap: AddressSanitizer sees a step beyond either end.
template <class T>
std::vector<T> array(const Place& place) {
  std::vector<T> values(place.elements);
  if (!read(values.data(), values.size() * sizeof(T))) throw std::runtime_error("the input ends within a call");
  return values;
}

template <class T>
void run(const Variant<T>& with, const Call& call, const std::vector<T>& from_a, const std::vector<T>& from_b,
         std::vector<T>& to) {
  const T *const a = from_a.data() + call.a.begin, *const b = from_b.data() + call.b.begin;
  T* const c = to.data() + call.c.begin;
  const int64_t rows = call.rows, columns = call.columns, depth = call.depth;
  switch (call.function) {
    case 0:
      return with.pack_panels(a, call.a.stride, rows, columns, c, call.c.stride);
    case 1:
      return with.pack_strips(a, call.a.stride, rows, columns, c, call.c.stride);
    case 2:
      return with.transpose(a, call.a.stride, rows, columns, c, call.c.stride);
    case 3:
      return with.multiply(a, call.a.stride, rows, depth, b, columns, c, call.c.stride, call.add != 0,
                           Ahead{from_a.data(), call.ahead});
    case 4:
      return with.multiply_transposed(a, call.a.stride, rows, depth, b, call.b.stride, columns, c, call.c.stride,
                                      call.add != 0);
    default:
      throw std::runtime_error("there is no such function");
  }
}

template <class T>
void run_all() {
  const std::vector<Variant<T>> here = variants<T>();
  std::string names;
  for (const Variant<T>& variant : here) names += (names.empty() ? "" : " ") + std::string(variant.name);
  names += '\n';
  write(names.data(), names.size());
  for (Call call; read(&call, sizeof call);) {
    const std::vector<T> a = array<T>(call.a), b = array<T>(call.b), c = array<T>(call.c);
    for (const Variant<T>& variant : here) {
      std::vector<T> to = c;
      run(variant, call, a, b, to);
      write(to.data(), to.size() * sizeof(T));
    }
  }
}

}  // namespace
}  // namespace gemm
}  // namespace transkd

int main() {
  int64_t bytes = 0;
  if (transkd::gemm::read(&bytes, sizeof bytes) && bytes == 4) {
    transkd::gemm::run_all<float>();
  } else {
    transkd::gemm::run_all<double>();
  }
}
