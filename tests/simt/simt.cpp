// The scheduler behind device.cuh: blocks one after the other, a fiber for each thread of a block.

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <string>
#include <vector>

#include "device.cuh"

namespace simt {
namespace {

constexpr int kWarp = 32;
constexpr int kMostThreads = 1024;
constexpr size_t kStack = 256 * 1024;
constexpr size_t kShared = 256 * 1024;
constexpr size_t kPage = 4096;

enum class State { kReady, kInWarp, kInBlock, kDone };

struct Copy {
  void* to;
  const void* from;
  int bytes, valid;
};

struct Thread {
  State state = State::kDone;
  const char* waits_for = "";
  bool started = false;
  jmp_buf context;
  ucontext_t first_context;
  std::vector<std::vector<Copy>> groups;  // committed, oldest first; the last is still open
};

struct Warp {
  int arrived = 0;
  void* operands[kWarp];
};

std::vector<Thread> threads(kMostThreads);
Warp warps[kMostThreads / kWarp];
unsigned char* stacks = nullptr;
unsigned char* shared = nullptr;  // a page without access, kShared bytes, a page without access
int64_t shared_size = 0;
int current = 0, count = 0, in_block_barrier = 0;
bool reversed = false;
const std::function<void()>* kernel = nullptr;
jmp_buf scheduler;
std::string failure;

std::string place(int thread) {
  return "thread " + std::to_string(thread) + " of block (" + std::to_string(block_index.x) + ", " +
         std::to_string(block_index.y) + ")";
}

// Fibers are entered by swapcontext once and by longjmp from then on, which makes no system call.
void to_scheduler() {
  Thread& thread = threads[current];
  if (_setjmp(thread.context) == 0) _longjmp(scheduler, 1);
}

void fiber() {
  for (;;) {
    (*kernel)();
    threads[current].state = State::kDone;
    to_scheduler();
  }
}

void enter(int index) {
  current = index;
  thread_index = dim3(static_cast<unsigned>(index), 0, 0);
  Thread& thread = threads[index];
  if (_setjmp(scheduler) != 0) return;
  if (thread.started) _longjmp(thread.context, 1);
  thread.started = true;
  getcontext(&thread.first_context);
  thread.first_context.uc_stack.ss_sp = stacks + static_cast<size_t>(index) * kStack;
  thread.first_context.uc_stack.ss_size = kStack;
  thread.first_context.uc_link = nullptr;
  makecontext(&thread.first_context, fiber, 0);
  setcontext(&thread.first_context);
}

void wait_as(State state, const char* what) {
  threads[current].state = state;
  threads[current].waits_for = what;
  to_scheduler();
}

void on_fault(int, siginfo_t* info, void*) {
  auto* at = static_cast<unsigned char*>(info->si_addr);
  const bool in_shared = shared <= at && at < shared + kShared + 2 * kPage;
  failure = place(current) + (in_shared ? " leaves the shared memory" : " leaves the global memory");
  _longjmp(scheduler, 1);
}

void describe_deadlock() {
  failure = "a barrier that not all reach:";
  for (int i = 0; i < count; ++i) {
    const bool repeats = i > 0 && threads[i].state == threads[i - 1].state &&
                         std::string(threads[i].waits_for) == threads[i - 1].waits_for;
    if (repeats) continue;
    failure += " from " + place(i) + ": " +
               (threads[i].state == State::kDone ? "left the kernel" : threads[i].waits_for) + ";";
  }
}

void run_block() {
  for (int i = 0; i < count; ++i) {
    threads[i].state = State::kReady;
    threads[i].waits_for = "";
    threads[i].groups.assign(1, {});
  }
  for (int w = 0; w < count / kWarp; ++w) warps[w].arrived = 0;
  in_block_barrier = 0;
  std::memset(shared + kPage, 0xff, kShared);
  for (;;) {
    bool progress = false, left = false;
    for (int i = 0; i < count && failure.empty(); ++i) {
      const int index = reversed ? count - 1 - i : i;
      left |= threads[index].state != State::kDone;
      if (threads[index].state != State::kReady) continue;
      progress = true;
      enter(index);
    }
    if (!failure.empty() || !left) return;
    if (!progress) return describe_deadlock();
  }
}

void prepare() {
  if (stacks != nullptr) return;
  const auto map = [](size_t bytes) {
    return static_cast<unsigned char*>(
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  };
  stacks = map(kMostThreads * kStack);
  shared = map(kShared + 2 * kPage);
  mprotect(shared, kPage, PROT_NONE);
  mprotect(shared + kPage + kShared, kPage, PROT_NONE);
}

}  // namespace

void fail(const char* what) {
  failure = place(current) + ": " + what;
  _longjmp(scheduler, 1);
}

void collective(const char* name, void* operand, void (*run)(void* const* operands)) {
  const int first = current / kWarp * kWarp;
  Warp& warp = warps[current / kWarp];
  warp.operands[current - first] = operand;
  if (++warp.arrived < kWarp) return wait_as(State::kInWarp, name);
  for (int i = first; i < first + kWarp; ++i) {
    if (i != current && std::string(threads[i].waits_for) != name) {
      failure = place(i) + " is at " + threads[i].waits_for + " where lane " +
                std::to_string(current - first) + " of its warp is at " + name;
      _longjmp(scheduler, 1);
    }
  }
  warp.arrived = 0;
  run(warp.operands);
  for (int i = first; i < first + kWarp; ++i) threads[i].state = State::kReady;
}

void block_barrier() {
  if (++in_block_barrier < count) return wait_as(State::kInBlock, "block barrier");
  in_block_barrier = 0;
  for (int i = 0; i < count; ++i) threads[i].state = State::kReady;
}

// It ends where access ends, so that the first byte beyond it faults.
unsigned char* shared_memory() {
  return shared + kPage + kShared - (shared_size + 15) / 16 * 16;
}

void copy_async(void* to, const void* from, int bytes, int valid) {
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0 || reinterpret_cast<uintptr_t>(from) % bytes != 0) {
    fail("an asynchronous copy is not aligned");
  }
  std::memset(to, 0xff, static_cast<size_t>(bytes));
  threads[current].groups.back().push_back({to, from, bytes, valid});
}

void commit_copies() {
  threads[current].groups.emplace_back();
}

void wait_copies(int newer) {
  auto& groups = threads[current].groups;
  while (static_cast<int>(groups.size()) - 1 > newer) {
    for (const Copy& copy : groups.front()) {
      std::memset(copy.to, 0, static_cast<size_t>(copy.bytes));
      std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.valid));
    }
    groups.erase(groups.begin());
  }
}

