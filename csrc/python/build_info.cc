#include "python/build_info.h"

#include <string_view>

#include "expertflow_build_info.h"
#ifdef EXPERTFLOW_WITH_CUDA
#include "cuda/devices.h"
#endif

namespace expertflow {
namespace {

namespace py = pybind11;

py::object NoneIfEmpty(std::string_view text) {
  return text.empty() ? py::object(py::none()) : py::object(py::str(text));
}

// CMake's list of architectures, "80-real;90-real".
py::object Architectures() {
  return build_info::kCudaArchitectures.empty()
             ? py::object(py::list())
             : py::str(build_info::kCudaArchitectures).attr("split")(";");
}

// Sets "gpus" and "gpus_missing_reason".
void AddGpus(py::dict& info) {
  py::list gpus;
#ifdef EXPERTFLOW_WITH_CUDA
  const GpuList list = ListGpus();
  for (const GpuInfo& gpu : list.gpus) {
    py::dict entry;
    entry["name"] = gpu.name;
    entry["compute_capability"] =
        py::make_tuple(gpu.compute_capability_major, gpu.compute_capability_minor);
    entry["total_memory_bytes"] = gpu.total_memory_bytes;
    entry["numa_node"] = gpu.numa_node < 0 ? py::object(py::none()) : py::cast(gpu.numa_node);
    gpus.append(entry);
  }
  info["gpus_missing_reason"] = NoneIfEmpty(list.missing_reason);
#else
  info["gpus_missing_reason"] = "ExpertFlow was built without CUDA";
#endif
  info["gpus"] = gpus;
}

}  // namespace

py::dict BuildInfo() {
  py::dict info;
  info["version"] = build_info::kVersion;
  info["compiler"] = build_info::kCompiler;
  info["build_type"] = build_info::kBuildType;
  info["torch_built_against"] = build_info::kTorchVersion;
  info["cuda_compiler"] = NoneIfEmpty(build_info::kCudaCompiler);
  info["cuda_architectures"] = Architectures();
  info["cuda_missing_reason"] = NoneIfEmpty(build_info::kCudaMissingReason);
  AddGpus(info);
  return info;
}

}  // namespace expertflow
