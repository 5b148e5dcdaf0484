// Tile sizes, roles and registers of the kernel.
#pragma once

#include <stdint.h>

namespace flash_kda {

constexpr int kChunk = 32;  // tokens
constexpr int kBlock = 16;  // tokens of a block: exponents are anchored per block
constexpr int kBlocks = kChunk / kBlock;
constexpr int kHeadDim = 128;               // K and V
constexpr int kHalf = 64;                   // channels of a 128-byte swizzled tile
constexpr int kPair = 2;                    // CTAs of a cluster, which share a head
constexpr int kColumns = kHeadDim / kPair;  // value columns of a CTA
constexpr int kShort = 16;                  // tokens of the longest sequence that short.h computes
static_assert(kBlocks == 2, "P and X have two blocks written out");

constexpr int kWarp = 32;
constexpr int kWarpgroup = 128;
constexpr int kWarpgroupWarps = kWarpgroup / kWarp;

// Roles by warp: R 0..3, P 4..11, loads 12, copies 13, X 14 and 15. The last four share a warpgroup, and so its
// registers. The two warpgroups of P are teams: each prepares every second one of the CTA's own chunks, and has an X of
// its own.
constexpr int kTeams = 2;
constexpr int kRecurWarps = kWarpgroupWarps;
constexpr int kTeamWarps = kWarpgroupWarps;
constexpr int kFirstPrepareWarp = kRecurWarps;
constexpr int kLoadWarp = kFirstPrepareWarp + kTeams * kTeamWarps;
constexpr int kCopyWarp = kLoadWarp + 1;
constexpr int kFirstInvertWarp = kCopyWarp + 1;
constexpr int kThreads = (kFirstInvertWarp + kTeams) * kWarp;
static_assert(kThreads == 4 * kWarpgroup, "whole warpgroups");

// Registers of a thread. All are launched with 128: R and P take exactly what the last warpgroup gives back, and would
// wait for ever if there were one less.
constexpr int kRecurRegisters = 192;
constexpr int kPrepareRegisters = 128;
constexpr int kLastRegisters = 64;
// Where R has a CTA alone, P's warps have nothing to do.
constexpr int kRecurApartRegisters = 240;
constexpr int kIdleRegisters = 24;
static_assert(kRecurApartRegisters + 2 * kIdleRegisters + kLastRegisters <= 65536 / kWarpgroup, "register file");
static_assert(kRecurRegisters + 2 * kPrepareRegisters + kLastRegisters <= 65536 / kWarpgroup, "register file");

// Named barriers, by hardware number; those of P for each team.
constexpr int kBarrierRecur = 1;
constexpr int kBarrierTeam = 2;   // to 3: its four warps
constexpr int kBarrierShort = 4;  // to 5: a group of warps that works on a short sequence, before the roles

// 32 rows x 128 bytes, 16-byte units XORed with the row (the 128-byte swizzle of TMA and wgmma).
constexpr int kTileBytes = kChunk * 128;
struct alignas(1024) Tile {
  unsigned char bytes[kTileBytes];
};

// The operands of a chunk.
struct Operands {
  // P writes them in the place of what was loaded, for each half of the channels. The first two are side by side: R
  // multiplies by both at once.
  struct {
    Tile q;  // q, then Q~
    Tile k;  // k, then K~, then W
  } of[2];
  // X b as the sum of two numbers of bf16: a row has 32 columns of the first, then 32 of the second. Before, that row
  // of L, then X, in fp32 (triangle.h).
  Tile X;
  Tile g[2];  // g, then Kr
  Tile M;     // of 128 bytes a row, the first 64
};

// What channels and rows of a chunk are multiplied by in R.
struct Factors {
  float decay[kHeadDim];  // exp(G_C)
  float q[kChunk];        // scale / |q|
};
constexpr int kPreparedBytes = sizeof(Operands) + sizeof(Factors);  // of a chunk

}  // namespace flash_kda
