// Short sequences: up to kShort tokens, one after the other in fp32, before the roles begin. The state is read once and
// written once.
//
// A group of eight warps works on one head of one sequence at a time; each warp has 16 value rows of its state, in
// registers. The warps prepare the tokens in turn, in shared memory. While they do, their rows are on the way.
#pragma once

#include "gate.h"
#include "plan.h"
#include "ptx.h"

namespace flash_kda {

constexpr int kShortWarps = kThreads / kWarp / kShortGroups;  // of a group
static_assert(kShortWarps * 16 == kHeadDim, "16 value rows a warp");

// Tokens are taken in pairs: the state is multiplied by the decay of a pair at its end. Until then it lacks that decay,
// D from the start of the pair through a token, which operands make up for. 1 / D is at most exp(10).
constexpr int kShortPairs = kShort / 2;
static_assert(kShortPairs == kShortWarps, "a warp prepares a pair");

// The tokens of a sequence of a head.
struct ShortTokens {
  struct Token {
    float read[kHeadDim];   // k D
    float write[kHeadDim];  // k / D
    float q[kHeadDim];      // q D; k and q normalised
    uint16_t v[kHeadDim];
  };
  Token token[kShort];
  float decay[kShortPairs][kHeadDim];
};
// Two sequences a group: the next one's tokens are written while warps still read the last one's. They lie where this
// CTA's own operands are loaded later, not where the peer's come.
static_assert(kShortGroups * 2 * sizeof(ShortTokens) <= kOwnStages * sizeof(Operands), "own stages");
static_assert(kShortGroups * 2 <= kOwnStages && kShort <= kChunk, "beta of each");

struct Short {
  const Params& p;
  ShortTokens* tokens;  // of this group, two
  float (*beta)[kChunk];
  int n, head, cost;  // what comes next, and the cost of all that is left
  uint32_t thread, lane, warp, group;

  // Of a row, this lane has channels 32 i + 4 (lane % 8) + 0..3. Of the warp's rows it has lane / 8 + 4 r.
  float S[4][16];

  __device__ __forceinline__ Short(const Params& params, SharedMemoryPlan& plan) : p(params), thread(threadIdx.x) {
    lane = thread % kWarp;
    warp = thread / kWarp % kShortWarps;
    group = thread / kWarp / kShortWarps;
    tokens = reinterpret_cast<ShortTokens*>(plan.operands) + 2 * group;
    beta = plan.b + 2 * group;
    const ShortPiece& piece = plan.schedule.shorts[group];
    n = static_cast<int>(piece.begin.sequence), head = piece.begin.head, cost = piece.cost;
  }

  __device__ __forceinline__ void run() {
    uint32_t buffer = 0;
    while (cost > 0) {
      if (head == 0) n = next_short(n);
      if (n >= p.sequences) break;
      Sequence sequence(p, n);
      const int spent = sequence.short_cost();
      sequence.length = sequence.short_length();
      if (sequence.length > 0 || p.final_state != nullptr) {
        prepare(sequence, buffer);
        load_state();
        if (head + 1 < p.heads)
          prefetch_state(n, head + 1);
        else if (n + 1 < p.sequences)
          prefetch_state(n + 1, 0);
        sync_threads(kBarrierShort + group, kShortWarps * kWarp);
        recur(sequence, buffer);
        store_states(sequence);
        buffer ^= 1;  // here alone: it is the barrier that makes the other one free
      }
      cost -= spent;
      if (++head == p.heads) head = 0, ++n;
    }
  }

  // The first short sequence from one on.
  __device__ __forceinline__ int next_short(int from) const {
    for (; from < p.sequences; from += kWarp) {
      const int mine = from + int(lane);
      const uint32_t found = __ballot_sync(~0u, mine < p.sequences && Sequence(p, mine).short_cost() > 0);
      if (found) return from + __ffs(found) - 1;
    }
    return from;
  }

  // The state -------------------------------------------------------------------------------------------------------

  __device__ __forceinline__ int64_t first_row() const { return 16 * warp + lane / 8; }
  __device__ __forceinline__ int first_channel() const { return 4 * (lane % 8); }

  // Four elements at a time if all rows lie so that this may be, else one at a time.
  static __device__ __forceinline__ bool by_fours(const void* state, int64_t a, int64_t b, int64_t c, int bytes) {
    return (reinterpret_cast<uintptr_t>(state) % (4 * bytes) | (a | b | c) % 4) == 0;
  }

