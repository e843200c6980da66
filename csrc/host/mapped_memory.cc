#include "host/mapped_memory.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <new>
#include <utility>

namespace expertflow {

MappedMemory::MappedMemory(size_t num_bytes) : num_bytes_(num_bytes) {
  void* mapped = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<std::byte*>(mapped);
  madvise(data_, num_bytes, MADV_HUGEPAGE);  // a hint: without it the pages are small
}

MappedMemory::MappedMemory(MappedMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), num_bytes_(std::exchange(other.num_bytes_, 0)) {}

MappedMemory& MappedMemory::operator=(MappedMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(num_bytes_, other.num_bytes_);
  return *this;
}

void MappedMemory::PreferNode(int node) const {
  constexpr int kPreferred = 1;  // MPOL_PREFERRED of <linux/mempolicy.h>; there is no libc call
  constexpr int kMaxNodes = 64;
  if (node < 0 || node >= kMaxNodes || data_ == nullptr) return;
  const uint64_t nodes = uint64_t{1} << node;
  syscall(SYS_mbind, data_, num_bytes_, kPreferred, &nodes, kMaxNodes + 1, 0);
}

MappedMemory::~MappedMemory() {
  if (data_ != nullptr) munmap(data_, num_bytes_);
}

}  // namespace expertflow
