// From raw head outputs to detections: decoding, candidates, non-maximum suppression.
// CPU twin: `detect::decode::detect` and `detect::nms`; the same candidates, order and comparisons.
//
// A candidate is one 64-bit key: score bits, then the complement of (anchor, class). Scores are positive, so the
// greatest key is the best candidate and, on equal scores, the first; keys are unique, so the order in which they are
// found does not matter. N images, A anchors, C classes, K = max_nms, D = max_det.
//  * nms_decode: corners of every anchor in pixels, by way of centre form, whose rounding is part of the result. Four
//    threads per anchor, 16 R bytes read and 16 written; resets the state of the image.
//  * nms_collect_all, nms_collect_best: a unit is eight classes of an anchor (or an anchor, of which the best class
//    counts). Reads 4 C bytes per anchor, bound by memory; logits safely below the threshold cost one comparison.
//    Appends the keys (one atomic per warp) and takes the extent of the boxes.
//  * nms_select, six launches that return at once where an image has no more than K candidates: radix selection of the
//    K-th greatest key, eleven bits at a time from the top: integer histograms over the head outputs, the last block
//    of an image picks the digit. The second nms_collect keeps the keys from there on.
//  * nms_suppress: one block of 1024 threads per image. D rounds at most: the greatest key left is kept, everything of
//    its class that overlaps it is dropped in the same sweep that finds the next one. Needs no sorting; the keys of an
//    image (at most 8 K bytes) stay in the first-level cache.
#include "common.cuh"
#include "detection.cuh"

#define CLASS_OFFSET_PX 7680.0f
#define BINS 2048u

// State of an image. 48 bytes.
struct NmsState {
  u64 threshold;   // keys from here on count; while selecting: its digits so far
  u32 count;       // candidates
  u32 listed;      // keys appended by the second collection
  u32 remaining;   // while selecting: rank of the key sought among those with these digits
  u32 arrived;     // blocks that finished their histogram
  u32 low, high;   // extent of the boxes as ordered bits
  u32 not_finite;  // a coordinate is not finite
  u32 kept;
  u32 reserved0, reserved1;
};

// A detection. 24 bytes.
struct Detection {
  float xyxy[4];
  float score;
  u32 cls;
};

struct NmsArgs {
  HeadLevel levels[LEVELS_MAX];
  FastDivisor groups;  // units of an anchor
  double iou;
  u64 corners;     // float4 [n][anchors]
  u64 keys;        // u64 [n][max_nms]
  u64 states;      // NmsState [n]
  u64 histograms;  // u32 [n][BINS], zero between launches
  u64 detections;  // Detection [n][max_det]
  u64 classes;     // u32 [(nc + 31) / 32], bits of the wanted ones, or 0 for all
  u32 n, anchors, level_count, nc;
  u32 reg_max, units, class_bits, max_nms;
  u32 max_det, is_agnostic, is_second, shift;
  float conf, logit_min;
};

DEVI NmsState& state_of(const NmsArgs& args, u32 image) { return reinterpret_cast<NmsState*>(args.states)[image]; }

// Bits that order like the numbers.
DEVI u32 ordered(float v) {
  const u32 bits = __float_as_uint(v);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
DEVI float from_ordered(u32 v) { return __uint_as_float(v & 0x80000000u ? v & 0x7fffffffu : ~v); }

// ---- decoding ----------------------------------------------------------------------------------------------------

KERNEL(nms_decode, NmsArgs, 256) {
  const u32 anchor = blockIdx.x * 64 + threadIdx.x / 4, side = threadIdx.x & 3, image = blockIdx.y;
  const u32 quad = 0xfu << (threadIdx.x & 28);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    NmsState state;
    state.threshold = 0, state.count = 0, state.listed = 0, state.remaining = args.max_nms, state.arrived = 0;
    state.low = 0xffffffffu, state.high = 0, state.not_finite = 0, state.kept = 0;
    state.reserved0 = 0, state.reserved1 = 0;
    state_of(args, image) = state;
  }
  if (anchor >= args.anchors) return;
  u32 cell, x;
  const HeadLevel& level = args.levels[locate(args, anchor, cell)];
  const u32 y = divide(level.width, cell, x);
  const float distance = side_distance(level, box_row(level, image, y, x) + side * args.reg_max, args.reg_max);
  const Exact point = Exact((float)(side & 1 ? y : x)) + 0.5f;
  const float corner = side < 2 ? (point - distance).v : (point + distance).v;
  const float other = __shfl_xor_sync(quad, corner, 2);
  const Exact low = side < 2 ? corner : other, high = side < 2 ? other : corner, stride = (float)level.stride;
  const Exact middle = (low + high) / 2.0f * stride, half = (high - low) * stride / 2.0f;
  float* out = reinterpret_cast<float*>(args.corners) + ((u64)image * args.anchors + anchor) * 4 + side;
  *out = side < 2 ? (middle - half).v : (middle + half).v;
}

