#include "lk/amx_access.h"

#include <cerrno>
#include <system_error>

#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lk {
namespace {

int request_tile_data() {
#if defined(__x86_64__)
  // From Linux's asm/prctl.h and its documentation of XSTATE features: ARCH_REQ_XCOMP_PERM for
  // state component 18. Threads and forked children have what the process has.
  constexpr int kRequestPermission = 0x1023;
  constexpr int kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? 0 : errno;
#else
  return ENOSYS;
#endif
}

}  // namespace

bool cpu_has_amx() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
         __builtin_cpu_supports("amx-bf16");
#else
  return false;
#endif
}

int amx_refusal() {
  static const int error = request_tile_data();
  return error;
}

std::string amx_refused(int error) {
  return "LK_ISA is \"amx\", which this CPU has, but Linux refuses the permission for its tile "
         "registers (" +
         std::generic_category().message(error) + ")";
}

}  // namespace lk
