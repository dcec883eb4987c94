// Optimisers over the flat vector of parameters: norm of all gradients, then one pass that does everything else.
// CPU twin: `engine::optim::{clip, rules, ema}`; the formulas are written over `Exact`, so that given the same
// gradients the pass has the CPU's bits. What changes from step to step (learning rates, bias corrections, the decay
// of the average) is a small table in device memory, so a captured step replays with other numbers.
//
//  * optim_norm: L2 norm of the gradients that count, in f64: 8192 numbers per block, partial sums combined by the last
//    block in a fixed order. Works out the clipping factor and whether the step is taken at all; moves the loss
//    scale. Reads 4 bytes per parameter: bound by memory.
//  * optim_step_<rule>: for each parameter: gradient times 1 / loss scale times clipping factor, the rule, the moving
//    average, the copy in the storage type; clears the gradient. Reads 4 (value, gradient, average, one or two
//    states) and writes as many and the copy: SGD moves 34 bytes per parameter with a copy in bf16, Adam 42. Four
//    numbers per thread, all loads issued before the first is used. Blocks past the parameters average the running
//    statistics. A norm that is not finite changes nothing but the gradients, which are cleared.
//
// A byte per 16 numbers says what they are: group * 16 + live - 1, where `live` of them belong to a tensor (tensors
// start at multiples of 16); 255: none moves (frozen tensors, gaps). The average follows all of them.
#include "common.cuh"
#include "exact.cuh"

#define GROUPS_MAX 15u
#define NORM_NUMBERS 8192u
#define FROZEN 255u

// Constants of one group; meaning by rule, see the kernels. 32 bytes.
struct RuleRow {
  float c[8];
};

// What the host sends before each step.
struct StepTable {
  double norm_max;
  float ema_keep, ema_take;
  u32 growth_interval;  // steps after which the loss scale doubles; 0 leaves it alone
  u32 reserved;
  RuleRow rules[GROUPS_MAX];
  float muon[GROUPS_MAX + 1][2];  // read by `muon.cu`
};

// What a step leaves. 32 bytes.
struct StepResult {
  double norm;
  float clip, inverse_scale;
  u32 is_finite, reserved0, reserved1, reserved2;
};

struct LossScale {
  float scale;
  u32 good_steps;
};

struct OptimArgs {
  u64 values, grads, state_a, state_b;  // f32 [count]
  u64 average, copy;                    // f32 [count]; storage type [count], or 0
  u64 buffers, buffer_average;          // f32 [buffer_count]
  u64 groups;                           // u8 [count / 16]
  u64 table, result;
  u64 scale;     // LossScale, or 0 for a scale of one
  u64 partials;  // f64 [norm blocks]
  u64 counter;   // u32, zero between launches
  u64 count;     // a multiple of 16
  u64 buffer_count;
  u32 value_blocks;  // blocks of the pass that work on parameters
  u32 copy_type;     // 0 bf16, 1 f16
};

// ---- norm --------------------------------------------------------------------------------------------------------

DEVI double norm_block_sum(double v, double* shared) {
  v = warp_sum(v);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = v;
  __syncthreads();
  double sum = 0.0;
  for (u32 i = 0; i < 8; ++i) sum += shared[i];
  return sum;
}

DEVI void finish_norm(const OptimArgs& args, double squares) {
  const StepTable& table = *reinterpret_cast<const StepTable*>(args.table);
  StepResult r;
  r.norm = sqrt(squares);
  r.is_finite = r.norm - r.norm == 0.0;
  const double clip = table.norm_max / (r.norm + 1e-6);
  r.clip = clip < 1.0 ? (float)clip : 1.0f;
  r.inverse_scale = 1.0f;
  r.reserved0 = 0, r.reserved1 = 0, r.reserved2 = 0;
  if (args.scale != 0) {
    LossScale* scale = reinterpret_cast<LossScale*>(args.scale);
    r.inverse_scale = 1.0f / scale->scale;
    if (table.growth_interval != 0) {
      // Gradients that overflowed were scaled too much; after a long time without one, try twice as much.
      const u32 good = r.is_finite ? scale->good_steps + 1 : 0;
      const bool grows = good == table.growth_interval;
      if (!r.is_finite) scale->scale *= 0.5f;
      if (grows) scale->scale *= 2.0f;
      scale->good_steps = grows ? 0 : good;
    }
  }
  *reinterpret_cast<StepResult*>(args.result) = r;
}

