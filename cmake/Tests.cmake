# One executable for each tests/cpp/*_test.cc, linked with the layers themselves.

find_package(GTest REQUIRED)
include(GoogleTest)

file(GLOB tests CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/tests/cpp/*_test.cc")
foreach(source ${tests})
  cmake_path(GET source STEM name)
  if(name MATCHES "^cuda_" AND NOT EXPERTFLOW_WITH_CUDA)
    continue()
  endif()
  add_executable(${name} "${source}")
  target_include_directories(${name} PRIVATE
    "${PROJECT_SOURCE_DIR}/tests/cpp" "${PROJECT_SOURCE_DIR}/bench/cpp")
  target_link_libraries(${name} PRIVATE ${EXPERTFLOW_LAYERS} expertflow_flags
    GTest::gmock GTest::gtest_main)
  gtest_discover_tests(${name} DISCOVERY_TIMEOUT 60 PROPERTIES TIMEOUT 300)
endforeach()
