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

// Roles by warp: R 0..3, P 4..11, X 12 and 13, the loads 14, the keys 15. The last three share a warpgroup, and so its
// registers.
constexpr int kRecurWarps = kWarpgroupWarps;
constexpr int kPrepareWarps = 2 * kWarpgroupWarps;
constexpr int kInvertWarps = 2;
constexpr int kFirstPrepareWarp = kRecurWarps;
constexpr int kFirstInvertWarp = kFirstPrepareWarp + kPrepareWarps;
constexpr int kLoadWarp = kFirstInvertWarp + kInvertWarps;
constexpr int kKeysWarp = kLoadWarp + 1;
constexpr int kThreads = (kKeysWarp + 1) * kWarp;
static_assert(kThreads == 4 * kWarpgroup, "whole warpgroups");

// Registers of a thread. All are launched with those of P: R takes exactly what the last warpgroup gives back, and
// would wait for ever if there were one less.
constexpr int kRecurRegisters = 192;
constexpr int kPrepareRegisters = 128;
constexpr int kLastRegisters = 64;
static_assert(kRecurRegisters + 2 * kPrepareRegisters + kLastRegisters <= 65536 / kWarpgroup, "register file");

// Named barriers, by hardware number.
constexpr int kBarrierPrepare = 1;
constexpr int kBarrierHalf = 2;   // and 3: P's warps of one half of the channels
constexpr int kBarrierBlock = 4;  // to 7: the two warps of a block
constexpr int kBarrierRecur = 8;
constexpr int kBarrierInvert = 9;

// 64 rows x 128 bytes, 16-byte units XORed with the row (the 128-byte swizzle of TMA and wgmma).
constexpr int kTileBytes = kChunk * 128;
struct alignas(1024) Tile {
  unsigned char bytes[kTileBytes];
};

// q, k, g as loaded; prepared in place: Q~, K~ and Kr. [half of the channels]
struct Slot {
  Tile q[2], k[2], g[2];
};

// X: fp32 [64 rows, 64 columns] without the quarter that is zero: columns 0..31 of all rows, then columns 32..63 of
// rows 32..63; rows of 128 bytes, 128-byte swizzle.
constexpr int kTriangleBytes = kTileBytes + kTileBytes / 2;
struct alignas(1024) Triangle {
  unsigned char bytes[kTriangleBytes];
};

// What rows and channels of a chunk are multiplied by. With the model's kn = 1 / |k| and qn = 1 / |q|:
struct Factors {
  float decay[kHeadDim];  // exp(G_C)
  float b[kChunk];        // sigmoid(beta)
  float bk[kChunk];       // b kn
  float q[kChunk];        // scale qn
};

}  // namespace flash_kda
