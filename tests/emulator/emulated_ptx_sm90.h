// The twins of the wrappers in `kernels/ptx_sm90.cuh`.
#pragma once

// Aligned to 64 bytes on the chip; arguments are copied to places that are less aligned here.
struct TensorMap {
  u64 words[16];
};

namespace emulator {

void make_mbarrier(u64* barrier, u32 count);
void arrive(u64* barrier, u32 bytes);
void wait_mbarrier(u64* barrier, u32 parity, const char* where);

struct TensorCopy {
  void* to;
  const TensorMap* map;
  u64* barrier;
  i32 at[4];
  u32 rank;
  bool pixels;
  u32 offsets[2];
};
void copy_tensor(const TensorCopy& copy);

struct GroupMultiply {
  float* d;
  u64 a, b;
  u32 columns, add;
  bool b_transposed, bf16;
};
void group_fence();
void group_multiply(GroupMultiply& multiply);
void group_commit();
void group_wait(u32 groups_left);

}  // namespace emulator

// ---- barriers in shared memory --------------------------------------------------------------------------------------

DEVI void mbarrier_init(u64* barrier, u32 count) { ::emulator::make_mbarrier(barrier, count); }
DEVI void mbarrier_init_fence() {}
DEVI void mbarrier_arrive(u64* barrier) { ::emulator::arrive(barrier, 0); }
DEVI void mbarrier_arrive_expect(u64* barrier, u32 bytes) { ::emulator::arrive(barrier, bytes); }
// A macro, so that a deadlock names the line.
#define mbarrier_wait(barrier, parity) ::emulator::wait_mbarrier(barrier, parity, EMULATOR_HERE)

// ---- the copy engine ------------------------------------------------------------------------------------------------

DEVI void tensor_map_prefetch(const TensorMap&) {}
DEVI void tensor_load_3d(void* to, const TensorMap& map, u64* barrier, i32 c0, i32 c1, i32 c2) {
  ::emulator::copy_tensor({to, &map, barrier, {c0, c1, c2, 0}, 3, false, {0, 0}});
}
DEVI void tensor_load_4d(void* to, const TensorMap& map, u64* barrier, i32 c, i32 x, i32 y, i32 n) {
  ::emulator::copy_tensor({to, &map, barrier, {c, x, y, n}, 4, false, {0, 0}});
}
DEVI void tensor_load_pixels(void* to, const TensorMap& map, u64* barrier, i32 c, i32 x, i32 y, i32 n, u32 offset_x,
                             u32 offset_y) {
  ::emulator::copy_tensor({to, &map, barrier, {c, x, y, n}, 4, true, {offset_x, offset_y}});
}

// ---- matrix products of a warpgroup -----------------------------------------------------------------------------------

DEVI void wgmma_fence() { ::emulator::group_fence(); }
DEVI void wgmma_commit() { ::emulator::group_commit(); }
template <i32 N> DEVI void wgmma_wait() { ::emulator::group_wait(N); }
template <i32 B_TRANSPOSED, i32 FRAGMENTS>
DEVI void wgmma(bf16, float (&d)[FRAGMENTS][4], u64 a, u64 b, u32 add) {
  ::emulator::GroupMultiply multiply{&d[0][0], a, b, FRAGMENTS * 8, add, B_TRANSPOSED != 0, true};
  ::emulator::group_multiply(multiply);
}
template <i32 B_TRANSPOSED, i32 FRAGMENTS>
DEVI void wgmma(f16, float (&d)[FRAGMENTS][4], u64 a, u64 b, u32 add) {
  ::emulator::GroupMultiply multiply{&d[0][0], a, b, FRAGMENTS * 8, add, B_TRANSPOSED != 0, false};
  ::emulator::group_multiply(multiply);
}
