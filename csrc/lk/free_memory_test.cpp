#include "lk/free_memory.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

namespace lk {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kGib = int64_t{1} << 30;

std::string gib(int64_t count) { return std::to_string(count * kGib); }

// Made-up files of the kernel, in a folder of their own.
class FreeMemory : public testing::Test {
 protected:
  FreeMemory() {
    std::string pattern = (fs::temp_directory_path() / "lk_free_memory_XXXXXX").string();
    root_ = mkdtemp(pattern.data());
    write("proc/meminfo", "MemTotal: 33554432 kB\nMemFree: 1 kB\nMemAvailable: 16777216 kB");
  }
  ~FreeMemory() override { fs::remove_all(root_); }

  void write(const std::string& name, const std::string& text) {
    const fs::path path = root_ / name;
    fs::create_directories(path.parent_path());
    std::ofstream(path) << text << "\n";
  }
  void cgroup_v1(const std::string& path, const std::string& limit, const std::string& usage,
                 const std::string& stat) {
    const std::string folder = "sys/fs/cgroup/memory" + path;
    write(folder + "/memory.limit_in_bytes", limit);
    write(folder + "/memory.usage_in_bytes", usage);
    write(folder + "/memory.stat", stat);
  }
  void cgroup_v2(const std::string& path, const std::string& limit, const std::string& usage,
                 const std::string& stat) {
    const std::string folder = "sys/fs/cgroup" + path;
    write(folder + "/memory.max", limit);
    write(folder + "/memory.current", usage);
    write(folder + "/memory.stat", stat);
  }
  int64_t available() const { return available_bytes(root_.string()); }

  fs::path root_;
};

TEST_F(FreeMemory, WithoutACgroupIsTheMachines) {
  EXPECT_EQ(available(), 16 * kGib);
  write("proc/self/cgroup", "3:cpu:/a\n0::/a");
  EXPECT_EQ(available(), 16 * kGib);
  cgroup_v2("/a", "max", gib(5), "inactive_file 0");
  EXPECT_EQ(available(), 16 * kGib);
}

TEST_F(FreeMemory, OfACgroupCountsItsPageCacheAsFree) {
  write("proc/self/cgroup", "0::/a");
  cgroup_v2("/a", gib(8), gib(7),
            "anon 1\ninactive_file " + gib(3) + "\nactive_file " + gib(1) + "\nslab 5");
  EXPECT_EQ(available(), 5 * kGib);
}

TEST_F(FreeMemory, IsTheLeastOfACgroupAndThoseAboveIt) {
  write("proc/self/cgroup", "0::/a/b");
  cgroup_v2("/a", gib(8), gib(6), "inactive_file 0");
  cgroup_v2("/a/b", gib(8), gib(1), "inactive_file 0");
  EXPECT_EQ(available(), 2 * kGib);
  cgroup_v2("/a/b", gib(2), gib(1), "inactive_file 0");
  EXPECT_EQ(available(), 1 * kGib);
}

// The usage of a version 1 cgroup includes the cgroups below it, but only the names with "total_"
// include their page cache.
TEST_F(FreeMemory, OfAVersion1CgroupCountsThePageCacheOfThoseBelow) {
  write("proc/self/cgroup", "9:memory:/a/b\n3:cpu:/other");
  cgroup_v1("/a", gib(8), gib(7),
            "inactive_file 0\nactive_file 4096\ntotal_inactive_file " + gib(4) +
                "\ntotal_active_file " + gib(1));
  cgroup_v1("/a/b", "9223372036854771712", gib(6),
            "inactive_file " + gib(4) + "\nactive_file " + gib(1) + "\ntotal_inactive_file " +
                gib(4) + "\ntotal_active_file " + gib(1));
  EXPECT_EQ(available(), 6 * kGib);
}

TEST_F(FreeMemory, IsNeverNegative) {
  write("proc/self/cgroup", "0::/a");
  cgroup_v2("/a", gib(2), gib(3), "inactive_file 0");
  EXPECT_EQ(available(), 0);
}

class NodesMemory : public FreeMemory {
 protected:
  void node(int id, const std::string& name, const std::string& text) {
    write("devices/system/node/node" + std::to_string(id) + "/" + name, text);
  }
};

TEST_F(NodesMemory, OfEachNodeByNumber) {
  node(10, "meminfo",
       "Node 10 MemTotal:       100 kB\nNode 10 MemFree:        10 kB\n"
       "Node 10 Active(file):    3 kB\nNode 10 Inactive(file):  4 kB\n"
       "Node 10 Active:         50 kB\nNode 10 SReclaimable:    5 kB\nNode 10 HugePages_Total: 0");
  node(10, "distance", "31 17 10");
  node(0, "meminfo", "Node 0 MemTotal: 200 kB\nNode 0 MemFree: 20 kB");
  node(0, "distance", "10 21 31");
  node(2, "cpulist", "0-3");  // has no memory
  node(2, "distance", "21 10 17");
  write("devices/system/node/nodes", "no node");
  write("devices/system/node/node", "no node");
  write("devices/system/node/has_memory", "0,10");
  const std::vector<NodeMemory> nodes = node_memory(root_.string());
  ASSERT_EQ(nodes.size(), 3u);
  EXPECT_EQ(nodes[0].id, 0);
  EXPECT_EQ(nodes[0].total_bytes, 200 * 1024);
  EXPECT_EQ(nodes[0].free_bytes, 20 * 1024);
  EXPECT_EQ(nodes[0].distances, (std::vector<int>{10, 21, 31}));
  EXPECT_EQ(nodes[1].id, 2);
  EXPECT_EQ(nodes[1].total_bytes, 0);
  EXPECT_EQ(nodes[1].free_bytes, 0);
  EXPECT_EQ(nodes[2].id, 10);
  EXPECT_EQ(nodes[2].free_bytes, 22 * 1024);
  EXPECT_EQ(nodes[2].distances, (std::vector<int>{31, 17, 10}));
}

TEST_F(NodesMemory, WithoutDistancesAndWithoutNodes) {
  EXPECT_TRUE(node_memory(root_.string()).empty());
  node(0, "meminfo", "Node 0 MemTotal: 200 kB");
  node(1, "distance", "10");  // two nodes, but one distance
  const std::vector<NodeMemory> nodes = node_memory(root_.string());
  ASSERT_EQ(nodes.size(), 2u);
  EXPECT_TRUE(nodes[0].distances.empty());
  EXPECT_TRUE(nodes[1].distances.empty());
}

TEST(ThisMachine, HasMemory) {
  EXPECT_GT(machine_bytes(), 0);
  EXPECT_GT(available_bytes(), 0);
  EXPECT_LE(available_bytes(), machine_bytes());
}

}  // namespace
}  // namespace lk
