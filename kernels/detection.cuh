// What the kernels of detection share: the levels of a head, decoding, overlap, the arguments of the loss.
//
// Rust twins: `detect::head_cuda`, `detect::losses::detection_cuda` (arguments), `detect::boxes`, `detect::losses::{bce, dfl}` (formulas,
// same order of operations, so that the assignment has the CPU's bits but for the arc tangent).
#pragma once

#include "exact.cuh"

#define LEVELS_MAX 5u
#define TOPK_MAX 16u
#define NOT_OWNED 0xffffffffu
#define CONTESTED 0xfffffffeu

// One level of the head. 248 bytes.
struct HeadLevel {
  Tensor boxes, scores;                  // f32 [n, h, w, 4R], [n, h, w, nc]
  Tensor box_gradient, score_gradient;   // storage type, same shapes
  FastDivisor width, cells;              // w and h * w
  u32 first;                             // anchors of the levels before
  u32 first_unit;                        // units of the class term of the levels before
  u32 stride;                            // pixels of the network input per cell
  u32 flags;                             // see below
  u32 box_channels, score_channels;      // channels of the gradients that are written, padding included
};
#define BOXES_VECTOR 1u            // box logits can be read 16 bytes at a time
#define BOX_GRADIENT_VECTOR 2u     // and so on
#define SCORES_VECTOR 4u
#define SCORE_GRADIENT_VECTOR 8u

// A labelled box as the host sends it. 32 bytes.
struct TargetRow {
  float cx, cy, w, h;  // fractions of the network input
  u32 cls, image;
  u32 reserved0, reserved1;
};

// A labelled box in pixels, and the box in which its anchors are sought. 32 bytes.
struct PreparedTarget {
  float4 xyxy, bounds;
};

// A foreground anchor. 16 bytes.
struct Positive {
  u32 anchor;  // within its image
  u32 target;  // row over the whole batch
  float score;
  float overlap;
};

// What the gradients are multiplied with; written by `task_aligned_settle`. 32 bytes.
struct LossFactors {
  double norm, score_sum;
  float box, cls, dfl;
  u32 reserved;
};

// What the host reads. 32 bytes.
struct LossResults {
  float box, cls, dfl, total;
  double score_sum;
  u32 reserved0, reserved1;
};

struct DetectionArgs {
  HeadLevel levels[LEVELS_MAX];
  FastDivisor groups;   // groups of eight classes in a row
  u64 offsets;          // u32 [n + 1]: first target row of each image
  u64 targets;          // TargetRow
  u64 prepared;         // PreparedTarget, as many
  u64 maxima;           // u32 [2], as many: bits of the best metric and the best overlap
  u64 corners;          // float4 [n][anchor_pitch]: predicted corners, pixels
  u64 owners;           // u32 [n][anchor_pitch]
  u64 positives;        // Positive [n][anchor_pitch]
  u64 counts;           // u32 [n]: positives
  u64 image_sums;       // f64 [n]: sums of scores
  u64 partials;         // f64 [2 * box_blocks + class_blocks]
  u64 counters;         // u32 [2], zero between launches
  u64 factors;          // LossFactors
  u64 results;          // LossResults
  u64 scale;            // f32, or 0 for a scale of one
  u64 class_weights;    // f32 [nc], or 0
  u32 n, anchors, anchor_pitch, level_count;
  u32 nc, reg_max, topk, units;
  u32 box_blocks, box_blocks_per_image, class_blocks, reserved;
  float alpha, beta;
  float gain_box, gain_cls, gain_dfl, side_min;
  float input_w, input_h;
};

// Level of an anchor; `cell` becomes its cell.
template <class Args> DEVI u32 locate(const Args& args, u32 anchor, u32& cell) {
  u32 level = 0;
#pragma unroll
  for (u32 i = 1; i < LEVELS_MAX; ++i) level += (u32)(i < args.level_count && anchor >= args.levels[i].first);
  cell = anchor - args.levels[level].first;
  return level;
}

DEVI const float* box_row(const HeadLevel& level, u32 image, u32 y, u32 x) {
  return at<const float>(level.boxes, image, (i32)y, (i32)x);
}
DEVI const float* score_row(const HeadLevel& level, u32 image, u32 y, u32 x) {
  return at<const float>(level.scores, image, (i32)y, (i32)x);
}

// ---- exponential, sigmoid ----------------------------------------------------------------------------------------

// e^x for x <= 0; below -87 it gives e^-87; NaN stays.
DEVI Exact exp_negative(Exact x) {
  if (x.v < -87.0f) x = -87.0f;
  const Exact round = 12582912.0f;
  const Exact shifted = x * 1.44269504088896341f + round;
  const Exact k = shifted - round;
  const Exact r = (x - k * 0.6933594f) - k * -2.1219444e-4f;
  const Exact tail = r * (Exact(1.0f / 120.0f) + r * (Exact(1.0f / 720.0f) + r * Exact(1.0f / 5040.0f)));
  const Exact p =
      Exact(1.0f) +
      r * (Exact(1.0f) + r * (Exact(0.5f) + r * (Exact(1.0f / 6.0f) + r * (Exact(1.0f / 24.0f) + tail))));
  const u32 exponent = __float_as_uint(shifted.v) - 0x4b400000u + 127u;
  return p * __uint_as_float(exponent << 23);
}

DEVI float exact_sigmoid(float x) {
  const Exact z = exp_negative(x < 0.0f ? x : -x);
  const Exact share = Exact(1.0f) / (Exact(1.0f) + z);
  return x < 0.0f ? (z * share).v : share.v;
}

// ---- distances ---------------------------------------------------------------------------------------------------

