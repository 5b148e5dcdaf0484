// Which chunks a cluster works on, in which order: `load.h` deals them to its two CTAs in turn. And which short
// sequences.
#pragma once

#include "../params.h"
#include "bits.h"
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
    // A checkpoint of the sequence is the state after the last token of the chunk.
    kCheckpoint = 1 << 12,
    // The chunk is for the sake of a checkpoint that lies inside the next one, and ends there: it changes nothing else.
    kAside = 1 << 13,
  };
  static constexpr int kSlotShift = 14;  // where the number of the checkpoint is
  // What R has to do with a state before a chunk, or after it. The end is among the former.
  static constexpr uint32_t kStateBefore = kFirst | kAside | 1 << 7, kStateAfter = kLast | kCheckpoint;
  int token;  // first token, in its batch row
  int sequence;
  int head;
  uint32_t about;  // tokens, up to 32, flags, and the number of a checkpoint

  __device__ __forceinline__ uint32_t valid() const { return about & 255; }
  __device__ __forceinline__ bool is(Flag flag) const { return about & flag; }
  __device__ __forceinline__ uint32_t slot() const { return about >> kSlotShift; }
  __device__ __forceinline__ bool is_end() const { return valid() == kEnd; }
  __device__ __forceinline__ int batch(const Params& p) const { return p.cu_seqlens ? 0 : sequence; }
};

// A place in the list of all chunks, ordered by sequence, head and chunk. Sequences that have none are passed over. In
// the list of short sequences, `chunk` counts units of their cost.
struct Position {
  int64_t sequence;
  int64_t chunk;
  int head;
};

// The list of chunks is cut into pieces of equal cost, one a cluster, each at least as long as the longest sequence:
// so a sequence of a head falls into two pieces at most (McNaughton's wrap-around rule). In front of its chunks, a
// sequence of a head has the cost of its state. A cluster begins with the
// sequence that the next cluster goes on with, and ends with the one that the cluster before began: its state has long
// been handed over by then. With sequences a (5 chunks), b (4), c (3) of one head, and two clusters of 6:
//
//     list         a0 a1 a2 a3 a4 b0 | b1 b2 b3 c0 c1 c2
//     cluster 0    b0, then a0 .. a4
//     cluster 1    c0 c1 c2, then b1 b2 b3 with the state that cluster 0 handed over
//
// A cluster may wait only for one of a lower number. So it is numbered as it starts, and those have started before it.
//
// The list of short sequences is cut by their cost, one piece for each group of warps. Clusters with fewer chunks get
// more of them: all of them, as long as that makes no cluster later than the one with most chunks.
struct ShortPiece {
  Position begin;  // a whole sequence of a head
  int cost;        // of those from there on; none if it is not above zero
};

constexpr int kShortGroups = 2;      // of a CTA
constexpr int kShortStateCost = 12;  // of reading and writing a state; the unit is one token
constexpr int kChunkCost = 10;       // of a chunk to a cluster, if both its CTAs worked on short sequences instead
constexpr int kStateCost = 1;        // of reading and writing a state between chunks; the unit is a chunk

struct Schedule {
  Position begin, end;
  ShortPiece shorts[kShortGroups];
  uint32_t cta;  // twice the number of the cluster, and the rank in it
};

__device__ __forceinline__ int64_t integer(const void* from, bool is_64_bit, int64_t n) {
  return is_64_bit ? static_cast<const int64_t*>(from)[n] : static_cast<const int32_t*>(from)[n];
}

__device__ __forceinline__ int64_t cu_seqlen(const Params& p, int64_t n) {
  const int64_t x = integer(p.cu_seqlens, p.cu_seqlens_is_64_bit, n);
  return x < 0 ? 0 : (x > p.tokens ? p.tokens : x);  // wrong contents must not reach outside the tensors
}

// The row that a sequence has of states with so many rows; negative: none.
__device__ __forceinline__ int64_t state_row(const Params& p, int64_t n, int64_t rows) {
  if (p.state_indices == nullptr) return n;
  const int64_t row = integer(p.state_indices, p.state_indices_are_64_bit, n * p.state_indices_stride);
  return row < rows ? row : -1;  // wrong contents must not reach outside the tensors
}

// The checkpoints of a sequence, one after the other. Offsets that lie outside it are passed over, and so are those
// that are not above the one before.
struct Checkpoints {
  int slot;    // number of the next one; all have been passed if it is `p.checkpoints`
  int offset;  // tokens before it

