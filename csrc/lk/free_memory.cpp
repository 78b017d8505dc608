#include "lk/free_memory.h"

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <fstream>
#include <limits>
#include <map>
#include <sstream>

namespace lk {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kUnlimited = std::numeric_limits<int64_t>::max();

// The sizes in a meminfo file, by name and in bytes. Lines of /proc/meminfo are
// "MemTotal:  24628 kB", those of a node "Node 0 MemTotal:  24628 kB".
std::map<std::string, int64_t> read_meminfo(const fs::path& path) {
  std::map<std::string, int64_t> sizes;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    const size_t colon = line.find(':');
    if (colon == std::string::npos) continue;
    const size_t space = line.rfind(' ', colon);
    const size_t begin = space == std::string::npos ? 0 : space + 1;
    int64_t kib = 0;
    if (std::istringstream(line.substr(colon + 1)) >> kib) {
      sizes[line.substr(begin, colon - begin)] = kib * 1024;
    }
  }
  return sizes;
}

std::string first_word(const std::string& path) {
  std::ifstream file(path);
  std::string word;
  file >> word;
  return word;
}

int64_t number_or(const std::string& word, int64_t otherwise) {
  if (word.empty() || word.find_first_not_of("0123456789") != std::string::npos) return otherwise;
  return std::stoll(word);
}

// The files of the two versions of memory cgroups. The sizes of page cache must include those of
// the cgroups below, as the usage does. In version 1, the names without "total_" do not.
struct CgroupFiles {
  const char* mount;
  const char* limit;
  const char* usage;
  const char* inactive_cache;
  const char* active_cache;
};
constexpr CgroupFiles kVersion1{"/sys/fs/cgroup/memory", "/memory.limit_in_bytes",
                                "/memory.usage_in_bytes", "total_inactive_file",
                                "total_active_file"};
constexpr CgroupFiles kVersion2{"/sys/fs/cgroup", "/memory.max", "/memory.current", "inactive_file",
                                "active_file"};

// Bytes that one memory cgroup can still give, or kUnlimited.
int64_t cgroup_free(const std::string& directory, const CgroupFiles& files) {
  const int64_t limit = number_or(first_word(directory + files.limit), kUnlimited);
  if (limit >= int64_t{1} << 60) return kUnlimited;
  const int64_t usage = number_or(first_word(directory + files.usage), 0);
  int64_t cache = 0;
  std::ifstream stat(directory + "/memory.stat");
  std::string name;
  for (int64_t value = 0; stat >> name >> value;) {
    if (name == files.inactive_cache || name == files.active_cache) cache += value;
  }
  return std::max<int64_t>(0, limit - usage + cache);
}

// The least that a cgroup can give, from this process's cgroup up to the root.
int64_t cgroup_available(const std::string& root) {
  int64_t least = kUnlimited;
  std::ifstream file(root + "/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const size_t first = line.find(':');
    const size_t second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (!controllers.empty() && controllers != "memory") continue;
    const CgroupFiles& files = controllers.empty() ? kVersion2 : kVersion1;
    std::string path = line.substr(second + 1);
    while (true) {
      least = std::min(least, cgroup_free(root + files.mount + (path == "/" ? "" : path), files));
      if (path.empty() || path == "/") break;
      path.resize(path.rfind('/'));
    }
  }
  return least;
}

// The numbers of the nodes that have a folder "node<number>", rising.
std::vector<int> node_ids(const fs::path& folder) {
  std::vector<int> ids;
  std::error_code none;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder, none)) {
    const std::string name = entry.path().filename().string();
    const std::string number = name.substr(std::min<size_t>(4, name.size()));
    int id = 0;
    const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), id);
    if (name.starts_with("node") && error == std::errc() && end == number.data() + number.size()) {
      ids.push_back(id);
    }
  }
  std::sort(ids.begin(), ids.end());
  return ids;
}

}  // namespace

int64_t available_bytes(const std::string& root) {
  const auto sizes = read_meminfo(root + "/proc/meminfo");
  const auto found = sizes.find("MemAvailable");
  return std::min(found == sizes.end() ? kUnlimited : found->second, cgroup_available(root));
}

int64_t machine_bytes() { return read_meminfo("/proc/meminfo")["MemTotal"]; }

std::vector<NodeMemory> node_memory(const std::string& sysfs) {
  const fs::path folder = fs::path(sysfs) / "devices/system/node";
  const std::vector<int> ids = node_ids(folder);
  std::vector<NodeMemory> nodes;
  for (int id : ids) {
    const fs::path path = folder / ("node" + std::to_string(id));
    NodeMemory& node = nodes.emplace_back();
    node.id = id;
    auto sizes = read_meminfo(path / "meminfo");
    node.total_bytes = sizes["MemTotal"];
    // A node has no MemAvailable.
    for (const char* name : {"MemFree", "Active(file)", "Inactive(file)", "SReclaimable"}) {
      node.free_bytes += sizes[name];
    }
    std::ifstream distances(path / "distance");
    for (int distance = 0; distances >> distance;) node.distances.push_back(distance);
    if (node.distances.size() != ids.size()) node.distances.clear();
  }
  return nodes;
}

}  // namespace lk
