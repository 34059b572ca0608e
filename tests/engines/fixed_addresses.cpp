// Pools of memory for CPU tensors, as those of CUDA graphs: while a thread uses a pool, its tensors come out of it, and
// what is freed there is used again at once.
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>

namespace {

using Pieces = std::map<char*, size_t>;  // where they begin, and their bytes
struct Pool {
  Pieces free, used;
};

constexpr size_t STEP = 512;
std::map<char*, Pool> pools;  // by where they begin; they stay
std::mutex mutex;             // any thread may free a tensor
thread_local Pool* current = nullptr;
c10::Allocator* before = nullptr;

void join_neighbours(Pieces& pieces) {
  for (auto piece = pieces.begin(); piece != pieces.end();) {
    auto next = std::next(piece);
    if (next != pieces.end() && piece->first + piece->second == next->first) {
      piece->second += next->second;
      pieces.erase(next);
    } else {
      piece = next;
    }
  }
}

void give_back(void* pointer) {
  {
    std::lock_guard<std::mutex> lock(mutex);
    for (auto& [memory, pool] : pools) {
      auto piece = pool.used.find(static_cast<char*>(pointer));
      if (piece != pool.used.end()) {
        pool.free.insert(pool.used.extract(piece));
        join_neighbours(pool.free);
        return;
      }
    }
  }
  before->raw_deleter()(pointer);
}

struct Pooled final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* pointer = current == nullptr || bytes == 0 ? before->raw_allocate(bytes) : take(*current, bytes);
    return {pointer, pointer, &give_back, c10::Device(c10::DeviceType::CPU)};
  }

  // The smallest piece that is large enough.
  static char* take(Pool& pool, size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex);
    bytes = (bytes + STEP - 1) / STEP * STEP;
    auto best = pool.free.end();
    for (auto piece = pool.free.begin(); piece != pool.free.end(); ++piece) {
      if (piece->second >= bytes && (best == pool.free.end() || piece->second < best->second)) best = piece;
    }
    TORCH_CHECK(best != pool.free.end(), "the pool is too small for ", bytes, " more bytes");
    auto [pointer, had] = *best;
    pool.free.erase(best);
    if (had > bytes) pool.free[pointer + bytes] = had - bytes;
    pool.used[pointer] = bytes;
    return pointer;
  }

  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

Pooled pooled;

}  // namespace

extern "C" {

// Where a new pool begins. Its bytes are all ones: no number in any floating-point format.
char* add_pool(size_t bytes) {
  if (before == nullptr) {
    before = c10::GetCPUAllocator();
    c10::SetCPUAllocator(&pooled, /*priority=*/255);
  }
  char* memory = static_cast<char*>(std::aligned_alloc(STEP, bytes));
  std::memset(memory, 0xff, bytes);
  std::lock_guard<std::mutex> lock(mutex);
  pools[memory].free[memory] = bytes;
  return memory;
}

// This thread's tensors come out of that pool from now on; nullptr: out of none.
void use_pool(char* memory) { current = memory == nullptr ? nullptr : &pools.at(memory); }
}
