// The emulator's bookkeeping: see emulator.h. Never instrumented, so that sanitizers see kernels
// only.
#include "emulator.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

attn_ext::emulator::Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace attn_ext::emulator {

using namespace internal;

namespace {

constexpr int kLanes = 32, kMostThreads = 1024, kInvalidOrder = -2;
constexpr int kMostCopies = 256;              // in flight, of a thread
constexpr int kMostSharedBytes = 227 * 1024;  // sm_90 and sm_100 have the most

int order_of_environment() {
  const char* text = std::getenv("ATTN_EXT_EMULATOR_ORDER");
  if (!text || !std::strcmp(text, "forward")) return kForward;
  if (!std::strcmp(text, "reverse")) return kReverse;
  const int seed = std::atoi(text);
  return seed > 0 ? seed : kInvalidOrder;
}

// Called through pointers: as real calls they reach the sanitizers' interceptors, which check them
// as accesses of the CUDA thread that runs.
void* (*volatile copy_bytes)(void*, const void*, std::size_t) = std::memcpy;
void* (*volatile fill_bytes)(void*, int, std::size_t) = std::memset;

struct Copy {
  char* shared;
  const char* global;
  int bytes, valid_bytes;
};

void run_threads() noexcept;

struct Thread : Fiber {
  int position = 0;  // in the order of this block
  unsigned number = 0;
  std::vector<Copy> copies;  // oldest first
  std::vector<int> groups;   // how many copies each committed group has
  int uncommitted = 0;

  explicit Thread(int index) : Fiber(index, run_threads) {
    copies.reserve(kMostCopies);  // here, so that it is the host that allocates
    groups.reserve(kMostCopies);
  }
  ~Thread() { join(); }
};

Thread& self() { return *static_cast<Thread*>(current); }

struct Warp {
  std::uint32_t runnable;  // a bit for each position of its lanes
  int arrived;
  unsigned count;  // of completed operations
  const void* operation;
  const char* name;
  const void* in[kLanes];
  void* out[kLanes];
  Event events[4];
};

struct Block {
  int threads, shared_bytes;
  void (*body)(void*);
  void* context;
  Thread* at[kMostThreads];  // by position
  Warp warps[kMostThreads / kLanes];
  int waiting, finished;
  unsigned barriers;  // completed
  Event start, end, events[4];
  std::string error;

  // Blocks take turns in two sets of fibers and events, or ThreadSanitizer would see one block's
  // end before the next one's start. Each set has two events for a rendezvous, in turns: a thread
  // that is one ahead must not be ordered before those that have yet to leave the last one.
  int set;
  Event& event(Event (&of)[4], unsigned count) { return of[2 * set + count % 2]; }
} block;

// Between red zones of a page each.
char* shared = nullptr;
std::unique_ptr<Thread> fibers[2 * kMostThreads];

std::string text(Dim3 at) {
  return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) +
         ")";
}

[[noreturn]] void fail(const std::string& what) {
  throw std::runtime_error("thread " + std::to_string(self().number) + ": " + what);
}

// The operation's function in what __PRETTY_FUNCTION__ says of warp.
std::string operation_name(const std::string& pretty) {
  const std::string key = "Compute = ";
  const std::size_t start = pretty.rfind(key) + key.size();
  return pretty.substr(start, std::min(pretty.find("::<", start), pretty.find("]", start)) - start);
}

std::string deadlock() {
  std::string what = std::to_string(block.waiting) + " of " + std::to_string(block.threads) +
                     " threads wait in sync_threads, " + std::to_string(block.finished) +
                     " have returned";
  const Warp* warp = std::find_if(block.warps, block.warps + block.threads / kLanes,
                                  [](const Warp& each) { return each.arrived > 0; });
  if (warp < block.warps + block.threads / kLanes)
    what += ", " + std::to_string(warp->arrived) + " lanes of warp " +
            std::to_string(block.at[(warp - block.warps) * kLanes]->number / kLanes) + " wait in " +
            operation_name(warp->name);
  return what + ": the others never come there";
}

// Leaves this thread until another has made it runnable.
void suspend() {
  const int own = self().position / kLanes;
  std::uint32_t runnable = block.warps[own].runnable &= ~(1u << (self().position % kLanes));
  int index = own;
  if (!runnable)
    for (index = 0; index < block.threads / kLanes; ++index)
      if ((runnable = block.warps[index].runnable)) break;
  if (runnable)
    switch_to(block.at[index * kLanes + __builtin_ctz(runnable)]);
  else
    switch_to(&host);
  threadIdx.x = self().number;
}

// Where a fiber starts. It runs a thread of one block after another.
void run_threads() noexcept {
  after_switch();
  threadIdx.x = self().number;
  for (;;) {
    block.start.acquire();
    try {
      block.body(block.context);
      if (!self().copies.empty()) fail("returns before it has waited for its cp.async copies");
    } catch (const std::exception& exception) {
      block.error = exception.what();
    }
    if (!block.error.empty()) switch_to(&host);
    self().groups.clear();
    block.end.release();
    ++block.finished;
    suspend();
  }
}

std::vector<unsigned> permutation(unsigned size, unsigned salt) {
  std::vector<unsigned> indices(size);
  std::iota(indices.begin(), indices.end(), 0u);
  if (order == kReverse) std::reverse(indices.begin(), indices.end());
  if (order > 0) std::shuffle(indices.begin(), indices.end(), std::mt19937(order + salt));
  return indices;
}

void run_block(unsigned number) {
  const unsigned warp_count = block.threads / kLanes;
  const std::vector<unsigned> warps = permutation(warp_count, number);
  for (unsigned index = 0; index < warp_count; ++index) {
    block.warps[index].runnable = ~0u;
    block.warps[index].arrived = 0;
    const std::vector<unsigned> lanes = permutation(kLanes, number + warps[index]);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int position = index * kLanes + lane;
      Thread* thread = fibers[block.set * kMostThreads + position].get();
      block.at[position] = thread;
      thread->position = position;
      thread->number = warps[index] * kLanes + lanes[lane];
      if (thread->tsan)
        __tsan_set_fiber_name(thread->tsan, ("block " + text(blockIdx) + ", CUDA thread " +
                                             std::to_string(thread->number))
                                                .c_str());
    }
  }
  block.waiting = block.finished = 0;
  // A new mapping is new memory to ThreadSanitizer: what the last block did in it is forgotten.
  if (__tsan_create_fiber)
    mmap(shared, kMostSharedBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED,
         -1, 0);
  std::memset(shared, 0xFF, block.shared_bytes);
  block.start.release();
  switch_to(block.at[0]);
  if (block.error.empty() && block.finished < block.threads) block.error = deadlock();
  if (block.error.empty()) return;
  for (auto& fiber : fibers) fiber.reset();  // threads that never go on
  throw std::runtime_error("block " + text(blockIdx) + ", " + std::exchange(block.error, {}));
}

}  // namespace

