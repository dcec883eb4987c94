// A stand-in `libcuda.so.1`: memory is host memory, kernels run in the emulator. For tests only.
//
// This file: devices and how they behave, contexts, modules, functions, errors.
#include "driver.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

#include <atomic>
#include <map>
#include <memory>

namespace driver {

namespace {

std::vector<std::unique_ptr<Device>>& devices() {
  static auto* all = new std::vector<std::unique_ptr<Device>>();
  return *all;
}
std::set<const void*>& handles() {
  static auto* all = new std::set<const void*>();
  return *all;
}
constexpr size_t DEVICES_MAX = 64;
std::atomic<bool> initialised{false};
thread_local std::vector<Context*> context_stack;

// ---- settings --------------------------------------------------------------------------------------------------

bool set_one(Device& device, Behaviour& b, const std::string& key, const std::string& value) {
  char* end = nullptr;
  const u64 number = strtoull(value.c_str(), &end, 10);
  const bool is_number = !value.empty() && *end == 0;
  const auto choice = [&](const char* name, const char* off, const char* on, bool& flag) {
    if (key != name || (value != off && value != on)) return false;
    flag = value == on;
    return true;
  };
  if (key == "order") {
    if (value == "fifo") b.run.order = emulator::Order::first_in;
    else if (value == "lifo") b.run.order = emulator::Order::last_in;
    else if (value == "random") b.run.order = emulator::Order::random;
    else return false;
    return true;
  }
  if (choice("async", "early", "late", b.run.late_copies) || choice("streams", "now", "late", b.late_streams) ||
      choice("poison", "0", "1", b.run.poison) || choice("check", "0", "1", b.check)) {
    return true;
  }
  if (!is_number) return false;
  if (key == "seed") b.run.seed = number;
  else if (key == "threads") b.run.threads = number < 1 ? 1 : number > 64 ? 64 : (u32)number;
  else if (key == "chip") b.chip = (u32)number;
  else if (key == "multiprocessors") b.multiprocessors = (u32)number;
  else if (key == "memory_mib") b.memory_mib = number;
  else if (key == "largest_bytes") b.largest_bytes = number;
  else if (key == "fail_launch") b.fail_launch = number, device.launches_since_set = 0;
  else if (key == "reset") device.context.error = SUCCESS, device.failure.clear();
  else return false;
  return true;
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts{""};
  for (char c : text) {
    if (c == separator) parts.emplace_back();
    else if (c != ' ' && c != '\n') parts.back() += c;
  }
  return parts;
}

void add_device() {
  auto device = std::make_unique<Device>();
  device->number = (int)devices().size();
  device->context = Context{device.get(), 0, SUCCESS};
  devices().push_back(std::move(device));
}

// Words for one device, or for all (`device` null). False at the first that is not understood.
bool set_words(Device* device, const std::string& words) {
  for (const std::string& word : split(words, ',')) {
    if (word.empty()) continue;
    const size_t equals = word.find('=');
    const std::string key = word.substr(0, equals), value = equals == std::string::npos ? "" : word.substr(equals + 1);
    if (key == "devices") {
      while (devices().size() < (size_t)atoi(value.c_str()) && devices().size() < DEVICES_MAX) add_device();
      continue;
    }
    if (key == "device") {
      device = device_at(atoi(value.c_str()));
      if (!device) return false;
      continue;
    }
    for (const auto& each : devices()) {
      if (device && each.get() != device) continue;
      std::lock_guard<std::mutex> guard(each->lock);
      if (!set_one(*each, each->behaviour, key, value)) {
        fprintf(stderr, "emulator: the setting `%s` is not understood\n", word.c_str());
        return false;
      }
    }
  }
  return true;
}

// Devices as the environment describes them: words for one device each, parted by semicolons.
void make_devices() {
  if (!devices().empty()) return;
  const char* text = getenv("BOXWRIGHT_EMULATOR");
  const std::vector<std::string> sections = split(text ? text : "", ';');
  devices().reserve(DEVICES_MAX);  // so that other threads can look while devices are added
  for (size_t i = 0; i < sections.size() && i < DEVICES_MAX; ++i) add_device();
  for (size_t i = 0; i < devices().size(); ++i) set_words(devices()[i].get(), sections[i]);
}

Result use_device(int number, Device*& device) {
  if (!initialised) return NOT_INITIALIZED;
  device = device_at(number);
  return device ? SUCCESS : INVALID_DEVICE;
}

const std::map<int, std::pair<const char*, const char*>>& errors() {
  static const auto* all = new std::map<int, std::pair<const char*, const char*>>{
      {SUCCESS, {"CUDA_SUCCESS", "no error"}},
      {INVALID_VALUE, {"CUDA_ERROR_INVALID_VALUE", "invalid argument"}},
      {OUT_OF_MEMORY, {"CUDA_ERROR_OUT_OF_MEMORY", "out of memory"}},
      {NOT_INITIALIZED, {"CUDA_ERROR_NOT_INITIALIZED", "initialization error"}},
      {INVALID_DEVICE, {"CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"}},
      {INVALID_IMAGE, {"CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"}},
      {INVALID_CONTEXT, {"CUDA_ERROR_INVALID_CONTEXT", "invalid device context"}},
      {INVALID_HANDLE, {"CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"}},
      {NOT_FOUND, {"CUDA_ERROR_NOT_FOUND", "named symbol not found"}},
      {NOT_READY, {"CUDA_ERROR_NOT_READY", "device not ready"}},
      {ILLEGAL_ADDRESS, {"CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"}},
      {LAUNCH_FAILED, {"CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"}},
      {NOT_SUPPORTED, {"CUDA_ERROR_NOT_SUPPORTED", "operation not supported"}},
      {CAPTURE_UNSUPPORTED,
       {"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"}},
      {CAPTURE_INVALIDATED,
       {"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"}},
      {CAPTURE_UNMATCHED,
       {"CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", "capture was not ended in the same stream as it began"}},
      {CAPTURE_UNJOINED,
       {"CUDA_ERROR_STREAM_CAPTURE_UNJOINED", "capturing stream has unjoined work"}},
      {CAPTURE_ISOLATION,
       {"CUDA_ERROR_STREAM_CAPTURE_ISOLATION", "dependency created on uncaptured work in another stream"}},
      {CAPTURE_IMPLICIT,
       {"CUDA_ERROR_STREAM_CAPTURE_IMPLICIT", "operation would make the legacy stream depend on a capturing stream"}},
      {CAPTURED_EVENT,
       {"CUDA_ERROR_CAPTURED_EVENT", "operation not permitted on an event last recorded in a capturing stream"}},
  };
  return *all;
}

}  // namespace

std::recursive_mutex& tables() {
  static auto* lock = new std::recursive_mutex();
  return *lock;
}

u32 shared_bytes_max(u32 chip) {
  switch (chip) {
    case 75: return 65536;
    case 80: return 166912;
    case 86: case 89: case 120: return 101376;
    default: return 232448;
  }
}

Device* device_at(int number) {
  return number >= 0 && (size_t)number < devices().size() ? devices()[(size_t)number].get() : nullptr;
}

Result use_context(Context*& context) {
  if (!initialised) return NOT_INITIALIZED;
  context = context_stack.empty() ? nullptr : context_stack.back();
  if (!context || context->users == 0) return INVALID_CONTEXT;
  return context->error;
}

void add_handle(void* handle) {
  std::lock_guard<std::recursive_mutex> guard(tables());
  handles().insert(handle);
}
bool has_handle(const void* handle) {
  std::lock_guard<std::recursive_mutex> guard(tables());
  return handles().count(handle) > 0;
}
bool drop_handle(void* handle) {
  std::lock_guard<std::recursive_mutex> guard(tables());
  return handles().erase(handle) > 0;
}

Behaviour behaviour_of(Device* device) {
  std::lock_guard<std::mutex> guard(device->lock);
  return device->behaviour;
}

void report(Device* device, const std::string& text) {
  fprintf(stderr, "emulator: %s\n", text.c_str());
  std::lock_guard<std::mutex> guard(device->lock);
  device->failure = text;
}

}  // namespace driver

