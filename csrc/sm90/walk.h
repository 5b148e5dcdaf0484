// Which chunks a cluster works on, in which order.
#pragma once

#include "../params.h"
#include "config.h"

namespace flash_kda {

// What there is to do with a chunk.
struct Chunk {
  static constexpr int kEnd = -1;
  int64_t token;  // first token, in its batch row
  int64_t sequence;
  int valid;  // tokens, up to 64. 0: a sequence without tokens, only its state passes; kEnd: nothing is left
  int batch;
  int head;
  bool first, last;   // of this cluster's part of the sequence
  bool begins, ends;  // the sequence
};

// A place in the list of all chunks, ordered by sequence, head and chunk.
struct Position {
  int64_t sequence;
  int64_t chunk;
  int head;
};

// The list is cut into pieces of equal length, one a cluster, each at least as long as the longest sequence: so a
// sequence of a head falls into two pieces at most. A cluster first does the part of a sequence that goes on in the
// next piece, and last the one that began in the piece before: nobody waits (McNaughton's wrap-around rule).
struct Schedule {
  Position begin, end;
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

// All threads of the CTA together; `schedule` and `scratch` in shared memory. Ends with a barrier.
__device__ __forceinline__ void make_schedule(const Params& p, Schedule& schedule, int64_t (&scratch)[2][16]) {
  const int64_t each = (p.sequences + kThreads - 1) / kThreads;
  const int64_t from = min(threadIdx.x * each, p.sequences), to = min(from + each, p.sequences);
  int64_t sum = 0, longest = 0;
  for (int64_t n = from; n < to; ++n) {
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
  if (lane == kWarp - 1) scratch[0][warp] = inclusive, scratch[1][warp] = longest;
  __syncthreads();
  int64_t total = 0, before = inclusive - sum;
#pragma unroll
  for (int w = 0; w < kThreads / kWarp; ++w) {
    if (w < warp) before += scratch[0][w];
    total += scratch[0][w];
    longest = max(longest, scratch[1][w]);
  }
  total *= p.heads;
  const int64_t clusters = gridDim.x / kPair, cluster = blockIdx.x / kPair;
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
    for (int64_t n = from; n < to; ++n) {
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

// The chunks of a cluster, one after the other.
struct Walk {
  enum Part { kHead, kWhole, kTail, kDone };
  Part part;
  Position at, stop;  // stop.chunk: where the head part ends; the rest of `stop`: where the whole ones end
  bool has_tail;
  Position tail;

  __device__ __forceinline__ explicit Walk(const Schedule& schedule) {
    stop = schedule.end;
    tail = schedule.begin;
    has_tail = tail.chunk > 0;
    part = kHead;
    at = {stop.sequence, 0, stop.head};
    if (stop.chunk == 0) start_whole();
  }

  __device__ __forceinline__ void start_whole() {
    part = kWhole;
    at = {tail.sequence, 0, tail.head};
    if (has_tail) step_head = true;
  }
  bool step_head = false;

  // Chunks of one head, one after the other: the first of them, and how much there is.
  struct Run {
    Chunk chunk;
    int left;  // tokens of the sequence, with those of `chunk`: TMA's coordinates are 32-bit
    int more;  // chunks after `chunk`

    __device__ __forceinline__ void advance() {
      --more;
      left -= kChunk;
      chunk.token += kChunk;
      chunk.begins = chunk.first = false;
      finish();
    }

    __device__ __forceinline__ void finish() {
      chunk.valid = min(left, kChunk);
      chunk.ends = left <= kChunk;
      chunk.last = more == 0;
    }
  };

  __device__ __forceinline__ void next(const Params& p, Run& run) {
    if (part == kWhole) {
      if (step_head) next_head(p);
      step_head = false;
      if (at.sequence == stop.sequence && at.head == stop.head) {
        part = has_tail ? kTail : kDone;
        at = tail;
      }
    }
    run.more = 0;
    if (part == kDone) {
      run.chunk.valid = Chunk::kEnd;
      return;
    }
    const Sequence sequence(p, at.sequence);
    Chunk& chunk = run.chunk;
    run.left = static_cast<int>(sequence.length - at.chunk * kChunk);
    run.more = static_cast<int>((part == kHead ? stop.chunk : sequence.chunks()) - at.chunk - 1);
    chunk.token = sequence.start + at.chunk * kChunk;
    chunk.sequence = at.sequence;
    chunk.batch = p.cu_seqlens ? 0 : static_cast<int>(at.sequence);
    chunk.head = at.head;
    chunk.begins = at.chunk == 0;
    chunk.first = part == kTail || chunk.begins;
    run.finish();
    if (part == kHead)
      start_whole();
    else if (part == kWhole)
      step_head = true;
    else
      part = kDone;
  }

  __device__ __forceinline__ void next_head(const Params& p) {
    at.chunk = 0;
    if (++at.head == p.heads) {
      at.head = 0;
      ++at.sequence;
    }
  }
};

}  // namespace flash_kda
