// The warpgroup's product of FP8 (e4m3) tiles: 64 x kFp8Columns of float32 from 32 of the
// contraction, both factors with the contraction along their rows. See wgmma.cuh.

#ifndef JAXMOE_XLA_FFI_GEMM_WGMMA_FP8_CUH_
#define JAXMOE_XLA_FFI_GEMM_WGMMA_FP8_CUH_

#include "xla_ffi/gemm/layout.cuh"

namespace jaxmoe::gemm {

// And the registers that hold a thread's part.
constexpr int kFp8Columns = 128;
constexpr int kFp8Accumulators = kFp8Columns / 2;

#define JAXMOE_D8(i)                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])

// d = a b, or d += a b if `add`.
__device__ __forceinline__ void Fp8Product(float (&d)[kFp8Accumulators], uint32_t a, uint32_t b,
                                           int add) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, "
      "%15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, "
      "%28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, "
      "%41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, "
      "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, %64, %65, p, 1, 1; }"
      : JAXMOE_D8(0), JAXMOE_D8(8), JAXMOE_D8(16), JAXMOE_D8(24), JAXMOE_D8(32), JAXMOE_D8(40),
        JAXMOE_D8(48), JAXMOE_D8(56)
      : "l"(WholeDescriptor(a)), "l"(WholeDescriptor(b)), "r"(add));
}

#undef JAXMOE_D8

}  // namespace jaxmoe::gemm

#endif  // JAXMOE_XLA_FFI_GEMM_WGMMA_FP8_CUH_
