// Tensor maps: the limits that the driver states, and the stand-in's own encoding.
#include <string.h>

#include "driver.h"
#include "tensor_map.h"

using namespace driver;

namespace {

u32 bytes_of(int type) {
  static const u8 bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  return type >= 0 && type < (int)sizeof bytes ? bytes[type] : 0;
}

// Fills what both kinds share; false where the driver would refuse.
bool encode(emulator::EncodedMap& map, void* out, int type, u32 rank, void* base, const u64* sizes, const u64* strides,
            u32 channels, const u32* steps, int interleave, int swizzle, int fill) {
  memset(&map, 0, sizeof map);
  map.magic = emulator::EncodedMap::MAGIC;
  map.rank = rank, map.base = (u64)base, map.element_bytes = bytes_of(type);
  // The stand-in knows what the kernels use: no interleaving, zeros outside, rows of 128 bytes or no swizzle.
  if (interleave != 0 || fill != 0 || (swizzle != 0 && swizzle != 3)) return false;
  map.swizzle = swizzle == 3;
  if (((u64)out & 63) || ((u64)base & 15) || !base || rank < 1 || rank > 4 || !map.element_bytes) return false;
  const u32 row = channels * map.element_bytes;
  if (row % 16 || (map.swizzle && row > 128) || steps[0] != 1) return false;
  for (u32 i = 0; i < rank; ++i) {
    if (sizes[i] < 1 || sizes[i] > 1ull << 32 || steps[i] < 1 || steps[i] > 8) return false;
    map.sizes[i] = sizes[i], map.steps[i] = (u8)steps[i];
    if (i == 0) continue;
    if (strides[i - 1] % 16 || strides[i - 1] >= 1ull << 40) return false;
    map.strides[i - 1] = strides[i - 1];
  }
  return true;
}

bool chip_has_maps() {
  Context* context;
  return use_context(context) == SUCCESS && behaviour_of(context->device).chip >= 90;
}

}  // namespace

EXPORT int cuTensorMapEncodeTiled(void* out, int type, u32 rank, void* base, const u64* sizes, const u64* strides,
                                  const u32* box, const u32* steps, int interleave, int swizzle, int, int fill) {
  emulator::EncodedMap map;
  if (!chip_has_maps()) return NOT_SUPPORTED;
  if (!encode(map, out, type, rank, base, sizes, strides, box[0], steps, interleave, swizzle, fill)) {
    return INVALID_VALUE;
  }
  for (u32 i = 0; i < rank; ++i) {
    // Boxes with gaps are not emulated.
    if (box[i] < 1 || box[i] > 256 || steps[i] != 1) return INVALID_VALUE;
    map.box[i] = (u16)box[i];
  }
  memset(out, 0, 128);
  memcpy(out, &map, sizeof map);
  return SUCCESS;
}

EXPORT int cuTensorMapEncodeIm2col(void* out, int type, u32 rank, void* base, const u64* sizes, const u64* strides,
                                   const int* lower, const int* upper, u32 channels, u32 pixels, const u32* steps,
                                   int interleave, int swizzle, int, int fill) {
  emulator::EncodedMap map;
  if (!chip_has_maps()) return NOT_SUPPORTED;
  if (rank != 4 || channels < 1 || channels > 256 || pixels < 1 || pixels > 1024) return INVALID_VALUE;
  if (!encode(map, out, type, rank, base, sizes, strides, channels, steps, interleave, swizzle, fill)) {
    return INVALID_VALUE;
  }
  map.im2col = 1;
  map.box[0] = (u16)channels, map.box[1] = (u16)pixels;
  for (u32 i = 0; i < 2; ++i) {
    if (lower[i] < -128 || lower[i] > 127 || upper[i] < -128 || upper[i] > 127) return INVALID_VALUE;
    // The box has a pixel.
    if (lower[i] > (i64)sizes[i + 1] - 1 + upper[i]) return INVALID_VALUE;
    map.lower[i] = (i8)lower[i], map.upper[i] = (i8)upper[i];
  }
  memset(out, 0, 128);
  memcpy(out, &map, sizeof map);
  return SUCCESS;
}
