// Vectors of one instruction set: GCC's vector types, and the few intrinsics that they lack.
//
// Included inside a namespace of the instruction set, after ATTN_EXT_VECTOR_BYTES (64, 32 or 16) is
// defined and `#pragma GCC target` is in force. No include guard: every instruction set gets its
// own copy.

constexpr int kVectorBytes = ATTN_EXT_VECTOR_BYTES;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
// Two neighbours along the summed dimension, the first in the low half: what one lane of a
// bfloat16 product takes. Aligned as its halves are, since rows are read as pairs where they lie.
struct BFloat16Pair {
  typedef uint32_t Bits __attribute__((aligned(2)));
  Bits bits;
};
static_assert(alignof(BFloat16Pair) == alignof(BFloat16) && sizeof(BFloat16Pair) == 4, "a pair");

template <typename Real>
struct Simd;

template <>
struct Simd<float> {
  using Int = int32_t;
  static constexpr int kMantissaBits = 23, kBias = 127;
  static constexpr float kRoundToInt = 12582912.0f;  // 1.5 * 2^23
  static constexpr float kExp2[] = {0.69314720285873210f,   0.24022647913122761f,
                                    0.055503324653332853f,  0.0096184373909533050f,
                                    0.0013398876242775026f, 0.00015353357278624635f};
};

template <>
struct Simd<double> {
  using Int = int64_t;
  static constexpr int kMantissaBits = 52, kBias = 1023;
  static constexpr double kRoundToInt = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kExp2[] = {
      0.69314718055994530841,    0.24022650695910071468,    0.055504108664821694667,
      0.0096181291076283482567,  0.0013333558146391323655,  0.00015403530393610069592,
      1.5252733855404498683e-05, 1.3215486617632906909e-06, 1.0178051548954344226e-07,
      7.0549666700349754407e-09, 4.4566235127964573139e-10, 2.563554075797703016e-11};
};

template <typename Real>
struct VecOf {
  typedef Real Type __attribute__((vector_size(kVectorBytes)));
  typedef Real Unaligned
      __attribute__((vector_size(kVectorBytes), aligned(sizeof(Real)), may_alias));
  typedef typename Simd<Real>::Int IntType __attribute__((vector_size(kVectorBytes)));
};
template <typename Real>
using Vec = typename VecOf<Real>::Type;
template <typename Real>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(Real));

template <typename Real>
inline Vec<Real> load(const Real* p) {
  return *reinterpret_cast<const typename VecOf<Real>::Unaligned*>(p);
}
template <typename Real>
inline void store(Real* p, Vec<Real> x) {
  *reinterpret_cast<typename VecOf<Real>::Unaligned*>(p) = x;
}
template <typename Real>
inline Vec<Real> broadcast(Real x) {
  return x - Vec<Real>{};  // x - 0 keeps -0, NaN and inf
}
template <typename Real>
inline Vec<Real> lane_index() {
  Vec<Real> index{};
  for (int lane = 0; lane < kLanes<Real>; ++lane) index[lane] = static_cast<Real>(lane);
  return index;
}

// If either is NaN the result is b, as x86's maximum instruction has it.
template <typename Real>
inline Vec<Real> simd_max(Vec<Real> a, Vec<Real> b) {
#if defined(__x86_64__) && ATTN_EXT_VECTOR_BYTES == 64
  if constexpr (sizeof(Real) == 4) return (Vec<Real>)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__x86_64__) && ATTN_EXT_VECTOR_BYTES == 32
  if constexpr (sizeof(Real) == 4) return (Vec<Real>)_mm256_max_ps((__m256)a, (__m256)b);
#endif
  return a > b ? a : b;
}

// Whether the sign bit is set in any lane: of a comparison, whether it holds in any.
template <typename Int>
inline bool any(Int mask) {
#if defined(__x86_64__) && ATTN_EXT_VECTOR_BYTES == 64
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__x86_64__) && ATTN_EXT_VECTOR_BYTES == 32
  return _mm256_movemask_epi8((__m256i)mask) != 0;
#else
  bool found = false;
  for (size_t lane = 0; lane < sizeof(Int) / sizeof(mask[0]); ++lane) found |= mask[lane] != 0;
  return found;
#endif
}

