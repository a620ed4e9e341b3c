// Runs a schedule: one parallel region, in which all threads walk through the commands together.
#include "abi.h"

#include <atomic>
#include <omp.h>
#include <sched.h>

namespace {

struct alignas(64) Gate {
  std::atomic<int32_t> arrived{0};
  std::atomic<int32_t> round{0};
};

thread_local Gate* gate_of_team = nullptr;

// Threads of a team wait for each other often and briefly, so they spin first and give the core away later.
void wait_for_team(const Team* team) {
  if (team->count == 1) return;
  Gate& gate = *gate_of_team;
  const int32_t round = gate.round.load(std::memory_order_relaxed);
  if (gate.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == team->count) {
    gate.arrived.store(0, std::memory_order_relaxed);
    gate.round.store(round + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; gate.round.load(std::memory_order_acquire) == round; ++spins) {
    if (spins < 4000) {
      __builtin_ia32_pause();
    } else {
      sched_yield();
    }
  }
}

}  // namespace

// scratch: `threads` pieces of scratch_size bytes. Runs with at most `threads` threads.
extern "C" void tfqc_run(const Command* commands, int64_t count, const int64_t* rows, int32_t threads,
                         uint8_t* scratch, int64_t scratch_size, uint8_t* shared, int64_t shared_size) {
  Gate gate;
#pragma omp parallel num_threads(threads)
  {
    gate_of_team = &gate;
    const int32_t id = omp_get_thread_num();
    Team team{id, omp_get_num_threads(), rows, scratch + id * scratch_size, scratch_size, shared, shared_size,
              wait_for_team};
    for (int64_t i = 0; i < count; ++i) {
      commands[i].run(commands[i].args, team);
      team.barrier();
    }
  }
}
