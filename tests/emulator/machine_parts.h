// The scheduler's state, shared by `emulator.cpp`, `launches.cpp` and `emulated_ptx.cpp`.
#pragma once

#include "machine.h"

namespace emulator {

enum : u32 { THREADS_MAX = 1024, WARPS_MAX = THREADS_MAX / 32, MEETINGS_MAX = 32 };

// Lanes of one warp on their way into one collective.
struct Meeting {
  u32 mask, arrived;
  Meet kind;
  const char* where;
  void* arguments[32];
};
struct Warp {
  u32 open;
  Meeting meetings[MEETINGS_MAX];
};

// Everything one thread of the operating system needs to run blocks. Machines are kept for the next launch.
struct Machine {
  Block block;
  const Kernel* kernel;
  const void* arguments;
  Settings settings;
  u64 random;
  u32 threads, live;

  Fiber fibers[THREADS_MAX];
  Warp warps[WARPS_MAX];

  // Threads that can run, a ring.
  u16 ready[THREADS_MAX];
  u32 ready_first, ready_count;

  // Threads that wait at the barrier of the block.
  u16 waiting[THREADS_MAX];
  u32 waiting_count, waiting_votes;
  const char* waiting_where;
  u32 vote_result;

  u8* stacks;
  u32 free_stacks[THREADS_MAX];
  u32 free_stack_count;
  void* home;  // stack pointer of the thread of the operating system

  u8* shared_end;  // dynamic shared memory ends right before an inaccessible page
  Outcome outcome;
  u64 switches;
};

// ---- emulator.cpp ----------------------------------------------------------------------------------------------

Machine* build_machine();
void prepare_launch(Machine& m, const Launch& launch, const Settings& settings);
// Runs one block to its end, or until something fails.
void run_block(Machine& m, u64 number);
bool shared_tail_written(const Machine& m);
// The file's name without its folders.
const char* short_place(const char* where);

// ---- emulated_ptx.cpp ------------------------------------------------------------------------------------------

// The work of one meeting, for all lanes at once.
void load_matrices(Block& block, void* const* arguments, bool transposed);
void multiply_matrices(void* const* arguments, bool bf16);

}  // namespace emulator