// ---- candidates --------------------------------------------------------------------------------------------------

DEVI bool is_wanted(const NmsArgs& args, u32 cls) {
  return args.classes == 0 || (reinterpret_cast<const u32*>(args.classes)[cls / 32] >> (cls & 31) & 1u);
}
DEVI u64 key_of(const NmsArgs& args, float score, u32 anchor, u32 cls) {
  return (u64)__float_as_uint(score) << 32 | (u64)(~(anchor << args.class_bits | cls));
}
DEVI const float* logits_of(const NmsArgs& args, u32 image, u32 anchor, u32& flags) {
  u32 cell, x;
  const HeadLevel& level = args.levels[locate(args, anchor, cell)];
  const u32 y = divide(level.width, cell, x);
  flags = level.flags;
  return score_row(level, image, y, x);
}

// The candidates of one unit: their keys, zero where there is none.
struct All {
  static constexpr u32 most = 8;
  static __device__ __forceinline__ void find(const NmsArgs& args, u32 image, u32 unit, u32& anchor, u64 (&keys)[8]) {
    u32 group, flags;
    anchor = divide(args.groups, unit, group);
    const float* row = logits_of(args, image, anchor, flags) + group * 8;
    float v[8];
    if (flags & SCORES_VECTOR) {
      load8(row, v);
    } else {
#pragma unroll
      for (u32 i = 0; i < 8; ++i) v[i] = group * 8 + i < args.nc ? row[i] : -__uint_as_float(0x7f800000u);
    }
#pragma unroll
    for (u32 i = 0; i < 8; ++i) {
      keys[i] = 0;
      if (!(v[i] > args.logit_min)) continue;
      const float score = exact_sigmoid(v[i]);
      if (score > args.conf && is_wanted(args, group * 8 + i)) keys[i] = key_of(args, score, anchor, group * 8 + i);
    }
  }
};
struct Best {
  static constexpr u32 most = 1;
  static __device__ __forceinline__ void find(const NmsArgs& args, u32 image, u32 unit, u32& anchor, u64 (&keys)[1]) {
    u32 flags;
    anchor = unit;
    const float* row = logits_of(args, image, anchor, flags);
    float best = -__uint_as_float(0x7f800000u);
    u32 cls = 0;
    for (u32 i = 0; i < args.nc; ++i) {
      if (!(row[i] > args.logit_min)) continue;
      const float score = exact_sigmoid(row[i]);
      if (score > best) best = score, cls = i;
    }
    keys[0] = best > args.conf && is_wanted(args, cls) ? key_of(args, best, anchor, cls) : 0;
  }
};

DEVI u32 warp_reduce(u32 v, bool is_max) {
#pragma unroll
  for (i32 offset = 16; offset > 0; offset >>= 1) {
    const u32 other = __shfl_xor_sync(0xffffffffu, v, offset);
    v = is_max ? (other > v ? other : v) : (other < v ? other : v);
  }
  return v;
}

// Extent of the boxes of all candidates.
DEVI void take_extent(const NmsArgs& args, NmsState& state, u32 image, u32 anchor, bool has_any) {
  u32 low = 0xffffffffu, high = 0;
  if (has_any) {
    const float4 b = reinterpret_cast<const float4*>(args.corners)[(u64)image * args.anchors + anchor];
    const float v[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      if (!(v[i] - v[i] == 0.0f)) atomicOr(&state.not_finite, 1u);
      low = min(low, ordered(v[i])), high = max(high, ordered(v[i]));
    }
  }
  low = warp_reduce(low, false), high = warp_reduce(high, true);
  if ((threadIdx.x & 31) == 0) {
    atomicMin(&state.low, low);
    atomicMax(&state.high, high);
  }
}

