#include "lk/testing/emulated/operations.h"

namespace lk {

std::span<const Operation> real_operations() { return kOperations; }

}  // namespace lk
