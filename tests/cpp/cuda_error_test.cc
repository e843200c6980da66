#include "cuda/cuda_error.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "cuda_test.h"

namespace expertflow {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

TEST(CudaError, NamesErrorCallPlaceAndSizes) {
  try {
    EXPERTFLOW_CUDA_CHECK(cudaErrorMemoryAllocation, std::to_string(4096) + " bytes");
    FAIL() << "did not throw";
  } catch (const CudaError& error) {
    EXPECT_EQ(error.code(), cudaErrorMemoryAllocation);
    EXPECT_THAT(error.what(),
                AllOf(HasSubstr("cudaErrorMemoryAllocation (out of memory)"),
                      HasSubstr("from cudaErrorMemoryAllocation, 4096 bytes, at "),
                      HasSubstr("cuda_error_test.cc:" + std::to_string(__LINE__ - 7))));
  }
}

TEST(CudaError, SuccessDoesNotThrow) { EXPECT_NO_THROW(EXPERTFLOW_CUDA_CHECK(cudaSuccess)); }

TEST(CudaError, WarningsGoToStderr) {
  ::testing::internal::CaptureStderr();
  EXPERTFLOW_CUDA_WARN(cudaErrorInvalidValue);
  EXPECT_THAT(::testing::internal::GetCapturedStderr(), HasSubstr("cudaErrorInvalidValue"));
}

TEST(CudaError, WarnsOfNothingWhileTheDriverUnloads) {
  ::testing::internal::CaptureStderr();
  EXPERTFLOW_CUDA_WARN(cudaErrorCudartUnloading);
  EXPECT_THAT(::testing::internal::GetCapturedStderr(), IsEmpty());
}

using CudaErrorOnGpu = CudaTest;

TEST_F(CudaErrorOnGpu, IsTakenOffTheRuntime) {
  void* data = nullptr;
  EXPECT_THROW(EXPERTFLOW_CUDA_CHECK(cudaMalloc(&data, size_t{1} << 60)), CudaError);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
}

}  // namespace
}  // namespace expertflow
