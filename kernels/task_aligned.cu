// Task-aligned assignment of anchor points to targets (Feng et al., "TOOD", 2021) on raw head outputs.
// CPU twin: `detect::assigners::task_aligned`; the same rules, ties and order of operations.
//
// Three kernels, launched one after another; N images, A anchors, M boxes in the batch, R bins, K = top-k:
//  * task_aligned_decode_<type>: per anchor the predicted corners in pixels; resets the owner; writes zeros over the
//    box gradient. Reads 16 R bytes per anchor, writes 20 + 4 R sizeof(T). Four threads per anchor, one per side, so
//    that a side's 16 logits stay in registers and nothing is exchanged. 64 exponentials per anchor in plain f32.
//  * task_aligned_choose: one block of 128 threads per box (striding over the boxes; their number is read from device
//    memory, so that a captured graph replays with other counts). The anchors inside the box are found from the
//    grids; each thread keeps its best 16 in registers, the warps' lists are merged by K rounds of maxima. A key is
//    (metric bits, ~anchor): the greatest key is the best metric, on ties the lower anchor. Claims are integer
//    compare-and-swaps whose outcome does not depend on their order: one claim gives the owner, two or more contest.
//  * task_aligned_settle: one block of 1024 threads per image. Lists the claimed anchors in ascending order (one
//    block-wide scan), gives each contested one to the box that it overlaps most, takes each box's maxima (integer
//    maxima of the bits of positive floats), scores, sums. The last block sums the images in order and works out
//    what the gradients are multiplied with. 4 A bytes read per image; the rest is proportional to the positives.
// All sums are f64 in an order that depends on the data of the image alone.
#include "common.cuh"
#include "detection.cuh"

// ---- decode ------------------------------------------------------------------------------------------------------

template <class T> DEVI void clear(T* p, u32 count, bool is_vector) {
  if (is_vector) {
    for (u32 i = 0; i < count * sizeof(T); i += 16)
      *reinterpret_cast<uint4*>(reinterpret_cast<u8*>(p) + i) = make_uint4(0, 0, 0, 0);
  } else {
    for (u32 i = 0; i < count; ++i) p[i] = from_f32<T>(0.0f);
  }
}

template <class T> DEVI void decode(const DetectionArgs& args) {
  const u32 anchor = blockIdx.x * 64 + threadIdx.x / 4, side = threadIdx.x & 3, image = blockIdx.y;
  if (anchor >= args.anchor_pitch) return;
  const u64 place = (u64)image * args.anchor_pitch + anchor;
  if (side == 0) reinterpret_cast<u32*>(args.owners)[place] = NOT_OWNED;
  if (anchor >= args.anchors) return;
  u32 cell, x;
  const HeadLevel& level = args.levels[locate(args, anchor, cell)];
  const u32 y = divide(level.width, cell, x), bins = args.reg_max;
  const float* row = box_row(level, image, y, x) + side * bins;
  const float distance = side_distance(level, row, bins);
  const Exact point = Exact((float)(side & 1 ? y : x)) + 0.5f;
  const Exact corner = side < 2 ? point - distance : point + distance;
  reinterpret_cast<float*>(args.corners)[place * 4 + side] = (corner * (float)level.stride).v;

  if (level.box_gradient.data == 0) return;
  T* gradient = at<T>(level.box_gradient, image, (i32)y, (i32)x) + side * bins;
  const bool is_vector = (level.flags & BOX_GRADIENT_VECTOR) && (bins * sizeof(T)) % 16 == 0;
  clear(gradient, bins, is_vector);
  if (side == 3 && level.box_channels > 4 * bins) clear(gradient + bins, level.box_channels - 4 * bins, false);
}

KERNEL(task_aligned_decode_f32, DetectionArgs, 256) { decode<float>(args); }
KERNEL(task_aligned_decode_bf16, DetectionArgs, 256) { decode<bf16>(args); }
KERNEL(task_aligned_decode_f16, DetectionArgs, 256) { decode<f16>(args); }

// ---- choose ------------------------------------------------------------------------------------------------------

// A row is padding unless its coordinates sum to more than zero.
DEVI bool is_valid(const float4& b) { return (((Exact(b.x) + b.y) + b.z) + b.w).v > 0.0f; }

DEVI float4 corners_of(Exact cx, Exact cy, Exact w, Exact h) {
  const Exact half_w = w / 2.0f, half_h = h / 2.0f;
  return make_float4((cx - half_w).v, (cy - half_h).v, (cx + half_w).v, (cy + half_h).v);
}

