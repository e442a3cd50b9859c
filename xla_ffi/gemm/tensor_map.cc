#include "xla_ffi/gemm/tensor_map.h"

namespace jaxmoe::gemm {
namespace {

constexpr int kSwizzleBytes = 128;

using Encode = decltype(&cuTensorMapEncodeTiled);

// From the driver, which we are not linked with: machines that compile have none.
Encode FindEncode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &found);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<Encode>(function);
}

cudaError_t DescribeAs(CUtensorMapDataType type, int bytes, const void* data,
                       std::initializer_list<int64_t> sizes, int box_rows, CUtensorMap* map) {
  static const Encode encode = FindEncode();
  if (encode == nullptr) return cudaErrorSymbolNotFound;
  cuuint64_t dims[3], strides[3];
  cuuint32_t box[3] = {static_cast<cuuint32_t>(kSwizzleBytes / bytes),
                       static_cast<cuuint32_t>(box_rows), 1};
  cuuint32_t steps[3] = {1, 1, 1}, rank = 0;
  cuuint64_t stride = bytes;
  for (const int64_t size : sizes) {
    dims[rank] = static_cast<cuuint64_t>(size);
    stride *= dims[rank];
    strides[rank++] = stride;
  }
  const CUresult result =
      encode(map, type, rank, const_cast<void*>(data), dims, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

cudaError_t Describe(const void* data, std::initializer_list<int64_t> sizes, int box_rows,
                     CUtensorMap* map) {
  return DescribeAs(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, data, sizes, box_rows, map);
}

cudaError_t DescribeBytes(const void* data, std::initializer_list<int64_t> sizes, int box_rows,
                          CUtensorMap* map) {
  return DescribeAs(CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, data, sizes, box_rows, map);
}

}  // namespace jaxmoe::gemm
