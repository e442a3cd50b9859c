// Grouped matrix products on the device, as host code sees them.

#ifndef JAXMOE_XLA_FFI_GEMM_LAUNCH_H_
#define JAXMOE_XLA_FFI_GEMM_LAUNCH_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace jaxmoe::gemm {

// Sizes of a product: rows [num_rows, dim] times weights [num_groups, dim, features]. `dim` and
// `features` are multiples of 8, and pointers of 16 bytes: what the copy engine can address.
struct Shape {
  int64_t num_rows, dim, features, num_groups;
};

// Where a product runs: on so many multiprocessors. `claims` is a number on the device for this
// product alone until it is done, or null: with it, blocks that are held up by other kernels leave
// their part to the others.
struct Target {
  cudaStream_t stream;
  int num_sms;
  int32_t* claims;
};

// All arrays are bf16 on the device but `group_sizes` [num_groups]. Nothing is read back, allocated
// or waited for.
cudaError_t LaunchForward(const Target& target, const Shape& shape, const void* x, const void* w,
                          const int32_t* group_sizes, void* y);

// d_x = d_y w^T for d_y [num_rows, features].
cudaError_t LaunchInputGrad(const Target& target, const Shape& shape, const void* d_y,
                            const void* w, const int32_t* group_sizes, void* d_x);

// d_x = d_y w^T + d_y2 w2^T, in one sum.
cudaError_t LaunchInputGradOfTwo(const Target& target, const Shape& shape, const void* d_y,
                                 const void* w, const void* d_y2, const void* w2,
                                 const int32_t* group_sizes, void* d_x);

// d_w = x^T d_y for each group; zeros for an empty one.
cudaError_t LaunchWeightGrad(const Target& target, const Shape& shape, const void* x,
                             const void* d_y, const int32_t* group_sizes, void* d_w);

// y = silu(x gate) (x up). `a` = x gate and `b` = x up are written too, unless they are null.
cudaError_t LaunchSwiglu(const Target& target, const Shape& shape, const void* x, const void* gate,
                         const void* up, const int32_t* group_sizes, void* y, void* a, void* b);

// The forward product of FP8 (e4m3) with float32 scales: `x` [num_rows, dim] with `x_scales`
// [num_rows, ceil(dim / 128)], `w` [num_groups, features, dim] with `w_scales`
// [num_groups, ceil(features / 128), ceil(dim / 128)]; y is bf16. `dim` is a multiple of 16.
cudaError_t LaunchFp8Forward(const Target& target, const Shape& shape, const void* x,
                             const float* x_scales, const void* w, const float* w_scales,
                             const int32_t* group_sizes, void* y);

// Loads the kernels on the current device, which a first launch would do at a worse moment.
cudaError_t Preload();
cudaError_t PreloadFp8();

}  // namespace jaxmoe::gemm

#endif  // JAXMOE_XLA_FFI_GEMM_LAUNCH_H_
