// The stand-in driver's memory.
//
// Each allocation has pages of its own. It begins right after an inaccessible page and ends less than 256 bytes before
// another one, and those bytes hold a pattern that must not change: a thread that goes far outside ends its launch,
// one that writes just past the end is found after it. New memory is full of 0xFF bytes: NaN in every type of number.
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <map>

#include "driver.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace driver {

namespace {

constexpr size_t PAGE = 4096, ALIGNMENT = 256;
// Around an allocation: NaN as f32, bf16 and f16. Another one for each allocation, since a kernel that goes too far in
// its source and its target alike may copy it.
u8 pattern(u8 mark, i64 at) { return at & 1 ? 0xff : mark; }
u8 next_mark() {
  static std::atomic<u32> count{0};
  return (u8)(0xc1 + count.fetch_add(1) % 61);
}

struct Allocation {
  Device* device;
  size_t bytes;
  u8* mapping;
  size_t mapping_bytes;
  u8 mark;
};
struct Pinned {
  size_t bytes;
  bool ours;
};

std::mutex lock;
std::map<u64, Allocation>& allocations() {
  static auto* all = new std::map<u64, Allocation>();
  return *all;
}
std::map<u64, Pinned>& pinned() {
  static auto* all = new std::map<u64, Pinned>();
  return *all;
}

template <class T> bool lies_in(const std::map<u64, T>& all, const void* at, size_t bytes) {
  auto found = all.upper_bound((u64)at);
  if (found == all.begin()) return false;
  --found;
  const u64 offset = (u64)at - found->first;
  return offset <= found->second.bytes && bytes <= found->second.bytes - offset;
}

size_t round_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

// Memory for `bytes`, its end close to the inaccessible page. Null if there is none.
u8* map_allocation(size_t bytes, bool poison, Allocation& a) {
  const size_t usable = round_up(bytes, PAGE);
  a.mapping_bytes = usable + 2 * PAGE;
  void* mapping = mmap(nullptr, a.mapping_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) return nullptr;
  a.mapping = static_cast<u8*>(mapping);
  u8* first = a.mapping + PAGE;
  if (mprotect(first, usable, PROT_READ | PROT_WRITE) != 0) {
    munmap(mapping, a.mapping_bytes);
    return nullptr;
  }
  u8* data = first + (usable - round_up(bytes, ALIGNMENT));
  if (poison) memset(data, 0xff, bytes);
  for (u8* p = first; p < data; ++p) *p = pattern(a.mark, p - first);
  for (u8* p = data + bytes; p < first + usable; ++p) *p = pattern(a.mark, p - first);
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(first, data - first);
  ASAN_POISON_MEMORY_REGION(data + bytes, first + usable - (data + bytes));
#endif
  return data;
}

// Signed distance from the allocation of the first byte that was overwritten around it, if any.
bool written_around(u64 address, const Allocation& a, i64& where) {
#if defined(__SANITIZE_ADDRESS__)
  return (void)address, (void)a, (void)where, false;  // the sanitizer has seen to it
#endif
  const u8* first = a.mapping + PAGE;
  const u8* data = (const u8*)address;
  const u8* end = a.mapping + a.mapping_bytes - PAGE;
  for (const u8* p = first; p < data; ++p) {
    if (*p != pattern(a.mark, p - first)) return where = p - data, true;
  }
  for (const u8* p = data + a.bytes; p < end; ++p) {
    if (*p != pattern(a.mark, p - first)) return where = p - data, true;
  }
  return false;
}

std::string sentence(const Allocation& a, i64 where) {
  char text[160];
  snprintf(text, sizeof text, "byte %lld of an allocation of %zu bytes was written", where, a.bytes);
  return text;
}

Result allocate(u64* address, size_t bytes) {
  Context* context;
  if (const Result r = use_context(context)) return r;
  if (const Result r = unsafe_while_capturing()) return r;
  if (bytes == 0) return INVALID_VALUE;
  Device* device = context->device;
  const Behaviour b = behaviour_of(device);
  {
    std::lock_guard<std::mutex> guard(device->lock);
    const u64 total = b.memory_mib << 20;
    if (bytes > total || device->allocated_bytes > total - bytes) return OUT_OF_MEMORY;
    if (b.largest_bytes && bytes > b.largest_bytes) return OUT_OF_MEMORY;
    device->allocated_bytes += bytes;
    device->allocations += 1;
    if (device->allocated_bytes > device->peak_bytes) device->peak_bytes = device->allocated_bytes;
  }
  Allocation a{device, bytes, nullptr, 0, next_mark()};
  u8* data = map_allocation(bytes, b.run.poison, a);
  if (!data) {
    std::lock_guard<std::mutex> guard(device->lock);
    device->allocated_bytes -= bytes;
    device->allocations -= 1;
    return OUT_OF_MEMORY;
  }
  std::lock_guard<std::mutex> guard(lock);
  allocations()[(u64)data] = a;
  *address = (u64)data;
  return SUCCESS;
}

Result release(u64 address) {
  if (address == 0) return SUCCESS;
  Allocation a;
  {
    std::lock_guard<std::mutex> guard(lock);
    const auto found = allocations().find(address);
    if (found == allocations().end()) return INVALID_VALUE;
    a = found->second;
    allocations().erase(found);
  }
  i64 where;
  if (written_around(address, a, where)) report(a.device, sentence(a, where) + ", seen when it was freed");
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(a.mapping, a.mapping_bytes);
#endif
  munmap(a.mapping, a.mapping_bytes);
  std::lock_guard<std::mutex> guard(a.device->lock);
  a.device->allocated_bytes -= a.bytes;
  a.device->allocations -= 1;
  return SUCCESS;
}

Result copy(void* to, const void* from, size_t bytes, bool to_device, bool from_device, void* handle, bool wait) {
  Context* context;
  if (const Result r = use_context(context)) return r;
  Stream* stream;
  if (const Result r = find_stream(handle, stream)) return r;
  if (wait) {
    if (const Result r = unsafe_while_capturing()) return r;
  }
  if (bytes == 0) return SUCCESS;
  if ((to_device && !in_device_memory(to, bytes)) || (from_device && !in_device_memory(from, bytes))) {
    char text[200];
    snprintf(text, sizeof text, "a copy of %zu bytes from %p to %p leaves the device's allocations", bytes, from, to);
    report(context->device, text);
    return INVALID_VALUE;
  }
  Operation operation;
  operation.kind = Operation::copy;
  operation.to = to, operation.from = from, operation.bytes = bytes;
  // The driver stages pageable memory: the source may change right after the call.
  operation.staged = !from_device && !in_pinned_memory(from, bytes);
  const bool pageable_target = !to_device && !in_pinned_memory(to, bytes);
  if (const Result r = submit(stream, std::move(operation))) return r;
  return wait || (pageable_target && !(stream && stream->capture)) ? finish(context, stream) : SUCCESS;
}

Result fill(u64 to, u32 value, u32 value_bytes, size_t count, void* handle, bool wait) {
  Context* context;
  if (const Result r = use_context(context)) return r;
  Stream* stream;
  if (const Result r = find_stream(handle, stream)) return r;
  if (wait) {
    if (const Result r = unsafe_while_capturing()) return r;
  }
  if (count == 0) return SUCCESS;
  if (to % value_bytes != 0) return INVALID_VALUE;
  if (!in_device_memory((void*)to, count * value_bytes)) {
    report(context->device, "a fill of " + std::to_string(count * value_bytes) + " bytes leaves its allocation");
    return INVALID_VALUE;
  }
  Operation operation;
  operation.kind = Operation::fill;
  operation.to = (void*)to, operation.bytes = count * value_bytes;
  operation.value = value, operation.value_bytes = value_bytes;
  if (const Result r = submit(stream, std::move(operation))) return r;
  return wait ? finish(context, stream) : SUCCESS;
}

}  // namespace

