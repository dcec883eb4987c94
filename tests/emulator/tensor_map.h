// What the stand-in driver puts into a tensor map, for the twin of the copy engine.
#pragma once

#include "emulator.h"

namespace emulator {

// At most four dimensions, the fastest first; strides of the others in bytes.
struct EncodedMap {
  static constexpr u32 MAGIC = 0x7e50a900u;
  u32 magic, rank;
  u64 base;
  u64 sizes[4], strides[3];
  u32 element_bytes, swizzle;  // 1 where 128 bytes are swizzled
  // Tiled: the box. Im2col: channels of a pixel, and pixels.
  u16 box[4];
  u8 steps[4];  // element strides
  // Im2col: the corners of the box that pixels go through, x then y, the upper ones from the last pixel.
  i8 lower[2], upper[2];
  u32 im2col, reserved;
};
static_assert(sizeof(EncodedMap) <= 128, "a tensor map has 128 bytes");

}  // namespace emulator
