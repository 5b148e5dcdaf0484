// The kernel: persistent clusters of two CTAs, specialised by warp.
#pragma once

#include "invert.h"
#include "load.h"
#include "pair.h"
#include "plan.h"
#include "prepare.h"
#include "recur.h"
#include "recur_apart.h"
#include "ring.h"
#include "short.h"
#include "timeline.h"

namespace flash_kda {

__device__ __forceinline__ void init_barriers(SharedMemoryPlan& s) {
  for (int i = 0; i < kOwnStages; ++i) {
    for (int parity = 0; parity < 2; ++parity) {
      Barrier::init(&s.bar_loaded[parity][i], 1);
      Barrier::init(&s.bar_L_ready[parity][i], kTeamWarps * kWarp);
    }
    Barrier::init(&s.bar_copied[i], 1);
  }
  for (int i = 0; i < kStages; ++i) {
    Barrier::init(&s.bar_prepared[i], 1);
    Barrier::init(&s.bar_used[i], kRecurWarps);
  }
  for (int i = 0; i < kValueStages; ++i) {
    Barrier::init(&s.bar_v_loaded[i], 1);
    Barrier::init(&s.bar_v_used[i], kRecurWarps);
  }
  cutlass::arch::fence_barrier_init();
}

// The last cluster to end clears the flags for the next launch. One warp; all of its cluster is done.
__device__ __forceinline__ void leave_as_found(const Params& p, bool with_ring) {
  const uint32_t clusters = gridDim.x / kPair, lane = threadIdx.x % kWarp;
  uint32_t ended = 0;
  if (lane == 0) ended = count_all(p.ended) + 1;
  if (__shfl_sync(~0u, ended, 0) != clusters) return;
  for (uint32_t i = lane; i < kCounters + clusters * kPair; i += kWarp) p.started[i] = 0;
  if (with_ring) {
    for (uint32_t i = lane; i < kRingSlots; i += kWarp) p.ring_ready[i] = 0;
    for (uint32_t i = lane; i < kMostItems * kPair; i += kWarp) p.ring_taken[i] = 0;
  }
}

// A function of its own: what the rest of the kernel keeps in registers would not fit beside a state.
static __device__ __noinline__ void run_short(const Params& p, SharedMemoryPlan& s) { Short(p, s).run(); }

// The roles of a CTA of a pair, or of one that only prepares chunks, for the ring.
template <bool kRing>
__device__ __forceinline__ void run_roles(const Params& p, SharedMemoryPlan& s) {
  for (int i = threadIdx.x; i < kOwnStages * int(sizeof(Tile)) / 16;
       i += kThreads) {  // above the diagonal it stays zero
    constexpr int kUnits = sizeof(Tile) / 16;
    reinterpret_cast<uint4*>(&s.operands[i / kUnits].M)[i % kUnits] = uint4{};
  }
  if (threadIdx.x < kTeams * kTeamWarps) s.gate[threadIdx.x].head = -1;
  if (threadIdx.x < kWarp) Prepare::make_triangle(s);
  fence_async();
  __syncthreads();

  const int rank = static_cast<int>(cute::block_rank_in_cluster());  // anew: what goes before needs the registers
  const int warp = threadIdx.x / kWarp;
  if constexpr (kRing)
    timeline_start(s.ring.others(s.schedule.cta) + 1, true);
  else
    timeline_start(s.schedule.cta, false);
  // In this order, the code that runs for every chunk meets fewest of itself in the instruction cache, as measured.
  if (warp >= kLoadWarp) {
    cutlass::arch::warpgroup_reg_dealloc<kLastRegisters>();
    if (warp >= kFirstInvertWarp) {
      Invert(s, rank).run();
    } else if (warp == kCopyWarp) {
      if (threadIdx.x % kWarp == 0) {
        if constexpr (kRing)
          Send{p, s}.run();
        else
          Copies{s, rank}.run();
      }
    } else if (threadIdx.x % kWarp == 0) {
      if constexpr (kRing)
        LoadOwn{p, s, s.ring.others(s.schedule.cta), s.ring.prepare}.run();
      else
        Load{p, s, rank}.run();
    }
  } else if (warp >= kFirstPrepareWarp) {
    cutlass::arch::warpgroup_reg_alloc<kPrepareRegisters>();
    Prepare(p, s, rank).run();
  } else {
    cutlass::arch::warpgroup_reg_alloc<kRecurRegisters>();
    if constexpr (!kRing) Recur(p, s, rank).run();
  }
}

// The roles of a CTA that has R alone: a head of a sequence, 64 value columns.
__device__ __forceinline__ void recur_apart(const Params& p, SharedMemoryPlan& plan) {
  RecurPlan& s = *reinterpret_cast<RecurPlan*>(&plan);
  const uint32_t cta = plan.schedule.cta;
  const int item = cta / kPair, slots = plan.ring.slots;
  const RingSchedule::Long of = plan.ring.of[item / p.heads];
  __syncthreads();  // the plan is read
  if (threadIdx.x == 0) {
    s.cta = cta;
    init_barriers(s);
  }
  __syncthreads();

  timeline_start(cta == 0 ? 0 : kPair, true);

  const Ring ring(p, item, slots);
  const int rank = cta % kPair, warp = threadIdx.x / kWarp;
  if (warp >= kLoadWarp) {
    cutlass::arch::warpgroup_reg_dealloc<kLastRegisters>();
    if (warp == kLoadWarp) Fetch{p, s, ring, rank}.run(of, item % p.heads);
  } else if (warp >= kFirstPrepareWarp) {
    cutlass::arch::warpgroup_reg_dealloc<kIdleRegisters>();
  } else {
    cutlass::arch::warpgroup_reg_alloc<kRecurApartRegisters>();
    RecurApart(p, s, rank).run();
  }
}

// kRing: through the ring; all CTAs run at the same time then. Else by pairs. Where only the contents of cu_seqlens say
// which one is faster, both are launched, and one of them returns at once.
template <bool kRing>
__global__ void __cluster_dims__(kPair, 1, 1) __launch_bounds__(kThreads, 1) forward(const __grid_constant__ Params p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char memory[];
  SharedMemoryPlan& s = *reinterpret_cast<SharedMemoryPlan*>(memory);
  const int rank_now = static_cast<int>(cute::block_rank_in_cluster());
  const bool first = rank_now == 0 && threadIdx.x == 0, pairs_only = p.ring_clusters == 0;
  uint32_t number = 0;
  if (first && pairs_only) number = count(p.started);  // asked for first: it takes its time
  if (threadIdx.x == 0) {
    if (cute::cast_smem_ptr_to_uint(memory) % 1024 != 0) __trap();  // the swizzles need it
    init_barriers(s);
    for (int i = kOwnStages; i < kStages; ++i) expect_from_peer(s, i);
  }
  const List list(p, s.scan);
  if (!pairs_only) {
    if (ring_is_faster(p.way, p.ring_slots, RingSchedule::work_of(p, list), p.ring_clusters) != kRing) return;
    if (first) number = count(p.started);
  }
  if (first) s.number = number;
  sync_cluster();  // the peer's barriers are ready as well
  if (threadIdx.x == 0) s.schedule.cta = of_first_cta(&s.number) * kPair + rank_now;
  __syncthreads();
  bool has_shorts = list.shorts.total > 0, has_recur = false;
  if constexpr (kRing) {
    s.ring.make(p, list);
    has_recur = s.ring.has_recur(s.schedule.cta / kPair);
    has_shorts = has_shorts && s.ring.others(s.schedule.cta) >= s.ring.prepare;
    if (has_shorts)
      list.cut_shorts(p, s.schedule, s.ring.others(s.schedule.cta) - s.ring.prepare,
                      s.ring.others(gridDim.x) - s.ring.prepare);
  } else {
    list.cut(p, s.schedule);
  }
  if (has_shorts) {
    run_short(p, s);
    __syncthreads();  // its memory is free
  }
  if (has_recur)
    recur_apart(p, s);
  else
    run_roles<kRing>(p, s);
  __syncwarp();
  sync_cluster();  // the peer may still signal this CTA, or be fetching what it sent out of its memory
  if (cute::block_rank_in_cluster() == 0 && threadIdx.x < kWarp) leave_as_found(p, kRing);
#endif
}

}  // namespace flash_kda