// 2^x = 2^n (1 + f q(f)), q being the polynomial of these coefficients: 2^n, f and q(f) are given
// back. For |x| up to 2^20.
template <typename Real, int kTerms>
inline void split_exp2(Vec<Real> x, const Real (&terms)[kTerms], Vec<Real>* power, Vec<Real>* f,
                       Vec<Real>* q) {
  using S = Simd<Real>;
  using IntVec = typename VecOf<Real>::IntType;
  const Real magic = S::kRoundToInt + static_cast<Real>(S::kBias);
  const Vec<Real> shifted = x + magic;  // low bits: n + bias
  *power = reinterpret_cast<Vec<Real>>(reinterpret_cast<IntVec>(shifted) << S::kMantissaBits);
  *f = x - (shifted - magic);
  Vec<Real> sum = broadcast(terms[kTerms - 1]);
#pragma GCC unroll 16
  for (int i = kTerms - 2; i >= 0; --i) sum = sum * *f + terms[i];
  *q = sum;
}

// 0 where the result would be well below the smallest normal number; NaN stays NaN. For x up to 1.
template <typename Real, int kTerms>
inline Vec<Real> exp2_by(Vec<Real> x, const Real (&terms)[kTerms]) {
  const Vec<Real> lowest = broadcast(static_cast<Real>(-Simd<Real>::kBias));  // its power is 0
  Vec<Real> power, f, q;
  split_exp2<Real>(simd_max<Real>(lowest, x), terms, &power, &f, &q);
  return (f * q + Real(1)) * power;
}

#if defined(__x86_64__) && ATTN_EXT_VECTOR_BYTES == 64
template <typename Real>
constexpr bool kExp2TakesAny = sizeof(Real) == 4;

// 2^(i / 16), and what rounding took from it, relative to it.
struct Exp2Sixteenths {
  alignas(kVectorBytes) float power[16] = {};
  alignas(kVectorBytes) float rest[16] = {};

  constexpr Exp2Sixteenths() {
    double exact = 1;
    for (int i = 0; i < 16; ++i, exact *= 1.0442737824274138403) {  // 2^(1 / 16)
      power[i] = static_cast<float>(exact);
      rest[i] = static_cast<float>((exact - power[i]) / power[i]);
    }
  }
};
constexpr Exp2Sixteenths kExp2Sixteenths;

// exp2 of any x but inf from a table: relative error below 2e-9 plus rounding, 0 below the smallest
// normal number, inf where it overflows. Of eleven instructions four multiply: on Zen 5 the others
// have units of their own, beside the two that matrix products fill. vreduceps would be both the
// rounding and the subtraction, and takes both units of additions for as long.
inline Vec<float> exp2_by_sixteenths(Vec<float> x) {
  const __m512 wide = (__m512)x;
  const __m512 nearest = _mm512_roundscale_ps(wide, 4 << 4), f = _mm512_sub_ps(wide, nearest);
  const __m512i sixteenths = (__m512i)(x + 786432.0f);  // 1.5 * 2^19: low bits are 16 x, rounded
  const __m512 power = _mm512_permutexvar_ps(sixteenths, _mm512_load_ps(kExp2Sixteenths.power));
  const __m512 rest = _mm512_permutexvar_ps(sixteenths, _mm512_load_ps(kExp2Sixteenths.rest));
  __m512 q = _mm512_fmadd_ps(f, _mm512_set1_ps(0.05550213649f), _mm512_set1_ps(0.240234288f));
  q = _mm512_fmadd_ps(f, q, _mm512_set1_ps(0.6931471827f));
  q = _mm512_fmadd_ps(_mm512_fmadd_ps(f, q, rest), power, power);
  const __mmask16 normal = _mm512_cmp_ps_mask(wide, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (Vec<float>)_mm512_maskz_scalef_ps(normal, q, nearest);
}
#else
template <typename Real>
constexpr bool kExp2TakesAny = false;
#endif

// Relative error below 2e-9 plus rounding (float), 1e-16 (double). For x up to 1, or any if
// kExp2TakesAny.
template <typename Real>
inline Vec<Real> exp2(Vec<Real> x) {
  if constexpr (kExp2TakesAny<Real>) {
    return exp2_by_sixteenths(x);
  } else {
    return exp2_by<Real>(x, Simd<Real>::kExp2);
  }
}

// The same for any x: inf where the result overflows.
template <typename Real>
inline Vec<Real> exp2_of_any(Vec<Real> x) {
  if constexpr (!kExp2TakesAny<Real>) {
    const Real highest = static_cast<Real>(Simd<Real>::kBias + 1);
    x = x > highest ? broadcast(highest) : x;
  }
  return exp2<Real>(x);
}

// tanh through expm1, accurate for small x too: expm1(2x) = (2^n - 1) + 2^n f q(f).
template <typename Real>
inline Vec<Real> tanh(Vec<Real> x) {
  const Real limit = sizeof(Real) == 4 ? Real(10) : Real(20);
  Vec<Real> clamped = x > limit ? broadcast(limit) : x;
  clamped = clamped < -limit ? broadcast(-limit) : clamped;
  Vec<Real> power, f, q;
  split_exp2<Real>(clamped * Real(2.8853900817779268147), Simd<Real>::kExp2, &power, &f, &q);
  const Vec<Real> expm1 = power * (f * q) + (power - Real(1));
  return expm1 / (expm1 + Real(2));
}

// --- 32-bit words, and those of Philox, one in 64 bits

typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint64_t WideWords __attribute__((vector_size(kVectorBytes)));
constexpr int kWordLanes = kVectorBytes / 4;

// Products of 64 bits of each lane's low word with a constant, whatever the high word is.
inline WideWords multiply_words(WideWords a, uint32_t constant) {
#if defined(__x86_64__) && ATTN_EXT_VECTOR_BYTES == 64
  return (WideWords)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(constant));
#elif defined(__x86_64__) && ATTN_EXT_VECTOR_BYTES == 32
  return (WideWords)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(constant));
