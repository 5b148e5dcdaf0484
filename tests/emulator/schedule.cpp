// The chunks that the scheduler of every cluster gives out, in random batches: each chunk once and in order, whole
// heads in no cluster longer than its piece, and a head that goes on in the next piece waiting there. A program for the
// host: tests/test_schedule.py runs it.
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <map>
#include <random>
#include <utility>
#include <vector>

#include "emulator.h"
// What the headers of the kernel take from CUDA comes first.
#include "sm90/scheduler.h"

using namespace flash_kda;

constexpr int kBatches = 20000;

static void check(bool right, const char* what, int batch) {
  if (right) return;
  printf("batch %d: %s\n", batch, what);
  exit(1);
}

int main() {
  std::mt19937 random(1);
  const auto below = [&](int n) { return int(random() % n); };
  for (int batch = 0; batch < kBatches; ++batch) {
    Params p{};
    std::vector<int64_t> offsets = {0};
    for (int n = 1 + below(6); n > 0; --n) {
      const int lengths[] = {0, below(kChunk), below(500), kChunk * below(5)};
      offsets.push_back(offsets.back() + lengths[below(4)]);
    }
    p.sequences = offsets.size() - 1;
    p.heads = 1 + below(5);
    p.tokens = offsets.back();
    p.cu_seqlens = offsets.data();
    p.cu_seqlens_is_64_bit = true;
    // Any offsets of checkpoints, in every second batch
    const int columns = below(2) * (1 + below(4));
    std::vector<int32_t> checkpoints;
    for (int i = 0; i < p.sequences * columns; ++i) {
      const int offsets[] = {16 * below(34), kChunk * below(17), below(600), -below(100), 1 << 30};
      checkpoints.push_back(offsets[below(5)]);
    }
    p.checkpoints = columns;
    p.checkpoint_offsets = checkpoints.data();
    p.offsets_stride_sequence = columns;
    p.offsets_stride_checkpoint = 1;

    // What the kernel's List works out with all threads
    int64_t total = 0, cost = 0, longest = 0;
    for (int64_t n = 0; n < p.sequences; ++n) {
      total += int64_t(Sequence(p, n).chunks()) * p.heads;
      cost += int64_t(Sequence(p, n).cost()) * p.heads;
      longest = std::max(longest, int64_t(Sequence(p, n).cost()));
    }
    const int clusters = std::min<int64_t>(1 + below(10), p.sequences * p.heads);
    const int64_t piece = std::max((cost + clusters - 1) / clusters, longest);
    const auto position = [&](int64_t unit) -> Position {
      for (int64_t n = 0; n < p.sequences; ++n) {
        const int64_t each = Sequence(p, n).cost();
        if (unit < each * p.heads) return {n, std::max<int64_t>(unit % each - kStateCost, 0), int(unit / each)};
        unit -= each * p.heads;
      }
      return {p.sequences, 0, 0};
    };

    int64_t done = 0;
    std::map<std::pair<int64_t, int>, int64_t> chunks_of;                    // how many have come
    std::map<std::pair<int64_t, int>, std::vector<int>> slots_of;            // checkpoints that have come
    std::map<std::pair<int64_t, int>, int64_t> next;                         // token of a head that comes next
    std::map<std::pair<int64_t, int>, std::pair<int, int64_t>> handed_over;  // by which cluster, and before which token
    for (int cluster = 0; cluster < clusters; ++cluster) {
      Scheduler scheduler(Schedule{position(cluster * piece), position((cluster + 1) * piece)});
      Scheduler::Run run;
      scheduler.next(p, run);
      int64_t count = 0, states = 0;
      for (bool within = false; !run.chunk.is_end(); run.more > 0 ? run.advance(p) : scheduler.next(p, run)) {
        const Chunk& chunk = run.chunk;
        const bool first = chunk.is(Chunk::kFirst), last = chunk.is(Chunk::kLast);
        const bool begins = chunk.is(Chunk::kBegins), ends = chunk.is(Chunk::kEnds);
        const std::pair<int64_t, int> head = {chunk.sequence, chunk.head};
        const Sequence sequence(p, chunk.sequence);
        const int64_t token = chunk.token - sequence.start;
        check(token == next[head], "a chunk is left out, or comes twice", batch);
        const bool aside = chunk.is(Chunk::kAside);
        const int64_t until = token + chunk.valid();
        if (!aside) next[head] += kChunk;
        check(first == !within && begins == (chunks_of[head] == 0), "the beginning", batch);
        ++chunks_of[head];
        check(aside || until == std::min<int64_t>(sequence.length, token + kChunk), "tokens", batch);
        check(ends == (!aside && token + kChunk >= sequence.length), "the end", batch);
        check(!aside || (chunk.is(Chunk::kCheckpoint) && until % kChunk != 0), "an aside without a reason", batch);
        if (chunk.is(Chunk::kCheckpoint)) {
          std::vector<int>& taken = slots_of[head];
          check(checkpoints[chunk.sequence * columns + chunk.slot()] == until, "a checkpoint at another place", batch);
          check(taken.empty() || taken.back() < int(chunk.slot()), "a checkpoint twice", batch);
          taken.push_back(int(chunk.slot()));
        }
        if (first && !begins) {
          check(handed_over.count(head) && handed_over[head] == std::make_pair(cluster - 1, token), "handover", batch);
          handed_over.erase(head);
        }
        ++count;
        states += begins;
        if (last && !ends) {
          check(count == chunks_of[head], "what goes on in the next piece does not come first", batch);
          handed_over[head] = {cluster, next[head]};
        }
        within = !last;
      }
      check(count + std::max<int64_t>(states - 1, 0) * kStateCost <= piece, "a piece is too long", batch);
      done += count;
    }
    check(done == total && handed_over.empty(), "not everything is done", batch);
    for (int64_t n = 0; n < p.sequences; ++n) {
      std::vector<int> wanted;
      int64_t before = kShort;  // those up to there are left to short.h
      for (int c = 0; c < columns; ++c) {
        const int64_t offset = checkpoints[n * columns + c];
        if (offset <= before || offset > Sequence(p, n).length) continue;
        wanted.push_back(c);
        before = offset;
      }
      for (int head = 0; head < p.heads; ++head)
        check(slots_of[std::make_pair(n, head)] == wanted, "a checkpoint is left out", batch);
    }
  }
  printf("%d batches\n", kBatches);
}
