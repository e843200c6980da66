#include "host/checkpoint_source.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <fstream>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "temporary_file.h"

namespace expertflow {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::ThrowsMessage;

constexpr std::byte kUntouched{0xAB};
constexpr ExpertIndex kFirst{0};

std::vector<std::byte> RandomBytes(size_t num_bytes, std::mt19937_64& random) {
  std::vector<std::byte> bytes(num_bytes);
  for (std::byte& b : bytes) b = static_cast<std::byte>(random());
  return bytes;
}

// Checkpoints with random layouts, cut into random extents that lie anywhere in two files, in any
// dtype and at odd offsets, and what the slots of their experts should hold.
class RandomCheckpoint {
 public:
  explicit RandomCheckpoint(uint64_t seed) : random_(seed), layout_(RandomLayout()) {
    const size_t num_experts = Draw(1, 4);
    extents_per_expert_ = layout_.segments().size() + Draw(0, 3);
    for (size_t e = 0; e < num_experts; ++e) AddExpert();
    files_.push_back(std::make_unique<TemporaryFile>(bytes_[0]));
    files_.push_back(std::make_unique<TemporaryFile>(bytes_[1]));
  }

  void Check() {
    const CheckpointSource source({files_[0]->path(), files_[1]->path()}, layout_, extents_,
                                  extents_per_expert_);
    ASSERT_EQ(source.num_experts(), expected_.size());
    ASSERT_EQ(source.expert_bytes(), layout_.slot_bytes());
    for (int i = 0; i < 60; ++i) {
      const size_t expert = Draw(0, expected_.size() - 1);
      const size_t num_blocks = layout_.slot_bytes() / kSlotAlignment;
      const size_t begin = kSlotAlignment * Draw(0, num_blocks - 1);
      const size_t num_bytes =
          Draw(0, 3) == 0 ? layout_.slot_bytes() - begin
                          : std::min(kSlotAlignment * Draw(1, 4), layout_.slot_bytes() - begin);
      std::vector<std::byte> chunk(num_bytes, kUntouched);
      source.Read(static_cast<ExpertIndex>(expert), begin, chunk);
      const auto expected = expected_[expert].begin() + static_cast<ptrdiff_t>(begin);
      ASSERT_TRUE(std::equal(chunk.begin(), chunk.end(), expected))
          << "expert " << expert << ", bytes " << begin << " to " << begin + num_bytes;
    }
  }

 private:
  size_t Draw(size_t lowest, size_t highest) {
    return std::uniform_int_distribution<size_t>(lowest, highest)(random_);
  }

  DType RandomDType() { return DTypeFromCode(static_cast<int64_t>(Draw(0, 2))); }

  ExpertLayout RandomLayout() {
    std::vector<SegmentSpec> specs(Draw(1, 3));
    for (SegmentSpec& spec : specs) spec = {"segment", RandomDType(), Draw(4, 1500)};
    return ExpertLayout(specs);
  }

  // Cuts the segments into extents_per_expert_ pieces of at least one element.
  void AddExpert() {
    std::vector<std::byte>& slot = expected_.emplace_back(layout_.slot_bytes(), kUntouched);
    size_t num_spare = extents_per_expert_ - layout_.segments().size();
    for (size_t s = 0; s < layout_.segments().size(); ++s) {
      const Segment& segment = layout_.segments()[s];
      const bool is_last = s + 1 == layout_.segments().size();
      const size_t num_pieces = 1 + (is_last ? num_spare : Draw(0, num_spare));
      num_spare -= num_pieces - 1;
      const size_t element_bytes = ElementBytes(segment.dtype);
      size_t left = segment.num_bytes / element_bytes;
      size_t offset = segment.offset_bytes;
      for (size_t piece = num_pieces; piece > 0; --piece) {
        const size_t count = piece == 1 ? left : Draw(1, left - (piece - 1));
        AddExtent(offset, count, segment.dtype, slot);
        offset += count * element_bytes;
        left -= count;
      }
    }
  }

