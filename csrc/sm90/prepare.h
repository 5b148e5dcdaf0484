// P: norms, beta, decays, the decayed operands K~, Q~, Kr and the triangles L and M of a chunk.
//
// A team has four warps. Each has 32 of the 128 channels of all tokens; L and M are sums over all four.
#pragma once

#include "gate.h"
#include "norms.h"
#include "plan.h"
#include "ptx.h"
#include "timeline.h"
#include "triangle.h"

namespace flash_kda {

struct Prepare : Norms {
  const Params& p;
  SharedMemoryPlan& s;
  int rank;
  uint32_t warp, team, quarter;

  __device__ __forceinline__ Prepare(const Params& params, SharedMemoryPlan& plan, int of_cluster)
      : p(params), s(plan), rank(of_cluster) {
    warp = threadIdx.x / kWarp - kFirstPrepareWarp;
    split_warp();
  }

  __device__ __forceinline__ void split_warp() {
    forget(warp);
    team = warp / kTeamWarps;
    quarter = warp % kTeamWarps;
  }

  __device__ __forceinline__ void sync_team() const { sync_threads(kBarrierTeam + team, kTeamWarps * kWarp); }

  // This warp's channels: a tile of q (tensor 0), k (1) or g (2), and its first unit of 16 bytes in a row.
  __device__ __forceinline__ Tile& tile_of(Operands& x, int tensor) const {
    return tensor < 2 ? (&x.of[quarter / 2].q)[tensor] : x.g[quarter / 2];
  }
  __device__ __forceinline__ uint32_t first_unit() const { return quarter % 2 * 4; }

  // The gate of a head. Each warp has its own.
  __device__ __forceinline__ void load_gate(int head) const {
    __syncwarp();  // the one before is read
    if (lane == 0) s.gate[warp] = {head, gate_rate(p.A_log[head])};
    s.bias[warp][lane] = p.dt_bias[head * p.dt_bias_stride + quarter * kWarp + lane];
    __syncwarp();
  }

  // Norms and beta ----------------------------------------------------------------------------------------------------

  __device__ __forceinline__ void clear_past_end(Operands& x, int valid) const {
    clear_rows(tile_of(x, 0), first_unit(), valid, 0);
    clear_rows(tile_of(x, 1), first_unit(), valid, 0);
    clear_rows(tile_of(x, 2), first_unit(), valid, 0xff80ff80u);  // no decay follows from a gate of -inf
  }

  // The sums of squares of q or k over this warp's channels, for all four warps.
  __device__ __forceinline__ void give_squares(Operands& x, int tensor) const {
    row_squares(tile_of(x, tensor), first_unit(), s.squares[team][quarter][tensor]);
  }
  __device__ __forceinline__ float take_squares(int tensor) const {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kTeamWarps; ++i) sum += s.squares[team][i][tensor][lane];
    return sum;
  }

  // 1 / |x| of row `lane` of q or k, once the squares of all warps are there. Rows from `valid` on are zero.
  // `ordinary`: all norms are near 1.
  __device__ __forceinline__ float inverse_norm(int tensor, int valid, bool& ordinary) const {
    const float squares = take_squares(tensor);
    const bool past = int(lane) >= valid;
    ordinary = past || (squares >= 0x1p-16f && squares <= 0x1p16f);
    return past ? 0.f : rsqrt_approx(squares + kNormEpsilon);
  }

  // The same where not all are: rows are multiplied by powers of two. All warps see the same squares, so all come here.
  __device__ __forceinline__ float any_inverse_norm(Operands& x, int tensor, int valid) const {
    bool ordinary;
    const float inverse = inverse_norm(tensor, valid, ordinary);
    if (__all_sync(~0u, ordinary)) return inverse;
    return unusual_norm(tile_of(x, tensor), first_unit(), take_squares(tensor), ordinary, inverse, [&] {
      sync_team();  // the first ones are read
      give_squares(x, tensor);
      sync_team();
      return take_squares(tensor);
    });
  }

  // The logit of beta of token `lane`, as bf16.
  __device__ __forceinline__ uint32_t load_beta(const Chunk& at) const {
    const int token = min(int(lane), int(at.valid()) - 1);
    return p.beta[at.batch(p) * p.beta_stride_batch + (at.token + int64_t(token)) * p.beta_stride_token +
                  at.head * p.beta_stride_head];
  }

  // Decays and operands -----------------------------------------------------------------------------------------------

