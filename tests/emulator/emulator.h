// A CUDA cluster on a CPU: enough of the language and of the hardware to run the kernel as it is written.
//
// Every CUDA thread is a fiber. Warps run in random order, the lanes of each forwards or backwards, and a fiber is left
// only where it waits for others: at a collective instruction, a barrier, an mbarrier. Copies (TMA, cp.async.bulk) are
// done late, at a random moment before somebody must see them; wgmma reads its right operand as late as
// `warpgroup_wait` allows. So a missing wait shows as a wrong result for some seed, and a barrier that is never reached
// as a deadlock. What it does not know: the proxies of the memory model (fences), registers, and time.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "fragments.h"

using std::max;
using std::min;

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define __CUDA_ARCH_FEAT_SM90_ALL

struct Dim {
  unsigned x;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace emulator {

constexpr int kWarpSize = 32;

struct Thread;
Thread& self();
Dim thread_index();
Dim block_index();
Dim grid_size();
unsigned char* shared_memory();
void sync(int barrier, int threads);
void cluster_sync();
void yield();
void later(std::function<void()> copy);  // done at some moment, before a deadlock is declared
[[noreturn]] void fail(const char* what);
// A copy to memory, in two steps at random moments: it reads, then it writes.
void store_later(void* to, const void* from, int bytes);
// Until all those of this thread have read, or have written.
void wait_stores(bool only_read);

// All 32 lanes meet; the last to come calls `work` with what each lane has brought.
void collective(void* mine, const std::function<void(void* (&)[kWarpSize])>& work);
int lane();
// This address in the shared memory of a CTA of the cluster.
void* in_cta(const void* here, unsigned rank);
unsigned rank();

// wgmma: an instruction, an operand in shared memory, and a product that has been asked for.
struct Atom {
  int columns;
  bool left_transposed, right_transposed;  // rows of the operand's tiles are summed over
  int sign;
};
struct InTiles {
  const unsigned char* rows;  // null: the operand is in registers
  int leading, stride;
};
struct Gmma {
  float* c;
  Atom atom;
  uint32_t a[4];
  InTiles left, right;
  bool accumulate;
  int group;
};
void gmma_push(Gmma product);
void gmma_commit();
void gmma_wait(int pending);

inline float from_bf16(uint32_t x) {
  const uint32_t bits = x << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

inline uint32_t to_bf16(float x) {  // to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline uint32_t to_fp16(float x) {  // to nearest, ties to even
  const float size = std::fabs(x);
  if (x != x) return 0x7fff;
  if (size >= 65520) return (x < 0 ? 0x8000 : 0) | 0x7c00;
  int exponent = -13;
  if (size > 0) std::frexp(size, &exponent);
  exponent = std::max(exponent, -13);                                   // below, numbers lie as far apart as there
  const float units = std::nearbyint(std::ldexp(size, 11 - exponent));  // of the last bit
  return (x < 0 ? 0x8000 : 0) | uint32_t(units + ((exponent + 13) << 10));
}

inline float from_fp16(uint32_t bits) {
  const int exponent = bits >> 10 & 31;
  const float units = (bits & 1023) + (exponent ? 1024 : 0);
  const float size = exponent == 31 ? INFINITY : std::ldexp(units, std::max(exponent, 1) - 25);
  return bits & 0x8000 ? -size : size;
}

inline float truncated(uint32_t bits) {  // as the tensor cores read tf32
  bits &= ~0x1fffu;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }

}  // namespace emulator

#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define gridDim (emulator::grid_size())

inline void __syncthreads() { emulator::sync(0, 512); }
inline void __syncwarp() {
  emulator::collective(nullptr, [](void*(&)[32]) {});
}
inline void __threadfence() {}
struct alignas(8) uint2 {
  uint32_t x, y;
};
inline void __trap() { emulator::fail("trap"); }
template <class T>
T __shfl_sync(unsigned, T x, int from) {
  // every lane names its own source
  struct Brought {
    T in, out;
    int from;
  } mine{x, x, from};
  emulator::collective(&mine, [](void*(&all)[32]) {
    for (void* one : all) {
      Brought* b = static_cast<Brought*>(one);
      b->out = static_cast<Brought*>(all[b->from & 31])->in;
    }
  });
  return mine.out;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int lanes) {
  return __shfl_sync(mask, x, emulator::lane() ^ lanes);
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, int lanes) {
  return __shfl_sync(mask, x, emulator::lane() >= lanes ? emulator::lane() - lanes : emulator::lane());
}
inline bool __all_sync(unsigned mask, bool x) {
  int all = x;
  for (int lanes = 1; lanes < 32; lanes *= 2) all &= __shfl_xor_sync(mask, all, lanes);
  return all;
}
inline bool __any_sync(unsigned mask, bool x) { return !__all_sync(mask, !x); }
inline unsigned __ballot_sync(unsigned mask, bool x) {
  unsigned all = unsigned(x) << emulator::lane();
  for (int lanes = 1; lanes < 32; lanes *= 2) all |= __shfl_xor_sync(mask, all, lanes);
  return all;
}
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }
inline float __uint_as_float(uint32_t x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t y;
  memcpy(&y, &x, 4);
  return y;
}
template <class T>
T __ldcg(const T* x) {
  return *x;
}
template <class T>
void __stcg(T* to, const T& x) {
  *to = x;
}

// A tensor map: the tensor itself.
struct CUtensorMap {
  const uint16_t* data;
  int64_t sizes[4], strides[4];  // channel, head, token, batch; in elements
};

namespace cutlass::arch {
inline void fence_barrier_init() {}
template <int>
void warpgroup_reg_alloc() {}
template <int>
void warpgroup_reg_dealloc() {}
}  // namespace cutlass::arch

namespace cute {
inline unsigned block_rank_in_cluster() { return emulator::rank(); }
inline uint64_t cast_smem_ptr_to_uint(const void* p) { return reinterpret_cast<uint64_t>(p); }
inline void warpgroup_arrive() {}
inline void warpgroup_commit_batch() { emulator::gmma_commit(); }
template <int kPending>
void warpgroup_wait() {
  emulator::gmma_wait(kPending);
}
namespace TMA {
enum class CacheHintSm90 { EVICT_NORMAL };
}
struct SM90_TMA_LOAD_4D {
  static void copy(const CUtensorMap* map, uint64_t* barrier, uint64_t, void* tile, int channel, int head, int token,
                   int batch);
};
}  // namespace cute
