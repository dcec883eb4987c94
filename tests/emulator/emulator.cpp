// The scheduler: fibers, barriers, warp collectives, blocks.
#include "machine_parts.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#if !defined(__x86_64__)
#error "the switch between fibers is written for x86-64"
#endif

// Stores the callee-saved registers and the stack pointer of this fiber, loads those of another one.
extern "C" void boxwright_switch_fiber(void** save, void* to);
asm(R"(
.text
.globl boxwright_switch_fiber
.hidden boxwright_switch_fiber
.type boxwright_switch_fiber,@function
boxwright_switch_fiber:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size boxwright_switch_fiber,.-boxwright_switch_fiber
)");

namespace emulator {

__thread Fiber* current;

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t STACK_BYTES = 256 << 10;
#else
constexpr size_t STACK_BYTES = 64 << 10;
#endif
// Stacks do not lie a power of two apart: their tops would all compete for the same few lines of the cache.
constexpr size_t STACK_PITCH = STACK_BYTES + 320;
constexpr size_t STACK_MARGIN = 2048;
constexpr size_t SHARED_BYTES_MAX = 256 << 10;
constexpr size_t PAGE = 4096;

}  // namespace

// ---- fibers ----------------------------------------------------------------------------------------------------

u64 next_random(Machine& m) {
  m.random += 0x9e3779b97f4a7c15ull;
  u64 v = m.random;
  v = (v ^ v >> 30) * 0xbf58476d1ce4e5b9ull;
  v = (v ^ v >> 27) * 0x94d049bb133111ebull;
  return v ^ v >> 31;
}

void make_ready(Machine& m, u32 index) {
  m.ready[(m.ready_first + m.ready_count) % THREADS_MAX] = (u16)index;
  ++m.ready_count;
}

namespace {

Fiber* take_ready(Machine& m) {
  u32 index;
  if (m.settings.order == Order::last_in) {
    index = m.ready[(m.ready_first + m.ready_count - 1) % THREADS_MAX];
  } else {
    u16& first = m.ready[m.ready_first];
    if (m.settings.order == Order::random) {
      std::swap(first, m.ready[(m.ready_first + (u32)(next_random(m) >> 33) % m.ready_count) % THREADS_MAX]);
    }
    index = first;
    m.ready_first = (m.ready_first + 1) % THREADS_MAX;
  }
  --m.ready_count;
  return &m.fibers[index];
}

void go_home(Fiber* fiber) {
  boxwright_switch_fiber(&fiber->stack_pointer, fiber->machine->home);
}

void begin(Fiber* fiber, u32 stack) {
  fiber->started = true;
  fiber->stack = stack;
  current = fiber;
}

// What runs on a stack: threads of the block, until one of them has to wait.
void fiber_main() {
  for (;;) {
    Fiber* fiber = current;
    Machine& m = *fiber->machine;
    m.kernel->body(m.arguments);
    fiber->ended = true;
    --m.live;
    while (m.ready_count == 0 && m.live > 0 && deliver_transfer(m)) {
    }
    if (m.ready_count == 0) go_home(fiber);  // all have ended, or the others wait for what cannot come
    Fiber* next = take_ready(m);
    if (!next->started) {
      // A thread that never waits needs no stack of its own, and no switch.
      begin(next, fiber->stack);
      continue;
    }
    m.free_stacks[m.free_stack_count++] = fiber->stack;
    ++m.switches;
    current = next;
    boxwright_switch_fiber(&fiber->stack_pointer, next->stack_pointer);
  }
}

void enter(Fiber* next, void** save) {
  Machine& m = *next->machine;
  ++m.switches;
  if (!next->started) {
    const u32 stack = m.free_stacks[--m.free_stack_count];
    begin(next, stack);
    const uintptr_t top = (uintptr_t)(m.stacks + STACK_PITCH * stack + STACK_BYTES) & ~(uintptr_t)63;
    void** words = (void**)top;
    *--words = nullptr;  // a return address for debuggers, and the alignment that a called function expects
    *--words = (void*)fiber_main;
    for (u32 i = 0; i < 6; ++i) *--words = nullptr;
    next->stack_pointer = words;
  }
  current = next;
  boxwright_switch_fiber(save, next->stack_pointer);
}

}  // namespace