  // The one after kShort tokens is left to short.h: a call on so few tokens goes that way, too.
  __device__ __forceinline__ Checkpoints() : slot(0), offset(kShort) {}

  // The number of the one after kShort tokens, or `p.checkpoints`.
  static __device__ __forceinline__ int of_short(const Params& p, int64_t n) {
    int slot = 0;
    while (slot < p.checkpoints && at(p, n, slot) != kShort) ++slot;
    return slot;
  }

  static __device__ __forceinline__ int64_t at(const Params& p, int64_t n, int slot) {
    const int64_t i = n * p.offsets_stride_sequence + slot * p.offsets_stride_checkpoint;
    return integer(p.checkpoint_offsets, p.offsets_are_64_bit, i);
  }

  // From `slot` on, above `offset`.
  __device__ __forceinline__ void seek(const Params& p, int64_t n, int length) {
    const int64_t first = n * p.offsets_stride_sequence;
    for (; slot < p.checkpoints; ++slot) {
      const int64_t x = integer(p.checkpoint_offsets, p.offsets_are_64_bit, first + slot * p.offsets_stride_checkpoint);
      if (x > offset && x <= length) {
        offset = static_cast<int>(x);
        return;
      }
    }
  }

  // It lies inside a chunk, and takes one of its own.
  __device__ __forceinline__ bool is_aside(int length) const { return offset % kChunk != 0 && offset < length; }
};

struct Sequence {
  int64_t start;  // first token in its batch row
  int64_t length;
  int aside = 0;                 // checkpoints that take a chunk of their own
  bool prefix_is_short = false;  // its first tokens are worked on as a short sequence, too: for a checkpoint

  __device__ __forceinline__ Sequence(const Params& p, int64_t n) : start(0), length(p.tokens) {
    if (p.cu_seqlens) {
      start = cu_seqlen(p, n);
      const int64_t end = cu_seqlen(p, n + 1);
      length = end > start ? end - start : 0;
    }
    if (seldom(p.checkpoints > 0)) {
      Checkpoints next;
      for (next.seek(p, n, int(length)); next.slot < p.checkpoints; next.seek(p, n, int(length)))
        aside += next.is_aside(int(length));
      prefix_is_short = length > kShort && Checkpoints::of_short(p, n) < p.checkpoints;
    }
  }

  __device__ __forceinline__ bool is_short() const { return length <= kShort; }
  __device__ __forceinline__ int chunks() const { return is_short() ? 0 : int((length + kChunk - 1) / kChunk) + aside; }
  __device__ __forceinline__ int cost() const { return is_short() ? 0 : chunks() + kStateCost; }
  // Without tokens too: the state passes.
  __device__ __forceinline__ int short_cost() const {
    return is_short() || prefix_is_short ? kShortStateCost + int(short_length()) : 0;
  }
  __device__ __forceinline__ int64_t short_length() const { return min(length, int64_t(kShort)); }
};

// The lists of all chunks and of all short sequences: what a thread of the CTA knows of them, which has looked at some
// of the sequences.
struct List {
  // Of cost: of sequences that have chunks, or of short ones.
  struct Units {
    int before = 0, sum = 0;  // of one head: of the sequences before those, and of those
    int64_t total = 0;        // of all heads
  };
  Units costs, shorts;
  int longest = 0;                  // chunks of the longest sequence
  int longs = 0, longs_before = 0;  // sequences that have chunks

  struct Range {
    int64_t from, to;
  };
  // Those sequences.
  static __device__ __forceinline__ Range range(const Params& p) {
    const int64_t each = (p.sequences + kThreads - 1) / kThreads, from = min(threadIdx.x * each, p.sequences);
    return {from, min(from + each, p.sequences)};
  }

