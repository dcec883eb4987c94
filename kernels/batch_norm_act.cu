// Batch normalisation, activation and shortcut: the passes over activation maps. All are bound by memory.
//
//  forward          z = act(scale * y + shift) + residual, scale = weight * inverse_deviation, shift = bias - mean *
//                   scale. Reads y (and the shortcut), writes z and the zeros of z's border: 2 or 3 elements of T
//                   for each number, about 10 operations.
//  backward_reduce  per channel sum d and sum d * (y - mean), d = dz * act'(u): reads y and dz, writes two floats per
//                   channel and block. About 20 operations for each number.
//  backward_apply   dy = scale * d + slope * y + offset (the coefficients hold the means of the two sums), the zeros
//                   of dy's border, and the shortcut's gradient: reads y and dz, writes dy (and the shortcut's).
//  bias_reduce      per channel sum of dz: the bias gradient of a convolution without normalisation.
//
// Tiling: a thread owns eight channels (16-byte accesses; one channel where views are not aligned) for all its pixels,
// so the per-channel constants stay in registers; a block's 256 threads cover 256 / (c / 8) neighbouring pixels, which
// lie together in memory; several loads are under way in each thread, and the grid is a few waves, each block
// striding over the map. Forward and reduction begin at the end of the map: it was written last, so it is still in
// the L2 cache, and the head, touched last, is what the next pass (convolution or apply) reads first.
// sigmoid: exact division and exponential for f32; the chip's approximate ones (2 ulp) for 16-bit storage, where the
// exact ones would cost more than the memory does.
//
// The sums of a block are added over its slots by a fixed tree; `batch_norm_act_finish.cu` adds the blocks.
#include "lanes.cuh"

template <class T> struct NormSigmoid {
  static __device__ __forceinline__ float of(float u) { return __fdividef(1.0f, 1.0f + __expf(-u)); }
};
template <> struct NormSigmoid<float> {
  static __device__ __forceinline__ float of(float u) { return sigmoid(u); }
};
// SILU chooses the branch at compile time; the other activations are told apart at run time.
template <class T, bool SILU> DEVI float value(u32 kind, float u) {
  return SILU ? u * NormSigmoid<T>::of(u) : activate(kind == Activation::relu ? kind : Activation::identity, u);
}
template <class T, bool SILU> DEVI float derivative(u32 kind, float u) {
  if (SILU) {
    const float s = NormSigmoid<T>::of(u);
    return fmaf(u * s, 1.0f - s, s);
  }
  return kind == Activation::relu ? (u > 0.0f ? 1.0f : 0.0f) : 1.0f;
}

// Numbers of 16 bits leave room for more loads in flight.
template <class T> struct NormSteps {
  static constexpr i32 forward = 2, reduce = 2, apply = 2;
};
template <> struct NormSteps<float> {
  static constexpr i32 forward = 1, reduce = 1, apply = 1;
};

// ---- forward ----------------------------------------------------------------------------------------------------

struct NormForwardArgs {
  Tensor y, z, residual;  // residual.data == 0: none
  Walk walk;              // over z with its border
  u64 stats;              // f32 [mean c][inverse_deviation c]
  u64 weight, bias;       // f32 [c]
  u32 activation, chunks;
};

