#include "../archive.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <new>
#include <utility>

namespace cuda_on_cpu {
namespace {

constexpr char kMagic[] = "cuda_on_cpu 1\n";
constexpr size_t kDeviceAlignment = 256;

[[noreturn]] void refuse(const std::string& message) {
  std::fprintf(stderr, "cuda_on_cpu: %s\n", message.c_str());
  std::_Exit(2);
}

int64_t product(const std::vector<int64_t>& shape) {
  int64_t count = 1;
  for (int64_t size : shape) count *= size;
  return count;
}

std::vector<int64_t> contiguous(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0; stride *= shape[d]) strides[d] = stride;
  return strides;
}

template <class T>
T get(std::istream& file) {
  T value{};
  file.read(reinterpret_cast<char*>(&value), sizeof value);
  return value;
}

template <class T>
void put(std::ostream& file, T value) {
  file.write(reinterpret_cast<const char*>(&value), sizeof value);
}

}  // namespace

size_t size_of(Type type) {
  constexpr size_t kSizes[] = {4, 2, 2, 8, 4, 8, 1};
  return kSizes[static_cast<size_t>(type)];
}

Array::Array(Type type, std::vector<int64_t> shape, size_t misalignment)
    : Array(type, shape, contiguous(shape), misalignment) {}

Array::Array(Type type, std::vector<int64_t> shape, std::vector<int64_t> strides, size_t misalignment)
    : type_(type),
      shape_(std::move(shape)),
      strides_(std::move(strides)),
      misalignment_(misalignment),
      count_(product(shape_)),
      memory_(static_cast<unsigned char*>(::operator new(bytes() + misalignment, std::align_val_t(kDeviceAlignment)))) {
  fill_bytes(0xff);
}

void Array::Free::operator()(unsigned char* memory) const {
  ::operator delete(memory, std::align_val_t(kDeviceAlignment));
}

void Array::fill_bytes(int byte) { std::memset(data(), byte, bytes()); }

void Array::require_size(size_t size) const {
  if (size != size_of(type_)) {
    refuse("an array with elements of " + std::to_string(size_of(type_)) + " bytes is used as one with elements of " +
           std::to_string(size) + " bytes");
  }
}

Archive::Archive(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  char magic[sizeof kMagic - 1] = {};
  file.read(magic, sizeof magic);
  if (std::memcmp(magic, kMagic, sizeof magic) != 0) refuse(path + ": expected a case file, as runner.py writes it");
  while (file.peek() != std::ifstream::traits_type::eof()) {
    std::string name(get<uint32_t>(file), '\0');
    file.read(name.data(), static_cast<std::streamsize>(name.size()));
    const auto type = static_cast<Type>(get<uint32_t>(file));
    std::vector<int64_t> shape(get<uint32_t>(file)), strides(shape.size());
    for (int64_t& size : shape) size = get<int64_t>(file);
    for (int64_t& stride : strides) stride = get<int64_t>(file);
    const auto misalignment = get<uint64_t>(file);
    Array array(type, shape, strides, misalignment);
    file.read(static_cast<char*>(array.data()), static_cast<std::streamsize>(array.bytes()));
    if (!file) refuse(path + ": the file ends inside of " + name);
    entries_.emplace(name, std::move(array));
  }
}

const Array& Archive::array(const std::string& name) const {
  const auto found = entries_.find(name);
  if (found == entries_.end()) refuse("the case has no " + name);
  return found->second;
}

std::vector<int64_t> Archive::integers(const std::string& name) const {
  const Array& entry = array(name);
  if (entry.type() != Type::i64) refuse(name + ": expected integers");
  return std::vector<int64_t>(entry.as<int64_t>(), entry.as<int64_t>() + entry.count());
}

std::vector<double> Archive::reals(const std::string& name) const {
  const Array& entry = array(name);
  if (entry.type() == Type::i64) {
    const auto values = integers(name);
    return std::vector<double>(values.begin(), values.end());
  }
  if (entry.type() != Type::f64) refuse(name + ": expected numbers");
  return std::vector<double>(entry.as<double>(), entry.as<double>() + entry.count());
}

int64_t Archive::integer(const std::string& name) const {
  const auto values = integers(name);
  if (values.size() != 1) refuse(name + ": expected one integer, got " + std::to_string(values.size()));
  return values[0];
}

double Archive::real(const std::string& name) const {
  const auto values = reals(name);
  if (values.size() != 1) refuse(name + ": expected one number, got " + std::to_string(values.size()));
  return values[0];
}

std::string Archive::text(const std::string& name) const {
  const Array& entry = array(name);
  if (entry.type() != Type::u8) refuse(name + ": expected a text");
  return std::string(static_cast<const char*>(entry.data()), entry.bytes());
}

void Results::add(const std::string& name, Array array) {
  if (!entries_.emplace(name, std::move(array)).second) refuse("the result " + name + " is added twice");
}

void Results::add(const std::string& name, int64_t value) {
  Array array(Type::i64, {});
  *array.as<int64_t>() = value;
  add(name, std::move(array));
}

void Results::add(const std::string& name, double value) {
  Array array(Type::f64, {});
  *array.as<double>() = value;
  add(name, std::move(array));
}

void Results::write(const std::string& path) const {
  std::ofstream file(path, std::ios::binary);
  file.write(kMagic, sizeof kMagic - 1);
  for (const auto& [name, array] : entries_) {
    put(file, static_cast<uint32_t>(name.size()));
    file.write(name.data(), static_cast<std::streamsize>(name.size()));
    put(file, static_cast<uint32_t>(array.type()));
    put(file, static_cast<uint32_t>(array.shape().size()));
    for (int64_t size : array.shape()) put(file, size);
    for (int64_t stride : array.strides()) put(file, stride);
    put(file, uint64_t{0});
    file.write(static_cast<const char*>(array.data()), static_cast<std::streamsize>(array.bytes()));
  }
  if (!file.flush()) refuse(path + ": cannot be written");
}

}  // namespace cuda_on_cpu