  // All threads together, with `scan` in shared memory.
  __device__ __forceinline__ List(const Params& p, int (&scan)[4][kThreads / kWarp]) {
    const Range mine = range(p);
    for (int64_t n = mine.from; n < mine.to; ++n) {
      const Sequence sequence(p, n);
      costs.sum += sequence.cost();
      shorts.sum += sequence.short_cost();
      longest = max(longest, sequence.chunks());
      longs += sequence.chunks() > 0;
    }
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    int of_costs = costs.sum, of_shorts = shorts.sum, of_longs = longs;  // with those of the lanes below
#pragma unroll
    for (int lanes = 1; lanes < kWarp; lanes *= 2) {
      const int below = __shfl_up_sync(~0u, of_costs, lanes), below_short = __shfl_up_sync(~0u, of_shorts, lanes);
      const int below_long = __shfl_up_sync(~0u, of_longs, lanes);
      if (lane >= lanes) of_costs += below, of_shorts += below_short, of_longs += below_long;
      longest = max(longest, __shfl_xor_sync(~0u, longest, lanes));
    }
    if (lane == kWarp - 1)
      scan[0][warp] = of_costs, scan[1][warp] = of_shorts, scan[2][warp] = longest, scan[3][warp] = of_longs;
    __syncthreads();
    costs.before = of_costs - costs.sum;
    shorts.before = of_shorts - shorts.sum;
    longs_before = of_longs - longs;
    longs = 0;
#pragma unroll
    for (int w = 0; w < kThreads / kWarp; ++w) {
      if (w < warp) costs.before += scan[0][w], shorts.before += scan[1][w], longs_before += scan[3][w];
      costs.total += scan[0][w];
      shorts.total += scan[1][w];
      longs += scan[3][w];
      longest = max(longest, scan[2][w]);
    }
    costs.total *= p.heads;
    shorts.total *= p.heads;
  }

  // The sequence and head of a unit, and which one of theirs it is. False if other threads have looked at that
  // sequence.
  template <class Size>
  static __device__ __forceinline__ bool find(const Params& p, const Units& units, int64_t unit, const Size& size,
                                              Position& position) {
    int64_t at = int64_t(units.before) * p.heads;
    if (unit < at || unit >= at + int64_t(units.sum) * p.heads) return false;
    const Range mine = range(p);
    for (int64_t n = mine.from; n < mine.to; ++n) {
      const int64_t each = size(Sequence(p, n)), all = each * p.heads;
      if (unit < at + all) {
        position = {n, (unit - at) % each, static_cast<int>((unit - at) / each)};
        return true;
      }
      at += all;
    }
    return false;
  }

  // The pieces of the CTA `schedule.cta`. All threads together; ends with a barrier.
  __device__ __forceinline__ void cut(const Params& p, Schedule& schedule) const {
    const int64_t clusters = gridDim.x / kPair, cluster = schedule.cta / kPair;
    const int64_t piece = max((costs.total + clusters - 1) / clusters, int64_t(longest + kStateCost));
    for (int which = 0; which < 2; ++which) {
      Position position = {0, 0, 0};
      const int64_t unit = min((cluster + which) * piece, costs.total);
      const bool at_end = unit == costs.total;  // behind the last one
      const bool found = find(p, costs, unit - at_end, [](const Sequence& x) { return x.cost(); }, position);
      position.chunk = max(position.chunk - kStateCost, int64_t(0));
      if (at_end) position = {position.sequence + 1, 0, 0};
      if (found || (costs.total == 0 && threadIdx.x == 0)) (which ? schedule.end : schedule.begin) = position;
    }
    if (shorts.total > 0)
      for (int group = 0; group < kShortGroups; ++group) {
        const int64_t of_all = int64_t(schedule.cta) * kShortGroups + group;
        cut_shorts(p, schedule.shorts[group], short_boundary(piece, of_all), short_boundary(piece, of_all + 1));
      }
    __syncthreads();
  }

  // The same where no CTA has chunks: all short sequences over those of so many CTAs, of which this is the `which`-th.
  __device__ __forceinline__ void cut_shorts(const Params& p, Schedule& schedule, int which, int all) const {
    for (int group = 0; group < kShortGroups; ++group) {
      const int64_t of_all = int64_t(which) * kShortGroups + group, groups = int64_t(all) * kShortGroups;
      cut_shorts(p, schedule.shorts[group], shorts.total * of_all / groups, shorts.total * (of_all + 1) / groups);
    }
    __syncthreads();
  }

  __device__ __forceinline__ void cut_shorts(const Params& p, ShortPiece& of_group, int64_t from, int64_t to) const {
    if (from == to) {
      if (threadIdx.x == 0) of_group.cost = 0;
      return;
    }
    Position begin;
    if (!find(p, shorts, from, [](const Sequence& x) { return x.short_cost(); }, begin)) return;
    int cost = static_cast<int>(to - from);
    if (begin.chunk > 0) {  // its first units are those of the group before, and so it is
      cost -= Sequence(p, begin.sequence).short_cost() - static_cast<int>(begin.chunk);
      begin.chunk = 0;
      if (++begin.head == p.heads) begin = {begin.sequence + 1, 0, 0};
    }
    of_group = {begin, cost};
  }

