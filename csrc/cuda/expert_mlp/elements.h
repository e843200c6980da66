#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace expertflow::mlp {

// Elements of the 16 bytes that a thread loads at once.
template <class Scalar>
constexpr int kChunkElements = 16 / static_cast<int>(sizeof(Scalar));

__device__ inline float ToFloat(float value) { return value; }
__device__ inline float ToFloat(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float ToFloat(__half value) { return __half2float(value); }

template <class Scalar>
__device__ Scalar FromFloat(float value);
template <>
__device__ inline float FromFloat<float>(float value) {
  return value;
}
template <>
__device__ inline __nv_bfloat16 FromFloat<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ inline __half FromFloat<__half>(float value) {
  return __float2half_rn(value);
}

__device__ inline void UnpackWord(unsigned word, __nv_bfloat16, float* values) {
  values[0] = __uint_as_float(word << 16);
  values[1] = __uint_as_float(word & 0xFFFF0000U);
}

__device__ inline void UnpackWord(unsigned word, __half, float* values) {
  const __half2_raw raw{static_cast<unsigned short>(word & 0xFFFFU),
                        static_cast<unsigned short>(word >> 16)};
  const float2 pair = __half22float2(__half2(raw));
  values[0] = pair.x;
  values[1] = pair.y;
}

__device__ inline void UnpackWord(unsigned word, float, float* values) {
  values[0] = __uint_as_float(word);
}

template <class Scalar>
__device__ void Unpack(const uint4& chunk, float (&values)[kChunkElements<Scalar>]) {
  constexpr int kPerWord = kChunkElements<Scalar> / 4;
  UnpackWord(chunk.x, Scalar(), values);
  UnpackWord(chunk.y, Scalar(), values + kPerWord);
  UnpackWord(chunk.z, Scalar(), values + 2 * kPerWord);
  UnpackWord(chunk.w, Scalar(), values + 3 * kPerWord);
}

}  // namespace expertflow::mlp
