// The warpgroup's product of FP8 (e4m3) tiles: 64 x kN of float32 from 32 of the contraction, both
// factors with the contraction along their rows. See wgmma.cuh.

#ifndef JAXMOE_XLA_FFI_GEMM_WGMMA_FP8_CUH_
#define JAXMOE_XLA_FFI_GEMM_WGMMA_FP8_CUH_

#include "xla_ffi/gemm/layout.cuh"

namespace jaxmoe::gemm {

// Widest, and the registers that hold its part of a thread.
constexpr int kMaxHalfColumns = kMaxColumns / 2;
constexpr int kHalfAccumulators = kMaxHalfColumns / 2;

// d = a b, or d += a b if `add`.
template <int kN>
struct Fp8Product;

// Operands of the instruction's text: the first n / 2 registers, then a, b and add.
#define JAXMOE_D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])

#define JAXMOE_PRODUCT(n, names, a_, b_, add_, ...)                                            \
  template <>                                                                                  \
  struct Fp8Product<n> {                                                                       \
    static __device__ __forceinline__ void Do(float (&d)[kHalfAccumulators], uint32_t a,       \
                                              uint32_t b, int add) {                           \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, " add_                                      \
                   ", 0;\n"                                                                    \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k32.f32.e4m3.e4m3 {" names "}, " a_ \
                   ", " b_ ", p, 1, 1; }"                                                      \
                   : __VA_ARGS__                                                               \
                   : "l"(WholeDescriptor(a)), "l"(WholeDescriptor(b)), "r"(add));              \
    }                                                                                          \
  }

#define JAXMOE_FP8_NAMES8 "%0, %1, %2, %3"
#define JAXMOE_FP8_NAMES16 JAXMOE_FP8_NAMES8 ", %4, %5, %6, %7"
#define JAXMOE_FP8_NAMES24 JAXMOE_FP8_NAMES16 ", %8, %9, %10, %11"
#define JAXMOE_FP8_NAMES32 JAXMOE_FP8_NAMES24 ", %12, %13, %14, %15"
#define JAXMOE_FP8_NAMES40 JAXMOE_FP8_NAMES32 ", %16, %17, %18, %19"
#define JAXMOE_FP8_NAMES48 JAXMOE_FP8_NAMES40 ", %20, %21, %22, %23"
#define JAXMOE_FP8_NAMES56 JAXMOE_FP8_NAMES48 ", %24, %25, %26, %27"
#define JAXMOE_FP8_NAMES64 JAXMOE_FP8_NAMES56 ", %28, %29, %30, %31"
#define JAXMOE_FP8_NAMES72 JAXMOE_FP8_NAMES64 ", %32, %33, %34, %35"
#define JAXMOE_FP8_NAMES80 JAXMOE_FP8_NAMES72 ", %36, %37, %38, %39"
#define JAXMOE_FP8_NAMES88 JAXMOE_FP8_NAMES80 ", %40, %41, %42, %43"
#define JAXMOE_FP8_NAMES96 JAXMOE_FP8_NAMES88 ", %44, %45, %46, %47"
#define JAXMOE_FP8_NAMES104 JAXMOE_FP8_NAMES96 ", %48, %49, %50, %51"
#define JAXMOE_FP8_NAMES112 JAXMOE_FP8_NAMES104 ", %52, %53, %54, %55"
#define JAXMOE_FP8_NAMES120 JAXMOE_FP8_NAMES112 ", %56, %57, %58, %59"
#define JAXMOE_FP8_NAMES128 JAXMOE_FP8_NAMES120 ", %60, %61, %62, %63"

