# One executable for each tests/*_test.cc, run by ctest.
enable_testing()
foreach(source ${JAXMOE_TEST_SOURCES})
  get_filename_component(name ${source} NAME_WE)
  add_executable(${name} ${source} tests/main.cc)
  target_link_libraries(${name} PRIVATE jaxmoe_native)
  add_test(NAME ${name} COMMAND ${name})
endforeach()
