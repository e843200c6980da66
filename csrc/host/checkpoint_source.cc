#include "host/checkpoint_source.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <stdexcept>
#include <system_error>
#include <utility>

namespace expertflow {
namespace {

std::system_error SystemError(const std::string& what) {
  return std::system_error(errno, std::generic_category(), what);
}

}  // namespace

InputFile::InputFile(std::string path)
    : path_(std::move(path)), descriptor_(open(path_.c_str(), O_RDONLY | O_CLOEXEC)) {
  if (descriptor_ < 0) throw SystemError("cannot open " + path_);
  modified_ = Status().st_mtim;
  // Measured on a cloud disk whose read-ahead is 8 MiB, 8 readers of 1 MiB each, cold: random
  // experts at 1.75 GB/s instead of 1.5.
  posix_fadvise(descriptor_, 0, 0, POSIX_FADV_RANDOM);
}

InputFile::InputFile(InputFile&& other) noexcept
    : path_(std::move(other.path_)),
      descriptor_(std::exchange(other.descriptor_, -1)),
      modified_(other.modified_) {}

InputFile::~InputFile() {
  if (descriptor_ >= 0) close(descriptor_);
}

struct stat InputFile::Status() const {
  struct stat status{};
  if (fstat(descriptor_, &status) != 0) throw SystemError("cannot ask for the state of " + path_);
  return status;
}

size_t InputFile::num_bytes() const { return static_cast<size_t>(Status().st_size); }

void InputFile::ReadAt(size_t offset_bytes, std::span<std::byte> to) const {
  while (!to.empty()) {
    const ssize_t got = pread(descriptor_, to.data(), to.size(), static_cast<off_t>(offset_bytes));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw SystemError("cannot read " + path_);
    if (got == 0) {
      throw std::runtime_error(path_ + " ends at byte " + std::to_string(num_bytes()) +
                               ", before byte " + std::to_string(offset_bytes + to.size()) +
                               " that its header promises: was it cut while in use?");
    }
    to = to.subspan(static_cast<size_t>(got));
    offset_bytes += static_cast<size_t>(got);
  }
  const timespec modified = Status().st_mtim;  // after the read, so that no older bytes pass
  if (modified.tv_sec != modified_.tv_sec || modified.tv_nsec != modified_.tv_nsec) {
    throw std::runtime_error(path_ + " was changed while in use: load the model again");
  }
}

void InputFile::Announce(size_t offset_bytes, size_t num_bytes) const {
  posix_fadvise(descriptor_, static_cast<off_t>(offset_bytes), static_cast<off_t>(num_bytes),
                POSIX_FADV_WILLNEED);
}

CheckpointSource::CheckpointSource(std::vector<std::string> paths, ExpertLayout layout,
                                   std::vector<Extent> extents, size_t extents_per_expert)
    : layout_(std::move(layout)),
      extents_(std::move(extents)),
      extents_per_expert_(extents_per_expert) {
  files_.reserve(paths.size());
  for (std::string& path : paths) files_.emplace_back(std::move(path));
  CheckExtents();
}

void CheckpointSource::CheckExtents() const {
  if (extents_per_expert_ == 0 || extents_.empty() || extents_.size() % extents_per_expert_ != 0) {
    throw std::invalid_argument("every expert needs the same number of extents, at least one");
  }
  std::vector<size_t> file_bytes;
  for (const InputFile& file : files_) file_bytes.push_back(file.num_bytes());
  for (const Extent& extent : extents_) {
    if (extent.file >= files_.size()) {
      throw std::invalid_argument("an extent lies in file " + std::to_string(extent.file) + " of " +
                                  std::to_string(files_.size()));
    }
    const size_t num_bytes = file_bytes[extent.file];
    const size_t offset = std::min(extent.file_offset_bytes, num_bytes);
    if (extent.num_elements > (num_bytes - offset) / ElementBytes(extent.file_dtype)) {
      throw std::invalid_argument(files_[extent.file].path() + " has " + std::to_string(num_bytes) +
                                  " bytes, but an expert has " +
                                  std::to_string(extent.num_elements) + " elements from byte " +
                                  std::to_string(extent.file_offset_bytes) + " on");
    }
  }
  for (size_t expert = 0; expert < num_experts(); ++expert) CheckCoverage(expert);
}

// A gap would leave whatever the slot held before, an overlap hides a wrong offset.
void CheckpointSource::CheckCoverage(size_t expert) const {
  const auto fail = [&](const Segment& segment) {
    throw std::invalid_argument("the extents of expert " + std::to_string(expert) +
                                " do not fill segment '" + segment.role + "' in order");
  };
  auto segment = layout_.segments().begin();
  size_t filled_bytes = 0;  // of `segment`
  for (size_t i = 0; i < extents_per_expert_; ++i) {
    const Extent& extent = extents_[expert * extents_per_expert_ + i];
    if (segment == layout_.segments().end()) fail(layout_.segments().back());
    const size_t element_bytes = ElementBytes(segment->dtype);
    if (extent.slot_offset_bytes != segment->offset_bytes + filled_bytes ||
        extent.num_elements > (segment->num_bytes - filled_bytes) / element_bytes) {
      fail(*segment);
    }
    filled_bytes += extent.num_elements * element_bytes;
    if (filled_bytes == segment->num_bytes) {
      ++segment;
      filled_bytes = 0;
    }
  }
  if (segment != layout_.segments().end()) fail(*segment);
}

void CheckpointSource::Read(ExpertIndex expert, size_t offset_bytes,
                            std::span<std::byte> to) const {
  const size_t end_bytes = offset_bytes + to.size();
  const std::span<const Extent> extents(
      extents_.data() + static_cast<size_t>(Index(expert)) * extents_per_expert_,
      extents_per_expert_);
  for (const Extent& extent : extents) {
    const DType to_dtype = layout_.SegmentAt(extent.slot_offset_bytes).dtype;
    const size_t element_bytes = ElementBytes(to_dtype);
    const size_t begin = std::max(offset_bytes, extent.slot_offset_bytes);
    const size_t end =
        std::min(end_bytes, extent.slot_offset_bytes + extent.num_elements * element_bytes);
    if (begin >= end) continue;
    const std::span<std::byte> part = to.subspan(begin - offset_bytes, end - begin);
    const size_t skipped_elements = (begin - extent.slot_offset_bytes) / element_bytes;
    if (extent.file_dtype == to_dtype) {
      const size_t file_offset = extent.file_offset_bytes + skipped_elements * element_bytes;
      files_[extent.file].ReadAt(file_offset, part);
    } else {
      ReadConverted(extent, to_dtype, skipped_elements, part);
    }
  }
}

void CheckpointSource::ReadConverted(const Extent& extent, DType to_dtype, size_t first_element,
                                     std::span<std::byte> to) const {
  constexpr size_t kBlockElements = 16 * 1024;
  std::array<std::byte, kBlockElements * 4> block;
  const size_t from_bytes = ElementBytes(extent.file_dtype);
  const size_t num_elements = to.size() / ElementBytes(to_dtype);
  files_[extent.file].Announce(extent.file_offset_bytes + first_element * from_bytes,
                               num_elements * from_bytes);
  for (size_t done = 0; done < num_elements; done += kBlockElements) {
    const size_t count = std::min(kBlockElements, num_elements - done);
    files_[extent.file].ReadAt(extent.file_offset_bytes + (first_element + done) * from_bytes,
                               std::span(block).first(count * from_bytes));
    ConvertElements(block.data(), extent.file_dtype, to.data() + done * ElementBytes(to_dtype),
                    to_dtype, count);
  }
}

}  // namespace expertflow
