// Descriptions of tensors for the copy engine.

#ifndef JAXMOE_XLA_FFI_GEMM_TENSOR_MAP_H_
#define JAXMOE_XLA_FFI_GEMM_TENSOR_MAP_H_

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <initializer_list>

namespace jaxmoe::gemm {

// Describes bf16 [.., sizes[1], sizes[0]] without gaps, copied in boxes of [.., box_rows, 64] that
// lie swizzled in shared memory. Sizes go from the innermost on, two or three of them.
cudaError_t Describe(const void* data, std::initializer_list<int64_t> sizes, int box_rows,
                     CUtensorMap* map);
// The same of bytes, in boxes of 128 columns.
cudaError_t DescribeBytes(const void* data, std::initializer_list<int64_t> sizes, int box_rows,
                          CUtensorMap* map);

}  // namespace jaxmoe::gemm

#endif  // JAXMOE_XLA_FFI_GEMM_TENSOR_MAP_H_