template <class Find> DEVI void collect(const NmsArgs& args) {
  const u32 image = blockIdx.y, unit = blockIdx.x * 256 + threadIdx.x, lane = threadIdx.x & 31;
  NmsState& state = state_of(args, image);
  u64 threshold = 0;
  if (args.is_second) {
    if (state.count <= args.max_nms) return;
    threshold = state.threshold;
  }
  u64 keys[Find::most];
#pragma unroll
  for (u32 i = 0; i < Find::most; ++i) keys[i] = 0;
  u32 anchor = 0, own = 0;
  if (unit < args.units) Find::find(args, image, unit, anchor, keys);
#pragma unroll
  for (u32 i = 0; i < Find::most; ++i) {
    if (keys[i] < threshold) keys[i] = 0;
    own += keys[i] != 0;
  }
  if (!__any_sync(0xffffffffu, own != 0)) return;
  if (!args.is_second && !args.is_agnostic) take_extent(args, state, image, anchor, own != 0);
  u32 before = own;
#pragma unroll
  for (u32 offset = 1; offset < 32; offset *= 2) {
    const u32 other = __shfl_up_sync(0xffffffffu, before, offset);
    if (lane >= offset) before += other;
  }
  u32 first = 0;
  if (lane == 31) first = atomicAdd(args.is_second ? &state.listed : &state.count, before);
  u32 slot = __shfl_sync(0xffffffffu, first, 31) + before - own;
  u64* list = reinterpret_cast<u64*>(args.keys) + (u64)image * args.max_nms;
#pragma unroll
  for (u32 i = 0; i < Find::most; ++i) {
    if (keys[i] == 0) continue;
    if (slot < args.max_nms) list[slot] = keys[i];
    ++slot;
  }
}

KERNEL(nms_collect_all, NmsArgs, 256) { collect<All>(args); }
KERNEL(nms_collect_best, NmsArgs, 256) { collect<Best>(args); }

// ---- selection of the K-th greatest key ------------------------------------------------------------------------------

// Finds the digit of the key sought and clears the histogram.
DEVI void pick_digit(NmsState& state, u32* histogram, u32 shift, u32* sums) {
  volatile u32* counts = histogram;
  u32 own = 0;
  const u32 top = BINS - 1 - threadIdx.x * 8;  // this thread's greatest digit
  for (u32 i = 0; i < 8; ++i) own += counts[top - i];
  sums[threadIdx.x] = own;
  __syncthreads();
  if (threadIdx.x == 0) {
    u32 rank = state.remaining, thread = 0;
    while (thread < 255 && sums[thread] < rank) rank -= sums[thread++];
    u32 digit = BINS - 1 - thread * 8;
    for (u32 i = 0; i < 7 && counts[digit] < rank; ++i) rank -= counts[digit--];
    state.remaining = rank;
    state.threshold |= (u64)digit << shift;
    state.arrived = 0;
  }
  __syncthreads();
  for (u32 i = threadIdx.x; i < BINS; i += 256) counts[i] = 0;
}

// The digits above `shift + 11` are known; the last digit of all has nine bits.
template <class Find> DEVI void select(const NmsArgs& args) {
  __shared__ u32 bins[BINS];
  __shared__ u32 arrived;
  const u32 image = blockIdx.y, shift = args.shift;
  NmsState& state = state_of(args, image);
  if (state.count <= args.max_nms) return;
  const u64 known = state.threshold;
  const u32 width = shift == 0 ? 9 : 11;
  const bool is_first = shift + width >= 64;
  for (u32 i = threadIdx.x; i < BINS; i += 256) bins[i] = 0;
  __syncthreads();
  for (u32 unit = blockIdx.x * 256 + threadIdx.x; unit < args.units; unit += gridDim.x * 256) {
    u64 keys[Find::most];
    u32 anchor;
    Find::find(args, image, unit, anchor, keys);
#pragma unroll
    for (u32 i = 0; i < Find::most; ++i) {
      const bool fits = is_first || keys[i] >> (shift + width) == known >> (shift + width);
      if (keys[i] != 0 && fits) atomicAdd(&bins[(u32)(keys[i] >> shift) & ((1u << width) - 1)], 1u);
    }
  }
  __syncthreads();
  u32* histogram = reinterpret_cast<u32*>(args.histograms) + (u64)image * BINS;
  for (u32 i = threadIdx.x; i < BINS; i += 256)
    if (bins[i] != 0) atomicAdd(&histogram[i], bins[i]);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) arrived = atomicAdd(&state.arrived, 1u);
  __syncthreads();
  if (arrived + 1 != gridDim.x) return;
  __threadfence();
  pick_digit(state, histogram, shift, bins);
}

