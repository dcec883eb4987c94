// Batch normalisation: the passes over channels, small against the maps.
//
//  finish_stats       combines the partial statistics of a convolution's epilogue, f32 [row tile][2][c] (the sum over
//                     the tile's pixels; the sum of squared deviations from the tile's own mean), into mean, variance
//                     and inverse deviation, and moves the running statistics. With s, q, n of each tile and S, M of
//                     all: variance = (sum q + sum s^2 / n - S^2 / M) / M, in double: the pairwise formula of Chan,
//                     Golub and LeVeque (1983), summed over tiles.
//  backward_finish    combines the sums of `backward_reduce`, adds them to the gradients of weight and bias, and
//                     makes the coefficients of `backward_apply`; with frozen statistics only the latter.
//  bias_finish        adds the sums of `bias_reduce` to a bias gradient.
//  running_stats      mean and inverse deviation from the running statistics (frozen normalisation).
//  fold               a normalisation by running statistics as scale and shift, for evaluation.
//
// Moves the partials once: 8 bytes for each tile and channel, up to a few MB where a map is large (64 images of
// 320x320 in tiles of 128 pixels: 51,200 tiles). So the tiles are split over up to 256 blocks (blockIdx.x) and the
// channels over blocks of 32 (blockIdx.y); the last block of a channel block to arrive adds the ranges and finishes,
// which saves a launch. Every sum is in double, by a tree that depends on the shape alone.
#include "common.cuh"

// Rust twin: `batch_norm_act::cuda::Columns`. 48 bytes.
struct Columns {
  u64 partials;  // f32 [rows][..][c]
  u64 scratch;   // f64 [channel block][range][K][1 << lane_bits]; not used where there is one range
  u64 counters;  // u32 for each channel block, zero between launches
  u32 rows, rows_per_range, channels, lane_bits;
  u32 reserved, reserved2;
};

// Adds K columns of doubles over the slots of a block by a fixed tree; slot 0 keeps the sums. All threads call it.
template <i32 K> DEVI void tree(double (&board)[K][256], u32 lane_bits, double (&sums)[K]) {
#pragma unroll
  for (i32 k = 0; k < K; ++k) board[k][threadIdx.x] = sums[k];
  __syncthreads();
  for (u32 half = 128; half >> lane_bits; half >>= 1) {
    if (threadIdx.x < half) {
#pragma unroll
      for (i32 k = 0; k < K; ++k) board[k][threadIdx.x] += board[k][threadIdx.x + half];
    }
    __syncthreads();
  }
#pragma unroll
  for (i32 k = 0; k < K; ++k) sums[k] = board[k][threadIdx.x];
  __syncthreads();
}

// Sums over all rows of what `read(row, channel, sums)` adds. True for the threads that hold the sums of `channel`.
template <i32 K, class Read> DEVI bool column_sums(const Columns& a, Read read, u32& channel, double (&sums)[K]) {
  __shared__ double board[K][256];
  __shared__ u32 last;
  const u32 lanes = 1u << a.lane_bits, lane = threadIdx.x & (lanes - 1), slot = threadIdx.x >> a.lane_bits;
  const u32 slots = 256u >> a.lane_bits;
  channel = blockIdx.y * lanes + lane;
#pragma unroll
  for (i32 k = 0; k < K; ++k) sums[k] = 0.0;
  const u32 end = min(a.rows, (blockIdx.x + 1) * a.rows_per_range);
  if (channel < a.channels) {
#pragma unroll 4
    for (u32 row = blockIdx.x * a.rows_per_range + slot; row < end; row += slots) read(row, channel, sums);
  }
  tree<K>(board, a.lane_bits, sums);
  if (gridDim.x > 1) {
    double* scratch = reinterpret_cast<double*>(a.scratch) + (u64)blockIdx.y * gridDim.x * K * lanes;
    if (slot == 0) {
#pragma unroll
      for (i32 k = 0; k < K; ++k) scratch[(blockIdx.x * K + k) * lanes + lane] = sums[k];
    }
    __threadfence();
    __syncthreads();
    u32* counter = reinterpret_cast<u32*>(a.counters) + blockIdx.y;
    if (threadIdx.x == 0) last = atomicAdd(counter, 1u) == gridDim.x - 1;
    __syncthreads();
    if (last == 0) return false;
    __threadfence();
    if (threadIdx.x == 0) *counter = 0;
#pragma unroll
    for (i32 k = 0; k < K; ++k) sums[k] = 0.0;
    const volatile double* ranges = scratch;
#pragma unroll 4
    for (u32 range = slot; range < gridDim.x; range += slots) {
#pragma unroll
      for (i32 k = 0; k < K; ++k) sums[k] += ranges[(range * K + k) * lanes + lane];
    }
    tree<K>(board, a.lane_bits, sums);
  }
  return slot == 0 && channel < a.channels;
}

// ---- statistics of the forward pass -----------------------------------------------------------------------------

struct FinishStatsArgs {
  Columns columns;  // rows: tiles
  u64 stats;        // f32 [mean c][inverse_deviation c][variance c]
  u64 running_mean, running_variance;
  u32 rows_per_partial, pixels;
  float eps, momentum;
};

struct ReadStats {
  const float* partials;
  u32 channels, last;
  double inverse_full, inverse_last;
  __device__ __forceinline__ void operator()(u32 row, u32 channel, double (&sums)[3]) const {
    const float* at = partials + (u64)row * 2 * channels + channel;
    const double sum = at[0];
    sums[0] += sum;
    sums[1] += at[channels];
    sums[2] += sum * sum * (row == last ? inverse_last : inverse_full);
  }
};

