// The instructions of csrc/sm90/ptx.h, for the emulator.
#pragma once

#include "emulator.h"

#include "bits.h"
#include "config.h"

namespace flash_kda {

using cute::cast_smem_ptr_to_uint;

inline void forget(uint32_t&) {}
inline float exp2_approx(float x) { return emulator::flushed(std::exp2(emulator::flushed(x))); }
inline float reciprocal_approx(float x) { return emulator::flushed(1.f / x); }
inline float rsqrt_approx(float x) { return 1.f / std::sqrt(x); }
inline uint32_t pack_bf16(float low, float high) { return emulator::to_bf16(low) | emulator::to_bf16(high) << 16; }
inline uint32_t pack_fp16(float low, float high) { return emulator::to_fp16(low) | emulator::to_fp16(high) << 16; }

// Four matrices of 8 x 8; lane l names row l % 8 of matrix l / 8.
struct Matrices {
  const unsigned char* row;
  uint32_t* d;
};

template <bool kStore, bool kTransposed>
void move_matrices(uint32_t* d, const void* row) {
  Matrices mine{static_cast<const unsigned char*>(row), d};
  emulator::collective(&mine, [](void*(&all)[32]) {
    for (int m = 0; m < 4; ++m)
      for (int i = 0; i < 8; ++i)
        for (int j = 0; j < 8; ++j) {
          unsigned char* memory = const_cast<unsigned char*>(static_cast<Matrices*>(all[m * 8 + i])->row) + j * 2;
          const emulator::Place at = emulator::matrix(i, j, kTransposed);
          uint32_t* in = static_cast<Matrices*>(all[at.lane])->d + m;
          unsigned char* held = reinterpret_cast<unsigned char*>(in) + at.value * 2;
          memcpy(kStore ? memory : held, kStore ? held : memory, 2);
        }
  });
}
inline void load_matrices(uint32_t (&d)[4], const void* row) { move_matrices<false, false>(d, row); }
inline void load_matrices_transposed(uint32_t* d, const void* row) { move_matrices<false, true>(d, row); }
inline void store_matrices(void* row, const uint32_t (&d)[4]) {
  move_matrices<true, false>(const_cast<uint32_t*>(d), row);
}

inline uint32_t transposed(uint32_t x) {
  struct Brought {
    uint32_t in, out;
  } mine{x, 0};
  emulator::collective(&mine, [](void*(&all)[32]) {
    for (int i = 0; i < 8; ++i)
      for (int j = 0; j < 8; ++j) {
        const emulator::Place from = emulator::matrix(i, j, false), to = emulator::matrix(i, j, true);
        const uint32_t half = static_cast<Brought*>(all[from.lane])->in >> 16 * from.value & 0xffff;
        static_cast<Brought*>(all[to.lane])->out |= half << 16 * to.value;
      }
  });
  return mine.out;
}

inline void store_release(uint32_t* to, uint32_t x) { *to = x; }
inline void store_relaxed(uint32_t* to, uint32_t x) { *to = x; }
inline uint32_t load_acquire(const uint32_t* from) {
  emulator::yield();
  return *from;
}

inline void rest(uint32_t) {}

inline void prefetch(const void*, int) {}
inline void prefetch_tile(const CUtensorMap&, int, int, int, int) {}

// Bulk copies of one thread to memory: those asked for and not done yet, and when they read what they copy.
inline void store_bulk(void* to, const void* from, int bytes) { emulator::store_later(to, from, bytes); }
inline void commit_bulk() {}
inline void wait_bulk_read() { emulator::wait_stores(true); }
inline void wait_bulk() { emulator::wait_stores(false); }
inline void fence_async_memory() {}

inline uint32_t count(uint32_t* counter) { return (*counter)++; }
inline uint32_t count_all(uint32_t* counter) { return (*counter)++; }

struct Product {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

// C = A B + C of two-byte numbers.
template <float kFrom(uint32_t)>
void mma_16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Product mine{c, a, {b0, b1}};
  emulator::collective(&mine, [](void*(&all)[32]) {
    const auto at = [&](int l) { return static_cast<Product*>(all[l]); };
    const auto half = [](uint32_t x, int odd) { return double(kFrom(odd ? x >> 16 : x & 0xffff)); };
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 8; ++j) {
        double sum = 0;
        for (int k = 0; k < 16; ++k) {
          const emulator::Place l = emulator::left_bf16(i, k), r = emulator::right_bf16(j, k);
          sum += half(at(l.lane)->a[l.value / 2], l.value % 2) * half(at(r.lane)->b[r.value / 2], r.value % 2);
        }
        const emulator::Place c = emulator::accumulator(i, j);
        at(c.lane)->c[c.value] += float(sum);
      }
  });
}

// Of the sixteen channels the first eight.
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool accumulate) {
  if (!accumulate) c[0] = c[1] = c[2] = c[3] = 0;
  mma_16<emulator::from_bf16>(c, a, b0, b1);
}

inline void mma_fp16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  c[0] = c[1] = c[2] = c[3] = 0;
  mma_16<emulator::from_fp16>(c, a, b0, b1);
}

inline void mma_bf16_8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  const uint32_t a[4] = {a0, a1, 0, 0};
  mma_bf16(c, a, b, 0, true);
}

inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool accumulate) {
  if (!accumulate) c[0] = c[1] = c[2] = c[3] = 0;
  Product mine{c, a, {b0, b1}};
  emulator::collective(&mine, [](void*(&all)[32]) {
    const auto at = [&](int l) { return static_cast<Product*>(all[l]); };
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 8; ++j) {
        double sum = 0;
        for (int k = 0; k < 8; ++k) {
          const emulator::Place l = emulator::left_tf32(i, k), r = emulator::right_tf32(j, k);
          sum += double(emulator::truncated(at(l.lane)->a[l.value])) * emulator::truncated(at(r.lane)->b[r.value]);
        }
        const emulator::Place c = emulator::accumulator(i, j);
        at(c.lane)->c[c.value] += float(sum);
      }
  });
}

namespace gmma_atoms {
struct Rows32 {
  static constexpr emulator::Atom atom{32, false, false, 1};
};
struct Rows64 {
  static constexpr emulator::Atom atom{64, false, false, 1};
};
struct Transposed {
  static constexpr emulator::Atom atom{128, false, true, 1};
};
}  // namespace gmma_atoms

template <int kLeading, int kStride>
struct Operand {
  const unsigned char* rows;

  explicit Operand(const void* from) : rows(static_cast<const unsigned char*>(from)) {}
  emulator::InTiles at(int bytes) const { return {rows + bytes, kLeading, kStride}; }
};

using KMajor = Operand<16, 1024>;
using MNMajor = Operand<kTileBytes, 1024>;
constexpr int kKMajorStep = 32;
constexpr int kMNMajorStep = kBlock * 128;

template <class Atom, int kAccumulators>
void gmma(float (&c)[kAccumulators], const uint32_t* a, emulator::InTiles b, bool accumulate) {
  static_assert(kAccumulators == Atom::atom.columns / 2);
  emulator::gmma_push({c, Atom::atom, {a[0], a[1], a[2], a[3]}, {}, b, accumulate});
}
template <class T, int N>
void gmma_fence(T (&)[N]) {}

// mbarriers. 1 bit of phase, 10 bits of arrivals awaited and 10 left, 32 bits of bytes left.
struct Barrier {
  struct State {
    uint32_t phase : 1, count : 10, left : 10;
    int32_t bytes;
  };
  static_assert(sizeof(State) == 8);
  static State& of(uint64_t* b) { return *reinterpret_cast<State*>(b); }
  static void init(uint64_t* b, int count) { of(b) = {0, uint32_t(count), uint32_t(count), 0}; }
  static void check(State& s) {
    if (s.left == 0 && s.bytes == 0) s.phase ^= 1, s.left = s.count;
  }
  static void arrive(uint64_t* b) {
    State& s = of(b);
    if (s.left == 0) emulator::fail("one arrival too many at a barrier");
    --s.left;
    check(s);
  }
  static void arrive(uint64_t* b, int rank, bool does) {
    if (does) arrive(static_cast<uint64_t*>(emulator::in_cta(b, rank)));
  }
  static void wait(uint64_t* b, int parity) {
    while (int(of(b).phase) == parity) emulator::yield();
  }
  static void complete(uint64_t* b, int bytes) {
    State& s = of(b);
    s.bytes -= bytes;
    check(s);
  }
  static void arrive_and_expect(uint64_t* b, int bytes) {
    of(b).bytes += bytes;
    arrive(b);
  }
};

inline void sync_cluster() { emulator::cluster_sync(); }
inline void sync_threads(int barrier, int threads) { emulator::sync(barrier, threads); }
inline void fence_async() {}
inline void warp_done(uint64_t* barrier) {
  __syncwarp();
  if (emulator::lane() == 0) Barrier::arrive(barrier);
}
inline void warp_arrive(uint64_t* barrier) { warp_done(barrier); }
inline uint32_t of_first_cta(const uint32_t* here) { return *static_cast<uint32_t*>(emulator::in_cta(here, 0)); }
inline void copy_to_peer(const void* from, const void* to, int bytes, const uint64_t* barrier) {
  const unsigned peer = emulator::rank() ^ 1;
  void* there = emulator::in_cta(to, peer);
  uint64_t* signal = static_cast<uint64_t*>(emulator::in_cta(barrier, peer));
  emulator::later([=] {
    memcpy(there, from, bytes);
    Barrier::complete(signal, bytes);
  });
}

inline void load_bulk(void* to, const void* from, int bytes, uint64_t* barrier) {
  emulator::later([=] {
    memcpy(to, from, bytes);
    Barrier::complete(barrier, bytes);
  });
}

}  // namespace flash_kda

inline void cute::SM90_TMA_LOAD_4D::copy(const CUtensorMap* map, uint64_t* barrier, uint64_t, void* tile, int channel,
                                         int head, int token, int batch) {
  emulator::later([=] {
    for (int i = 0; i < flash_kda::kChunk; ++i)
      for (int j = 0; j < 64; ++j) {
        const bool inside = token + i < map->sizes[2] && head < map->sizes[1] && batch < map->sizes[3];
        const uint16_t x = inside ? map->data[batch * map->strides[3] + (token + i) * map->strides[2] +
                                              head * map->strides[1] + channel + j]
                                  : 0;
        memcpy(static_cast<unsigned char*>(tile) + flash_kda::swizzled(i, j / 8) + j % 8 * 2, &x, 2);
      }
    flash_kda::Barrier::complete(barrier, sizeof(flash_kda::Tile));
  });
}
