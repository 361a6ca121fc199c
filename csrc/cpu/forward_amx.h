// The forward pass with AMX: three tiles of keys under way at a time.
//
// The unit that multiplies tiles works beside those of vectors, so that the softmax of one tile is
// done a piece at a time between the products of its neighbours:
//     output += values of tile t - 2   |
//     scores of tile t                 | softmax of tile t - 1
// Scores and what they become, two tiles of them, the output and the queries stay in L1. The output
// is rescaled where a maximum has moved, however little: a row's largest weight is then 1, which
// bfloat16 holds exactly. Letting maxima stay until they have risen by 2^8, as FlashAttention-4
// does, was 5 % faster, and the error of peaked rows grew by a quarter.

// One tile between its scores and the product with its values. Tiles take turns at two of these.
template <typename Real, typename Element>
struct TileUnderWay {
  Real* scores;
  Element* weights;
  Real* scale;
  int64_t key = 0, keys = 0;
  Real factor = 0;
};

// The softmax of a tile in pieces: of a few keys for one vector of rows. Weights are multiplied
// with w.keep if kKeep.
template <bool kKeep, typename Real, typename Element>
class SoftmaxInPieces {
 public:
  SoftmaxInPieces(const ForwardWorkspace<Real, Element>& w, const RowBlock& rows,
                  const TileUnderWay<Real, Element>& tile)
      : w_(w), tile_(tile), lanes_(rows.vectors * kLanes<Real>) {}

  // Does the next piece, if any is left.
  inline __attribute__((always_inline)) void operator()() {
    if (lane_ == lanes_) return;
    if (key_ == kMaximumFirst) {
      begin_vector();
      return;
    }
    const int64_t left = tile_.keys - key_;
    left >= kPiece ? some_keys(kPiece) : some_keys(left);
    if (key_ == tile_.keys) end_vector();
  }
  void finish() {
    while (lane_ < lanes_) (*this)();
  }

 private:
  static constexpr int64_t kPiece = 4, kMaximumFirst = -1;

  void begin_vector() {
    const Vec<Real> before = load(w_.max + lane_);
    const Vec<Real> top = maximum_of_vector<Real>(tile_.keys, tile_.scores + lane_);
    const Vec<Real> after = simd_max<Real>(top * tile_.factor, before);
    softmax_ = RunningSoftmax<Real>(before, after, load(w_.sum + lane_));
    store<Real>(w_.max + lane_, after);
    store<Real>(tile_.scale + lane_, softmax_.scale);
    key_ = 0;
  }
  inline __attribute__((always_inline)) void some_keys(int64_t count) {
    const int64_t index = key_ * kRows<Real> + lane_;
    scores_to_weights<kKeep>(count, tile_.factor, softmax_.shift, tile_.scores + index,
                             w_.keep + index, tile_.weights + index, softmax_.total);
    key_ += count;
  }
  void end_vector() {
    store<Real>(w_.sum + lane_, softmax_.total);
    lane_ += kLanes<Real>;
    key_ = kMaximumFirst;
  }

  const ForwardWorkspace<Real, Element>& w_;
  const TileUnderWay<Real, Element>& tile_;
  int64_t lanes_, lane_ = 0, key_ = kMaximumFirst;
  RunningSoftmax<Real> softmax_;
};

template <typename Real, typename Element>
void rescale_output(const Problem& p, const RowBlock& rows, const Real* scale,
                    const ForwardWorkspace<Real, Element>& w) {
  for (int64_t lane = 0; lane < rows.vectors * kLanes<Real>; lane += kLanes<Real>) {
    const Vec<Real> by = load(scale + lane);
    if (!any(by != Real(1))) continue;
    for (int64_t d = 0; d < p.value_dim; ++d) {
      Real* output = w.output + d * kRows<Real> + lane;
      store<Real>(output, load(output) * by);
    }
  }
}

// All tiles of a range; kKeep with dropout. Returns whether any of them has hidden pairs.
template <typename T, bool kKeep, typename Real, typename Element>
bool tiles_overlapped(const Problem& p, const RowBlock& rows, const KeyRange& range,
                      const PackedColumns<T, Element>& packed, Surroundings around,
                      const ForwardWorkspace<Real, Element>& w) {
  using Tile = TileUnderWay<Real, Element>;
  using Softmax = SoftmaxInPieces<kKeep, Real, Element>;
  Tile tiles[2] = {{w.scores, w.weights, w.scale},
                   {w.next_scores, reinterpret_cast<Element*>(w.next_scores), w.next_scale}};
  const auto softmax_of = [&](const Tile& tile) {
    if (kKeep) dropout_factors(p, rows, tile.key, tile.keys, w.keep);
    return Softmax(w, rows, tile);
  };
  const auto add_values = [&](const Tile& tile, auto& meanwhile) {
    rescale_output(p, rows, tile.scale, w);
    const Element* v = packed.tile(rows, tile.key, tile.keys, w.values);
    multiply<false>(p.value_dim, rows.vectors, (tile.keys + 1) / 2, v, kKeys / 2, tile.weights,
                    2 * kRows<Real>, Into<Real>{w.output, kRows<Real>, true}, meanwhile);
  };
  const auto begin = [&](Tile& tile, TileKind kind, int64_t key, auto& meanwhile) {
    tile.key = key, tile.keys = std::min(kKeys, range.end - key);
    int64_t stride;
    const Element* k = as_block<T>(at<const T>(p.key, rows.batch, rows.key_head, key),
                                   p.key.stride[2], tile.keys, p.head_dim, false, w.keys, &stride);
    Upcoming next = next_entries<Real>(p, rows, key + tile.keys);
    Into<Real> scores{tile.scores, kRows<Real>};
    scores.next = &next;
    multiply<false>(tile.keys, rows.vectors, score_depth<Element>(p), k, stride, w.queries,
                    kRows<Real>, scores, meanwhile);
    tile.factor = finish_scores<Real>(p, rows, kind, key, tile.keys, tile.scores);
  };
  NothingMeanwhile nothing;
  clear_output(p, w);
  bool any_edge = false;
  int64_t count = 0;  // of tiles begun
  for (int64_t key = range.first; key < range.end; key += kKeys) {
    const TileKind kind = classify(p, rows, key, std::min(kKeys, range.end - key));
    if (kind == TileKind::kSkip) continue;
    any_edge |= kind == TileKind::kEdge;
    around.ask();
    Tile& tile = tiles[count % 2];  // and what tile t - 2 left there
    if (count == 0) {
      begin(tile, kind, key, nothing);
    } else {
      Softmax softmax = softmax_of(tiles[(count - 1) % 2]);
      if (count > 1) add_values(tile, softmax);
      begin(tile, kind, key, softmax);
      softmax.finish();
    }
    ++count;
  }
  if (count > 0) {
    Softmax softmax = softmax_of(tiles[(count - 1) % 2]);
    if (count > 1) add_values(tiles[count % 2], softmax);
    softmax.finish();
    add_values(tiles[(count - 1) % 2], nothing);
  }
  return any_edge;
}
