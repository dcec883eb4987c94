// c[m][n] = sum over k of a[m][k] b[k][n] in f32 by the copy engine and a warpgroup: right kernels and wrong ones.
//
// A block makes 64x128 numbers of c: four warps multiply, a fifth one copies 64 deep, two stages ahead. b lies [k][n],
// or (`b_rows`) [n][k].
#include "ptx_sm90.cuh"

struct WarpgroupArgs {
  TensorMap a, b;  // (k, m, 1), box 64x64; (n, k, 1), box 64x64, or (k, n, 1), box 64x128
  u64 c;
  u32 m, n, k, reserved[27];
};

struct Fault {
  static constexpr u32 none = 0, no_empty_wait = 1, early_release = 2, no_last_wait = 3, no_full_wait = 4, no_fence = 5,
                       few_bytes = 6, many_bytes = 7, no_swizzle = 8;
};

template <class T, bool B_ROWS, u32 FAULT> DEVI void warpgroup(const WarpgroupArgs& args) {
  constexpr u32 A_BYTES = 64 * 128, STAGE = A_BYTES + 128 * 128, STAGES = 2;
  DYN_SMEM(smem);
  __shared__ u64 full[STAGES], empty[STAGES];
  const u32 tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const u32 row0 = blockIdx.y * 64, column0 = blockIdx.x * 128, steps = (args.k + 63) / 64;
  if (tid == 0) {
    for (u32 i = 0; i < STAGES; ++i) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, 4);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (warp == 4) {
    for (u32 step = 0; lane == 0 && step < steps; ++step) {
      const u32 slot = step % STAGES;
      u8* to = smem + slot * STAGE;
      if (FAULT != Fault::no_empty_wait) mbarrier_wait(empty + slot, (step / STAGES + 1) & 1);
      const u32 wrong = FAULT == Fault::few_bytes ? 0u - 128u : FAULT == Fault::many_bytes ? 128u : 0u;
      mbarrier_arrive_expect(full + slot, STAGE + wrong);
      tensor_load_3d(to, args.a, full + slot, (i32)(step * 64), (i32)row0, 0);
      if (B_ROWS) {
        tensor_load_3d(to + A_BYTES, args.b, full + slot, (i32)(step * 64), (i32)column0, 0);
      } else {
        for (u32 j = 0; j < 2; ++j)
          tensor_load_3d(to + A_BYTES + j * 8192, args.b, full + slot, (i32)(column0 + j * 64), (i32)(step * 64), 0);
      }
    }
    return;
  }
  float sums[16][4];
  for (u32 j = 0; j < 16; ++j) {
    for (u32 q = 0; q < 4; ++q) sums[j][q] = 123.0f;  // the first product does not add
  }
  for (u32 step = 0; step < steps; ++step) {
    const u32 slot = step % STAGES, at = shared_address(smem + slot * STAGE);
    if (FAULT != Fault::no_full_wait) mbarrier_wait(full + slot, step / STAGES & 1);
    if (FAULT != Fault::no_fence) wgmma_fence();
    if (FAULT == Fault::early_release && lane == 0) mbarrier_arrive(empty + slot);
    for (u32 k = 0; k < 4; ++k) {
      u64 a = wgmma_matrix(at + k * 32, 16, 1024);
      if (FAULT == Fault::no_swizzle) a &= ~((u64)3 << 62);
      if (B_ROWS)
        wgmma<0>(T{}, sums, a, wgmma_matrix(at + A_BYTES + k * 32, 16, 1024), step + k > 0);
      else
        wgmma<1>(T{}, sums, a, wgmma_matrix(at + A_BYTES + k * 2048, 8192, 1024), step + k > 0);
    }
    wgmma_commit();
    if (FAULT != Fault::no_last_wait || step + 1 < steps) wgmma_wait<0>();
    if (FAULT != Fault::early_release && lane == 0) mbarrier_arrive(empty + slot);
  }
  BARRIER_PART(1, 128);
  float* c = reinterpret_cast<float*>(args.c);
  for (u32 j = 0; j < 16; ++j) {
    for (u32 q = 0; q < 4; ++q) {
      const u32 row = row0 + warp * 16 + (lane >> 2) + (q >> 1) * 8, column = column0 + j * 8 + (lane & 3) * 2 + (q & 1);
      if (row < args.m && column < args.n) c[(u64)row * args.n + column] = sums[j][q];
    }
  }
}

KERNEL(warpgroup_bf16, WarpgroupArgs, 160) { warpgroup<bf16, false, Fault::none>(args); }
KERNEL(warpgroup_f16, WarpgroupArgs, 160) { warpgroup<f16, false, Fault::none>(args); }
KERNEL(warpgroup_rows_bf16, WarpgroupArgs, 160) { warpgroup<bf16, true, Fault::none>(args); }
KERNEL(warpgroup_rows_f16, WarpgroupArgs, 160) { warpgroup<f16, true, Fault::none>(args); }
KERNEL(warpgroup_no_empty_wait, WarpgroupArgs, 160) { warpgroup<bf16, false, Fault::no_empty_wait>(args); }
KERNEL(warpgroup_early_release, WarpgroupArgs, 160) { warpgroup<bf16, false, Fault::early_release>(args); }
KERNEL(warpgroup_no_last_wait, WarpgroupArgs, 160) { warpgroup<bf16, false, Fault::no_last_wait>(args); }
KERNEL(warpgroup_no_full_wait, WarpgroupArgs, 160) { warpgroup<bf16, false, Fault::no_full_wait>(args); }
KERNEL(warpgroup_no_fence, WarpgroupArgs, 160) { warpgroup<bf16, false, Fault::no_fence>(args); }
KERNEL(warpgroup_few_bytes, WarpgroupArgs, 160) { warpgroup<bf16, false, Fault::few_bytes>(args); }
KERNEL(warpgroup_many_bytes, WarpgroupArgs, 160) { warpgroup<bf16, false, Fault::many_bytes>(args); }
KERNEL(warpgroup_no_swizzle, WarpgroupArgs, 160) { warpgroup<bf16, false, Fault::no_swizzle>(args); }
