// The stand-in driver's streams, events and launches.
//
// A stream does what it is given at once, or, with `streams=late`, only when somebody waits for it: what the host
// has not ordered then really runs in another order.
#include <stdio.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>

#include "driver.h"

namespace driver {

namespace {

std::vector<Stream*>& streams() {
  static auto* all = new std::vector<Stream*>();
  return *all;
}
i64 nanoseconds() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

Result run_event(Stream* stream, const Operation& operation);

Result launch(Context* context, const Operation& operation) {
  Device* device = context->device;
  const Behaviour b = behaviour_of(device);
  emulator::Counters counters{};
  emulator::Outcome outcome;
  bool planned;
  {
    std::lock_guard<std::mutex> guard(device->lock);
    planned = ++device->launches_since_set == b.fail_launch;
  }
  if (planned) {
    outcome.failure = "this launch was told to fail";
  } else {
    outcome = emulator::run({operation.kernel, operation.grid, operation.block, operation.shared_bytes,
                             operation.words.data()},
                            b.run, counters);
    if (outcome.failure.empty() && b.check) outcome.failure = overrun(device);
  }
  {
    std::lock_guard<std::mutex> guard(device->lock);
    emulator::Counters& all = device->counters;
    all.launches += counters.launches, all.blocks += counters.blocks, all.switches += counters.switches;
    all.bank_conflicts += counters.bank_conflicts, all.matrix_loads += counters.matrix_loads;
  }
  if (outcome.failure.empty()) return SUCCESS;
  report(device, "kernel " + std::string(operation.kernel->name) + " failed: " + outcome.failure);
  return outcome.bad_address ? ILLEGAL_ADDRESS : LAUNCH_FAILED;
}

void fill(const Operation& operation) {
  u8* to = static_cast<u8*>(operation.to);
  for (size_t at = 0; at < operation.bytes; at += operation.value_bytes) {
    memcpy(to + at, &operation.value, operation.value_bytes);
  }
}

// Really does it. `stream` is null for the default stream.
Result perform(Context* context, Stream* stream, const Operation& operation) {
  if (context->error) return context->error;
  Result result = SUCCESS;
  switch (operation.kind) {
    case Operation::launch:
      result = launch(context, operation);
      break;
    case Operation::copy:
      memmove(operation.to, operation.staged ? operation.words.data() : operation.from, operation.bytes);
      break;
    case Operation::fill:
      if (operation.value_bytes == 1) memset(operation.to, (int)operation.value, operation.bytes);
      else fill(operation);
      break;
    case Operation::call:
      operation.function(operation.data);
      break;
    case Operation::record:
    case Operation::await:
      result = run_event(stream, operation);
      break;
  }
  if (result) context->error = result;
  return result;
}

Result drain(Stream* stream) {
  std::lock_guard<std::recursive_mutex> guard(stream->lock);
  while (stream->queue_done < stream->queue.size()) {
    const Operation operation = std::move(stream->queue[stream->queue_done++]);
    if (const Result r = perform(stream->context, stream, operation)) {
      stream->queue.clear(), stream->queue_done = 0;
      return r;
    }
  }
  stream->queue.clear(), stream->queue_done = 0;
  return stream->context->error;
}

// Does what the stream was given up to the record `generation` of the event.
Result drain_until(Stream* stream, const Event* event, u64 generation) {
  // Another thread may hold that stream and itself wait for the one that is being run here: no waiting for the lock.
  std::unique_lock<std::recursive_mutex> guard(stream->lock, std::defer_lock);
  while (!guard.try_lock()) {
    if (event->happened >= generation) return SUCCESS;
    std::this_thread::yield();
  }
  while (event->happened < generation && stream->queue_done < stream->queue.size()) {
    const Operation operation = std::move(stream->queue[stream->queue_done++]);
    if (const Result r = perform(stream->context, stream, operation)) return r;
  }
  return SUCCESS;
}

Result run_event(Stream* stream, const Operation& operation) {
  Event* event = operation.event;
  if (operation.kind == Operation::record) {
    event->happened = operation.generation;
    event->nanoseconds = nanoseconds();
    return SUCCESS;
  }
  if (event->happened >= operation.generation || event->stream == stream || !event->stream) return SUCCESS;
  return drain_until(event->stream, event, operation.generation);
}

Result check_launch(const Function* function, const Operation& o) {
  const Device* device = function->module->context->device;
  const auto refuse = [&](const std::string& reason) {
    report(const_cast<Device*>(device), "kernel " + std::string(function->kernel->name) + " is not launched: " + reason);
    return INVALID_VALUE;
  };
  const u64 threads = (u64)o.block.x * o.block.y * o.block.z;
  if (!o.grid.x || !o.grid.y || !o.grid.z) return refuse("the grid is empty");
  if (o.grid.x > 0x7fffffffu || o.grid.y > 65535 || o.grid.z > 65535) return refuse("the grid is too large");
  if (threads != function->kernel->threads || threads == 0 || threads > 1024) {
    return refuse("blocks of " + std::to_string(threads) + " threads; it is written for " +
                  std::to_string(function->kernel->threads));
  }
  if (o.shared_bytes > function->shared_bytes_allowed) {
    return refuse(std::to_string(o.shared_bytes) + " bytes of shared memory; allowed are " +
                  std::to_string(function->shared_bytes_allowed));
  }
  return SUCCESS;
}

// The kernel's one structure, from whichever form the host chose.
Result take_arguments(const Function* function, void** parameters, void** extra, Operation& o) {
  const size_t bytes = function->kernel->argument_bytes;
  const void* from = parameters ? parameters[0] : nullptr;
  if (!parameters && extra) {
    size_t given = 0;
    for (; *extra; extra += 2) {
      if (*extra == (void*)1) from = extra[1];
      if (*extra == (void*)2) given = *static_cast<size_t*>(extra[1]);
    }
    if (given != bytes) {
      report(function->module->context->device,
             "kernel " + std::string(function->kernel->name) + " is not launched: it takes " + std::to_string(bytes) +
                 " bytes of arguments, the host gives " + std::to_string(given));
      return INVALID_VALUE;
    }
  }
  if (!from) return INVALID_VALUE;
  o.words.resize((bytes + 7) / 8);
  memcpy(o.words.data(), from, bytes);
  return SUCCESS;
}

Result launch_function(Function* function, dim3 grid, dim3 block, u32 shared_bytes, void* handle, void** parameters,
                       void** extra) {
  Context* context;
  if (const Result r = use_context(context)) return r;
  Stream* stream;
  if (const Result r = find_stream(handle, stream)) return r;
  if (!has_handle(function)) return INVALID_HANDLE;
  if (function->module->context != context || (stream && stream->context != context)) return INVALID_HANDLE;
  Operation o;
  o.kind = Operation::launch;
  o.kernel = function->kernel, o.grid = grid, o.block = block, o.shared_bytes = shared_bytes;
  if (const Result r = check_launch(function, o)) return r;
  if (const Result r = take_arguments(function, parameters, extra, o)) return r;
  return submit(stream, std::move(o));
}

}  // namespace

Result find_stream(void* handle, Stream*& stream) {
  // 1 and 2 name the default stream of all threads and of this thread.
  stream = (size_t)handle <= 2 ? nullptr : static_cast<Stream*>(handle);
  return !stream || has_handle(stream) ? SUCCESS : INVALID_HANDLE;
}

Result submit(Stream* stream, Operation operation) {
  Context* context;
  if (const Result r = use_context(context)) return r;
  if (!stream) {
    if (const Result r = default_stream_while_capturing(context)) return r;
    // The default stream waits for every blocking stream, and everything waits for it.
    std::vector<Stream*> before;
    {
      std::lock_guard<std::recursive_mutex> guard(tables());
      for (Stream* other : streams()) {
        if (other->context == context && other->blocking) before.push_back(other);
      }
    }
    for (Stream* other : before) {
      if (const Result r = drain(other)) return r;
    }
    if (operation.staged) operation.staged = false;
    return perform(context, nullptr, operation);
  }
  if (stream->capture) {
    std::lock_guard<std::recursive_mutex> guard(tables());
    if (stream->capture->invalid) return CAPTURE_INVALIDATED;
    operation.staged = false;  // a graph reads its source when it runs
    note(stream, std::move(operation));
    return SUCCESS;
  }
  std::lock_guard<std::recursive_mutex> guard(stream->lock);
  if (!behaviour_of(context->device).late_streams) {
    if (const Result r = drain(stream)) return r;
    operation.staged = false;
    return perform(context, stream, operation);
  }
  if (operation.staged) {
    operation.words.resize((operation.bytes + 7) / 8);
    memcpy(operation.words.data(), operation.from, operation.bytes);
  }
  stream->queue.push_back(std::move(operation));
  return SUCCESS;
}

Result finish(Context* context, Stream* stream) {
  if (stream) return drain(stream);
  std::vector<Stream*> all;
  {
    std::lock_guard<std::recursive_mutex> guard(tables());
    for (Stream* each : streams()) {
      if (each->context == context) all.push_back(each);
    }
  }
  for (Stream* each : all) {
    if (const Result r = drain(each)) return r;
  }
  return context->error;
}

void drain_all() {
  std::vector<Stream*> all;
  {
    std::lock_guard<std::recursive_mutex> guard(tables());
    all = streams();
  }
  for (Stream* each : all) drain(each);
}

}  // namespace driver

