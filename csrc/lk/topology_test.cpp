#include "lk/topology.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <numeric>

namespace lk {
namespace {

namespace fs = std::filesystem;

std::string join(const std::vector<int>& values) {
  std::string text;
  for (int value : values) {
    if (!text.empty()) text += ',';
    text += std::to_string(value);
  }
  return text;
}

// A made-up /sys in a folder of its own.
class Sysfs {
 public:
  Sysfs() {
    std::string pattern = (fs::temp_directory_path() / "lk_sysfs_XXXXXX").string();
    root_ = mkdtemp(pattern.data());
  }
  ~Sysfs() { fs::remove_all(root_); }
  std::string path() const { return root_.string(); }

  void node(int id, const std::vector<int>& cpus, int64_t mib = 1024) {
    nodes_.push_back(id);
    write("node/online", join(nodes_));
    const std::string node = "node/node" + std::to_string(id);
    write(node + "/cpulist", join(cpus));
    write(node + "/meminfo", "Node " + std::to_string(id) + " MemFree: 1 kB\nNode " +
                                 std::to_string(id) + " MemTotal: " + std::to_string(mib * 1024) +
                                 " kB");
  }
  void core(const std::vector<int>& cpus, const char* file = "core_cpus_list") {
    for (int cpu : cpus) write("cpu/cpu" + std::to_string(cpu) + "/topology/" + file, join(cpus));
  }

 private:
  void write(const std::string& name, const std::string& text) {
    const fs::path path = root_ / "devices/system" / name;
    fs::create_directories(path.parent_path());
    std::ofstream(path) << text << "\n";
  }