#elif defined(__x86_64__)
  return (WideWords)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(constant));
#else
  return (a & 0xFFFFFFFFull) * static_cast<uint64_t>(constant);
#endif
}

// --- Conversions between storage types and the compute type

inline float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
inline float to_float(Float16 x) {
#if defined(__x86_64__) && ATTN_EXT_VECTOR_BYTES > 16
  return _cvtsh_ss(x.bits);
#elif defined(__aarch64__)
  __fp16 half;
  std::memcpy(&half, &x, 2);
  return half;
#else
  // Shift exponent and mantissa into place, then let a product fix the bias, subnormals included.
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7FFF) << 13;
  float result;
  std::memcpy(&result, &magnitude, 4);
  result *= 5.192296858534828e33f;  // 2^112
  uint32_t bits;
  std::memcpy(&bits, &result, 4);
  if ((x.bits & 0x7C00) == 0x7C00) bits = 0x7F800000u | magnitude;  // inf and NaN
  bits |= static_cast<uint32_t>(x.bits & 0x8000) << 16;
  std::memcpy(&result, &bits, 4);
  return result;
#endif
}
inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }

#if !defined(__x86_64__) || ATTN_EXT_VECTOR_BYTES == 16
inline Float16 to_half(float x) {
#ifdef __aarch64__
  const __fp16 nearest = x;
  Float16 result;
  std::memcpy(&result, &nearest, 2);
  return result;
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7FFFFFFF;
  uint32_t half;
  if (magnitude > 0x7F800000u) {
    half = 0x7E00;
  } else if (magnitude >= 0x477FF000u) {  // rounds to 65536 or more
    half = 0x7C00;
  } else if (magnitude < 0x38800000u) {  // subnormal: let an addition round it
    float value;
    std::memcpy(&value, &magnitude, 4);
    value += 0.5f;
    std::memcpy(&half, &value, 4);
    half -= 0x3F000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
#endif
}
#endif

// --- Vectors of which the first `count` items exist, the rest being 0

// Fewer than 2 * kChunk bytes.
template <int kChunk>
inline void copy_by_halves(char* to, const char* from, int64_t bytes) {
  if (bytes & kChunk) {
    std::memcpy(to, from, kChunk);
    to += kChunk, from += kChunk;
  }
  if constexpr (kChunk > 1) copy_by_halves<kChunk / 2>(to, from, bytes);
}

// The mask of the first `count` lanes of fewer than 32.
inline uint32_t first_lanes(int64_t count) { return (1u << std::max<int64_t>(count, 0)) - 1; }

// No item beyond them is touched. There may be more than the vector holds.
template <typename Vector, typename Item>
inline Vector load_items(const Item* p, int64_t count = sizeof(Vector) / sizeof(Item)) {
  constexpr int64_t kItems = sizeof(Vector) / sizeof(Item);
  Vector x{};
  if (count >= kItems) {
    std::memcpy(&x, p, sizeof(x));
    return x;
  }
#if defined(__x86_64__) && ATTN_EXT_VECTOR_BYTES == 64
  constexpr int kBytes = sizeof(Vector), kSize = sizeof(Item);
  const uint32_t lanes = first_lanes(count);
  if constexpr (kBytes == 64 && kSize == 8) return (Vector)_mm512_maskz_loadu_epi64(lanes, p);
  if constexpr (kBytes == 64 && kSize == 4) return (Vector)_mm512_maskz_loadu_epi32(lanes, p);
  if constexpr (kBytes == 64 && kSize == 2) return (Vector)_mm512_maskz_loadu_epi16(lanes, p);
  if constexpr (kBytes == 32 && kSize == 2) return (Vector)_mm256_maskz_loadu_epi16(lanes, p);
  if constexpr (kBytes == 16 && kSize == 1) return (Vector)_mm_maskz_loadu_epi8(lanes, p);
#endif
  if (count > 0) {
    copy_by_halves<kVectorBytes / 2>(reinterpret_cast<char*>(&x), reinterpret_cast<const char*>(p),
                                     count * static_cast<int64_t>(sizeof(Item)));
  }
  return x;
}
template <typename Vector, typename Item>
inline void store_items(Item* p, Vector x, int64_t count) {
  constexpr int64_t kItems = sizeof(Vector) / sizeof(Item);
  if (count >= kItems) {
    std::memcpy(p, &x, sizeof(x));
    return;
  }
#if defined(__x86_64__) && ATTN_EXT_VECTOR_BYTES == 64
  constexpr int kBytes = sizeof(Vector), kSize = sizeof(Item);
  const uint32_t lanes = first_lanes(count);
  if constexpr (kBytes == 64 && kSize == 8) {
    return _mm512_mask_storeu_epi64(p, lanes, (__m512i)x);
  }
  if constexpr (kBytes == 64 && kSize == 4) {
    return _mm512_mask_storeu_epi32(p, lanes, (__m512i)x);
  }
  if constexpr (kBytes == 32 && kSize == 2) {
    return _mm256_mask_storeu_epi16(p, lanes, (__m256i)x);
  }
#endif
  if (count > 0) {
    copy_by_halves<kVectorBytes / 2>(reinterpret_cast<char*>(p), reinterpret_cast<const char*>(&x),
                                     count * static_cast<int64_t>(sizeof(Item)));
  }
}

// --- The same of the storage types, converted

typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

inline Vec<float> load_some(const float* p, int64_t count) {
  return load_items<Vec<float>>(p, count);
}
inline Vec<double> load_some(const double* p, int64_t count) {
  return load_items<Vec<double>>(p, count);
}
inline Vec<float> load_some(const BFloat16* p, int64_t count) {
  const Halves bits = load_items<Halves>(p, count);
#if defined(__x86_64__) && ATTN_EXT_VECTOR_BYTES == 64  // which GCC 12 would widen in two halves
  return reinterpret_cast<Vec<float>>((Words)_mm512_cvtepu16_epi32((__m256i)bits) << 16);
#else
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(bits, Words) << 16);
#endif
}
inline Vec<float> load_some(const Float16* p, int64_t count) {
  const Halves bits = load_items<Halves>(p, count);
#if defined(__x86_64__) && ATTN_EXT_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__x86_64__) && ATTN_EXT_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_cvtph_ps((__m128i)bits);
#else
  Vec<float> x;
  for (int lane = 0; lane < kLanes<float>; ++lane) x[lane] = to_float(Float16{bits[lane]});
  return x;
#endif
}