using namespace driver;

// ---- streams ---------------------------------------------------------------------------------------------------

EXPORT int cuStreamCreate(Stream** stream, u32 flags) {
  Context* context;
  if (const Result r = use_context(context)) return r;
  Stream* made = new Stream();
  made->context = context;
  made->blocking = !(flags & 1);
  add_handle(made);
  std::lock_guard<std::recursive_mutex> guard(tables());
  streams().push_back(made);
  *stream = made;
  return SUCCESS;
}
EXPORT int cuStreamCreateWithPriority(Stream** stream, u32 flags, int) { return cuStreamCreate(stream, flags); }
EXPORT int cuStreamDestroy_v2(void* handle) {
  Stream* stream;
  if (const Result r = find_stream(handle, stream)) return r;
  if (!stream) return INVALID_HANDLE;
  drain(stream);
  std::lock_guard<std::recursive_mutex> guard(tables());
  streams().erase(std::find(streams().begin(), streams().end(), stream));
  drop_handle(stream);  // the structure stays: an event may still name it
  return SUCCESS;
}
EXPORT int cuStreamSynchronize(void* handle) {
  Context* context;
  if (const Result r = use_context(context)) return r;
  Stream* stream;
  if (const Result r = find_stream(handle, stream)) return r;
  if (stream && stream->capture) {
    invalidate(stream->capture);
    return CAPTURE_UNSUPPORTED;
  }
  if (!stream) {
    if (const Result r = unsafe_while_capturing()) return r;
  }
  return finish(context, stream);
}
EXPORT int cuStreamQuery(void* handle) { return cuStreamSynchronize(handle); }
EXPORT int cuStreamGetCtx(void* handle, Context** context) {
  Stream* stream;
  if (const Result r = find_stream(handle, stream)) return r;
  return stream ? (*context = stream->context, SUCCESS) : (int)use_context(*context);
}
EXPORT int cuStreamGetPriority(void*, int* priority) {
  *priority = 0;
  return SUCCESS;
}
EXPORT int cuStreamGetFlags(void* handle, u32* flags) {
  Stream* stream;
  if (const Result r = find_stream(handle, stream)) return r;
  *flags = stream && !stream->blocking;
  return SUCCESS;
}
EXPORT int cuStreamWaitEvent(void* handle, Event* event, u32) {
  Context* context;
  if (const Result r = use_context(context)) return r;
  Stream* stream;
  if (const Result r = find_stream(handle, stream)) return r;
  if (!has_handle(event)) return INVALID_HANDLE;
  std::unique_lock<std::recursive_mutex> guard(tables());
  if (event->capture) return stream ? await_captured(stream, event) : CAPTURE_IMPLICIT;
  if (stream && stream->capture) {
    if (event->generation == 0) return SUCCESS;
    invalidate(stream->capture);
    return CAPTURE_ISOLATION;
  }
  guard.unlock();
  if (event->generation == 0) return SUCCESS;
  Operation o;
  o.kind = Operation::await;
  o.event = event, o.generation = event->generation;
  return submit(stream, std::move(o));
}
EXPORT int cuLaunchHostFunc(void* handle, void (*function)(void*), void* data) {
  Context* context;
  if (const Result r = use_context(context)) return r;
  Stream* stream;
  if (const Result r = find_stream(handle, stream)) return r;
  Operation o;
  o.kind = Operation::call;
  o.function = function, o.data = data;
  return submit(stream, std::move(o));
}