void wait(const char* where) {
  Fiber* me = current;
  Machine& m = *me->machine;
  const u8* low = m.stacks + STACK_PITCH * me->stack;
  if ((const u8*)__builtin_frame_address(0) < low + STACK_MARGIN) {
    fail("%s: the stack of an emulated thread, %zu bytes, is full", where, STACK_BYTES);
  }
  me->where = where;
  // Everybody waits: what the copy engine has to do happens now, as late as it may.
  while (m.ready_count == 0 && deliver_transfer(m)) {
  }
  if (m.ready_count == 0) {
    go_home(me);
    return;
  }
  Fiber* next = take_ready(m);
  if (next == me) return;
  enter(next, &me->stack_pointer);
}

namespace {

std::string deadlock(const Machine& m) {
  std::string text = "deadlock:";
  char part[256];
  u32 shown = 0;
  // One line per warp and place: the first thread of a warp that waits at another place than the one before it.
  const char* last = nullptr;
  u32 last_warp = ~0u;
  for (u32 i = 0; i < m.threads && shown < 12; ++i) {
    const Fiber& f = m.fibers[i];
    if (f.ended || !f.where || (f.warp == last_warp && f.where == last)) continue;
    snprintf(part, sizeof part, " thread %u of warp %u waits at %s;", i, f.warp, short_place(f.where));
    text += part, last = f.where, last_warp = f.warp, ++shown;
  }
  snprintf(part, sizeof part, " %u of %u threads have ended", m.threads - m.live, m.threads);
  return text + part;
}

}  // namespace

// ---- what launches call ----------------------------------------------------------------------------------------

// The file's name without its folders.
const char* short_place(const char* where) {
  const char* slash = strrchr(where, '/');
  return slash ? slash + 1 : where;
}

static void* map_memory(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    fputs("emulator: no memory for the stacks of a block\n", stderr);
    abort();
  }
  // A huge page per stack would be a lot of memory to clear.
  madvise(memory, bytes, MADV_NOHUGEPAGE);
  return memory;
}

Machine* build_machine() {
  Machine* m = new Machine();
  m->stacks = static_cast<u8*>(map_memory(STACK_PITCH * THREADS_MAX));
  u8* shared = static_cast<u8*>(map_memory(SHARED_BYTES_MAX + PAGE));
  m->shared_end = shared + SHARED_BYTES_MAX;
  mprotect(m->shared_end, PAGE, PROT_NONE);
  for (u32 i = 0; i < THREADS_MAX; ++i) {
    m->fibers[i].machine = m;
    m->fibers[i].block = &m->block;
  }
  return m;
}

// Between the end of dynamic shared memory and the inaccessible page there can be up to 1023 bytes.
static void mark_shared_tail(u8* from, u8* end) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(end - SHARED_BYTES_MAX, SHARED_BYTES_MAX);
  ASAN_POISON_MEMORY_REGION(from, end - from);
#else
  memset(from, 0xf7, (size_t)(end - from));
#endif
}
bool shared_tail_written(const Machine& m) {
#if !defined(__SANITIZE_ADDRESS__)
  for (const u8* p = m.block.shared + m.block.shared_bytes; p < m.shared_end; ++p) {
    if (*p != 0xf7) return true;
  }
#endif
  return (void)m, false;
}

void prepare_launch(Machine& m, const Launch& launch, const Settings& settings) {
  m.kernel = launch.kernel;
  m.arguments = launch.arguments;
  m.settings = settings;
  m.threads = launch.block.x * launch.block.y * launch.block.z;
  m.outcome = Outcome();
  m.switches = 0;
  Block& b = m.block;
  b.grid = launch.grid;
  b.size = launch.block;
  b.shared_bytes = launch.shared_bytes;
  // Aligned as on the chip; what is asked for ends as close to the inaccessible page as that allows.
  b.shared = (u8*)((uintptr_t)(m.shared_end - launch.shared_bytes) & ~(uintptr_t)1023);
  mark_shared_tail(b.shared + b.shared_bytes, m.shared_end);
  b.late_copies = settings.late_copies;
  b.bank_conflicts = b.matrix_loads = 0;
  u32 index = 0;
  for (u32 z = 0; z < b.size.z; ++z) {
    for (u32 y = 0; y < b.size.y; ++y) {
      for (u32 x = 0; x < b.size.x; ++x, ++index) {
        Fiber& f = m.fibers[index];
        f.thread = {x, y, z};
        f.index = index, f.lane = index & 31, f.warp = index >> 5;
      }
    }
  }
}

