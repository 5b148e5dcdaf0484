// Wrappers of the instructions that CUTLASS has no name for, and of wgmma on arrays.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/util.hpp>
#include <utility>

#include "bits.h"
#include "config.h"

namespace flash_kda {

using cute::cast_smem_ptr_to_uint;

// The compiler must not know that `x` stays the same: what is computed from it is then computed anew each time, instead
// of once for the whole kernel and kept, spilled, in local memory.
__device__ __forceinline__ void forget(uint32_t& x) { asm volatile("" : "+r"(x)); }

// Special functions ---------------------------------------------------------------------------------------------------

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float rsqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Conversions ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// The same of fp16: the tensor core multiplies its 11 bits.
__device__ __forceinline__ uint32_t pack_fp16(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// Shared memory -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void load_matrices(uint32_t (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(cast_smem_ptr_to_uint(row))
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t* d, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(cast_smem_ptr_to_uint(row))
               : "memory");
}

__device__ __forceinline__ void store_matrices(void* row, const uint32_t (&d)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(cast_smem_ptr_to_uint(row)),
               "r"(d[0]), "r"(d[1]), "r"(d[2]), "r"(d[3])
               : "memory");
}

// An 8 x 8 matrix of 16-bit numbers, one register a lane: its rows become its columns.
__device__ __forceinline__ uint32_t transposed(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Device memory, between CTAs -----------------------------------------------------------------------------------------

__device__ __forceinline__ void store_release(uint32_t* to, uint32_t x) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}

__device__ __forceinline__ void store_relaxed(uint32_t* to, uint32_t x) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* from) {
  uint32_t x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
  return x;
}

// Between two looks at memory that others wait to reach as well.
__device__ __forceinline__ void rest(uint32_t nanoseconds) { __nanosleep(nanoseconds); }

// What the counter was, which goes up by one. Not by atomicAdd: the compiler would let the warp wait for it at once.
__device__ __forceinline__ uint32_t count(uint32_t* counter) { return atomicInc(counter, 0x7fffffff); }

// Likewise. Whoever counts last sees what all the others did before they counted.
__device__ __forceinline__ uint32_t count_all(uint32_t* counter) {
  uint32_t x;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(x) : "l"(counter) : "memory");
  return x;
}

// So many bytes, a multiple of 16 as the address is, into the second-level cache.
__device__ __forceinline__ void prefetch(const void* from, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// A tile of a tensor, likewise.
__device__ __forceinline__ void prefetch_tile(const CUtensorMap& map, int channel, int head, int token, int batch) {
  cute::SM90_TMA_LOAD_4D::PREFETCH::copy(&map, channel, head, token, batch);
}

// From shared memory to memory, of one thread: copies, their group, and waits for what has been committed.
__device__ __forceinline__ void store_bulk(void* to, const void* from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
               "r"(cast_smem_ptr_to_uint(from)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void commit_bulk() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// It is read: it may be overwritten.
__device__ __forceinline__ void wait_bulk_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
// It is written.
__device__ __forceinline__ void wait_bulk() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// From memory to shared memory; the bytes count at `barrier`.
__device__ __forceinline__ void load_bulk(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   cast_smem_ptr_to_uint(to)),
               "l"(from), "r"(bytes), "r"(cast_smem_ptr_to_uint(barrier))
               : "memory");
}

// Between what flags in memory say and copies of that memory.
__device__ __forceinline__ void fence_async_memory() { asm volatile("fence.proxy.async;" ::: "memory"); }

// Warp-level MMA ------------------------------------------------------------------------------------------------------

// C = A B + C, or C = A B.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                         bool accumulate) {
  if (accumulate)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.f));
}

// C = A B, of fp16.
__device__ __forceinline__ void mma_fp16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
      : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.f));
}

// C = A B + C, of 8 channels.
__device__ __forceinline__ void mma_bf16_8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(b));
}

__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                         bool accumulate) {
  if (accumulate)
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.f));
}

// Warpgroup MMA -------------------------------------------------------------------------------------------------------

namespace gmma_atoms {
using namespace cute::SM90::GMMA;
// C[64, n] += A[64, 16] B[n, 16]^T
using Rows32 = MMA_64x32x16_F32BF16BF16_RS<Major::K, Major::K>;
using Rows64 = MMA_64x64x16_F32BF16BF16_RS<Major::K, Major::K>;
// C[64, 128] += A[64, 16] B[16, 128]
using Transposed = MMA_64x128x16_F32BF16BF16_RS<Major::K, Major::MN>;
}  // namespace gmma_atoms

// An operand in 128-byte swizzled tiles. K-major: rows of 128 bytes are the M or N index, and groups of eight rows lie
// `kStride` apart. MN-major: rows are the K index, groups of eight rows lie `kStride` apart, and the next 64 elements
// of N `kLeading` apart. Of the descriptor only the lower half differs from place to place, and that by an addition.
template <int kLeading, int kStride>
struct Operand {
  uint32_t low;

