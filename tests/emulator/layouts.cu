// What the kernel and the emulator take for granted of fragments, swizzles and descriptors, against CuTe's own
// definitions. A program for the host: tests/test_layouts.py compiles and runs it.
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm90.hpp>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/copy_traits_sm90.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include <stdio.h>

#include <map>
#include <utility>

#include "../../csrc/sm90/invert.h"
#include "../../csrc/sm90/prepare.h"
#include "../../csrc/sm90/recur.h"
#include "fragments.h"

using namespace cute;
using namespace emulator;
using SM90::GMMA::Major;

static int failed = 0;

struct Count {
  const char* what;
  long checked = 0, wrong = 0;

  explicit Count(const char* name) : what(name) {}
  void operator()(bool right) { ++checked, wrong += !right; }
  ~Count() {
    printf("%-60s %6ld checked, %ld wrong\n", what, checked, wrong);
    failed += wrong != 0 || checked == 0;
  }
};

// Fragments -----------------------------------------------------------------------------------------------------------

// A layout of CuTe maps thread and value to an element, the rows of a column side by side.
template <class Layout>
void fragment(const char* what, Layout layout, int rows, Place (*place)(int, int)) {
  Count count(what);
  for (int thread = 0; thread < int(size<0>(layout)); ++thread)
    for (int value = 0; value < int(size<1>(layout)); ++value) {
      const int element = layout(thread, value), row = element % rows;
      const Place at = place(row % 16, element / rows);
      count(row / 16 == thread / 32 && at.lane == thread % 32 && at.value == value);
    }
}

template <class Op>
void wgmma(const char* what, Place (*left)(int, int)) {
  using Traits = MMA_Traits<Op>;
  printf("%s\n", what);
  fragment("  left operand", typename Traits::ALayout{}, 64, left);
  fragment("  accumulators", typename Traits::CLayout{}, 64, accumulator);
}

template <class Op>
void mma(const char* what, Place (*left)(int, int), Place (*right)(int, int)) {
  using Traits = MMA_Traits<Op>;
  printf("%s\n", what);
  fragment("  left operand", typename Traits::ALayout{}, 16, left);
  fragment("  right operand", typename Traits::BLayout{}, 8, right);
  fragment("  accumulators", typename Traits::CLayout{}, 16, accumulator);
}

// CuTe maps lane and bit, of rows in memory and of registers, to the same places: what meets belongs together.
template <class MemoryLayout, class RegisterLayout>
void matrices(const char* what, MemoryLayout memory, RegisterLayout registers, bool transposed) {
  Count count(what);
  std::map<int, std::pair<int, int>> rows;  // lane that names a row, element of that row
  for (int lane = 0; lane < 32; ++lane)
    for (int j = 0; j < 8; ++j) rows[memory(lane, 16 * j)] = {lane, j};
  for (int lane = 0; lane < 32; ++lane)
    for (int half = 0; half < 8; ++half) {
      const auto found = rows.find(registers(lane, 16 * half));
      if (found == rows.end()) {
        count(false);
        continue;
      }
      const int row = found->second.first;
      const Place at = matrix(row % 8, found->second.second, transposed);
      count(row / 8 == half / 2 && at.lane == lane && at.value == half % 2);
    }
}

// Operands of wgmma in shared memory ----------------------------------------------------------------------------------

template <class Tensor, class... Index>
uintptr_t address(const Tensor& tensor, Index... index) {
  return reinterpret_cast<uintptr_t>(&tensor(index...));
}

template <int kLeading, int kStride>
constexpr int leading(flash_kda::Operand<kLeading, kStride>) {
  return kLeading;
}
template <int kLeading, int kStride>
constexpr int stride(flash_kda::Operand<kLeading, kStride>) {
  return kStride;
}