// ---- events ----------------------------------------------------------------------------------------------------

EXPORT int cuEventCreate(Event** event, u32 flags) {
  Context* context;
  if (const Result r = use_context(context)) return r;
  *event = new Event();
  (*event)->context = context;
  (*event)->timed = !(flags & 2);
  add_handle(*event);
  return SUCCESS;
}
EXPORT int cuEventDestroy_v2(Event* event) {
  // A stream may still have to record it: the structure stays.
  return drop_handle(event) ? SUCCESS : INVALID_HANDLE;
}
EXPORT int cuEventRecord(Event* event, void* handle) {
  Context* context;
  if (const Result r = use_context(context)) return r;
  Stream* stream;
  if (const Result r = find_stream(handle, stream)) return r;
  if (!has_handle(event) || (stream && stream->context != event->context)) return INVALID_HANDLE;
  if (stream && stream->capture) {
    std::lock_guard<std::recursive_mutex> guard(tables());
    event->capture = stream->capture;
    event->captured_on = stream, event->captured_at = stream->captured;
    return SUCCESS;
  }
  event->capture = nullptr;
  event->stream = stream;
  Operation o;
  o.kind = Operation::record;
  o.event = event, o.generation = ++event->generation;
  return submit(stream, std::move(o));
}
EXPORT int cuEventRecordWithFlags(Event* event, void* handle, u32) { return cuEventRecord(event, handle); }
EXPORT int cuEventSynchronize(Event* event) {
  Context* context;
  if (const Result r = use_context(context)) return r;
  if (!has_handle(event)) return INVALID_HANDLE;
  if (event->capture) return CAPTURED_EVENT;
  if (event->happened < event->generation && event->stream) {
    if (const Result r = drain_until(event->stream, event, event->generation)) return r;
  }
  return context->error;
}
EXPORT int cuEventQuery(Event* event) {
  Context* context;
  if (const Result r = use_context(context)) return r;
  if (!has_handle(event)) return INVALID_HANDLE;
  if (event->capture) return CAPTURED_EVENT;
  if (event->happened >= event->generation) return SUCCESS;
  // Not ready once, as on a busy device; asking again makes the stream move on.
  if (const Result r = drain_until(event->stream, event, event->generation)) return r;
  return NOT_READY;
}
EXPORT int cuEventElapsedTime_v2(float* milliseconds, Event* from, Event* to) {
  if (!has_handle(from) || !has_handle(to) || !from->timed || !to->timed) return INVALID_HANDLE;
  if (from->generation == 0 || to->generation == 0) return INVALID_HANDLE;
  if (from->happened < from->generation || to->happened < to->generation) return NOT_READY;
  *milliseconds = (float)(to->nanoseconds - from->nanoseconds) * 1e-6f;
  return SUCCESS;
}
EXPORT int cuEventElapsedTime(float* milliseconds, Event* from, Event* to) {
  return cuEventElapsedTime_v2(milliseconds, from, to);
}

// ---- launches --------------------------------------------------------------------------------------------------

EXPORT int cuLaunchKernel(Function* function, u32 grid_x, u32 grid_y, u32 grid_z, u32 block_x, u32 block_y, u32 block_z,
                          u32 shared_bytes, void* stream, void** parameters, void** extra) {
  return launch_function(function, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared_bytes, stream,
                         parameters, extra);
}
struct LaunchConfiguration {
  u32 grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
  void* stream;
  void* attributes;
  u32 attribute_count;
};
EXPORT int cuLaunchKernelEx(const LaunchConfiguration* c, Function* function, void** parameters, void** extra) {
  return launch_function(function, {c->grid_x, c->grid_y, c->grid_z}, {c->block_x, c->block_y, c->block_z},
                         c->shared_bytes, c->stream, parameters, extra);
}
// Blocks run one after another here, so a barrier of the whole grid cannot be.
EXPORT int cuLaunchCooperativeKernel(Function*, u32, u32, u32, u32, u32, u32, u32, void*, void**) {
  return NOT_SUPPORTED;
}