bool in_device_memory(const void* at, size_t bytes) {
  std::lock_guard<std::mutex> guard(lock);
  return lies_in(allocations(), at, bytes);
}
bool in_pinned_memory(const void* at, size_t bytes) {
  std::lock_guard<std::mutex> guard(lock);
  return lies_in(pinned(), at, bytes);
}
std::string overrun(Device* device) {
  std::lock_guard<std::mutex> guard(lock);
  for (const auto& [address, a] : allocations()) {
    i64 where;
    if (a.device == device && written_around(address, a, where)) return sentence(a, where);
  }
  return "";
}

}  // namespace driver

using namespace driver;

EXPORT int cuMemAlloc_v2(u64* address, size_t bytes) { return allocate(address, bytes); }
EXPORT int cuMemAllocAsync(u64* address, size_t bytes, void*) { return allocate(address, bytes); }
EXPORT int cuMemFree_v2(u64 address) {
  Context* context;
  // A context that has failed still gives its memory back here, so that tests can go on.
  const Result state = use_context(context);
  if (state == NOT_INITIALIZED || state == INVALID_CONTEXT) return state;
  if (const Result r = unsafe_while_capturing()) return r;
  if (state == SUCCESS) {
    if (const Result r = finish(context, nullptr)) return r;
  }
  const Result r = release(address);
  return r ? r : state;
}
EXPORT int cuMemFreeAsync(u64 address, void* handle) {
  Context* context;
  const Result state = use_context(context);
  if (state == NOT_INITIALIZED || state == INVALID_CONTEXT) return state;
  Stream* stream;
  if (const Result r = find_stream(handle, stream)) return r;
  if (stream && stream->capture) return CAPTURE_UNSUPPORTED;
  if (state == SUCCESS) {
    if (const Result r = finish(context, stream)) return r;
  }
  const Result r = release(address);
  return r ? r : state;
}
EXPORT int cuMemGetInfo_v2(size_t* free, size_t* total) {
  Context* context;
  if (const Result r = use_context(context)) return r;
  std::lock_guard<std::mutex> guard(context->device->lock);
  *total = context->device->behaviour.memory_mib << 20;
  *free = *total > context->device->allocated_bytes ? *total - context->device->allocated_bytes : 0;
  return SUCCESS;
}
EXPORT int cuMemGetAddressRange_v2(u64* base, size_t* bytes, u64 address) {
  std::lock_guard<std::mutex> guard(lock);
  auto found = allocations().upper_bound(address);
  if (found == allocations().begin()) return NOT_FOUND;
  --found;
  if (address - found->first >= found->second.bytes) return NOT_FOUND;
  if (base) *base = found->first;
  if (bytes) *bytes = found->second.bytes;
  return SUCCESS;
}
EXPORT int cuMemHostAlloc(void** address, size_t bytes, u32) {
  Context* context;
  if (const Result r = use_context(context)) return r;
  if (bytes == 0) return INVALID_VALUE;
  if (posix_memalign(address, PAGE, bytes) != 0) return OUT_OF_MEMORY;
  memset(*address, 0xff, bytes);
  std::lock_guard<std::mutex> guard(lock);
  pinned()[(u64)*address] = {bytes, true};
  return SUCCESS;
}
EXPORT int cuMemAllocHost_v2(void** address, size_t bytes) { return cuMemHostAlloc(address, bytes, 0); }
EXPORT int cuMemFreeHost(void* address) {
  Context* context;
  if (use_context(context) == SUCCESS && !unsafe_while_capturing()) finish(context, nullptr);
  std::lock_guard<std::mutex> guard(lock);
  const auto found = pinned().find((u64)address);
  if (found == pinned().end() || !found->second.ours) return INVALID_VALUE;
  pinned().erase(found);
  free(address);
  return SUCCESS;
}
EXPORT int cuMemHostRegister_v2(void* address, size_t bytes, u32) {
  Context* context;
  if (const Result r = use_context(context)) return r;
  std::lock_guard<std::mutex> guard(lock);
  if (lies_in(pinned(), address, bytes)) return 712;  // registered already
  pinned()[(u64)address] = {bytes, false};
  return SUCCESS;
}
EXPORT int cuMemHostUnregister(void* address) {
  Context* context;
  if (use_context(context) == SUCCESS) finish(context, nullptr);
  std::lock_guard<std::mutex> guard(lock);
  const auto found = pinned().find((u64)address);
  if (found == pinned().end() || found->second.ours) return 713;  // not registered
  pinned().erase(found);
  return SUCCESS;
}
EXPORT int cuMemHostGetDevicePointer_v2(u64* device_address, void* address, u32) {
  if (!in_pinned_memory(address, 1)) return INVALID_VALUE;
  *device_address = (u64)address;
  return SUCCESS;
}
EXPORT int cuPointerGetAttribute(void* value, int attribute, u64 address) {
  const bool device = in_device_memory((void*)address, 1), host = in_pinned_memory((void*)address, 1);
  if (attribute != 2 || (!device && !host)) return INVALID_VALUE;
  *static_cast<u32*>(value) = device ? 2 : 1;
  return SUCCESS;
}

