# Warnings and sanitizers, for our own targets only.

add_library(expertflow_flags INTERFACE)
target_link_libraries(expertflow_flags INTERFACE Threads::Threads)

# nvcc's generated host code trips -Wsign-conversion, so CUDA files get the first two only.
set(cxx_warnings -Wall -Wextra -Wsign-conversion)
set(cuda_warnings -Xcompiler=-Wall,-Wextra)
if(EXPERTFLOW_WERROR)
  list(APPEND cxx_warnings -Werror)
  list(APPEND cuda_warnings -Werror=all-warnings)
endif()
target_compile_options(expertflow_flags INTERFACE
  "$<$<COMPILE_LANGUAGE:CXX>:${cxx_warnings}>"
  "$<$<COMPILE_LANGUAGE:CUDA>:${cuda_warnings}>")

if(EXPERTFLOW_SANITIZE)
  add_compile_options(-fsanitize=${EXPERTFLOW_SANITIZE} -fno-sanitize-recover=all
    -fno-omit-frame-pointer -g)
  add_link_options(-fsanitize=${EXPERTFLOW_SANITIZE})
endif()
