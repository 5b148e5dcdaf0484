// What R is made of, in a pair (recur.h) and in a CTA of its own (recur_apart.h). One warpgroup has 64 value columns.
//
// Everything is transposed, so that every left operand is already in registers: value columns are the rows of the
// accumulators, and an accumulator fragment has, k-step by k-step, the order of the next left operand.
#pragma once

#include "fragment.h"
#include "plan.h"
#include "ptx.h"
#include "state.h"

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

  // Four channels of a row are one access. So lanes 2t and 2t + 1 of a row exchange halves: of two fragments of eight
  // channels, S[0..1] and S[4..5], an even lane gets four channels of the first, an odd lane four of the second.
  __device__ __forceinline__ float4 exchanged(const float* S) const {
    const bool odd = t % 2;
    const float2 a = {S[0], S[1]}, b = {S[4], S[5]}, other = from_neighbour(odd ? a : b);
    return odd ? float4{other.x, other.y, b.x, b.y} : float4{a.x, a.y, other.x, other.y};
  }
  // And back, in place.
  __device__ __forceinline__ void exchange_back(float* S) const {
    const bool odd = t % 2;
    const float2 low = {S[0], S[1]}, high = {S[4], S[5]}, other = from_neighbour(odd ? low : high);
    const float2 a = odd ? other : low, b = odd ? high : other;
    S[0] = a.x, S[1] = a.y, S[4] = b.x, S[5] = b.y;
  }
  static __device__ __forceinline__ float2 from_neighbour(const float2& x) {
    return {__shfl_xor_sync(~0u, x.x, 1), __shfl_xor_sync(~0u, x.y, 1)};
  }
  // The first of those channels, from that of the first fragment.
  __device__ __forceinline__ uint32_t first_of_four() const { return t % 2 * 8 + t / 2 * 4; }

  __device__ __forceinline__ void load_state(const Chunk& at, float (&S)[64]) const {
    if (!at.is(Chunk::kBegins)) return take_over(S);
    const int64_t of = state_row(p, at.sequence, p.initial_rows);
    if (p.initial_state == nullptr || of < 0) {
#pragma unroll
      for (int i = 0; i < 64; ++i) S[i] = 0.f;
      return;
    }
    const int64_t first = of * p.initial_stride_sequence + at.head * p.initial_stride_head +
                          value_column(0) * p.initial_stride_value + first_of_four();
    with_elements(p.initial_is_fp32, p.initial_in_fours, [&](auto four) {
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int j = 0; j < 16; j += 2) {
          const float4 x = four.load(p.initial_state, first + 8 * r * p.initial_stride_value + 8 * j);
          float* const to = S + 4 * j + 2 * r;
          to[0] = x.x, to[1] = x.y, to[4] = x.z, to[5] = x.w;
        }
    });
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int j = 0; j < 16; j += 2) exchange_back(S + 4 * j + 2 * r);
  }

  __device__ __forceinline__ StatePlace checkpoint_of(const Chunk& at) const {
    return {at.is(Chunk::kCheckpoint) ? p.checkpoint_state : nullptr,
            at.sequence * p.checkpoint_stride_sequence + at.slot() * p.checkpoint_stride +
                at.head * p.checkpoint_stride_head,
            p.checkpoint_stride_value, p.checkpoint_is_fp32, p.checkpoint_in_fours};
  }

  __device__ __forceinline__ StatePlace final_state_of(const Chunk& at) const {
    const int64_t of = state_row(p, at.sequence, p.final_rows);
    return {at.is(Chunk::kEnds) && of >= 0 ? p.final_state : nullptr,
            of * p.final_stride_sequence + at.head * p.final_stride_head, p.final_stride_value, p.final_is_fp32,
            p.final_in_fours};
  }

  // After a chunk with a checkpoint, or the last one of this cluster's part.
  __device__ __forceinline__ void store_state(const Chunk& at, float (&S)[64]) const {
#pragma unroll 1  // for the size of the code
    for (int i = 0; i < 2; ++i) {
      const StatePlace to = i == 0 ? checkpoint_of(at) : final_state_of(at);
      if (to.data != nullptr) store(to, S);
    }
    if (at.is(Chunk::kAside)) recall(p.kept, cta, S);
    if (at.is(Chunk::kLast) && !at.is(Chunk::kEnds)) hand_over(S);
  }

  __device__ __forceinline__ void store(const StatePlace& to, const float (&S)[64]) const {
    const int64_t first = to.at + value_column(0) * to.stride_value + first_of_four();
    with_elements(to.is_fp32, to.in_fours, [&](auto four) {
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int j = 0; j < 16; j += 2)
          four.store(to.data, first + 8 * r * to.stride_value + 8 * j, exchanged(S + 4 * j + 2 * r));
    });
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
};

}  // namespace flash_kda