  __device__ __forceinline__ constexpr explicit Operand(uint32_t address)
      : low(((address & 0x3ffff) >> 4) + (kLeading >> 4 << 16)) {}
  __device__ __forceinline__ explicit Operand(const void* rows) : Operand(cast_smem_ptr_to_uint(rows)) {}

  __device__ __forceinline__ constexpr uint64_t at(int bytes) const {
    return uint64_t((1u << 30) + (kStride >> 4)) << 32 | (low + (bytes >> 4));
  }
};

// Tiles whose rows are rows or columns of the product, and tiles whose rows are summed over.
using KMajor = Operand<16, 1024>;  // the first number means nothing here
using MNMajor = Operand<kTileBytes, 1024>;
constexpr int kKMajorStep = 32;             // bytes from one k-step of 16 elements to the next, within a tile
constexpr int kMNMajorStep = kBlock * 128;  // the same, over all tiles

template <class Atom, size_t... I>
__device__ __forceinline__ void gmma_expand(float* c, const uint32_t* a, uint64_t b, bool accumulate,
                                            std::index_sequence<I...>) {
  Atom::fma(a[0], a[1], a[2], a[3], b, c[I]...,
            accumulate ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero);
}

// C += A B or C = A B, 16 elements of the sum; `a`: the left operand's four registers.
template <class Atom, int kAccumulators>
__device__ __forceinline__ void gmma(float (&c)[kAccumulators], const uint32_t* a, uint64_t b, bool accumulate) {
  gmma_expand<Atom>(c, a, b, accumulate, std::make_index_sequence<kAccumulators>{});
}

template <class T, int N>
__device__ __forceinline__ void gmma_fence(T (&c)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) cute::warpgroup_fence_operand(c[i]);
}

// Barriers ------------------------------------------------------------------------------------------------------------

// What a barrier orders, the compiler must not reorder either. CUTLASS's functions do not tell it: nothing in them says
// that memory is touched.
__device__ __forceinline__ void keep_order() { asm volatile("" ::: "memory"); }

struct Barrier {
  using Mbarrier = cutlass::arch::ClusterTransactionBarrier;

  static __device__ __forceinline__ void init(uint64_t* barrier, int arrivals) { Mbarrier::init(barrier, arrivals); }

  static __device__ __forceinline__ void wait(uint64_t* barrier, uint32_t parity) {
    Mbarrier::wait(barrier, parity);
    keep_order();
  }

  static __device__ __forceinline__ void arrive(uint64_t* barrier) {
    keep_order();
    Mbarrier::arrive(barrier);
  }

  // At the barrier of the CTA `rank` of the cluster, if `does`.
  static __device__ __forceinline__ void arrive(uint64_t* barrier, int rank, bool does) {
    keep_order();
    Mbarrier::arrive(barrier, rank, does);
  }

  // The phase then also waits for copies of so many bytes.
  static __device__ __forceinline__ void arrive_and_expect(uint64_t* barrier, int bytes) {
    keep_order();
    Mbarrier::arrive_and_expect_tx(barrier, bytes);
  }
};

__device__ __forceinline__ void sync_cluster() {
  keep_order();
  cute::cluster_sync();
  keep_order();
}

__device__ __forceinline__ void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// What this thread has written to shared memory is visible to TMA and wgmma from here on; for the compiler too.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// One arrival for the whole warp: it has done with what it read.
__device__ __forceinline__ void warp_done(uint64_t* barrier) {
  __syncwarp();
  if ((threadIdx.x & 31) == 0) Barrier::arrive(barrier);
}

// The same after everything its threads wrote to shared memory; the writes become visible to TMA and wgmma as well.
__device__ __forceinline__ void warp_arrive(uint64_t* barrier) {
  fence_async();
  warp_done(barrier);
}

// The other CTA of the cluster --------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t peer_address(const void* here) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(there)
      : "r"(cast_smem_ptr_to_uint(here)), "r"(cute::block_rank_in_cluster() ^ 1));
  return there;
}

// What the first CTA of the cluster has here.
__device__ __forceinline__ uint32_t of_first_cta(const uint32_t* here) {
  uint32_t x;
  asm volatile("{.reg .b32 there; mapa.shared::cluster.u32 there, %1, 0; ld.shared::cluster.u32 %0, [there];}"
               : "=r"(x)
               : "r"(cast_smem_ptr_to_uint(here))
               : "memory");
  return x;
}

// Copy to where the peer has `to`, and count the bytes at its `barrier`.
__device__ __forceinline__ void copy_to_peer(const void* from, const void* to, int bytes, const uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   peer_address(to)),
               "r"(cast_smem_ptr_to_uint(from)), "r"(bytes), "r"(peer_address(barrier))
               : "memory");
}

}  // namespace flash_kda