using namespace driver;

// ---- for tests -------------------------------------------------------------------------------------------------

// Sets how devices behave from now on, as the environment does; `device=2,` before other words means that device.
EXPORT int boxwright_emulator_set(const char* words) {
  std::lock_guard<std::recursive_mutex> guard(tables());
  make_devices();
  return set_words(nullptr, words) ? SUCCESS : INVALID_VALUE;
}

// Up to `count` of: launches, blocks, switches between fibers, bank conflicts of matrix loads, matrix loads, live
// allocations, bytes allocated, most bytes allocated at once, launches of graphs.
EXPORT int boxwright_emulator_stats(int number, u64* values, int count) {
  Device* device = device_at(number);
  if (!device) return INVALID_DEVICE;
  std::lock_guard<std::mutex> guard(device->lock);
  const emulator::Counters& c = device->counters;
  const u64 all[] = {c.launches,          c.blocks,           c.switches,
                     c.bank_conflicts,    c.matrix_loads,     device->allocations,
                     device->allocated_bytes, device->peak_bytes, device->graph_launches};
  for (int i = 0; i < count && i < (int)(sizeof all / sizeof *all); ++i) values[i] = all[i];
  return SUCCESS;
}

// Why the latest launch or check of the device failed, as text that ends with a zero byte.
EXPORT int boxwright_emulator_failure(int number, char* text, size_t bytes) {
  Device* device = device_at(number);
  if (!device || !bytes) return INVALID_VALUE;
  std::lock_guard<std::mutex> guard(device->lock);
  snprintf(text, bytes, "%s", device->failure.c_str());
  return SUCCESS;
}

