// Prints what a call of DeepSeek-V3's experts does on simulated machines: see simulation.h. With an
// argument, also by kinds of cache lines.
#include <algorithm>
#include <cstdio>

#include "lk/testing/simulated_calls.h"

namespace {

using namespace lk::simulation;

// 85% of the bandwidth of 12 channels of DDR5-4800.
constexpr double kSocketRate = 0.85 * 460;

struct Machine {
  const char* name;
  const char* topology;
  int sockets;
  int cores;

  // GB/s that the cores can read.
  double rate() const { return std::min(kSocketRate * sockets, Costs().core_rate * cores); }
};
constexpr Machine kMachines[] = {
    {"1 x 16", "1 node x 16 cores x 1 threads", 1, 16},
    {"2 x 24", "2 nodes x 24 cores x 1 threads", 2, 48},
    {"4 x 24", "4 nodes x 24 cores x 1 threads", 2, 96},
    {"2 x 96", "2 nodes x 96 cores x 1 threads", 2, 192},
    {"8 x 24", "8 nodes x 24 cores x 1 threads", 2, 192},
    {"12 x 16", "12 nodes x 16 cores x 1 threads", 2, 192},
};

struct Weights {
  const char* name;
  int bits;
  double scale_bytes;  // for each byte of weights
};
constexpr Weights kWeights[] = {
    {"int4", 4, 2.0 / 64},           // a bf16 scale for 128 weights
    {"fp8", 8, 4.0 / (128 * 128)}};  // a float scale for 128 x 128 weights

struct Way {
  const char* name;
  int64_t gap;
  bool own_cores;
};
constexpr Way kWays[] = {
    {"20 us", 20'000, false}, {"300 us", 300'000, false}, {"300 us, own cores", 300'000, true}};

void print(const Machine& machine, const Weights& weights, int tokens, const Way& way,
           const Call& call) {
  const Line all = call.counts.total();
  const double reading = static_cast<double>(call.bytes) / machine.rate();
  std::printf(
      "| %s | %s | %d | %s | %ld | %ld | %ld | %ld | %ld | %ld | %ld | %ld | %.0f | %.0f |\n",
      machine.name, weights.name, tokens, way.name, call.counts.futex_waits,
      call.counts.futex_wakes, call.counts.most_woken, all.updates, all.most_updates, all.reads,
      call.tiles, call.stolen, static_cast<double>(call.ns) / 1e3, reading / 1e3);
}

}  // namespace

int main(int argc, char**) {
  std::printf(
      "| nodes x cores | weights | tokens | after a gap of | threads asleep | futex wakes | "
      "most woken by one | updates | most of a line | lines fetched | tiles | of another node | us "
      "| reading alone |\n|---|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n");
  for (const Machine& machine : kMachines) {
    for (const Weights& weights : kWeights) {
      for (int tokens : {1, 16}) {
        for (const Way& way : kWays) {
          Calls calls;
          calls.topology = machine.topology;
          calls.sockets = machine.sockets;
          calls.pool.own_cores = way.own_cores;
          calls.tokens = tokens;
          calls.bits = weights.bits;
          calls.scale_bytes = weights.scale_bytes;
          calls.machine_rate = kSocketRate * machine.sockets;
          calls.gaps = {way.gap, way.gap, way.gap};
          const Call call = simulate(calls).calls.back();
          print(machine, weights, tokens, way, call);
          if (argc == 1) continue;
          for (const auto& [name, line] : call.counts.lines) {
            std::printf(
                "    %s: %ld lines, fetched %ld, stores %ld, updates %ld, most %ld, "
                "from one to all %ld\n",
                name.c_str(), line.lines, line.reads, line.writes, line.updates, line.most_updates,
                line.broadcast);
          }
        }
      }
    }
  }
}
