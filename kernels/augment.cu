// Training images made from decoded ones: mosaic, random perspective, mixup, cutmix, colour jitter, flips, in one pass.
//
// augment_gather, augment_gather_turned: out[i, y, x] of a batch [n, h, w, 3] of bytes, RGB. A table (`Sample`, `Base`)
// says for each image of the batch which sources it is made of. A pixel finds its place on the canvas (the mosaic of
// four, or the one image) by the inverse transform, reads the four source pixels around it and interpolates; no canvas
// exists. The first kernel serves batches without rotation, shear, perspective, mixup and cutmix (the published
// defaults): the places of columns and rows come from two short tables that the host made. The second does everything.
// augment_resize: scales a batch, pixel centres at half-integers, edges repeated (`multi_scale`).
//
// The numbers equal those of the CPU (`data/augment/{canvas,hsv,mixup,flip}.rs`, `data/rows.rs`) bit for bit: the
// axis-aligned interpolation is the same fixed-point arithmetic (8 bits between rows, 11 between columns); general
// coordinates are computed in double precision and the interpolation in single precision with every product rounded
// on its own; the growth of saturation and value is a table of 256 entries each, made by the host in double precision.
//
// Bytes: 3 written per pixel, and every source byte that the canvas shows read once from memory (neighbours find it in
// the cache): about 6 per pixel in all. Work: some 130 instructions per pixel, more than half of them the colour jitter,
// so the pass is bound by instructions rather than by memory; a batch of 64 at 640 px is 26 million pixels.
// Tiling: a block makes 32 x 32 pixels, a warp four rows of 32, a lane one pixel of each, so that the lanes of a load
// lie side by side and a tile's sources stay in the first-level cache in both directions. The two neighbours of a row
// are six bytes at any address: three aligned words and two shifts instead of six loads. The vertical blend treats two
// channels in one word. Results are turned into words in shared memory and written as rows of 96 bytes.
#include "common.cuh"

// A rectangle of the canvas and the image that lies on it. Canvas pixel (x, y) is at `origin + 3 (y pitch + x)`; the
// origin itself may lie outside of the image.
struct Patch {
  u64 origin;
  u32 pitch, reserved;
  i32 left, top, right, bottom;
};
// A canvas and the way back to it. Patches: top left, top right, bottom left, bottom right of the centre.
struct Base {
  Patch patches[4];
  double back[9];
  i32 centre_x, centre_y;
  i32 width, height;
  u32 taps;  // axis-aligned: first of `w` columns and `h` rows in the table of taps
  u32 kind;
};
struct BaseKind {
  static constexpr u32 aligned = 0, affine = 1, projective = 2;
};
// One image of the batch.
struct Sample {
  double ratio;  // share of its own in the mixture
  u32 own, mixed, pasted;  // bases
  u32 flags;
  i32 left, top, right, bottom;  // where `pasted` shows
  i32 hue;
  u32 reserved;
};
struct SampleFlag {
  static constexpr u32 flip_vertical = 1, flip_horizontal = 2, swap_channels = 4, jitter = 8, mixed = 16, pasted = 32;
};

struct AugmentArgs {
  u64 samples, bases;
  u64 growth;  // 512 bytes per image: saturation, value
  u64 taps;    // a pixel in the low half, signed, and the weight of the next in the high half
  u64 images;
  u32 h, w;
};
struct ResizeArgs {
  u64 from, to;
  u64 taps;  // `w` columns, `h` rows
  u32 source_h, source_w, h, w;
};

constexpr u32 border = 0x727272u;
constexpr u32 vertical_one = 256, horizontal_one = 2048;
constexpr u32 tile = 32, rows_per_warp = 4, warps = 8;

// Two neighbouring pixels: r0 g0 b0 r1, then g1 b1.
struct Two {
  u32 low, high;
};

DEVI Two load_two(u64 address) {
  const u32* words = reinterpret_cast<const u32*>(address & ~3ull);
  const u32 by = ((u32)address & 3u) * 8;
  const u32 a = __ldg(words), b = __ldg(words + 1), c = __ldg(words + 2);
  return {__funnelshift_r(a, b, by), __funnelshift_r(b, c, by)};
}
DEVI u32 load_one(u64 address) {
  const u8* p = reinterpret_cast<const u8*>(address);
  return (u32)__ldg(p) | (u32)__ldg(p + 1) << 8 | (u32)__ldg(p + 2) << 16;
}
DEVI Two two_of(u32 first, u32 second) { return {first | second << 24, second >> 8}; }

