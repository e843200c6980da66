#include "core/predictor/vector_math.h"

// GCC resolves such functions before a sanitizer's runtime is ready.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
#define EXPERTFLOW_WIDEST_VECTORS \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EXPERTFLOW_WIDEST_VECTORS
#endif

namespace expertflow {
namespace {

constexpr size_t kLanes = 32;  // independent sums, so that the compiler may use vectors

}  // namespace

EXPERTFLOW_WIDEST_VECTORS
void MatrixVector(const float* matrix, size_t num_rows, size_t stride, const float* x,
                  size_t num_columns, float* out) {
  for (size_t row = 0; row < num_rows; ++row) {
    const float* values = matrix + row * stride;
    float lanes[kLanes] = {};
    size_t i = 0;
    for (; i + kLanes <= num_columns; i += kLanes) {
      for (size_t lane = 0; lane < kLanes; ++lane) lanes[lane] += values[i + lane] * x[i + lane];
    }
    for (size_t lane = 0; i < num_columns; ++i, ++lane) lanes[lane] += values[i] * x[i];
    for (size_t width = kLanes / 2; width > 0; width /= 2) {
      for (size_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    }
    out[row] = lanes[0];
  }
}

EXPERTFLOW_WIDEST_VECTORS
void AddOuterProduct(float* matrix, size_t num_rows, size_t stride, const float* scale,
                     const float* x, size_t num_columns) {
  for (size_t row = 0; row < num_rows; ++row) {
    float* values = matrix + row * stride;
    for (size_t i = 0; i < num_columns; ++i) values[i] += scale[row] * x[i];
  }
}

}  // namespace expertflow
