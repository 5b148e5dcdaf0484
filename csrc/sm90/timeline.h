// Clock reads at the begin of each stage of each warp, for a build with FLASH_KDA_TIMELINE. Without it, nothing.
//
// Of the first cluster, and of some chunks in the middle of its work: `python -m benchmarks.timeline` draws them.
#pragma once

#include <stdint.h>

#include "config.h"

// What a warp does from a mark to the next one: name, and what is drawn. Names that begin with "wait" are waits.
#define FLASH_KDA_STAGES(X)                      \
  X(kWaitChunk, "wait for a chunk")              \
  X(kWaitFree, "wait for a free buffer")         \
  X(kWaitPrepared, "wait for prepared operands") \
  X(kWaitValues, "wait for values")              \
  X(kLoads, "loads")                             \
  X(kNorms, "norms")                             \
  X(kOperands, "decays, K~ Q~ Kr, products L M") \
  X(kSums, "sums L M")                           \
  X(kInvert, "X, X b in two parts")              \
  X(kW, "W")                                     \
  X(kCopy, "copy to the peer")                   \
  X(kState, "state in or out")                   \
  X(kU, "U, and Q~ S")                           \
  X(kUpdate, "M U, and the state")               \
  X(kOutput, "output")                           \
  X(kEnd, "end")

namespace flash_kda {

enum class Stage : uint32_t {
#define FLASH_KDA_NAME(name, text) name,
  FLASH_KDA_STAGES(FLASH_KDA_NAME)
#undef FLASH_KDA_NAME
};

#ifdef FLASH_KDA_TIMELINE

constexpr int kTimelineFrom = 20, kTimelineTo = 32;  // chunks of the cluster
constexpr int kTimelineMarks = 256;                  // of a warp

struct TimelineMark {
  uint32_t clock, stage, chunk;
};
struct Timeline {
  uint32_t begin[kPair];  // the clock of each CTA as both leave a barrier
  TimelineMark marks[kPair][kThreads / kWarp][kTimelineMarks];
};
__device__ Timeline timeline;

// How many marks a warp has: in shared memory, since memory would take as long to answer as a stage lasts.
__device__ __forceinline__ uint32_t& timeline_count() {
  __shared__ uint32_t counts[kThreads / kWarp];
  return counts[threadIdx.x / kWarp];
}

__device__ __forceinline__ void timeline_start() {
  if (blockIdx.x >= kPair || threadIdx.x % kWarp != 0) return;
  timeline_count() = 0;
  if (threadIdx.x == 0) timeline.begin[blockIdx.x] = clock();
  for (int i = 0; i < kTimelineMarks; ++i)
    timeline.marks[blockIdx.x][threadIdx.x / kWarp][i].stage = uint32_t(Stage::kEnd);
}

__device__ __forceinline__ void mark(Stage stage, uint32_t chunk) {
  if (blockIdx.x >= kPair || threadIdx.x % kWarp != 0 || chunk < kTimelineFrom || chunk >= kTimelineTo) return;
  const uint32_t i = timeline_count()++;
  if (i < kTimelineMarks)
    timeline.marks[blockIdx.x][threadIdx.x / kWarp][i] = {uint32_t(clock()), uint32_t(stage), chunk};
}

#else

__device__ __forceinline__ void timeline_start() {}
__device__ __forceinline__ void mark(Stage, uint32_t) {}

#endif

}  // namespace flash_kda
