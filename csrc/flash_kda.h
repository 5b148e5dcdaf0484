// The C interface of the library: plain pointers, sizes, strides and a stream; no PyTorch.
//
// All device pointers must be on `device`. Strides are in elements; the last dimension has stride 1. What is
// not checked: that pointers are valid, that outputs overlap nothing, that `scale` is finite and `lower_bound` (the
// least log-decay of a token, natural logarithm) in [-5, 0], and that N is B where there is no cu_seqlens.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FLASH_KDA_ABI_VERSION 4
#define FLASH_KDA_API __attribute__((visibility("default")))

typedef enum { FLASH_KDA_NONE = 0, FLASH_KDA_BF16 = 1, FLASH_KDA_FP32 = 2 } flash_kda_state_dtype;

// A bf16 tensor [B, T, H, 128] (or [B, T, H] for beta).
typedef struct {
  void* data;
  int64_t stride_batch, stride_token, stride_head;
} flash_kda_tokens;

// A tensor [N, H, V, K], or a pool [P, H, V, K]. Read and written two elements at a time where data is aligned to two
// elements and strides are even, one at a time elsewhere.
typedef struct {
  void* data;
  int64_t stride_sequence, stride_head, stride_value;
  int32_t dtype;  // flash_kda_state_dtype; FLASH_KDA_NONE: absent, and data is ignored
} flash_kda_state;

// Integers, int32 or int64. Any contents are safe.
typedef struct {
  const void* data;  // null: absent
  int64_t stride_sequence;
  int32_t is_64_bit;
} flash_kda_integers;

// What serving engines ask for besides. All zero: nothing.
typedef struct {
  // [N], or absent: the states are then pools of so many rows, of which sequence n has this one. A negative index, or
  // one past the pool: the initial state is zero, and no final state is written.
  flash_kda_integers state_indices;
  int64_t initial_rows, final_rows;

  // [N, C], or absent: checkpoint_state [N, C, H, V, K] gets the state of sequence n after so many tokens. Offsets that
  // are not above 0, above those before them in their row, and at most the length, are passed over.
  flash_kda_integers checkpoint_offsets;
  int64_t checkpoint_offsets_stride;  // from one checkpoint of a sequence to the next, and so the other one
  flash_kda_state checkpoint_state;
  int64_t checkpoint_state_stride;
  int64_t checkpoints;  // C, less than 2^18
} flash_kda_serving;

typedef struct {
  int32_t abi_version;  // FLASH_KDA_ABI_VERSION
  int32_t heads;        // H
  int64_t batch;        // B
  int64_t tokens;       // T
  int64_t sequences;    // N

  // q, k, g and v are read by TMA: data 16-byte aligned, strides multiples of 8. out likewise (16-byte stores).
  flash_kda_tokens q, k, v, g, beta, out;
  const float* A_log;    // [H]
  const float* dt_bias;  // [H, 128], row stride dt_bias_stride
  int64_t dt_bias_stride;
  // int32 or int64 [N + 1], or null: every batch row is a sequence. Contents are held to [0, T] by the kernel: wrong
  // ones give wrong results, and touch nothing outside the tensors.
  const void* cu_seqlens;
  int32_t cu_seqlens_is_64_bit;

  float scale;
  float lower_bound;
  int32_t device;  // must be the current one
  flash_kda_state initial_state, final_state;

  // States that pass between processors: 16-byte aligned, contents do not matter, for one launch at a time. Null stands
  // for memory that the library keeps for this stream. That spares the launch a memset.
  void* scratch;
  int64_t scratch_bytes;

  flash_kda_serving serving;
} flash_kda_arguments;

// The bytes that `scratch` must have, on a device with this many multiprocessors.
FLASH_KDA_API int64_t flash_kda_scratch_bytes(int processors);

// For tests, of the whole process: 0 which way the kernel goes is its choice, 1 CTAs prepare chunks for themselves and
// their peer, 2 chunks pass through a ring in device memory wherever heads and sequences are few enough. Results are
// the same bits.
FLASH_KDA_API void flash_kda_use_way(int32_t way);

// Launch on `stream` (a cudaStream_t). Returns 0, a cudaError_t, or a flash_kda_error: flash_kda_error_string explains
// it, and no kernel was launched.
FLASH_KDA_API int flash_kda_forward(const flash_kda_arguments* arguments, void* stream);

typedef enum {
  FLASH_KDA_BAD_VERSION = 100001,     // the arguments are of another version of this interface
  FLASH_KDA_NO_TENSOR_MAPS = 100002,  // the driver has no cuTensorMapEncodeTiled
  FLASH_KDA_BAD_TENSOR = 100003,      // TMA cannot read a tensor
  FLASH_KDA_BAD_SCRATCH = 100004,     // too little scratch
  FLASH_KDA_OTHER_DEVICE = 100005,    // another device is current
  // Scratch is null, and the library keeps none for this stream: it is being captured (replays of a graph may overlap
  // other work), it is one of each thread, too many streams have some already, or memory has run out. Pass scratch.
  FLASH_KDA_NEEDS_SCRATCH = 100006,
} flash_kda_error;

FLASH_KDA_API const char* flash_kda_error_string(int error);

#ifdef __cplusplus
}
#endif
