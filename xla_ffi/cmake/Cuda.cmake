# libjaxmoe_cuda.so, with NVSHMEM libjaxmoe_nvshmem.so, and libjaxmoe_gemm.so: the CUDA handlers and
# kernels, without a Python symbol, so that Python can load them (ctypes) only where a GPU platform
# exists. Needs nvcc to build and nothing of CUDA to import jaxmoe.

# Says whether the library is built, and why not. pip hides CMake's messages, so the sentence is also
# installed as jaxmoe/lib/cuda_library.txt, for the Makefile and for the errors of the Python package.
function(jaxmoe_cuda_status sentence)
  message(STATUS "jaxmoe: ${sentence}")
  file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/cuda_library.txt "${sentence}\n")
  install(FILES ${CMAKE_CURRENT_BINARY_DIR}/cuda_library.txt DESTINATION jaxmoe/lib)
endfunction()

if(NOT JAXMOE_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "jaxmoe: JAXMOE_CUDA is '${JAXMOE_CUDA}', must be AUTO, ON or OFF")
endif()
if(JAXMOE_CUDA STREQUAL "OFF")
  jaxmoe_cuda_status("CUDA library not built, because of JAXMOE_CUDA=OFF")
  return()
endif()
if(NOT JAXMOE_CUDA_SOURCES)
  jaxmoe_cuda_status("CUDA library not built, because xla_ffi/cuda holds no sources yet")
  return()
endif()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(JAXMOE_CUDA STREQUAL "ON")
    message(FATAL_ERROR
      "jaxmoe: JAXMOE_CUDA=ON, but there is no working nvcc. Put nvcc on PATH or set CUDACXX to it.")
  endif()
  # check_language keeps its failure in the cache: without this an nvcc installed later goes unseen.
  unset(CMAKE_CUDA_COMPILER CACHE)
  jaxmoe_cuda_status(
    "CUDA library not built, because nvcc was not found. To have it, put nvcc on PATH or set CUDACXX, and install again")
  return()
endif()

if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 90a-real)
endif()
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
enable_language(CUDA)

function(jaxmoe_cuda_library name)
  add_library(${name} SHARED ${ARGN})
  target_link_libraries(${name} PRIVATE jaxmoe_options)
  # For the .cc files; nvcc itself knows where they are, wherever it was installed.
  target_include_directories(${name} SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  # Lines of the sources for profilers and compute-sanitizer; they change no instruction.
  target_compile_options(${name} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall;-lineinfo>)
  if(JAXMOE_WERROR)
    target_compile_options(${name} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings>)
  endif()
  install(TARGETS ${name} LIBRARY DESTINATION jaxmoe/lib)
endfunction()

# One set of sources, two libraries: see jaxmoe/transport for when each is loaded.
jaxmoe_cuda_library(jaxmoe_cuda ${JAXMOE_COMMON_SOURCES} ${JAXMOE_CUDA_SOURCES})
# Hopper's tensor cores have instructions that no other architecture knows.
if(CMAKE_CUDA_ARCHITECTURES MATCHES "90a")
  jaxmoe_cuda_library(jaxmoe_gemm ${JAXMOE_GEMM_SOURCES})
  set_target_properties(jaxmoe_gemm PROPERTIES CUDA_ARCHITECTURES 90a-real)
endif()
include(cmake/Nvshmem.cmake)
jaxmoe_cuda_status(
  "CUDA library built for ${CMAKE_CUDA_ARCHITECTURES} with CUDA ${CMAKE_CUDA_COMPILER_VERSION}; ${JAXMOE_NVSHMEM_STATUS}")
