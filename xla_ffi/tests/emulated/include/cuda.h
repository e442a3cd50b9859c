#include "xla_ffi/tests/emulated/cuda.h"