KERNEL(optim_norm, OptimArgs, 256) {
  __shared__ double shared[8];
  __shared__ u32 arrived;
  const float* grads = reinterpret_cast<const float*>(args.grads);
  const u8* groups = reinterpret_cast<const u8*>(args.groups);
  const float inverse =
      args.scale != 0 ? 1.0f / *reinterpret_cast<const volatile float*>(args.scale) : 1.0f;
  float4 v[8];
  u32 live[8];
#pragma unroll
  for (u32 i = 0; i < 8; ++i) {
    const u64 at = (u64)blockIdx.x * NORM_NUMBERS + i * 1024 + threadIdx.x * 4;
    live[i] = 0;
    v[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (at < args.count) {
      v[i] = *reinterpret_cast<const float4*>(grads + at);
      const u32 group = groups[at / 16];
      const u32 in_chunk = group == FROZEN ? 0 : (group & 15u) + 1;
      live[i] = in_chunk > (at & 15u) ? in_chunk - (u32)(at & 15u) : 0;
    }
  }
  double sum = 0.0;
#pragma unroll
  for (u32 i = 0; i < 8; ++i) {
    const float q[4] = {v[i].x, v[i].y, v[i].z, v[i].w};
#pragma unroll
    for (u32 k = 0; k < 4; ++k) {
      const double g = k < live[i] ? (double)(q[k] * inverse) : 0.0;
      sum += g * g;
    }
  }
  sum = norm_block_sum(sum, shared);
  double* partials = reinterpret_cast<double*>(args.partials);
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = sum;
    __threadfence();
    arrived = atomicAdd(reinterpret_cast<u32*>(args.counter), 1u);
  }
  __syncthreads();
  if (arrived + 1 != gridDim.x) return;
  __threadfence();
  double total = 0.0;
  for (u32 i = threadIdx.x; i < gridDim.x; i += 256)
    total += *reinterpret_cast<const volatile double*>(partials + i);
  total = norm_block_sum(total, shared);
  if (threadIdx.x == 0) {
    *reinterpret_cast<u32*>(args.counter) = 0;
    finish_norm(args, total);
  }
}

// ---- rules: `p` value, `g` gradient, `a`, `b` states, `c` constants of the group -------------------------------------

struct Sgd {  // c: lr, momentum, decay
  static constexpr bool has_second = false;
  static __device__ __forceinline__ void update(Exact& p, Exact g, Exact& a, Exact& b, const float (&c)[8]) {
    g = g + Exact(c[2]) * p;
    a = Exact(c[1]) * a + g;
    p = p - Exact(c[0]) * (g + Exact(c[1]) * a);
  }
};

DEVI void moments(Exact g, Exact& m, Exact& v, float beta1, float beta2) {
  m = m + (g - m) * (Exact(1.0f) - beta1);
  v = v * beta2 + (Exact(1.0f) - beta2) * g * g;
}

struct Adam {  // c: step, beta1, beta2, root2, eps, coupled decay, share kept
  static constexpr bool has_second = true;
  static __device__ __forceinline__ void update(Exact& p, Exact g, Exact& a, Exact& b, const float (&c)[8]) {
    const Exact kept = p * c[6];
    g = g + Exact(c[5]) * p;
    moments(g, a, b, c[1], c[2]);
    p = kept - Exact(c[0]) * (a / (exact_sqrt(b) / c[3] + c[4]));
  }
};

struct Adamax {  // c: step, beta1, beta2, eps, decay
  static constexpr bool has_second = true;
  static __device__ __forceinline__ void update(Exact& p, Exact g, Exact& a, Exact& b, const float (&c)[8]) {
    g = g + Exact(c[4]) * p;
    a = a + (g - a) * (Exact(1.0f) - c[1]);
    b = exact_max(b * c[2], Exact(fabsf(g.v)) + c[3]);
    p = p - Exact(c[0]) * (a / b);
  }
};

struct NAdam {  // c: step of the gradient, step of the moment, beta1, beta2, root2, eps, decay
  static constexpr bool has_second = true;
  static __device__ __forceinline__ void update(Exact& p, Exact g, Exact& a, Exact& b, const float (&c)[8]) {
    g = g + Exact(c[6]) * p;
    moments(g, a, b, c[2], c[3]);
    const Exact denominator = exact_sqrt(b) / c[4] + c[5];
    p = p - Exact(c[0]) * (g / denominator);
    p = p - Exact(c[1]) * (a / denominator);
  }
};

struct RAdam {  // c: step, beta1, beta2, eps, decay, rectification, 1 where it applies
  static constexpr bool has_second = true;
  static __device__ __forceinline__ void update(Exact& p, Exact g, Exact& a, Exact& b, const float (&c)[8]) {
    g = g + Exact(c[4]) * p;
    moments(g, a, b, c[1], c[2]);
    const Exact scale = c[6] != 0.0f ? Exact(c[5]) / (exact_sqrt(b) + c[3]) : Exact(1.0f);
    p = p - Exact(c[0]) * a * scale;
  }
};

