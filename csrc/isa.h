// The instruction sets that the inner loops are compiled for, and which of them this process uses.
#pragma once

namespace s5eqx {

enum class Isa { kGeneric, kV3, kV4 };  // plain; x86-64-v3: AVX2 and FMA; x86-64-v4: AVX-512

Isa isa();

// Its name: "x86-64-v4", "x86-64-v3" or "generic".
const char* instruction_set();

// Of the tables `name_generic`, `name_v3` and `name_v4`, the one in use.
#if defined(S5EQX_X86)
#define S5EQX_OF_ISA(name) (isa() == Isa::kV4 ? name##_v4 : isa() == Isa::kV3 ? name##_v3 : name##_generic)
#else
#define S5EQX_OF_ISA(name) name##_generic
#endif

}  // namespace s5eqx