// Sides below `side_min` are set to it about the same centre. The way through centre form rounds, and that is part
// of the result.
DEVI PreparedTarget prepare(const DetectionArgs& args, const TargetRow& row) {
  const Exact w = args.input_w, h = args.input_h;
  PreparedTarget p;
  p.xyxy = corners_of(Exact(row.cx) * w, Exact(row.cy) * h, Exact(row.w) * w, Exact(row.h) * h);
  const float4 b = p.xyxy;
  const Exact cx = (Exact(b.x) + b.z) / 2.0f, cy = (Exact(b.y) + b.w) / 2.0f;
  Exact bw = Exact(b.z) - b.x, bh = Exact(b.w) - b.y;
  if (is_valid(b)) {
    if (bw < args.side_min) bw = args.side_min;
    if (bh < args.side_min) bh = args.side_min;
  }
  p.bounds = corners_of(cx, cy, bw, bh);
  return p;
}

DEVI bool is_between(Exact p, Exact low, Exact high) { return (p - low).v > 1e-9f && (high - p).v > 1e-9f; }
DEVI Exact centre(u32 index, u32 stride) { return (Exact((float)index) + 0.5f) * (float)stride; }

// Cells of one axis whose centre lies between `low` and `high`: first and number.
DEVI uint2 inside_range(float low, float high, u32 stride, u32 cells) {
  const float per_cell = (float)stride, limit = (float)cells;
  u32 first = (u32)fminf(fmaxf((Exact(low) / per_cell + -1.5f).v, 0.0f), limit);
  u32 last = (u32)fminf(fmaxf((Exact(high) / per_cell + 1.5f).v, 0.0f), limit);
  while (first < last && !is_between(centre(first, stride), low, high)) ++first;
  while (first < last && !is_between(centre(last - 1, stride), low, high)) --last;
  return make_uint2(first, last - first);
}

// Overlap as the metric uses it: complete IoU, not below zero.
DEVI float overlap(const float4& target, float angle, const float4& predicted) {
  const bool is_apart = predicted.x >= target.z || predicted.z <= target.x || predicted.y >= target.w ||
                        predicted.w <= target.y;
  return is_apart ? 0.0f : fmaxf(complete_iou(target, predicted, angle), 0.0f);
}

DEVI float metric(const DetectionArgs& args, float score, float overlap) {
  const Exact class_part = args.alpha == 0.5f ? exact_sqrt(score) : Exact(powf(score, args.alpha));
  const Exact u = overlap;
  const Exact cube = u * u * u;
  const Exact overlap_part = args.beta == 6.0f ? cube * cube : Exact(powf(overlap, args.beta));
  return (class_part * overlap_part).v;
}

// Probability of class `cls` at an anchor.
DEVI float probability_of(const DetectionArgs& args, u32 image, u32 anchor, u32 cls) {
  u32 cell, x;
  const HeadLevel& level = args.levels[locate(args, anchor, cell)];
  const u32 y = divide(level.width, cell, x);
  return exact_sigmoid(score_row(level, image, y, x)[cls]);
}

DEVI u64 warp_max_key(u64 v) {
#pragma unroll
  for (i32 offset = 16; offset > 0; offset >>= 1) {
    const u64 other = __shfl_xor_sync(0xffffffffu, v, offset);
    v = other > v ? other : v;
  }
  return v;
}

// Best keys of one thread, greatest first.
struct Best {
  u64 key[TOPK_MAX];
};
DEVI void insert(Best& best, u64 key) {
  if (key <= best.key[TOPK_MAX - 1]) return;
  best.key[TOPK_MAX - 1] = key;
#pragma unroll
  for (u32 i = TOPK_MAX - 1; i > 0; --i) {
    const u64 low = best.key[i], high = best.key[i - 1];
    best.key[i - 1] = low > high ? low : high;
    best.key[i] = low > high ? high : low;
  }
}

// The best keys of this thread among the anchors inside the target's bounds.
DEVI void gather(const DetectionArgs& args, const TargetRow& row, const PreparedTarget& target, Best& best) {
  const float angle = aspect_angle(target.xyxy);
  const float4* corners = reinterpret_cast<const float4*>(args.corners) + (u64)row.image * args.anchor_pitch;
#pragma unroll 1
  for (u32 l = 0; l < args.level_count; ++l) {
    const HeadLevel& level = args.levels[l];
    const uint2 columns = inside_range(target.bounds.x, target.bounds.z, level.stride, level.boxes.w);
    const uint2 rows = inside_range(target.bounds.y, target.bounds.w, level.stride, level.boxes.h);
#pragma unroll 1
    for (u32 i = threadIdx.x; i < columns.y * rows.y; i += 128) {
      const u32 y = rows.x + i / columns.y, x = columns.x + i % columns.y;
      const u32 anchor = level.first + y * level.boxes.w + x;
      const float u = overlap(target.xyxy, angle, corners[anchor]);
      if (!(u > 0.0f)) continue;
      const float m = metric(args, exact_sigmoid(score_row(level, row.image, y, x)[row.cls]), u);
      if (m > 0.0f) insert(best, (u64)__float_as_uint(m) << 32 | (u64)(~anchor));
    }
  }
}

