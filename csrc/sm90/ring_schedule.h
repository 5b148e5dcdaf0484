// Which way a call goes, and which chunks a CTA prepares where P has multiprocessors of its own.
//
// With few heads, most multiprocessors have nothing to recur. So the first clusters get R alone, one head of a sequence
// each; all other CTAs prepare chunks. What they have prepared passes through a ring in device memory, which the
// second-level cache holds. Each chunk is computed by the same instructions as in a pair, in the same order: the way
// changes no bit.
#pragma once

#include "scheduler.h"

namespace flash_kda {

constexpr int kFetchedStages = 6;                // of a CTA that has R alone
constexpr int kLeastSlots = kFetchedStages + 1;  // of an item: a chunk counts as taken when another one gets its stage
static_assert(kRingSlots / kMostItems >= kLeastSlots, "a ring for each item");
constexpr int kMostLong = 64;  // sequences of more than kShort tokens that a call may have to go this way

// Times in cycles, as measured on an H200: only the choice depends on them.
constexpr int kPairTime = 2400;                     // of a chunk to a pair
constexpr int kChainTime = 1400;                    // of a chunk to a CTA that has R alone
constexpr int kPrepareTime = 2500;                  // of a chunk to a CTA that only prepares
constexpr int kPassTime = 95;                       // of a chunk to the ring, of all items together
constexpr int kFillTime = 5000;                     // until R has its first chunk, more than in a pair
constexpr int kShortTime = kPairTime / kChunkCost;  // of a unit of the cost of short sequences, to a cluster

// What a call consists of.
struct Work {
  int64_t longs;    // sequences that have chunks
  int64_t longest;  // chunks of the longest one
  int64_t chunks;   // of all heads, with the cost of states in chunks
  int64_t shorts;   // cost of the short sequences of all heads
  int heads;
};

// Of so many CTAs without R, those that prepare. They have time: R waits for none of them. But it would wait for one
// that has short sequences to do first.
__host__ __device__ __forceinline__ constexpr int64_t that_prepare(int64_t others, const Work& work) {
  return work.shorts > 0 ? others - others / 2 : others;
}

// Whether the call goes through the ring. All threads of all CTAs say the same, and so does the host if it knows.
__host__ __device__ __forceinline__ constexpr bool ring_is_faster(Way way, int ring_slots, const Work& work,
                                                                  int64_t clusters) {
  const int64_t items = work.longs * work.heads, others = kPair * (clusters - items);
  if (way == Way::kPair || others <= 0 || work.longs > kMostLong || items > kMostItems) return false;
  if (ring_slots < items * kLeastSlots) return false;
  if (way == Way::kRing) return true;
  if (items == 0) return false;
  const int64_t prepare = that_prepare(others, work);
  const auto most = [](int64_t x, int64_t y) { return x > y ? x : y; };
  const int64_t pair = most(most((work.chunks + clusters - 1) / clusters, work.longest) * kPairTime,
                            (work.chunks * kPairTime + work.shorts * kShortTime) / clusters);
  const int64_t shorts = work.shorts > 0 ? work.shorts * kPair * kShortTime / (others - prepare) : 0;
  const int64_t ring = most(most(work.longest * kChainTime, work.chunks * kPassTime),
                            most(work.chunks * kPrepareTime / prepare, shorts));
  return ring + kFillTime < pair;
}

struct RingSchedule {
  struct Long {
    int sequence, chunks;
  };
  int longs;
  int longest;  // chunks
  int items;    // heads of those sequences: so many clusters have R
  int slots;    // of the ring of each item
  int prepare;  // CTAs that prepare chunks; those behind them have the short sequences
  Long of[kMostLong];

  __device__ __forceinline__ bool has_recur(uint32_t cluster) const { return int(cluster) < items; }

  // Of the CTAs before this one, those without R.
  __device__ __forceinline__ int others(uint32_t cta) const { return int(cta) - items * kPair; }

  static __device__ __forceinline__ Work work_of(const Params& p, const List& list) {
    return {list.longs, list.longest, list.costs.total, list.shorts.total, p.heads};
  }

  // All threads together; ends with a barrier.
  __device__ __forceinline__ void make(const Params& p, const List& list) {
    const List::Range mine = List::range(p);
    int at = list.longs_before;
    for (int64_t n = mine.from; n < mine.to; ++n)
      if (const int chunks = Sequence(p, n).chunks()) of[at++] = {int(n), chunks};
    if (threadIdx.x == 0) {
      longs = list.longs;
      longest = list.longest;
      items = longs * p.heads;
      slots = items > 0 ? min(p.ring_slots / items, kMostSlots) : 0;
      prepare = int(that_prepare(others(gridDim.x), work_of(p, list)));
    }
    __syncthreads();
  }
};

// A chunk in the list of all of them, ordered by number, sequence and head: so all items get theirs in turn.
struct RingPosition {
  int chunk = 0, which = 0, head = 0;

  // False past the last one.
  __device__ __forceinline__ bool advance(const RingSchedule& s, int heads, int by) {
    for (;;) {
      const int here = chunk < s.of[which].chunks ? heads - head : 0;
      if (by < here) {
        head += by;
        return true;
      }
      by -= here;
      head = 0;
      if (++which == s.longs) {
        which = 0;
        if (++chunk == s.longest) return false;
      }
    }
  }
};

}  // namespace flash_kda
