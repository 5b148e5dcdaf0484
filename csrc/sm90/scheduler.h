// Which chunks a cluster works on, in which order. `load.h` deals them to its two CTAs in turn.
#pragma once

#include "../params.h"
#include "config.h"

namespace flash_kda {

// What there is to do with a chunk: one access of 16 bytes. TMA's coordinates are 32-bit.
struct alignas(16) Chunk {
  static constexpr uint32_t kEnd = 255;  // in the place of the number of tokens: nothing is left
  enum Flag : uint32_t {
    kFirst = 1 << 8,    // of this cluster's part of the sequence
    kLast = 1 << 9,     // of this cluster's part of the sequence
    kBegins = 1 << 10,  // the sequence
    kEnds = 1 << 11,    // the sequence
  };
  int token;  // first token, in its batch row
  int sequence;
  int head;
  uint32_t about;  // tokens, up to 32, and flags. No tokens: a sequence that has none, of which only the state passes

  __device__ __forceinline__ uint32_t valid() const { return about & 255; }
  __device__ __forceinline__ bool is(Flag flag) const { return about & flag; }
  __device__ __forceinline__ bool is_end() const { return valid() == kEnd; }
  __device__ __forceinline__ int batch(const Params& p) const { return p.cu_seqlens ? 0 : sequence; }
};

// A place in the list of all chunks, ordered by sequence, head and chunk.
struct Position {
  int64_t sequence;
  int64_t chunk;
  int head;
};

// The list is cut into pieces of equal length, one a cluster, each at least as long as the longest sequence: so a
// sequence of a head falls into two pieces at most (McNaughton's wrap-around rule). A cluster begins with the sequence
// that the next cluster goes on with, and ends with the one that the cluster before began: its state has long been
// handed over by then. With sequences a (5 chunks), b (4), c (3) of one head, and two clusters of 6:
//
//     list         a0 a1 a2 a3 a4 b0 | b1 b2 b3 c0 c1 c2
//     cluster 0    b0, then a0 .. a4
//     cluster 1    c0 c1 c2, then b1 b2 b3 with the state that cluster 0 handed over
//
// A cluster may wait only for one of a lower number. So it is numbered as it starts, and those have started before it.
struct Schedule {
  Position begin, end;
  uint32_t cta;  // twice the number of the cluster, and the rank in it
};

__device__ __forceinline__ int64_t cu_seqlen(const Params& p, int64_t n) {
  const int64_t x = p.cu_seqlens_is_64_bit ? static_cast<const int64_t*>(p.cu_seqlens)[n]
                                           : static_cast<const int32_t*>(p.cu_seqlens)[n];
  return x < 0 ? 0 : (x > p.tokens ? p.tokens : x);  // wrong contents must not reach outside the tensors
}

struct Sequence {
  int64_t start;  // first token in its batch row
  int64_t length;

  __device__ __forceinline__ Sequence(const Params& p, int64_t n) : start(0), length(p.tokens) {
    if (p.cu_seqlens) {
      start = cu_seqlen(p, n);
      const int64_t end = cu_seqlen(p, n + 1);
      length = end > start ? end - start : 0;
    }
  }

  // A sequence without tokens takes the time of a chunk too: its state passes.
  __device__ __forceinline__ int64_t chunks() const { return length > 0 ? (length + kChunk - 1) / kChunk : 1; }
};

// The list of all chunks: what a thread of the CTA knows of it, which has looked at some of the sequences.
struct List {
  int64_t before, sum;     // chunks of one head: of the sequences before those, and of those
  int64_t total, longest;  // chunks of all, and of the longest sequence

  struct Range {
    int64_t from, to;
  };
  // Those sequences.
  static __device__ __forceinline__ Range range(const Params& p) {
    const int64_t each = (p.sequences + kThreads - 1) / kThreads, from = min(threadIdx.x * each, p.sequences);
    return {from, min(from + each, p.sequences)};
  }

  // All threads together, with `scan` in shared memory.
  __device__ __forceinline__ List(const Params& p, int64_t (&scan)[2][kThreads / kWarp])
      : sum(0), total(0), longest(0) {
    const Range mine = range(p);
    for (int64_t n = mine.from; n < mine.to; ++n) {
      const int64_t chunks = Sequence(p, n).chunks();
      sum += chunks;
      longest = max(longest, chunks);
    }
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    int64_t inclusive = sum;
#pragma unroll
    for (int lanes = 1; lanes < kWarp; lanes *= 2) {
      const int64_t below = __shfl_up_sync(~0u, inclusive, lanes);
      if (lane >= lanes) inclusive += below;
      longest = max(longest, __shfl_xor_sync(~0u, longest, lanes));
    }
    if (lane == kWarp - 1) scan[0][warp] = inclusive, scan[1][warp] = longest;
    __syncthreads();
    before = inclusive - sum;
#pragma unroll
    for (int w = 0; w < kThreads / kWarp; ++w) {
      if (w < warp) before += scan[0][w];
      total += scan[0][w];
      longest = max(longest, scan[1][w]);
    }
    total *= p.heads;
  }

