// Whether the process may use AMX: the CPU must have it, and Linux gives permission for the tile
// registers, whose 8 KiB it saves for each thread.
#pragma once

#include <string>

namespace lk {

// Whether the CPU has AMX with the products of bytes and of bf16, and the system saves its state.
bool cpu_has_amx();

// Asks for permission, once for the process and all its threads. Returns 0, or the error number.
int amx_refusal();

// What choose_kernels says if amx was asked for and permission was refused with `error`.
std::string amx_refused(int error);

}  // namespace lk