inline void store_some(float* p, Vec<float> x, int64_t count) { store_items(p, x, count); }
inline void store_some(double* p, Vec<double> x, int64_t count) { store_items(p, x, count); }
inline void store_some(BFloat16* p, Vec<float> x, int64_t count) {
#ifdef ATTN_EXT_BFLOAT16_PRODUCTS
  store_items(p, (Halves)_mm512_cvtneps_pbh((__m512)x), count);
#else
  const Words bits = reinterpret_cast<Words>(x);
  const Words nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // ties to even
  const Words rounded = x != x ? Words{} + 0x7FC0 : nearest;
  store_items(p, __builtin_convertvector(rounded, Halves), count);
#endif
}
inline void store_some(Float16* p, Vec<float> x, int64_t count) {
#if defined(__x86_64__) && ATTN_EXT_VECTOR_BYTES == 64
  store_items(p, (Halves)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT), count);
#elif defined(__x86_64__) && ATTN_EXT_VECTOR_BYTES == 32
  store_items(p, (Halves)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT), count);
#else
  Halves bits;
  for (int lane = 0; lane < kLanes<float>; ++lane) bits[lane] = to_half(x[lane]).bits;
  store_items(p, bits, count);
#endif
}

// One byte a lane, and as integers: widened step by step, GCC 12 would convert lane by lane.
template <typename Integer, int kCount>
struct IntegersOf {
  typedef Integer Type __attribute__((vector_size(sizeof(Integer) * kCount)));
};
template <typename Real>
using Bytes = typename IntegersOf<uint8_t, kLanes<Real>>::Type;
template <typename Real>
inline typename VecOf<Real>::IntType widen(Bytes<Real> bytes) {
#if defined(__x86_64__) && ATTN_EXT_VECTOR_BYTES == 64
  if constexpr (sizeof(Real) == 4) {
    return (typename VecOf<Real>::IntType)_mm512_cvtepu8_epi32((__m128i)bytes);
  }
#endif
  using Shorts = typename IntegersOf<uint16_t, kLanes<Real>>::Type;
  using Longs = typename IntegersOf<uint32_t, kLanes<Real>>::Type;
  const Longs longs = __builtin_convertvector(__builtin_convertvector(bytes, Shorts), Longs);
  return __builtin_convertvector(longs, typename VecOf<Real>::IntType);
}