EXPORT int cuMemcpyHtoD_v2(u64 to, const void* from, size_t bytes) {
  return copy((void*)to, from, bytes, true, false, nullptr, true);
}
EXPORT int cuMemcpyDtoH_v2(void* to, u64 from, size_t bytes) {
  return copy(to, (void*)from, bytes, false, true, nullptr, true);
}
EXPORT int cuMemcpyDtoD_v2(u64 to, u64 from, size_t bytes) {
  return copy((void*)to, (void*)from, bytes, true, true, nullptr, true);
}
EXPORT int cuMemcpyHtoDAsync_v2(u64 to, const void* from, size_t bytes, void* stream) {
  return copy((void*)to, from, bytes, true, false, stream, false);
}
EXPORT int cuMemcpyDtoHAsync_v2(void* to, u64 from, size_t bytes, void* stream) {
  return copy(to, (void*)from, bytes, false, true, stream, false);
}
EXPORT int cuMemcpyDtoDAsync_v2(u64 to, u64 from, size_t bytes, void* stream) {
  return copy((void*)to, (void*)from, bytes, true, true, stream, false);
}
EXPORT int cuMemcpyAsync(u64 to, u64 from, size_t bytes, void* stream) {
  return copy((void*)to, (void*)from, bytes, in_device_memory((void*)to, 1), in_device_memory((void*)from, 1), stream,
              false);
}
EXPORT int cuMemcpy(u64 to, u64 from, size_t bytes) {
  return copy((void*)to, (void*)from, bytes, in_device_memory((void*)to, 1), in_device_memory((void*)from, 1), nullptr,
              true);
}
EXPORT int cuMemsetD8_v2(u64 to, u8 value, size_t count) { return fill(to, value, 1, count, nullptr, true); }
EXPORT int cuMemsetD16_v2(u64 to, u16 value, size_t count) { return fill(to, value, 2, count, nullptr, true); }
EXPORT int cuMemsetD32_v2(u64 to, u32 value, size_t count) { return fill(to, value, 4, count, nullptr, true); }
EXPORT int cuMemsetD8Async(u64 to, u8 value, size_t count, void* stream) {
  return fill(to, value, 1, count, stream, false);
}
EXPORT int cuMemsetD16Async(u64 to, u16 value, size_t count, void* stream) {
  return fill(to, value, 2, count, stream, false);
}
EXPORT int cuMemsetD32Async(u64 to, u32 value, size_t count, void* stream) {
  return fill(to, value, 4, count, stream, false);
}
