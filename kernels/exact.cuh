// Arithmetic in f32 that the compiler may not contract: `a * b + c` rounds twice, as it does on the CPU.
//
// Where a result must have the bits of its CPU twin (who owns an anchor, where the optimiser moves a weight), the
// formula is written over `Exact`. Addition, subtraction, multiplication, division and square root are correctly
// rounded on both sides, so equal order of operations gives equal bits.
#pragma once

struct Exact {
  float v;
  __device__ __forceinline__ Exact() {}
  __device__ __forceinline__ Exact(float x) : v(x) {}
};

DEVI Exact operator+(Exact a, Exact b) { return Exact(__fadd_rn(a.v, b.v)); }
DEVI Exact operator-(Exact a, Exact b) { return Exact(__fsub_rn(a.v, b.v)); }
DEVI Exact operator*(Exact a, Exact b) { return Exact(__fmul_rn(a.v, b.v)); }
DEVI Exact operator/(Exact a, Exact b) { return Exact(__fdiv_rn(a.v, b.v)); }
DEVI Exact exact_sqrt(Exact a) { return Exact(__fsqrt_rn(a.v)); }
DEVI Exact operator-(Exact a) { return Exact(-a.v); }
DEVI bool operator<(Exact a, Exact b) { return a.v < b.v; }
DEVI bool operator>(Exact a, Exact b) { return a.v > b.v; }
DEVI Exact exact_min(Exact a, Exact b) { return Exact(fminf(a.v, b.v)); }
DEVI Exact exact_max(Exact a, Exact b) { return Exact(fmaxf(a.v, b.v)); }
