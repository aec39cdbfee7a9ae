#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace s5eqx {
namespace {

constexpr const char* kNames[] = {"generic", "x86-64-v3", "x86-64-v4"};

bool has(Isa which) {
#if defined(S5EQX_X86)
  if (which == Isa::kV4)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  if (which == Isa::kV3)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#endif
  return which == Isa::kGeneric;
}

Isa best() {
  const char* wish = std::getenv("S5EQX_CPU_ISA");  // for tests: the name of a lesser instruction set
  for (const Isa which : {Isa::kV4, Isa::kV3})
    if (has(which) && (!wish || std::strcmp(wish, kNames[static_cast<int>(which)]) == 0)) return which;
  return Isa::kGeneric;
}

}  // namespace

Isa isa() {
  static const Isa chosen = best();
  return chosen;
}

const char* instruction_set() { return kNames[static_cast<int>(isa())]; }

}  // namespace s5eqx