DEVI void choose_for(const DetectionArgs& args, u32 index, u64* lists) {
  const TargetRow row = reinterpret_cast<const TargetRow*>(args.targets)[index];
  const PreparedTarget target = prepare(args, row);
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  if (threadIdx.x == 0) {
    reinterpret_cast<PreparedTarget*>(args.prepared)[index] = target;
    reinterpret_cast<uint2*>(args.maxima)[index] = make_uint2(0, 0);
  }
  Best best;
#pragma unroll
  for (u32 i = 0; i < TOPK_MAX; ++i) best.key[i] = 0;
  if (is_valid(target.xyxy)) gather(args, row, target, best);
  __syncwarp();
  u64 mine = 0;
#pragma unroll 1
  for (u32 round = 0; round < args.topk; ++round) {
    const u64 top = warp_max_key(best.key[0]);
    if (top == 0) break;
    if (best.key[0] == top) {
#pragma unroll
      for (u32 i = 0; i + 1 < TOPK_MAX; ++i) best.key[i] = best.key[i + 1];
      best.key[TOPK_MAX - 1] = 0;
    }
    if (lane == round) mine = top;
  }
  if (lane < TOPK_MAX) lists[warp * TOPK_MAX + lane] = mine;
  __syncthreads();
  if (warp == 0) {
    u64 low = lists[lane], high = lists[lane + 32], chosen = 0;
#pragma unroll 1
    for (u32 round = 0; round < args.topk; ++round) {
      const u64 top = warp_max_key(low > high ? low : high);
      if (top == 0) break;
      if (low == top) low = 0;
      if (high == top) high = 0;
      if (lane == round) chosen = top;
    }
    if (chosen != 0) {
      u32* owner = reinterpret_cast<u32*>(args.owners) + (u64)row.image * args.anchor_pitch + ~(u32)chosen;
      if (atomicCAS(owner, NOT_OWNED, index) != NOT_OWNED) atomicExch(owner, CONTESTED);
    }
  }
  __syncthreads();
}

KERNEL(task_aligned_choose, DetectionArgs, 128) {
  __shared__ u64 lists[4 * TOPK_MAX];
  const u32 total = reinterpret_cast<const u32*>(args.offsets)[args.n];
#pragma unroll 1
  for (u32 index = blockIdx.x; index < total; index += gridDim.x) choose_for(args, index, lists);
}

// ---- settle ------------------------------------------------------------------------------------------------------

#define SETTLE_THREADS 1024u

// Lists the claimed anchors of the image in ascending order; returns their number. Each thread takes one stretch of
// anchors, whose length is a multiple of four.
DEVI u32 list_claimed(const DetectionArgs& args, const u32* owners, Positive* positives, u32* warp_counts) {
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const u32 stretch = (args.anchor_pitch / 4 + SETTLE_THREADS - 1) / SETTLE_THREADS * 4;
  const u32 from = min(threadIdx.x * stretch, args.anchor_pitch), to = min(from + stretch, args.anchor_pitch);
  u32 count = 0;
  for (u32 i = from; i < to; i += 4) {
    const uint4 q = *reinterpret_cast<const uint4*>(owners + i);
    count += (u32)(q.x != NOT_OWNED) + (u32)(q.y != NOT_OWNED) + (u32)(q.z != NOT_OWNED) + (u32)(q.w != NOT_OWNED);
  }
  u32 before = count;  // inclusive scan over the warp, then over the warps
#pragma unroll
  for (u32 offset = 1; offset < 32; offset *= 2) {
    const u32 other = __shfl_up_sync(0xffffffffu, before, offset);
    if (lane >= offset) before += other;
  }
  if (lane == 31) warp_counts[warp] = before;
  __syncthreads();
  u32 total = 0;
  for (u32 i = 0; i < SETTLE_THREADS / 32; ++i) {
    if (i == warp) before += total;
    total += warp_counts[i];
  }
  u32 slot = before - count;
  if (count != 0) {
    for (u32 i = from; i < to; ++i) {
      const u32 owner = owners[i];
      if (owner != NOT_OWNED) positives[slot++] = Positive{i, owner, 0.0f, 0.0f};
    }
  }
  __syncthreads();
  return total;
}

