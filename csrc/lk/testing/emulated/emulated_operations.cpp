#include "lk/testing/emulated/operations.h"

namespace lk {

std::span<const Operation> emulated_operations() { return kOperations; }

}  // namespace lk
