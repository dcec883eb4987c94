// The terms of the detection loss and their gradients, once the assignment is settled (`task_aligned.cu`).
// CPU twin: `detect::losses::{detection, bce, dfl}`, `detect::boxes`. Norm N and the factors of the gradients are read
// from device memory, as is the number of positives, so one captured launch serves every batch.
//
// detection_loss_terms_<type>: one launch, two kinds of blocks of 256 threads (images N, anchors A, classes C, bins R):
//  * class blocks: binary cross-entropy of every logit and its gradient. Reads 4 C bytes of logits and the owner of the
//    anchor (4 bytes), writes C sizeof(T) per anchor: bound by memory (6 bytes and about 45 operations per logit in
//    bf16). A unit is eight classes of one anchor, a block has 1024 units, four per thread, of which two are loaded
//    before either is worked on. Softplus and sigmoid come from one exponential and one division: with z = e^-|x|,
//    r = 1 / ((1 + z)(2 + z)), sigmoid is r (2 + z) and ln(1 + z) = 2 artanh(z r (1 + z)), whose series is accurate
//    relative to its value, however small. Channels of padding are written as zeros.
//  * box blocks, first in the grid: complete IoU, distribution focal loss (or L1 with one bin) and their gradient for
//    the positives alone, four threads per positive, one per side. The rest of the box gradient was zeroed by
//    `task_aligned_decode`. About 16 R bytes read and 4 R sizeof(T) written per positive.
// Sums: f32 within a thread (32 logits), f64 over the block and over blocks, all in a fixed order; the last block
// writes the loss. The cut into blocks depends on the shape alone.
#include "common.cuh"
#include "detection.cuh"

#define UNITS_PER_BLOCK 1024u

// ---- class term --------------------------------------------------------------------------------------------------

// Where a unit lies.
struct Unit {
  u32 level, image, y, x, first_class, anchor;
};
DEVI Unit unit_at(const DetectionArgs& args, u32 index) {
  Unit u;
  u.level = 0;
#pragma unroll
  for (u32 i = 1; i < LEVELS_MAX; ++i)
    u.level += (u32)(i < args.level_count && index >= args.levels[i].first_unit);
  const HeadLevel& level = args.levels[u.level];
  u32 group, cell;
  const u32 row = divide(args.groups, index - level.first_unit, group);
  u.image = divide(level.cells, row, cell);
  u.y = divide(level.width, cell, u.x);
  u.first_class = group * 8;
  u.anchor = level.first + cell;
  return u;
}

// Eight logits; classes that do not exist give minus infinity, which adds nothing and whose gradient is zero.
DEVI void load_logits(const DetectionArgs& args, const Unit& u, float (&x)[8]) {
  const HeadLevel& level = args.levels[u.level];
  const float* row = score_row(level, u.image, u.y, u.x) + u.first_class;
  if (level.flags & SCORES_VECTOR) {
    load8(row, x);
  } else {
#pragma unroll
    for (u32 i = 0; i < 8; ++i)
      x[i] = u.first_class + i < args.nc ? row[i] : -__uint_as_float(0x7f800000u);
  }
}

template <class T> DEVI void store_gradient(const DetectionArgs& args, const Unit& u, const float (&g)[8]) {
  const HeadLevel& level = args.levels[u.level];
  if (level.score_gradient.data == 0) return;
  T* row = at<T>(level.score_gradient, u.image, (i32)u.y, (i32)u.x) + u.first_class;
  if (level.flags & SCORE_GRADIENT_VECTOR) {
    store8(row, g);
  } else {
#pragma unroll
    for (u32 i = 0; i < 8; ++i)
      if (u.first_class + i < level.score_channels) row[i] = from_f32<T>(g[i]);
  }
}

// ln(1 + e^x); `share` becomes 1 / (1 + e^-x).
DEVI float softplus(float x, float& share) {
  const bool is_negative = x < 0.0f;
  const float z = expf(is_negative ? x : -x);
  const float r = __fdividef(1.0f, (1.0f + z) * (2.0f + z));
  const float positive_share = r * (2.0f + z), s = z * (r * (1.0f + z));
  share = is_negative ? z * positive_share : positive_share;
  const float q = s * s;
  const float high =
      1.0f / 9.0f + q * (1.0f / 11.0f + q * (1.0f / 13.0f + q * (1.0f / 15.0f + q * (1.0f / 17.0f))));
  const float series = 1.0f / 3.0f + q * (1.0f / 5.0f + q * (1.0f / 7.0f + q * high));
  return (is_negative ? 0.0f : x) + (2.0f * s + 2.0f * s * q * series);
}

