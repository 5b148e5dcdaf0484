// Host side of the C interface: tensor maps, parameters, launch.
#include "flash_kda.h"

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <mutex>

#include "params.h"
#include "sm90/forward.h"

namespace flash_kda {
namespace {

// A function of the driver, found once; null where there is no driver.
template <typename Function>
Function of_driver(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t status = cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found);
  return status == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Function>(function) : nullptr;
}

// All that a tensor map says, in the driver's words.
struct Described {
  void* data;
  std::array<cuuint64_t, 4> sizes;
  std::array<cuuint64_t, 3> strides;  // in bytes

  Described() = default;
  Described(const flash_kda_tokens& x, const flash_kda_arguments& a)
      : data(x.data), sizes{kHeadDim, cuuint64_t(a.heads), cuuint64_t(a.tokens), cuuint64_t(a.batch)} {
    // A dimension of size 1 may come with any stride: TMA wants a valid one.
    const auto bytes = [](int64_t stride, int64_t size) { return cuuint64_t(size > 1 ? stride * 2 : kHeadDim * 2); };
    strides = {bytes(x.stride_head, a.heads), bytes(x.stride_token, a.tokens), bytes(x.stride_batch, a.batch)};
  }
  bool operator==(const Described& other) const {
    return data == other.data && sizes == other.sizes && strides == other.strides;
  }
};

int encode(CUtensorMap& map, const Described& x) {
  static const auto encoder = of_driver<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  if (!encoder) return FLASH_KDA_NO_TENSOR_MAPS;
  const cuuint32_t box[4] = {kHalf, 1, kChunk, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUresult status = encoder(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, x.data, x.sizes.data(), x.strides.data(),
                                  box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status == CUDA_ERROR_INVALID_VALUE) return FLASH_KDA_BAD_TENSOR;
  return static_cast<int>(status);  // an earlier kernel's fault, say: the runtime has the driver's numbers
}

// The same, unless this thread has lately described the same memory: a map holds nothing but its description.
int encode_or_recall(CUtensorMap& map, const Described& x) {
  struct Known {
    Described about;
    CUtensorMap map;
  };
  constexpr int kBits = 6;
  static thread_local Known known[1 << kBits];  // by a hash of the address
  Known& mine = known[(reinterpret_cast<uint64_t>(x.data) >> 4) * 0x9e3779b97f4a7c15 >> (64 - kBits)];
  if (!(mine.about == x)) {
    if (const int error = encode(mine.map, x)) {
      mine.about = {};
      return error;
    }
    mine.about = x;
  }
  map = mine.map;
  return 0;
}

// The first call makes CUDA load the kernel. While a stream is being captured, a thread may do so only if it says that
// it knows what it does: nothing of that is work on a stream.
struct LoadingWhileCaptured {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  LoadingWhileCaptured() { cudaThreadExchangeStreamCaptureMode(&mode); }
  ~LoadingWhileCaptured() { cudaThreadExchangeStreamCaptureMode(&mode); }
};

// This thread's context, which must be of that device. A thread that has not called CUDA yet gets one, without which
// the driver encodes no tensor maps.
int current_context(int device, CUcontext& context) {
  static const auto get_context = of_driver<decltype(&cuCtxGetCurrent)>("cuCtxGetCurrent");
  static const auto get_device = of_driver<CUresult (*)(CUdevice*)>("cuCtxGetDevice");
  const auto is_there = [&] { return get_context && get_context(&context) == CUDA_SUCCESS && context != nullptr; };
  int current = 0;
  if (!is_there()) {
    const LoadingWhileCaptured allowed;
    if (const cudaError_t error = cudaGetDevice(&current)) return error;  // no driver, say
    if (current != device) return FLASH_KDA_OTHER_DEVICE;
    if (const cudaError_t error = cudaSetDevice(device)) return error;
    if (!is_there()) return cudaErrorDeviceUninitialized;
  }
  if (const CUresult error = get_device(&current)) return static_cast<int>(error);
  return current == device ? 0 : FLASH_KDA_OTHER_DEVICE;
}

// As many clusters as run at once.
template <bool kRing>
int cluster_count(int device, int& clusters) {
  static std::atomic<int> known[64];  // by device; 0: not asked yet
  std::atomic<int>* const cached = device < 64 ? &known[device] : nullptr;
  clusters = cached ? cached->load() : 0;
  if (clusters == 0) {
    const LoadingWhileCaptured allowed;
    if (const cudaError_t error =
            cudaFuncSetAttribute(forward<kRing>, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(SharedMemoryPlan)))
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
    if (const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, forward<kRing>, &config)) return error;
    if (clusters == 0) return cudaErrorInvalidConfiguration;
    if (cached) cached->store(clusters);
  }
  return 0;
}

constexpr int64_t kHandoverFloats = kColumns * kHeadDim;
constexpr int64_t kFlagBytes = 8192;  // in front: `started`, `ended` and `handed_over` of params.h, then the ring's
constexpr int64_t kRingFlags = 512;   // where those begin
static_assert((kRingFlags + kRingSlots + kMostItems * kPair) * sizeof(uint32_t) <= kFlagBytes, "flags");

// The ring, and of each CTA the state that it hands over and the one that it keeps.
int64_t scratch_bytes(int64_t processors) {
  return kFlagBytes + int64_t(kRingSlots) * kPreparedBytes + 2 * processors * kHandoverFloats * int64_t(sizeof(float));
}

// Which way calls go: for tests.
std::atomic<int> wanted_way{int(Way::kAny)};

// Which kernels a call launches. `clusters`: so many run at once.
struct Launches {
  bool ring, pairs;
  Way way;
};
Launches launches_of(const flash_kda_arguments& a, int clusters, Way wanted) {
  constexpr Launches kPairs = {false, true, Way::kPair};
  if (wanted == Way::kPair) return kPairs;
  if (a.cu_seqlens == nullptr || a.sequences == 1) {  // a sequence may be shorter, which the ring does not mind
    const int64_t chunks = a.tokens > kShort ? (a.tokens + kChunk - 1) / kChunk : 0;
    const int64_t cost = chunks > 0 ? a.sequences * a.heads * (chunks + kStateCost) : 0;
    const Work work{chunks > 0 ? a.sequences : 0, chunks, cost, 0, a.heads};
    return ring_is_faster(wanted, kRingSlots, work, clusters) ? Launches{true, false, Way::kRing} : kPairs;
  }
  if (a.heads > kMostItems || a.heads >= clusters) return kPairs;
  if (wanted == Way::kRing) return {true, true, Way::kRing};
  // With too many sequences for the ring, most may be short beside long ones: not if they are long on average.
  constexpr int kMixed = 1024;
  if (a.sequences * a.heads > kMostItems && a.tokens >= a.sequences * kMixed) return kPairs;
  return a.tokens * kPairTime > kFillTime * kChunk ? Launches{true, true, Way::kAny} : kPairs;
}

// Memory between clusters that the library keeps for each stream, and never frees. Its flags are zero between launches,
// because a launch leaves them so, and those of one stream follow one another.
class KeptScratch {
 public:
  // For this stream of the current context, or FLASH_KDA_NEEDS_SCRATCH.
  int of(CUcontext context, cudaStream_t stream, int device, void*& scratch) {
    // A graph may be replayed on another stream. The default stream of each thread has the same name in all of them.
    cudaStreamCaptureStatus capture;
    if (const cudaError_t error = cudaStreamIsCapturing(stream, &capture)) return error;
    if (capture != cudaStreamCaptureStatusNone || stream == cudaStreamPerThread) return FLASH_KDA_NEEDS_SCRATCH;
    const int count = count_.load(std::memory_order_acquire);
    for (int i = 0; i < count; ++i)
      if (kept_[i].stream == stream && kept_[i].context == context) {
        scratch = kept_[i].memory;
        return 0;
      }
    return make(context, stream, device, scratch);
  }