// A byte a lane, in 32 bits.
template <typename Real>
using Bytes32 = typename IntegersOf<int32_t, kLanes<Real>>::Type;
// x where a >= b, else 0.
template <typename Real>
inline Vec<Real> where_not_below(Bytes32<Real> a, Bytes32<Real> b, Real x) {
  if constexpr (sizeof(Real) == 4) {
    return a >= b ? broadcast(x) : Vec<Real>{};
  } else {
    return __builtin_convertvector(a >= b, typename VecOf<Real>::IntType) ? broadcast(x)
                                                                          : Vec<Real>{};
  }
}

typedef float HalfOfFloats __attribute__((vector_size(kVectorBytes / 2)));
// kLanes<double> lanes of floats from lane kFirst on, as doubles.
template <int kFirst, int... kLane>
inline Vec<double> some_as_doubles(Vec<float> x, std::integer_sequence<int, kLane...>) {
  const HalfOfFloats half = __builtin_shufflevector(x, x, (kFirst + kLane)...);
#if defined(__x86_64__) && ATTN_EXT_VECTOR_BYTES == 64  // as load_as
  return (Vec<double>)_mm512_cvtps_pd((__m256)half);
#else
  return __builtin_convertvector(half, Vec<double>);
#endif
}
inline double sum_of_lanes(Vec<double> x) {
#if defined(__x86_64__) && ATTN_EXT_VECTOR_BYTES == 64
  return _mm512_reduce_add_pd((__m512d)x);
#else
  double sum = 0;
  for (int lane = 0; lane < kLanes<double>; ++lane) sum += x[lane];
  return sum;
#endif
}

