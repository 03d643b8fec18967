// True where this build fuses multiplications with additions, which vector.h takes for granted if the machine can.
#pragma once

namespace kdk {
namespace baseline {
bool contracts();
}
namespace avx2 {
bool contracts();
}
namespace avx512 {
bool contracts();
}
}  // namespace kdk
