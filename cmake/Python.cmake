# libexpertflow_ops (torch's stable ABI, no Python) and _core (pybind11, no torch).

find_package(Python 3.10 COMPONENTS Interpreter Development.Module)
if(NOT Python_Development.Module_FOUND)
  message(FATAL_ERROR "No Python >= 3.10 with headers was found (Python.h; on Debian and Ubuntu: "
    "apt-get install python3-dev). Choose one with -DPython_EXECUTABLE=...")
endif()

execute_process(COMMAND "${Python_EXECUTABLE}" "${PROJECT_SOURCE_DIR}/cmake/find_torch.py"
  OUTPUT_VARIABLE torch ERROR_VARIABLE torch_error OUTPUT_STRIP_TRAILING_WHITESPACE)
if(NOT torch)
  message(FATAL_ERROR "${torch_error}")
endif()
list(POP_FRONT torch torch_dir EXPERTFLOW_TORCH_VERSION)
message(STATUS "torch ${EXPERTFLOW_TORCH_VERSION} in ${torch_dir}")

# torch's own CMake package is not used: it asks for the CUDA toolkit torch was built with. Of its
# libraries, libtorch_cpu has the stable ABI, also in a CUDA build.
add_library(torch_stable_abi INTERFACE)
target_include_directories(torch_stable_abi SYSTEM INTERFACE "${torch_dir}/include")
target_compile_definitions(torch_stable_abi INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
find_library(torch_library NAMES torch_cpu torch PATHS "${torch_dir}/lib" NO_DEFAULT_PATH REQUIRED
  NO_CACHE)
target_link_libraries(torch_stable_abi INTERFACE "${torch_library}")

file(GLOB_RECURSE ops_sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/csrc/ops/*.cc")
add_library(expertflow_ops SHARED ${ops_sources})
target_link_libraries(expertflow_ops PRIVATE expertflow expertflow_flags torch_stable_abi)
install(TARGETS expertflow_ops LIBRARY DESTINATION .)

execute_process(COMMAND "${Python_EXECUTABLE}" -m pybind11 --cmakedir
  OUTPUT_VARIABLE pybind11_dir OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
find_package(pybind11 2.13 CONFIG QUIET HINTS "${pybind11_dir}")
if(NOT pybind11_FOUND)
  message(FATAL_ERROR "pybind11 >= 2.13 was not found: ${Python_EXECUTABLE} -m pip install pybind11")
endif()

configure_file("${PROJECT_SOURCE_DIR}/cmake/expertflow_build_info.h.in"
  "${PROJECT_BINARY_DIR}/generated/expertflow_build_info.h" @ONLY)
file(GLOB_RECURSE python_sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/csrc/python/*.cc")
pybind11_add_module(_core NO_EXTRAS ${python_sources})
target_include_directories(_core PRIVATE "${PROJECT_BINARY_DIR}/generated")
target_link_libraries(_core PRIVATE expertflow expertflow_flags)
install(TARGETS _core LIBRARY DESTINATION .)

if(EXPERTFLOW_WITH_CUDA)
  foreach(target expertflow_ops _core)
    target_compile_definitions(${target} PRIVATE EXPERTFLOW_WITH_CUDA=1)
    target_include_directories(${target} SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
  endforeach()
endif()
