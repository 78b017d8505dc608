#include "lk/engine.h"

#include <gtest/gtest.h>

#include <stdexcept>
#include <string>

namespace lk {
namespace {

EngineOptions on(const std::string& topology) {
  EngineOptions options;
  options.topology = topology;
  return options;
}

TEST(Configure, RefusesMoreNodesThanTheEngineDividesWorkAmong) {
  configure(on("64 nodes x 1 cores x 1 threads"));
  EXPECT_EQ(engine_info().plan.nodes.size(), 64u);
  try {
    configure(on("65 nodes x 1 cores x 1 threads"));
    ADD_FAILURE();
  } catch (const std::invalid_argument& error) {
    EXPECT_STREQ(error.what(),
                 "the 65 threads are on 65 NUMA nodes, must be on 1 to 64: give the engine fewer "
                 "threads or the CPUs of fewer nodes");
  }
  EXPECT_EQ(engine_info().plan.nodes.size(), 64u);  // nothing has changed
  // Nodes without threads do not count.
  EngineOptions fewer = on("65 nodes x 1 cores x 1 threads");
  fewer.pool.threads = 64;
  configure(fewer);
  EXPECT_EQ(engine_info().plan.nodes.size(), 64u);
  configure({});
}

}  // namespace
}  // namespace lk
