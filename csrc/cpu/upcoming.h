// Rows that are read or written before long: asked for a few cache lines at a time while something
// else is computed, so that the latency of memory does not show. A core waits for about two dozen
// lines at most, and stalls if it is to ask for more at once.

class Upcoming {
 public:
  Upcoming() = default;
  // `count` rows of `bytes` bytes each, `stride` bytes apart.
  Upcoming(const void* first, int64_t stride, int64_t bytes, int64_t count)
      : row_(static_cast<const char*>(first)), stride_(stride), bytes_(bytes), rows_(count) {}

  template <bool kToWrite>
  void ask(int64_t lines) {
    for (; lines > 0 && rows_ > 0; --lines) {
      __builtin_prefetch(row_ + offset_, kToWrite, 3);
      offset_ += 64;
      if (offset_ >= bytes_) offset_ = 0, row_ += stride_, --rows_;
    }
  }

 private:
  const char* row_ = nullptr;
  int64_t stride_ = 0, bytes_ = 0, rows_ = 0, offset_ = 0;
};
