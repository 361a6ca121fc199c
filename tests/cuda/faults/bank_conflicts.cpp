// Prints the bank conflicts of ldmatrix, as the emulator counts them, for each layout of a tile.
//
// A wavefront reads 128 bytes of different banks. Tested by tests/cuda/test_emulator.py.
#include <cstdio>

#include "../../cuda_emulator/emulator.h"

namespace emulator = attn_ext::emulator;

namespace {

// Lane r names the row r of a column of 8 values of 2 bytes, as a load of four 8x8 matrices does.
__global__ void load_column(int row_bytes, bool swizzled) {
  const unsigned row = threadIdx.x;
  const unsigned chunk = swizzled ? row % 8 : 0;
  const void* address = emulator::shared_memory() + row * row_bytes + chunk * 16;
  emulator::warp<char>(address, [](const void* const(&in)[32], char (&out)[32]) {
    emulator::count_bank_conflicts(in, 4);
    for (char& value : out) value = 0;
  });
}

void print(const char* layout, int row_bytes, bool swizzled) {
  emulator::bank_conflicts = {};
  emulator::launch({1}, 32, 32 * 144, load_column, row_bytes, swizzled);
  std::printf("%s %d/%d\n", layout, static_cast<int>(emulator::bank_conflicts.extra_wavefronts),
              static_cast<int>(emulator::bank_conflicts.phases));
}

}  // namespace

int main() {
  print("rows of 128 bytes", 128, false);
  print("swizzled rows of 128 bytes", 128, true);
  print("rows of 64 bytes", 64, false);
  print("rows of 144 bytes", 144, false);
  print("one row for all lanes", 0, false);
}
