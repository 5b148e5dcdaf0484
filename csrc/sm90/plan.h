// The shared-memory plan: a type, not arithmetic on byte offsets.
#pragma once

#include "config.h"
#include "walk.h"

namespace flash_kda {

struct SharedMemoryPlan {
  Slot slots[kSlots];
  Tile X[2];  // fp32 (tf32) [64 rows, 64 columns]: two tiles of 32 columns. Holds L before X. Upper blocks stay zero.
  Tile M[2];  // likewise
  // One 4 KB region per preparing warp (block, half of the channels): decays from the start of the block, fp32
  // [16 tokens, 64 channels]; afterwards the first half holds the column operand of L and M, fp16, while the decays
  // of the last token stay readable.
  unsigned char scratch[8][4096];
  Tile v[kValueSlots];       // bf16 [64 tokens, 64 columns]; later the output tile
  float decay[2][kHeadDim];  // exp(G_C), by parity of the chunk
  float b[2][kChunk];        // sigmoid(beta), by parity of the chunk
  // Powers of two (bf16) that operands leave out, by parity of the chunk, see `Prepare::units`
  uint16_t q_unit[2][kChunk];       // rows of both Q~ and M
  uint16_t Q_unit[2][kChunk];       // rows of Q~ alone
  uint16_t K_unit[2][kChunk];       // rows of K~
  uint16_t Kr_unit[2][kChunk];      // rows of Kr
  uint16_t column_unit[2][kChunk];  // columns of L and M outside their own block

  Chunk chunks[kSlots];
  Walk walk;  // the loader's; here to spare registers

  uint64_t bar_qkg_loaded[kSlots];  // and chunks[]
  uint64_t bar_slot_free[kSlots];   // every warp has done with it
  uint64_t bar_v_loaded[kValueSlots];
  uint64_t bar_operands_ready[2];  // Q~, K~, Kr, decay and b, by parity of the chunk
  uint64_t bar_L_ready;
  uint64_t bar_XM_ready;
  uint64_t bar_XM_free;
};
static_assert(sizeof(SharedMemoryPlan) <= 232448, "227 KB of shared memory a CTA");

}  // namespace flash_kda
