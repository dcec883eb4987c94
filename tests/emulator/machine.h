// What the stand-in driver needs of the emulator.
#pragma once

#include <stddef.h>

#include <string>

#include "emulator.h"

namespace emulator {

enum class Order { first_in, last_in, random };

// How kernels are run; all legal, and a right kernel cannot tell them apart.
struct Settings {
  Order order = Order::first_in;
  u64 seed = 1;
  bool late_copies = true;  // asynchronous copies happen when they are waited for, not when they are issued
  bool poison = true;       // dynamic shared memory starts as 0xFF bytes
  u32 threads = 1;          // of the operating system, for different blocks
};

struct Counters {
  u64 launches, blocks, switches, bank_conflicts, matrix_loads;
};

struct Launch {
  const Kernel* kernel;
  dim3 grid, block;
  u32 shared_bytes;
  const void* arguments;
};

// How a launch ended: an empty text, or why it failed. `bad_address` where a thread touched memory it has not.
struct Outcome {
  std::string failure;
  bool bad_address = false;
  u64 instruction = 0;  // where the hardware objected, if it did
};
Outcome run(const Launch& launch, const Settings& settings, Counters& counters);

// The kernel of this name in the file `stem`, or null.
const Kernel* find_kernel(const std::string& stem, const std::string& name);
bool has_stem(const std::string& stem);
void each_kernel(const std::string& stem, void (*visit)(const Kernel* kernel, void* data), void* data);

// From now on a bad memory access inside a kernel ends the launch instead of the program.
void catch_bad_accesses();

}  // namespace emulator
