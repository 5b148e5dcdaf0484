// Host side of the C interface: tensor maps, parameters, launch.
#include "flash_kda.h"

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>

#include "params.h"
#include "sm90/forward.h"

namespace flash_kda {
namespace {

enum Error { kBadVersion = 100001, kNoTensorMaps = 100002, kBadTensor = 100003, kBadScratch = 100004 };

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
  if (status == CUDA_ERROR_INVALID_VALUE) return kBadTensor;
  return static_cast<int>(status);  // an earlier kernel's fault, say: the runtime has the driver's numbers
}

// The first call makes CUDA load the kernel. While a stream is being captured, a thread may do so only if it says that
// it knows what it does: nothing of that is work on a stream.
struct LoadingWhileCaptured {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  LoadingWhileCaptured() { cudaThreadExchangeStreamCaptureMode(&mode); }
  ~LoadingWhileCaptured() { cudaThreadExchangeStreamCaptureMode(&mode); }
};

// As many clusters as run at once, but no more than there are heads of sequences.
int cluster_count(int device, int64_t items, int& clusters) {
  static std::atomic<int> known[64];  // by device; 0: not asked yet
  std::atomic<int>* const cached = device < 64 ? &known[device] : nullptr;
  clusters = cached ? cached->load() : 0;
  if (clusters == 0) {
    if (const cudaError_t error =
            cudaFuncSetAttribute(forward, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(SharedMemoryPlan)))
      return error;
    cudaLaunchConfig_t config{};
    config.gridDim = kPair;
    config.blockDim = kThreads;
    config.dynamicSmemBytes = sizeof(SharedMemoryPlan);
    cudaLaunchAttribute pair{};
    pair.id = cudaLaunchAttributeClusterDimension;
    pair.val.clusterDim.x = kPair;
    pair.val.clusterDim.y = pair.val.clusterDim.z = 1;
    config.attrs = &pair;
    config.numAttrs = 1;
    if (const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, forward, &config)) return error;
    if (clusters == 0) return cudaErrorInvalidConfiguration;
    if (cached) cached->store(clusters);
  }
  clusters = static_cast<int>(std::min<int64_t>(items, clusters));
  return 0;
}

constexpr int64_t kHandoverFloats = kColumns * kHeadDim;
constexpr int64_t kFlagBytes = 4096;  // in front of the states: how many clusters have started, and a flag for each CTA

int64_t scratch_bytes(int64_t processors) { return kFlagBytes + processors * kHandoverFloats * int64_t(sizeof(float)); }

int launch(const flash_kda_arguments& a, cudaStream_t stream) {
  const int64_t items = a.sequences * a.heads;
  if (items == 0) return 0;
  int device = 0, clusters = 0;  // asked first: where there is no device, CUDA says so best
  {
    const LoadingWhileCaptured allowed;
    if (const cudaError_t error = cudaGetDevice(&device)) return error;
    if (const int error = cluster_count(device, items, clusters)) return error;
  }
  if (a.scratch == nullptr || a.scratch_bytes < scratch_bytes(clusters * kPair)) return kBadScratch;
  // Before the maps are encoded: to the driver, a thread that has not called CUDA yet has no context, and asking the
  // runtime for the device gives it none. This does.
  if (const cudaError_t error = cudaMemsetAsync(a.scratch, 0, (1 + clusters * kPair) * sizeof(uint32_t), stream))
    return error;
  Params p = to_params(a);
  p.started = static_cast<uint32_t*>(a.scratch);
  p.handed_over = p.started + 1;
  p.handover = reinterpret_cast<float*>(static_cast<char*>(a.scratch) + kFlagBytes);
  if (a.tokens > 0) {
    const struct {
      CUtensorMap& map;
      const flash_kda_tokens& x;
    } maps[] = {{p.q, a.q}, {p.k, a.k}, {p.g, a.g}, {p.v, a.v}};
    for (const auto& m : maps)
      if (const int error = encode(m.map, m.x, a)) return error;
  }

  cudaGetLastError();  // what failed in an earlier call, and was returned there, is not this launch's
  forward<<<clusters * kPair, kThreads, sizeof(SharedMemoryPlan), stream>>>(p);
  return cudaGetLastError();
}

}  // namespace
}  // namespace flash_kda

extern "C" int flash_kda_forward(const flash_kda_arguments* arguments, void* stream) {
  if (arguments->abi_version != FLASH_KDA_ABI_VERSION) return flash_kda::kBadVersion;
  return flash_kda::launch(*arguments, static_cast<cudaStream_t>(stream));
}

extern "C" int64_t flash_kda_scratch_bytes(int processors) { return flash_kda::scratch_bytes(processors); }

extern "C" const char* flash_kda_error_string(int error) {
  switch (error) {
    case flash_kda::kBadVersion:
      return "the arguments are of another version of the C interface";
    case flash_kda::kNoTensorMaps:
      return "the CUDA driver offers no cuTensorMapEncodeTiled (it is older than CUDA 12.0)";
    case flash_kda::kBadTensor:
      return "a tensor cannot be described to TMA (data 16-byte aligned, strides multiples of 8 elements)";
    case flash_kda::kBadScratch:
      return "the scratch memory is smaller than flash_kda_scratch_bytes says";
    default:
      return cudaGetErrorString(static_cast<cudaError_t>(error));
  }
}

#ifdef FLASH_KDA_TIMELINE

// What the last launch recorded (sm90/timeline.h): for each CTA of a cluster its clock at the begin, then for each mark
// of each warp of each CTA its clock, its stage and its chunk. All are uint32.
extern "C" FLASH_KDA_API int flash_kda_timeline_read(void* to) {
  return cudaMemcpyFromSymbol(to, flash_kda::timeline, sizeof(flash_kda::Timeline));
}

extern "C" FLASH_KDA_API void flash_kda_timeline_shape(int32_t (&ctas_warps_marks)[3]) {
  ctas_warps_marks[0] = flash_kda::kPair;
  ctas_warps_marks[1] = flash_kda::kThreads / flash_kda::kWarp;
  ctas_warps_marks[2] = flash_kda::kTimelineMarks;
}

// The role that a warp stands for, of which it is the first one; null of other warps.
extern "C" FLASH_KDA_API const char* flash_kda_timeline_role(int warp) {
  using namespace flash_kda;
  if (warp == 0) return "R";
  if (warp == kFirstPrepareWarp) return "P, team 0";
  if (warp == kFirstPrepareWarp + kTeamWarps) return "P, team 1";
  if (warp == kLoadWarp) return "loads";
  if (warp == kCopyWarp) return "copies";
  if (warp == kFirstInvertWarp) return "X, team 0";
  if (warp == kFirstInvertWarp + 1) return "X, team 1";
  return nullptr;
}

// The name of a stage; null behind the last one.
extern "C" FLASH_KDA_API const char* flash_kda_timeline_stage(int stage) {
#define FLASH_KDA_NAME(name, text) text,
  static const char* const names[] = {FLASH_KDA_STAGES(FLASH_KDA_NAME) nullptr};
#undef FLASH_KDA_NAME
  return stage < int(sizeof(names) / sizeof(names[0])) ? names[stage] : nullptr;
}

#endif
