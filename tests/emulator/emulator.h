// What a kernel file sees instead of CUDA when it is compiled as C++: the subset that `kernels/` uses.
//
// One CUDA thread is one fiber, a block runs on one thread of the operating system, warp collectives and barriers
// are meetings of fibers (`emulator.cpp`). `__shared__` arrays are thread-local, which is one copy per running block;
// unlike dynamic shared memory they keep what an earlier block left. Nothing here is fast where it need not be, and
// everything that CUDA leaves undefined and that can be noticed ends the launch with a sentence.
#pragma once

// Every header of the standard library must come before the macros below.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>
#include <vector>

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef int i32;
typedef unsigned long long u64;
typedef long long i64;

struct uint3 {
  u32 x, y, z;
};
struct dim3 {
  u32 x, y, z;
};
struct alignas(8) float2 {
  float x, y;
};
struct float3 {
  float x, y, z;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) int2 {
  i32 x, y;
};
struct int3 {
  i32 x, y, z;
};
struct alignas(16) int4 {
  i32 x, y, z, w;
};
struct alignas(8) uint2 {
  u32 x, y;
};
struct alignas(16) uint4 {
  u32 x, y, z, w;
};
struct alignas(16) ulonglong2 {
  u64 x, y;
};
struct alignas(4) ushort2 {
  u16 x, y;
};
struct alignas(8) ushort4 {
  u16 x, y, z, w;
};
struct alignas(4) uchar4 {
  u8 x, y, z, w;
};
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline double2 make_double2(double x, double y) { return {x, y}; }
static inline int2 make_int2(i32 x, i32 y) { return {x, y}; }
static inline int3 make_int3(i32 x, i32 y, i32 z) { return {x, y, z}; }
static inline int4 make_int4(i32 x, i32 y, i32 z, i32 w) { return {x, y, z, w}; }
static inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static inline uint3 make_uint3(u32 x, u32 y, u32 z) { return {x, y, z}; }
static inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static inline ulonglong2 make_ulonglong2(u64 x, u64 y) { return {x, y}; }
static inline ushort2 make_ushort2(u16 x, u16 y) { return {x, y}; }
static inline ushort4 make_ushort4(u16 x, u16 y, u16 z, u16 w) { return {x, y, z, w}; }
static inline uchar4 make_uchar4(u8 x, u8 y, u8 z, u8 w) { return {x, y, z, w}; }

namespace emulator {

// One 16-byte copy that was issued and has not happened yet.
struct PendingCopy {
  void* to;
  const void* from;
  bool valid;
};

struct Machine;

// What a block's threads share.
struct Block {
  dim3 grid, size;
  uint3 index;
  u8* shared;
  u32 shared_bytes;
  bool late_copies;
  u64 bank_conflicts, matrix_loads;
};

// One CUDA thread.
struct Fiber {
  uint3 thread;
  u32 index, lane, warp;
  Block* block;
  Machine* machine;
  void* stack_pointer;
  u32 stack;
  bool started, ended;
  const char* where;  // the source line it waits at
  // Copies in order of issue; `group_ends[i]` of them belong to groups up to i; `groups_done` have happened.
  std::vector<PendingCopy> copies;
  std::vector<u32> group_ends;
  u32 groups_done;
};

// The running fiber of this thread of the operating system; null outside of kernels.
extern __thread Fiber* current;

// Ends the launch with a sentence; does not come back.
void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

enum class Meet : u32 { sync, shuffle, ballot, load_matrix, load_matrix_transposed, multiply_bf16, multiply_f16 };
// The lanes of `mask` meet; the last to arrive does the work for all, on every lane's `argument`.
void meet(u32 mask, Meet kind, void* argument, const char* where);

enum class Vote : u32 { none, any, all, count };
// All threads of the block meet.
u32 barrier(Vote vote, bool predicate, const char* where);
// The first `threads` threads of the block meet at barrier `id`.
void barrier_part(u32 id, u32 threads, const char* where);

struct Shuffle {
  u64 value;
  u32 source;  // lane to read
};
struct Ballot {
  bool predicate;
  u32 votes;
};

template <class T> static inline T shuffle(const char* where, u32 mask, T value, u32 source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles exchange 4 or 8 bytes");
  Shuffle argument{0, source};
  memcpy(&argument.value, &value, sizeof(T));
  meet(mask, Meet::shuffle, &argument, where);
  memcpy(&value, &argument.value, sizeof(T));
  return value;
}
// First lane of the segment of `width` lanes that `lane` lies in.
static inline u32 segment(u32 lane, i32 width) { return lane & ~((u32)width - 1); }
template <class T> static inline T shuffle_index(const char* where, u32 mask, T value, i32 source, i32 width = 32) {
  return shuffle(where, mask, value, segment(current->lane, width) + ((u32)source & ((u32)width - 1)));
}
template <class T> static inline T shuffle_xor(const char* where, u32 mask, T value, i32 bits, i32 width = 32) {
  const u32 lane = current->lane, other = lane ^ (u32)bits;
  return shuffle(where, mask, value, segment(other, width) <= segment(lane, width) ? other : lane);
}
template <class T> static inline T shuffle_down(const char* where, u32 mask, T value, u32 by, i32 width = 32) {
  const u32 lane = current->lane, other = lane + by;
  return shuffle(where, mask, value, other < segment(lane, width) + (u32)width ? other : lane);
}
template <class T> static inline T shuffle_up(const char* where, u32 mask, T value, u32 by, i32 width = 32) {
  const u32 lane = current->lane;
  return shuffle(where, mask, value, lane >= segment(lane, width) + by ? lane - by : lane);
}
static inline u32 ballot(const char* where, u32 mask, bool predicate) {
  Ballot argument{predicate, 0};
  meet(mask, Meet::ballot, &argument, where);
  return argument.votes;
}
static inline bool all(const char* where, u32 mask, bool predicate) { return !ballot(where, mask, !predicate); }
static inline void sync_warp(const char* where, u32 mask = 0xffffffffu) { meet(mask, Meet::sync, nullptr, where); }

// A kernel makes itself known when the library is loaded.
struct Kernel {
  const char* stem;
  const char* name;
  u64 argument_bytes;
  u32 threads;
  void (*body)(const void* arguments);
};
struct Registration {
  explicit Registration(const Kernel& kernel);
};

}  // namespace emulator