  __device__ __forceinline__ void load_state() {
    const int64_t of = state_row(p, n, p.initial_rows);
    if (p.initial_state == nullptr || of < 0) {
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int c = 0; c < 16; ++c) S[r][c] = 0.f;
      return;
    }
    const int64_t at = of * p.initial_stride_sequence + head * p.initial_stride_head +
                       first_row() * p.initial_stride_value + first_channel();
    const int64_t step = 4 * p.initial_stride_value;
    const bool fours = by_fours(p.initial_state, p.initial_stride_sequence, p.initial_stride_head,
                                p.initial_stride_value, p.initial_is_fp32 ? 4 : 2);
    if (p.initial_is_fp32) {
      const float* from = static_cast<const float*>(p.initial_state) + at;
      if (fours)
        load_rows(from, step, [](const float* x) { return __ldcg(reinterpret_cast<const float4*>(x)); });
      else
        load_rows(from, step,
                  [](const float* x) { return float4{__ldcg(x), __ldcg(x + 1), __ldcg(x + 2), __ldcg(x + 3)}; });
    } else {
      const uint16_t* from = static_cast<const uint16_t*>(p.initial_state) + at;
      if (fours)
        load_rows(from, step, [](const uint16_t* x) { return unpacked(__ldcg(reinterpret_cast<const uint2*>(x))); });
      else
        load_rows(from, step, [](const uint16_t* x) {
          return unpacked({__ldcg(x) | uint32_t(__ldcg(x + 1)) << 16, __ldcg(x + 2) | uint32_t(__ldcg(x + 3)) << 16});
        });
    }
  }

  // Those of the warp's rows, one a lane, that may come next.
  __device__ __forceinline__ void prefetch_state(int64_t of_sequence, int of_head) const {
    of_sequence = state_row(p, of_sequence, p.initial_rows);
    if (p.initial_state == nullptr || of_sequence < 0 || lane >= 16) return;
    const int bytes = p.initial_is_fp32 ? 4 : 2;
    const int64_t at = of_sequence * p.initial_stride_sequence + of_head * p.initial_stride_head +
                       (16 * warp + lane) * p.initial_stride_value;
    const char* const row = static_cast<const char*>(p.initial_state) + at * bytes;
    if (reinterpret_cast<uintptr_t>(row) % 16 == 0) prefetch(row, kHeadDim * bytes);
  }

  static __device__ __forceinline__ float4 unpacked(uint2 x) {
    const float2 low = unpack_bf16(x.x), high = unpack_bf16(x.y);
    return {low.x, low.y, high.x, high.y};
  }