// Expectation of one side's distribution over 16 bins, in the order of sums of the CPU.
DEVI float expectation16(const float (&x)[16]) {
  float top = -__uint_as_float(0x7f800000u);
#pragma unroll
  for (u32 i = 0; i < 16; ++i) top = x[i] > top ? x[i] : top;
  Exact sum[4], moment[4];
#pragma unroll
  for (u32 lane = 0; lane < 4; ++lane) sum[lane] = 0.0f, moment[lane] = 0.0f;
#pragma unroll
  for (u32 i = 0; i < 16; ++i) {
    const Exact p = exp_negative(Exact(x[i]) - top);
    sum[i & 3] = sum[i & 3] + p;
    moment[i & 3] = moment[i & 3] + Exact((float)i) * p;
  }
  const Exact all = ((sum[0] + sum[1]) + sum[2]) + sum[3];
  return ((((moment[0] + moment[1]) + moment[2]) + moment[3]) / all).v;
}

// A distribution over `bins` bins that is read twice more after this: its greatest logit, the reciprocal of the sum
// of exponentials, the expectation.
struct Softmax {
  float top, reciprocal, expectation, log_denominator;
};
DEVI float probability(const Softmax& s, float x) { return (exp_negative(Exact(x) - s.top) * s.reciprocal).v; }
DEVI Softmax softmax_of(const float* x, u32 bins) {
  Softmax s;
  s.top = -__uint_as_float(0x7f800000u);
  for (u32 i = 0; i < bins; ++i) s.top = x[i] > s.top ? x[i] : s.top;
  Exact sum = 0.0f;
  for (u32 i = 0; i < bins; ++i) sum = sum + exp_negative(Exact(x[i]) - s.top);
  s.reciprocal = (Exact(1.0f) / sum).v;
  Exact expectation = 0.0f;
  for (u32 i = 0; i < bins; ++i) expectation = expectation + Exact((float)i) * Exact(probability(s, x[i]));
  s.expectation = expectation.v;
  s.log_denominator = s.top + logf(sum.v);
  return s;
}

// Distance of one side from its logits.
DEVI float side_distance(const HeadLevel& level, const float* row, u32 bins) {
  if (bins == 1) return row[0];
  if (bins != 16) return softmax_of(row, bins).expectation;
  float v[16];
  if (level.flags & BOXES_VECTOR) {
#pragma unroll
    for (u32 i = 0; i < 16; i += 4) {
      const float4 q = *reinterpret_cast<const float4*>(row + i);
      v[i] = q.x, v[i + 1] = q.y, v[i + 2] = q.z, v[i + 3] = q.w;
    }
  } else {
#pragma unroll
    for (u32 i = 0; i < 16; ++i) v[i] = row[i];
  }
  return expectation16(v);
}

// ---- complete IoU ------------------------------------------------------------------------------------------------

#define IOU_EPS 1e-7f
#define ASPECT_FACTOR 0.405284703f  // 4 / pi^2 as the CPU rounds it

// Complete IoU of corner boxes `a` and `b`; `a_angle` is `aspect_angle(a)`, which many calls share.
DEVI float complete_iou(const float4& a, const float4& b, float a_angle) {
  const Exact a0 = a.x, a1 = a.y, a2 = a.z, a3 = a.w, b0 = b.x, b1 = b.y, b2 = b.z, b3 = b.w;
  const Exact aw = a2 - a0, ah = a3 - a1 + IOU_EPS, bw = b2 - b0, bh = b3 - b1 + IOU_EPS;
  const Exact iw = exact_max(exact_min(a2, b2) - exact_max(a0, b0), 0.0f);
  const Exact ih = exact_max(exact_min(a3, b3) - exact_max(a1, b1), 0.0f);
  const Exact intersection = iw * ih;
  const Exact both = aw * ah + bw * bh - intersection + IOU_EPS;
  const Exact iou = intersection / both;
  const Exact cw = exact_max(a2, b2) - exact_min(a0, b0), ch = exact_max(a3, b3) - exact_min(a1, b1);
  const Exact diagonal = cw * cw + ch * ch + IOU_EPS;
  const Exact dx = b0 + b2 - a0 - a2, dy = b1 + b3 - a1 - a3;
  const Exact distance = (dx * dx + dy * dy) / 4.0f;
  const Exact angle = Exact(atanf((bw / bh).v)) - Exact(a_angle);
  const Exact v = Exact(ASPECT_FACTOR) * angle * angle;
  const Exact alpha = v / (v - iou + Exact(1.0f + IOU_EPS));
  return (iou - (distance / diagonal + v * alpha)).v;
}
DEVI float aspect_angle(const float4& a) {
  return atanf(((Exact(a.z) - a.x) / (Exact(a.w) - a.y + IOU_EPS)).v);
}

// ---- sums of a block ---------------------------------------------------------------------------------------------

// Sum over the block in a fixed order; thread 0 gets it. `shared` has one place per warp.
DEVI double block_sum(double v, double* shared) {
  v = warp_sum(v);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = v;
  __syncthreads();
  double sum = 0.0;
  if (threadIdx.x == 0)
    for (u32 i = 0; i < blockDim.x / 32; ++i) sum += shared[i];
  return sum;
}

// True in the last block to come here; resets the counter. What the others wrote before is visible to it.
DEVI bool is_last_block(u32* counter, u32 blocks) {
  __shared__ u32 arrived;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    arrived = atomicAdd(counter, 1u);
  }
  __syncthreads();
  if (arrived + 1 != blocks) return false;
  __threadfence();
  if (threadIdx.x == 0) *counter = 0;
  return true;
}
