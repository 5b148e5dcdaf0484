// Runs the kernel of csrc/sm90 behind the C interface of csrc/flash_kda.h, on tensors in ordinary memory.
#undef _FORTIFY_SOURCE  // it takes a jump from one stack to another for a mistake
#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "flash_kda.h"
#include "params.h"
#include "sm90/forward.h"

namespace emulator {

using flash_kda::kPair, flash_kda::kThreads;
constexpr size_t kStack = 256 * 1024;

struct Warp {
  int arrived = 0;
  unsigned generation = 0;
  void* brought[kWarpSize];
};

struct Cluster;

struct Thread {
  ucontext_t context;  // its beginning
  jmp_buf left;        // where it goes on
  bool started = false;
  std::unique_ptr<char[]> stack;
  Cluster* cluster;
  int index, cta;
  bool done = false;
  int reading = 0, writing = 0;  // bulk copies to memory
  std::vector<Gmma> gmmas;
  int group = 0;
};

struct Named {
  int arrived = 0;
  unsigned generation = 0;
};

struct Cta {
  unsigned char* memory;
  Warp warps[kThreads / kWarpSize];
  Named barriers[16];
};

struct Cluster {
  Cta ctas[kPair];
  Named barrier;
  unsigned index;
};

// Clusters that run at the same time.
struct Machine {
  jmp_buf left;
  std::vector<Thread> threads;
  std::vector<Cluster> clusters;
  unsigned all;  // clusters of the grid
  void (*kernel)(flash_kda::Params);
  flash_kda::Params params;
  std::vector<std::function<void()>> copies;
  std::mt19937 random;
  Thread* running = nullptr;
  uint64_t progress = 0;
  std::string error;
};

Machine* machine;

Thread& self() { return *machine->running; }
Cta& cta() { return self().cluster->ctas[self().cta]; }
Dim thread_index() { return {unsigned(self().index)}; }
Dim block_index() { return {self().cluster->index * kPair + self().cta}; }
Dim grid_size() { return {machine->all * kPair}; }
unsigned char* shared_memory() { return cta().memory; }
int lane() { return self().index % kWarpSize; }
unsigned rank() { return self().cta; }

// Jumps, because swapcontext asks the system for the signal mask each time.
void yield() {
  if (_setjmp(self().left) == 0) _longjmp(machine->left, 1);
}

void resume(Thread& thread) {
  machine->running = &thread;
  if (_setjmp(machine->left) != 0) return;
  if (thread.started) _longjmp(thread.left, 1);
  thread.started = true;
  setcontext(&thread.context);
}

void fail(const char* what) {
  machine->error = what;
  for (;;) yield();
}

void* in_cta(const void* here, unsigned rank) {
  return self().cluster->ctas[rank].memory + (static_cast<const unsigned char*>(here) - cta().memory);
}

void later(std::function<void()> copy) {
  ++machine->progress;
  machine->copies.push_back(std::move(copy));
}

void store_later(void* to, const void* from, int bytes) {
  Thread& t = self();
  ++t.reading, ++t.writing;
  later([=, &t] {
    const auto held = std::make_shared<std::vector<char>>(bytes);
    memcpy(held->data(), from, bytes);
    --t.reading;
    later([=, &t] {
      memcpy(to, held->data(), bytes);
      --t.writing;
    });
  });
}

void wait_stores(bool only_read) {
  while (only_read ? self().reading : self().writing) yield();
}

void meet(Named& barrier, int threads) {
  ++machine->progress;
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) yield();
}

void sync(int barrier, int threads) {
  collective(nullptr, [](void*(&)[kWarpSize]) {});
  meet(cta().barriers[barrier], threads);
}
void cluster_sync() { meet(self().cluster->barrier, kPair * kThreads); }

void collective(void* mine, const std::function<void(void* (&)[kWarpSize])>& work) {
  Warp& warp = cta().warps[self().index / kWarpSize];
  warp.brought[lane()] = mine;
  const unsigned generation = warp.generation;
  ++machine->progress;
  if (++warp.arrived == kWarpSize) {
    work(warp.brought);
    warp.arrived = 0;
    ++warp.generation;
    return;
  }
  while (warp.generation == generation) yield();
}

void gmma_push(Gmma product) {
  product.group = self().group;
  self().gmmas.push_back(product);
}

void gmma_commit() { ++self().group; }

float element(const InTiles& x, bool transposed, int n, int k) {
  uint16_t y;
  const uintptr_t rows = reinterpret_cast<uintptr_t>(x.rows);
  memcpy(&y, reinterpret_cast<const void*>(tile_address(transposed, rows, x.leading, x.stride, n, k)), 2);
  return from_bf16(y);
}

