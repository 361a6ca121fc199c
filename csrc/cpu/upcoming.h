// Rows that are read or written before long: asked for a cache line at a time while something else
// is computed, so that the latency of memory does not show. A core waits for about two dozen lines
// at most, and stalls if it is to ask for more at once.

class Upcoming {
 public:
  static constexpr int64_t kLine = 64;

  Upcoming() = default;  // `Upcoming()` is none; an array of them is not written
  // `count` rows of `bytes` bytes each, `stride` bytes apart.
  Upcoming(const void* first, int64_t stride, int64_t bytes, int64_t count)
      : first_(static_cast<const char*>(first)),
        stride_(stride),
        bytes_(bytes),
        rows_(count),
        row_(0),
        column_(0),
        in_haste_(false) {
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
  const char* first_;
  int64_t stride_, bytes_, rows_;
  int64_t row_, column_;  // of what is asked for next
  bool in_haste_;
};

// What a product asks for while it runs: the next product's operand, then whatever was added.
struct Ahead {
  Upcoming operand;

  Ahead() : Ahead(Upcoming()) {}
  explicit Ahead(const Upcoming& operand) : operand(operand) {}
  // The same, then what was added to `other`, which forgets what this one has asked for.
  Ahead(const Upcoming& operand, Ahead* other) : operand(operand), other_(other) {}

  void add(const Upcoming& other) {
    if (other.any()) others_[count_++] = other;
  }

  Upcoming::Share share(int64_t steps) {
    // Half a line a step, so each line twice, where nothing else waits and there is no haste: the
    // more evenly they come.
    const bool more = has_others() || (other_ && other_->has_others());
    const bool whole = more || operand.in_haste();
    if (operand.any()) return operand.share(steps, whole ? Upcoming::kLine : Upcoming::kLine / 2);
    return share_of_others(steps);
  }

  // Lines of an operand in haste and of what was added, at once, where no inner loop has room for
  // them.
  void ask(int64_t lines) {
    constexpr int64_t kMostInHaste = 128;  // a tile's values at a head_dim of 128, in two times
    if (operand.in_haste()) operand.ask(kMostInHaste);
    while (lines > 0 && has_others()) {
      lines = others_[next_].ask(lines);
      if (!others_[next_].any()) ++next_;
    }
  }

  // All that has not been asked for.
  void ask_rest() {
    constexpr int64_t kAll = std::numeric_limits<int64_t>::max();
    operand.ask(kAll);
    for (; has_others(); ++next_) others_[next_].ask(kAll);
  }

 private:
  bool has_others() const { return next_ < count_; }

  Upcoming::Share share_of_others(int64_t steps) {
    Ahead& from = has_others() || !other_ ? *this : *other_;
    if (!from.has_others()) return {};
    const Upcoming::Share share = from.others_[from.next_].share(steps, Upcoming::kLine);
    if (!from.others_[from.next_].any()) ++from.next_;
    return share;
  }

  Upcoming others_[6];
  int count_ = 0, next_ = 0;
  Ahead* other_ = nullptr;
};
