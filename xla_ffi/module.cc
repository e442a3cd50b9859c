// Python module jaxmoe._cpu: hands the FFI handlers of the CPU transport to Python.

#include <nanobind/nanobind.h>

NB_MODULE(_cpu, m) { m.doc() = "FFI handlers of the CPU transport."; }
