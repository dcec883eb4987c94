// c[m][n] = sum over k of a[m][k] b[n][k] in f32, for 16-bit numbers, k a multiple of 8: a right kernel and wrong ones.
//
// A block of 128 threads makes 64x64 numbers of c, 32 deep per step, with three stages of shared memory; each of its
// four warps makes 32x32. Rows of a stage are 40 numbers apart, so that matrix loads have no bank conflicts.
#include "common.cuh"

struct GemmArgs {
  u64 a, b, c;
  u32 m, n, k, reserved;
};

struct Gemm {
  static constexpr u32 tile = 64, depth = 32, stages = 3, pitch = depth + 8;
};
// What is wrong with a kernel.
struct Fault {
  static constexpr u32 none = 0, weak_wait = 1, no_barrier = 2, no_k_guard = 3, misaligned = 4, bank_conflicts = 5;
};

template <class T, u32 FAULT> DEVI void gemm_load(const GemmArgs& args, T* as, T* bs, u32 step) {
  constexpr u32 pitch = FAULT == Fault::bank_conflicts ? Gemm::depth : Gemm::pitch;
  const u32 stage = step % Gemm::stages;
  const T* a = reinterpret_cast<const T*>(args.a);
  const T* b = reinterpret_cast<const T*>(args.b);
  for (u32 part = threadIdx.x; part < Gemm::tile * 4; part += 128) {
    const u32 row = part >> 2, column = (part & 3) * 8, k = step * Gemm::depth + column;
    const u32 i = blockIdx.y * Gemm::tile + row, j = blockIdx.x * Gemm::tile + row;
    const bool deep = FAULT == Fault::no_k_guard || k < args.k;
    const bool has_a = i < args.m && deep, has_b = j < args.n && deep;
    const u32 shift = FAULT == Fault::misaligned ? 4 : 0;
    cp_async16(as + (stage * Gemm::tile + row) * pitch + column, has_a ? a + (u64)i * args.k + k + shift : a, has_a);
    cp_async16(bs + (stage * Gemm::tile + row) * pitch + column, has_b ? b + (u64)j * args.k + k : b, has_b);
  }
}

template <class T, u32 FAULT> DEVI void gemm(const GemmArgs& args) {
  constexpr u32 pitch = FAULT == Fault::bank_conflicts ? Gemm::depth : Gemm::pitch;
  DYN_SMEM(shared);
  T* as = reinterpret_cast<T*>(shared);
  T* bs = as + Gemm::stages * Gemm::tile * pitch;
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const u32 row0 = (warp >> 1) * 32, column0 = (warp & 1) * 32;
  float sums[2][4][4] = {};
  const u32 steps = (args.k + Gemm::depth - 1) / Gemm::depth;
  for (u32 s = 0; s < Gemm::stages - 1; ++s) {
    if (s < steps) gemm_load<T, FAULT>(args, as, bs, s);
    cp_async_commit();
  }
  for (u32 step = 0; step < steps; ++step) {
    if (FAULT == Fault::weak_wait) {
      cp_async_wait<Gemm::stages - 1>();
    } else {
      cp_async_wait<Gemm::stages - 2>();
    }
    if (FAULT != Fault::no_barrier) __syncthreads();
    if (step + Gemm::stages - 1 < steps) gemm_load<T, FAULT>(args, as, bs, step + Gemm::stages - 1);
    cp_async_commit();
    const T* a = as + step % Gemm::stages * Gemm::tile * pitch;
    const T* b = bs + step % Gemm::stages * Gemm::tile * pitch;
#pragma unroll
    for (u32 k = 0; k < Gemm::depth; k += 16) {
      u32 fa[2][4], fb[2][4];
#pragma unroll
      for (u32 i = 0; i < 2; ++i) ldmatrix_x4(fa[i], a + (row0 + i * 16 + (lane & 15)) * pitch + k + (lane >> 4) * 8);
#pragma unroll
      for (u32 j = 0; j < 2; ++j) {
        const u32 row = column0 + j * 16 + (lane & 7) + (lane >> 4 << 3);
        ldmatrix_x4(fb[j], b + row * pitch + k + (lane >> 3 & 1) * 8);
      }
#pragma unroll
      for (u32 i = 0; i < 2; ++i) {
#pragma unroll
        for (u32 j = 0; j < 4; ++j) {
          mma_16x8x16(T{}, sums[i][j], fa[i], fb[j >> 1][(j & 1) * 2], fb[j >> 1][(j & 1) * 2 + 1]);
        }
      }
    }
  }
  float* c = reinterpret_cast<float*>(args.c);
  for (u32 i = 0; i < 2; ++i) {
    for (u32 j = 0; j < 4; ++j) {
      for (u32 part = 0; part < 4; ++part) {
        const u32 row = blockIdx.y * Gemm::tile + row0 + i * 16 + (lane >> 2) + (part >> 1) * 8;
        const u32 column = blockIdx.x * Gemm::tile + column0 + j * 8 + (lane & 3) * 2 + (part & 1);
        if (row < args.m && column < args.n) c[(u64)row * args.n + column] = sums[i][j][part];
      }
    }
  }
}

#if __CUDA_ARCH__ >= 800 || defined(BOXWRIGHT_EMULATOR)
KERNEL(gemm_bf16, GemmArgs, 128) { gemm<bf16, Fault::none>(args); }
KERNEL(gemm_f16, GemmArgs, 128) { gemm<f16, Fault::none>(args); }
KERNEL(gemm_weak_wait, GemmArgs, 128) { gemm<bf16, Fault::weak_wait>(args); }
KERNEL(gemm_no_barrier, GemmArgs, 128) { gemm<bf16, Fault::no_barrier>(args); }
KERNEL(gemm_no_k_guard, GemmArgs, 128) { gemm<bf16, Fault::no_k_guard>(args); }
KERNEL(gemm_misaligned, GemmArgs, 128) { gemm<bf16, Fault::misaligned>(args); }
KERNEL(gemm_bank_conflicts, GemmArgs, 128) { gemm<bf16, Fault::bank_conflicts>(args); }
#endif