struct RmsProp {  // c: lr, momentum, eps, decay
  static constexpr bool has_second = true;
  static __device__ __forceinline__ void update(Exact& p, Exact g, Exact& a, Exact& b, const float (&c)[8]) {
    g = g + Exact(c[3]) * p;
    a = a * 0.99f + (Exact(1.0f) - 0.99f) * g * g;
    b = Exact(c[1]) * b + g / (exact_sqrt(a) + c[2]);
    p = p - Exact(c[0]) * b;
  }
};

// ---- the pass ----------------------------------------------------------------------------------------------------

DEVI void spread(const float4& q, float (&v)[4]) { v[0] = q.x, v[1] = q.y, v[2] = q.z, v[3] = q.w; }
DEVI float4 gathered(const float (&v)[4]) { return make_float4(v[0], v[1], v[2], v[3]); }
DEVI float4* quad(u64 base, u64 at) { return reinterpret_cast<float4*>(reinterpret_cast<float*>(base) + at); }

// average = average * keep + take * model
DEVI void blend(const StepTable& table, u64 average, u64 at, const float (&model)[4], const float4& before) {
  float a[4];
  spread(before, a);
#pragma unroll
  for (u32 k = 0; k < 4; ++k) a[k] = (Exact(a[k]) * table.ema_keep + Exact(table.ema_take) * model[k]).v;
  *quad(average, at) = gathered(a);
}

template <class R> DEVI void move_values(const OptimArgs& args, const StepTable& table, const StepResult& result, u64 at) {
  const u32 chunk = reinterpret_cast<const u8*>(args.groups)[at / 16];
  const u32 live = chunk == FROZEN ? 0 : (chunk & 15u) + 1, first = (u32)(at & 15u);
  const float4 before = *quad(args.average, at);
  float p[4], g[4], a[4], b[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  spread(*quad(args.values, at), p);
  spread(*quad(args.grads, at), g);
  spread(*quad(args.state_a, at), a);
  if (R::has_second) spread(*quad(args.state_b, at), b);
  if (live > first) {
    float c[8];
    const RuleRow& row = table.rules[chunk >> 4];
#pragma unroll
    for (u32 k = 0; k < 8; ++k) c[k] = row.c[k];
#pragma unroll
    for (u32 k = 0; k < 4; ++k) {
      if (first + k >= live) continue;
      const Exact gradient = Exact(g[k]) * result.inverse_scale * result.clip;
      Exact value = p[k], state_a = a[k], state_b = b[k];
      R::update(value, gradient, state_a, state_b, c);
      p[k] = value.v, a[k] = state_a.v, b[k] = state_b.v;
    }
    *quad(args.values, at) = gathered(p);
    *quad(args.state_a, at) = gathered(a);
    if (R::has_second) *quad(args.state_b, at) = gathered(b);
  }
  *quad(args.grads, at) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  blend(table, args.average, at, p, before);
  if (args.copy != 0) {
    const uint2 packed = args.copy_type == 0 ? make_uint2(Pair<bf16>::pack(p[0], p[1]), Pair<bf16>::pack(p[2], p[3]))
                                             : make_uint2(Pair<f16>::pack(p[0], p[1]), Pair<f16>::pack(p[2], p[3]));
    *reinterpret_cast<uint2*>(args.copy + at * 2) = packed;
  }
}

template <class R> DEVI void step(const OptimArgs& args) {
  const StepResult result = *reinterpret_cast<const StepResult*>(args.result);
  const StepTable& table = *reinterpret_cast<const StepTable*>(args.table);
  if (blockIdx.x < args.value_blocks) {
    const u64 at = ((u64)blockIdx.x * 256 + threadIdx.x) * 4;
    if (at >= args.count) return;
    if (result.is_finite) {
      move_values<R>(args, table, result, at);
    } else {
      *quad(args.grads, at) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    return;
  }
  const u64 at = ((u64)(blockIdx.x - args.value_blocks) * 256 + threadIdx.x) * 4;
  if (at >= args.buffer_count || !result.is_finite) return;
  float model[4];
  spread(*quad(args.buffers, at), model);
  blend(table, args.buffer_average, at, model, *quad(args.buffer_average, at));
}

KERNEL(optim_step_sgd, OptimArgs, 256) { step<Sgd>(args); }
KERNEL(optim_step_adam, OptimArgs, 256) { step<Adam>(args); }
KERNEL(optim_step_adamax, OptimArgs, 256) { step<Adamax>(args); }
KERNEL(optim_step_nadam, OptimArgs, 256) { step<NAdam>(args); }
KERNEL(optim_step_radam, OptimArgs, 256) { step<RAdam>(args); }
KERNEL(optim_step_rmsprop, OptimArgs, 256) { step<RmsProp>(args); }
