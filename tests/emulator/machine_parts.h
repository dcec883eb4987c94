// The scheduler's state, shared by `emulator.cpp`, `launches.cpp`, `emulated_ptx.cpp` and `emulated_ptx_sm90.cpp`.
#pragma once

#include "machine.h"

namespace emulator {

enum : u32 { THREADS_MAX = 1024, WARPS_MAX = THREADS_MAX / 32, MEETINGS_MAX = 32, BARRIERS = 16 };

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

// Threads that wait at a barrier, of the block or of a part of it.
struct Barrier {
  u16 waiting[THREADS_MAX];
  u32 count, threads;
  const char* where;
};

// A thread that waits for the end of a phase.
struct MbarrierWait {
  u32 fiber;
  u64* barrier;
  u32 parity;
};
// A copy of the copy engine that is under way.
struct Transfer {
  u64 map[16];
  u32 to;  // offset in dynamic shared memory
  u64* barrier;
  i32 at[4];
  u32 offsets[2];
};
// A product of a warpgroup that is under way.
struct GroupProduct {
  u64 a, b;
  u32 columns, add;
  bool b_transposed, bf16;
  float* registers0;  // of the group's first thread; names the sums
  u64 batch;          // commits before it
};
// Sums that products under way add to; the registers get them when the last is done.
struct GroupSums {
  float* registers[128];
  u32 columns, products;
  std::vector<float> numbers;
};
struct Group {
  u32 arrived;
  const char* where;
  void* arguments[128];
  bool fenced;
  u64 batches;
  std::vector<GroupProduct> products;
  std::vector<GroupSums> sums;
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

  Barrier barriers[BARRIERS];  // of parts of the block, by their number

  std::vector<MbarrierWait> mbarrier_waits;
  std::vector<Transfer> transfers;
  Group groups[THREADS_MAX / 128];

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
// Runs others until somebody makes this fiber ready.
void wait(const char* where);
void make_ready(Machine& m, u32 index);
u64 next_random(Machine& m);

// ---- emulated_ptx.cpp ------------------------------------------------------------------------------------------

// The work of one meeting, for all lanes at once.
void load_matrices(Block& block, void* const* arguments, bool transposed);
void multiply_matrices(void* const* arguments, bool bf16);

// ---- emulated_ptx_sm90.cpp -------------------------------------------------------------------------------------

// One copy that is under way arrives; false if there is none.
bool deliver_transfer(Machine& m);
// For a new block.
void reset_groups(Machine& m);

}  // namespace emulator