int order = order_of_environment();
BankConflicts bank_conflicts;

char* shared_memory() { return shared; }

void sync_threads() {
  Event& event = block.event(block.events, block.barriers);
  event.release();
  if (++block.waiting < block.threads) {
    suspend();
  } else {
    block.waiting = 0;
    ++block.barriers;
    for (int index = 0; index < block.threads / kLanes; ++index) block.warps[index].runnable = ~0u;
  }
  event.acquire();
}

namespace internal {

bool arrive(const void* operation, const char* name, const void* in, void* out) {
  Warp& warp = block.warps[self().position / kLanes];
  if (warp.arrived && warp.operation != operation)
    fail(std::string("is in ") + operation_name(name) + " while another lane of its warp is in " +
         operation_name(warp.name));
  warp.operation = operation;
  warp.name = name;
  warp.in[self().number % kLanes] = in;
  warp.out[self().number % kLanes] = out;
  Event& event = block.event(warp.events, warp.count);
  event.release();
  const bool last = ++warp.arrived == kLanes;
  if (!last) suspend();
  event.acquire();
  return last;
}

const void* const* inputs() { return block.warps[self().position / kLanes].in; }

void* const* outputs() { return block.warps[self().position / kLanes].out; }

void release() {
  Warp& warp = block.warps[self().position / kLanes];
  block.event(warp.events, warp.count++).release();
  warp.arrived = 0;
  warp.runnable = ~0u;
}

void run(Dim3 grid, int threads, int shared_bytes, void (*body)(void*), void* context) {
  static std::mutex one_launch;
  std::lock_guard<std::mutex> lock(one_launch);
  if (order < kReverse) throw std::runtime_error("order: expected forward, reverse or a seed > 0");
  if (threads < kLanes || threads > kMostThreads || threads % kLanes)
    throw std::runtime_error("threads is " + std::to_string(threads) +
                             ": expected a multiple of 32 up to 1024");
  if (shared_bytes < 0 || shared_bytes > kMostSharedBytes)
    throw std::runtime_error("shared_bytes is " + std::to_string(shared_bytes) +
                             ": expected 0 to " + std::to_string(kMostSharedBytes));
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7FFFFFFF || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error("grid is " + text(grid) + ": expected 1 to (2^31 - 1, 65535, 65535)");

  const int sets = __tsan_create_fiber ? 2 : 1;
  if (!shared) shared = map(kMostSharedBytes + 2 * kPage) + kPage;
  poison(shared - kPage, kMostSharedBytes + 2 * kPage);
  unpoison(shared, shared_bytes);
  if (__tsan_get_current_fiber) host.tsan = __tsan_get_current_fiber();
  for (int index = 0; index < 2 * kMostThreads; ++index)
    if (!fibers[index] && index % kMostThreads < threads && index < sets * kMostThreads)
      fibers[index] = std::make_unique<Thread>(index);
  block.threads = threads;
  block.shared_bytes = shared_bytes;
  block.body = body;
  block.context = context;
  gridDim = grid;
  blockDim = {static_cast<unsigned>(threads), 1, 1};
  threadIdx.y = threadIdx.z = 0;
  for (const unsigned number : permutation(grid.x * grid.y * grid.z, 0)) {
    blockIdx = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
    block.set = (block.set + 1) % sets;
    run_block(number);
  }
  block.end.acquire();
}

}  // namespace internal

