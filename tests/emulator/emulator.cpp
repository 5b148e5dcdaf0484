// Runs the kernel of csrc/sm90 behind the C interface of csrc/flash_kda.h, on tensors in ordinary memory.
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

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  int index, cta;
  bool done = false;
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
  ucontext_t main;
  std::vector<Thread> threads;
  Cta ctas[kPair];
  Named barrier;
  unsigned index, clusters;
  flash_kda::Params params;
  std::vector<std::function<void()>> copies;
  std::mt19937 random;
  Thread* running = nullptr;
  uint64_t progress = 0;
  std::string error;
};

Cluster* cluster;

Thread& self() { return *cluster->running; }
Cta& cta() { return cluster->ctas[self().cta]; }
Dim thread_index() { return {unsigned(self().index)}; }
Dim block_index() { return {cluster->index * kPair + self().cta}; }
Dim grid_size() { return {cluster->clusters * kPair}; }
unsigned char* shared_memory() { return cta().memory; }
int lane() { return self().index % kWarpSize; }
unsigned rank() { return self().cta; }

void yield() { swapcontext(&self().context, &cluster->main); }

void fail(const char* what) {
  cluster->error = what;
  for (;;) yield();
}

void* in_cta(const void* here, unsigned rank) {
  return cluster->ctas[rank].memory + (static_cast<const unsigned char*>(here) - cta().memory);
}

void later(std::function<void()> copy) {
  ++cluster->progress;
  cluster->copies.push_back(std::move(copy));
}

void meet(Named& barrier, int threads) {
  ++cluster->progress;
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
void cluster_sync() { meet(cluster->barrier, kPair * kThreads); }

void collective(void* mine, const std::function<void(void* (&)[kWarpSize])>& work) {
  Warp& warp = cta().warps[self().index / kWarpSize];
  warp.brought[lane()] = mine;
  const unsigned generation = warp.generation;
  ++cluster->progress;
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
  flash_kda::forward(cluster->params);
  self().done = true;
  ++cluster->progress;
  for (;;) yield();
}

// For a while one role of one CTA, all of that CTA, or the copies fall behind: whoever should wait for them and does
// not is far ahead then.
struct Lag {
  enum { kAllRoles = -1, kRecur, kPrepare, kLoad, kCopies, kInvert, kAsynchronous, kEnd };
  int cta = 0, role = kEnd;

  void change(std::mt19937& random) {
    cta = random() % kPair;
    role = kAllRoles + int(random() % (kEnd - kAllRoles + 1));
  }
  bool of_warp(int of_cluster) const {
    using namespace flash_kda;
    const int warp = of_cluster % (kThreads / kWarpSize);
    const int its = warp < kFirstPrepareWarp  ? kRecur
                    : warp < kLoadWarp        ? kPrepare
                    : warp == kLoadWarp       ? kLoad
                    : warp < kFirstInvertWarp ? kCopies
                                              : kInvert;
    return of_cluster / (kThreads / kWarpSize) == cta && (role == kAllRoles || role == its);
  }
};

// One cluster from its start to its end. Empty, or what went wrong.
std::string run_cluster(const flash_kda::Params& params, unsigned index, unsigned clusters, unsigned seed) {
  Cluster now;
  cluster = &now;
  now.params = params;
  now.index = index;
  now.clusters = clusters;
  now.random.seed(seed * 1000003 + index);
  const size_t bytes = (sizeof(flash_kda::SharedMemoryPlan) + 1023) / 1024 * 1024;
  for (Cta& c : now.ctas) {
    c.memory = static_cast<unsigned char*>(aligned_alloc(1024, bytes));
    memset(c.memory, 0xff, bytes);  // NaN, wherever nothing was written
  }
  now.threads.resize(kPair * kThreads);
  for (size_t i = 0; i < now.threads.size(); ++i) {
    Thread& t = now.threads[i];
    t.index = i % kThreads;
    t.cta = i / kThreads;
    t.stack.reset(new char[kStack]);
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.get();
    t.context.uc_stack.ss_size = kStack;
    t.context.uc_link = &now.main;
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
    if (now.random() % 32 == 0) lag.change(now.random);
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
          now.running = &t;
          swapcontext(&now.main, &t.context);
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
  for (Cta& c : now.ctas) free(c.memory);
  return now.error;
}

CUtensorMap tensor(const flash_kda_tokens& x, const flash_kda_arguments& a) {
  return {static_cast<const uint16_t*>(x.data),
          {128, a.heads, a.tokens, a.batch},
          {1, x.stride_head, x.stride_token, x.stride_batch}};
}

}  // namespace emulator

static std::string last_error;

// `clusters` one after the other, in random order: one waits only for those that have started before it.
extern "C" const char* emulate_forward(const flash_kda_arguments* arguments, int clusters, unsigned seed) {
  const flash_kda_arguments& a = *arguments;
  flash_kda::Params p = flash_kda::to_params(a);
  p.q = emulator::tensor(a.q, a), p.k = emulator::tensor(a.k, a);
  p.g = emulator::tensor(a.g, a), p.v = emulator::tensor(a.v, a);
  std::vector<uint32_t> flags(flash_kda::kCounters + 2 * clusters);
  std::vector<float> states(2 * clusters * 64 * 128);
  p.started = flags.data();
  p.ended = p.started + 1;
  p.handed_over = p.started + flash_kda::kCounters;
  p.handover = states.data();
  std::vector<float> kept(2 * clusters * 64 * 128);
  p.kept = kept.data();
  std::vector<unsigned> order(clusters);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  for (const unsigned i : order) {
    last_error = emulator::run_cluster(p, i, clusters, seed);
    if (!last_error.empty()) return last_error.c_str();
  }
  if (std::any_of(flags.begin(), flags.end(), [](uint32_t flag) { return flag != 0; }))
    return "flags that the next launch finds set";
  return nullptr;
}
