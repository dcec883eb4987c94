// Inline PTX stands here and in `ptx_sm90.cuh` only: thin wrappers, one instruction each.
// `tests/emulator/emulated_ptx.h` holds their twins.
#pragma once

#if defined(BOXWRIGHT_EMULATOR)
#include "emulated_ptx.h"
#else

DEVI u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// The first `threads` threads of a block, whole warps, meet; `id` from 1 to 15 tells such meetings apart.
#define BARRIER_PART(id, threads) asm volatile("bar.sync %0, %1;" ::"n"(id), "n"(threads) : "memory")

// ---- conversions ------------------------------------------------------------------------------------------------

DEVI float f16_to_f32(u16 bits) {
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
  return v;
}
DEVI u16 f32_to_f16(float v) {
  u16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
  return bits;
}

#if __CUDA_ARCH__ >= 800
DEVI u16 f32_to_bf16(float v) {
  u16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
  return bits;
}
DEVI u32 f32x2_to_bf16x2(float low, float high) {
  u32 v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}
DEVI u32 f32x2_to_f16x2(float low, float high) {
  u32 v;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}
#else
// Older chips have no instruction for bfloat16: round to nearest even by hand.
DEVI u16 f32_to_bf16(float v) {
  const u32 u = __float_as_uint(v);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return (u16)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
DEVI u32 f32x2_to_bf16x2(float low, float high) { return (u32)f32_to_bf16(low) | (u32)f32_to_bf16(high) << 16; }
DEVI u32 f32x2_to_f16x2(float low, float high) { return (u32)f32_to_f16(low) | (u32)f32_to_f16(high) << 16; }
#endif

#if __CUDA_ARCH__ >= 800

// ---- asynchronous copies to shared memory -----------------------------------------------------------------------

// 16 bytes; zeros where `valid` is false (the address is not read then, but must be a valid pointer). Both aligned.
DEVI void cp_async16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
DEVI void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N groups of this thread are still under way.
template <i32 N> DEVI void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// ---- matrix fragments -------------------------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit numbers; lane 8i+j gives the address of row j of matrix i, aligned to 16 bytes.
// Lane l receives of each matrix the numbers (l / 4, 2 (l % 4)) and (l / 4, 2 (l % 4) + 1).
DEVI void ldmatrix_x4(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same of the transposed matrices: lane l receives (2 (l % 4), l / 4) and (2 (l % 4) + 1, l / 4).
DEVI void ldmatrix_x4_trans(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b for a 16x16 (row major), b 16x8 (column major), d 16x8 in f32. With g = lane / 4, t = 2 (lane % 4):
// a[0] (g, t) a[1] (g+8, t) a[2] (g, t+8) a[3] (g+8, t+8), b0 (k=t, n=g), b1 (k=t+8, n=g), two numbers each;
// d[0], d[1] (g, t), (g, t+1); d[2], d[3] (g+8, t), (g+8, t+1).
DEVI void mma_16x8x16(bf16, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVI void mma_16x8x16(f16, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif  // __CUDA_ARCH__ >= 800
#endif  // BOXWRIGHT_EMULATOR
