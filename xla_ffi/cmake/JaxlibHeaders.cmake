# Sets JAXLIB_INCLUDE_DIR to the folder that holds xla/ffi/api/ffi.h of the jaxlib that Python sees.
# find_spec does not run jaxlib: configuring stays fast, and no device is touched.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
          "import importlib.util as u; print(u.find_spec('jaxlib').submodule_search_locations[0])"
  OUTPUT_STRIP_TRAILING_WHITESPACE
  OUTPUT_VARIABLE jaxlib_dir
  ERROR_VARIABLE jaxlib_error
  RESULT_VARIABLE jaxlib_result)
set(JAXLIB_INCLUDE_DIR "${jaxlib_dir}/include")
if(NOT jaxlib_result EQUAL 0 OR NOT EXISTS "${JAXLIB_INCLUDE_DIR}/xla/ffi/api/ffi.h")
  message(FATAL_ERROR
    "jaxmoe: ${Python_EXECUTABLE} has no jaxlib with XLA FFI headers (looked for "
    "'${JAXLIB_INCLUDE_DIR}/xla/ffi/api/ffi.h'). Install jaxlib >= 0.10.2 for this Python, or build "
    "without --no-build-isolation.\n${jaxlib_error}")
endif()
message(STATUS "jaxmoe: XLA FFI headers in ${JAXLIB_INCLUDE_DIR}")