static void reset_stacks(Machine& m) {
  // The lowest stack is on top: few threads use few stacks.
  m.free_stack_count = m.threads;
  for (u32 i = 0; i < m.threads; ++i) m.free_stacks[i] = m.threads - 1 - i;
}

void run_block(Machine& m, u64 number) {
  Block& b = m.block;
  b.index = {(u32)(number % b.grid.x), (u32)(number / b.grid.x % b.grid.y), (u32)(number / ((u64)b.grid.x * b.grid.y))};
  m.random = m.settings.seed * 0x2545f4914f6cdd1dull + number;
  m.live = m.threads;
  m.waiting_count = 0;
  for (Barrier& barrier : m.barriers) barrier.count = 0;
  reset_groups(m);
  reset_stacks(m);
  for (u32 i = 0; i < m.threads; ++i) {
    Fiber& f = m.fibers[i];
    f.started = f.ended = false;
    f.where = nullptr;
    if (!f.copies.empty()) f.copies.clear();
    if (!f.group_ends.empty()) f.group_ends.clear();
    f.groups_done = 0;
    m.ready[i] = (u16)i;
  }
  m.ready_first = 0;
  m.ready_count = m.threads;
  for (u32 i = 0; i * 32 < m.threads; ++i) m.warps[i].open = 0;
  if (m.settings.poison && b.shared_bytes) memset(b.shared, 0xff, b.shared_bytes);
  enter(take_ready(m), &m.home);
  if (m.outcome.failure.empty() && m.live > 0) {
    current = nullptr;
    char place[64];
    snprintf(place, sizeof place, "block (%u, %u, %u): ", b.index.x, b.index.y, b.index.z);
    m.outcome.failure = place + deadlock(m);
  }
  if (m.outcome.failure.empty() && !m.transfers.empty()) {
    m.outcome.failure = "a block has ended while copies to its shared memory were under way";
  }
  current = nullptr;
  if (!m.outcome.failure.empty()) {
    // The stacks are dropped as they are.
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(m.stacks, STACK_PITCH * THREADS_MAX);
#endif
  }
}

// ---- what kernels call -----------------------------------------------------------------------------------------

void fail(const char* format, ...) {
  Fiber* fiber = current;
  Machine& m = *fiber->machine;
  char reason[512], place[128];
  va_list values;
  va_start(values, format);
  vsnprintf(reason, sizeof reason, format, values);
  va_end(values);
  const uint3 b = m.block.index, t = fiber->thread;
  snprintf(place, sizeof place, "block (%u, %u, %u) thread (%u, %u, %u): ", b.x, b.y, b.z, t.x, t.y, t.z);
  m.outcome.failure = std::string(place) + reason;
  go_home(fiber);
}

u32 barrier(Vote vote, bool predicate, const char* where) {
  Fiber* me = current;
  Machine& m = *me->machine;
  if (m.waiting_count == 0) {
    m.waiting_where = where;
    m.waiting_votes = 0;
  } else if (m.waiting_where != where && strcmp(m.waiting_where, where) != 0) {
    fail("threads of one block meet at different barriers, %s and %s", short_place(m.waiting_where),
         short_place(where));
  }
  m.waiting_votes += predicate;
  m.waiting[m.waiting_count++] = (u16)me->index;
  if (m.waiting_count < m.threads) {
    wait(where);
    return m.vote_result;
  }
  const u32 votes = m.waiting_votes;
  m.vote_result = vote == Vote::any ? votes > 0 : vote == Vote::all ? votes == m.threads : votes;
  m.waiting_count = 0;
  for (u32 i = 0; i < m.threads; ++i) {
    m.fibers[m.waiting[i]].where = nullptr;
    make_ready(m, m.waiting[i]);
  }
  wait(where);
  me->where = nullptr;
  return m.vote_result;
}

