#pragma once

#include <cstddef>

namespace expertflow {

// Anonymous memory from the operating system: zeroed, page-aligned, in huge pages where the system
// grants them, and taken only as it is touched. Owns its pages.
class MappedMemory {
 public:
  MappedMemory() = default;
  // Throws std::bad_alloc if the address space or the limits of the process do not allow it.
  explicit MappedMemory(size_t num_bytes);
  MappedMemory(MappedMemory&& other) noexcept;
  MappedMemory& operator=(MappedMemory&& other) noexcept;
  ~MappedMemory();

  // Pages that are not touched yet come from NUMA node `node` while it has any. A hint: nothing
  // happens if the system has no such node, or `node` is negative.
  void PreferNode(int node) const;

  std::byte* data() const { return data_; }
  size_t num_bytes() const { return num_bytes_; }

 private:
  std::byte* data_ = nullptr;
  size_t num_bytes_ = 0;
};

}  // namespace expertflow
