#include "wmma.h"

#include <cstdint>
#include <sstream>

#include "block.h"
#include "sanitizers.h"

namespace cuda_on_cpu {
namespace {

constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr size_t kTileAlignment = 32, kRowAlignment = 16;

const Gathered& gather_all(const char* name, uint64_t value, Site site) {
  const Gathered& gathered = gather(name, kAllLanes, value, site);
  if (gathered.lanes != kAllLanes) {
    Block::running->fail(std::string(name) + ": some lanes of the warp have returned or do not exist", site);
  }
  return gathered;
}

void require_uniform(const char* name, const char* what, uint64_t value, Site site) {
  const Gathered& gathered = gather_all(name, value, site);
  for (uint64_t other : gathered.value) {
    if (other != gathered.value[0]) {
      Block::running->fail(std::string(name) + ": the lanes of the warp come with different " + what, site);
    }
  }
}

}  // namespace

unsigned wmma_lane() { return Block::running->current().linear % kLanes; }

void check_tile(const char* name, const void* tile, unsigned leading, size_t element_bytes, int layout, Site site) {
  const tsan::Unseen unseen;
  const auto address = reinterpret_cast<uintptr_t>(tile);
  require_uniform(name, "pointers", address, site);
  require_uniform(name, "leading dimensions or layouts", uint64_t{leading} << 1 | static_cast<unsigned>(layout), site);
  std::ostringstream message;
  if (address % kTileAlignment != 0) {
    message << name << ": expected a pointer aligned to " << kTileAlignment << " bytes, got one "
            << address % kTileAlignment << " bytes past such a place";
  } else if (leading * element_bytes % kRowAlignment != 0) {
    message << name << ": expected a leading dimension that is a multiple of " << kRowAlignment / element_bytes
            << " elements, got " << leading;
  } else {
    return;
  }
  Block::running->fail(message.str(), site);
}

void multiply(const Multiplication& lane_part, float* d, Site site) {
  const tsan::Unseen unseen;
  const auto [m, n, k, a, b, c] = lane_part;
  // Until the second meeting below every lane waits in here, so that the arrays of all are there to be read.
  const Gathered parts = gather_all("mma_sync", reinterpret_cast<uint64_t>(&lane_part), site);
  const auto part = [&](unsigned lane) { return reinterpret_cast<const Multiplication*>(parts.value[lane]); };
  float all_a[32 * 16], all_b[16 * 32];
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    for (unsigned i = 0; i < m * k / kLanes; ++i) all_a[element_of(lane, i, m * k)] = part(lane)->a[i];
    for (unsigned i = 0; i < k * n / kLanes; ++i) all_b[element_of(lane, i, k * n)] = part(lane)->b[i];
  }
  for (unsigned i = 0; i < m * n / kLanes; ++i) {
    const unsigned element = element_of(wmma_lane(), i, m * n);
    float sum = c[i];
    for (unsigned j = 0; j < k; ++j) sum += all_a[element / n * k + j] * all_b[j * n + element % n];
    d[i] = sum;
  }
  gather_all("mma_sync", 0, site);
}

}  // namespace cuda_on_cpu
