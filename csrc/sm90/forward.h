// The kernel: one persistent CTA an SM, specialised by warpgroup.
#pragma once

#include "invert.h"
#include "plan.h"
#include "prepare.h"
#include "recur.h"

namespace flash_kda {

__global__ void __launch_bounds__(kThreads, 1) forward(const __grid_constant__ Params p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char memory[];
  SharedMemoryPlan& s = *reinterpret_cast<SharedMemoryPlan*>(memory);
  if (threadIdx.x == 0) {
    if (cute::cast_smem_ptr_to_uint(memory) % 1024 != 0) __trap();  // the swizzles need it
    for (int i = 0; i < kSlots; ++i) {
      TransactionBarrier::init(&s.bar_qkg_loaded[i], 1);
      Barrier::init(&s.bar_slot_free[i], kThreads / 32);
    }
    for (int i = 0; i < kValueSlots; ++i) TransactionBarrier::init(&s.bar_v_loaded[i], 1);
    for (int i = 0; i < 2; ++i) Barrier::init(&s.bar_operands_ready[i], kPrepareThreads / 32);
    Barrier::init(&s.bar_L_ready, kBlocks);
    Barrier::init(&s.bar_XM_ready, 2 * kBlocks);
    Barrier::init(&s.bar_XM_free, kWarpgroup / 32);
    cutlass::arch::fence_barrier_init();
  }
  // The blocks of X and M above the diagonal are never written again.
  for (int i = threadIdx.x; i < int(sizeof(s.X) / 4); i += kThreads) {
    reinterpret_cast<float*>(s.X)[i] = 0.f;
    reinterpret_cast<float*>(s.M)[i] = 0.f;
  }
  cutlass::arch::fence_view_async_shared();
  __syncthreads();

  const int warpgroup = threadIdx.x / kWarpgroup;
  if (warpgroup == kRecurWarpgroup) {
    cutlass::arch::warpgroup_reg_alloc<kRecurRegisters>();
    Recur(p, s).run();
  } else if (warpgroup == kInvertWarpgroup) {
    cutlass::arch::warpgroup_reg_dealloc<kInvertRegisters>();
    Invert(p, s).run();
  } else {
    cutlass::arch::warpgroup_reg_dealloc<kPrepareRegisters>();
    Prepare(p, s).run();
  }
#endif
}

}  // namespace flash_kda