#if defined(BOXWRIGHT_EMULATOR)  // the emulator's own files include this header without the macros

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __constant__ static const
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ thread_local
#define DEVI static inline __attribute__((unused))
#define DYN_SMEM(name) u8* const name = ::emulator::current->block->shared

#ifndef BOXWRIGHT_STEM
#define BOXWRIGHT_STEM "kernels"
#endif
// The second layer lets an argument be a macro of the caller.
#define EMULATOR_KERNEL(name, Args, threads_of_block)                                                          \
  static void name(const Args& args);                                                                          \
  static const ::emulator::Registration registration_of_##name({BOXWRIGHT_STEM, #name, sizeof(Args),           \
                                                                threads_of_block, [](const void* arguments) { \
                                                                  name(*static_cast<const Args*>(arguments)); \
                                                                }});                                           \
  static void name(const Args& args)
#define KERNEL(name, Args, threads) EMULATOR_KERNEL(name, Args, threads)
#define KERNEL_RESIDENT(name, Args, threads, blocks) EMULATOR_KERNEL(name, Args, threads)

#define threadIdx (::emulator::current->thread)
#define blockIdx (::emulator::current->block->index)
#define blockDim (::emulator::current->block->size)
#define gridDim (::emulator::current->block->grid)
#define warpSize 32

#define EMULATOR_TEXT_OF(x) #x
#define EMULATOR_TEXT(x) EMULATOR_TEXT_OF(x)
#define EMULATOR_HERE __FILE__ ":" EMULATOR_TEXT(__LINE__)
#define __syncthreads() ((void)::emulator::barrier(::emulator::Vote::none, false, EMULATOR_HERE))
#define BARRIER_PART(id, threads) ::emulator::barrier_part(id, threads, EMULATOR_HERE)
#define __syncthreads_or(p) ((i32)::emulator::barrier(::emulator::Vote::any, (p) != 0, EMULATOR_HERE))
#define __syncthreads_and(p) ((i32)::emulator::barrier(::emulator::Vote::all, (p) != 0, EMULATOR_HERE))
#define __syncthreads_count(p) ((i32)::emulator::barrier(::emulator::Vote::count, (p) != 0, EMULATOR_HERE))
#define __syncwarp(...) ::emulator::sync_warp(EMULATOR_HERE __VA_OPT__(, ) __VA_ARGS__)
#define __shfl_sync(...) ::emulator::shuffle_index(EMULATOR_HERE, __VA_ARGS__)
#define __shfl_xor_sync(...) ::emulator::shuffle_xor(EMULATOR_HERE, __VA_ARGS__)
#define __shfl_down_sync(...) ::emulator::shuffle_down(EMULATOR_HERE, __VA_ARGS__)
#define __shfl_up_sync(...) ::emulator::shuffle_up(EMULATOR_HERE, __VA_ARGS__)
#define __ballot_sync(mask, p) ::emulator::ballot(EMULATOR_HERE, (mask), (p) != 0)
#define __any_sync(mask, p) ((i32)(::emulator::ballot(EMULATOR_HERE, (mask), (p) != 0) != 0))
#define __all_sync(mask, p) ((i32)::emulator::all(EMULATOR_HERE, (mask), (p) != 0))
#define __trap() ::emulator::fail("%s: the kernel calls __trap", EMULATOR_HERE)

#include "emulated_math.h"

#endif  // BOXWRIGHT_EMULATOR