void copy_async(void* to, const void* from, int bytes, int valid_bytes) {
  const auto destination = reinterpret_cast<std::uintptr_t>(to);
  const auto source = reinterpret_cast<std::uintptr_t>(from);
  if (bytes != 4 && bytes != 8 && bytes != 16)
    fail("cp.async of " + std::to_string(bytes) + " bytes: expected 4, 8 or 16");
  if (valid_bytes < 0 || valid_bytes > bytes)
    fail("cp.async with " + std::to_string(valid_bytes) + " valid bytes: expected 0 to " +
         std::to_string(bytes));
  if (destination % bytes || source % bytes)
    fail("cp.async of " + std::to_string(bytes) + " bytes between addresses not aligned to it");
  const std::ptrdiff_t offset = static_cast<char*>(to) - shared;
  if (offset < 0 || offset + bytes > block.shared_bytes)
    fail("cp.async to byte " + std::to_string(offset) + " of " +
         std::to_string(block.shared_bytes) + " bytes of shared memory");
  if (self().copies.size() == kMostCopies) fail("has more than 256 cp.async in flight");
  if (__asan_storeN) __asan_storeN(to, bytes);
  if (__asan_loadN && valid_bytes) __asan_loadN(from, valid_bytes);
  fill_bytes(to, 0xFF, bytes);
  poison(to, bytes);
  self().copies.push_back(
      {static_cast<char*>(to), static_cast<const char*>(from), bytes, valid_bytes});
  ++self().uncommitted;
}

void commit() {
  if (self().groups.size() == kMostCopies) fail("has more than 256 cp.async groups in flight");
  self().groups.push_back(std::exchange(self().uncommitted, 0));
}

void wait(int pending) {
  std::vector<Copy>& copies = self().copies;
  std::vector<int>& groups = self().groups;
  if (pending < 0) fail("waits for all but " + std::to_string(pending) + " groups");
  while (static_cast<int>(groups.size()) > pending) {
    for (int index = 0; index < groups.front(); ++index) {
      const Copy& copy = copies[index];
      unpoison(copy.shared, copy.bytes);
      if (copy.valid_bytes) copy_bytes(copy.shared, copy.global, copy.valid_bytes);
      fill_bytes(copy.shared + copy.valid_bytes, 0, copy.bytes - copy.valid_bytes);
    }
    copies.erase(copies.begin(), copies.begin() + groups.front());
    groups.erase(groups.begin());
  }
}

void count_bank_conflicts(const void* const (&row_address)[32], int matrices) {
  constexpr int kRows = 8, kRowBytes = 16, kAllBanksBytes = 128;
  for (int matrix = 0; matrix < matrices; ++matrix) {
    // The different rows that lie in each four banks; lanes that name the same row share it.
    std::ptrdiff_t rows[kAllBanksBytes / kRowBytes][kRows];
    int counts[kAllBanksBytes / kRowBytes] = {};
    for (int row = 0; row < kRows; ++row) {
      const std::ptrdiff_t offset =
          static_cast<const char*>(row_address[matrix * kRows + row]) - shared;
      if (offset % kRowBytes || offset < 0 || offset + kRowBytes > block.shared_bytes)
        fail("ldmatrix of byte " + std::to_string(offset) + " of " +
             std::to_string(block.shared_bytes) +
             " bytes of shared memory: expected 16 aligned bytes inside");
      const int banks = offset % kAllBanksBytes / kRowBytes;
      std::ptrdiff_t* const end = rows[banks] + counts[banks];
      if (std::find(rows[banks], end, offset) == end) rows[banks][counts[banks]++] = offset;
    }
    bank_conflicts.extra_wavefronts += *std::max_element(counts, std::end(counts)) - 1;
    ++bank_conflicts.phases;
  }
}

}  // namespace attn_ext::emulator