  // A triangle of ones as a left operand of fp16, to s.triangle. From registers, the compiler would make it anew for
  // each product.
  static __device__ __forceinline__ void make_triangle(SharedMemoryPlan& s) {
    constexpr uint32_t kOnes = 0x3c003c00;
    const Fragment at;
    const uint32_t corner = 2 * at.t + 1 <= at.row ? kOnes : 2 * at.t == at.row ? kOnes & 0xffff : 0;
    s.triangle[at.lane] = {corner, kOnes, 0, corner};
  }

  // exp(G) of rows `row` and `row + 8` of a block, channels 2t and 2t + 1 of eight. G, the cumulative log-decay from
  // the start of the block, is the product of a triangle of ones with the gates' sigmoids: so it comes out as fragments
  // lie. A sigmoid, times 2^15, is the sum of two numbers of fp16, 22 bits: the factor keeps small ones in range. `g`:
  // of tokens 2t and 2t + 1 (then 8 more), channel `row`.
  __device__ __forceinline__ void decays(float (&d)[2][2], const uint32_t (&triangle)[4], const uint32_t* g,
                                         float bias) const {
    const float bound = p.lower_bound * (kLog2E / kSigmoidScale), rate = s.gate[warp].rate;
    // Apart, and added in fp32: the tensor core cuts its sums off. Those of the first numbers, of 11 bits, are exact
    // then.
    uint32_t high[2], low[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float2 gate = unpack_bf16(g[r]);
      // g + bias comes first: they may cancel
      const float x = scaled_sigmoid_of_minus(rate * (gate.x + bias));
      const float y = scaled_sigmoid_of_minus(rate * (gate.y + bias));
      const float x_high = without_low_bits(x), y_high = without_low_bits(y);
      high[r] = pack_fp16(x_high, y_high);
      low[r] = pack_fp16(x - x_high, y - y_high);
    }
    float sum[4], rest[4];
    mma_fp16(sum, triangle, high[0], high[1]);
    mma_fp16(rest, triangle, low[0], low[1]);
#pragma unroll
    for (int e = 0; e < 4; ++e) d[e / 2][e % 2] = exp2_approx(bound * (sum[e] + rest[e]));
  }

  // Blocks of L and M: the first 16 rows with their own columns, the last 16 with those of the first, and with their
  // own. Eight columns each: so many fragments of an accumulator.
  enum { kFirst, kBetween, kSecond, kParts };
  static constexpr int kPieces = 2 * kParts;
  using Sums = float[kPieces][4];

  // Two channels a lane, 2t and 2t + 1 of eight, of rows `row` and `row + 8` of a block.
  using Channels = float2[2];

  static __device__ __forceinline__ void pack(uint32_t* y, const Channels& x) {
#pragma unroll
    for (int r = 0; r < 2; ++r) y[r] = pack_bf16(x[r].x, x[r].y);
  }
  // By a factor of each channel.
  static __device__ __forceinline__ void scale(Channels& x, const float2& w) {
#pragma unroll
    for (int r = 0; r < 2; ++r) x[r] = {x[r].x * w.x, x[r].y * w.y};
  }

  // A block of L and of M, eight channels of the sum. Columns are packed as rows are.
  static __device__ __forceinline__ void multiply(Sums& L, Sums& M, int part, const uint32_t* k_row,
                                                  const uint32_t* q_row, const uint32_t* columns) {
#pragma unroll
    for (int octet = 0; octet < 2; ++octet) {
      mma_bf16_8(L[2 * part + octet], k_row[0], k_row[1], columns[octet]);
      mma_bf16_8(M[2 * part + octet], q_row[0], q_row[1], columns[octet]);
    }
  }

