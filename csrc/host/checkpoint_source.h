#pragma once

#include <sys/stat.h>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/expert_layout.h"
#include "core/expert_source.h"

namespace expertflow {

// A run of elements that lies in one piece both in a checkpoint file and in the slot.
struct Extent {
  size_t file;
  size_t file_offset_bytes;
  size_t slot_offset_bytes;
  size_t num_elements;
  DType file_dtype;
};

// A file opened for reading, of which the system reads just what is asked for: experts lie
// anywhere, and reading on behind them would only delay the next. Move-only; a moved-from file owns
// nothing.
class InputFile {
 public:
  // Throws std::system_error that names the path.
  explicit InputFile(std::string path);
  InputFile(InputFile&& other) noexcept;
  InputFile& operator=(InputFile&&) = delete;
  ~InputFile();

  const std::string& path() const { return path_; }
  size_t num_bytes() const;
  // Throws std::system_error if the system refuses, std::runtime_error if the file ends before `to`
  // is full or was written to since it was opened.
  void ReadAt(size_t offset_bytes, std::span<std::byte> to) const;
  // Has the system begin to read what will be read in small pieces. A hint: never fails.
  void Announce(size_t offset_bytes, size_t num_bytes) const;

 private:
  struct stat Status() const;

  std::string path_;
  int descriptor_;
  timespec modified_;
};

// The file pool: reads experts from the checkpoint's own files when they are wanted. The files stay
// open, so a checkpoint that is deleted or replaced by another meanwhile is still read as it was;
// one that is cut or written to is an error.
class CheckpointSource : public ExpertSource {
 public:
  // `extents` [num_experts * extents_per_expert], those of one expert in ascending slot offset,
  // without gaps but for the padding between segments, which is never written.
  // Elements are converted to the dtype of their segment. Throws std::system_error for a file that
  // cannot be opened, std::invalid_argument for an extent that leaves its file and for extents that
  // do not fill every segment of an expert exactly.
  CheckpointSource(std::vector<std::string> paths, ExpertLayout layout, std::vector<Extent> extents,
                   size_t extents_per_expert);

  void Read(ExpertIndex expert, size_t offset_bytes, std::span<std::byte> to) const override;

  const ExpertLayout& layout() const { return layout_; }
  size_t num_experts() const override { return extents_.size() / extents_per_expert_; }
  size_t expert_bytes() const override { return layout_.slot_bytes(); }

 private:
  void CheckExtents() const;
  void CheckCoverage(size_t expert) const;
  void ReadConverted(const Extent& extent, DType to_dtype, size_t first_element,
                     std::span<std::byte> to) const;

  ExpertLayout layout_;
  std::vector<InputFile> files_;
  std::vector<Extent> extents_;
  size_t extents_per_expert_;
};

}  // namespace expertflow
