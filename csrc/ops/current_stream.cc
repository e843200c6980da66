#ifdef EXPERTFLOW_WITH_CUDA
#include "ops/current_stream.h"

#include <dlfcn.h>

#include <cstdint>
#include <stdexcept>

namespace expertflow::ops {
namespace {

using GetCurrentStream = int32_t (*)(int32_t device, void** stream);

// Looked up and not linked: else this library could not be loaded beside a torch without CUDA.
GetCurrentStream Find() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* function =
      library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
  return reinterpret_cast<GetCurrentStream>(function);
}

}  // namespace

cudaStream_t CurrentStream(int device) {
  static const GetCurrentStream get_current_stream = Find();
  void* stream = nullptr;
  if (get_current_stream == nullptr || get_current_stream(device, &stream) != 0) {
    throw std::runtime_error("this torch cannot compute on CUDA: install one that can");
  }
  return static_cast<cudaStream_t>(stream);
}

}  // namespace expertflow::ops
#endif