  // K~, Q~, Kr in place, the chunk's decay, and L and M over this warp's channels, eight at a time. `kn`: 1 / |k| of
  // tokens 8 * i + `row`.
  __device__ __forceinline__ void operands(Operands& x, float* chunk_decay, const float (&kn)[4], Sums& L,
                                           Sums& M) const {
    const uint32_t first = row_place(first_unit());
    chunk_decay += quarter * kWarp + 2 * t;
    const uint4 ones = s.triangle[lane];
    const uint32_t triangle[4] = {ones.x, ones.y, ones.z, ones.w};
#pragma unroll 1
    for (uint32_t i = 0; i < kUnits; ++i) {
      unsigned char* const q_rows = tile_of(x, 0).bytes + (first ^ i << 4);
      unsigned char* const k_rows = q_rows + sizeof(Tile);
      unsigned char* const g_rows = tile_of(x, 2).bytes + (first ^ i << 4);
      uint32_t g[4], k[4], q[4];  // of tokens 8 * j and on
      load_matrices_transposed(g, g_rows);
      load_matrices(k, k_rows);
      load_matrices(q, q_rows);
      float d[kBlocks][2][2];  // the decay through each token, and over each block
      float2 whole[kBlocks];
      const float bias = s.bias[warp][8 * i + row];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        decays(d[b], triangle, g + 2 * b, bias);
        whole[b] = {__shfl_sync(~0u, d[b][1][0], 28 + t), __shfl_sync(~0u, d[b][1][1], 28 + t)};  // of the last row
      }
      if (row == 0)
        *reinterpret_cast<float2*>(chunk_decay + 8 * i) = {whole[0].x * whole[1].x, whole[0].y * whole[1].y};
      uint32_t between[2];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        Channels kd, qd, ki;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float2 kx = unpack_bf16(k[2 * b + r]), qx = unpack_bf16(q[2 * b + r]);
          kd[r] = {kx.x * d[b][r][0], kx.y * d[b][r][1]};
          qd[r] = {qx.x * d[b][r][0], qx.y * d[b][r][1]};
          ki[r] = {kx.x * reciprocal_approx(d[b][r][0]), kx.y * reciprocal_approx(d[b][r][1])};
        }
        uint32_t k_row[2], q_row[2], columns[2];
        pack(k_row, kd);
        pack(q_row, qd);
        pack(columns, ki);
        multiply(L, M, b == 0 ? kFirst : kSecond, k_row, q_row, columns);
        if (b == 1) multiply(L, M, kBetween, k_row, q_row, between);
        scale(ki, whole[b]);
        // Then from the start of the chunk, and to its end.
        if (b == 0) {
          pack(between, ki);
          scale(ki, whole[1]);
        } else {
          scale(kd, whole[0]);
          scale(qd, whole[0]);
        }
        pack(q + 2 * b, qd);
        pack(g + 2 * b, ki);
#pragma unroll
        for (int r = 0; r < 2; ++r) k[2 * b + r] = pack_bf16(kd[r].x * kn[2 * b + r], kd[r].y * kn[2 * b + r]);
      }
      __syncwarp();  // q, k and g are read
      store_matrices(q_rows, q);
      store_matrices(k_rows, k);
      store_matrices(g_rows, g);
    }
  }

  // Sums over all channels --------------------------------------------------------------------------------------------

  // What warp `of` gives to another one: four accumulators in scratch memory, two in the place of X, where L will be.
  __device__ __forceinline__ float4& given(Tile& X, uint32_t of, int piece) const {
    unsigned char* const at =
        piece < 4 ? s.scratch[team][of].bytes + piece * 512 : X.bytes + of * 1024 + (piece - 4) * 512;
    return *reinterpret_cast<float4*>(at + lane * 16);
  }

  // Sums over all channels, of rows `row + 8 * (quarter / 2)`: this warp ends with those of L if `quarter` is even,
  // else of M. First warps 0 and 1, and 2 and 3, exchange L and M, then 0 and 2, and 1 and 3, rows. Into L[..][0..1].
  __device__ __forceinline__ void exchange(Tile& X, Sums& L, const Sums& M) const {
    if (quarter % 2 == 0) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) given(X, quarter, i) = {M[i][0], M[i][1], M[i][2], M[i][3]};
    } else {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        given(X, quarter, i) = {L[i][0], L[i][1], L[i][2], L[i][3]};
#pragma unroll
        for (int e = 0; e < 4; ++e) L[i][e] = M[i][e];
      }
    }
    sync_team();
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const float4 y = given(X, quarter ^ 1, i);
      L[i][0] += y.x, L[i][1] += y.y, L[i][2] += y.z, L[i][3] += y.w;
    }
    __syncwarp();  // taken: what was there may be overwritten
    if (quarter / 2 == 1) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float other = L[i][e];
          L[i][e] = L[i][e + 2], L[i][e + 2] = other;
        }
    }
#pragma unroll
    for (int i = 0; i < kPieces; i += 2) given(X, quarter ^ 1, i / 2) = {L[i][2], L[i][3], L[i + 1][2], L[i + 1][3]};
    sync_team();
