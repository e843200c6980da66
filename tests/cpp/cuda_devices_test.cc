#include "cuda/devices.h"

#include <gtest/gtest.h>

#include "cuda_test.h"

namespace expertflow {
namespace {

TEST(Devices, EitherGpusOrAReason) {
  const GpuList list = ListGpus();
  EXPECT_EQ(list.gpus.empty(), !list.missing_reason.empty());
}

using DevicesOnGpu = CudaTest;

TEST_F(DevicesOnGpu, AreDescribed) {
  for (const GpuInfo& gpu : ListGpus().gpus) {
    EXPECT_FALSE(gpu.name.empty());
    EXPECT_GE(gpu.compute_capability_major, 7);
    EXPECT_GT(gpu.total_memory_bytes, size_t{1} << 30);
  }
}

}  // namespace
}  // namespace expertflow