  fs::path root_;
  std::vector<int> nodes_;
};

std::vector<int> range(int begin, int end) {
  std::vector<int> values(end - begin);
  std::iota(values.begin(), values.end(), begin);
  return values;
}

std::vector<std::vector<int>> cores_of(const Node& node) {
  std::vector<std::vector<int>> cores;
  for (const Core& core : node.cores) cores.push_back(core.cpus);
  return cores;
}

using Cores = std::vector<std::vector<int>>;

TEST(CpuList, ReadsRangesAndSingles) {
  EXPECT_EQ(parse_cpu_list("0-3,8,10-11"), (std::vector<int>{0, 1, 2, 3, 8, 10, 11}));
  EXPECT_EQ(parse_cpu_list(""), std::vector<int>());
  for (const char* wrong : {"a", "1-", "-1", "3-1", "1,,2", "1 2", "0-65536", "2147483647"}) {
    EXPECT_THROW(parse_cpu_list(wrong), std::invalid_argument) << wrong;
  }
}

TEST(DetectTopology, OneNodeWithSmt) {
  Sysfs sysfs;
  sysfs.node(0, range(0, 4), 2048);
  sysfs.core({0, 2});
  sysfs.core({1, 3});
  const Topology topology = detect_topology(sysfs.path(), range(0, 4));
  ASSERT_EQ(topology.nodes.size(), 1u);
  EXPECT_EQ(cores_of(topology.nodes[0]), (Cores{{0, 2}, {1, 3}}));
  EXPECT_EQ(topology.nodes[0].memory_bytes, int64_t{2048} << 20);
  EXPECT_EQ(topology.core_count(), 2);
  EXPECT_EQ(topology.cpu_count(), 4);
  EXPECT_FALSE(topology.synthetic);
}

class ManyNodes : public testing::TestWithParam<int> {};

// CPUs are numbered across nodes, as many servers do: node n has CPUs n, n + nodes, ...
TEST_P(ManyNodes, KeepTheirOwnCpus) {
  const int nodes = GetParam();
  Sysfs sysfs;
  for (int n = 0; n < nodes; ++n) {
    sysfs.node(n, {n, n + nodes});
    sysfs.core({n});
    sysfs.core({n + nodes});
  }
  const Topology topology = detect_topology(sysfs.path(), range(0, 2 * nodes));
  ASSERT_EQ(static_cast<int>(topology.nodes.size()), nodes);
  for (int n = 0; n < nodes; ++n) {
    EXPECT_EQ(topology.nodes[n].id, n);
    EXPECT_EQ(cores_of(topology.nodes[n]), (Cores{{n}, {n + nodes}}));
  }
}

INSTANTIATE_TEST_SUITE_P(Counts, ManyNodes, testing::Values(1, 2, 4, 8, 32));

TEST(DetectTopology, UnevenNodesAndGapsInNumbers) {
  Sysfs sysfs;
  sysfs.node(0, {0, 1, 2});
  sysfs.node(4, {7});
  const Topology topology = detect_topology(sysfs.path(), {0, 1, 2, 7});
  ASSERT_EQ(topology.nodes.size(), 2u);
  EXPECT_EQ(topology.nodes[0].cores.size(), 3u);
  EXPECT_EQ(topology.nodes[1].id, 4);
  EXPECT_EQ(cores_of(topology.nodes[1]), (Cores{{7}}));
}

TEST(DetectTopology, CpusetThatCutsCoresInHalfAndDropsANode) {
  Sysfs sysfs;
  sysfs.node(0, {0, 1, 4, 5});
  sysfs.node(1, {2, 3, 6, 7});
  for (int core = 0; core < 4; ++core) sysfs.core({core, core + 4});
  // Core 0 is whole, core 1 has only its second sibling, and node 1 has nothing.
  const Topology topology = detect_topology(sysfs.path(), {0, 4, 5});
  ASSERT_EQ(topology.nodes.size(), 2u);
  EXPECT_EQ(cores_of(topology.nodes[0]), (Cores{{0, 4}, {5}}));
  EXPECT_TRUE(topology.nodes[1].cores.empty());
  EXPECT_GT(topology.nodes[1].memory_bytes, 0);
}

TEST(DetectTopology, MemoryOnlyNode) {
  Sysfs sysfs;
  sysfs.node(0, {0, 1});
  sysfs.node(1, {}, 4096);
  const Topology topology = detect_topology(sysfs.path(), {0, 1});
  ASSERT_EQ(topology.nodes.size(), 2u);
  EXPECT_TRUE(topology.nodes[1].cores.empty());
  EXPECT_EQ(topology.nodes[1].memory_bytes, int64_t{4096} << 20);
}

TEST(DetectTopology, WithoutNumaInformationEverythingIsOneNode) {
  Sysfs sysfs;
  sysfs.core({0, 1}, "thread_siblings_list");  // the name before Linux 5.3
  sysfs.core({2, 3}, "thread_siblings_list");
  const Topology topology = detect_topology(sysfs.path(), range(0, 4));
  ASSERT_EQ(topology.nodes.size(), 1u);
  EXPECT_EQ(cores_of(topology.nodes[0]), (Cores{{0, 1}, {2, 3}}));
}

TEST(DetectTopology, WithoutAnySysfsEachCpuIsACore) {
  const Topology topology = detect_topology("/nonexistent", {3, 5});
  ASSERT_EQ(topology.nodes.size(), 1u);
  EXPECT_EQ(cores_of(topology.nodes[0]), (Cores{{3}, {5}}));
}

TEST(DetectTopology, ThisMachine) {
  const std::vector<int> allowed = allowed_cpus();
  EXPECT_EQ(detect_topology("/sys", allowed).cpu_count(), static_cast<int>(allowed.size()));
}

TEST(ParseTopology, EvenAndUneven) {
  const Topology even = parse_topology("2 nodes x 3 cores x 2 threads");
  EXPECT_TRUE(even.synthetic);
  EXPECT_EQ(cores_of(even.nodes[1]), (Cores{{6, 7}, {8, 9}, {10, 11}}));
  const Topology uneven = parse_topology(" 3 nodes x 2,0,1 cores x 1 thread ");
  EXPECT_EQ(cores_of(uneven.nodes[0]), (Cores{{0}, {1}}));
  EXPECT_TRUE(uneven.nodes[1].cores.empty());
  EXPECT_EQ(cores_of(uneven.nodes[2]), (Cores{{2}}));
  for (const char* wrong : {"", "2 nodes", "2 nodes x 1,2,3 cores x 1 threads",
                            "0 nodes x 1 cores x 1 threads", "1 nodes x 0 cores x 1 threads",
                            "1 nodes x 1 cores x 0 threads", "-1 nodes x 1 cores x 1 threads"}) {
    EXPECT_THROW(parse_topology(wrong), std::invalid_argument) << wrong;
  }
}

TEST(RestrictTopology, KeepsOnlyTheGivenCpus) {
  const Topology machine = parse_topology("2 nodes x 2 cores x 2 threads");
  const Topology part = restrict_topology(machine, {1, 2, 3});
  EXPECT_EQ(cores_of(part.nodes[0]), (Cores{{1}, {2, 3}}));
  EXPECT_TRUE(part.nodes[1].cores.empty());
  EXPECT_THROW(restrict_topology(machine, {8}), std::invalid_argument);
  EXPECT_THROW(restrict_topology(machine, {}), std::invalid_argument);
}

}  // namespace
}  // namespace lk