template <typename T>
inline double dot_in_double(const T* a, const T* b, int64_t count) {
  constexpr int kHalf = kLanes<double>;
  constexpr auto kLaneNumbers = std::make_integer_sequence<int, kHalf>{};
  Vec<double> low{}, high{};
  if constexpr (!std::is_same_v<T, double>) {
    for (int64_t i = 0; i < count; i += 2 * kHalf) {
      const Vec<float> x = load_some(a + i, count - i), y = load_some(b + i, count - i);
      if constexpr (sizeof(T) == 2) {  // products of halves are floats
        const Vec<float> product = x * y;
        low += some_as_doubles<0>(product, kLaneNumbers);
        high += some_as_doubles<kHalf>(product, kLaneNumbers);
      } else {
        low += some_as_doubles<0>(x, kLaneNumbers) * some_as_doubles<0>(y, kLaneNumbers);
        high += some_as_doubles<kHalf>(x, kLaneNumbers) * some_as_doubles<kHalf>(y, kLaneNumbers);
      }
    }
  } else {
    for (int64_t i = 0; i < count; i += kHalf) {
      low += load_some(a + i, count - i) * load_some(b + i, count - i);
    }
  }
  return sum_of_lanes(low + high);
}

// --- Transposition of a square of vectors, in log2(lanes) rounds

// Lanes of a and b in turns within each kQuarter lanes: of their low or high halves.
template <typename V, int kCount, int kQuarter, bool kHigh, int... kLane>
inline V interleave_quarters(V a, V b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b,
                                 (kLane / kQuarter * kQuarter + kLane % 2 * kCount +
                                  kLane % kQuarter / 2 + (kHigh ? kQuarter / 2 : 0))...);
}

template <typename V, int kCount, bool kHigh, int... kLane>
inline V interleave(V a, V b, std::integer_sequence<int, kLane...> lanes) {
  return interleave_quarters<V, kCount, kCount, kHigh>(a, b, lanes);
}

// Every second 128 bits of a, then of b: the even or the odd ones.
template <typename V, int kCount, int kQuarter, bool kOdd, int... kLane>
inline V every_second_quarter(V a, V b, std::integer_sequence<int, kLane...>) {
  constexpr int kHalf = kCount / 2;
  return __builtin_shufflevector(
      a, b,
      (kLane / kHalf * kCount + (kLane % kHalf / kQuarter * 2 + kOdd) * kQuarter +
       kLane % kQuarter)...);
}

// Of rows[i], lane j becomes lane i of rows[j]. Each round takes pairs of rows and exchanges one
// bit of the row's number with one of the lane's: first those within 128 bits, then the others. All
// are shuffles that processors have an instruction for, without an index in a register.
template <int kW, typename V>
inline __attribute__((always_inline)) void transpose_square(V* rows) {
  constexpr int kQuarter = std::min<int>(kW, 16 / (sizeof(V) / kW));
  constexpr auto kLaneNumbers = std::make_integer_sequence<int, kW>{};
#pragma GCC unroll 4
  for (int bit = kQuarter / 2; bit > 0; bit /= 2) {
#pragma GCC unroll 16
    for (int pair = 0; pair < kW / 2; ++pair) {
      const int i = pair / bit * 2 * bit + pair % bit;
      const V a = rows[i], b = rows[i + bit];
      rows[i] = interleave_quarters<V, kW, kQuarter, false>(a, b, kLaneNumbers);
      rows[i + bit] = interleave_quarters<V, kW, kQuarter, true>(a, b, kLaneNumbers);
    }
  }
  if constexpr (kQuarter < kW) {
#pragma GCC unroll 4
    for (int bit = kQuarter; bit < kW; bit *= 2) {
#pragma GCC unroll 16
      for (int pair = 0; pair < kW / 2; ++pair) {
        const int i = pair / bit * 2 * bit + pair % bit;
        const V a = rows[i], b = rows[i + bit];
        rows[i] = every_second_quarter<V, kW, kQuarter, false>(a, b, kLaneNumbers);
        rows[i + bit] = every_second_quarter<V, kW, kQuarter, true>(a, b, kLaneNumbers);
      }
    }
  }
}
template <typename Real>
inline __attribute__((always_inline)) void transpose(Vec<Real>* rows) {
  transpose_square<kLanes<Real>>(rows);
}

// Of rows[i], the sum of all lanes becomes lane i of the result.
template <typename Real>
inline __attribute__((always_inline)) Vec<Real> sums_of_lanes(Vec<Real>* rows) {
  constexpr int kW = kLanes<Real>;
  constexpr auto kLaneNumbers = std::make_integer_sequence<int, kW>{};
#pragma GCC unroll 4
  for (int half = kW / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      const Vec<Real> a = rows[i], b = rows[i + half];
      rows[i] = interleave<Vec<Real>, kW, false>(a, b, kLaneNumbers) +
                interleave<Vec<Real>, kW, true>(a, b, kLaneNumbers);
    }
  }
  return rows[0];
}

