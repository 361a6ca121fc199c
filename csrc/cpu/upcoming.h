// Rows that are read or written before long: asked for a cache line at a time while something else
// is computed, so that the latency of memory does not show. A core waits for about two dozen lines
// at most, and stalls if it is to ask for more at once.

class Upcoming {
 public:
  static constexpr int64_t kLine = 64;

  Upcoming() = default;
  // `count` rows of `bytes` bytes each, `stride` bytes apart.
  Upcoming(const void* first, int64_t stride, int64_t bytes, int64_t count)
      : first_(static_cast<const char*>(first)), stride_(stride), bytes_(bytes), rows_(count) {
    if (stride == bytes) bytes_ *= rows_, rows_ = 1;  // one row after the other
  }

  bool any() const { return column_ < bytes_ && rows_ > 0; }

  // Whether memory is what the rows are waited for, because they are read once: then they are asked
  // for as early as can be, stalls or not.
  bool in_haste() const { return in_haste_; }
  Upcoming in_haste(bool value) const {
    Upcoming changed = *this;
    changed.in_haste_ = value;
    return changed;
  }

  // What some steps of an inner loop ask for.
  struct Share {
    const char* place = nullptr;
    int64_t stride = 0, steps = 0;

    inline __attribute__((always_inline)) void ask() {
      __builtin_prefetch(place, 0, 2);  // into the second cache: the first one is in use
      place += stride;
    }
  };

  // What comes next, for up to `steps` steps that get on by `bytes` bytes of a row.
  Share share(int64_t steps, int64_t bytes) {
    Share next{first_ + row_ * stride_ + column_};
    if (rows_ == 1) {  // along the row
      next.stride = bytes, next.steps = std::min(steps, (bytes_ - column_ + bytes - 1) / bytes);
      column_ += next.steps * bytes;
    } else {  // down the rows
      next.stride = stride_, next.steps = std::min(steps, rows_ - row_);
      row_ += next.steps;
      if (row_ == rows_) row_ = 0, column_ += bytes;
    }
    return next;
  }

  // Asks for up to `lines` lines at once; returns how many of these there were no rows for.
  int64_t ask(int64_t lines) {
    while (lines > 0 && any()) {
      Share next = share(lines, kLine);
      for (int64_t i = 0; i < next.steps; ++i) next.ask();
      lines -= next.steps;
    }
    return lines;
  }

 private:
  const char* first_ = nullptr;
  int64_t stride_ = 0, bytes_ = 0, rows_ = 0;
  int64_t row_ = 0, column_ = 0;  // of what is asked for next
  bool in_haste_ = false;
};

// What a product asks for while it runs: the next product's operand, then whatever was added, then
// what was added to another.
struct Ahead {
  Upcoming operand;

  Ahead() : Ahead(Upcoming()) {}
  // `then` is changed by what is asked for and must live as long. Inner loops alone look at it (not
  // AMX's, which have no room for that).
  explicit Ahead(const Upcoming& operand, Ahead* then = nullptr) : operand(operand), then_(then) {}

  void add(const Upcoming& more) {
    if (more.any() && count_ < kMost) added_[count_++] = more;
  }

  Upcoming::Share share(int64_t steps) {
    // Half a line a step, so each line twice, where nothing else waits and there is no haste: the
    // more evenly they come.
    Ahead& from = any_added() || !then_ ? *this : *then_;
    const bool more = from.any_added(), whole = more || operand.in_haste();
    if (operand.any()) return operand.share(steps, whole ? Upcoming::kLine : Upcoming::kLine / 2);
    return more ? from.share_of_added(steps) : Upcoming::Share();
  }

  // Lines of an operand in haste and of what was added, at once, where no inner loop has room for
  // them.
  void ask(int64_t lines) {
    constexpr int64_t kMostInHaste = 128;  // a tile's values at a head_dim of 128, in two times
    if (operand.in_haste()) operand.ask(kMostInHaste);
    while (lines > 0 && any_added()) {
      lines = added_[next_].ask(lines);
      if (!added_[next_].any()) ++next_;
    }
  }

  // All that has not been asked for, stalls or not: what follows would wait for it one by one.
  void ask_rest() {
    constexpr int64_t kAll = std::numeric_limits<int64_t>::max();
    operand.ask(kAll);
    for (; any_added(); ++next_) added_[next_].ask(kAll);
  }

 private:
  static constexpr int kMost = 6;

  bool any_added() const { return next_ < count_; }

  Upcoming::Share share_of_added(int64_t steps) {
    const Upcoming::Share share = added_[next_].share(steps, Upcoming::kLine);
    if (!added_[next_].any()) ++next_;
    return share;
  }

  union {  // written from the first on, as they are added: all at once would show in small tiles
    Upcoming added_[kMost];
  };
  int count_ = 0, next_ = 0;
  Ahead* then_;
};