// Loss of one unit; `x` becomes the gradient.
DEVI float class_unit(const DetectionArgs& args, const Unit& u, u32 owner, float factor, float (&x)[8]) {
  u32 wanted = NOT_OWNED;
  float score = 0.0f;
  if (owner != NOT_OWNED) {
    const Positive p =
        reinterpret_cast<const Positive*>(args.positives)[(u64)u.image * args.anchor_pitch + owner];
    wanted = reinterpret_cast<const TargetRow*>(args.targets)[p.target].cls - u.first_class;
    score = p.score;
  }
  const float* weights = reinterpret_cast<const float*>(args.class_weights);
  float loss = 0.0f;
#pragma unroll
  for (u32 i = 0; i < 8; ++i) {
    float share, weight = 1.0f;
    if (weights != nullptr && u.first_class + i < args.nc) weight = weights[u.first_class + i];
    const float logit = x[i];
    const float term = softplus(logit, share);
    const float coefficient = factor * weight;
    x[i] = coefficient * share;
    loss += weight * term;
    if (i == wanted) {
      x[i] -= coefficient * score;
      loss -= weight * logit * score;
    }
  }
  return loss;
}

template <class T> DEVI float class_term(const DetectionArgs& args, u32 block) {
  const float factor = reinterpret_cast<const LossFactors*>(args.factors)->cls;
  const u32* owners = reinterpret_cast<const u32*>(args.owners);
  float loss = 0.0f;
#pragma unroll 1
  for (u32 step = 0; step < UNITS_PER_BLOCK; step += 512) {
    const u32 first = block * UNITS_PER_BLOCK + step + threadIdx.x, second = first + 256;
    if (first >= args.units) break;
    // Past the end the second unit repeats the first and is dropped.
    const Unit a = unit_at(args, first), b = unit_at(args, second < args.units ? second : first);
    float x[8], y[8];
    load_logits(args, a, x);
    load_logits(args, b, y);
    const u32 owner_a = owners[(u64)a.image * args.anchor_pitch + a.anchor];
    const u32 owner_b = owners[(u64)b.image * args.anchor_pitch + b.anchor];
    loss += class_unit(args, a, owner_a, factor, x);
    store_gradient<T>(args, a, x);
    if (second < args.units) {
      loss += class_unit(args, b, owner_b, factor, y);
      store_gradient<T>(args, b, y);
    }
  }
  return loss;
}

// ---- box term ----------------------------------------------------------------------------------------------------

// Share of d min(a, b) / d a: one half where both are equal.
DEVI float share_of_min(float a, float b) { return a < b ? 1.0f : (a == b ? 0.5f : 0.0f); }