#pragma unroll
    for (int i = 0; i < kPieces; i += 2) {
      const float4 y = given(X, quarter ^ 3, i / 2);
      L[i][0] += y.x, L[i][1] += y.y, L[i + 1][0] += y.z, L[i + 1][1] += y.w;
    }
  }

  // Rows and columns of the blocks of the sums.
  static __device__ __forceinline__ constexpr int row_block(int part) { return part == kFirst ? 0 : 1; }
  static __device__ __forceinline__ constexpr int column_block(int part) { return part == kSecond ? 1 : 0; }

  // L, with the factors of its rows, in fp32.
  __device__ __forceinline__ void store_L(Tile& to, const Sums& x, const float* b, const float* kn) const {
    const uint32_t token = row + quarter / 2 * 8, place = triangle_place(token, t / 2, t % 2 * 2);
    const float factor[kBlocks] = {b[token] * kn[token], b[token + kBlock] * kn[token + kBlock]};
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int part = i / 2, I = row_block(part);
      triangle<float2>(to, place, I, 0, column_block(part), 2 * (i % 2)) = {factor[I] * x[i][0], factor[I] * x[i][1]};
    }
  }

  __device__ __forceinline__ void store_M(Tile& to, const Sums& x) const {
    const uint32_t token = row + quarter / 2 * 8, place = swizzled(token, 0) + 4 * t;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int part = i / 2, I = row_block(part), J = column_block(part), octet = i % 2;
      const uint32_t column = 8 * octet + 2 * t;
      // A selection: above the diagonal there may be anything.
      const uint32_t m = I != J ? pack_bf16(x[i][0], x[i][1])
                                : pack_bf16(column <= token ? x[i][0] : 0.f, column < token ? x[i][1] : 0.f);
      *reinterpret_cast<uint32_t*>(to.bytes + (place ^ (2 * J + octet) << 4) + I * kBlock * 128) = m;
    }
  }

  // The n-th own chunk, as soon as it is loaded.
  __device__ __forceinline__ Chunk next(uint32_t n) {
    const Own own(n);
    mark(Stage::kWaitChunk, kPair * n + rank);
    Barrier::wait(&s.bar_loaded[own.parity][own.stage], own.team_parity);
    recompute();
    split_warp();
    return s.own[own.stage];
  }

  // What an ordinary chunk does not need stands outside of the inner loop, as in R.
  __device__ __forceinline__ void run() {
    uint32_t n = team;  // own chunks
    for (Chunk at = next(n); !at.is_end();) {
      if (at.head != s.gate[warp].head) load_gate(at.head);
      if (at.valid() < kChunk) clear_past_end(s.operands[Own(n).stage], at.valid());
      do {
        prepare(at, n);
        at = next(n += kTeams);
      } while (at.valid() == kChunk && at.head == s.gate[warp].head);
    }
    const Own own(n);
    Barrier::arrive(&s.bar_L_ready[own.parity][own.stage]);  // the end
  }

  __device__ __forceinline__ void prepare(const Chunk& at, uint32_t n);
};

// Apart: the code of an ordinary chunk has to be small.
static __device__ __noinline__ float2 unusual_norms(const Params& p, SharedMemoryPlan& s, uint32_t stage, int valid) {
  const Prepare team(p, s, 0);
  return {team.any_inverse_norm(s.operands[stage], 0, valid), team.any_inverse_norm(s.operands[stage], 1, valid)};
}

__device__ __forceinline__ void Prepare::prepare(const Chunk& at, uint32_t n) {
  const Own own(n);
  const uint32_t c = kPair * n + rank;
  Operands& x = s.operands[own.stage];
  mark(Stage::kNorms, c);
  const uint32_t logit = load_beta(at);  // asked for first
  const int valid = at.valid();
#pragma unroll 1
  for (int tensor = 0; tensor < 2; ++tensor) give_squares(x, tensor);
  sync_team();  // squares of all warps
  bool q_ordinary, k_ordinary;
  float2 inverse = {inverse_norm(0, valid, q_ordinary), inverse_norm(1, valid, k_ordinary)};
  if (seldom(!__all_sync(~0u, q_ordinary && k_ordinary))) inverse = unusual_norms(p, s, own.stage, valid);
  if (quarter == 0) s.factors[own.stage].q[lane] = p.scale * inverse.x;
  if (quarter == 1) s.kn[own.stage][lane] = inverse.y;
  float kn[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) kn[i] = __shfl_sync(~0u, inverse.y, 8 * i + row);
  mark(Stage::kOperands, c);
  Sums L = {}, M = {};
  operands(x, s.factors[own.stage].decay, kn, L, M);
  recompute();
  split_warp();
  mark(Stage::kSums, c);
  if (quarter == 2) {
    const float logit_or_none = int(lane) < valid ? unpack_bf16(logit).x : -INFINITY;
    s.b[own.stage][lane] = sigmoid_of_minus(-kLog2E * logit_or_none);
  }
  exchange(x.X, L, M);
  if (quarter % 2 == 0)
    store_L(x.X, L, s.b[own.stage], s.kn[own.stage]);
  else
    store_M(x.M, L);
  fence_async();
  Barrier::arrive(&s.bar_L_ready[own.parity][own.stage]);
}

}  // namespace flash_kda