  void AddExtent(size_t slot_offset, size_t count, DType dtype, std::vector<std::byte>& slot) {
    const DType file_dtype = RandomDType();
    const size_t file = Draw(0, 1);
    std::vector<std::byte>& bytes = bytes_[file];
    const std::vector<std::byte> gap = RandomBytes(Draw(0, 9), random_);
    bytes.insert(bytes.end(), gap.begin(), gap.end());
    extents_.push_back({file, bytes.size(), slot_offset, count, file_dtype});
    const std::vector<std::byte> data = RandomBytes(count * ElementBytes(file_dtype), random_);
    ConvertElements(data.data(), file_dtype, slot.data() + slot_offset, dtype, count);
    bytes.insert(bytes.end(), data.begin(), data.end());
  }

  std::mt19937_64 random_;
  ExpertLayout layout_;
  size_t extents_per_expert_ = 0;
  std::vector<std::byte> bytes_[2];
  std::vector<Extent> extents_;
  std::vector<std::vector<std::byte>> expected_;  // slots; padding is kUntouched
  std::vector<std::unique_ptr<TemporaryFile>> files_;
};

TEST(CheckpointSourceTest, AnyChunkOfAnyLayoutIsReadExactly) {
  for (uint64_t seed = 0; seed < 150 && !testing::Test::HasFailure(); ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    RandomCheckpoint(seed).Check();
  }
}

TEST(CheckpointSourceTest, ConvertsRunsLongerThanItsBlock) {
  constexpr size_t kCount = 50'000;
  std::mt19937_64 random(1);
  std::vector<std::byte> bytes = RandomBytes(4 * kCount, random);
  const TemporaryFile file(bytes);
  const ExpertLayout layout({{"w", DType::kBFloat16, kCount}});
  const CheckpointSource source({file.path()}, layout, {{0, 0, 0, kCount, DType::kFloat32}}, 1);
  std::vector<std::byte> expected(2 * kCount), found(2 * kCount);
  ConvertElements(bytes.data(), DType::kFloat32, expected.data(), DType::kBFloat16, kCount);
  source.Read(kFirst, 0, std::span(found).first(256 * 150));
  source.Read(kFirst, 256 * 150, std::span(found).subspan(256 * 150));
  EXPECT_EQ(found, expected);
}

// One segment of 100 float32 elements, in one file.
class OneSegmentTest : public testing::Test {
 protected:
  static constexpr size_t kCount = 100;

  CheckpointSource Open(const std::vector<Extent>& extents, size_t extents_per_expert = 1) {
    return CheckpointSource({file_->path()}, layout_, extents, extents_per_expert);
  }

  static Extent Whole() { return {0, 0, 0, kCount, DType::kFloat32}; }

  std::mt19937_64 random_{1};
  std::vector<std::byte> bytes_ = RandomBytes(4 * kCount, random_);
  std::unique_ptr<TemporaryFile> file_ = std::make_unique<TemporaryFile>(bytes_);
  ExpertLayout layout_{{{"w", DType::kFloat32, kCount}}};
};

TEST_F(OneSegmentTest, AFileThatVanishedIsStillRead) {
  const CheckpointSource source = Open({Whole()});
  unlink(file_->path().c_str());
  std::vector<std::byte> found(4 * kCount);
  source.Read(kFirst, 0, found);
  EXPECT_EQ(found, bytes_);
}

TEST_F(OneSegmentTest, AFileThatIsCutWhileOpenIsAnErrorThatNamesIt) {
  const CheckpointSource source = Open({Whole()});
  ASSERT_EQ(truncate(file_->path().c_str(), 300), 0);
  std::vector<std::byte> found(4 * kCount);
  EXPECT_THAT([&] { source.Read(kFirst, 0, found); },
              ThrowsMessage<std::runtime_error>(
                  AllOf(HasSubstr(file_->path()), HasSubstr("ends at byte 300"))));
}

TEST_F(OneSegmentTest, AFileThatIsRewrittenWhileOpenIsAnErrorThatNamesIt) {
  const CheckpointSource source = Open({Whole()});
  std::vector<std::byte> found(4 * kCount);
  source.Read(kFirst, 0, found);
  const std::vector<char> zeros(4 * kCount);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));  // the file system's clock ticks
  std::fstream(file_->path(), std::ios::in | std::ios::out | std::ios::binary)
      .write(zeros.data(), static_cast<std::streamsize>(zeros.size()));
  EXPECT_THAT([&] { source.Read(kFirst, 0, found); },
              ThrowsMessage<std::runtime_error>(
                  AllOf(HasSubstr(file_->path()), HasSubstr("was changed while in use"))));
}