KERNEL_RESIDENT(nms_select_all, NmsArgs, 256, 4) { select<All>(args); }
KERNEL_RESIDENT(nms_select_best, NmsArgs, 256, 4) { select<Best>(args); }

// ---- suppression -------------------------------------------------------------------------------------------------

DEVI u64 greatest(u64 a, u64 b) { return a > b ? a : b; }

// Greatest key of the block; every thread gets it.
DEVI u64 block_greatest(u64 v, u64* shared) {
#pragma unroll
  for (i32 offset = 16; offset > 0; offset >>= 1) v = greatest(v, __shfl_xor_sync(0xffffffffu, v, offset));
  __syncthreads();
  if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = v;
  __syncthreads();
  v = shared[threadIdx.x & 31];
#pragma unroll
  for (i32 offset = 16; offset > 0; offset >>= 1) v = greatest(v, __shfl_xor_sync(0xffffffffu, v, offset));
  return v;
}

// Corners of a candidate, moved apart by class; the shift rounds, and that rounding is part of the result.
DEVI float4 shifted(const float4& b, float shift) {
  return make_float4((Exact(b.x) + shift).v, (Exact(b.y) + shift).v, (Exact(b.z) + shift).v, (Exact(b.w) + shift).v);
}
DEVI Exact area_of(const float4& b) { return (Exact(b.z) - b.x) * (Exact(b.w) - b.y); }
DEVI float overlap(const float4& kept, const float4& b) {
  const Exact w = exact_max(exact_min(kept.z, b.z) - exact_max(kept.x, b.x), 0.0f);
  const Exact h = exact_max(exact_min(kept.w, b.w) - exact_max(kept.y, b.y), 0.0f);
  const Exact intersection = w * h;
  return (intersection / (area_of(kept) + area_of(b) - intersection)).v;
}

KERNEL_RESIDENT(nms_suppress, NmsArgs, 1024, 1) {
  __shared__ u64 shared[32];
  const u32 image = blockIdx.x;
  NmsState& state = state_of(args, image);
  const u32 count = min(state.count, args.max_nms), mask = (1u << args.class_bits) - 1;
  u64* keys = reinterpret_cast<u64*>(args.keys) + (u64)image * args.max_nms;
  const float4* corners = reinterpret_cast<const float4*>(args.corners) + (u64)image * args.anchors;
  Detection* out = reinterpret_cast<Detection*>(args.detections) + (u64)image * args.max_det;
  // Shifted boxes of different classes cannot meet unless a box is wider than the shift: then compare all.
  const Exact extent = Exact(from_ordered(state.high)) - from_ordered(state.low);
  const bool is_apart =
      !args.is_agnostic && (count == 0 || (!state.not_finite && extent.v < CLASS_OFFSET_PX - 8.0f));
  u64 own = 0;
  for (u32 i = threadIdx.x; i < count; i += 1024) own = greatest(own, keys[i]);
  u32 kept = 0;
#pragma unroll 1
  for (; kept < args.max_det; ++kept) {
    const u64 best = block_greatest(own, shared);
    if (best == 0) break;
    const u32 place = ~(u32)best, cls = place & mask;
    const float4 box = corners[place >> args.class_bits];
    const float4 rival = shifted(box, args.is_agnostic ? 0.0f : (Exact((float)cls) * CLASS_OFFSET_PX).v);
    if (threadIdx.x == 0)
      out[kept] = Detection{{box.x, box.y, box.z, box.w}, __uint_as_float((u32)(best >> 32)), cls};
    own = 0;
    for (u32 i = threadIdx.x; i < count; i += 1024) {
      const u64 key = keys[i];
      if (key == 0) continue;
      const u32 other = ~(u32)key, other_class = other & mask;
      bool is_dropped = key == best;
      if (!is_dropped && (!is_apart || other_class == cls)) {
        const float shift = args.is_agnostic ? 0.0f : (Exact((float)other_class) * CLASS_OFFSET_PX).v;
        is_dropped = (double)overlap(rival, shifted(corners[other >> args.class_bits], shift)) > args.iou;
      }
      if (is_dropped) {
        keys[i] = 0;
      } else {
        own = greatest(own, key);
      }
    }
  }
  if (threadIdx.x == 0) state.kept = kept;
}
