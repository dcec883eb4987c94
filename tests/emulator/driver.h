// The stand-in driver's own structures. Signatures and numbers are those of the CUDA driver interface 13.0.
#pragma once

#include <atomic>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "machine.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace driver {

enum Result : int {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  NOT_INITIALIZED = 3,
  INVALID_DEVICE = 101,
  INVALID_IMAGE = 200,
  INVALID_CONTEXT = 201,
  INVALID_HANDLE = 400,
  NOT_FOUND = 500,
  NOT_READY = 600,
  ILLEGAL_ADDRESS = 700,
  LAUNCH_FAILED = 719,
  NOT_SUPPORTED = 801,
  CAPTURE_UNSUPPORTED = 900,
  CAPTURE_INVALIDATED = 901,
  CAPTURE_UNMATCHED = 903,
  CAPTURE_UNJOINED = 904,
  CAPTURE_ISOLATION = 905,
  CAPTURE_IMPLICIT = 906,
  CAPTURED_EVENT = 907,
};

// How one device behaves; see `README.md` for the words that set it.
struct Behaviour {
  emulator::Settings run;
  bool late_streams = false;
  bool check = true;
  u32 chip = 90;
  u32 multiprocessors = 4;
  u64 memory_mib = 1024;
  u64 largest_bytes = 0;  // allocations above this many bytes are refused; 0 for no limit
  u64 fail_launch = 0;    // the launch that fails, counted from 1 since this was set; 0 for none
};

struct Device;

// The primary context of a device; there are no others.
struct Context {
  Device* device;
  u32 users;
  Result error;  // once a kernel has failed, every later call answers this
};

struct Device {
  int number;
  Behaviour behaviour;
  Context context;
  emulator::Counters counters;
  u64 launches_since_set, graph_launches;
  u64 allocated_bytes, peak_bytes, allocations;
  std::string failure;
  std::mutex lock;  // of the fields above
};

struct Graph;
struct Stream;
struct Event;

// One thing that a stream does.
struct Operation {
  enum Kind { launch, copy, fill, call, record, await } kind;
  // launch
  const emulator::Kernel* kernel = nullptr;
  dim3 grid{}, block{};
  u32 shared_bytes = 0;
  std::vector<u64> words;  // the kernel's arguments, or a staged copy of pageable memory
  // copy, fill
  void* to = nullptr;
  const void* from = nullptr;
  size_t bytes = 0;
  u32 value = 0, value_bytes = 0;
  bool staged = false;  // the source is `words`
  // call
  void (*function)(void*) = nullptr;
  void* data = nullptr;
  // record, await
  Event* event = nullptr;
  u64 generation = 0;
};

struct Graph {
  Context* context;
  std::vector<Operation> operations;
};

// Streams on their way into one graph.
struct Capture {
  Graph* graph;
  Stream* origin;
  int mode;
  u64 thread, number;
  bool invalid;
  std::vector<Stream*> joined;
};

struct Stream {
  Context* context;
  bool blocking;  // orders itself with the default stream
  Capture* capture;
  u64 captured;           // operations captured on this stream
  bool unjoined;          // captured something that the origin has not waited for
  std::vector<Operation> queue;
  size_t queue_done;
  std::recursive_mutex lock;
};

struct Event {
  Context* context;
  bool timed;
  u64 generation;   // of the latest record that was asked for
  std::atomic<u64> happened;  // of the latest record that has happened
  i64 nanoseconds;
  Stream* stream;   // where the latest record waits
  Capture* capture;
  Stream* captured_on;
  u64 captured_at;
};

struct Module {
  Context* context;
  std::string stem;
};

struct Function {
  const emulator::Kernel* kernel;
  Module* module;
  u32 shared_bytes_allowed;
};

// ---- driver.cpp ----------------------------------------------------------------------------------------------------

// Most shared memory that a block of this chip can have.
u32 shared_bytes_max(u32 chip);
Device* device_at(int number);
// The context of this thread, if it can be used; otherwise the answer to give.
Result use_context(Context*& context);
// Live handles: what was created and not destroyed.
void add_handle(void* handle);
bool has_handle(const void* handle);
bool drop_handle(void* handle);
// A copy, as it may be set at any time.
Behaviour behaviour_of(Device* device);
void report(Device* device, const std::string& text);
// One lock for the tables of handles, captures and settings.
std::recursive_mutex& tables();

// ---- driver_memory.cpp ---------------------------------------------------------------------------------------------

// Whether all of these bytes lie in one allocation.
bool in_device_memory(const void* at, size_t bytes);
// Host memory that the driver gave or was told of: copies from it really happen later.
bool in_pinned_memory(const void* at, size_t bytes);
// A sentence about the first allocation whose surroundings were written to, or an empty text.
std::string overrun(Device* device);

// ---- driver_streams.cpp --------------------------------------------------------------------------------------------

// Does the operation now, or later, or notes it in the graph that the stream is capturing.
Result submit(Stream* stream, Operation operation);
// Everything that was submitted has happened afterwards. A null stream means all streams of the context.
Result finish(Context* context, Stream* stream);
// Every stream of every context does what it was given.
void drain_all();
// `SUCCESS` and the stream that a handle names; the default stream is null.
Result find_stream(void* handle, Stream*& stream);

// ---- driver_graphs.cpp ---------------------------------------------------------------------------------------------

// The answer to a call that a capture under way forbids.
Result unsafe_while_capturing();
// The same for work on the default stream.
Result default_stream_while_capturing(const Context* context);
void invalidate(Capture* capture);
// Appends to the graph that the stream is capturing.
void note(Stream* stream, Operation operation);
// A captured event: the waiting stream becomes part of the capture, or joins it again.
Result await_captured(Stream* stream, Event* event);

}  // namespace driver
