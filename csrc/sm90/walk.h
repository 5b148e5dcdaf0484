// Which chunks a CTA works on, in which order.
#pragma once

#include "../params.h"
#include "config.h"

namespace flash_kda {

// One (sequence, head, half of the value columns).
struct Item {
  int64_t sequence;
  int64_t start;   // first token in its batch row
  int64_t length;  // tokens; zero is possible
  int batch;
  int head;
  int column;  // first value column
};

__device__ __forceinline__ int64_t item_count(const Params& p) { return p.sequences * p.heads * kColumnSplits; }

__device__ __forceinline__ int64_t cu_seqlen(const Params& p, int64_t n) {
  const int64_t x = p.cu_seqlens_is_64_bit ? static_cast<const int64_t*>(p.cu_seqlens)[n]
                                           : static_cast<const int32_t*>(p.cu_seqlens)[n];
  return x < 0 ? 0 : (x > p.tokens ? p.tokens : x);  // wrong contents must not reach outside the tensors
}

__device__ __forceinline__ Item item_at(const Params& p, int64_t index) {
  Item item;
  const int64_t sequence_head = index / kColumnSplits;
  item.column = static_cast<int>(index % kColumnSplits) * kColumns;
  item.sequence = sequence_head / p.heads;
  item.head = static_cast<int>(sequence_head % p.heads);
  if (p.cu_seqlens) {
    item.start = cu_seqlen(p, item.sequence);
    const int64_t end = cu_seqlen(p, item.sequence + 1);
    item.length = end > item.start ? end - item.start : 0;
    item.batch = 0;
  } else {
    item.start = 0;
    item.length = p.tokens;
    item.batch = static_cast<int>(item.sequence);
  }
  return item;
}

// The chunks of this CTA, one after the other, over all its items. Only the loader walks; the other roles read what it
// leaves in shared memory.
struct Walk {
  Item item;
  int64_t index;  // of the item, or past the last one
  int64_t token;  // first token of the chunk, within the sequence

  __device__ __forceinline__ void start() {
    index = blockIdx.x;
    token = 0;
  }

  __device__ __forceinline__ Chunk next(const Params& p) {
    Chunk chunk;
    if (index >= item_count(p)) {
      chunk.valid = Chunk::kEnd;
      return chunk;
    }
    if (token == 0) item = item_at(p, index);
    const int64_t left = item.length - token;
    chunk.token = item.start + token;
    chunk.valid = left < kChunk ? static_cast<int>(left) : kChunk;
    chunk.sequence = static_cast<int>(item.sequence);
    chunk.batch = item.batch;
    chunk.head = item.head;
    chunk.column = item.column;
    chunk.first = token == 0;
    chunk.last = left <= kChunk;
    token += kChunk;
    if (chunk.last) {
      token = 0;
      index += gridDim.x;
    }
    return chunk;
  }
};

// A position in a ring of `kSize` stages: the stage, and the parity of how often the ring went round.
template <int kSize>
struct Ring {
  int stage = 0;
  int parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kSize) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace flash_kda
