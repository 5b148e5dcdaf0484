// Tile sizes, roles and registers of the kernel.
#pragma once

#include <stdint.h>

namespace flash_kda {

constexpr int kChunk = 64;  // tokens
constexpr int kBlock = 16;  // tokens of a block: exponents are anchored per block
constexpr int kBlocks = kChunk / kBlock;
constexpr int kTriangleBlocks = kBlocks * (kBlocks + 1) / 2;
constexpr int kHeadDim = 128;               // K and V
constexpr int kHalf = 64;                   // channels of a 128-byte swizzled tile
constexpr int kPair = 2;                    // CTAs of a cluster, which share a head
constexpr int kColumns = kHeadDim / kPair;  // value columns of a CTA

constexpr int kWarp = 32;
constexpr int kWarpgroup = 128;
constexpr int kWarpgroupWarps = kWarpgroup / kWarp;

// Roles by warp: R 0..3, P 4..11, loads 12, rows 13, X 14 and 15. The last four share a warpgroup, and so its
// registers.
constexpr int kRecurWarps = kWarpgroupWarps;
constexpr int kPrepareWarps = 2 * kWarpgroupWarps;
constexpr int kInvertWarps = 2;
constexpr int kFirstPrepareWarp = kRecurWarps;
constexpr int kLoadWarp = kFirstPrepareWarp + kPrepareWarps;
constexpr int kRowsWarp = kLoadWarp + 1;
constexpr int kFirstInvertWarp = kRowsWarp + 1;
constexpr int kThreads = (kFirstInvertWarp + kInvertWarps) * kWarp;
static_assert(kThreads == 4 * kWarpgroup, "whole warpgroups");

// Registers of a thread. All are launched with 128: R and P take exactly what the last warpgroup gives back, and would
// wait for ever if there were one less.
constexpr int kRecurRegisters = 176;
constexpr int kPrepareRegisters = 136;
constexpr int kLastRegisters = 64;
static_assert(kRecurRegisters + 2 * kPrepareRegisters + kLastRegisters <= 65536 / kWarpgroup, "register file");

// Named barriers, by hardware number.
constexpr int kBarrierPrepare = 1;     // all of P
constexpr int kBarrierHalf = 2;        // and 3: P's warps of one half of the channels
constexpr int kBarrierWarpgroup = 4;   // and 5: one warpgroup of P
constexpr int kBarrierInvert = 6;      // X
constexpr int kBarrierRecur = 7;

// 64 rows x 128 bytes, 16-byte units XORed with the row (the 128-byte swizzle of TMA and wgmma).
constexpr int kTileBytes = kChunk * 128;
struct alignas(1024) Tile {
  unsigned char bytes[kTileBytes];
};

// The operands of a chunk that have channels. P writes them in the place of q, k and g as loaded.
struct Slot {
  Tile q[2];  // q, then Q~ [half of the channels]
  Tile k[2];  // k, then K~, then W
  Tile g[2];  // g, then G of some tokens, then Kr
};

// The operands of a chunk that have tokens alone: X b as the sum of two numbers of bf16, and M. Before, L and X in fp32
// are in the place of X b (triangle.h).
struct Triangles {
  Tile X_high, X_low, M;
};

// What channels and rows of a chunk are multiplied by in R.
struct Factors {
  float decay[kHeadDim];  // exp(G_C)
  float q[kChunk];        // scale / |q|
};

}  // namespace flash_kda
