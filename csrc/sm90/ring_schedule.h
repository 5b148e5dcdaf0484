// Which way a call goes, and which chunks a CTA prepares where P has multiprocessors of its own.
//
// With few heads, most multiprocessors have nothing to recur. So the first clusters get R alone, one head of a sequence
// each; all other CTAs prepare chunks. What they have prepared passes through a ring in device memory, which the
// second-level cache holds. Each chunk is computed by the same instructions as in a pair, in the same order: the way
// changes no bit.
#pragma once

#include "scheduler.h"

namespace flash_kda {

constexpr int kMostLong = 64;  // sequences of more than kShort tokens that a call may have to go this way

// Times in cycles, as measured on an H200: only the choice depends on them.
constexpr int kPairTime = 2400;    // of a chunk in a pair
constexpr int kChainTime = 950;    // of a chunk where R has a CTA of its own
constexpr int kPrepareTime = 4300;  // of a chunk in a CTA that only prepares
constexpr int kRingTime = 5000;    // once, until R has its first chunk, more than in a pair

struct RingSchedule {
  struct Long {
    int sequence, chunks;
  };
  int longs;
  int longest;  // chunks
  int items;    // heads of those sequences: so many clusters have R
  int slots;    // of the ring of each item
  Long of[kMostLong];

  __device__ __forceinline__ bool has_recur(uint32_t cluster) const { return int(cluster) < items; }

  // Of the CTAs before this one, those that prepare.
  __device__ __forceinline__ int preparing(uint32_t cta) const { return int(cta) - items * kPair; }

  // Whether the call goes this way. All threads of all CTAs say the same.
  static __device__ __forceinline__ bool is_faster(const Params& p, const List& list, int64_t clusters) {
    const int64_t items = list.longs * int64_t(p.heads), preparing = 2 * (clusters - items);
    if (p.way == Way::kPair || items == 0 || preparing <= 0 || list.longs > kMostLong || items > kMostItems)
      return false;
    if (p.way == Way::kRing) return true;
    const int64_t piece = max((list.chunks.total + clusters - 1) / clusters, int64_t(list.longest));
    const int64_t ring = max(list.longest * int64_t(kChainTime), list.chunks.total * kPrepareTime / preparing);
    return ring + kRingTime < piece * kPairTime;
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
