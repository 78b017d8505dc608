#include "lk/topology.h"

#include <sched.h>

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <regex>
#include <sstream>
#include <stdexcept>

#include "lk/free_memory.h"

namespace lk {
namespace {

namespace fs = std::filesystem;

std::optional<std::string> read_line(const fs::path& path) {
  std::ifstream file(path);
  std::string line;
  if (!file || !std::getline(file, line)) return std::nullopt;
  return line;
}

// Linux counts no more than 8192 CPUs. Without a bound, a range could take all memory.
constexpr int kMostCpu = 65535;

int parse_number(const std::string& text, const std::string& whole) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 0 || value > kMostCpu) {
    throw std::invalid_argument("not a CPU list: \"" + whole + "\", wanted for example \"0-3,8\"");
  }
  return value;
}

// Groups CPUs by core. A core is identified by its lowest sibling, even if that is not allowed.
std::vector<Core> group_cores(const fs::path& sysfs, const std::vector<int>& cpus) {
  std::map<int, Core> cores;
  for (int cpu : cpus) {
    const fs::path topology =
        sysfs / "devices/system/cpu" / ("cpu" + std::to_string(cpu)) / "topology";
    auto siblings = read_line(topology / "core_cpus_list");
    if (!siblings) siblings = read_line(topology / "thread_siblings_list");  // kernels before 5.3
    const std::vector<int> list = siblings ? parse_cpu_list(*siblings) : std::vector<int>();
    const int key = list.empty() ? cpu : *std::min_element(list.begin(), list.end());
    cores[key].cpus.push_back(cpu);
  }
  std::vector<Core> result;
  for (auto& [key, core] : cores) {
    std::sort(core.cpus.begin(), core.cpus.end());
    result.push_back(std::move(core));
  }
  return result;
}

}  // namespace

int Topology::core_count() const {
  int count = 0;
  for (const Node& node : nodes) count += static_cast<int>(node.cores.size());
  return count;
}

int Topology::cpu_count() const {
  int count = 0;
  for (const Node& node : nodes) {
    for (const Core& core : node.cores) count += static_cast<int>(core.cpus.size());
  }
  return count;
}

std::vector<int> parse_cpu_list(const std::string& text) {
  std::vector<int> cpus;
  std::istringstream parts(text);
  std::string part;
  while (std::getline(parts, part, ',')) {
    const size_t dash = part.find('-');
    const int first = parse_number(part.substr(0, dash), text);
    const int last = dash == std::string::npos ? first : parse_number(part.substr(dash + 1), text);
    if (last < first) parse_number("", text);
    for (int cpu = first; cpu <= last; ++cpu) cpus.push_back(cpu);
  }
  return cpus;
}

std::vector<int> allowed_cpus() {
  // The mask is larger than cpu_set_t with its 1024 CPUs, because sched_getaffinity fails if the
  // kernel's mask is larger than the given one.
  constexpr int kMaxCpus = 8192;
  cpu_set_t* mask = CPU_ALLOC(kMaxCpus);
  const size_t size = CPU_ALLOC_SIZE(kMaxCpus);
  CPU_ZERO_S(size, mask);
  std::vector<int> cpus;
  if (sched_getaffinity(0, size, mask) == 0) {
    for (int cpu = 0; cpu < kMaxCpus; ++cpu) {
      if (CPU_ISSET_S(cpu, size, mask)) cpus.push_back(cpu);
    }
  }
  CPU_FREE(mask);
  if (cpus.empty()) throw std::runtime_error("cannot read this process's CPU affinity");
  return cpus;
}

Topology detect_topology(const std::string& sysfs, const std::vector<int>& allowed) {
  const fs::path root(sysfs);
  Topology topology;
  std::vector<int> left = allowed;
  for (const NodeMemory& node : node_memory(sysfs)) {
    const fs::path path = root / "devices/system/node" / ("node" + std::to_string(node.id));
    std::vector<int> cpus;
    for (int cpu : parse_cpu_list(read_line(path / "cpulist").value_or(""))) {
      const auto found = std::find(left.begin(), left.end(), cpu);
      if (found == left.end()) continue;
      left.erase(found);
      cpus.push_back(cpu);
    }
    topology.nodes.push_back({node.id, group_cores(root, cpus), node.total_bytes});
  }
  if (topology.core_count() == 0) {
    topology.nodes = {{0, group_cores(root, allowed), machine_bytes()}};
  }
  return topology;
}

Topology parse_topology(const std::string& text) {
  static const std::regex form(
      R"(\s*(\d{1,3})\s+nodes?\s*x\s*(\d{1,4}(?:\s*,\s*\d{1,4})*)\s+cores?\s*x\s*(\d)\s+threads?\s*)");
  const auto fail = [&] {
    throw std::invalid_argument(
        "topology \"" + text +
        "\" is not of the form \"2 nodes x 3 cores x 2 threads\" or \"2 nodes "
        "x 3,1 cores x 2 threads\", with at least one core and one thread");
  };
  std::smatch match;
  if (!std::regex_match(text, match, form)) fail();
  const int node_count = std::stoi(match[1]);
  const int threads = std::stoi(match[3]);
  std::vector<int> cores;
  std::istringstream list(match[2]);
  for (std::string item; std::getline(list, item, ',');) cores.push_back(std::stoi(item));
  if (cores.size() == 1) cores.resize(node_count, cores[0]);
  if (static_cast<int>(cores.size()) != node_count || threads < 1) fail();

  Topology topology;
  topology.synthetic = true;
  int cpu = 0;
  for (int id = 0; id < node_count; ++id) {
    Node node{id, {}, 0};
    for (int core = 0; core < cores[id]; ++core) {
      node.cores.emplace_back();
      for (int thread = 0; thread < threads; ++thread) node.cores.back().cpus.push_back(cpu++);
    }
    topology.nodes.push_back(std::move(node));
  }
  if (cpu == 0) fail();
  return topology;
}

Topology restrict_topology(const Topology& topology, const std::vector<int>& cpus) {
  Topology result = topology;
  std::vector<int> missing = cpus;
  for (Node& node : result.nodes) {
    for (Core& core : node.cores) {
      std::erase_if(core.cpus, [&](int cpu) {
        std::erase(missing, cpu);
        return std::find(cpus.begin(), cpus.end(), cpu) == cpus.end();
      });
    }
    std::erase_if(node.cores, [](const Core& core) { return core.cpus.empty(); });
  }
  if (!missing.empty()) {
    throw std::invalid_argument("CPU " + std::to_string(missing.front()) +
                                " is not among the CPUs that this process may use");
  }
  if (result.core_count() == 0) throw std::invalid_argument("the list of CPUs is empty");
  return result;
}

}  // namespace lk