 private:
  struct Kept {
    CUcontext context;  // the null stream is another one in each
    cudaStream_t stream;
    void* memory;
  };

  int make(CUcontext context, cudaStream_t stream, int device, void*& scratch) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const int count = count_.load(std::memory_order_relaxed);
    if (count == int(kept_.size())) return FLASH_KDA_NEEDS_SCRATCH;
    const LoadingWhileCaptured allowed;  // another stream, maybe
    int processors;
    if (const cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device))
      return error;
    if (cudaMalloc(&scratch, scratch_bytes(processors)) != cudaSuccess) {
      cudaGetLastError();
      return FLASH_KDA_NEEDS_SCRATCH;
    }
    if (const cudaError_t error = cudaMemsetAsync(scratch, 0, kFlagBytes, stream)) {
      cudaFree(scratch);
      return error;
    }
    kept_[count] = {context, stream, scratch};  // two of one stream, if two threads came at once: both serve
    count_.store(count + 1, std::memory_order_release);
    return 0;
  }

  std::array<Kept, 16> kept_;
  std::atomic<int> count_{0};
  std::mutex mutex_;
};

int launch(const flash_kda_arguments& a, cudaStream_t stream) {
  static KeptScratch kept;
  const int64_t items = a.sequences * a.heads;
  if (items == 0) return 0;
  CUcontext context = nullptr;
  int clusters = 0;
  if (const int error = current_context(a.device, context)) return error;
  if (const int error = cluster_count<false>(a.device, clusters)) return error;
  int ring_clusters = 0;
  Launches launches = launches_of(a, clusters, Way(wanted_way.load(std::memory_order_relaxed)));
  if (launches.ring)
    if (const int error = cluster_count<true>(a.device, ring_clusters)) return error;
  const int most = std::max(clusters, ring_clusters);
  clusters = static_cast<int>(std::min<int64_t>(items, clusters));
  void* scratch = a.scratch;
  if (scratch == nullptr) {
    if (const int error = kept.of(context, stream, a.device, scratch)) return error;
  } else {
    if (a.scratch_bytes < scratch_bytes(most * kPair)) return FLASH_KDA_BAD_SCRATCH;
    if (const cudaError_t error = cudaMemsetAsync(scratch, 0, kFlagBytes, stream)) return error;
  }
  Params p = to_params(a);
  p.started = static_cast<uint32_t*>(scratch);
  p.ended = p.started + 1;
  p.handed_over = p.started + kCounters;
  p.ring_ready = p.started + kRingFlags;
  p.ring_taken = p.ring_ready + kRingSlots;
  p.ring = static_cast<unsigned char*>(scratch) + kFlagBytes;
  p.handover = reinterpret_cast<float*>(p.ring + int64_t(kRingSlots) * kPreparedBytes);
  p.kept = p.handover + int64_t(most) * kPair * kHandoverFloats;
  p.way = launches.way;
  p.ring_clusters = ring_clusters;
  p.ring_slots = kRingSlots;
  if (a.tokens > 0) {
    const struct {
      CUtensorMap& map;
      const flash_kda_tokens& x;
    } maps[] = {{p.q, a.q}, {p.k, a.k}, {p.g, a.g}, {p.v, a.v}};
    for (const auto& m : maps)
      if (const int error = encode_or_recall(m.map, Described(m.x, a))) return error;
  }

  cudaGetLastError();  // what failed in an earlier call, and was returned there, is not this launch's
  if (launches.ring) {
    cudaLaunchConfig_t config{};
    config.gridDim = ring_clusters * kPair;
    config.blockDim = kThreads;
    config.dynamicSmemBytes = sizeof(SharedMemoryPlan);
    config.stream = stream;
    cudaLaunchAttribute all_at_once{};  // CTAs wait for one another
    all_at_once.id = cudaLaunchAttributeCooperative;
    all_at_once.val.cooperative = 1;
    config.attrs = &all_at_once;
    config.numAttrs = 1;
    const cudaError_t error = cudaLaunchKernelEx(&config, forward<true>, p);
    if (error == cudaErrorCooperativeLaunchTooLarge) {  // this process may not have all multiprocessors
      cudaGetLastError();
      launches.pairs = true;
      p.ring_clusters = 0;
    } else if (error) {
      return error;
    }
  }
  if (launches.pairs) forward<false><<<clusters * kPair, kThreads, sizeof(SharedMemoryPlan), stream>>>(p);
  return cudaGetLastError();
}

}  // namespace
}  // namespace flash_kda