const char* run_grid(dim3 grid, int block, int64_t shared_bytes, const std::function<void()>& run) {
  prepare();
  failure.clear();
  if (block % kWarp != 0 || block > kMostThreads)
    return "a block must be of whole warps, 1024 threads at most";
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535) return "a grid that CUDA refuses";
  if (shared_bytes > static_cast<int64_t>(kShared)) return "too much shared memory";
  kernel = &run;
  count = block;
  shared_size = shared_bytes;
  grid_size = grid;
  block_size = dim3(static_cast<unsigned>(block));
  struct sigaction handler{}, segv, bus;
  handler.sa_sigaction = on_fault;
  handler.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &handler, &segv);
  sigaction(SIGBUS, &handler, &bus);
  for (unsigned y = 0; y < grid.y && failure.empty(); ++y) {
    for (unsigned x = 0; x < grid.x && failure.empty(); ++x) {
      block_index = dim3(x, y, 0);
      run_block();
    }
  }
  sigaction(SIGSEGV, &segv, nullptr);
  sigaction(SIGBUS, &bus, nullptr);
  if (failure.empty()) return nullptr;
  for (Thread& thread : threads) thread.started = false;  // they are left in the midst of a kernel
  return failure.c_str();
}

// Threads of a block, and lanes of a warp, in falling order instead of rising.
extern "C" void simt_reverse(int reverse) {
  reversed = reverse != 0;
}

}  // namespace simt