template <class T, i32 V, bool SILU> DEVI void forward(const NormForwardArgs& a) {
  constexpr i32 U = NormSteps<T>::forward;
  u32 slot, channel;
  if (!seat<V>(a.walk, slot, channel)) return;
  float scale[V], shift[V];
  {
    const float* mean = reinterpret_cast<const float*>(a.stats) + channel;
    const float* inverse = mean + a.y.c;
    const float* weight = reinterpret_cast<const float*>(a.weight) + channel;
    const float* bias = reinterpret_cast<const float*>(a.bias) + channel;
#pragma unroll
    for (i32 i = 0; i < V; ++i) {
      scale[i] = weight[i] * inverse[i];
      shift[i] = bias[i] - mean[i] * scale[i];
    }
  }
  const bool has_residual = a.residual.data != 0;
  for (u32 chunk = blockIdx.x; chunk < a.chunks; chunk += gridDim.x) {
    const u32 first = (a.chunks - 1 - chunk) * (U * a.walk.slots) + slot;
    Lanes<T, V> y[U], residual[U];
    T* z[U];
    bool inner[U];
#pragma unroll
    for (i32 i = 0; i < U; ++i) {
      const u32 pixel = first + i * a.walk.slots;
      z[i] = nullptr;
      inner[i] = false;
      if (pixel < a.walk.pixels) {
        const Place p = place(a.walk, pixel);
        z[i] = at<T>(a.z, p.n, p.y, p.x) + channel;
        inner[i] = inside(p, a.z);
        if (inner[i]) {
          y[i].load(at<T>(a.y, p.n, p.y, p.x) + channel);
          if (has_residual) residual[i].load(at<T>(a.residual, p.n, p.y, p.x) + channel);
        }
      }
    }
#pragma unroll
    for (i32 i = 0; i < U; ++i) {
      if (inner[i]) {
        float v[V];
        y[i].get(v);
#pragma unroll
        for (i32 k = 0; k < V; ++k) v[k] = value<T, SILU>(a.activation, fmaf(v[k], scale[k], shift[k]));
        if (has_residual) {
          float r[V];
          residual[i].get(r);
#pragma unroll
          for (i32 k = 0; k < V; ++k) v[k] += r[k];
        }
        Lanes<T, V>::put(z[i], v);
      } else if (z[i] != nullptr) {
        Lanes<T, V>::zero(z[i]);
      }
    }
  }
}

// ---- backward, first sweep --------------------------------------------------------------------------------------

struct NormReduceArgs {
  Tensor y, dz;
  Walk walk;  // over y, no border
  u64 stats, weight, bias;
  u64 partials;  // f32 [gridDim.x][2][c] (bias_reduce: [gridDim.x][c])
  u32 activation, chunks;
};

// Adds the numbers of all slots of a block by a fixed tree; the threads of slot 0 keep the sums. All threads call it.
template <i32 N> DEVI void add_slots(const Walk& w, u32 slot, bool active, float (&sums)[N]) {
  __shared__ float board[N * 256];
  u32 half = 1;
  while (half < w.slots) half <<= 1;
  for (half >>= 1; half > 0; half >>= 1) {
    if (active && slot >= half && slot < 2 * half) {
#pragma unroll
      for (i32 k = 0; k < N; ++k) board[k * 256 + threadIdx.x] = sums[k];
    }
    __syncthreads();
    if (active && slot < half && slot + half < w.slots) {
#pragma unroll
      for (i32 k = 0; k < N; ++k) sums[k] += board[k * 256 + threadIdx.x + half * w.groups.divisor];
    }
    __syncthreads();
  }
}