// One canvas pixel, grey where nothing is.
DEVI u32 canvas_pixel(const Base& base, i32 x, i32 y) {
  const Patch& p = base.patches[(x >= base.centre_x ? 1 : 0) + (y >= base.centre_y ? 2 : 0)];
  if (x < p.left || x >= p.right || y < p.top || y >= p.bottom) return border;
  return load_one(p.origin + (i64)(3 * (y * (i32)p.pitch + x)));
}

// The pixels (x, y), (x + 1, y) and (x, y + 1), (x + 1, y + 1).
DEVI void square(const Base& base, i32 x, i32 y, Two& upper, Two& lower) {
  const Patch* p = base.patches + (x >= base.centre_x ? 1 : 0) + (y >= base.centre_y ? 2 : 0);
  const uint4 source = __ldg(reinterpret_cast<const uint4*>(p));
  const int4 rect = __ldg(reinterpret_cast<const int4*>(p) + 1);
  if (x >= rect.x && x + 1 < rect.z && y >= rect.y && y + 1 < rect.w) {
    const u64 origin = (u64)source.y << 32 | source.x;
    const u64 address = origin + (i64)(3 * (y * (i32)source.z + x));
    upper = load_two(address);
    lower = load_two(address + 3 * source.z);
  } else {
    upper = two_of(canvas_pixel(base, x, y), canvas_pixel(base, x + 1, y));
    lower = two_of(canvas_pixel(base, x, y + 1), canvas_pixel(base, x + 1, y + 1));
  }
}

DEVI u32 packed(u32 r, u32 g, u32 b) { return r | g << 8 | b << 16; }

// Fixed-point interpolation: weights of the right column (of 2048) and of the lower row (of 256).
DEVI u32 interpolate_fixed(Two upper, Two lower, u32 column, u32 row) {
  constexpr u32 mask = 0x00ff00ffu;
  const u32 first = vertical_one - row;
  // 255 * 256 fits 16 bits, so two channels go in one word: (r0, b0), (g0, r1), (g1, b1).
  const u32 rb = (upper.low & mask) * first + (lower.low & mask) * row;
  const u32 gr = (upper.low >> 8 & mask) * first + (lower.low >> 8 & mask) * row;
  const u32 gb = __byte_perm(upper.high, 0, 0x4140) * first + __byte_perm(lower.high, 0, 0x4140) * row;
  const u32 left = horizontal_one - column;
  const u32 r = ((rb & 0xffffu) * left + (gr >> 16) * column + (1u << 18)) >> 19;
  const u32 g = ((gr & 0xffffu) * left + (gb & 0xffffu) * column + (1u << 18)) >> 19;
  const u32 b = ((rb >> 16) * left + (gb >> 16) * column + (1u << 18)) >> 19;
  return packed(r, g, b);
}

// `a (1 - t) + b t` with each product rounded on its own.
DEVI float between(float a, float b, float t) { return __fmul_rn(a, 1.0f - t) + __fmul_rn(b, t); }
DEVI u32 interpolate_channel(u32 a, u32 b, u32 c, u32 d, float u, float v) {
  const float upper = between((float)(a & 0xffu), (float)(b & 0xffu), u);
  const float lower = between((float)(c & 0xffu), (float)(d & 0xffu), u);
  return (u32)__float2int_rn(between(upper, lower, v));
}

// The whole number at or below `v`, which is small.
DEVI i32 floor_of(double v) {
  const i32 whole = (i32)v;
  return (double)whole > v ? whole - 1 : whole;
}
DEVI double row_of(const double* m, double x, double y) { return __dmul_rn(m[0], x) + __dmul_rn(m[1], y) + m[2]; }

// A pixel of a canvas that is turned, sheared or seen from aside.
DEVI u32 turned(const Base& base, i32 x, i32 y) {
  double at_x = row_of(base.back, (double)x, (double)y);
  double at_y = row_of(base.back + 3, (double)x, (double)y);
  if (base.kind == BaseKind::projective) {
    const double depth = row_of(base.back + 6, (double)x, (double)y);
    at_x = at_x / depth, at_y = at_y / depth;
  }
  // Written so that a coordinate that is not a number counts as outside.
  if (!(at_x > -1.0 && at_y > -1.0 && at_x < (double)base.width && at_y < (double)base.height)) return border;
  const i32 x0 = floor_of(at_x), y0 = floor_of(at_y);
  const float u = (float)(at_x - (double)x0), v = (float)(at_y - (double)y0);
  Two upper, lower;
  square(base, x0, y0, upper, lower);
  return packed(interpolate_channel(upper.low, upper.low >> 24, lower.low, lower.low >> 24, u, v),
                interpolate_channel(upper.low >> 8, upper.high, lower.low >> 8, lower.high, u, v),
                interpolate_channel(upper.low >> 16, upper.high >> 8, lower.low >> 16, lower.high >> 8, u, v));
}