extern "C" int flash_kda_forward(const flash_kda_arguments* arguments, void* stream) {
  if (arguments->abi_version != FLASH_KDA_ABI_VERSION) return FLASH_KDA_BAD_VERSION;
  return flash_kda::launch(*arguments, static_cast<cudaStream_t>(stream));
}

extern "C" void flash_kda_use_way(int32_t way) { flash_kda::wanted_way = way; }

extern "C" int64_t flash_kda_scratch_bytes(int processors) { return flash_kda::scratch_bytes(processors); }

extern "C" const char* flash_kda_error_string(int error) {
  switch (error) {
    case FLASH_KDA_BAD_VERSION:
      return "the arguments are of another version of the C interface";
    case FLASH_KDA_NO_TENSOR_MAPS:
      return "the CUDA driver offers no cuTensorMapEncodeTiled (it is older than CUDA 12.0)";
    case FLASH_KDA_BAD_TENSOR:
      return "a tensor cannot be described to TMA (data 16-byte aligned, strides multiples of 8 elements)";
    case FLASH_KDA_BAD_SCRATCH:
      return "the scratch memory is smaller than flash_kda_scratch_bytes says";
    case FLASH_KDA_OTHER_DEVICE:
      return "the current device is another one than the arguments name";
    case FLASH_KDA_NEEDS_SCRATCH:
      return "no scratch memory was given, and the library keeps none for this stream";
    default:
      return cudaGetErrorString(static_cast<cudaError_t>(error));
  }
}

