#pragma once

#include <gtest/gtest.h>

#include "cuda/devices.h"

namespace expertflow {

// A test that needs a GPU; without one it is skipped with the runtime's reason.
class CudaTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const GpuList list = ListGpus();
    if (list.gpus.empty()) GTEST_SKIP() << "no GPU: " << list.missing_reason;
  }
};

}  // namespace expertflow