// A pixel of a canvas whose rows and columns stay rows and columns.
DEVI u32 aligned(const AugmentArgs& args, const Base& base, i32 x, i32 y) {
  const u32* taps = reinterpret_cast<const u32*>(args.taps) + base.taps;
  const u32 column = __ldg(taps + x), row = __ldg(taps + args.w + y);
  Two upper, lower;
  square(base, (i32)(column << 16) >> 16, (i32)(row << 16) >> 16, upper, lower);
  return interpolate_fixed(upper, lower, column >> 16, row >> 16);
}

// `floor(ratio a + (1 - ratio) b)` in double precision.
DEVI u32 mix(u32 a, u32 b, double ratio) {
  u32 out = 0;
#pragma unroll
  for (u32 shift = 0; shift < 24; shift += 8) {
    const double own = __dmul_rn((double)(a >> shift & 0xffu), ratio);
    const double other = __dmul_rn((double)(b >> shift & 0xffu), 1.0 - ratio);
    out |= (u32)(i32)(own + other) << shift;
  }
  return out;
}

DEVI float unit(float v) { return fminf(fmaxf(v, 0.0f), 1.0f); }
DEVI u32 shaded(float value, float chroma, float inner) {
  return (u32)__float2int_rn(value - __fmul_rn(chroma, 1.0f - unit(inner)));
}

// Colour jitter in HSV; see `data/augment/hsv.rs`. Both quotients have at most 20 bits before the point and are never
// within half a divisor's reciprocal of a tie, so that approximate division rounds them right.
DEVI u32 jitter(u32 rgb, i32 turn, const u8* growth) {
  const i32 red = (i32)(rgb & 0xffu), green = (i32)(rgb >> 8 & 0xffu), blue = (i32)(rgb >> 16);
  const i32 most = max(max(red, green), blue);
  const i32 diff = most - min(min(red, green), blue);
  const i32 by_value = __float2int_rn(__fdividef((float)(255 << 12), (float)max(most, 1)));
  const i32 by_diff = __float2int_rn(__fdividef((float)(30 << 12), (float)max(diff, 1)));
  const i32 saturation = (diff * by_value + 2048) >> 12;
  const i32 sector = most == red     ? green - blue
                     : most == green ? blue - red + 2 * diff
                                     : red - green + 4 * diff;
  i32 turned = (sector * by_diff + 2048) >> 12;
  turned += turned < 0 ? 180 + turn : turn;
  turned -= turned >= 180 ? 180 : 0;
  const float grown = (float)__ldg(growth + saturation), value = (float)__ldg(growth + 256 + most);
  const float hue = __fmul_rn((float)turned, 1.0f / 30.0f);
  const float chroma = __fmul_rn(__fmul_rn(value, grown), 1.0f / 255.0f);
  return packed(shaded(value, chroma, fabsf(hue - 3.0f) - 1.0f), shaded(value, chroma, 2.0f - fabsf(hue - 2.0f)),
                shaded(value, chroma, 2.0f - fabsf(hue - 4.0f)));
}

template <bool everything> DEVI u32 finished(const AugmentArgs& args, const Sample& sample, i32 x, i32 y) {
  const Base* bases = reinterpret_cast<const Base*>(args.bases);
  const u32 flags = sample.flags;
  x = flags & SampleFlag::flip_horizontal ? (i32)args.w - 1 - x : x;
  y = flags & SampleFlag::flip_vertical ? (i32)args.h - 1 - y : y;
  u32 rgb;
  if (everything) {
    const bool pasted = (flags & SampleFlag::pasted) && x >= sample.left && x < sample.right && y >= sample.top &&
                        y < sample.bottom;
    const bool mixed = (flags & SampleFlag::mixed) && !pasted;
    u32 index = pasted ? sample.pasted : sample.own;
    // One copy of the code for both bases of a mixture.
    u32 first = 0;
#pragma unroll 1
    for (u32 pass = 0;; ++pass) {
      const Base& base = bases[index];
      rgb = base.kind == BaseKind::aligned ? aligned(args, base, x, y) : turned(base, x, y);
      if (!mixed || pass == 1) break;
      first = rgb, index = sample.mixed;
    }
    if (mixed) rgb = mix(first, rgb, sample.ratio);
  } else {
    rgb = aligned(args, bases[sample.own], x, y);
  }
  if (flags & SampleFlag::jitter) {
    rgb = jitter(rgb, sample.hue, reinterpret_cast<const u8*>(args.growth) + 512 * blockIdx.z);
  }
  return flags & SampleFlag::swap_channels ? __byte_perm(rgb, 0, 0x4012) : rgb;
}

