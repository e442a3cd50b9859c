# libjaxmoe_nvshmem.so, from the wheel nvidia-nvshmem-cu12 or -cu13 that fits nvcc: headers and the static
# device library at build time, its shared host library at run time, which Python loads beforehand.
# Sets JAXMOE_NVSHMEM_STATUS to a sentence.

execute_process(
  COMMAND ${Python_EXECUTABLE} -c
          "import importlib.util as u; print(list(u.find_spec('nvidia.nvshmem').submodule_search_locations)[0])"
  OUTPUT_STRIP_TRAILING_WHITESPACE OUTPUT_VARIABLE nvshmem_dir ERROR_QUIET RESULT_VARIABLE nvshmem_result)
string(REGEX MATCH "^[0-9]+" cuda_major "${CMAKE_CUDA_COMPILER_VERSION}")
if(NOT nvshmem_result EQUAL 0 OR NOT EXISTS "${nvshmem_dir}/lib/libnvshmem_device.a")
  set(JAXMOE_NVSHMEM_STATUS
      "NVSHMEM library not built, because nvidia-nvshmem-cu${cuda_major} is not installed here")
  if(JAXMOE_CUDA STREQUAL "ON")
    message(FATAL_ERROR "jaxmoe: ${JAXMOE_NVSHMEM_STATUS}. Install it for ${Python_EXECUTABLE}.")
  endif()
  return()
endif()
file(STRINGS "${nvshmem_dir}/include/non_abi/nvshmem_version.h" nvshmem_version
     REGEX "NVSHMEM_VENDOR_(MAJOR|MINOR|PATCH)_VERSION")
string(REGEX MATCHALL "[0-9]+" nvshmem_version "${nvshmem_version}")
string(REPLACE ";" "." nvshmem_version "${nvshmem_version}")

find_library(nvshmem_host NAMES libnvshmem_host.so.3 PATHS "${nvshmem_dir}/lib" NO_DEFAULT_PATH REQUIRED)
jaxmoe_cuda_library(
  jaxmoe_nvshmem ${JAXMOE_COMMON_SOURCES} ${JAXMOE_CUDA_SOURCES} ${JAXMOE_NVSHMEM_SOURCES})
target_compile_definitions(jaxmoe_nvshmem PRIVATE JAXMOE_NVSHMEM)
target_include_directories(jaxmoe_nvshmem SYSTEM PRIVATE "${nvshmem_dir}/include")
# Its headers warn.
set_source_files_properties(nvshmem/puts.cu PROPERTIES COMPILE_OPTIONS "-w")
set_target_properties(jaxmoe_nvshmem PROPERTIES CUDA_SEPARABLE_COMPILATION ON)
target_link_libraries(jaxmoe_nvshmem PRIVATE ${nvshmem_host} "${nvshmem_dir}/lib/libnvshmem_device.a")
set(JAXMOE_NVSHMEM_STATUS "NVSHMEM library built with ${nvshmem_version}")
