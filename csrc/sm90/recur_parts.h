// What R is made of, in a pair (recur.h) and in a CTA of its own (recur_apart.h). One warpgroup has 64 value columns.
//
// Everything is transposed, so that every left operand is already in registers: value columns are the rows of the
// accumulators, and an accumulator fragment has, k-step by k-step, the order of the next left operand.
#pragma once

#include "fragment.h"
#include "plan.h"
#include "ptx.h"

namespace flash_kda {

struct RecurParts : Fragment {
  const Params& p;
  const uint32_t& cta;  // of all, in shared memory
  int rank;             // in the cluster: which value columns
  uint32_t thread, warp;

  __device__ __forceinline__ RecurParts(const Params& params, const uint32_t& of_all, int of_cluster)
      : p(params), cta(of_all), rank(of_cluster), thread(threadIdx.x), warp(threadIdx.x % kWarpgroup / kWarp) {}

  static __device__ __forceinline__ void sync() { sync_threads(kBarrierRecur, kWarpgroup); }

  // The state ---------------------------------------------------------------------------------------------------------
  //
  // S^T: S[4j + 0..1] are columns (value) 16 * warp + row, channels 8j + 2t + 0..1; S[4j + 2..3] value column + 8.

  __device__ __forceinline__ int value_column(int r) const { return rank * kColumns + 16 * warp + row + 8 * r; }

  // Where a state of the head is, or null.
  struct Place {
    void* data;
    int64_t at;  // its first element
    int64_t stride_value;
    bool is_fp32, in_pairs;
  };

  __device__ __forceinline__ void load_state(const Chunk& at, float (&S)[64]) const {
    if (!at.is(Chunk::kBegins)) return take_over(S);
    const int64_t of = state_row(p, at.sequence, p.initial_rows);
    if (p.initial_state == nullptr || of < 0) {
#pragma unroll
      for (int i = 0; i < 64; ++i) S[i] = 0.f;
      return;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t offset = of * p.initial_stride_sequence + at.head * p.initial_stride_head +
                             value_column(r) * p.initial_stride_value + 2 * t;
      const float* const fp32 = static_cast<const float*>(p.initial_state) + offset;
      const uint16_t* const bf16 = static_cast<const uint16_t*>(p.initial_state) + offset;
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        float2 x;
        if (p.initial_in_pairs)
          x = p.initial_is_fp32 ? *reinterpret_cast<const float2*>(fp32 + 8 * j)
                                : unpack_bf16(*reinterpret_cast<const uint32_t*>(bf16 + 8 * j));
        else
          x = p.initial_is_fp32 ? float2{fp32[8 * j], fp32[8 * j + 1]}
                                : unpack_bf16(bf16[8 * j] | uint32_t(bf16[8 * j + 1]) << 16);
        S[4 * j + 2 * r] = x.x;
        S[4 * j + 2 * r + 1] = x.y;
      }
    }
  }

  __device__ __forceinline__ Place checkpoint_of(const Chunk& at) const {
    return {at.is(Chunk::kCheckpoint) ? p.checkpoint_state : nullptr,
            at.sequence * p.checkpoint_stride_sequence + at.slot() * p.checkpoint_stride +
                at.head * p.checkpoint_stride_head,
            p.checkpoint_stride_value, p.checkpoint_is_fp32, p.checkpoint_in_pairs};
  }

  __device__ __forceinline__ Place final_state_of(const Chunk& at) const {
    const int64_t of = state_row(p, at.sequence, p.final_rows);
    return {at.is(Chunk::kEnds) && of >= 0 ? p.final_state : nullptr,
            of * p.final_stride_sequence + at.head * p.final_stride_head, p.final_stride_value, p.final_is_fp32,
            p.final_in_pairs};
  }

  // After a chunk with a checkpoint, or the last one of this cluster's part.
  __device__ __forceinline__ void store_state(const Chunk& at, float (&S)[64]) const {
#pragma unroll 1  // for the size of the code
    for (int i = 0; i < 2; ++i) {
      const Place to = i == 0 ? checkpoint_of(at) : final_state_of(at);
      if (to.data != nullptr) store(to, S);
    }
    if (at.is(Chunk::kAside)) recall(p.kept, cta, S);
    if (at.is(Chunk::kLast) && !at.is(Chunk::kEnds)) hand_over(S);
  }