#define JAXMOE_FP8_REGISTERS8 JAXMOE_D8(0)
#define JAXMOE_FP8_REGISTERS16 JAXMOE_FP8_REGISTERS8, JAXMOE_D8(4)
#define JAXMOE_FP8_REGISTERS24 JAXMOE_FP8_REGISTERS16, JAXMOE_D8(8)
#define JAXMOE_FP8_REGISTERS32 JAXMOE_FP8_REGISTERS24, JAXMOE_D8(12)
#define JAXMOE_FP8_REGISTERS40 JAXMOE_FP8_REGISTERS32, JAXMOE_D8(16)
#define JAXMOE_FP8_REGISTERS48 JAXMOE_FP8_REGISTERS40, JAXMOE_D8(20)
#define JAXMOE_FP8_REGISTERS56 JAXMOE_FP8_REGISTERS48, JAXMOE_D8(24)
#define JAXMOE_FP8_REGISTERS64 JAXMOE_FP8_REGISTERS56, JAXMOE_D8(28)
#define JAXMOE_FP8_REGISTERS72 JAXMOE_FP8_REGISTERS64, JAXMOE_D8(32)
#define JAXMOE_FP8_REGISTERS80 JAXMOE_FP8_REGISTERS72, JAXMOE_D8(36)
#define JAXMOE_FP8_REGISTERS88 JAXMOE_FP8_REGISTERS80, JAXMOE_D8(40)
#define JAXMOE_FP8_REGISTERS96 JAXMOE_FP8_REGISTERS88, JAXMOE_D8(44)
#define JAXMOE_FP8_REGISTERS104 JAXMOE_FP8_REGISTERS96, JAXMOE_D8(48)
#define JAXMOE_FP8_REGISTERS112 JAXMOE_FP8_REGISTERS104, JAXMOE_D8(52)
#define JAXMOE_FP8_REGISTERS120 JAXMOE_FP8_REGISTERS112, JAXMOE_D8(56)
#define JAXMOE_FP8_REGISTERS128 JAXMOE_FP8_REGISTERS120, JAXMOE_D8(60)

JAXMOE_PRODUCT(8, JAXMOE_FP8_NAMES8, "%4", "%5", "%6", JAXMOE_FP8_REGISTERS8);
JAXMOE_PRODUCT(16, JAXMOE_FP8_NAMES16, "%8", "%9", "%10", JAXMOE_FP8_REGISTERS16);
JAXMOE_PRODUCT(24, JAXMOE_FP8_NAMES24, "%12", "%13", "%14", JAXMOE_FP8_REGISTERS24);
JAXMOE_PRODUCT(32, JAXMOE_FP8_NAMES32, "%16", "%17", "%18", JAXMOE_FP8_REGISTERS32);
JAXMOE_PRODUCT(40, JAXMOE_FP8_NAMES40, "%20", "%21", "%22", JAXMOE_FP8_REGISTERS40);
JAXMOE_PRODUCT(48, JAXMOE_FP8_NAMES48, "%24", "%25", "%26", JAXMOE_FP8_REGISTERS48);
JAXMOE_PRODUCT(56, JAXMOE_FP8_NAMES56, "%28", "%29", "%30", JAXMOE_FP8_REGISTERS56);
JAXMOE_PRODUCT(64, JAXMOE_FP8_NAMES64, "%32", "%33", "%34", JAXMOE_FP8_REGISTERS64);
JAXMOE_PRODUCT(72, JAXMOE_FP8_NAMES72, "%36", "%37", "%38", JAXMOE_FP8_REGISTERS72);
JAXMOE_PRODUCT(80, JAXMOE_FP8_NAMES80, "%40", "%41", "%42", JAXMOE_FP8_REGISTERS80);
JAXMOE_PRODUCT(88, JAXMOE_FP8_NAMES88, "%44", "%45", "%46", JAXMOE_FP8_REGISTERS88);
JAXMOE_PRODUCT(96, JAXMOE_FP8_NAMES96, "%48", "%49", "%50", JAXMOE_FP8_REGISTERS96);
JAXMOE_PRODUCT(104, JAXMOE_FP8_NAMES104, "%52", "%53", "%54", JAXMOE_FP8_REGISTERS104);
JAXMOE_PRODUCT(112, JAXMOE_FP8_NAMES112, "%56", "%57", "%58", JAXMOE_FP8_REGISTERS112);
JAXMOE_PRODUCT(120, JAXMOE_FP8_NAMES120, "%60", "%61", "%62", JAXMOE_FP8_REGISTERS120);
JAXMOE_PRODUCT(128, JAXMOE_FP8_NAMES128, "%64", "%65", "%66", JAXMOE_FP8_REGISTERS128);

#undef JAXMOE_PRODUCT
#undef JAXMOE_D8

}  // namespace jaxmoe::gemm

#endif  // JAXMOE_XLA_FFI_GEMM_WGMMA_FP8_CUH_
