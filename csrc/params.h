// The whole contract between host and device: one plain struct, passed by value.
#pragma once

#include <cuda.h>
#include <stdint.h>

namespace flash_kda {

struct Params {
  // Tiles of 64 tokens x 64 channels of one head, 128-byte swizzle. Coordinates: channel, head, token, batch row.
  CUtensorMap q, k, g, v;

  const uint16_t* beta;  // bf16 [B, T, H]
  int64_t beta_stride_batch, beta_stride_token, beta_stride_head;
  uint16_t* out;  // bf16 [B, T, H, 128]
  int64_t out_stride_batch, out_stride_token, out_stride_head;

  const float* A_log;    // [H]
  const float* dt_bias;  // [H, 128]
  int64_t dt_bias_stride;

  const void* cu_seqlens;  // [N + 1] or null
  bool cu_seqlens_is_64_bit;
  int64_t tokens;     // T
  int64_t sequences;  // N
  int heads;          // H

  const void* initial_state;  // [N, H, V, K] or null
  int64_t initial_stride_sequence, initial_stride_head, initial_stride_value;
  void* final_state;  // [N, H, V, K] or null
  int64_t final_stride_sequence, final_stride_head, final_stride_value;
  bool initial_is_fp32, final_is_fp32;

  float scale;
  float lower_bound;
};

}  // namespace flash_kda