// A whole operand of `layout`, of which one instruction takes 16 elements of the sum, the k-th those from `advance(k)`
// on.
template <Major kMajor, class Mine, class Layout>
void operand(const char* what, Layout layout, int (*advance)(int)) {
  printf("%s\n", what);
  constexpr int kDepth = 16, kRows = size<0>(Layout{}), kSteps = size<1>(Layout{}) / kDepth;
  const uintptr_t base = 1 << 20;  // as aligned as any tile
  const Tensor whole = make_tensor(make_smem_ptr(reinterpret_cast<bfloat16_t*>(base)), layout);
  const Tensor steps = local_tile(whole, make_shape(Int<kRows>{}, Int<kDepth>{}), make_coord(0, _));
  const Mine mine(uint32_t{0});  // a generic address has no place in shared memory here: CuTe's descriptor begins at 0
  const auto begin = SM90::GMMA::make_gmma_desc<kMajor>(steps(_, _, 0)).desc_;
  Count places("  elements"), descriptors("  descriptors, with every bit");
  for (int k = 0; k < kSteps; ++k) {
    for (int n = 0; n < kRows; ++n)
      for (int i = 0; i < kDepth; ++i)
        places(tile_address(kMajor == Major::MN, base + advance(k), leading(mine), stride(mine), n, i) ==
               address(whole, n, k * kDepth + i));
    const uint64_t cute = begin + (steps.layout()(0, 0, k) * sizeof(bfloat16_t) >> 4);
    descriptors(cute == mine.at(advance(k)));
  }
}

template <class T>
using KMajorAtom = SM90::GMMA::Layout_K_SW128_Atom<T>;
using MNMajorAtom = SM90::GMMA::Layout_MN_SW128_Atom<bfloat16_t>;

// 64 channels and the next ones, as far apart as the halves of a chunk (config.h): the atoms of CuTe in that order.
using flash_kda::Operands;
constexpr int kNextHalf = sizeof(Operands::of[0]), kNextHalfOfKr = sizeof(Operands::g[0]);
using HalfStride = Int<kNextHalf / int(sizeof(bfloat16_t))>;
using HalfStrideOfKr = Int<kNextHalfOfKr / int(sizeof(bfloat16_t))>;
template <class Atom, class Layout>
auto in_order(Atom atom, Layout layout) {
  return composition(atom.layout_a(), atom.offset(), layout);
}
const auto kRowsOfHalves =
    in_order(KMajorAtom<bfloat16_t>{},
             Layout<Shape<Shape<_8, _8>, Shape<_64, _2>>, Stride<Stride<_64, _512>, Stride<_1, HalfStride>>>{});
const auto kColumnsOfHalves =
    in_order(MNMajorAtom{},
             Layout<Shape<Shape<_64, _2>, Shape<_8, _4>>, Stride<Stride<_1, HalfStrideOfKr>, Stride<_64, _512>>>{});

// Where the tiles lie that these take for one operand.
void tiles() {
  Count count("tiles of a chunk: K~ behind Q~, the second half behind the first");
  const Operands* const x = nullptr;
  const auto place = [](const auto& tile) { return reinterpret_cast<uintptr_t>(&tile); };
  count(place(x->of[0].k) == place(x->of[0].q) + 4 * 1024 && place(x->of[1].k) == place(x->of[1].q) + 4 * 1024);
  count(place(x->of[1].q) == place(x->of[0].q) + kNextHalf && place(x->g[1]) == place(x->g[0]) + kNextHalfOfKr);
  count(sizeof(x->X) == 32 * 128 && sizeof(x->M) == 32 * 128);
}

void swizzle() {
  const auto layout = tile_to_shape(KMajorAtom<bfloat16_t>{}, Shape<_32, _64>{});
  const uintptr_t base = 1 << 20;
  const Tensor tile = make_tensor(make_smem_ptr(reinterpret_cast<bfloat16_t*>(base)), layout);
  Count count("swizzled(): a tile as TMA writes it and wgmma reads it");
  for (int row = 0; row < 32; ++row)
    for (int column = 0; column < 64; ++column)
      count(base + flash_kda::swizzled(row, column / 8) + column % 8 * 2 == address(tile, row, column));
}

// L and X: where element (row, column) has to lie, by CuTe. A row of 32 columns in fp32 fills that row of X b.
int in_triangle(int row, int column) {
  const auto layout = tile_to_shape(KMajorAtom<float>{}, Shape<_32, _32>{});
  const uintptr_t base = 1 << 20;
  const Tensor tile = make_tensor(make_smem_ptr(reinterpret_cast<float*>(base)), layout);
  return int(address(tile, row, column) - base);
}

