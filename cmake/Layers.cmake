# The folders of csrc/ that make up libexpertflow. Each layer compiles against an include root that
# holds only itself and what it links, so an include that points the wrong way does not compile.

set(EXPERTFLOW_LAYERS "")

function(add_layer layer)
  cmake_parse_arguments(ARG "" "" "USES" ${ARGN})
  set(include_root "${PROJECT_BINARY_DIR}/layers/${layer}")
  file(MAKE_DIRECTORY "${include_root}")
  file(CREATE_LINK "${PROJECT_SOURCE_DIR}/csrc/${layer}" "${include_root}/${layer}" SYMBOLIC)
  file(GLOB_RECURSE sources CONFIGURE_DEPENDS
    "${PROJECT_SOURCE_DIR}/csrc/${layer}/*.cc" "${PROJECT_SOURCE_DIR}/csrc/${layer}/*.cu")
  set(target expertflow_${layer})
  add_library(${target} OBJECT ${sources})
  target_include_directories(${target} PUBLIC "${include_root}")
  list(TRANSFORM ARG_USES PREPEND expertflow_)
  target_link_libraries(${target} PRIVATE expertflow_flags PUBLIC ${ARG_USES})
  list(APPEND EXPERTFLOW_LAYERS ${target})
  set(EXPERTFLOW_LAYERS "${EXPERTFLOW_LAYERS}" PARENT_SCOPE)
endfunction()

add_layer(core)
add_layer(host USES core)
if(EXPERTFLOW_WITH_CUDA)
  add_layer(cuda USES host core)
  set_target_properties(expertflow_cuda PROPERTIES
    CUDA_ARCHITECTURES "${EXPERTFLOW_CUDA_ARCHITECTURES}")
  target_link_libraries(expertflow_cuda PUBLIC CUDA::cudart_static)
endif()