// Complete IoU of corner boxes and its gradient by corner `side` of `p`; the weight of the aspect term is constant.
DEVI float complete_iou_gradient(const float (&p)[4], const float (&q)[4], u32 side, float& gradient) {
  const float pw = p[2] - p[0], ph = p[3] - p[1] + IOU_EPS, qw = q[2] - q[0], qh = q[3] - q[1] + IOU_EPS;
  const float raw_w = fminf(p[2], q[2]) - fmaxf(p[0], q[0]), raw_h = fminf(p[3], q[3]) - fmaxf(p[1], q[1]);
  const float iw = fmaxf(raw_w, 0.0f), ih = fmaxf(raw_h, 0.0f), intersection = iw * ih;
  const float all = pw * ph + qw * qh - intersection + IOU_EPS, iou = intersection / all;
  const float cw = fmaxf(p[2], q[2]) - fminf(p[0], q[0]), ch = fmaxf(p[3], q[3]) - fminf(p[1], q[1]);
  const float diagonal = cw * cw + ch * ch + IOU_EPS;
  const float dx = q[0] + q[2] - p[0] - p[2], dy = q[1] + q[3] - p[1] - p[3];
  const float distance = (dx * dx + dy * dy) / 4.0f;
  const float angle = atanf(qw / qh) - atanf(pw / ph), v = ASPECT_FACTOR * angle * angle;
  const float alpha = v / (v - iou + (1.0f + IOU_EPS));

  const bool is_x = (side & 1) == 0, is_low = side < 2;
  const float a = is_low ? (is_x ? p[0] : p[1]) : (is_x ? p[2] : p[3]);
  const float b = is_low ? (is_x ? q[0] : q[1]) : (is_x ? q[2] : q[3]);
  // A width of exactly zero still passes its gradient.
  const float pass = (is_x ? raw_w : raw_h) >= 0.0f ? (is_x ? ih : iw) : 0.0f;
  const float d_intersection = is_low ? -pass * share_of_min(b, a) : pass * share_of_min(a, b);
  const float d_enclosing = is_low ? -share_of_min(a, b) : share_of_min(b, a);
  const float by_area = -iou / all;
  const float by_angle = 2.0f * alpha * ASPECT_FACTOR * angle / (pw * pw + ph * ph);
  const float by_side = is_x ? by_area * ph + by_angle * ph : by_area * pw - by_angle * pw;
  const float d_distance = -(is_x ? dx : dy) / 2.0f;
  const float d_diagonal = 2.0f * (is_x ? cw : ch) * d_enclosing;
  gradient = d_intersection * ((1.0f + iou) / all) - (d_distance - distance / diagonal * d_diagonal) / diagonal +
             (is_low ? -by_side : by_side);
  return iou - (distance / diagonal + v * alpha);
}

// One side of one positive: writes its gradient; sums get its share of both terms.
template <class T>
DEVI void box_side(const DetectionArgs& args, u32 image, const Positive& positive, double& box, double& third) {
  const LossFactors* factors = reinterpret_cast<const LossFactors*>(args.factors);
  const u32 side = threadIdx.x & 3, bins = args.reg_max, quad = 0xfu << (threadIdx.x & 28);
  u32 cell, x;
  const HeadLevel& level = args.levels[locate(args, positive.anchor, cell)];
  const u32 y = divide(level.width, cell, x);
  const float* logits = box_row(level, image, y, x) + side * bins;
  T* gradient = at<T>(level.box_gradient, image, (i32)y, (i32)x) + side * bins;
  Softmax s;
  if (bins == 1) {
    s.expectation = logits[0];
  } else {
    s = softmax_of(logits, bins);
  }
  const float point = (float)(side & 1 ? y : x) + 0.5f;
  const float corner = side < 2 ? point - s.expectation : point + s.expectation;
  const float4 xyxy = reinterpret_cast<const PreparedTarget*>(args.prepared)[positive.target].xyxy;
  const float stride = (float)level.stride;
  const float q[4] = {xyxy.x / stride, xyxy.y / stride, xyxy.z / stride, xyxy.w / stride};
  float p[4];
#pragma unroll
  for (i32 i = 0; i < 4; ++i) p[i] = __shfl_sync(quad, corner, i, 4);
  float d_corner;
  const float iou = complete_iou_gradient(p, q, side, d_corner);
  const float wanted_corner = side < 2 ? (side == 0 ? q[0] : q[1]) : (side == 2 ? q[2] : q[3]);
  const float wanted = side < 2 ? point - wanted_corner : wanted_corner - point;
  // The left and top distances are subtracted from the point.
  const float d_distance = -factors->box * positive.score * (side < 2 ? -1.0f : 1.0f) * d_corner;
  const float third_factor = factors->dfl * positive.score / 4.0f;
  if (side == 0) box += (double)(positive.score * (1.0f - iou));
  if (bins == 1) {
    const float unit = stride / (side & 1 ? args.input_h : args.input_w);
    const float difference = (s.expectation - wanted) * unit;
    const float direction = difference == 0.0f ? 0.0f : (difference < 0.0f ? -1.0f : 1.0f);
    third += (double)(positive.score * fabsf(difference) / 4.0f);
    if (level.box_gradient.data != 0) gradient[0] = from_f32<T>(d_distance + third_factor * direction * unit);
    return;
  }
  const float g = fminf(fmaxf(wanted, 0.0f), (float)(bins - 1) - 0.01f);
  const float left = floorf(g), weight_left = left + 1.0f - g, weight_right = g - left;
  const u32 l = (u32)left;
  third += (double)(positive.score *
                    -((logits[l] - s.log_denominator) * weight_left +
                      (logits[l + 1] - s.log_denominator) * weight_right) / 4.0f);
  if (level.box_gradient.data == 0) return;
  for (u32 bin = 0; bin < bins; ++bin) {
    const float share = probability(s, logits[bin]);
    float d = d_distance * share * ((float)bin - s.expectation) + third_factor * share;
    if (bin == l) d -= third_factor * weight_left;
    if (bin == l + 1) d -= third_factor * weight_right;
    gradient[bin] = from_f32<T>(d);
  }
}