// In the ways in which L, X and their fragments are reached (prepare.h, invert.h).
void triangle() {
  using flash_kda::triangle_offset;
  using flash_kda::triangle_place;
  Count count("triangle(): L and X as fragments");
  for (int I = 0; I < 2; ++I)
    for (int J = 0; J <= I; ++J)
      for (int lane = 0; lane < 32; ++lane) {
        const int row = lane / 4, t = lane % 4;
        for (int octet = 0; octet < 2; ++octet)
          for (int x = 0; x < 2; ++x)
            for (int y = 0; y < 2; ++y) {
              // accumulators and left operands: rows `row` and 8 on, columns 2t and 2t + 1
              count(triangle_offset(triangle_place(row, t / 2, t % 2 * 2 + y), I, 8 * x, J, 2 * octet) ==
                    in_triangle(16 * I + row + 8 * x, 16 * J + 8 * octet + 2 * t + y));
              // right operands: rows 2t and 2t + 1 of each eight, column `row`
              count(triangle_offset(triangle_place(2 * t, row / 4, row % 4), I, 8 * x + y, J, 2 * octet) ==
                    in_triangle(16 * I + 8 * x + 2 * t + y, 16 * J + 8 * octet + row));
            }
      }
}

int main() {
  using namespace flash_kda::gmma_atoms;
  wgmma<Rows32>("wgmma m64n32k16, bf16", left_bf16);
  wgmma<Rows64>("wgmma m64n64k16, bf16", left_bf16);
  wgmma<Transposed>("wgmma m64n128k16, bf16", left_bf16);
  mma<SM80_16x8x16_F32BF16BF16F32_TN>("mma m16n8k16, bf16", left_bf16, right_bf16);
  mma<SM80_16x8x8_F32BF16BF16F32_TN>("mma m16n8k8, bf16", left_bf16, right_bf16);
  mma<SM80_16x8x8_F32TF32TF32F32_TN>("mma m16n8k8, tf32", left_tf32, right_tf32);

  using Load = Copy_Traits<SM75_U32x4_LDSM_N>;
  using LoadTransposed = Copy_Traits<SM75_U16x8_LDSM_T>;
  using Store = Copy_Traits<SM90_U32x4_STSM_N>;
  using StoreTransposed = Copy_Traits<SM90_U16x8_STSM_T>;
  matrices("ldmatrix", Load::SrcLayout{}, Load::DstLayout{}, false);
  matrices("ldmatrix, transposed", LoadTransposed::SrcLayout{}, LoadTransposed::DstLayout{}, true);
  matrices("stmatrix", Store::DstLayout{}, Store::SrcLayout{}, false);
  // movmatrix is ldmatrix, transposed, of what ldmatrix read: its places are those above.
  matrices("stmatrix, transposed", StoreTransposed::DstLayout{}, StoreTransposed::SrcLayout{}, true);

  // The offsets are those of recur.h.
  operand<Major::K, flash_kda::KMajor>("[Q~; -W]: [64 rows, 128 channels]", kRowsOfHalves,
                                       [](int k) { return k / 4 * kNextHalf + k % 4 * flash_kda::kKMajorStep; });
  operand<Major::K, flash_kda::KMajor>("X b: [32 tokens, 32 tokens in two parts]",
                                       tile_to_shape(KMajorAtom<bfloat16_t>{}, Shape<_32, _64>{}),
                                       [](int k) { return k * flash_kda::kKMajorStep; });
  operand<Major::K, flash_kda::KMajor>("M: [32 tokens, 64 columns, of which 32 are used]",
                                       tile_to_shape(KMajorAtom<bfloat16_t>{}, Shape<_32, _64>{}),
                                       [](int k) { return k * flash_kda::kKMajorStep; });
  operand<Major::MN, flash_kda::MNMajor>("Kr: [128 channels, 32 tokens]", kColumnsOfHalves,
                                         [](int k) { return k * flash_kda::kMNMajorStep; });
  tiles();
  swizzle();
  triangle();
  printf(failed ? "%d differ\n" : "all the same\n", failed);
  return failed != 0;
}
