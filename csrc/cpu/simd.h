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
  return a > b ? a : b;
}

// 2^x = 2^n (1 + f q(f)): n and q are given back, and f. For |x| up to 2^20.
template <typename Real>
inline void split_exp2(Vec<Real> x, Vec<Real>* power, Vec<Real>* f, Vec<Real>* q) {
  using S = Simd<Real>;
  using IntVec = typename VecOf<Real>::IntType;
  const Real magic = S::kRoundToInt + static_cast<Real>(S::kBias);
  const Vec<Real> shifted = x + magic;  // low bits: n + bias
  *power = reinterpret_cast<Vec<Real>>(reinterpret_cast<IntVec>(shifted) << S::kMantissaBits);
  *f = x - (shifted - magic);
  constexpr int kTerms = sizeof(S::kExp2) / sizeof(Real);
  Vec<Real> sum = broadcast(S::kExp2[kTerms - 1]);
#pragma GCC unroll 16
  for (int i = kTerms - 2; i >= 0; --i) sum = sum * *f + S::kExp2[i];
  *q = sum;
}

// Relative error below 2e-9 plus rounding (float), 1e-16 (double). 0 where the result would be
// subnormal; NaN stays NaN.
template <typename Real>
inline Vec<Real> exp2(Vec<Real> x) {
  const Real lowest = static_cast<Real>(1 - Simd<Real>::kBias);
  const Real highest = static_cast<Real>(Simd<Real>::kBias + 1);
  const Vec<Real> clamped = x > highest ? broadcast(highest) : x;
  Vec<Real> power, f, q;
  split_exp2<Real>(clamped, &power, &f, &q);
  return x < lowest ? Vec<Real>{} : (f * q + Real(1)) * power;
}

// tanh through expm1, accurate for small x too: expm1(2x) = (2^n - 1) + 2^n f q(f).
template <typename Real>
inline Vec<Real> tanh(Vec<Real> x) {
  const Real limit = sizeof(Real) == 4 ? Real(10) : Real(20);
  Vec<Real> clamped = x > limit ? broadcast(limit) : x;
  clamped = clamped < -limit ? broadcast(-limit) : clamped;
  Vec<Real> power, f, q;
  split_exp2<Real>(clamped * Real(2.8853900817779268147), &power, &f, &q);
  const Vec<Real> expm1 = power * (f * q) + (power - Real(1));
  return expm1 / (expm1 + Real(2));
}

// --- 32-bit words for Philox

typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint64_t WordPairs __attribute__((vector_size(kVectorBytes)));
constexpr int kWordLanes = kVectorBytes / 4;

// Product of the even 32-bit words with a constant's low word, 64 bits each.
inline WordPairs multiply_even(WordPairs a, uint32_t constant) {
#if defined(__x86_64__) && ATTN_EXT_VECTOR_BYTES == 64
  return (WordPairs)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(constant));
#elif defined(__x86_64__) && ATTN_EXT_VECTOR_BYTES == 32
  return (WordPairs)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(constant));
#elif defined(__x86_64__)
  return (WordPairs)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(constant));
#else
  return (a & 0xFFFFFFFFull) * static_cast<uint64_t>(constant);
#endif
}

inline void multiply_words(Words a, uint32_t constant, Words* high, Words* low) {
  const WordPairs low_half = WordPairs{} + 0xFFFFFFFFull;
  const WordPairs even = multiply_even(reinterpret_cast<WordPairs>(a), constant);
  const WordPairs odd = multiply_even(reinterpret_cast<WordPairs>(a) >> 32, constant);
  *high = reinterpret_cast<Words>((even >> 32) | (odd & ~low_half));
  *low = reinterpret_cast<Words>((even & low_half) | (odd << 32));
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

inline void from_float(float x, float* out) { *out = x; }
inline void from_float(double x, double* out) { *out = x; }
inline void from_float(float x, BFloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = bits + 0x7FFF + ((bits >> 16) & 1);  // to nearest, ties to even
  out->bits = x != x ? 0x7FC0 : static_cast<uint16_t>(rounded >> 16);
}
inline void from_float(float x, Float16* out) {
#if defined(__x86_64__) && ATTN_EXT_VECTOR_BYTES > 16
  out->bits = static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
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
  out->bits = static_cast<uint16_t>(sign | half);
#endif
}

// to[0..n) = from[0..n) in the compute type.
template <typename T, typename Real>
inline void convert_row(const T* from, Real* to, int64_t n) {
  int64_t i = 0;
#if defined(__x86_64__) && ATTN_EXT_VECTOR_BYTES > 16
  if constexpr (std::is_same_v<T, Float16>) {
    for (; i + 8 <= n; i += 8) {
      const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
    }
  }
#endif
  for (; i < n; ++i) to[i] = to_float(from[i]);
}
