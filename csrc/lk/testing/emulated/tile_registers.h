// AMX's tile registers and instructions: palette 1, as Intel's Software Developer's Manual, volume
// 2, defines it, bit by bit. What would raise an exception ends the process with a line that names
// the instruction and the reason. Each thread has registers of its own.
#pragma once

#include <cstdint>

namespace lk::emulated {

void ldtilecfg(const void* config);
void sttilecfg(void* config);
void tilerelease();
void tileloadd(int tile, const void* base, int64_t stride);
void tileloaddt1(int tile, const void* base, int64_t stride);
void tilestored(int tile, void* base, int64_t stride);
void tilezero(int tile);
// c += a * b. The letters say which of a and b are signed.
void tdpbssd(int c, int a, int b);
void tdpbsud(int c, int a, int b);
void tdpbusd(int c, int a, int b);
void tdpbf16ps(int c, int a, int b);

}  // namespace lk::emulated
