#include "lk/amx_access.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <string>
#include <vector>

#include "lk/kernels.h"

namespace lk {
namespace {

// kernels_named("amx") works, or says in one line why not; the list never has more than there is.
TEST(AmxAccess, KernelsAreThereWithPermission) {
  const std::vector<std::string> names = available_kernels();
  const bool there = std::find(names.begin(), names.end(), "amx") != names.end();
  EXPECT_EQ(there, cpu_has_amx() && amx_refusal() == 0);
  EXPECT_NO_THROW(kernels_named(names.back()));
  if (there) return;
  try {
    kernels_named("amx");
    FAIL();
  } catch (const std::invalid_argument& error) {
    const std::string line = error.what();
    EXPECT_NE(line.find(cpu_has_amx() ? amx_refused(amx_refusal()) : "LK_ISA is \"amx\", must be"),
              std::string::npos)
        << line;
    EXPECT_EQ(line.find('\n'), std::string::npos);
  }
}

TEST(AmxAccess, NoPermissionWithoutTheCpu) {
  if (cpu_has_amx()) GTEST_SKIP() << "this CPU has AMX";
  EXPECT_NE(amx_refusal(), 0);
}

TEST(AmxAccess, RefusalTellsTheReason) {
  EXPECT_EQ(amx_refused(EPERM),
            "LK_ISA is \"amx\", which this CPU has, but Linux refuses the permission for its tile "
            "registers (Operation not permitted)");
}

}  // namespace
}  // namespace lk