// Calls `visit` with every kernel of a file; the stand-in compiler lists them in its log.
EXPORT void boxwright_emulator_kernels(const char* stem, void (*visit)(const char* name, u64 threads, void* data),
                                       void* data) {
  struct Visitor {
    void (*visit)(const char*, u64, void*);
    void* data;
  } visitor{visit, data};
  emulator::each_kernel(
      stem,
      [](const emulator::Kernel* kernel, void* data) {
        auto* v = static_cast<Visitor*>(data);
        v->visit(kernel->name, kernel->threads, v->data);
      },
      &visitor);
}

// ---- devices ---------------------------------------------------------------------------------------------------

EXPORT int cuInit(u32) {
  std::lock_guard<std::recursive_mutex> guard(tables());
  make_devices();
  initialised = true;
  emulator::catch_bad_accesses();
  return SUCCESS;
}
EXPORT int cuDriverGetVersion(int* version) {
  *version = 13000;
  return SUCCESS;
}
EXPORT int cuDeviceGetCount(int* count) {
  if (!initialised) return NOT_INITIALIZED;
  *count = (int)devices().size();
  return SUCCESS;
}
EXPORT int cuDeviceGet(int* handle, int number) {
  Device* device;
  if (const Result r = use_device(number, device)) return r;
  *handle = number;
  return SUCCESS;
}
EXPORT int cuDeviceGetName(char* name, int bytes, int number) {
  Device* device;
  if (const Result r = use_device(number, device)) return r;
  snprintf(name, (size_t)bytes, "CPU emulation");
  return SUCCESS;
}
EXPORT int cuDeviceGetUuid_v2(u8* uuid, int number) {
  Device* device;
  if (const Result r = use_device(number, device)) return r;
  memcpy(uuid, "boxwright-emul-", 15);
  uuid[15] = (u8)number;
  return SUCCESS;
}
EXPORT int cuDeviceGetUuid(u8* uuid, int number) { return cuDeviceGetUuid_v2(uuid, number); }
EXPORT int cuDeviceTotalMem_v2(size_t* bytes, int number) {
  Device* device;
  if (const Result r = use_device(number, device)) return r;
  *bytes = behaviour_of(device).memory_mib << 20;
  return SUCCESS;
}
EXPORT int cuDeviceGetAttribute(int* value, int attribute, int number) {
  Device* device;
  if (const Result r = use_device(number, device)) return r;
  const Behaviour b = behaviour_of(device);
  switch (attribute) {
    case 1: case 2: case 3: *value = 1024; break;          // threads of a block
    case 4: *value = 64; break;
    case 5: *value = 0x7fffffff; break;                    // blocks of a grid
    case 6: case 7: *value = 65535; break;
    case 8: *value = 49152; break;                         // shared memory without asking for more
    case 9: *value = 65536; break;                         // constant memory
    case 10: *value = 32; break;                           // lanes of a warp
    case 12: case 82: *value = 65536; break;               // registers
    case 13: *value = 1500000; break;                      // clock, kHz
    case 16: *value = (int)b.multiprocessors; break;
    case 19: case 31: case 41: case 78: *value = 1; break; // host memory mapped, kernels side by side, one address space
    case 36: *value = 2000000; break;                      // memory clock, kHz
    case 37: *value = 5120; break;                         // memory bus, bits
    case 38: *value = 50 << 20; break;                     // second-level cache
    case 39: *value = b.chip == 75 ? 1024 : b.chip == 86 || b.chip == 89 || b.chip == 120 ? 1536 : 2048; break;
    case 40: *value = 2; break;                            // copy engines
    case 75: *value = (int)b.chip / 10; break;
    case 76: *value = (int)b.chip % 10; break;
    case 81: *value = (int)shared_bytes_max(b.chip) + (b.chip == 75 ? 0 : 1024); break;
    case 97: *value = (int)shared_bytes_max(b.chip); break;
    case 106: *value = b.chip == 75 ? 16 : b.chip == 80 || b.chip == 90 ? 32 : 24; break;
    case 111: *value = b.chip == 75 ? 0 : 1024; break;     // shared memory the chip keeps for itself
    default: *value = 0;
  }
  return SUCCESS;
}
EXPORT int cuDeviceGetPCIBusId(char* text, int bytes, int number) {
  Device* device;
  if (const Result r = use_device(number, device)) return r;
  snprintf(text, (size_t)bytes, "0000:%02x:00.0", number + 1);
  return SUCCESS;
}

