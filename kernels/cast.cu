// Casts the master weights to the storage type before each pass.
//
// cast_<type>: out[i] = round(values[i]), i < count. Reads 4 bytes and writes 2 (or 4) per number: bound by memory.
// Eight numbers per thread, 16-byte accesses; both arrays start at multiples of 64 bytes, and the count is a
// multiple of 16, so no tail is left over.
#include "common.cuh"

struct CastArgs {
  u64 values, out;
  u64 count;
};

template <class T> DEVI void cast(const CastArgs& args) {
  const u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (i >= args.count) return;
  float v[8];
  load8(reinterpret_cast<const float*>(args.values) + i, v);
  store8(reinterpret_cast<T*>(args.out) + i, v);
}

KERNEL(cast_bf16, CastArgs, 256) { cast<bf16>(args); }
KERNEL(cast_f16, CastArgs, 256) { cast<f16>(args); }
