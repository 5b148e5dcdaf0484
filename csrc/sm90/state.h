// States in global memory: fp32 or bf16, four elements of a row at a time where all rows lie so that this may be.
#pragma once

#include <type_traits>

#include "bits.h"
#include "ptx.h"

namespace flash_kda {

template <bool kFp32, bool kFours>
struct FourElements {
  using Element = std::conditional_t<kFp32, float, uint16_t>;

  static __device__ __forceinline__ float4 load(const void* state, int64_t at) {
    const Element* const x = static_cast<const Element*>(state) + at;
    if constexpr (kFp32 && kFours)
      return __ldcg(reinterpret_cast<const float4*>(x));
    else if constexpr (kFp32)
      return {__ldcg(x), __ldcg(x + 1), __ldcg(x + 2), __ldcg(x + 3)};
    else if constexpr (kFours)
      return unpack_bf16(__ldcg(reinterpret_cast<const uint2*>(x)));
    else
      return unpack_bf16(
          uint2{__ldcg(x) | uint32_t(__ldcg(x + 1)) << 16, __ldcg(x + 2) | uint32_t(__ldcg(x + 3)) << 16});
  }

  static __device__ __forceinline__ void store(void* state, int64_t at, const float4& x) {
    Element* const y = static_cast<Element*>(state) + at;
    if constexpr (kFp32 && kFours) {
      __stcg(reinterpret_cast<float4*>(y), x);
    } else if constexpr (kFp32) {
      y[0] = x.x, y[1] = x.y, y[2] = x.z, y[3] = x.w;
    } else {
      const uint2 rounded = {pack_bf16(x.x, x.y), pack_bf16(x.z, x.w)};
      if constexpr (kFours) {
        __stcg(reinterpret_cast<uint2*>(y), rounded);
      } else {
        y[0] = uint16_t(rounded.x), y[1] = uint16_t(rounded.x >> 16);
        y[2] = uint16_t(rounded.y), y[3] = uint16_t(rounded.y >> 16);
      }
    }
  }
};

// Where a state of a head is, or nowhere.
struct StatePlace {
  void* data;
  int64_t at;  // its first element
  int64_t stride_value;
  bool is_fp32, in_fours;
};

// `run` with what loads and stores elements of that format. The choice comes before all accesses: so many of them are
// under way at once.
template <class Run>
__device__ __forceinline__ void with_elements(bool is_fp32, bool fours, const Run& run) {
  if (is_fp32)
    fours ? run(FourElements<true, true>{}) : run(FourElements<true, false>{});
  else
    fours ? run(FourElements<false, true>{}) : run(FourElements<false, false>{});
}

}  // namespace flash_kda