  template <class T, class Load>
  __device__ __forceinline__ void load_rows(const T* from, int64_t step, const Load& load) {
#pragma unroll
    for (int r = 0; r < 4; ++r, from += step)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float4 x = load(from + 32 * i);
        S[r][4 * i] = x.x, S[r][4 * i + 1] = x.y, S[r][4 * i + 2] = x.z, S[r][4 * i + 3] = x.w;
      }
  }

  // Into the final states, and into a checkpoint after the last token.
  __device__ __forceinline__ void store_states(const Sequence& sequence) const {
    const int64_t of = state_row(p, n, p.final_rows);
    if (p.final_state != nullptr && of >= 0 && !sequence.prefix_is_short)
      store_state(p.final_state, of * p.final_stride_sequence, p.final_stride_head, p.final_stride_value,
                  p.final_is_fp32);
    if (seldom(p.checkpoints > 0 && sequence.length == kShort)) {
      const int slot = Checkpoints::of_short(p, n);
      if (slot < p.checkpoints)
        store_state(p.checkpoint_state, n * p.checkpoint_stride_sequence + slot * p.checkpoint_stride,
                    p.checkpoint_stride_head, p.checkpoint_stride_value, p.checkpoint_is_fp32);
    }
  }

  // `first`: the state of the first head.
  __device__ __forceinline__ void store_state(void* states, int64_t first, int64_t stride_head, int64_t stride_value,
                                              bool is_fp32) const {
    const int64_t at = first + head * stride_head + first_row() * stride_value + first_channel();
    const int64_t step = 4 * stride_value;
    const bool fours = by_fours(states, first, stride_head, stride_value, is_fp32 ? 4 : 2);
    if (is_fp32) {
      float* to = static_cast<float*>(states) + at;
      if (fours)
        store_rows(to, step, [](float* y, float4 x) { __stcg(reinterpret_cast<float4*>(y), x); });
      else
        store_rows(to, step, [](float* y, float4 x) { y[0] = x.x, y[1] = x.y, y[2] = x.z, y[3] = x.w; });
    } else {
      uint16_t* to = static_cast<uint16_t*>(states) + at;
      if (fours)
        store_rows(to, step, [](uint16_t* y, float4 x) {
          __stcg(reinterpret_cast<uint2*>(y), uint2{pack_bf16(x.x, x.y), pack_bf16(x.z, x.w)});
        });
      else
        store_rows(to, step, [](uint16_t* y, float4 x) {
          const uint32_t low = pack_bf16(x.x, x.y), high = pack_bf16(x.z, x.w);
          y[0] = uint16_t(low), y[1] = uint16_t(low >> 16), y[2] = uint16_t(high), y[3] = uint16_t(high >> 16);
        });
    }
  }

  template <class T, class Store>
  __device__ __forceinline__ void store_rows(T* to, int64_t step, const Store& store) const {
#pragma unroll
    for (int r = 0; r < 4; ++r, to += step)
#pragma unroll
      for (int i = 0; i < 4; ++i) store(to + 32 * i, {S[r][4 * i], S[r][4 * i + 1], S[r][4 * i + 2], S[r][4 * i + 3]});
  }

  // Preparation: one warp a token, four channels a lane
  // ----------------------------------------------------------------

  __device__ __forceinline__ uint2 load_four(const flash_kda_tokens& x, int64_t batch, int64_t token) const {
    const int64_t at = batch * x.stride_batch + token * x.stride_token + head * x.stride_head + 4 * lane;
    return *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(x.data) + at);
  }

  __device__ __forceinline__ void prepare(const Sequence& sequence, uint32_t buffer) const {
    const int64_t batch = p.cu_seqlens ? 0 : n;
    const auto four = [&](float (&of)[kHeadDim]) -> float4& { return *reinterpret_cast<float4*>(of + 4 * lane); };
    ShortTokens& to = tokens[buffer];
    const int first = 2 * warp, count = min(int(sequence.length) - first, 2);
    if (count <= 0) return;
    uint2 q[2], k[2], g[2], v[2];
    uint32_t logit[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // all are asked for before one is waited for
      const int64_t token = sequence.start + first + min(i, count - 1);
      q[i] = load_four(p.q_rows, batch, token), k[i] = load_four(p.k_rows, batch, token);
      g[i] = load_four(p.g_rows, batch, token), v[i] = load_four(p.v_rows, batch, token);
      logit[i] = p.beta[batch * p.beta_stride_batch + token * p.beta_stride_token + head * p.beta_stride_head];
    }
    const float* const biases = p.dt_bias + head * p.dt_bias_stride + 4 * lane;
    const float4 bias = {biases[0], biases[1], biases[2], biases[3]};
    const float rate = gate_rate(p.A_log[head]);
    float4 D = {0.f, 0.f, 0.f, 0.f};  // its logarithm, base 2
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (i == count) break;
      const float4 gate = unpacked(g[i]);
      D = {log_decay(rate, gate.x + bias.x, D.x), log_decay(rate, gate.y + bias.y, D.y),
           log_decay(rate, gate.z + bias.z, D.z), log_decay(rate, gate.w + bias.w, D.w)};
      const float4 decay = {exp2_approx(D.x), exp2_approx(D.y), exp2_approx(D.z), exp2_approx(D.w)};
      four(to.decay[warp]) = decay;
      ShortTokens::Token& token = to.token[first + i];
      *reinterpret_cast<uint2*>(token.v + 4 * lane) = v[i];
      four(token.q) = product(normalised(unpacked(q[i])), decay);
      const float4 kn = normalised(unpacked(k[i]));
      four(token.read) = product(kn, decay);
      four(token.write) = product(kn, {exp2_approx(-D.x), exp2_approx(-D.y), exp2_approx(-D.z), exp2_approx(-D.w)});
      if (lane == 0) beta[buffer][first + i] = sigmoid_of_minus(-kLog2E * unpack_bf16(logit[i]).x);
    }
  }

  __device__ __forceinline__ float log_decay(float rate, float gate, float before) const {
    return fmaf(p.lower_bound * kLog2E, sigmoid_of_minus(rate * gate), before);
  }

  static __device__ __forceinline__ float4 product(float4 x, float4 y) {
    return {x.x * y.x, x.y * y.y, x.z * y.z, x.w * y.w};
  }

  // x / sqrt(|x|^2 + epsilon). The squares of a large row are those of the row times 2^-80, beside which epsilon is
  // nothing; those of a tiny row may vanish beside epsilon.
  static __device__ __forceinline__ float4 normalised(float4 x) {
    constexpr float kLarge = 0x1p40f;
    const bool large = __any_sync(~0u, fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w))) >= kLarge);
    const float unit = large ? 1.f / (kLarge * kLarge) : 1.f;
    x = {x.x * unit, x.y * unit, x.z * unit, x.w * unit};
    float squares = x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
