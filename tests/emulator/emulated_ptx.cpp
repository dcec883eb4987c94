// The work behind the wrappers of PTX: asynchronous copies, matrix loads and matrix products.
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif
#include <string>

#define BOXWRIGHT_EMULATOR 1
#include "machine_parts.h"

struct bf16 {
  u16 bits;
};
struct f16 {
  u16 bits;
};
#include "emulated_ptx.h"

namespace emulator {

// ---- asynchronous copies: late ones overwrite their destination with 0xFF at once and copy when waited for ---------

void copy_async(void* to, const void* from, bool valid) {
  Fiber& me = *current;
  const Block& block = *me.block;
  if (((uintptr_t)to | (uintptr_t)from) & 15) {
    fail("cp_async16: %p from %p is not aligned to 16 bytes", to, from);
  }
  const uintptr_t at = (uintptr_t)to - (uintptr_t)block.shared;
  // Static shared memory lies elsewhere; what begins in dynamic shared memory has to end there.
  if (at < block.shared_bytes && at + 16 > block.shared_bytes) {
    fail("cp_async16: writes past the %u bytes of dynamic shared memory", block.shared_bytes);
  }
#if defined(__SANITIZE_ADDRESS__)
  // The copy may happen much later: the place that issued it is the one to name.
  if (valid && __asan_region_is_poisoned(const_cast<void*>(from), 16)) (void)*(volatile const uint4*)from;
#endif
  if (block.late_copies) {
    memset(to, 0xff, 16);
    me.copies.push_back({to, from, valid});
  } else if (valid) {
    memcpy(to, from, 16);
  } else {
    memset(to, 0, 16);
  }
}

void close_copy_group() {
  Fiber& me = *current;
  if (me.block->late_copies) me.group_ends.push_back((u32)me.copies.size());
}

void wait_copies(u32 groups_left) {
  Fiber& me = *current;
  if (!me.block->late_copies) return;
  const u32 groups = (u32)me.group_ends.size();
  while (groups - me.groups_done > groups_left) {
    const u32 from = me.groups_done ? me.group_ends[me.groups_done - 1] : 0;
    for (u32 i = from; i < me.group_ends[me.groups_done]; ++i) {
      const PendingCopy& copy = me.copies[i];
      if (copy.valid) {
        memcpy(copy.to, copy.from, 16);
      } else {
        memset(copy.to, 0, 16);
      }
    }
    ++me.groups_done;
  }
  if (me.groups_done == groups && groups && me.group_ends.back() == me.copies.size()) {
    me.copies.clear(), me.group_ends.clear();
    me.groups_done = 0;
  }
}

// ---- matrix fragments ------------------------------------------------------------------------------------------

void load_matrices(Block& block, void* const* arguments, bool transposed) {
  for (u32 matrix = 0; matrix < 4; ++matrix) {
    const u16* rows[8];
    u32 lines[8] = {};
    for (u32 i = 0; i < 8; ++i) {
      const void* row = static_cast<MatrixLoad*>(arguments[matrix * 8 + i])->row;
      const uintptr_t at = (uintptr_t)row - (uintptr_t)block.shared;
      if ((uintptr_t)row & 15) fail("ldmatrix: the row at %p is not aligned to 16 bytes", row);
      if (at < block.shared_bytes && at + 16 > block.shared_bytes) {
        fail("ldmatrix: reads past the %u bytes of dynamic shared memory", block.shared_bytes);
      }
      rows[i] = static_cast<const u16*>(row);
      // 32 banks of 4 bytes: eight rows of 16 bytes are read at once if they lie in different eighths of 128 bytes.
      if (lines[at >> 4 & 7]++) ++block.bank_conflicts;
    }
    ++block.matrix_loads;
    for (u32 lane = 0; lane < 32; ++lane) {
      const u32 r = lane >> 2, c = (lane & 3) * 2;
      const u32 low = transposed ? rows[c][r] : rows[r][c], high = transposed ? rows[c + 1][r] : rows[r][c + 1];
      static_cast<MatrixLoad*>(arguments[lane])->words[matrix] = low | high << 16;
    }
  }
}

namespace {

template <bool BF16> void split(u32 word, float& low, float& high) {
  if (BF16) {
    low = __uint_as_float(word << 16), high = __uint_as_float(word & 0xffff0000u);
  } else {
    low = f16_to_f32((u16)(word & 0xffffu)), high = f16_to_f32((u16)(word >> 16));
  }
}

template <bool BF16> void multiply_16x8x16(void* const* arguments) {
  float a[16][16], b[16][8], d[16][8];
  for (u32 lane = 0; lane < 32; ++lane) {
    const Multiply& x = *static_cast<Multiply*>(arguments[lane]);
    const u32 g = lane >> 2, t = (lane & 3) * 2;
    split<BF16>(x.a[0], a[g][t], a[g][t + 1]);
    split<BF16>(x.a[1], a[g + 8][t], a[g + 8][t + 1]);
    split<BF16>(x.a[2], a[g][t + 8], a[g][t + 9]);
    split<BF16>(x.a[3], a[g + 8][t + 8], a[g + 8][t + 9]);
    split<BF16>(x.b0, b[t][g], b[t + 1][g]);
    split<BF16>(x.b1, b[t + 8][g], b[t + 9][g]);
    d[g][t] = x.d[0], d[g][t + 1] = x.d[1];
    d[g + 8][t] = x.d[2], d[g + 8][t + 1] = x.d[3];
  }
  for (u32 i = 0; i < 16; ++i) {
    for (u32 k = 0; k < 16; ++k) {
      for (u32 j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
    }
  }
  for (u32 lane = 0; lane < 32; ++lane) {
    float* out = static_cast<Multiply*>(arguments[lane])->d;
    const u32 g = lane >> 2, t = (lane & 3) * 2;
    out[0] = d[g][t], out[1] = d[g][t + 1];
    out[2] = d[g + 8][t], out[3] = d[g + 8][t + 1];
  }
}

}  // namespace

void multiply_matrices(void* const* arguments, bool bf16) {
  if (bf16) {
    multiply_16x8x16<true>(arguments);
  } else {
    multiply_16x8x16<false>(arguments);
  }
}

}  // namespace emulator
