// The stand-in driver's captures and graphs: lists of operations in the order of capture.
#include <algorithm>
#include <atomic>

#include "driver.h"

namespace driver {

namespace {

std::vector<Capture*>& captures() {
  static auto* all = new std::vector<Capture*>();
  return *all;
}
// 0 global, 1 thread, 2 relaxed: what this thread may do while somebody captures.
thread_local int capture_mode = 0;

u64 thread_number() {
  static std::atomic<u64> last{0};
  thread_local const u64 number = ++last;
  return number;
}

void leave_capture(Stream* stream) {
  stream->capture = nullptr;
  stream->captured = 0, stream->unjoined = false;
}

}  // namespace

void invalidate(Capture* capture) { capture->invalid = true; }

void note(Stream* stream, Operation operation) {
  Capture* capture = stream->capture;
  capture->graph->operations.push_back(std::move(operation));
  ++stream->captured;
  if (stream != capture->origin) stream->unjoined = true;
}

Result default_stream_while_capturing(const Context* context) {
  std::lock_guard<std::recursive_mutex> guard(tables());
  for (Capture* capture : captures()) {
    if (capture->origin->blocking && capture->origin->context == context) {
      invalidate(capture);
      return CAPTURE_IMPLICIT;
    }
  }
  return SUCCESS;
}

// A captured event: the waiting stream becomes part of the capture, or joins it again.
Result await_captured(Stream* stream, Event* event) {
  Capture* capture = event->capture;
  if (stream->capture && stream->capture != capture) return CAPTURE_ISOLATION;
  if (!stream->capture) {
    stream->capture = capture;
    stream->captured = 0, stream->unjoined = true;
    capture->joined.push_back(stream);
  }
  Stream* other = event->captured_on;
  if (other != stream && other->captured == event->captured_at) other->unjoined = false;
  return SUCCESS;
}

Result unsafe_while_capturing() {
  std::lock_guard<std::recursive_mutex> guard(tables());
  if (capture_mode == 2) return SUCCESS;
  for (Capture* capture : captures()) {
    const bool mine = capture->thread == thread_number();
    if (capture->mode == 0 ? capture_mode == 0 || mine : capture->mode == 1 && mine) {
      invalidate(capture);
      return CAPTURE_UNSUPPORTED;
    }
  }
  return SUCCESS;
}

}  // namespace driver

using namespace driver;

// ---- graphs ----------------------------------------------------------------------------------------------------

