// Host side of the C interface: tensor maps, parameters, launch.
#include "flash_kda.h"

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "params.h"
#include "sm90/forward.h"

namespace flash_kda {
namespace {

enum Error { kBadVersion = 100001, kNoTensorMaps = 100002, kBadTensor = 100003 };

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode tensor_map_encoder() {
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return status == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  return encode;
}

int encode(CUtensorMap& map, const flash_kda_tokens& x, const flash_kda_arguments& a) {
  const Encode encode = tensor_map_encoder();
  if (!encode) return kNoTensorMaps;
  // A dimension of size 1 may come with any stride: TMA wants a valid one.
  const auto bytes = [](int64_t stride, int64_t size) { return cuuint64_t(size > 1 ? stride * 2 : kHeadDim * 2); };
  const cuuint64_t sizes[4] = {kHeadDim, cuuint64_t(a.heads), cuuint64_t(a.tokens), cuuint64_t(a.batch)};
  const cuuint64_t strides[3] = {bytes(x.stride_head, a.heads), bytes(x.stride_token, a.tokens),
                                 bytes(x.stride_batch, a.batch)};
  const cuuint32_t box[4] = {kHalf, 1, kChunk, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUresult status = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, x.data, sizes, strides, box, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? 0 : kBadTensor;
}

int launch(const flash_kda_arguments& a, cudaStream_t stream) {
  const int64_t items = a.sequences * a.heads * kColumnSplits;
  if (items == 0) return 0;
  int device = 0, processors = 0;  // asked first: where there is no device, CUDA says so best
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device))
    return error;
  Params p{};
  if (a.tokens > 0) {
    const struct {
      CUtensorMap& map;
      const flash_kda_tokens& x;
    } maps[] = {{p.q, a.q}, {p.k, a.k}, {p.g, a.g}, {p.v, a.v}};
    for (const auto& m : maps)
      if (const int error = encode(m.map, m.x, a)) return error;
  }
  p.beta = static_cast<const uint16_t*>(a.beta.data);
  p.beta_stride_batch = a.beta.stride_batch;
  p.beta_stride_token = a.beta.stride_token;
  p.beta_stride_head = a.beta.stride_head;
  p.out = static_cast<uint16_t*>(a.out.data);
  p.out_stride_batch = a.out.stride_batch;
  p.out_stride_token = a.out.stride_token;
  p.out_stride_head = a.out.stride_head;
  p.A_log = a.A_log;
  p.dt_bias = a.dt_bias;
  p.dt_bias_stride = a.dt_bias_stride;
  p.cu_seqlens = a.cu_seqlens;
  p.cu_seqlens_is_64_bit = a.cu_seqlens_is_64_bit != 0;
  p.tokens = a.tokens;
  p.sequences = a.sequences;
  p.heads = a.heads;
  if (a.initial_state.dtype != FLASH_KDA_NONE) {
    p.initial_state = a.initial_state.data;
    p.initial_stride_sequence = a.initial_state.stride_sequence;
    p.initial_stride_head = a.initial_state.stride_head;
    p.initial_stride_value = a.initial_state.stride_value;
    p.initial_is_fp32 = a.initial_state.dtype == FLASH_KDA_FP32;
  }
  if (a.final_state.dtype != FLASH_KDA_NONE) {
    p.final_state = a.final_state.data;
    p.final_stride_sequence = a.final_state.stride_sequence;
    p.final_stride_head = a.final_state.stride_head;
    p.final_stride_value = a.final_state.stride_value;
    p.final_is_fp32 = a.final_state.dtype == FLASH_KDA_FP32;
  }
  p.scale = a.scale;
  p.lower_bound = a.lower_bound;

  if (const cudaError_t error =
          cudaFuncSetAttribute(forward, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(SharedMemoryPlan)))
    return error;
  const unsigned blocks = static_cast<unsigned>(std::min<int64_t>(items, processors));
  forward<<<blocks, kThreads, sizeof(SharedMemoryPlan), stream>>>(p);
  return cudaGetLastError();
}

}  // namespace
}  // namespace flash_kda

extern "C" int flash_kda_forward(const flash_kda_arguments* arguments, void* stream) {
  if (arguments->abi_version != FLASH_KDA_ABI_VERSION) return flash_kda::kBadVersion;
  return flash_kda::launch(*arguments, static_cast<cudaStream_t>(stream));
}

extern "C" const char* flash_kda_error_string(int error) {
  switch (error) {
    case flash_kda::kBadVersion:
      return "the arguments are of another version of the C interface";
    case flash_kda::kNoTensorMaps:
      return "the CUDA driver offers no cuTensorMapEncodeTiled (it is older than CUDA 12.0)";
    case flash_kda::kBadTensor:
      return "a tensor cannot be described to TMA (data 16-byte aligned, strides multiples of 8 elements)";
    default:
      return cudaGetErrorString(static_cast<cudaError_t>(error));
  }
}