// Turns the pixels of a warp's four rows into words and writes them. `pixel(x, y)` makes one.
template <class F> DEVI void write_rows(u8 (&staged)[warps][rows_per_warp * tile * 3], u64 image, u32 h, u32 w, F pixel) {
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const u32 left = blockIdx.x * tile, top = blockIdx.y * tile + warp * rows_per_warp;
  const u32 x = left + lane;
#pragma unroll 1
  for (u32 row = 0; row < rows_per_warp; ++row) {
    if (x >= w || top + row >= h) continue;
    const u32 rgb = pixel((i32)x, (i32)(top + row));
    u8* to = staged[warp] + (row * tile + lane) * 3;
    to[0] = (u8)rgb, to[1] = (u8)(rgb >> 8), to[2] = (u8)(rgb >> 16);
  }
  __syncwarp();
  const u32 columns = min(tile, w - left), rows = top < h ? min(rows_per_warp, h - top) : 0;
  if (w % 4 == 0) {
    constexpr u32 words = tile * 3 / 4;
    const u32* from = reinterpret_cast<const u32*>(staged[warp]);
#pragma unroll
    for (u32 i = lane; i < rows_per_warp * words; i += 32) {
      const u32 row = i / words, word = i % words;
      if (row >= rows || word >= columns * 3 / 4) continue;
      u8* to = reinterpret_cast<u8*>(image) + ((u64)(top + row) * w + left) * 3;
      reinterpret_cast<u32*>(to)[word] = from[i];
    }
  } else {
    for (u32 row = 0; row < rows; ++row) {
      u8* to = reinterpret_cast<u8*>(image) + ((u64)(top + row) * w + left) * 3;
      for (u32 i = lane; i < columns * 3; i += 32) to[i] = staged[warp][row * tile * 3 + i];
    }
  }
}

template <bool everything> DEVI void gather(const AugmentArgs& args) {
  __shared__ __align__(16) u8 staged[warps][rows_per_warp * tile * 3];
  const Sample& sample = reinterpret_cast<const Sample*>(args.samples)[blockIdx.z];
  const u64 image = args.images + (u64)blockIdx.z * args.h * args.w * 3;
  write_rows(staged, image, args.h, args.w,
             [&](i32 x, i32 y) { return finished<everything>(args, sample, x, y); });
}

KERNEL(augment_gather, AugmentArgs, 256) { gather<false>(args); }
KERNEL_RESIDENT(augment_gather_turned, AugmentArgs, 256, 4) { gather<true>(args); }

KERNEL(augment_resize, ResizeArgs, 256) {
  __shared__ __align__(16) u8 staged[warps][rows_per_warp * tile * 3];
  const u64 source = args.from + (u64)blockIdx.z * args.source_h * args.source_w * 3;
  const u32* taps = reinterpret_cast<const u32*>(args.taps);
  const u32 pitch = args.source_w * 3;
  const auto two_at = [&](u32 x, u32 y) {
    const u64 address = source + (u64)y * pitch + x * 3;
    if (x + 1 < args.source_w) return load_two(address);
    const u32 last = load_one(address);
    return two_of(last, last);
  };
  write_rows(staged, args.to + (u64)blockIdx.z * args.h * args.w * 3, args.h, args.w, [&](i32 x, i32 y) {
    const u32 column = __ldg(taps + x), row = __ldg(taps + args.w + y);
    const u32 x0 = column & 0xffffu, y0 = row & 0xffffu, y1 = min(y0 + 1, args.source_h - 1);
    return interpolate_fixed(two_at(x0, y0), two_at(x0, y1), column >> 16, row >> 16);
  });
}