// --- Products of packed operands: float and double by fused multiply-add, bfloat16 in pairs

template <typename Element>
constexpr int kDepth = 1;  // values along the summed dimension that one element holds
template <>
constexpr int kDepth<BFloat16Pair> = 2;

// Of numbers that are sums of two bfloat16, a pair of either summand: see planes.h.
struct PlanePair {
  uint32_t bits;
};
template <>
constexpr int kDepth<PlanePair> = 2;
template <typename Element>
constexpr bool kInPlanes = std::is_same_v<Element, PlanePair>;

template <typename Element>
struct PackedOf {
  using Real = Element;
  using Type = Vec<Element>;
};
template <>
struct PackedOf<BFloat16Pair> {
  using Real = float;
  using Type = Words;
};
template <>
struct PackedOf<PlanePair> : PackedOf<BFloat16Pair> {};

// 2^x as accurate as operands of bfloat16 products need it; also which results are not 0.
template <typename Element>
struct RoughExp2;

#ifdef ATTN_EXT_BFLOAT16_PRODUCTS
// The bits of 2^(i / 32), less i << 18: to which 32 times the exponent, with i as its low bits, is
// added once shifted by 18.
struct Exp2Steps {
  alignas(kVectorBytes) uint32_t bits[32] = {};

  constexpr Exp2Steps() {
    double step = 1;
    for (uint32_t i = 0; i < 32; ++i, step *= 1.0218971486541166782) {  // 2^(1 / 32)
      const uint32_t mantissa = static_cast<uint32_t>((step - 1) * (1 << 23) + 0.5);
      bits[i] = 0x3F800000u + mantissa - (i << 18);
    }
  }
};
constexpr Exp2Steps kExp2Steps;

// From a table, with a relative error below 2e-7: four of twelve instructions multiply. While AMX
// multiplies tiles only one of two units works on vectors (measured on Emerald Rapids), and this
// leaves six instructions to it.
struct RoughExp2OfPairs {
  Vec<float> power;
  __mmask16 normal;

  // 0 for numbers below `least`.
  RoughExp2OfPairs(Vec<float> x, float least) {
    const __m512 wide = (__m512)x;
    const Vec<float> shifted = x + 393216.0f;  // 1.5 * 2^18: low bits are 32 x, rounded
    const Vec<float> rest = (Vec<float>)_mm512_reduce_ps(wide, 5 << 4);  // x without them
    const __m512i step =
        _mm512_permutex2var_epi32(_mm512_load_si512(kExp2Steps.bits), (__m512i)shifted,
                                  _mm512_load_si512(kExp2Steps.bits + 16));
    normal = _mm512_cmp_ps_mask(wide, _mm512_set1_ps(least), _CMP_NLT_UQ);
    const Vec<float> whole =
        (Vec<float>)_mm512_maskz_add_epi32(normal, step, _mm512_slli_epi32((__m512i)shifted, 18));
    power = whole * rest * (rest * 0.24022651f + 0.69315734f) + whole;
  }
  // power * y, but 0 where power is, whatever y.
  Vec<float> times(Vec<float> y) const {
    return (Vec<float>)_mm512_maskz_mul_ps(normal, (__m512)power, (__m512)y);
  }
};
template <>
struct RoughExp2<BFloat16Pair> : RoughExp2OfPairs {
  explicit RoughExp2(Vec<float> x) : RoughExp2OfPairs(x, -126) {}
};
// What a weight's first plane leaves is then a normal number, or 0.
template <>
struct RoughExp2<PlanePair> : RoughExp2OfPairs {
  explicit RoughExp2(Vec<float> x) : RoughExp2OfPairs(x, -100) {}
};
#endif

// exp2 as accurate as what is made of it.
template <typename Element>
inline Vec<typename PackedOf<Element>::Real> exp2_for(Vec<typename PackedOf<Element>::Real> x) {
  if constexpr (kDepth<Element> == 1) {
    return exp2<Element>(x);
  } else {
    return RoughExp2<Element>(x).power;
  }
}