template <class T> DEVI void box_term(const DetectionArgs& args, u32 block, double& box, double& third) {
  const u32 image = block / args.box_blocks_per_image, part = block % args.box_blocks_per_image;
  const u32 count = reinterpret_cast<const u32*>(args.counts)[image];
  const Positive* positives = reinterpret_cast<const Positive*>(args.positives) + (u64)image * args.anchor_pitch;
#pragma unroll 1
  for (u32 slot = part * 64 + threadIdx.x / 4; slot < count; slot += args.box_blocks_per_image * 64)
    box_side<T>(args, image, positives[slot], box, third);
  __syncwarp();
}

// ---- both --------------------------------------------------------------------------------------------------------

DEVI double sum_partials(const volatile double* p, u32 count, u32 stride, double* shared) {
  double sum = 0.0;
  for (u32 i = threadIdx.x; i < count; i += 256) sum += p[(u64)i * stride];
  return block_sum(sum, shared);
}

DEVI void finish_loss(const DetectionArgs& args, double* shared) {
  const volatile double* partials = reinterpret_cast<const volatile double*>(args.partials);
  const LossFactors* factors = reinterpret_cast<const LossFactors*>(args.factors);
  const double box = sum_partials(partials, args.box_blocks, 2, shared);
  const double third = sum_partials(partials + 1, args.box_blocks, 2, shared);
  const double cls = sum_partials(partials + 2 * args.box_blocks, args.class_blocks, 1, shared);
  if (threadIdx.x != 0) return;
  LossResults r;
  r.box = (float)(box * (double)args.gain_box / factors->norm);
  r.cls = (float)(cls * (double)args.gain_cls / factors->norm);
  r.dfl = (float)(third * (double)args.gain_dfl / factors->norm);
  r.total = (float)args.n * (r.box + r.cls + r.dfl);
  r.score_sum = factors->score_sum;
  r.reserved0 = 0, r.reserved1 = 0;
  *reinterpret_cast<LossResults*>(args.results) = r;
}

template <class T> DEVI void terms(const DetectionArgs& args) {
  __shared__ double shared[8];
  double* partials = reinterpret_cast<double*>(args.partials);
  if (blockIdx.x < args.box_blocks) {
    double box = 0.0, third = 0.0;
    box_term<T>(args, blockIdx.x, box, third);
    box = block_sum(box, shared);
    third = block_sum(third, shared);
    if (threadIdx.x == 0) partials[2 * blockIdx.x] = box, partials[2 * blockIdx.x + 1] = third;
  } else {
    const u32 block = blockIdx.x - args.box_blocks;
    const double loss = block_sum((double)class_term<T>(args, block), shared);
    if (threadIdx.x == 0) partials[2 * args.box_blocks + block] = loss;
  }
  if (is_last_block(reinterpret_cast<u32*>(args.counters) + 1, gridDim.x)) finish_loss(args, shared);
}

KERNEL_RESIDENT(detection_loss_terms_f32, DetectionArgs, 256, 3) { terms<float>(args); }
KERNEL_RESIDENT(detection_loss_terms_bf16, DetectionArgs, 256, 3) { terms<bf16>(args); }
KERNEL_RESIDENT(detection_loss_terms_f16, DetectionArgs, 256, 3) { terms<f16>(args); }
