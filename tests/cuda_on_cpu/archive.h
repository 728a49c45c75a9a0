// The cases that Python hands to a driver and the results that it hands back: named arrays and scalars in one file.
// runner.py writes and reads the same format.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace cuda_on_cpu {

enum class Type : uint32_t { f32, bf16, f16, f64, i32, i64, u8 };

size_t size_of(Type type);

// A dense array in a heap allocation of its own that ends with the last element, so that AddressSanitizer sees every
// access past it. The first element lies `misalignment` bytes past a 256-byte boundary (what cudaMalloc gives).
// Strides count elements; they say how Python shall see the array and have no other meaning here.
class Array {
 public:
  // Contiguous and filled with 0xff bytes, which are NaNs in all floating types: memory that was never written.
  Array(Type type, std::vector<int64_t> shape, size_t misalignment = 0);
  Array(Type type, std::vector<int64_t> shape, std::vector<int64_t> strides, size_t misalignment);
  // As large and laid out as another one, filled with 0xff bytes.
  static Array like(const Array& other) {
    return Array(other.type_, other.shape_, other.strides_, other.misalignment_);
  }

  Type type() const { return type_; }
  const std::vector<int64_t>& shape() const { return shape_; }
  const std::vector<int64_t>& strides() const { return strides_; }
  int64_t count() const { return count_; }
  size_t bytes() const { return static_cast<size_t>(count_) * size_of(type_); }

  // T must be as large as an element; its name is not checked, since every kernel has its own types.
  template <class T>
  T* as() const {
    require_size(sizeof(T));
    return static_cast<T*>(data());
  }
  void* data() const { return memory_.get() + misalignment_; }
  void fill_bytes(int byte);

 private:
  struct Free {
    void operator()(unsigned char* memory) const;
  };
  void require_size(size_t size) const;

  Type type_;
  std::vector<int64_t> shape_, strides_;
  size_t misalignment_;
  int64_t count_;
  std::unique_ptr<unsigned char, Free> memory_;
};

// What came from Python. A name that is not there, or is of another kind, ends the program with a message.
class Archive {
 public:
  explicit Archive(const std::string& path);
  bool has(const std::string& name) const { return entries_.count(name) != 0; }
  int64_t integer(const std::string& name) const;
  double real(const std::string& name) const;  // an integer will do as well
  std::vector<int64_t> integers(const std::string& name) const;
  std::vector<double> reals(const std::string& name) const;
  std::string text(const std::string& name) const;
  const Array& array(const std::string& name) const;

 private:
  std::map<std::string, Array> entries_;
};

// What goes back to Python.
class Results {
 public:
  void add(const std::string& name, Array array);
  void add(const std::string& name, int64_t value);
  void add(const std::string& name, double value);
  void write(const std::string& path) const;

 private:
  std::map<std::string, Array> entries_;
};

// The driver's own part: runs the kernels on a case. main() is the runtime's: `driver CASE_IN CASE_OUT [SEED]`.
void drive(const Archive& in, Results& out);

}  // namespace cuda_on_cpu