template <typename Element>
using Packed = typename PackedOf<Element>::Type;  // a vector of elements

template <typename Real>
inline Vec<Real> load_packed(const Real* p) {
  return load(p);
}
template <typename Real>
inline Vec<Real> multiply_add(Real a, Vec<Real> b, Vec<Real> sum) {
  return sum + a * b;
}

inline Words load_packed(const BFloat16Pair* p) {
  return reinterpret_cast<Words>(load(reinterpret_cast<const float*>(p)));
}
inline void store_packed(BFloat16Pair* p, Words x) {
  store<float>(reinterpret_cast<float*>(p), reinterpret_cast<Vec<float>>(x));
}

// Defined where the instructions are; elsewhere nothing calls them.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
Vec<float> multiply_add(BFloat16Pair a, Words b, Vec<float> sum);
// Vectors of each, rounded: the first in the low half of the result.
Words round_both(Vec<float> first, Vec<float> second);
// What round_both gave, as pairs (first, second); or stored in two places.
Words as_pairs(Words halves);
// Of what round_both gave twice, each value of the first with that of the second at its place: the
// pairs of the low halves' values, or of the high halves'.
template <bool kHigh>
Words pairs_of_two(Words first, Words second);
// The pairs of two vectors of weights; what a NaN becomes does not matter, their sum tells of it.
Words pairs_of_weights(Vec<float> first, Vec<float> second);
void store_halves(BFloat16Pair* first, BFloat16Pair* second, Words halves);
#pragma GCC diagnostic pop

#ifdef ATTN_EXT_BFLOAT16_PRODUCTS
inline Vec<float> multiply_add(BFloat16Pair a, Words b, Vec<float> sum) {
  return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a.bits),
                                      (__m512bh)b);
}
inline Words round_both(Vec<float> first, Vec<float> second) {
  return (Words)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}
inline void store_halves(BFloat16Pair* first, BFloat16Pair* second, Words halves) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(first), _mm512_castsi512_si256((__m512i)halves));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(second),
                      _mm512_extracti64x4_epi64((__m512i)halves, 1));
}
inline Words as_pairs(Words halves) {
  typedef uint16_t Shorts __attribute__((vector_size(kVectorBytes)));
  Shorts order;  // 0, 16, 1, 17, ...
  for (int i = 0; i < 2 * kWordLanes; ++i) order[i] = static_cast<uint16_t>(i % 2 * 16 + i / 2);
  return (Words)_mm512_permutexvar_epi16((__m512i)order, (__m512i)halves);
}
template <bool kHigh>
inline Words pairs_of_two(Words first, Words second) {
  typedef uint16_t Shorts __attribute__((vector_size(kVectorBytes)));
  constexpr int kCount = 2 * kWordLanes;
  return reinterpret_cast<Words>(interleave<Shorts, kCount, kHigh>(
      reinterpret_cast<Shorts>(first), reinterpret_cast<Shorts>(second),
      std::make_integer_sequence<int, kCount>{}));
}
#ifdef ATTN_EXT_AMX_PRODUCTS
inline Vec<float> without_low_half(Vec<float> x) {
  return reinterpret_cast<Vec<float>>(reinterpret_cast<Words>(x) & 0xFFFF0000u);
}
// The pairs of what without_low_half leaves.
inline Words pairs_of_high_halves(Vec<float> first, Vec<float> second) {
  const __m512i high_halves = _mm512_set4_epi32(0x0F0E0F0E, 0x0B0A0B0A, 0x07060706, 0x03020302);
  return (Words)_mm512_mask_shuffle_epi8((__m512i)second, 0x3333333333333333u, (__m512i)first,
                                         high_halves);
}
#endif
inline Words pairs_of_weights(Vec<float> first, Vec<float> second) {
#ifdef ATTN_EXT_AMX_PRODUCTS
  // Ties away from 0: a third of the instructions, none of them where vectors are multiplied.
  return pairs_of_high_halves(
      reinterpret_cast<Vec<float>>(reinterpret_cast<Words>(first) + 0x8000),
      reinterpret_cast<Vec<float>>(reinterpret_cast<Words>(second) + 0x8000));
#else
  return as_pairs(round_both(first, second));
#endif
}
#endif
