// Hopper's own instructions (sm_90a): barriers in shared memory, the copy engine, matrix products of warpgroups. With
// `ptx.cuh` the only files with inline PTX; `tests/emulator/emulated_ptx_sm90.h` holds the twins.
//
// What the kernels rely on (PTX ISA 8.0 and later, section numbers of 9.0):
//  * `cp.async.bulk.tensor` (9.7.9.27) writes a box densely, rows of 128 bytes here, in the order of its dimensions,
//    the first fastest; elements outside of the tensor are zeros and count as bytes of the barrier.
//  * In im2col mode (5.5.4) coordinates (c, x, y, n) and offsets (x, y) name the first pixel, their sum; further pixels
//    follow in x, then y, then n, in steps of the element strides, within the corners of the box, to which the offsets
//    are added. Both corners belong to the box; the upper one counts from the last pixel.
//  * 128-byte swizzle (5.5.6): bits 4 to 6 of a shared address are xored with bits 7 to 9. Boxes begin at multiples of
//    1024 bytes, so copy engine and tensor cores see the same pattern.
//  * Matrix descriptor (9.7.15.5.1): bits 0-13 address / 16, 16-29 leading offset / 16, 32-45 stride offset / 16,
//    62-63 = 1 for 128-byte swizzle. Canonical layouts with it, in units of 16-byte pieces (8 numbers):
//      K-major  ((8, m), (8, 2)) : ((8 pieces, stride offset), (1, piece)): rows of 64 numbers of k, eight of them one
//               after the other, the next eight at the stride offset; the leading offset is not used;
//      MN-major ((8 numbers, 8 pieces, m), (8, k)) : ((1, piece, leading offset), (8 pieces, stride offset)): rows of 64
//               numbers of m or n, one for each k, eight of them one after the other, the next eight k at the stride
//               offset, the next 64 of m or n at the leading offset.
//    Stepping k by 16 adds 32 bytes (K-major) or twice the stride offset (MN-major) to the address.
//  * Result of m64nNk16 (9.7.15.5.1.1): warp w of the group has rows 16 w to 16 w + 15, otherwise as m16n8k16.
#pragma once
#include "common.cuh"

#if defined(BOXWRIGHT_EMULATOR)
#include "emulated_ptx_sm90.h"
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A tensor map as the driver encodes it; Rust twin: `engine::device::cuda::TensorMap`. Lies in kernel arguments.
struct __align__(128) TensorMap {
  u64 words[16];
};

// ---- barriers in shared memory --------------------------------------------------------------------------------------

// `count` arrivals, and all bytes that were announced, end a phase; the first has parity 0.
DEVI void mbarrier_init(u64* barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
// After `mbarrier_init`, before a barrier of the block: the copy engine sees the barriers too.
DEVI void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVI void mbarrier_arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and announces bytes that copies will bring.
DEVI void mbarrier_arrive_expect(u64* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Waits for the end of the phase of this parity; a barrier that has just been made counts as past parity 1.
DEVI void mbarrier_wait(u64* barrier, u32 parity) {
  u32 done = 0;
  while (!done) {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}

// ---- the copy engine ------------------------------------------------------------------------------------------------

DEVI void tensor_map_prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// Boxes of tiled maps: coordinates of the first element, the fastest dimension first.
DEVI void tensor_load_3d(void* to, const TensorMap& map, u64* barrier, i32 c0, i32 c1, i32 c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}
DEVI void tensor_load_4d(void* to, const TensorMap& map, u64* barrier, i32 c, i32 x, i32 y, i32 n) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::
          "r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(c), "r"(x), "r"(y), "r"(n)
      : "memory");
}
// Consecutive pixels of an im2col map.
DEVI void tensor_load_pixels(void* to, const TensorMap& map, u64* barrier, i32 c, i32 x, i32 y, i32 n, u32 offset_x,
                             u32 offset_y) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2], {%7, %8};" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(c), "r"(x), "r"(y), "r"(n), "h"((u16)offset_x), "h"((u16)offset_y)
      : "memory");
}

// ---- matrix products of a warpgroup: four warps, the first of a number divisible by four -------------------------------

// Registers that the products read or add to are written.
DEVI void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVI void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most N groups are still under way.
template <i32 N> DEVI void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

#define WGMMA_PLACES_0 "" \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define WGMMA_PLACES_1 "," \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define WGMMA_PLACES_2 "," \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79," \
  "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define WGMMA_PLACES_3 "," \
  "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111," \
  "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define WGMMA_D4(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define WGMMA_D32(j) \
  WGMMA_D4(j), WGMMA_D4(j + 1), WGMMA_D4(j + 2), WGMMA_D4(j + 3), WGMMA_D4(j + 4), WGMMA_D4(j + 5), WGMMA_D4(j + 6), \
      WGMMA_D4(j + 7)

// d += a b, or d = a b without `add`: a 64x16 K-major, b 16xCOLUMNS, MN-major where B_TRANSPOSED (rows of k), else
// K-major (rows of n). The numbers are those of `conv_mma`: d[j] as of a 16x8 fragment of columns 8 j.
#define WGMMA(columns, type, ptx_type, places, a, b, p, t, ...)                                                       \
  template <i32 B_TRANSPOSED> DEVI void wgmma(type, float (&d)[columns / 8][4], u64 a_matrix, u64 b_matrix, u32 add) { \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p                                                               \
                 ", 0;\n"                                                                                             \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." ptx_type "." ptx_type " {" places "}, %" #a    \
                 ", %" #b ", p, 1, 1, 0, %" #t ";\n}\n"                                                               \
                 : __VA_ARGS__                                                                                        \
                 : "l"(a_matrix), "l"(b_matrix), "r"(add), "n"(B_TRANSPOSED));                                        \
  }
#define WGMMA_BOTH(columns, places, a, b, p, t, ...)                   \
  WGMMA(columns, bf16, "bf16", places, a, b, p, t, __VA_ARGS__) \
  WGMMA(columns, f16, "f16", places, a, b, p, t, __VA_ARGS__)

WGMMA_BOTH(64, WGMMA_PLACES_0, 32, 33, 34, 35,
           WGMMA_D32(0))
WGMMA_BOTH(128, WGMMA_PLACES_0 WGMMA_PLACES_1, 64, 65, 66, 67,
           WGMMA_D32(0), WGMMA_D32(8))
WGMMA_BOTH(192, WGMMA_PLACES_0 WGMMA_PLACES_1 WGMMA_PLACES_2, 96, 97, 98, 99,
           WGMMA_D32(0), WGMMA_D32(8), WGMMA_D32(16))
WGMMA_BOTH(256, WGMMA_PLACES_0 WGMMA_PLACES_1 WGMMA_PLACES_2 WGMMA_PLACES_3, 128, 129, 130, 131,
           WGMMA_D32(0), WGMMA_D32(8), WGMMA_D32(16), WGMMA_D32(24))

#endif

#if defined(BOXWRIGHT_EMULATOR) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Descriptors of matrices with 128-byte swizzle. `at` is a shared address.
DEVI u64 wgmma_matrix(u32 at, u32 leading_bytes, u32 stride_bytes) {
  return (u64)(at >> 4) | (u64)(leading_bytes >> 4) << 16 | (u64)(stride_bytes >> 4) << 32 | (u64)1 << 62;
}

#endif
