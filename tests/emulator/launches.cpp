// Launches: the table of kernels, machines that are kept, several threads of the operating system, faults.
#include "machine_parts.h"

#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <atomic>
#include <condition_variable>
#include <functional>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

namespace emulator {

namespace {

// ---- kernels ---------------------------------------------------------------------------------------------------

using Table = std::map<std::pair<std::string, std::string>, Kernel>;
Table& kernels() {
  static Table table;
  return table;
}

// ---- machines are kept for the next launch ------------------------------------------------------------------------

std::mutex idle_lock;
std::vector<Machine*>& idle() {
  static std::vector<Machine*>* machines = new std::vector<Machine*>();
  return *machines;
}
Machine* take_machine() {
  {
    std::lock_guard<std::mutex> guard(idle_lock);
    if (!idle().empty()) {
      Machine* m = idle().back();
      idle().pop_back();
      return m;
    }
  }
  return build_machine();
}
void return_machine(Machine* m) {
  std::lock_guard<std::mutex> guard(idle_lock);
  idle().push_back(m);
}

// ---- several threads of the operating system -------------------------------------------------------------------

// Helpers that wait for a job. Only one launch at a time has them; others run alone meanwhile.
class Crew {
 public:
  static Crew& get() {
    static Crew* crew = new Crew();  // never destroyed: its threads outlive `main`
    return *crew;
  }
  // Runs `job` here and on `helpers` more threads at once.
  void run(u32 helpers, const std::function<void()>& job) {
    std::unique_lock<std::mutex> mine(use_, std::try_to_lock);
    if (!mine.owns_lock()) return job();
    {
      std::lock_guard<std::mutex> guard(lock_);
      while (size_ < helpers) {
        const u32 number = size_++;
        std::thread([this, number] { work(number); }).detach();
      }
      job_ = &job;
      wanted_ = helpers;
      running_ = helpers;
      ++round_;
    }
    wake_.notify_all();
    job();
    std::unique_lock<std::mutex> guard(lock_);
    done_.wait(guard, [this] { return running_ == 0; });
  }

 private:
  void work(u32 number) {
    u64 seen = 0;
    for (;;) {
      const std::function<void()>* job;
      {
        std::unique_lock<std::mutex> guard(lock_);
        wake_.wait(guard, [&] { return round_ != seen; });
        seen = round_;
        if (number >= wanted_) continue;
        job = job_;
      }
      (*job)();
      std::lock_guard<std::mutex> guard(lock_);
      if (--running_ == 0) done_.notify_all();
    }
  }
  std::mutex use_, lock_;
  std::condition_variable wake_, done_;
  const std::function<void()>* job_ = nullptr;
  u32 size_ = 0, wanted_ = 0, running_ = 0;
  u64 round_ = 0;
};

// ---- faults ----------------------------------------------------------------------------------------------------

struct sigaction earlier_segv, earlier_bus, earlier_ill;

// On a fiber the launch ends; elsewhere whoever was there before us is asked.
void on_bad_access(int number, siginfo_t* info, void* context) {
  if (current) {
    Outcome& outcome = current->machine->outcome;
    outcome.instruction = (u64) static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP];
    if (number == SIGILL) {
      fail("uses an address that is not aligned to its type, or an index outside of its array");
    } else {
      outcome.bad_address = true;
      fail("touches address %p, which it has not", info->si_addr);
    }
  }
  sigaction(number, number == SIGSEGV ? &earlier_segv : number == SIGBUS ? &earlier_bus : &earlier_ill, nullptr);
}

// The source lines of an instruction, the innermost function first, if `addr2line` is here to tell.
std::string source_of(u64 instruction) {
  Dl_info library;
  if (!dladdr((void*)instruction, &library)) return "";
  char command[1024], line[512];
  snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%llx 2>/dev/null", library.dli_fname,
           instruction - (u64)library.dli_fbase);
  FILE* lines = popen(command, "r");
  if (!lines) return "";
  std::string text;
  while (fgets(line, sizeof line, lines)) {
    line[strcspn(line, " \n")] = 0;
    if (line[0] == '?') continue;
    text += (text.empty() ? " at " : ", called at ") + std::string(short_place(line));
  }
  pclose(lines);
  return text;
}