  // Where the piece of the `group`-th group of all clusters begins.
  __device__ __forceinline__ int64_t short_boundary(int64_t piece, int64_t group) const {
    constexpr int kGroups = kPair * kShortGroups;  // of a cluster
    const int64_t clusters = gridDim.x / kPair, cluster = group / kGroups;
    const double room = double(clusters * piece - costs.total) * kChunkCost;
    const double more = max(double(shorts.total) - room, 0.) / double(clusters);
    // What the clusters before that one have time for
    const auto before = [&](int64_t c) {
      return double(max(c * piece - costs.total, int64_t(0))) * kChunkCost + double(c) * more;
    };
    const double all = before(clusters);
    const auto boundary = [&](int64_t c) {
      return c == clusters ? shorts.total : int64_t(double(shorts.total) * (before(c) / all));
    };
    const int64_t from = boundary(cluster);
    return group % kGroups == 0 ? from : from + (boundary(cluster + 1) - from) * (group % kGroups) / kGroups;
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
    int length;               // tokens of the sequence
    int left;                 // of those, with those of `chunk`
    int more;                 // chunks after `chunk`
    Checkpoints checkpoints;  // the next one of the sequence

    // At a chunk of a sequence of a head, of which those before `end` are wanted.
    __device__ __forceinline__ void start(const Params& p, const Sequence& sequence, const Position& at, int end,
                                          bool is_first) {
      length = static_cast<int>(sequence.length);
      int64_t whole = at.chunk;  // chunks before this one that are no asides
      checkpoints = {};
      if (seldom(p.checkpoints > 0)) {
        Checkpoints& next = checkpoints;
        int aside = 0;
        for (next.seek(p, at.sequence, length); next.slot < p.checkpoints; next.seek(p, at.sequence, length)) {
          if ((next.offset - 1) / kChunk + aside >= at.chunk) break;  // in this chunk or later
          aside += next.is_aside(length);
        }
        whole -= aside;
      }
      left = static_cast<int>(sequence.length - whole * kChunk);
      more = static_cast<int>(end - at.chunk - 1);
      chunk.token = static_cast<int>(sequence.start + whole * kChunk);
      chunk.sequence = static_cast<int>(at.sequence);
      chunk.head = at.head;
      describe(p, (at.chunk == 0 ? Chunk::kBegins : 0) | (is_first || at.chunk == 0 ? Chunk::kFirst : 0));
    }

    __device__ __forceinline__ void advance(const Params& p) {
      --more;
      const bool checkpoint = chunk.is(Chunk::kCheckpoint);
      if (!seldom(chunk.is(Chunk::kAside))) {
        left -= kChunk;
        chunk.token += kChunk;
      }
      if (seldom(checkpoint)) checkpoints.seek(p, chunk.sequence, length);
      describe(p, 0);
    }

    __device__ __forceinline__ void describe(const Params& p, uint32_t flags) {
      int tokens = min(left, kChunk);
      if (left <= kChunk) flags |= Chunk::kEnds;
      if (more == 0) flags |= Chunk::kLast;
      const int before = checkpoints.offset - (length - left);  // tokens of the chunk before the next checkpoint
      if (seldom(checkpoints.slot < p.checkpoints && before <= kChunk)) {
        flags |= Chunk::kCheckpoint | checkpoints.slot << Chunk::kSlotShift;
        if (before < tokens) {
          tokens = before;
          flags = (flags | Chunk::kAside) & ~uint32_t(Chunk::kEnds);
        }
      }
      chunk.about = tokens | flags;
    }
  };

  // The next sequence of a head, or kEnd.
  __device__ __forceinline__ void next(const Params& p, Run& run) {
    if (part == kWhole) {
      if (next_is_another) step(p);
      next_is_another = false;
      while (at.sequence < stop.sequence && Sequence(p, at.sequence).is_short()) ++at.sequence;
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
    const int end = static_cast<int>(part == kHandedOver ? stop.chunk : sequence.chunks());
    run.start(p, sequence, at, end, part == kTakenOver);
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
