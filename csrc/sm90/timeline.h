// Clock reads at the begin of each stage of each warp, for a build with FLASH_KDA_TIMELINE. Without it, nothing.
//
// Of two CTAs, and of some chunks in the middle of their work: `python -m benchmarks.timeline` draws them.
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
// Two CTAs: those of the first cluster, or the first one that has R alone and the first one that only prepares.
struct Timeline {
  uint32_t apart;         // whether it is the latter two
  uint32_t begin[kPair];  // the clock of each CTA as its roles begin
  TimelineMark marks[kPair][kThreads / kWarp][kTimelineMarks];
};
__device__ Timeline timeline;

// How many marks a warp has, and which CTA it is; at the end of shared memory, since memory would take as long to
// answer as a stage lasts.
struct TimelineCounts {
  uint32_t marks[kThreads / kWarp];
  int cta[kThreads / kWarp];
};
__device__ __forceinline__ TimelineCounts& timeline_counts() {
  extern __shared__ __align__(1024) unsigned char memory[];
  uint32_t bytes;
  asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
  return *reinterpret_cast<TimelineCounts*>(memory + bytes - sizeof(TimelineCounts));
}
__device__ __forceinline__ uint32_t& timeline_count() { return timeline_counts().marks[threadIdx.x / kWarp]; }
__device__ __forceinline__ int& timeline_cta() { return timeline_counts().cta[threadIdx.x / kWarp]; }

// `cta`: where it is recorded, if that is 0 or 1.
__device__ __forceinline__ void timeline_start(int cta, bool apart) {
  if (threadIdx.x % kWarp != 0) return;
  timeline_count() = 0;
  timeline_cta() = cta;
  if (cta < 0 || cta >= kPair) return;
  if (threadIdx.x == 0) timeline.begin[cta] = clock(), timeline.apart = apart;
  for (int i = 0; i < kTimelineMarks; ++i) timeline.marks[cta][threadIdx.x / kWarp][i].stage = uint32_t(Stage::kEnd);
}

__device__ __forceinline__ void mark(Stage stage, uint32_t chunk) {
  if (threadIdx.x % kWarp != 0 || chunk < kTimelineFrom || chunk >= kTimelineTo) return;
  const int cta = timeline_cta();
  if (cta < 0 || cta >= kPair) return;
  const uint32_t i = timeline_count()++;
  if (i < kTimelineMarks) timeline.marks[cta][threadIdx.x / kWarp][i] = {uint32_t(clock()), uint32_t(stage), chunk};
}

#else

__device__ __forceinline__ void timeline_start(int, bool) {}
__device__ __forceinline__ void mark(Stage, uint32_t) {}

#endif

}  // namespace flash_kda