// ---- contexts --------------------------------------------------------------------------------------------------

EXPORT int cuDevicePrimaryCtxRetain(Context** context, int number) {
  Device* device;
  if (const Result r = use_device(number, device)) return r;
  std::lock_guard<std::recursive_mutex> guard(tables());
  ++device->context.users;
  *context = &device->context;
  return SUCCESS;
}
EXPORT int cuDevicePrimaryCtxRelease_v2(int number) {
  Device* device;
  if (const Result r = use_device(number, device)) return r;
  std::lock_guard<std::recursive_mutex> guard(tables());
  if (device->context.users == 0) return INVALID_CONTEXT;
  // As with the driver, a context that failed is new again when nobody holds it.
  if (--device->context.users == 0) device->context.error = SUCCESS;
  return SUCCESS;
}
EXPORT int cuDevicePrimaryCtxReset_v2(int number) {
  Device* device;
  if (const Result r = use_device(number, device)) return r;
  device->context.error = SUCCESS;
  return SUCCESS;
}
EXPORT int cuDevicePrimaryCtxGetState(int number, u32* flags, int* active) {
  Device* device;
  if (const Result r = use_device(number, device)) return r;
  *flags = 0;
  *active = device->context.users > 0;
  return SUCCESS;
}
EXPORT int cuDevicePrimaryCtxSetFlags_v2(int, u32) { return SUCCESS; }
EXPORT int cuCtxSetFlags(u32) { return SUCCESS; }
EXPORT int cuCtxSetCurrent(Context* context) {
  if (!initialised) return NOT_INITIALIZED;
  if (!context_stack.empty()) context_stack.pop_back();
  if (context) context_stack.push_back(context);
  return SUCCESS;
}
EXPORT int cuCtxGetCurrent(Context** context) {
  if (!initialised) return NOT_INITIALIZED;
  *context = context_stack.empty() ? nullptr : context_stack.back();
  return SUCCESS;
}
EXPORT int cuCtxPushCurrent_v2(Context* context) {
  if (!context) return INVALID_CONTEXT;
  context_stack.push_back(context);
  return SUCCESS;
}
EXPORT int cuCtxPopCurrent_v2(Context** context) {
  if (context_stack.empty()) return INVALID_CONTEXT;
  if (context) *context = context_stack.back();
  context_stack.pop_back();
  return SUCCESS;
}
EXPORT int cuCtxGetDevice(int* number) {
  Context* context;
  if (const Result r = use_context(context)) return r;
  *number = context->device->number;
  return SUCCESS;
}
EXPORT int cuCtxSynchronize() {
  Context* context;
  if (const Result r = use_context(context)) return r;
  if (const Result r = unsafe_while_capturing()) return r;
  return finish(context, nullptr);
}
EXPORT int cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0, *greatest = -5;
  return SUCCESS;
}

// ---- modules and functions -------------------------------------------------------------------------------------