DEVI void move_running(float* running, float batch, float momentum, float factor) {
  *running = (1.0f - momentum) * *running + momentum * (batch * factor);
}

KERNEL(batch_norm_act_finish_stats, FinishStatsArgs, 256) {
  const u32 rest = args.pixels - (args.columns.rows - 1) * args.rows_per_partial;
  const ReadStats read{reinterpret_cast<const float*>(args.columns.partials), args.columns.channels,
                       args.columns.rows - 1, 1.0 / args.rows_per_partial, 1.0 / rest};
  u32 channel;
  double sums[3];
  if (!column_sums<3>(args.columns, read, channel, sums)) return;
  const double count = args.pixels, mean = sums[0] / count;
  double variance = (sums[1] + (sums[2] - sums[0] * mean)) / count;
  if (variance < 0.0) variance = 0.0;  // NaN stays
  const float mean32 = (float)mean, variance32 = (float)variance;
  float* stats = reinterpret_cast<float*>(args.stats) + channel;
  stats[0] = mean32;
  stats[args.columns.channels] = 1.0f / sqrtf(variance32 + args.eps);
  stats[2 * args.columns.channels] = variance32;
  const u32 degrees = (args.pixels > 2 ? args.pixels : 2) - 1;
  move_running(reinterpret_cast<float*>(args.running_mean) + channel, mean32, args.momentum, 1.0f);
  move_running(reinterpret_cast<float*>(args.running_variance) + channel, variance32, args.momentum,
               (float)args.pixels / (float)degrees);
}

// ---- sums of the backward pass ----------------------------------------------------------------------------------

struct BackwardFinishArgs {
  Columns columns;  // rows: blocks of `backward_reduce`; 0 with frozen statistics
  u64 stats, weight, bias;
  u64 dweight, dbias;  // f32 [c], added to; not used with frozen statistics
  u64 coefficients;    // f32 [scale c][shift c][slope c][offset c]
  u32 pixels, reserved;
};

template <i32 K> struct ReadSums {
  const float* partials;
  u32 channels;
  __device__ __forceinline__ void operator()(u32 row, u32 channel, double (&sums)[K]) const {
#pragma unroll
    for (i32 k = 0; k < K; ++k) sums[k] += partials[((u64)row * K + k) * channels + channel];
  }
};

KERNEL(batch_norm_act_backward_finish, BackwardFinishArgs, 256) {
  const u32 c = args.columns.channels;
  const ReadSums<2> read{reinterpret_cast<const float*>(args.columns.partials), c};
  u32 channel;
  double sums[2];
  if (!column_sums<2>(args.columns, read, channel, sums)) return;
  const float* stats = reinterpret_cast<const float*>(args.stats) + channel;
  const float mean = stats[0], inverse = stats[c];
  const float scale = reinterpret_cast<const float*>(args.weight)[channel] * inverse;
  float* out = reinterpret_cast<float*>(args.coefficients) + channel;
  out[0] = scale;
  out[c] = reinterpret_cast<const float*>(args.bias)[channel] - mean * scale;
  float slope = 0.0f, offset = 0.0f;
  if (args.columns.rows != 0) {
    // sum d * xhat; then dy = scale * (d - mean_d - xhat * mean_dx), multiplied out.
    const double dweight = sums[1] * inverse;
    reinterpret_cast<float*>(args.dweight)[channel] += (float)dweight;
    reinterpret_cast<float*>(args.dbias)[channel] += (float)sums[0];
    const double per_pixel = -(double)scale / args.pixels, per_y = per_pixel * dweight * inverse;
    slope = (float)per_y;
    offset = (float)(per_pixel * sums[0] - per_y * mean);
  }
  out[2 * c] = slope;
  out[3 * c] = offset;
}

struct BiasFinishArgs {
  Columns columns;
  u64 dbias;  // f32 [c], added to
};

KERNEL(batch_norm_act_bias_finish, BiasFinishArgs, 256) {
  const ReadSums<1> read{reinterpret_cast<const float*>(args.columns.partials), args.columns.channels};
  u32 channel;
  double sums[1];
  if (column_sums<1>(args.columns, read, channel, sums)) {
    reinterpret_cast<float*>(args.dbias)[channel] += (float)sums[0];
  }
}

// ---- running statistics -----------------------------------------------------------------------------------------

struct RunningArgs {
  u64 running_mean, running_variance, weight, bias;  // weight and bias: `fold` only
  u64 first, second;                                 // mean and inverse deviation; or scale and shift
  u32 channels;
  float eps;
};

KERNEL(batch_norm_act_running_stats, RunningArgs, 256) {
  const u32 c = blockIdx.x * 256 + threadIdx.x;
  if (c >= args.channels) return;
  reinterpret_cast<float*>(args.first)[c] = reinterpret_cast<const float*>(args.running_mean)[c];
  reinterpret_cast<float*>(args.second)[c] =
      1.0f / sqrtf(reinterpret_cast<const float*>(args.running_variance)[c] + args.eps);
}

KERNEL(batch_norm_act_fold, RunningArgs, 256) {
  const u32 c = blockIdx.x * 256 + threadIdx.x;
  if (c >= args.channels) return;
  const float scale = reinterpret_cast<const float*>(args.weight)[c] /
                      sqrtf(reinterpret_cast<const float*>(args.running_variance)[c] + args.eps);
  reinterpret_cast<float*>(args.first)[c] = scale;
  reinterpret_cast<float*>(args.second)[c] = reinterpret_cast<const float*>(args.bias)[c] -
                                             reinterpret_cast<const float*>(args.running_mean)[c] * scale;
}
