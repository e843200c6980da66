# Sets EXPERTFLOW_WITH_CUDA and EXPERTFLOW_CUDA_ARCHITECTURES, or EXPERTFLOW_CUDA_MISSING_REASON.

set(EXPERTFLOW_WITH_CUDA OFF)
set(EXPERTFLOW_CUDA_ARCHITECTURES "")
set(EXPERTFLOW_CUDA_MISSING_REASON "")
set(default_architectures 80-real 90-real 90-virtual)

if(NOT EXPERTFLOW_CUDA)
  set(EXPERTFLOW_CUDA_MISSING_REASON "left out by the build option EXPERTFLOW_CUDA=OFF")
  return()
endif()

# CMake wants a value before it looks at the compiler. What counts is set for each target below,
# because torch's CMake files overwrite this variable.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 90)
endif()
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(NOT EXPERTFLOW_CUDA STREQUAL "AUTO")
    message(FATAL_ERROR "EXPERTFLOW_CUDA=${EXPERTFLOW_CUDA}, but no working nvcc was found")
  endif()
  set(EXPERTFLOW_CUDA_MISSING_REASON "no working nvcc was found when ExpertFlow was built")
  message(STATUS "CUDA backend: left out, ${EXPERTFLOW_CUDA_MISSING_REASON}")
  return()
endif()

set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12)
  set(EXPERTFLOW_CUDA_MISSING_REASON
    "nvcc ${CMAKE_CUDA_COMPILER_VERSION} is too old for C++20, which needs 12")
  message(WARNING "CUDA backend: left out, ${EXPERTFLOW_CUDA_MISSING_REASON}")
  return()
endif()

if(NOT "$ENV{EXPERTFLOW_CUDA_ARCHS}" STREQUAL "")
  string(REGEX REPLACE "[, ]+" ";" EXPERTFLOW_CUDA_ARCHITECTURES "$ENV{EXPERTFLOW_CUDA_ARCHS}")
  foreach(architecture ${EXPERTFLOW_CUDA_ARCHITECTURES})
    if(NOT architecture MATCHES "^([0-9]+[af]?(-real|-virtual)?|native|all|all-major)$")
      message(FATAL_ERROR "EXPERTFLOW_CUDA_ARCHS: '${architecture}' is no architecture as CMake "
        "spells it. Use for example '80-real;90-real;90-virtual' or 'native'.")
    endif()
  endforeach()
elseif(CMAKE_CUDA_ARCHITECTURES_NATIVE MATCHES "^[0-9]")
  set(EXPERTFLOW_CUDA_ARCHITECTURES ${CMAKE_CUDA_ARCHITECTURES_NATIVE})
else()
  set(EXPERTFLOW_CUDA_ARCHITECTURES ${default_architectures})
endif()
set(EXPERTFLOW_CUDA_COMPILER "nvcc ${CMAKE_CUDA_COMPILER_VERSION}")
set(EXPERTFLOW_WITH_CUDA ON)
message(STATUS "CUDA backend: nvcc ${CMAKE_CUDA_COMPILER_VERSION}, architectures "
  "${EXPERTFLOW_CUDA_ARCHITECTURES}")
