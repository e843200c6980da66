#pragma once

#include <cstddef>

namespace expertflow {

// The two loops that all of the predictor's time goes into, over row-major matrices whose rows are
// `stride` floats apart. On x86-64 the widest vector unit of the machine is chosen at load time; on
// one machine the result is always the same bits.

// out[r] = matrix[r] . x
void MatrixVector(const float* matrix, size_t num_rows, size_t stride, const float* x,
                  size_t num_columns, float* out);

// matrix[r] += scale[r] * x
void AddOuterProduct(float* matrix, size_t num_rows, size_t stride, const float* scale,
                     const float* x, size_t num_columns);

}  // namespace expertflow
