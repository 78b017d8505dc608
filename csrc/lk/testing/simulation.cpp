#include "lk/testing/simulation.h"

#include <sched.h>

#include <algorithm>
#include <bitset>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <mutex>
#include <unordered_map>

namespace lk {
namespace simulation {
namespace {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
constexpr size_t kMostThreads = 1024;

enum class State { kReady, kSpinning, kReading, kAsleep, kEnded };

struct SimulatedThread {
  int64_t clock = 0;
  State state = State::kReady;
  int node = 0;
  uintptr_t last_line = 0;  // the line that it read last
  uintptr_t word = 0;       // the futex that it sleeps on
  int64_t end = kNever;     // of its spinning
  bool written = false;     // whether a write ended its spinning
  double served = 0;        // Node::served when all is read
  int64_t woken = 0;
  int64_t writes_end = 0;  // when all of its plain stores are visible
  int joined_by = -1;
  std::condition_variable turn;
};

struct CacheLine {
  int owner = -1;                     // the thread that wrote it last
  std::bitset<kMostThreads> holders;  // threads whose core has a copy
  int64_t free_at = 0;                // when the next transfer may begin
  int64_t reads = 0, writes = 0, updates = 0;
  std::bitset<kMostThreads> writers, readers;
  std::vector<int> spinning;
};

// The readers of a node's memory share its bandwidth evenly.
struct Node {
  double served = 0;  // bytes that each reader has got since the start
  int64_t at = 0;     // when `served` was true
  std::vector<int> readers;
};

struct Machine {
  std::mutex mutex;
  Costs costs;
  int sockets = 1;
  int nodes = 1;
  std::vector<int> node_of;
  cpu_set_t cpus;  // of the thread that started the machine
  std::vector<std::unique_ptr<SimulatedThread>> threads;
  std::unordered_map<uintptr_t, CacheLine> lines;
  std::unordered_map<uintptr_t, std::string> names;
  std::vector<Node> memory;
  Counts counts;
  int running = 0;
};

Machine* machine = nullptr;
thread_local int current = 0;

using Lock = std::unique_lock<std::mutex>;

SimulatedThread& me() { return *machine->threads[current]; }
uintptr_t line_of(const void* word) { return reinterpret_cast<uintptr_t>(word) / 64; }

double rate(const Node& node) {
  const Costs& costs = machine->costs;
  return std::min(costs.core_rate, costs.node_rate / static_cast<double>(node.readers.size()));
}

void advance(Node& node, int64_t to) {
  if (!node.readers.empty()) node.served += static_cast<double>(to - node.at) * rate(node);
  node.at = to;
}

// When a thread goes on if nothing else happens.
int64_t due(const SimulatedThread& thread) {
  switch (thread.state) {
    case State::kReady:
      return thread.clock;
    case State::kSpinning:
      return thread.end;
    case State::kReading: {
      const Node& node = machine->memory[thread.word];
      const double left = std::max(thread.served - node.served, 0.0);
      return node.at + static_cast<int64_t>(left / rate(node)) + 1;
    }
    default:
      return kNever;
  }
}

// Lets the thread that is due first go on. Returns when it is the caller's turn again.
void give_turn(Lock& lock) {
  int next = -1;
  int64_t first = kNever;
  for (size_t t = 0; t < machine->threads.size(); ++t) {
    const int64_t at = due(*machine->threads[t]);
    if (at < first) {
      first = at;
      next = static_cast<int>(t);
    }
  }
  if (next < 0) {
    std::fprintf(stderr, "simulation: all threads wait for each other\n");
    std::abort();
  }
  SimulatedThread& thread = *machine->threads[next];
  if (thread.state == State::kReading) {
    Node& node = machine->memory[thread.word];
    advance(node, first);
    std::erase(node.readers, next);
  }
  if (thread.state == State::kSpinning && thread.last_line != 0) {
    std::erase(machine->lines[thread.last_line].spinning, next);
  }
  thread.clock = first;
  thread.state = State::kReady;
  if (next == current) return;
  machine->running = next;
  thread.turn.notify_one();
  if (me().state == State::kEnded) return;
  me().turn.wait(lock, [] { return machine->running == current; });
}

// Lets threads go on that are due before the caller.
void keep_order(Lock& lock) {
  const int64_t clock = me().clock;
  for (const auto& thread : machine->threads) {
    if (due(*thread) < clock) {
      give_turn(lock);
      return;
    }
  }
}

int64_t transfer(int from, int to) {
  const auto socket = [](int thread) {
    return machine->threads[thread]->node * machine->sockets / machine->nodes;
  };
  const Costs& costs = machine->costs;
  return socket(from) == socket(to) ? costs.socket : costs.far;
}

}  // namespace

Line Counts::total() const {
  Line sum;
  for (const auto& [name, line] : lines) {
    sum.reads += line.reads;
    sum.writes += line.writes;
    sum.updates += line.updates;
    sum.most_updates = std::max(sum.most_updates, line.most_updates);
    sum.lines += line.lines;
    sum.broadcast += line.broadcast;
  }
  return sum;
}

void start(const std::vector<int>& nodes, int sockets, const Costs& costs) {
  machine = new Machine;
  machine->costs = costs;
  machine->sockets = sockets;
  machine->node_of = nodes;
  machine->nodes = *std::max_element(nodes.begin(), nodes.end()) + 1;
  machine->memory.resize(machine->nodes);
  current = add_thread();
  // One thread runs at a time, and on a single CPU their turns take a third of the time.
  sched_getaffinity(0, sizeof(machine->cpus), &machine->cpus);
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(sched_getcpu(), &one);
  sched_setaffinity(0, sizeof(one), &one);
}

void stop() {
  sched_setaffinity(0, sizeof(machine->cpus), &machine->cpus);
  delete machine;
  machine = nullptr;
}

Counts take_counts() {
  const Lock lock(machine->mutex);
  Counts counts = std::exchange(machine->counts, {});
  const size_t threads = machine->threads.size();
  for (auto& [key, line] : machine->lines) {
    if (line.reads + line.writes + line.updates == 0) continue;
    const auto name = machine->names.find(key);
    Line& sum = counts.lines[name == machine->names.end() ? "other" : name->second];
    sum.reads += line.reads;
    sum.writes += line.writes;
    sum.updates += line.updates;
    sum.most_updates = std::max(sum.most_updates, line.updates);
    ++sum.lines;
    if (line.writers.count() == 1 && (line.readers | line.writers).count() == threads) {
      ++sum.broadcast;
    }
    line.reads = line.writes = line.updates = 0;
    line.readers.reset();
    line.writers.reset();
  }
  for (const auto& thread : machine->threads) {
    counts.most_woken = std::max(counts.most_woken, std::exchange(thread->woken, 0));
  }
  return counts;
}

int64_t now() { return me().clock; }
int this_thread() { return current; }

int64_t asleep() {
  const Lock lock(machine->mutex);
  return std::count_if(machine->threads.begin(), machine->threads.end(),
                       [](const auto& thread) { return thread->state == State::kAsleep; });
}

void pause(int64_t ns) {
  Lock lock(machine->mutex);
  me().last_line = 0;
  me().end = me().clock + ns;
  me().state = State::kSpinning;
  give_turn(lock);
}

void work(int64_t ns) {
  Lock lock(machine->mutex);
  me().clock += ns;
  keep_order(lock);
}

void read_memory(int number, int64_t bytes) {
  if (machine->costs.node_rate == 0) return;
  Lock lock(machine->mutex);
  keep_order(lock);
  Node& node = machine->memory[number];
  advance(node, me().clock);
  node.readers.push_back(current);
  me().word = number;
  me().served = node.served + static_cast<double>(bytes);
  me().state = State::kReading;
  give_turn(lock);
}

void access(const void* word, Access kind) {
  if (machine == nullptr) return;
  Lock lock(machine->mutex);
  keep_order(lock);
  const Costs& costs = machine->costs;
  SimulatedThread& self = me();
  CacheLine& line = machine->lines[line_of(word)];
  if (kind == Access::kRead) {
    self.last_line = line_of(word);
    line.readers.set(current);
    if (line.owner < 0) line.owner = current;
    if (line.holders[current] || line.owner == current) {
      self.clock += costs.own;
    } else {
      const int64_t begin = std::max(self.clock, line.free_at);
      line.free_at = begin + costs.next_reader;
      self.clock = begin + transfer(line.owner, current);
      ++line.reads;
    }
    line.holders.set(current);
    return;
  }
  ++(kind == Access::kUpdate ? line.updates : line.writes);
  line.writers.set(current);
  const bool alone = line.owner == current && line.holders.count() == 1;
  int64_t end = self.clock + (kind == Access::kUpdate ? costs.own_update : costs.own);
  if (!alone && line.owner >= 0) {
    // The copies of other cores are invalidated, the farthest last.
    int64_t cost = transfer(line.owner, current);
    for (size_t t = 0; t < machine->threads.size(); ++t) {
      if (line.holders[t]) cost = std::max(cost, transfer(static_cast<int>(t), current));
    }
    end = std::max(self.clock, line.free_at) + cost;
  }
  line.free_at = std::max(line.free_at, end);
  // A plain store waits in the core's store buffer, and the thread goes on.
  self.clock = kind == Access::kWrite ? self.clock + costs.own : end;
  self.writes_end = std::max(self.writes_end, end);
  line.owner = current;
  line.holders.reset();
  line.holders.set(current);
  for (int spinning : std::exchange(line.spinning, {})) {
    SimulatedThread& thread = *machine->threads[spinning];
    thread.clock = std::max(thread.clock, end);
    thread.state = State::kReady;
    thread.written = true;
  }
}

void finish_writes() {
  const Lock lock(machine->mutex);
  me().clock = std::max(me().clock, me().writes_end);
}

bool wait_for_write(int64_t end) {
  Lock lock(machine->mutex);
  SimulatedThread& self = me();
  if (self.clock >= end) return false;
  self.end = end;
  self.written = false;
  self.state = State::kSpinning;
  machine->lines[self.last_line].spinning.push_back(current);
  give_turn(lock);
  return self.written;
}

void sleep_on(const void* word) {
  Lock lock(machine->mutex);
  ++machine->counts.futex_waits;
  me().clock += machine->costs.futex;
  me().word = reinterpret_cast<uintptr_t>(word);
  me().state = State::kAsleep;
  give_turn(lock);
}

void wake(const void* word, int count) {
  Lock lock(machine->mutex);
  keep_order(lock);
  const Costs& costs = machine->costs;
  SimulatedThread& self = me();
  ++machine->counts.futex_wakes;
  self.clock += costs.futex;
  for (const auto& thread : machine->threads) {
    if (count == 0) break;
    if (thread->state != State::kAsleep || thread->word != reinterpret_cast<uintptr_t>(word)) {
      continue;
    }
    --count;
    self.clock += costs.wake;
    ++self.woken;
    ++machine->counts.woken;
    thread->clock = self.clock + costs.wake_latency;
    thread->state = State::kReady;
  }
}

int add_thread() {
  const Lock lock(machine->mutex);
  const size_t id = machine->threads.size();
  if (id >= std::min(kMostThreads, machine->node_of.size())) {
    std::fprintf(stderr, "simulation: the machine has no core for thread %zu\n", id);
    std::abort();
  }
  auto thread = std::make_unique<SimulatedThread>();
  thread->node = machine->node_of[id];
  if (id != 0) thread->clock = me().clock;
  machine->threads.push_back(std::move(thread));
  return static_cast<int>(id);
}

void begin_thread(int thread) {
  current = thread;
  Lock lock(machine->mutex);
  me().turn.wait(lock, [] { return machine->running == current; });
}

void end_thread() {
  Lock lock(machine->mutex);
  me().state = State::kEnded;
  if (me().joined_by >= 0) {
    SimulatedThread& waiting = *machine->threads[me().joined_by];
    waiting.clock = std::max(waiting.clock, me().clock);
    waiting.state = State::kReady;
  }
  give_turn(lock);
}

void join_thread(int thread) {
  Lock lock(machine->mutex);
  if (machine->threads[thread]->state == State::kEnded) {
    me().clock = std::max(me().clock, machine->threads[thread]->clock);
    return;
  }
  machine->threads[thread]->joined_by = current;
  me().word = 0;
  me().state = State::kAsleep;
  give_turn(lock);
}

}  // namespace simulation

void name_line(const void* line, const char* name) {
  if (simulation::machine == nullptr) return;
  const simulation::Lock lock(simulation::machine->mutex);
  simulation::machine->names[simulation::line_of(line)] = name;
}

}  // namespace lk
