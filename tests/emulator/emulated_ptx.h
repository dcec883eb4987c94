// The twins of the wrappers in `kernels/ptx.cuh`.
#pragma once

namespace emulator {

void copy_async(void* to, const void* from, bool valid);
void close_copy_group();
void wait_copies(u32 groups_left);

struct MatrixLoad {
  const void* row;
  u32* words;
};
struct Multiply {
  float* d;
  const u32* a;
  u32 b0, b1;
};

}  // namespace emulator

// ---- conversions ------------------------------------------------------------------------------------------------

DEVI float f16_to_f32(u16 bits) {
  const u32 sign = (u32)(bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // The exponent's bias differs by 112; multiplying also makes subnormal numbers normal.
  const float v = __uint_as_float(magnitude << 13) * 5.192296858534828e33f;
  return __uint_as_float(sign | __float_as_uint(v));
}
// To nearest, ties to even; what is too large becomes infinite, NaN the canonical one.
DEVI u16 f32_to_f16(float v) {
  const u32 u = __float_as_uint(v), magnitude = u & 0x7fffffffu;
  const u16 sign = (u16)(u >> 16 & 0x8000u);
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;
  if (magnitude < 0x38800000u) {
    // One unit in the last place of numbers in [0.5, 1) is the step of subnormal halves: the addition rounds.
    return sign | (u16)(__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u);
  }
  return sign | (u16)((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
}
DEVI u16 f32_to_bf16(float v) {
  const u32 u = __float_as_uint(v);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return (u16)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}
DEVI u32 f32x2_to_bf16x2(float low, float high) { return (u32)f32_to_bf16(low) | (u32)f32_to_bf16(high) << 16; }
DEVI u32 f32x2_to_f16x2(float low, float high) { return (u32)f32_to_f16(low) | (u32)f32_to_f16(high) << 16; }

// ---- asynchronous copies to shared memory -----------------------------------------------------------------------

DEVI u32 shared_address(const void* p) { return (u32)((const u8*)p - ::emulator::current->block->shared); }
DEVI void cp_async16(void* shared, const void* global, bool valid) { ::emulator::copy_async(shared, global, valid); }
DEVI void cp_async_commit() { ::emulator::close_copy_group(); }
template <i32 N> DEVI void cp_async_wait() { ::emulator::wait_copies(N); }

// ---- matrix fragments -------------------------------------------------------------------------------------------

DEVI void ldmatrix_x4(u32 (&r)[4], const void* row) {
  ::emulator::MatrixLoad load{row, r};
  ::emulator::meet(0xffffffffu, ::emulator::Meet::load_matrix, &load, "ldmatrix_x4");
}
DEVI void ldmatrix_x4_trans(u32 (&r)[4], const void* row) {
  ::emulator::MatrixLoad load{row, r};
  ::emulator::meet(0xffffffffu, ::emulator::Meet::load_matrix_transposed, &load, "ldmatrix_x4_trans");
}
DEVI void mma_16x8x16(bf16, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  ::emulator::Multiply multiply{d, a, b0, b1};
  ::emulator::meet(0xffffffffu, ::emulator::Meet::multiply_bf16, &multiply, "mma_16x8x16");
}
DEVI void mma_16x8x16(f16, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  ::emulator::Multiply multiply{d, a, b0, b1};
  ::emulator::meet(0xffffffffu, ::emulator::Meet::multiply_f16, &multiply, "mma_16x8x16");
}