  // The piece of the cluster that `schedule.cta` is of. All threads together; ends with a barrier.
  __device__ __forceinline__ void cut(const Params& p, Schedule& schedule) const {
    const int64_t clusters = gridDim.x / kPair, cluster = schedule.cta / kPair;
    const int64_t piece = max((total + clusters - 1) / clusters, longest);
    for (int which = 0; which < 2; ++which) {
      Position& position = which ? schedule.end : schedule.begin;
      const int64_t unit = min((cluster + which) * piece, total);
      if (unit == total) {
        if (threadIdx.x == 0) position = {p.sequences, 0, 0};
        continue;
      }
      int64_t at = before * p.heads;
      if (unit < at || unit >= at + sum * p.heads) continue;
      const Range mine = range(p);
      for (int64_t n = mine.from; n < mine.to; ++n) {
        const int64_t chunks = Sequence(p, n).chunks();
        if (unit < at + chunks * p.heads) {
          position = {n, (unit - at) % chunks, static_cast<int>((unit - at) / chunks)};
          break;
        }
        at += chunks * p.heads;
      }
    }
    __syncthreads();
  }
};

// The chunks of a cluster, one after the other.
struct Scheduler {
  enum Part { kHandedOver, kWhole, kTakenOver, kDone };  // in this order
  Part part;
  Position at;
  Position stop;        // of the whole ones; `stop.chunk`: of the one that is handed over
  Position taken_over;  // where that begins
  bool has_taken_over;
  bool next_is_another;  // `at` still names the whole one that has been given out

  __device__ __forceinline__ explicit Scheduler(const Schedule& schedule) {
    stop = schedule.end;
    taken_over = schedule.begin;
    has_taken_over = taken_over.chunk > 0;
    part = kHandedOver;
    at = {stop.sequence, 0, stop.head};
    if (stop.chunk == 0) start_whole();
  }

  __device__ __forceinline__ void start_whole() {
    part = kWhole;
    at = {taken_over.sequence, 0, taken_over.head};
    next_is_another = has_taken_over;
  }

  // What is left of a sequence of a head: the next chunk, and how much there is.
  struct Run {
    Chunk chunk;
    int left;  // tokens of the sequence, with those of `chunk`
    int more;  // chunks after `chunk`

    __device__ __forceinline__ void advance() {
      --more;
      left -= kChunk;
      chunk.token += kChunk;
      describe(0);
    }

    __device__ __forceinline__ void describe(uint32_t flags) {
      if (left <= kChunk) flags |= Chunk::kEnds;
      if (more == 0) flags |= Chunk::kLast;
      chunk.about = min(left, kChunk) | flags;
    }
  };

  // The next sequence of a head, or kEnd.
  __device__ __forceinline__ void next(const Params& p, Run& run) {
    if (part == kWhole) {
      if (next_is_another) step(p);
      next_is_another = false;
      if (at.sequence == stop.sequence && at.head == stop.head) {
        part = has_taken_over ? kTakenOver : kDone;
        at = taken_over;
      }
    }
    run.more = 0;
    if (part == kDone) {
      run.chunk.about = Chunk::kEnd;
      return;
    }
    const Sequence sequence(p, at.sequence);
    Chunk& chunk = run.chunk;
    run.left = static_cast<int>(sequence.length - at.chunk * kChunk);
    run.more = static_cast<int>((part == kHandedOver ? stop.chunk : sequence.chunks()) - at.chunk - 1);
    chunk.token = static_cast<int>(sequence.start + at.chunk * kChunk);
    chunk.sequence = static_cast<int>(at.sequence);
    chunk.head = at.head;
    run.describe((at.chunk == 0 ? Chunk::kBegins : 0) | (part == kTakenOver || at.chunk == 0 ? Chunk::kFirst : 0));
    if (part == kHandedOver)
      start_whole();
    else if (part == kWhole)
      next_is_another = true;
    else
      part = kDone;
  }

  __device__ __forceinline__ void step(const Params& p) {
    at.chunk = 0;
    if (++at.head == p.heads) {
      at.head = 0;
      ++at.sequence;
    }
  }
};

}  // namespace flash_kda