#pragma unroll
    for (int lanes = 1; lanes < kWarp; lanes *= 2) squares += __shfl_xor_sync(~0u, squares, lanes);
    const float inverse = rsqrt_approx(large ? squares : squares + kNormEpsilon);
    return {x.x * inverse, x.y * inverse, x.z * inverse, x.w * inverse};
  }

  // The recurrence ----------------------------------------------------------------------------------------------------

  // Which one of its rows a lane gets the sum of.
  __device__ __forceinline__ int row_of_sum() const { return lane / 2 % 4; }

  // The sum of x[row_of_sum()] over the eight lanes that share rows.
  __device__ __forceinline__ float sum(const float (&x)[4]) const {
    const bool high = lane & 4, odd = lane & 2;
    const float even_one = (high ? x[2] : x[0]) + __shfl_xor_sync(~0u, high ? x[0] : x[2], 4);
    const float odd_one = (high ? x[3] : x[1]) + __shfl_xor_sync(~0u, high ? x[1] : x[3], 4);
    const float one = (odd ? odd_one : even_one) + __shfl_xor_sync(~0u, odd ? even_one : odd_one, 2);
    return one + __shfl_xor_sync(~0u, one, 1);
  }

  // Four channels of this lane: the c-th ones of 32.
  __device__ __forceinline__ float4 four_of(const float (&of)[kHeadDim], int c) const {
    return *reinterpret_cast<const float4*>(of + 32 * c + first_channel());
  }

  // One token: S then lacks the decay of the pair through it. The output of the column of this lane.
  __device__ __forceinline__ float take(const ShortTokens::Token& token, float b, uint32_t column) {
    float said[4] = {}, o[4] = {}, u[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float4 k = four_of(token.read, c);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float* const x = S[r] + 4 * c;
        said[r] = fmaf(k.x, x[0], said[r]);
        said[r] = fmaf(k.y, x[1], said[r]);
        said[r] = fmaf(k.z, x[2], said[r]);
        said[r] = fmaf(k.w, x[3], said[r]);
      }
    }
    const float mine = b * (unpack_bf16(token.v[column]).x - sum(said));
#pragma unroll
    for (int r = 0; r < 4; ++r) u[r] = __shfl_sync(~0u, mine, (lane & 24) + 2 * r);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float4 k = four_of(token.write, c), q = four_of(token.q, c);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        float* const x = S[r] + 4 * c;
        x[0] = fmaf(k.x, u[r], x[0]);
        x[1] = fmaf(k.y, u[r], x[1]);
        x[2] = fmaf(k.z, u[r], x[2]);
        x[3] = fmaf(k.w, u[r], x[3]);
        o[r] = fmaf(q.x, x[0], o[r]);
        o[r] = fmaf(q.y, x[1], o[r]);
        o[r] = fmaf(q.z, x[2], o[r]);
        o[r] = fmaf(q.w, x[3], o[r]);
      }
    }
    return sum(o);
  }

  __device__ __forceinline__ void recur(const Sequence& sequence, uint32_t buffer) {
    const uint32_t column = first_row() + 4 * row_of_sum();
    uint16_t* out = p.out + (p.cu_seqlens ? 0 : n) * p.out_stride_batch + sequence.start * p.out_stride_token +
                    head * p.out_stride_head + column;
    const int length = static_cast<int>(sequence.length);
    const ShortTokens& of = tokens[buffer];
#pragma unroll 1
    for (int i = 0; i < length; ++i, out += p.out_stride_token) {
      const uint32_t o = pack_bf16(p.scale * take(of.token[i], beta[buffer][i], column), 0.f);
      if (lane % 2 == 0 && !sequence.prefix_is_short) *out = static_cast<uint16_t>(o);
      if (i % 2 == 0 && i + 1 < length) continue;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float4 d = four_of(of.decay[i / 2], c);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          float* const x = S[r] + 4 * c;
          x[0] *= d.x, x[1] *= d.y, x[2] *= d.z, x[3] *= d.w;
        }
      }
    }
  }
};

}  // namespace flash_kda