template <class T, i32 V, bool SILU> DEVI void reduce(const NormReduceArgs& a) {
  constexpr i32 U = NormSteps<T>::reduce;
  u32 slot, channel;
  const bool active = seat<V>(a.walk, slot, channel);
  float sums[2 * V];
#pragma unroll
  for (i32 k = 0; k < 2 * V; ++k) sums[k] = 0.0f;
  if (active) {
    float mean[V], scale[V], bias[V];
    const float* stats = reinterpret_cast<const float*>(a.stats) + channel;
    const float* weight = reinterpret_cast<const float*>(a.weight) + channel;
#pragma unroll
    for (i32 i = 0; i < V; ++i) {
      mean[i] = stats[i];
      scale[i] = weight[i] * stats[a.y.c + i];
      bias[i] = reinterpret_cast<const float*>(a.bias)[channel + i];
    }
    for (u32 chunk = blockIdx.x; chunk < a.chunks; chunk += gridDim.x) {
      const u32 first = (a.chunks - 1 - chunk) * (U * a.walk.slots) + slot;
      Lanes<T, V> y[U], dz[U];
#pragma unroll
      for (i32 i = 0; i < U; ++i) {
        const u32 pixel = first + i * a.walk.slots;
        if (pixel < a.walk.pixels) {
          const Place p = place(a.walk, pixel);
          y[i].load(at<T>(a.y, p.n, p.y, p.x) + channel);
          dz[i].load(at<T>(a.dz, p.n, p.y, p.x) + channel);
        } else {
          y[i].clear();
          dz[i].clear();  // adds nothing
        }
      }
#pragma unroll
      for (i32 i = 0; i < U; ++i) {
        float yv[V], d[V];
        y[i].get(yv);
        dz[i].get(d);
#pragma unroll
        for (i32 k = 0; k < V; ++k) {
          const float centred = yv[k] - mean[k];
          const float g = d[k] * derivative<T, SILU>(a.activation, fmaf(centred, scale[k], bias[k]));
          sums[k] += g;
          sums[V + k] = fmaf(g, centred, sums[V + k]);
        }
      }
    }
  }
  add_slots(a.walk, slot, active, sums);
  if (active && slot == 0) {
    float* out = reinterpret_cast<float*>(a.partials) + (u64)blockIdx.x * 2 * a.y.c + channel;
#pragma unroll
    for (i32 k = 0; k < V; ++k) out[k] = sums[k], out[a.y.c + k] = sums[V + k];
  }
}

template <class T, i32 V> DEVI void bias_reduce(const NormReduceArgs& a) {
  constexpr i32 U = 4;
  u32 slot, channel;
  const bool active = seat<V>(a.walk, slot, channel);
  float sums[V];
#pragma unroll
  for (i32 k = 0; k < V; ++k) sums[k] = 0.0f;
  for (u32 chunk = blockIdx.x; active && chunk < a.chunks; chunk += gridDim.x) {
    const u32 first = (a.chunks - 1 - chunk) * (U * a.walk.slots) + slot;
    Lanes<T, V> dz[U];
#pragma unroll
    for (i32 i = 0; i < U; ++i) {
      const u32 pixel = first + i * a.walk.slots;
      dz[i].clear();
      if (pixel < a.walk.pixels) {
        const Place p = place(a.walk, pixel);
        dz[i].load(at<T>(a.dz, p.n, p.y, p.x) + channel);
      }
    }
#pragma unroll
    for (i32 i = 0; i < U; ++i) {
      float d[V];
      dz[i].get(d);
#pragma unroll
      for (i32 k = 0; k < V; ++k) sums[k] += d[k];
    }
  }
  add_slots(a.walk, slot, active, sums);
  if (active && slot == 0) {
    float* out = reinterpret_cast<float*>(a.partials) + (u64)blockIdx.x * a.dz.c + channel;
#pragma unroll
    for (i32 k = 0; k < V; ++k) out[k] = sums[k];
  }
}

// ---- backward, second sweep -------------------------------------------------------------------------------------

struct NormApplyArgs {
  Tensor y, dz, dy, residual_grad;  // residual_grad.data == 0: none
  Walk walk;                        // over dy with its border
  u64 coefficients;                 // f32 [scale c][shift c][slope c][offset c]
  u32 activation, chunks, accumulate, reserved;
};

