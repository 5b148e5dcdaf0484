// The whole contract between host and device: one plain struct, passed by value.
#pragma once

#include <cuda.h>
#include <stdint.h>

#include "flash_kda.h"

namespace flash_kda {

struct Params {
  // Tiles of 32 tokens x 64 channels of one head, 128-byte swizzle. Coordinates: channel, head, token, batch row.
  CUtensorMap q, k, g, v;
  // The same tensors as memory, for short sequences.
  flash_kda_tokens q_rows, k_rows, g_rows, v_rows;

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

  // Zero at the start of the launch, and again at its end: how many clusters have started, how many have ended, and
  // whether a state is there, [clusters * 2].
  uint32_t* started;
  uint32_t* ended;
  uint32_t* handed_over;
  float* handover;  // states that pass from one cluster to the next, [clusters * 2, 64 * 128] as R's registers lie

  float scale;
  float lower_bound;
};

constexpr int kCounters = 2;  // `started` and `ended`, in front of `handed_over`

// All but the tensor maps and the memory between clusters.
inline Params to_params(const flash_kda_arguments& a) {
  Params p{};
  p.q_rows = a.q, p.k_rows = a.k, p.g_rows = a.g, p.v_rows = a.v;
  p.beta = static_cast<const uint16_t*>(a.beta.data);
  p.beta_stride_batch = a.beta.stride_batch;
  p.beta_stride_token = a.beta.stride_token;
  p.beta_stride_head = a.beta.stride_head;
  p.out = static_cast<uint16_t*>(a.out.data);
  p.out_stride_batch = a.out.stride_batch;
  p.out_stride_token = a.out.stride_token;
  p.out_stride_head = a.out.stride_head;
  p.A_log = a.A_log;
  p.dt_bias = a.dt_bias;
  p.dt_bias_stride = a.dt_bias_stride;
  p.cu_seqlens = a.cu_seqlens;
  p.cu_seqlens_is_64_bit = a.cu_seqlens_is_64_bit != 0;
  p.tokens = a.tokens;
  p.sequences = a.sequences;
  p.heads = a.heads;
  if (a.initial_state.dtype != FLASH_KDA_NONE) {
    p.initial_state = a.initial_state.data;
    p.initial_stride_sequence = a.initial_state.stride_sequence;
    p.initial_stride_head = a.initial_state.stride_head;
    p.initial_stride_value = a.initial_state.stride_value;
    p.initial_is_fp32 = a.initial_state.dtype == FLASH_KDA_FP32;
  }
  if (a.final_state.dtype != FLASH_KDA_NONE) {
    p.final_state = a.final_state.data;
    p.final_stride_sequence = a.final_state.stride_sequence;
    p.final_stride_head = a.final_state.stride_head;
    p.final_stride_value = a.final_state.stride_value;
    p.final_is_fp32 = a.final_state.dtype == FLASH_KDA_FP32;
  }
  p.scale = a.scale;
  p.lower_bound = a.lower_bound;

  return p;
}

}  // namespace flash_kda
