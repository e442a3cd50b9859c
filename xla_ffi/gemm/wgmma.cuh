// The warpgroup's matrix product (wgmma): 64 x kN of float32 in registers, from tiles of bf16 in
// shared memory. https://docs.nvidia.com/cuda/parallel-thread-execution, section on wgmma.

#ifndef JAXMOE_XLA_FFI_GEMM_WGMMA_CUH_
#define JAXMOE_XLA_FFI_GEMM_WGMMA_CUH_

#include "xla_ffi/gemm/layout.cuh"

namespace jaxmoe::gemm {

__device__ __forceinline__ void BeginProducts() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void EndProducts() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until all but the `kPending` latest groups are done.
template <int kPending>
__device__ __forceinline__ void WaitProducts() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from reading the first kCount results before the wait above this.
template <int kCount, int kSize>
__device__ __forceinline__ void TakeFirst(float (&d)[kSize]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int kSize>
__device__ __forceinline__ void TakeResults(float (&d)[kSize]) {
  TakeFirst<kSize>(d);
}

// d = a b, or d += a b if `add`. a is 64 x 16 and b 16 x kN.
template <int kN, bool kTransposedA, bool kTransposedB>
struct Product;

// Operands of the instruction's text: the first n / 2 registers, then a, b, add and the
// transpositions, which the compiler numbers from n / 2 on.
#define JAXMOE_D16(i)                                                                         \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])

#define JAXMOE_PRODUCT(n, names, a_, b_, add_, ta_, tb_, ...)                                    \
  template <bool kTransposedA, bool kTransposedB>                                                \
  struct Product<n, kTransposedA, kTransposedB> {                                                \
    static __device__ __forceinline__ void Do(float (&d)[kAccumulators], uint32_t a, uint32_t b, \
                                              int add) {                                         \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, " add_                                        \
                   ", 0;\n"                                                                      \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" names "}, " a_   \
                   ", " b_ ", p, 1, 1, " ta_ ", " tb_ "; }"                                      \
                   : __VA_ARGS__                                                                 \
                   : "l"(WholeDescriptor(a)), "l"(WholeDescriptor(b)), "r"(add),                 \
                     "n"(kTransposedA ? 1 : 0), "n"(kTransposedB ? 1 : 0));                      \
    }                                                                                            \
  }

#define JAXMOE_NAMES16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define JAXMOE_NAMES32 \
  JAXMOE_NAMES16       \
  ", "                 \
  "%8, %9, %10, %11, %12, %13, %14, %15"
#define JAXMOE_NAMES48 \
  JAXMOE_NAMES32       \
  ", "                 \
  "%16, %17, %18, %19, %20, %21, %22, %23"
#define JAXMOE_NAMES64 \
  JAXMOE_NAMES48       \
  ", "                 \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define JAXMOE_NAMES80 \
  JAXMOE_NAMES64       \
  ", "                 \
  "%32, %33, %34, %35, %36, %37, %38, %39"
#define JAXMOE_NAMES96 \
  JAXMOE_NAMES80       \
  ", "                 \
  "%40, %41, %42, %43, %44, %45, %46, %47"
#define JAXMOE_NAMES112 \
  JAXMOE_NAMES96        \
  ", "                  \
  "%48, %49, %50, %51, %52, %53, %54, %55"
#define JAXMOE_NAMES128 \
  JAXMOE_NAMES112       \
  ", "                  \
  "%56, %57, %58, %59, %60, %61, %62, %63"
#define JAXMOE_NAMES144 \
  JAXMOE_NAMES128       \
  ", "                  \
  "%64, %65, %66, %67, %68, %69, %70, %71"
#define JAXMOE_NAMES160 \
  JAXMOE_NAMES144       \
  ", "                  \
  "%72, %73, %74, %75, %76, %77, %78, %79"
#define JAXMOE_NAMES176 \
  JAXMOE_NAMES160       \
  ", "                  \
  "%80, %81, %82, %83, %84, %85, %86, %87"
#define JAXMOE_NAMES192 \
  JAXMOE_NAMES176       \
  ", "                  \
  "%88, %89, %90, %91, %92, %93, %94, %95"
#define JAXMOE_NAMES208 \
  JAXMOE_NAMES192       \
  ", "                  \
  "%96, %97, %98, %99, %100, %101, %102, %103"
#define JAXMOE_NAMES224 \
  JAXMOE_NAMES208       \
  ", "                  \
  "%104, %105, %106, %107, %108, %109, %110, %111"
#define JAXMOE_NAMES240 \
  JAXMOE_NAMES224       \
  ", "                  \
  "%112, %113, %114, %115, %116, %117, %118, %119"
#define JAXMOE_NAMES256 \
  JAXMOE_NAMES240       \
  ", "                  \
  "%120, %121, %122, %123, %124, %125, %126, %127"

#define JAXMOE_REGISTERS16 JAXMOE_D16(0)
#define JAXMOE_REGISTERS32 JAXMOE_REGISTERS16, JAXMOE_D16(8)
#define JAXMOE_REGISTERS48 JAXMOE_REGISTERS32, JAXMOE_D16(16)
#define JAXMOE_REGISTERS64 JAXMOE_REGISTERS48, JAXMOE_D16(24)
#define JAXMOE_REGISTERS80 JAXMOE_REGISTERS64, JAXMOE_D16(32)
#define JAXMOE_REGISTERS96 JAXMOE_REGISTERS80, JAXMOE_D16(40)
#define JAXMOE_REGISTERS112 JAXMOE_REGISTERS96, JAXMOE_D16(48)
#define JAXMOE_REGISTERS128 JAXMOE_REGISTERS112, JAXMOE_D16(56)
#define JAXMOE_REGISTERS144 JAXMOE_REGISTERS128, JAXMOE_D16(64)
#define JAXMOE_REGISTERS160 JAXMOE_REGISTERS144, JAXMOE_D16(72)
#define JAXMOE_REGISTERS176 JAXMOE_REGISTERS160, JAXMOE_D16(80)
#define JAXMOE_REGISTERS192 JAXMOE_REGISTERS176, JAXMOE_D16(88)
#define JAXMOE_REGISTERS208 JAXMOE_REGISTERS192, JAXMOE_D16(96)
#define JAXMOE_REGISTERS224 JAXMOE_REGISTERS208, JAXMOE_D16(104)
#define JAXMOE_REGISTERS240 JAXMOE_REGISTERS224, JAXMOE_D16(112)
#define JAXMOE_REGISTERS256 JAXMOE_REGISTERS240, JAXMOE_D16(120)

JAXMOE_PRODUCT(16, JAXMOE_NAMES16, "%8", "%9", "%10", "%11", "%12", JAXMOE_REGISTERS16);
JAXMOE_PRODUCT(32, JAXMOE_NAMES32, "%16", "%17", "%18", "%19", "%20", JAXMOE_REGISTERS32);
JAXMOE_PRODUCT(48, JAXMOE_NAMES48, "%24", "%25", "%26", "%27", "%28", JAXMOE_REGISTERS48);
JAXMOE_PRODUCT(64, JAXMOE_NAMES64, "%32", "%33", "%34", "%35", "%36", JAXMOE_REGISTERS64);
JAXMOE_PRODUCT(80, JAXMOE_NAMES80, "%40", "%41", "%42", "%43", "%44", JAXMOE_REGISTERS80);
JAXMOE_PRODUCT(96, JAXMOE_NAMES96, "%48", "%49", "%50", "%51", "%52", JAXMOE_REGISTERS96);
JAXMOE_PRODUCT(112, JAXMOE_NAMES112, "%56", "%57", "%58", "%59", "%60", JAXMOE_REGISTERS112);
JAXMOE_PRODUCT(128, JAXMOE_NAMES128, "%64", "%65", "%66", "%67", "%68", JAXMOE_REGISTERS128);
JAXMOE_PRODUCT(144, JAXMOE_NAMES144, "%72", "%73", "%74", "%75", "%76", JAXMOE_REGISTERS144);
JAXMOE_PRODUCT(160, JAXMOE_NAMES160, "%80", "%81", "%82", "%83", "%84", JAXMOE_REGISTERS160);
JAXMOE_PRODUCT(176, JAXMOE_NAMES176, "%88", "%89", "%90", "%91", "%92", JAXMOE_REGISTERS176);
JAXMOE_PRODUCT(192, JAXMOE_NAMES192, "%96", "%97", "%98", "%99", "%100", JAXMOE_REGISTERS192);
JAXMOE_PRODUCT(208, JAXMOE_NAMES208, "%104", "%105", "%106", "%107", "%108", JAXMOE_REGISTERS208);
JAXMOE_PRODUCT(224, JAXMOE_NAMES224, "%112", "%113", "%114", "%115", "%116", JAXMOE_REGISTERS224);
JAXMOE_PRODUCT(240, JAXMOE_NAMES240, "%120", "%121", "%122", "%123", "%124", JAXMOE_REGISTERS240);
JAXMOE_PRODUCT(256, JAXMOE_NAMES256, "%128", "%129", "%130", "%131", "%132", JAXMOE_REGISTERS256);

#undef JAXMOE_PRODUCT
#undef JAXMOE_D16

}  // namespace jaxmoe::gemm

#endif  // JAXMOE_XLA_FFI_GEMM_WGMMA_CUH_
