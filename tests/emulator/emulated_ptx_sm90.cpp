// The work behind the wrappers of Hopper's instructions: barriers that count bytes, the copy engine, products of
// warpgroups. Late copies happen when every thread waits, late products when they are waited for; what they will write
// is 0xFF until then.
#include <string.h>

#include <utility>

#define BOXWRIGHT_EMULATOR 1
#include "machine_parts.h"
#include "tensor_map.h"

struct bf16 {
  u16 bits;
};
struct f16 {
  u16 bits;
};
#include "emulated_ptx.h"
#include "emulated_ptx_sm90.h"

namespace emulator {

// ---- barriers in shared memory --------------------------------------------------------------------------------------

namespace {

// As one u64: arrivals of a phase, arrivals that are missing, bytes that are missing, parity of the running phase.
struct Mbarrier {
  u64 expected : 16, pending : 16, bytes : 31, parity : 1;
};
Mbarrier& mbarrier(u64* barrier) {
  static_assert(sizeof(Mbarrier) == 8, "one word");
  return *reinterpret_cast<Mbarrier*>(barrier);
}

// Ends the phase if nothing is missing, and wakes who waits for that.
void settle(u64* barrier) {
  Mbarrier& b = mbarrier(barrier);
  if (b.pending != 0 || b.bytes != 0) return;
  b.parity ^= 1;
  b.pending = b.expected;
  Machine& m = *current->machine;
  std::vector<MbarrierWait>& waits = m.mbarrier_waits;
  for (size_t i = 0; i < waits.size();) {
    if (waits[i].barrier == barrier && b.parity != waits[i].parity) {
      m.fibers[waits[i].fiber].where = nullptr;
      make_ready(m, waits[i].fiber);
      waits.erase(waits.begin() + (long)i);
    } else {
      ++i;
    }
  }
}

}  // namespace

void make_mbarrier(u64* barrier, u32 count) {
  if (count < 1 || count > 1024) fail("mbarrier_init: %u arrivals", count);
  Mbarrier& b = mbarrier(barrier);
  b.expected = count, b.pending = count, b.bytes = 0, b.parity = 0;
}

void arrive(u64* barrier, u32 bytes) {
  Mbarrier& b = mbarrier(barrier);
  if (b.expected == 0 || b.expected > 1024) fail("mbarrier_arrive: the barrier was not made");
  if (b.pending == 0) fail("mbarrier_arrive: more arrivals than the barrier was made for");
  b.bytes = b.bytes + bytes;
  b.pending = b.pending - 1;
  settle(barrier);
}

void wait_mbarrier(u64* barrier, u32 parity, const char* where) {
  Mbarrier& b = mbarrier(barrier);
  if (b.expected == 0 || b.expected > 1024) fail("%s: the barrier was not made", short_place(where));
  if (b.parity != (parity & 1)) return;
  current->machine->mbarrier_waits.push_back({current->index, barrier, parity & 1});
  wait(where);
}

// ---- the copy engine ------------------------------------------------------------------------------------------------

namespace {

u32 swizzled(u32 at) { return at ^ (at >> 7 & 7) << 4; }

// Bytes of a box.
u32 box_bytes(const EncodedMap& map) {
  u32 bytes = map.element_bytes;
  for (u32 i = 0; i < (map.im2col ? 2 : map.rank); ++i) bytes *= map.box[i];
  return bytes;
}

// One row of a box: `count` elements from coordinates `at`, zeros where they lie outside of the tensor.
void copy_row(const EncodedMap& map, u8* shared, u32 to, const i64 (&at)[4], u32 count) {
  const u8* from = reinterpret_cast<const u8*>(map.base);
  bool inside = true;
  for (u32 i = 1; i < map.rank; ++i) {
    inside = inside && at[i] >= 0 && at[i] < (i64)map.sizes[i];
    if (inside) from += (u64)at[i] * map.strides[i - 1];
  }
  for (u32 i = 0; i < count; ++i) {
    const i64 c = at[0] + i;
    u32 place = to + i * map.element_bytes;
    if (map.swizzle) place = swizzled(place);
    if (inside && c >= 0 && c < (i64)map.sizes[0]) {
      memcpy(shared + place, from + c * map.element_bytes, map.element_bytes);
    } else {
      memset(shared + place, 0, map.element_bytes);
    }
  }
}

void deliver(Machine& m, const Transfer& t) {
  const EncodedMap& map = *reinterpret_cast<const EncodedMap*>(&t.map);
  const u32 row_bytes = map.box[0] * map.element_bytes;
  if (map.im2col) {
    // Pixels go through x, then y, then images, in steps, between the corners.
    i64 at[4] = {t.at[0], t.at[1], t.at[2], t.at[3]};
    for (u32 pixel = 0; pixel < map.box[1]; ++pixel) {
      const i64 shifted[4] = {at[0], at[1] + t.offsets[0], at[2] + t.offsets[1], at[3]};
      copy_row(map, m.block.shared, t.to + pixel * row_bytes, shifted, map.box[0]);
      at[1] += map.steps[1];
      if (at[1] <= (i64)map.sizes[1] - 1 + map.upper[0]) continue;
      at[1] = map.lower[0];
      at[2] += map.steps[2];
      if (at[2] <= (i64)map.sizes[2] - 1 + map.upper[1]) continue;
      at[2] = map.lower[1];
      ++at[3];
    }
  } else {
    u32 to = t.to;
    const u32 n1 = map.rank > 1 ? map.box[1] : 1, n2 = map.rank > 2 ? map.box[2] : 1, n3 = map.rank > 3 ? map.box[3] : 1;
    for (u32 l = 0; l < n3; ++l) {
      for (u32 k = 0; k < n2; ++k) {
        for (u32 j = 0; j < n1; ++j, to += row_bytes) {
          const i64 at[4] = {t.at[0], (i64)t.at[1] + j, (i64)t.at[2] + k, (i64)t.at[3] + l};
          copy_row(map, m.block.shared, to, at, map.box[0]);
        }
      }
    }
  }
  Mbarrier& b = mbarrier(t.barrier);
  const u32 bytes = box_bytes(map);
  if (b.bytes < bytes) fail("tensor_load: brings %u bytes where %u are announced", bytes, (u32)b.bytes);
  b.bytes = b.bytes - bytes;
  settle(t.barrier);
}

}  // namespace

bool deliver_transfer(Machine& m) {
  std::vector<Transfer>& all = m.transfers;
  if (all.empty()) return false;
  size_t index = 0;
  if (m.settings.order == Order::last_in) index = all.size() - 1;
  if (m.settings.order == Order::random) index = (size_t)(next_random(m) >> 33) % all.size();
  const Transfer transfer = all[index];
  all.erase(all.begin() + (long)index);
  deliver(m, transfer);
  return true;
}

void copy_tensor(const TensorCopy& copy) {
  Machine& m = *current->machine;
  const EncodedMap& map = *reinterpret_cast<const EncodedMap*>(copy.map);
  if (map.magic != EncodedMap::MAGIC) fail("tensor_load: this is no tensor map");
  if (map.rank != copy.rank || (map.im2col != 0) != copy.pixels) fail("tensor_load: a tensor map of another kind");
  const u64 to = (u64)((const u8*)copy.to - m.block.shared);
  const u32 bytes = box_bytes(map);
  if (to % (map.swizzle ? 1024 : 128)) fail("tensor_load: the destination, %llu, is not aligned", to);
  if (to + bytes > m.block.shared_bytes) fail("tensor_load: writes past the end of dynamic shared memory");
  Transfer t;
  memcpy(&t.map, copy.map, sizeof t.map);
  t.to = (u32)to, t.barrier = copy.barrier;
  memcpy(t.at, copy.at, sizeof t.at);
  memcpy(t.offsets, copy.offsets, sizeof t.offsets);
  if (!m.block.late_copies) return deliver(m, t);
  memset(copy.to, 0xff, bytes);
  m.transfers.push_back(t);
}

// ---- products of warpgroups -----------------------------------------------------------------------------------------

namespace {

// Offset in shared memory of number (row, k) of a matrix: `row` counts m or n.
u32 matrix_offset(u64 matrix, bool transposed, u32 row, u32 k) {
  const u32 start = (u32)(matrix & 0x3fff) << 4;
  const u32 leading = (u32)(matrix >> 16 & 0x3fff) << 4, stride = (u32)(matrix >> 32 & 0x3fff) << 4;
  const u32 at = transposed ? row / 64 * leading + k / 8 * stride + k % 8 * 128 + row % 64 * 2
                            : row / 8 * stride + row % 8 * 128 + k * 2;
  return swizzled(start + at);
}

float read_number(const Block& block, u32 at, bool is_bf16) {
  if (at + 2 > block.shared_bytes) fail("wgmma: reads past the %u bytes of dynamic shared memory", block.shared_bytes);
  u16 bits;
  memcpy(&bits, block.shared + at, 2);
  return is_bf16 ? __uint_as_float((u32)bits << 16) : f16_to_f32(bits);
}

void multiply(const Block& block, const GroupProduct& p, float* sums) {
  static thread_local float a[64][16], b[16][256];
  for (u32 row = 0; row < 64; ++row) {
    for (u32 k = 0; k < 16; ++k) a[row][k] = read_number(block, matrix_offset(p.a, false, row, k), p.bf16);
  }
  for (u32 n = 0; n < p.columns; ++n) {
    for (u32 k = 0; k < 16; ++k) b[k][n] = read_number(block, matrix_offset(p.b, p.b_transposed, n, k), p.bf16);
  }
  for (u32 row = 0; row < 64; ++row) {
    float* d = sums + row * p.columns;
    if (!p.add) memset(d, 0, p.columns * sizeof(float));
    for (u32 k = 0; k < 16; ++k) {
      const float v = a[row][k];
      for (u32 n = 0; n < p.columns; ++n) d[n] += v * b[k][n];
    }
  }
}

// Calls `visit` with each number in a thread's registers and its place in the matrix.
template <class Visit> void each_number(const GroupSums& s, Visit visit) {
  for (u32 t = 0; t < 128; ++t) {
    const u32 lane = t & 31, row = (t >> 5) * 16 + (lane >> 2), column = (lane & 3) * 2;
    float* d = s.registers[t];
    for (u32 j = 0; j < s.columns / 8; ++j, d += 4) {
      for (u32 q = 0; q < 4; ++q) visit(d[q], (row + (q >> 1) * 8) * s.columns + j * 8 + column + (q & 1));
    }
  }
}

Group& my_group() { return current->machine->groups[current->index / 128]; }

// The 128 threads of the warpgroup meet; true for the last one, before the others go on.
bool meet_group(Group& g, const char* where, void* argument) {
  Machine& m = *current->machine;
  const u32 first = current->index & ~127u;
  if (first + 128 > m.threads) fail("%s: needs a warpgroup of 128 threads", where);
  if (g.arrived == 0) g.where = where;
  if (strcmp(g.where, where) != 0) fail("threads of one warpgroup meet in %s and %s", g.where, where);
  g.arguments[current->index & 127] = argument;
  if (++g.arrived < 128) {
    wait(where);
    return false;
  }
  g.arrived = 0;
  for (u32 i = 0; i < 128; ++i) {
    if (first + i == current->index) continue;
    m.fibers[first + i].where = nullptr;
    make_ready(m, first + i);
  }
  return true;
}

void finish_product(const Block& block, Group& g, const GroupProduct& p) {
  for (size_t i = 0; i < g.sums.size(); ++i) {
    GroupSums& s = g.sums[i];
    if (s.registers[0] != p.registers0) continue;
    multiply(block, p, s.numbers.data());
    if (--s.products > 0) return;
    each_number(s, [&](float& number, u32 at) { number = s.numbers[at]; });
    g.sums.erase(g.sums.begin() + (long)i);
    return;
  }
}

}  // namespace

void group_fence() {
  Group& g = my_group();
  if (meet_group(g, "wgmma_fence", nullptr)) g.fenced = true;
}

void group_multiply(GroupMultiply& x) {
  Group& g = my_group();
  if (!meet_group(g, "wgmma", &x)) return;
  const Block& block = *current->block;
  if (!g.fenced) fail("wgmma: no wgmma_fence before it");
  if ((x.a >> 62) != 1 || (x.b >> 62) != 1) fail("wgmma: a matrix without 128-byte swizzle");
  if (x.columns > 256 || x.columns % 8) fail("wgmma: %u columns", x.columns);
  GroupProduct p{x.a, x.b, x.columns, x.add, x.b_transposed, x.bf16, x.d, 0};
  GroupSums* sums = nullptr;
  for (GroupSums& s : g.sums) {
    if (s.registers[0] == static_cast<GroupMultiply*>(g.arguments[0])->d) sums = &s;
  }
  if (!sums) {
    g.sums.emplace_back();
    sums = &g.sums.back();
    sums->columns = x.columns, sums->products = 0;
    sums->numbers.resize(64 * x.columns);
    for (u32 t = 0; t < 128; ++t) {
      const GroupMultiply& other = *static_cast<GroupMultiply*>(g.arguments[t]);
      if (other.a != x.a || other.b != x.b || other.add != x.add) fail("wgmma: threads give different descriptors");
      sums->registers[t] = other.d;
    }
    each_number(*sums, [&](float& number, u32 at) {
      sums->numbers[at] = number;
      if (block.late_copies) number = __uint_as_float(0xffffffffu);
    });
  }
  p.registers0 = sums->registers[0];
  p.batch = g.batches;
  ++sums->products;
  if (block.late_copies) {
    g.products.push_back(p);
  } else {
    finish_product(block, g, p);
  }
}

void group_commit() {
  Group& g = my_group();
  if (!meet_group(g, "wgmma_commit", nullptr)) return;
  ++g.batches;
  g.fenced = false;
}

void group_wait(u32 groups_left) {
  Group& g = my_group();
  if (!meet_group(g, "wgmma_wait", nullptr)) return;
  size_t done = 0;
  while (done < g.products.size() && g.products[done].batch + groups_left < g.batches) {
    finish_product(*current->block, g, g.products[done++]);
  }
  g.products.erase(g.products.begin(), g.products.begin() + (long)done);
}

void reset_groups(Machine& m) {
  m.transfers.clear(), m.mbarrier_waits.clear();
  for (Group& g : m.groups) {
    g.arrived = 0, g.batches = 0, g.fenced = false;
    g.sums.clear(), g.products.clear();
  }
}

}  // namespace emulator