#ifdef FLASH_KDA_TIMELINE

// What the last launch recorded (sm90/timeline.h): whether P and R have CTAs of their own, for each CTA its clock at
// the begin, then for each mark of each warp of each CTA its clock, its stage and its chunk. All are uint32.
extern "C" FLASH_KDA_API int flash_kda_timeline_read(void* to) {
  return cudaMemcpyFromSymbol(to, flash_kda::timeline, sizeof(flash_kda::Timeline));
}

extern "C" FLASH_KDA_API void flash_kda_timeline_shape(int32_t (&ctas_warps_marks)[3]) {
  ctas_warps_marks[0] = flash_kda::kPair;
  ctas_warps_marks[1] = flash_kda::kThreads / flash_kda::kWarp;
  ctas_warps_marks[2] = flash_kda::kTimelineMarks;
}

// The role that a warp stands for, of which it is the first one; null of other warps.
extern "C" FLASH_KDA_API const char* flash_kda_timeline_role(int apart, int cta, int warp) {
  using namespace flash_kda;
  const bool recurs = !apart || cta == 0, prepares = !apart || cta == 1;
  if (warp == 0 && recurs) return "R";
  if (warp == kLoadWarp) return prepares ? "loads" : "fetch";
  if (!prepares) return nullptr;
  if (warp == kFirstPrepareWarp) return "P, team 0";
  if (warp == kFirstPrepareWarp + kTeamWarps) return "P, team 1";
  if (warp == kCopyWarp) return apart ? "send" : "copies";
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