u64 common_divisor(u64 a, u64 b) { return b ? common_divisor(b, a % b) : a; }

// In which order blocks run: the `i`-th to run is block `first + i * step` modulo their number.
void block_order(const Settings& settings, u64 blocks, u64& first, u64& step) {
  first = 0, step = 1;
  if (settings.order == Order::last_in) {
    first = blocks - 1, step = blocks > 1 ? blocks - 1 : 1;
  } else if (settings.order == Order::random) {
    first = settings.seed * 0x9e3779b97f4a7c15ull % blocks;
    step = 1 + settings.seed * 0xbf58476d1ce4e5b9ull % blocks;
    while (common_divisor(step, blocks) != 1) ++step;
  }
}

}  // namespace

Registration::Registration(const Kernel& kernel) {
  const auto key = std::make_pair(std::string(kernel.stem), std::string(kernel.name));
  if (!kernels().emplace(key, kernel).second) {
    fprintf(stderr, "emulator: kernels/%s.cu has two kernels %s\n", kernel.stem, kernel.name);
    abort();
  }
}

// ---- what the driver calls -------------------------------------------------------------------------------------

const Kernel* find_kernel(const std::string& stem, const std::string& name) {
  const auto found = kernels().find({stem, name});
  return found == kernels().end() ? nullptr : &found->second;
}
bool has_stem(const std::string& stem) {
  const auto found = kernels().lower_bound({stem, ""});
  return found != kernels().end() && found->first.first == stem;
}
void each_kernel(const std::string& stem, void (*visit)(const Kernel* kernel, void* data), void* data) {
  for (auto at = kernels().lower_bound({stem, ""}); at != kernels().end() && at->first.first == stem; ++at) {
    visit(&at->second, data);
  }
}

void catch_bad_accesses() {
#if !defined(__SANITIZE_ADDRESS__)
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action = {};
    action.sa_sigaction = on_bad_access;
    // The handler does not come back, so the signal must not stay blocked.
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &action, &earlier_segv);
    sigaction(SIGBUS, &action, &earlier_bus);
    sigaction(SIGILL, &action, &earlier_ill);
  });
#endif
}

Outcome run(const Launch& launch, const Settings& settings, Counters& counters) {
  const u64 blocks = (u64)launch.grid.x * launch.grid.y * launch.grid.z;
  u64 first, step;
  block_order(settings, blocks, first, step);
  std::atomic<u64> next{0};
  std::mutex lock;
  Outcome outcome;
  const std::function<void()> job = [&] {
    Machine* m = take_machine();
    prepare_launch(*m, launch, settings);
    for (u64 i; (i = next.fetch_add(1)) < blocks;) {
      run_block(*m, (u64)((first + (unsigned __int128)i * step) % blocks));
      if (!m->outcome.failure.empty()) next = blocks;
    }
    if (m->outcome.failure.empty() && shared_tail_written(*m)) {
      m->outcome.failure = "writes past the " + std::to_string(launch.shared_bytes) + " bytes of dynamic shared memory";
    }
    {
      std::lock_guard<std::mutex> guard(lock);
      if (outcome.failure.empty()) outcome = m->outcome;
      counters.switches += m->switches;
      counters.bank_conflicts += m->block.bank_conflicts;
      counters.matrix_loads += m->block.matrix_loads;
    }
    return_machine(m);
  };
  if (settings.threads > 1 && blocks > 1) {
    Crew::get().run(settings.threads - 1, job);
  } else {
    job();
  }
  if (outcome.instruction) outcome.failure += source_of(outcome.instruction);
  counters.launches += 1;
  counters.blocks += blocks;
  return outcome;
}

}  // namespace emulator
