# One executable for each bench/cpp/*_bench.cc, and each *_replay.cc, which a script in bench/ runs.
# The kernels that the CUDA benchmarks compare with
# are in bench/cpp/*.cu.

find_package(benchmark REQUIRED)

if(EXPERTFLOW_WITH_CUDA)
  file(GLOB bench_kernels CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/bench/cpp/*.cu")
  add_library(expertflow_bench_kernels OBJECT ${bench_kernels})
  set_target_properties(expertflow_bench_kernels PROPERTIES
    CUDA_ARCHITECTURES "${EXPERTFLOW_CUDA_ARCHITECTURES}")
  target_link_libraries(expertflow_bench_kernels PRIVATE expertflow_cuda expertflow_flags)
endif()

file(GLOB benchmarks CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/bench/cpp/*_bench.cc"
  "${PROJECT_SOURCE_DIR}/bench/cpp/*_replay.cc")
foreach(source ${benchmarks})
  cmake_path(GET source STEM name)
  if(name MATCHES "^cuda_" AND NOT EXPERTFLOW_WITH_CUDA)
    continue()
  endif()
  add_executable(${name} "${source}")
  target_link_libraries(${name} PRIVATE ${EXPERTFLOW_LAYERS} expertflow_flags
    benchmark::benchmark_main)
  if(name MATCHES "^cuda_")
    target_link_libraries(${name} PRIVATE expertflow_bench_kernels)
  endif()
endforeach()