template <class T, i32 V, bool SILU> DEVI void apply(const NormApplyArgs& a) {
  constexpr i32 U = NormSteps<T>::apply;
  u32 slot, channel;
  if (!seat<V>(a.walk, slot, channel)) return;
  float scale[V], shift[V], slope[V], offset[V];
  const float* coefficients = reinterpret_cast<const float*>(a.coefficients) + channel;
  const u32 c = a.dy.c;
#pragma unroll
  for (i32 i = 0; i < V; ++i) {
    scale[i] = coefficients[i], shift[i] = coefficients[c + i];
    slope[i] = coefficients[2 * c + i], offset[i] = coefficients[3 * c + i];
  }
  const bool has_residual = a.residual_grad.data != 0;
  const bool accumulate = has_residual && a.accumulate != 0;
  for (u32 chunk = blockIdx.x; chunk < a.chunks; chunk += gridDim.x) {
    const u32 first = chunk * (U * a.walk.slots) + slot;
    Lanes<T, V> y[U], dz[U], old[U];
    T *dy[U], *shortcut[U];
    bool inner[U];
#pragma unroll
    for (i32 i = 0; i < U; ++i) {
      const u32 pixel = first + i * a.walk.slots;
      dy[i] = shortcut[i] = nullptr;
      inner[i] = false;
      if (pixel < a.walk.pixels) {
        const Place p = place(a.walk, pixel);
        dy[i] = at<T>(a.dy, p.n, p.y, p.x) + channel;
        inner[i] = inside(p, a.dy);
        if (inner[i]) {
          y[i].load(at<T>(a.y, p.n, p.y, p.x) + channel);
          dz[i].load(at<T>(a.dz, p.n, p.y, p.x) + channel);
          if (has_residual) shortcut[i] = at<T>(a.residual_grad, p.n, p.y, p.x) + channel;
          if (accumulate) old[i].load(shortcut[i]);
        }
      }
    }
#pragma unroll
    for (i32 i = 0; i < U; ++i) {
      if (inner[i]) {
        float yv[V], d[V];
        y[i].get(yv);
        dz[i].get(d);
        if (accumulate) {
          float sum[V];
          old[i].get(sum);
#pragma unroll
          for (i32 k = 0; k < V; ++k) sum[k] += d[k];
          Lanes<T, V>::put(shortcut[i], sum);
        } else if (has_residual) {
          dz[i].store(shortcut[i]);
        }
#pragma unroll
        for (i32 k = 0; k < V; ++k) {
          const float g = d[k] * derivative<T, SILU>(a.activation, fmaf(yv[k], scale[k], shift[k]));
          d[k] = fmaf(g, scale[k], fmaf(yv[k], slope[k], offset[k]));
        }
        Lanes<T, V>::put(dy[i], d);
      } else if (dy[i] != nullptr) {
        Lanes<T, V>::zero(dy[i]);
      }
    }
  }
}

// ---- kernels ----------------------------------------------------------------------------------------------------

// Three blocks in a multiprocessor: enough loads under way, enough warps to hide the exponential behind them.
#define KERNELS(T, V, SUFFIX)                                                                             \
  KERNEL_RESIDENT(batch_norm_act_forward_silu_##SUFFIX, NormForwardArgs, 256, 3) { forward<T, V, true>(args); } \
  KERNEL_RESIDENT(batch_norm_act_forward_##SUFFIX, NormForwardArgs, 256, 3) { forward<T, V, false>(args); }     \
  KERNEL_RESIDENT(batch_norm_act_backward_reduce_silu_##SUFFIX, NormReduceArgs, 256, 3) {                 \
    reduce<T, V, true>(args);                                                                             \
  }                                                                                                       \
  KERNEL_RESIDENT(batch_norm_act_backward_reduce_##SUFFIX, NormReduceArgs, 256, 3) {                      \
    reduce<T, V, false>(args);                                                                            \
  }                                                                                                       \
  KERNEL(batch_norm_act_backward_apply_silu_##SUFFIX, NormApplyArgs, 256) { apply<T, V, true>(args); }    \
  KERNEL(batch_norm_act_backward_apply_##SUFFIX, NormApplyArgs, 256) { apply<T, V, false>(args); }        \
  KERNEL(batch_norm_act_bias_reduce_##SUFFIX, NormReduceArgs, 256) { bias_reduce<T, V>(args); }

KERNELS(float, 8, f32)
KERNELS(float, 1, scalar_f32)
KERNELS(bf16, 8, bf16)
KERNELS(bf16, 1, scalar_bf16)
KERNELS(f16, 8, f16)
KERNELS(f16, 1, scalar_f16)
