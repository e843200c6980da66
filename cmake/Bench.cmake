# One executable for each bench/cpp/*_bench.cc.

find_package(benchmark REQUIRED)

file(GLOB benchmarks CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/bench/cpp/*_bench.cc")
foreach(source ${benchmarks})
  cmake_path(GET source STEM name)
  if(name MATCHES "^cuda_" AND NOT EXPERTFLOW_WITH_CUDA)
    continue()
  endif()
  add_executable(${name} "${source}")
  target_link_libraries(${name} PRIVATE ${EXPERTFLOW_LAYERS} expertflow_flags
    benchmark::benchmark_main)
endforeach()
