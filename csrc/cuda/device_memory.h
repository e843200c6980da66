#pragma once

#include <cstddef>
#include <memory>
#include <new>
#include <string>

namespace expertflow {

// The device has no room. The message says how much was asked for and how much is free.
class OutOfDeviceMemory : public std::bad_alloc {
 public:
  explicit OutOfDeviceMemory(std::string message) : message_(std::move(message)) {}
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

// Memory on the device that is current when it is made. Whoever frees it sees to it that no work
// uses it any more.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  // Throws OutOfDeviceMemory, which names `purpose`; CudaError for any other failure.
  DeviceMemory(size_t num_bytes, const std::string& purpose);

  std::byte* data() const { return data_.get(); }
  size_t num_bytes() const { return num_bytes_; }

 private:
  struct Free {
    void operator()(std::byte* data) const;
  };
  std::unique_ptr<std::byte, Free> data_;
  size_t num_bytes_ = 0;
};

}  // namespace expertflow