// Owner, metric (as `score`) and overlap of one claimed anchor; among all boxes of the image if it is contested.
DEVI Positive settle_one(const DetectionArgs& args, Positive p, u32 image, u32 first, u32 end) {
  const PreparedTarget* prepared = reinterpret_cast<const PreparedTarget*>(args.prepared);
  const float4 predicted =
      reinterpret_cast<const float4*>(args.corners)[(u64)image * args.anchor_pitch + p.anchor];
  if (p.target == CONTESTED) {
    u32 cell, x;
    const HeadLevel& level = args.levels[locate(args, p.anchor, cell)];
    const u32 y = divide(level.width, cell, x);
    const Exact px = centre(x, level.stride), py = centre(y, level.stride);
    p.target = first;
    for (u32 t = first; t < end; ++t) {
      const PreparedTarget target = prepared[t];
      const bool is_inside =
          is_between(px, target.bounds.x, target.bounds.z) && is_between(py, target.bounds.y, target.bounds.w);
      if (!is_inside || !is_valid(target.xyxy)) continue;
      const float u = overlap(target.xyxy, aspect_angle(target.xyxy), predicted);
      if (u > p.overlap) p.target = t, p.overlap = u;
    }
  } else {
    const float4 xyxy = prepared[p.target].xyxy;
    p.overlap = overlap(xyxy, aspect_angle(xyxy), predicted);
  }
  const u32 cls = reinterpret_cast<const TargetRow*>(args.targets)[p.target].cls;
  p.score = metric(args, probability_of(args, image, p.anchor, cls), p.overlap);
  return p;
}

// What gradients are multiplied with, from the sums of the images.
DEVI void finish_scores(const DetectionArgs& args) {
  const volatile double* sums = reinterpret_cast<const volatile double*>(args.image_sums);
  double total = 0.0;
  for (u32 i = 0; i < args.n; ++i) total += sums[i];
  LossFactors f;
  f.score_sum = total;
  f.norm = total > 1.0 ? total : 1.0;
  const double scale = args.scale != 0 ? (double)*reinterpret_cast<const float*>(args.scale) : 1.0;
  const double to_total = (double)args.n * scale / f.norm;
  f.box = (float)(to_total * (double)args.gain_box);
  f.cls = (float)(to_total * (double)args.gain_cls);
  f.dfl = (float)(to_total * (double)args.gain_dfl);
  f.reserved = 0;
  *reinterpret_cast<LossFactors*>(args.factors) = f;
}

KERNEL(task_aligned_settle, DetectionArgs, SETTLE_THREADS) {
  __shared__ u32 warp_counts[SETTLE_THREADS / 32];
  __shared__ double sums[SETTLE_THREADS / 32];
  const u32 image = blockIdx.x;
  const u32 *offsets = reinterpret_cast<const u32*>(args.offsets), first = offsets[image], end = offsets[image + 1];
  u32* owners = reinterpret_cast<u32*>(args.owners) + (u64)image * args.anchor_pitch;
  Positive* positives = reinterpret_cast<Positive*>(args.positives) + (u64)image * args.anchor_pitch;
  u32* maxima = reinterpret_cast<u32*>(args.maxima);
  double sum = 0.0;
  u32 count = 0;
  if (first != end) {
    count = list_claimed(args, owners, positives, warp_counts);
    for (u32 slot = threadIdx.x; slot < count; slot += SETTLE_THREADS) {
      const Positive p = settle_one(args, positives[slot], image, first, end);
      positives[slot] = p;
      atomicMax(&maxima[2 * p.target], __float_as_uint(p.score));
      atomicMax(&maxima[2 * p.target + 1], __float_as_uint(p.overlap));
    }
    __syncthreads();
    for (u32 slot = threadIdx.x; slot < count; slot += SETTLE_THREADS) {
      Positive p = positives[slot];
      const volatile u32* best = maxima + 2 * p.target;
      const Exact metric_max = __uint_as_float(best[0]), overlap_max = __uint_as_float(best[1]);
      p.score = (Exact(p.score) * overlap_max / (metric_max + 1e-9f)).v;
      positives[slot].score = p.score;
      owners[p.anchor] = slot;  // from here on: the place in the list
      sum += (double)p.score;
    }
  }
  sum = block_sum(sum, sums);
  if (threadIdx.x == 0) {
    reinterpret_cast<u32*>(args.counts)[image] = count;
    reinterpret_cast<double*>(args.image_sums)[image] = sum;
  }
  if (is_last_block(reinterpret_cast<u32*>(args.counters), gridDim.x) && threadIdx.x == 0) finish_scores(args);
}