void gmma_wait(int pending) {
  Thread& t = self();
  const int until = t.group - pending, first_row = t.index / kWarpSize % flash_kda::kWarpgroupWarps * 16;
  collective(&t, [&](void*(&all)[kWarpSize]) {
    const auto at = [&](int l) -> std::vector<Gmma>& { return static_cast<Thread*>(all[l])->gmmas; };
    size_t count = 0;
    while (count < at(0).size() && at(0)[count].group < until) ++count;
    for (size_t op = 0; op < count; ++op) {
      const Gmma& g = at(0)[op];
      constexpr int kDepth = 16;
      std::vector<float> b(g.atom.columns * kDepth);
      for (int n = 0; n < g.atom.columns; ++n)
        for (int k = 0; k < kDepth; ++k) b[n * kDepth + k] = element(g.right, g.atom.right_transposed, n, k);
      for (int i = 0; i < 16; ++i) {
        float a[kDepth];
        for (int k = 0; k < kDepth; ++k) {
          const Place from = left_bf16(i, k);
          const uint32_t x = at(from.lane)[op].a[from.value / 2];
          a[k] = g.left.rows ? element(g.left, g.atom.left_transposed, first_row + i, k)
                             : from_bf16(from.value % 2 ? x >> 16 : x & 0xffff);
        }
        for (int n = 0; n < g.atom.columns; ++n) {
          double sum = 0;
          for (int k = 0; k < kDepth; ++k) sum += double(a[k]) * b[n * kDepth + k];
          const Place to = accumulator(i, n);
          float& c = at(to.lane)[op].c[to.value];
          c = float((g.accumulate ? c : 0.f) + g.atom.sign * sum);
        }
      }
    }
    for (int l = 0; l < kWarpSize; ++l) at(l).erase(at(l).begin(), at(l).begin() + count);
  });
}

void entry() {
  machine->kernel(machine->params);
  self().done = true;
  ++machine->progress;
  for (;;) yield();
}

// For a while one role of one CTA, all of that CTA, or the copies fall behind: whoever should wait for them and does
// not is far ahead then.
struct Lag {
  enum { kAllRoles = -1, kRecur, kPrepare, kLoad, kCopies, kInvert, kAsynchronous, kEnd };
  int cta = 0, role = kEnd;  // `cta`: of all that run

  void change(std::mt19937& random, size_t clusters) {
    cta = random() % (kPair * clusters);
    role = kAllRoles + int(random() % (kEnd - kAllRoles + 1));
  }
  bool of_warp(int of_all) const {
    using namespace flash_kda;
    const int warp = of_all % (kThreads / kWarpSize);
    const int its = warp < kFirstPrepareWarp  ? kRecur
                    : warp < kLoadWarp        ? kPrepare
                    : warp == kLoadWarp       ? kLoad
                    : warp < kFirstInvertWarp ? kCopies
                                              : kInvert;
    return of_all / (kThreads / kWarpSize) == cta && (role == kAllRoles || role == its);
  }
};