EXPORT int cuModuleLoadData(Module** module, const void* image) {
  Context* context;
  if (const Result r = use_context(context)) return r;
  if (const Result r = unsafe_while_capturing()) return r;
  const std::string mark = "boxwright-emulated:";
  const char* text = static_cast<const char*>(image);
  if (strncmp(text, mark.c_str(), mark.size()) != 0) return INVALID_IMAGE;
  const std::string rest(text + mark.size(), strnlen(text + mark.size(), 256));
  const std::string stem = rest.substr(0, rest.find_first_not_of(
      "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-"));
  if (!emulator::has_stem(stem)) {
    report(context->device, "kernels/" + stem + ".cu is not in this build of the emulator");
    return INVALID_IMAGE;
  }
  *module = new Module{context, stem};
  add_handle(*module);
  return SUCCESS;
}
EXPORT int cuModuleLoadDataEx(Module** module, const void* image, u32, void*, void**) {
  return cuModuleLoadData(module, image);
}
EXPORT int cuModuleUnload(Module* module) { return drop_handle(module) ? SUCCESS : INVALID_HANDLE; }
EXPORT int cuModuleGetFunction(Function** function, Module* module, const char* name) {
  if (!has_handle(module)) return INVALID_HANDLE;
  const emulator::Kernel* kernel = emulator::find_kernel(module->stem, name);
  if (!kernel) return NOT_FOUND;
  *function = new Function{kernel, module, 49152};
  add_handle(*function);
  return SUCCESS;
}
EXPORT int cuModuleGetLoadingMode(int* mode) {
  *mode = 1;
  return SUCCESS;
}
EXPORT int cuFuncLoad(Function* function) { return has_handle(function) ? SUCCESS : INVALID_HANDLE; }
EXPORT int cuFuncGetName(const char** name, Function* function) {
  if (!has_handle(function)) return INVALID_HANDLE;
  *name = function->kernel->name;
  return SUCCESS;
}
EXPORT int cuFuncGetModule(Module** module, Function* function) {
  if (!has_handle(function)) return INVALID_HANDLE;
  *module = function->module;
  return SUCCESS;
}
EXPORT int cuFuncSetCacheConfig(Function* function, int) { return has_handle(function) ? SUCCESS : INVALID_HANDLE; }
EXPORT int cuFuncSetAttribute(Function* function, int attribute, int value) {
  if (!has_handle(function)) return INVALID_HANDLE;
  if (attribute == 8) {
    if (value < 0 || (u32)value > shared_bytes_max(behaviour_of(function->module->context->device).chip)) {
      return INVALID_VALUE;
    }
    function->shared_bytes_allowed = (u32)value;
  }
  return SUCCESS;
}
EXPORT int cuFuncGetAttribute(int* value, int attribute, Function* function) {
  if (!has_handle(function)) return INVALID_HANDLE;
  const int chip = (int)behaviour_of(function->module->context->device).chip;
  switch (attribute) {
    case 0: *value = (int)function->kernel->threads; break;
    case 4: *value = 32; break;                    // registers
    case 5: case 6: *value = chip; break;          // versions of the code
    case 8: *value = (int)function->shared_bytes_allowed; break;
    default: *value = 0;
  }
  return SUCCESS;
}
EXPORT int cuFuncGetParamInfo(Function* function, size_t index, size_t* offset, size_t* bytes) {
  if (!has_handle(function)) return INVALID_HANDLE;
  if (index > 0) return INVALID_VALUE;
  *offset = 0;
  if (bytes) *bytes = function->kernel->argument_bytes;
  return SUCCESS;
}
EXPORT int cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, Function* function, int threads,
                                                                size_t shared_bytes, u32) {
  if (!has_handle(function)) return INVALID_HANDLE;
  if (threads < 1 || threads > 1024) return INVALID_VALUE;
  const u32 most = shared_bytes_max(behaviour_of(function->module->context->device).chip);
  const size_t by_threads = 2048 / (((size_t)threads + 31) / 32 * 32);
  const size_t by_memory = shared_bytes ? (most + 1024) / (shared_bytes + 1024) : by_threads;
  *blocks = (int)(by_memory < by_threads ? by_memory : by_threads);
  return SUCCESS;
}
EXPORT int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Function* function, int threads,
                                                       size_t shared_bytes) {
  return cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared_bytes, 0);
}

// ---- errors and addresses of functions -------------------------------------------------------------------------

EXPORT int cuGetErrorName(int error, const char** text) {
  const auto found = errors().find(error);
  *text = found == errors().end() ? nullptr : found->second.first;
  return *text ? SUCCESS : INVALID_VALUE;
}
EXPORT int cuGetErrorString(int error, const char** text) {
  const auto found = errors().find(error);
  *text = found == errors().end() ? nullptr : found->second.second;
  return *text ? SUCCESS : INVALID_VALUE;
}
EXPORT int cuGetProcAddress_v2(const char* name, void** address, int, u64, int* status) {
  Dl_info self;
  void* library = nullptr;
  if (dladdr((void*)cuInit, &self)) library = dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  *address = nullptr;
  for (const char* ending : {"_v2", ""}) {
    if (library && !*address) *address = dlsym(library, (std::string(name) + ending).c_str());
  }
  if (status) *status = *address ? 0 : 1;
  return *address ? SUCCESS : NOT_FOUND;
}
EXPORT int cuProfilerStart() { return SUCCESS; }
EXPORT int cuProfilerStop() { return SUCCESS; }
