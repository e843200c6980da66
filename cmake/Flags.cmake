# The C++ standard, warnings and sanitizers, for our own targets only.

add_library(expertflow_flags INTERFACE)
target_link_libraries(expertflow_flags INTERFACE Threads::Threads)
target_compile_features(expertflow_flags INTERFACE cxx_std_20)

set(cxx_warnings -Wall -Wextra -Wsign-conversion)
# nvcc's generated host code trips -Wsign-conversion. The standard is a plain flag, because an older
# CMake (3.25) does not know that a newer nvcc (13) has it.
set(cuda_warnings -Xcompiler=-Wall,-Wextra)
if(EXPERTFLOW_WERROR)
  list(APPEND cxx_warnings -Werror)
  list(APPEND cuda_warnings -Werror=all-warnings)
endif()
target_compile_options(expertflow_flags INTERFACE
  "$<$<COMPILE_LANGUAGE:CXX>:${cxx_warnings}>"
  "$<$<COMPILE_LANGUAGE:CUDA>:-std=c++20;${cuda_warnings}>")

if(EXPERTFLOW_SANITIZE)
  add_compile_options(-fsanitize=${EXPERTFLOW_SANITIZE} -fno-sanitize-recover=all
    -fno-omit-frame-pointer -g)
  add_link_options(-fsanitize=${EXPERTFLOW_SANITIZE})
endif()