// Some clusters of a grid of `all` from their start to their end, at the same time. Empty, or what went wrong.
std::string run(const std::vector<unsigned>& clusters, unsigned all, void (*kernel)(flash_kda::Params),
                const flash_kda::Params& params, unsigned seed) {
  Machine now;
  machine = &now;
  now.kernel = kernel;
  now.params = params;
  now.all = all;
  now.random.seed(seed * 1000003 + clusters.front());
  const size_t bytes = (sizeof(flash_kda::SharedMemoryPlan) + 1023) / 1024 * 1024;
  now.clusters.resize(clusters.size());
  now.threads.resize(clusters.size() * kPair * kThreads);
  for (size_t n = 0; n < clusters.size(); ++n) {
    now.clusters[n].index = clusters[n];
    for (Cta& c : now.clusters[n].ctas) {
      c.memory = static_cast<unsigned char*>(aligned_alloc(1024, bytes));
      memset(c.memory, 0xff, bytes);  // NaN, wherever nothing was written
    }
  }
  for (size_t i = 0; i < now.threads.size(); ++i) {
    Thread& t = now.threads[i];
    t.cluster = &now.clusters[i / (kPair * kThreads)];
    t.index = i % kThreads;
    t.cta = i / kThreads % kPair;
    t.stack.reset(new char[kStack]);
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.get();
    t.context.uc_stack.ss_size = kStack;
    t.context.uc_link = nullptr;  // none returns
    makecontext(&t.context, entry, 0);
  }
  std::vector<int> order(now.threads.size() / kWarpSize);
  for (size_t i = 0; i < order.size(); ++i) order[i] = int(i);
  bool left = true;
  int idle = 0;
  // Far more than it takes: a role that waits for nothing can work for ever.
  const int64_t rows = params.cu_seqlens ? 1 : params.sequences, chunks = rows * params.tokens / flash_kda::kChunk;
  const int64_t most_rounds = 5000 + 200 * params.heads * (chunks + params.sequences * (1 + params.checkpoints));
  int64_t rounds = 0;
  Lag lag;
  while (left && now.error.empty()) {
    left = false;
    const uint64_t before = now.progress;
    std::shuffle(order.begin(), order.end(), now.random);
    if (now.random() % 32 == 0) lag.change(now.random, clusters.size());
    for (const int warp : order) {
      if (lag.of_warp(warp) ? now.random() % 32 != 0 : now.random() % 4 == 0) continue;
      // A warp goes on until nothing moves in it, or is left behind at one of its collective instructions
      const int flip = now.random() % 2 * (kWarpSize - 1);  // its lanes one after the other, or the last one first
      uint64_t moved;
      do {
        moved = now.progress;
        for (int l = 0; l < kWarpSize; ++l) {
          Thread& t = now.threads[warp * kWarpSize + (l ^ flip)];
          if (t.done) continue;
          resume(t);
        }
      } while (moved != now.progress && now.error.empty() && now.random() % 16 != 0);
    }
    for (const Thread& t : now.threads) left |= !t.done;
    for (size_t i = 0; i < now.copies.size();)
      if (now.random() % (lag.role == Lag::kAsynchronous ? 64 : 3) == 0) {
        const auto copy = std::move(now.copies[i]);
        now.copies.erase(now.copies.begin() + i);
        copy();
        ++now.progress;
      } else {
        ++i;
      }
    idle = now.progress == before ? idle + 1 : 0;
    if (idle > 1000) now.error = "deadlock";
    if (++rounds > most_rounds) now.error = "no end";
  }
  for (Cluster& cluster : now.clusters)
    for (Cta& c : cluster.ctas) free(c.memory);
  return now.error;
}

CUtensorMap tensor(const flash_kda_tokens& x, const flash_kda_arguments& a) {
  return {static_cast<const uint16_t*>(x.data),
          {128, a.heads, a.tokens, a.batch},
          {1, x.stride_head, x.stride_token, x.stride_batch}};
}

}  // namespace emulator

static std::string last_error;

// A grid of so many clusters. With `way` 1 they run one after the other, in random order: one waits only for those that
// have started before it. With every second seed all run at the same time, and wait for each other. With 2, chunks go
// through the ring wherever they can: both kernels are launched, and one returns at once.
extern "C" const char* emulate_forward(const flash_kda_arguments* arguments, int clusters, int way, int ring_slots,
                                       unsigned seed) {
  using namespace flash_kda;
  const flash_kda_arguments& a = *arguments;
  Params p = to_params(a);
  p.q = emulator::tensor(a.q, a), p.k = emulator::tensor(a.k, a);
  p.g = emulator::tensor(a.g, a), p.v = emulator::tensor(a.v, a);
  std::vector<uint32_t> flags(kCounters + kPair * clusters), ring_flags(kRingSlots + kMostItems * kPair);
  std::vector<float> states(kPair * clusters * kColumns * kHeadDim, NAN), kept(states);
  std::vector<unsigned char> ring(size_t(ring_slots) * kPreparedBytes, 0xff);
  p.started = flags.data();
  p.ended = p.started + 1;
  p.handed_over = p.started + kCounters;
  p.handover = states.data();
  p.kept = kept.data();
  p.way = Way(way);
  p.ring_slots = ring_slots;
  p.ring = ring.data();
  p.ring_ready = ring_flags.data();
  p.ring_taken = p.ring_ready + kRingSlots;
  std::vector<unsigned> order(clusters);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  p.ring_clusters = p.way == Way::kRing ? clusters : 0;
  last_error.clear();
  if (p.way == Way::kRing) last_error = emulator::run(order, clusters, forward<true>, p, seed);
  if (seed % 2 == 1) {
    if (last_error.empty()) last_error = emulator::run(order, clusters, forward<false>, p, seed);
  } else {
    for (const unsigned i : order)
      if (last_error.empty()) last_error = emulator::run({i}, clusters, forward<false>, p, seed);
  }
  if (!last_error.empty()) return last_error.c_str();
  const auto is_set = [](uint32_t flag) { return flag != 0; };
  if (std::any_of(flags.begin(), flags.end(), is_set) || std::any_of(ring_flags.begin(), ring_flags.end(), is_set))
    return "flags that the next launch finds set";
  return nullptr;
}