void barrier_part(u32 id, u32 threads, const char* where) {
  Fiber* me = current;
  Machine& m = *me->machine;
  if (id < 1 || id >= BARRIERS || threads % 32 || me->index >= threads) {
    fail("%s: barrier %u for the first %u threads", short_place(where), id, threads);
  }
  Barrier& b = m.barriers[id];
  if (b.count == 0) {
    b.threads = threads, b.where = where;
  } else if (b.threads != threads || strcmp(b.where, where) != 0) {
    fail("threads of one block meet at different barriers, %s and %s", short_place(b.where), short_place(where));
  }
  b.waiting[b.count++] = (u16)me->index;
  if (b.count < threads) {
    wait(where);
    return;
  }
  b.count = 0;
  for (u32 i = 0; i < threads; ++i) {
    m.fibers[b.waiting[i]].where = nullptr;
    make_ready(m, b.waiting[i]);
  }
  wait(where);
  me->where = nullptr;
}

void meet(u32 mask, Meet kind, void* argument, const char* where) {
  Fiber* me = current;
  Machine& m = *me->machine;
  const u32 lane = me->lane, first = me->index - lane;
  const u32 lanes = m.threads - first >= 32 ? 32 : m.threads - first;
  const u32 full = lanes == 32 ? 0xffffffffu : (1u << lanes) - 1;
  if (mask == 0xffffffffu) mask = full;
  if (!(mask >> lane & 1)) fail("%s: the lane is not in its own mask %08x", short_place(where), mask);
  if (mask & ~full) fail("%s: mask %08x names lanes that the block has not", short_place(where), mask);
  Warp& warp = m.warps[me->warp];
  Meeting* meeting = nullptr;
  for (u32 i = 0; i < warp.open && !meeting; ++i) {
    if (warp.meetings[i].mask == mask) meeting = &warp.meetings[i];
  }
  if (!meeting) {
    if (warp.open == MEETINGS_MAX) fail("%s: too many open collectives in one warp", short_place(where));
    meeting = &warp.meetings[warp.open++];
    meeting->mask = mask, meeting->arrived = 0, meeting->kind = kind, meeting->where = where;
  } else if (meeting->kind != kind || (meeting->where != where && strcmp(meeting->where, where) != 0)) {
    fail("lanes of one warp meet in different collectives, %s and %s", short_place(meeting->where),
         short_place(where));
  }
  meeting->arrived |= 1u << lane;
  meeting->arguments[lane] = argument;
  if (meeting->arrived != mask) {
    wait(where);
    return;
  }
  void* const* arguments = meeting->arguments;
  switch (kind) {
    case Meet::sync:
      break;
    case Meet::shuffle: {
      u64 values[32];
      for (u32 left = mask; left; left &= left - 1) {
        const u32 l = (u32)__builtin_ctz(left);
        const u32 source = static_cast<Shuffle*>(arguments[l])->source;
        if (source > 31 || !(mask >> source & 1)) {
          fail("%s: lane %u reads lane %u, which is not in mask %08x", short_place(where), l, source, mask);
        }
        values[l] = static_cast<Shuffle*>(arguments[source])->value;
      }
      for (u32 left = mask; left; left &= left - 1) {
        const u32 l = (u32)__builtin_ctz(left);
        static_cast<Shuffle*>(arguments[l])->value = values[l];
      }
      break;
    }
    case Meet::ballot: {
      u32 votes = 0;
      for (u32 left = mask; left; left &= left - 1) {
        const u32 l = (u32)__builtin_ctz(left);
        votes |= (u32) static_cast<Ballot*>(arguments[l])->predicate << l;
      }
      for (u32 left = mask; left; left &= left - 1) {
        static_cast<Ballot*>(arguments[__builtin_ctz(left)])->votes = votes;
      }
      break;
    }
    case Meet::load_matrix:
    case Meet::load_matrix_transposed:
    case Meet::multiply_bf16:
    case Meet::multiply_f16:
      if (mask != 0xffffffffu) fail("%s: needs a warp of 32 lanes", short_place(where));
      if (kind == Meet::load_matrix || kind == Meet::load_matrix_transposed) {
        load_matrices(m.block, arguments, kind == Meet::load_matrix_transposed);
      } else {
        multiply_matrices(arguments, kind == Meet::multiply_bf16);
      }
      break;
  }
  for (u32 left = mask & ~(1u << lane); left; left &= left - 1) {
    const u32 index = first + (u32)__builtin_ctz(left);
    m.fibers[index].where = nullptr;
    make_ready(m, index);
  }
  if (meeting != &warp.meetings[--warp.open]) *meeting = warp.meetings[warp.open];
}

}  // namespace emulator
