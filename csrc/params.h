// The whole contract between host and device: one plain struct, passed by value.
#pragma once

#include <cuda.h>
#include <stdint.h>

#include "flash_kda.h"

namespace flash_kda {

// Who prepares chunks: the two CTAs that recur on them, or others, which pass them through a ring. kAny: what is
// faster, as the kernel estimates.
enum class Way { kAny, kPair, kRing };

constexpr int kRingSlots = 320;
constexpr int kMostSlots = 16;  // of an item, a head of a sequence
constexpr int kMostItems = 40;

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

  const void* initial_state;  // [N, H, V, K], with state_indices [initial_rows, H, V, K], or null
  int64_t initial_stride_sequence, initial_stride_head, initial_stride_value;
  void* final_state;  // [N, H, V, K], with state_indices [final_rows, H, V, K], or null
  int64_t final_stride_sequence, final_stride_head, final_stride_value;
  bool initial_is_fp32, final_is_fp32;
  bool initial_in_pairs, final_in_pairs;  // addresses and strides allow it

  const void* state_indices;  // [N] or null
  int64_t state_indices_stride;
  bool state_indices_are_64_bit;
  int64_t initial_rows, final_rows;

  const void* checkpoint_offsets;  // [N, C] or null
  int64_t offsets_stride_sequence, offsets_stride_checkpoint;
  bool offsets_are_64_bit;
  int checkpoints;         // C
  void* checkpoint_state;  // [N, C, H, V, K]
  int64_t checkpoint_stride_sequence, checkpoint_stride, checkpoint_stride_head, checkpoint_stride_value;
  bool checkpoint_is_fp32, checkpoint_in_pairs;

  // Zero at the start of the launch, and again at its end: how many clusters have started, how many have ended, and
  // whether a state is there, [clusters * 2].
  uint32_t* started;
  uint32_t* ended;
  uint32_t* handed_over;
  float* handover;  // states that pass from one cluster to the next, [clusters * 2, 64 * 128] as R's registers lie
  float* kept;      // likewise, states that R keeps while it works on a part of a chunk

  // Prepared chunks that pass through device memory (sm90/ring.h), and which way the call goes. Flags and counts are
  // zero at the start of the launch, and again at its end.
  Way way;
  int ring_clusters;     // of the launch that goes through the ring; none if there is no such launch
  int ring_slots;        // at most kRingSlots
  unsigned char* ring;   // [ring_slots, kPreparedBytes]
  uint32_t* ring_ready;  // [ring_slots]: chunks that have come to a place
  uint32_t* ring_taken;  // [kMostItems, 2]: chunks that a CTA has taken

  float scale;
  float lower_bound;
};

constexpr int kCounters = 2;  // `started` and `ended`, in front of `handed_over`

// Whether a state can be read and written two elements at a time. `other_stride` is one more that counts.
inline bool in_pairs(const flash_kda_state& x, int64_t other_stride = 0) {
  const uint64_t bytes = x.dtype == FLASH_KDA_FP32 ? 8 : 4;
  return reinterpret_cast<uint64_t>(x.data) % bytes == 0 &&
         (x.stride_sequence | x.stride_head | x.stride_value | other_stride) % 2 == 0;
}

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
    p.initial_in_pairs = in_pairs(a.initial_state);
  }
  if (a.final_state.dtype != FLASH_KDA_NONE) {
    p.final_state = a.final_state.data;
    p.final_stride_sequence = a.final_state.stride_sequence;
    p.final_stride_head = a.final_state.stride_head;
    p.final_stride_value = a.final_state.stride_value;
    p.final_is_fp32 = a.final_state.dtype == FLASH_KDA_FP32;
    p.final_in_pairs = in_pairs(a.final_state);
  }
  const flash_kda_serving& e = a.serving;
  p.state_indices = e.state_indices.data;
  p.state_indices_stride = e.state_indices.stride_sequence;
  p.state_indices_are_64_bit = e.state_indices.is_64_bit != 0;
  p.initial_rows = e.initial_rows;
  p.final_rows = e.final_rows;
  if (e.checkpoint_offsets.data != nullptr && e.checkpoint_state.dtype != FLASH_KDA_NONE && e.checkpoints > 0) {
    p.checkpoint_offsets = e.checkpoint_offsets.data;
    p.offsets_stride_sequence = e.checkpoint_offsets.stride_sequence;
    p.offsets_stride_checkpoint = e.checkpoint_offsets_stride;
    p.offsets_are_64_bit = e.checkpoint_offsets.is_64_bit != 0;
    p.checkpoints = static_cast<int>(e.checkpoints);
    p.checkpoint_state = e.checkpoint_state.data;
    p.checkpoint_stride_sequence = e.checkpoint_state.stride_sequence;
    p.checkpoint_stride = e.checkpoint_state_stride;
    p.checkpoint_stride_head = e.checkpoint_state.stride_head;
    p.checkpoint_stride_value = e.checkpoint_state.stride_value;
    p.checkpoint_is_fp32 = e.checkpoint_state.dtype == FLASH_KDA_FP32;
    p.checkpoint_in_pairs = in_pairs(e.checkpoint_state, e.checkpoint_state_stride);
  }
  p.scale = a.scale;
  p.lower_bound = a.lower_bound;

  return p;
}

}  // namespace flash_kda