EXPORT int cuThreadExchangeStreamCaptureMode(int* mode) {
  std::swap(*mode, capture_mode);
  return SUCCESS;
}
EXPORT int cuStreamBeginCapture_v2(void* handle, int mode) {
  Context* context;
  if (const Result r = use_context(context)) return r;
  Stream* stream;
  if (const Result r = find_stream(handle, stream)) return r;
  if (!stream) return CAPTURE_UNSUPPORTED;
  if (stream->capture) return 401;  // illegal state
  static std::atomic<u64> last{0};
  std::lock_guard<std::recursive_mutex> guard(tables());
  stream->capture = new Capture{new Graph{context, {}}, stream, mode, thread_number(), ++last, false, {}};
  stream->captured = 0, stream->unjoined = false;
  captures().push_back(stream->capture);
  return SUCCESS;
}
EXPORT int cuStreamEndCapture(void* handle, Graph** graph) {
  Context* context;
  if (const Result r = use_context(context)) return r;
  Stream* stream;
  if (const Result r = find_stream(handle, stream)) return r;
  *graph = nullptr;
  std::lock_guard<std::recursive_mutex> guard(tables());
  if (!stream || !stream->capture) return 401;  // illegal state
  Capture* capture = stream->capture;
  if (capture->origin != stream) return CAPTURE_UNMATCHED;
  if (capture->mode != 2 && capture->thread != thread_number()) return 908;  // another thread began it
  Result result = capture->invalid ? CAPTURE_INVALIDATED : SUCCESS;
  for (Stream* joined : capture->joined) {
    if (!result && joined->unjoined) result = CAPTURE_UNJOINED;
    leave_capture(joined);
  }
  leave_capture(stream);
  captures().erase(std::find(captures().begin(), captures().end(), capture));
  if (result) {
    delete capture->graph;
  } else {
    add_handle(capture->graph);
    *graph = capture->graph;
  }
  return result;  // the capture itself stays: an event may still name it
}
EXPORT int cuStreamIsCapturing(void* handle, int* status) {
  Stream* stream;
  if (const Result r = find_stream(handle, stream)) return r;
  *status = !stream || !stream->capture ? 0 : stream->capture->invalid ? 2 : 1;
  return SUCCESS;
}
EXPORT int cuStreamGetCaptureInfo_v2(void* handle, int* status, u64* number, Graph** graph, const void** dependencies,
                                     size_t* dependency_count) {
  Stream* stream;
  if (const int r = cuStreamIsCapturing(handle, status)) return r;
  find_stream(handle, stream);
  if (*status == 1) {
    if (number) *number = stream->capture->number;
    if (graph) *graph = stream->capture->graph;
    if (dependencies) *dependencies = nullptr;
    if (dependency_count) *dependency_count = 0;
  }
  return SUCCESS;
}
EXPORT int cuStreamGetCaptureInfo_v3(void* handle, int* status, u64* number, Graph** graph, const void** dependencies,
                                     const void** edges, size_t* dependency_count) {
  if (edges) *edges = nullptr;
  return cuStreamGetCaptureInfo_v2(handle, status, number, graph, dependencies, dependency_count);
}
EXPORT int cuGraphCreate(Graph** graph, u32) {
  Context* context;
  if (const Result r = use_context(context)) return r;
  *graph = new Graph{context, {}};
  add_handle(*graph);
  return SUCCESS;
}
EXPORT int cuGraphGetNodes(Graph* graph, void** nodes, size_t* count) {
  if (!has_handle(graph)) return INVALID_HANDLE;
  const size_t all = graph->operations.size();
  if (nodes) {
    for (size_t i = 0; i < *count; ++i) nodes[i] = i < all ? &graph->operations[i] : nullptr;
    *count = std::min(*count, all);
  } else {
    *count = all;
  }
  return SUCCESS;
}
EXPORT int cuGraphDestroy(Graph* graph) {
  if (!drop_handle(graph)) return INVALID_HANDLE;
  delete graph;
  return SUCCESS;
}
EXPORT int cuGraphInstantiateWithFlags(Graph** executable, Graph* graph, u64) {
  Context* context;
  if (const Result r = use_context(context)) return r;
  if (!has_handle(graph)) return INVALID_HANDLE;
  *executable = new Graph(*graph);
  add_handle(*executable);
  return SUCCESS;
}
EXPORT int cuGraphInstantiateWithParams(Graph** executable, Graph* graph, void*) {
  return cuGraphInstantiateWithFlags(executable, graph, 0);
}
EXPORT int cuGraphExecDestroy(Graph* executable) {
  if (!drop_handle(executable)) return INVALID_HANDLE;
  drain_all();  // it may still wait in a stream
  delete executable;
  return SUCCESS;
}
EXPORT int cuGraphUpload(Graph* executable, void*) { return has_handle(executable) ? SUCCESS : INVALID_HANDLE; }
EXPORT int cuGraphLaunch(Graph* executable, void* handle) {
  Context* context;
  if (const Result r = use_context(context)) return r;
  Stream* stream;
  if (const Result r = find_stream(handle, stream)) return r;
  if (!has_handle(executable)) return INVALID_HANDLE;
  for (const Operation& operation : executable->operations) {
    if (const Result r = submit(stream, operation)) return r;
  }
  std::lock_guard<std::mutex> guard(context->device->lock);
  ++context->device->graph_launches;
  return SUCCESS;
}
