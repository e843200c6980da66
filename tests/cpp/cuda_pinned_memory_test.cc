#include "cuda/pinned_memory.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <span>
#include <type_traits>
#include <utility>

#include "cuda/cuda_error.h"
#include "cuda/host_registration.h"
#include "cuda_test.h"

namespace expertflow {
namespace {

static_assert(!std::is_copy_constructible_v<PinnedMemory>);
static_assert(!std::is_copy_constructible_v<HostRegistration>);

constexpr size_t kNumBytes = 1 << 20;

bool IsPinned(const void* data) {
  cudaPointerAttributes attributes;
  EXPERTFLOW_CUDA_CHECK(cudaPointerGetAttributes(&attributes, data));
  return attributes.type == cudaMemoryTypeHost;
}

// Ordinary pages, whose lifetime does not depend on the registration under test.
struct Pages {
  std::span<std::byte> span() const { return {data.get(), kNumBytes}; }
  std::unique_ptr<std::byte, decltype(&std::free)> data{
      static_cast<std::byte*>(std::aligned_alloc(4096, kNumBytes)), &std::free};
};

using PinnedMemoryTest = CudaTest;
using HostRegistrationTest = CudaTest;

TEST_F(PinnedMemoryTest, IsPinnedAndWritable) {
  PinnedMemory memory(kNumBytes);
  EXPECT_EQ(memory.num_bytes(), kNumBytes);
  EXPECT_TRUE(IsPinned(memory.data()));
  std::fill_n(memory.data(), kNumBytes, std::byte{7});
  EXPECT_EQ(memory.data()[kNumBytes - 1], std::byte{7});
}

TEST_F(PinnedMemoryTest, MovingTransfersTheMemory) {
  PinnedMemory first(kNumBytes);
  std::byte* data = first.data();
  PinnedMemory second = std::move(first);
  EXPECT_EQ(second.data(), data);
  EXPECT_EQ(first.data(), nullptr);
}

TEST_F(PinnedMemoryTest, TooLargeNamesTheSize) {
  try {
    PinnedMemory memory(size_t{1} << 60);
    FAIL() << "did not throw";
  } catch (const CudaError& error) {
    EXPECT_THAT(error.what(), ::testing::HasSubstr("1152921504606846976 bytes"));
  }
}

TEST_F(HostRegistrationTest, PinsWhileItLives) {
  Pages pages;
  std::fill_n(pages.data.get(), kNumBytes, std::byte{7});
  EXPECT_FALSE(IsPinned(pages.data.get()));
  {
    HostRegistration registration(pages.span());
    EXPECT_TRUE(IsPinned(pages.data.get() + kNumBytes - 1));
  }
  EXPECT_FALSE(IsPinned(pages.data.get()));
  EXPECT_EQ(pages.data.get()[kNumBytes - 1], std::byte{7});
}

TEST_F(HostRegistrationTest, TwiceIsAnErrorThatLeavesTheFirst) {
  Pages pages;
  HostRegistration registration(pages.span());
  EXPECT_THROW(HostRegistration{pages.span()}, CudaError);
  EXPECT_TRUE(IsPinned(pages.data.get()));
}

TEST_F(HostRegistrationTest, OfNothingIsAnError) {
  EXPECT_THROW(HostRegistration{std::span<std::byte>()}, CudaError);
}

}  // namespace
}  // namespace expertflow
