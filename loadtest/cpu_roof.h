#ifndef ADAATTN_LOADTEST_CPU_ROOF_H_
#define ADAATTN_LOADTEST_CPU_ROOF_H_

#include <cstdint>

namespace adaattn {

// Runs `iterations` rounds of independent vector FMAs in registers on the calling thread and
// returns the floating point operations done (two an FMA and lane). `sink` keeps the compiler
// honest.
int64_t RunFmaRounds(int64_t iterations, float* sink);

}  // namespace adaattn

#endif  // ADAATTN_LOADTEST_CPU_ROOF_H_
