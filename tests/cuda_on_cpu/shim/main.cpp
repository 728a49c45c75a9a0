// The main program of every driver: CASE_IN CASE_OUT [SEED].
#include <cstdio>
#include <cstdlib>
#include <exception>

#include "../archive.h"
#include "launch.h"

int main(int count, char** arguments) {
  if (count < 3 || count > 4) {
    std::fprintf(stderr, "usage: %s CASE_IN CASE_OUT [SEED]\n", arguments[0]);
    return 2;
  }
  cuda_on_cpu::set_seed(count == 4 ? std::strtoull(arguments[3], nullptr, 10) : 0);
  try {
    const cuda_on_cpu::Archive in(arguments[1]);
    cuda_on_cpu::Results out;
    cuda_on_cpu::drive(in, out);
    out.write(arguments[2]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", arguments[0], error.what());
    return 2;
  }
  return 0;
}
