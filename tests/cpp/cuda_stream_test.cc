#include "cuda/stream.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <memory>
#include <type_traits>
#include <utility>

#include "cuda/event.h"
#include "cuda/pinned_memory.h"
#include "cuda_test.h"

namespace expertflow {
namespace {

static_assert(!std::is_copy_constructible_v<CudaStream> && !std::is_copy_assignable_v<CudaStream>);
static_assert(!std::is_copy_constructible_v<CudaEvent> && !std::is_copy_assignable_v<CudaEvent>);

using StreamTest = CudaTest;
using EventTest = CudaTest;

// Holds up a stream until `released` is set, as a slow kernel would.
struct Gate {
  static void CUDART_CB Wait(void* gate) {
    while (!static_cast<Gate*>(gate)->released.load()) {
    }
  }
  std::atomic<bool> released{false};
};

TEST_F(StreamTest, MovingTransfersTheStream) {
  CudaStream first;
  const cudaStream_t handle = first.get();
  CudaStream second = std::move(first);
  EXPECT_EQ(second.get(), handle);
  EXPECT_EQ(first.get(), nullptr);
  second = CudaStream();
  EXPECT_NE(second.get(), nullptr);
  second.Synchronize();
}

TEST_F(EventTest, IsDoneBeforeItIsRecorded) { EXPECT_TRUE(CudaEvent().IsDone()); }

TEST_F(EventTest, HappensAfterTheWorkBeforeIt) {
  Gate gate;
  CudaStream stream;
  CudaEvent event;
  EXPERTFLOW_CUDA_CHECK(cudaLaunchHostFunc(stream.get(), &Gate::Wait, &gate));
  event.Record(stream.get());
  EXPECT_FALSE(event.IsDone());
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  gate.released = true;
  event.Synchronize();
  EXPECT_TRUE(event.IsDone());
}

struct FreeDeviceMemory {
  void operator()(std::byte* data) const { EXPERTFLOW_CUDA_WARN(cudaFree(data)); }
};

TEST_F(EventTest, OrdersAnotherStream) {
  constexpr size_t kNumBytes = 1 << 20;
  PinnedMemory from(kNumBytes), to(kNumBytes);
  std::fill_n(from.data(), kNumBytes, std::byte{7});
  std::fill_n(to.data(), kNumBytes, std::byte{0});
  void* data = nullptr;
  EXPERTFLOW_CUDA_CHECK(cudaMalloc(&data, kNumBytes));
  const std::unique_ptr<std::byte, FreeDeviceMemory> between(static_cast<std::byte*>(data));
  Gate gate;
  CudaStream producer, consumer;
  CudaEvent written;
  EXPERTFLOW_CUDA_CHECK(cudaMemset(data, 0, kNumBytes));
  EXPERTFLOW_CUDA_CHECK(cudaDeviceSynchronize());

  EXPERTFLOW_CUDA_CHECK(cudaLaunchHostFunc(producer.get(), &Gate::Wait, &gate));
  EXPERTFLOW_CUDA_CHECK(
      cudaMemcpyAsync(data, from.data(), kNumBytes, cudaMemcpyDefault, producer.get()));
  written.Record(producer.get());
  written.MakeWait(consumer.get());
  EXPERTFLOW_CUDA_CHECK(
      cudaMemcpyAsync(to.data(), data, kNumBytes, cudaMemcpyDefault, consumer.get()));
  gate.released = true;
  consumer.Synchronize();
  EXPECT_EQ(std::count(to.data(), to.data() + kNumBytes, std::byte{7}), kNumBytes);
}

}  // namespace
}  // namespace expertflow