  __device__ __forceinline__ void store(const Place& to, const float (&S)[64]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t offset = to.at + value_column(r) * to.stride_value + 2 * t;
      float* const fp32 = static_cast<float*>(to.data) + offset;
      uint16_t* const bf16 = static_cast<uint16_t*>(to.data) + offset;
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const float x = S[4 * j + 2 * r], y = S[4 * j + 2 * r + 1];
        if (to.is_fp32) {
          if (to.in_pairs)
            *reinterpret_cast<float2*>(fp32 + 8 * j) = {x, y};
          else
            fp32[8 * j] = x, fp32[8 * j + 1] = y;
        } else {
          const uint32_t both = pack_bf16(x, y);
          if (to.in_pairs)
            *reinterpret_cast<uint32_t*>(bf16 + 8 * j) = both;
          else
            bf16[8 * j] = uint16_t(both), bf16[8 * j + 1] = uint16_t(both >> 16);
        }
      }
    }
  }

  // A state as it lies in registers, in the memory between clusters: that of a CTA.
  __device__ __forceinline__ void keep(float* memory, uint32_t cta, const float (&S)[64]) const {
    float4* state = reinterpret_cast<float4*>(memory) + int64_t(cta) * 16 * kWarpgroup;
#pragma unroll
    for (int i = 0; i < 16; ++i) state[i * kWarpgroup + thread] = {S[4 * i], S[4 * i + 1], S[4 * i + 2], S[4 * i + 3]};
  }

  __device__ __forceinline__ void recall(const float* memory, uint32_t cta, float (&S)[64]) const {
    const float4* state = reinterpret_cast<const float4*>(memory) + int64_t(cta) * 16 * kWarpgroup;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float4 x = __ldcg(state + i * kWarpgroup + thread);
      S[4 * i] = x.x, S[4 * i + 1] = x.y, S[4 * i + 2] = x.z, S[4 * i + 3] = x.w;
    }
  }

  // A sequence that goes on in the next cluster: its state, through memory.
  __device__ __forceinline__ void hand_over(const float (&S)[64]) const {
    keep(p.handover, cta, S);
    __threadfence();
    sync();
    if (thread == 0) store_release(p.handed_over + cta, 1);
  }

  // From the cluster before: it is running or has ended.
  __device__ __forceinline__ void take_over(float (&S)[64]) const {
    const uint32_t from = cta - kPair;
    if (thread == 0)
      while (!load_acquire(p.handed_over + from)) {
      }
    sync();
    recall(p.handover, from, S);
  }

  // A chunk -----------------------------------------------------------------------------------------------------------

  // V^T as a left operand: tokens 8j + 2t and 8j + 2t + 1 of value columns `row` (V[2j]) and `row + 8` (V[2j + 1]).
  __device__ __forceinline__ void load_values(uint32_t (&V)[8], const Tile& v, int valid) const {
    load_matrices_of_values(V, v);
    if (seldom(valid < kChunk)) clear_values(V, valid);
  }

  __device__ __forceinline__ void load_matrices_of_values(uint32_t (&V)[8], const Tile& v) const {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      load_matrices_transposed(V + 4 * i,
                               v.bytes + swizzled(16 * i + lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2));
  }

  // Rows past the end may hold anything, NaN included.
  __device__ __forceinline__ void clear_values(uint32_t (&V)[8], int valid) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int token = 8 * (i / 2) + 2 * t;
      V[i] = token >= valid ? 0 : token + 1 >= valid ? V[i] & 0xffff : V[i];
    }
  }

  // To bf16, as a left operand.
  template <int kN>
  static __device__ __forceinline__ void round(uint32_t (&y)[kN], const float (&x)[2 * kN]) {
#pragma unroll
    for (int i = 0; i < kN; ++i) y[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
  }

  // C = A B^T or C += A B^T, where 64 of the columns that are summed over lie in a tile, and the next ones `kNext`
  // bytes on.
  template <class Atom, int kNext, int kN, int kAccumulators>
  static __device__ __forceinline__ void multiply(float (&C)[kAccumulators], const uint32_t (&A)[kN], const Tile& B,
                                                  int first_step, bool accumulate) {
    const KMajor right(B.bytes);
#pragma unroll
    for (int k = 0; k < kN / 4; ++k) {
      const int step = first_step + k;
      gmma<Atom>(C, A + 4 * k, right.at(step / 4 * kNext + step % 4 * kKMajorStep), accumulate || k > 0);
    }
  }

  __device__ __forceinline__ void load_decay(float2 (&d)[16], const float* decay) const {
#pragma unroll
    for (int j = 0; j < 16; ++j) d[j] = *reinterpret_cast<const float2*>(decay + 8 * j + 2 * t);
  }

  static __device__ __forceinline__ void multiply_by(float (&S)[64], const float2 (&d)[16]) {
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      S[4 * j] *= d[j].x;
      S[4 * j + 1] *= d[j].y;
      S[4 * j + 2] *= d[j].x;
      S[4 * j + 3] *= d[j].y;
    }
  }

  // The output of a chunk, until the products of the next one are under way: it is stored beside them.
  struct Output {
    uint32_t O[8];
    unsigned char* to;  // this lane's first token and columns
    int valid = 0;      // tokens
  };

  // O^T = (U^T M^T + S^T Q~^T) scale / |q|, rounded.
  template <int kN>
  __device__ __forceinline__ void scale(Output& output, const float (&U_part)[16], const float (&S_part)[kN],
                                        const float* factors) const {
#pragma unroll
    for (int j = 0; j < kChunk / 8; ++j) {
      const float2 q = *reinterpret_cast<const float2*>(factors + 8 * j + 2 * t);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int i = 4 * j + 2 * r;
        output.O[2 * j + r] = pack_bf16((U_part[i] + S_part[i]) * q.x, (U_part[i + 1] + S_part[i + 1]) * q.y);
      }
    }
  }

  // Transposed back by eights, from registers to memory.
  __device__ __forceinline__ void store(const Output& x) const {
    unsigned char* to = x.to;
#pragma unroll
    for (int j = 0; j < kChunk / 8; ++j) {
      const uint32_t low = transposed(x.O[2 * j]), high = transposed(x.O[2 * j + 1]);
      if (int(8 * j + row) < x.valid) {
        __stcg(reinterpret_cast<uint32_t*>(to), low);
        __stcg(reinterpret_cast<uint32_t*>(to + 16), high);
      }
      to += 16 * p.out_stride_token;  // eight tokens of two bytes
    }
  }

  // Where the output of the chunk goes that `out` then moves on from: this lane's first token and columns.
  __device__ __forceinline__ unsigned char* output_of(const Chunk& at) const {
    return reinterpret_cast<unsigned char*>(p.out + at.batch(p) * p.out_stride_batch +
                                            (at.token + int64_t(row)) * p.out_stride_token +
                                            at.head * p.out_stride_head + rank * kColumns + 16 * warp + 2 * t);
  }

  // All chunks. `next` waits for the c-th one and says what it is, `work` does what each chunk needs. What only some
  // need stands outside of the inner loop. Its code is long: the instructions of the loop would lie far apart, and R
  // waited for them after each jump.
  template <class Next, class Work>
  __device__ __forceinline__ void recur(const Next& next, const Work& work) const {
    float S[64];
    unsigned char* out = nullptr;
    Output output;
    Chunk at;
    at.about = 0;
    bool done = true;  // with `at`
    for (uint32_t c = ~0u;;) {
      if (done) {
        if (at.about & Chunk::kStateAfter) {
          mark(Stage::kState, c);
          if (at.is(Chunk::kAside)) output.valid = 0;  // the whole chunk writes it
          store(output);
          output.valid = 0;
          store_state(at, S);
          if (at.is(Chunk::kAside)) out = output_of(at);
        }
        at = next(++c);
      }
      if (at.is_end()) break;
      if (at.is(Chunk::kFirst)) {
        mark(Stage::kState, c);
        load_state(at, S);
        out = output_of(at);
      }
      if (at.is(Chunk::kAside)) keep(p.kept, cta, S);
      do {
        work(S, output, out, at, c);
        done = at.about & Chunk::kStateAfter;
        if (!done) at = next(++c);
      } while (!done && !(at.about & Chunk::kStateBefore));
    }
  }
};

}  // namespace flash_kda
