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
constexpr int kChainTime = 1500;                    // of a chunk to a CTA that has R alone
constexpr int kPrepareTime = 2500;                  // of a chunk to a CTA that only prepares
constexpr int kPassTime = 95;                       // of a chunk to the ring, of all items together
constexpr int kFillTime = 5000;                     // until R has its first chunk, more than in a pair
constexpr int kShortTime = kPairTime / kChunkCost;  // of a unit of the cost of short sequences, to a cluster

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

  // Of so many CTAs without R, those that prepare. They have time: R waits for none of them. But it would wait for one
  // that has short sequences to do first.
  static __device__ __forceinline__ int64_t that_prepare(int64_t others, const List& list) {
    return list.shorts.total > 0 ? others - others / 2 : others;
  }

  // Whether the call goes this way. All threads of all CTAs say the same.
  static __device__ __forceinline__ bool is_faster(const Params& p, const List& list, int64_t clusters) {
    const int64_t items = list.longs * int64_t(p.heads), others = kPair * (clusters - items);
    if (p.way == Way::kPair || items == 0 || others <= 0 || list.longs > kMostLong || items > kMostItems) return false;
    if (p.ring_slots / items < kLeastSlots) return false;
    if (p.way == Way::kRing) return true;
    const int64_t chunks = list.chunks.total, shorts = list.shorts.total, prepare = that_prepare(others, list);
    const int64_t pair = max(max((chunks + clusters - 1) / clusters, int64_t(list.longest)) * kPairTime,
                             (chunks * kPairTime + shorts * kShortTime) / clusters);
    const int64_t ring =
        max(max(list.longest * int64_t(kChainTime), chunks * kPassTime),
            max(chunks * kPrepareTime / prepare, shorts > 0 ? shorts * kPair * kShortTime / (others - prepare) : 0));
    return ring + kFillTime < pair;
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
      slots = min(p.ring_slots / items, kMostSlots);
      prepare = int(that_prepare(others(gridDim.x), list));
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