TEST_F(OneSegmentTest, AMissingFileIsASystemErrorThatNamesIt) {
  try {
    CheckpointSource({"/nonexistent/model.safetensors"}, layout_, {Whole()}, 1);
    FAIL() << "did not throw";
  } catch (const std::system_error& e) {
    EXPECT_EQ(e.code().value(), ENOENT);
    EXPECT_THAT(e.what(), HasSubstr("/nonexistent/model.safetensors"));
  }
}

TEST_F(OneSegmentTest, RefusesExtentsThatLeaveTheirFile) {
  constexpr size_t kHuge = std::numeric_limits<size_t>::max();
  const std::string path = file_->path();
  const auto refused = ThrowsMessage<std::invalid_argument>(HasSubstr(path));
  for (const Extent& extent :
       {Extent{0, 1, 0, kCount, DType::kFloat32}, Extent{0, 401, 0, kCount, DType::kBFloat16},
        Extent{0, kHuge - 3, 0, kCount, DType::kFloat32},
        Extent{0, 0, 0, kHuge / 4 + 2, DType::kFloat32}}) {  // wraps to 4
    EXPECT_THAT([&] { Open({extent}); }, refused) << extent.file_offset_bytes;
  }
  EXPECT_THROW(Open({Extent{1, 0, 0, kCount, DType::kFloat32}}), std::invalid_argument);
}

TEST_F(OneSegmentTest, RefusesExtentsThatDoNotFillTheSegmentExactly) {
  const auto extent = [](size_t slot_offset, size_t count) {
    return Extent{0, 0, slot_offset, count, DType::kFloat32};
  };
  const std::vector<std::vector<Extent>> bad = {
      {extent(0, kCount - 1)},                    // short
      {extent(4, kCount - 1)},                    // begins late
      {extent(2, kCount - 1)},                    // splits an element
      {extent(0, 50), extent(204, 49)},           // gap
      {extent(0, 50), extent(196, 51)},           // overlap
      {extent(200, 50), extent(0, 50)},           // descending
      {extent(0, kCount), extent(0, kCount)},     // twice
      {extent(0, kCount), extent(4 * kCount, 1)}  // goes on in the padding
  };
  for (const std::vector<Extent>& extents : bad) {
    EXPECT_THAT([&] { Open(extents, extents.size()); },
                ThrowsMessage<std::invalid_argument>(HasSubstr("'w'")))
        << extents[0].slot_offset_bytes << ", " << extents[0].num_elements;
  }
  EXPECT_NO_THROW(Open({extent(0, 50), extent(200, 50)}, 2));
}

TEST_F(OneSegmentTest, RefusesAnUnevenNumberOfExtents) {
  EXPECT_THROW(Open({}), std::invalid_argument);
  EXPECT_THROW(Open({Whole()}, 0), std::invalid_argument);
  EXPECT_THROW(Open({Whole(), Whole(), Whole()}, 2), std::invalid_argument);
}

TEST_F(OneSegmentTest, AMovedFromFileOwnsNothing) {
  InputFile first(file_->path());
  const InputFile second(std::move(first));
  EXPECT_EQ(second.num_bytes(), 4 * kCount);
  std::vector<std::byte> found(8);
  second.ReadAt(4, found);
  EXPECT_TRUE(std::equal(found.begin(), found.end(), bytes_.begin() + 4));
}

}  // namespace
}  // namespace expertflow
