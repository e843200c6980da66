#pragma once

#include <cstddef>
#include <memory>

namespace expertflow {

// Page-locked host memory that every device can read and write, for rings, flags and staging.
// Allocating takes about half a second for each GiB, so a pool of experts is ordinary memory,
// filled first and then registered (HostRegistration).
class PinnedMemory {
 public:
  // Throws CudaError, with the size, if the system does not grant it.
  explicit PinnedMemory(size_t num_bytes);

  std::byte* data() const { return data_.get(); }
  size_t num_bytes() const { return num_bytes_; }

 private:
  struct Free {
    void operator()(std::byte* data) const;
  };
  std::unique_ptr<std::byte, Free> data_;
  size_t num_bytes_;
};

}  // namespace expertflow
